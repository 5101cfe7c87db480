"""Fixtures and arguments that the tests of the command line share."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastddim import DDIM
from fastddim.__main__ import main
from fastddim.tools.pace import Count

GUIDED = Path(__file__).parents[1] / "golden" / "guided-tiny.pt"


QUICK = ("--device", "cpu", "--batch-size", "2")


FEW = (*QUICK, "--steps", "2")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    def run(*arguments: str, status: int = 2) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main(arguments) == status
        out, err = capfd.readouterr()
        assert out == ""
        assert re.fullmatch(r"fastddim: [^\n]+\n", err), err
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return run


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(*_: Any, **__: Any) -> None:
        pytest.fail("sampling began")

    monkeypatch.setattr(DDIM, "sample", sample)


def told(n: int, left: float | None = None, rate: float | None = None) -> Count:
    count = Count(n)
    count.total, count.left, count.rate = 100, left, rate
    return count
