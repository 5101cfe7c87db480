"""A program holds the rows that one sampler's requests step through, in the order of the steps."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastddim.coefficients import COLUMNS_OF_MANY, PREDICTIONS, Float32
from fastddim.loop.plan import Plan
from fastddim.loop.sampler import DDIM

_C1, _KAPPA = COLUMNS_OF_MANY.index("c1"), COLUMNS_OF_MANY.index("kappa")


@dataclass(frozen=True, eq=False)
class Program:
    """The rows of one sampler from one ``start``, or of its loop backwards.

    Attributes:
        key: equal programs have equal keys.
        rows: float32 (steps, 9), of ``COLUMNS_OF_MANY``.
        times: the t that the model is called with, (steps,).
        all_times: the t of all of the sampler's rows, which ``guidance`` counts.
        numbers: the place of each step among the sampler's rows.
        noise_scale: the standard deviation of the noise that the first row begins with.
        noisy: whether any step adds noise.
        remembers: whether any step reads the x0 of the step before.
    """

    key: Hashable
    rows: Float32
    times: npt.NDArray[Any]
    all_times: npt.NDArray[Any]
    numbers: range
    noise_scale: float
    noisy: bool
    remembers: bool

    def __len__(self) -> int:
        return len(self.rows)


def program_of(ddim: DDIM, start: int, reverse: bool, until: int | None) -> Program:
    """Returns the rows from ``start`` on, or with ``reverse`` from the last row up to ``until``.

    Raises:
        ValueError: the sampler has no such rows, or its loop backwards cannot be taken by the
            fused step alone.
    """
    plan = ddim._reverse_plan(until, False) if reverse else ddim._plan(start, False)
    if reverse:
        _check_one_pass(plan)
    order = list(plan.order)
    rows = np.zeros((len(order), len(COLUMNS_OF_MANY)), np.float32)
    rows[:, :_KAPPA] = plan.table[order]
    if plan.second is not None:  # The first step has no x0 of a step before.
        rows[1:, : _KAPPA + 1] = plan.second[order[1:]]
    rows[:, _KAPPA + 1] = order
    return Program(
        (ddim, start, reverse, until),
        rows,
        plan.times[order],
        plan.times,
        plan.order,
        plan.noise_scale,
        bool((rows[:, _C1] != 0).any()),
        bool((rows[:, _KAPPA] != 0).any()),
    )


def _check_one_pass(plan: Plan) -> None:
    """Refuses a loop backwards whose steps convert the model's output before they use it."""
    own = PREDICTIONS.index(plan.prediction)
    for row in plan.order:
        if plan.step_predictions[row] != own:
            needed = PREDICTIONS[plan.step_predictions[row]]
            raise ValueError(
                f"reverse needs a model whose prediction is {needed!r} in row {row}, which an "
                f"engine does not convert, got {plan.prediction!r}: call DDIM.invert"
            )
