"""The σ of a multistep solver → the coefficient table of its steps."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fastddim.coefficients import Float32, extrapolation, from_steps
from fastddim.levels import Float64, Levels, log_snr_steps
from fastddim.variances import Steps

NEARLY = 1e-6
"""The relative difference of two ᾱ that the float32 σ of one level may give."""
LEAST = 2.0**-126
"""The κ of rows of order 1: D = x0 + κ·(x0 − x0′) rounds to x0, but the step still makes x_s from D
and x_t, as diffusers does, and not from x0 and ε. That sum rounds less in short steps, in which the
factor of x0 is small."""


def make_rows(sigmas: npt.ArrayLike, order: int, eta: float, heun: bool) -> Float32:
    """Returns the rows of the steps along ``sigmas``, σ = √((1−ᾱ)/ᾱ), which may be 0 at the end.

    The first S rows are the steps of order 1. With order 2, S rows of order 2 follow them: a solver
    decides at each step which of the two it takes. Both have the columns of order 2.

    ``heun`` is the other second order that diffusers' solver has. It changes κ alone: with
    k = (1 + η)·h, which is h in the ODE and 2·h in the SDE,

        κ = h/h′ · (k − (1 − e⁻ᵏ)) / (k·(1 − e⁻ᵏ))

    in place of h/(2h′), to which it tends for small h (Lu et al. 2022, appendix).

    Raises:
        ValueError: η > 0, and some σ is larger than the σ before it.
    """
    sigma = np.asarray(sigmas, dtype=np.float64)
    abar = 1 / (1 + sigma**2)
    abar_t, abar_s = abar[:-1], abar[1:]
    if eta:
        # "sigma_min" repeats the last σ, which may then rise by a rounding.
        abar_s = np.where(abar_s >= abar_t * (1 - NEARLY), np.maximum(abar_s, abar_t), abar_s)
        if (rises := np.flatnonzero(abar_t > abar_s)).size:
            i = int(rises[0])
            raise ValueError(
                f'timesteps must fall with algorithm_type "sde-dpmsolver++", got '
                f"σ = {sigma[i + 1]:g} after {sigma[i]:g}"
            )
    none = np.zeros(len(abar_t), dtype=np.bool_)
    least = np.full_like(abar_t, LEAST)
    t, s = Levels.of_abar(abar_t), Levels.of_abar(abar_s)
    steps = Steps(t, s, none)
    first = from_steps(steps, eta, kappa=least)
    if order == 1:
        return first
    kappa = extrapolation(t, s)
    if heun:
        kappa = kappa * _heun((1 + eta) * log_snr_steps(t, s))
    kappa = np.where(np.abs(kappa) > LEAST, kappa, least)  # False for NaN too
    return np.concatenate([first, from_steps(steps, eta, kappa=kappa)])


def _heun(k: Float64) -> Float64:
    """Returns κ of ``heun`` as a multiple of h/(2h′); NaN where h is 0 or infinite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        rest = -np.expm1(-k)
        return 2 * (k - rest) / (k * rest)
