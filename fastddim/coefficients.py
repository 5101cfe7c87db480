"""(t, s) pairs × η → the coefficient table: the factors of one step per row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fastddim.check import finite, shown
from fastddim.schedule import Float64, NoiseSchedule
from fastddim.timesteps import Pair

Float32: TypeAlias = npt.NDArray[np.float32]
Eta: TypeAlias = float | Literal["hat"]

Prediction: TypeAlias = Literal["epsilon", "v", "sample", "flow"]

PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v", "sample", "flow")
"""What a model may predict. The step's op takes the position in this tuple."""
VP_PREDICTIONS = PREDICTIONS[:3]
"""What a model may predict on a path with α² + σ² = 1, where ᾱ = α² says all."""

PredictionSynonym: TypeAlias = Literal[
    "eps", "noise", "pred_noise", "v_prediction", "pred_v", "x0", "x_0", "x_start", "pred_x0"
]
_SYNONYMS: dict[str, Prediction] = {
    "eps": "epsilon",
    "noise": "epsilon",
    "pred_noise": "epsilon",
    "v_prediction": "v",
    "pred_v": "v",
    "x0": "sample",
    "x_0": "sample",
    "x_start": "sample",
    "pred_x0": "sample",
}
"""The names that CompVis, diffusers, guided-diffusion and denoising_diffusion_pytorch use."""

COLUMNS = (
    "sqrt_abar_t",  # √ᾱ_t
    "rcp_sqrt_abar_t",  # 1/√ᾱ_t, from the float32 √ᾱ_t, as the kernel's exact division needs
    "sqrt_1m_abar_t",  # √(1−ᾱ_t)
    "rcp_sqrt_1m_abar_t",  # 1/√(1−ᾱ_t)
    "sqrt_abar_s",  # √ᾱ_s
    "c1",  # noise scale
    "c2",  # direction to x_t
)
"""The table's columns, in the order in which the kernel reads them."""
COLUMNS_2 = (*COLUMNS, "kappa")  # κ, the weight of the x0 of the step before
"""The columns of a table of order 2: see ``make_table``."""
ORDERS = (1, 2)


def make_table(
    schedule: NoiseSchedule,
    pairs: Sequence[Pair],
    eta: Eta = 0.0,
    final_alpha_cumprod: float = 1.0,
    temperature: float = 1.0,
    order: int = 1,
) -> Float32:
    """Returns the table of a trajectory, float32 of shape (len(pairs), len(COLUMNS)).

    For each step t → s (Song et al. 2021, eq. 12 and 16), in float64, rounded once:

        c1 = η·√((1 − ᾱ_t/ᾱ_s)·(1−ᾱ_s)/(1−ᾱ_t)),   c2 = √(1 − ᾱ_s − c1²)

    ``eta="hat"`` keeps the mean of η = 1 and has the larger c1 = √(1 − ᾱ_t/ᾱ_s) (the paper's σ̂).
    A step to s = −1 takes ᾱ_s = ``final_alpha_cumprod`` and c1 = 0, with σ̂ too. ``temperature``
    scales c1 and leaves c2 unchanged. A step towards noise, s > t, is a step of the ODE backwards:
    it needs η = 0, and t = −1 is clean data there.

    ``order=2`` adds the column κ, and the step extrapolates x0 from x0′, the x0 of the step before.
    With λ = ln(√ᾱ/√(1−ᾱ)), h = λ_s − λ_t and h′ the h of the step before:

        κ = h/(2h′),   D = x0 + κ·(x0 − x0′),   ε_D = (x_t − √ᾱ_t·D)/√(1−ᾱ_t)
        x_s = √ᾱ_s·D + c1·z + c2·ε_D = (√ᾱ_s − c2·√ᾱ_t/√(1−ᾱ_t))·D + c1·z + c2/√(1−ᾱ_t)·x_t

    At η = 0 this is DPM-Solver++(2M) and at η = 1 its SDE form (Lu et al. 2022, algorithm 2 and
    appendix). Rows with κ ≠ 0 hold the factors of D and x_t in place of √ᾱ_s and c2. In the first
    row, and where h or h′ is infinite (a step to clean data, or from ᾱ = 0), κ is 0, and the row is
    that of order 1.

    Raises:
        ValueError: η is negative, not finite, or gives c1² > 1 − ᾱ_s, and the message names the
            largest η that these pairs allow; or there are no pairs, or a level is out of range; or
            ``order`` is neither 1 nor 2, or is 2 with σ̂, a step towards noise, or pairs of which
            one does not start where the one before ends.
    """
    eta, order = checked_eta(eta), checked_order(order)
    abar_t, abar_s = levels(schedule, pairs, final_alpha_cumprod)
    last = np.array([s < 0 for _, s in pairs])
    if order == 1:
        return from_levels(abar_t, abar_s, eta, last, temperature)
    if eta == "hat":
        raise ValueError(
            'eta must be a number with order 2, got "hat": its noise is larger than that of the '
            "equation which the second order solves"
        )
    if (abar_t > abar_s).any():
        raise ValueError("order must be 1 for a step towards noise, got 2")
    for i, (before, after) in enumerate(pairwise(pairs), start=1):
        if before[1] != after[0]:
            raise ValueError(
                f"pairs[{i}] must start where the step before ended with order 2, at "
                f"t = {before[1]}, got t = {after[0]}"
            )
    return from_levels(abar_t, abar_s, eta, last, temperature, extrapolation(abar_t, abar_s))


def from_levels(
    abar_t: Float64,
    abar_s: Float64,
    eta: Eta,
    last: npt.NDArray[np.bool_],
    temperature: float = 1.0,
    kappa: Float64 | None = None,
) -> Float32:
    """Returns the table of steps between any two levels, with the column κ if it is given.

    ``last`` marks the steps that add no noise whatever η is. All else is as in ``make_table``.
    """
    c1, c2 = _noise_and_direction(abar_t, abar_s, eta, last)
    if kappa is None:
        return pack(abar_t, abar_s, temperature * c1, c2)
    with np.errstate(divide="ignore", invalid="ignore"):  # where κ = 0 neither factor is used
        of_x = c2 / np.sqrt(1 - abar_t)
        of_x0 = np.sqrt(abar_s) - of_x * np.sqrt(abar_t)
    table = pack(abar_t, abar_s, temperature * c1, np.where(kappa == 0, c2, of_x))
    table[:, 4] = np.where(kappa == 0, table[:, 4], of_x0)
    return np.concatenate([table, kappa[:, None].astype(np.float32)], axis=1)


def log_snr_steps(abar_t: Float64, abar_s: Float64) -> Float64:
    """Returns h = λ_s − λ_t of each step, with λ = ln(√ᾱ/√(1−ᾱ)), half the log of the SNR."""
    with np.errstate(divide="ignore", invalid="ignore"):  # λ is infinite at ᾱ = 0 and ᾱ = 1
        return (np.log(abar_s / abar_t) - np.log1p(-abar_s) + np.log1p(-abar_t)) / 2


def extrapolation(abar_t: Float64, abar_s: Float64) -> Float64:
    """Returns κ = h/(2h′) of each step; 0 in the first, and where h/h′ is no number or infinite."""
    h = log_snr_steps(abar_t, abar_s)
    kappa = np.zeros_like(h)
    finite_h = np.isfinite(h[1:]) & np.isfinite(h[:-1]) & (h[:-1] != 0)
    kappa[1:][finite_h] = h[1:][finite_h] / (2 * h[:-1][finite_h])
    return kappa


def _noise_and_direction(
    abar_t: Float64, abar_s: Float64, eta: Eta, last: npt.NDArray[np.bool_]
) -> tuple[Float64, Float64]:
    """Returns (c1, c2) of each step."""
    if eta == 0:
        return np.zeros_like(abar_t), np.sqrt(1 - abar_s)
    if (abar_t > abar_s).any():
        raise ValueError(f"eta must be 0 for a step towards noise, got {eta}")
    posterior = (1 - abar_t / abar_s) * (1 - abar_s) / (1 - abar_t)
    posterior[last] = 0.0
    if eta == "hat":
        c1 = np.where(last, 0.0, np.sqrt(1 - abar_t / abar_s))
        variance = posterior
    else:
        most = largest_eta(abar_t, abar_s, last)
        if eta > most:
            raise ValueError(
                f"eta must be at most {floor6(most)} for these steps (beyond it 1 − ᾱ_s − c1² "
                f"is negative), got {eta:g}"
            )
        variance = eta**2 * posterior
        c1 = np.sqrt(variance)
    return c1, np.sqrt(np.maximum(1 - abar_s - variance, 0.0))


def levels(
    schedule: NoiseSchedule, pairs: Sequence[Pair], final_alpha_cumprod: float = 1.0
) -> tuple[Float64, Float64]:
    """Returns (ᾱ_t, ᾱ_s) of the pairs, float64; ᾱ_{−1} is ``final_alpha_cumprod``."""
    abar = np.append(schedule.alphas_cumprod, final_alpha_cumprod)  # index −1 is the last element
    t, s = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    if not t.size or min(t.min(), s.min()) < -1 or max(t.max(), s.max()) >= len(schedule):
        raise ValueError(
            f"pairs must hold at least one step (t, s) of levels in [-1, {len(schedule) - 1}], "
            f"got {shown(pairs)}"
        )
    return abar[t], abar[s]


def largest_eta(abar_t: Float64, abar_s: Float64, last: npt.NDArray[np.bool_]) -> float:
    """Returns the largest η with c1² ≤ 1 − ᾱ_s but at ``last``, min √((1−ᾱ_t)/(1−ᾱ_t/ᾱ_s))."""
    moving = ~last & (abar_t < abar_s)
    if not moving.any():
        return float("inf")
    t, s = abar_t[moving], abar_s[moving]
    return float(np.sqrt((1 - t) / (1 - t / s)).min())


def checked_prediction(prediction: Any) -> Prediction:
    """Returns one of ``PREDICTIONS``, given its name or a synonym."""
    if isinstance(prediction, str):
        found = _SYNONYMS.get(prediction, prediction)
        for name in VP_PREDICTIONS:
            if name == found:
                return name
        if "flow" in prediction.lower() or prediction.lower() == "velocity":
            raise ValueError(
                f"prediction must be one of {', '.join(VP_PREDICTIONS)}, got {prediction!r}: the "
                f"velocity of a flow ε − x0 belongs to the path (1 − σ, σ) and not to ᾱ; v is "
                f"√ᾱ·ε − √(1−ᾱ)·x0"
            )
    raise ValueError(
        f"prediction must be one of {', '.join(VP_PREDICTIONS)} (sample is x0), got "
        f"{shown(prediction)}"
    )


def checked_order(order: Any) -> int:
    """Returns ``order``, which is 1 or 2."""
    if order.__class__ is bool or order not in ORDERS:
        raise ValueError(f"order must be 1 (DDIM) or 2, got {shown(order)}")
    return int(order)


def checked_eta(eta: Any) -> Eta:
    """Returns ``eta`` as a float ≥ 0, or ``"hat"``."""
    if isinstance(eta, str):
        if eta == "hat":
            return "hat"
        raise ValueError(f'eta must be a number ≥ 0 or "hat", got {eta!r}')
    value = finite("eta", eta)
    if value < 0:
        raise ValueError(f'eta must be a number ≥ 0 or "hat", got {value:g}')
    return value


def pack(abar_t: Float64, abar_s: Float64, c1: Float64, c2: Float64) -> Float32:
    """Returns the table, float32, with ``COLUMNS`` in their order."""
    sqrt_t = np.sqrt(abar_t).astype(np.float32)
    sqrt_1mt = np.sqrt(1 - abar_t).astype(np.float32)
    with np.errstate(divide="ignore"):  # ᾱ_T = 0: a v model never divides by it
        columns = (sqrt_t, 1 / sqrt_t, sqrt_1mt, 1 / sqrt_1mt, np.sqrt(abar_s), c1, c2)
    return np.stack([np.asarray(c, dtype=np.float32) for c in columns], axis=1)


def floor6(value: float) -> float:
    """Rounds down to six decimals, so that the number in the message is allowed."""
    return float(np.floor(value * 1e6) / 1e6)
