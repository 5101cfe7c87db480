"""The Triton kernels of fastddim: one DDIM step and its noise in one pass over memory."""

from .checks import COLUMNS
from .geometry import pixel_spacing
from .launch import BoundStep, bind, ddim_step, normal_

__all__ = ["COLUMNS", "BoundStep", "bind", "ddim_step", "normal_", "pixel_spacing"]
