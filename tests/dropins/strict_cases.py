"""Original and strict schedulers on Gaussian data, whose exact model and flow are known."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastddim import NoiseSchedule
from fastddim.dropins.diffusers import (
    FastDDIMScheduler,
)

diffusers: Any = importlib.import_module("diffusers")  # without its types
DDIMInverseScheduler = diffusers.DDIMInverseScheduler
DDIMParallelScheduler = diffusers.DDIMParallelScheduler
DDIMScheduler = diffusers.DDIMScheduler

T = 1000
MEAN, STD = 0.3, 0.5
SPACINGS = ("leading", "trailing", "linspace")
Config = dict[str, Any]


def original(steps: int, **config: Any) -> Any:
    scheduler = DDIMScheduler(**{"clip_sample": False, **config})
    scheduler.set_timesteps(steps)
    return scheduler


def strict(steps: int, **config: Any) -> Any:
    scheduler: Any = FastDDIMScheduler(**{"clip_sample": False, **config}, strict=True)
    scheduler.set_timesteps(steps)
    return scheduler


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def schedule_of(scheduler: Any) -> NoiseSchedule:
    return NoiseSchedule.from_betas(scheduler.betas)


def exact_model(scheduler: Any, mean: float = MEAN, std: float = STD) -> Callable[..., Tensor]:
    """The exact ε of data from N(mean, std²), at −1 as the original's tables have it: at T − 1."""
    abar = scheduler.alphas_cumprod.double()

    def model(x: Tensor, t: Any) -> Any:
        a = abar[int(t)]
        return ((1 - a).sqrt() * (x.double() - a.sqrt() * mean) / (a * std**2 + 1 - a)).to(x.dtype)

    return model


def loop(scheduler: Any, x: Tensor, model: Callable[..., Tensor], **given: Any) -> Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x, **given).prev_sample
    return x


def level_reached(scheduler: Any, t: int) -> float:
    """ᾱ_s of a step from t: with ε = 0 it goes from x to √(ᾱ_s/ᾱ_t)·x."""
    x = torch.ones(1, 1)
    found = scheduler.step(torch.zeros(1, 1), t, x).prev_sample
    return float(found) ** 2 * float(scheduler.alphas_cumprod[t])
