"""The loop, from noise to data and from data to noise: generators that read like the paper."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeAlias

from torch import Tensor

from fastddim.loop.plan import Row
from fastddim.loop.run import Run

State: TypeAlias = tuple[Row, Tensor, Tensor | None]
"""A row, the state after its step, and the x0 that the step predicted, or None."""
States: TypeAlias = Generator[State, Tensor | None, None]


def denoise(run: Run, x_T: Tensor | None = None, *, wants_x0: bool = False) -> States:
    """Yields (row, x_s, x0) after each step. A tensor that the caller sends replaces x_s.

    Everything that the loop reads is on the device before the first step.
    """
    x, stepper = run.begin(x_T, wants_x0)
    for row in run.progress(run.rows):  # τ_S → τ_1
        output = stepper.predict(x, row)
        x, x0 = stepper.step(x, output, row)
        del output  # Drop our reference so that the next step can reuse this buffer.
        replacement = yield row, x, x0
        if replacement is not None:
            x = replacement
            yield row, x, x0  # This is what send returns.


def invert(run: Run, refine: int, *, wants_x0: bool = False) -> States:
    """Yields (row, x_t, x0) after each step of the loop that runs backwards.

    x_t is the fixed point of x_s = step(x_t); each of ``refine`` iterations brings it closer.
    """
    x, stepper = run.begin(None, wants_x0)
    for row in run.progress(run.rows):  # τ_1 → τ_S
        y, x0 = stepper.step(x, stepper.predict(x, row), row)
        for _ in range(refine):
            y, x0 = stepper.step(x, stepper.predict(y, row), row)
        x = y
        del y
        yield row, x, x0
