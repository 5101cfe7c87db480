"""The plain strategy: the original's steps, from tables by the original's float32 operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastddim.check import shown
from fastddim.dropins._compiled import Kind
from fastddim.dropins._scheduler import levels_fit, like
from fastddim.dropins._shared import Buffers, as_eager, pack_rows
from fastddim.dropins._tables import Made, Tables, with_nan
from fastddim.dropins._transfer import sent
from fastddim.dropins.diffusers import compiled
from fastddim.dropins.diffusers.base import (
    BATCH,
    Base,
    Generators,
    batch_fits,
    fits,
    has_grad,
    of_each,
)
from fastddim.step.arguments import transformed


class Plain:
    """Steps from t to t − T // S, and calls the original's step if the fused one would differ."""

    def begin(self, scheduler: Base) -> None:
        """Checks nothing, because the original accepts any configuration."""

    def checked_seeds(self, seeds: Sequence[int] | Tensor | None) -> Tensor | None:
        if seeds is not None:
            raise ValueError("seeds need strict=True: the original draws from a generator")
        return None

    def set_timesteps(
        self,
        scheduler: Base,
        num_inference_steps: int | None,
        device: str | torch.device | None,
        timesteps: Sequence[int] | Tensor | None,
    ) -> None:
        if timesteps is not None:
            raise ValueError(
                f"timesteps must be left out without strict=True, got {shown(timesteps)}: the "
                f"original steps from t to t − T // S, whatever the next timestep is"
            )
        scheduler._parent.set_timesteps(scheduler, num_inference_steps, device)

    def step(
        self,
        scheduler: Base,
        output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float,
        rederive: bool,
        generator: Generators,
        noise: Tensor | None,
    ) -> tuple[Tensor, Tensor] | None:
        if torch.compiler.is_compiling():
            if fits(scheduler, output, sample) and (generator is None or not eta > 0):
                args = scheduler, output, timestep, sample, eta, rederive, noise
                return compiled.plain_step(*args)
            return None
        if transformed():
            return None
        row = scheduler._row(timestep)
        if row is None and of_each(timestep, sample) and len(sample) > 1:
            row = timestep
        if row is None or not isinstance(eta, (int, float)) or not fits(scheduler, output, sample):
            return None
        z = noise if eta > 0 else None
        if z is not None and (generator is not None or not like(z, sample) or has_grad(z)):
            return None
        tables = self.tables(scheduler, float(eta), sample.device, sample.dtype)
        if tables is None:
            return None
        count = scheduler.alphas_cumprod.shape[0]
        rows: Tensor | int
        if isinstance(row, Tensor):
            rows = rows_at(row, count, sample.device).expand(sample.shape[0])
        else:
            rows = row + count
            if not 0 <= rows < 2 * count:
                return None
        if eta > 0 and z is None:
            z = scheduler._drawn(output, generator)
        own = scheduler._own
        x_s, x0 = scheduler._stepped(own, tables, sample, output, rows, rederive=rederive, noise=z)
        read = scheduler._read
        if read is not None and type(row) is int and read.levels and row == read.levels[-1]:
            own.clear()
        assert x0 is not None
        return x_s, x0

    def tables(
        self, scheduler: Base, kind: Kind, device: torch.device, dtype: torch.dtype
    ) -> Tables | None:
        if scheduler._upwards:
            return _upward_tables(scheduler, device, dtype)
        if kind == BATCH:
            # The original ends a batch at ᾱ = 1, whatever the value of ``final_alpha_cumprod``.
            return tables_of(scheduler, 0.0, device, 1.0)
        return tables_of(scheduler, float(kind), device, scheduler._end(), dtype)

    def batch_step(
        self,
        scheduler: Base,
        output: Tensor,
        timesteps: Tensor,
        sample: Tensor,
        eta: float,
        rederive: bool,
    ) -> Tensor | None:
        if not batch_fits(scheduler, output, timesteps, sample, eta):
            return None
        if torch.compiler.is_compiling():
            return compiled.batch_step(scheduler, output, timesteps, sample, rederive)
        tables = self.tables(scheduler, BATCH, sample.device, sample.dtype)
        if tables is None:
            return None
        rows = rows_at(timesteps, len(scheduler.alphas_cumprod), sample.device)
        x_s, _ = scheduler._stepped(
            Buffers(), tables, sample, output, rows, rederive=rederive, want_x0=False
        )
        return x_s

    def previous_timestep(self, scheduler: Base, timestep: int | Tensor) -> int:
        steps = scheduler.num_inference_steps
        assert steps is not None
        return int(timestep) - int(scheduler.config.num_train_timesteps // steps)

    def variance(self, scheduler: Base, timestep: int | Tensor, prev_timestep: Any) -> Tensor:
        found = scheduler._parent._get_variance(scheduler, timestep, prev_timestep)
        return cast(Tensor, found)

    def variances(self, scheduler: Base, t: Tensor, prev_t: Tensor) -> Tensor:
        return cast(Tensor, scheduler._parent._batch_get_variance(scheduler, t, prev_t))


def rows_at(timesteps: Tensor, count: int, device: torch.device) -> Tensor:
    """Returns the table's rows of these timesteps, from −count to count − 1, on ``device``.

    On a GPU a check is a host sync. Any other number has the last row there, which is NaN, because
    a row out of range would read memory that is not the table's.
    """
    if not timesteps.is_cpu:
        return compiled.places(timesteps.long(), count).to(torch.int32)
    rows = timesteps.long() + count
    if rows.numel():
        least, most = (int(row) - count for row in torch.aminmax(rows))
        if least < -count or most >= count:
            raise ValueError(
                f"timesteps must lie in [{-count}, {count - 1}], got {least} to {most}"
            )
    return sent(rows.to(torch.int32), device)


def tables_of(
    scheduler: Base,
    eta: float,
    device: torch.device,
    final: Tensor | float,
    dtype: torch.dtype = torch.float32,
) -> Tables | None:
    """Returns the original's step from each timestep, by its own float32 operations.

    A negative timestep counts from the end, as an index does in the original. The operations run
    on the device where the original's would, and ``as_eager`` makes the table of samples of
    ``dtype``. Returns None if the original's operations are not float32.
    """
    abar, steps = scheduler.alphas_cumprod, scheduler.num_inference_steps
    T = scheduler.config.num_train_timesteps
    # ``final`` is a number for a batch and a tensor for all other steps: never mix their tables.
    given = (eta, final.__class__, dtype), device, abar, final, (steps, T)
    found = scheduler._cache.found(*given)
    if found is not None or not levels_fit(scheduler):
        return found
    t = torch.arange(-len(abar), len(abar), device=abar.device)
    s = t - T // steps
    at, last = abar[t], torch.as_tensor(final, dtype=abar.dtype, device=abar.device)
    at_prev = torch.where(s >= 0, abar[s.clamp(min=0)], last)
    variance = ((1 - at_prev) / (1 - at)) * (1 - at / at_prev)
    sigma = eta * variance**0.5
    direction = (1 - at_prev - sigma**2) ** 0.5
    table = pack_rows(at**0.5, (1 - at) ** 0.5, at_prev**0.5, sigma, direction)
    return scheduler._cache.keep(*given, Made(with_nan(as_eager(table, device, dtype))))


def _upward_tables(scheduler: Base, device: torch.device, dtype: torch.dtype) -> Tables | None:
    """Returns the original's step to each timestep, by its own float32 operations."""
    abar, initial = scheduler.alphas_cumprod, scheduler._end()
    steps, T = scheduler.num_inference_steps, scheduler.config.num_train_timesteps
    given = ("inverse", dtype), device, abar, initial, (steps, T)
    found = scheduler._cache.found(*given)
    if found is not None or not levels_fit(scheduler):
        return found
    to = torch.arange(-len(abar), len(abar), device=abar.device)
    at = (to - T // steps).clamp(max=T - 1)
    first = initial.to(abar.device)
    abar_t = torch.where(at >= 0, abar[at.clamp(0, len(abar) - 1)], first)
    abar_s = abar[to]
    a, none = abar_t**0.5, torch.zeros_like(abar_t)
    table = pack_rows(a, (1 - abar_t) ** 0.5, abar_s**0.5, none, (1 - abar_s) ** 0.5)
    return scheduler._cache.keep(*given, Made(with_nan(as_eager(table, device, dtype))))
