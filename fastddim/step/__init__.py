"""One step: the equation, the checks of its arguments, and the backends that take it."""

from fastddim.step.checked import BoundStep, bind, ddim_step

__all__ = ("BoundStep", "bind", "ddim_step")
