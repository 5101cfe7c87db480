"""Refuses states, outputs and masks that a step of the sampler cannot take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddim.check import kind
from fastddim.loop.model import shapes
from fastddim.step.arguments import OUTPUTS


def check_state(name: str, x: Any) -> Tensor:
    if not isinstance(x, Tensor) or x.dtype not in OUTPUTS or x.dim() == 0:
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else kind(x)
        raise TypeError(f"{name} must be float32, bfloat16 or float16 (batch, ...), got {got}")
    return x


def check_output(output: Any, x: Tensor, guided: bool) -> None:
    """Refuses an output that has another shape than x, or, ``guided``, than two of x stacked."""
    if not guided and isinstance(output, Tensor) and output.shape == x.shape:
        return
    want = ((2 if guided else 1) * x.shape[0], *x.shape[1:])
    if isinstance(output, Tensor) and output.shape != want:
        allowed, described = shapes(want)
        if output.shape not in allowed:
            raise ValueError(
                f"model.apply_model must return a tensor of {described}, got {tuple(output.shape)}"
            )


def check_mask(mask: Any, x0: Any, x: Tensor) -> None:
    """Refuses a mask or an x0 that is no tensor or cannot be broadcast to x's shape."""
    for name, tensor in (("mask", mask), ("x0", x0)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor where a mask is given, got {kind(tensor)}")
        try:
            fits = torch.broadcast_shapes(tensor.shape, x.shape) == x.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"{name} must have shape {tuple(x.shape)} or broadcast to it, "
                f"got {tuple(tensor.shape)}"
            )
