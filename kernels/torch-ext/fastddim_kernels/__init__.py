"""Triton kernels of fastddim: one DDIM step in one pass over memory, with its noise."""

from .launch import COLUMNS, BoundStep, bind, ddim_step, normal_, pixel_spacing

__all__ = ["COLUMNS", "BoundStep", "bind", "ddim_step", "normal_", "pixel_spacing"]
