"""fastddim: the DDIM sampler you put in place of your loop.

    >>> import fastddim
    >>> from fastddim import embedded
    >>> ddim = fastddim.DDIM(steps=2)
    >>> images = ddim.sample(embedded.load(), shape=(4, 1, 28, 28), seeds=range(4))
    >>> images.shape
    torch.Size([4, 1, 28, 28])

``DDIM`` is the sampler, ``NoiseSchedule`` what a model was trained on, ``generate`` makes any
number of images in any number of processes, and ``generalized_steps`` replaces the function of
ermongroup/ddim. ``bind`` returns the step for a loop of one's own, and ``using`` chooses what takes
the steps. ``fastddim.embedded`` has a model that ships, ``fastddim.checkpoints`` loads
others, ``fastddim.dropins`` replaces the samplers of other systems, and ``fastddim.profile``
measures steps against η. Each name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastddim import checkpoints as checkpoints
    from fastddim import dropins as dropins
    from fastddim import embedded as embedded
    from fastddim import profile as profile
    from fastddim.backends import using as using
    from fastddim.check import SamplingWarning as SamplingWarning
    from fastddim.coefficients import make_table as make_table
    from fastddim.dropins.ermongroup import generalized_steps as generalized_steps
    from fastddim.generate import generate as generate
    from fastddim.latents import slerp as slerp
    from fastddim.sampler import DDIM as DDIM
    from fastddim.schedule import NoiseSchedule as NoiseSchedule
    from fastddim.step import bind as bind
    from fastddim.step import ddim_step as ddim_step
    from fastddim.timesteps import make_pairs as make_pairs
    from fastddim.trajectory import Step as Step
    from fastddim.trajectory import Trajectory as Trajectory

__version__ = "0.1.0"

__all__ = (
    "DDIM",
    "NoiseSchedule",
    "SamplingWarning",
    "Step",
    "Trajectory",
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
    "using",
)

_FROM = {
    "DDIM": "sampler",
    "NoiseSchedule": "schedule",
    "SamplingWarning": "check",
    "Step": "trajectory",
    "Trajectory": "trajectory",
    "bind": "step",
    "ddim_step": "step",
    "generalized_steps": "dropins.ermongroup",
    "make_pairs": "timesteps",
    "make_table": "coefficients",
    "slerp": "latents",
    "using": "backends",
}
"""The modules of the names that are no modules themselves.

``generate`` is one: the module can be called as the function of its name.
"""


def __getattr__(name: str) -> Any:
    """Imports ``name``. Torch alone takes a second, which ``fastddim --help`` need not wait for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_FROM.get(name, name)}")
    found = getattr(module, name) if name in _FROM else module
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
