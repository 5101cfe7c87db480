"""One step: the equation, the backends that take it, and the checks before it."""

from fastddim.step.checked import BoundStep, bind, ddim_step

__all__ = ("BoundStep", "bind", "ddim_step")
