"""The plain loop: DDIM in six lines of PyTorch with precomputed factors, a peer without a library.

This module imports only PyTorch, so that the loop can be timed beside any version of fastddim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

NUMBERS = "a plain loop, factors precomputed"
TENSORS = "a plain loop, factors precomputed as tensors"
Row: TypeAlias = Sequence[Any]
"""√ᾱ_t, 1/√ᾱ_t, √(1−ᾱ_t), 1/√(1−ᾱ_t), √ᾱ_s, c1, c2: a row of a coefficient table."""


def numbers(table: Tensor) -> list[Row]:
    """The rows' factors as Python floats. A GPU divides by a float through its reciprocal."""
    found: list[Row] = table.tolist()
    return found


def tensors(table: Tensor) -> list[Row]:
    """The rows' factors as zero-dimensional tensors, with which a CPU multiplies faster."""
    return [row.unbind() for row in table]


@torch.no_grad()
def plain(
    model: Callable[[Tensor, Any], Tensor],
    x: Tensor,
    rows: Iterable[Row],
    noisy: Iterable[bool],
    ts: Iterable[Any],
    generator: torch.Generator | None = None,
) -> Tensor:
    """Runs the loop and returns the last x; rows for which ``noisy`` is true add noise."""
    for (a, _, b, _, a_s, c1, c2), draw, t in zip(rows, noisy, ts, strict=True):
        eps = model(x, t)
        x0 = (x - eps * b) / a
        x = a_s * x0
        if draw:
            x = x + c1 * torch.randn(x.shape, generator=generator, device=x.device)
        x = x + c2 * eps
    return x
