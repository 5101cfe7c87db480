"""The loops of ermongroup/ddim: the same calls, the same results, one pass a step or two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fastddim.check import finite, whole
from fastddim.dropins._shared import Buffers, checked_factors, pack_rows, passed_over
from fastddim.step import reference

Step: TypeAlias = tuple[Tensor, Tensor | None]
"""(x_s, x0)"""


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
    dtypes, torch's default one included, run that loop itself (``fastddim.step.reference``).

    Args:
        x: x_T, (batch, channels, height, width).
        seq: τ in increasing order, as ``range(0, T, T // S)``; repeated values are kept.
        model: ε(x, t), t being float32 of shape (batch,).
        b: β, float32 of shape (T,), on x's device.
        eta: η ≥ 0.
        keep: ``"all"`` returns what the original does. ``"last"`` returns lists of one and keeps
            nothing else, so that ``[0][-1]`` still holds the images.

    Returns:
        (xs, x0_preds): len(seq) + 1 states from x on, and len(seq) predictions; on the CPU, those
        of a GPU in pinned memory.

    Raises:
        TypeError, ValueError: naming the argument, the value and what is allowed. Where the
            original would give NaN for a large η, the largest that works is named.
    """
    tau = _checked(x, seq, model, b, eta, keep)
    if not _float32(x, tau, b):
        return _kept(reference.generalized_steps(x, tau, model, b, eta), keep)
    table, buffers = _table(tau, b, eta), Buffers()

    def step(x: Tensor, eps: Tensor, row: Tensor, z: Tensor | None, want_x0: bool) -> Step:
        return buffers.stepped(table, x, eps, row, noise_first=True, want_x0=want_x0, noise=z)

    draw = partial(buffers.drawn, x) if eta else passed_over(x)
    return _loop(x, tau, model, step, draw, keep)


def ddpm_steps(
    x: Tensor,
    seq: Sequence[int],
    model: Callable[[Tensor, Tensor], Tensor],
    b: Tensor,
    *,
    eta: object = None,
    keep: Literal["all", "last"] = "all",
) -> tuple[list[Tensor], list[Tensor]]:
    """The DDPM loop beside it ("ddpm_noisy"), likewise bit-identical in float32.

        mean = (√ᾱ_s·β·x0 + √(1−β)·(1−ᾱ_s)·x_t) / (1−ᾱ_t),   β = 1 − ᾱ_t/ᾱ_s
        x_s  = mean + √β·z, without the noise at t = 0

    x0 being clamped to ±1. The mean has x0 and x_t in it where ``ddim_step`` has x0 and ε, so a
    step is two passes: one to the sum of the two, one for the division and the noise.

    Args:
        eta: nothing, as in the original, which takes any keyword and reads none.

    All other arguments, the results and what is raised are those of ``generalized_steps``.
    """
    tau = _checked(x, seq, model, b, 0.0, keep)
    if not _float32(x, tau, b):
        return _kept(reference.ddpm_steps(x, tau, model, b), keep)
    sums, means = _ddpm_tables(tau, b)
    buffers, between = Buffers(), Buffers()

    def step(x: Tensor, eps: Tensor, row: Tensor, z: Tensor | None, want_x0: bool) -> Step:
        # x0 is a difference of two products, as a v model's is; x_t is added in the noise's place.
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
    """(xs, x0_preds) of ``step``, given the row and its noise."""
    at_once = x.is_cuda  # States of a GPU go into pinned memory while the loop goes on.
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
        torch.cuda.current_stream(x.device).synchronize()  # The last states have arrived.
    return xs, x0_preds


def _kept(found: tuple[list[Tensor], list[Tensor]], keep: str) -> tuple[list[Tensor], list[Tensor]]:
    return found if keep == "all" else (found[0][-1:], found[1][-1:])


def _float32(x: Tensor, tau: Sequence[int], b: Tensor) -> bool:
    """Whether there are steps, and all that is computed is float32."""
    return bool(tau) and {x.dtype, b.dtype, torch.get_default_dtype()} == {torch.float32}


@torch.no_grad()
def _table(tau: Sequence[int], b: Tensor, eta: float) -> Tensor:
    """The coefficients by the original's own float32 operations, on β's device."""
    at, at_next = _levels(tau, b)

    def factors(eta: float) -> tuple[Tensor, Tensor]:
        c1 = eta * ((1 - at / at_next) * (1 - at_next) / (1 - at)).sqrt()
        return c1, ((1 - at_next) - c1**2).sqrt()

    c1, c2 = checked_factors(factors, eta, "this seq")
    return pack_rows(at.sqrt(), (1 - at).sqrt(), at_next.sqrt(), c1, c2)


@torch.no_grad()
def _ddpm_tables(tau: Sequence[int], b: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that make √ᾱ_s·β·x0 + √(1−β)·(1−ᾱ_s)·x_t, and those that make x_s of it."""
    at, at_next = _levels(tau, b)
    beta, zero, one = 1 - at / at_next, torch.zeros_like(at), torch.ones_like(at)
    from_x0, from_x = at_next.sqrt() * beta, (1 - beta).sqrt() * (1 - at_next)
    noisy = torch.tensor([float(t > 0) for t in reversed(tau)], device=b.device)
    sums = pack_rows((1.0 / at).sqrt(), (1.0 / at - 1).sqrt(), from_x0, from_x, zero)
    return sums, pack_rows(1.0 - at, zero, one, noisy * (0.5 * beta.log()).exp(), zero)


def _levels(tau: Sequence[int], b: Tensor) -> tuple[Tensor, Tensor]:
    """(ᾱ_t, ᾱ_s) of each step, in the order they are taken."""
    t = torch.tensor(tau[::-1], device=b.device)
    s = torch.tensor([-1, *tau[:-1]][::-1], device=b.device)
    at, at_next = (reference.compute_alpha(b, level).flatten() for level in (t, s))
    return at, at_next


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
