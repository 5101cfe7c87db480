"""The load, the static batches, and the comparison of ``serve-bench``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fastddim import DDIM
from fastddim.tools.serving_bench import ENGINE, Bench, Job, Outcome, Peer, batch_of, load, peers
from tests.loops import column

SHAPE = (1, 4, 4)
AT_ONCE = float("inf")


def model(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * x.clamp(-1, 1) + 1e-3 * column(t % 97, x)


def sampler(steps: int) -> DDIM:
    return DDIM(steps, spacing="trailing")


def bench(
    network: Any = model, slots: int = 3, steps: tuple[int, ...] = (2, 7), **rest: Any
) -> Bench:
    return Bench(network, SHAPE, slots, steps, make=sampler, device="cpu", **rest)


def by_name(outcomes: list[Outcome]) -> dict[str, Outcome]:
    return {each.name: each for each in outcomes}


def test_the_gaps_of_arrivals_are_exponential() -> None:
    jobs = load([8, 50], 2000, rate=4.0, seed=1)
    gaps = np.diff([0.0, *(job.at for job in jobs)])
    assert stats.kstest(gaps, "expon", args=(0, 0.25)).pvalue > 0.01
    few = sum(job.steps == 8 for job in jobs)
    assert stats.binomtest(few, len(jobs)).pvalue > 0.01
    assert [job.seed for job in jobs] == list(range(2000))


def test_a_load_depends_on_its_seed_alone() -> None:
    assert load(range(8, 51), 20, 3.0, seed=5) == load(range(8, 51), 20, 3.0, seed=5)
    assert load(range(8, 51), 20, 3.0, seed=5) != load(range(8, 51), 20, 3.0, seed=6)
    slow, fast = load([8, 9], 20, 1.0), load([8, 9], 20, 2.0)
    assert [job.steps for job in slow] == [job.steps for job in fast]
    assert [job.at for job in slow] == pytest.approx([2 * job.at for job in fast])
    assert all(job.at == 0.0 for job in load([8], 5, AT_ONCE))


JOBS = [Job(0, 5, 0.0), Job(1, 9, 0.1), Job(2, 9, 0.2), Job(3, 5, 0.3)]


@pytest.mark.parametrize(
    ("slots", "alike", "timeout", "now", "last", "expected"),
    [
        (2, False, None, 0.3, False, [0, 1]),
        (2, True, None, 0.3, False, [0, 3]),
        (5, False, None, 9.0, False, []),
        (5, False, None, 0.3, True, [0, 1, 2, 3]),
        (5, True, None, 0.3, True, [0, 3]),
        (5, False, 0.5, 0.4, False, []),
        (5, False, 0.5, 0.5, False, [0, 1, 2, 3]),
        (5, True, 0.5, 0.5, False, [0, 3]),
        (1, True, 0.0, 0.3, False, [0]),
    ],
)
def test_a_batch_begins_when_full_or_late(
    slots: int, alike: bool, timeout: float | None, now: float, last: bool, expected: list[int]
) -> None:
    peer = Peer("peer", slots, alike, timeout)
    assert [job.seed for job in batch_of(JOBS, peer, now, last)] == expected
    assert batch_of([], peer, now, last) == []


def test_the_first_full_group_goes_before_the_first_request() -> None:
    peer = Peer("peer", 2, True, None)
    assert [job.seed for job in batch_of(JOBS[:3], peer, 0.3, False)] == [1, 2]


def test_occupancy_is_that_of_the_schedule() -> None:
    made = bench()
    made.measure()
    jobs = load([2, 7], 9, AT_ONCE, seed=3)
    found = by_name(made.compare(jobs, peers(3, 0.1)))
    steps = [job.steps for job in jobs]
    calls = sum(max(steps[i : i + 3]) for i in range(0, 9, 3))
    for name in ("static, mixed S", "static, mixed S, timeout"):
        assert found[name].occupancy == pytest.approx(sum(steps) / (3 * calls))
    assert found["one at a time"].occupancy == pytest.approx(1 / 3)
    assert found["static, mixed S"].occupancy < found[ENGINE].occupancy <= 1


def test_alike_requests_fill_every_batch() -> None:
    made = bench(steps=(4,))
    made.measure()
    found = by_name(made.compare(load([4], 6, AT_ONCE), peers(3, 0.1), rounds=2))
    assert {each.occupancy for name, each in found.items() if name != "one at a time"} == {1.0}
    assert all(len(each.latencies) == 12 for each in found.values())
    assert found[ENGINE].against == 1.0


def test_latency_counts_from_the_arrival() -> None:
    made = bench(steps=(2,))
    tick = made.measure()
    assert made.capacity(tick) == pytest.approx(3 / (2 * tick))
    jobs = [Job(0, 2, 0.0), Job(1, 2, 0.2)]
    waits = Peer("waits", 3, False, None)
    soon = Peer("soon", 3, False, 0.05)
    found = by_name(made.compare(jobs, [waits, soon]))
    assert found["waits"].latencies[0] >= 0.2
    assert 0.05 <= found["soon"].latencies[0] < 0.2
    for each in found.values():
        assert each.samples_per_second <= 2 / 0.2
        assert 0 < each.p50 <= each.p99


def test_guided_requests_with_a_class_are_served() -> None:
    def network(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return model(x, t) * (1 + 0.1 * column(label, x))

    def options(n: int) -> dict[str, Any]:
        return {
            "cond": {"label": torch.full((n,), 3)},
            "uncond": {"label": torch.zeros(n, dtype=torch.int64)},
            "guidance": 2.0,
        }

    made = bench(network, options=options)
    made.measure()
    assert len(made.compare(load([2, 7], 4, AT_ONCE), peers(3, 0.1))) == 6


def test_a_model_that_mixes_samples_is_refused() -> None:
    def mixing(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t) + x.mean()

    with pytest.raises(ValueError, match=r"^model must treat samples independently: a sample of"):
        bench(mixing).measure()


def test_samples_of_other_batch_sizes_are_compared() -> None:
    def sized(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t) + 0.1 * len(x)

    made = bench(sized)
    made.measure()
    with pytest.raises(ValueError, match=r"by the peer 'one at a time' .* more than 0\.01$"):
        made.compare(load([2, 7], 3, AT_ONCE), peers(3, 0.1))


def test_fewer_than_one_slot_or_round_is_refused() -> None:
    with pytest.raises(ValueError, match="slots must be an integer ≥ 1, got 0"):
        bench(slots=0)
    with pytest.raises(ValueError, match="rounds must be an integer ≥ 1, got 0"):
        bench().compare(JOBS, [], rounds=0)
