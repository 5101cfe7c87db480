"""Turns the options ``Machine`` and ``Network`` into a model on its device, ready to sample."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from fastddim.check import SamplingWarning, whole
from fastddim.cli.options import Machine, Network
from fastddim.cli.values import DTYPES, parse_number, parse_shape
from fastddim.coefficients import checked_prediction
from fastddim.loop import devices
from fastddim.loop.model import Model
from fastddim.loop.sampler import DDIM
from fastddim.models import checkpoints
from fastddim.schedule import NoiseSchedule
from fastddim.tools import provenance
from fastddim.tuned import Tuned

HIDDEN = ("transformers", "torchvision", "peft", "scipy", "accelerate")
"""Packages that diffusers imports if they are installed, and that a U-Net does not need. Each is
slow to import, and a torchvision built for another torch makes the import fail."""

VERBOSITY = "DIFFUSERS_VERBOSITY"

SCHEDULES = {
    "linear": NoiseSchedule.linear,
    "scaled_linear": NoiseSchedule.scaled_linear,
    "cosine": NoiseSchedule.cosine,
}


@dataclass(frozen=True)
class Prepared:
    """A model on its device, with its class and guidance.

    Attributes:
        loaded: the model, its shape and its training; the command line overrides the files.
        device: the device that the model is on.
        dtype: the dtype that the model computes in; None is the state's float32.
        label, guidance, no_class: the class to draw, the guidance weight w, and the null class.
    """

    loaded: checkpoints.Loaded
    device: torch.device
    dtype: torch.dtype | None
    label: int | None
    guidance: float | None
    no_class: int | None

    @property
    def model(self) -> Model:
        return self.loaded.model

    @property
    def shape(self) -> checkpoints.Shape:
        return self.loaded.shape

    def ddim(self, steps: int | None = None, **options: Any) -> DDIM:
        """Returns a sampler; it warns of timesteps that were tuned for other weights."""
        ddim = self.loaded.ddim(steps, **options)
        if isinstance(ddim.spacing, Tuned):
            tuned = ddim.spacing.model
            if tuned and self.weights and tuned != self.weights:
                warnings.warn(
                    f"the timesteps were tuned for the weights {tuned[:12]}, and are used with "
                    f"the weights {self.weights[:12]} (SHA-256)",
                    SamplingWarning,
                    stacklevel=2,
                )
        return ddim

    @cached_property
    def weights(self) -> str:
        """The SHA-256 of the weights; empty in half precision, where the rounded ones differ."""
        model = self.loaded.model
        if isinstance(model, nn.Module) and self.dtype is None:
            return provenance.digest(model)
        return ""

    def options(self, samples: int) -> dict[str, Any]:
        """Returns ``DDIM.sample``'s options for so many samples; none for a plain model."""
        options: dict[str, Any] = {} if self.dtype is None else {"dtype": self.dtype}
        if self.label is not None:
            options["cond"] = self.labels(self.label, samples)
        if self.guidance is not None:
            assert self.no_class is not None
            options |= {
                "uncond": self.labels(self.no_class, samples),
                "guidance": self.guidance,
            }
        return options

    def labels(self, label: int, samples: int) -> dict[str, torch.Tensor]:
        """Returns the keyword argument of a class-conditional network."""
        return {"class_labels": torch.full((samples,), label, device=self.device)}


def prepare(machine: Machine, network: Network, device: str | None = None) -> Prepared:
    """Loads the model, moves it to its device, and prints on stderr how its files were read.

    Args:
        device: the device if ``machine`` names none.

    Raises:
        ValueError, OSError: an option is not allowed, or a file cannot be read.
    """
    where = usable(machine, device)
    shape = None if network.shape is None else parse_shape(network.shape)
    if network.model is not None:
        loaded = checkpoints.build(network.model, shape)
    elif network.checkpoint is not None:
        with lean_imports():
            loaded = checkpoints.load(
                network.checkpoint, config=network.config, shape=shape, ema=network.ema
            )
    else:
        loaded = checkpoints.load(None, config=network.config, shape=shape)
    loaded = overruled(loaded, network)
    check_classes(loaded, network)
    dtype = None if network.dtype == DTYPES[0] else getattr(torch, network.dtype)
    if isinstance(loaded.model, nn.Module):
        loaded.model.to(where, dtype)
    if not machine.quiet and (network.checkpoint is not None or network.model is not None):
        print(f"{loaded.description}\n{taken_for(loaded)}", file=sys.stderr)
    no_class = loaded.null_class if network.no_class is None else network.no_class
    guidance = None if network.guidance is None else parse_number("guidance", network.guidance)
    return Prepared(loaded, where, dtype, network.label, guidance, no_class)


def usable(machine: Machine, device: str | None = None) -> torch.device:
    """Returns the device, and sets the number of threads."""
    if machine.threads is not None:
        torch.set_num_threads(machine.threads)
    name = machine.device or device or devices.preferred_device()
    return devices.usable_device(name, computes=True)


def overruled(loaded: checkpoints.Loaded, network: Network) -> checkpoints.Loaded:
    """Returns ``loaded`` with the schedule and the prediction of the command line."""
    if network.prediction is not None:
        loaded = replace(loaded, prediction=checked_prediction(network.prediction))
    if network.schedule is None and network.levels is None:
        return loaded
    name = network.schedule or loaded.schedule.name.partition("(")[0]
    known = name in SCHEDULES and SCHEDULES[name](len(loaded.schedule)).name == loaded.schedule.name
    if network.schedule is None and not known:
        raise ValueError(
            f"train-steps must be given with schedule, got {network.levels} for a model on "
            f"{loaded.schedule.name} noise"
        )
    levels = network.levels or len(loaded.schedule)
    return replace(loaded, schedule=SCHEDULES[name](levels))


def taken_for(loaded: checkpoints.Loaded) -> str:
    """Returns a line on the prediction and schedule: no error would show if these were wrong."""
    return (
        f"it is taken to predict {loaded.prediction} on {loaded.schedule.name} noise, "
        f"T = {len(loaded.schedule)} (--prediction, --schedule and --train-steps change this)"
    )


def check_classes(loaded: checkpoints.Loaded, network: Network) -> None:
    """Raises ``ValueError`` unless a class-conditional network, and no other, has a class."""
    if loaded.classes is None:
        if network.label is not None:
            raise ValueError(
                f"class must be left out with a network without classes, got {network.label} "
                f"(a --model with classes returns a Loaded whose classes are set)"
            )
        return
    if network.label is None:
        raise ValueError(
            f"class must be an integer in [0, {loaded.classes - 1}] for a network of "
            f"{loaded.classes} classes, got none: add --class"
        )
    whole("class", network.label, low=0, high=loaded.classes - 1)
    if network.no_class is not None:
        whole("no-class", network.no_class, low=0, high=loaded.classes - 1)
    if network.guidance is not None and network.no_class is None and loaded.null_class is None:
        raise ValueError(
            f"no-class must be given with guidance, got none: the class in "
            f"[0, {loaded.classes - 1}] that means no class in this network"
        )


@contextmanager
def lean_imports() -> Iterator[None]:
    """Hides the packages ``HIDDEN`` from diffusers' import, and its messages below errors.

    Modules that are already imported stay, and the others can be imported again afterwards.
    """
    # diffusers decides at its import which packages there are; hidden later, they fail as it loads.
    late = "diffusers" in sys.modules
    hidden = [] if late else [name for name in HIDDEN if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type] # None: the import fails
    given = os.environ.get(VERBOSITY)
    os.environ.setdefault(VERBOSITY, "error")  # diffusers reads it once, when it is imported
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if given is None:
            os.environ.pop(VERBOSITY, None)
        for name in hidden:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)
