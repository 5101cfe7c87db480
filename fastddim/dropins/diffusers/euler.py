"""The base of the Euler schedulers: a step's place in ``sigmas``, and the steps that fuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddim.coefficients import COLUMNS
from fastddim.dropins._compiled import MATHS, Kind, Maths, compiled_tables, places_of
from fastddim.dropins._scheduler import like
from fastddim.dropins._shared import Buffers, as_eager, rounds
from fastddim.dropins._tables import CPU, Chosen, Made, Source, Tables, with_nan
from fastddim.dropins.diffusers.base import Base
from fastddim.step.arguments import transformed

HALVES = torch.bfloat16, torch.float16
A_S = COLUMNS.index("sqrt_abar_s")
"""The column of the factor of x0."""


class Euler(Base):
    """Finds the step of a call, and keeps the table of all steps along ``sigmas``."""

    sigmas: Tensor
    _step_index: int | None
    _begin_index: int | None
    _kinds: int
    """The number of rows of one step: the table holds the first of all steps, then the second."""
    _unbound: tuple[Tensor, dict[int, tuple[Tensor, ...]]] | None = None
    """A table, and the numbers of its columns as tensors of no dimension."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_unbound"}

    def _rows(self, sigmas: Tensor) -> Tensor:
        """Returns the table, by the original's float32 operations on ``sigmas``."""
        raise NotImplementedError

    def _begin(self) -> None:
        """Reads timesteps on a device, and frees the memory of the loop before."""
        if self.timesteps.device != CPU:
            self._chosen()
        self._own.clear()
        self._stateless = False
        self._renew_compiled()

    def _chosen(self) -> Chosen:
        """Returns the timesteps as the floats that they are, read again only after a change."""
        read, timesteps = self._read, self.timesteps
        if read is None or not read.source.unchanged(timesteps):
            read = self._read = Chosen(Source(timesteps), timesteps.tolist(), {})
        return read

    def _init_step_index(self, timestep: Any) -> None:
        """Finds the first step's place as the original does, without waiting for the device."""
        if self._stateless:  # The index where the loop began is that of another step.
            self._step_index = self._chosen().levels.index(float(timestep))  # type: ignore[arg-type]
            return
        if self._begin_index is None and self.timesteps.device != CPU:
            chosen = self._chosen()
            place = chosen.position(timestep)
            if place is not None:
                timestep = chosen.levels[place]
            if not isinstance(timestep, Tensor) or timestep.is_cpu:
                at = torch.tensor(chosen.levels, dtype=self.timesteps.dtype, device=CPU)
                self._step_index = self.index_for_timestep(timestep, at)  # type: ignore[attr-defined]
                return
        self._parent._init_step_index(self, timestep)

    def _found(
        self, output: Any, timestep: Any, sample: Any, generator: Any, halves: bool = False
    ) -> tuple[Tensor, Any, int] | None:
        """Returns the table, the step's place and the number of steps.

        Inside torch.compile the place is a tensor. Returns None if the original's step must run.
        ``halves`` tells that the original rounds the result of each operation on a half precision
        sample.
        """
        traced = torch.compiler.is_compiling()
        if (
            not isinstance(sample, Tensor)
            or not (
                sample.dtype == torch.float32
                or (halves and (sample.dtype in HALVES if traced else rounds(sample, None)))
            )
            or not like(output, sample)
            or sample.dim() < 2
            or (generator is not None if traced else transformed())
            or (torch.is_grad_enabled() and (sample.requires_grad or output.requires_grad))
            or not _is_float(timestep)
        ):
            return None
        if traced:
            return self._traced(timestep, sample)
        table = self._table_on(sample.device, sample.dtype)
        if table is None:
            return None
        if self._step_index is None:
            self._init_step_index(timestep)
        place, steps = self._step_index, table.shape[0] // self._kinds
        # The original fails after the last step, and takes a negative place from the end.
        if not isinstance(place, int) or not 0 <= place < steps:
            return None
        return table, place, steps

    def _traced(self, timestep: Any, sample: Tensor) -> tuple[Tensor, Tensor, int] | None:
        """Returns the same as ``_found``. The place is that of the timestep.

        The step's number would be a constant of the graph.
        """
        tables = compiled_tables(self, 0.0, sample)
        if tables is None:
            return None
        self._stateless, self._step_index = True, None
        place, steps = places_of(timestep, self.timesteps, tables.table, self._kinds)
        return tables.table, place, steps

    def _behind_tables(self) -> tuple[Any, ...]:
        return self.sigmas, self.timesteps

    def _tables_for(self, kind: Kind, device: torch.device, dtype: torch.dtype) -> Tables | None:
        table, levels = self._table_on(device, dtype), self._chosen().levels
        if table is None or len({*levels}) < len(levels):
            return None
        return Tables(with_nan(table), None, None)

    @property
    def _taker(self) -> Maths | Buffers:
        """Takes the steps: the thread's buffers, or plain maths inside torch.compile."""
        return MATHS if torch.compiler.is_compiling() else self._own

    def _table_on(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """Returns the table, or None if the original does not compute the factors in float32."""
        sigmas = self.sigmas
        if not isinstance(sigmas, Tensor) or sigmas.requires_grad:
            return None
        given = ("euler", dtype), device, sigmas, None, None
        found = self._cache.found(*given)
        if found is None:
            on_device = sigmas.device in (CPU, device)
            if sigmas.dtype != torch.float32 or sigmas.dim() != 1 or not on_device:
                return None
            made = Made(as_eager(self._rows(sigmas.detach()), device, dtype))
            found = self._cache.keep(*given, made)
        return found.table

    def _column(self, table: Tensor, column: int) -> tuple[Tensor, ...]:
        """Returns the numbers of a column: indexing at each step would cost as much as the sum."""
        unbound = self._unbound
        if unbound is None or unbound[0] is not table:
            unbound = self._unbound = table, {}
        found = unbound[1].get(column)
        if found is None:
            found = unbound[1][column] = table[:, column].unbind()
        return found

    def _sum(self, table: Tensor, row: Any, x: Tensor, term: Tensor, *, kept: bool) -> Tensor:
        """Returns x + f·term, where f is the row's factor of x0.

        Without ``kept`` this may overwrite x and the term. On a CPU, two operations of PyTorch cost
        less than a launch of the step, at every size.
        """
        if x.is_cpu and isinstance(row, int):
            factor = self._column(table, A_S)[row]
            if not kept:
                return x.add_(term.mul_(factor))
            product = factor * term
            # The result is laid out as x: a network may round differently in another layout.
            return product.add_(x) if product.stride() == x.stride() else x + product
        # The sum of a "sample" model, a_s·x0 + c2·x_t, takes the term in the place of x0.
        x_s, _ = self._taker.stepped(
            table, x, term, row, prediction="sample", posterior=True, want_x0=False, checked=True
        )
        return x_s

    def _advance(self, place: Any, steps: int) -> None:
        """Goes on to the next step, and frees the memory after the last."""
        if isinstance(place, Tensor):
            return
        self._step_index = place + 1
        if place == steps - 1:
            self._own.clear()


def _is_float(timestep: Any) -> bool:
    """Tells whether this is a timestep that the original does not refuse as an index."""
    if isinstance(timestep, Tensor):
        return timestep.is_floating_point()
    return isinstance(timestep, float)
