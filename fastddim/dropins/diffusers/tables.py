"""Tables of coefficients on the samples' device, and the tensors that they were made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastddim.dropins._shared import stream_of
from fastddim.transfer import sent

CPU = torch.device("cpu")


def version(tensor: Tensor) -> int:
    """How often it was written in place; tensors of inference mode do not count that."""
    return 0 if tensor.is_inference() else tensor._version


class Source:
    """A small tensor that tables were made from, and whether it still holds the same numbers.

    On a CPU its bytes are compared, as the version counter does not count ``x.data[...] = 0``. On a
    GPU looking would wait for the device: there the version decides.
    """

    __slots__ = ("_address", "_bytes", "_version", "_view", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self._version = tensor, version(tensor)
        self._view: Any = None
        self._bytes, self._address = b"", 0
        try:
            self._view = tensor.detach().numpy()
        except (RuntimeError, TypeError, AttributeError):  # not on a CPU, or no NumPy dtype
            return
        self._bytes, self._address = self._view.tobytes(), tensor.data_ptr()

    def unchanged(self, tensor: Any) -> bool:
        if tensor is not self.tensor:
            return False
        if self._view is None:
            return version(tensor) == self._version
        same_memory = tensor.data_ptr() == self._address  # what ``x.data = ...`` changes
        return same_memory and bool(self._view.tobytes() == self._bytes)


class Tables(NamedTuple):
    """The coefficients of every step a scheduler may be asked for, on the samples' device."""

    table: Tensor
    rows: Tensor
    """Of each row its number, int32, so that a step takes its own without a copy to the device."""
    row_of: Tensor | None
    """Strict: the row of each timestep, and of one more. The last row, which is of NaN, is that of
    the timesteps that are not chosen, and of those that are chosen more than once."""
    to_eps: Tensor | None
    """Strict, towards noise, where the model returns no ε: rows that turn its output into ε."""

    views: dict[int, Tensor]
    """Views of ``rows`` that steps have taken: making one costs a small step a thirtieth."""

    def row(self, row: int, batch: int) -> Tensor:
        """One row's number for each sample of a batch."""
        found = self.views.get(row)
        if found is None or found.shape[0] != batch:
            found = self.views[row] = self.rows.as_strided((batch,), (0,), row)
        return found

    def rows_at(self, t: Tensor) -> Tensor:
        """Strict: the row of each of these timesteps, which are on the device.

        Nothing is asked of the device. What is no timestep at all gets the row of NaN as well:
        −1 counts from the end, and an index beyond it would end the process's use of the GPU.
        """
        assert self.row_of is not None
        return self.row_of[t.long().clamp(-1, len(self.row_of) - 1)]


class Made(NamedTuple):
    """What ``make`` of ``cached`` returns; ``Tables`` says what the three are."""

    table: Tensor
    row_of: Tensor | None = None
    to_eps: Tensor | None = None


Cached = dict[Any, tuple[Any, Source, Any, Tables]]
"""Settings, the two sources and the tables, by key, device and stream."""


def cached(
    cache: Cached,
    key: Any,
    device: torch.device,
    made_from: tuple[Tensor, Any],
    settings: tuple[Any, ...],
    make: Callable[[], Made],
) -> Tables:
    """``make()``'s tables, kept until something that they were made from is another.

    ``made_from``: ᾱ and the end's, tensors that may be written; the second may be a number.
    """
    # Another stream would have to wait for the one that makes them.
    key = (key, device, 0 if device.type == "cpu" else stream_of(device))
    held = cache.get(key)
    abar, end = made_from
    if held is not None:
        before, abar_before, end_before, found = held
        if (
            before == settings
            and abar_before.unchanged(abar)
            and (
                end_before.unchanged(end)
                if type(end_before) is Source
                else not isinstance(end, Tensor) and end_before == end
            )
        ):
            return found
    if len(cache) >= 16:
        cache.clear()
    sources = Source(abar), Source(end) if isinstance(end, Tensor) else end
    table, row_of, to_eps = make()
    found = Tables(
        sent(table.to(torch.float32), device),
        torch.arange(len(table), dtype=torch.int32, device=device),
        None if row_of is None else sent(row_of, device),
        None if to_eps is None else sent(to_eps, device),
        {},
    )
    cache[key] = settings, *sources, found
    return found


@dataclass(frozen=True, eq=False)
class Chosen:
    """``timesteps`` as they were read last. One is another's equal if it is the same object."""

    source: Source
    levels: list[int]
    place: dict[int, int]
    """The position of each of them that is there once."""

    def position(self, timestep: Any) -> int | None:
        """Where in ``timesteps`` this tensor is, if it is an element of it and no copy."""
        whole = self.source.tensor
        if not isinstance(timestep, Tensor) or timestep.dtype != whole.dtype:
            return None
        if timestep.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            return None
        offset, stride = timestep.storage_offset() - whole.storage_offset(), whole.stride(0)
        if stride == 0 or offset % stride or not 0 <= offset // stride < len(self.levels):
            return None
        return int(offset // stride)
