"""Calls on several CUDA streams, here fakes, follow one another on the device."""

from __future__ import annotations

import pytest
import torch

from fastddim import DDIM
from fastddim.loop import streams
from fastddim.loop.streams import Streams
from tests.tape import tapes_for_graphs


class Stream(str):
    said: list[str]

    def wait_stream(self, other: str) -> None:
        self.said.append(f"{self} waits for {other}")


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[Stream]:
    """The current stream, which a test may replace."""
    Stream.said, found = [], [Stream("a")]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: found[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return found


def test_a_call_waits_for_a_call_on_another_stream(current: list[Stream]) -> None:
    calls = Streams(torch.device("cuda", 0))
    for name in "aabba":
        current[0] = Stream(name)
        calls.join()
    assert Stream.said == ["b waits for a", "a waits for b"]


@pytest.mark.parametrize(("names", "waits"), [("aba", []), ("abc", ["a waits for c"])])
def test_freed_memory_waits_for_the_last_call(
    current: list[Stream], names: str, waits: list[str]
) -> None:
    calls = Streams(torch.device("cuda", 0))
    for name in names:
        current[0] = Stream(name)
        calls.join()
    Stream.said.clear()
    del calls
    assert Stream.said == waits


def test_calls_on_a_cpu_have_no_streams(current: list[Stream]) -> None:
    calls = Streams(torch.device("cpu"))
    for name in "ab":
        current[0] = Stream(name)
        calls.join()
    assert Stream.said == []


def test_each_call_of_a_captured_loop_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    tapes = tapes_for_graphs(monkeypatch)
    said: list[str] = []
    monkeypatch.setattr(streams.Streams, "join", lambda _: said.append("join"))
    act = DDIM(3).capture(lambda x, t: 0.5 * x, (2, 3, 4), device="cpu")
    assert said == ["join"]
    monkeypatch.setattr(tapes[0], "replay", lambda: said.append("replay"))
    for _ in range(2):
        act(seeds=[1, 2])
    assert said == ["join", "join", "replay", "join", "replay"]
