"""A sheet of images as a PNG: rows and columns, their labels, and the sheet's recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastddim.files import replacing
from fastddim.tools import images

KEY = "fastddim"
"""The key of the recipe among a PNG's texts."""


def save(
    pictures: Tensor,
    path: Path,
    *,
    columns: int | None = None,
    recipe: Mapping[str, Any] | None = None,
    rows: Sequence[str] = (),
    heads: Sequence[str] = (),
    captions: Sequence[str] = (),
) -> bool:
    """Writes images side by side: the whole picture, or nothing.

    Args:
        pictures: uint8 (N, 1 or 3, H, W), row by row.
        columns: as in ``images.grid``.
        recipe: plain values, kept in the PNG as JSON in the text named ``fastddim``.
        rows, heads: the label left of each row, and above each column.
        captions: the label below each image.

    Returns:
        Whether the picture replaced a file.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    if captions:
        strips = [_text(c, pictures.shape[-1], pictures.shape[1]) for c in captions]
        pictures = torch.cat([pictures, torch.stack(strips)], 2)
    sheet = images.grid(pictures, columns=columns)
    if rows or heads:
        sheet = _framed(sheet, rows, heads, *pictures.shape[2:])
    images.check_channels(sheet.shape[0])
    text = PngInfo()
    if recipe is not None:
        text.add_text(KEY, json.dumps(recipe))
    pixels = sheet[0] if sheet.shape[0] == 1 else sheet.movedim(0, -1)
    there = path.exists()
    with replacing(path) as file:
        Image.fromarray(pixels.contiguous().numpy()).save(file, format="PNG", pnginfo=text)
    return there


def recipe_of(path: Path) -> dict[str, Any]:
    """Returns the recipe that ``save`` has kept in a PNG; empty if there is none."""
    from PIL import Image

    with Image.open(path) as picture:
        return dict(json.loads(picture.info.get(KEY, "{}")))


HEIGHT = 12
"""Pixels of a line of text."""


def _text(text: str, width: int, channels: int, height: int = HEIGHT) -> Tensor:
    """Returns grey text on black, uint8 (channels, height, width); text that is too long is cut."""
    import numpy as np
    from PIL import Image, ImageDraw

    strip = Image.new("L", (width, height))
    ImageDraw.Draw(strip).text((1, 0), text, fill=200)
    return torch.from_numpy(np.array(strip)).expand(channels, -1, -1)


def _framed(
    sheet: Tensor, rows: Sequence[str], heads: Sequence[str], height: int, width: int
) -> Tensor:
    """Returns ``sheet`` with a margin on the left for row labels and above for column labels."""
    padding = 2  # of images.grid
    channels = sheet.shape[0]
    left = 6 * max((len(row) for row in rows), default=0) + padding if rows else 0
    above = HEIGHT if heads else 0
    framed = sheet.new_zeros(channels, above + sheet.shape[1], left + sheet.shape[2])
    framed[:, above:, left:] = sheet
    for i, row in enumerate(rows):
        top = above + padding + i * (height + padding) + max(0, (height - HEIGHT) // 2)
        part = framed[:, top : top + HEIGHT, :left]
        part.copy_(_text(row, left, channels)[:, : part.shape[1]])
    for i, head in enumerate(heads):
        start = left + padding + i * (width + padding)
        framed[:, :above, start : start + width] = _text(head, width, channels)
    return framed
