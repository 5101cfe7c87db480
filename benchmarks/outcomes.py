"""A plugin of pytest's that tells of each test as soon as it has ended.

    python -m pytest -p benchmarks.outcomes --outcomes FILE ...

A JUnit report is written at the end only, and a run that is killed leaves none. Each line of FILE
is a JSON object: the test's name, "passed", "failed" or "skipped", and the reason in one line.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.children import Pipe


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", metavar="FILE", help="where each test's outcome is written")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("outcomes")
    # A worker of pytest-xdist reports to the process that started it, which has this plugin too.
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(Pipe(path)))


class Outcomes:
    """Writes what pytest reports of each test: of its fixtures only where these end it."""

    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.tell(report.nodeid, report.outcome, report.longrepr)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported is one failure, in place of its tests."""
        if report.failed:
            self.tell(report.nodeid, "failed", report.longrepr)

    def tell(self, name: str, outcome: str, why: Any) -> None:
        found = {"test": name, "outcome": outcome}
        if outcome != "passed" and why is not None:
            found["why"] = reason(why)
        self.pipe.write(found)


def reason(why: Any) -> str:
    """The line that names the error, of a report's long representation."""
    if isinstance(why, tuple):  # of a skipped test: (file, line, reason)
        return str(why[2])[:200]
    crash = getattr(why, "reprcrash", None)
    lines = [line for line in str(crash.message if crash else why).splitlines() if line.strip()]
    # The first line of an assertion says what failed; the last one of an import error does.
    return (lines[0 if crash else -1] if lines else "")[:200]
