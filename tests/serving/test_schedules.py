"""Any schedule of arrivals, cancellations and ticks gives each request its own bits, once."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastddim import Engine, Request
from fastddim.serving.order import ORDERS
from fastddim.serving.ticket import Ticket
from tests.loops import drawn
from tests.serving.serving_cases import MIX, SHAPE, alone, exact, expected, named

ARRIVAL = st.tuples(
    st.just("submit"), st.integers(0, len(MIX) - 1), st.sampled_from([0, 7, 2**35, 2**63 - 1])
)
CANCEL = st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0))
TICKS = st.tuples(st.just("step"), st.integers(1, 6), st.just(0))
EVENTS = st.lists(st.one_of(ARRIVAL, ARRIVAL, CANCEL, TICKS), max_size=40)


SIZES = st.sampled_from([1, 2, 4, 8, 16])


def served(slots: int, size: int, order: str, events: list[tuple[str, int, int]]) -> None:
    """Plays the events, drains the engine, and compares every result."""
    size = size if slots % size == 0 else slots
    engine = Engine(exact, SHAPE, slots, batch_size=size, order=order)
    futures: list[tuple[Ticket, int, int]] = []
    calls: list[int] = []
    dropped = set()

    def noted(n: int, _: object) -> None:
        calls.append(n)

    for name, a, b in events:
        if name == "submit":
            future = engine.submit(Request(b, ddim=MIX[a], deadline=1.0 + a))
            future.add_done_callback(partial(noted, len(futures)))
            futures.append((future, a, b))
        elif name == "cancel" and futures:
            future = futures[a % len(futures)][0]
            if future.cancel():
                dropped.add(a % len(futures))
        else:
            for _ in range(a if name == "step" else 0):
                engine.step()
    engine.drain()
    assert sorted(calls) == list(range(len(futures)))
    for n, (future, number, seed) in enumerate(futures):
        assert future.cancelled() == (n in dropped)
        if n not in dropped:
            assert torch.equal(future.result(), expected(number, seed, size))
    metrics = engine.metrics()
    assert metrics.finished + metrics.cancelled == metrics.submitted == len(futures)
    assert (metrics.queued, metrics.active, metrics.failed) == (0, 0, 0)


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


@pytest.mark.parametrize("slots", [1, 3, 8, 16])
@settings(max_examples=12, deadline=None, suppress_health_check=QUIET)
@given(size=SIZES, order=st.sampled_from(sorted(ORDERS)), events=EVENTS)
def test_a_sample_is_its_requests_alone(
    slots: int, size: int, order: str, events: list[tuple[str, int, int]]
) -> None:
    served(slots, size, order, events)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 3, 8, 16])
@settings(max_examples=125, deadline=None, suppress_health_check=QUIET)
@given(size=SIZES, order=st.sampled_from(sorted(ORDERS)), events=EVENTS)
def test_a_sample_is_its_requests_alone_500_times(
    slots: int, size: int, order: str, events: list[tuple[str, int, int]]
) -> None:
    served(slots, size, order, events)


GUIDED = st.tuples(
    st.just("submit"),
    st.tuples(
        st.integers(0, len(MIX) - 1),
        st.integers(0, 4),  # the condition
        st.sampled_from([None, 0.0, 3.0, "late", "early"]),
        st.booleans(),  # whether it begins further down
    ),
)
OTHERS = st.tuples(st.sampled_from(["cancel", "step"]), st.integers(0, 30))

TRIPLES = st.sampled_from([3, 9])


@functools.cache
def conditions(number: int) -> dict[str, Tensor]:
    return {"c": drawn(*SHAPE, seed=number), "y": torch.tensor(number)}


NOTHING = {"c": torch.zeros(SHAPE)}
W = {"late": lambda t: 1.0 if t > 400 else 2.5, "early": lambda t: 2.5 if t > 400 else 1.0}


@functools.cache
def guided_of(number: int, c: int, w: float | str | None, below: bool) -> tuple[Request, Tensor]:
    """A request and its sample by ``DDIM``'s own loop."""
    extra: dict[str, Any] = {}
    if w is not None:
        extra = {"uncond": NOTHING, "guidance": W.get(w, w) if isinstance(w, str) else w}
    if below:
        start = len(MIX[number].pairs) // 2
        extra |= {"x_T": drawn(*SHAPE, seed=50 + c), "start": start}
    request = Request(c, ddim=MIX[number], cond=conditions(c), **extra)
    return request, alone(named, request, 3)


def served_guided(slots: int, events: list[tuple[str, Any]]) -> None:
    """Plays the events with an engine that guides, and compares every result."""
    spec = {"c": torch.zeros(SHAPE), "y": torch.tensor(0)}
    engine = Engine(named, SHAPE, slots, batch_size=3, cond=spec, guided=True)
    futures: list[tuple[Ticket, Tensor]] = []
    for name, given_ in events:
        if name == "submit":
            request, want = guided_of(*given_)
            futures.append((engine.submit(request), want))
        elif name == "cancel" and futures:
            futures[given_ % len(futures)][0].cancel()
        elif name == "step":
            for _ in range(given_ % 7):
                engine.step()
    engine.drain()
    for future, want in futures:
        assert future.cancelled() or torch.equal(future.result(timeout=0), want)


@settings(max_examples=40, deadline=None, suppress_health_check=QUIET)
@given(
    slots=st.sampled_from([3, 9]), events=st.lists(st.one_of(GUIDED, GUIDED, OTHERS), max_size=30)
)
def test_guided_samples_are_their_requests_alone(slots: int, events: list[tuple[str, Any]]) -> None:
    served_guided(slots, events)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=QUIET)
@given(
    slots=st.sampled_from([3, 9]), events=st.lists(st.one_of(GUIDED, GUIDED, OTHERS), max_size=40)
)
def test_guided_samples_are_their_requests_alone_400_times(
    slots: int, events: list[tuple[str, Any]]
) -> None:
    served_guided(slots, events)
