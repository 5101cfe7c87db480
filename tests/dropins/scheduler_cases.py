"""diffusers' schedulers beside the drop-ins: configurations, and comparisons of whole loops."""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastddim.dropins.diffusers import (
    FastDDIMInverseScheduler,
    FastDDIMParallelScheduler,
    FastDDIMScheduler,
)
from fastddim.step.on_torch import BLOCK

diffusers: Any = importlib.import_module("diffusers")  # without its types
DDIMInverseScheduler = diffusers.DDIMInverseScheduler
DDIMParallelScheduler = diffusers.DDIMParallelScheduler
DDIMScheduler = diffusers.DDIMScheduler
FAST: Any = FastDDIMScheduler
PAIRS: dict[str, tuple[Any, Any]] = {
    "plain": (DDIMScheduler, FastDDIMScheduler),
    "parallel": (DDIMParallelScheduler, FastDDIMParallelScheduler),
    "inverse": (DDIMInverseScheduler, FastDDIMInverseScheduler),
}
SHAPE = (2, 3, 4, 5)
Config = dict[str, Any]

BOUNDS: list[Config] = [
    {"clip_sample": False},
    {"clip_sample": True},
    {"clip_sample": True, "clip_sample_range": 0.4},
    {"thresholding": True, "sample_max_value": 1.5},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 3.0},
]
GRID: list[Config] = [
    {
        "prediction_type": prediction,
        "timestep_spacing": spacing,
        "steps_offset": offset,
        "set_alpha_to_one": one,
        "rescale_betas_zero_snr": zero,
        "beta_schedule": betas,
        **bound,
    }
    for prediction, spacing, offset, one, zero, betas, bound in itertools.product(
        ("epsilon", "v_prediction", "sample"),
        ("leading", "trailing", "linspace"),
        (0, 1),
        (True, False),
        (False, True),
        ("linear", "scaled_linear", "squaredcos_cap_v2"),
        BOUNDS,
    )
]
"""Every option. Each 47th has every value of each of them: 47 shares no factor with their numbers.
"""


def model(x: Tensor, t: Any) -> Tensor:
    """Nonlinear, bounded, and rounding alike wherever it runs."""
    return 0.8 * x.clamp(-1.5, 1.5) + 1e-3 * (int(t) % 97)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gen(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_identical(a: Any, b: Any, where: object = "") -> None:
    """Equal values, dtype and shape; NaN in the same places."""
    assert (a.dtype, a.shape) == (b.dtype, b.shape), where
    assert torch.equal(a.isnan(), b.isnan()), where
    finite = {"nan": 0.0, "posinf": torch.inf, "neginf": -torch.inf}
    assert torch.equal(a.nan_to_num(**finite), b.nan_to_num(**finite)), where


DRAWS: dict[str, Config] = {
    "ddim": {},
    "generator": {"eta": 0.3, "seed": 5},
    "generators": {"eta": 1.0, "seed": [4, 9]},
    "global stream": {"eta": 1.0},
    "variance_noise": {
        "eta": 1.0,
        "variance_noise": randn(*SHAPE, seed=8),
        "use_clipped_model_output": True,
    },
}
"""The sources of a loop's noise, as arguments of ``assert_same_loops``."""
LAYOUTS: dict[str, Callable[[int], Tensor]] = {
    "one": lambda k: randn(1, 1, 1, 1, seed=k),
    "odd": lambda k: randn(1, 3, 5, 7, seed=k),
    "rank two": lambda k: randn(5, 7, seed=k),
    "rank five": lambda k: randn(2, 3, 2, 4, 5, seed=k),
    "empty": lambda k: randn(0, 3, 4, 4, seed=k),
    "channels_last": lambda k: randn(3, 4, 6, 5, seed=k).contiguous(
        memory_format=torch.channels_last
    ),
    "slice": lambda k: randn(4, 5, 6, 9, seed=k)[1:3, 1:4, ::2, 2:],
    "transposed": lambda k: randn(2, 6, 5, 3, seed=k).transpose(1, 3),
    "expanded": lambda k: randn(1, 3, 4, 4, seed=k).expand(3, -1, -1, -1),
    "chunk": lambda k: randn(4, 3, 4, 4, seed=k).chunk(2)[1],
    "large": lambda k: randn(2, 1, 1, BLOCK + 17, seed=k),
}


def made(classes: tuple[Any, Any], config: Config, **chosen: Any) -> tuple[Any, Any]:
    """The original and the drop-in with the same timesteps, chosen where ``chosen`` says how."""
    original, fast = (cls(**config) for cls in classes)
    if chosen:
        for scheduler in (original, fast):
            scheduler.set_timesteps(**chosen)
    assert torch.equal(original.timesteps, fast.timesteps)
    return original, fast


def both(config: Config, steps: int, which: str = "plain") -> tuple[Any, Any]:
    return made(PAIRS[which], config, num_inference_steps=steps)


def unstepped(original: Any, fast: Any) -> tuple[Any, Any]:
    """The same schedulers, where the drop-in cannot take the original's step."""
    fast._parent = type("Unstepped", (fast._parent,), {"step": None})
    return original, fast


def loop(
    scheduler: Any,
    x: Tensor,
    every: int = 1,
    net: Callable[[Tensor, Any], Tensor] = model,
    **arguments: Any,
) -> list[Tensor]:
    """All states and predictions of a loop, over each ``every``-th timestep and the last."""
    chosen = list(scheduler.timesteps)
    results = []
    for t in [*chosen[:-1:every], chosen[-1]]:
        found = scheduler.step(net(x, t), t, x, **arguments)
        results += [found.prev_sample, found.pred_original_sample]
        x = found.prev_sample
    return results


def assert_same_loops(original: Any, fast: Any, x: Tensor, **arguments: Any) -> None:
    """Compares loops with generators or global seeds, and the generators' states after them."""
    seed = arguments.pop("seed", None)
    results, states = [], []
    for scheduler in (original, fast):
        torch.manual_seed(7)
        if seed is not None:
            drawn: Any = [gen(k) for k in seed] if isinstance(seed, list) else gen(seed)
            arguments["generator"] = drawn
        results.append(loop(scheduler, x, **arguments))
        generators = arguments.get("generator") or []
        listed = generators if isinstance(generators, list) else [generators]
        states.append([torch.get_rng_state(), *(g.get_state() for g in listed)])
    assert len(results[0]) == len(results[1])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert_identical(a, b, f"{('x_s', 'x0')[i % 2]} of step {i // 2}")
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def assert_same_configuration(original: Any, fast: Any, dtype: torch.dtype = torch.float32) -> None:
    """Compares loops without noise, and of 61 steps with noise and ε derived again."""
    x = randn(*SHAPE).to(dtype)
    assert_same_loops(original, fast, x, every=3)
    for scheduler in (original, fast):
        scheduler.set_timesteps(61)
    assert_same_loops(original, fast, x, every=13, eta=0.7, use_clipped_model_output=True, seed=11)


def outcome(call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call returns, or the kind and the words of its error."""
    try:
        return call(*arguments)
    except Exception as error:
        return type(error), re.sub("<class '.*?'>|FastD", "D", str(error))


def assert_same_outcome(call: Callable[..., Any], original: Any, fast: Any, *more: Any) -> None:
    """The same tensors, or the same error in the same words."""
    a, b = (outcome(call, scheduler, *more) for scheduler in (original, fast))
    if isinstance(a[0], type) or isinstance(b[0], type):
        assert str(a) == str(b)
        return
    for mine, own in zip(a, b, strict=True):
        assert_identical(mine, own)
