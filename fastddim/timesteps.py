"""τ, the timesteps of a sampler, as explicit (t, s) pairs in the order of the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from os import PathLike
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from fastddim.check import finite, whole
from fastddim.levels import Float64, GaussianPath, log_nsr
from fastddim.paths import TINY, Continuous
from fastddim.tuned import Tuned

Pair: TypeAlias = tuple[Any, Any]
"""(t, s): numbers of a table's levels, ints, or σ of a continuous path; −1 is clean data."""
SpacingName: TypeAlias = Literal[
    "uniform",
    "quad",
    "leading",
    "trailing",
    "linspace",
    "mixed",
    "logsnr",
    "karras",
    "uniform-ermongroup",
    "quad-ermongroup",
]
Spacing: TypeAlias = SpacingName | Tuned | PathLike[str] | Sequence[Any] | Sequence[Pair]


def make_pairs(
    spacing: Spacing | str, steps: int | None, T: int | GaussianPath
) -> tuple[Pair, ...]:
    """Returns the (t, s) pairs of τ: each step goes from level t to s, the last to s = −1 (data).

    Args:
        spacing: a name; the ``Tuned`` timesteps of ``fastddim.tune``, or the path of their file,
            which ends in .json; or τ itself: timesteps that strictly increase or strictly decrease
            (the steps go from the noisiest down), or (t, s) pairs in the order of the steps.

            - ``"uniform"``: ⌊i·T/S⌋ (Song et al. 2021, appendix D.2, "linear").
            - ``"quad"``: max(i, ⌊c·i²⌋) up to 0.8·T (the same appendix, "quadratic").
            - ``"leading"``: i·⌊T/S⌋; ``"trailing"``: round(T − i·T/S) − 1; ``"linspace"``: equally
              spaced from 0 to T−1, rounded (Lin et al. 2024, table 2).
            - ``"mixed"``: equally spaced in 0.8·t/(T−1) + 0.2·(λ_0 − λ_t)/(λ_0 − λ_{T−1}), with
              λ = ln(√ᾱ/√(1−ᾱ)), from T−1 to 0.016·(T−1): the best of the names for few steps of
              order 2. ``"logsnr"``: equally spaced in λ (Lu et al. 2022, section 4.3), and
              ``"karras"``: in σ^(1/7) with σ = √(1−ᾱ)/√ᾱ (Karras et al. 2022, eq. 5), both from
              T−1 to 0. These three need the schedule.
            - With S = 1 each of these eight takes one step from T−1, the noisiest level; i = 0
              would give t = 0.
            - ``"uniform-ermongroup"``, ``"quad-ermongroup"``: the spacings of ermongroup/ddim's
              code. The first strides by ⌊T/S⌋ and so may take more than S steps (334 for 300 of
              1000). The second repeats truncated values from S = 30 on, and each repetition is a
              model call that leaves x unchanged.
        steps: S; None takes the length of a list, or of the only ``Tuned`` τ. All but the two
            ermongroup spacings take exactly S distinct steps.
        T: the number of noise levels, or the schedule itself. On a continuous path the pairs hold
            σ instead of t: ``"uniform"`` and ``"trailing"`` are S even times u of the path's own
            formula, ``"linspace"``, ``"mixed"``, ``"logsnr"`` and ``"karras"`` lie between the
            ends of its 1,000 even times, and a list holds σ.

    Raises:
        TypeError, ValueError: naming the argument, the value and what is allowed.
    """
    schedule, T = (T, len(T)) if isinstance(T, GaussianPath) else (None, T)
    spacing = read(spacing)
    if isinstance(schedule, Continuous):
        return _on_path(spacing, steps, schedule)
    if isinstance(spacing, Tuned):
        spacing = spacing.tau(steps)
    if not isinstance(spacing, str):
        return _explicit(spacing, lambda name, t, low: whole(name, t, low=low, high=T - 1))
    if spacing not in SPACINGS:
        raise ValueError(_unknown(spacing))
    S = whole("steps", steps, low=1, high=T)
    if spacing in _BY_COUNT:
        return chain(_BY_COUNT[spacing](S, T))
    if schedule is None:
        raise TypeError(f"T must be a NoiseSchedule for spacing {spacing!r}, got {T}")
    return chain(_distinct(_BY_LEVEL[spacing](np.linspace(0, 1, S), schedule), T))


def read(spacing: Spacing | str) -> Spacing | str:
    """Returns the ``Tuned`` timesteps of a file; any other spacing as it is.

    Raises:
        FileNotFoundError, ValueError: the file is missing, or of another kind.
    """
    if isinstance(spacing, PathLike) or (isinstance(spacing, str) and spacing.endswith(".json")):
        return Tuned.read(spacing)
    return spacing


def chain(tau: Sequence[float]) -> tuple[Pair, ...]:
    """Returns the pairs of an increasing τ, from the noisiest level down to s = −1."""
    return tuple(zip(reversed(tau), reversed([-1, *tau[:-1]]), strict=True))


_MOST = 1_000_000
"""The most steps on a continuous path, so that a slip of the pen does not fill the memory."""


def _on_path(spacing: Any, steps: int | None, path: Continuous) -> tuple[Pair, ...]:
    """Returns the pairs of σ of a continuous path."""
    if isinstance(spacing, Tuned):
        raise ValueError(f"spacing must be a name or a list of σ on {path}, got tuned timesteps")
    if not isinstance(spacing, str):
        return _explicit(spacing, lambda name, value, low: _sigma(name, value, low, path))
    if spacing not in SPACINGS:
        raise ValueError(_unknown(spacing))
    S = whole("steps", steps, low=1, high=_MOST)
    if spacing in ("uniform", "trailing"):
        return _falling(path.sigma_of(path.even(S))[::-1], path)
    u = np.linspace(0, 1, S) if S > 1 else np.ones(1)
    if spacing == "linspace":
        index = u * (len(path) - 1)
    elif spacing in _BY_LEVEL:
        index = _BY_LEVEL[spacing](u, path)
    else:
        raise ValueError(
            f"spacing must be uniform, linspace, mixed, logsnr, karras or a list of σ on {path}, "
            f"got {spacing!r}, which counts the levels of a table"
        )
    index[-1] = len(path) - 1  # The interpolation may miss the end by a rounding.
    low = path.cleanest_u
    return _falling(path.sigma_of(low + (1 - low) * index / (len(path) - 1)), path)


def _falling(tau: Float64, path: Continuous) -> tuple[Pair, ...]:
    """Returns the pairs of an increasing τ of σ, or refuses steps between equal levels."""
    if not (np.diff(tau) > 0).all():
        raise ValueError(f"steps must be fewer on {path}, where σ repeats, got {len(tau)}")
    return chain(tau.tolist())


def _sigma(name: str, value: Any, low: int, path: Continuous) -> float:
    sigma = finite(name, value)
    if low < 0 and sigma == -1:
        return -1
    if not TINY <= sigma <= path.noisiest:
        clean = " or −1 for clean data" if low < 0 else ""
        raise ValueError(
            f"{name} must be σ in (0, {path.noisiest:g}]{clean}, and float32 must hold σ, got "
            f"{sigma:g}"
        )
    return sigma


def uniform(S: int, T: int) -> list[int]:
    return [i * T // S for i in range(S)] if S > 1 else [T - 1]


def quad(S: int, T: int) -> list[int]:
    # Truncation alone repeats small values; max(i, ·) is the least that keeps S distinct steps.
    return [max(i, t) for i, t in enumerate(quad_ermongroup(S, T))] if S > 1 else [T - 1]


def leading(S: int, T: int) -> list[int]:
    return [i * (T // S) for i in range(S)] if S > 1 else [T - 1]


def trailing(S: int, T: int) -> list[int]:
    return [round(T - i * T / S) - 1 for i in reversed(range(S))]


def linspace(S: int, T: int) -> list[int]:
    return [round(t) for t in np.linspace(0, T - 1, S).tolist()] if S > 1 else [T - 1]


def uniform_ermongroup(S: int, T: int) -> list[int]:
    return list(range(0, T, T // S))


def quad_ermongroup(S: int, T: int) -> list[int]:
    return [int(t) for t in np.linspace(0, np.sqrt(T * 0.8), S) ** 2]


def mixed(u: Float64, schedule: GaussianPath) -> Float64:
    """Returns the real t at which 0.8·(t) + 0.2·(λ), both from 0 to 1, are evenly spaced.

    The weights and the end were chosen by the FD-clf of the model that ships, with 6, 8 and 10
    steps of order 2 and 2,000 seeds: 0.560, 0.295 and 0.293. The weights 0.7 and 0.3 gave 0.612,
    0.296 and 0.277, and with the end t = 0 they gave 0.684, 0.328 and 0.291.
    """
    t, noise = _half_log_nsr(schedule)
    share = 0.8 * _from_0_to_1(t) + 0.2 * _from_0_to_1(noise)
    end = np.interp(0.016 * t[-1], t, share)
    t_of: Float64 = np.interp(end + u * (1 - end), share, t)
    return t_of


def logsnr(u: Float64, schedule: GaussianPath) -> Float64:
    t, noise = _half_log_nsr(schedule)
    return np.interp(u, _from_0_to_1(noise), t)


def karras(u: Float64, schedule: GaussianPath) -> Float64:
    t, noise = _half_log_nsr(schedule)
    return np.interp(u, _from_0_to_1(np.exp(noise / 7)), t)


def _half_log_nsr(schedule: GaussianPath) -> tuple[Float64, Float64]:
    """Returns t and −λ = ln(σ/α) of each level; −λ is extrapolated where α is 0."""
    sigma = schedule.table() if isinstance(schedule, Continuous) else np.arange(len(schedule))
    at = schedule.at(sigma)
    noise = log_nsr(at)
    if at.alpha2[-1] == 0:
        noise[-1] = 2 * noise[-2] - noise[-3] if len(noise) > 2 else 0.0
    return np.arange(len(at), dtype=np.float64), noise


def _from_0_to_1(rising: Float64) -> Float64:
    span = rising[-1] - rising[0]
    return (rising - rising[0]) / span if span else rising * 0


def _distinct(t: Float64, T: int) -> list[int]:
    """Returns increasing ``t`` as distinct integers below T: rounded, or the nearest still free.

    A single level is T−1.
    """
    if len(t) == 1:
        return [T - 1]
    tau = [round(v) for v in t.tolist()]
    for i in range(1, len(tau)):
        tau[i] = max(tau[i], tau[i - 1] + 1)
    most = T - 1
    for i in reversed(range(len(tau))):
        tau[i] = min(tau[i], most)
        most = tau[i] - 1
    return tau


_BY_LEVEL: dict[str, Callable[[Float64, GaussianPath], Float64]] = {
    "mixed": mixed,
    "logsnr": logsnr,
    "karras": karras,
}
"""Spacings that read the schedule: functions of u in [0, 1], from the cleanest level up."""

_BY_COUNT: dict[str, Callable[[int, int], list[int]]] = {
    "uniform": uniform,
    "quad": quad,
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
    "uniform-ermongroup": uniform_ermongroup,
    "quad-ermongroup": quad_ermongroup,
}
"""Spacings that read S and T alone."""

SPACINGS: tuple[SpacingName, ...] = get_args(SpacingName)
"""The names of spacings that ``make_pairs`` takes."""

_OTHER_NAMES = {"linear": "uniform", "quadratic": "quad"}
"""The names of two spacings in the paper's appendix → their names here."""


def _unknown(spacing: str) -> str:
    return (
        f"spacing must be one of {', '.join(SPACINGS)}, the file of fastddim tune (.json), a "
        f"list of timesteps or a list of (t, s) pairs, got {spacing!r}"
        + (f" (here {_OTHER_NAMES[spacing]})" if spacing in _OTHER_NAMES else "")
    )


Checked: TypeAlias = Callable[[str, Any, int], float]
"""``checked(name, value, low)`` returns a level that a caller gave; ``low`` is −1 or 0."""


def _explicit(spacing: Any, checked: Checked) -> tuple[Pair, ...]:
    if hasattr(spacing, "tolist"):
        spacing = spacing.tolist()
    if not isinstance(spacing, Sequence):
        raise TypeError(
            f"spacing must be a name, a list of timesteps or a list of (t, s) pairs, "
            f"got {type(spacing).__name__}"
        )
    if not spacing:
        raise ValueError("spacing must hold at least one step, got an empty list")
    if isinstance(spacing[0], Sequence):
        return _pairs(spacing, checked)
    tau = [checked(f"spacing[{i}]", t, 0) for i, t in enumerate(spacing)]
    if len(tau) > 1 and tau[0] > tau[1]:
        tau.reverse()
    for low, high in pairwise(tau):
        if low >= high:
            raise ValueError(
                f"spacing must strictly increase or strictly decrease, got {low} beside {high}"
            )
    return chain(tau)


def _pairs(spacing: Any, checked: Checked) -> tuple[Pair, ...]:
    pairs: list[Pair] = []
    for i, pair in enumerate(spacing):
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"spacing[{i}] must be a pair (t, s), got {pair!r}")
        t, s = checked(f"spacing[{i}][0]", pair[0], 0), checked(f"spacing[{i}][1]", pair[1], -1)
        if s >= t:
            raise ValueError(f"spacing[{i}] must go down, s < t, got ({t}, {s})")
        if pairs and pairs[-1][1] != t:
            raise ValueError(
                f"spacing[{i}] must start where the step before ended, at t = {pairs[-1][1]}, "
                f"got t = {t}"
            )
        pairs.append((t, s))
    return tuple(pairs)
