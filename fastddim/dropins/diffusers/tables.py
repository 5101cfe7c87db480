"""Tables of coefficients are made once, and again where the tensors behind them change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastddim.dropins._shared import stream_of
from fastddim.dropins._transfer import sent

CPU = torch.device("cpu")


def version(tensor: Tensor) -> int:
    """Returns how often it was written in place, or 0 where inference mode does not count."""
    return 0 if tensor.is_inference() else tensor._version


class Source:
    """Remembers what a small tensor held when tables were made from it.

    On a CPU its bytes are compared, because the version counter does not count
    ``x.data[...] = 0``. On a GPU reading them would wait for the device: there the version decides.
    """

    __slots__ = ("_address", "_bytes", "_version", "_view", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self._version = tensor, version(tensor)
        self._view: Any = None
        self._bytes, self._address = b"", 0
        try:
            self._view = tensor.detach().numpy()
        except (RuntimeError, TypeError, AttributeError):
            return  # It is not on a CPU, or NumPy has no such dtype.
        self._bytes, self._address = self._view.tobytes(), tensor.data_ptr()

    def unchanged(self, tensor: Any) -> bool:
        """Tells whether ``tensor`` is the same object and holds the same numbers."""
        if tensor is not self.tensor:
            return False
        if self._view is None:
            return version(tensor) == self._version
        same_memory = tensor.data_ptr() == self._address  # ``x.data = ...`` changes it.
        return same_memory and bool(self._view.tobytes() == self._bytes)


class Tables(NamedTuple):
    """Holds the coefficients of every step a scheduler may be asked for, on the samples' device."""

    table: Tensor
    row_of: Tensor | None
    """Strict keeps the row of each timestep here, and of one more. Timesteps that are not chosen,
    or are chosen more than once, have the last row, which is of NaN."""
    to_eps: Tensor | None
    """These rows turn the model's output into ε, where strict goes towards noise without one."""

    def rows_at(self, t: Tensor) -> Tensor:
        """Returns strict's row of each of these timesteps, without waiting for the device.

        A number that is no timestep at all gets the row of NaN as well: −1 counts from the end,
        and an index beyond it would end the process's use of the GPU.
        """
        assert self.row_of is not None
        return self.row_of[t.long().clamp(-1, len(self.row_of) - 1)]


class Made(NamedTuple):
    """Holds tables as they are made, on any device; ``Tables`` says what the three are."""

    table: Tensor
    row_of: Tensor | None = None
    to_eps: Tensor | None = None


class Cache:
    """Keeps tables until something behind them changes."""

    def __init__(self) -> None:
        self._held: dict[Any, tuple[Any, Source, Any, Tables]] = {}
        self._latest: tuple[Any, Any] = None, None

    def found(
        self, key: Any, device: torch.device, abar: Tensor, end: Any, settings: Any
    ) -> Tables | None:
        """Returns the tables of this key, where ᾱ, the end's ᾱ and the settings are as they were.

        Users may write into ``abar`` and ``end``, which are tensors; ``end`` may be a number.
        """
        latest, held = self._latest
        if latest != (key, device):
            held = self._held.get(_place(key, device))
        if held is None or held[0] != settings or not held[1].unchanged(abar):
            return None
        _, _, before, tables = held
        if before.__class__ is Source:
            return tables if before.unchanged(end) else None
        return tables if not isinstance(end, Tensor) and before == end else None

    def keep(
        self, key: Any, device: torch.device, abar: Tensor, end: Any, settings: Any, made: Made
    ) -> Tables:
        """Keeps what was made of these, and returns it on the device."""
        if len(self._held) >= 16:
            self._held.clear()
        tables = Tables(
            *(None if t is None else sent(t, device) for t in (made.table.float(), *made[1:]))  # type: ignore[arg-type]
        )
        ends = Source(end) if isinstance(end, Tensor) else end
        held = settings, Source(abar), ends, tables
        place = _place(key, device)
        self._held[place] = held
        if len(place) == 2:  # and belongs to no stream
            self._latest = place, held
        return tables


def _place(key: Any, device: torch.device) -> Any:
    # Another stream would have to wait for the one that makes the tables.
    return (key, device) if device.type == "cpu" else (key, device, stream_of(device))


@dataclass(frozen=True, eq=False)
class Chosen:
    """Holds ``timesteps`` as they were read last; two are equal if they are the same object."""

    source: Source
    levels: list[int]
    place: dict[int, int]
    """Each timestep that occurs once has its position here."""

    def position(self, timestep: Any) -> int | None:
        """Returns where in ``timesteps`` this tensor is, if it is an element of it and no copy."""
        whole = self.source.tensor
        if not isinstance(timestep, Tensor) or timestep.dtype != whole.dtype:
            return None
        if timestep.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            return None
        offset, stride = timestep.storage_offset() - whole.storage_offset(), whole.stride(0)
        if stride == 0 or offset % stride or not 0 <= offset // stride < len(self.levels):
            return None
        return int(offset // stride)
