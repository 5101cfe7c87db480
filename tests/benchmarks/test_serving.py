"""The soak and the GPU section find faults, and the engine passes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks import serving, soak
from benchmarks.sections import scale
from benchmarks.sections import serving as section
from benchmarks.timing import WrongResultError
from fastddim.serving.landing import Landing
from fastddim.serving.ticket import Ticket


def test_a_short_soak_finds_no_fault() -> None:
    found = soak.soak(400, seed=3)
    assert found["finished"] + found["failed"] + found["cancelled"] == 400
    assert found["failed"] > 0
    assert found["cancelled"] > 0


@pytest.mark.slow
def test_a_soak_of_2000_requests_finds_no_fault() -> None:
    assert soak.soak(2000)["lost"] == 0


def test_a_soak_finds_a_lost_request(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Landing.copy

    def lossy(self: Landing, ticket: Ticket, x: Tensor) -> None:
        if ticket.number != 20:
            copy(self, ticket, x)

    monkeypatch.setattr(Landing, "copy", lossy)
    with pytest.raises(WrongResultError, match="'lost': 1"):
        soak.soak(150)


def test_a_soak_finds_a_neighbours_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Landing.copy
    monkeypatch.setattr(Landing, "copy", lambda self, ticket, x: copy(self, ticket, x + 1e-6))
    with pytest.raises(WrongResultError, match="the soak found a fault"):
        soak.soak(50)


def test_the_gpu_section_times_no_engine_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("DEVICE", "cpu"), ("SLOTS", 3), ("SERVED", (3, 4, 4))):
        monkeypatch.setattr(scale, name, value)
    refilled = section.busy(refills=9)
    begun = refilled.metrics().finished
    for _ in range(5):
        refilled.step()
    assert refilled.metrics().finished == begun + 5
    copy = Landing.copy
    monkeypatch.setattr(Landing, "copy", lambda self, ticket, x: copy(self, ticket, x + 1e-6))
    with pytest.raises(WrongResultError, match="the engine's sample of seed"):
        section.busy()


def test_a_tick_costs_the_host_two_bound_steps_at_most() -> None:
    assert serving.host(rounds=10, calls=50)["ratio"] <= 2.0


@pytest.mark.slow
def test_the_engine_keeps_up_with_full_static_batches() -> None:
    threads = torch.get_num_threads()
    try:
        assert serving.alike()["share"] >= 0.95
    finally:
        torch.set_num_threads(threads)
