"""Runs the GPU tests, so that a record holds their outcomes beside its figures."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec

from benchmarks.children import ROOT, Child, Deadline
from benchmarks.timing import Record

WORKERS = 15
"""Greatest number of parallel test processes, which mostly compile kernels. Each holds about half a
GiB of the GPU's memory."""
WORST = ("passed", "skipped", "failed")
"""Outcomes from the best to the worst."""


def files() -> list[str]:
    """The files with GPU tests; others may import packages that a GPU's machine lacks."""
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in found if "mark.gpu" in path.read_text()]


def workers() -> int:
    """Number of test processes; one core is left to the process that distributes the tests."""
    return max(1, min(WORKERS, len(os.sched_getaffinity(0)) - 1))


def beside_one_another() -> list[str]:
    """pytest's options for parallel processes, if pytest-xdist is installed.

    pytest-benchmark warns when it runs beside pytest-xdist, and warnings are errors here.
    """
    if find_spec("xdist") is None:
        return []
    off = ["-p", "no:benchmark"] if find_spec("pytest_benchmark") else []
    return ["-n", str(workers()), *off]


def pytest(path: str, *arguments: str) -> list[str]:
    """The command that runs GPU tests and writes each outcome to ``path``."""
    return [
        *(sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"),
        # A file that cannot be imported must not stop the tests of other files.
        *("--continue-on-collection-errors", "--tb=short"),
        *("-p", "benchmarks.outcomes", "--outcomes", path),
        *arguments,
    ]


class Tests:
    """The tests that have ended so far: the worst outcome of each, and the reason."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.ended: str = "not run"

    def add(self, found: Record) -> None:
        """Adds a report of a test's setup, call or teardown, of which the worst outcome counts."""
        name, outcome = found["test"], found["outcome"]
        before = self.outcomes.get(name, "passed")
        if WORST.index(outcome) >= WORST.index(before):
            self.outcomes[name] = outcome
            if outcome != "passed":
                self.reasons[name] = found.get("why", "")

    def summary(self) -> Record:
        """The record's entry: numbers of tests by outcome, and each failure with its reason."""
        counts = {outcome: list(self.outcomes.values()).count(outcome) for outcome in WORST}
        failures = [name for name, outcome in self.outcomes.items() if outcome == "failed"]
        return counts | {
            "ended": self.ended,
            "failures": [{"test": name, "why": self.reasons[name]} for name in sorted(failures)],
        }

    @property
    def good(self) -> bool:
        counts = self.summary()
        return self.ended == "done" and bool(counts["passed"]) and not counts["failed"]

    def run(self, deadline: Deadline) -> Iterator[Record]:
        """Runs all GPU tests and yields each outcome as soon as it is known."""
        child = Child(lambda path: pytest(path, *beside_one_another(), *files()), deadline)
        self.ended = "cut off"
        for found in child:
            self.add(found)
            yield found
        # pytest exits with 1 where tests failed; their outcomes already record that.
        self.ended = "done" if child.status in (0, 1) and not child.late else "cut off"
        if not child.late and child.status not in (0, 1):
            self.ended = f"pytest exited with {child.status}"
