"""The order of a loop's rows, and what the step of each row reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastddim.coefficients import COLUMNS, PREDICTIONS, Float32, Prediction
from fastddim.predict import Predictor
from fastddim.step import OUTPUTS
from fastddim.timesteps import Pair

_C1 = COLUMNS.index("c1")


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What a sampler decides before it sees a tensor: its table, and the order of its rows.

    Attributes:
        table: the coefficients.
        order: the rows that are taken.
        levels: the t that the model is called with, by the table's rows.
        pairs: the (from, to) levels of each row.
        shift: the factor of cond_fn's gradient in each row; None without a cond_fn.
        prediction, clip: what the step takes them to be.
        heard: for a loop that runs backwards, the table by which the step's op makes ε of the
            model's output, or x0 in rows ``by_x0``; None forwards.
        by_x0: backwards, whether the model's x0 stays and ε follows from x_s, not the reverse.
        forward: makes the table from clean data to each row's t and to the final s. None
            backwards, where nothing is inpainted.
    """

    table: Float32
    order: range
    levels: tuple[int, ...]
    pairs: tuple[Pair, ...]
    shift: Float32 | None
    prediction: Prediction
    clip: float | None
    heard: Float32 | None = None
    by_x0: tuple[bool, ...] = ()
    forward: Callable[[], Float32] | None = None

    @property
    def backwards(self) -> bool:
        return self.heard is not None

    @cached_property
    def noisy(self) -> list[bool]:
        """Whether each row adds noise."""
        return (self.table[:, _C1] != 0).tolist()  # type: ignore[no-any-return]

    @cached_property
    def _on_cpu(self) -> Tensor:
        with torch.inference_mode(False):  # which would leave a tensor for that mode alone
            return torch.tensor(self.table, device="cpu")

    def table_on(self, device: torch.device) -> Tensor:
        """The table as the steps read it: on a CPU one tensor for all runs, which nobody writes."""
        return self._on_cpu if device.type == "cpu" else torch.tensor(self.table, device=device)


class Row(NamedTuple):
    """What one step reads. All of it is on the device before the first model call."""

    number: int
    pair: Pair
    """The levels that the step goes from and to."""
    rows: int | Tensor
    """``number``, as the step takes it: in a graph that counts its rows int32 (batch,)."""
    t: Tensor
    """The level that the model is called with, int64 (batch,)."""
    asked: Tensor
    """t for each sample that the model is given: twice the batch with guidance."""
    guidance: Tensor | None
    """w, float32 (batch,), where the model is given twice the batch."""
    shift: Tensor | None
    """The factor of cond_fn's gradient, float32 ()."""
    noisy: bool
    """Whether the step adds noise."""
    feeds: int
    """How many copies of the batch the step writes for the next model call; 0 if it writes none."""
    prediction: int
    """What the step is given, by its place in ``PREDICTIONS``."""
    kind: int
    """Rows of one kind have the same arguments of the step: noise, w, the next input, ε or x0."""


def rows_of(
    plan: Plan, predictor: Predictor, guidance: Tensor | None, inpainted: bool
) -> tuple[Row, ...]:
    """The rows of ``plan`` in its order. ``guidance``: w (rows, batch), on the device."""
    batch, device, count = predictor.batch, predictor.device, len(plan.table)
    # Fresh memory each time: the model is given it.
    levels = torch.tensor(plan.levels, device=device).unsqueeze(1)
    once = levels.expand(-1, batch).unbind()
    # Where w is 1 for every sample the condition alone is asked: half the work, and c exactly.
    guided = [False] * count if guidance is None else (guidance != 1).any(1).tolist()
    none: list[Any] = [None] * count
    asked, w = once, none
    if guidance is not None:
        twice = levels.expand(-1, 2 * batch).unbind()
        asked = tuple((twice if double else once)[i] for i, double in enumerate(guided))
        w = [row if double else None for row, double in zip(guidance, guided, strict=True)]
    # A float32 model that is given each sample once takes x itself.
    dtype = predictor.dtype
    writable = dtype in OUTPUTS and not inpainted
    fed = [writable and (double or dtype != torch.float32) for double in guided]
    feeds = [0] * count
    for i, following in pairwise(plan.order):
        feeds[i] = fed[following] * (1 + guided[following])
    given = [PREDICTIONS.index(plan.prediction)] * count
    if plan.backwards:
        given = [PREDICTIONS.index("sample" if x0 else "epsilon") for x0 in plan.by_x0]
    alike = zip(plan.noisy, guided, feeds, given, strict=True)
    kinds = [16 * said + 4 * copies + 2 * double + adds for adds, double, copies, said in alike]
    columns = (
        range(count),
        plan.pairs,
        range(count),
        once,
        asked,
        w,
        none if plan.shift is None else torch.tensor(plan.shift, device=device).unbind(),
        plan.noisy,
        feeds,
        given,
        kinds,
    )
    rows = list(map(Row, *columns))
    return tuple([rows[i] for i in plan.order])
