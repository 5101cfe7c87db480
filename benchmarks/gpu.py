"""Runs the GPU tests and every GPU measurement in seven minutes, and keeps one record a GPU.

    benchmarks/gpu.sh                            # the GPU tests, then every measurement
    benchmarks/gpu.sh --seconds 240              # the same in less time
    benchmarks/gpu.sh --sections tests ladder    # only these sections, in a separate record

Sections run in the order of their importance. Each runs in its own process (``gpu_sections.py``)
with a share of the time; the time that a section leaves goes to the later ones. Every row is
printed and written to the record as soon as it is measured. So the record of a run that is cut off
holds all rows measured until then, and names the missing sections. Failing tests do not stop
measurements; the record and the pages name them. This process itself never uses the GPU.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

# tests/kernels/test_gpu.py imports these from here.
from benchmarks.checks import Given as Given
from benchmarks.checks import by_reference as by_reference
from benchmarks.checks import contract_error as contract_error
from benchmarks.checks import kernel_noise as kernel_noise
from benchmarks.children import Child, Deadline
from benchmarks.gpu_sections import DEAD
from benchmarks.records import RESULTS, commit, slug, write
from benchmarks.sections.scale import ELEMENTS, ROUNDS
from benchmarks.testing import Tests
from benchmarks.timing import Record, by, rounded
from benchmarks.variants import VARIANTS

SECONDS = 420.0
CLOSING = 3.0
"""Seconds at the end for killing a late section and writing the record."""
MACHINE = 60.0
"""Seconds in which the GPU must answer; PyTorch loads slowly on a cold machine."""


@dataclass(frozen=True)
class Share:
    """A section's share of the time.

    Attributes:
        seconds: the section's seconds of ``SECONDS``; a shorter run gives proportionally less.
        least: seconds below which the section is not begun, since it could only prepare.
    """

    seconds: float
    least: float


SHARES = {
    "tests": Share(135, 30),
    "variants": Share(55, 15),
    "host": Share(22, 15),
    "graph": Share(16, 8),
    "serving": Share(26, 14),
    "peers": Share(25, 12),
    "loops": Share(42, 15),
    "ladder": Share(49, 20),
    "sanitizer": Share(40, 20),
    "tuning": Share(10, 8),
}
"""The sections, the most important first. On an H200 with cold caches 605 tests took 93 s in ten
processes (some 800 run now, in fifteen), the variants 20, the host 15 (most of them for imports),
the graph 9, the peers 22 and the loops 40. The ladder and the sanitizer used all they got: 110 s
and 76 s. No GPU has run the section "serving" yet."""
RANGES = "[median, low, high]: the true median lies from low to high with 95% probability"


def budget(name: str, later: list[str], left: float) -> float:
    """This section's share of the ``left`` seconds, beside the shares of the ``later`` sections.

    If its share is too short to begin, the last sections get no time.
    """
    others = [SHARES[section].seconds for section in later]
    share = SHARES[name]

    def part() -> float:
        return left * share.seconds / (share.seconds + sum(others))

    while others and part() < share.least:
        others.pop()
    return part()


class Book:
    """The record of a run; its file holds everything known so far at any moment."""

    def __init__(self, record: Record, path: Path, sections: list[str]) -> None:
        self.record, self.path = record, path
        self.sections: dict[str, Record] = {name: {"ended": "not begun"} for name in sections}
        self.wrong: list[str] = []
        self.written = 0.0

    def keep(self) -> None:
        """Rewrites the file atomically."""
        missing = [name for name in SHARES if self.sections.get(name, {}).get("ended") != "done"]
        state = {"complete": not missing, "missing": missing, "sections": self.sections}
        write(self.path, self.record | state)
        self.written = time.monotonic()

    def add(self, key: str, row: Record) -> None:
        """Adds a row to the record, keeps it and prints it."""
        self.record.setdefault(key, []).append(row)
        self.keep()
        print(shown(key, row), flush=True)
        # An error that the sanitizer finds fails the run like a wrong result.
        if "wrong" in row or row.get("errors"):
            self.wrong.append(shown(key, row))


def shown(key: str, row: Record) -> str:
    """A row as one line, with a shape as 64x3x256x256 and an interval as 12.7 (11.1–14)."""

    def cell(name: str, value: Any) -> str:
        if name == "shape":
            return by(value)
        if isinstance(value, list) and len(value) == 3 and not isinstance(value[0], str):
            median, low, high = (f"{v:g}" for v in value)
            return f"{median} ({low}–{high})"
        if isinstance(value, bool):
            return "yes" if value else "NO"
        return f"{value:g}" if isinstance(value, float) else str(value)

    pairs = (f"{name} {cell(name, value)}" for name, value in row.items() if value is not None)
    return f"{key}: {', '.join(pairs)}"


def measured(name: str, deadline: Deadline, options: list[str], book: Book) -> str:
    """Runs a section, adds its rows, and returns how it ended.

    A part that ends its process (by an illegal address or a crash) loses only its own rows: another
    process goes on with the next part.
    """
    begin, failed, left_out = 0, False, False
    while True:
        part: Record | None = None
        rows = 0
        child = section(name, deadline, [*options, "--begin", str(begin)])
        for found in child:
            if "part" in found:
                part, rows = found, 0
                continue
            rows += 1
            failed |= found.get("raised", False)
            left_out |= "left_out" in found["row"]
            book.add(found["key"], found["row"])
        if child.late:
            return "cut off"
        if child.status == 0:
            break
        failed = True
        if part is None:
            return f"failed: its process ended with {child.status}"
        if child.status != DEAD or not rows:
            row = part["label"] | {"failed": f"its process ended with {child.status}"}
            book.add(part["key"], row)
        begin = part["part"] + 1
    return "failed in part" if failed else "out of time" if left_out else "done"


def section(name: str, deadline: Deadline, options: list[str]) -> Child:
    """A section's process: it ends itself before the deadline, or is killed at the deadline."""
    left = deadline.left()
    until = time.monotonic() + max(0.5 * left, 0.9 * left - 2)
    arguments = [name, "--until", str(until), *options]
    return Child(
        lambda path: [
            *(sys.executable, "-m", "benchmarks.gpu_sections", *arguments),
            *("--rows", path),
        ],
        deadline,
    )


def tested(deadline: Deadline, book: Book) -> str:
    """Runs the GPU tests, keeps their outcomes in the record, and returns how the run ended."""
    tests = Tests()
    for found in tests.run(deadline):
        book.record["tests"] = tests.summary()
        if found["outcome"] == "failed":
            print(f"FAILED {found['test']}: {found.get('why', '')}", flush=True)
        # Writing the file after each of several hundred tests would take too long.
        if time.monotonic() - book.written > 1:
            book.keep()
    book.record["tests"] = summary = tests.summary()
    print(
        f"tests: {summary['passed']} passed, {summary['failed']} failed, {summary['skipped']} "
        f"skipped ({summary['ended']})",
        flush=True,
    )
    return "done" if tests.ended == "done" else tests.ended


def described(deadline: Deadline) -> Record | str:
    """The machine's row, or one line that says why nothing can be measured on it."""
    child = section("machine", Deadline(min(MACHINE, deadline.left())), [])
    found: list[Record] = [line["row"] for line in child if "row" in line]
    if not found:
        return f"the GPU did not answer (status {child.status}): nothing was measured"
    reason = found[0].get("unusable") or found[0].get("failed")
    return found[0] if reason is None else str(reason)


def ended(signum: int, _: object) -> None:
    """Exits in place of dying by a signal, so that child processes are killed too."""
    sys.exit(128 + signum)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of the whole run")
    parser.add_argument("--sections", nargs="+", metavar="NAME", choices=list(SHARES),
        default=list(SHARES), help=f"among {', '.join(SHARES)} (default: all)")  # fmt: skip
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    parser.add_argument("--elements", type=int, default=ELEMENTS, help="least size of a state")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of a measurement")
    parser.add_argument("--variants", nargs="+", metavar="NAME", choices=list(VARIANTS),
        default=list(VARIANTS), help="variants to measure (default: all)")  # fmt: skip
    args = parser.parse_args(arguments)
    for name, least in (("elements", ELEMENTS), ("rounds", 6), ("seconds", 30)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    deadline = Deadline(args.seconds - CLOSING)
    signal.signal(signal.SIGTERM, ended)
    machine = described(deadline)
    if isinstance(machine, str):
        print(machine, file=sys.stderr)
        return 2
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)

    chosen = [name for name in SHARES if name in args.sections]
    given = sys.argv[1:] if arguments is None else arguments
    record: Record = machine | {
        "command": " ".join(["benchmarks/gpu.sh", *given]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "seconds": args.seconds,
        "elements": args.elements,
        "rounds": args.rounds,
        "ranges": RANGES,
        "tests": Tests().summary(),
    }
    if record["commit"] == "unknown":  # a copy of the tree without its git history
        record["commit"] = os.environ.get("COMMIT", "unknown")
    part = "" if len(chosen) == len(SHARES) else f"-{'-'.join(chosen)}"
    book = Book(record, args.results / f"{slug(machine['gpu'])}{part}.json", chosen)
    sizes = ["--elements", str(args.elements), "--rounds", str(args.rounds)]
    options = [*sizes, "--variants", *args.variants]
    for name, later in after(chosen):
        state, begin = book.sections[name], time.monotonic()
        left = deadline.left()
        seconds = budget(name, later, left)
        if seconds < SHARES[name].least:
            state["ended"] = "no time"
            continue
        state |= {"budget": rounded(seconds), "ended": "cut off"}
        book.keep()
        print(f"\n{name} ({seconds:.0f} s at most)", flush=True)
        limit = Deadline(seconds)
        if name == "tests":
            state["ended"] = tested(limit, book)
        else:
            state["ended"] = measured(name, limit, options, book)
        state["seconds"] = rounded(time.monotonic() - begin)
        print(f"{name}: {state['ended']} after {state['seconds']:g} s", flush=True)
        book.keep()
    book.keep()
    return concluded(book)


def after(names: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yields each name with the names that come after it."""
    for k, name in enumerate(names):
        yield name, names[k + 1 :]


def concluded(book: Book) -> int:
    """Prints the failures and the incomplete sections, and returns the exit status."""
    tests = book.record["tests"]
    bad = list(book.wrong)
    if "tests" in book.sections:
        bad += [f"tests: {found['test']} failed: {found['why']}" for found in tests["failures"]]
        if tests["ended"] != "done" or not tests["passed"]:
            bad.append(f"tests: {tests['ended']}, {tests['passed']} passed")
    endings = {name: state["ended"] for name, state in book.sections.items()}
    bad += [f"{name}: {how}" for name, how in endings.items() if how.startswith("failed")]
    print()
    for line in bad:
        print(f"BAD: {line}", file=sys.stderr)
    rest = [f"{name} ({how})" for name, how in endings.items() if how != "done"]
    if rest:
        print(f"not complete: {', '.join(rest)}")
    print(book.path)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
