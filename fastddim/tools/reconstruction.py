"""The error of an image that is encoded as noise and decoded again."""

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
from fastddim.tools import draw


@dataclass(frozen=True)
class Reconstruction:
    """The images that one sampler has encoded and decoded.

    Attributes:
        ddim: the sampler.
        calls: the model calls for each image: |τ|·(1 + refine) to encode and |τ| to decode.
        error: the mean over images and elements of (x0 − decoded)²/4: the squared difference
            with data in [−1, 1] scaled to [0, 1].
        seconds: the time for all images.
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
        refine: as in ``DDIM.invert``: the number of further model calls in each step of the
            encoding. Where this iteration converges, the encoding tends to the exact inverse of
            the decoding.
        batch_size: the number of samples in every call of the model; the last batch is padded.
        progress: True for a bar, or a wrapper such as ``tqdm.tqdm``; it counts model calls.
        options: further options of ``DDIM.invert`` and ``DDIM.sample``, such as ``cond`` with a
            row for each sample of a full batch.

    Returns:
        An iterator that yields one ``Reconstruction`` for each sampler, in order.

    Raises:
        TypeError, ValueError: before any work, if an argument is not allowed.
    """
    if not len(checked_state("x0", x0, None)):
        raise ValueError(f"x0 must hold at least one image, got shape {tuple(x0.shape)}")
    size = whole("batch_size", batch_size, low=1, high=draw.LARGEST_BATCH)
    for ddim in ddims:
        ddim.iterate(model, x0[:1], reverse=True, refine=refine)  # raises if ddim cannot invert
    ticks = iter(checked_progress(progress)(range(model_calls(ddims, len(x0), size, refine))))

    def counted(x: Tensor, t: Tensor, **cond: Any) -> Any:
        next(ticks, None)
        return model(x, t, **cond)

    def results() -> Iterator[Reconstruction]:
        for ddim in ddims:
            start = time.perf_counter()
            decoded = []
            for index, n in draw.full_batches(range(len(x0)), size):
                x_T = ddim.invert(counted, x0[index], refine=refine, **options)
                decoded.append(ddim.sample(counted, x_T, **options)[:n].cpu())
            images = torch.cat(decoded)
            error = float((images.double() - x0.cpu().double()).square().mean() / 4)
            seconds = time.perf_counter() - start
            yield Reconstruction(ddim, model_calls([ddim], 1, 1, refine), error, seconds, images)
        next(ticks, None)  # past the last call, so that the bar closes

    return results()


def model_calls(ddims: Sequence[DDIM], images: int, batch_size: int, refine: int = 0) -> int:
    """The number of times that ``errors`` calls the model for ``images`` images."""
    return (2 + refine) * draw.model_calls(ddims, images, batch_size)


def warm_up(
    ddim: DDIM,
    model: Model,
    shape: Sequence[int],
    batch_size: int,
    device: torch.device,
    **options: Any,
) -> None:
    """Encodes and decodes one image of zeros with ``ddim``, and discards the result.

    First calls compile; run them before timing.
    """
    zeros = torch.zeros(1, *shape, device=device)
    list(errors([ddim], model, zeros, batch_size=batch_size, **options))
