"""Checks the fields of ``DDIM``, and derives its (t, s) pairs and its coefficient table."""

from __future__ import annotations

import warnings
from typing import Any

from fastddim.check import SamplingWarning, finite, kind, whole
from fastddim.coefficients import checked_order, checked_prediction, make_table
from fastddim.levels import GaussianPath
from fastddim.schedule import NoiseSchedule
from fastddim.timesteps import make_pairs, read
from fastddim.tuned import Tuned
from fastddim.variances import checked_eta

FAR = 0.2
"""A sampler warns if √ᾱ of its first level exceeds this bound, because the model expects less
noise there than x_T holds. The paper's own spacings stay below the bound from S = 3 on (0.105,
linear β), and so does Stable Diffusion's (0.192 at S = 5)."""


def checked_fields(
    *,
    steps: Any,
    eta: Any,
    schedule: Any,
    spacing: Any,
    prediction: Any,
    clip: Any,
    final_alpha_cumprod: Any,
    temperature: Any,
    order: Any,
) -> dict[str, Any]:
    """Returns the fields that ``DDIM`` stores: checked arguments, ``pairs`` and ``table``.

    Raises:
        TypeError, ValueError: naming the argument, the value and what is allowed.
    """
    if not isinstance(schedule, GaussianPath):
        raise TypeError(f"schedule must be a NoiseSchedule, got {kind(schedule)}")
    prediction = checked_prediction(prediction, schedule)
    clip = None if clip is None else finite("clip", clip)
    if clip is not None and clip <= 0:
        raise ValueError(f"clip must be > 0, got {clip:g}")
    spacing = read(spacing)
    if isinstance(spacing, Tuned):
        for line in spacing.differences(schedule, checked_order(order)):
            # The caller's DDIM(...): above are __init__, __post_init__ and checked_fields.
            warnings.warn(line, SamplingWarning, stacklevel=4)
    count = 50 if steps is None and not isinstance(spacing, Tuned) else steps
    pairs = make_pairs(spacing, count, schedule)
    if isinstance(spacing, Tuned):
        count = len(pairs)
    elif isinstance(spacing, str):
        count = whole("steps", count, low=1)
        _check_first_level(schedule, spacing, count, pairs[0][0])
    elif steps in (None, len(pairs)):
        count, spacing = len(pairs), pairs  # The caller could write to a list, but not to a tuple.
    else:
        raise ValueError(
            f"steps must be left out or {len(pairs)}, the length of spacing, got {steps!r}"
        )
    final = finite("final_alpha_cumprod", final_alpha_cumprod)
    noisiest, cleanest = schedule.at([pairs[0][0], pairs[-1][0]], final).alpha2
    if noisiest == 0 and prediction == "epsilon":
        others = " or ".join(name for name in schedule.predictions if name != "epsilon")
        zero = "ᾱ" if isinstance(schedule, NoiseSchedule) else "α"
        level = "σ" if schedule.continuous else "t"
        raise ValueError(
            f"prediction must be {others} where {zero} is 0, as it is at {level} = "
            f"{pairs[0][0]:g} of this schedule, got 'epsilon'"
        )
    if isinstance(schedule, NoiseSchedule) and not cleanest <= final <= 1:
        raise ValueError(
            f"final_alpha_cumprod must lie between {cleanest:.6g}, the level of the last "
            f"step, and 1, got {final:g}"
        )
    temperature = finite("temperature", temperature)
    if temperature < 0:
        raise ValueError(f"temperature must be ≥ 0, got {temperature:g}")
    table = make_table(schedule, pairs, eta, final, temperature, order)
    table.setflags(write=False)
    return {
        "steps": count,
        "spacing": spacing,
        "eta": checked_eta(eta),
        "prediction": prediction,
        "clip": clip,
        "final_alpha_cumprod": final,
        "temperature": temperature,
        "order": int(order),
        "pairs": pairs,
        "table": table,
    }


def _check_first_level(schedule: GaussianPath, spacing: str, steps: int, t: float) -> None:
    """Warns if a named spacing begins at a level t where x holds much of an image.

    A list of timesteps is not checked: image to image may begin at any level.

    Raises:
        ValueError: the only step goes from t = 0.
    """
    if schedule.continuous:
        return  # Every named spacing begins at the noisiest σ.
    last = len(schedule) - 1
    if t == 0 < last:
        raise ValueError(
            f"steps must be 2 or more with spacing {spacing!r}, whose one step goes from t = 0, "
            f"where noise stays noise (spacing 'trailing' has one from t = {last}), got {steps}"
        )
    signal, least = schedule.at([t, last]).signal
    if signal > max(FAR, 2 * least):
        warnings.warn(
            f"spacing {spacing!r} with {steps} steps begins at t = {t}, where the model expects "
            f"{signal:.3g} (√ᾱ) of an image in x, and noise holds none: spacing 'trailing' begins "
            f"at t = {last}, where it expects {least:.3g}",
            SamplingWarning,
            # The caller's DDIM(...): above are __init__, __post_init__ and checked_fields.
            stacklevel=5,
        )
