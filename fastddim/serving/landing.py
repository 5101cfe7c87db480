"""Finished samples are copied out of their slots, on CUDA on a side stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastddim.loop.recording import lasting
from fastddim.serving.ticket import Ticket


class Flight(NamedTuple):
    """A finished sample on its way to its future."""

    ticket: Ticket
    result: Tensor
    finite: Tensor | None
    """Whether all of the sample is finite, bool (), where the request asks."""
    event: Any
    """The end of the copy on a GPU; None on other devices."""


class Landing:
    """The finished samples that their futures do not hold yet.

    On CUDA a side stream copies a sample, and the sample is handed to its future when the copy has
    ended: it is then ready on every stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._device = device
        self._flights: deque[Flight] = deque()

    def __len__(self) -> int:
        return len(self._flights)

    def all(self) -> list[Flight]:
        """Returns the samples on their way."""
        return list(self._flights)

    def copy(self, ticket: Ticket, x: Tensor) -> None:
        """Begins to copy a sample out of its slot. Later work on the stream may overwrite it."""
        if self._side is None:
            self._flights.append(Flight(ticket, *_copied(ticket, x), None))
            return
        here = torch.cuda.current_stream(self._device)
        self._side.wait_stream(here)
        event = torch.cuda.Event()
        with torch.cuda.stream(self._side):
            result, finite = _copied(ticket, x)
            if finite is not None:  # A copy to other than pinned memory would wait.
                answer = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
                finite = answer.copy_(finite, non_blocking=True)
            event.record(self._side)
        result.record_stream(here)
        here.wait_event(event)
        self._flights.append(Flight(ticket, result, finite, event))

    def landed(self, wait: bool) -> Iterator[Flight]:
        """Yields the samples whose copies have ended, or with ``wait`` all of them.

        A flight is removed after the caller has taken it: an interrupt loses none.
        """
        while self._flights:
            flight = self._flights[0]
            if flight.event is not None and not flight.event.query():
                if not wait:
                    return
                flight.event.synchronize()
            yield flight
            self._flights.popleft()


def _copied(ticket: Ticket, x: Tensor) -> tuple[Tensor, Tensor | None]:
    if torch.is_inference_mode_enabled():
        # The request's owner may use gradients, which the tensors of inference mode do not have.
        with lasting():
            return _plain_copy(ticket, x)
    return _plain_copy(ticket, x)


def _plain_copy(ticket: Ticket, x: Tensor) -> tuple[Tensor, Tensor | None]:
    finite = torch.isfinite(x).all() if ticket.work.check_finite else None
    return x.clone().to(ticket.work.dtype), finite
