"""From tensors to launches: one function a kernel, checked and asking the device nothing."""

# A launch takes Triton's own options beside the kernel's parameters.
# pyright: reportCallIssue=false

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from .noise import normal_kernel
from .step import ddim_step_kernel

COLUMNS = 7
_is_dense = torch.ops.aten.is_non_overlapping_and_dense.default
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
# The interpreter pays for each program, a GPU for each idle lane.
_MAX_BLOCK = 16384 if _INTERPRETED else 1024


def ddim_step(
    x: Tensor,
    output: Tensor,
    table: Tensor,
    rows: Tensor,
    out: Tensor,
    x0: Tensor | None = None,
    *,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    prediction: int = 0,
    noise_first: bool = True,
    clip: float | None = None,
) -> None:
    """Writes x_s to ``out`` and, if given, the predicted x0 to ``x0``.

    Args:
        x: x_t, float32, dense, of shape (batch, ...).
        output: what the model returned, float32, bfloat16 or float16; shape and strides of x.
        table: (steps, 7) float32: √ᾱ_t, 1/√ᾱ_t, √(1−ᾱ_t), 1/√(1−ᾱ_t), √ᾱ_s, c1, c2.
        rows: (batch,) int32 in [0, steps), stride 0 where all samples are on the same row; where
            not, the batch must be x's outermost dimension in memory.
        seeds: (batch,) int64, for counter noise; x must then be contiguous.
        noise: z, float32, shape and strides of x. Neither: no noise is added.
        prediction: what the model returns: 0 ε, 1 v, 2 x0.
        noise_first: whether the noise is added before the direction to x_t or after it.
        clip: x0 is clamped to ±clip.
    """
    _check(x, output, table, rows, out, x0, seeds, noise)
    if x.numel() == 0:
        return
    batch, total = x.shape[0], x.numel()
    per_sample = rows.stride(0) != 0 or seeds is not None
    samples = batch if per_sample else 1
    n = total // samples
    block = min(_MAX_BLOCK, max(16, triton.next_power_of_2(n)))
    blocks = -(-n // block)
    with _device(x):
        ddim_step_kernel[(samples * blocks,)](
            x,
            output,
            noise,
            out,
            x0,
            table,
            rows,
            seeds,
            n,
            blocks,
            rows.stride(0),
            0.0 if clip is None else clip,
            COLUMNS=COLUMNS,
            PREDICTION=prediction,
            NOISE=2 if seeds is not None else 1 if noise is not None else 0,
            NOISE_FIRST=noise_first,
            CLIP=clip is not None,
            WRITE_X0=x0 is not None,
            VECTOR=n % 4 == 0,
            PORTABLE=_portable(),
            BLOCK_SIZE=block,
            num_warps=4,
            # Contracted multiply-adds would differ from eager PyTorch in the last bit.
            enable_fp_fusion=False,
        )


def normal_(out: Tensor, seeds: Tensor, rows: Tensor, stream: int) -> None:
    """Fills ``out``, contiguous float32 (batch, ...), with counter noise; seeds, rows: (batch,)."""
    if out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(f"out must be contiguous float32, got {_describe(out)}")
    _check_vector("seeds", seeds, torch.int64, out)
    _check_vector("rows", rows, torch.int32, out)
    if out.numel() == 0:
        return
    n = out.numel() // out.shape[0]
    block = min(_MAX_BLOCK, max(16, triton.next_power_of_2(n)))
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


def _portable() -> bool:
    return _INTERPRETED or torch.version.hip is not None


def _device(x: Tensor) -> AbstractContextManager[object]:
    # Triton launches on the current device, which need not be the tensor's.
    return torch.cuda.device(x.device.index) if x.is_cuda else nullcontext()


def _check(
    x: Tensor,
    output: Tensor,
    table: Tensor,
    rows: Tensor,
    out: Tensor,
    x0: Tensor | None,
    seeds: Tensor | None,
    noise: Tensor | None,
) -> None:
    if x.dim() < 1 or x.dtype != torch.float32 or not _is_dense(x):
        raise ValueError(f"x must be dense float32 of shape (batch, ...), got {_describe(x)}")
    if output.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"output must be float32, bfloat16 or float16, got {output.dtype}")
    _check_like("output", output, x, output.dtype)
    _check_like("out", out, x, torch.float32)
    if x0 is not None:
        _check_like("x0", x0, x, torch.float32)
    if noise is not None:
        _check_like("noise", noise, x, torch.float32)
    if table.dim() != 2 or table.shape[1] != COLUMNS or not table.is_contiguous():
        raise ValueError(f"table must be contiguous (steps, {COLUMNS}), got {_describe(table)}")
    if table.dtype != torch.float32 or table.device != x.device:
        raise ValueError(f"table must be float32 on {x.device}, got {_describe(table)}")
    _check_vector("rows", rows, torch.int32, x)
    if rows.stride(0) != 0 and not _samples_apart(x):
        raise ValueError(
            f"x must hold each sample in one stretch where rows differ, got {_describe(x)}"
        )
    if seeds is not None:
        if noise is not None:
            raise ValueError("noise comes from seeds or from a tensor, got both")
        if not x.is_contiguous():
            raise ValueError(f"x must be contiguous with seeds, got {_describe(x)}")
        _check_vector("seeds", seeds, torch.int64, x)


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


def _samples_apart(x: Tensor) -> bool:
    """Whether each sample of a dense tensor is one stretch of memory."""
    return len(x) < 2 or x.stride(0) * len(x) == x.numel() or x.numel() == 0


def _strides(tensor: Tensor) -> list[int]:
    """The strides that matter: those of dimensions longer than one."""
    return [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]


def _describe(tensor: Tensor) -> str:
    return (
        f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} "
        f"with strides {tensor.stride()} on {tensor.device}"
    )
