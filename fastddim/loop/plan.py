"""A plan orders the rows of a loop; a row holds everything that its step reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastddim.coefficients import COLUMNS_2, PREDICTIONS, Float32, Prediction, make_table
from fastddim.levels import GaussianPath, Levels
from fastddim.loop.model import Predictor
from fastddim.step.arguments import OUTPUTS
from fastddim.step.bound import watched
from fastddim.timesteps import Pair

_C1, _KAPPA = COLUMNS_2.index("c1"), COLUMNS_2.index("kappa")


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A sampler decides this before it sees a tensor: its table, and the order of its rows.

    Attributes:
        table: the coefficients, of order 1.
        second: the coefficients of order 2, for steps that follow another step; None at order 1.
        order: the rows to take, in order.
        times: the t that the model is called with, by the table's rows.
        noise_scale: the standard deviation of the noise that the first row begins with.
        pairs: the (from, to) levels of each row.
        preserving: whether α² + σ² = 1 on the path.
        shift: the factor of cond_fn's gradient in each row; None without a cond_fn.
        prediction, clip: the step's options of these names.
        conversion: for a loop that runs backwards, the table by which a step turns the model's
            output into ε, or into x0 in the rows of ``by_x0``; None forwards.
        by_x0: for a loop that runs backwards, whether a row keeps the model's x0 and computes ε
            from x_s, instead of keeping ε.
        forward: returns the table from clean data to each row's t and to the final s. It is None
            for a loop that runs backwards, which does not inpaint.
    """

    table: Float32
    order: range
    times: npt.NDArray[Any]
    pairs: tuple[Pair, ...]
    shift: Float32 | None
    prediction: Prediction
    clip: float | None
    conversion: Float32 | None = None
    by_x0: tuple[bool, ...] = ()
    forward: Callable[[], Float32] | None = None
    second: Float32 | None = None
    noise_scale: float = 1.0
    preserving: bool = True

    @property
    def backwards(self) -> bool:
        return self.conversion is not None

    @cached_property
    def noisy(self) -> list[bool]:
        """For each row, whether its step adds noise."""
        return (self.table[:, _C1] != 0).tolist()  # type: ignore[no-any-return]

    @cached_property
    def step_predictions(self) -> list[int]:
        """For each row, the prediction that its step receives, by its place in ``PREDICTIONS``."""
        if self.backwards:
            return [PREDICTIONS.index("sample" if x0 else "epsilon") for x0 in self.by_x0]
        return [PREDICTIONS.index(self.prediction)] * len(self.table)

    @cached_property
    def kinds(self) -> list[int]:
        """The kind of each row, without guidance and without a next input."""
        both = zip(self.step_predictions, self.noisy, strict=True)
        return [16 * prediction + adds for prediction, adds in both]

    @cached_property
    def extrapolates(self) -> list[bool]:
        """For each row, whether its step of order 2 reads the x0 of the step before."""
        if self.second is None:
            return [False] * len(self.table)
        return (self.second[:, _KAPPA] != 0).tolist()  # type: ignore[no-any-return]

    @cached_property
    def _on_cpu(self) -> Tensor:
        # A tensor that is made in inference mode could not be used outside of it.
        with torch.inference_mode(False):
            return torch.tensor(self.table, device="cpu")

    def table_on(self, device: torch.device) -> Tensor:
        """Returns the table as steps read it. On a CPU all runs share one, which none writes."""
        # A tensor that a dispatch mode makes (a fake one, say) is unusable outside of the mode.
        if device.type != "cpu" or watched():
            return torch.tensor(self.table, device=device)
        return self._on_cpu

    def lines(self) -> list[str]:
        """Returns the levels and the factors of each row as a table of text."""
        names, columns = ["√ᾱ_t", "√ᾱ_s", "c1", "c2"], [0, 4, _C1, 6]
        if not self.preserving:
            names, columns = ["α_t", "σ_t", "α_s", "c1", "c2"], [0, 2, 4, _C1, 6]
        numbers = self.table[:, columns].tolist()
        if self.second is not None:
            names.append("κ")
            numbers = [[*n, k] for n, k in zip(numbers, self.second[:, _KAPPA], strict=True)]
        heads = "".join(f"{name:>11}" for name in names)
        width = 6 if all(isinstance(t, int) for t, _ in self.pairs) else 10
        return [f"{'row':>5}{'t':>{width}}{'s':>{width}}{heads}"] + [
            f"{row:>5}{t:>{width}.4g}{s:>{width}.4g}"
            + "".join(f"{number:>11.6f}" for number in numbers[row])
            for row, (t, s) in enumerate(self.pairs)
        ]


def plan_of(
    schedule: GaussianPath,
    pairs: tuple[Pair, ...],
    table: Float32,
    prediction: Prediction,
    clip: float | None,
    *,
    order: int,
    settings: tuple[Any, ...],
) -> Plan:
    """Returns the plan of all of a sampler's rows, from noise to data.

    ``settings`` are η, the final ᾱ and the temperature, from which ``table`` was made.
    """
    t = [t for t, _ in pairs]
    return Plan(
        table=table if order == 1 else make_table(schedule, pairs, *settings),
        second=table if order == 2 else None,
        order=range(len(pairs)),
        times=schedule.times(t),
        pairs=pairs,
        preserving=schedule.at(t).preserving,
        shift=None,
        prediction=prediction,
        clip=clip,
        noise_scale=schedule.noise_scale(t[0]),
        forward=partial(forward_table, schedule, pairs),
    )


def forward_table(schedule: GaussianPath, pairs: Sequence[Pair]) -> Float32:
    """Returns the table whose rows lead from clean data to each t, and to the final s.

    If the final s is −1, the last row is not used: clean data takes no noise.
    """
    t = [t for t, _ in pairs]
    last = pairs[-1][1]
    return make_table(schedule, [(-1, i) for i in (*t, last if last >= 0 else t[-1])])


def gradient_factors(at: Levels, prediction: Prediction) -> Float32:
    """Returns the factor of cond_fn's gradient at each level, in terms of the model's output.

    ε becomes ε − σ_t·∇ (Dhariwal and Nichol 2021, algorithm 2); v, x0 and ε − x0 follow from ε.
    """
    alpha, sigma = at.alpha, at.sigma
    # Where α is 0 a factor is infinite, and ``prepare`` refuses a cond_fn.
    with np.errstate(divide="ignore"):
        ratio = -sigma / alpha
        factors = {"epsilon": -sigma, "v": ratio, "flow": ratio, "sample": sigma**2 / alpha}
    return factors[prediction].astype(np.float32)


class Row(NamedTuple):
    """A step reads this. All tensors are on the device before the first model call."""

    number: int
    """The row of the table."""
    pair: Pair
    """The step goes from the first of these levels to the second."""
    table_index: int | Tensor
    """``number`` as the step takes it: int32 (batch,) in a graph that counts its rows."""
    t: Tensor
    """The t of each sample, int64 (batch,), on a continuous path float32."""
    model_t: Tensor
    """The t that the model is called with: ``t``, or ``t`` twice with guidance."""
    guidance: Tensor | None
    """w, float32 (batch,), where the model is called with twice the batch, and None elsewhere."""
    shift: Tensor | None
    """The factor of cond_fn's gradient, float32 ()."""
    noisy: bool
    """True if the step adds noise."""
    extrapolates: bool
    """True if the step of order 2 reads the x0 of the step before."""
    feeds: int
    """The step writes this many copies of the batch for the next model call, or none."""
    prediction: int
    """The prediction that the step receives, by its place in ``PREDICTIONS``."""
    kind: int
    """Rows of one kind pass the step the same arguments: noise, w, the next input, ε or x0."""


def rows_of(
    plan: Plan, predictor: Predictor, guidance: Tensor | None, inpainted: bool
) -> tuple[Row, ...]:
    """Returns the rows of ``plan`` in its order; ``guidance`` is w (rows, batch) on the device."""
    batch, device, count = predictor.batch, predictor.device, len(plan.table)
    # Each run has levels of its own, because a model may write into its arguments.
    levels = torch.tensor(plan.times, device=device).unsqueeze(1)
    once = levels.expand(-1, batch).unbind()
    none: list[Any] = [None] * count
    shifts = none if plan.shift is None else torch.tensor(plan.shift, device=device).unbind()
    # A float32 model that gets each sample once takes x itself, so a step writes no input for it.
    dtype = predictor.dtype
    writable = dtype in OUTPUTS and not inpainted
    model_t, w = once, none
    if guidance is None and (dtype == torch.float32 or not writable):
        feeds, kinds = [0] * count, plan.kinds
    else:
        # Where w is 1 for every sample, the model gets the condition alone: it then does half the
        # work, and c is exact, which u + 1·(c − u) is not.
        guided = [False] * count if guidance is None else (guidance != 1).any(1).tolist()
        if guidance is not None:
            twice = levels.expand(-1, 2 * batch).unbind()
            model_t = tuple((twice if double else once)[i] for i, double in enumerate(guided))
            w = [row if double else None for row, double in zip(guidance, guided, strict=True)]
        fed = [writable and (double or dtype != torch.float32) for double in guided]
        feeds = [0] * count
        for i, following in pairwise(plan.order):
            feeds[i] = fed[following] * (1 + guided[following])
        alike = zip(plan.kinds, feeds, guided, strict=True)
        kinds = [kind + 4 * copies + 2 * double for kind, copies, double in alike]
    numbers = range(count)
    columns = (
        *(numbers, plan.pairs, numbers, once, model_t, w, shifts),
        *(plan.noisy, plan.extrapolates, feeds, plan.step_predictions, kinds),
    )
    rows = list(map(Row._make, zip(*columns, strict=True)))
    return tuple([rows[i] for i in plan.order])
