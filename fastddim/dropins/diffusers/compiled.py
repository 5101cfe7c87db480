"""The steps of the DDIM schedulers as torch.compile traces them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fastddim.dropins._compiled import MATHS, compiled_tables, constant, rows_of
from fastddim.dropins._scheduler import NAMES, like
from fastddim.dropins._tables import Tables
from fastddim.dropins.diffusers.base import BATCH, Base, has_grad, of_each


def plain_step(
    scheduler: Base,
    output: Tensor,
    timestep: Any,
    sample: Tensor,
    eta: float,
    rederive: bool,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """Takes a default step, or returns None if the original's step must run."""
    eta = constant(eta)
    noise = noise if eta > 0 else None
    rows = _rows_of(timestep, sample)
    if rows is None or not (noise is None or (like(noise, sample) and not has_grad(noise))):
        return None
    tables = compiled_tables(scheduler, eta, sample)
    if tables is None:
        return None
    if eta > 0 and noise is None:
        noise = torch.randn(output.shape, device=output.device, dtype=output.dtype)
    rows = places(rows, scheduler.alphas_cumprod.shape[0])
    return _stepped(scheduler, tables, sample, output, rows, rederive, None, noise)


def strict_step(
    scheduler: Base,
    output: Tensor,
    timestep: Any,
    sample: Tensor,
    eta: float,
    rederive: bool,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """Takes a strict step with checked arguments, or returns None if it must run untraced."""
    eta = constant(eta)
    rows = _rows_of(timestep, sample)
    tables = None if rows is None else compiled_tables(scheduler, eta, sample)
    if rows is None or tables is None:
        return None
    # The inverse scheduler adds no noise, and therefore ignores seeds.
    seeds = None if scheduler._upwards or noise is not None else scheduler._seeds
    if noise is not None:
        noise = noise.float() if eta else None
    elif eta and seeds is None:
        noise = torch.randn(sample.shape, device=sample.device)
    rows, output = tables.rows_at(rows), output.float()
    if tables.to_eps is not None:
        own = NAMES[scheduler.config.prediction_type]
        output, _ = MATHS.stepped(tables.to_eps, sample, output, rows, prediction=own)
    seeds = None if seeds is None else seeds.to(sample.device)
    return _stepped(scheduler, tables, sample, output, rows, rederive, seeds, noise)


def batch_step(
    scheduler: Base, output: Tensor, timesteps: Tensor, sample: Tensor, rederive: bool
) -> Tensor | None:
    """Takes each sample's step from its own timestep, or returns None, as ``plain_step`` does."""
    tables = compiled_tables(scheduler, BATCH, sample)
    if tables is None:
        return None
    t = timesteps.to(device=sample.device, dtype=torch.int64)
    strict = tables.row_of is not None
    rows = tables.rows_at(t) if strict else places(t, scheduler.alphas_cumprod.shape[0])
    return _stepped(scheduler, tables, sample, output, rows, rederive, None, None)[0]


def _rows_of(timestep: Any, sample: Tensor) -> Tensor | None:
    """Returns the timestep, or one for each sample, as an int64 tensor, or None."""
    if of_each(timestep, sample) and len(sample) > 1:
        return cast(Tensor, timestep.to(device=sample.device, dtype=torch.int64))
    return rows_of(timestep, sample.device)


def places(timesteps: Tensor, count: int) -> Tensor:
    """Returns the rows of a default step; the last row, which is NaN, for any other number."""
    return (timesteps + count).clamp(-1, 2 * count) % (2 * count + 1)


def _stepped(
    scheduler: Base,
    tables: Tables,
    x: Tensor,
    output: Tensor,
    rows: Tensor,
    rederive: bool,
    seeds: Tensor | None,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    x_s, x0 = scheduler._stepped(
        MATHS, tables, x, output, rows, rederive=rederive, seeds=seeds, noise=noise
    )
    assert x0 is not None
    return x_s, x0
