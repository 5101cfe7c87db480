"""fastddim: a DDIM sampler that replaces your sampling loop.

    >>> import fastddim
    >>> from fastddim import embedded
    >>> ddim = fastddim.DDIM(steps=2)
    >>> images = ddim.sample(embedded.load(), shape=(4, 1, 28, 28), seeds=range(4))
    >>> images.shape
    torch.Size([4, 1, 28, 28])

``DDIM`` is the sampler, and ``NoiseSchedule`` the noise levels that a model was trained on.
``Engine`` serves each ``Request`` in a slot of one batch, ``generate`` makes any number of images
in any number of processes, and ``generalized_steps`` replaces the function of ermongroup/ddim.
``bind`` returns the step for your own loop, and ``using`` chooses the steps' backend.
``fastddim.embedded`` has a small trained model, ``fastddim.checkpoints`` loads other models,
``fastddim.dropins`` replaces the samplers of other systems, and ``fastddim.profile`` measures steps
against η. A name is imported at its first use.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from fastddim._moved import Finder

if TYPE_CHECKING:
    from fastddim import dropins as dropins
    from fastddim import embedded as embedded
    from fastddim.check import SamplingWarning as SamplingWarning
    from fastddim.coefficients import make_table as make_table
    from fastddim.dropins.ermongroup import generalized_steps as generalized_steps
    from fastddim.latents import slerp as slerp
    from fastddim.loop.sampler import DDIM as DDIM
    from fastddim.loop.trajectory import Step as Step
    from fastddim.loop.trajectory import Trajectory as Trajectory
    from fastddim.models import checkpoints as checkpoints
    from fastddim.schedule import NoiseSchedule as NoiseSchedule
    from fastddim.serving.engine import Engine as Engine
    from fastddim.serving.order import QueueFull as QueueFull
    from fastddim.serving.request import Request as Request
    from fastddim.step.backends import using as using
    from fastddim.step.checked import bind as bind
    from fastddim.step.checked import ddim_step as ddim_step
    from fastddim.timesteps import make_pairs as make_pairs
    from fastddim.tools import profile as profile
    from fastddim.tools.shards import generate as generate
    from fastddim.tools.tuning import tune as tune
    from fastddim.tuned import Tuned as Tuned

__version__ = "0.1.0"

__all__ = (
    "DDIM",
    "Engine",
    "NoiseSchedule",
    "QueueFull",
    "Request",
    "SamplingWarning",
    "Step",
    "Trajectory",
    "Tuned",
    "bind",
    "checkpoints",
    "ddim_step",
    "dropins",
    "embedded",
    "generalized_steps",
    "generate",
    "make_pairs",
    "make_table",
    "profile",
    "slerp",
    "tune",
    "using",
)

_MODULES = {
    "checkpoints": "models.checkpoints",
    "dropins": "dropins",
    "embedded": "embedded",
    "generate": "tools.shards",
    "profile": "tools.profile",
}
"""The public names that are modules. The module ``generate`` can be called as the function."""

_FROM = {
    "DDIM": "loop.sampler",
    "Engine": "serving.engine",
    "NoiseSchedule": "schedule",
    "QueueFull": "serving.order",
    "Request": "serving.request",
    "SamplingWarning": "check",
    "Step": "loop.trajectory",
    "Trajectory": "loop.trajectory",
    "Tuned": "tuned",
    "bind": "step.checked",
    "ddim_step": "step.checked",
    "generalized_steps": "dropins.ermongroup",
    "make_pairs": "timesteps",
    "make_table": "coefficients",
    "slerp": "latents",
    "tune": "tools.tuning",
    "using": "step.backends",
}
"""The modules of the other public names."""


def __getattr__(name: str) -> Any:
    """Imports ``name`` at its first use: torch alone would add a second to ``fastddim --help``."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES.get(name) or _FROM[name]}")
    found = getattr(module, name) if name in _FROM else module
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.meta_path.append(Finder())
