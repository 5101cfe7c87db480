"""Images as pixels: read from files, arranged in grids, written as PNG."""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from fastddim.check import whole
from fastddim.files import check_out, replacing

FILES = (
    "a picture such as a .png, a .npy or .npz of uint8 (N, H, W) or (N, H, W, C), or an idx file "
    "of bytes, gzipped or not"
)
"""The files that ``read`` accepts, for messages."""


def to_uint8(x: Tensor) -> Tensor:
    """Maps [-1, 1] to 0..255, rounded to the nearest; values outside are clamped, NaN is black.

    A caller that shows or keeps the pixels should report the samples that ``not_finite`` finds.
    """
    return ((x.float().nan_to_num(nan=-1.0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def not_finite(x: Tensor) -> list[int]:
    """Returns the indices of the samples of x (N, ...) that hold NaN or infinity.

    ``to_uint8`` turns these values into black or white pixels, which look like any others.
    """
    low, high = x.flatten(1).aminmax(dim=1)  # NaN if any element is; one pass, no mask of x's size
    odd: list[int] = (~(low.isfinite() & high.isfinite())).nonzero().flatten().tolist()
    return odd


def drawn(batches: Iterable[Tensor]) -> tuple[Tensor, list[int]]:
    """Returns (the pictures of all samples of ``batches``, on the CPU; the indices of the samples
    that hold NaN or infinity)."""
    pictures: list[Tensor] = []
    odd: list[int] = []
    first = 0
    for x in batches:
        pictures.append(to_uint8(x).cpu())
        odd += [first + place for place in not_finite(x)]
        first += len(x)
    return torch.cat(pictures), odd


def from_uint8(pixels: Tensor) -> Tensor:
    """Maps 0..255 to [-1, 1] in float32, the range that models are trained on."""
    return pixels.float() / 127.5 - 1


def read(path: Path | str, shape: Sequence[int] | None = None, count: int | None = None) -> Tensor:
    """Returns the images of a file, uint8 (N, C, H, W). Pickles are refused.

    Args:
        path: a picture that Pillow reads, grey or RGB, of 8 bits and opaque; a .npy or .npz with
            one array (or one named ``arr_0``) of (N, H, W) or (N, H, W, C); or an idx file such
            as MNIST's, gzipped or not. The content decides, not the name.
        shape: the (C, H, W) that the images must have.
        count: the number of images to read, from the first on; all by default.

    Raises:
        TypeError, ValueError, OSError: the file is missing, damaged or of another kind, or has
            too few images or images of another shape.
    """
    path = Path(path)
    n = None if count is None else whole("count", count, low=1)
    if not path.is_file():
        raise FileNotFoundError(f"images must be {FILES}, got {str(path)!r}, which is no file")
    try:
        with path.open("rb") as file:
            pixels = _pixels(file, n)
    except Exception as error:  # each reader raises its own error for a damaged file
        raise ValueError(f"images must be {FILES}, got {path}: {error}") from None
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or not pixels.size:
        raise ValueError(
            f"images must be {FILES}, got {pixels.dtype} {tuple(pixels.shape)} in {path}"
        )
    if n is not None and n > len(pixels):
        raise ValueError(f"count must be an integer in [1, {len(pixels)}] for {path}, got {n}")
    images = torch.from_numpy(np.array(pixels[:n]))
    images = images.unsqueeze(1) if images.ndim == 3 else images.movedim(3, 1).contiguous()
    check_shape(images.shape[1:], shape, path)
    return images


def check_shape(got: Sequence[int], wanted: Sequence[int] | None, path: Path) -> None:
    """Raises ``ValueError`` if the images in ``path`` do not have the (C, H, W) ``wanted``."""
    if wanted is not None and tuple(got) != tuple(wanted):
        expected, found = (
            f"{h}x{w} with {c} {'channel' if c == 1 else 'channels'}" for c, h, w in (wanted, got)
        )
        raise ValueError(f"images must all be {expected}, got {found} in {path}")


def _pixels(file: IO[bytes], count: int | None) -> np.ndarray[Any, Any]:
    """Returns the array of a file of a known kind; of an idx file the first ``count`` images."""
    start = file.read(6)
    file.seek(0)
    if start.startswith(b"\x1f\x8b"):
        with gzip.open(file) as unzipped:
            return _idx(cast(IO[bytes], unzipped), count)
    if start.startswith(b"\0\0"):
        return _idx(file, count)
    if start == b"\x93NUMPY":
        return np.asarray(np.load(file, allow_pickle=False))
    if start.startswith(b"PK"):
        with np.load(file, allow_pickle=False) as arrays:
            names = arrays.files
            if "arr_0" not in names and len(names) != 1:
                raise ValueError(f"holds {', '.join(names[:8]) or 'no array'}")
            return np.asarray(arrays["arr_0" if "arr_0" in names else names[0]])
    if start.startswith((b"\x89PNG", b"\xff\xd8", b"BM", b"RIFF", b"II*", b"MM\0*")):
        return _picture(file)
    raise ValueError("another kind of file")


def _picture(file: IO[bytes]) -> np.ndarray[Any, Any]:
    """Returns one picture, (1, H, W) or (1, H, W, 3)."""
    from PIL import Image

    with Image.open(file) as picture:
        if picture.mode in ("1", "P", "PA", "LA", "RGBA") or "transparency" in picture.info:
            full = picture.convert("RGBA")
            if full.getchannel("A").getextrema() != (255, 255):
                raise ValueError("a picture that is not opaque")
            return np.asarray(full.convert("L" if picture.mode in ("1", "LA") else "RGB"))[None]
        if picture.mode not in ("L", "RGB"):
            raise ValueError(f"a picture of mode {picture.mode}, which does not have 8 bits")
        return np.asarray(picture)[None]


def _idx(file: IO[bytes], count: int | None) -> np.ndarray[Any, Any]:
    """Reads idx (LeCun, MNIST): two zeros, type, number of dimensions, their sizes, values."""
    magic = file.read(4)
    if magic[:3] != b"\0\0\x08" or magic[3:] not in (b"\3", b"\4"):
        raise ValueError("another kind of file")
    header = file.read(4 * magic[3])
    if len(header) == 4 * magic[3]:
        sizes = np.frombuffer(header, ">u4").tolist()
        sizes[0] = sizes[0] if count is None else min(count, sizes[0])
        values = file.read(math.prod(sizes))
        file.read(1)  # gzip checks its checksum only at the end of the file
        if len(values) == math.prod(sizes):
            return np.frombuffer(values, np.uint8).reshape(sizes)
    raise ValueError("truncated")


def grid(images: Tensor, padding: int = 2, columns: int | None = None) -> Tensor:
    """Arranges images (N, C, H, W) row by row as one (C, rows·(H+p)+p, columns·(W+p)+p).

    By default there are ⌈√N⌉ columns. There are as many rows as N needs. Gaps are 0.
    """
    n, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else whole("columns", columns, low=1)
    rows = math.ceil(n / columns)
    cells = images.new_zeros(rows * columns, channels, height + padding, width + padding)
    cells[:n, :, padding:, padding:] = images
    sheet = cells.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
    sheet = sheet.reshape(channels, rows * (height + padding), columns * (width + padding))
    return torch.nn.functional.pad(sheet, (0, padding, 0, padding))


def check_channels(channels: int) -> None:
    """Raises ``ValueError`` unless a PNG can have so many channels."""
    if channels not in (1, 3):
        raise ValueError(f"a PNG takes 1 channel (grey) or 3 (RGB), got {channels}")


def check_png(path: Path | str) -> Path:
    """Returns ``path`` if a PNG can be written there: a check before the images are drawn.

    Raises:
        ValueError, OSError: ``path`` does not end in .png, or cannot be written.
        ModuleNotFoundError: Pillow is missing.
    """
    import PIL.Image  # noqa: F401

    return check_out(path, ".png")


def save_png(image: Tensor, path: Path | str) -> bool:
    """Writes uint8 (1 or 3, H, W) to ``path``: the whole picture, or nothing.

    Returns:
        Whether the picture replaced a file.
    """
    check_channels(image.shape[0])
    there = Path(path).exists()
    with replacing(Path(path)) as file:
        write_png(image, file)
    return there


def write_png(image: Tensor, file: IO[bytes]) -> None:
    """Writes uint8 (1 or 3, H, W) to an open file: the same bytes for the same picture."""
    from PIL import Image

    check_channels(image.shape[0])
    mode = "L" if image.shape[0] == 1 else "RGB"
    size = (image.shape[2], image.shape[1])
    pixels = image.permute(1, 2, 0).contiguous().cpu().numpy().tobytes()
    Image.frombytes(mode, size, pixels).save(file, format="PNG")
