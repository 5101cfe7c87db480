"""DDIM against theory, on data whose exact model is known."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from fastddim import DDIM, NoiseSchedule
from fastddim.tools.quality import Gaussian, GaussianMixture

LINEAR = NoiseSchedule.linear()
LAST = 999
X_T = torch.linspace(-3, 3, 24).view(12, 2)

# "trailing" starts at t = T − 1 for every S, so that all of them approximate one map.
STEPS = (50, 100, 200, 500, 1000)


def orders(errors: list[float]) -> list[float]:
    """p of error ∝ S^−p, between neighbours."""
    return [
        math.log(coarse / fine) / math.log(more / fewer)
        for (fewer, coarse), (more, fine) in pairwise(zip(STEPS, errors, strict=True))
    ]


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.3), (-0.2, 1.5)])
def test_ddim_converges_to_a_gaussians_flow_with_order_one(mean: float, std: float) -> None:
    # The flow that carries N(√ᾱ·m, v) onto N(m, s²): x0 = m + s·(x_T − √ᾱ·m)/√v.
    abar = float(LINEAR.alphas_cumprod[LAST])
    v = abar * std**2 + 1 - abar
    exact = mean + std * (X_T.double() - math.sqrt(abar) * mean) / math.sqrt(v)
    oracle = Gaussian(mean, std, LINEAR)
    outs = [
        DDIM(S, schedule=LINEAR, spacing="trailing").sample(oracle, X_T).double() for S in STEPS
    ]
    errors = [float((out - exact).abs().max()) for out in outs]
    assert all(0.95 <= p <= 1.05 for p in orders(errors)), orders(errors)
    # And the limit is that map: one extrapolation removes the error of first order.
    limit = 2 * outs[4] - outs[3]
    assert (limit - exact).abs().max() < 0.1 * errors[4]


RING = torch.arange(3) * (2 * math.pi / 3)
MEANS = torch.stack([RING.cos(), RING.sin()], 1)
STDS = torch.tensor([0.2, 0.3, 0.4])


def exact_flow_of_the_mixture(x_T: Tensor) -> Tensor:
    """The DDIM ODE d(x/√ᾱ) = ε dσ, σ = √((1−ᾱ)/ᾱ) (Song et al. 2021, eq. 14), to 1e-9.

    The mixture's ε is written again here, in x/√ᾱ and σ.
    """
    mu, s = MEANS.double().numpy(), STDS.double().numpy()
    abar = float(LINEAR.alphas_cumprod[LAST])
    sigma = math.sqrt((1 - abar) / abar)

    def eps(sigma: float, flat: Any) -> Any:
        difference = flat.reshape(-1, 1, 2) - mu
        v = s**2 + sigma**2
        log_r = -np.log(v) - (difference**2).sum(-1) / (2 * v)
        r = np.exp(log_r - log_r.max(1, keepdims=True))
        r /= r.sum(1, keepdims=True)
        return (sigma * (r / v)[..., None] * difference).sum(1).ravel()

    start = (x_T.double() / math.sqrt(abar)).numpy().ravel()
    solution = solve_ivp(eps, (sigma, 0.0), start, method="DOP853", rtol=1e-9, atol=1e-9)
    assert solution.success
    return torch.from_numpy(solution.y[:, -1].copy()).view(x_T.shape)


def test_ddim_converges_to_a_mixtures_flow_with_order_one() -> None:
    x_T = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
    exact = exact_flow_of_the_mixture(x_T)
    oracle = GaussianMixture(MEANS, STDS, schedule=LINEAR)
    errors = [
        float(
            (DDIM(S, schedule=LINEAR, spacing="trailing").sample(oracle, x_T) - exact)
            .square()
            .mean()
            .sqrt()
        )
        for S in STEPS
    ]
    assert all(0.95 <= p <= 1.05 for p in orders(errors)), orders(errors)
    assert errors[-1] < 0.01


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2·E‖a − b‖ − E‖a − a'‖ − E‖b − b'‖: 0 for one distribution alone, with no choice to make."""
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


@pytest.mark.parametrize("first_seed", [0, 10_000])
def test_at_ten_steps_ddim_is_closer_to_the_data_than_ddpm(first_seed: int) -> None:
    # The paper's Table 1, column S = 10: η = 0 before η = 1 before σ̂. Ten narrow modes in eight
    # dimensions, for what ten steps of noise leave behind is variance.
    draw = torch.Generator().manual_seed(1)
    data = GaussianMixture(torch.randn(10, 8, generator=draw).sign(), 0.1, schedule=LINEAR)
    n = 2000
    truth, more = data.sample(n, draw), data.sample(n, draw)
    etas: list[Any] = [0.0, 1.0, "hat"]
    zero, one, hat = (
        energy_distance(
            DDIM(10, eta=eta, schedule=LINEAR).sample(
                data, shape=(n, 8), seeds=range(first_seed, first_seed + n)
            ),
            truth,
        )
        for eta in etas
    )
    floor = energy_distance(more, truth)
    assert zero < 0.6 * one < 0.6 * hat
    assert zero < 3 * floor
    assert one > 2 * floor


def test_eta_one_on_the_full_tau_draws_the_data() -> None:
    mean, std, n = 0.5, 0.3, 8192
    ddim = DDIM(1000, eta=1.0, schedule=LINEAR)
    oracle = Gaussian(mean, std, LINEAR)
    # A Gaussian stays one: x_s = A·x_t + B + c1·z, whose moments follow without sampling.
    m, v = 0.0, 1.0
    for (t, _), row in zip(ddim.pairs, ddim.table.astype(np.float64), strict=True):
        a_t, _, b_t, _, a_s, c1, c2 = row
        level = torch.tensor([t])
        at_zero, at_one = (
            float(oracle(torch.full((1, 1), x, dtype=torch.float64), level)) for x in (0.0, 1.0)
        )
        slope = at_one - at_zero
        A = a_s * (1 - b_t * slope) / a_t + c2 * slope
        B = (c2 - a_s * b_t / a_t) * at_zero
        m, v = A * m + B, A * A * v + c1 * c1
    # The chain's own end: the data, but for a discretisation of order 1/T.
    assert m == pytest.approx(mean, abs=2e-3)
    assert math.sqrt(v) == pytest.approx(std, rel=2e-2)
    out = ddim.sample(oracle, shape=(8, n // 8), seeds=range(8)).double()
    # Five standard errors; the seeds are fixed.
    assert float(out.mean()) == pytest.approx(m, abs=5 * math.sqrt(v / n))
    assert float(out.std()) == pytest.approx(math.sqrt(v), rel=5 / math.sqrt(2 * n))
