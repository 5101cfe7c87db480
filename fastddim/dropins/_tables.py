"""Cached tables of coefficients, made again when the tensors behind them change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastddim.dropins._shared import stream_of
from fastddim.dropins._transfer import capturing, sent

CPU = torch.device("cpu")


def version(tensor: Tensor) -> int:
    """Returns how often ``tensor`` was written in place, or 0 for an inference tensor."""
    return 0 if tensor.is_inference() else tensor._version


class Source:
    """Remembers the values that a small tensor had when tables were made from it.

    On a CPU the bytes are compared, because the version counter does not count
    ``x.data[...] = 0``. On a GPU, reading the bytes is a host sync; the version counter decides.
    """

    __slots__ = ("_address", "_bytes", "_version", "_view", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self._version = tensor, version(tensor)
        self._view: Any = None
        self._bytes, self._address = b"", 0
        try:
            self._view = tensor.detach().numpy()
        except (RuntimeError, TypeError, AttributeError):
            return  # The tensor is not on a CPU, or NumPy lacks its dtype.
        self._bytes, self._address = self._view.tobytes(), tensor.data_ptr()

    def unchanged(self, tensor: Any) -> bool:
        """Tells whether ``tensor`` is the same object and holds the same numbers."""
        if tensor is not self.tensor:
            return False
        if self._view is None:
            return version(tensor) == self._version
        same_memory = tensor.data_ptr() == self._address  # ``x.data = ...`` changes the address.
        return same_memory and bool(self._view.tobytes() == self._bytes)


class Tables(NamedTuple):
    """The coefficients of every step that a scheduler can take, on the samples' device."""

    table: Tensor
    row_of: Tensor | None
    """The row of each timestep (strict only). A timestep that is not chosen, or is chosen more than
    once, has the last row, which is NaN; so has the additional last entry."""
    to_eps: Tensor | None
    """Rows that turn the output of a v or x0 model into ε (strict inversion only)."""

    def rows_at(self, t: Tensor) -> Tensor:
        """Returns the row of each of these timesteps without a host sync (strict only).

        A number that is no timestep gets the row of NaN, at index −1: an index out of range would
        make the GPU unusable for the process.
        """
        assert self.row_of is not None
        return self.row_of[t.long().clamp(-1, len(self.row_of) - 1)]


class Made(NamedTuple):
    """Newly made tables, on any device; ``Tables`` describes the three fields."""

    table: Tensor
    row_of: Tensor | None = None
    to_eps: Tensor | None = None


def with_nan(rows: Tensor) -> Tensor:
    """Returns a table's rows and an additional row of NaN."""
    return torch.cat([rows, rows.new_full((1, rows.shape[1]), torch.nan)])


class Cache:
    """Keeps tables until a tensor or a setting behind them changes.

    A CUDA graph knows only the addresses of the tables that its steps read, so the tables of a
    captured step are kept as long as the cache.
    """

    def __init__(self) -> None:
        self._held: dict[Any, _Held] = {}
        self._latest: tuple[Any, Any] = None, None
        self._captured: dict[int, Tables] = {}

    def found(
        self, key: Any, device: torch.device, abar: Tensor, end: Any, settings: Any
    ) -> Tables | None:
        """Returns the tables of this key if ᾱ, the end's ᾱ and the settings have not changed.

        ``abar`` is a tensor and ``end`` a tensor or a number. Users may write to the tensors.
        """
        latest, held = self._latest
        if latest != (key, device):
            held = self._held.get(_place(key, device))
        tables = _unchanged(held, abar, end, settings)
        if device.type != "cpu" and capturing(device):
            if tables is None:
                # ``torch.cuda.graph`` captures on a stream of its own. It first waits for the
                # device, so tables that any stream made before the capture are complete.
                others = (h for p, h in list(self._held.items()) if p[:2] == (key, device))
                every = (_unchanged(other, abar, end, settings) for other in others)
                tables = next((found for found in every if found is not None), None)
            if tables is not None:
                self._captured[id(tables)] = tables
        return tables

    def keep(
        self, key: Any, device: torch.device, abar: Tensor, end: Any, settings: Any, made: Made
    ) -> Tables:
        """Moves ``made`` to the device, keeps the tables and returns them.

        Raises:
            RuntimeError: a CUDA graph is being captured and ``made`` is on the CPU.
        """
        tables = Tables(
            *(None if t is None else sent(t, device) for t in (made.table.float(), *made[1:]))  # type: ignore[arg-type]
        )
        if capturing(device):
            return tables  # Made from ᾱ on the GPU, they hold no values before the first replay.
        if len(self._held) >= 16:
            self._held.clear()
        ends = Source(end) if isinstance(end, Tensor) else end
        held = settings, Source(abar), ends, tables
        place = _place(key, device)
        self._held[place] = held
        if (
            len(place) == 2
        ):  # A place with a stream has three parts, and depends on the current stream.
            self._latest = place, held
        return tables


_Held: TypeAlias = "tuple[Any, Source, Any, Tables]"
"""The settings, the sources of ᾱ and of the end's ᾱ, and the tables made from them."""


def _unchanged(held: _Held | None, abar: Tensor, end: Any, settings: Any) -> Tables | None:
    """Returns the tables of ``held`` if everything behind them is as it was."""
    if held is None or held[0] != settings or not held[1].unchanged(abar):
        return None
    _, _, before, tables = held
    if before.__class__ is Source:
        return tables if before.unchanged(end) else None
    return tables if not isinstance(end, Tensor) and before == end else None


def _place(key: Any, device: torch.device) -> Any:
    # Another stream would have to wait for the stream that makes the tables.
    return (key, device) if device.type == "cpu" else (key, device, stream_of(device))


@dataclass(frozen=True, eq=False)
class Chosen:
    """The chosen timesteps as last read. Two objects are equal only if they are the same object."""

    source: Source
    levels: list[int]
    place: dict[int, int]
    """The position of each timestep that occurs once."""

    def position(self, timestep: Any) -> int | None:
        """Returns the position of ``timestep`` if it is an element of the list, not a copy."""
        whole = self.source.tensor
        if not isinstance(timestep, Tensor) or timestep.dtype != whole.dtype:
            return None
        if timestep.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            return None
        offset, stride = timestep.storage_offset() - whole.storage_offset(), whole.stride(0)
        if stride == 0 or offset % stride or not 0 <= offset // stride < len(self.levels):
            return None
        return int(offset // stride)
