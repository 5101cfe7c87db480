"""(t, s) pairs × η → the coefficient table: the factors of one step per row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fastddim.check import shown
from fastddim.levels import Float64, GaussianPath, Levels, log_snr_steps, noisier
from fastddim.timesteps import Pair
from fastddim.variances import Eta, Steps, checked_eta, noise_and_direction

Float32: TypeAlias = npt.NDArray[np.float32]

Prediction: TypeAlias = Literal["epsilon", "v", "sample", "flow"]

PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v", "sample", "flow")
"""The quantities that a model may predict. The step's op takes the position in this tuple."""
VP_PREDICTIONS = PREDICTIONS[:3]
"""The quantities that a model may predict on the path of ᾱ."""

PredictionSynonym: TypeAlias = Literal[
    "eps",
    "noise",
    "pred_noise",
    "v_prediction",
    "pred_v",
    "x0",
    "x_0",
    "x_start",
    "pred_x0",
    "flow_prediction",
    "velocity",
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
    "flow_prediction": "flow",
    "velocity": "flow",
}
"""The names that CompVis, diffusers, guided-diffusion and denoising_diffusion_pytorch use."""

COLUMNS = (
    "sqrt_abar_t",  # √ᾱ_t, on any path α_t
    "rcp_sqrt_abar_t",  # 1/√ᾱ_t, from the float32 √ᾱ_t, as the kernel's exact division needs
    "sqrt_1m_abar_t",  # √(1−ᾱ_t), on any path σ_t
    "rcp_sqrt_1m_abar_t",  # 1/√(1−ᾱ_t)
    "sqrt_abar_s",  # √ᾱ_s, on any path α_s
    "c1",  # noise scale
    "c2",  # direction to x_t
)
"""The table's columns, in the order in which the kernel reads them."""
COLUMNS_2 = (*COLUMNS, "kappa")  # κ, the weight of the x0 of the step before
"""The columns of a table of order 2: see ``make_table``."""
# √ᾱ_t and √(1−ᾱ_t) where they multiply: eager PyTorch may round a factor to the dtype of a half
# precision state there, and not where the factor divides.
COLUMNS_ROUNDED = (*COLUMNS, "times_sqrt_abar_t", "times_sqrt_1m_abar_t")
"""The columns of a step that rounds (``Fixed.rounding``), which draws no counter noise."""
COLUMNS_OF_MANY = (*COLUMNS_2, "number")  # the row's number in its own sampler's table
"""The columns of the tables of several samplers, one after the other. Counter noise belongs to the
row's own number, float32, which holds the numbers below 2²⁴ exactly."""
ORDERS = (1, 2)


def make_table(
    schedule: GaussianPath,
    pairs: Sequence[Pair],
    eta: Eta = 0.0,
    final_alpha_cumprod: float = 1.0,
    temperature: float = 1.0,
    order: int = 1,
) -> Float32:
    """Returns the table of a trajectory, float32 of shape (len(pairs), len(COLUMNS)).

    For each step t → s, with the levels (α, σ) of the schedule, in float64, rounded once:

        c1 = η·σ_s·√(1 − (α_t·σ_s/(α_s·σ_t))²),   c2 = √(σ_s² − c1²)

    Where α² = ᾱ = 1 − σ² this is c1 = η·√((1 − ᾱ_t/ᾱ_s)·(1−ᾱ_s)/(1−ᾱ_t)) and c2 = √(1 − ᾱ_s − c1²)
    (Song et al. 2021, eq. 12 and 16). ``eta="hat"`` keeps the mean of η = 1 and has the larger
    c1 = √(1 − ᾱ_t/ᾱ_s) (the paper's σ̂). Any other rule of ``fastddim.variances`` gives c1 and c2
    itself. A step to s = −1 takes ᾱ_s = ``final_alpha_cumprod`` and c1 = 0, with any rule.
    ``temperature`` scales c1 and leaves c2 unchanged. A step towards noise is a step of the ODE
    backwards: it needs η = 0, and t = −1 is clean data there.

    ``order=2`` adds the column κ, and the step extrapolates x0 from x0′, the x0 of the step before.
    With λ = ln(α/σ), h = λ_s − λ_t and h′ the h of the step before:

        κ = h/(2h′),   D = x0 + κ·(x0 − x0′),   ε_D = (x_t − α_t·D)/σ_t
        x_s = α_s·D + c1·z + c2·ε_D = (α_s − c2·α_t/σ_t)·D + c1·z + c2/σ_t·x_t

    At η = 0 this is DPM-Solver++(2M) and at η = 1 its SDE form (Lu et al. 2022, algorithm 2 and
    appendix). Rows with κ ≠ 0 hold the factors of D and x_t in place of α_s and c2. In the first
    row, and where h or h′ is infinite (a step to clean data, or from α = 0), κ is 0, and the row is
    that of order 1.

    Raises:
        ValueError: η is negative, not finite, or gives c1² > σ_s², and the message names the
            largest η that these pairs allow; or there are no pairs, or a level is out of range; or
            ``order`` is neither 1 nor 2, or is 2 with a rule other than a number, a step towards
            noise, or pairs of which one does not start where the one before ends.
    """
    eta, order = checked_eta(eta), checked_order(order)
    t, s = levels(schedule, pairs, final_alpha_cumprod)
    steps = Steps(t, s, np.array([s < 0 for _, s in pairs]), schedule, pairs)
    if order == 1:
        return from_steps(steps, eta, temperature)
    if not isinstance(eta, float):
        given = '"hat"' if eta == "hat" else shown(eta)
        raise ValueError(
            f"eta must be a number with order 2, got {given}: its noise is not that of the "
            f"equation which the second order solves"
        )
    if noisier(s, t).any():
        raise ValueError("order must be 1 for a step towards noise, got 2")
    for i, (before, after) in enumerate(pairwise(pairs), start=1):
        if before[1] != after[0]:
            raise ValueError(
                f"pairs[{i}] must start where the step before ended with order 2, at "
                f"t = {before[1]}, got t = {after[0]}"
            )
    return from_steps(steps, eta, temperature, extrapolation(t, s))


def from_steps(
    steps: Steps, eta: Eta, temperature: float = 1.0, kappa: Float64 | None = None
) -> Float32:
    """Returns the table of steps between any two levels, with the column κ if it is given.

    All else is as in ``make_table``.
    """
    t, s = steps.t, steps.s
    c1, c2 = noise_and_direction(steps, eta)
    if kappa is None:
        return pack(t, s.alpha, temperature * c1, c2)
    with np.errstate(divide="ignore", invalid="ignore"):  # where κ = 0 neither factor is used
        of_x = c2 / t.sigma
        of_x0 = s.alpha - of_x * t.alpha
    of_eps_or_x = np.where(kappa == 0, c2, of_x)
    table = pack(t, np.where(kappa == 0, s.alpha, of_x0), temperature * c1, of_eps_or_x)
    return np.concatenate([table, kappa[:, None].astype(np.float32)], axis=1)


def extrapolation(t: Levels, s: Levels) -> Float64:
    """Returns κ = h/(2h′) of each step; 0 in the first, and where h/h′ is no number or infinite."""
    h = log_snr_steps(t, s)
    kappa = np.zeros_like(h)
    finite_h = np.isfinite(h[1:]) & np.isfinite(h[:-1]) & (h[:-1] != 0)
    kappa[1:][finite_h] = h[1:][finite_h] / (2 * h[:-1][finite_h])
    return kappa


def levels(
    schedule: GaussianPath, pairs: Sequence[Pair], final_alpha_cumprod: float = 1.0
) -> tuple[Levels, Levels]:
    """Returns the levels of t and of s of the pairs; ᾱ_{−1} is ``final_alpha_cumprod``."""
    t, s = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    if not t.size:
        where = "σ" if schedule.continuous else f"levels in [-1, {len(schedule) - 1}]"
        raise ValueError(f"pairs must hold at least one step (t, s) of {where}, got none")
    try:
        return schedule.at(t, final_alpha_cumprod), schedule.at(s, final_alpha_cumprod)
    except ValueError as error:
        raise ValueError(f"pairs must hold steps (t, s) of levels of {schedule}: {error}") from None


def checked_prediction(prediction: Any, path: GaussianPath | None = None) -> Prediction:
    """Returns one of ``PREDICTIONS``, given its name or a synonym.

    Raises:
        ValueError: the name is unknown, or the path (that of ᾱ by default) has no such prediction.
    """
    allowed = VP_PREDICTIONS if path is None else path.predictions
    found = _SYNONYMS.get(prediction, prediction) if isinstance(prediction, str) else None
    for name in PREDICTIONS:
        if name == found and name in allowed:
            return name
    reason = ""
    if "sample" in allowed and found not in PREDICTIONS:
        reason = " (sample is x0)"
    on = "" if path is None or path.predictions == VP_PREDICTIONS else f" on {path}"
    text = f"prediction must be one of {', '.join(allowed)}{reason}{on}, got {shown(prediction)}"
    if found == "flow":
        text += (
            ": the velocity of a flow ε − x0 belongs to the path (1 − σ, σ) and not to ᾱ; v is "
            "√ᾱ·ε − √(1−ᾱ)·x0"
        )
    elif found == "v":
        text += ": v = α·ε − σ·x0 belongs to a path with α² + σ² = 1"
    raise ValueError(text)


def checked_order(order: Any) -> int:
    """Returns ``order``, which is 1 or 2."""
    try:
        known = order.__class__ is not bool and order in ORDERS
    except (RuntimeError, ValueError):  # several numbers are neither true nor false
        known = False
    if not known:
        raise ValueError(f"order must be 1 (DDIM) or 2, got {shown(order)}")
    return int(order)


def pack(t: Levels, a_s: Float64, c1: Float64, c2: Float64) -> Float32:
    """Returns the table, float32, with ``COLUMNS`` in their order."""
    alpha, sigma = t.alpha.astype(np.float32), t.sigma.astype(np.float32)
    with np.errstate(divide="ignore"):  # α = 0: a v model never divides by it
        columns = (alpha, 1 / alpha, sigma, 1 / sigma, a_s, c1, c2)
    return np.stack([np.asarray(c, dtype=np.float32) for c in columns], axis=1)
