"""Samples and failures are handed to their futures, and counted as they are."""

from __future__ import annotations

from concurrent.futures import InvalidStateError

from fastddim.serving.landing import Landing
from fastddim.serving.metrics import Recorder
from fastddim.serving.ticket import Ticket


class Delivery:
    """Hands samples and exceptions to their futures.

    Each is counted before the future has it, since whoever has a result finds it in the metrics.
    An interrupt between the two, or in a callback of the future, lets the same delivery be made
    again, which counts the request once.
    """

    def __init__(self, landing: Landing, recorder: Recorder) -> None:
        self._landing, self._recorder = landing, recorder

    def deliver(self, wait: bool) -> bool:
        """Hands finished samples to their futures; returns whether there were any.

        Args:
            wait: whether samples are awaited that a GPU still copies.
        """
        any_ = False
        for flight in self._landing.landed(wait):
            any_, ticket = True, flight.ticket
            if flight.finite is not None and not flight.finite:
                seed = ticket.work.seed
                self.fail(
                    ticket,
                    FloatingPointError(f"the sample of seed {seed} holds NaN or an infinity"),
                )
                continue
            if ticket.late is None:
                ticket.late = self._recorder.finish(ticket.began, ticket.due)
            try:
                ticket.set_result(flight.result)
            except InvalidStateError:
                if _cancelled(ticket):
                    self._recorder.take_back(ticket.late)
                    ticket.late = None
                    continue
            ticket.strip()
        return any_

    def fail(self, ticket: Ticket, error: BaseException) -> None:
        """Hands an exception to a future."""
        if isinstance(error, StopIteration):  # Neither asyncio nor a generator can raise it.
            cause, error = error, RuntimeError("the model raised StopIteration")
            error.__cause__ = cause
        if not ticket.failed:
            self._recorder.failed += 1
            ticket.failed = True
        try:
            ticket.set_exception(error)
        except InvalidStateError:
            if _cancelled(ticket):
                self.begins_again(ticket)
                return
        ticket.strip()

    def begins_again(self, ticket: Ticket) -> None:
        """Takes back the count of a failure that an interrupt kept from the future."""
        if ticket.failed:
            self._recorder.failed -= 1
            ticket.failed = False


def _cancelled(ticket: Ticket) -> bool:
    """Returns whether the request was cancelled, and otherwise has its result from before."""
    # ``cancel`` reports the cancellation, if an interrupt has kept it from the engine.
    return ticket.cancelled() and ticket.cancel()
