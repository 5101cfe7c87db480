"""``Engine.run``: requests are submitted as slots are free, and samples come as they finish."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from typing import Any, TypeAlias

from torch import Tensor

from fastddim.serving.order import ClosedError, QueueFull
from fastddim.serving.request import Request
from fastddim.serving.ticket import Ticket

Done: TypeAlias = "queue.SimpleQueue[Future[Tensor]]"


def stream(
    requests: Iterable[Request],
    submit: Callable[[Request], Ticket],
    next_done: Callable[[Done], Future[Tensor] | None],
    ahead: int,
    return_exceptions: bool,
) -> Iterator[tuple[int, Any]]:
    """Yields (i, sample) of the i-th request, as ``Engine.run`` does.

    Args:
        requests, return_exceptions: as in ``Engine.run``.
        submit: the engine's.
        next_done: returns a future of the queue, or None where there is none yet.
        ahead: the most requests that are submitted and not yielded.
    """
    done: Done = queue.SimpleQueue()
    pending: dict[Future[Tensor], int] = {}
    rest, held, more = enumerate(requests), None, True
    try:
        while True:
            while more and len(pending) < ahead:
                i, request = next(rest, (-1, None)) if held is None else held
                held, more = None, i >= 0
                if not more:
                    break
                try:
                    ticket = submit(request)  # type: ignore[arg-type]
                except QueueFull:
                    held = i, request
                    break
                except Exception as error:
                    if isinstance(error, ClosedError) or not return_exceptions:
                        raise
                    yield i, error
                    continue
                pending[ticket] = i
                ticket.add_done_callback(done.put)
            if not pending and not more:
                return
            finished = next_done(done)
            if finished is None:
                continue
            i, outcome = pending.pop(finished), _outcome(finished)
            if isinstance(outcome, BaseException) and not return_exceptions:
                raise outcome
            yield i, outcome
    finally:
        for left in pending:
            left.cancel()


def _outcome(future: Future[Tensor]) -> Tensor | BaseException:
    """Returns the result of a future that is done, or its exception."""
    if future.cancelled():
        return CancelledError()
    error = future.exception()
    return future.result() if error is None else error
