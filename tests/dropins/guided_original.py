"""What guided-diffusion computes, operation for operation, and models to compare on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import Enum, auto
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddim.dropins import guided


class ModelMeanType(Enum):
    PREVIOUS_X = auto()
    START_X = auto()
    EPSILON = auto()


class ModelVarType(Enum):
    LEARNED = auto()
    FIXED_SMALL = auto()
    FIXED_LARGE = auto()
    LEARNED_RANGE = auto()


class Original:
    """GaussianDiffusion and, with ``kept`` timesteps, SpacedDiffusion of guided-diffusion 22e0df8:
    what DDIM and ``p_sample`` compute there, operation for operation, float64 tables read as
    float32."""

    def __init__(
        self,
        betas: Any,
        kept: set[int] | None = None,
        mean: str = "EPSILON",
        var: str = "FIXED_LARGE",
        rescale: bool = False,
    ) -> None:
        self.original_steps = len(betas)
        if kept is not None:
            self.timestep_map = sorted(kept)
            self.original_num_steps = len(betas)
            new, last = [], 1.0
            for i, abar in enumerate(np.cumprod(1.0 - betas)):
                if i in kept:
                    new.append(1 - abar / last)
                    last = abar
            betas = np.array(new)
        self.betas = betas
        self.num_timesteps = len(betas)
        self.alphas_cumprod = np.cumprod(1.0 - betas)
        self.model_mean_type = ModelMeanType[mean]
        self.model_var_type = ModelVarType[var]
        self.rescale_timesteps = rescale
        abar, abar_s = self.alphas_cumprod, np.append(1.0, self.alphas_cumprod[:-1])
        with np.errstate(divide="ignore"):
            self.a, self.b = np.sqrt(1.0 / abar), np.sqrt(1.0 / abar - 1)
        self.small = betas * (1.0 - abar_s) / (1.0 - abar)
        self.log_small = np.log(np.append(self.small[1:2], self.small[1:]))
        self.from_x0 = betas * np.sqrt(abar_s) / (1.0 - abar)
        self.from_x = (1.0 - abar_s) * np.sqrt(1.0 - betas) / (1.0 - abar)

    def at(self, table: Any, t: Tensor, x: Tensor) -> Tensor:
        level = torch.from_numpy(table).to(t.device)[t].float()
        return level.view(-1, *[1] * (x.dim() - 1)).expand(x.shape)

    def seen(self, t: Tensor) -> Tensor:
        t = torch.tensor(getattr(self, "timestep_map", range(len(self.betas))), device=t.device)[t]
        return t.float() * (1000.0 / self.original_steps) if self.rescale_timesteps else t

    def predict(
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        cond_fn: Any = None,
        model_kwargs: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """(x0, ε), with the part that cond_fn adds."""
        abar = self.at(self.alphas_cumprod, t, x)
        scale = self.at(np.sqrt(1.0 / self.alphas_cumprod), t, x)
        noisy = self.at(np.sqrt(1.0 / self.alphas_cumprod - 1), t, x)
        kwargs = model_kwargs or {}
        x0 = model(x, self.seen(t), **kwargs)
        if self.model_var_type.name.startswith("LEARNED"):
            x0, _ = torch.split(x0, x.shape[1], dim=1)
        assert x0.shape == x.shape
        if self.model_mean_type is ModelMeanType.EPSILON:
            x0 = scale * x - noisy * x0
        if denoised_fn is not None:
            x0 = denoised_fn(x0)
        if clip_denoised:
            x0 = x0.clamp(-1, 1)
        if cond_fn is not None:
            eps = (scale * x - x0) / noisy
            eps = eps - (1 - abar).sqrt() * cond_fn(x, self.seen(t), **kwargs)
            x0 = scale * x - noisy * eps
        return x0, (scale * x - x0) / noisy

    def ddim_sample(
        self, model: Any, x: Tensor, t: Tensor, eta: float = 0.0, **kwargs: Any
    ) -> dict[str, Tensor]:
        x0, eps = self.predict(model, x, t, **kwargs)
        abar = self.at(self.alphas_cumprod, t, x)
        abar_s = self.at(np.append(1.0, self.alphas_cumprod[:-1]), t, x)
        sigma = eta * torch.sqrt((1 - abar_s) / (1 - abar)) * torch.sqrt(1 - abar / abar_s)
        z = torch.randn_like(x)
        mean = x0 * torch.sqrt(abar_s) + torch.sqrt(1 - abar_s - sigma**2) * eps
        moving = (t != 0).float().view(-1, *[1] * (x.dim() - 1))
        return {"sample": mean + moving * sigma * z, "pred_xstart": x0}

    def ddim_reverse_sample(
        self, model: Any, x: Tensor, t: Tensor, **kwargs: Any
    ) -> dict[str, Tensor]:
        x0, eps = self.predict(model, x, t, **kwargs)
        abar_s = self.at(np.append(self.alphas_cumprod[1:], 0.0), t, x)
        return {
            "sample": x0 * torch.sqrt(abar_s) + torch.sqrt(1 - abar_s) * eps,
            "pred_xstart": x0,
        }

    @torch.no_grad()
    def ddim_sample_loop_progressive(
        self, model: Any, shape: Any, noise: Any = None, device: Any = "cpu", **kwargs: Any
    ) -> Iterator[dict[str, Tensor]]:
        x = torch.randn(*shape, device=device) if noise is None else noise
        for i in range(self.num_timesteps)[::-1]:
            out = self.ddim_sample(model, x, torch.tensor([i] * shape[0], device=device), **kwargs)
            yield out
            x = out["sample"]

    def p_sample(
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        cond_fn: Any = None,
        model_kwargs: Any = None,
    ) -> dict[str, Tensor]:
        """The ancestral step: the posterior's mean, and the variance of ``model_var_type``."""
        kwargs, kind = model_kwargs or {}, self.model_var_type
        x0 = model(x, self.seen(t), **kwargs)
        if kind.name.startswith("LEARNED"):
            x0, log_variance = torch.split(x0, x.shape[1], dim=1)
            if kind is ModelVarType.LEARNED_RANGE:
                low, high = self.at(self.log_small, t, x), self.at(np.log(self.betas), t, x)
                share = (log_variance + 1) / 2
                log_variance = share * high + (1 - share) * low
            variance = torch.exp(log_variance)
        elif kind is ModelVarType.FIXED_SMALL:
            variance, log_variance = self.at(self.small, t, x), self.at(self.log_small, t, x)
        else:
            large = np.append(self.small[1], self.betas[1:])
            variance, log_variance = self.at(large, t, x), self.at(np.log(large), t, x)
        if self.model_mean_type is ModelMeanType.EPSILON:
            x0 = self.at(self.a, t, x) * x - self.at(self.b, t, x) * x0
        if denoised_fn is not None:
            x0 = denoised_fn(x0)
        if clip_denoised:
            x0 = x0.clamp(-1, 1)
        mean = self.at(self.from_x0, t, x) * x0 + self.at(self.from_x, t, x) * x
        z = torch.randn_like(x)
        moving = (t != 0).float().view(-1, *[1] * (x.dim() - 1))
        if cond_fn is not None:
            mean = mean.float() + variance * cond_fn(x, self.seen(t), **kwargs).float()
        sample = mean + moving * torch.exp(0.5 * log_variance) * z
        return {"sample": sample, "pred_xstart": x0}

    @torch.no_grad()
    def p_sample_loop_progressive(
        self, model: Any, shape: Any, noise: Any = None, device: Any = "cpu", **kwargs: Any
    ) -> Iterator[dict[str, Tensor]]:
        x = torch.randn(*shape, device=device) if noise is None else noise
        for i in range(self.num_timesteps)[::-1]:
            out = self.p_sample(model, x, torch.tensor([i] * shape[0], device=device), **kwargs)
            yield out
            x = out["sample"]


def linear(T: int = 1000) -> Any:
    return np.linspace(1000 / T * 0.0001, 1000 / T * 0.02, T, dtype=np.float64)


def cosine(T: int = 1000) -> Any:
    levels = [math.cos((i / T + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(T + 1)]
    return np.array([min(1 - levels[i + 1] / levels[i], 0.999) for i in range(T)])


FIFTY, TWELVE = set(range(0, 1000, 20)), set(range(0, 1000, 90))
LINEAR = Original(linear(), FIFTY)


def toy(x: Tensor, t: Tensor) -> Tensor:
    """Rounds alike wherever it runs."""
    return 0.8 * x.clamp(-1.5, 1.5) + 1e-3 * (t % 97).to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def model(x: Tensor, t: Tensor, y: Tensor | None = None, variance: bool = False) -> Tensor:
    """A model that draws from the global stream too, as dropout does, and keeps no tensor."""
    eps = toy(x, t) + 0.01 * torch.randn_like(x)
    if y is not None:
        eps = eps + 0.1 * y.view(-1, *[1] * (x.dim() - 1))
    return torch.cat([eps, 0.3 * x], 1) if variance else eps


def score(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad((-0.125 * x**2 + 1e-4 * t.view(-1, 1, 1, 1) * x).sum(), x)[0]


def darker(x0: Tensor) -> Tensor:
    return 0.9 * x0 - 0.01


def start(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kept(outs: Any) -> list[Tensor]:
    return [tensor for out in outs for tensor in (out["sample"], out["pred_xstart"])]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for mine, own in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, own)
        assert mine.isfinite().all()


def assert_identical(
    diffusion: Original, net: Any, x: Tensor, loop: str = "ddim_sample_loop", **kwargs: Any
) -> None:
    """Compares every state and x0 of the loop, and the generator's state after it."""
    shape, progressive = tuple(x.shape), f"{loop}_progressive"
    torch.manual_seed(0)
    ours = list(getattr(guided, progressive)(diffusion, net, shape, x, device="cpu", **kwargs))
    state = torch.get_rng_state()
    torch.manual_seed(0)
    theirs = kept(getattr(diffusion, progressive)(net, shape, x, **kwargs))
    assert_equal(kept(ours), theirs)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(0)
    last = getattr(guided, loop)(diffusion, net, shape, x, device="cpu", **kwargs)
    assert torch.equal(last, ours[-1]["sample"])
    assert torch.equal(state, torch.get_rng_state())
