"""A loaded model, and the facts about it that sampling needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import nn

from fastddim.coefficients import Prediction
from fastddim.loop.model import Model
from fastddim.loop.sampler import DDIM
from fastddim.schedule import NoiseSchedule

Shape: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True)
class Loaded:
    """A model and the facts about it that sampling needs.

    Attributes:
        model: a network is in evaluation mode and on the CPU; one from a file is float32.
        shape: (channels, height, width) of one sample.
        schedule: the noise schedule that the model was trained on.
        prediction: the quantity that the model returns, as ``DDIM`` names it.
        description: one line for the user, which lists every assumption.
        classes: the number of classes of a model that takes ``class_labels``, else None.
        null_class: the label that stands for "no class", which guidance needs, or None.
        clip: x0 is clamped to ±clip, as the scheduler's configuration demands; None for no clamp.
    """

    model: Model
    shape: Shape
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule.linear)
    prediction: Prediction = "epsilon"
    description: str = ""
    classes: int | None = None
    null_class: int | None = None
    clip: float | None = None

    def ddim(self, steps: int | None = None, **options: Any) -> DDIM:
        """Returns a sampler with the model's schedule, prediction and clip, or with ``options``."""
        own = {"schedule": self.schedule, "prediction": self.prediction, "clip": self.clip}
        return DDIM(steps, **{**own, **options})


def measured(model: Any, shape: Shape) -> str:
    """Returns the number of parameters, if the model has any, and the shape, as text."""
    n = sum(p.numel() for p in model.parameters()) if isinstance(model, nn.Module) else None
    return size_text(shape) if n is None else f"{n / 1e6:.1f} M parameters, {size_text(shape)}"


def size_text(shape: Sequence[int]) -> str:
    """Returns a shape as text: 3x32x32."""
    return "x".join(map(str, shape))


def checked_shape(shape: Any) -> Shape:
    """Returns a shape of three positive integers, or refuses it."""
    if not (
        isinstance(shape, Sequence)
        and len(shape) == 3
        and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape)
    ):
        raise ValueError(f"shape must be (channels, height, width), each ≥ 1, got {shape!r}")
    return shape[0], shape[1], shape[2]
