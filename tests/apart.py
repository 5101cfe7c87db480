"""Tests that run in a process of their own, so that one fault is one failure.

    @pytest.mark.gpu
    @apart
    @pytest.mark.parametrize("steps", [7, 102])
    def test_a_replay(steps: int) -> None: ...

A graph that reads memory which is not its own ends the use of the GPU for its whole process: every
later test would fail as well. A child that fails, dies or hangs is one test that fails.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, TypeVar

import pytest

Test = TypeVar("Test", bound=Callable[..., None])
SECONDS = 120.0
"""What a test may take with cold caches; most take two."""
PRELOADED = ["torch", "triton", "fastddim", "fastddim_kernels", "tests.apart"]


def apart(test: Test) -> Test:
    """The test in a child process. It is a function of a module, and can pickle its arguments."""

    @functools.wraps(test)
    def in_a_child(**given: Any) -> None:
        __tracebackhide__ = True
        outcome, text = run(test.__module__, test.__qualname__, given, SECONDS)
        if outcome == "skipped":
            pytest.skip(text)
        if outcome != "passed":
            pytest.fail(text, pytrace=False)

    return in_a_child  # type: ignore[return-value]


def run(module: str, name: str, given: dict[str, Any], seconds: float) -> tuple[str, str]:
    """(passed, skipped or failed, what there is to say) of this test in a child."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said"
        parent, child = _context().Pipe(duplex=False)
        process = _context().Process(
            target=_run, args=(child, module, name, given, str(said)), daemon=True
        )
        process.start()
        child.close()
        # Its death is noticed too, for something of its own may hold the pipe open.
        if not wait([parent, process.sentinel], seconds):
            outcome, text = "failed", f"{name} took over {seconds:g} s"
        elif (report := _report(parent)) is not None:
            outcome, text = report
        else:
            process.join(10)
            outcome, text = "failed", f"the process of {name} died: exit code {process.exitcode}"
        process.join(1)
        process.kill()  # What it does after its report is of no interest.
        process.join()
        printed = said.read_text(errors="replace")[-4000:] if said.exists() else ""
    return outcome, f"{text}\n{printed}".strip()


def _report(parent: Connection) -> tuple[str, str] | None:
    """What the child has sent before its end."""
    try:
        return parent.recv() if parent.poll() else None
    except EOFError:
        return None


def _run(child: Connection, module: str, name: str, given: dict[str, Any], said: str) -> None:
    """The child: it runs the test and reports."""
    out = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)  # CUDA's own messages, such as an assertion's, do not pass by Python.
    os.dup2(out, 2)
    try:
        test = inspect.unwrap(getattr(importlib.import_module(module), name))
        import torch

        torch.set_num_threads(1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            test(**given)
        report = "passed", ""
    except pytest.skip.Exception as skipped:
        report = "skipped", str(skipped)
    except BaseException:
        report = "failed", traceback.format_exc()
    child.send(report)
    child.close()
    sys.stdout.flush()
    os._exit(0)  # Where CUDA has failed, the end of the interpreter may hang or abort.


@functools.cache
def _context() -> ForkServerContext:
    """Children are forked from a server that has imported what they need and never touched CUDA."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with _path_inherited():
        forkserver.ensure_running()
    return context


@contextmanager
def _path_inherited() -> Iterator[None]:
    """Up to Python 3.12.3 the server does not know its parent's sys.path."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
