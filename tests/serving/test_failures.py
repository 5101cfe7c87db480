"""Exceptions, NaN, cancellations and interrupts reach the requests they concern, and no other."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim import DDIM, Engine, Request
from fastddim.serving import tables
from fastddim.serving.batch import Batches
from fastddim.serving.landing import Landing
from fastddim.serving.order import Waiting
from fastddim.serving.slots import Slots
from fastddim.serving.ticket import Ticket
from tests.serving.serving_cases import MIX, SHAPE, alone, exact, expected, named


class Breaking:
    """The exact model, which raises at some of its calls."""

    def __init__(self, *at: int, error: type[BaseException] = ZeroDivisionError) -> None:
        self.at, self.error, self.calls = at, error, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        if self.calls in self.at:
            raise self.error("out of luck")
        return exact(x, t)


def test_the_models_exception_fails_the_requests_in_flight() -> None:
    engine = Engine(Breaking(3), SHAPE, 3)
    futures = [engine.submit(Request(seed, ddim=MIX[0])) for seed in range(5)]
    engine.drain()
    for future in futures[:3]:
        with pytest.raises(ZeroDivisionError, match="out of luck"):
            future.result()
    for seed in (3, 4):
        assert torch.equal(futures[seed].result(), expected(0, seed, 3))
    assert torch.equal(engine.submit(Request(9, ddim=MIX[1])).result(), expected(1, 9, 3))
    assert (engine.metrics().failed, engine.metrics().finished) == (3, 3)


def test_the_models_exception_fails_its_batch_alone() -> None:
    engine = Engine(Breaking(4), SHAPE, 6, batch_size=2)  # the first call of the second tick
    futures = [engine.submit(Request(seed, ddim=MIX[0])) for seed in range(8)]
    engine.drain()
    for seed, future in enumerate(futures):
        if seed < 2:
            assert isinstance(future.exception(), ZeroDivisionError)
        else:
            assert torch.equal(future.result(), expected(0, seed, 2))
    found = engine.metrics()
    assert (found.failed, found.finished, found.active) == (2, 6, 0)


@pytest.mark.parametrize("guided", [False, True])
def test_a_condition_the_model_refuses_leaves_with_its_request(guided: bool) -> None:
    table = torch.linspace(0, 1, 3 * 24).view(3, *SHAPE)

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return 0.1 * x + table[y]

    def request_of(label: int) -> Request:
        cond, uncond = ({"y": torch.tensor(y)} for y in (label, 2 * label))
        rest: dict[str, Any] = {"uncond": uncond, "guidance": 2.0} if guided else {}
        return Request(1, ddim=MIX[0], cond=cond, **rest)

    engine = Engine(model, SHAPE, 4, cond={"y": torch.tensor(0)}, guided=guided)
    futures = [engine.submit(request_of(label)) for label in (1, 1, 7)]
    engine.drain()
    assert all(isinstance(future.exception(), IndexError) for future in futures)
    after = engine.submit(request_of(1))
    assert torch.equal(after.result(), alone(model, request_of(1), 4))


def test_a_request_that_cannot_move_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def take(*_: object) -> None:
        raise MemoryError("no room")

    engine = Engine(exact, SHAPE, 4, batch_size=2)
    futures = [engine.submit(Request(seed, ddim=MIX[n])) for seed, n in enumerate((4, 5, 4, 5))]
    monkeypatch.setattr(Slots, "take", take)
    engine.drain()
    assert isinstance(futures[2].exception(), MemoryError) ^ isinstance(
        futures[0].exception(), MemoryError
    )
    assert (engine.metrics().failed, engine.metrics().finished) == (1, 3)


def test_a_model_of_wrong_outputs_fails_its_requests() -> None:
    engine = Engine(lambda x, t: x[:, :1], SHAPE, 2)
    with pytest.raises(ValueError, match="model must return a tensor of x's shape"):
        engine.submit(Request(1)).result()
    writing = Engine(lambda x, t: x.mul_(2), SHAPE, 2)
    with pytest.raises(ValueError, match="model must not write into x"):
        writing.submit(Request(1)).result()


@pytest.mark.parametrize("by_engine", [True, False])
def test_a_nan_is_a_failure_where_asked_for(by_engine: bool) -> None:
    engine = Engine(exact, SHAPE, 2, check_finite=by_engine)
    nan = torch.full(SHAPE, float("nan"))
    check = None if by_engine else True
    bad = engine.submit(Request(8, x_T=nan, ddim=MIX[0], check_finite=check))
    good = engine.submit(Request(1, ddim=MIX[0], check_finite=check))
    unchecked = engine.submit(Request(8, x_T=nan, ddim=MIX[0], check_finite=False))
    with pytest.raises(FloatingPointError, match="the sample of seed 8 holds NaN or an infinity"):
        bad.result()
    assert torch.equal(good.result(), expected(0, 1, 2))
    assert unchecked.result().isnan().all()


def test_a_cancelled_request_frees_its_slot_for_the_next() -> None:
    model = Breaking()
    engine = Engine(model, SHAPE, 1)
    first, second = (engine.submit(Request(seed, ddim=MIX[1])) for seed in (1, 2))
    engine.step()
    assert first.running()
    assert not second.running()
    assert first.cancel()
    assert first.cancelled()
    assert not first.running()
    assert torch.equal(second.result(), expected(1, 2, 1))
    assert model.calls == 1 + 7
    with pytest.raises(CancelledError):
        first.result()
    assert not second.cancel()


def test_a_cancelled_request_leaves_the_queue() -> None:
    engine = Engine(exact, SHAPE, 1, limit=2)
    kept, dropped = (engine.submit(Request(seed, ddim=MIX[0])) for seed in (1, 2))
    assert dropped.cancel()
    assert dropped.cancel()
    assert engine.metrics().queued == 1
    more = engine.submit(Request(3, ddim=MIX[0]))
    assert torch.equal(more.result(), expected(0, 3, 1))
    assert torch.equal(kept.result(), expected(0, 1, 1))
    assert engine.metrics().cancelled == 1


def test_a_callback_may_submit_and_cancel() -> None:
    engine = Engine(exact, SHAPE, 1)
    more: list[Ticket] = []
    last: list[Ticket] = []

    def done(_: object) -> None:
        last[0].cancel()
        more.append(engine.submit(Request(5, ddim=MIX[0])))

    engine.submit(Request(1, ddim=MIX[0])).add_done_callback(done)
    last.append(engine.submit(Request(2, ddim=MIX[0])))
    engine.drain()
    assert last[0].cancelled()
    assert torch.equal(more[0].result(), expected(0, 5, 1))


def test_a_model_that_steps_its_engine_is_refused() -> None:
    engine: Engine

    def model(x: Tensor, t: Tensor) -> Tensor:
        engine.step()
        return x

    engine = Engine(model, SHAPE, 1)
    with pytest.raises(RuntimeError, match="model and callbacks must neither take nor await"):
        engine.submit(Request(1)).result()


def test_an_idle_slot_stays_finite_after_any_guidance() -> None:
    def model(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        assert x.isfinite().all()
        return 0.1 * x + c

    engine = Engine(model, SHAPE, 2, cond={"c": SHAPE}, guided=True)
    none, nine = {"c": torch.zeros(SHAPE)}, {"c": torch.full(SHAPE, 9.0)}
    engine.submit(Request(1, ddim=MIX[5], cond=nine, uncond=none, guidance=3e38))
    future = engine.submit(Request(2, ddim=MIX[0], cond=none))
    engine.drain()
    assert future.result(timeout=0).isfinite().all()


def test_an_interrupt_of_the_model_begins_requests_again() -> None:
    engine = Engine(Breaking(3, error=KeyboardInterrupt), SHAPE, 2)
    futures = [engine.submit(Request(seed, ddim=MIX[1])) for seed in range(4)]
    with pytest.raises(KeyboardInterrupt):
        engine.drain()
    assert not any(future.done() for future in futures)
    engine.drain()
    for seed, future in enumerate(futures):
        assert torch.equal(future.result(timeout=0), expected(1, seed, 2))


def test_cancelled_requests_leave_the_queue_and_no_others() -> None:
    engine = Engine(exact, SHAPE, 1, order="shortest")
    futures = [engine.submit(Request(seed, ddim=MIX[5])) for seed in range(100)]
    for future in futures[:97]:
        future.cancel()
    assert len(engine._waiting._heap) < 80
    engine.drain()
    for seed in (97, 98, 99):
        assert torch.equal(futures[seed].result(timeout=0), expected(5, seed, 1))


def test_a_request_cancelled_after_an_interrupt_is_let_go() -> None:
    engine = Engine(Breaking(2, error=KeyboardInterrupt), SHAPE, 1)
    future = engine.submit(Request(1, x_T=torch.ones(SHAPE), ddim=MIX[1]))
    with pytest.raises(KeyboardInterrupt):
        engine.drain()
    future.cancel()
    assert not engine.step()
    assert future.work.x_T is None


def test_interrupts_leave_room_in_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_ROOM", 8)
    engine = Engine(Breaking(*range(20), error=KeyboardInterrupt), SHAPE, 1)
    for steps in range(3, 22):
        future = engine.submit(Request(1, ddim=DDIM(steps)))
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        future.cancel()
    assert len(engine._batches._tables.table) <= 64  # The samplers have 228 rows.


@pytest.mark.parametrize("error", [None, ArithmeticError])
def test_a_request_cancelled_as_it_ends_is_counted_once(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | None
) -> None:
    engine = Engine(exact if error is None else Breaking(1, error=error), SHAPE, 1)
    future = engine.submit(Request(1, ddim=MIX[5]))
    noted = future.set_running_or_notify_cancel

    def late() -> bool:
        engine.step()  # The future is cancelled, and the engine does not know.
        return noted()

    monkeypatch.setattr(future, "set_running_or_notify_cancel", late)
    assert future.cancel()
    found = engine.metrics()
    assert (found.cancelled, found.failed, found.finished, found.active) == (1, 0, 0, 0)


def interrupting(function: Callable[..., object], at: int, after: bool) -> Callable[..., object]:
    """``function``, which one of its calls interrupts, before or after its work."""
    calls = 0

    def called(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == at and not after:
            raise KeyboardInterrupt
        found = function(*arguments)
        if calls == at:
            raise KeyboardInterrupt
        return found

    return called


class Interruptible:
    """A method whose next call is interrupted once ``interrupt`` is called."""

    def __init__(self, method: Callable[..., object]) -> None:
        self.method, self.calls = method, method

    def interrupt(self, after: bool) -> None:
        self.calls = interrupting(self.method, 1, after)

    def __get__(self, owner: object, _: type) -> Callable[..., object]:
        return lambda *arguments: self.calls(owner, *arguments)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "name",
    ["place", "fill", "free", "gather", "take", "tick", "copy", "drop", "set_result", "landed"],
)
def test_an_interrupt_anywhere_loses_no_request(
    monkeypatch: pytest.MonkeyPatch, name: str, at: int, after: bool
) -> None:
    owners: dict[str, type] = {"copy": Landing, "landed": Landing, "drop": Waiting}
    owners |= {"take": Slots, "set_result": Ticket}
    owner = owners.get(name, Batches)
    calls: list[int] = []

    def noted(n: int, _: object) -> None:
        calls.append(n)

    slots, count = (24, 24) if name == "take" else (4, 12)
    engine = Engine(exact, SHAPE, slots, batch_size=2)
    futures = [engine.submit(Request(seed, ddim=MIX[seed % 6])) for seed in range(count)]
    for n, future in enumerate(futures):
        future.add_done_callback(partial(noted, n))
    monkeypatch.setattr(owner, name, interrupting(getattr(owner, name), at, after))
    with pytest.raises(KeyboardInterrupt):
        engine.drain()
    engine.drain()
    for seed, future in enumerate(futures):
        assert torch.equal(future.result(timeout=0), expected(seed % 6, seed, 2))
    assert sorted(calls) == list(range(count))
    found = engine.metrics()
    assert (found.finished, found.failed, found.active, found.queued) == (count, 0, 0, 0)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_an_interrupt_of_a_delivery_counts_a_request_once(
    monkeypatch: pytest.MonkeyPatch, fails: bool, after: bool
) -> None:
    name = "set_exception" if fails else "set_result"
    engine = Engine(Breaking(2) if fails else exact, SHAPE, 2)
    futures = [engine.submit(Request(seed, ddim=MIX[0])) for seed in range(2)]
    monkeypatch.setattr(Ticket, name, interrupting(getattr(Ticket, name), 1, after))
    with pytest.raises(KeyboardInterrupt):
        engine.drain()
    engine.drain()
    failed = sum(future.exception() is not None for future in futures)
    found = engine.metrics()
    assert (found.failed, found.finished) == (failed, 2 - failed)
    assert failed == (fails and after)  # The others began again, and their model has better luck.


@pytest.mark.parametrize("after", [False, True])
def test_an_interrupted_submission_leaves_a_whole_queue(
    monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    engine = Engine(exact, SHAPE, 1, order="shortest")
    with monkeypatch.context() as patched:
        patched.setattr(heapq, "heappush", interrupting(heapq.heappush, 1, after))
        with pytest.raises(KeyboardInterrupt):
            engine.submit(Request(1, ddim=MIX[0]))
    future = engine.submit(Request(2, ddim=MIX[0]))
    engine.drain()
    assert torch.equal(future.result(timeout=0), expected(0, 2, 1))
    found = engine.metrics()
    assert (found.submitted, found.finished, found.queued) == (1, 1, 0)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Future, "cancel"),
        (Future, "set_running_or_notify_cancel"),
        (Engine, "_dropped"),
        (Waiting, "drop"),
    ],
)
@pytest.mark.parametrize("placed", [False, True])
def test_an_interrupted_cancellation_is_counted_once(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, after: bool, again: bool, placed: bool
) -> None:
    monkeypatch.setattr(owner, name, method := Interruptible(getattr(owner, name)))
    engine = Engine(exact, SHAPE, 1)
    future = engine.submit(Request(1, ddim=MIX[0]))
    if placed:
        engine.step()
    method.interrupt(after)
    with pytest.raises(KeyboardInterrupt):
        future.cancel()
    if again:
        future.cancel()
    engine.drain()
    if not future.cancelled():
        assert (name, after, again) == ("cancel", False, False)
        assert torch.equal(future.result(), expected(0, 1, 1))
        return
    found = engine.metrics()
    assert (found.cancelled, found.finished, found.queued, found.active) == (1, 0, 0, 0)


@pytest.mark.parametrize(("owner", "name"), [(Landing, "copy"), (Slots, "guide")])
def test_a_copy_that_fails_is_its_requests_alone(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    method, calls = getattr(owner, name), 0

    def failing(*arguments: Any) -> object:
        nonlocal calls
        calls += 1
        if calls == (1 if name == "copy" else 3):  # The first two are those of ``fill``.
            raise MemoryError("no room")
        return method(*arguments)

    c, y, nothing = torch.ones(SHAPE), torch.tensor(1), torch.zeros(SHAPE)
    engine = Engine(named, SHAPE, 2, cond={"c": c, "y": y}, guided=True)
    requests = [
        Request(
            seed,
            ddim=DDIM(5),
            cond={"c": c, "y": y},
            uncond={"c": nothing},
            guidance=lambda t: 2.0 if t > 500 else 3.0,
        )
        for seed in range(2)
    ]
    futures = [engine.submit(request) for request in requests]
    monkeypatch.setattr(owner, name, failing)
    engine.drain()
    assert isinstance(futures[0].exception(), MemoryError)
    assert torch.equal(futures[1].result(), alone(named, requests[1], 2))
    assert (engine.metrics().failed, engine.metrics().finished) == (1, 1)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", ["_enter", "_leave", "_move"])
def test_an_interrupt_between_two_slots_loses_no_request(
    monkeypatch: pytest.MonkeyPatch, name: str, after: bool
) -> None:
    engine = Engine(exact, SHAPE, 4, batch_size=2)
    futures = [engine.submit(Request(seed, ddim=MIX[n])) for seed, n in enumerate((4, 5, 4, 5))]
    engine.step()  # Half of each batch is finished then.
    with monkeypatch.context() as patched:
        patched.setattr(Batches, name, interrupting(getattr(Batches, name), 1, after))
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    engine.drain()
    for seed, (future, n) in enumerate(zip(futures, (4, 5, 4, 5), strict=True)):
        assert torch.equal(future.result(timeout=0), expected(n, seed, 2))
    found = engine.metrics()
    assert (found.finished, found.active, found.queued) == (4, 0, 0)


def test_an_interrupted_run_cancels_its_requests() -> None:
    engine = Engine(Breaking(4, error=KeyboardInterrupt), SHAPE, 2)
    other = engine.submit(Request(7, ddim=MIX[1]))
    with pytest.raises(KeyboardInterrupt):
        list(engine.run(Request(seed, ddim=MIX[1]) for seed in range(9)))
    assert torch.equal(other.result(), expected(1, 7, 2))
    metrics = engine.metrics()
    assert metrics.cancelled == metrics.submitted - 1
    assert (metrics.queued, metrics.active) == (0, 0)


def test_run_yields_a_requests_errors_but_raises_the_engines() -> None:
    c, y, nothing = torch.ones(SHAPE), torch.tensor(1), torch.zeros(SHAPE)
    engine = Engine(named, SHAPE, 2, cond={"c": c, "y": y}, guided=True)
    cond: dict[str, Any] = {"cond": {"c": c, "y": y}, "uncond": {"c": nothing}, "ddim": MIX[0]}
    requests = [Request(1, guidance=lambda t: 1 / 0, **cond), Request(1, guidance=2.0, **cond)]
    found = dict(engine.run(requests, return_exceptions=True))
    assert isinstance(found[0], ZeroDivisionError)
    assert torch.equal(found[1], alone(named, requests[1], 2))
    engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        list(engine.run(requests, return_exceptions=True))


def test_run_raises_or_yields_a_failed_requests_exception() -> None:
    requests = [Request(1, ddim=MIX[0]), Request(-1), Request(2, ddim=MIX[0])]
    found = dict(Engine(exact, SHAPE, 1).run(requests, return_exceptions=True))
    assert torch.equal(found[2], expected(0, 2, 1))
    assert isinstance(found[1], ValueError)
    with pytest.raises(ValueError, match="seed must be"):
        list(Engine(exact, SHAPE, 1).run(requests))
    with pytest.raises(ZeroDivisionError):
        list(Engine(Breaking(1), SHAPE, 1).run(requests[:1]))


def test_a_slot_that_cannot_be_filled_fails_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(exact, SHAPE, 2)
    fill = Slots.fill

    def failing(self: Slots, slot: int, work: object, base: int) -> None:
        if getattr(work, "seed") == 1:  # noqa: B009
            raise MemoryError("no room")
        fill(self, slot, work, base)  # type: ignore[arg-type]

    monkeypatch.setattr(Slots, "fill", failing)
    futures = [engine.submit(Request(seed, ddim=MIX[0])) for seed in range(3)]
    engine.drain()
    assert isinstance(futures[1].exception(), MemoryError)
    for seed in (0, 2):
        assert torch.equal(futures[seed].result(), expected(0, seed, 2))
