"""The sampling methods of openai's guided-diffusion and improved-diffusion, as functions.

    sample_fn = partial(guided.ddim_sample_loop, diffusion)  # was diffusion.ddim_sample_loop
    sample_fn = partial(guided.p_sample_loop, diffusion)  # was diffusion.p_sample_loop

Each function takes the diffusion object (the user's own, or a ``Diffusion``) and then the method's
own arguments. It returns the method's result, bit-identical in float32 on the same device.
"""

from __future__ import annotations

from fastddim.dropins.guided.diffusion import Diffusion as Diffusion
from fastddim.dropins.guided.loops import ddim_reverse_sample as ddim_reverse_sample
from fastddim.dropins.guided.loops import ddim_reverse_sample_loop as ddim_reverse_sample_loop
from fastddim.dropins.guided.loops import (
    ddim_reverse_sample_loop_progressive as ddim_reverse_sample_loop_progressive,
)
from fastddim.dropins.guided.loops import ddim_sample as ddim_sample
from fastddim.dropins.guided.loops import ddim_sample_loop as ddim_sample_loop
from fastddim.dropins.guided.loops import (
    ddim_sample_loop_progressive as ddim_sample_loop_progressive,
)
from fastddim.dropins.guided.loops import p_sample as p_sample
from fastddim.dropins.guided.loops import p_sample_loop as p_sample_loop
from fastddim.dropins.guided.loops import p_sample_loop_progressive as p_sample_loop_progressive
