"""Images drawn by seed, in batches that are always full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastddim.check import whole
from fastddim.latents import slerp
from fastddim.loop.devices import usable_device
from fastddim.loop.model import Model
from fastddim.loop.options import Progress
from fastddim.loop.sampler import DDIM
from fastddim.step.op import initial_noise
from fastddim.tools.seeds import check_pairs, checked_all

LARGEST_BATCH = 65_536

Item = TypeVar("Item")


def full_batches(items: Sequence[Item], size: int) -> Iterator[tuple[list[Item], int]]:
    """Yields (``size`` items, the number of them that count), the last batch padded.

    The padding repeats the last item. A network rounds differently at another batch size; with
    full batches only, the result of an item is the same bit for bit whatever the other items.
    """
    for first in range(0, len(items), size):
        batch = list(items[first : first + size])
        yield batch + batch[-1:] * (size - len(batch)), len(batch)


def by_seed(
    ddim: DDIM,
    model: Model,
    seeds: Sequence[int],
    shape: Sequence[int],
    batch_size: int,
    *,
    device: torch.device | str | None = None,
    progress: Progress = False,
    **options: Any,
) -> Iterator[Tensor]:
    """Draws the samples of ``seeds``, in order, a batch at a time.

    A sample is the same bit for bit whatever the other seeds.

    Args:
        ddim, model, device, progress: as in ``DDIM.sample``; the model is on the device already.
        seeds: an integer in [0, 2⁶³) for each sample.
        shape: the shape of one sample, without the batch.
        batch_size: the number of samples in every call of the model.
        options: further options of ``DDIM.sample``, such as ``cond`` with a row for each sample
            of a full batch.

    Returns:
        An iterator over tensors of at most ``batch_size`` samples, without the padding.

    Raises:
        TypeError, ValueError: at the call, before the first batch.
    """
    size, keys = _size_and_keys(batch_size, seeds)

    def batches() -> Iterator[Tensor]:
        for batch, n in full_batches(keys, size):
            yield ddim.sample(
                model,
                shape=(size, *shape),
                seeds=batch,
                device=device,
                progress=progress,
                **options,
            )[:n]

    return batches()


def sequences(
    ddim: DDIM,
    model: Model,
    seeds: Sequence[int],
    shape: Sequence[int],
    batch_size: int,
    columns: int,
    *,
    state: bool = False,
    device: torch.device | str | None = None,
    progress: Progress = False,
    **options: Any,
) -> Iterator[Tensor]:
    """Draws the samples of ``by_seed``, and yields the steps after the rows of ``kept_rows``.

    Args:
        columns: the number of steps kept of each sample.
        state: keep x_s instead of the x0 predicted from x_t.
        ddim, model, seeds, shape, batch_size, device, progress, options: as in ``by_seed``.

    Returns:
        An iterator over tensors (n, columns, *shape), n at most ``batch_size``. The last column
        is the sample, because x_s = x0 where s = −1.

    Raises:
        TypeError, ValueError: at the call, before the first batch.
    """
    size, keys = _size_and_keys(batch_size, seeds)
    kept = set(kept_rows(ddim, columns))

    def batches() -> Iterator[Tensor]:
        for batch, n in full_batches(keys, size):
            steps = ddim.iterate(
                model,
                shape=(size, *shape),
                seeds=batch,
                device=device,
                progress=progress,
                **options,
            )
            along = [step.x if state else step.x0 for step in steps if step.index in kept]
            yield torch.stack(along, 1)[:n]

    return batches()


def kept_rows(ddim: DDIM, columns: int) -> list[int]:
    """Returns ``columns`` rows at even distances: ⌊i·S/columns⌋ − 1 for i = 1, ..., columns."""
    steps = len(ddim.pairs)
    n = whole("columns", columns, low=1, high=steps)
    return [(i + 1) * steps // n - 1 for i in range(n)]


def interpolations(
    ddim: DDIM,
    model: Model,
    seeds: Sequence[int],
    shape: Sequence[int],
    batch_size: int,
    columns: int,
    *,
    device: torch.device | str | None = None,
    progress: Progress = False,
    **options: Any,
) -> Tensor:
    """Draws a row from one sample to another for each pair of seeds: Song et al. 2021, figure 6.

    The x_T of column i is ``slerp`` of the pair's x_T at α = i/(columns − 1). The first and the
    last sample of a row equal the samples of ``by_seed``.

    Args:
        ddim: a sampler with η = 0: otherwise x_T alone does not determine the sample.
        seeds: a, b, c, d, ... for rows from a to b, from c to d, ...
        columns: the number of samples in a row, both ends included; at least 2.
        model, shape, batch_size, device, progress: as in ``by_seed``.
        options: as in ``by_seed``, but ``cond`` has a row for each of the pairs·columns samples.

    Returns:
        A tensor (pairs, columns, *shape).

    Raises:
        TypeError, ValueError: before any work.
    """
    size, keys = _size_and_keys(batch_size, seeds)
    n = whole("columns", columns, low=2)
    check_pairs(keys)
    if ddim.eta != 0:
        raise ValueError(
            f"eta must be 0 to interpolate, got {ddim.eta}: x_T must determine the image"
        )
    own = torch.tensor(keys, dtype=torch.int64, device=usable_device(device))
    ends = initial_noise(own, (len(keys), *shape))
    between = slerp(ends[0::2], ends[1::2], [i / (n - 1) for i in range(n)])
    x = between.transpose(0, 1).flatten(0, 1)
    out: Tensor = ddim.sample(model, x, batch_size=size, progress=progress, **options)
    return out.view(-1, n, *shape)


def model_calls(ddims: Sequence[DDIM], samples: int, batch_size: int) -> int:
    """The number of times that sampling ``samples`` images with each sampler calls the model."""
    return -(-samples // batch_size) * sum(len(ddim.pairs) for ddim in ddims)


def nearer_seeds(seeds: Sequence[int], columns: int, places: Sequence[int]) -> list[int]:
    """Returns for each place in ``interpolations`` the seed of the nearer end of its row."""
    ends = (2 * (place // columns) + (2 * (place % columns) >= columns) for place in places)
    return [seeds[end] for end in ends]


def _size_and_keys(batch_size: int, seeds: Sequence[int]) -> tuple[int, list[int]]:
    size = whole("batch_size", batch_size, low=1, high=LARGEST_BATCH)
    return size, checked_all(seeds)
