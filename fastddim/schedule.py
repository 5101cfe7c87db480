"""The noise schedule: the levels (α, σ) of x = α·x0 + σ·ε, and the t of the model's calls."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastddim.check import finite, whole
from fastddim.levels import Float64, GaussianPath, Levels, indices, vector
from fastddim.paths import EDM, Continuous, Cosine, Flow, LevelTable, resolution_shift


@dataclass(frozen=True, eq=False)
class NoiseSchedule(GaussianPath):
    """The noise levels of a diffusion model: ᾱ_t = Π_{i≤t} (1 − β_i), t = 0 … T−1.

    They are those of Ho et al. 2020, section 2, but t counts from 0, as in code, and not from 1.
    Build a schedule with ``linear``, ``scaled_linear``, ``cosine``, ``from_betas`` or
    ``from_alphas_cumprod``. Other paths than ᾱ come from ``flow``, ``edm``, ``continuous_cosine``
    and ``from_levels``.
    Two schedules are equal, and have the same hash, where every ᾱ_t is equal, whatever their names.

    Attributes:
        alphas_cumprod: ᾱ, float64 of shape (T,), strictly decreasing, in (0, 1), read-only. The
            last may be 0 (zero terminal SNR, Lin et al. 2024), where an ``epsilon`` model cannot
            start.
        name: the schedule's name in messages and records.
    """

    alphas_cumprod: Float64
    name: str = "from_alphas_cumprod"

    def __post_init__(self) -> None:
        abar = vector("alphas_cumprod", self.alphas_cumprod)
        if not (abar[0] < 1 and (abar[:-1] > 0).all() and abar[-1] >= 0):
            raise ValueError(
                f"alphas_cumprod must lie in (0, 1) (the last may be 0), "
                f"got values from {abar.min():g} to {abar.max():g}"
            )
        rising = np.flatnonzero(np.diff(abar) >= 0)
        if rising.size:
            t = int(rising[0])
            raise ValueError(
                f"alphas_cumprod must strictly decrease, got {abar[t]:g} at {t} "
                f"and {abar[t + 1]:g} at {t + 1}"
            )
        abar[abar == 0] = 0.0  # −0 equals 0 but has other bytes, which the hash reads
        abar.setflags(write=False)
        object.__setattr__(self, "alphas_cumprod", abar)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NoiseSchedule):
            return NotImplemented
        return np.array_equal(self.alphas_cumprod, other.alphas_cumprod)

    def __hash__(self) -> int:
        return hash(self.alphas_cumprod.tobytes())

    def __setstate__(self, state: dict[str, Any]) -> None:
        # pickle and deepcopy copy an array without its write protection.
        state["alphas_cumprod"].setflags(write=False)
        vars(self).update(state)

    def __len__(self) -> int:
        """Returns T, the number of noise levels."""
        return len(self.alphas_cumprod)

    def __repr__(self) -> str:
        return f"NoiseSchedule({self.name}, T={len(self)})"

    @property
    def predictions(self) -> tuple[str, ...]:
        return "epsilon", "v", "sample"

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.alphas_cumprod.tobytes()).hexdigest()

    def at(self, levels: npt.ArrayLike, final_alpha_cumprod: float = 1.0) -> Levels:
        abar = np.append(self.alphas_cumprod, final_alpha_cumprod)  # index −1 is the last element
        return Levels.of_abar(abar[indices(levels, len(self))])

    def times(self, levels: npt.ArrayLike) -> npt.NDArray[Any]:
        return indices(levels, len(self), low=0)

    def _levels_at(self, times: Float64) -> npt.ArrayLike:
        return indices(times, len(self), low=0)

    @classmethod
    def linear(
        cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """β goes from ``beta_start`` to ``beta_end`` in equal steps (Ho et al. 2020, section 4)."""
        betas = np.linspace(*_ends(beta_start, beta_end), _levels(T))
        return cls.from_betas(betas, name=f"linear({beta_start:g}, {beta_end:g})")

    @classmethod
    def scaled_linear(
        cls, T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> NoiseSchedule:
        """√β goes in equal steps, as in latent diffusion and Stable Diffusion."""
        low, high = _ends(beta_start, beta_end)
        betas = np.linspace(low**0.5, high**0.5, _levels(T)) ** 2
        return cls.from_betas(betas, name=f"scaled_linear({beta_start:g}, {beta_end:g})")

    @classmethod
    def cosine(cls, T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
        """ᾱ(u) is cos²((u + s)/(1 + s)·π/2), β clipped (Nichol and Dhariwal 2021, eq. 17)."""
        s, max_beta = finite("s", s), finite("max_beta", max_beta)
        if s < 0:
            raise ValueError(f"s must be ≥ 0, got {s:g}")
        if not 0 < max_beta < 1:
            raise ValueError(f"max_beta must lie in (0, 1), got {max_beta:g}")
        u = np.arange(_levels(T) + 1, dtype=np.float64) / T
        abar = np.cos((u + s) / (1 + s) * np.pi / 2) ** 2
        return cls.from_betas(np.minimum(1 - abar[1:] / abar[:-1], max_beta), name="cosine")

    @classmethod
    def from_betas(cls, betas: Any, name: str = "from_betas") -> NoiseSchedule:
        """Multiplies 1 − β_t up in float64, each β_t in (0, 1), of a sequence, array or tensor."""
        beta = vector("betas", betas)
        outside = np.flatnonzero(~((beta > 0) & (beta < 1)))
        if outside.size:
            t = int(outside[0])
            raise ValueError(f"betas must lie in (0, 1), got {beta[t]:g} at {t}")
        return cls(np.cumprod(1 - beta, dtype=np.float64), name)

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Any) -> NoiseSchedule:
        """Takes ᾱ_t itself, of a sequence, array or tensor."""
        return cls(vector("alphas_cumprod", alphas_cumprod))

    @staticmethod
    def from_levels(alpha: Any, sigma: Any, t: Any = None, name: str = "from_levels") -> LevelTable:
        """Takes α and σ of each level of x = α·x0 + σ·ε, from the cleanest to the noisiest.

        Args:
            alpha, sigma: (T,) each; a number stands for all levels. α/σ must strictly fall.
            t: the t of the model's call at each level, (T,) of distinct numbers: int64 where all
                are integers, and float32 otherwise. 0 to T−1 by default.
            name: the schedule's name in messages and records.
        """
        return LevelTable(alpha, sigma, t, name)

    @staticmethod
    def flow(
        shift: float | None = None,
        *,
        tokens: int | None = None,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        scale: float = 1000.0,
    ) -> Continuous:
        """The path of rectified flow, (1 − σ, σ), for models of ε − x0 (``prediction="flow"``).

            σ = shift·u / (1 + (shift − 1)·u),   u = 1, 1 − 1/S, …, 1/S with S steps

        (Esser et al. 2024, eq. 23). The model is called with t = σ·``scale``, float32: 1000 as
        in diffusers (SD3, FLUX, Wan), 1 as in π0 and SmolVLA.

        Args:
            shift: > 0; 1 by default. SD3 has 3.
            tokens: instead of ``shift``, the number of image tokens: ln(shift) then goes from
                ``base_shift`` at 256 tokens to ``max_shift`` at 4096, as FLUX does.
        """
        if tokens is not None:
            if shift is not None:
                raise ValueError(f"shift must be left out with tokens, got {shift}")
            shift = resolution_shift(tokens, base_shift, max_shift)
        elif (finite("base_shift", base_shift), finite("max_shift", max_shift)) != (0.5, 1.15):
            raise ValueError(
                f"base_shift and max_shift must be left out without tokens, got {base_shift:g} and "
                f"{max_shift:g}"
            )
        return Flow(1.0 if shift is None else shift, scale)

    @staticmethod
    def edm(
        sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, time: str = "sigma"
    ) -> Continuous:
        """The path (1, σ) of EDM and variance exploding models (Karras et al. 2022, eq. 5).

            σ = (σ_min^(1/ρ) + u·(σ_max^(1/ρ) − σ_min^(1/ρ)))^ρ,   S even u from 1 to 0

        Args:
            sigma_min, sigma_max: the ends, 0 < σ_min < σ_max.
            rho: ρ > 0.
            time: the t of the model's calls: ``"sigma"`` itself, or ``"c_noise"``, ln(σ)/4.
        """
        return EDM(sigma_min, sigma_max, rho, time)

    @staticmethod
    def continuous_cosine(shift: float = 1.0) -> Continuous:
        """α = cos(π·u/2), σ = sin(π·u/2) at continuous time u in [0, 1], which the model gets.

        ``shift`` multiplies σ/α at each u, and the model gets the shifted u (Hoogeboom et al.
        2023, section 2; larger images need a shift above 1).
        """
        return Cosine(shift)


def guided_diffusions(name: str, T: int) -> NoiseSchedule:
    """Returns guided-diffusion's ``noise_schedule`` of this name, linear or cosine.

    Linear goes from 0.1/T to 20/T, by guided-diffusion's expression, since another would round
    otherwise.
    """
    if name == "cosine":
        return NoiseSchedule.cosine(T)
    scale = 1000 / T
    return NoiseSchedule.linear(T, scale * 0.0001, scale * 0.02)


def _levels(T: int) -> int:
    return whole("T", T, low=1, high=10**7)


def _ends(beta_start: float, beta_end: float) -> tuple[float, float]:
    low, high = finite("beta_start", beta_start), finite("beta_end", beta_end)
    if not 0 < low <= high < 1:
        raise ValueError(
            f"beta_start and beta_end must satisfy 0 < beta_start ≤ beta_end < 1, "
            f"got {low:g} and {high:g}"
        )
    return low, high
