"""Folders of images that several test files make, and their content."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastddim
from fastddim import DDIM
from fastddim.tools.folder import Folder
from fastddim.tools.quality import Gaussian

MODULE = importlib.import_module("fastddim.tools.shards")


SHAPE = (3, 4, 6)


MODEL = Gaussian(0.0, 0.5)


LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MODULE, "_end_with_parent", lambda: None)
    for name in os.environ:
        if name in LAUNCHERS or name.startswith("SLURM_"):
            monkeypatch.delenv(name)


def make(out: Path, *, ddim: DDIM | None = None, n: int = 53, **changes: Any) -> bool:
    """53 images in shards of 10 and batches of 4, which divide nothing."""
    options = {"batch_size": 4, "shard_size": 10, "seeds": range(n), "shape": SHAPE, **changes}
    model = options.pop("model", MODEL)
    return fastddim.generate(ddim or DDIM(3, eta=1.0), model, out=out, **options)


def content(out: Path) -> dict[str, bytes]:
    files = (file for file in out.rglob("*") if file.is_file())
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def pixels(out: Path) -> Tensor:
    folder = Folder.read(out)
    return torch.cat([folder.pictures(k) for k in range(len(folder))])


class Killed(BaseException):
    """As SIGKILL: nothing may be tidied up after it."""


def spoilt(x: Tensor, t: Tensor) -> Tensor:
    """ε of N(0, 0.5²), but for samples whose first element is above 1 at the start: NaN, ±inf."""
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf])[(x.flatten(1)[:, 1] * 8).long() % 3]
    where = (t == 999) & (x.flatten(1)[:, 0] > 1)
    return torch.where(where.view(-1, 1, 1, 1), odd.view(-1, 1, 1, 1), MODEL(x, t))


FEW = ("--steps", "2", "--batch-size", "4", "--shard-size", "8", "--device", "cpu")
