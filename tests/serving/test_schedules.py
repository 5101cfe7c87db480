"""Any schedule of arrivals, cancellations and ticks gives each request its own bits, once."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastddim import Engine, Request
from fastddim.serving.order import ORDERS
from fastddim.serving.ticket import Ticket
from tests.serving.serving_cases import MIX, SHAPE, exact, expected

ARRIVAL = st.tuples(
    st.just("submit"), st.integers(0, len(MIX) - 1), st.sampled_from([0, 7, 2**35, 2**63 - 1])
)
CANCEL = st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0))
TICKS = st.tuples(st.just("step"), st.integers(1, 6), st.just(0))
EVENTS = st.lists(st.one_of(ARRIVAL, ARRIVAL, CANCEL, TICKS), max_size=40)


def served(slots: int, order: str, events: list[tuple[str, int, int]]) -> None:
    """Plays the events, drains the engine, and compares every result."""
    engine = Engine(exact, SHAPE, slots, order=order)
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
            assert torch.equal(future.result(), expected(number, seed, slots))
    metrics = engine.metrics()
    assert metrics.finished + metrics.cancelled == metrics.submitted == len(futures)
    assert (metrics.queued, metrics.active, metrics.failed) == (0, 0, 0)


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


@pytest.mark.parametrize("slots", [1, 3, 8, 16])
@settings(max_examples=12, deadline=None, suppress_health_check=QUIET)
@given(order=st.sampled_from(sorted(ORDERS)), events=EVENTS)
def test_a_sample_is_its_requests_alone(
    slots: int, order: str, events: list[tuple[str, int, int]]
) -> None:
    served(slots, order, events)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 3, 8, 16])
@settings(max_examples=125, deadline=None, suppress_health_check=QUIET)
@given(order=st.sampled_from(sorted(ORDERS)), events=EVENTS)
def test_a_sample_is_its_requests_alone_500_times(
    slots: int, order: str, events: list[tuple[str, int, int]]
) -> None:
    served(slots, order, events)
