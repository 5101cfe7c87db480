"""Table, tensors and model of the step's tests, and the comparison of results."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import Phase
from torch import Tensor

from fastddim import DDIM

TABLE = torch.tensor(DDIM(steps=50, eta=1.0).table)

# No shrinking: examples are small, and interpreted ones are slow.
DRAWN: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "phases": [Phase.generate],
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model(x: Tensor, row: int) -> Tensor:
    """An arbitrary nonlinear function that keeps a trajectory bounded."""
    return torch.tanh(x * 0.7 + 0.3 * torch.sin(x.flip(-1) * 3 + row))


def same(a: Tensor, b: Tensor) -> bool:
    """True if the values are equal, where NaN equals NaN."""
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a[~nan], b[~nan])
