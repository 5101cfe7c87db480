"""Inpainting replaces a part of each state with that part of a known image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastddim.check import kind
from fastddim.coefficients import Float32
from fastddim.loop.normals import Noise
from fastddim.step.checked import ddim_step


@dataclass(frozen=True, eq=False)
class Known:
    """A known image, and the mask of the part that each state takes from it at its noise level."""

    image: Tensor
    mask: Tensor
    table: Tensor
    """Rows that lead from clean data to each row's t, and last to the final s."""
    rows: tuple[Tensor, ...]
    """The indices of the table's rows, each int32 (batch,)."""
    clean: tuple[bool, ...]
    """For each row, whether its level is clean data, which takes the image without noise."""

    def put_back(self, x: Tensor, row: int, noise: Noise) -> Tensor:
        """Returns x with the image, at the noise level of ``row``'s t, where the mask is 1."""
        image = self.image
        if not self.clean[row]:
            # The forward process is the step at η = 0 from clean data, with the noise for ε.
            z = noise.forward(self.rows[row])
            image, _ = ddim_step(image, z, self.table, self.rows[row], want_x0=False)
        return torch.lerp(x, image, self.mask)

    def part(self, samples: Tensor) -> Known:
        """Returns the part for some of the samples."""
        mask = self.mask[samples] if len(self.mask) == len(self.image) else self.mask
        rows = tuple(row[:1].expand(len(samples)) for row in self.rows)
        return replace(self, image=self.image[samples], mask=mask, rows=rows)


def checked_known(
    known: Tensor | None,
    mask: Tensor | None,
    x: Tensor,
    table: Callable[[], Float32],
    clean: tuple[bool, ...],
) -> Known | None:
    """Returns ``known`` and ``mask`` checked, or None without both.

    ``table`` makes the table that leads from clean data to each level.

    Raises:
        TypeError, ValueError: naming the argument, the value and what is allowed.
    """
    if known is None and mask is None:
        return None
    known, mask = _beside("known", known, "mask", x), _beside("mask", mask, "known", x)
    if known.shape != x.shape:
        raise ValueError(f"known must have x_T's shape, {tuple(x.shape)}, got {tuple(known.shape)}")
    try:
        fits = mask.dim() == x.dim() and torch.broadcast_shapes(mask.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"mask must broadcast to {tuple(x.shape)} with as many dimensions, "
            f"got {tuple(mask.shape)}"
        )
    mask = mask.to(torch.float32)
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError("mask must lie in [0, 1]: 1 takes the known image, 0 the model's")
    factors = torch.tensor(table(), device=x.device)
    rows = torch.arange(len(factors), dtype=torch.int32, device=x.device)
    return Known(
        known.detach().to(torch.float32),
        mask,
        factors,
        rows[:, None].expand(-1, len(x)).unbind(),
        clean,
    )


def _beside(name: str, tensor: Any, other: str, x: Tensor) -> Tensor:
    """Returns ``tensor``, checked to be one on x's device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor where {other} is given, got {kind(tensor)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x.device} with x_T, got {tensor.device}")
    return tensor
