"""Keeps a failing GPU test from failing the tests after it."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def waiting_allowed_again() -> Iterator[None]:
    """Allows waiting for the GPU again, even after a test that forbade it has failed."""
    yield
    waiting = sys.modules.get("tests.waiting")
    if waiting is not None:
        waiting.allow_waiting()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Ends a process whose GPU is unusable, since every later test in it would fail.

    pytest-xdist replaces a worker that dies, and reports the test that was running as failed. So
    the worker prints its report and dies before sending it, or the test would be reported twice.
    Without pytest-xdist the run stops here.
    """
    report = yield
    if report.failed and item.get_closest_marker("gpu") and _gpu_is_lost():
        if "PYTEST_XDIST_WORKER" in os.environ:
            capture: Any = item.config.pluginmanager.getplugin("capturemanager")
            with capture.global_and_fixture_disabled():
                print(f"{item.nodeid}\n{report.longreprtext}", file=sys.stderr, flush=True)
            os._exit(1)
        item.session.shouldfail = f"{item.nodeid} has left the GPU unusable"
    return report


def _gpu_is_lost() -> bool:
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
