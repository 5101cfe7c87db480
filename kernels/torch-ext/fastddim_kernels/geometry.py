"""The geometry of a launch: how its tensors lie in memory, and the blocks of its programs."""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import MODEL_DTYPES, describe, inner_strides
from .layout import FEW, IN_ORDER, SCATTERED, TILE, block_channels, layout_of

_IN_ORDER, _FEW, _TILE, _SCATTERED = (layout.value for layout in (IN_ORDER, FEW, TILE, SCATTERED))
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
LARGE = 1 << 20
"""From this many elements on a program takes several parts, so that their common work costs each
element less. Fewer elements are better spread over the multiprocessors."""
INTERPRETED_FOURS = 4096
"""Fours of a part under the interpreter, which pays for each program."""
_MOST_REGISTERS = 64
_ODD_REGISTERS = 40
_FEWER_ELEMENTS = 1 << 34
"""Where pixels are channels last, the kernel counts the fours of a sample in 32 bits."""


def portable() -> bool:
    """Returns whether the kernels use no instruction that only NVIDIA's GPUs have."""
    return INTERPRETED or torch.version.hip is not None


@functools.cache
def _form(channels: int, fours: bool) -> tuple[int, int]:
    """Returns (layout, channels of a program) by the kernel's functions, which take 5 µs a call."""
    layout = int(layout_of(channels, fours))
    return layout, int(block_channels(channels, layout))


@dataclass(frozen=True)
class Geometry:
    """How a step's elements lie in memory, in the terms of the kernel."""

    samples: int
    n: int  # elements of a sample
    output_stride: int  # from one sample of the model's output to the next
    channels: int = 0  # 0 where state and output lie in the order of their elements
    x_pixel: int = 1  # from one pixel of the state to the next; 1 where channel follows channel
    output_pixel: int = 1  # from one pixel of the model's output to the next

    @functools.cached_property
    def run(self) -> int:
        """The number of adjacent elements that also follow one another logically."""
        return self.n // max(self.channels, 1)

    @functools.cached_property
    def in_fours(self) -> bool:
        """Whether each four elements of one Philox call can be one access."""
        return self.run % 4 == 0 and self.output_stride % 4 == 0

    @functools.cached_property
    def layout(self) -> int:
        return _form(self.channels, self.in_fours)[0]

    @functools.cached_property
    def width(self) -> int:
        """The channels that a program takes."""
        return _form(self.channels, self.in_fours)[1]

    @property
    def groups(self) -> int:
        """The number of programs for the channels of a pixel."""
        return max(self.channels, 1) // self.width

    @property
    def fours(self) -> int:
        """The fours of a run, whose first four may begin up to three elements before it."""
        early = 0 if self.in_fours else 3
        return -(-(self.run + early) // 4)


def geometry_of(
    x: Tensor,
    output: Tensor,
    rows: Tensor | int,
    seeds: Tensor | None,
    guidance: Tensor | None,
    threshold: Tensor | None,
    twice: bool,
) -> Geometry:
    """Returns the geometry of checked arguments, or raises where the kernel cannot read them."""
    batch = len(x)
    shape = (batch if guidance is None else 2 * batch, *x.shape[1:])
    if output.dtype not in MODEL_DTYPES or output.shape != shape or output.device != x.device:
        raise ValueError(
            f"output must be float32, bfloat16 or float16 of shape {tuple(shape)} on {x.device}, "
            f"got {describe(output)}"
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
    alike = inner_strides(output) == inner_strides(x)
    stacked = {
        "guidance stacks output": guidance is not None,
        "next_input is stacked": twice,
        "output lies otherwise than x": not alike,
    }
    reasons = [reason for reason, holds in (by_sample | stacked).items() if holds]
    if reasons and batch > 1 and x.numel() and x.stride(0) != n:
        raise ValueError(
            f"x must hold each sample in one stretch where {reasons[0]}, got {describe(x)}"
        )
    if alike and (seeds is None or x.is_contiguous()):
        if any(by_sample.values()):
            return Geometry(batch, n, output_stride)
        # All samples count as one. The stride leads to the conditional half of the output.
        return Geometry(1, x.numel(), x.numel() if guidance is None else output_stride * batch)
    x_pixel, output_pixel = pixel_spacing(x), pixel_spacing(output)
    if x_pixel is None or output_pixel is None:
        name, tensor = ("x", x) if x_pixel is None else ("output", output)
        raise ValueError(f"{name} must be contiguous or channels last, got {describe(tensor)}")
    if seeds is not None and n >= _FEWER_ELEMENTS:
        raise ValueError(
            f"x must hold fewer than 2³⁴ elements a sample where pixels are channels last, noise "
            f"being drawn from seeds, got {describe(x)}"
        )
    return Geometry(batch, n, output_stride, x.shape[1], x_pixel, output_pixel)


def pixel_spacing(tensor: Tensor) -> int | None:
    """Returns the elements from one pixel to the next; 1 where channel follows channel.

    Returns None where a sample lies in any other order. A pixel holds its channels, or twice as
    many where a learned variance follows them.
    """
    if tensor.dim() < 2:
        return 1
    strides, (channels, *pixels) = tensor.stride()[1:], tensor.shape[1:]

    def lie(channel: int, pixel: int) -> bool:
        """Returns whether channels and pixels lie this far apart, ignoring dimensions of one."""
        apart = [channel, *(pixel * math.prod(pixels[i + 1 :]) for i in range(len(pixels)))]
        of = zip(strides, apart, tensor.shape[1:], strict=True)
        return all(size == 1 or stride == expected for stride, expected, size in of)

    if lie(math.prod(pixels), 1):
        return 1
    spacing = next(
        (s for s, n in zip(strides[:0:-1], pixels[::-1], strict=True) if n > 1), channels
    )
    return spacing if lie(1, spacing) and spacing in (channels, 2 * channels) else None


def block_of(g: Geometry, noisy: bool, dense: bool) -> tuple[int, int]:
    """Returns (quads, parts): the fours of a part, and a program's parts, of each of its channels.

    ``dense`` is a step of many instructions for its bytes: it divides twice an element, or reads a
    16-bit output and moves nothing beside it and the state.
    """
    # Each lane takes a four (AMD's wavefronts have 64 lanes), or lanes would exchange elements.
    lanes = 256 if portable() else 128
    if g.layout == _TILE:
        # Four channels with noise, 2048 elements a part, on an H200: 38.1 µs with one part a
        # program, 38.6 with two, 40.0 with four; 4096 elements are slower. Where the output is
        # turned as well, 2048 elements would spill registers.
        turned = (g.x_pixel == 1) != (g.output_pixel == 1)
        quads, parts = (512 if noisy and not turned else 256) // g.width, 1
    elif g.layout == _FEW:
        # Three channels with noise: 0.948 of a copy's speed with one part, 0.919 with two, 0.679
        # with four.
        quads, parts = lanes, 1
    elif g.layout == _SCATTERED:
        # Programs of one warp: its lanes exchange their noise without shared memory or barriers.
        quads, parts = lanes // 4, 4 if g.width == 1 and not noisy else 2
    elif not noisy:
        # As a share of a copy's speed, two tensors read and one written: 1.011 with one part of
        # 1024 elements, 0.997 with two, 0.990 with four; two and two 0.969, 0.958, 0.946; three
        # and one 1.031, 1.020, 0.997.
        quads, parts = 256, 1
    elif not g.in_fours:
        # 38.4 µs with two parts, 39.7 with four.
        quads, parts = lanes, 2
    else:
        # ε with a float32 output: 37.3 µs with one part, 37.9 with two or four; with x0: 50.3,
        # 51.0, 52.1; with a bfloat16 output: 31.9, 32.2, 33.0; with guidance: 50.5, 50.9, 52.1. A
        # dense step of one part would exceed 48 instructions, or on sm_100 three quarters of the
        # room that a copy's time leaves.
        quads, parts = 256, 2 if dense else 1
    if INTERPRETED:
        quads = INTERPRETED_FOURS
    if g.samples * g.n < LARGE or g.fours < quads * parts:
        parts = 1
    # A block that one part covers is the next power of two, of four fours at least.
    return (quads if g.fours > quads else max(4, 1 << max(g.fours - 1, 0).bit_length())), parts


def warps_of(g: Geometry) -> int:
    """Returns the warps of a program."""
    return 1 if g.layout == _SCATTERED else 4


def registers(g: Geometry, noisy: bool) -> int | None:
    """Returns the most registers of a lane, or None where the compiler decides.

    With a tile of order 2 ptxas would take 72 registers, and fewer than eight programs would fit on
    a multiprocessor. Where up to three channels of the state are last, a limit makes ptxas take
    more: without one it takes 40 registers or fewer, and holds back loads until others have
    arrived, though every sector is read by two accesses. With 64 all loads are issued first. Where
    a sample with noise is no multiple of four, ptxas takes 32 registers without a limit and more
    instructions than with 40. Elsewhere ptxas takes fewer without a limit. AMD's compiler does not
    know the option.
    """
    if portable():
        return None
    if g.layout == _IN_ORDER:
        return _ODD_REGISTERS if noisy and not g.in_fours else None
    return _MOST_REGISTERS if g.layout == _TILE or (g.layout == _FEW and g.x_pixel != 1) else None


def divisor(d: int) -> tuple[int, int]:
    """Returns (magic, shift), by which ``layout.quotient`` divides a number below 2³¹ by d.

    The magic is a 32-bit word as a signed number: Triton would give a larger int another type, and
    compile the kernel twice.
    """
    shift = (d - 1).bit_length()
    magic = (2**shift - d) * 2**32 // d + 1
    return magic - (magic >> 31 << 32), shift
