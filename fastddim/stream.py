"""PyTorch's own generator, moved as the replaced loops move it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastddim.blocked import BLOCK


def normals(x: Tensor) -> Callable[[], Tensor]:
    """Draws as ``torch.randn_like(x)`` does, into the same tensor each time."""
    return torch.empty_like(x).normal_


def passed_over(x: Tensor) -> Callable[[], None]:
    """Leaves the generator where ``torch.randn_like(x)`` would, for noise that has no effect.

    On a CPU a contiguous tensor takes its normals sixteen at a time, in order: drawn in blocks
    that stay in the cache they cost no pass over memory, and move the generator alike.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.is_contiguous():
        z = torch.empty_like(x)

        def draw_all() -> None:
            z.normal_()

        return draw_all
    block = x.new_empty(min(x.numel(), 2 * BLOCK))

    def draw() -> None:
        left = x.numel()
        while left > len(block):
            block[:BLOCK].normal_()
            left -= BLOCK
        block[:left].normal_()

    return draw
