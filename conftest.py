"""Adds ``pytest --benchmark``, which runs the benchmarks; without it pytest runs only tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastddim")
    group.addoption(
        "--benchmark",
        action="store_true",
        help="run benchmarks/bench_*.py, and no test (needs pytest-benchmark)",
    )
    group.addoption(
        "--level",
        choices=("quick", "full"),
        default="quick",
        help="quick: under three minutes on two cores; full: the level of kept results",
    )
    group.addoption(
        "--results",
        type=Path,
        metavar="DIR",
        help="keep a whole run of the benchmarks as a section of DIR/<machine>.json "
        "(--results=DIR where DIR is outside the repository: pytest would look for tests there)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("benchmark"):
        return
    if not config.pluginmanager.has_plugin("benchmark"):
        raise pytest.UsageError(
            "--benchmark needs pytest-benchmark, which is not installed: "
            'pip install -e ".[test]" brings it'
        )
    os.environ.pop("TRITON_INTERPRET", None)  # with it the kernels would be interpreted
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(config.rootpath / "benchmarks")]


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """One process a core for the whole suite, and none beside this one for files named or timed."""
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    return 0 if named or config.getoption("benchmark") else None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Ignores the tests with ``--benchmark``, and the benchmarks without it."""
    if collection_path.is_dir() or collection_path.name == "__init__.py":
        return None
    return _ignored(collection_path, config) or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuses paths on the command line that pytest collects although they are ignored."""
    ignored = [item for item in items if _ignored(item.path, config)]
    if ignored:
        only = "runs no tests" if config.getoption("benchmark") else "alone runs benchmarks"
        raise pytest.UsageError(f"--benchmark {only}, got {ignored[0].nodeid}")


def _ignored(path: Path, config: pytest.Config) -> bool:
    return path.name.startswith("bench_") != bool(config.getoption("benchmark"))
