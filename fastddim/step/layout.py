"""How tensors lie in memory: which ones a backend can use as they are, and copies of the others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

is_dense = torch.ops.aten.is_non_overlapping_and_dense.default
"""Returns whether a tensor fills one stretch of memory, with its dimensions in any order."""


def like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns a new tensor of x's shape, which lies as x does if x is dense."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.preserve_format)


def with_batch(batch: int, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a new tensor of ``batch`` samples, each of which lies as one of x's."""
    if batch == len(x):
        return like(x, dtype)
    strides = (x.numel() // max(len(x), 1), *x.stride()[1:])
    return torch.empty_strided((batch, *x.shape[1:]), strides, dtype=dtype, device=x.device)


def input_like(x: Tensor, dtype: torch.dtype, copies: int) -> Tensor:
    """Returns a new model input: ``copies`` times the batch, each sample laid out as x's."""
    if not is_dense(x) or not apart(x):
        return torch.empty((copies * len(x), *x.shape[1:]), dtype=dtype, device=x.device)
    return with_batch(copies * len(x), x, dtype)


def alike(tensor: Tensor, x: Tensor) -> bool:
    """Returns whether the strides that matter, those of dimensions longer than one, are equal."""
    return tensor.stride() == x.stride() or all(
        a == b for a, b, n in zip(tensor.stride(), x.stride(), x.shape, strict=True) if n > 1
    )


def apart(x: Tensor) -> bool:
    """Returns whether each sample of a dense tensor is one stretch of memory."""
    return len(x) < 2 or x.stride(0) * len(x) == x.numel()


def is_channels_last(x: Tensor) -> bool:
    """Returns whether the channels of each pixel are adjacent, in any number of dimensions."""
    return x.dim() > 2 and x.movedim(1, -1).is_contiguous()


def has_variance(output: Tensor, x: Tensor) -> bool:
    """Returns whether the output has twice x's channels, the second half a learned variance."""
    if output.numel() == x.numel() != 0:
        return False  # The usual case, decided by one comparison.
    return output.dim() == x.dim() > 2 and output.shape[1] == 2 * x.shape[1]


def laid_out(tensor: Tensor, x: Tensor) -> Tensor:
    """Returns ``tensor`` with x's strides: a flat pass over two layouts would mix up elements."""
    return tensor if alike(tensor, x) else like(x, tensor.dtype).copy_(tensor)


def readable(output: Tensor, x: Tensor, reads: Callable[[Tensor, Tensor], bool]) -> bool:
    """Returns whether a backend reads the model's output as it lies.

    Each sample must be laid out as x's, however far apart the samples are, or in another order that
    the backend ``reads``.
    """
    if len(output) == len(x) and alike(output, x):
        return True
    return apart(x) and (alike(output[:1], x[:1]) or reads(x, output))


def writable(next_input: Tensor, x: Tensor) -> bool:
    """Returns whether a pass over x can write the next model input in place."""
    if len(next_input) == len(x):
        return alike(next_input, x)
    return alike(next_input[:1], x[:1]) and is_dense(next_input)


def write_next(next_input: Tensor, x_s: Tensor) -> None:
    """Writes x_s to the next model input, once or for both halves of classifier-free guidance."""
    if next_input.shape[0] != x_s.shape[0]:
        next_input = next_input.unflatten(0, (-1, x_s.shape[0]))
    next_input.copy_(x_s)
