"""On CUDA, here a fake: the host never waits, and a future waits for its sample's copy alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from fastddim import Engine, Request
from fastddim.loop import recording
from fastddim.serving.request import checked
from tests.loop.waits_cases import assert_equal
from tests.loops import drawn
from tests.pretend import CUDA, Device
from tests.serving.serving_cases import MIX, SHAPE, alone, exact, expected, named


class Stream:
    def wait_stream(self, other: object) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        event.awaited = True


class Event:
    made: list[Event]

    def __init__(self) -> None:
        self.ended = self.awaited = self.synchronized = False
        self.made.append(self)

    def record(self, stream: object) -> None:
        pass

    def query(self) -> bool:
        return self.ended

    def synchronize(self) -> None:
        self.ended = self.synchronized = True


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine on a CPU whose finished samples are copied as on CUDA."""
    Event.made = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    found = Engine(exact, SHAPE, 2)
    monkeypatch.setattr(found._landing, "_side", Stream())
    return found


def test_a_future_waits_for_its_copy_and_not_the_engine(engine: Engine) -> None:
    short, long = (engine.submit(Request(seed, ddim=MIX[n])) for seed, n in ((1, 5), (2, 1)))
    late = engine.submit(Request(3, ddim=MIX[5]))
    engine.step()
    assert not short.done()
    engine.step()
    assert not late.done()
    assert Event.made[0].awaited  # by the stream, before the slot is filled again
    Event.made[0].ended = True
    engine.step()
    assert torch.equal(short.result(0), expected(5, 1, 2))
    assert not late.done()
    Event.made[1].ended = True
    engine.drain()
    assert torch.equal(late.result(0), expected(5, 3, 2))
    assert torch.equal(long.result(0), expected(1, 2, 2))
    assert [event.synchronized for event in Event.made] == [False, False, True]


def test_a_sample_on_its_way_can_be_cancelled(engine: Engine) -> None:
    future = engine.submit(Request(1, ddim=MIX[5]))
    engine.step()
    assert future.cancel()
    engine.drain()
    assert future.cancelled()
    found = engine.metrics()
    assert (found.cancelled, found.finished, found.active) == (1, 0, 0)


def test_closing_hands_out_samples_that_are_on_their_way(engine: Engine) -> None:
    future = engine.submit(Request(1, ddim=MIX[5]))
    engine.step()
    engine.close()
    assert torch.equal(future.result(0), expected(5, 1, 2))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A pretended GPU without graphs."""
    Event.made = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(recording.Memory, "on", lambda device: None)
    with Device() as device:
        yield device


def test_the_host_never_waits_for_the_device(device: Device) -> None:
    spec = {"c": torch.zeros(SHAPE), "y": torch.tensor(0)}
    engine = Engine(named, SHAPE, 2, cond=spec, guided=True, device=CUDA)

    def asked(i: int) -> Request:
        own = {"c": drawn(*SHAPE, seed=i), "y": torch.tensor(i)}
        return Request(i, ddim=MIX[i % 5], cond=own, uncond=spec, guidance=1.0 + i)

    futures = [engine.submit(asked(i)) for i in range(5)]
    with device.watch() as waits:  # with samplers that the tables do not hold yet
        for _ in range(60):
            for event in Event.made:
                event.ended = True
            engine.step()
    assert waits == []
    for i, future in enumerate(futures):
        assert_equal(future.result(0), alone(named, asked(i), 2))


def test_ticks_on_several_streams_follow_one_another(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    class Named(str):
        def wait_stream(self, other: str) -> None:
            said.append(f"{self} waits for {other}")

        def wait_event(self, event: Event) -> None:
            pass

    def on(name: str) -> None:
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Named(name))

    on("a")
    engine = Engine(exact, SHAPE, 2, device=CUDA)
    on("b")
    engine.warm_up()
    on("c")
    engine.submit(Request(1, ddim=MIX[0]))
    engine.step()
    engine.step()
    assert said == ["b waits for a", "c waits for b"]


def test_a_check_of_samples_never_waits(device: Device) -> None:
    engine = Engine(exact, SHAPE, 2, device=CUDA, check_finite=True)
    futures = [engine.submit(Request(i, ddim=MIX[0])) for i in range(2)]
    engine.step()
    # A default device must not take the place of the pinned memory that the host reads.
    with torch.device(CUDA), device.watch() as waits:
        for _ in range(10):
            for event in Event.made:
                event.ended = True
            engine.step()
    assert waits == []
    assert all(future.done() for future in futures)


def test_a_sample_belongs_to_the_stream_that_takes_it(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(exact, SHAPE, 2, device=CUDA)
    future = engine.submit(Request(1, ddim=MIX[0]))
    engine.drain()
    mine = Stream()
    used: list[object] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: mine)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: used.append(stream))
    future.result()
    assert used == [mine]


def test_copies_of_a_request_are_awaited_on_their_own_gpu(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[object] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(Event, "record", lambda event, stream=None: recorded.append(stream))
    x = device.put(drawn(*SHAPE, seed=1))
    network = Engine(exact, SHAPE, 2, device="cpu")._network
    work = checked(Request(1, x_T=x, ddim=MIX[0]), network)
    assert recorded == ["stream of cuda:0"]  # whatever device is the current one
    assert list(work.ready) == [CUDA]


def test_no_tick_is_taken_inside_of_a_capture(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(exact, SHAPE, 2, device=CUDA)
    future = engine.submit(Request(1, ddim=MIX[0]))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="while a CUDA graph is being captured"):
        engine.step()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    engine.drain()
    assert_equal(future.result(0), expected(0, 1, 2))
