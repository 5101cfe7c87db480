"""Plans the loop that runs backwards, from data to noise."""

from __future__ import annotations

import numpy as np

from fastddim.check import whole
from fastddim.coefficients import Prediction, levels, make_table, pack
from fastddim.levels import GaussianPath
from fastddim.loop.plan import Plan, gradient_factors
from fastddim.timesteps import Pair
from fastddim.variances import Eta


def reverse_plan(
    schedule: GaussianPath,
    pairs: tuple[Pair, ...],
    final_alpha_cumprod: float,
    prediction: Prediction,
    *,
    order: int,
    eta: Eta,
    clip: float | None,
    until: int | None,
    shifted: bool,
) -> Plan:
    """Returns the sampler's rows, each from its s to its t, from the last row to ``until``.

    Args:
        schedule, pairs, final_alpha_cumprod, prediction, order, eta, clip: the sampler's.
        until: the row to stop at; None is row 0.
        shifted: whether a cond_fn shifts the model's output.

    Raises:
        ValueError: the order is 2, η is not 0, clip is not None, or a step leads from ᾱ = 0 to
            clean data.
    """
    if order != 1:
        raise ValueError(
            f"order must be 1 to run backwards, got {order}: x_t is no fixed point of a step that "
            f"reads the x0 of the step before"
        )
    if eta != 0:  # A temperature of 0 does not help: c2 is still that of η.
        raise ValueError(
            f"eta must be 0 to run backwards, got {eta}: noise that was added cannot be taken away"
        )
    if clip is not None:
        raise ValueError(
            f"clip must be None to run backwards, got {clip:g}: a clamp has no inverse"
        )
    last = whole("until", 0 if until is None else until, low=0, high=len(pairs) - 1)
    up = tuple((s, t) for t, s in pairs)
    at, at_s = levels(schedule, pairs, final_alpha_cumprod)
    a, b, a_s, b_s = at.alpha, at.sigma, at_s.alpha, at_s.sigma
    if ((a == 0) & (b_s == 0))[last:].any():
        raise ValueError(
            "a loop that runs backwards cannot lead from clean data to α = 0 in one step, where "
            "x_T is no function of the data: take more steps"
        )
    # The iteration that keeps ε leaves (b_t·a_s − a_t·b_s)/(b_t·a_s) of its error in y, as ∂x0/∂y
    # tends to 0; for data with unit variance, the one that keeps x0 leaves
    # (b_t·a_s − a_t·b_s)·a_t/b_s.
    by_x0 = (a * b_s < 0.1 * a_s * b) & (a * a_s < b * b_s)
    zeros = np.zeros_like(a)
    return Plan(
        table=make_table(schedule, up, 0.0, final_alpha_cumprod),
        order=range(len(up) - 1, last - 1, -1),
        times=schedule.times([t for t, _ in pairs]),
        pairs=up,
        shift=gradient_factors(at, prediction) if shifted else None,
        prediction=prediction,
        clip=None,
        conversion=pack(at, np.where(by_x0, 1.0, 0.0), zeros, np.where(by_x0, 0.0, 1.0)),
        by_x0=tuple(by_x0.tolist()),
    )
