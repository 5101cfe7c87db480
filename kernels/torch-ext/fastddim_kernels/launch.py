"""Each function checks its tensors and launches a kernel, without waiting for the device."""

# pyright does not know that a launch takes Triton's options beside the kernel's parameters.
# pyright: reportCallIssue=false

from __future__ import annotations

import functools
import operator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from . import geometry
from .checks import (
    check_coefficients,
    check_rounding,
    check_seeds,
    check_state,
    check_vector,
    describe,
)
from .noise import normal_kernel
from .step import ddim_step_kernel


def ddim_step(
    x: Tensor,
    output: Tensor,
    table: Tensor,
    rows: Tensor | int,
    out: Tensor,
    x0: Tensor | None = None,
    next_input: Tensor | None = None,
    *,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    guidance: Tensor | None = None,
    threshold: Tensor | None = None,
    history: Tensor | None = None,
    prediction: int = 0,
    noise_first: bool = True,
    clip: float | None = None,
    rederive: bool = False,
    posterior: bool = False,
    rounding: torch.dtype | None = None,
) -> None:
    """Writes x_s to ``out`` and, where given, the predicted x0 and the next model input.

    Args:
        x: x_t, float32, dense, of shape (batch, ...).
        output: what the model returned, float32, bfloat16 or float16, of x's shape; with
            ``guidance`` (2·batch, ...), first without and then with the condition. Each sample
            lies as x's samples, or x and output are each contiguous or channels last. Samples may
            be any number of elements apart, and channels-last pixels may be twice x's channels
            apart, so output may be a view of the first half where a learned variance follows.
        table: (steps, 7) float32: √ᾱ_t, 1/√ᾱ_t, √(1−ᾱ_t), 1/√(1−ᾱ_t), √ᾱ_s, c1, c2. With
            ``history`` (steps, 8): κ is the last, and where it is not 0 the factors of D and x_t
            stand in the places of √ᾱ_s and c2. With or without ``history``, (steps, 9): κ, then the
            number below 2²⁴ for which a row's counter noise is drawn in place of its place here.
        rows: the row that all samples are on, or (batch,) int32 in [0, steps).
        out, x0: x_s and x0 are written here, float32 with the shape and strides of x. ``out`` may
            be x itself.
        next_input: x_s is written here in this tensor's dtype, float32, bfloat16 or float16: once
            in x's shape and strides, or twice in (2·batch, ...).
        seeds: (batch,) int64, for counter noise.
        noise: z, float32 with the shape and strides of x, in place of seeds. With neither, no
            noise is added.
        guidance: (batch,) float32, w in output_u + w·(output_c − output_u); any stride.
        threshold: (batch,) float32, s > 0 in x0 = clamp(x0, ±s)/s.
        history: x0′, the x0 of the step before, float32 with the shape and strides of x, in
            D = x0 + κ·(x0 − x0′) and x_s = p·D + c1·z + q·x_t; it may be ``x0`` itself. Rows with
            κ = 0 do not use it.
        prediction: what ``output`` is: 0 ε, 1 v, 2 x0, 3 the flow's ε − x0 (α + σ = 1).
        noise_first: whether the noise is added before the direction to x_t or after it.
        clip: x0 is clamped to ±clip.
        rederive: whether ε is computed again from the clamped x0.
        posterior: whether x_t takes the place of ε in x_s, whose factors the table then holds.
        rounding: bfloat16 or float16, the dtype of x, output, noise, out and x0 in place of
            float32. The result of each operation is rounded to it, as eager PyTorch does, and the
            table has two columns more: √ᾱ_t and √(1−ᾱ_t) where they multiply. There are no seeds,
            guidance, next_input or history.

    With seeds, a threshold, or rows or guidance that differ between samples, the batch must be x's
    outermost dimension in memory. With seeds x must be contiguous or channels last.

    Raises:
        ValueError: naming the argument, the value and what is allowed.
    """
    grid, scalars, options = _choices(
        x, output, table, rows, seeds, noise, guidance, threshold, out, x0, next_input, history,
        prediction, noise_first, clip, rederive, posterior, rounding,
    )  # fmt: skip
    if x.numel() == 0:
        return
    each, row = (rows, None) if isinstance(rows, Tensor) else (None, rows)
    s, rcp_s = _with_reciprocal(threshold)
    with _device(x):
        ddim_step_kernel[grid](
            x, output, noise, out, x0, next_input, history, table, each, seeds, guidance, s, rcp_s,
            row, *scalars, **options,
        )  # fmt: skip


def bind(
    x: Tensor,
    output: Tensor,
    table: Tensor,
    rows: Tensor | int,
    out: Tensor,
    x0: Tensor | None = None,
    next_input: Tensor | None = None,
    *,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    guidance: Tensor | None = None,
    threshold: Tensor | None = None,
    history: Tensor | None = None,
    prediction: int = 0,
    noise_first: bool = True,
    clip: float | None = None,
    rederive: bool = False,
    posterior: bool = False,
    rounding: torch.dtype | None = None,
) -> BoundStep:
    """Returns ``ddim_step`` for many steps, checked and compiled once.

    The arguments are those of a first step, which is not taken. ``BoundStep`` says which of their
    properties later steps must keep.

    Raises:
        ValueError: naming the argument, the value and what is allowed.
    """
    grid, scalars, options = _choices(
        x, output, table, rows, seeds, noise, guidance, threshold, out, x0, next_input, history,
        prediction, noise_first, clip, rederive, posterior, rounding,
    )  # fmt: skip
    step = BoundStep(x, table, grid, scalars, options)
    first = x, output, noise, out, x0, next_input, history
    low = functools.reduce(operator.or_, (t.data_ptr() for t in first if t is not None))
    if step.direct and not low & 15:
        each, row = (rows, None) if isinstance(rows, Tensor) else (None, rows)
        s, rcp_s = _with_reciprocal(threshold)
        with _device(x):
            compiled = ddim_step_kernel.warmup(
                *first, table, each, seeds, guidance, s, rcp_s, row, *scalars, grid=grid, **options
            )
        step.adopt(compiled, x)
    return step


class BoundStep:
    """A step whose kernel is compiled, for tensors that lie as those it was bound to.

    A call costs the host about as much as one of PyTorch's operations. It checks that a row given
    as a number is in the table; that the addresses of x, output, out, noise, x0, next_input and
    history are multiples of 16; that the current device is the bound one; and that Triton has no
    launch hooks. It then launches the compiled kernel past Triton's dispatch, with addresses in
    place of tensors, which works with Triton 3.6 and 3.7. Where an address, the device or a hook
    fails the check, with other versions, on ROCm and under the interpreter, the call goes through
    Triton's dispatch.

    The caller must keep everything else as it was when the step was bound: each tensor's dtype,
    shape, strides and device, which arguments are None, whether ``rows`` is a number, and how many
    rows the table has. A call does not notice a change, and may then read or write memory that
    belongs to no tensor.

    A row that is a number is an argument of the launch: a CUDA graph that holds the launch reads no
    memory for the row, and repeats the row that it was captured with.
    """

    def __init__(
        self,
        x: Tensor,
        table: Tensor,
        grid: tuple[int],
        scalars: tuple[Any, ...],
        options: dict[str, Any],
    ) -> None:
        self._grid, self._scalars, self._options = grid, scalars, options
        self._device = x.device.index
        self._steps = len(table)
        self.direct = _launches_directly() and x.is_cuda and bool(options)
        """Whether the kernel, once it is compiled, is launched past Triton's dispatch."""
        self._run: Any = None

    def adopt(self, compiled: Any, x: Tensor) -> None:
        """Takes the kernel that Triton compiled for aligned addresses."""
        with _device(x):  # ``run`` loads the machine code onto the current device.
            run = compiled.run
        self._launch_of = compiled.function, compiled.packed_metadata, None, None, None
        # ``run`` takes compile-time arguments too, in the order of the parameters.
        parameters = [p.name for p in ddim_step_kernel.params if p.is_constexpr]
        self._rest = *self._scalars, *(self._options[name] for name in parameters)
        self._run = run

    def __call__(
        self,
        x: Tensor,
        output: Tensor,
        table: Tensor,
        rows: Any,
        seeds: Tensor | None,
        noise: Tensor | None,
        guidance: Tensor | None,
        threshold: Tensor | None,
        out: Tensor,
        x0: Tensor | None,
        next_input: Tensor | None,
        history: Tensor | None = None,
    ) -> None:
        """Takes ``ddim_step`` of tensors that lie as the bound ones.

        ``rows`` is a number if it was one when the step was bound.

        Raises:
            ValueError: ``rows`` is a number that is no row of the table.
        """
        s = rcp_s = None
        if threshold is not None:
            s, rcp_s = _with_reciprocal(threshold)
        each, row = rows, None
        if isinstance(rows, int):
            each, row = None, rows
            if not 0 <= rows < self._steps:
                raise ValueError(f"rows must lie in [0, {self._steps}), got {rows}")
        aligned = False
        if self.direct:
            x_at, output_at, out_at = x.data_ptr(), output.data_ptr(), out.data_ptr()
            noise_at = x0_at = next_at = history_at = None
            low = x_at | output_at | out_at
            if noise is not None:
                low |= (noise_at := noise.data_ptr())
            if x0 is not None:
                low |= (x0_at := x0.data_ptr())
            if next_input is not None:
                low |= (next_at := next_input.data_ptr())
            if history is not None:
                low |= (history_at := history.data_ptr())
            # A kernel that is compiled for aligned memory reads 16 bytes at a time.
            aligned = not low & 15
            run = self._run
            if aligned and run and _current_device() == self._device and not _hooked():
                run(
                    self._grid[0], 1, 1, _stream(self._device), *self._launch_of,
                    x_at, output_at, noise_at, out_at, x0_at, next_at, history_at,
                    table.data_ptr(),
                    each if each is None else each.data_ptr(),
                    seeds if seeds is None else seeds.data_ptr(),
                    guidance if guidance is None else guidance.data_ptr(),
                    s, rcp_s, row, *self._rest,
                )  # fmt: skip
                return
        if not self._options:
            return  # A step of no elements was bound without options.
        with _device(x):
            compiled = ddim_step_kernel[self._grid](
                x, output, noise, out, x0, next_input, history, table, each, seeds, guidance, s,
                rcp_s, row, *self._scalars, **self._options,
            )  # fmt: skip
        if aligned and self._run is None:  # the first step's tensors were not
            self.adopt(compiled, x)


def _choices(
    x: Tensor,
    output: Tensor,
    table: Tensor,
    rows: Tensor | int,
    seeds: Tensor | None,
    noise: Tensor | None,
    guidance: Tensor | None,
    threshold: Tensor | None,
    out: Tensor,
    x0: Tensor | None,
    next_input: Tensor | None,
    history: Tensor | None,
    prediction: int,
    noise_first: bool,
    clip: float | None,
    rederive: bool,
    posterior: bool,
    rounding: torch.dtype | None = None,
) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any]]:
    """Checks the arguments, and returns (grid, scalars, options) of their launch.

    ``scalars`` follow the kernel's pointers by position, and ``options`` go by name.
    """
    check_state(x, out, x0, noise, next_input, history, rounding or torch.float32)
    check_coefficients(x, table, rows, seeds, guidance, threshold, history, rounding)
    if rounding is not None:
        check_rounding(rounding, output, seeds, guidance, next_input, history)
        # PyTorch's clamp rounds its bounds.
        clip = None if clip is None else torch.tensor(clip, dtype=rounding, device="cpu").item()
    if seeds is not None and noise is not None:
        raise ValueError("noise comes from seeds or from a tensor, got both")
    if clip is not None and threshold is not None:
        raise ValueError(f"clip must be None with a threshold, got {clip:g}")
    twice = next_input is not None and len(next_input) > len(x)
    g = geometry.geometry_of(x, output, rows, seeds, guidance, threshold, twice)
    if x.numel() == 0:
        return (0,), (), {}
    alone = x0 is None and next_input is None and history is None and guidance is None
    dense = rederive or threshold is not None or (alone and output.itemsize == 2)
    quads, parts = geometry.block_of(g, noisy=seeds is not None, dense=dense)
    blocks = -(-g.fours // (quads * parts))
    unit = 4 if g.in_fours else 1
    scalars = (
        g.run // unit,
        g.samples,
        None if g.samples == 1 else -blocks,
        *geometry.divisor(blocks),
        None if g.output_stride == g.n else g.output_stride // unit,
        None if g.samples == 1 or not isinstance(rows, Tensor) else rows.stride(0) or None,
        None if guidance is None or g.samples == 1 else guidance.stride(0) or None,
        clip,
    )
    options = {
        "COLUMNS": table.shape[1],
        "PREDICTION": prediction,
        "NOISE_FIRST": noise_first,
        "REDERIVE": rederive,
        "POSTERIOR": posterior,
        "NEXT_TWICE": twice,
        "CHANNELS": g.channels,
        "X_PIXEL": g.x_pixel,
        "OUTPUT_PIXEL": g.output_pixel,
        "FOURS": g.in_fours,
        "EVEN": g.in_fours and g.fours % (quads * parts) == 0,
        "PORTABLE": geometry.portable(),
        "QUADS": quads,
        "PARTS": parts,
        "num_warps": geometry.warps_of(g),
        # Contracted multiply-adds would differ from eager PyTorch in the last bit.
        "enable_fp_fusion": False,
    }
    if (registers := geometry.registers(g, seeds is not None)) is not None:
        options["maxnreg"] = registers
    return (g.samples * blocks * g.groups,), scalars, options


def _with_reciprocal(threshold: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Returns s and 1/s, contiguous."""
    if threshold is None:
        return None, None
    return threshold.contiguous(), threshold.contiguous().reciprocal()


def _launches_directly() -> bool:
    """Returns whether this version of Triton is known to launch compiled kernels with addresses."""
    return not geometry.portable() and triton.__version__.split(".")[:2] in (["3", "6"], ["3", "7"])


_hooks: Any = getattr(triton, "knobs").runtime  # noqa: B009 its types do not name it


def _hooked() -> bool:
    """Returns whether Triton calls a hook, a profiler's for example, at each launch."""
    enter, leave = _hooks.launch_enter_hook, _hooks.launch_exit_hook
    return (enter is not None and bool(enter.calls)) or (leave is not None and bool(leave.calls))


def normal_(out: Tensor, seeds: Tensor, rows: Tensor, stream: int) -> None:
    """Fills ``out``, contiguous float32 (batch, ...), with counter noise; seeds, rows: (batch,)."""
    if out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(f"out must be contiguous float32, got {describe(out)}")
    check_seeds(seeds, out)
    check_vector("rows", rows, torch.int32, out)
    if out.numel() == 0:
        return
    n = out.numel() // out.shape[0]
    most = 4 * geometry.INTERPRETED_FOURS if geometry.INTERPRETED else 1024
    block = min(most, max(16, triton.next_power_of_2(n)))
    blocks = -(-n // block)
    with _device(out):
        normal_kernel[(out.shape[0] * blocks,)](
            out,
            seeds,
            rows,
            n,
            blocks,
            rows.stride(0),
            stream,
            BLOCK_SIZE=block,
            PORTABLE=geometry.portable(),
            num_warps=4,
            enable_fp_fusion=False,
        )


# Each launch calls these, because torch.cuda's functions initialise and check more each time.
_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def _device(x: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one, on which Triton launches."""
    return torch.cuda.device(x.device.index) if x.is_cuda else nullcontext()
