"""The part that guided-diffusion's steps share: checked arguments, and the model's timesteps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastddim.check import kind, shown, truth
from fastddim.dropins._shared import Buffers
from fastddim.dropins._transfer import sent
from fastddim.loop.devices import check_not_capturing
from fastddim.schedule import NoiseSchedule
from fastddim.step.arguments import OUTPUTS

Denoised: TypeAlias = Callable[[Tensor], Tensor] | None
Condition: TypeAlias = Callable[..., Tensor] | None
Keywords: TypeAlias = Mapping[str, Any] | None
Out: TypeAlias = dict[str, Tensor]

_NO_X0 = "which is the mean of x_s itself and leaves no x0 to compute it from"
_VARIANCES = {"FIXED_SMALL": 1, "FIXED_LARGE": 1, "LEARNED": 2, "LEARNED_RANGE": 2}
"""The channels of the output for each channel of x."""


class Call(ABC):
    """Checks the arguments of one call, which any number of steps may follow."""

    def __init__(
        self,
        diffusion: Any,
        model: Callable[..., Tensor],
        clip_denoised: bool,
        denoised_fn: Denoised,
        cond_fn: Condition,
        model_kwargs: Keywords,
        device: torch.device,
        levels: str,
    ) -> None:
        """``levels`` is the attribute that the noise levels are read from."""
        for name in (levels, "model_mean_type", "model_var_type"):
            if not hasattr(diffusion, name):
                raise TypeError(
                    f"diffusion must be a GaussianDiffusion, a SpacedDiffusion or a "
                    f"guided.Diffusion, got {kind(diffusion)}, which has no {name}"
                )
        if not callable(model):
            raise TypeError(f"model must be callable, got {kind(model)}")
        for name, function in (("denoised_fn", denoised_fn), ("cond_fn", cond_fn)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be callable or None, got {shown(function)}")
        if model_kwargs is not None and not isinstance(model_kwargs, Mapping):
            raise TypeError(f"model_kwargs must be a mapping or None, got {kind(model_kwargs)}")
        self.mean_type = _one_of(
            diffusion, "model_mean_type", ("EPSILON", "START_X"), PREVIOUS_X=_NO_X0
        )
        self.var_type = _one_of(diffusion, "model_var_type", _VARIANCES)
        self.times_channels = _VARIANCES[self.var_type]
        self.model, self.denoised_fn, self.cond_fn = model, denoised_fn, cond_fn
        self.model_kwargs = dict(model_kwargs or {})
        self.clip = 1.0 if truth("clip_denoised", clip_denoised) else None
        check_not_capturing(device)

        of_betas = levels == "betas"
        made = NoiseSchedule.from_betas if of_betas else NoiseSchedule.from_alphas_cumprod
        self.schedule = made(getattr(diffusion, levels))
        self.count = len(self.schedule)
        timestep_map = getattr(diffusion, "timestep_map", range(self.count))
        self.model_t = sent(torch.from_numpy(np.array(timestep_map, dtype=np.int64)), device)
        if getattr(diffusion, "rescale_timesteps", False):
            T = getattr(diffusion, "original_num_steps", self.count)
            self.model_t = self.model_t.float() * (1000.0 / T)
        self.buffers, self.between = Buffers(), Buffers()

    @abstractmethod
    def __call__(self, x: Tensor, t: Tensor, row: int | None = None, want_x0: bool = True) -> Out:
        """Takes one step from t, (batch,) on x's device.

        ``row`` is the number that all elements of t have, or None where they may differ.
        """

    def output_of(self, x: Tensor, model_t: Tensor) -> Tensor:
        """Returns the model's output, with the channels of a learned variance if it has one."""
        output = self.model(x, model_t, **self.model_kwargs)
        return checked("model", output, x, self.times_channels)

    def score_of(self, x: Tensor, model_t: Tensor) -> Tensor:
        """Returns ∇_x log p(y | x_t), as ``cond_fn`` computes it."""
        assert self.cond_fn is not None
        return checked("cond_fn", self.cond_fn(x, model_t, **self.model_kwargs), x)


def _one_of(diffusion: Any, name: str, allowed: Any, **refused: str) -> str:
    """Returns the name of ``diffusion``'s enum member ``name``; ``refused`` gives reasons."""
    value = getattr(diffusion, name)
    found = getattr(value, "name", value)
    if found not in allowed:
        reason = f", {refused[found]}" if found in refused else ""
        raise ValueError(
            f"diffusion.{name} must be one of {', '.join(allowed)}, got {found}{reason}"
        )
    return str(found)


def checked(name: str, output: Any, x: Tensor, times_channels: int = 1) -> Tensor:
    """Returns the output of the caller's function ``name``, or refuses it."""
    if not isinstance(output, Tensor):
        raise TypeError(f"{name} must return a tensor, got {kind(output)}")
    batch, channels, *rest = x.shape
    if output.shape != (shape := (batch, times_channels * channels, *rest)):
        raise ValueError(f"{name} must return shape {shape}, got {tuple(output.shape)}")
    if output.dtype not in OUTPUTS:
        dtype = str(output.dtype)[6:]
        raise TypeError(f"{name} must return float32, bfloat16 or float16, got {dtype}")
    if output.device != x.device:
        raise ValueError(f"{name} must return a tensor on {x.device}, got {output.device}")
    return output
