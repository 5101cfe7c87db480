"""Steps on a GPU, and their comparison with the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import Given
from benchmarks.variants import VARIANTS, step_arguments
from fastddim import DDIM

DEVICE = "cuda"


LARGE = 1 << 20
"""Elements from which on the launcher gives a program several parts."""


def arguments(name: str, size: str = "odd", seed: int = 0) -> Given:
    """A batch of this variant, large or small, of what ``fastddim.ddim_step`` takes."""
    v = VARIANTS[name]
    if size == "odd":
        return step_arguments(v, 3, DEVICE, shape=(v.shape[0], 5, 7), seed=seed)
    return step_arguments(v, LARGE // math.prod(v.shape) + 1, DEVICE, seed=seed)


def plain(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, row: int = 20, **more: Any
) -> Given:
    """A step of an ε model on contiguous tensors, all samples on one row."""
    g = torch.Generator(DEVICE).manual_seed(0)
    x, output = (torch.randn(shape, generator=g, device=DEVICE) for _ in range(2))
    rows = on_row(row, shape[0])
    return {"x": x, "output": output.to(dtype), "table": factors(), "rows": rows, **more}


def factors(eta: float = 1.0, order: int = 1) -> Tensor:
    return torch.tensor(DDIM(steps=50, eta=eta, order=order).table, device=DEVICE)


def on_row(row: int, batch: int) -> Tensor:
    return torch.full((), row, dtype=torch.int32, device=DEVICE).expand(batch)


def last(tensor: Tensor) -> Tensor:
    """The same values, channels last, a single channel's strides included."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def moved(
    given: Given, to: Callable[[Tensor], Tensor], names: tuple[str, ...] = ("x", "output")
) -> Given:
    """These of the step's tensors somewhere else, the others as they are."""
    return {name: to(value) if name in names else value for name, value in given.items()}


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in value, NaN being equal to NaN."""
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a[~nan], b[~nan])
