"""The paper's step and the original loop in plain PyTorch, with which every test compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastddim.step.rows import check_columns


def ddim_step(
    x: Tensor,
    output: Tensor,
    row: Tensor,
    z: Tensor | None = None,
    prediction: str = "epsilon",
    clip: float | None = None,
    noise_first: bool = True,
    guidance: Tensor | None = None,
    threshold: Tensor | None = None,
    rederive: bool = False,
    history: Tensor | None = None,
    posterior: bool = False,
    rounding: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (x_s, x0) of one step t → s, in its arguments' dtype (Song et al. 2021, eq. 12).

        x0  = (x_t − √(1−ᾱ_t)·ε) / √ᾱ_t
        x_s = √ᾱ_s·x0 + c1·z + c2·ε

    ``row`` is one row of the coefficient table. A ``v`` model has x0 = √ᾱ_t·x − √(1−ᾱ_t)·v and
    ε = √ᾱ_t·v + √(1−ᾱ_t)·x; a ``sample`` model returns x0 and ε = (x − √ᾱ_t·x0)/√(1−ᾱ_t); a
    ``flow`` model returns u = ε − x0 on a path with α + σ = 1, and x0 = x − σ·u, ε = x + α·u.
    Where ``output`` has twice x's channels, the second half, a learned variance, is ignored.
    ``guidance`` is w in u + w·(c − u), where ``output`` holds u and c, the outputs without and with
    the condition, along the batch (Ho and Salimans 2022). ``clip`` clamps x0 to ±clip;
    ``threshold`` is s in x0 = clamp(x0, ±s)/s (Saharia et al. 2022, section 2.3); ``rederive``
    computes ε again from the clamped x0. ``noise_first=False`` adds the noise last, as diffusers.
    ``history`` is x0′, the x0 of the step before: D = x0 + κ·(x0 − x0′) and x_t then take the
    places of x0 and ε in the sum where κ, the eighth column of the row, is not 0 (``make_table``).
    ``posterior`` puts x_t in the place of ε in any row.

    In half precision PyTorch computes each operation in float32 and rounds its result. A factor
    of no dimensions on a CPU is not rounded, because it stands after the tensor that it
    multiplies. ``rounding`` is the dtype of x where ``row`` has the columns ``COLUMNS_ROUNDED``,
    which hold √ᾱ_t and √(1−ᾱ_t) a second time, for products.

    Raises:
        ValueError: the step cannot read a row of this many columns, or ``rounding`` is not x's
            dtype.
    """
    check_columns("row", row.shape[-1], history is not None, rounding)
    if rounding is not None and x.dtype != rounding:
        raise ValueError(f"rounding must be the dtype of x, {x.dtype}, or None, got {rounding}")
    a_t, _, b_t, _, a_s, c1, c2 = row[..., :7].unbind(-1)
    times_a, times_b = (a_t, b_t) if rounding is None else row[..., 7:].unbind(-1)
    if output.dim() > 2 and output.shape[1] == 2 * x.shape[1]:
        output = output[:, : x.shape[1]]
    if guidance is not None:
        uncond, cond = output.chunk(2)
        output = uncond + guidance * (cond - uncond)
    if prediction == "epsilon":
        x0, eps = (x - output * times_b) / a_t, output
    elif prediction == "v":
        x0, eps = x * times_a - output * times_b, output * times_a + x * times_b
    elif prediction == "flow":
        x0, eps = x - output * times_b, x + output * times_a
    else:
        x0, eps = output, (x - output * times_a) / b_t
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    if threshold is not None:
        x0 = (x0.clamp(-threshold, threshold) / threshold).to(x0.dtype)
    if rederive:
        eps = (x - x0 * times_a) / b_t
    if posterior:
        eps = x
    combined = x0
    if history is not None:
        kappa = row[..., 7]
        combined = torch.where(kappa == 0, x0, x0 + kappa * (x0 - history))
        eps = torch.where(kappa == 0, eps, x)
    x_s = combined * a_s
    if z is not None and noise_first:
        x_s = x_s + z * c1
    x_s = x_s + eps * c2
    if z is not None and not noise_first:
        x_s = x_s + z * c1
    return x_s, x0


def compute_alpha(beta: Tensor, t: Tensor) -> Tensor:
    """Returns ᾱ_t, (n, 1, 1, 1), in β's dtype, as ermongroup/ddim's function does; ᾱ_{−1} is 1."""
    beta = torch.cat([torch.zeros(1, device="cpu").to(beta.device), beta], dim=0)
    return (1 - beta).cumprod(dim=0).index_select(0, t + 1).view(-1, 1, 1, 1)


def generalized_steps(
    x: Tensor,
    seq: Sequence[int],
    model: Callable[[Tensor, Tensor], Tensor],
    b: Tensor,
    eta: float = 0.0,
) -> tuple[list[Tensor], list[Tensor]]:
    """Runs the original loop (ermongroup/ddim), operation for operation.

    The one change is the device: x's, where the original names "cuda". The loop draws noise at
    every step, at η = 0 too, and moves every state to the CPU and back.

    Returns:
        (xs, x0_preds): len(seq) + 1 states from x on, and len(seq) predictions of x0.
    """
    with torch.no_grad():
        n = x.size(0)
        seq_next = [-1, *list(seq[:-1])]
        x0_preds: list[Tensor] = []
        xs = [x]
        for i, j in zip(reversed(seq), reversed(seq_next), strict=False):
            # The original makes t on the host and copies it, and benchmarks time this loop.
            t = (torch.ones(n, device="cpu") * i).to(x.device)
            next_t = (torch.ones(n, device="cpu") * j).to(x.device)
            at = compute_alpha(b, t.long())
            at_next = compute_alpha(b, next_t.long())
            xt = xs[-1].to(x.device)
            et = model(xt, t)
            x0_t = (xt - et * (1 - at).sqrt()) / at.sqrt()
            x0_preds.append(x0_t.to("cpu"))
            c1 = eta * ((1 - at / at_next) * (1 - at_next) / (1 - at)).sqrt()
            c2 = ((1 - at_next) - c1**2).sqrt()
            xt_next = at_next.sqrt() * x0_t + c1 * torch.randn_like(x) + c2 * et
            xs.append(xt_next.to("cpu"))
    return xs, x0_preds


def ddpm_steps(
    x: Tensor, seq: Sequence[int], model: Callable[[Tensor, Tensor], Tensor], b: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Runs the authors' DDPM loop ("ddpm_noisy"), operation for operation, on x's device.

        mean = (√ᾱ_s·β·x0 + √(1−β)·(1−ᾱ_s)·x_t) / (1−ᾱ_t),   β = 1 − ᾱ_t/ᾱ_s
        x_s  = mean + √β·z, without the noise at t = 0

    where x0 is clamped to ±1.

    Returns:
        (xs, x0_preds), as ``generalized_steps``.
    """
    with torch.no_grad():
        n = x.size(0)
        x0_preds: list[Tensor] = []
        xs = [x]
        for i, j in zip(reversed(seq), reversed([-1, *seq[:-1]]), strict=False):
            t, next_t = ((torch.ones(n, device="cpu") * level).to(x.device) for level in (i, j))
            at, at_next = (compute_alpha(b, level.long()) for level in (t, next_t))
            beta = 1 - at / at_next
            xt = xs[-1].to(x.device)
            e = model(xt, t.float())
            x0_t = ((1.0 / at).sqrt() * xt - (1.0 / at - 1).sqrt() * e).clamp(-1, 1)
            x0_preds.append(x0_t.to("cpu"))
            from_x0 = (at_next.sqrt() * beta) * x0_t
            mean = (from_x0 + ((1 - beta).sqrt() * (1 - at_next)) * xt) / (1.0 - at)
            noise = torch.randn_like(xt)
            noisy = (1 - (t == 0).float()).view(-1, 1, 1, 1)
            xs.append((mean + noisy * (0.5 * beta.log()).exp() * noise).to("cpu"))
    return xs, x0_preds
