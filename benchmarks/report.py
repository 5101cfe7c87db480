"""Writes the tables of benchmarks/README.md and README.md from ``benchmarks/results``.

    python -m benchmarks.report            # rewrites the pages that differ
    python -m benchmarks.report --check    # writes nothing, and fails where a page differs

This module generates the text between ``<!-- report: NAME -->`` and ``<!-- end -->``. The rest of a
page is written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import codegen, gpu_report, host
from benchmarks.markdown import duration, grid, met, percent, span
from benchmarks.peers import PEERS
from benchmarks.records import RESULTS
from benchmarks.timing import Record, by

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "benchmarks" / "README.md", ROOT / "README.md")
BLOCK = re.compile(r"(<!-- report: (\w+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
NONE = "Not yet measured."
LARGE = [64, 3, 256, 256]
OURS = ("scheduler", "pytorch", "numba", "triton")
THEIRS = ("original", "diffusers", "plain", "tensors", "compile")
ORIGINAL = "original loop"


@dataclass(frozen=True)
class Results:
    """The records of a folder: those of machines, and those that no machine affects."""

    machines: list[Record]
    gpus: list[Record]
    counts: Record
    codegen: list[Record]

    @classmethod
    def of(cls, folder: Path) -> Results:
        found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        code, counts = found.pop("codegen"), found.pop("counts")
        machines = [r for r in found.values() if "machine" in r]
        return cls(machines, [r for r in found.values() if "gpu" in r], counts, code)

    def sections(self, name: str) -> list[tuple[Record, Record]]:
        """(machine, section) of every machine that has this section."""
        return [(m, m[name]) for m in self.machines if name in m]


# Titles and origins


def title(loop: str) -> str:
    """A loop's name; a call is formatted as code."""
    return PEERS["original"].title if loop == ORIGINAL else f"`{loop}`" if "(" in loop else loop


def made(machine: Record, section: Record) -> str:
    """Machine, versions, date, commit and command of a section."""
    of = ", ".join(f"{name} {number}" for name, number in section["versions"].items())
    return (
        f"{machine['machine']}, {section['threads']} threads, {of}; {section['date']}, commit "
        f"{section['commit']}: `{section['command']}`"
    )


def each(results: Results, name: str, show: Callable[[Record], str]) -> str:
    """The section of every machine, each below its origin."""
    shown = [f"{made(m, s)}\n\n{show(s)}" for m, s in results.sections(name)]
    return "\n\n".join(shown) or NONE


# The tables


def counts(results: Results) -> str:
    rows = results.counts["rows"]
    names = ("operations", "passes", "bytes_per_element", "transfers", "host_syncs")
    lines = [
        ["", "operations", "passes over memory", "bytes an element", "transfers", "host syncs"]
    ]
    for loop in dict.fromkeys(row["loop"] for row in rows):
        both = [row for row in rows if row["loop"] == loop]
        values = [dict.fromkeys(str(row[name]) for row in both) for name in names]
        lines.append([title(loop), *(" / ".join(v) for v in values)])
    return grid(*lines)


def steps(section: Record) -> str:
    rows = section["rows"]
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in rows))
    parts = []
    for eta in dict.fromkeys(row["eta"] for row in rows):
        cells = {(r["peer"], tuple(r["shape"])): step_cell(r) for r in rows if r["eta"] == eta}
        peers = dict.fromkeys(peer for peer, _ in cells)
        lines = [[f"η = {eta}", *map(by, shapes)]]
        lines += [[PEERS[p].title, *(cells.get((p, s), "") for s in shapes)] for p in peers]
        parts.append(grid(*lines))
    large = [row for row in rows if row["shape"] == LARGE and "missing" not in row]
    lines = [[by(LARGE), "η", "noise", "bytes an element", "GB/s", "of a copy's speed"]]
    for row in large:
        of = [PEERS[row["peer"]].title, str(row["eta"]), row["noise"]]
        numbers = [str(row["bytes_per_element"]), f"{row['gb_per_s']:.3g}"]
        lines.append([*of, *numbers, percent(row["of_copy"])])
    compiling = [row for row in rows if "compile_seconds" in row]
    if compiling:
        parts.append(compiled(compiling))
    return "\n\n".join([*parts, grid(*lines)])


def compiled(rows: list[Record]) -> str:
    """The loops that torch.compile compiles, and the seconds until their first result."""
    lines = [["compiled loop", "shape", "η", "a step", "compiled in"]]
    for row in rows:
        of = [PEERS[row["peer"]].title, by(row["shape"]), str(row["eta"])]
        lines.append([*of, step_cell(row), f"{row['compile_seconds']:.3g} s"])
    return grid(*lines)


def step_cell(row: Record) -> str:
    if "missing" in row:
        return str(row["missing"])
    return f"{duration(row['us_per_step'][0])}, {span(row['times_original'])}"


def losses(section: Record) -> str:
    """The rows in which another step is faster than ours, by the median."""
    lines = []
    for row in section["rows"]:
        for base in THEIRS:
            median, low, high = row.get(f"times_{base}", (1, 1, 1))
            if row["peer"] in OURS and median < 1:
                lines.append(
                    f"- {PEERS[row['peer']].title} at {by(row['shape'])}, η = {row['eta']}: "
                    f"{1 / median:.3g} times as long ({1 / high:.3g}–{1 / low:.3g}) as "
                    f"{PEERS[base].title}"
                )
    return "\n".join(lines) or "No other step is faster in any of these tables."


def whole(section: Record) -> str:
    lines = [["", "ms a call", "outside the model", "µs a step", "DDIMPipeline / it"]]
    for row in section["rows"]:
        case = f"{row['model']}, {row['shape'][0]} images, {row['steps']} steps"
        about = f"{case}: {title(row['loop'])}"
        outside = f"{row['outside_us_per_step'][0]:.3g}"
        numbers = [f"{row['ms'][0]:.4g}", percent(row["outside"]), outside]
        lines.append([about, *numbers, span(row["times_pipeline"])])
    return grid(*lines)


def writing(section: Record) -> str:
    lines = [["", "images", "seconds", "outside the sampler", "µs an image"]]
    for row in section["rows"]:
        numbers = [str(row["images"]), f"{row['seconds']:.3g}", f"{row['outside']:.2%}"]
        lines.append([row["format"], *numbers, f"{row['us_an_image']:.3g}"])
    peaks = (f"{row['peak_mib']:.0f} MiB with {row['images']:,}" for row in section["memory"])
    return f"{grid(*lines)}\n\nPeak memory of a process: {', '.join(peaks)} images."


def loops(section: Record, show: Callable[[list[float]], str] = span) -> str:
    """A row for each loop, and a column for each η, without numba and with it."""
    rows = {(row["loop"], row["eta"]): row for row in section["rows"]}
    etas = sorted({eta for _, eta in rows})
    columns = [(ways, eta) for ways in (("", ", PyTorch"), (", numba",)) for eta in etas]
    lines = [["ms a step", *(f"η = {e:g}{', numba' * (', numba' in w)}" for w, e in columns)]]
    for name in dict.fromkeys(re.sub(", (PyTorch|numba)$", "", loop) for loop, _ in rows):
        found = [[rows.get((name + way, eta)) for way in ways] for ways, eta in columns]
        cells = [next((loop_cell(r, show) for r in some if r), "") for some in found]
        lines.append([title(name), *cells])
    return grid(*lines)


def loop_cell(row: Record, show: Callable[[list[float]], str]) -> str:
    ratio = "" if row["loop"] == ORIGINAL else f", {show(row['times_original'])}"
    return f"{row['ms_per_step'][0]:.3g}{ratio}"


def cost(results: Results) -> str:
    """The README's table, from the latest section "loop"."""
    found = sorted(results.sections("loop"), key=lambda pair: pair[1]["date"])
    if not found:
        return NONE
    machine, section = found[-1]
    return (
        f"{loops(section, lambda ratio: f'{ratio[0]:.3g}×')}\n\n{by(section['shape'])} float32, "
        f"medians of {section['repeats']} interleaved runs of {section['steps']} steps, beside the "
        f"ratios to the original loop. {made(machine, section)}."
    )


@dataclass(frozen=True)
class Figure:
    """A required speed: (time of ``base``) / (time of ``peer``) must be at least ``least``."""

    peer: str
    base: str
    eta: int
    least: float
    shape: list[int] | None = None

    def shown(self, rows: list[Record]) -> list[str] | None:
        """The table row of the shape with the worst ratio, or None if it was not measured."""
        key = f"times_{self.base}"
        found = [
            row
            for row in rows
            if (row["peer"], row["eta"]) == (self.peer, self.eta)
            and key in row
            and self.shape in (None, row["shape"])
        ]
        if not found:
            return None
        row = min(found, key=lambda row: (row[key][2] >= self.least, row[key][0]))
        who = f"{PEERS[self.peer].title}, η = {self.eta}, against {PEERS[self.base].title}"
        where = f"any shape, here {by(row['shape'])}" if self.shape is None else by(self.shape)
        return [who, where, f"≥ {self.least:g}×", span(row[key]), met(row[key], self.least)]


FIGURES = (
    Figure("pytorch", "original", 0, 8, LARGE),
    Figure("pytorch", "original", 1, 3, LARGE),
    Figure("numba", "original", 0, 15, LARGE),
    Figure("numba", "original", 1, 6, LARGE),
    Figure("pytorch", "diffusers", 0, 4, LARGE),
    Figure("numba", "diffusers", 0, 4, LARGE),
    Figure("scheduler", "diffusers", 0, 4, LARGE),
    *(
        Figure(peer, "plain", eta, 1)
        for peer in ("scheduler", "pytorch", "numba")
        for eta in (0, 1)
    ),
    Figure("numba", "compile", 0, 1),
    Figure("numba", "compile", 1, 1),
)


def figures(section: Record) -> str:
    shown = [figure.shown(section["rows"]) for figure in FIGURES]
    return grid(["", "shape", "required", "measured", "met"], *(line for line in shown if line))


CALLS = (6, 8, 10, 16, 20, 50)


def calls(section: Record) -> str:
    """The FD-clf of each number of model calls, for DDIM, order 2 and tuned timesteps."""
    found = {row["sampler"]: row["fd_clf"] for row in section["rows"]}
    kinds = {
        "DDIM": "order 1",
        "order 2, `mixed`": "order 2 mixed",
        "order 2, tuned": "order 2 tuned",
    }

    def cell(S: int, kind: str) -> str:
        value = found.get(f"{S} {kind}")
        return "" if value is None else f"{value:.2f}"

    lines = [[name, *(cell(S, kind) for S in CALLS)] for name, kind in kinds.items()]
    return grid(["model calls an image", *map(str, CALLS)], *lines)


def ratios(section: Record) -> str:
    """The FD-clf of each sampler beside another's, and every sampler's FD-clf."""
    found = {row["sampler"]: row["fd_clf"] for row in section["rows"]}
    compared = [
        [row["sampler"], row["beside"], span(row["ratio"], unit="")] for row in section["ratios"]
    ]
    mean, spread = section["real"]
    heads = grid(["sampler", "beside", "ratio of FD-clf"], *compared)
    every = grid(["sampler", "FD-clf"], *([name, f"{v:.3g}"] for name, v in found.items()))
    return (
        f"Seeds {section['seeds']}; as many real garments have {mean:.3g} ± {spread:.2g}.\n\n"
        f"{heads}\n\n{every}"
    )


def machine_code(results: Results) -> str:
    rows = results.codegen
    return codegen.table([row for row in rows if row["arch"] == "90"])


def gpu(results: Results) -> str:
    """The tables of every GPU's record."""
    return "\n\n".join(map(gpu_report.tables, results.gpus)) or gpu_report.NOT_YET


BLOCKS: dict[str, Callable[[Results], str]] = {
    "counts": counts,
    "figures": lambda results: each(results, "step", figures),
    "steps": lambda results: each(results, "step", steps),
    "losses": lambda results: each(results, "step", losses),
    "whole": lambda results: each(results, "whole", whole),
    "loop": lambda results: each(results, "loop", loops),
    "busy": lambda results: each(results, "loop-busy", loops),
    "host": lambda results: each(results, "host", host.shown),
    "writing": lambda results: each(results, "writing", writing),
    "cost": cost,
    "calls": lambda results: "\n\n".join(calls(s) for _, s in results.sections("calls")) or NONE,
    "ratios": lambda results: each(results, "calls", ratios),
    "codegen": machine_code,
    "spans": lambda results: codegen.spans(results.codegen),
    "gpu": gpu,
    "gpus": lambda results: gpu_report.summary(results.gpus),
}


def rendered(page: str, results: Results) -> str:
    """The page with its blocks generated from the results."""

    def block(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        if name not in BLOCKS:
            raise SystemExit(f"report must be one of {', '.join(BLOCKS)}, got {name!r}")
        return f"{begin}{BLOCKS[name](results)}\n{end}"

    return BLOCK.sub(block, page)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="only compare; exit with 1 if a page differs"
    )
    check, results, stale = parser.parse_args(arguments).check, Results.of(RESULTS), []
    for path in PAGES:
        page = path.read_text()
        again = rendered(page, results)
        if again != page:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(again)
    if check and stale:
        print(
            f"{' and '.join(stale)} must match benchmarks/results: run python -m benchmarks.report"
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
