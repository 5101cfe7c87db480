"""The original loops, of ermongroup/ddim: same calls and results, in one or two passes a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fastddim.check import finite, shown, whole
from fastddim.dropins._shared import Buffers, checked_factors, pack_rows, passed_over
from fastddim.step import reference
from fastddim.untraced import untraced

Step: TypeAlias = tuple[Tensor, Tensor | None]
"""(x_s, x0)"""


@untraced
def generalized_steps(
    x: Tensor,
    seq: Sequence[int],
    model: Callable[[Tensor, Tensor], Tensor],
    b: Tensor,
    eta: float = 0,
    keep: Literal["all", "last"] = "all",
) -> tuple[list[Tensor], list[Tensor]]:
    """Samples as the original loop does: bit-identical in float32 on the same device.

    The generator ends in the same state: the loop draws at every step, at η = 0 too. If x, b or
    torch's default dtype is not float32, ``fastddim.step.reference`` runs the original's
    operations.

        x0  = (x_t − √(1−ᾱ_t)·ε(x_t, t))/√ᾱ_t
        x_s = √ᾱ_s·x0 + σ·z + √(1 − ᾱ_s − σ²)·ε                (Song et al. 2021, eq. 12)

    Args:
        x: x_T, (batch, channels, height, width).
        seq: τ in increasing order, such as ``range(0, T, T // S)``; values may repeat.
        model: ε(x, t), with t float32 of shape (batch,).
        b: β, float32 of shape (T,), on x's device.
        eta: η ≥ 0.
        keep: ``"all"`` returns the original's lists. ``"last"`` returns only the last element of
            each, so that ``[0][-1]`` is the images in both cases.

    Returns:
        (xs, x0_preds): len(seq) + 1 states, the first of them x, and len(seq) predictions of x0.
        They are on the CPU, in pinned memory if x is on a GPU.

    Raises:
        TypeError, ValueError: naming the argument, the value and what is allowed. If the original
            would give NaN for this η, the message names the largest η that works.
    """
    tau = _checked(x, seq, model, b, eta, keep)
    if not _float32(x, tau, b):
        return _kept(reference.generalized_steps(x, tau, model, b, eta), keep)
    table, buffers = _table(tau, b, eta), Buffers()

    def step(x: Tensor, eps: Tensor, row: Tensor, z: Tensor | None, want_x0: bool) -> Step:
        return buffers.stepped(table, x, eps, row, noise_first=True, want_x0=want_x0, noise=z)

    draw = partial(buffers.drawn, x) if eta else passed_over(x)
    return _loop(x, tau, model, step, draw, keep)


@untraced
def ddpm_steps(
    x: Tensor,
    seq: Sequence[int],
    model: Callable[[Tensor, Tensor], Tensor],
    b: Tensor,
    *,
    eta: object = None,
    keep: Literal["all", "last"] = "all",
) -> tuple[list[Tensor], list[Tensor]]:
    """Samples as the original's DDPM loop does ("ddpm_noisy"), bit-identical in float32.

        mean = (√ᾱ_s·β·x0 + √(1−β)·(1−ᾱ_s)·x_t) / (1−ᾱ_t),   β = 1 − ᾱ_t/ᾱ_s
        x_s  = mean + √β·z, without the noise at t = 0

    x0 is clamped to [−1, 1]. The mean combines x0 and x_t, while ``ddim_step`` combines x0 and ε.
    A step therefore takes two passes: the first makes the sum, the second divides and adds noise.

    Args:
        eta: ignored; the original accepts any keyword and reads none.

    All other arguments, the results and what is raised are those of ``generalized_steps``.
    """
    tau = _checked(x, seq, model, b, 0.0, keep)
    if not _float32(x, tau, b):
        return _kept(reference.ddpm_steps(x, tau, model, b), keep)
    sums, means = _ddpm_tables(tau, b)
    buffers, between = Buffers(), Buffers()

    def step(x: Tensor, eps: Tensor, row: Tensor, z: Tensor | None, want_x0: bool) -> Step:
        # This x0 is a difference of two products, like the x0 of v. x_t takes the noise's place.
        total, x0 = between.stepped(
            sums,
            x,
            eps,
            row,
            prediction="v",
            clip=1.0,
            noise_first=True,
            want_x0=want_x0,
            noise=x,
        )
        x_s, _ = buffers.stepped(means, total, total, row, noise_first=True, want_x0=False, noise=z)
        return x_s, x0

    return _loop(x, tau, model, step, partial(buffers.drawn, x), keep)


def _loop(
    x: Tensor,
    tau: Sequence[int],
    model: Callable[[Tensor, Tensor], Tensor],
    step: Callable[..., Step],
    draw: Callable[[], Tensor | None],
    keep: str,
) -> tuple[list[Tensor], list[Tensor]]:
    """Runs the original loop with ``step`` and returns (xs, x0_preds)."""
    at_once = x.is_cuda  # The loop does not wait while states are copied into pinned memory.
    rows = torch.arange(len(tau), dtype=torch.int32, device=x.device)
    xs: list[Tensor] = [x]
    x0_preds: list[Tensor] = []
    for row, i in enumerate(reversed(tau)):
        with torch.no_grad():
            eps = model(x, torch.full((len(x),), float(i), device=x.device))
            z = draw()
            wanted = keep == "all" or row == len(tau) - 1
            x, x0 = step(x, eps, rows[row], z, wanted)
        del eps  # The model may return a view of a state, which the next step could not reuse.
        if keep == "last":
            xs, x0_preds = [], []
        if x0 is not None:
            xs.append(x.to("cpu", non_blocking=at_once))
            x0_preds.append(x0.to("cpu", non_blocking=at_once))
    if at_once:
        torch.cuda.current_stream(
            x.device
        ).synchronize()  # Wait until the last states have arrived.
    return xs, x0_preds


def _kept(lists: tuple[list[Tensor], list[Tensor]], keep: str) -> tuple[list[Tensor], list[Tensor]]:
    return lists if keep == "all" else (lists[0][-1:], lists[1][-1:])


def _float32(x: Tensor, tau: Sequence[int], b: Tensor) -> bool:
    """Tells whether there are steps, and all of them compute in float32."""
    return bool(tau) and {x.dtype, b.dtype, torch.get_default_dtype()} == {torch.float32}


@torch.no_grad()
def _table(tau: Sequence[int], b: Tensor, eta: float) -> Tensor:
    """Returns the table by the original's own float32 operations, on β's device."""
    at, at_next = _levels(tau, b)

    def factors(eta: float) -> tuple[Tensor, Tensor]:
        c1 = eta * ((1 - at / at_next) * (1 - at_next) / (1 - at)).sqrt()
        return c1, ((1 - at_next) - c1**2).sqrt()

    c1, c2 = checked_factors(factors, float(eta), "this seq")
    return pack_rows(at.sqrt(), (1 - at).sqrt(), at_next.sqrt(), c1, c2)


@torch.no_grad()
def _ddpm_tables(tau: Sequence[int], b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the tables of the sum √ᾱ_s·β·x0 + √(1−β)·(1−ᾱ_s)·x_t, and of x_s from that sum."""
    at, at_next = _levels(tau, b)
    beta, zero, one = 1 - at / at_next, torch.zeros_like(at), torch.ones_like(at)
    from_x0, from_x = at_next.sqrt() * beta, (1 - beta).sqrt() * (1 - at_next)
    noisy = torch.tensor([float(t > 0) for t in reversed(tau)], device=b.device)
    sums = pack_rows((1.0 / at).sqrt(), (1.0 / at - 1).sqrt(), from_x0, from_x, zero)
    return sums, pack_rows(1.0 - at, zero, one, noisy * (0.5 * beta.log()).exp(), zero)


def _levels(tau: Sequence[int], b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ᾱ_t and ᾱ_s of all steps, the first step first."""
    t = torch.tensor(tau[::-1], device=b.device)
    s = torch.tensor([-1, *tau[:-1]][::-1], device=b.device)
    at, at_next = (reference.compute_alpha(b, level).flatten() for level in (t, s))
    return at, at_next


def _checked(
    x: Tensor, seq: Sequence[int], model: object, b: Tensor, eta: float, keep: str
) -> list[int]:
    """Checks the arguments, and returns ``seq`` as a list of ints."""
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
    if not isinstance(keep, str) or keep not in ("all", "last"):
        raise ValueError(f'keep must be "all" or "last", got {shown(keep)}')
    if finite("eta", eta) < 0:
        raise ValueError(f"eta must be ≥ 0, got {eta:g}")
    try:
        taken = [] if isinstance(seq, str) else list(seq)
    except TypeError:  # Neither a number nor a tensor without dimensions has elements.
        taken = None
    if isinstance(seq, str) or taken is None:
        raise TypeError(f"seq must be a sequence of integers, got {shown(seq)}")
    tau = [whole(f"seq[{k}]", i, low=0, high=len(b) - 1) for k, i in enumerate(taken)]
    for low, high in pairwise(tau):
        if low > high:
            raise ValueError(f"seq must not decrease, got {high} after {low}")
    return tau
