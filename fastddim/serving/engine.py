"""The engine: requests come in, futures go out, and each tick moves every slot by one step."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastddim.check import kind, truth, whole
from fastddim.loop.devices import check_not_capturing, place_of
from fastddim.loop.model import Model, Predictor, warn_of_training
from fastddim.loop.options import checked_dtype
from fastddim.loop.recording import Memory
from fastddim.loop.sampler import DDIM
from fastddim.loop.streams import Streams
from fastddim.serving.batch import Batch, Batches
from fastddim.serving.delivery import Delivery
from fastddim.serving.guard import Guard
from fastddim.serving.landing import Landing
from fastddim.serving.metrics import Metrics, Recorder
from fastddim.serving.order import ClosedError, QueueFull, Waiting
from fastddim.serving.request import (
    Network,
    Request,
    checked,
    checked_shape,
    sampler_program,
    specs_of,
)
from fastddim.serving.stream import stream
from fastddim.serving.tables import Tables
from fastddim.serving.thread import Runner
from fastddim.serving.ticket import Ticket
from fastddim.step.arguments import OUTPUTS, check_untransformed


class Engine:
    """Serves samples by continuous batching: every slot of a batch makes another request's sample.

        engine = fastddim.Engine(model, (3, 32, 32), slots=16)
        for i, image in engine.run(fastddim.Request(seed) for seed in range(100)):
            ...

    A tick calls the model on all slots, each with its own t, and takes one fused step, each slot
    with its own row, seed and weight of guidance. A slot whose sample is finished takes the next
    request before the next tick, so no request waits for a slower one. The host knows how many
    ticks each slot needs, and never waits for the device. On CUDA a tick is one captured graph.

    **Batches.** With ``batch_size`` a tick calls the model on batches of that size, and only on as
    many as hold the requests: before each call requests move together. Choose the smallest size at
    which a sample costs the model hardly more than in a full batch of ``slots``.

    **Bits.** A sample is a function of its request alone: no bit depends on the requests in other
    slots, on the order in which requests came or on cancelled ones, if the model's output for a
    sample depends on that sample and the batch size alone. The batch size never changes, so the
    sample has the bits of ``DDIM.sample(model, seeds=[seed, ...], batch_size=batch_size)``. With
    ``guided`` the model is called with 2·batch_size samples: a guided request has the bits of
    ``DDIM.sample`` with guidance, and one without guidance those of ``2 * batch_size``.

    **Failures.** An exception of the model is the exception of all requests in its batch, and the
    engine goes on with the others. After a ``KeyboardInterrupt`` in ``step``, ``drain`` or
    ``result`` the engine is usable: the requests that had a slot begin again at the next tick.

    ``submit``, ``metrics`` and a future's methods may be called by any thread.

    Args:
        model: as in ``DDIM.sample``. The tensors that it gets are the engine's own memory, which
            the next tick overwrites.
        shape: of one sample, without the batch.
        slots: the number of samples that are made at the same time, ≥ 1.
        batch_size: the number of samples in a call of the model, which divides ``slots``;
            ``slots`` by default.
        ddim: the sampler of requests that name none. It also says what the network is: its
            prediction, clip, T and the dtype of t hold for every request.
        device, dtype, autocast: as in ``DDIM.sample``; ``dtype`` is float32 by default.
        cond: the model's keyword arguments: for each name the shape of one request's tensor,
            without the batch, of the model's dtype; or a tensor with that shape and its dtype.
        guided: whether requests may have guidance. The model is then called with 2·batch_size
            samples, without the condition and with it, for every request.
        order: which request is served next: ``"first"`` come, ``"shortest"``, with the fewest
            steps, or ``"deadline"``, the earliest.
        limit: the most requests that may wait; None for any number.
        check_finite: whether a sample that holds NaN or an infinity is a failure.

    Raises:
        TypeError, ValueError: naming the argument, the value and what is allowed.
        RuntimeError: while a CUDA graph is being captured.

    Example:
        >>> engine = Engine(lambda x, t: 0.1 * x, (3, 8, 8), slots=4, ddim=DDIM(steps=5))
        >>> future = engine.submit(Request(seed=7, ddim=DDIM(steps=3, eta=1.0)))
        >>> future.result().shape
        torch.Size([3, 8, 8])
    """

    def __init__(
        self,
        model: Model,
        shape: Sequence[int],
        slots: int,
        *,
        batch_size: int | None = None,
        ddim: DDIM | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        autocast: torch.dtype | bool | None = None,
        cond: Mapping[str, Tensor | Sequence[int]] | None = None,
        guided: bool = False,
        order: str = "first",
        limit: int | None = 1024,
        check_finite: bool = False,
    ) -> None:
        ddim = DDIM() if ddim is None else ddim
        if not isinstance(ddim, DDIM):
            raise TypeError(f"ddim must be a fastddim.DDIM, got {kind(ddim)}")
        count = whole("slots", slots, low=1)
        batch = count if batch_size is None else whole("batch_size", batch_size, low=1)
        if count % batch:
            raise ValueError(f"batch_size must divide slots = {count}, got {batch}")
        size = checked_shape(shape)
        dtype = torch.float32 if dtype is None else checked_dtype(dtype)
        if dtype not in OUTPUTS:
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        if limit is not None:
            limit = whole("limit", limit, low=1)
        self._waiting = Waiting(order, limit)
        where = place_of(device, model)
        on_gpu = where.type == "cuda"
        specs = specs_of(cond, dtype)
        guided, check_finite = truth("guided", guided), truth("check_finite", check_finite)
        self._network = Network(ddim, size, specs, guided, check_finite, on_gpu)
        check_not_capturing(where)
        check_untransformed("serving")
        predictor = Predictor.of(model, batch, where, dtype, None, None, None, None, autocast)
        warn_of_training(model, 2)
        self._streams = Streams(where)
        self._streams.join()
        times = ddim.schedule.times([t for t, _ in ddim.pairs])
        tables = Tables(times, where)
        shared = predictor, self._network, tables, Memory.on(where)
        batches = [Batch.of(*shared) for _ in range(count // batch)]
        self._landing = Landing(where)
        self._batches = Batches(batches, tables, self._landing)
        self._recorder = Recorder(count, batch)
        self._delivery = Delivery(self._landing, self._recorder)
        self._arrived = Guard()
        """Guards the queue, ``_cancelled``, ``_closed`` and the counts of requests."""
        self._turn = threading.Lock()
        """Is held while a tick is taken."""
        self._runs_in = 0
        """The thread that holds ``_turn``."""
        self._torn = False
        """True while a tick is taken. It stays True where an interrupt has ended the tick."""
        self._cancelled: deque[Ticket] = deque()
        """Cancelled requests that may still have a slot."""
        self._number = 0
        self._closed: str | None = None
        self._runner: Runner | None = None

    def warm_up(self, *ddims: DDIM) -> None:
        """Prepares the engine for requests of these samplers, so that the first is not slower.

        The model is called on slots without requests. On CUDA the ticks are then captured, and
        need not be captured again for requests whose steps are like those of ``ddims``: with noise
        or without, of order 1 or 2.

        Args:
            ddims: samplers as in ``Request``; the engine's own by default.

        Raises:
            TypeError, ValueError: naming the argument, the value and what is allowed.
            RuntimeError: a request has a slot, or the engine is closed.
            Exception: that of the model.
        """
        programs = [sampler_program(ddim, self._network) for ddim in ddims or (None,)]
        self._check_outside()
        self._has_thread()
        with self._turn:
            self._check_open()
            if self._batches.active:
                raise RuntimeError("warm_up must be called while no request has a slot")
            self._streams.join()
            self._batches.warm_up(programs)

    def submit(self, request: Request) -> Ticket:
        """Adds a request to the queue and returns the future of its sample.

        Returns:
            A ``concurrent.futures.Future``. Its result is a tensor of the engine's shape on the
            engine's device. ``cancel`` works until the result is there. If no thread runs the
            engine, ``result`` takes the ticks; ``wait``, ``as_completed`` and asyncio take none.

        Raises:
            TypeError, ValueError: before anything is queued, naming the argument, the value and
                what is allowed.
            QueueFull: ``limit`` requests wait already.
            RuntimeError: the engine is closed, or its thread runs in the process that was forked.
        """
        self._has_thread()
        with self._arrived:
            self._check_room()
        work = checked(request, self._network)
        with self._arrived:
            self._check_room()
            ticket = Ticket(self._number, work, request.deadline, self._dropped, self._helped)
            self._number += 1
            self._waiting.add(ticket)
            self._recorder.submitted += 1
            if self._runner is not None:
                self._runner.kept = self
            self._arrived.notify_all()
        return ticket

    def step(self) -> bool:
        """Takes one tick; returns False if there was nothing to do.

        Raises:
            RuntimeError: a thread runs the engine, the model or a callback calls this method, or a
                CUDA graph is being captured.
        """
        if self._has_thread():
            raise RuntimeError("step must not be called while the engine's thread takes the ticks")
        return self._step()

    def run(
        self, requests: Iterable[Request], *, return_exceptions: bool = False
    ) -> Iterator[tuple[int, Any]]:
        """Yields (i, sample) of the i-th request, as samples finish.

        At most 2·slots of the requests are submitted ahead, so ``requests`` may have no end. If
        the generator ends early, by an error, an interrupt or ``close``, its requests are
        cancelled.

        Args:
            requests: the requests.
            return_exceptions: whether a failed or refused request yields (i, its exception)
                instead of raising it. The error of a closed engine is raised.

        Raises:
            Exception: as ``submit`` does, and the exception of the first request that fails.
        """
        ahead = 2 * len(self._batches.tickets)
        return stream(requests, self.submit, self._next_done, ahead, return_exceptions)

    def drain(self) -> None:
        """Returns when every request that was submitted is finished, failed or cancelled.

        Raises:
            RuntimeError: the model or a callback calls this method.
        """
        self._check_outside()
        while not self._has_thread() and self._step():
            pass
        with self._arrived:
            while self._runner is not None and self._busy():
                self._arrived.wait()

    def start(self) -> None:
        """Starts a thread that takes the ticks until ``close``, and waits while there are none.

        The thread also ends once it has no work and the program no longer holds the engine.
        """
        self._has_thread()
        with self._arrived:
            self._check_open()
            if self._runner is None:
                methods = self._busy, self._step, self._broken
                self._runner = Runner(self._arrived, *methods)
                self._runner.kept = self

    def close(self, *, drain: bool = False) -> None:
        """Refuses further requests, and cancels those that are not finished.

        Args:
            drain: whether requests that were submitted are finished first.

        Raises:
            RuntimeError: the model or a callback calls this method.
        """
        self._check_outside()
        self._has_thread()
        with self._arrived:
            if self._closed is None:
                self._closed = "the engine is closed, and takes no requests"
        if drain:
            self.drain()
        if (runner := self._runner) is not None:
            runner.stop()
        with self._arrived:
            self._runner = None
            self._arrived.notify_all()
            left = self._waiting.all()
        for ticket in (*left, *self._batches.occupants()):
            ticket.cancel()
        self._step()

    def metrics(self) -> Metrics:
        """Returns the engine's counts, rates and latencies."""
        with self._arrived:
            return self._recorder.now(len(self._waiting), self._batches.active)

    def __enter__(self) -> Engine:
        """Closes the engine at the end of the block: after its requests, or at once by an error."""
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close(drain=kind is None)

    async def __aenter__(self) -> Engine:
        """Starts the thread; the end of the block closes the engine as ``with`` does.

        If the task is cancelled while the block's requests are finished, the rest are cancelled.

        async with engine:
            image = await asyncio.wrap_future(engine.submit(fastddim.Request(7)))
        """
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            await asyncio.to_thread(self.close, drain=kind is None)
        except asyncio.CancelledError:  # The thread above would finish all requests.
            await asyncio.to_thread(self.close)
            raise

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Engine cannot be copied or pickled: make one in each process")

    def _step(self) -> bool:
        self._check_outside()
        with self._turn:
            self._runs_in = threading.get_ident()
            try:
                self._streams.join()
                return self._advance()
            finally:
                self._runs_in = 0

    def _advance(self) -> bool:
        """Frees cancelled slots, fills free slots, takes the tick and hands out results."""
        batches = self._batches
        if self._torn:
            self._mend()
        self._torn = True
        while self._cancelled:
            ticket = self._cancelled[0]
            batches.free(ticket)
            ticket.strip()
            self._cancelled.popleft()
        self._refill()
        ticking = batches.active > 0
        if ticking:
            batches.gather(self._delivery.fail)
            self._recorder.tick(batches.active, batches.tick(self._delivery.fail))
        self._torn = False
        return self._delivery.deliver(wait=not ticking) or ticking

    def _refill(self) -> None:
        """Gives free slots to the requests that wait, in the order of service."""
        while len(self._waiting):
            with self._arrived:
                ticket = self._waiting.next()
                if ticket is None or not self._batches.place(ticket):
                    return
                self._waiting.drop(ticket)
            try:
                self._batches.fill(ticket)
            except Exception as error:  # The device has no memory for larger tables, say.
                self._batches.free(ticket)
                self._delivery.fail(ticket, error)

    def _mend(self) -> None:
        """Puts the requests of an interrupted tick back into the queue, to begin again."""
        landing = [flight.ticket for flight in self._landing.all()]
        with self._arrived:
            for ticket in self._batches.occupants():
                if not ticket.done() and ticket not in landing:
                    self._delivery.begins_again(ticket)
                    self._waiting.add(ticket)
            self._batches.clear()

    def _broken(self, error: BaseException) -> None:
        """Closes the engine after an error of its own: requests that are left fail with it."""
        with self._arrived:
            self._closed = f"the engine is closed after an error of its thread: {error!r}"
        with suppress(BaseException):  # An exit in a callback must not keep the rest waiting.
            self._delivery.deliver(wait=True)
        with self._arrived:
            left = [*self._waiting.all(), *self._batches.occupants()]
            left += [flight.ticket for flight in self._landing.all()]
            for ticket in left:
                self._waiting.drop(ticket)
        for ticket in left:
            with suppress(BaseException):
                self._delivery.fail(ticket, error)
        with self._arrived:
            self._batches.clear()
            self._runner = None
            self._arrived.notify_all()

    def _dropped(self, ticket: Ticket) -> None:
        """Takes note of a cancelled request, again where an interrupt has ended the first note."""
        with self._arrived:
            if not ticket.dropped:
                self._recorder.cancelled += 1
                ticket.dropped = True
            if self._waiting.drop(ticket):
                ticket.strip()
            else:
                self._cancelled.append(ticket)
            self._arrived.notify_all()

    def _helped(self, ticket: Ticket, timeout: float | None) -> bool:
        """Takes a tick for a future that is waited for, unless a thread takes the ticks."""
        self._check_outside()
        if self._has_thread():
            return False
        if timeout is not None and self._turn.locked():
            # Another thread takes a tick, which may be longer than the timeout.
            wait([ticket], min(timeout, 0.01))
            return True
        return self._step()

    def _next_done(self, done: queue.SimpleQueue[Future[Tensor]]) -> Future[Tensor] | None:
        """Returns a finished future, or None after a tick that finished none."""
        self._check_outside()
        if not self._has_thread() and done.empty() and self._step():
            return None if done.empty() else done.get()
        try:
            return done.get(timeout=0.05)
        except queue.Empty:
            return None

    def _has_thread(self) -> bool:
        """Returns whether a thread takes the ticks; refuses a fork, in which no thread does."""
        if (runner := self._runner) is not None:
            runner.check_process()
        return runner is not None

    def _busy(self) -> bool:
        return bool(
            len(self._waiting) or self._batches.active or len(self._landing) or self._cancelled
        )

    def _check_room(self) -> None:
        self._check_open()
        try:
            self._waiting.check_room()
        except QueueFull:
            self._recorder.refused += 1
            raise

    def _check_open(self) -> None:
        if self._closed is not None:
            raise ClosedError(self._closed)

    def _check_outside(self) -> None:
        if self._runs_in == threading.get_ident():
            raise RuntimeError(
                "an engine's model and callbacks must neither take nor await its ticks"
            )
