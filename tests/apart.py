"""Runs a test in its own process, so that one fault is one failure.

    @pytest.mark.gpu
    @apart
    @pytest.mark.parametrize("steps", [7, 102])
    def test_a_replay(steps: int) -> None: ...

A graph that reads foreign memory makes the GPU unusable for its whole process, so every later test
would fail too. A child process that fails, dies or hangs is one failing test.
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
"""Time limit of a test with cold caches; most tests take two seconds."""
PRELOADED = ["torch", "triton", "fastddim", "fastddim_kernels", "tests.apart"]


def apart(test: Test) -> Test:
    """Decorates a module-level test with picklable arguments to run in a child process."""

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
    """Runs the test in a child; returns ("passed", "skipped" or "failed", its text)."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        parent, child = _context().Pipe(duplex=False)
        process = _context().Process(
            target=_run, args=(child, module, name, given, str(log)), daemon=True
        )
        process.start()
        child.close()
        # Wait for its death too: a grandchild may hold the pipe open.
        if not wait([parent, process.sentinel], seconds):
            outcome, text = "failed", f"{name} took over {seconds:g} s"
        elif (report := _report(parent)) is not None:
            outcome, text = report
        else:
            process.join(10)
            outcome, text = "failed", f"the process of {name} died: exit code {process.exitcode}"
        process.join(1)
        process.kill()  # After the report its work does not matter.
        process.join()
        printed = log.read_text(errors="replace")[-4000:] if log.exists() else ""
    return outcome, f"{text}\n{printed}".strip()


def _report(parent: Connection) -> tuple[str, str] | None:
    """The child's report, or None if it ended without one."""
    try:
        return parent.recv() if parent.poll() else None
    except EOFError:
        return None


def _run(child: Connection, module: str, name: str, given: dict[str, Any], log: str) -> None:
    """The child's main function: runs the test and sends its report."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)  # CUDA writes messages, such as a failed assertion's, without Python.
    os.dup2(out, 2)
    try:
        test = inspect.unwrap(getattr(importlib.import_module(module), name))
        import torch

        torch.set_num_threads(1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # torch.compile's own imports warn of torch.jit.
            warnings.filterwarnings("ignore", ".*torch.jit", DeprecationWarning)
            test(**given)
        report = "passed", ""
    except pytest.skip.Exception as skipped:
        report = "skipped", str(skipped)
    except BaseException:
        report = "failed", traceback.format_exc()
    child.send(report)
    child.close()
    sys.stdout.flush()
    os._exit(0)  # After a CUDA failure the interpreter's shutdown may hang or abort.


@functools.cache
def _context() -> ForkServerContext:
    """Forks children from a server that has imported ``PRELOADED`` and never initialised CUDA."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with _path_inherited():
        forkserver.ensure_running()
    return context


@contextmanager
def _path_inherited() -> Iterator[None]:
    """Sets PYTHONPATH to sys.path, which the server does not inherit up to Python 3.12.3."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
