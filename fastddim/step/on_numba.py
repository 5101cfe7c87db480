"""The backend ``numba`` takes a step on a CPU by ``numba_pass``, which PyTorch's threads share.

A launch writes addresses, strides and flags into a record, ``numba_pass.CALL``, and calls the
compiled function on it: from this thread alone, or from all of PyTorch's where the step is large.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastddim.step import layout, on_torch
from fastddim.step.backends import Backend, Fixed, Launch, StepArgs, forked, numbers_of
from fastddim.step.numba_pass import (
    BOUND,
    BROUGHT,
    CALL,
    CHUNK,
    DONE,
    FUNCTIONS,
    MODES,
    OWN,
    REFUSED,
    SIZE,
    TASK,
    UNDONE,
    part_of,
    take_part,
)
from fastddim.step.philox import STEP_STREAM
from fastddim.step.rows import rows_of

SMALL = 64
"""Below this many elements a sample on a row of its own costs less in PyTorch's operations, which
take many samples at once. Here each costs 70 ns."""
SHARED, NOISY_SHARED = 32 * TASK, 4 * TASK
"""The least elements of a pass that threads share, without and with counter noise or rounding.
Such a pass takes tenths of a millisecond, many times the cost of starting the threads and waiting
for them."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OUTCOME, _FIRST_BOUND = (
    CALL.fields[name][1]  # type: ignore[index]
    for name in ("outcome", "batch")
)
_bring = struct.Struct(f"={len(BROUGHT)}q").pack_into
_bind = struct.Struct(f"={len(BOUND) + 1 + len(FUNCTIONS)}qd").pack_into
_int64_at = struct.Struct("=q").unpack_from


class Team:
    """The OpenMP threads that PyTorch's own operations run on.

    They are awake while a model runs, and other threads would compete with them for the cores. So
    a call goes to the OpenMP library that PyTorch is linked to: GNU's, LLVM's or Intel's, each of
    which has GNU's functions.
    """

    def __init__(self) -> None:
        for scope in (None, torch._C.__file__):  # in PyTorch's order: a preloaded library first
            library = ctypes.CDLL(scope)
            if hasattr(library, "GOMP_parallel"):
                break
        self._parallel, self._read_modes = library.GOMP_parallel, library.fegetenv
        self._parallel.restype, self._read_modes.argtypes = None, (ctypes.c_void_p,)
        self._parallel.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
        functions = (ctypes.cast(getattr(library, f), ctypes.c_void_p) for f in FUNCTIONS)
        self.functions = tuple(function.value or 0 for function in functions)

    def run(self, function: Any, call: Any, threads: int) -> None:
        """Runs ``function`` on the call in ``threads`` threads, and waits for them."""
        self._read_modes(ctypes.byref(call, MODES))
        self._parallel(function.address, call, threads, 0)


team: Team | None = None
"""PyTorch's threads; None where PyTorch is built without OpenMP, and on Windows."""
with contextlib.suppress(OSError, AttributeError, TypeError):
    team = Team()
_NO_FUNCTIONS = (0,) * len(FUNCTIONS)


class Calls:
    """Calls ``take_part`` with the same bound arguments each time, and reuses the records.

    A record leaves ``_spare`` while its call runs, so that no other thread takes it.
    """

    def __init__(
        self, bound: tuple[int, ...], clip: float | None, many: bool, part: Any = take_part
    ) -> None:
        self._bound, self._clip, self._many = bound, clip, many
        self._part, self._alone = part, part.ctypes
        self._spare: list[tuple[Any, int]] = []

    def __call__(self, *brought: int) -> int:
        """Runs a call with the addresses of ``BROUGHT``, and returns its outcome."""
        if self._many and team and not forked() and torch.get_num_threads() > 1:
            call = self._new(torch.get_num_threads(), team.functions)
            _bring(call, 0, *brought, UNDONE, 0)
            team.run(self._part, call, torch.get_num_threads())
            return int(_int64_at(call, _OUTCOME)[0])
        try:
            own = self._spare.pop()
        except IndexError:
            call = self._new(1, _NO_FUNCTIONS)
            own = call, ctypes.addressof(call)
        _bring(own[0], 0, *brought, UNDONE, 0)
        outcome = self._alone(own[1])
        self._spare.append(own)
        return outcome  # type: ignore[no-any-return]

    def _new(self, threads: int, functions: tuple[int, ...]) -> Any:
        call = (ctypes.c_char * (SIZE + OWN * threads))()
        _bind(call, _FIRST_BOUND, *self._bound, threads, *functions, self._clip or 0.0)
        return call


def bind(fixed: Fixed, first: StepArgs) -> Launch:
    """Binds the equation of ``reference.ddim_step`` as one pass: see ``backends.Backend``.

    Raises:
        ValueError: samples have rows, guidance or thresholds of their own, and a sample is not one
            stretch of memory.
    """
    x, output, table, row, seeds, _, guidance, threshold, *_ = first
    batch, total = x.shape[0], x.numel()
    n = total // batch
    row_stride = 0 if isinstance(row, int) or batch == 1 else row.stride(0)
    guidance_stride = 0 if batch == 1 or guidance is None else guidance.stride(0)
    threshold_stride = 0 if batch == 1 or threshold is None else threshold.stride(0)
    if not layout.apart(x) and (row_stride or threshold_stride or guidance is not None):
        raise ValueError(
            "x must hold each sample in one stretch of memory where rows or thresholds differ or "
            f"guidance is given, got strides {x.stride()}"
        )
    small = n < SMALL and batch > 1
    channels = 1
    if seeds is not None and not x.is_contiguous():
        few = layout.apart(x) and x.dim() > 2 and x.shape[1] <= CHUNK // 16
        channels = x.shape[1] if few and x[0].movedim(0, -1).is_contiguous() else 0
    # The pass draws the noise of contiguous samples, and of channels-last samples of few channels.
    # For another layout, and for small samples that differ in their options, it is drawn before.
    ahead = seeds is not None and (
        channels == 0 or (small and on_torch.by_sample(row, guidance, threshold))
    )
    if ahead or (small and row_stride):
        rest = on_torch.bind if small and row_stride else bind
        return _drawn_ahead(rest, fixed, first)
    steps = table.shape[0]
    bound = (  # in the order of BOUND
        batch,
        n,
        channels,
        steps,
        table.shape[1],
        _DTYPES.index(output.dtype),
        fixed.prediction,
        fixed.noise_first,
        fixed.rederive,
        fixed.posterior,
        output.stride(0) if layout.apart(x) and output.shape[0] > 1 else n,
        row_stride,
        guidance_stride,
        threshold_stride,
        STEP_STREAM,
        fixed.clip is not None,
        False,
    )
    clip, heavy = fixed.clip, seeds is not None
    if fixed.rounding is not None:
        heavy = True
        clip = (
            None if clip is None else torch.tensor(clip, dtype=fixed.rounding, device="cpu").item()
        )
    part = part_of(fixed.rounding)
    run = Calls(bound, clip, total >= (NOISY_SHARED if heavy else SHARED), part)
    rows = _counting(steps)

    def launch(
        x: Tensor,
        output: Tensor,
        table: Tensor,
        row: Any,
        seeds: Tensor | None,
        noise: Tensor | None,
        guidance: Tensor | None,
        threshold: Tensor | None,
        out: Tensor,
        x0: Tensor | None,
        next_input: Tensor | None,
        history: Tensor | None = None,
    ) -> None:
        if not isinstance(row, int):
            at = row.data_ptr()
        elif 0 <= row < steps:
            at = rows + 4 * row
        else:
            raise ValueError(f"rows must lie in [0, {steps}), got {row}")
        outcome = run(
            x.data_ptr(),
            output.data_ptr(),
            table.data_ptr(),
            at,
            0 if seeds is None else seeds.data_ptr(),
            0 if noise is None else noise.data_ptr(),
            0 if guidance is None else guidance.data_ptr(),
            0 if threshold is None else threshold.data_ptr(),
            out.data_ptr(),
            0 if x0 is None else x0.data_ptr(),
            0 if history is None else history.data_ptr(),
        )
        if outcome != DONE:
            _refuse(outcome, row, steps)
        if next_input is not None:
            layout.write_next(next_input, out)

    return launch


def _refuse(outcome: int, row: Any, steps: int) -> None:
    """Raises the error of a call that wrote nothing."""
    if outcome != REFUSED:
        raise MemoryError("there is no memory for the step's scratch chunks")
    low, high = (int(each) for each in torch.aminmax(rows_of(row, 1)))
    raise ValueError(f"rows must lie in [0, {steps}), got {low} to {high}")


def _drawn_ahead(bind: Callable[..., Launch], fixed: Fixed, first: StepArgs) -> Launch:
    """Returns ``bind``'s launch, which gets the noise as a tensor in place of the seeds."""

    def with_noise(
        x: Tensor, output: Tensor, table: Tensor, row: int | Tensor, seeds: Tensor | None,
        noise: Tensor | None, *rest: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        if seeds is not None:
            noise = on_torch.drawn(x, seeds, numbers_of(table, row), normal_)
        return x, output, table, row, None, noise, *rest

    inner = bind(fixed, StepArgs(*with_noise(*first)))

    def launch(*arguments: Any) -> None:
        inner(*with_noise(*arguments))

    return launch


_counted: list[npt.NDArray[np.int32]] = []


def _counting(count: int) -> int:
    """Returns the address of 0, 1, 2, ..., at least ``count`` of them as int32, kept for good."""
    for numbers in _counted:
        if len(numbers) >= count:
            break
    else:  # Another thread may append too: each returns the address of the array that it made.
        numbers = np.arange(max(count, 1024), dtype=np.int32)
        _counted.append(numbers)
    return int(numbers.ctypes.data)


def normal_(out: Tensor, seeds: Tensor, rows: Tensor, stream: int) -> None:
    """Fills ``out``, contiguous float32 (batch, ...), with counter noise."""
    total = out.numel()
    if total == 0:
        return
    batch = out.shape[0]
    seeds = seeds.contiguous()
    bound = dict.fromkeys(BOUND, 0) | {
        "batch": batch,
        "n": total // batch,
        "row_stride": 0 if batch == 1 else rows.stride(0),
        "stream": stream,
        "fills": True,
    }
    run = Calls(tuple(bound.values()), None, total >= NOISY_SHARED)
    if run(0, 0, 0, rows.data_ptr(), seeds.data_ptr(), 0, 0, 0, out.data_ptr(), 0, 0) != DONE:
        raise MemoryError("there is no memory for the scratch chunks of the counter noise")


BACKEND = Backend("numba", bind, normal_, rounds=("cpu",))
