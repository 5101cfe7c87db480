"""A tick: the model on all slots, one fused step, and each slot's row moves on."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastddim.loop.held import holding
from fastddim.loop.model import Predictor
from fastddim.loop.own_graphs import own_graphs_off
from fastddim.loop.recording import Memory, Replay, capture
from fastddim.serving.slots import Slots
from fastddim.serving.tables import Tables
from fastddim.step.backends import Fixed, Launch, backend, chosen
from fastddim.step.bound import by_op_again, is_plain, moded, profiled, step_of, watched

_NONE: tuple[Any, ...] = None, None, None, None


class Tick:
    """Takes one step of every slot. On CUDA each side of the slots' memory has a captured graph.

    The graphs of all ticks share ``memory``, which is None if the device has no graphs.

    Attributes:
        noisy: whether the step gets the seeds; set once a request adds noise.
    """

    def __init__(
        self,
        predictor: Predictor,
        slots: Slots,
        tables: Tables,
        fixed: Fixed,
        guided: bool,
        memory: Memory | None,
    ) -> None:
        self._predictor, self._slots, self._tables = predictor, slots, tables
        self._fixed, self._guided = fixed, guided
        device = predictor.device
        self._backend, self._chosen = backend(device), chosen()
        self._memory = memory
        self.noisy = False
        self._state: tuple[Any, ...] = ()
        self._launch: tuple[Any, ...] = _NONE
        self._replays: list[Replay | None] = [None, None]

    def __call__(self) -> None:
        """Takes the tick. If the model raises, no slot has moved."""
        slots, tables = self._slots, self._tables
        state = tables.version, self.noisy, slots.x0 is None
        if state != self._state:
            self._state, self._launch, self._replays = state, _NONE, [None, None]
        side = slots.side
        replay = self._replays[side]
        if replay is None:
            replay = self._replays[side] = self._captured(side)
        replay()
        slots.side = 1 - side

    def _captured(self, side: int) -> Replay:
        """Captures a tick. The warm-up of the capture leaves every slot as it is.

        It writes the other side, whose contents nobody needs. Hence the other side's own graph is
        captured in the tick that replays it.
        """
        slots, body = self._slots, partial(self._body, side)
        if self._memory is None:
            return capture(body, slots.rows.device)
        moves, x0 = slots.moves.clone(), None if slots.x0 is None else slots.x0.clone()
        slots.moves.zero_()
        try:
            with own_graphs_off(self._predictor, "model"):
                replay = capture(body, slots.rows.device, self._memory)
        finally:
            slots.moves.copy_(moves)
            if slots.x0 is not None and x0 is not None:
                slots.x0.copy_(x0)
        return holding(replay, self._predictor.model)

    def _body(self, side: int) -> None:
        slots, tables, other = self._slots, self._tables, 1 - side
        torch.index_select(tables.times, 0, slots.rows, out=slots.t)
        output = self._predictor(slots.inputs[side], slots.t, None, self._guided)
        arguments = (
            slots.x[side],
            output,
            tables.table,
            slots.step_rows,
            slots.seeds if self.noisy else None,
            None,
            slots.w if self._guided else None,
            None,
            slots.x[other],
            slots.x0,
            None if slots.inputs is slots.x else slots.inputs[other],
            slots.x0,
        )
        # All tensors but the output are the slots' own.
        dtype, shape, stride, launch = self._launch
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
            launch = self._bound(arguments)
        launch(*arguments)
        slots.rows.add_(slots.moves)

    def _bound(self, arguments: tuple[Any, ...]) -> Launch:
        """Binds the step, and keeps the launch for outputs that lie as this one."""
        output, device = arguments[1], self._predictor.device
        step = step_of(self._backend, self._fixed, device)
        if watched():
            return partial(by_op_again, self._chosen, self._fixed)
        launch = step.launch(*arguments)
        if is_plain(output):
            self._launch = output.dtype, output.shape, output.stride(), launch
        return launch
