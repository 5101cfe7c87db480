"""NoiseSchedule: ᾱ against the published numbers, and every bad input refused in one line."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from fastddim import NoiseSchedule
from tests.refusals import refused


def betas_of(schedule: NoiseSchedule) -> np.ndarray[Any, np.dtype[np.float64]]:
    abar = np.append(1.0, schedule.alphas_cumprod)
    betas: np.ndarray[Any, np.dtype[np.float64]] = 1 - abar[1:] / abar[:-1]
    return betas


def test_linear_is_the_schedule_of_ho_et_al() -> None:
    # β from 1e-4 to 0.02 in 1000 equal steps, multiplied up exactly.
    schedule = NoiseSchedule.linear()
    low, high = Fraction("0.0001"), Fraction("0.02")
    abar, exact = Fraction(1), []
    for t in range(1000):
        abar *= 1 - (low + (high - low) * t / 999)
        abar = Fraction(round(abar * 10**40), 10**40)
        exact.append(float(abar))
    np.testing.assert_allclose(schedule.alphas_cumprod, exact, rtol=1e-13, atol=0)
    assert schedule.alphas_cumprod[0] == 0.9999
    # Their paper: hardly any signal is left, and L_T is about 1e-5 bits per dimension.
    assert schedule.alphas_cumprod[-1] == pytest.approx(4.0358e-5, rel=1e-4)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (NoiseSchedule.linear(), {"beta_schedule": "linear"}),
        (
            NoiseSchedule.linear(100, 1e-3, 0.05),
            {"num_train_timesteps": 100, "beta_start": 1e-3, "beta_end": 0.05},
        ),
        (
            NoiseSchedule.scaled_linear(),
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        ),
        (NoiseSchedule.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
        (
            NoiseSchedule.cosine(100),
            {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100},
        ),
    ],
    ids=["linear", "linear-100", "scaled-linear", "cosine", "cosine-100"],
)
def test_schedules_agree_with_diffusers(ours: NoiseSchedule, theirs: dict[str, Any]) -> None:
    scheduler = DDPMScheduler(**theirs)
    # diffusers computes in float32: two roundings an entry in β, one a factor in ᾱ.
    betas = scheduler.betas.double().numpy()
    np.testing.assert_allclose(betas_of(ours), betas, rtol=1e-6)
    abar = scheduler.alphas_cumprod.double().numpy()
    np.testing.assert_allclose(ours.alphas_cumprod, abar, rtol=1e-4)
    assert len(ours) == len(abar)


def test_cosine_is_the_published_formula_with_beta_clipped() -> None:
    T = 1000
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
    expected = np.array([min(1 - f[t + 1] / f[t], 0.999) for t in range(T)])
    schedule = NoiseSchedule.cosine(T)
    np.testing.assert_allclose(betas_of(schedule), expected, rtol=1e-11)
    assert expected[-1] == 0.999
    # Where β is not clipped, ᾱ_t = f(t + 1)/f(0).
    np.testing.assert_allclose(
        schedule.alphas_cumprod[:-1], np.array(f[1:-1]) / f[0], rtol=1e-10, atol=0
    )


def test_cosine_arguments_reach_the_formula() -> None:
    f = [math.cos((t / 10 + 0.1) / 1.1 * math.pi / 2) ** 2 for t in range(11)]
    expected = [min(1 - f[t + 1] / f[t], 0.5) for t in range(10)]
    np.testing.assert_allclose(
        betas_of(NoiseSchedule.cosine(10, s=0.1, max_beta=0.5)), expected, rtol=1e-12
    )


BETAS = [0.1, 0.25, 0.5]
ABAR = [0.9, 0.9 * 0.75, 0.9 * 0.75 * 0.5]


@pytest.mark.parametrize(
    "kind",
    [
        list,
        tuple,
        np.array,
        lambda v: np.array(v, dtype=np.float64)[::-1][::-1],
        lambda v: torch.tensor(v, dtype=torch.float64),
        lambda v: torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)),
        lambda v: [torch.tensor(x, dtype=torch.float64) for x in v],
        lambda v: [Fraction(x) for x in v],
    ],
)
def test_betas_and_abar_may_be_any_sequence_array_or_tensor(
    kind: Callable[[list[float]], Any],
) -> None:
    np.testing.assert_allclose(
        NoiseSchedule.from_betas(kind(BETAS)).alphas_cumprod, ABAR, rtol=1e-15
    )
    assert NoiseSchedule.from_alphas_cumprod(kind(ABAR)).alphas_cumprod.tolist() == ABAR
    assert NoiseSchedule(kind(ABAR)).alphas_cumprod.tolist() == ABAR


def test_float32_betas_are_multiplied_up_in_float64() -> None:
    betas = torch.linspace(1e-4, 0.02, 1000)
    expected = np.cumprod(1 - betas.numpy().astype(np.float64))
    abar = NoiseSchedule.from_betas(betas).alphas_cumprod
    assert abar.dtype == np.float64
    assert abar.tolist() == expected.tolist()


def test_a_schedule_is_its_own_and_read_only() -> None:
    theirs = np.array(ABAR)
    schedule = NoiseSchedule.from_alphas_cumprod(theirs)
    theirs[0] = 0.99
    assert schedule.alphas_cumprod[0] == ABAR[0]
    assert theirs.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        schedule.alphas_cumprod[0] = 0.5
    with pytest.raises(FrozenInstanceError):
        schedule.name = "other"  # type: ignore[misc]


def test_schedules_are_equal_by_their_levels_whatever_made_them() -> None:
    one, other = NoiseSchedule.linear(50), NoiseSchedule.linear(50)
    assert one == other
    assert hash(one) == hash(other)
    assert one == NoiseSchedule.from_alphas_cumprod(one.alphas_cumprod)
    zeros = [NoiseSchedule.from_alphas_cumprod([0.5, zero]) for zero in (0.0, -0.0)]
    assert zeros[0] == zeros[1]
    assert len({*zeros, one, other}) == 2
    assert one != NoiseSchedule.linear(51)
    assert one != NoiseSchedule.linear(50, beta_end=0.03)
    assert one != one.alphas_cumprod.tolist()


@pytest.mark.parametrize("copied", [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy])
def test_a_copy_of_a_schedule_is_equal_and_read_only(copied: Any) -> None:
    schedule = NoiseSchedule.cosine(20)
    other = copied(schedule)
    assert other is not schedule
    assert other == schedule
    assert hash(other) == hash(schedule)
    assert repr(other) == repr(schedule)
    with pytest.raises(ValueError, match="read-only"):
        other.alphas_cumprod[0] = 0.5


def test_terminal_snr_may_be_zero() -> None:
    assert NoiseSchedule.from_alphas_cumprod([0.9, 0.5, 0.0]).alphas_cumprod[-1] == 0


def test_a_schedules_repr_names_its_kind() -> None:
    assert repr(NoiseSchedule.linear(100)) == "NoiseSchedule(linear(0.0001, 0.02), T=100)"
    assert repr(NoiseSchedule.cosine(10)) == "NoiseSchedule(cosine, T=10)"
    assert (
        repr(NoiseSchedule.from_alphas_cumprod([0.5])) == "NoiseSchedule(from_alphas_cumprod, T=1)"
    )


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("T", [True, 1.0, "10", None, [10], torch.ones(3, 3)])
@pytest.mark.parametrize("make", ["linear", "scaled_linear", "cosine"])
def test_T_that_is_no_integer_is_refused(make: str, T: Any) -> None:
    refused(lambda: getattr(NoiseSchedule, make)(T), TypeError, "T")


@pytest.mark.parametrize("T", [0, -1, 10**30])
@pytest.mark.parametrize("make", ["linear", "scaled_linear", "cosine"])
def test_T_of_no_schedule_is_refused(make: str, T: int) -> None:
    refused(lambda: getattr(NoiseSchedule, make)(T), ValueError, "T")


@pytest.mark.parametrize("make", ["linear", "scaled_linear"])
@pytest.mark.parametrize(
    ("beta_start", "beta_end"),
    [(0.0, 0.02), (-0.1, 0.02), (1e-4, 1.0), (0.02, 1e-4), (NAN, 0.02), (1e-4, INF), (1e-4, NAN)],
)
def test_ends_of_beta_out_of_range_are_refused(
    make: str, beta_start: float, beta_end: float
) -> None:
    refused(lambda: getattr(NoiseSchedule, make)(10, beta_start, beta_end), ValueError, "beta_")


@pytest.mark.parametrize("value", ["0.1", None, True, [0.1], 1j])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        ("linear", "beta_start"),
        ("scaled_linear", "beta_end"),
        ("cosine", "s"),
        ("cosine", "max_beta"),
    ],
)
def test_arguments_that_are_no_numbers_are_refused(make: str, name: str, value: Any) -> None:
    refused(lambda: getattr(NoiseSchedule, make)(10, **{name: value}), TypeError, name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("s", -0.1),
        ("s", NAN),
        ("s", 10**400),
        ("max_beta", 0.0),
        ("max_beta", 1.0),
        ("max_beta", INF),
    ],
)
def test_cosine_arguments_out_of_range_are_refused(name: str, value: Any) -> None:
    refused(lambda: NoiseSchedule.cosine(10, **{name: value}), ValueError, name)


@pytest.mark.parametrize(
    "values",
    [
        [],
        np.zeros((0,)),
        [[0.1, 0.2]],
        torch.full((2, 2), 0.1),
        torch.tensor(0.1),
        [0.1, NAN],
        [INF, 0.1],
        [None],
        torch.tensor([0.1, NAN]),
        [0.1, 0.0],
        [0.1, 1.0],
        [-0.1, 0.1],
        [1.5, 0.1],
    ],
)
def test_bad_betas_are_refused(values: Any) -> None:
    refused(lambda: NoiseSchedule.from_betas(values), ValueError, "betas")


@pytest.mark.parametrize(
    "values",
    [
        [],
        [[0.9, 0.8]],
        np.array(0.9),
        [0.9, NAN],
        [0.9, -INF],
        [0.5, 0.9],
        [0.9, 0.9],
        [0.9, 0.5, 0.6],
        [1.0, 0.5],
        [1.1, 0.5],
        [0.5, -0.1],
        [0.5, 0.0, -0.5],
        [0.5, 0.0, 0.0],
        [0.0, 0.0],
    ],
)
def test_bad_abar_is_refused(values: Any) -> None:
    refused(lambda: NoiseSchedule.from_alphas_cumprod(values), ValueError, "alphas_cumprod")
    refused(lambda: NoiseSchedule(values), ValueError, "alphas_cumprod")


@pytest.mark.parametrize(
    "values",
    [
        None,
        0.1,
        "0.1",
        b"0.1",
        {0.1},
        {"betas": [0.1]},
        (b for b in [0.1]),
        ["0.1"],
        [1j],
        np.array([0.1j]),
        torch.tensor([0.1j]),
        np.array(["0.1"]),
        [True],
        [[0.1], [0.1, 0.2]],
        np.array([True]),
        [object()],
    ],
)
def test_schedules_that_are_no_vector_of_numbers_are_refused(values: Any) -> None:
    refused(lambda: NoiseSchedule.from_betas(values), TypeError, "betas")
    refused(lambda: NoiseSchedule.from_alphas_cumprod(values), TypeError, "alphas_cumprod")


def test_where_abar_rises_is_named() -> None:
    with pytest.raises(ValueError, match=r"got 0\.5 at 1 and 0\.6 at 2"):
        NoiseSchedule.from_alphas_cumprod([0.9, 0.5, 0.6])
