"""The future of a request's sample, which can be cancelled until the sample is there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import NoReturn

import torch
from torch import Tensor

from fastddim.serving.guard import Guard
from fastddim.serving.request import Work


class Ticket(Future[Tensor]):
    """A ``concurrent.futures.Future`` of one sample. ``Engine.submit`` returns it.

    ``cancel`` also works while the sample is being made: its slot is free at the next tick. If no
    thread runs the engine, ``result`` and ``exception`` take the engine's ticks themselves.
    """

    def __init__(
        self,
        number: int,
        work: Work,
        deadline: float | None,
        dropped: Callable[[Ticket], None],
        advance: Callable[[Ticket, float | None], bool],
    ) -> None:
        super().__init__()
        # An interrupt of a thread that waits must not stop the engine's thread.
        self._condition: threading.Condition = Guard()
        self.number, self.work = number, work
        self.began = time.perf_counter()
        self.due = None if deadline is None else self.began + deadline
        self.slot: int | None = None
        """The slot in which the sample is being made."""
        self.base: int | None = None
        """The row at which its program lies, while it has a slot."""
        self.late: bool | None = None
        """Whether the sample came after its deadline, once the metrics count it."""
        self.dropped = False
        """Whether the metrics count the request as cancelled."""
        self.failed = False
        """Whether the metrics count the request as failed."""
        self._dropped, self._advance = dropped, advance
        self._once = threading.Lock()

    def strip(self) -> None:
        """Lets go of the request's tensors and of the engine, once neither is needed any more."""
        self.work = self.work.without_tensors()
        self._advance, self._dropped = _nothing, _noted

    def cancel(self) -> bool:
        """Cancels the request, and returns False if its result is already there."""
        if not super().cancel():
            return False
        self._dropped(self)
        if self._once.acquire(blocking=False):
            self.set_running_or_notify_cancel()  # Waiters in other threads learn of it.
        return True

    def running(self) -> bool:
        """Returns whether a slot makes the sample now."""
        return self.slot is not None and not self.done()

    def result(self, timeout: float | None = None) -> Tensor:
        """Returns the sample, as ``Future.result`` does.

        A tick that this call takes itself may outlast the timeout.
        """
        sample = super().result(self._waited(timeout))
        if sample.is_cuda:  # A freed sample's memory must wait for the work of the caller's stream.
            sample.record_stream(torch.cuda.current_stream(sample.device))
        return sample

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Returns the exception of a failed request, as ``Future.exception`` does."""
        return super().exception(self._waited(timeout))

    def __reduce__(self) -> NoReturn:
        raise TypeError("the future of a sample cannot be copied or pickled: pass its result")

    def _waited(self, timeout: float | None) -> float | None:
        """Takes ticks until the request is done, unless a thread takes them.

        Returns the rest of the timeout.
        """
        end = None if timeout is None else time.perf_counter() + timeout
        rest = timeout
        while not self.done() and (rest is None or rest > 0) and self._advance(self, rest):
            rest = None if end is None else end - time.perf_counter()
        return None if end is None else max(0.0, end - time.perf_counter())


def _nothing(ticket: Ticket, timeout: float | None) -> bool:
    return False


def _noted(ticket: Ticket) -> None:
    """Does nothing: the engine knows of the cancellation."""
