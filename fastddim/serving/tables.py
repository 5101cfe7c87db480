"""The rows and times of all samplers in service lie one after the other in device memory."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddim.coefficients import COLUMNS_OF_MANY
from fastddim.loop.recording import lasting
from fastddim.serving.program import Program

PARKED = 0
"""The row of a slot without a request."""
_ROOM = 1024
"""The rows that there is room for at first."""


class Tables:
    """The tables in one memory. A program is copied there once and stays while slots use it.

    A program that no slot uses keeps its place until another one needs the room. Where all room is
    in use, the memory doubles: ``version`` counts how often it has moved.

    Attributes:
        table: float32 (room, 9).
        times: the t of each row, of the dtype that the model gets.
    """

    def __init__(self, times: Any, device: torch.device) -> None:
        self.version = 0
        with lasting():
            self.table = torch.zeros(
                _ROOM, len(COLUMNS_OF_MANY), dtype=torch.float32, device=device
            )
            self.times = torch.from_numpy(np.full(_ROOM, times[0])).to(device)
            # A slot without a request steps to x = 0·x0 + 0·ε, which stays finite.
            self.table[PARKED, :4] = 1
        self._places: dict[Hashable, range] = {}
        self._users: dict[Hashable, int] = {}

    def add(self, program: Program) -> int:
        """Returns the row at which the program lies, and counts one more user of it."""
        place = self._places.get(program.key)
        if place is None:
            place = self._found(len(program))
            here = slice(place.start, place.stop)
            for memory, values in ((self.table, program.rows), (self.times, program.times)):
                host = torch.from_numpy(values)
                # A copy from other than pinned memory would wait for the ticks before it.
                memory[here].copy_(host.pin_memory() if memory.is_cuda else host, non_blocking=True)
            self._places[program.key] = place
        self._users[program.key] = self._users.get(program.key, 0) + 1
        return place.start

    def release(self, program: Program) -> None:
        """Counts one user less."""
        self._users[program.key] -= 1

    def release_all(self) -> None:
        """Counts no users at all."""
        self._users.clear()

    def _found(self, count: int) -> range:
        """Returns room for ``count`` rows: at the end, where unused programs lay, or in new memory.

        The rows of programs in use never move, since the device counts them.
        """
        last = max((place.stop for place in self._places.values()), default=PARKED + 1)
        if last + count <= len(self.table):
            return range(last, last + count)
        for key in [key for key in self._places if not self._users.get(key)]:
            del self._places[key]
            self._users.pop(key, None)
        last = PARKED + 1
        for place in sorted(self._places.values(), key=lambda place: place.start):
            if place.start - last >= count:
                return range(last, last + count)
            last = place.stop
        if last + count > len(self.table):
            self._grow(last + count)
        return range(last, last + count)

    def _grow(self, least: int) -> None:
        room = len(self.table)
        while room < least:
            room *= 2
        with lasting():
            table, times = (_grown(old, room) for old in (self.table, self.times))
        # All three change or, where the memory does not suffice, none of them.
        self.table, self.times, self.version = table, times, self.version + 1


def _grown(old: Tensor, room: int) -> Tensor:
    new = old.new_zeros(room, *old.shape[1:])
    new[: len(old)] = old
    return new
