"""The steps of a policy's loop: everything that stays the same from call to call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastddim.dropins._scheduler import NAMES
from fastddim.dropins._shared import Launches, Own
from fastddim.dropins._tables import Chosen, Source, Tables
from fastddim.dropins._transfer import sent
from fastddim.dropins.diffusers import FastDDIMScheduler, FastDDPMScheduler
from fastddim.dropins.diffusers.plain import tables_of
from fastddim.loop.recording import lasting
from fastddim.step.buffers import FRESH

Noise: TypeAlias = Callable[[int, Tensor], Tensor]
"""Returns the normals of the i-th step, shaped like the state."""
Unfit: TypeAlias = Callable[[int, Tensor, Tensor], Tensor]
"""Returns the state after the i-th step where the fused step cannot take the model's output."""


class Known(NamedTuple):
    """The part of a trajectory that is written into every state: where ``mask``, ``data``."""

    data: Tensor
    mask: Tensor

    def into(self, x: Tensor) -> None:
        """Writes the known part into ``x`` as ``x[mask] = data[mask]`` does, in one pass."""
        torch.where(self.mask, self.data, x, out=x)


@dataclass(frozen=True)
class Options:
    """The arguments of ``scheduler.step`` that stay the same in a loop."""

    eta: float = 0.0
    rederive: bool = False


class Steps:
    """The steps of one loop: the scheduler's rows, and the timesteps as the network takes them.

    Args:
        scheduler: a ``FastDDIMScheduler`` or ``FastDDPMScheduler``.
        chosen: its timesteps.
        tables: its factors, one row for each step.
        rows: the row of each step, and whether the step adds noise.
        options: the arguments of every step.
        batch: the number of timesteps that the network takes, or None for one of no dimension.
    """

    def __init__(
        self,
        scheduler: Any,
        chosen: Chosen,
        tables: Tables,
        rows: list[tuple[int, bool]],
        options: Options,
        device: torch.device,
        batch: int | None,
    ) -> None:
        self.scheduler, self.chosen, self._tables, self.rows = scheduler, chosen, tables, rows
        self._fixed = scheduler.config, getattr(scheduler, "variance_type", None)
        self._levels = Source(scheduler.alphas_cumprod), Source(scheduler._end())
        self._is_ddpm = isinstance(scheduler, FastDDPMScheduler)
        self._rederive, self._own = options.rederive, Own()
        config = scheduler.config
        clip = config.clip_sample_range if config.clip_sample else None
        given = NAMES[config.prediction_type], clip, options.rederive, self._is_ddpm
        # A threshold is one more pass before each step.
        self._launches = None if config.thresholding else Launches(tables.table, *given)
        with lasting():
            whole = sent(chosen.source.tensor, device).long()
            if batch is not None:
                whole = whole[:, None].repeat(1, batch)
            elif device.type == "cpu":
                whole = chosen.source.tensor  # The original's own elements, whatever their dtype.
            self._whole, self._version = whole, whole._version
            self.times = list(whole.unbind())
        self._device, self._made = device, None
        if device.type == "cuda":
            self._made = torch.cuda.Event()
            self._made.record(torch.cuda.current_stream(device))

    def await_tables(self) -> None:
        """Makes the current stream wait for the tables, which another stream may have made."""
        if self._made is not None:
            torch.cuda.current_stream(self._device).wait_event(self._made)

    @property
    def current(self) -> bool:
        """Whether the scheduler still takes these steps, and no network wrote to the timesteps."""
        scheduler = self.scheduler
        return (
            scheduler.config is self._fixed[0]
            and getattr(scheduler, "variance_type", None) == self._fixed[1]
            and self._whole._version == self._version
            and self._levels[0].unchanged(scheduler.alphas_cumprod)
            and self._levels[1].unchanged(scheduler._end())
        )

    def run(
        self,
        model: Any,
        x: Tensor,
        cond: dict[str, Any],
        known: Known | None,
        noise: Noise,
        unfit: Unfit,
    ) -> Tensor:
        """Returns the state after the last step from ``x``, which ``known`` is written into."""
        scheduler, own, tables = self.scheduler, self._own, self._tables
        # For a large state on a CPU the buffers of earlier steps save more than a kept launch.
        launches = None if x.is_cpu and x.numel() >= FRESH else self._launches
        for i, ((row, noisy), t) in enumerate(zip(self.rows, self.times, strict=True)):
            if known is not None:
                known.into(x)
            output = model(x, t, **cond)
            if (
                output.__class__ is not Tensor
                or output.dtype != torch.float32
                or output.shape != x.shape
                or output.device != x.device
            ):
                x = unfit(i, output, x)
                continue
            z = noise(i, x) if noisy else None
            if launches is not None:
                x = launches.stepped(x, output, row, z)
                continue
            x, _ = scheduler._stepped(
                own,
                tables,
                x,
                output,
                row,
                rederive=self._rederive,
                want_x0=False,
                noise=z,
                posterior=self._is_ddpm,
            )
        if known is not None:
            known.into(x)
        if x.numel() >= FRESH:
            own.clear()
        return x


def steps_of(
    scheduler: Any, chosen: Chosen, options: Options, device: torch.device, batch: int | None
) -> Steps | None:
    """Returns the steps, or None where the original's own step must run."""
    rows: list[tuple[int, bool]] = []
    if isinstance(scheduler, FastDDIMScheduler):
        tables = tables_of(scheduler, options.eta, device, scheduler._end())
        count = len(scheduler.alphas_cumprod)
        for t in chosen.levels:
            if not -count <= t < count:
                return None
            rows.append((t + count, options.eta > 0))
    else:
        tables = scheduler._tables_of(chosen, device)
        for t in chosen.levels:
            row = scheduler._place(chosen, t)
            if row is None:
                return None
            rows.append((row, t > 0))
    if tables is None:
        return None
    return Steps(scheduler, chosen, tables, rows, options, device, batch)
