"""diffusers' DDIM schedulers: the same configuration, the same calls, one pass a step.

    pipe.scheduler = FastDDIMScheduler.from_config(pipe.scheduler.config)

``DDIMPipeline`` makes a plain scheduler of whatever its constructor is given: assign afterwards.
"""

from __future__ import annotations

try:
    # A saved pipeline is loaded through this module, which must then know the classes' own base.
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
except ModuleNotFoundError as error:
    from fastddim.extras import explained

    raise explained(error) from None

from fastddim.dropins.diffusers.schedulers import (
    FastDDIMInverseScheduler,
    FastDDIMParallelScheduler,
    FastDDIMScheduler,
)

__all__ = (
    "FastDDIMInverseScheduler",
    "FastDDIMParallelScheduler",
    "FastDDIMScheduler",
    "SchedulerMixin",
)

for _class in (FastDDIMScheduler, FastDDIMParallelScheduler, FastDDIMInverseScheduler):
    # diffusers writes the module's name into saved pipelines, which therefore name this package.
    _class.__module__ = __name__
