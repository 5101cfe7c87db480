"""What a failing test leaves behind harms no other, shown on a GPU that is a stand-in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

TORCH = '''
"""As much of PyTorch as is asked for."""
import warnings

class cuda:
    mode, alive, warned = "default", True, False

    @staticmethod
    def is_initialized():
        return True

    @staticmethod
    def synchronize():
        if not cuda.alive:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    @staticmethod
    def set_sync_debug_mode(mode):
        cuda.mode = mode
        if not cuda.warned:
            cuda.warned = True
            warnings.warn("Synchronization debug mode is a prototype feature and does not yet")
'''
CONFTEST = "from tests.faults import pytest_runtest_makereport, waiting_allowed_again"
SETTINGS = "[pytest]\nfilterwarnings = error\nmarkers = gpu: needs a GPU\n"
WAITING = """
import pytest
import torch
from tests.waiting import allow_waiting, forbid_waiting, no_waiting

def test_forbids_and_fails():
    forbid_waiting()
    assert torch.cuda.mode == "error"
    assert False, "in the middle of it"

def test_after():
    assert torch.cuda.mode == "default"

def test_within():
    with pytest.raises(KeyError), no_waiting():
        assert torch.cuda.mode == "error"
        raise KeyError
    assert torch.cuda.mode == "default"
    forbid_waiting()
    allow_waiting()
    assert torch.cuda.mode == "default"

def test_other_warnings_are_errors():
    import warnings
    forbid_waiting()
    with pytest.raises(UserWarning):
        warnings.warn("of something else")
"""
LOST = """
import pytest
import torch

pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("n", range(6))
def test_a_graph(n):
    assert torch.cuda.alive
    if n == 1:
        assert False, "which is nothing but a failure"
    if n == 2:
        torch.cuda.alive = False
        assert False, "an illegal address"
"""


def ran(tmp_path: Path, tests: str, *options: str) -> tuple[dict[str, int], str]:
    """(outcomes, what was printed) of these tests, in a process of their own."""
    files = {"torch.py": TORCH, "conftest.py": CONFTEST, "pytest.ini": SETTINGS}
    for name, text in {**files, "test_it.py": tests}.items():
        (tmp_path / name).write_text(text)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=environment
        | {
            "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
    )
    summary = done.stdout.strip().splitlines()[-1]
    found = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", summary)}
    return found, done.stdout + done.stderr


def test_waiting_is_forbidden_until_the_test_ends(tmp_path: Path) -> None:
    outcomes, printed = ran(tmp_path, WAITING)
    assert outcomes == {"failed": 1, "passed": 3}, printed
    assert "in the middle of it" in printed


def test_a_process_ends_where_its_gpu_is_lost(tmp_path: Path) -> None:
    outcomes, printed = ran(tmp_path, LOST)
    assert outcomes == {"failed": 2, "passed": 1}, printed
    assert "test_it.py::test_a_graph[2] has left the GPU unusable" in printed
    assert "an illegal address" in printed


@pytest.mark.slow
def test_another_worker_takes_the_place_of_one_whose_gpu_is_lost(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    outcomes, printed = ran(tmp_path, LOST, "-p", "xdist", "-n", "1")
    assert outcomes == {"failed": 2, "passed": 4}, printed
    assert "crashed while running 'test_it.py::test_a_graph[2]'" in printed
    assert "an illegal address" in printed


def test_the_mode_is_set_in_one_place() -> None:
    files = [file for folder in ("tests", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    named = {file.name for file in files if "set_sync_debug_mode" in file.read_text()}
    assert named == {"waiting.py", "test_faults.py", "rehearsal.py"}  # the last fakes torch.cuda
