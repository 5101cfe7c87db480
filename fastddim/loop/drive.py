"""Drives a loop to its end: gradients off, in batches, with a callback and a trajectory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastddim.check import kind, whole
from fastddim.loop import loops
from fastddim.loop.loops import State, States
from fastddim.loop.plan import Row
from fastddim.loop.run import Run
from fastddim.loop.trajectory import Callback, Copies, Recorder, Step

_AS_IT_IS = nullcontext()


def no_grad() -> AbstractContextManager[None]:
    """Returns ``torch.no_grad()``, or a no-op where gradients are already off.

    Entering and leaving ``torch.no_grad()`` costs 5 % of a small step.
    """
    return torch.no_grad() if torch.is_grad_enabled() else _AS_IT_IS


def sampled(
    run: Run, path: Recorder | None, callback: Callback | None, samples: slice = slice(None)
) -> Tensor:
    """Runs the loop and returns the last x, in the result's dtype.

    Calls the callback and records the trajectory after each step. ``samples`` says where this
    run's samples lie in the trajectory.
    """
    kept = path is not None and path.wants("x0")
    copies = Copies(run.dtype, kept or run.remembers)
    x = None
    states = loops.denoise(run, wants_x0=kept or callback is not None)
    with no_grad() if callback is None else _AS_IT_IS:
        for row, x, x0 in states if callback is None else _without_grad(states):
            answer = None if callback is None else callback(copies.step(row, x, x0))
            if answer is not None and not isinstance(answer, bool):
                _, x, _ = states.send(_replacement(answer, x))
            if path is not None:
                path.keep(row.number, samples, x, x0, stopped=answer is True)
            if answer is True:
                break
    return reached(x).to(run.dtype)


def last_of(states: States, run: Run) -> Tensor:
    """Runs the loop and returns the last x, in the result's dtype."""
    x = None
    with no_grad(), run.predictor.one_cast():
        for _, x, _ in states:  # noqa: B007
            pass
    return reached(x).to(run.dtype)


def steps_of(states: States, copies: Copies) -> Iterator[Step]:
    """Yields the ``Step`` of each state."""
    for row, x, x0 in _without_grad(states):
        yield copies.step(row, x, x0)


def batches_of(
    run: Run, batch_size: int | None, callback: Callback | None
) -> Iterator[tuple[slice, Run]] | None:
    """Returns (samples, their run) of each full batch, or None for all samples at once."""
    if batch_size is None:
        return None
    size, count = whole("batch_size", batch_size, low=1, high=2**31 - 1), run.noise.size[0]
    if callback is not None:
        raise ValueError(
            "batch_size and callback exclude each other: call sample once for each batch"
        )
    if run.noise.generator is not None and (run.known or any(row.noisy for row in run.rows)):
        raise ValueError(
            "batch_size needs seeds or noise where steps add noise: a generator's stream belongs "
            "to the whole batch"
        )

    def batches() -> Iterator[tuple[slice, Run]]:
        firsts = range(0, count, size)
        ticks = iter(run.progress([row for _ in firsts for row in run.rows]))

        def counted(rows: Iterable[Row]) -> Iterable[Row]:
            return (row for row, _ in zip(rows, ticks, strict=False))

        for first in firsts:
            last = min(first + size, count)
            index = torch.arange(first, first + size, device=run.noise.device)
            yield slice(first, last), run.part(index.clamp_(max=last - 1), counted)
        for _ in ticks:  # A bar is full only when its iterator has ended.
            pass

    return batches()


def reached(x: Tensor | None) -> Tensor:
    """Returns the last x, which is None if the caller's ``progress`` has skipped every step."""
    if x is None:
        raise ValueError("progress must yield the steps it wraps, got a wrapper that yields none")
    return x


def _without_grad(states: States) -> Iterator[State]:
    """Yields ``states``, computed without gradients. Between two the caller's grad mode holds."""
    while True:
        with no_grad():
            state = next(states, None)
        if state is None:
            return
        yield state
        del state  # Drop our reference so that the next step can reuse these buffers.


def _replacement(answer: object, x: Tensor) -> Tensor:
    """Returns a copy of the tensor that a callback returned, which replaces x."""
    if not isinstance(answer, Tensor) or answer.shape != x.shape or answer.device != x.device:
        got = tuple(answer.shape) if isinstance(answer, Tensor) else kind(answer)
        raise ValueError(
            f"callback must return None, True to stop, or a tensor of x's shape, "
            f"{tuple(x.shape)}, on {x.device}, got {got}"
        )
    return answer.detach().to(torch.float32, copy=True)
