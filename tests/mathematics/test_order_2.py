"""The second order: its factors against closed forms, and its error against exact solutions."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from fastddim import DDIM, NoiseSchedule, make_pairs, make_table
from fastddim.coefficients import COLUMNS, COLUMNS_2
from fastddim.tools.quality import Gaussian, GaussianMixture
from tests.refusals import refused

LINEAR = NoiseSchedule.linear()
ABAR = LINEAR.alphas_cumprod
PAIRS = make_pairs("uniform", 12, 1000)
KAPPA = COLUMNS_2.index("kappa")


def levels(pairs: Any) -> tuple[Any, ...]:
    """(α, σ, λ) of each pair's t and s, float64; λ is infinite for clean data."""
    t, s = np.array(pairs).T
    abar = np.append(ABAR, 1.0)
    a, b = np.sqrt(abar), np.sqrt(1 - abar)
    with np.errstate(divide="ignore"):
        lam = np.log(a) - np.log(b)
    return a[t], b[t], lam[t], a[s], b[s], lam[s]


def smooth(S: int) -> list[int]:
    """Timesteps whose λ are as equally spaced as the levels allow."""
    lam = (np.log(ABAR) - np.log1p(-ABAR)) / 2
    wanted = np.linspace(lam[-1], lam[0], S)
    return sorted({int(np.abs(lam - w).argmin()) for w in wanted})


def test_kappa_is_half_the_ratio_of_the_steps_in_lambda() -> None:
    *_, lam_t, _, _, lam_s = levels(PAIRS)
    table = make_table(LINEAR, PAIRS, order=2)
    assert table.shape == (12, len(COLUMNS_2))
    h = (lam_s - lam_t)[:-1]
    assert table[0, KAPPA] == table[-1, KAPPA] == 0
    np.testing.assert_allclose(table[1:-1, KAPPA], h[1:] / (2 * h[:-1]), rtol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_factors_are_those_of_dpm_solver(eta: float) -> None:
    """Lu et al. 2022, DPM-Solver++(2M) and its SDE form, written in h and λ."""
    _, b_t, lam_t, a_s, b_s, lam_s = (column[1:-1] for column in levels(PAIRS))
    h = lam_s - lam_t
    table = make_table(LINEAR, PAIRS, eta, order=2)[1:-1]
    of_x0 = -a_s * np.expm1(-(1 + eta) * h)
    of_x = b_s / b_t * np.exp(-eta * h)
    of_z = eta * b_s * np.sqrt(-np.expm1(-2 * h))
    np.testing.assert_allclose(table[:, 4], of_x0, rtol=1e-6)
    np.testing.assert_allclose(table[:, 6], of_x, rtol=1e-6)
    np.testing.assert_allclose(table[:, 5], of_z, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_factors_are_those_of_ddim_with_d_in_the_place_of_x0(eta: float) -> None:
    first, second = (make_table(LINEAR, PAIRS, eta, order=order) for order in (1, 2))
    a_t, b_t, a_s, c2 = (first[:, i].astype(float) for i in (0, 2, 4, 6))
    inner = second[:, KAPPA] != 0
    np.testing.assert_allclose(second[inner, 6], (c2 / b_t)[inner], rtol=1e-6)
    np.testing.assert_allclose(second[inner, 4], (a_s - c2 * a_t / b_t)[inner], atol=1e-6)
    assert np.array_equal(second[~inner, : len(COLUMNS)], first[~inner])
    assert np.array_equal(second[:, [0, 1, 2, 3, 5]], first[:, [0, 1, 2, 3, 5]])


def test_steps_from_and_to_infinite_lambda_are_of_order_1() -> None:
    zero = NoiseSchedule.from_alphas_cumprod(np.append(ABAR[:-1], 0.0))
    pairs = make_pairs("linspace", 10, 1000)
    kappa = make_table(zero, pairs, order=2)[:, KAPPA]
    assert list(np.flatnonzero(kappa == 0)) == [0, 1, 9]
    assert np.isfinite(make_table(zero, pairs, 1.0, order=2)[:, 4:]).all()
    # A final ᾱ below 1 makes the last step one of finite h.
    assert make_table(LINEAR, PAIRS, final_alpha_cumprod=0.99995, order=2)[-1, KAPPA] > 0


def test_temperature_scales_the_noise_alone() -> None:
    plain, cold = (make_table(LINEAR, PAIRS, 1.0, temperature=T, order=2) for T in (1.0, 0.5))
    np.testing.assert_allclose(cold[:, 5], plain[:, 5] / 2, rtol=1e-6)
    assert np.array_equal(np.delete(cold, 5, 1), np.delete(plain, 5, 1))


def gaussian_error(S: int, order: int) -> float:
    """The largest error of the flow of a Gaussian, whose solution is known."""
    x = torch.tensor([[1.3], [-0.4], [0.2], [2.1]])
    model = Gaussian(0.3, 0.5)
    found = DDIM(spacing=smooth(S), order=order).sample(model, x)
    return float((found - model.flow(x.double(), len(ABAR) - 1)).abs().max())


def test_the_order_of_convergence_is_two() -> None:
    coarse, fine = gaussian_error(20, 2), gaussian_error(160, 2)
    assert np.log(coarse / fine) / np.log(8) >= 1.9
    assert np.log(gaussian_error(20, 1) / gaussian_error(160, 1)) / np.log(8) < 1.1


def test_ten_steps_have_at_most_a_quarter_of_the_error_of_ddim() -> None:
    assert gaussian_error(10, 2) <= gaussian_error(10, 1) / 4


def test_a_mixtures_flow_is_closer_at_order_2() -> None:
    data = GaussianMixture(
        weights=[0.3, 0.7], means=torch.tensor([[-0.8, 0.1], [0.6, -0.4]]), stds=[0.2, 0.3]
    )
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    fine = DDIM(spacing=range(0, 1000, 2), order=2).sample(data, x)
    errors = [
        float((DDIM(spacing=smooth(16), order=order).sample(data, x) - fine).abs().mean())
        for order in (1, 2)
    ]
    assert errors[1] <= errors[0] / 4


def moments(S: int, order: int) -> tuple[float, float]:
    """(mean, variance) after the loop at η = 1 of data N(0.3, 0.5²), exactly: the steps are linear.

    The state and the x0 of the step before are two linear functions of normals: their means and
    their covariance are carried through each step in float64.
    """
    mean, variance = 0.3, 0.25
    pairs = make_pairs(smooth(S), S, len(ABAR))
    first = make_table(LINEAR, pairs, 1.0).astype(float)
    second = make_table(LINEAR, pairs, 1.0, order=2).astype(float)
    mu, cov = np.array([0.0, 0.0]), np.diag([1.0, 0.0])  # of (x, x0′)
    for (t, _), plain, row in zip(pairs, first, second, strict=True):
        level = ABAR[t]
        total = level * variance + 1 - level
        gain = np.sqrt(level) * variance / total  # x0 = mean + gain·(x − √ᾱ·mean)
        shift = mean * (1 - gain * np.sqrt(level))
        kappa = row[KAPPA] if order == 2 else 0.0
        if kappa:
            of_x = row[4] * (1 + kappa) * gain + row[6]
            of_before, constant = -row[4] * kappa, row[4] * (1 + kappa) * shift
        else:
            of_x = plain[4] * gain + plain[6] * (1 - plain[0] * gain) / plain[2]
            of_before = 0.0
            constant = (plain[4] - plain[6] * plain[0] / plain[2]) * shift
        matrix = np.array([[of_x, of_before], [gain, 0.0]])
        mu = matrix @ mu + np.array([constant, shift])
        cov = matrix @ cov @ matrix.T + np.diag([plain[5] ** 2, 0.0])
    return float(mu[0]), float(cov[0, 0])


def test_the_weak_error_at_eta_1_is_at_most_half() -> None:
    (first_mean, first), (second_mean, second) = (moments(20, order) for order in (1, 2))
    assert abs(second - 0.25) <= abs(first - 0.25) / 2
    assert max(abs(first_mean - 0.3), abs(second_mean - 0.3)) < 1e-5  # both have the mean


@pytest.mark.parametrize("order", [0, 3, True, "2", 2.5, None])
def test_other_orders_are_refused(order: Any) -> None:
    refused(partial(DDIM, 10, order=order), ValueError, "order must be 1 (DDIM) or 2", str(order))


def test_sigma_hat_steps_upwards_and_gaps_are_refused_at_order_2() -> None:
    refused(partial(DDIM, 10, eta="hat", order=2), ValueError, "eta must be a number", "hat")
    upwards = partial(make_table, LINEAR, [(0, 10), (10, 20)], order=2)
    refused(upwards, ValueError, "order must be 1 for a step towards noise")
    gap = partial(make_table, LINEAR, [(20, 10), (11, 5)], order=2)
    refused(gap, ValueError, "pairs[1] must start where", "t = 10", "t = 11")
