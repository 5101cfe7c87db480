"""Images asked for by seed, and pictures of them."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastddim.check import whole
from fastddim.predict import Model
from fastddim.run import Progress
from fastddim.sampler import DDIM

LARGEST_BATCH = 65_536


def by_seed(
    ddim: DDIM,
    model: Model,
    seeds: Sequence[int],
    shape: Sequence[int],
    batch_size: int,
    *,
    device: torch.device | str | None = None,
    progress: Progress = False,
) -> Iterator[Tensor]:
    """The samples of ``seeds``, in order, a batch at a time.

    A network rounds differently at another batch size. So batches are always full, the last one
    padded with its last seed, and a sample is the same bit for bit whatever else is asked for.

    Args:
        ddim, model, device, progress: as in ``DDIM.sample``; the model is on the device already.
        seeds: an integer in [0, 2⁶³) for each sample.
        shape: of one sample, without the batch.
        batch_size: what every call of the model gets.

    Returns:
        An iterator over tensors of at most ``batch_size`` samples, the padding left out.

    Raises:
        TypeError, ValueError: before the first batch is asked for.
    """
    size = whole("batch_size", batch_size, low=1, high=LARGEST_BATCH)
    keys = [whole(f"seeds[{i}]", k, low=0, high=2**63 - 1) for i, k in enumerate(seeds)]
    full = (size, *shape)

    def batches() -> Iterator[Tensor]:
        for first in range(0, len(keys), size):
            batch = keys[first : first + size]
            padded = batch + batch[-1:] * (size - len(batch))
            x = ddim.sample(model, shape=full, seeds=padded, device=device, progress=progress)
            yield x[: len(batch)]

    return batches()


class Timed:
    """A model that knows how long its calls took.

    On an accelerator it waits for the device around each call, so that the time is the model's
    own. What waits for nothing between two calls is then counted in full: the share that
    ``summary`` gives is an upper bound.
    """

    def __init__(self, model: Model, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.start()

    def start(self) -> None:
        """From here on time counts."""
        self._inside = 0.0
        self._started = self._now()

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Any:
        before = self._now()
        output = self.model(x, t, **cond)
        self._inside += self._now() - before
        return output

    def summary(self, images: int) -> str:
        """One line about ``images`` made since ``start``."""
        seconds = self._now() - self._started
        return (
            f"{images} {'image' if images == 1 else 'images'} in {seconds:.1f} s: "
            f"{images / seconds:.2f} images/s, "
            f"{1 - self._inside / seconds:.1%} of the time outside the model"
        )

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


def warm_up(
    ddim: DDIM, model: Model, shape: Sequence[int], batch_size: int, device: torch.device
) -> None:
    """Takes one step of ``ddim`` and one that adds no noise.

    The first call of a model and of each kind of step prepares and compiles: nothing a rate or
    a share of the time should hold.
    """
    for sampler in (ddim, DDIM(steps=1)):
        sampler.sample(
            model,
            shape=(batch_size, *shape),
            seeds=[0] * batch_size,
            device=device,
            progress=lambda steps: itertools.islice(steps, 1),
        )


def usable_device(name: str | None) -> torch.device:
    """The device of that name, or the one to take where none is given: CUDA, else the CPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).cpu()
        return torch.device(name)
    except Exception as error:  # each backend has its own for not being there
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"device must be one that torch can use here, such as cpu, got {name!r}: {reason}"
        ) from None


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] → 0..255, to the nearest; what lies outside is clamped and NaN is black."""
    return ((x.float().nan_to_num(nan=-1.0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def grid(images: Tensor, padding: int = 2) -> Tensor:
    """N images (N, C, H, W) side by side as one (C, rows·(H+p)+p, columns·(W+p)+p), row by row.

    There are ⌈√N⌉ columns and as many rows as N needs. What no image covers is 0.
    """
    n, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    cells = images.new_zeros(rows * columns, channels, height + padding, width + padding)
    cells[:n, :, padding:, padding:] = images
    sheet = cells.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
    sheet = sheet.reshape(channels, rows * (height + padding), columns * (width + padding))
    return torch.nn.functional.pad(sheet, (0, padding, 0, padding))


def check_channels(channels: int) -> None:
    """Raises ``ValueError`` unless a PNG has that many."""
    if channels not in (1, 3):
        raise ValueError(f"a PNG takes 1 channel (grey) or 3 (RGB), got {channels}")


def check_png(path: Path | str) -> Path:
    """``path``, if a PNG can be written there.

    Raises:
        ValueError, OSError: naming what was given and what is allowed.
        ModuleNotFoundError: Pillow is missing, which is better known before there are images.
    """
    import PIL.Image  # noqa: F401

    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"out must be a file name that ends in .png, got {str(path)!r}")
    if path.is_dir():
        raise ValueError(f"out must be a file name that ends in .png, got the folder {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"out must be in a folder that exists, got {path}")
    temporary = _beside(path)
    try:
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise type(error)(
            f"out must be in a folder that can be written to, got {path}: {error.strerror}"
        ) from None
    temporary.unlink()
    return path


def save_png(image: Tensor, path: Path | str) -> None:
    """Writes uint8 (1 or 3, H, W) to ``path``: the whole picture, or nothing at all."""
    from PIL import Image

    path = Path(path)
    check_channels(image.shape[0])
    mode = "L" if image.shape[0] == 1 else "RGB"
    size = (image.shape[2], image.shape[1])
    pixels = image.permute(1, 2, 0).contiguous().cpu().numpy().tobytes()
    temporary = _beside(path)
    try:
        with temporary.open("wb") as file:
            Image.frombytes(mode, size, pixels).save(file, format="PNG")
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name and no content
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise


def _beside(path: Path) -> Path:
    """A name in the same folder, since replacing is atomic only within one file system."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
