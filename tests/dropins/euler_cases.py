"""diffusers' Euler schedulers and their drop-ins: configurations, and whole loops."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddim.dropins.diffusers import (
    FastEulerAncestralDiscreteScheduler,
    FastFlowMatchEulerDiscreteScheduler,
)

diffusers: Any = importlib.import_module("diffusers")  # without its types
FLOW: Any = FastFlowMatchEulerDiscreteScheduler
FLOW_ORIGINAL: Any = diffusers.FlowMatchEulerDiscreteScheduler
EULER: Any = FastEulerAncestralDiscreteScheduler
EULER_ORIGINAL: Any = diffusers.EulerAncestralDiscreteScheduler
PAIRS: dict[str, tuple[Any, Any]] = {
    "flow": (FLOW, FLOW_ORIGINAL),
    "euler": (EULER, EULER_ORIGINAL),
}
SHAPE = (2, 4, 8, 8)
Config = dict[str, Any]

SHIFTS: list[tuple[Config, Config]] = [
    ({}, {}),
    ({"shift": 3.0}, {}),
    ({"use_dynamic_shifting": True}, {"mu": 0.5}),
    ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"mu": 1.15}),
    ({"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05}, {"mu": 2.05}),
]
CONVERSIONS: list[Config] = [
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
]


def _times(S: int) -> list[Config]:
    """The ways in which ``set_timesteps`` takes S timesteps."""
    sigmas = np.linspace(1.0, 1 / S, S).tolist()
    timesteps = np.linspace(990.5, 10.25, S).tolist()
    return [
        {"num_inference_steps": S},
        {"sigmas": sigmas},
        {"num_inference_steps": S, "timesteps": timesteps},
        {"sigmas": sigmas, "timesteps": timesteps},
    ]


_product: Any = itertools.product  # without its types
FLOWS: list[tuple[Config, Config]] = [
    (
        {
            "stochastic_sampling": stochastic,
            "invert_sigmas": inverted,
            "shift_terminal": terminal,
            **conversion,
            **shift,
        },
        {**times, **mu},
    )
    for stochastic, inverted, terminal, conversion, (shift, mu), S in _product(
        (False, True), (False, True), (None, 0.02), CONVERSIONS, SHIFTS, (2, 28, 50)
    )
    for times in _times(S)
]
"""Every option, and the arguments of ``set_timesteps``."""
EULERS: list[tuple[Config, Config]] = [
    (
        {
            "prediction_type": prediction,
            "rescale_betas_zero_snr": zero,
            "steps_offset": offset,
            "timestep_spacing": spacing,
            **betas,
        },
        {"num_inference_steps": S},
    )
    for prediction, zero, spacing, offset, betas, S in _product(
        ("epsilon", "v_prediction"),
        (False, True),
        ("linspace", "leading", "trailing"),
        (0, 1),
        (
            {"beta_schedule": "linear"},
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
            {"beta_schedule": "squaredcos_cap_v2"},
            {"trained_betas": np.linspace(1e-4, 0.03, 1000).tolist()},
        ),
        (1, 7, 28, 50),
    )
]


def drawn(seed: int = 1, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gen(seed: int) -> torch.Generator:
    """A generator. The global one, from which diffusers 0.37 draws flow's noise, is seeded too."""
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def net(x: Tensor, t: Any) -> Tensor:
    """Nonlinear and bounded, in x's dtype."""
    return torch.tanh(0.9 * x) + 0.05 * (float(t) % 97) / 97


def scaled(scheduler: Any, x: Tensor, t: Any) -> Tensor:
    """The model's input, which flow matching does not scale."""
    scale = getattr(scheduler, "scale_model_input", None)
    return x if scale is None else scale(x, t)


def stepped(scheduler: Any, x: Tensor, t: Any, **given: Any) -> Any:
    return scheduler.step(net(scaled(scheduler, x, t), t), t, x, **given)


def loop(scheduler: Any, x: Tensor, generator: Any = None, start: int = 0) -> list[Tensor]:
    """The inputs of the model and all that the steps return."""
    kept = []
    for t in scheduler.timesteps[start:]:
        kept.append(scaled(scheduler, x, t))
        kept += (found := stepped(scheduler, x, t, generator=generator)).values()
        x = found.prev_sample
    return kept


def start(scheduler: Any, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """x_T, from the same normals each time."""
    return drawn(shape=shape) * getattr(scheduler, "init_noise_sigma", 1.0)


def never_the_originals(scheduler: Any) -> Any:
    """A scheduler whose steps must be its own."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the original's step ran")

    scheduler._parent = type("Original", (scheduler._parent,), {"step": refuse})
    return scheduler


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Each tensor has the other's bits and layout; a NaN is one in both."""
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, check_stride=True)


def assert_same_loops(
    kind: str, config: Config, times: Config, dtype: torch.dtype = torch.float32
) -> None:
    """Whole loops have the same bits, timesteps, σ, places, and generators."""
    found = []
    for cls in PAIRS[kind]:
        scheduler, g = cls(**config), gen(5)
        if cls is PAIRS[kind][0]:
            never_the_originals(scheduler)
        scheduler.set_timesteps(**times)
        kept = loop(scheduler, start(scheduler).to(dtype), g)
        assert scheduler.step_index == len(scheduler.timesteps)
        found.append([*kept, g.get_state(), scheduler.timesteps, scheduler.sigmas])
    assert_same(*found)
