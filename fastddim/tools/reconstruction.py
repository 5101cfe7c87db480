"""How much of an image is lost on the way to its noise and back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastddim.check import whole
from fastddim.loop.model import Model
from fastddim.loop.options import Progress, checked_progress, checked_state
from fastddim.loop.sampler import DDIM
from fastddim.tools.draw import LARGEST_BATCH, full_batches


@dataclass(frozen=True)
class Reconstruction:
    """What one sampler has made of the images.

    Attributes:
        ddim: the sampler.
        calls: of the model, for each image: |τ|·(1 + refine) to encode and |τ| to decode.
        error: the mean over images and elements of (x0 − decoded)²/4, that is, of the squared
            difference with data in [−1, 1] scaled to [0, 1].
        seconds: the time taken, for all images.
        images: the decoded images, of x0's shape and dtype, on the CPU.
    """

    ddim: DDIM
    calls: int
    error: float
    seconds: float
    images: Tensor


def errors(
    ddims: Sequence[DDIM],
    model: Model,
    x0: Tensor,
    *,
    refine: int = 0,
    batch_size: int = 16,
    progress: Progress = False,
    **options: Any,
) -> Iterator[Reconstruction]:
    """x0 → x_T → x0 with each sampler: Song et al. 2021, section 5.4 and table 2.

    Args:
        ddims: the samplers, such as ``[DDIM(S) for S in (10, 20, 50)]``; η = 0 and no clip.
        model: as in ``DDIM.sample``, on x0's device.
        x0: images in [−1, 1], (N, ...), N ≥ 1; never written.
        refine: as in ``DDIM.invert``: how many more times the model is asked in each step of the
            encoding, which tends to the exact inverse of the decoding where the iteration settles.
        batch_size: what every call of the model gets, the last batch padded.
        progress: True for a bar, or a wrapper such as ``tqdm.tqdm``; it counts model calls.
        options: what else ``DDIM.invert`` and ``DDIM.sample`` are told, such as ``cond`` with a
            row for each sample of a full batch.

    Returns:
        An iterator over one ``Reconstruction`` for each sampler, in order.

    Raises:
        TypeError, ValueError: before any work, naming the argument, the value and what is allowed.
    """
    if not len(checked_state("x0", x0, None)):
        raise ValueError(f"x0 must hold at least one image, got shape {tuple(x0.shape)}")
    size = whole("batch_size", batch_size, low=1, high=LARGEST_BATCH)
    for ddim in ddims:
        ddim.iterate(model, x0[:1], reverse=True, refine=refine)  # refuses what cannot be inverted
    ticks = iter(checked_progress(progress)(range(model_calls(ddims, len(x0), size, refine))))

    def counted(x: Tensor, t: Tensor, **cond: Any) -> Any:
        next(ticks, None)
        return model(x, t, **cond)

    def results() -> Iterator[Reconstruction]:
        for ddim in ddims:
            start = time.perf_counter()
            decoded = []
            for index, n in full_batches(range(len(x0)), size):
                x_T = ddim.invert(counted, x0[index], refine=refine, **options)
                decoded.append(ddim.sample(counted, x_T, **options)[:n].cpu())
            images = torch.cat(decoded)
            error = float((images.double() - x0.cpu().double()).square().mean() / 4)
            seconds = time.perf_counter() - start
            yield Reconstruction(ddim, model_calls([ddim], 1, 1, refine), error, seconds, images)
        next(ticks, None)  # beyond the last, where a bar is full

    return results()


def model_calls(ddims: Sequence[DDIM], images: int, batch_size: int, refine: int = 0) -> int:
    """How often ``errors`` asks the model for so many images."""
    batches = -(-images // batch_size)
    return batches * sum(len(ddim.pairs) * (2 + refine) for ddim in ddims)
