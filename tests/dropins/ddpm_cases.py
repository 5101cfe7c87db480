"""diffusers' DDPM scheduler beside the drop-in: configurations, and the loop in float64."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from fastddim.dropins.diffusers import FastDDPMScheduler
from tests.dropins.scheduler_cases import BOUNDS, Config, diffusers, made, model, unstepped

ORIGINAL: Any = diffusers.DDPMScheduler
FAST: Any = FastDDPMScheduler
POLICY: Config = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2"}
"""The configuration of LeRobot's diffusion policy, and its states: 16 actions of 7 numbers."""
ACTIONS = (1, 16, 7)
FIXED = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
LEARNED = ("learned", "learned_range")
BETAS: list[Config] = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "sigmoid"},
    {"beta_schedule": "laplace"},
    {"trained_betas": torch.linspace(0.001, 0.03, 400).tolist(), "num_train_timesteps": 400},
]
CHOSEN: list[Config] = [
    {"num_inference_steps": 7},
    {"num_inference_steps": 61},
    {"timesteps": [399, 300, 77, 5, 0]},
]
_product: Any = itertools.product  # without its types
GRID: list[tuple[Config, Config]] = [
    (
        {
            "variance_type": variance,
            "prediction_type": prediction,
            "timestep_spacing": spacing,
            "steps_offset": offset,
            "rescale_betas_zero_snr": zero,
            **betas,
            **bound,
        },
        chosen,
    )
    for variance, prediction, spacing, offset, zero, betas, bound, chosen in _product(
        FIXED,
        ("epsilon", "v_prediction", "sample"),
        ("leading", "trailing", "linspace"),
        (0, 1),
        (False, True),
        BETAS,
        BOUNDS,
        CHOSEN,
    )
]
"""Every option. Each n-th has every value of each of them if n shares no factor with 2, 3 and 5."""


def both(config: Config, **chosen: Any) -> tuple[Any, Any]:
    return made((ORIGINAL, FAST), config, **chosen)


def fused(config: Config, **chosen: Any) -> tuple[Any, Any]:
    """``both``, where the drop-in cannot take the original's step."""
    return unstepped(*both(config, **chosen))


def exact(config: Config, S: int, x: Tensor, seed: int) -> Tensor:
    """The last state of the original's loop in float64, with the normals of a float32 loop."""
    scheduler = ORIGINAL(**config)
    scheduler.set_timesteps(S)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.one = scheduler.one.double()
    g, x = torch.Generator().manual_seed(seed), x.double()
    for t in scheduler.timesteps:
        mean, _ = _without_noise(scheduler, model(x, t), t, x)
        if t > 0:
            z = torch.randn(x.shape, generator=g).double()
            mean = mean + scheduler._get_variance(t) ** 0.5 * z
        x = mean
    return x


def _without_noise(scheduler: Any, output: Tensor, t: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The original's step whose variance is 0, which draws from a generator of its own."""
    variance, scheduler._get_variance = scheduler._get_variance, lambda *_, **__: 0.0
    try:
        found: tuple[Tensor, Tensor] = scheduler.step(
            output, t, x, torch.Generator().manual_seed(0), return_dict=False
        )
        return found
    finally:
        scheduler._get_variance = variance
