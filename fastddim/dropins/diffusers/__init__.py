"""diffusers' schedulers (DDIM, DDPM, CogVideoX, DPM-Solver++, Euler): same calls, fewer passes.

    pipe.scheduler = FastDDIMScheduler.from_config(pipe.scheduler.config)

Assign the scheduler after constructing the pipeline: ``DDIMPipeline``'s constructor converts any
scheduler to diffusers' own.
"""

from __future__ import annotations

try:
    # diffusers loads a saved pipeline through this module, and looks SchedulerMixin up in it.
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
except ModuleNotFoundError as error:
    from fastddim.extras import explained

    raise explained(error) from None

from fastddim.dropins.diffusers.cogvideox import FastCogVideoXDDIMScheduler
from fastddim.dropins.diffusers.ddpm import FastDDPMScheduler
from fastddim.dropins.diffusers.euler_ancestral import FastEulerAncestralDiscreteScheduler
from fastddim.dropins.diffusers.flow_match import FastFlowMatchEulerDiscreteScheduler
from fastddim.dropins.diffusers.multistep import FastDPMSolverMultistepScheduler
from fastddim.dropins.diffusers.schedulers import (
    FastDDIMInverseScheduler,
    FastDDIMParallelScheduler,
    FastDDIMScheduler,
)

__all__ = (
    "FastCogVideoXDDIMScheduler",
    "FastDDIMInverseScheduler",
    "FastDDIMParallelScheduler",
    "FastDDIMScheduler",
    "FastDDPMScheduler",
    "FastDPMSolverMultistepScheduler",
    "FastEulerAncestralDiscreteScheduler",
    "FastFlowMatchEulerDiscreteScheduler",
    "SchedulerMixin",
)

for _class in (
    FastDDIMScheduler,
    FastDDIMParallelScheduler,
    FastDDIMInverseScheduler,
    FastDDPMScheduler,
    FastCogVideoXDDIMScheduler,
    FastDPMSolverMultistepScheduler,
    FastEulerAncestralDiscreteScheduler,
    FastFlowMatchEulerDiscreteScheduler,
):
    # diffusers writes ``__module__`` into saved pipelines: it must be this package's public path.
    _class.__module__ = __name__
