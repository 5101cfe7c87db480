"""What the configuration of a diffusers scheduler says of how a model was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastddim.check import finite, shown, whole
from fastddim.schedule import NoiseSchedule

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
"""diffusers' names of what a model returns, and ours."""

_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "clip_sample": False,
    "clip_sample_range": 1.0,
}
_OTHER_DEFAULTS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": True},
    "DDPMScheduler": {"clip_sample": True},
    "LCMScheduler": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "TCDScheduler": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
}
"""What a configuration that leaves it out means, by its class where that is one of these."""


@dataclass(frozen=True)
class Trained:
    """How a model was trained.

    Attributes:
        schedule: its noise.
        prediction: what it returns, as ``DDIM`` has it.
        clip: what the scheduler clamps x0 to; None for nothing.
    """

    schedule: NoiseSchedule
    prediction: str
    clip: float | None


def read(config: Mapping[str, Any], source: Path) -> Trained:
    """What ``config``, which ``source`` holds, says of training.

    ᾱ is multiplied up in float64, diffusers' in float32: they agree to 1e-5.

    Raises:
        ValueError: one line naming ``source``, the entry, its value and what is allowed.
    """
    kind = str(config.get("_class_name", "")).replace("Parallel", "").replace("Inverse", "")
    betas = ("beta_schedule", "beta_start", "trained_betas")
    if kind and kind not in _OTHER_DEFAULTS and not any(name in config for name in betas):
        raise ValueError(
            f"{source} must be of a scheduler that knows β, such as DDPMScheduler, got {kind!r}: "
            f"a model of another kind of noise is not for DDIM"
        )
    asked = {**_DEFAULTS, **_OTHER_DEFAULTS.get(kind, {})}
    asked |= {name: config[name] for name in asked if name in config}
    kind_of = asked["prediction_type"]
    if config.get("predict_epsilon") is False and "prediction_type" not in config:
        kind_of = "sample"  # as it was written before 2023
    if kind_of not in PREDICTIONS:
        raise ValueError(
            f"{source} must have prediction_type one of {', '.join(PREDICTIONS)}, got {kind_of!r}"
        )
    try:
        clip = finite("clip_sample_range", asked["clip_sample_range"])
        schedule = _schedule(asked)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from None
    return Trained(schedule, PREDICTIONS[kind_of], clip if asked["clip_sample"] else None)


def _schedule(asked: Mapping[str, Any]) -> NoiseSchedule:
    T = whole("num_train_timesteps", asked["num_train_timesteps"], low=1)
    ends = asked["beta_start"], asked["beta_end"]
    name = asked["beta_schedule"]
    if asked["trained_betas"] is not None:
        schedule = NoiseSchedule.from_betas(asked["trained_betas"], name="trained_betas")
    elif name == "linear":
        schedule = NoiseSchedule.linear(T, *ends)
    elif name == "scaled_linear":
        schedule = NoiseSchedule.scaled_linear(T, *ends)
    elif name == "squaredcos_cap_v2":
        schedule = NoiseSchedule.cosine(T)
    elif name == "sigmoid":
        low, high = (finite(f"beta_{end}", ends[i]) for i, end in enumerate(("start", "end")))
        betas = low + (high - low) / (1 + np.exp(-np.linspace(-6, 6, T)))
        schedule = NoiseSchedule.from_betas(betas, name=f"sigmoid({low:g}, {high:g})")
    else:
        raise ValueError(
            f"beta_schedule must be linear, scaled_linear, squaredcos_cap_v2 or sigmoid, or "
            f"trained_betas be given, got {shown(name)}"
        )
    if not asked["rescale_betas_zero_snr"]:
        return schedule
    # Lin et al. 2024, algorithm 1: √ᾱ is shifted so that the last is 0, and scaled so that the
    # first is what it was.
    root = np.sqrt(schedule.alphas_cumprod)
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return NoiseSchedule(root**2, f"{schedule.name}, rescaled to zero terminal SNR")
