"""On CUDA a sample reaches its future when its copy on the side stream has ended; here by fakes."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from fastddim import Engine, Request
from tests.serving.serving_cases import MIX, SHAPE, exact, expected


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
