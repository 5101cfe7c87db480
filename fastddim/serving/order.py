"""The order of service: requests wait in a bounded queue, and a rule says which is next."""

from __future__ import annotations

import heapq
import math
import queue
from collections.abc import Callable

from fastddim.check import shown
from fastddim.serving.ticket import Ticket

ORDERS: dict[str, Callable[[Ticket], float]] = {
    "first": lambda ticket: 0.0,
    "shortest": lambda ticket: ticket.work.steps,
    "deadline": lambda ticket: math.inf if ticket.due is None else ticket.due,
}
"""The rules by name. Requests that a rule ranks alike are served in the order they came."""


class QueueFull(queue.Full):
    """A request was refused, because as many wait as the engine's ``limit`` allows."""


class ClosedError(RuntimeError):
    """An engine takes no request, whichever it is."""


class Waiting:
    """The requests that wait for a slot. The caller holds a lock."""

    def __init__(self, order: str, limit: int | None) -> None:
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {shown(order)}")
        self._rank, self._limit = ORDERS[order], limit
        self._heap: list[tuple[float, int, Ticket]] = []
        self._live: dict[int, Ticket] = {}

    def __len__(self) -> int:
        return len(self._live)

    @property
    def full(self) -> bool:
        return self._limit is not None and len(self._live) >= self._limit

    def check_room(self) -> None:
        """Raises ``QueueFull`` if no further request may wait."""
        if self.full:
            raise QueueFull(f"the queue holds limit = {self._limit} requests, and takes no more")

    def add(self, ticket: Ticket) -> None:
        """Adds a request, or puts one back that had been taken: it keeps its place in the order."""
        if ticket.number not in self._live:
            # In this order an interrupt in between leaves no request that is never next.
            heapq.heappush(self._heap, (self._rank(ticket), ticket.number, ticket))
            self._live[ticket.number] = ticket

    def next(self) -> Ticket | None:
        """Returns the request to be served next, which stays in the queue."""
        while self._heap:
            ticket = self._heap[0][2]
            if ticket.number in self._live:
                return ticket
            heapq.heappop(self._heap)
        return None

    def drop(self, ticket: Ticket) -> bool:
        """Removes a request, and returns whether it was there."""
        if self._live.pop(ticket.number, None) is None:
            return False
        if len(self._heap) > 2 * len(self._live) + 64:
            self._heap = [entry for entry in self._heap if entry[1] in self._live]
            heapq.heapify(self._heap)
        return True

    def all(self) -> list[Ticket]:
        """Returns the requests, in the order in which they came."""
        return list(self._live.values())
