"""Reads the training of a model from the configuration of its diffusers scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastddim.check import finite, shown, whole
from fastddim.schedule import NoiseSchedule

PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
"""diffusers' names of a model's prediction, and fastddim's."""

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
"""Defaults of these classes, which differ from ``_DEFAULTS``."""


@dataclass(frozen=True)
class Trained:
    """How a model was trained.

    Attributes:
        schedule: the noise schedule.
        prediction: the quantity that the model returns, as ``DDIM`` names it.
        clip: the scheduler clamps x0 to ±clip; None for no clamp.
    """

    schedule: NoiseSchedule
    prediction: str
    clip: float | None


def read(config: Mapping[str, Any], source: Path) -> Trained:
    """Returns the training that ``config`` describes; ``source`` is its file, for messages.

    ᾱ is a product in float64, while diffusers' is one in float32; they agree to 1e-5.

    Raises:
        ValueError: one line naming ``source``, the entry, its value and what is allowed.
    """
    kind = str(config.get("_class_name", "")).replace("Parallel", "").replace("Inverse", "")
    betas = ("beta_schedule", "beta_start", "trained_betas")
    if kind and kind not in _OTHER_DEFAULTS and not any(name in config for name in betas):
        raise ValueError(
            f"{source} must be of a scheduler that has β, such as DDPMScheduler, got {kind!r}: "
            f"DDIM cannot sample a model of another kind of noise"
        )
    settings = {**_DEFAULTS, **_OTHER_DEFAULTS.get(kind, {})}
    settings |= {name: config[name] for name in settings if name in config}
    prediction = settings["prediction_type"]
    if config.get("predict_epsilon") is False and "prediction_type" not in config:
        prediction = "sample"  # diffusers wrote it so before 2023.
    if prediction not in PREDICTIONS:
        raise ValueError(
            f"{source} must have prediction_type one of {', '.join(PREDICTIONS)}, "
            f"got {prediction!r}"
        )
    try:
        clip = finite("clip_sample_range", settings["clip_sample_range"])
        schedule = _schedule(settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from None
    return Trained(schedule, PREDICTIONS[prediction], clip if settings["clip_sample"] else None)


def _schedule(settings: Mapping[str, Any]) -> NoiseSchedule:
    T = whole("num_train_timesteps", settings["num_train_timesteps"], low=1)
    ends = settings["beta_start"], settings["beta_end"]
    name = settings["beta_schedule"]
    if settings["trained_betas"] is not None:
        schedule = NoiseSchedule.from_betas(settings["trained_betas"], name="trained_betas")
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
    if not settings["rescale_betas_zero_snr"]:
        return schedule
    # Lin et al. 2024, algorithm 1: shift √ᾱ so that the last value is 0, and scale it so that the
    # first value stays the same.
    root = np.sqrt(schedule.alphas_cumprod)
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return NoiseSchedule(root**2, f"{schedule.name}, rescaled to zero terminal SNR")
