"""Spacings that read the schedule: equal steps in λ, in σ^(1/7), and in a mix of t and λ."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import pytest

from fastddim import DDIM, NoiseSchedule, make_pairs
from tests.refusals import refused

BY_LEVEL = ("mixed", "logsnr", "karras")
SCHEDULES = {
    "linear": NoiseSchedule.linear(),
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "cosine": NoiseSchedule.cosine(),
    "short": NoiseSchedule.linear(100),
    "terminal": NoiseSchedule.from_alphas_cumprod([*np.linspace(0.999, 0.01, 99), 0.0]),
    "two": NoiseSchedule.linear(2),
    "one": NoiseSchedule.linear(1),
}


def tau(spacing: str, S: int, schedule: NoiseSchedule) -> list[int]:
    return [t for t, _ in reversed(make_pairs(spacing, S, schedule))]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("spacing", BY_LEVEL)
def test_every_S_gives_distinct_levels(spacing: str, schedule: NoiseSchedule) -> None:
    T = len(schedule)
    for S in {1, 2, 3, 6, 8, 10, 50, T // 2, T - 1, T} & set(range(1, T + 1)):
        levels = tau(spacing, S, schedule)
        assert len(levels) == S
        assert all(map(operator.lt, levels, levels[1:]))
        assert levels[-1] == T - 1
        least = 0 if spacing != "mixed" else min(round(0.016 * (T - 1)), T - S)
        assert S == 1 or levels[0] == least
        assert set(map(type, levels)) == {int}
    assert tau(spacing, T, schedule) == list(range(T))


def lambdas(schedule: NoiseSchedule) -> Any:
    abar = schedule.alphas_cumprod
    return np.log(np.sqrt(abar) / np.sqrt(1 - abar))


def nearest(wanted: Any, values: Any) -> list[int]:
    return [int(np.abs(values - w).argmin()) for w in wanted]


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("S", [6, 8, 10])
def test_the_levels_are_nearest_to_equal_steps(name: str, S: int) -> None:
    """Rounding t to the nearest integer and taking the nearest λ may differ by one level."""
    schedule = SCHEDULES[name]
    lam = lambdas(schedule)
    sigma = np.exp(-lam)
    t = np.arange(1000) / 999
    mix = 0.8 * t + 0.2 * (lam[0] - lam) / (lam[0] - lam[-1])
    u = np.linspace(0, 1, S)
    karras = (sigma[0] ** (1 / 7) + u * (sigma[-1] ** (1 / 7) - sigma[0] ** (1 / 7))) ** 7
    expected = {
        "logsnr": nearest(lam[0] + u * (lam[-1] - lam[0]), lam),
        "karras": nearest(np.log(karras), np.log(sigma)),
        "mixed": nearest(mix[16] + u * (1 - mix[16]), mix),
    }
    for spacing, levels in expected.items():
        found = tau(spacing, S, schedule)
        if len(set(levels)) < S:  # the cosine's σ spans so much that levels of noise coincide
            assert name == "cosine"
            continue
        assert np.abs(np.array(found) - levels).max() <= 1, (spacing, found, levels)


def test_spacings_of_eight_are_these_lists() -> None:
    linear = SCHEDULES["linear"]
    assert tau("mixed", 8, linear) == [16, 135, 281, 431, 579, 723, 863, 999]
    assert tau("logsnr", 8, linear) == [0, 8, 44, 177, 440, 673, 851, 999]
    assert tau("karras", 8, linear) == [0, 32, 205, 484, 681, 815, 917, 999]


@pytest.mark.parametrize("spacing", BY_LEVEL)
def test_a_number_of_levels_alone_is_refused(spacing: str) -> None:
    refused(lambda: make_pairs(spacing, 8, 1000), TypeError, "T", "NoiseSchedule", spacing, "1000")


@pytest.mark.parametrize("spacing", BY_LEVEL)
def test_steps_beyond_the_schedule_are_refused(spacing: str) -> None:
    refused(lambda: make_pairs(spacing, 101, SCHEDULES["short"]), ValueError, "steps", "101")


@pytest.mark.parametrize("spacing", BY_LEVEL)
def test_the_sampler_takes_them_from_its_own_schedule(spacing: Any) -> None:
    for schedule in (SCHEDULES["linear"], SCHEDULES["cosine"]):
        ddim = DDIM(8, order=2, spacing=spacing, schedule=schedule)
        assert ddim.pairs == make_pairs(spacing, 8, schedule)


def test_names_that_need_no_schedule_take_one() -> None:
    schedule = SCHEDULES["short"]
    assert make_pairs("uniform", 7, schedule) == make_pairs("uniform", 7, 100)
