"""The loop that is written in six lines once its factors are made: the peer that costs nothing.

It imports PyTorch alone, so that it can be timed beside any version of fastddim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

NUMBERS = "a plain loop, factors made before"
TENSORS = "a plain loop, factors made before as tensors"
Row: TypeAlias = Sequence[Any]
"""√ᾱ_t, 1/√ᾱ_t, √(1−ᾱ_t), 1/√(1−ᾱ_t), √ᾱ_s, c1, c2: a row of a coefficient table."""


def numbers(table: Tensor) -> list[Row]:
    """The rows' factors as Python floats. A GPU divides by such a number through its reciprocal."""
    found: list[Row] = table.tolist()
    return found


def tensors(table: Tensor) -> list[Row]:
    """The rows' factors as tensors of no dimensions, by which a CPU multiplies sooner."""
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
    """The last x. Noise is drawn where ``noisy`` says that the row adds some."""
    for (a, _, b, _, a_s, c1, c2), draw, t in zip(rows, noisy, ts, strict=True):
        eps = model(x, t)
        x0 = (x - eps * b) / a
        x = a_s * x0
        if draw:
            x = x + c1 * torch.randn(x.shape, generator=generator, device=x.device)
        x = x + c2 * eps
    return x
