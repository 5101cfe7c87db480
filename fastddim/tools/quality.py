"""The Fréchet distance between pictures and data, and data whose exact ε is known."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastddim.check import finite, whole
from fastddim.coefficients import checked_prediction
from fastddim.levels import GaussianPath
from fastddim.paths import Continuous
from fastddim.schedule import NoiseSchedule


class Moments(NamedTuple):
    """A Gaussian for ``frechet_distance``: its mean μ (D,), and R (rows, D) with Σ = RᵀR."""

    mean: Tensor
    root: Tensor


def moments(features: Any) -> Moments:
    """Returns the Gaussian fitted to ``features`` (N, D): μ, and R (min(N, D), D), float64.

    Σ has the divisor N − 1, and R comes from a QR factorisation of the centred features.

    Raises:
        ValueError: ``features`` has another shape, fewer than 2 rows, or a value that is not
            finite.
    """
    return _moments("features", features)


def frechet_distance(a: Any, b: Any) -> float:
    """Returns the Fréchet distance of the Gaussians fitted to two sets of features.

        ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2·(Σ_a Σ_b)^½)

    This is the distance of Heusel et al. 2017, computed in float64. With Σ = RᵀR from ``moments``,
    tr((Σ_a Σ_b)^½) = tr((Σ_a^½ Σ_b Σ_a^½)^½) is the sum of the singular values of R_a R_bᵀ. This
    needs no root of a matrix, so the result stays exact with fewer rows than features (Σ
    singular), where the root of an eigenvalue that should be 0 would be off by 1e-8.

    The distance is biased: two samples of one distribution differ by about 1/N, so compare only
    distances of samples of the same size. Features of a network other than Inception v3 do not
    give FID.

    Args:
        a, b: features, (N_a, D) and (N_b, D), N ≥ 2, tensors or arrays of real numbers; or
            their ``Moments``.

    Raises:
        ValueError: a set of features has another shape, another D, fewer than 2 rows, or a value
            that is not finite.
    """
    x, y = (v if isinstance(v, Moments) else _moments(k, v) for k, v in (("a", a), ("b", b)))
    if len(x.mean) != len(y.mean):
        raise ValueError(
            f"a and b must have the same number of features, got {len(x.mean)} and {len(y.mean)}"
        )
    cross = torch.linalg.svdvals(x.root @ y.root.T).sum()
    spread = x.root.square().sum() + y.root.square().sum() - 2 * cross
    return float((x.mean - y.mean).square().sum() + spread.clamp(min=0))


def garment_share(logits: Tensor, confidence: float = 0.9) -> float:
    """Returns the share of rows of ``logits`` (N, classes) whose top class exceeds ``confidence``.

    A row that is not finite counts as no garment. The share means something only for pictures
    near the data, so read it beside a distance: a black square also gets a confident class.

    Raises:
        ValueError: ``logits`` is not (N, classes) with N ≥ 1, ``confidence`` not in [0, 1).
    """
    if logits.ndim != 2 or not logits.numel():
        raise ValueError(f"logits must have shape (N, classes), got {tuple(logits.shape)}")
    if not 0 <= finite("confidence", confidence) < 1:
        raise ValueError(f"confidence must lie in [0, 1), got {confidence:g}")
    return float((logits.softmax(1).amax(1) > confidence).double().mean())


class _Oracle(nn.Module):
    """The base of both oracles: α and σ of a path, in float64, and the output of a prediction.

    It is a module so that ``.to("cuda")`` moves its tensors, which a captured graph needs.
    """

    roots: Tensor
    """α and σ of a table's levels; none on a continuous path."""
    times: Tensor
    """The t of a table's levels."""

    def __init__(self, schedule: GaussianPath | None, prediction: str) -> None:
        super().__init__()
        self.schedule = NoiseSchedule.linear() if schedule is None else schedule
        self.prediction = checked_prediction(prediction, self.schedule)
        count = 0 if self.schedule.continuous else len(self.schedule)
        levels = np.arange(count)
        at = self.schedule.at(levels)
        self.register_buffer("roots", torch.from_numpy(np.stack([at.alpha, at.sigma], 1)))
        self.register_buffer("times", torch.from_numpy(self.schedule.times(levels).copy()))

    def _levels_at(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns α_t and σ_t in x's dtype, each (batch, 1, ...); NaN where t is not on the path.

        1 − ᾱ_t in float32 would be off by 3e-4 at t = 0. The result is NaN instead of an error,
        because an error would need a host sync.
        """
        if not x.is_floating_point() or x.ndim == 0:
            raise ValueError(
                f"x must be floating point of shape (batch, ...), "
                f"got {x.dtype} of shape {tuple(x.shape)}"
            )
        if t.shape not in ((), x.shape[:1]):
            raise ValueError(f"t must have shape () or ({len(x)},), got {tuple(t.shape)}")
        if isinstance(self.schedule, Continuous):
            sigma = self.schedule.sigma_at(t.double())
            known = (sigma >= 0) & (sigma <= self.schedule.noisiest * (1 + 1e-6))
            sigma = sigma.clamp(0, self.schedule.noisiest)
            roots = torch.stack([self.schedule.alpha2_of(sigma).sqrt(), sigma], -1)
        elif isinstance(self.schedule, NoiseSchedule):
            level = t.long().clamp(0, len(self.roots) - 1)
            roots, known = self.roots[level], level == t
        else:
            given = t.float() if self.times.is_floating_point() else t
            same = given.reshape(-1, 1) == self.times
            roots, known = self.roots[same.int().argmax(1)], same.any(1)
        roots = roots.to(x).where(known.unsqueeze(-1), torch.nan)
        alpha, sigma = roots.view(-1, 2, *[1] * (x.ndim - 1)).unbind(1)
        return alpha, sigma

    def _output(self, alpha: Tensor, sigma: Tensor, eps: Tensor, x0: Tensor) -> Tensor:
        """Returns the exact output of a model with this prediction."""
        if self.prediction == "epsilon":
            return eps
        if self.prediction == "v":
            return alpha * eps - sigma * x0
        return x0 if self.prediction == "sample" else eps - x0

    def _at(self, name: str, level: Any) -> tuple[float, float]:
        """Returns α and σ of a level of the path, or of clean data, −1."""
        if self.schedule.continuous:
            level = finite(name, level)
        else:
            level = whole(name, level, low=-1, high=len(self.schedule) - 1)
        found = self.schedule.at([level])
        return float(found.alpha[0]), float(found.sigma[0])


class Gaussian(_Oracle):
    """The exact ε and the exact flow of data whose elements are independent N(m, s²).

        x_t ~ N(√ᾱ_t·m, v_t),   v_t = ᾱ_t·s² + 1 − ᾱ_t
        ε(x, t) = √(1−ᾱ_t)·(x − √ᾱ_t·m)/v_t

    ε is −√(1−ᾱ_t) times the score of x_t's density (Song et al. 2021, score-based generative
    modeling). The oracle is called with ``(x, t)`` as any model: x is floating point of shape
    (batch, ...); t are timesteps in [0, T) of shape (batch,) or (), of any real dtype. The output
    has x's shape and dtype, and is NaN where t is not one of the schedule's timesteps.

    Args:
        mean: m, a number or a tensor that broadcasts to x.
        std: s ≥ 0, likewise.
        schedule: ᾱ, or another path; by default the paper's (linear β, T = 1000).
        prediction: the output: ε, or another that ``DDIM`` takes on this path.

    Raises:
        ValueError: ``mean`` or ``std`` is not finite, or ``std`` is negative; when called, x is
            not floating point or t has another shape.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Any,
        std: Any,
        schedule: GaussianPath | None = None,
        prediction: str = "epsilon",
    ) -> None:
        super().__init__(schedule, prediction)
        self.register_buffer("mean", _parameter("mean", mean))
        self.register_buffer("std", _parameter("std", std, positive=True))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self._levels_at(x, t)
        mean, std = self.mean.to(x).expand_as(x), self.std.to(x).expand_as(x)
        from_mean, v = x - alpha * mean, (alpha * std) ** 2 + sigma**2
        eps = sigma * from_mean / v
        if self.prediction == "epsilon":
            return eps
        return self._output(alpha, sigma, eps, mean + alpha * std**2 * from_mean / v)

    def flow(self, x: Tensor, t: float, s: float = -1) -> Tensor:
        """Returns x at level ``t`` carried exactly along the probability flow to level ``s``.

            x_s = √ᾱ_s·m + √(v_s/v_t)·(x_t − √ᾱ_t·m)

        This is the limit of DDIM with η = 0 for many steps (Song et al. 2021, DDIM, eq. 14), in
        either direction. Level −1 is clean data, v = s², so the default is
        x0 = m + s·(x_t − √ᾱ_t·m)/√v_t.

        Raises:
            ValueError: ``t`` or ``s`` is not in [−1, T), or on a continuous path no σ of the path.
        """
        (a_t, b_t), (a_s, b_s) = self._at("t", t), self._at("s", s)
        ratio = torch.sqrt(((a_s * self.std) ** 2 + b_s**2) / ((a_t * self.std) ** 2 + b_t**2))
        carried: Tensor = (a_s * self.mean).to(x) + ratio.to(x) * (x - (a_t * self.mean).to(x))
        return carried


class GaussianMixture(_Oracle):
    """The exact ε of data drawn from K isotropic Gaussians, Σ_k w_k·N(μ_k, s_k²·I).

        r_k = softmax_k(ln w_k − ½·(D·ln v_k + ‖x − √ᾱ_t·μ_k‖²/v_k)),   v_k = ᾱ_t·s_k² + 1 − ᾱ_t
        ε(x, t) = √(1−ᾱ_t)·Σ_k r_k·(x − √ᾱ_t·μ_k)/v_k

    ε is −√(1−ᾱ_t) times the score of x_t's density, and r_k is the probability that x came from
    component k. The oracle is called as ``Gaussian`` is, with x of shape (batch, ...) with D
    elements a sample. It computes in x's dtype and allocates batch·K·D values.

    Args:
        means: μ, (K, ...) with D elements each; x may have any shape with D elements.
        stds: s ≥ 0, a number or (K,).
        weights: w ≥ 0, (K,), in any scale; equal by default.
        schedule: ᾱ, or another path; by default the paper's (linear β, T = 1000).
        prediction: the output: ε, or another that ``DDIM`` takes on this path.

    Raises:
        ValueError: a parameter is not finite, is negative or has another shape, or all weights
            are 0; when called, x is not floating point or has not D elements, or t has another
            shape.
    """

    means: Tensor
    stds: Tensor
    weights: Tensor

    def __init__(
        self,
        means: Any,
        stds: Any,
        weights: Any = None,
        schedule: GaussianPath | None = None,
        prediction: str = "epsilon",
    ) -> None:
        super().__init__(schedule, prediction)
        mu = _parameter("means", means)
        if mu.ndim < 2 or not mu.numel():
            raise ValueError(f"means must have shape (K, ...), got {tuple(mu.shape)}")
        s = _parameter("stds", stds, positive=True)
        w = _parameter("weights", [1.0] * len(mu) if weights is None else weights, positive=True)
        if s.shape not in ((), mu.shape[:1]):
            raise ValueError(f"stds must be a number or ({len(mu)},), got {tuple(s.shape)}")
        if w.shape != mu.shape[:1] or not w.any():
            raise ValueError(f"weights must be ({len(mu)},) and not all 0, got {tuple(w.shape)}")
        self.register_buffer("means", mu)
        self.register_buffer("stds", s.expand(len(mu)).clone())
        self.register_buffer("weights", w)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (root.view(-1, 1, 1) for root in self._levels_at(x, t))
        means, stds = self.means.flatten(1).to(x), self.stds.to(x)
        if x.shape[1:].numel() != means.shape[1]:
            raise ValueError(
                f"x must have {means.shape[1]} elements a sample, got shape {tuple(x.shape)}"
            )
        difference = x.reshape(len(x), 1, means.shape[1]) - alpha * means
        v = (alpha * stds.unsqueeze(-1)) ** 2 + sigma**2
        penalty = means.shape[1] * v.log() + difference.square().sum(-1, keepdim=True) / v
        r = torch.softmax(self.weights.to(x).log().unsqueeze(-1) - 0.5 * penalty, 1)
        eps = (sigma * r / v * difference).sum(1)
        if self.prediction == "epsilon":
            return eps.view(x.shape)
        x0 = (r * (means + alpha * stds.unsqueeze(-1) ** 2 / v * difference)).sum(1)
        return self._output(alpha[:, 0], sigma[:, 0], eps, x0).view(x.shape)

    def moments(self) -> Moments:
        """Returns the data's moments on the CPU.

        μ = Σ_k w_k·μ_k,   Σ = Σ_k w_k·(s_k²·I + (μ_k−μ)(μ_k−μ)ᵀ)
        """
        w = (self.weights / self.weights.sum()).cpu()
        mu, s = self.means.flatten(1).cpu(), self.stds.cpu()
        mean = w @ mu
        within = (w @ s**2).sqrt() * torch.eye(mu.shape[1], dtype=mu.dtype, device="cpu")
        return Moments(mean, torch.cat([w.sqrt().unsqueeze(1) * (mu - mean), within]))

    def sample(
        self, n: int, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Returns ``n`` draws of the data, (n, ...) with the shape of one mean.

        They are drawn in float64 on the oracle's device, which must be ``generator``'s device too.
        """
        n = whole("n", n, low=1)
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        means = self.means[k]
        z = torch.empty_like(means).normal_(generator=generator)
        return (means + self.stds[k].view(-1, *[1] * (means.ndim - 1)) * z).to(dtype)


def _parameter(name: str, values: Any, positive: bool = False) -> Tensor:
    """Returns ``values`` as a new float64 tensor; they must be finite and, if ``positive``, ≥ 0."""
    if isinstance(values, Tensor):
        tensor = values.detach().to("cpu", torch.float64, copy=True)
    else:
        tensor = torch.tensor(values, dtype=torch.float64, device="cpu")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} must be finite")
    if positive and (tensor < 0).any():
        raise ValueError(f"{name} must be ≥ 0, got {float(tensor.min()):g}")
    return tensor


def _moments(name: str, values: Any) -> Moments:
    """Returns the moments of features (N, D); a ``ValueError`` names the argument ``name``."""
    x = _parameter(name, values)
    if x.ndim != 2 or len(x) < 2 or x.shape[1] < 1:
        raise ValueError(f"{name} must be (N, D) with N ≥ 2, got {tuple(x.shape)}")
    mean = x.mean(0)
    return Moments(mean, torch.linalg.qr((x - mean) / (len(x) - 1) ** 0.5, mode="r").R)
