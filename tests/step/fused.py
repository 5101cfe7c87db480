"""The fused pass, and tensors that its tests share."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from fastddim import DDIM
from tests import paths
from tests.processes import ran

numba = pytest.importorskip("numba", reason="the fused pass needs the cpu extra: numba")
from fastddim.step import on_numba  # noqa: E402

step = partial(paths.step, on_numba.BACKEND)


TABLE = torch.tensor(DDIM(steps=50, eta=1.0).table)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows_of(batch: int, rows: int | list[int]) -> Tensor:
    """int32 (batch,), with a stride of 0 for a row that all samples share."""
    return torch.tensor(rows, dtype=torch.int32).expand(batch)


def run(code: str, numba: bool = True) -> str:
    done = ran(code, numba=numba)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
