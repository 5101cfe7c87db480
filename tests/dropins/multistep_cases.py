"""diffusers' multistep solver in float64, its configurations, and whole loops."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import torch
from torch import Tensor

from fastddim.dropins.diffusers import FastDPMSolverMultistepScheduler

diffusers: Any = importlib.import_module("diffusers")  # without its types
ORIGINAL: Any = diffusers.DPMSolverMultistepScheduler
FAST: Any = FastDPMSolverMultistepScheduler
SHAPE = (2, 4, 16, 16)
Config = dict[str, Any]
SDE: Config = {"algorithm_type": "sde-dpmsolver++"}

BETAS: list[Config] = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
]
SPACINGS: list[Config] = [
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"use_lu_lambdas": True},
]
_product: Any = itertools.product  # without its types
GRID: list[tuple[Config, int]] = [
    (
        {
            "algorithm_type": algorithm,
            "solver_order": order,
            "solver_type": solver,
            "lower_order_final": lower,
            "euler_at_final": euler,
            "final_sigmas_type": final,
            "prediction_type": prediction,
            "thresholding": threshold,
            "sample_max_value": 1.5,
            "rescale_betas_zero_snr": zero,
            **spacing,
            **betas,
        },
        S,
    )
    for (
        algorithm,
        order,
        solver,
        lower,
        euler,
        final,
        prediction,
        threshold,
        zero,
        spacing,
        betas,
        S,
    ) in _product(
        ("dpmsolver++", "sde-dpmsolver++"),
        (1, 2),
        ("midpoint", "heun"),
        (True, False),
        (False, True),
        ("zero", "sigma_min"),
        ("epsilon", "sample", "v_prediction"),
        (False, True),
        (False, True),
        SPACINGS,
        BETAS,
        (5, 12, 25),
    )
]
"""Every option. Each n-th has every value of each of them if n shares no factor with 2, 3 and 7."""


class Exact(ORIGINAL):  # type: ignore[misc]
    """The original in float64, at the levels of its own float32 ``sigmas``.

    Its ``step`` rounds samples to float32; this one takes the same decisions without that, and the
    formulas are those of the original's methods.
    """

    sigmas: Tensor
    model_outputs: list[Any]
    lower_order_nums: int

    def set_timesteps(self, *arguments: Any, **given: Any) -> None:
        super().set_timesteps(*arguments, **given)
        self.sigmas = self.sigmas.double()

    def step(self, output: Tensor, t: Any, x: Tensor, noise: Tensor | None = None) -> Tensor:
        if self.step_index is None:
            self._init_step_index(t)
        config, S = self.config, len(self.timesteps)
        last = self.step_index == S - 1
        lower = config.euler_at_final or (config.lower_order_final and S < 15)
        x0 = self.convert_model_output(output, sample=x)
        self.model_outputs = [*self.model_outputs[1:], x0]
        if config.solver_order == 1 or self.lower_order_nums < 1 or (
            last and (lower or config.final_sigmas_type == "zero")
        ):  # fmt: skip
            found = self.dpm_solver_first_order_update(x0, sample=x, noise=noise)
        else:
            found = self.multistep_dpm_solver_second_order_update(
                self.model_outputs, sample=x, noise=noise
            )
        self.lower_order_nums = min(self.lower_order_nums + 1, config.solver_order)
        self._step_index += 1
        return found  # type: ignore[no-any-return]


def net(x: Tensor, t: Any, prediction: str = "epsilon") -> Tensor:
    """Nonlinear and bounded, in any dtype."""
    if prediction == "sample":
        return 0.8 * torch.tanh(x)
    return torch.tanh(0.9 * x) + 0.05 * (float(t) % 97) / 97


def drawn(seed: int = 1, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loop(scheduler: Any, x: Tensor, generator: Any = None, start: int = 0) -> Tensor:
    """The last state of a loop, which draws its noise from ``generator``."""
    for t in scheduler.timesteps[start:]:
        output = net(x, t, scheduler.config.prediction_type)
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    return x


def exact(config: Config, S: int, x: Tensor, seed: int = 5, start: int = 0) -> Tensor:
    """The last state of the same loop in float64, with the same normals."""
    scheduler = Exact(**config)
    scheduler.set_timesteps(S)
    scheduler.set_begin_index(start)
    g = torch.Generator().manual_seed(seed)
    x = x.double()
    for t in scheduler.timesteps[start:]:
        z = None
        if scheduler.config.algorithm_type.startswith("sde"):
            z = torch.randn(x.shape, generator=g).double()
        x = scheduler.step(net(x, t, scheduler.config.prediction_type), t, x, z)
    return x


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
