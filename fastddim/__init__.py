"""fastddim: the DDIM sampler you put in place of your loop."""

from typing import TYPE_CHECKING

from fastddim.coefficients import make_table as make_table
from fastddim.dropins.ermongroup import generalized_steps as generalized_steps
from fastddim.latents import slerp as slerp
from fastddim.ops import ddim_step as ddim_step
from fastddim.sampler import DDIM as DDIM
from fastddim.sampler import Step as Step
from fastddim.schedule import NoiseSchedule as NoiseSchedule
from fastddim.timesteps import make_pairs as make_pairs
from fastddim.trajectory import Trajectory as Trajectory

if TYPE_CHECKING:
    from fastddim.generate import generate as generate
else:
    from fastddim import generate as generate  # the module, which is called as the function

__version__ = "0.1.0"
