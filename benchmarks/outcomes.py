"""A pytest plugin that writes the outcome of each test as soon as the test ends.

    python -m pytest -p benchmarks.outcomes --outcomes FILE ...

pytest writes a JUnit report only at the end, and none when it is killed. Each line of FILE is a
JSON object: the test's name, "passed", "failed" or "skipped", and the reason in one line.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.children import Pipe


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", metavar="FILE", help="file to write each test's outcome to")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("outcomes")
    # A pytest-xdist worker reports to its parent, which has this plugin too.
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(Pipe(path)))


class Outcomes:
    """Writes the report of each test's call, and of its setup and teardown unless they pass."""

    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.write(report.nodeid, report.outcome, report.longrepr)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Reports a file that cannot be imported as one failure in place of its tests."""
        if report.failed:
            self.write(report.nodeid, "failed", report.longrepr)

    def write(self, name: str, outcome: str, why: Any) -> None:
        found = {"test": name, "outcome": outcome}
        if outcome != "passed" and why is not None:
            found["why"] = reason(why)
        self.pipe.write(found)


def reason(why: Any) -> str:
    """The line of a report's long representation that names the error."""
    if isinstance(why, tuple):  # a skipped test's (file, line, reason)
        return str(why[2])[:200]
    crash = getattr(why, "reprcrash", None)
    lines = [line for line in str(crash.message if crash else why).splitlines() if line.strip()]
    if lines and lines[0].endswith("Traceback (most recent call last):"):
        # A test in a process of its own fails with the child's traceback, whose first line without
        # an indent names the error.
        return next((line for line in lines[1:] if not line[0].isspace()), lines[0])[:200]
    # An assertion names the error in its first line, an import error in its last.
    return (lines[0 if crash else -1] if lines else "")[:200]
