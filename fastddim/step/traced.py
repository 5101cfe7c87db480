"""The step as plain maths, which torch.compile traces and fuses with the operations around it."""

from __future__ import annotations

from torch import Tensor

from fastddim.coefficients import PREDICTIONS
from fastddim.step import reference
from fastddim.step.backends import Fixed


def traced_step(
    fixed: Fixed,
    x: Tensor,
    output: Tensor,
    table: Tensor,
    rows: Tensor,
    noise: Tensor | None = None,
    guidance: Tensor | None = None,
    threshold: Tensor | None = None,
    history: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (x_s, x0) by the reference's operations.

    ``rows`` is an integer tensor of shape (1,) or (batch,) on the table's device. A number would be
    a constant of the graph: torch.compile would compile anew for each step.
    """
    row = table.index_select(0, rows)
    ones = (1,) * (x.dim() - 1)
    # A row of no dimensions leaves a half precision state in its dtype, as a number does.
    row = row[0] if rows.shape[0] == 1 else row.view(rows.shape[0], *ones, -1)
    return reference.ddim_step(
        x,
        output,
        row,
        noise,
        PREDICTIONS[fixed.prediction],
        fixed.clip,
        fixed.noise_first,
        None if guidance is None else guidance.view(guidance.shape[0], *ones),
        None if threshold is None else threshold.view(threshold.shape[0], *ones),
        fixed.rederive,
        history,
        fixed.posterior,
        fixed.rounding,
    )
