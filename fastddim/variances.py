"""How much noise a step adds: c1 and c2 as functions of the two levels of the step.

    x_s = α_s·x0 + c1·z + c2·ε,   c1² + c2² = σ_s²

Every rule but ``"hat"`` keeps the second line, so that x_s has the level of s. On any path:

- η, a number: c1 = η·σ_s·√(1 − (α_t·σ_s/(α_s·σ_t))²). 0 is DDIM (Song et al. 2021), and the Euler
  step of a flow. 1 is DDPM with ``variance_type="fixed_small"`` (Ho et al. 2020, section 3.2), and
  Euler ancestral on the path (1, σ).
- ``"hat"``: the mean of η = 1 and the noise √β_t, DDPM's ``"fixed_large"``; c1² + c2² > σ_s².
- ``TCD(gamma)``: strategic stochastic sampling (Zheng et al. 2024, section 4.3).
- ``CPS(eta)``: coefficients-preserving sampling (Flow-GRPO's; Wang and Yu 2025).
- ``Fresh()``: c1 = σ_s and c2 = 0, multistep consistency sampling (Song et al. 2023, algorithm 1;
  LCM, Luo et al. 2023), and the flow's ``stochastic_sampling`` in diffusers.

With an exact model, only η gives samples of the data as S grows. A step of the last three rules
adds noise that does not shrink with the step; models distilled for few steps expect that noise.

DDPM's ``"learned_range"`` has a variance for each element, which no table can hold: the drop-in
for guided-diffusion composes that noise. LCM's boundary factors c_skip and c_out are left out of
``Fresh``: at the timesteps of LCM's own schedules c_skip is below 1e-5.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fastddim.check import finite
from fastddim.levels import Float64, GaussianPath, Levels, added, noisier, posterior

if TYPE_CHECKING:
    from fastddim.timesteps import Pair


@dataclass(frozen=True, eq=False)
class Steps:
    """The steps of a table: a rule turns them into c1 and c2.

    Attributes:
        t, s: the levels that the steps go from and to.
        last: marks the steps that add no noise whatever the rule is.
        schedule, pairs: the path, and the (t, s) of each step on it; None and () for levels that
            belong to no path.
    """

    t: Levels
    s: Levels
    last: npt.NDArray[np.bool_]
    schedule: GaussianPath | None = None
    pairs: Sequence[Pair] = ()


class Rule(ABC):
    """A rule that gives c1 and c2 itself: ``DDIM(eta=CPS(0.7))``. Equal rules have one hash."""

    @abstractmethod
    def __call__(self, steps: Steps) -> tuple[Float64, Float64]:
        """Returns (c1, c2) of each step. Steps that are ``last`` get c1 = 0 afterwards."""


@dataclass(frozen=True)
class Fresh(Rule):
    """All noise is new: c1 = σ_s, c2 = 0. The model's x0 is all that a step keeps.

    >>> from fastddim import DDIM
    >>> DDIM(steps=4, eta=Fresh()).table[0, 6].item()
    0.0
    """

    def __call__(self, steps: Steps) -> tuple[Float64, Float64]:
        return steps.s.sigma, np.zeros_like(steps.s.sigma2)


@dataclass(frozen=True)
class CPS(Rule):
    """c1 = σ_s·sin(η·π/2) and c2 = σ_s·cos(η·π/2), with η in [0, 1]: 0 is DDIM, 1 is ``Fresh``."""

    eta: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "eta", _in_unit("eta", self.eta))

    def __call__(self, steps: Steps) -> tuple[Float64, Float64]:
        angle = self.eta * np.pi / 2
        return np.sin(angle) * steps.s.sigma, np.cos(angle) * steps.s.sigma


@dataclass(frozen=True)
class TCD(Rule):
    """A DDIM step to t′ = ⌊(1−γ)·s⌋, then noise back up to s, with γ in [0, 1]: 0 is DDIM.

    c1 = √(σ_s² − (α_s/α_t′)²·σ_t′²) and c2 = (α_s/α_t′)·σ_t′. On a continuous path t′ has
    (1−γ)·σ_s.
    """

    gamma: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "gamma", _in_unit("gamma", self.gamma))

    def __call__(self, steps: Steps) -> tuple[Float64, Float64]:
        if steps.schedule is None:
            raise ValueError("TCD needs the levels between two steps, and these have no schedule")
        to = np.array([s for _, s in steps.pairs], dtype=np.float64)
        below = (1 - self.gamma) * to
        if not steps.schedule.continuous:
            # In float32, as diffusers does: ⌊0.93·500⌋ is 465 there, and 464 in float64.
            below = np.floor(np.float32(1 - self.gamma) * to.astype(np.float32))
        below = np.where(to < 0, to, below)
        middle = steps.schedule.at(below)
        c1 = np.sqrt(np.maximum(added(steps.s, middle), 0.0))
        return c1, steps.s.alpha / middle.alpha * middle.sigma


Eta: TypeAlias = float | Literal["hat"] | Rule


def noise_and_direction(steps: Steps, eta: Eta) -> tuple[Float64, Float64]:
    """Returns (c1, c2) of each step.

    Raises:
        ValueError: a step goes towards noise and η is not 0, or η is too large for these steps.
    """
    t, s, last = steps.t, steps.s, steps.last
    if not isinstance(eta, Rule) and eta == 0:
        return np.zeros_like(t.alpha2), s.sigma
    if noisier(s, t).any():
        raise ValueError(f"eta must be 0 for a step towards noise, got {eta}")
    if isinstance(eta, Rule):
        c1, c2 = eta(steps)
        return np.where(last, 0.0, c1), np.where(last, s.sigma, c2)
    variance = posterior(t, s)
    variance[last] = 0.0
    if eta == "hat":
        c1 = np.where(last, 0.0, np.sqrt(added(t, s)))
    else:
        most = largest_eta(t, s, last)
        if eta > most:
            raise ValueError(
                f"eta must be at most {floor6(most)} for these steps (beyond it σ_s² − c1² is "
                f"negative), got {eta:g}"
            )
        variance = eta**2 * variance
        c1 = np.sqrt(variance)
    return c1, np.sqrt(np.maximum(s.sigma2 - variance, 0.0))


def largest_eta(t: Levels, s: Levels, last: npt.NDArray[np.bool_]) -> float:
    """Returns the largest η with c1² ≤ σ_s² but at ``last``, min √(σ_t²/added)."""
    moving = np.flatnonzero(~last & noisier(t, s))
    if not moving.size:
        return float("inf")
    return float(np.sqrt(t.sigma2[moving] / added(t[moving], s[moving])).min())


def checked_eta(eta: Any) -> Eta:
    """Returns ``eta`` as a float ≥ 0, ``"hat"``, or a rule."""
    if isinstance(eta, Rule):
        return eta
    if isinstance(eta, str):
        if eta == "hat":
            return "hat"
        raise ValueError(f'eta must be a number ≥ 0 or "hat", got {eta!r}')
    value = finite("eta", eta)
    if value < 0:
        raise ValueError(f'eta must be a number ≥ 0 or "hat", got {value:g}')
    return value


def floor6(value: float) -> float:
    """Rounds down to six decimals, so that the number in the message is allowed."""
    return float(np.floor(value * 1e6) / 1e6)


def _in_unit(name: str, value: Any) -> float:
    number = finite(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {number:g}")
    return number
