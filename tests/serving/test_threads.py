"""The engine's thread, other threads, forks, event loops and the end of an engine."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import pickle
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import Future, TimeoutError, wait
from contextlib import suppress
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim import DDIM, Engine, Request
from fastddim.serving.guard import Guard
from fastddim.serving.thread import Runner
from fastddim.serving.ticket import Ticket
from tests.serving.serving_cases import MIX, SHAPE, exact, expected

WAITS: dict[str, Callable[[Engine, Ticket], object]] = {
    "drain": lambda engine, other: engine.drain(),
    "result": lambda engine, other: other.result(),
    "exception": lambda engine, other: other.exception(),
    "run": lambda engine, other: list(engine.run([Request(3, ddim=MIX[0])])),
    "close": lambda engine, other: engine.close(),
}


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("name", WAITS)
def test_a_callback_that_waits_for_ticks_is_refused(name: str, started: bool) -> None:
    engine = Engine(exact, SHAPE, 1)
    refused: list[str] = []

    def waits(_: object) -> None:
        try:
            WAITS[name](engine, second)
        except RuntimeError as error:
            refused.append(str(error))

    first, second = (engine.submit(Request(seed, ddim=MIX[1])) for seed in (1, 2))
    first.add_done_callback(waits)
    if started:
        engine.start()
    else:
        engine.drain()
    assert not wait([second], timeout=10).not_done
    assert len(refused) == 1
    assert "callbacks must neither take nor await its ticks" in refused[0]
    assert torch.equal(second.result(), expected(1, 2, 1))
    engine.close(drain=True)
    assert engine.metrics().submitted == engine.metrics().finished + engine.metrics().cancelled


def test_a_stop_iteration_of_the_model_reaches_asyncio() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return next(iter(()))

    async def main() -> None:
        async with Engine(model, SHAPE, 1) as engine:
            future = asyncio.wrap_future(engine.submit(Request(1)))
            with pytest.raises(RuntimeError, match="the model raised StopIteration"):
                await asyncio.wait_for(future, 10)

    asyncio.run(main())


def test_an_exit_in_a_callback_keeps_no_finished_sample_back() -> None:
    engine = Engine(exact, SHAPE, 2)
    futures = [engine.submit(Request(seed, ddim=MIX[0])) for seed in range(4)]
    for future in futures[::2]:
        future.add_done_callback(lambda _: sys.exit(3))
    engine.start()
    assert not wait(futures, timeout=10).not_done
    for seed in range(2):  # The two samples were made in the same tick.
        with suppress(SystemExit):
            assert torch.equal(futures[seed].result(), expected(0, seed, 2))
    assert all(isinstance(future.exception(), SystemExit) for future in futures[2:])
    found = engine.metrics()
    assert found.finished + found.failed == found.submitted == 4
    assert (found.queued, found.active) == (0, 0)


def test_a_cancelled_block_of_asyncio_cancels_its_requests() -> None:
    futures: list[Future[Tensor]] = []
    began = asyncio.Event()

    def slow(x: Tensor, t: Tensor) -> Tensor:
        time.sleep(0.002)
        return x

    async def block() -> None:
        async with Engine(slow, SHAPE, 1) as engine:
            futures.extend(engine.submit(Request(seed, ddim=DDIM(1000))) for seed in range(50))
            began.set()

    async def main() -> None:
        task = asyncio.create_task(block())
        await began.wait()
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert all(future.cancelled() for future in futures)

    before = time.perf_counter()
    asyncio.run(main())
    assert time.perf_counter() - before < 10  # All of the requests would take 100 seconds.


def test_an_engine_without_work_or_owner_ends_its_thread() -> None:
    engine = Engine(exact, SHAPE, 1)
    engine.start()
    assert engine._runner is not None
    thread = engine._runner._thread
    assert thread.daemon  # A process with a started engine ends.
    engine.submit(Request(1, ddim=MIX[0])).result()
    engine.drain()
    del engine
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_an_engine_without_owner_finishes_its_work() -> None:
    found: list[Tensor] = []
    done = threading.Event()

    def taken(future: Future[Tensor]) -> None:
        found.append(future.result())
        done.set()

    engine = Engine(exact, SHAPE, 1)
    held, arrived = weakref.ref(engine), engine._arrived
    engine.start()
    while engine._runner is not None and engine._runner.kept is not None:
        time.sleep(0.001)
    with arrived:  # The thread learns of the work after the engine has lost its owner.
        engine.submit(Request(2, ddim=MIX[1])).add_done_callback(taken)
        del engine
        gc.collect()
    assert done.wait(10)
    assert torch.equal(found[0], expected(1, 2, 1))
    for _ in range(100):
        gc.collect()
        if held() is None:
            return
        time.sleep(0.01)
    pytest.fail("the engine is still held")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_of_a_started_engine_is_refused() -> None:
    def answers() -> bool:
        """Whether each method is refused, where it would wait for a thread that is not there."""
        methods: list[Callable[[], object]] = [
            lambda: engine.submit(Request(1)),
            future.result,
            engine.drain,
            engine.step,
            engine.start,
            engine.warm_up,
            engine.close,
            lambda: list(engine.run([Request(1)])),
        ]
        for method in methods:
            with pytest.raises(RuntimeError, match="and not in this fork of it: make an engine"):
                method()
        return True

    held = threading.Event()

    def model(x: Tensor, t: Tensor) -> Tensor:
        held.wait()
        return x

    engine = Engine(model, SHAPE, 1)
    engine.start()
    future = engine.submit(Request(1, ddim=MIX[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of the thread.
        child = os.fork()
    if not child:
        code = 1
        with suppress(BaseException):
            code = 0 if answers() else 1
        os._exit(code)
    for _ in range(1000):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.01)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the fork hangs")
    assert status == 0
    held.set()
    engine.close(drain=True)
    assert future.result(timeout=0).shape == SHAPE


@pytest.mark.parametrize("function", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_engine_and_its_futures_are_not_copied(function: Callable[[Any], object]) -> None:
    engine = Engine(exact, SHAPE, 1)
    with pytest.raises(TypeError, match="an Engine cannot be copied or pickled: make one in each"):
        function(engine)
    with pytest.raises(TypeError, match="future of a sample cannot be copied or pickled: pass"):
        function(engine.submit(Request(1)))


def test_an_interrupted_close_can_be_called_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Runner) -> None:
        raise KeyboardInterrupt

    engine = Engine(exact, SHAPE, 1)
    engine.start()
    runner = engine._runner
    assert runner is not None
    future = engine.submit(Request(1, ddim=DDIM(1000)))
    with monkeypatch.context() as patched:
        patched.setattr(Runner, "stop", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.close()
    engine.close()
    assert future.done()
    assert not runner._thread.is_alive()


def test_an_interrupt_anywhere_in_a_condition_leaves_it_free() -> None:
    free: list[bool] = []

    def takes(guard: Guard) -> None:
        free.append(guard.acquire(timeout=5))
        guard.release()

    def uses(guard: Guard, at: int) -> bool:
        """Interrupts the ``at``-th instruction of the library; returns whether there are more."""
        left = at

        def traced(frame: FrameType, event: str, _: object) -> Any:
            nonlocal left
            if frame.f_code.co_filename != threading.__file__:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                left -= 1
                if not left:
                    raise KeyboardInterrupt
            return traced

        before = sys.gettrace()
        sys.settrace(traced)
        try:
            with guard:
                guard.notify_all()
                guard.wait(1e-4)
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    at = 1
    while uses(guard := Guard(), at):
        thread = threading.Thread(target=takes, args=(guard,))
        thread.start()
        thread.join()
        at += 1
    assert at > 50  # ``notify_all`` and ``wait`` have more instructions.
    assert free == [True] * (at - 1)


def test_a_timeout_does_not_await_the_tick_of_another_thread() -> None:
    began, held = threading.Event(), threading.Event()

    def model(x: Tensor, t: Tensor) -> Tensor:
        began.set()
        held.wait(10)
        return exact(x, t)

    engine = Engine(model, SHAPE, 1)
    futures = [engine.submit(Request(seed, ddim=MIX[0])) for seed in range(2)]
    thread = threading.Thread(target=engine.drain)
    thread.start()
    began.wait()
    before = time.perf_counter()
    with pytest.raises(TimeoutError):
        futures[1].result(timeout=0.05)
    assert time.perf_counter() - before < 5
    held.set()
    assert torch.equal(futures[1].result(timeout=10), expected(0, 1, 1))
    thread.join()
