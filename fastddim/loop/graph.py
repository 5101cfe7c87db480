"""The loop captured: one CUDA graph that is replayed with other seeds, conditions and guidance."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastddim.check import kind, shown
from fastddim.loop.devices import check_not_capturing
from fastddim.loop.held import holding
from fastddim.loop.loops import denoise
from fastddim.loop.model import Model, same, stacked
from fastddim.loop.normals import drawn_seeds
from fastddim.loop.options import (
    CaptureOptions,
    Guidance,
    checked_guidance,
    checked_seeds,
    checked_state,
    prepare,
)
from fastddim.loop.own_graphs import own_graphs_off
from fastddim.loop.plan import Plan, Row
from fastddim.loop.recording import Memory, Replay, capture, lasting
from fastddim.loop.streams import Streams
from fastddim.step.layout import input_like
from fastddim.step.op import initial_noise
from fastddim.untraced import untraced

WHOLE = 100
"""The most steps in one graph. A longer loop replays graphs of one step: a graph holds a node for
every kernel, and each call of a U-Net runs hundreds."""


class Captured:
    """A sampler whose whole loop is a CUDA graph. ``DDIM.capture`` returns it.

        act = ddim.capture(model, (1, 16, 7), cond=dict(global_cond=obs))
        a = act(seeds=[tick], cond=dict(global_cond=obs))

    A call copies its arguments into the memory that the graph reads, replays the graph and returns
    a copy of the result, bit for bit that of ``DDIM.sample``. Conditions and guidance left out keep
    their last values. The model runs in Python only during the capture; each replay repeats its
    operations. The graph reads the weights at their addresses, so weights loaded in place take
    effect. If a module is moved or gets other tensors, the graph still reads the captured tensors,
    and holds their memory. Other shapes, dtypes and non-tensor arguments need another capture.

    Up to 100 steps are one graph. A longer loop replays graphs of one step, which alternate
    between two buffers and count the rows on the device.

    On a device without CUDA graphs, such as a CPU, a call runs the loop itself with the same
    result.

    Calls write the same memory. Threads may share a captured loop: their calls take turns, also on
    several CUDA streams, and the last values may be those of another thread.

    Raises:
        TypeError, ValueError: as ``DDIM.sample`` does, in ``capture`` and in each call.
        RuntimeError: the model cannot be captured, for the reason in the message; or another graph
            is being captured; or the model calls the loop that runs it.
    """

    def __init__(
        self,
        plan: Plan,
        model: Model,
        size: tuple[int, ...],
        device: torch.device,
        options: CaptureOptions,
    ) -> None:
        self._size, self._plan, self._turn, self._runs_in = size, plan, threading.Lock(), 0
        self._streams = Streams(device)
        self._streams.join()
        cond, uncond = options.get("cond"), options.get("uncond")
        with lasting():
            self._x_T = torch.zeros(size, dtype=torch.float32, device=device)
            # Copy the conditions, because calls overwrite them, and the caller's must not change.
            self._cond = _copied(cond)
            self._uncond = _copied(uncond, cond, self._cond, size[0])
            memory = {"seeds": [0] * size[0], "cond": self._cond, "uncond": self._uncond}
            self._run = prepare(plan, model, self._x_T, {**options, **memory})
        assert self._run.noise.seeds is not None
        self._seeds = self._run.noise.seeds
        whole = len(self._run.rows) <= WHOLE
        off: AbstractContextManager[None] = nullcontext()
        if Memory.on(device) is not None:  # On other devices a call runs the model as it is.
            off = own_graphs_off(self._run.predictor, "model", "cond_fn")
        with off:
            replay = self._whole() if whole else self._stepwise()
        self._replay = holding(replay, self._run.predictor.model, self._run.predictor.cond_fn)

    @untraced
    def __call__(
        self,
        *,
        seeds: Sequence[int] | Tensor | None = None,
        x_T: Tensor | None = None,
        cond: Mapping[str, Any] | None = None,
        uncond: Mapping[str, Any] | None = None,
        guidance: Guidance | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Replays the loop once.

        Args:
            seeds: an integer in [0, 2⁶³) for each sample; by default they come from torch's
                default generator.
            x_T: the state to begin with, of the captured shape; drawn from the seeds by default.
                Required if the capture has a ``start`` beyond row 0.
            cond, uncond: the tensors that change, of the captured shapes and dtypes.
            guidance: w, if guidance was captured. A row captured with w = 1 throughout has no
                unconditional half and keeps w = 1.
            out: a tensor for the result, float32 of the captured shape; made if left out.

        Returns:
            ``out``, or a new tensor, float32.
        """
        thread = threading.get_ident()
        if self._runs_in == thread:
            raise RuntimeError("a captured loop must not be called by the model that it runs")
        with self._turn:
            self._runs_in = thread
            try:
                return self._called(seeds, x_T, cond, uncond, guidance, out)
            finally:
                self._runs_in = 0

    def _called(
        self,
        seeds: Sequence[int] | Tensor | None,
        x_T: Tensor | None,
        cond: Mapping[str, Any] | None,
        uncond: Mapping[str, Any] | None,
        guidance: Guidance | None,
        out: Tensor | None,
    ) -> Tensor:
        """Replays once, while no other thread does."""
        device = self._x_T.device
        check_not_capturing(device)
        if x_T is not None:
            checked_state("x_T", x_T, device)
            if x_T.shape != self._x_T.shape:
                raise ValueError(f"x_T must have shape {self._size}, got {tuple(x_T.shape)}")
        elif start := self._plan.order[0]:
            raise ValueError(f"x_T must be given with start = {start}: noise is at row 0")
        if out is not None:
            checked_state("out", out, device)
            if out.shape != self._x_T.shape or out.dtype != torch.float32:
                raise ValueError(
                    f"out must be float32 of shape {self._size}, got {out.dtype} {tuple(out.shape)}"
                )
        keys = None
        if seeds is not None or x_T is None or any(row.noisy for row in self._run.rows):
            given = drawn_seeds(self._size[0]) if seeds is None else seeds
            keys = checked_seeds(given, self._size[0])
        w = self._weights(guidance)
        copies = self._renewed(cond, uncond)
        self._streams.join()
        # Write only after every check has passed: a refused call leaves the arguments as they were.
        with torch.no_grad():
            if keys is not None:
                self._seeds.copy_(keys, non_blocking=True)
            if x_T is not None:
                self._x_T.copy_(x_T)
            else:
                initial_noise(self._seeds, self._size, out=self._x_T)
                if self._plan.noise_scale != 1:
                    self._x_T.mul_(self._plan.noise_scale)
            if w is not None and self._run.guidance is not None:
                self._run.guidance.copy_(w, non_blocking=True)
            for into, value in copies:
                into.copy_(value)
            predictor = self._run.predictor
            if copies and predictor.uncond is not None:
                both = stacked(predictor.uncond, predictor.cond, self._size[0])
                for into, value in _matched("cond", predictor.both, both):
                    into.copy_(value)
            result = self._replay()
            return result.clone() if out is None else out.copy_(result)

    def _weights(self, guidance: Guidance | None) -> Tensor | None:
        """Returns the call's w, (rows, batch), or None if the call leaves guidance out."""
        if guidance is None:
            return None
        w = checked_guidance(guidance, self, self._size[0], self._plan.times.tolist())
        assert w is not None
        for row in self._run.rows:
            if row.guidance is None and (w[row.number] != 1).any():
                raise ValueError(
                    f"guidance must be 1 in row {row.number}, which was captured without its "
                    f"unconditional half, got {w[row.number].tolist()}"
                )
        return torch.from_numpy(w)

    def _renewed(
        self, cond: Mapping[str, Any] | None, uncond: Mapping[str, Any] | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Returns (memory, value) of each tensor that a call passes."""
        found: list[tuple[Tensor, Tensor]] = []
        for name, given, held in (("cond", cond, self._cond), ("uncond", uncond, self._uncond)):
            if given is None:
                continue
            if not isinstance(given, Mapping):
                raise TypeError(f"{name} must map names to values, got {kind(given)}")
            for key, value in given.items():
                if key not in (held or {}):
                    raise ValueError(f"{name} must hold captured keys only, got {key!r}")
                new = _matched(f"{name}[{key!r}]", held[key], value)
                if name == "uncond":
                    shared = {id(tensor) for tensor in _tensors(self._cond)}
                    renewed = {(id(into), id(tensor)) for into, tensor in found}
                    if any(
                        id(into) in shared and (id(into), id(tensor)) not in renewed
                        for into, tensor in new
                    ):
                        raise ValueError(
                            f"uncond[{key!r}] is cond's own tensor in the capture and must be "
                            f"cond's new tensor, got {kind(value)}"
                        )
                found += new
        return found

    def _whole(self) -> Replay:
        """Captures all steps as one graph."""
        run, x_T = self._run, self._x_T

        def body() -> Tensor:
            x = x_T
            with run.predictor.one_cast():
                for _, x, _ in denoise(run, x_T):  # noqa: B007
                    pass
            return x

        return capture(body, x_T.device)

    def _stepwise(self) -> Replay:
        """Captures a graph of one step for each kind of row. The graphs count the rows."""
        # Do not capture self: the cycle would delay freeing the graph's memory.
        run, x_T, batch = self._run, self._x_T, self._size[0]
        rows, device = run.rows, x_T.device
        with lasting():
            n = torch.zeros(1, dtype=torch.int64, device=device)
            index = torch.tensor([row.number for row in rows], dtype=torch.int32, device=device)
            level = torch.tensor(self._plan.times[[row.number for row in rows]], device=device)
            shifts = [row.shift for row in rows if row.shift is not None]
            shift = torch.stack(shifts) if shifts else None
            states, x0s = ([torch.empty_like(x_T) for _ in range(2)] for _ in range(2))
            inputs = {
                copies: [input_like(x_T, run.predictor.dtype, copies) for _ in range(2)]
                for copies in {1 if row.guidance is None else 2 for row in rows}
            }

        def body(row: Row, side: int, first: bool, fed: bool) -> None:
            x, other = states[side], 1 - side
            which = index.index_select(0, n)
            t = level.index_select(0, n)
            w = None
            if row.guidance is not None and run.guidance is not None:
                w = run.guidance.index_select(0, which)[0]
            here = row._replace(
                table_index=which.expand(batch),
                t=t.expand(batch),
                model_t=t.expand(len(row.model_t)),
                guidance=w,
                shift=None if shift is None else shift.index_select(0, n)[0],
            )
            run.step_between(
                here,
                x,
                inputs[1 if row.guidance is None else 2][side] if fed else None,
                None if first else x0s[side],
                states[other],
                inputs[row.feeds][other] if row.feeds else None,
                x0s[other],
            )
            n.add_(1)

        memory = Memory.on(device)
        steps: dict[Any, Replay] = {}
        order = []
        fed = False
        for i, row in enumerate(rows):
            alike = (i % 2, i == 0, fed, row.guidance is not None, row.noisy, row.feeds)
            if alike not in steps:
                n.zero_()
                steps[alike] = capture(partial(body, row, i % 2, i == 0, fed), device, memory)
            order.append(steps[alike])
            fed = row.feeds > 0

        def replay() -> Tensor:
            n.zero_()
            states[0].copy_(x_T)
            for step in order:
                step()
            return states[len(rows) % 2]

        return replay


def _copied(value: Any, beside: Any = None, copy: Any = None, batch: int = 0) -> Any:
    """Returns ``value`` with a copy of each tensor.

    ``beside`` is the value of cond in the same place, and ``copy`` its copy. Where ``value`` is the
    same tensor and has no row for each sample, both halves share ``copy``.
    """
    if isinstance(value, Tensor):
        shared = value is beside and (value.dim() == 0 or len(value) != batch)
        return copy if shared else value.detach().clone()
    if isinstance(value, Mapping):
        found = beside if isinstance(beside, Mapping) else {}
        return {
            key: _copied(item, found[key], copy[key], batch) if key in found else _copied(item)
            for key, item in value.items()
        }
    if type(value) in (list, tuple):
        if type(beside) is not type(value) or len(beside) != len(value):
            return type(value)([_copied(item) for item in value])
        three = zip(value, beside, copy, strict=True)
        return type(value)([_copied(item, b, c, batch) for item, b, c in three])
    return value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if type(value) in (list, tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return [value] if isinstance(value, Tensor) else []


def _matched(name: str, held: Any, value: Any) -> list[tuple[Tensor, Tensor]]:
    """Returns (held tensor, new tensor) for each tensor of two values that agree in all else."""
    if isinstance(held, Tensor):
        if not isinstance(value, Tensor) or (value.shape, value.dtype) != (held.shape, held.dtype):
            got = (
                f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else kind(value)
            )
            raise ValueError(
                f"{name} must be {held.dtype} {tuple(held.shape)}, as captured, got {got}"
            )
        return [] if value is held else [(held, value)]
    if isinstance(held, Mapping) and isinstance(value, Mapping) and held.keys() == value.keys():
        return [pair for k in held for pair in _matched(f"{name}[{k!r}]", held[k], value[k])]
    if type(held) in (list, tuple) and type(value) is type(held) and len(value) == len(held):
        both = enumerate(zip(held, value, strict=True))
        return [pair for i, (h, v) in both for pair in _matched(f"{name}[{i}]", h, v)]
    if isinstance(held, (Mapping, list, tuple)) or not same(held, value):
        raise ValueError(f"{name} is part of the graph, {shown(held)}, got {shown(value)}")
    return []
