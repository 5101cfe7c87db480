"""The changes that CompVis' descendants make to an output and to x0, and the tables they read."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddim.check import SamplingWarning, finite, kind

IGNORED = frozenset(
    {
        "quantize_denoised",
        "schedule_verbose",
        "uc_type",
        "conditional_guidance_scale_temporal",
    }
)
"""Keywords that the original samplers accept and never read."""

NAMED = frozenset({"fs"})
"""Keywords that DynamiCrafter's sampler names, and hands to the model without reading them."""


def thresholded(x0: Tensor, value: float) -> Tensor:
    """Returns x0·v/max(v, rms(x0)) for each sample: Zero123's ``norm_thresholding``."""
    rms = x0.pow(2).flatten(1).mean(1).sqrt().clamp(min=value)
    return x0 * (value / rms.view(-1, *[1] * (x0.dim() - 1)))


def rescaled(output: Tensor, w: float, share: float) -> Tensor:
    """Returns the guided output, scaled to the standard deviation of the conditional one.

        g = u + w·(c − u)        φ·g·std(c)/std(g) + (1 − φ)·g

    (Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4).

    Args:
        output: the outputs of both conditions, (2·batch, ...), the unconditional ones first.
        w: the guidance scale.
        share: φ, the ``guidance_rescale`` of DynamiCrafter's sampler.
    """
    u, c = output.chunk(2)
    g = u + w * (c - u)
    others = list(range(1, g.dim()))
    ratio = c.std(dim=others, keepdim=True) / g.std(dim=others, keepdim=True)
    return share * (g * ratio) + (1 - share) * g


def check_changes(dynamic_threshold: float | None, guidance_rescale: float) -> None:
    """Refuses a threshold that is not above 0, and a negative share."""
    if dynamic_threshold is not None and finite("dynamic_threshold", dynamic_threshold) <= 0:
        raise ValueError(f"dynamic_threshold must be above 0, got {dynamic_threshold:g}")
    if finite("guidance_rescale", guidance_rescale) < 0:
        raise ValueError(f"guidance_rescale must be ≥ 0, got {guidance_rescale:g}")


def checked_scales(ucg_schedule: Any, steps: int) -> Sequence[float]:
    """Returns the guidance scale of each step, from noise to data."""
    if not isinstance(ucg_schedule, Sequence) and not hasattr(ucg_schedule, "tolist"):
        raise TypeError(f"ucg_schedule must be a sequence of numbers, got {kind(ucg_schedule)}")
    if len(ucg_schedule) != steps:
        raise ValueError(
            f"ucg_schedule must have a scale for each of the {steps} steps, got {len(ucg_schedule)}"
        )
    return [finite(f"ucg_schedule[{i}]", w) for i, w in enumerate(ucg_schedule)]


def handed(model: Any, given: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """Returns the keywords of ``given`` that ``model.apply_model`` gets.

    ``known`` holds the names that an earlier call has checked. A new name that neither the sampler
    nor ``apply_model`` has among its arguments is announced by a warning.

    Raises:
        TypeError: ``apply_model`` takes no such keyword.
    """
    more = {name: value for name, value in given.items() if name not in IGNORED}
    if more.keys() <= known:
        return more
    parameters = inspect.signature(model.apply_model).parameters
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in sorted(more.keys() - known):
        if name not in parameters and not any_name:
            raise TypeError(
                f"{name} must be left out: sample knows no such argument, and neither does "
                f"model.apply_model"
            )
        known.add(name)
        if name not in parameters and name not in NAMED:
            warnings.warn(
                f"{name} is no argument of the sampler: model.apply_model gets it",
                SamplingWarning,
                stacklevel=5,  # Above are ``sample`` and its two decorators.
            )
    return more


def _float32(name: str) -> Callable[[Any], Tensor]:
    return lambda model: getattr(model, name).detach().clone().float()


def _of_abar(function: Callable[[Tensor], Tensor], root: Any = np.sqrt) -> Callable[[Any], Tensor]:
    def found(model: Any) -> Tensor:
        abar = model.alphas_cumprod.detach()
        # The original takes the roots and logarithms with NumPy, whose last place may differ.
        return torch.from_numpy(root(function(abar.cpu()).numpy())).float().to(abar.device)

    return found


BUFFERS: dict[str, Callable[[Any], Tensor]] = {
    "betas": _float32("betas"),
    "alphas_cumprod": _float32("alphas_cumprod"),
    "alphas_cumprod_prev": _float32("alphas_cumprod_prev"),
    "sqrt_alphas_cumprod": _of_abar(lambda abar: abar),
    "sqrt_one_minus_alphas_cumprod": _of_abar(lambda abar: 1.0 - abar),
    "log_one_minus_alphas_cumprod": _of_abar(lambda abar: 1.0 - abar, np.log),
    "sqrt_recip_alphas_cumprod": _of_abar(lambda abar: 1.0 / abar),
    "sqrt_recipm1_alphas_cumprod": _of_abar(lambda abar: 1.0 / abar - 1),
}
"""The tables of a model that the original copies into its sampler. No step reads them."""


def original_sigmas(model: Any, eta: float) -> Tensor:
    """Returns ``ddim_sigmas_for_original_num_steps``: σ of the step from each t to t − 1."""
    abar, before = BUFFERS["alphas_cumprod"](model), BUFFERS["alphas_cumprod_prev"](model)
    return eta * torch.sqrt((1 - before) / (1 - abar) * (1 - abar / before))
