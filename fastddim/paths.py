"""Paths other than a table of ᾱ: tables of (α, σ), and paths in continuous time."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fastddim.check import finite, shown, whole
from fastddim.levels import Float64, GaussianPath, Levels, indices, log_nsr, vector

TINY, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
"""The least and the largest σ of a float32 table, which also holds 1/σ."""
_NEAR = 1e-6
"""How far α² + σ² or α + σ may be from 1 to count as 1: float32 tables are given too."""


@dataclass(frozen=True, eq=False, repr=False)
class LevelTable(GaussianPath):
    """T levels (α, σ), from the cleanest to the noisiest: ``NoiseSchedule.from_levels``.

    Attributes:
        alpha, sigma: α and σ of each level, float64 (T,), read-only.
        t: the t that the model is called with at each level, (T,), int64 or float32, read-only.
    """

    alpha: Any
    sigma: Any
    t: Any = None
    name: str = "from_levels"

    def __post_init__(self) -> None:
        sigma = vector("sigma", self.sigma)
        T = len(sigma)
        alpha = self.alpha
        if isinstance(alpha, (int, float, np.number)):
            alpha = np.full(T, finite("alpha", alpha))
        alpha = vector("alpha", alpha)
        if alpha.shape != sigma.shape:
            raise ValueError(f"alpha must have sigma's {T} levels, got {len(alpha)}")
        for name, values in (("alpha", alpha), ("sigma", sigma)):
            if (bad := np.flatnonzero(values < 0)).size:
                raise ValueError(f"{name} must be ≥ 0, got {values[bad[0]]:g} at level {bad[0]}")
            bad = np.flatnonzero((values > 0) & ((values < TINY) | (values > LARGEST)))
            if bad.size:
                raise ValueError(
                    f"{name} must be 0 or lie in [{TINY:.3g}, {LARGEST:.3g}], which "
                    f"float32 holds, got {values[bad[0]]:g} at level {bad[0]}"
                )
        if (bad := np.flatnonzero(sigma == 0)).size:
            both = " with alpha 0" if alpha[bad[0]] == 0 else ""
            raise ValueError(
                f"sigma must be > 0, got 0{both} at level {bad[0]}: clean data is the level −1"
            )
        rising = np.flatnonzero(alpha[1:] * sigma[:-1] >= alpha[:-1] * sigma[1:])
        if rising.size:
            i = int(rising[0])
            raise ValueError(
                f"alpha/sigma must strictly fall from the cleanest level to the noisiest, got "
                f"{alpha[i] / sigma[i]:g} at level {i} and {alpha[i + 1] / sigma[i + 1]:g} at "
                f"level {i + 1}"
            )
        t = vector("t", np.arange(T) if self.t is None else self.t)
        if t.shape != sigma.shape:
            raise ValueError(f"t must have sigma's {T} levels, got {len(t)}")
        t = self._as_called(t)
        if len(np.unique(t)) < T:
            raise ValueError(
                f"t must differ from level to level as {t.dtype}, which the model is called with, "
                f"got a number twice"
            )
        kept: dict[str, npt.NDArray[Any]] = {
            "alpha": alpha + 0.0,  # −0 equals 0 but has other bytes, which the hash reads
            "sigma": sigma,
            "t": t,
        }
        for name, array in kept.items():
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @staticmethod
    def _as_called(t: Float64) -> npt.NDArray[Any]:
        """Returns ``t`` as int64, or as float32 where a number is no integer."""
        dtype = np.int64 if (t == np.rint(t)).all() else np.float32
        most = 2.0**53 if dtype is np.int64 else LARGEST
        if (bad := np.flatnonzero(np.abs(t) > most)).size:
            raise ValueError(
                f"t must lie in [-{most:g}, {most:g}], got {t[bad[0]]:g} at level {bad[0]}"
            )
        return t.astype(dtype)

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in ("alpha", "sigma", "t"):  # pickle and deepcopy drop the write protection
            state[name].setflags(write=False)
        vars(self).update(state)

    def __repr__(self) -> str:
        return f"NoiseSchedule({self.name}, T={len(self)})"

    def __len__(self) -> int:
        return len(self.sigma)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LevelTable) and self._bytes() == other._bytes()

    def __hash__(self) -> int:
        return hash(self._bytes())

    def _bytes(self) -> bytes:
        return b"".join(values.tobytes() for values in (self.alpha, self.sigma, self.t))

    @property
    def digest(self) -> str:
        return hashlib.sha256(self._bytes()).hexdigest()

    @property
    def predictions(self) -> tuple[str, ...]:
        squares, sums = self.alpha**2 + self.sigma**2, self.alpha + self.sigma
        found = ["epsilon", "sample"]
        if np.abs(squares - 1).max() <= _NEAR:
            found.insert(1, "v")
        if np.abs(sums - 1).max() <= _NEAR:
            found.append("flow")
        return tuple(found)

    def at(self, levels: npt.ArrayLike, final_alpha_cumprod: float = 1.0) -> Levels:
        _check_clean_end(final_alpha_cumprod)
        index = indices(levels, len(self))
        alpha, sigma = np.append(self.alpha, 1.0), np.append(self.sigma, 0.0)
        return Levels(alpha[index] ** 2, sigma[index] ** 2)

    def times(self, levels: npt.ArrayLike) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = self.t[indices(levels, len(self), low=0)]
        return found

    def _levels_at(self, times: Float64) -> npt.ArrayLike:
        known = self.t.astype(np.float64)
        # A t that was given in float64 is the float32 number that the model is called with.
        given = times.astype(np.float32).astype(np.float64) if self.t.dtype == np.float32 else times
        order = np.argsort(known)
        found = np.searchsorted(known[order], given).clip(max=len(known) - 1)
        place: npt.NDArray[np.int64] = order[found]
        wrong = known[place] != given
        if wrong.any():
            raise ValueError(f"t must be one of the schedule's t, got {times[wrong][0]:g}")
        return place


class Continuous(GaussianPath):
    """A path whose level is any σ in (0, ``noisiest``], a function of a time u in [0, 1].

    Spacings choose u, from 1 at the noisiest level down. Subclasses are frozen dataclasses, which
    are equal where their numbers are.
    """

    continuous: ClassVar[bool] = True

    def _check_falls(self, *names: str) -> None:
        """Refuses numbers (of these names) with which levels of the path are equal, or 0."""
        with np.errstate(all="ignore"):
            sigma = self.table()
            differ = sigma[0] >= TINY and (np.diff(sigma) > 0).all()
            # A tiny σ may leave α² = 1, where spacings by λ have no number.
            differ = differ and np.isfinite(log_nsr(self.at(sigma[:1]))).all()
        if not differ:
            values = " and ".join(f"{getattr(self, name):g}" for name in names)
            raise ValueError(
                f"{' and '.join(names)} must give {len(self)} different levels σ > 0, got {values}"
            )

    def __len__(self) -> int:
        """Returns 1000, the number of levels between which spacings by λ interpolate."""
        return 1000

    def __repr__(self) -> str:
        return f"NoiseSchedule.{self.name}"

    @property
    def digest(self) -> str:
        # ``name`` rounds its numbers; repr(float) does not.
        numbers = {key: value for key, value in sorted(vars(self).items()) if key != "name"}
        return hashlib.sha256(f"{type(self).__name__} {numbers}".encode()).hexdigest()

    @property
    @abstractmethod
    def noisiest(self) -> float:
        """The largest σ."""

    @property
    @abstractmethod
    def cleanest_u(self) -> float:
        """The u of the lowest of T evenly spaced levels: 1/T where u = 0 is clean data."""

    @abstractmethod
    def sigma_of(self, u: Float64) -> Float64:
        """Returns σ at times u in [0, 1], increasing."""

    @abstractmethod
    def time_of(self, sigma: Float64) -> Float64:
        """Returns the t that the model is called with at σ."""

    @abstractmethod
    def sigma_at(self, t: Any) -> Any:
        """Returns σ at a t of the model's calls: the inverse of ``time_of``, of tensors too."""

    @abstractmethod
    def alpha2_of(self, sigma: Any) -> Any:
        """Returns α² at σ, of tensors too."""

    @property
    def preserving(self) -> bool:
        return False

    def even(self, S: int) -> Float64:
        """Returns S evenly spaced times u, decreasing from 1; the step after the last is clean."""
        if self.cleanest_u > 0:
            return 1 - np.arange(S) / S
        return np.linspace(1, 0, S)

    def table(self) -> Float64:
        """Returns σ of T evenly spaced levels, increasing."""
        return self.sigma_of(np.linspace(self.cleanest_u, 1, len(self)))

    def at(self, levels: npt.ArrayLike, final_alpha_cumprod: float = 1.0) -> Levels:
        _check_clean_end(final_alpha_cumprod)
        sigma = np.array(levels, dtype=np.float64)
        sigma[sigma == -1] = 0.0
        wrong = ~((sigma >= 0) & (sigma <= self.noisiest))
        if wrong.any():
            raise ValueError(
                f"σ must lie on the path, in (0, {self.noisiest:g}], or be −1 for clean data, got "
                f"{sigma[wrong].flat[0]:g}"
            )
        return Levels(self.alpha2_of(sigma), sigma**2, self.preserving)

    def times(self, levels: npt.ArrayLike) -> npt.NDArray[Any]:
        found = self.time_of(np.asarray(levels, dtype=np.float64))
        return found.astype(np.float32)

    def _levels_at(self, times: Float64) -> npt.ArrayLike:
        with np.errstate(all="ignore"):
            found: Float64 = self.sigma_at(times)
        # ``at`` takes σ = −1 for clean data, and a t of float32 may lie just above the end.
        wrong = ~((found >= 0) & (found <= self.noisiest * (1 + 1e-6)))
        if wrong.any():
            raise ValueError(
                f"t must lie on {self}, where σ is at most {self.noisiest:g}, got "
                f"{times[wrong][0]:g}"
            )
        return np.minimum(found, self.noisiest)


@dataclass(frozen=True, repr=False)
class Flow(Continuous):
    """(1 − σ, σ): see ``NoiseSchedule.flow``."""

    name: str = field(init=False, compare=False)
    shift: float = 1.0
    scale: float = 1000.0

    def __post_init__(self) -> None:
        for name in ("shift", "scale"):
            object.__setattr__(self, name, _positive(name, getattr(self, name)))
        scale = "" if self.scale == 1000 else f", scale={self.scale:g}"
        object.__setattr__(self, "name", f"flow(shift={self.shift:g}{scale})")
        self._check_falls("shift")

    @property
    def predictions(self) -> tuple[str, ...]:
        return "flow", "epsilon", "sample"

    @property
    def noisiest(self) -> float:
        return 1.0

    @property
    def cleanest_u(self) -> float:
        return 1 / len(self)

    def sigma_of(self, u: Float64) -> Float64:
        # At u = 1 the quotient may miss 1 by a rounding, and α would not be 0.
        return np.where(u >= 1, 1.0, self.shift * u / (1 + (self.shift - 1) * u))

    def time_of(self, sigma: Float64) -> Float64:
        return sigma * self.scale

    def sigma_at(self, t: Any) -> Any:
        return t / self.scale

    def alpha2_of(self, sigma: Any) -> Any:
        return (1 - sigma) ** 2


@dataclass(frozen=True, repr=False)
class EDM(Continuous):
    """(1, σ): see ``NoiseSchedule.edm``."""

    name: str = field(init=False, compare=False)
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    time: str = "sigma"

    def __post_init__(self) -> None:
        for name in ("sigma_min", "sigma_max", "rho"):
            object.__setattr__(self, name, _positive(name, getattr(self, name)))
        if not self.sigma_min < self.sigma_max:
            raise ValueError(
                f"sigma_min must be below sigma_max, got {self.sigma_min:g} and {self.sigma_max:g}"
            )
        for name in ("sigma_min", "sigma_max"):
            if not TINY <= (value := getattr(self, name)) <= LARGEST:
                raise ValueError(
                    f"{name} must lie in [{TINY:.3g}, {LARGEST:.3g}], which float32 "
                    f"holds, got {value:g}"
                )
        if not (isinstance(self.time, str) and self.time in ("sigma", "c_noise")):
            raise ValueError(f'time must be "sigma" or "c_noise", got {shown(self.time)}')
        numbers = f"{self.sigma_min:g}, {self.sigma_max:g}, rho={self.rho:g}"
        object.__setattr__(self, "name", f"edm({numbers}, time={self.time!r})")
        self._check_falls("sigma_min", "sigma_max", "rho")

    @property
    def predictions(self) -> tuple[str, ...]:
        return "epsilon", "sample"

    @property
    def noisiest(self) -> float:
        return self.sigma_max

    @property
    def cleanest_u(self) -> float:
        return 0.0

    def sigma_of(self, u: Float64) -> Float64:
        low, high = np.array([self.sigma_min, self.sigma_max]) ** (1 / self.rho)
        sigma = (low + u * (high - low)) ** self.rho
        # The power may miss both ends by a rounding, and a σ above the end is not on the path.
        return np.where(u >= 1, self.sigma_max, np.where(u <= 0, self.sigma_min, sigma))

    def time_of(self, sigma: Float64) -> Float64:
        if self.time == "sigma":
            return sigma
        with np.errstate(divide="ignore"):
            return np.log(sigma) / 4

    def sigma_at(self, t: Any) -> Any:
        return t if self.time == "sigma" else np.e ** (4 * t)

    def alpha2_of(self, sigma: Any) -> Any:
        return 1 + 0 * sigma


@dataclass(frozen=True, repr=False)
class Cosine(Continuous):
    """(cos(π·u/2), sin(π·u/2)): see ``NoiseSchedule.continuous_cosine``."""

    name: str = field(init=False, compare=False)
    shift: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shift", _positive("shift", self.shift))
        object.__setattr__(self, "name", f"continuous_cosine(shift={self.shift:g})")
        self._check_falls("shift")

    @property
    def predictions(self) -> tuple[str, ...]:
        return "v", "epsilon", "sample"

    @property
    def preserving(self) -> bool:
        return True

    @property
    def noisiest(self) -> float:
        return 1.0

    @property
    def cleanest_u(self) -> float:
        return 1 / len(self)

    def sigma_of(self, u: Float64) -> Float64:
        ratio = self.shift * np.tan(np.minimum(u, 1.0) * np.pi / 2)
        return np.where(u >= 1, 1.0, ratio / np.sqrt(1 + ratio**2))

    def time_of(self, sigma: Float64) -> Float64:
        return np.arcsin(sigma) * 2 / np.pi

    def sigma_at(self, t: Any) -> Any:
        # The sine has the σ of t at 2 − t again, where no model was called.
        angle = t * (np.pi / 2)
        if hasattr(angle, "sin"):
            return angle.sin().where((t >= 0) & (t <= 1), np.nan)
        return np.where((t >= 0) & (t <= 1), np.sin(angle), np.nan)

    def alpha2_of(self, sigma: Any) -> Any:
        return 1 - sigma**2


def resolution_shift(tokens: Any, base_shift: Any, max_shift: Any) -> float:
    """Returns e^μ, with μ linear from ``base_shift`` at 256 tokens to ``max_shift`` at 4096."""
    count = whole("tokens", tokens, low=1, high=10**9)
    low, high = finite("base_shift", base_shift), finite("max_shift", max_shift)
    with np.errstate(over="ignore"):
        shift = float(np.exp(low + (high - low) * (count - 256) / (4096 - 256)))
    if not 0 < shift < np.inf:
        raise ValueError(
            f"base_shift and max_shift must give {count} tokens a finite shift > 0, got {low:g} "
            f"and {high:g}"
        )
    return shift


def _positive(name: str, value: Any) -> float:
    number = finite(name, value)
    if number <= 0:
        raise ValueError(f"{name} must be > 0, got {number:g}")
    return number


def _check_clean_end(final_alpha_cumprod: float) -> None:
    if final_alpha_cumprod != 1:
        raise ValueError(
            f"final_alpha_cumprod must be 1 on this path, whose last step leads to clean data, got "
            f"{final_alpha_cumprod:g}"
        )
