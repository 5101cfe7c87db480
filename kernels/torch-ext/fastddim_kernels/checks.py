"""The checks of a launch's tensors, each of whose errors is one line."""

from __future__ import annotations

import torch
from torch import Tensor

COLUMNS = 7
"""The columns of the coefficient table; order 2 has one more, κ."""
COLUMNS_ROUNDED = 9
"""The columns of the table with ``rounding``: √ᾱ_t and √(1−ᾱ_t) again, where they multiply."""
COLUMNS_OF_MANY = 9
"""The columns of the tables of several samplers: κ, and the number of a row's counter noise."""
_is_dense = torch.ops.aten.is_non_overlapping_and_dense.default
MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_state(
    x: Tensor,
    out: Tensor,
    x0: Tensor | None,
    noise: Tensor | None,
    next_input: Tensor | None,
    history: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Raises ``ValueError`` where a tensor does not lie as the kernel takes x and the results."""
    if x.dim() < 1 or x.dtype != dtype or not _is_dense(x):
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"x must be dense {name} of shape (batch, ...), got {describe(x)}")
    _check_like("out", out, x, dtype)
    if x0 is not None:
        _check_like("x0", x0, x, dtype)
    if noise is not None:
        _check_like("noise", noise, x, dtype)
    if history is not None:
        _check_like("history", history, x, torch.float32)
    if next_input is not None:
        if next_input.dtype not in MODEL_DTYPES:
            raise ValueError(
                f"next_input must be float32, bfloat16 or float16, got {describe(next_input)}"
            )
        stacked = next_input.dim() > 0 and len(next_input) == 2 * len(x) > 0
        for half in next_input.chunk(2) if stacked else (next_input,):
            _check_like("next_input", half, x, next_input.dtype)
        if stacked and next_input.stride(0) * len(x) != x.numel():
            raise ValueError(f"next_input must be dense, got {describe(next_input)}")


def check_coefficients(
    x: Tensor,
    table: Tensor,
    rows: Tensor | int,
    seeds: Tensor | None,
    guidance: Tensor | None,
    threshold: Tensor | None,
    history: Tensor | None,
    rounding: torch.dtype | None,
) -> None:
    """Raises ``ValueError`` where the table or a value of a sample is not what the kernel takes."""
    columns = [COLUMNS + (history is not None), COLUMNS_OF_MANY]
    if rounding is not None:
        columns = [COLUMNS_ROUNDED]
    if table.dim() != 2 or table.shape[1] not in columns or not table.is_contiguous():
        allowed = " or ".join(f"(steps, {n})" for n in columns)
        raise ValueError(f"table must be contiguous {allowed}, got {describe(table)}")
    if table.dtype != torch.float32 or table.device != x.device:
        raise ValueError(f"table must be float32 on {x.device}, got {describe(table)}")
    if isinstance(rows, Tensor):
        check_vector("rows", rows, torch.int32, x)
    elif not 0 <= rows < len(table):
        raise ValueError(f"rows must lie in [0, {len(table)}), got {rows}")
    if seeds is not None:
        check_seeds(seeds, x)
    if guidance is not None:
        check_vector("guidance", guidance, torch.float32, x)
    if threshold is not None:
        check_vector("threshold", threshold, torch.float32, x)


def check_rounding(
    rounding: torch.dtype,
    output: Tensor,
    seeds: Tensor | None,
    guidance: Tensor | None,
    next_input: Tensor | None,
    history: Tensor | None,
) -> None:
    """Raises ``ValueError`` where a step that rounds gets an argument that it does not take."""
    if rounding not in (torch.bfloat16, torch.float16) or output.dtype != rounding:
        raise ValueError(
            f"rounding must be bfloat16 or float16, the dtype of output, got {rounding} with "
            f"{describe(output)}"
        )
    given = {"seeds": seeds, "guidance": guidance, "next_input": next_input, "history": history}
    for name, tensor in given.items():
        if tensor is not None:
            raise ValueError(f"{name} must be None with rounding, got {describe(tensor)}")


def _check_like(name: str, tensor: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    if tensor.shape != x.shape or _strides(tensor) != _strides(x):
        raise ValueError(f"{name} must have the shape and strides of x, got {describe(tensor)}")
    if tensor.dtype != dtype or tensor.device != x.device:
        raise ValueError(f"{name} must be {dtype} on {x.device}, got {describe(tensor)}")


def check_vector(name: str, tensor: Tensor, dtype: torch.dtype, x: Tensor) -> None:
    if tensor.shape != x.shape[:1] or tensor.dtype != dtype or tensor.device != x.device:
        raise ValueError(
            f"{name} must be {dtype} of shape ({x.shape[0]},) on {x.device}, got {describe(tensor)}"
        )


def check_seeds(seeds: Tensor, x: Tensor) -> None:
    check_vector("seeds", seeds, torch.int64, x)
    if seeds.stride(0) != 1 and len(seeds) > 1:
        raise ValueError(f"seeds must be contiguous, got {describe(seeds)}")


def inner_strides(tensor: Tensor) -> list[int]:
    """Returns the strides that matter within a sample: those of dimensions longer than one."""
    return [s for s, n in zip(tensor.stride()[1:], tensor.shape[1:], strict=True) if n > 1]


def _strides(tensor: Tensor) -> list[int]:
    """Returns the strides that matter: those of dimensions longer than one."""
    return [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]


def describe(tensor: Tensor) -> str:
    return (
        f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} "
        f"with strides {tensor.stride()} on {tensor.device}"
    )
