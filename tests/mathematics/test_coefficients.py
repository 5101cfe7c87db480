"""The table against exact arithmetic, and its special cases against the papers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastddim import DDIM, NoiseSchedule, make_pairs, make_table
from fastddim.coefficients import COLUMNS, Prediction
from fastddim.step import reference
from fastddim.timesteps import SpacingName
from tests.refusals import refused

LINEAR = NoiseSchedule.linear()
FULL = make_pairs("uniform", 1000, 1000)
COLUMN = {name: i for i, name in enumerate(COLUMNS)}


def exact_table(
    schedule: NoiseSchedule, pairs: Sequence[tuple[int, int]], eta: Any, final: float = 1.0
) -> list[list[Decimal]]:
    """The same columns in 60 digits, from the float64 ᾱ."""
    with localcontext() as context:
        context.prec = 60
        abar = [Decimal(float(a)) for a in schedule.alphas_cumprod]
        rows = []
        for t, s in pairs:
            at, a_s = abar[t], abar[s] if s >= 0 else Decimal(final)
            larger = 1 - at / a_s
            posterior = larger * (1 - a_s) / (1 - at)
            if s < 0:
                larger = posterior = Decimal(0)
            if eta == "hat":
                noise, variance = larger, posterior
            else:
                noise = variance = Decimal(eta) ** 2 * posterior
            rows.append(
                [
                    at.sqrt(),
                    (1 - at).sqrt(),
                    a_s.sqrt(),
                    noise.sqrt(),
                    (1 - a_s - variance).sqrt(),
                ]
            )
        return rows


@pytest.mark.parametrize("eta", [0.0, 0.2, 1.0, "hat"])
@pytest.mark.parametrize(
    ("schedule", "spacing", "steps", "final"),
    [
        (LINEAR, "uniform", 1000, 1.0),
        (LINEAR, "quad", 50, 1.0),
        (LINEAR, "quad-ermongroup", 100, 1.0),
        (NoiseSchedule.scaled_linear(), "leading", 50, 0.99915),
        (NoiseSchedule.cosine(100), "trailing", 100, 1.0),
    ],
    ids=["full", "quad", "repeated", "final", "cosine"],
)
def test_factors_are_exact_to_half_a_unit_of_float32(
    schedule: NoiseSchedule, spacing: str, steps: int, final: float, eta: Any
) -> None:
    pairs = make_pairs(spacing, steps, len(schedule))
    table = make_table(schedule, pairs, eta, final)
    assert table.dtype == np.float32
    assert table.shape == (len(pairs), 7)
    mine = ["sqrt_abar_t", "sqrt_1m_abar_t", "sqrt_abar_s", "c1", "c2"]
    for row, exact in zip(table, exact_table(schedule, pairs, eta, final), strict=True):
        for name, truth in zip(mine, exact, strict=True):
            value = row[COLUMN[name]]
            # Float64 cancels to 1e-10 at worst, far below a half unit of float32.
            error = abs(Decimal(float(value)) - truth)
            assert error <= Decimal("0.501") * Decimal(float(np.spacing(value))), name


def test_reciprocals_are_rounded_from_the_float32_divisors() -> None:
    table = make_table(LINEAR, FULL)
    for of, rcp in ((0, 1), (2, 3)):
        for c, r in table[:, [of, rcp]]:
            exact = 1 / Fraction(float(c))
            assert abs(Fraction(float(r)) - exact) <= Fraction(float(np.spacing(r))) / 2


def ddpm(t: int) -> tuple[float, float, float]:
    """(x0's factor, x_t's factor, β̃) of q(x_{t−1} | x_t, x0): Ho et al. 2020, eq. 6 and 7."""
    abar = LINEAR.alphas_cumprod
    a, a_before = abar[t], abar[t - 1] if t else 1.0
    alpha = a / a_before
    beta = 1 - alpha
    return (
        math.sqrt(a_before) * beta / (1 - a),
        math.sqrt(alpha) * (1 - a_before) / (1 - a),
        (1 - a_before) / (1 - a) * beta,
    )


def mean_factors(row: npt.NDArray[np.float32]) -> tuple[float, float]:
    """(x0's factor, x_t's factor) of a step's mean, ε written as (x_t − √ᾱ_t·x0)/√(1−ᾱ_t)."""
    a_t, _, b_t, _, a_s, _, c2 = (float(f) for f in row)
    return a_s - c2 * a_t / b_t, c2 / b_t


@pytest.mark.parametrize("eta", [1.0, "hat"])
def test_eta_one_on_the_full_tau_is_ddpm(eta: Any) -> None:
    table = make_table(LINEAR, FULL, eta)
    for row, (t, _) in zip(table, FULL, strict=True):
        x0, x_t, variance = ddpm(t)
        # Factors of order one, each the difference of a few that are rounded to 6e-8.
        assert mean_factors(row) == pytest.approx((x0, x_t), abs=3e-7, rel=0)
        if eta == 1.0:
            assert float(row[COLUMN["c1"]]) ** 2 == pytest.approx(variance, rel=2e-7)


def test_the_mean_of_hat_is_that_of_eta_one_for_any_tau() -> None:
    pairs = make_pairs("quad", 20, 1000)
    hat, one = make_table(LINEAR, pairs, "hat"), make_table(LINEAR, pairs, 1.0)
    same = [c for c in COLUMNS if c != "c1"]
    for name in same:
        assert hat[:, COLUMN[name]].tolist() == one[:, COLUMN[name]].tolist()
    assert (hat[:-1, COLUMN["c1"]] > one[:-1, COLUMN["c1"]]).all()


def test_the_noise_of_hat_is_sqrt_beta_on_the_full_tau() -> None:
    c1 = make_table(LINEAR, FULL, "hat")[:, COLUMN["c1"]]
    betas = np.linspace(1e-4, 0.02, 1000)[::-1]
    np.testing.assert_allclose(c1[:-1], np.sqrt(betas[:-1]), rtol=1e-7)


@pytest.mark.parametrize("final", [1.0, 0.99995])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, "hat"])
def test_the_last_row_adds_no_noise(eta: Any, final: float) -> None:
    last = make_table(LINEAR, make_pairs("quad", 10, 1000), eta, final)[-1]
    assert last[COLUMN["c1"]] == 0
    assert last[COLUMN["sqrt_abar_s"]] == np.float32(math.sqrt(final))
    assert last[COLUMN["c2"]] == np.float32(math.sqrt(1 - final))


def test_final_alpha_cumprod_touches_the_last_row_alone() -> None:
    pairs = make_pairs("leading", 10, 1000)
    one, ends = make_table(LINEAR, pairs, 1.0), make_table(LINEAR, pairs, 1.0, 0.9999)
    assert one[:-1].tolist() == ends[:-1].tolist()
    assert one[-1].tolist() != ends[-1].tolist()


def test_eta_scales_the_noise_and_shortens_the_direction() -> None:
    pairs = make_pairs("uniform", 10, 1000)
    one, fifth = make_table(LINEAR, pairs, 1.0), make_table(LINEAR, pairs, 0.2)
    np.testing.assert_allclose(fifth[:, 5], 0.2 * one[:, 5], rtol=2e-7)
    for table in (one, fifth):
        np.testing.assert_allclose(
            table[:, 4].astype(float) ** 2 + table[:, 5].astype(float) ** 2 + table[:, 6] ** 2,
            1,
            rtol=3e-7,  # ᾱ_s + c1² + c2² = 1: the marginals are kept
        )


def general_step(row: npt.NDArray[np.float32], x: Tensor, eps: Tensor, z: Tensor) -> Tensor:
    return reference.ddim_step(x, eps, torch.from_numpy(row).double(), z)[0]


@pytest.mark.parametrize("t", [1, 10, 100, 500, 999])
def test_the_eta_one_line_has_the_root_of_the_variance(t: int) -> None:
    # The line as it is often printed multiplies the noise by β̃ itself.
    x, eps, z = torch.randn(3, 64, generator=torch.manual_seed(t), dtype=torch.float64)
    row = make_table(LINEAR, [(t, t - 1)], 1.0)[0]
    abar, before = LINEAR.alphas_cumprod[t], LINEAR.alphas_cumprod[t - 1]
    alpha = abar / before
    mean = (x - (1 - alpha) / math.sqrt(1 - abar) * eps) / math.sqrt(alpha)
    variance = (1 - before) / (1 - abar) * (1 - alpha)
    general = general_step(row, x, eps, z)
    torch.testing.assert_close(general, mean + math.sqrt(variance) * z, rtol=0, atol=1e-5)
    misprint = mean + variance * z
    assert (general - misprint).abs().max() > 5e-3


@pytest.mark.parametrize("t", [1, 10, 100, 500, 999])
def test_the_eta_zero_line_keeps_both_terms(t: int) -> None:
    # The line as it is sometimes printed keeps (x − √(1−α_t)·ε)/√ᾱ_t alone.
    x, eps, z = torch.randn(3, 64, generator=torch.manual_seed(t), dtype=torch.float64)
    row = make_table(LINEAR, [(t, t - 1)], 0.0)[0]
    abar, before = LINEAR.alphas_cumprod[t], LINEAR.alphas_cumprod[t - 1]
    x0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
    general = general_step(row, x, eps, z)
    right = math.sqrt(before) * x0 + math.sqrt(1 - before) * eps
    torch.testing.assert_close(general, right, rtol=0, atol=2e-5)
    misprint = (x - math.sqrt(1 - abar / before) * eps) / math.sqrt(abar)
    assert (general - misprint).abs().max() > 5e-3


SPACINGS = ["uniform", "quad", "leading", "trailing", "linspace"]
SPACINGS += ["uniform-ermongroup", "quad-ermongroup"]
SCHEDULES = [LINEAR, NoiseSchedule.scaled_linear(), NoiseSchedule.cosine(100)]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(SPACINGS), st.integers(2, 100), st.sampled_from(SCHEDULES))
def test_the_largest_eta_named_is_accepted_and_no_larger_one(
    spacing: SpacingName, S: int, schedule: NoiseSchedule
) -> None:
    pairs = make_pairs(spacing, S, len(schedule))
    assume(any(t > s >= 0 for t, s in pairs))
    with pytest.raises(ValueError, match="eta must be at most") as caught:
        make_table(schedule, pairs, 1e6)
    (number,) = re.findall(r"at most ([\d.]+(?:e[+-]\d+)?)", str(caught.value))
    most = float(number)
    assert most >= 1  # DDPM is always possible
    table = make_table(schedule, pairs, most)
    assert np.isfinite(table).all()
    a_s, c1, c2 = table.astype(np.float64)[:, 4:].T
    np.testing.assert_allclose(a_s**2 + c1**2 + c2**2, 1, atol=3e-7)
    assert DDIM(steps=S, spacing=spacing, eta=most, schedule=schedule).eta == most
    refused(lambda: make_table(schedule, pairs, most + 2e-6), ValueError, "eta", number)
    # The limit is exact: c2 nearly vanishes at one step.
    abar = np.append(schedule.alphas_cumprod, 1.0)
    t, s = np.array([p for p in pairs if p[1] >= 0 and p[0] > p[1]]).T
    posterior = (1 - abar[t] / abar[s]) * (1 - abar[s]) / (1 - abar[t])
    left = (1 - abar[s] - most**2 * posterior) / (1 - abar[s])
    assert -1e-9 < left.min() < 5e-6


def test_eta_slightly_above_one_is_refused_before_it_gives_nan() -> None:
    # At 50 steps diffusers returns NaN from 1.0081 on.
    refused(lambda: DDIM(steps=50, eta=1.0081), ValueError, "eta", "1.00802", "1.0081")


@pytest.mark.parametrize("eta", [-0.1, math.nan, math.inf, "max", "", 10**400])
def test_bad_eta_is_refused(eta: Any) -> None:
    refused(lambda: make_table(LINEAR, FULL, eta), ValueError, "eta")
    refused(lambda: DDIM(eta=eta), ValueError, "eta")


@pytest.mark.parametrize("eta", [None, True, [1.0], 1j, torch.ones(40, 40), np.ones((3, 3))])
def test_eta_that_is_no_number_is_refused(eta: Any) -> None:
    refused(lambda: make_table(LINEAR, FULL, eta), TypeError, "eta")
    refused(lambda: DDIM(eta=eta), TypeError, "eta")


@pytest.mark.parametrize("pairs", [[], [(1000, 500)], [(5, -2)], [(-2, 5)], [(5, 1000)]])
def test_pairs_that_are_no_levels_are_refused(pairs: Any) -> None:
    refused(lambda: make_table(LINEAR, pairs), ValueError, "pairs", "999")


@pytest.mark.parametrize("prediction", ["v", "sample"])
def test_zero_terminal_snr_is_finite_for_v_and_sample(prediction: Prediction) -> None:
    schedule = NoiseSchedule.from_alphas_cumprod(np.linspace(0.99, 0.0, 100))
    ddim = DDIM(5, eta=1.0, schedule=schedule, spacing="trailing", prediction=prediction)
    assert ddim.pairs[0][0] == 99
    assert ddim.table[0, 0] == 0
    # An exact model of data that is all 0.25.
    out = ddim.sample(
        lambda x, t: exact_constant(schedule, prediction, 0.25, x, t),
        shape=(3, 4, 4),
        seeds=[1, 2, 3],
    )
    torch.testing.assert_close(out, torch.full_like(out, 0.25), rtol=0, atol=1e-5)


def exact_constant(
    schedule: NoiseSchedule, prediction: str, value: float, x: Tensor, t: Tensor
) -> Tensor:
    """The output of an exact v or x0 model for data of one value."""
    if prediction == "sample":
        return torch.full_like(x, value)
    abar = torch.from_numpy(schedule.alphas_cumprod.copy())[t].view(-1, 1, 1)
    # From x = √ᾱ·x0 + √(1−ᾱ)·ε: v = √ᾱ·ε − √(1−ᾱ)·x0.
    eps = (x - abar.sqrt() * value) / (1 - abar).sqrt()
    return (abar.sqrt() * eps - (1 - abar).sqrt() * value).float()


def test_zero_terminal_snr_refuses_an_epsilon_model() -> None:
    schedule = NoiseSchedule.from_alphas_cumprod(np.linspace(0.99, 0.0, 100))
    refused(
        lambda: DDIM(5, schedule=schedule, spacing="trailing"), ValueError, "prediction", "t = 99"
    )
    assert DDIM(5, schedule=schedule, spacing="leading").pairs[0][0] == 80
