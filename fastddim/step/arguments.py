"""The checks of a step's arguments, before any work, and in one line each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastddim.check import finite, kind, shown, truth, whole
from fastddim.coefficients import COLUMNS, COLUMNS_2, COLUMNS_OF_MANY, PREDICTIONS
from fastddim.step import layout
from fastddim.step.backends import Fixed, StepArgs
from fastddim.step.rows import check_columns

STATE = torch.float32
OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of a model's output, and of the next model input."""


def checked_table(table: Any) -> Tensor:
    """Returns the coefficient table that ``bind`` is given."""
    if not isinstance(table, Tensor):
        raise TypeError(f"table must be a tensor, got {kind(table)}")
    given = table.shape[1] if table.dim() == 2 else 0
    known = given in (len(COLUMNS_2), len(COLUMNS_OF_MANY))
    _check_tensor("table", table, table, (STATE,), (-1, given if known else len(COLUMNS)))
    return table


def checked_fixed(
    prediction: Any, clip: float | None, rederive: bool, noise_first: bool, posterior: bool
) -> Fixed:
    """Returns the options that a run fixes."""
    if not isinstance(prediction, str) or prediction not in PREDICTIONS:
        names = ", ".join(PREDICTIONS)
        raise ValueError(f"prediction must be one of {names}, got {shown(prediction)}")
    if clip is not None:
        # ``finite`` turns an int, for which Triton would compile another kernel, into a float.
        clip = finite("clip", clip)
        if not clip > 0:
            raise ValueError(f"clip must be > 0, got {clip:g}")
    rederive, posterior = truth("rederive", rederive), truth("posterior", posterior)
    noise_first = truth("noise_first", noise_first)
    if posterior and rederive:
        raise ValueError("rederive must be False with posterior, whose sum holds no ε, got True")
    return Fixed(PREDICTIONS.index(prediction), noise_first, clip, rederive, posterior)


def checked_rows(
    fixed: Fixed,
    x: Tensor,
    output: Tensor,
    table: Tensor,
    rows: Tensor | int,
    seeds: Tensor | None,
    noise: Tensor | None,
    guidance: Tensor | float | None,
    threshold: Tensor | None,
    out: Tensor | None,
    x0_out: Tensor | None,
    next_input: Tensor | None,
    history: Tensor | None = None,
) -> Tensor | int:
    """Returns ``rows`` if ``ddim_step`` allows all arguments, and raises otherwise."""
    if not torch.compiler.is_compiling() and transformed():
        _check_constants(
            x=x, output=output, table=table, rows=rows, seeds=seeds, noise=noise,
            guidance=guidance, threshold=threshold, out=out, x0_out=x0_out, history=history,
        )  # fmt: skip
    _check_tensor("x", x, x, (STATE,))
    if x.dim() == 0:
        raise ValueError("x must have shape (batch, ...), got ()")
    if guidance is not None and not isinstance(guidance, Tensor):
        finite("guidance", guidance)
    batch = x.shape[0]
    expected = x.shape if guidance is None else (2 * batch, *x.shape[1:])
    if isinstance(output, Tensor) and layout.has_variance(output, x):
        expected = (expected[0], 2 * expected[1], *expected[2:])
    _check_tensor("output", output, x, OUTPUTS, expected)
    of_many = isinstance(table, Tensor) and table.dim() == 2
    of_many = of_many and table.shape[1] == len(COLUMNS_OF_MANY)
    if of_many:
        _check_tensor("table", table, x, (STATE,), (-1, len(COLUMNS_OF_MANY)))
        if history is not None:
            _check_tensor("history", history, x, (STATE,))
    elif history is None:
        if isinstance(table, Tensor) and table.dim() == 2 and table.shape[1] == len(COLUMNS_2):
            raise ValueError("history must be given with a table of order 2, got None")
        _check_tensor("table", table, x, (STATE,), (-1, len(COLUMNS)))
    else:
        _check_tensor("table", table, x, (STATE,), (-1, len(COLUMNS_2)))
        _check_tensor("history", history, x, (STATE,))
    if isinstance(rows, Tensor):
        _check_tensor("rows", rows, x, (torch.int32,), x.shape[:1] if rows.dim() else ())
    else:
        rows = whole("rows", rows, low=0, high=len(table) - 1)
    if seeds is not None:
        if noise is not None:
            raise ValueError("noise comes from seeds or from a tensor, got both")
        _check_tensor("seeds", seeds, x, (torch.int64,), x.shape[:1])
    if noise is not None:
        _check_tensor("noise", noise, x, (STATE,))
    if isinstance(guidance, Tensor):
        _check_tensor("guidance", guidance, x, (STATE,), x.shape[:1] if guidance.dim() else ())
    if threshold is not None:
        if fixed.clip is not None:
            raise ValueError(
                f"clip must be left out where there is a threshold, got {fixed.clip:g}"
            )
        shape = x.shape[:1] if isinstance(threshold, Tensor) and threshold.dim() else ()
        _check_tensor("threshold", threshold, x, (STATE,), shape)
    for name, tensor in (("out", out), ("x0_out", x0_out)):
        if tensor is not None:
            _check_tensor(name, tensor, x, (STATE,))
    if next_input is not None:
        copies = 2 if isinstance(next_input, Tensor) and next_input.shape[:1] != x.shape[:1] else 1
        _check_tensor("next_input", next_input, x, OUTPUTS, (copies * batch, *x.shape[1:]))
    return rows


_MAY_SHARE = {("out", "x"), ("x0_out", "history")}


def check_memory(first: StepArgs) -> None:
    """Raises ``ValueError`` where writing a result would destroy another one, or an argument.

    Two tensors share memory here if they begin at one address: views of one tensor may lie between
    each other's elements, as two states of a trajectory do.
    """
    others = {
        "x": first.x, "output": first.output, "noise": first.noise, "history": first.history
    }  # fmt: skip
    written = {"out": first.out, "x0_out": first.x0, "next_input": first.next_input}
    for name, tensor in written.items():
        if tensor is None or not tensor.numel():
            continue
        strides = zip(tensor.shape, tensor.stride(), strict=True)
        if any(n > 1 and not stride for n, stride in strides):
            raise ValueError(
                f"{name} must have memory for each of its elements, got a tensor of shape "
                f"{tuple(tensor.shape)} with strides {tensor.stride()}"
            )
        for other, value in others.items():
            if value is None or value.data_ptr() != tensor.data_ptr():
                continue
            if (name, other) not in _MAY_SHARE or not layout.alike(tensor, value):
                raise ValueError(f"{name} must not share memory with {other}, got the same memory")
        others[name] = tensor


def check_bound(fixed: Fixed, first: StepArgs) -> None:
    """Raises ``ValueError`` where the table has other columns than ``fixed`` and ``first`` need.

    Every backend binds after this check, for callers without other checks too. A step that rounds
    takes no seeds, guidance, next input or history.
    """
    check_columns("table", first.table.shape[1], first.history is not None, fixed.rounding)
    if fixed.rounding is not None:
        for name in ("seeds", "guidance", "next_input", "history"):
            if getattr(first, name) is not None:
                raise ValueError(f"{name} must be None with rounding, got a tensor")


def transformed() -> bool:
    """Returns whether this call is differentiated forwards or transformed by ``torch.func``.

    The op has no rule for either: its results would be constants, and memory that is kept for a
    later step would belong to the transform. torch.compile cannot trace this function, and its
    traces do not need it.
    """
    return _interpreter() is not None or forward_ad._current_level >= 0


def check_untransformed(name: str) -> None:
    """Raises ``ValueError`` where ``name``, which carries no derivatives, runs in a transform."""
    if not torch.compiler.is_compiling() and transformed():
        raise ValueError(
            f"{name} must not run inside torch.func's transforms or forward-mode differentiation: "
            f"it carries no derivatives"
        )


_functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009 its types do not name it
_interpreter: Callable[[], Any] = _functorch.peek_interpreter_stack


def _check_tensor(
    name: str,
    tensor: Tensor,
    x: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: Sequence[int] | None = None,
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    shape = x.shape if shape is None else shape
    here = tensor.shape == shape and tensor.dtype in dtypes and tensor.device == x.device
    if here and not tensor.requires_grad:
        return  # The usual case: the comparisons below would cost every step time.
    if len(tensor.shape) != len(shape) or any(
        want not in (-1, got) for want, got in zip(shape, tensor.shape, strict=True)
    ):
        # Only the first dimension of a table may have any size.
        wanted = str(tuple(shape)).replace("-1", "steps")
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be {allowed}, got {str(tensor.dtype)[6:]}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x.device} with x, got {tensor.device}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, which the step does not carry: detach it or use torch.no_grad()"
        )


def _check_constants(**arguments: object) -> None:
    """Raises where a tensor carries a forward derivative or belongs to ``torch.func``."""
    for name, tensor in arguments.items():
        if not isinstance(tensor, Tensor):
            continue
        wrapped = _functorch.is_functorch_wrapped_tensor(tensor)
        if wrapped or forward_ad.unpack_dual(tensor).tangent is not None:
            raise ValueError(
                f"{name} is transformed by torch.func or carries a forward derivative, which the "
                f"step does not support: take it out of the transform"
            )
