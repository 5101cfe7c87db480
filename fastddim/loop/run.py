"""A run holds the checked arguments of a loop; its stepper takes the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import InitVar, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastddim.coefficients import PREDICTIONS, Prediction
from fastddim.loop.inpaint import Known
from fastddim.loop.model import Predictor
from fastddim.loop.normals import Noise
from fastddim.loop.plan import Row
from fastddim.step.backends import Fixed, Launch, backend, chosen
from fastddim.step.bound import by_op_again, is_plain, moded, profiled, step_of, watched
from fastddim.step.buffers import FRESH, Spare
from fastddim.step.checked import ddim_step
from fastddim.step.layout import input_like


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """The arguments of one run of the loop, checked and on the device. A run never changes.

    Attributes:
        x: the state to begin with; the first loop takes it.
        made: True if the loop allocated x and may overwrite it.
        predictor: the model and the arguments of its calls.
        table: the coefficients, of order 1.
        second: the coefficients of order 2, or None.
        rows: the steps to take, in order.
        prediction, clip: the step's options of these names.
        conversion: for a loop that runs backwards, the table by which a step turns the model's
            output into ε or x0, guidance included; None forwards.
        guidance: w, float32 (rows of the table, batch), or None.
        noise: the source of z.
        known: the part of the image that is known, for inpainting.
        dtype: the result's dtype.
        progress: the function that wraps the rows.
    """

    x: InitVar[Tensor]
    made: bool
    predictor: Predictor
    table: Tensor
    second: Tensor | None
    rows: tuple[Row, ...]
    prediction: Prediction
    clip: float | None
    conversion: Tensor | None
    guidance: Tensor | None
    noise: Noise
    known: Known | None
    dtype: torch.dtype
    progress: Callable[[Iterable[Any]], Iterable[Any]]
    _start: list[Tensor] = field(init=False, repr=False)
    """Holds x until a loop takes it. A field would keep the loop from reusing x."""

    def __post_init__(self, x: Tensor) -> None:
        object.__setattr__(self, "_start", [x])

    def begin(self, x: Tensor | None = None, wants_x0: bool = False) -> tuple[Tensor, Stepper]:
        """Returns the x to begin with, and the stepper that continues from it.

        Args:
            x: the state to begin with instead of the run's own x. The loop never writes it.
            wants_x0: whether each step returns x0.
        """
        made = self.made and x is None
        x = self._start.pop() if x is None else x
        stepper = Stepper(self, wants_x0)
        stepper.allocate(x, made, self.rows)
        if self.known is not None:
            x = self.known.put_back(x, self.rows[0].number, self.noise)
        return x, stepper

    @property
    def remembers(self) -> bool:
        """True if the next step or the next model call reads the x0 of the step before."""
        return self.second is not None or self.predictor.self_condition is not None

    def step_between(
        self,
        row: Row,
        x: Tensor,
        x_in: Tensor | None,
        x0: Tensor | None,
        out: Tensor,
        next_input: Tensor | None,
        x0_out: Tensor,
    ) -> None:
        """Takes one step between given buffers, as a graph of one step does.

        Args:
            row: the row to step from.
            x: the state.
            x_in: the state in the model's dtype, or None.
            x0: the x0 of the last step, or None.
            out: the buffer for the next state.
            next_input: the buffer for the next model input, if the row writes one.
            x0_out: the buffer for x0, with self-conditioning and at order 2.
        """
        stepper = Stepper(self)
        stepper.use(x, x_in, x0, out, next_input, x0_out)
        stepper.step(x, stepper.predict(x, row), row)

    def empty_result(self) -> Tensor:
        """Returns an empty tensor for the result, laid out as x is."""
        return torch.empty_like(self._start[0], dtype=self.dtype)

    def part(self, samples: Tensor, progress: Callable[[Iterable[Any]], Iterable[Any]]) -> Run:
        """Returns the run for some of the samples."""
        n = len(samples)
        some = None if self.guidance is None else self.guidance[:, samples]

        def narrowed(row: Row) -> Row:
            w = None if row.guidance is None or some is None else some[row.number]
            model_t = row.t[:1].expand(n if w is None else 2 * n)
            return row._replace(t=row.t[:1].expand(n), model_t=model_t, guidance=w)

        return replace(
            self,
            x=self._start[0][samples],
            made=True,
            predictor=self.predictor.part(samples),
            rows=tuple(narrowed(row) for row in self.rows),
            guidance=some,
            noise=self.noise.part(samples),
            known=None if self.known is None else self.known.part(samples),
            progress=progress,
        )


class Stepper:
    """Calls the model and takes the steps of a run, and holds the buffers of both.

    A stepper copies the run's attributes, since each name that a step looks up costs host time.
    """

    __slots__ = (
        "_backend",
        "_chosen",
        "_clip",
        "_compiled",
        "_conversion",
        "_direct",
        "_input",
        "_inputs",
        "_known",
        "_launches",
        "_made",
        "_noise",
        "_prediction",
        "_predictor",
        "_reached",
        "_remembers",
        "_second",
        "_states",
        "_table",
        "_wants_x0",
        "_x0",
        "_x0s",
        "_z",
    )

    def __init__(self, run: Run, wants_x0: bool = False) -> None:
        self._predictor, self._noise, self._known = run.predictor, run.noise, run.known
        self._table, self._conversion, self._clip = run.table, run.conversion, run.clip
        self._prediction = PREDICTIONS.index(run.prediction)
        self._direct = run.predictor.dtype == torch.float32
        """True if the state itself is the model's input without guidance."""
        self._second = run.second
        self._remembers = run.remembers
        self._wants_x0 = wants_x0 or self._remembers
        self._backend, self._chosen = backend(run.predictor.device), chosen()
        self._launches: dict[int, tuple[Any, ...]] = {}
        """The launch of each kind of row, and the dtype, shape and strides of its output."""
        self._states: Spare | None = None
        self._x0s: Spare | None = None
        """Buffers that earlier steps wrote. None where fresh memory costs no more."""
        self._inputs: dict[int, Spare] = {1: Spare(), 2: Spare()}
        """Buffers for the model's inputs, by the copies of the batch in them."""
        self._made: Tensor | None = None
        """The latest state, if the loop may overwrite it."""
        self._input: Tensor | None = None
        """``_made`` as the model's input."""
        self._x0: Tensor | None = None
        """The last x0, for a model that is conditioned on it and for a step of order 2."""
        self._reached: Tensor | None = None
        """The state that the last step returned. Another one has no x0 of a step before."""
        self._z: Tensor | None = None
        """The last z. A generator writes the next one into it."""

    def allocate(self, x: Tensor, made: bool, rows: Sequence[Row]) -> None:
        """On a CPU, allocates the buffers of the steps of ``rows`` before the first model call."""
        self._made = x if made else None
        if x.device.type != "cpu":
            return
        if x.numel() >= FRESH:
            self._states = Spare(*(torch.empty_like(x) for _ in range(1 if made else 2)))
            self._x0s = Spare(*(torch.empty_like(x) for _ in range(2 * self._remembers)))
        for copies in {row.feeds for row in rows} - {0}:
            self._inputs[copies] = Spare(input_like(x, self._predictor.dtype, copies))

    def use(
        self,
        x: Tensor,
        x_in: Tensor | None,
        x0: Tensor | None,
        out: Tensor,
        next_input: Tensor | None,
        x0_out: Tensor,
    ) -> None:
        """Sets the state and the memory of the next step: see ``Run.step_between``."""
        self._made, self._input, self._x0, self._reached = x, x_in, x0, x
        self._states, self._x0s = _Fixed(out), _Fixed(x0_out)
        if next_input is not None:
            self._inputs = dict.fromkeys((1, 2), _Fixed(next_input))

    def predict(self, x: Tensor, row: Row) -> Tensor:
        """Returns the model's output; backwards, ε or x0 computed from the output."""
        twice = row.guidance is not None
        x_in, self._input = self._input, None
        written = x_in is not None and x is self._made and len(x_in) == len(row.model_t)
        if x_in is None or not written:
            x_in = x if self._direct and not twice else self._predictor.input(x, twice)
        output = self._predictor(x_in, row.model_t, self._x0, twice)
        if written:  # Keep only inputs that a step wrote; others may have other strides.
            self._inputs[1 + twice].keep(x_in)
        if row.shift is not None:
            output = self._predictor.shifted(output, x, row.t, row.shift)
        if self._conversion is None:
            return output
        if row.prediction == self._prediction and row.guidance is None:
            return output
        # A step with the factors 0·x0 + 1·ε turns any output into ε, and 1·x0 + 0·ε into x0.
        converted, _ = ddim_step(
            x,
            output,
            self._conversion,
            row.table_index,
            guidance=row.guidance,
            prediction=PREDICTIONS[self._prediction],
            want_x0=False,
        )
        return converted

    def step(self, x: Tensor, output: Tensor, row: Row) -> tuple[Tensor, Tensor | None]:
        """Returns (x_s, x0). The model's next input is written in the same pass over memory."""
        if x is not self._made:
            self._check_layout(x)
        seeds = z = into = x0 = history = None
        table, kind = self._table, row.kind
        if row.extrapolates and self._x0 is not None and x is self._reached:
            assert self._second is not None
            table, kind, history = self._second, kind + _OF_ORDER_2, self._x0
        if row.noisy:
            seeds, z = self._noise.step(row.number, self._z)
            self._z = z
        if row.feeds:
            into = self._inputs[row.feeds].take()
            if into is None:
                into = input_like(x, self._predictor.dtype, row.feeds)
        x_s = None if self._states is None else self._states.take()
        if x_s is None:
            x_s = torch.empty_like(x)
        if self._wants_x0:
            x0 = None if self._x0s is None else self._x0s.take()
            if x0 is None:
                x0 = torch.empty_like(x)
        w = row.guidance if self._conversion is None else None
        # The stepper allocates all tensors but the output, so only the output's strides may differ
        # from those at the time when a row of this kind was bound.
        dtype, shape, stride, launch = self._launches.get(kind, _NONE)
        if (
            output.dtype is not dtype
            or output.shape != shape
            or output.stride() != stride
            or output.__class__ is not Tensor
            or output.is_neg()
            or output._is_zerotensor()
            or moded()
            or profiled()
        ):
            launch = self._bound(
                kind,
                row,
                x,
                output,
                table,
                row.table_index,
                seeds,
                z,
                w,
                None,
                x_s,
                x0,
                into,
                history,
            )
        launch(x, output, table, row.table_index, seeds, z, w, None, x_s, x0, into, history)
        if x is self._made and self._states is not None:
            self._states.keep(x)
        if self._remembers:
            if self._x0 is not None and self._x0s is not None:
                self._x0s.keep(self._x0)
            self._x0 = x0
        self._made, self._input = x_s, into
        if self._known is not None:
            x_s = self._known.put_back(x_s, row.number + 1, self._noise)
        self._reached = x_s
        return x_s, x0

    def _bound(self, kind: int, row: Row, x: Tensor, output: Tensor, *rest: Any) -> Launch:
        """Binds the step, and keeps the launch if all rows of this kind will have these strides."""
        fixed = Fixed(row.prediction, True, self._clip, False)
        step = step_of(self._backend, fixed, x.device)
        if watched():
            return partial(by_op_again, self._chosen, fixed)
        launch = step.launch(x, output, *rest)
        # A tensor of the caller's may have other strides than the next one: do not keep its launch.
        if is_plain(output) and x is self._made and self._noise.tensors is None:
            self._launches[kind] = output.dtype, output.shape, output.stride(), launch
        return launch

    def _check_layout(self, x: Tensor) -> None:
        """Forgets launches and buffers if the caller's state has other strides than the last."""
        if self._made is not None and self._made.stride() != x.stride():
            self._launches.clear()
            if self._states is not None:
                self._states = Spare()
            if self._x0s is not None:
                self._x0s = Spare()
            self._inputs = {1: Spare(), 2: Spare()}


_OF_ORDER_2 = 64
"""This much is added to a row's kind in a step that reads the x0 of the step before."""
_NONE: tuple[Any, ...] = None, None, None, None
"""The entry of a kind of row that is not bound yet."""


class _Fixed(Spare):
    """Gives the same buffer to every step, because a captured step writes fixed addresses."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self._tensor = tensor

    def keep(self, tensor: Tensor) -> None:
        pass

    def take(self) -> Tensor:
        return self._tensor
