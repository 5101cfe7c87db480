"""Plans the loop that runs backwards, from data to noise."""

from __future__ import annotations

import numpy as np

from fastddim.check import whole
from fastddim.coefficients import Eta, Prediction, levels, make_table, pack
from fastddim.loop.plan import Plan, gradient_factors
from fastddim.schedule import NoiseSchedule
from fastddim.timesteps import Pair


def reverse_plan(
    schedule: NoiseSchedule,
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
    abar, abar_s = levels(schedule, pairs, final_alpha_cumprod)
    if ((abar == 0) & (abar_s == 1))[last:].any():
        raise ValueError(
            "a loop that runs backwards cannot lead from clean data to ᾱ = 0 in one step, where "
            "x_T is no function of the data: take more steps"
        )
    # The iteration that keeps ε leaves (b_t·a_s − a_t·b_s)/(b_t·a_s) of its error in y, as ∂x0/∂y
    # tends to 0; for data with unit variance, the one that keeps x0 leaves
    # (b_t·a_s − a_t·b_s)·a_t/b_s.
    a, b, a_s, b_s = (np.sqrt(n) for n in (abar, 1 - abar, abar_s, 1 - abar_s))
    by_x0 = (a * b_s < 0.1 * a_s * b) & (a * a_s < b * b_s)
    zeros = np.zeros_like(abar)
    return Plan(
        table=make_table(schedule, up, 0.0, final_alpha_cumprod),
        order=range(len(up) - 1, last - 1, -1),
        levels=tuple(t for t, _ in pairs),
        pairs=up,
        shift=gradient_factors(abar, prediction) if shifted else None,
        prediction=prediction,
        clip=None,
        conversion=pack(abar, np.where(by_x0, 1.0, 0.0), zeros, np.where(by_x0, 0.0, 1.0)),
        by_x0=tuple(by_x0.tolist()),
    )
