"""The order of service, the queue's limit, the metrics, threads, asyncio, draining and closing."""

from __future__ import annotations

import asyncio
import gc
import queue
import threading
import time
import weakref
from concurrent.futures import (
    CancelledError,
    Future,
    ThreadPoolExecutor,
    TimeoutError,
    as_completed,
    wait,
)
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim import DDIM, Engine, QueueFull, Request
from fastddim.serving import metrics as recorded
from fastddim.serving.ticket import Ticket
from tests.paths import use
from tests.serving.serving_cases import MIX, SHAPE, alone, exact, expected

STEPS = (5, 2, 9, 3, 2)


@pytest.mark.parametrize(
    ("order", "wanted"),
    [("first", [0, 1, 2, 3, 4]), ("shortest", [1, 4, 3, 0, 2]), ("deadline", [4, 3, 1, 0, 2])],
)
def test_the_order_of_service_is_the_engines(order: str, wanted: list[int]) -> None:
    engine = Engine(exact, SHAPE, 1, order=order)
    found: list[int] = []

    def noted(future: Future[Tensor]) -> None:
        assert isinstance(future, Ticket)
        found.append(future.number)

    deadlines = (40.0, 30.0, None, 20.0, 10.0)
    for seed, (steps, deadline) in enumerate(zip(STEPS, deadlines, strict=True)):
        request = Request(seed, ddim=DDIM(steps), deadline=deadline)
        engine.submit(request).add_done_callback(noted)
    engine.drain()
    assert found == wanted


def test_a_full_queue_refuses_and_counts() -> None:
    engine = Engine(exact, SHAPE, 1, limit=2)
    futures = [engine.submit(Request(seed, ddim=MIX[0])) for seed in range(2)]
    with pytest.raises(QueueFull, match="the queue holds limit = 2 requests, and takes no more"):
        engine.submit(Request(3))
    assert issubclass(QueueFull, queue.Full)
    engine.step()
    futures.append(engine.submit(Request(2, ddim=MIX[0])))
    engine.drain()
    for seed, future in enumerate(futures):
        assert torch.equal(future.result(), expected(0, seed, 1))
    assert engine.metrics().refused == 1


def test_run_waits_where_the_queue_is_full() -> None:
    engine = Engine(exact, SHAPE, 2, limit=1)
    other = engine.submit(Request(50, ddim=MIX[1]))
    found = dict(engine.run(Request(seed, ddim=MIX[0]) for seed in range(9)))
    assert sorted(found) == list(range(9))
    assert torch.equal(other.result(), expected(1, 50, 2))


def test_run_reads_its_requests_as_slots_are_free() -> None:
    read = 0

    def endless() -> object:
        nonlocal read
        while True:
            yield Request(read, ddim=MIX[0])
            read += 1

    engine = Engine(exact, SHAPE, 2)
    found = engine.run(endless())  # type: ignore[arg-type]
    for _ in range(6):
        next(found)
    assert read <= 6 + 2 * 2
    found.close()  # type: ignore[attr-defined]
    engine.drain()
    assert engine.metrics().active == 0


def test_metrics_count_and_measure() -> None:
    engine = Engine(exact, SHAPE, 2)
    empty = engine.metrics()
    assert (empty.ticks_per_second, empty.occupancy, empty.latency_p99) == (0.0, 0.0, 0.0)
    for seed in range(3):
        engine.submit(Request(seed, ddim=DDIM(4), deadline=1e-9 if seed else None))
    engine.step()
    found = engine.metrics()
    assert (found.submitted, found.queued, found.active, found.slots) == (3, 1, 2, 2)
    time.sleep(0.02)
    engine.drain()
    found = engine.metrics()
    assert (found.finished, found.late, found.ticks) == (3, 2, 8)
    assert found.occupancy == 12 / 16
    assert found.latency_p99 >= found.latency_p90 >= found.latency_p50 >= 0.02
    assert 0 < found.ticks_per_second < 8 / 0.02


def test_rates_are_of_the_latest_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "KEPT", 4)
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    recorder = recorded.Recorder(2, 2)
    for pause, active in ((9.0, 2), (9.0, 2), (0.5, 1), (0.5, 1), (0.5, 1), (0.5, 0)):
        clock[0] += pause
        recorder.tick(active, 1)
        recorder.finish(clock[0] - pause, None)
    found = recorder.now(0, 0)
    assert found.ticks_per_second == 3 / 1.5
    assert found.occupancy == 3 / 8
    assert (found.latency_p50, found.latency_p99) == (0.5, 0.5)


def test_a_thread_serves_many_threads() -> None:
    engine = Engine(exact, SHAPE, 3)
    engine.start()
    engine.start()
    found: dict[int, Tensor] = {}

    def asks(first: int) -> None:
        futures = {engine.submit(Request(s, ddim=MIX[s % 7])): s for s in range(first, first + 8)}
        for future in as_completed(futures, timeout=30):
            found[futures[future]] = future.result()  # type: ignore[index]

    threads = [threading.Thread(target=asks, args=(10 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.raises(RuntimeError, match="step must not be called while the engine's thread"):
        engine.step()
    engine.close()
    assert len(found) == 32
    for seed, x in found.items():
        assert torch.equal(x, expected(seed % 7, seed, 3))


def test_an_engine_keeps_the_backend_of_its_birth() -> None:
    with use("torch"):
        engine = Engine(exact, SHAPE, 2)
        want = [alone(exact, Request(seed, ddim=MIX[1]), 2) for seed in range(3)]
    with engine:
        engine.start()
        futures = [engine.submit(Request(seed, ddim=MIX[1])) for seed in range(3)]
        for future, x in zip(futures, want, strict=True):
            assert torch.equal(future.result(), x)


def test_run_takes_its_results_from_the_thread() -> None:
    with Engine(exact, SHAPE, 2) as engine:
        engine.start()
        for i, x in engine.run(Request(seed, ddim=MIX[1]) for seed in range(7)):
            assert torch.equal(x, expected(1, i, 2))
        engine.drain()
        assert engine.metrics().finished == 7


def test_the_metrics_count_a_result_that_is_there() -> None:
    seen: list[tuple[int, int]] = []
    fails = [False, True, False]

    def model(x: Tensor, t: Tensor) -> Tensor:
        if fails[len(seen)]:
            raise ArithmeticError
        return x

    engine = Engine(model, SHAPE, 1)

    def look(_: Any) -> None:
        found = engine.metrics()
        seen.append((found.finished, found.failed))

    for seed in range(3):
        engine.submit(Request(seed, ddim=MIX[1])).add_done_callback(look)
    engine.drain()
    assert seen == [(1, 0), (1, 1), (2, 1)]


def test_asyncio_awaits_samples_and_cancels() -> None:
    async def main() -> None:
        engine = Engine(exact, SHAPE, 2)
        async with engine:
            tasks = [
                asyncio.wrap_future(engine.submit(Request(seed, ddim=MIX[1]))) for seed in range(6)
            ]
            tasks[5].cancel()
            for seed, task in enumerate(tasks[:5]):
                assert torch.equal(await task, expected(1, seed, 2))
        with pytest.raises(RuntimeError, match="the engine is closed"):
            engine.submit(Request(1))
        assert engine.metrics().finished + engine.metrics().cancelled == 6

    asyncio.run(main())


def test_leaving_the_block_finishes_or_cancels() -> None:
    with Engine(exact, SHAPE, 2) as engine:
        future = engine.submit(Request(1, ddim=MIX[0]))
    assert torch.equal(future.result(timeout=0), expected(0, 1, 2))
    engine = Engine(exact, SHAPE, 2)
    slow = engine.submit(Request(1, ddim=DDIM(1000)))
    with suppress(ZeroDivisionError), engine:
        engine.start()
        raise ZeroDivisionError
    with pytest.raises(CancelledError):
        slow.result(timeout=0)


def test_closing_cancels_all_that_is_left() -> None:
    engine = Engine(exact, SHAPE, 1)
    futures = [engine.submit(Request(seed)) for seed in range(3)]
    engine.step()
    engine.close()
    engine.close()
    assert all(future.cancelled() for future in futures)
    assert not wait(futures, timeout=0).not_done
    found = engine.metrics()
    assert (found.cancelled, found.active, found.queued) == (3, 0, 0)


def test_an_engine_survives_its_idle_thread() -> None:
    engine = Engine(exact, SHAPE, 1)
    engine.start()
    for seed in range(3):
        assert torch.equal(
            engine.submit(Request(seed, ddim=MIX[0])).result(10), expected(0, seed, 1)
        )
        engine.drain()
    engine.close(drain=True)


def test_an_error_of_the_thread_closes_the_engine() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        raise SystemExit(3)

    engine = Engine(model, SHAPE, 1)
    futures = [engine.submit(Request(seed, ddim=MIX[0])) for seed in range(2)]
    engine.start()
    for future in futures:
        assert isinstance(future.exception(timeout=10), SystemExit)
    engine.drain()
    with pytest.raises(RuntimeError, match="the engine is closed after an error of its thread"):
        engine.submit(Request(1))
    engine.close()


def test_a_timeout_of_a_result_is_kept() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        time.sleep(0.01)
        return x

    engine = Engine(model, SHAPE, 1)
    future = engine.submit(Request(1, ddim=DDIM(1000)))
    before = time.perf_counter()
    with pytest.raises(TimeoutError):  # its own class before Python 3.11
        future.result(timeout=0.05)
    assert time.perf_counter() - before < 1
    assert not future.done()
    assert future.running()


def test_a_kept_future_keeps_its_sample_alone() -> None:
    engine = Engine(exact, SHAPE, 1)
    futures = [engine.submit(Request(seed, x_T=torch.ones(SHAPE), ddim=MIX[0])) for seed in (1, 2)]
    futures[1].cancel()
    engine.drain()
    held = weakref.ref(engine)
    del engine
    gc.collect()
    assert held() is None
    assert [future.work.x_T for future in futures] == [None, None]
    assert futures[0].result().shape == SHAPE


def test_a_warm_up_serves_no_request_and_moves_none() -> None:
    calls: list[int] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        assert x.isfinite().all()
        return exact(x, t)

    engine = Engine(model, SHAPE, 4, batch_size=2)
    engine.warm_up()
    assert calls == [2] * 4
    assert (engine.metrics().ticks, engine.metrics().submitted) == (0, 0)
    future = engine.submit(Request(7, ddim=MIX[2]))
    engine.step()
    with pytest.raises(RuntimeError, match="warm_up must be called while no request has a slot"):
        engine.warm_up()
    assert torch.equal(future.result(), expected(2, 7, 2))
    with pytest.raises(ValueError, match="ddim must have the engine's clip"):
        engine.warm_up(DDIM(3, clip=1.0))
    with pytest.raises(TypeError, match=r"ddim must be a fastddim\.DDIM, got int"):
        engine.warm_up(3)  # type: ignore[arg-type]
    engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.warm_up()


def test_a_warm_up_waits_for_the_tick_of_another_thread() -> None:
    entered, leave = threading.Event(), threading.Event()

    def model(x: Tensor, t: Tensor) -> Tensor:
        entered.set()
        assert leave.wait(10)
        return x

    engine = Engine(model, SHAPE, 1)
    engine.submit(Request(1, ddim=MIX[5]))
    with ThreadPoolExecutor(2) as pool:
        pool.submit(engine.step)
        assert entered.wait(10)
        warm = pool.submit(engine.warm_up)
        assert wait([warm], timeout=0.05).not_done
        leave.set()
        warm.result(timeout=10)


def test_a_warm_up_raises_the_models_exception() -> None:
    luck = [True]

    def model(x: Tensor, t: Tensor) -> Tensor:
        if luck.pop():
            raise ArithmeticError("out of luck")
        luck.append(False)
        return exact(x, t)

    engine = Engine(model, SHAPE, 2)
    with pytest.raises(ArithmeticError, match="out of luck"):
        engine.warm_up()
    luck.append(False)
    assert torch.equal(engine.submit(Request(7, ddim=MIX[2])).result(), expected(2, 7, 2))
