"""Images by seed, in batches that are always full."""

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

LARGEST_BATCH = 65_536

Item = TypeVar("Item")


def full_batches(items: Sequence[Item], size: int) -> Iterator[tuple[list[Item], int]]:
    """(``size`` items, how many of them count): the last batch is padded with the last item.

    A network rounds differently at another batch size. Where all are full, what becomes of an
    item is the same bit for bit whatever other items there are.
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
    """The samples of ``seeds``, in order, a batch at a time, each the same whatever the others.

    Args:
        ddim, model, device, progress: as in ``DDIM.sample``; the model is on the device already.
        seeds: an integer in [0, 2⁶³) for each sample.
        shape: of one sample, without the batch.
        batch_size: what every call of the model gets.
        options: what else ``DDIM.sample`` is told, such as ``cond`` with a row for each sample of
            a full batch.

    Returns:
        An iterator over tensors of at most ``batch_size`` samples, the padding left out.

    Raises:
        TypeError, ValueError: before the first batch is asked for.
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
    """What ``by_seed`` passes through on its way, after the rows that ``kept_rows`` names.

    Args:
        columns: how many steps are kept of each sample.
        state: whether x_s is, instead of the x0 predicted from x_t.
        ddim, model, seeds, shape, batch_size, device, progress, options: as in ``by_seed``.

    Returns:
        An iterator over tensors (n, columns, *shape), n at most ``batch_size``. The last column
        is the sample: x0 and x_s are one where s = −1.

    Raises:
        TypeError, ValueError: before the first batch is asked for.
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
    """``columns`` rows of ``ddim``, evenly chosen: ⌊i·S/columns⌋ − 1 for i = 1, ..., columns."""
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
    """From the sample of one seed to that of the next, for each pair: Song et al. 2021, figure 6.

    Each x_T between is ``slerp`` of the pair's at α = i/(columns − 1), and the first and the last
    sample of a row are those that ``by_seed`` gives.

    Args:
        ddim: with η = 0, or x_T would not be what decides the sample.
        seeds: a, b, c, d, ... for rows from a to b, from c to d, ...
        columns: samples in a row, both ends included; at least 2.
        model, shape, batch_size, device, progress: as in ``by_seed``.
        options: the same, ``cond`` with a row for each of the pairs·columns samples.

    Returns:
        (pairs, columns, *shape).

    Raises:
        TypeError, ValueError: before any work.
    """
    size, keys = _size_and_keys(batch_size, seeds)
    n = whole("columns", columns, low=2)
    check_pairs(keys)
    if ddim.eta != 0:
        raise ValueError(f"eta must be 0 to interpolate, got {ddim.eta}: noise would decide too")
    own = torch.tensor(keys, dtype=torch.int64, device=usable_device(device))
    ends = initial_noise(own, (len(keys), *shape))
    between = slerp(ends[0::2], ends[1::2], [i / (n - 1) for i in range(n)])
    x = between.transpose(0, 1).flatten(0, 1)
    out: Tensor = ddim.sample(model, x, batch_size=size, progress=progress, **options)
    return out.view(-1, n, *shape)


def check_pairs(seeds: Sequence[int]) -> None:
    """Raises ``ValueError`` unless there is an even number of seeds, and some."""
    if not seeds or len(seeds) % 2:
        raise ValueError(f"seeds must be pairs, an even number of them, got {len(seeds)}")


def _size_and_keys(batch_size: int, seeds: Sequence[int]) -> tuple[int, list[int]]:
    size = whole("batch_size", batch_size, low=1, high=LARGEST_BATCH)
    return size, [whole(f"seeds[{i}]", k, low=0, high=2**63 - 1) for i, k in enumerate(seeds)]
