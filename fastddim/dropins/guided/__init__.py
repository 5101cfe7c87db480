"""The DDIM methods of openai's guided-diffusion and improved-diffusion, as functions."""

from __future__ import annotations

from fastddim.dropins.guided.loops import Diffusion as Diffusion
from fastddim.dropins.guided.loops import _Step as _Step
from fastddim.dropins.guided.loops import _tables as _tables
from fastddim.dropins.guided.loops import ddim_reverse_sample as ddim_reverse_sample
from fastddim.dropins.guided.loops import ddim_sample as ddim_sample
from fastddim.dropins.guided.loops import ddim_sample_loop as ddim_sample_loop
from fastddim.dropins.guided.loops import (
    ddim_sample_loop_progressive as ddim_sample_loop_progressive,
)
