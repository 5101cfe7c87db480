"""generalized_steps of ermongroup/ddim: the same call, the same results, one pass a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from fastddim import reference
from fastddim.buffers import Spare
from fastddim.check import finite, whole
from fastddim.coefficients import checked_factors
from fastddim.ops import ddim_step
from fastddim.stream import normals, passed_over


def generalized_steps(
    x: Tensor,
    seq: Sequence[int],
    model: Callable[[Tensor, Tensor], Tensor],
    b: Tensor,
    eta: float = 0,
    keep: Literal["all", "last"] = "all",
) -> tuple[list[Tensor], list[Tensor]]:
    """The paper's loop, unchanged for its caller: bit-identical in float32 on the same device.

    The generator is left where that loop leaves it: it draws at every step, at η = 0 too. Other
    dtypes, torch's default one included, run that loop itself (``fastddim.reference``).

    Args:
        x: x_T, (batch, channels, height, width).
        seq: τ in increasing order, as ``range(0, T, T // S)``; repeated values are kept.
        model: ε(x, t), t being float32 of shape (batch,).
        b: β, float32 of shape (T,), on x's device.
        eta: η ≥ 0.
        keep: ``"all"`` returns what the original does. ``"last"`` returns lists of one and keeps
            nothing else, so that ``[0][-1]`` still holds the images.

    Returns:
        (xs, x0_preds): len(seq) + 1 states from x on, and len(seq) predictions; on the CPU.

    Raises:
        TypeError, ValueError: naming the argument, the value and what is allowed. Where the
            original would give NaN for a large η, the largest that works is named.
    """
    tau = _checked(x, seq, model, b, eta, keep)
    if not tau or {x.dtype, b.dtype, torch.get_default_dtype()} != {torch.float32}:
        xs, x0_preds = reference.generalized_steps(x, tau, model, b, eta)
        return (xs, x0_preds) if keep == "all" else (xs[-1:], x0_preds[-1:])
    table = _table(tau, b, eta)
    rows = torch.arange(len(tau), dtype=torch.int32, device=x.device)
    xs, x0_preds = [x], []
    spare, draw = Spare(), normals(x) if eta else passed_over(x)
    for row, i in enumerate(reversed(tau)):
        with torch.no_grad():
            eps = model(x, torch.full((len(x),), float(i), device=x.device))
            z = draw()
            x_s, x0 = ddim_step(
                x,
                eps,
                table,
                rows[row],
                noise=z,
                want_x0=keep == "all" or row == len(tau) - 1,
                out=spare.take(),
            )
        if row:  # the first x is the caller's
            spare.keep(x)
        x = x_s
        del x_s, eps
        if keep == "last":
            xs, x0_preds = [], []
        if x0 is not None:
            xs.append(x.to("cpu"))
            x0_preds.append(x0.to("cpu"))
    return xs, x0_preds


@torch.no_grad()
def _table(tau: Sequence[int], b: Tensor, eta: float) -> Tensor:
    """The coefficients by the original's own float32 operations, on β's device."""
    t = torch.tensor(tau[::-1], device=b.device)
    s = torch.tensor([-1, *tau[:-1]][::-1], device=b.device)
    at, at_next = (reference.compute_alpha(b, level).flatten() for level in (t, s))

    def factors(eta: float) -> tuple[Tensor, Tensor]:
        c1 = eta * ((1 - at / at_next) * (1 - at_next) / (1 - at)).sqrt()
        return c1, ((1 - at_next) - c1**2).sqrt()

    c1, c2 = checked_factors(factors, eta, "this seq")
    a_t, b_t = at.sqrt(), (1 - at).sqrt()
    return torch.stack([a_t, 1 / a_t, b_t, 1 / b_t, at_next.sqrt(), c1, c2], dim=1)


def _checked(
    x: Tensor, seq: Sequence[int], model: object, b: Tensor, eta: float, keep: str
) -> list[int]:
    """The arguments found sound; ``seq`` as a list of ints."""
    for name, tensor, dims in (("x", x, 4), ("b", b, 1)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != dims or not tensor.is_floating_point():
            raise ValueError(
                f"{name} must be floating point with {dims} dimension{'s' * (dims > 1)}, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
    if b.device != x.device:
        raise ValueError(f"b must be on {x.device} with x, got {b.device}")
    if not ((b > 0) & (b < 1)).all():
        raise ValueError(f"b must lie in (0, 1), got {b.min():g} to {b.max():g}")
    if x.requires_grad:
        raise ValueError("x requires grad, which sampling does not carry: pass x.detach()")
    if not callable(model):
        raise TypeError(f"model must be callable, got {type(model).__name__}")
    if keep not in ("all", "last"):
        raise ValueError(f'keep must be "all" or "last", got {keep!r}')
    if finite("eta", eta) < 0:
        raise ValueError(f"eta must be ≥ 0, got {eta:g}")
    if isinstance(seq, str) or not hasattr(seq, "__iter__"):
        raise TypeError(f"seq must be a sequence of integers, got {type(seq).__name__}")
    tau = [whole(f"seq[{k}]", i, low=0, high=len(b) - 1) for k, i in enumerate(seq)]
    for low, high in pairwise(tau):
        if low > high:
            raise ValueError(f"seq must not decrease, got {high} after {low}")
    return tau
