"""A function for each kernel checks tensors and launches, without waiting for the device."""

# A launch takes Triton's own options beside the kernel's parameters.
# pyright: reportCallIssue=false

from __future__ import annotations

import functools
import math
import operator
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .layout import FEW, SCATTERED, TILE, block_channels, layout_of
from .noise import normal_kernel
from .step import ddim_step_kernel

COLUMNS = 7
_FEW, _TILE, _SCATTERED = FEW.value, TILE.value, SCATTERED.value
_is_dense = torch.ops.aten.is_non_overlapping_and_dense.default
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
# From so many elements on a program takes several blocks, whose common work then costs each element
# less; fewer elements are better spread over the multiprocessors.
_LARGE = 1 << 20
_INTERPRETED_FOURS = 4096
# Of a tile's four parts ptxas would make one long order in 90 registers and more, and fewer than
# eight programs would fit on a multiprocessor. Elsewhere it takes fewer by itself than with a
# limit. AMD's compiler does not know the option.
_TILE_REGISTERS = 64
# Where pixels are channels last, the kernel counts the fours of a sample in 32 bits.
_FEWER_ELEMENTS = 1 << 34
_MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    prediction: int = 0,
    noise_first: bool = True,
    clip: float | None = None,
    rederive: bool = False,
) -> None:
    """Writes x_s to ``out`` and, where given, the predicted x0 and the next model input.

    Args:
        x: x_t, float32, dense, of shape (batch, ...).
        output: what the model returned, float32, bfloat16 or float16, of x's shape; with
            ``guidance`` (2·batch, ...), first without and then with the condition. Samples lie as
            x's do, or x and they are contiguous and channels last, in any combination. They may be
            any number of elements apart, and pixels that are channels last may hold twice x's
            channels, so that the first half of the channels of a learned variance is a view.
        table: (steps, 7) float32: √ᾱ_t, 1/√ᾱ_t, √(1−ᾱ_t), 1/√(1−ᾱ_t), √ᾱ_s, c1, c2.
        rows: the row that all samples are on, or (batch,) int32 in [0, steps).
        out, x0: float32, with the shape and strides of x.
        next_input: x_s in its own dtype, float32, bfloat16 or float16: of x's shape and strides,
            or (2·batch, ...), twice.
        seeds: (batch,) int64, for counter noise.
        noise: z, float32, shape and strides of x. Neither: no noise is added.
        guidance: (batch,) float32, w in output_u + w·(output_c − output_u); any stride.
        threshold: (batch,) float32, s > 0 in x0 = clamp(x0, ±s)/s.
        prediction: what the model returns: 0 ε, 1 v, 2 x0.
        noise_first: whether the noise is added before the direction to x_t or after it.
        clip: x0 is clamped to ±clip.
        rederive: whether ε is computed again from the clamped x0.

    Where anything belongs to a sample (rows, seeds, guidance that differ, a threshold), the batch
    must be x's outermost dimension in memory. With seeds x must be contiguous or channels last.
    """
    grid, scalars, options = _choices(
        x, output, table, rows, seeds, noise, guidance, threshold, out, x0, next_input,
        prediction, noise_first, clip, rederive,
    )  # fmt: skip
    if x.numel() == 0:
        return
    each, row = (rows, None) if isinstance(rows, Tensor) else (None, rows)
    s, rcp_s = _with_reciprocal(threshold)
    with _device(x):
        ddim_step_kernel[grid](
            x, output, noise, out, x0, next_input, table, each, seeds, guidance, s, rcp_s, row,
            *scalars, **options,
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
    prediction: int = 0,
    noise_first: bool = True,
    clip: float | None = None,
    rederive: bool = False,
) -> BoundStep:
    """Returns ``ddim_step`` for many steps, which is checked, chosen for and compiled once.

    The arguments are those of a first step, which is not taken. ``rows`` may be the number of the
    row that all samples are on. ``BoundStep`` says what later steps have to keep.

    Raises:
        ValueError: naming the argument, what was given and what is allowed.
    """
    grid, scalars, options = _choices(
        x, output, table, rows, seeds, noise, guidance, threshold, out, x0, next_input,
        prediction, noise_first, clip, rederive,
    )  # fmt: skip
    step = BoundStep(x, table, grid, scalars, options)
    given = x, output, noise, out, x0, next_input
    low = functools.reduce(operator.or_, (t.data_ptr() for t in given if t is not None))
    if step.direct and not low & 15:
        each, row = (rows, None) if isinstance(rows, Tensor) else (None, rows)
        s, rcp_s = _with_reciprocal(threshold)
        with _device(x):
            compiled = ddim_step_kernel.warmup(
                *given, table, each, seeds, guidance, s, rcp_s, row, *scalars, grid=grid, **options
            )
        step.adopt(compiled, x)
    return step


class BoundStep:
    """A step whose kernel is compiled, for tensors that lie as those it was bound to.

    A call compares little, so that it costs the host about as much as one of PyTorch's operations:
    a row that is a number with the table's length; the addresses of x, output, out, noise, x0 and
    next_input with multiples of 16; the device that the step was bound to with the current one;
    and Triton's launch hooks with none. It then launches the compiled kernel past Triton's
    dispatch, with addresses in place of tensors, which is known to work with Triton 3.6 and 3.7.
    Where a comparison fails, with other versions, on ROCm and under the interpreter, the call goes
    through Triton's dispatch.

    The caller keeps everything else as it was when the step was bound: each tensor's dtype, shape,
    strides and device, which arguments are None, whether ``rows`` is a number, and how many rows
    the table has. A change is not noticed, and may read or write memory that is no tensor's.

    A row that is a number is an argument of the launch itself: a CUDA graph that holds the launch
    reads no memory for it, and repeats the row it was captured with.
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
        """Keeps the kernel that Triton compiled for aligned addresses."""
        with _device(x):  # ``run`` loads the machine code onto the current device.
            run = compiled.run
        self._launch_of = compiled.function, compiled.packed_metadata, None, None, None
        # Triton passes compile-time arguments too, in the order of the parameters.
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
            noise_at = x0_at = next_at = None
            low = x_at | output_at | out_at
            if noise is not None:
                low |= (noise_at := noise.data_ptr())
            if x0 is not None:
                low |= (x0_at := x0.data_ptr())
            if next_input is not None:
                low |= (next_at := next_input.data_ptr())
            # A kernel that was compiled for aligned memory reads 16 bytes at a time.
            aligned = not low & 15
            run = self._run
            if aligned and run and _current_device() == self._device and not _hooked():
                run(
                    self._grid[0], 1, 1, _stream(self._device), *self._launch_of,
                    x_at, output_at, noise_at, out_at, x0_at, next_at, table.data_ptr(),
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
                x, output, noise, out, x0, next_input, table, each, seeds, guidance, s, rcp_s, row,
                *self._scalars, **self._options,
            )  # fmt: skip
        if aligned and self._run is None:  # the tensors that it was bound to were not
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
    prediction: int,
    noise_first: bool,
    clip: float | None,
    rederive: bool,
) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any]]:
    """Returns (grid, scalars, options) of a launch, of checked arguments.

    ``scalars`` follow the kernel's pointers by position, and ``options`` are given by name.
    """
    _check_state(x, out, x0, noise, next_input)
    _check_coefficients(x, table, rows, seeds, guidance, threshold)
    if seeds is not None and noise is not None:
        raise ValueError("noise comes from seeds or from a tensor, got both")
    if clip is not None and threshold is not None:
        raise ValueError(f"clip must be None with a threshold, got {clip:g}")
    twice = next_input is not None and len(next_input) > len(x)
    g = _geometry(x, output, rows, seeds, guidance, threshold, twice)
    if x.numel() == 0:
        return (0,), (), {}
    light = prediction == 0 and guidance is None and threshold is None and next_input is None
    quads, parts = _block(g, noisy=seeds is not None, light=light)
    blocks = -(-g.fours // (quads * parts))
    unit = 4 if g.in_fours else 1
    scalars = (
        g.run // unit,
        g.samples,
        None if g.samples == 1 else -blocks,
        *divisor(blocks),
        None if g.output_stride == g.n else g.output_stride // unit,
        None if g.samples == 1 or not isinstance(rows, Tensor) else rows.stride(0) or None,
        None if guidance is None or g.samples == 1 else guidance.stride(0) or None,
        clip,
    )
    options = {
        "COLUMNS": COLUMNS,
        "PREDICTION": prediction,
        "NOISE_FIRST": noise_first,
        "REDERIVE": rederive,
        "NEXT_TWICE": twice,
        "CHANNELS": g.channels,
        "X_PIXEL": g.x_pixel,
        "OUTPUT_PIXEL": g.output_pixel,
        "FOURS": g.in_fours,
        "EVEN": g.in_fours and g.fours % (quads * parts) == 0,
        "PORTABLE": _portable(),
        "QUADS": quads,
        "PARTS": parts,
        "num_warps": 4,
        # Contracted multiply-adds would differ from eager PyTorch in the last bit.
        "enable_fp_fusion": False,
    }
    if g.layout == _TILE and not _portable():
        options["maxnreg"] = _TILE_REGISTERS
    return (g.samples * blocks * g.groups,), scalars, options


def _with_reciprocal(threshold: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if threshold is None:
        return None, None
    return threshold.contiguous(), threshold.contiguous().reciprocal()


def _launches_directly() -> bool:
    """Whether this version of Triton is known to launch compiled kernels with addresses."""
    return not _portable() and triton.__version__.split(".")[:2] in (["3", "6"], ["3", "7"])


_hooks: Any = getattr(triton, "knobs").runtime  # noqa: B009 its types do not name it


def _hooked() -> bool:
    """Whether somebody, such as a profiler, has asked Triton to be told of each launch."""
    enter, leave = _hooks.launch_enter_hook, _hooks.launch_exit_hook
    return (enter is not None and bool(enter.calls)) or (leave is not None and bool(leave.calls))


def divisor(d: int) -> tuple[int, int]:
    """(magic, shift) by which ``layout.quotient`` divides a number below 2³¹ by d.

    The magic is a word of 32 bits as a signed number: an int beyond would be of another type to
    Triton, and its kernel compiled twice.
    """
    shift = (d - 1).bit_length()
    magic = (2**shift - d) * 2**32 // d + 1
    return magic - (magic >> 31 << 32), shift


def normal_(out: Tensor, seeds: Tensor, rows: Tensor, stream: int) -> None:
    """Fills ``out``, contiguous float32 (batch, ...), with counter noise; seeds, rows: (batch,)."""
    if out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(f"out must be contiguous float32, got {_describe(out)}")
    _check_seeds(seeds, out)
    _check_vector("rows", rows, torch.int32, out)
    if out.numel() == 0:
        return
    n = out.numel() // out.shape[0]
    most = 4 * _INTERPRETED_FOURS if _INTERPRETED else 1024
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
            PORTABLE=_portable(),
            num_warps=4,
            enable_fp_fusion=False,
        )


# Each launch asks these, because torch.cuda's own functions initialise and check more each time.
_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def _portable() -> bool:
    return _INTERPRETED or torch.version.hip is not None


def _device(x: Tensor) -> AbstractContextManager[object]:
    # Triton launches on the current device, which need not be the tensor's.
    return torch.cuda.device(x.device.index) if x.is_cuda else nullcontext()


@functools.cache
def _form(channels: int, fours: bool) -> tuple[int, int]:
    """(layout, channels of a program) by the kernel's own functions, which take 5 µs a call."""
    layout = int(layout_of(channels, fours))
    return layout, int(block_channels(channels, layout))


@dataclass(frozen=True)
class _Geometry:
    """How a step's elements lie in memory, in the kernel's terms."""

    samples: int
    n: int  # elements of each
    output_stride: int  # from one sample of the model's output to the next
    channels: int = 0  # 0: state and output lie in the order of their elements
    x_pixel: int = 1  # from one pixel of the state to the next; 1 where channel follows channel
    output_pixel: int = 1  # the same of the model's output

    @functools.cached_property
    def run(self) -> int:
        """Elements in a row that follow one another logically."""
        return self.n // max(self.channels, 1)

    @functools.cached_property
    def in_fours(self) -> bool:
        """Whether every four that share a Philox call can be one access."""
        return self.run % 4 == 0 and self.output_stride % 4 == 0

    @functools.cached_property
    def layout(self) -> int:
        return _form(self.channels, self.in_fours)[0]

    @functools.cached_property
    def width(self) -> int:
        """Channels that a program takes."""
        return _form(self.channels, self.in_fours)[1]

    @property
    def groups(self) -> int:
        """Programs for the channels of a pixel."""
        return max(self.channels, 1) // self.width

    @property
    def fours(self) -> int:
        """Fours of a run; those of a channel may begin up to three pixels early."""
        early = 3 if self.channels and not self.in_fours else 0
        return -(-(self.run + early) // 4)


def _geometry(
    x: Tensor,
    output: Tensor,
    rows: Tensor | int,
    seeds: Tensor | None,
    guidance: Tensor | None,
    threshold: Tensor | None,
    twice: bool,
) -> _Geometry:
    batch = len(x)
    shape = (batch if guidance is None else 2 * batch, *x.shape[1:])
    if output.dtype not in _MODEL_DTYPES or output.shape != shape or output.device != x.device:
        raise ValueError(
            f"output must be float32, bfloat16 or float16 of shape {tuple(shape)} on {x.device}, "
            f"got {_describe(output)}"
        )
    n = x.numel() // max(batch, 1)
    output_stride = output.stride(0) if len(output) > 1 else n
    by_sample = {
        "rows differ": isinstance(rows, Tensor) and rows.stride(0) != 0,
        "there are seeds": seeds is not None,
        "guidance differs": guidance is not None and guidance.stride(0) != 0,
        "there is a threshold": threshold is not None,
        "the samples of output are apart": batch > 1 and output_stride != x.stride(0),
    }
    alike = _inner_strides(output) == _inner_strides(x)
    stacked = {
        "guidance stacks output": guidance is not None,
        "next_input is stacked": twice,
        "output lies otherwise than x": not alike,
    }
    reasons = [reason for reason, holds in (by_sample | stacked).items() if holds]
    if reasons and batch > 1 and x.numel() and x.stride(0) != n:
        raise ValueError(
            f"x must hold each sample in one stretch where {reasons[0]}, got {_describe(x)}"
        )
    if alike and (seeds is None or x.is_contiguous()):
        if any(by_sample.values()):
            return _Geometry(batch, n, output_stride)
        # One sample of all: from its output to that of the condition, where there is one.
        return _Geometry(1, x.numel(), x.numel() if guidance is None else output_stride * batch)
    x_pixel, output_pixel = pixel_spacing(x), pixel_spacing(output)
    if x_pixel is None or output_pixel is None:
        name, tensor = ("x", x) if x_pixel is None else ("output", output)
        raise ValueError(f"{name} must be contiguous or channels last, got {_describe(tensor)}")
    if seeds is not None and n >= _FEWER_ELEMENTS:
        raise ValueError(
            f"x must hold fewer than 2³⁴ elements a sample where pixels are channels last, noise "
            f"being drawn from seeds, got {_describe(x)}"
        )
    return _Geometry(batch, n, output_stride, x.shape[1], x_pixel, output_pixel)


def pixel_spacing(tensor: Tensor) -> int | None:
    """From one pixel of a sample to the next, in elements; 1 where channel follows channel.

    None where the elements of a sample lie in any other order. A pixel holds its channels, or
    twice as many: a learned variance follows.
    """
    if tensor.dim() < 2:
        return 1
    strides, (channels, *pixels) = tensor.stride()[1:], tensor.shape[1:]

    def lie(channel: int, pixel: int) -> bool:
        """Whether channels and pixels lie so far apart; a dimension of one says nothing."""
        apart = [channel, *(pixel * math.prod(pixels[i + 1 :]) for i in range(len(pixels)))]
        of = zip(strides, apart, tensor.shape[1:], strict=True)
        return all(size == 1 or stride == expected for stride, expected, size in of)

    if lie(math.prod(pixels), 1):
        return 1
    spacing = next(
        (s for s, n in zip(strides[:0:-1], pixels[::-1], strict=True) if n > 1), channels
    )
    return spacing if lie(1, spacing) and spacing in (channels, 2 * channels) else None


def _block(g: _Geometry, noisy: bool, light: bool) -> tuple[int, int]:
    """(quads, parts): a program takes so many parts of so many fours, of each of its channels.

    ``light``: an ε model's step without guidance, a threshold or the next input. The interpreter
    pays for each program alone.
    """
    # A four for each lane (AMD's wavefronts have 64), or lanes would exchange what they hold.
    lanes = 256 if _portable() else 128
    if g.layout == _TILE:
        # As a share of a copy's speed on an H200, four channels with noise, 2048 elements a part:
        # 0.944 with four parts a program, 0.905 with two, 0.932 with one; 4096 elements are slower.
        # What more a step does, more channels, or an output that is turned as well, leave no
        # registers for four parts: they would spill.
        alike = g.x_pixel == g.output_pixel
        turned = (g.x_pixel == 1) != (g.output_pixel == 1)
        quads = (512 if noisy and not turned else 256) // g.width
        parts = 4 if noisy and alike and light and g.width == 4 else 1
    elif g.layout == _FEW:
        # Three channels with noise: 0.948 with one part, 0.919 with two, 0.679 with four.
        quads, parts = lanes, 1
    elif g.layout == _SCATTERED:
        quads, parts = lanes, 4 if g.width == 1 and not noisy else 2
    elif not g.in_fours:
        quads, parts = lanes, 4
    else:
        # Two streams read and one written: 1.011 with one part of 1024 elements, 0.997 with two,
        # 0.990 with four; two and two 0.969, 0.958, 0.946; three and one 1.031, 1.020, 0.997.
        # Counter noise has been measured with four parts alone, at 0.965: each part spreads the
        # program's own work over more elements.
        quads, parts = 256, 4 if noisy else 1
    if _INTERPRETED:
        quads = _INTERPRETED_FOURS
    if g.samples * g.n < _LARGE or g.fours < quads * parts:
        parts = 1
    # A smaller block is the next power of two, and four fours at least.
    return (quads if g.fours > quads else max(4, 1 << max(g.fours - 1, 0).bit_length())), parts


def _check_state(
    x: Tensor,
    out: Tensor,
    x0: Tensor | None,
    noise: Tensor | None,
    next_input: Tensor | None,
) -> None:
    if x.dim() < 1 or x.dtype != torch.float32 or not _is_dense(x):
        raise ValueError(f"x must be dense float32 of shape (batch, ...), got {_describe(x)}")
    _check_like("out", out, x, torch.float32)
    if x0 is not None:
        _check_like("x0", x0, x, torch.float32)
    if noise is not None:
        _check_like("noise", noise, x, torch.float32)
    if next_input is not None:
        if next_input.dtype not in _MODEL_DTYPES:
            raise ValueError(
                f"next_input must be float32, bfloat16 or float16, got {_describe(next_input)}"
            )
        stacked = next_input.dim() > 0 and len(next_input) == 2 * len(x) > 0
        for half in next_input.chunk(2) if stacked else (next_input,):
            _check_like("next_input", half, x, next_input.dtype)
        if stacked and next_input.stride(0) * len(x) != x.numel():
            raise ValueError(f"next_input must be dense, got {_describe(next_input)}")


def _check_coefficients(
    x: Tensor,
    table: Tensor,
    rows: Tensor | int,
    seeds: Tensor | None,
    guidance: Tensor | None,
    threshold: Tensor | None,
) -> None:
    if table.dim() != 2 or table.shape[1] != COLUMNS or not table.is_contiguous():
        raise ValueError(f"table must be contiguous (steps, {COLUMNS}), got {_describe(table)}")
    if table.dtype != torch.float32 or table.device != x.device:
        raise ValueError(f"table must be float32 on {x.device}, got {_describe(table)}")
    if isinstance(rows, Tensor):
        _check_vector("rows", rows, torch.int32, x)
    elif not 0 <= rows < len(table):
        raise ValueError(f"rows must lie in [0, {len(table)}), got {rows}")
    if seeds is not None:
        _check_seeds(seeds, x)
    if guidance is not None:
        _check_vector("guidance", guidance, torch.float32, x)
    if threshold is not None:
        _check_vector("threshold", threshold, torch.float32, x)


def _check_like(name: str, tensor: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    if tensor.shape != x.shape or _strides(tensor) != _strides(x):
        raise ValueError(f"{name} must have the shape and strides of x, got {_describe(tensor)}")
    if tensor.dtype != dtype or tensor.device != x.device:
        raise ValueError(f"{name} must be {dtype} on {x.device}, got {_describe(tensor)}")


def _check_vector(name: str, tensor: Tensor, dtype: torch.dtype, x: Tensor) -> None:
    if tensor.shape != x.shape[:1] or tensor.dtype != dtype or tensor.device != x.device:
        raise ValueError(
            f"{name} must be {dtype} of shape ({x.shape[0]},) on {x.device}, "
            f"got {_describe(tensor)}"
        )


def _check_seeds(seeds: Tensor, x: Tensor) -> None:
    _check_vector("seeds", seeds, torch.int64, x)
    if seeds.stride(0) != 1 and len(seeds) > 1:
        raise ValueError(f"seeds must be contiguous, got {_describe(seeds)}")


def _inner_strides(tensor: Tensor) -> list[int]:
    """The strides that matter within a sample: those of dimensions longer than one."""
    return [s for s, n in zip(tensor.stride()[1:], tensor.shape[1:], strict=True) if n > 1]


def _strides(tensor: Tensor) -> list[int]:
    """The strides that matter: those of dimensions longer than one."""
    return [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]


def _describe(tensor: Tensor) -> str:
    return (
        f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} "
        f"with strides {tensor.stride()} on {tensor.device}"
    )
