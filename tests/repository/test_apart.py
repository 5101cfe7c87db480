"""One fault is one failure: of a test in a child, and of one that leaves the GPU unusable."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import apart
from tests.apart import run


def passing(x: int, folder: Path) -> None:
    assert x == 3
    (folder / "pid").write_text(str(os.getpid()))


def raising() -> None:
    raise ValueError("this is why")


def asserting(x: int) -> None:
    assert x == 4, "four was asked for"


def warning() -> None:
    warnings.warn("an error in a test", stacklevel=1)


def skipping() -> None:
    pytest.skip("there is no second GPU")


def aborting() -> None:
    print("the last words", flush=True)
    os.abort()


def leaving() -> None:
    os._exit(0)


def hanging() -> None:
    print("still here", flush=True)
    time.sleep(600)


def threads() -> None:
    assert torch.get_num_threads() == 1


def of(name: str, seconds: float = 60.0, **given: object) -> tuple[str, str]:
    return run(__name__, name, given, seconds)


@pytest.mark.slow
def test_a_test_in_a_child_passes_in_another_process(tmp_path: Path) -> None:
    assert of("passing", x=3, folder=tmp_path) == ("passed", "")
    assert int((tmp_path / "pid").read_text()) != os.getpid()
    assert of("threads") == ("passed", "")


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("raising", {}, ["ValueError: this is why", "test_apart.py", "in raising"]),
        pytest.param(
            "asserting",
            {"x": 3},
            ["AssertionError: four was asked for"],
            marks=pytest.mark.slow,
        ),
        ("warning", {}, ["UserWarning: an error in a test"]),
        ("aborting", {}, ["the process of aborting died", "-6", "the last words"]),
        pytest.param("leaving", {}, ["the process of leaving died", "0"], marks=pytest.mark.slow),
    ],
)
def test_a_fault_in_a_child_is_one_failure(
    name: str, given: dict[str, Any], said: list[str]
) -> None:
    outcome, text = of(name, **given)
    assert outcome == "failed"
    assert all(words in text for words in said), text
    # And the next one is not the worse for it.
    assert of("threads") == ("passed", "")


@pytest.mark.slow
def test_a_child_that_hangs_is_ended() -> None:
    start = time.monotonic()
    outcome, text = of("hanging", seconds=1.0)
    assert outcome == "failed"
    assert "hanging took over 1 s" in text
    assert "still here" in text
    assert time.monotonic() - start < 20


def test_a_child_may_skip() -> None:
    assert of("skipping") == ("skipped", "there is no second GPU")


@apart.apart
@pytest.mark.parametrize("x", [3])
def test_the_decorator_hands_over_what_pytest_gives(x: int, tmp_path: Path) -> None:
    passing(x, tmp_path)
    assert multiprocessing_child()


def multiprocessing_child() -> bool:
    import multiprocessing

    return multiprocessing.parent_process() is not None


@pytest.mark.xfail(raises=pytest.fail.Exception, strict=True)
@apart.apart
def test_the_decorator_fails_where_the_child_does() -> None:
    os.abort()
