"""Existing images: those of a generated folder, of a folder of pictures, or of a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastddim.check import whole
from fastddim.tools import images
from fastddim.tools.folder import MANIFEST, Folder

WHAT = f"a folder that fastddim generate has filled, a folder of pictures, or {images.FILES}"
"""The sources that ``opened`` accepts, for messages."""

PICTURES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"))
ARRAYS = frozenset((".npy", ".npz"))


@dataclass(frozen=True)
class Source:
    """Images in parts, so that not all need to be in memory.

    Attributes:
        path: the folder or file that holds the images.
        shape: (channels, height, width) of each image.
        count: the number of images.
        part_size: the number of images in a part; the last part may have fewer.
        part: returns part k, uint8 (N, C, H, W).
        verify: checks every byte, if the source has checksums.
        not_finite: the seeds of generated images whose samples held NaN or infinity.
    """

    path: Path
    shape: tuple[int, int, int]
    count: int
    part_size: int
    part: Callable[[int], Tensor]
    verify: Callable[[], None]
    not_finite: Sequence[int] = ()

    def __len__(self) -> int:
        """The number of parts."""
        return -(-self.count // self.part_size)

    def first(self, n: int) -> Tensor:
        """Returns the first ``n`` images, uint8 (n, C, H, W).

        Raises:
            ValueError: the source has fewer images.
        """
        if whole("count", n, low=1) > self.count:
            raise ValueError(
                f"count must be an integer in [1, {self.count}] for {self.path}, got {n}"
            )
        parts = [self.part(k) for k in range(-(-n // self.part_size))]
        return torch.cat(parts)[:n]


def opened(path: Path | str, shape: Sequence[int] | None = None) -> Source:
    """Returns the images at ``path``, which is one of ``WHAT``.

    Pictures, also those in subfolders, are sorted by name.

    Args:
        shape: the (C, H, W) that the images must have.

    Raises:
        FileNotFoundError, ValueError: ``path`` holds no images, images of several sizes, or
            images of another shape.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        found = of(Folder.read(path))
    elif path.is_dir():
        found = _of_files(path)
    elif path.is_file():
        read = images.read(path)
        found = _whole(path, read)
    else:
        raise FileNotFoundError(f"images must be {WHAT}, got {path}, which does not exist")
    images.check_shape(found.shape, shape, path)
    return found


def of(folder: Folder) -> Source:
    """Returns the images of a folder that ``generate`` has filled."""
    channels, height, width = folder.recipe["shape"]
    return Source(
        folder.path,
        (channels, height, width),
        len(folder.seeds),
        folder.recipe["shard_size"],
        folder.pictures,
        folder.verify,
        folder.not_finite,
    )


def _whole(path: Path, read: Tensor) -> Source:
    n, channels, height, width = read.shape
    return Source(path, (channels, height, width), n, n, lambda k: read, lambda: None)


def _of_files(folder: Path) -> Source:
    files = sorted(
        Path(root, name)
        for root, _, names in os.walk(folder)
        for name in names
        if not name.startswith(".") and Path(name).suffix.lower() in PICTURES | ARRAYS
    )
    if not files:
        raise FileNotFoundError(f"images must be {WHAT}, got {folder}, which holds none")
    arrays = [file for file in files if file.suffix.lower() in ARRAYS]
    if arrays:
        if len(arrays) < len(files):
            raise ValueError(
                f"images must be pictures or arrays, got both in {folder}: "
                f"{min(set(files) - set(arrays)).name} and {arrays[0].name}"
            )
        first = images.read(arrays[0])
        rest = (images.read(file, first.shape[1:]) for file in arrays[1:])
        return _whole(folder, torch.cat([first, *rest]))
    channels, height, width = images.read(files[0]).shape[1:]
    shape, size = (channels, height, width), 256

    def part(k: int) -> Tensor:
        chosen = files[k * size : (k + 1) * size]
        return torch.cat([images.read(file, shape) for file in chosen])

    return Source(folder, shape, len(files), size, part, lambda: None)
