"""The first images of each cell of a profile, kept as one small PNG in the profile's folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastddim.tools import images
from fastddim.tools.table import Cell

FOLDER = "images"
"""The folder of the PNGs, in the folder of the profile."""

FIRST = 8
"""The number of images that are kept of a cell."""

SIDE = 64
"""The most pixels of an image's longer side; larger images are scaled down."""


def keep_images(folder: Path) -> Callable[[Cell, Tensor], None]:
    """Returns a function that writes the first samples (N, C, H, W) of a cell in one row.

    Their values are in [-1, 1]. Samples that are no images with 1 or 3 channels are not kept.
    """

    def keep(cell: Cell, samples: Tensor) -> None:
        if samples.ndim != 4 or samples.shape[1] not in (1, 3):
            return
        first = samples[:FIRST].float()
        scale = max(first.shape[2:]) / SIDE
        if scale > 1:
            size = [max(1, round(n / scale)) for n in first.shape[2:]]
            first = torch.nn.functional.interpolate(first, size, mode="area")
        path = image_path(folder, cell)
        path.parent.mkdir(exist_ok=True)
        images.save_png(images.grid(images.to_uint8(first), columns=len(first)), path)

    return keep


def image_path(folder: Path, cell: Cell) -> Path:
    """Returns the path of a cell's PNG, which need not exist."""
    name = f"{cell.steps}-order{cell.order}-{cell.spacing}-eta{cell.eta}"
    return folder / FOLDER / f"{re.sub(r'[^A-Za-z0-9.-]', '_', name)}.png"
