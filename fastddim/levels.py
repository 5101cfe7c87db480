"""Noise levels (α, σ) of x = α·x0 + σ·ε, and the functions of two levels that a step needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fastddim.check import shown

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Levels:
    """Levels of x = α·x0 + σ·ε as squares, since √(a²) is exactly a in floating point.

    Attributes:
        alpha2, sigma2: α² and σ², float64 (n,).
        preserving: whether α² + σ² = 1 (variance preserving), where α² is ᾱ. Two formulas then
            have a form in ᾱ alone that rounds less.
    """

    alpha2: Float64
    sigma2: Float64
    preserving: bool = False

    @classmethod
    def of_abar(cls, abar: Float64) -> Levels:
        """Returns the levels (√ᾱ, √(1−ᾱ))."""
        return cls(abar, 1 - abar, preserving=True)

    def __getitem__(self, index: slice | npt.NDArray[np.int64]) -> Levels:
        return Levels(self.alpha2[index], self.sigma2[index], self.preserving)

    def __len__(self) -> int:
        return len(self.alpha2)

    @property
    def alpha(self) -> Float64:
        return np.sqrt(self.alpha2)

    @property
    def sigma(self) -> Float64:
        return np.sqrt(self.sigma2)

    @property
    def signal(self) -> Float64:
        """α/√(α²+σ²), √ᾱ on a path that preserves variance: how much of an image x holds."""
        return self.alpha if self.preserving else np.sqrt(self.alpha2 / (self.alpha2 + self.sigma2))


def noisier(s: Levels, t: Levels) -> npt.NDArray[np.bool_]:
    """Returns whether each level of ``s`` has more noise for its signal than that of ``t``."""
    return t.alpha2 * s.sigma2 > s.alpha2 * t.sigma2


def added(t: Levels, s: Levels) -> Float64:
    """Returns σ_t² − (α_t/α_s)²·σ_s², the variance of the noise that leads from s to t.

    It is 1 − ᾱ_t/ᾱ_s where variance is preserved.
    """
    if t.preserving:
        return 1 - t.alpha2 / s.alpha2
    return t.sigma2 - t.alpha2 / s.alpha2 * s.sigma2


def posterior(t: Levels, s: Levels) -> Float64:
    """Returns the variance of x_s given x_t and x0: ``added`` · σ_s²/σ_t²."""
    return added(t, s) * s.sigma2 / t.sigma2


def log_snr_steps(t: Levels, s: Levels) -> Float64:
    """Returns h = λ_s − λ_t of each step, with λ = ln(α/σ), half the log of the SNR."""
    with np.errstate(divide="ignore", invalid="ignore"):  # λ is infinite at α = 0 and σ = 0
        return (np.log(s.alpha2 / t.alpha2) - _log_sigma2(s) + _log_sigma2(t)) / 2


def log_nsr(at: Levels) -> Float64:
    """Returns −λ = ln(σ/α) of each level."""
    with np.errstate(divide="ignore"):
        return (_log_sigma2(at) - np.log(at.alpha2)) / 2


def _log_sigma2(at: Levels) -> Float64:
    return np.log1p(-at.alpha2) if at.preserving else np.log(at.sigma2)


class GaussianPath(ABC):
    """A path of noise levels (α, σ), x = α·x0 + σ·ε, and the t that a model is called with.

    ``fastddim.NoiseSchedule`` is the path of ᾱ and makes the others. A sampler names a level by its
    number in a table, or on a continuous path by σ; −1 is clean data.
    """

    name: str
    alphas_cumprod: Float64  # of the paths of ``NoiseSchedule`` itself alone
    continuous: ClassVar[bool] = False
    """Whether a level is any σ of the path, and not one of a table."""

    def __getattr__(self, name: str) -> Any:
        if name == "alphas_cumprod":
            raise AttributeError(f"{self!r} has levels (α, σ) and no alphas_cumprod: see levels_of")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @abstractmethod
    def __len__(self) -> int:
        """Returns T, the number of noise levels."""

    @property
    @abstractmethod
    def predictions(self) -> tuple[str, ...]:
        """The quantities that a model may predict on this path."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """The SHA-256 of the levels, in hexadecimal digits."""

    @abstractmethod
    def at(self, levels: npt.ArrayLike, final_alpha_cumprod: float = 1.0) -> Levels:
        """Returns (α, σ) of some levels, as the pairs of a sampler name them.

        Args:
            levels: numbers t in [0, T), or on a continuous path σ; −1 is clean data.
            final_alpha_cumprod: ᾱ of −1, 1 on any path but that of ᾱ.

        Raises:
            ValueError: a level is not on the path.
        """

    @abstractmethod
    def times(self, levels: npt.ArrayLike) -> npt.NDArray[Any]:
        """Returns the t that the model is called with at some levels."""

    @abstractmethod
    def _levels_at(self, times: Float64) -> npt.ArrayLike:
        """Returns the levels of some t that a model is called with."""

    def levels_of(self, t: Any) -> tuple[Float64, Float64]:
        """Returns (α, σ) of the t that a model is called with, float64 of t's shape.

        >>> from fastddim import NoiseSchedule
        >>> NoiseSchedule.flow().levels_of(250.0)
        (array(0.75), array(0.25))

        Raises:
            TypeError: t is not made of real numbers.
            ValueError: t is not on the path.
        """
        times = _real(t)
        found = self.at(self._levels_at(times.reshape(-1)))
        return found.alpha.reshape(times.shape), found.sigma.reshape(times.shape)

    def noise_scale(self, level: float) -> float:
        """Returns the standard deviation of the noise that a sampler begins with at a level.

        It is 1 on the path of ᾱ and on the continuous cosine, and σ on the others.
        """
        at = self.at([level])
        return 1.0 if at.preserving else float(at.sigma[0])


def _real(t: Any) -> Float64:
    if hasattr(t, "detach"):
        t = t.detach().cpu()
        t = t.numpy() if t.is_complex() else t.double().numpy()  # NumPy has no bfloat16
    try:
        array = np.asarray(t)
    except ValueError:  # a list whose lists differ in length
        array = np.asarray(None)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"t must hold real numbers only, got {shown(t)}")
    return array.astype(np.float64)


def vector(name: str, values: Any) -> Float64:
    """Returns a new float64 vector of ``values``, or raises an error that names ``name``."""
    if hasattr(values, "detach"):
        if values.is_complex():
            raise TypeError(f"{name} must hold real numbers only")
        values = values.detach().cpu().double().numpy()
    if not isinstance(values, (Sequence, np.ndarray)) or isinstance(values, str):
        raise TypeError(
            f"{name} must be a sequence, array or tensor of numbers, got {type(values).__name__}"
        )
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "fiuO":  # NumPy would read strings as numbers
            raise TypeError
        array = array.astype(np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must hold real numbers only") from None
    except OverflowError:
        raise ValueError(f"{name} must be finite, got an integer above 1e308") from None
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must have shape (T,) with T ≥ 1, got {array.shape}")
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise ValueError(f"{name} must be finite, got {array[bad[0]]} at {int(bad[0])}")
    return array


def indices(levels: npt.ArrayLike, T: int, low: int = -1) -> npt.NDArray[np.int64]:
    """Returns numbers of a table's levels as int64."""
    given = np.asarray(levels, dtype=np.float64)
    whole_numbers = np.clip(np.nan_to_num(given, nan=-2), -2, T).astype(np.int64)
    wrong = (whole_numbers != given) | (whole_numbers < low) | (whole_numbers >= T)
    if wrong.any():
        raise ValueError(f"t must be a level in [{low}, {T - 1}], got {given[wrong].flat[0]:g}")
    return whole_numbers
