"""CompVis' timesteps and factors, by the original's own operations, as tables of the fused step."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastddim.check import shown, whole
from fastddim.coefficients import Prediction
from fastddim.dropins._shared import checked_factors, pack_rows


class Schedule(NamedTuple):
    """The timesteps that ``DDIMSampler.make_schedule`` chose, and the tables of their steps."""

    steps: npt.NDArray[np.int64]
    """The timesteps that the model is called with, rising."""
    eta: float
    table: Tensor
    """The whole step, a row for each of ``steps``."""
    rows: Tensor
    """The index of each row, int32, on the model's device."""
    to_halves: Tensor
    """The first half of a step that is taken in two: from (x_t, output) to (ε, x0)."""
    from_halves: Tensor
    """The second half: from (x0, ε) to x_s, with noise that σ has already multiplied."""
    forward: Tensor
    """The steps from clean data to x_t: √ᾱ_t·x0 + √(1−ᾱ_t)·ε."""
    scale: Tensor | None
    """The scale of x0 at each of ``steps``, float32, if the model rescales x0 (DynamiCrafter)."""
    x0_factor: Tensor | None
    """The factor of x0 in each step: the scale at its end by the scale at its start."""
    alphas: Tensor
    """This field and the following ones become attributes of the sampler. No step reads them."""
    alphas_prev: npt.NDArray[Any]
    sigmas: Tensor
    sqrt_one_minus: Tensor


def make_schedule(
    model: Any, T: int, S: int, discretize: str, eta: float, prediction: Prediction
) -> Schedule:
    """Returns S steps of a model of T timesteps, on the device of ``model.alphas_cumprod``.

    Raises:
        TypeError, ValueError: as ``DDIMSampler.make_schedule``.
    """
    steps = _timesteps(S, discretize, T)
    abar = model.alphas_cumprod.detach()
    if abar.shape != (T,):
        raise ValueError(
            f"model.alphas_cumprod must have shape ({T},), model.num_timesteps, "
            f"got {tuple(abar.shape)}"
        )
    device, abar = abar.device, abar.cpu()
    alphas = abar[torch.from_numpy(steps)]
    # The original mixes NumPy and PyTorch: it computes in float64, except for this reciprocal,
    # and except for a schedule of one step, which stays float32.
    alphas_prev = np.array([float(abar[0]), *alphas[:-1].tolist()])
    alphas_prev = alphas_prev if len(steps) > 1 else abar[:1].numpy()
    rest = (1 - alphas).reciprocal().numpy().astype(alphas_prev.dtype)
    ratio = alphas.numpy().astype(alphas_prev.dtype) / alphas_prev
    sigmas = torch.from_numpy(np.sqrt((1 - alphas_prev) * rest * (1 - ratio)))
    one_minus = torch.from_numpy(np.sqrt((1 - alphas).numpy()))

    def float32(tensor: Tensor) -> Tensor:
        return tensor.detach().float().to(device)

    at, at_prev = float32(alphas), float32(torch.from_numpy(alphas_prev))

    def factors(eta: float) -> tuple[Tensor, Tensor]:
        c1 = float32(eta * sigmas)
        return c1, (1 - at_prev - c1**2).sqrt()

    c1, c2 = checked_factors(factors, eta, f"these {len(steps)} steps")
    a_t, b_t, a_s = at.sqrt(), float32(one_minus), at_prev.sqrt()
    zero, one = torch.zeros_like(at), torch.ones_like(at)
    forward = pack_rows(one, zero, a_t, zero, b_t)
    if prediction == "v":
        levels = torch.from_numpy(steps).to(device)
        a_t = float32(model.sqrt_alphas_cumprod)[levels]
        b_t = float32(model.sqrt_one_minus_alphas_cumprod)[levels]
    scale = x0_factor = None
    if getattr(model, "use_dynamic_rescale", False):
        scale = model.scale_arr.detach()[torch.from_numpy(steps).to(model.scale_arr.device)]
        scale = scale.float().to(device)
        x0_factor = torch.cat([scale[:1], scale[:-1]]) / scale
    return Schedule(
        steps=steps,
        eta=eta,
        table=pack_rows(a_t, b_t, a_s, c1, c2),
        rows=torch.arange(len(steps), dtype=torch.int32, device=device),
        to_halves=pack_rows(a_t, b_t, zero, zero, one),
        from_halves=pack_rows(one, zero, a_s, one, c2),
        forward=forward,
        scale=scale,
        x0_factor=x0_factor,
        alphas=alphas.to(device),
        alphas_prev=alphas_prev,
        sigmas=eta * sigmas,
        sqrt_one_minus=one_minus.to(device),
    )


def forward_table(alphas_cumprod: Tensor, device: torch.device) -> Tensor:
    """Returns the steps from clean data to each of the model's T levels, as ``forward`` is."""
    abar = alphas_cumprod.detach().cpu()
    a, b = (torch.from_numpy(np.sqrt(level.numpy())) for level in (abar, 1 - abar))
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    return pack_rows(one, zero, a, zero, b).to(device, torch.float32)


def encoding_table(alphas_next: Tensor, alphas: Tensor, device: torch.device) -> Tensor:
    """Returns the steps of DDIM's inversion, from ᾱ of ``alphas`` to ᾱ of ``alphas_next``.

    x_next = √(ᾱ_next/ᾱ)·x + √ᾱ_next·(√(1/ᾱ_next − 1) − √(1/ᾱ − 1))·ε
    """
    a = (alphas_next / alphas).sqrt()
    b = alphas_next.sqrt() * ((1 / alphas_next - 1).sqrt() - (1 / alphas - 1).sqrt())
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    return pack_rows(one, zero, a, zero, b).to(device)


def _timesteps(S: int, discretize: str, T: int) -> npt.NDArray[np.int64]:
    """Returns the original's timesteps, or refuses an S for which one of them is T."""

    def chosen(S: int) -> npt.NDArray[np.int64]:
        if discretize == "uniform":
            return np.arange(0, T, T // S) + 1
        if discretize == "uniform_trailing":
            return np.round(np.arange(T, 0, -(T / S)))[::-1].astype(np.int64) - 1
        return (np.linspace(0, np.sqrt(T * 0.8), S) ** 2).astype(np.int64) + 1

    S = whole("S (ddim_num_steps)", S, low=1, high=T)
    if discretize not in ("uniform", "uniform_trailing", "quad"):
        raise ValueError(
            f'ddim_discretize must be "uniform", "uniform_trailing" or "quad", '
            f"got {shown(discretize)}"
        )

    def fits(steps: npt.NDArray[np.int64]) -> bool:
        return bool(steps[0] >= 0 and steps[-1] < T)

    steps = chosen(S)
    if fits(steps):
        return steps
    works = [n for n in range(1, T + 1) if fits(chosen(n))]
    near = [*[n for n in works if n < S][-1:], *[n for n in works if n > S][:1]]
    raise ValueError(
        f"S (ddim_num_steps) must have timesteps up to {T - 1}, got {S}, which has "
        f"{steps[0] if steps[0] < 0 else steps[-1]} "
        f"among them: near it {' and '.join(map(str, near)) or 'nothing'} will do"
    )
