"""The state that every system's scheduler keeps between steps, and what its own step must read."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from fastddim.check import kind
from fastddim.coefficients import Prediction
from fastddim.dropins._compiled import Compiled, Kind
from fastddim.dropins._shared import Own
from fastddim.dropins._tables import Cache, Chosen, Source, Tables

NAMES: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}


class Scheduler:
    """Holds a scheduler's chosen timesteps, its tables and each thread's buffers.

    Names without _ are those of the system whose scheduler is replaced.
    """

    alphas_cumprod: Tensor
    timesteps: Tensor

    _ends = "final_alpha_cumprod"
    """The attribute that ``_end`` reads."""
    _unsaved: tuple[str, ...] = ("_tables", "_own_memory", "_read", "_compiled")
    """The attributes that copies and pickles make again."""
    _read: Chosen | None = None
    _tables: Cache | None = None
    _own_memory: Own | None = None
    _stateless = False
    """True once a step inside torch.compile has found its place by its timestep alone, and left
    ``step_index`` behind."""
    _compiled: Compiled | None = None
    """The tables of steps inside torch.compile, once such a step was traced."""

    @property
    def _own(self) -> Own:
        found = self._own_memory
        # setdefault gives two threads the same object, even if both get here at once.
        return self.__dict__.setdefault("_own_memory", Own()) if found is None else found

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out tables and buffers, so that copies and pickles make their own."""
        return {name: value for name, value in self.__dict__.items() if name not in self._unsaved}

    def _follow_timesteps(self) -> None:
        """Reads the timesteps that were just chosen, and drops everything of the former ones.

        The host reads them here because it would wait for the device in a step.
        """
        self._chosen()
        self._own.clear()
        self._renew_compiled()

    def _renew_compiled(self) -> None:
        """Makes the tables of compiled steps again, after a change of the timesteps."""
        if self._compiled is not None:
            self._compiled.renew(self)

    def _behind_tables(self) -> tuple[Any, ...]:
        """Returns the attributes from which the tables of compiled steps are made."""
        raise NotImplementedError

    def _tables_for(self, kind: Kind, device: torch.device, dtype: torch.dtype) -> Tables | None:
        """Returns the tables of compiled steps, or None if the original's step must run."""
        raise NotImplementedError

    def _end(self) -> Any:
        """Returns ᾱ at the end of the last step, or at the start of the first inverse step."""
        return getattr(self, self._ends)

    def _chosen(self) -> Chosen:
        """Returns the chosen timesteps as numbers, read again only if they have changed."""
        read, timesteps = self._read, self.timesteps
        if read is not None and read.source.unchanged(timesteps):
            return read
        if not isinstance(timesteps, Tensor) or timesteps.dim() != 1:
            got = tuple(timesteps.shape) if isinstance(timesteps, Tensor) else kind(timesteps)
            raise TypeError(f"timesteps must be a tensor of one dimension, got {got}")
        source, levels = Source(timesteps), [int(t) for t in timesteps.tolist()]
        times = Counter(levels)
        place = {t: i for i, t in enumerate(levels) if times[t] == 1}
        read = self._read = Chosen(source, levels, place)
        return read

    def _row(self, timestep: Any) -> int | Tensor | None:
        """Returns the timestep as a number if the host knows it, else as a tensor.

        Pipelines take timesteps from ``self.timesteps``. The host recognises such an element by its
        address, without waiting for the device. None stands for a value that is no timestep.
        """
        if isinstance(timestep, Tensor):
            if timestep.dim() or timestep.is_floating_point() or timestep.dtype == torch.bool:
                return None
            if timestep.is_cpu:
                return int(timestep)
            read = self._read
            if read is not None and read.source.unchanged(read.source.tensor):
                position = read.position(timestep)
                if position is not None:
                    return read.levels[position]
            return timestep
        try:
            return None if isinstance(timestep, bool) else operator.index(timestep)
        except TypeError:
            return None

    @property
    def _cache(self) -> Cache:
        found = self._tables
        return self.__dict__.setdefault("_tables", Cache()) if found is None else found


def levels_fit(scheduler: Scheduler) -> bool:
    """Tells whether the original computes the factors in float32.

    It computes in float64 with a Python number, and in the tensors' dtype if that is another.
    """
    abar, end = scheduler.alphas_cumprod, scheduler._end()
    return isinstance(end, Tensor) and end.dtype == abar.dtype == torch.float32 and not end.dim()


def like(tensor: Any, sample: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Tells whether ``tensor`` has sample's shape and device, and ``dtype`` or sample's dtype."""
    return (
        isinstance(tensor, Tensor)
        and tensor.shape == sample.shape
        and tensor.dtype == (dtype or sample.dtype)
        and tensor.device == sample.device
    )
