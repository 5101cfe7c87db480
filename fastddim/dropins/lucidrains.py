"""``ddim_sample`` of lucidrains' denoising-diffusion-pytorch, bit-identical in float32.

    diffusion.ddim_sample = partial(lucidrains.ddim_sample, diffusion)

From then on ``diffusion.sample(batch_size=16)`` uses it. Nothing of theirs is imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastddim.buffers import Spare, fitting
from fastddim.check import finite, kind, shown, whole
from fastddim.coefficients import checked_factors
from fastddim.ops import OUTPUTS, check_untransformed, ddim_step
from fastddim.stream import normals, passed_over

PREDICTIONS = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v"}
STARTS = ("predict_start_from_noise", "predict_start_from_v")
METHODS = ("ddim_sample", "model_predictions", "predict_noise_from_start", *STARTS)
ROOTS = ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
BUFFERS = ("alphas_cumprod", *ROOTS, "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")
STEP = partial(ddim_step, clip=1.0, rederive=True, noise_first=False, want_x0=False)


@torch.inference_mode()
def ddim_sample(diffusion: Any, shape: Sequence[int], return_all_timesteps: bool = False) -> Tensor:
    """The method's result, from the user's own GaussianDiffusion and the method's arguments.

        x0  = √(1/ᾱ_t)·x_t − √(1/ᾱ_t − 1)·ε,  or √ᾱ_t·x_t − √(1−ᾱ_t)·v,  clamped to ±1
        ε   = (√(1/ᾱ_t)·x_t − x0)/√(1/ᾱ_t − 1)
        x_s = √ᾱ_s·x0 + √(1 − ᾱ_s − σ²)·ε + σ·z

    The last step returns x0. Every other step draws noise, at η = 0 too, as the original does.

    Raises:
        TypeError, ValueError: naming the argument, the value and what is allowed. Where the
            original would give NaN for a large η, the largest that works is named.
    """
    S, eta, size = _checked(diffusion, shape, return_all_timesteps)
    # The original's own call, as its rounding decides which timesteps there are.
    times = torch.linspace(-1, diffusion.num_timesteps - 1, steps=S + 1).int().tolist()[:0:-1]
    scale, table, from_v = _tables(diffusion, times, eta)
    rows = torch.arange(S, dtype=torch.int32, device=table.device)
    prediction, conditioned = PREDICTIONS[diffusion.objective], bool(diffusion.self_condition)
    x, x0 = torch.randn(size, device=table.device), None
    kept = x.new_empty(len(x), S + 1, *x.shape[1:]) if return_all_timesteps else None
    scaled, drawn = torch.empty_like(x), normals if eta else passed_over
    states, x0s, draw = Spare(x), Spare(), drawn(scaled)
    for i, (t, row) in enumerate(zip(times, rows, strict=True)):
        last, seen = i == S - 1, torch.full((len(x),), t, device=x.device)
        output = diffusion.model(x, seen, x0 if conditioned else None)
        _check("diffusion.model must return float32 or half precision", output, x.shape, OUTPUTS)
        if kept is not None:
            kept[:, i] = x  # with what the model may have written into it, as in the original
        z, out, x0_out = None if last else draw(), fitting(states.take(), x), fitting(x0s.take(), x)
        if prediction == "sample" and output.stride() != x.stride():
            # The original's state is laid out as x0, and its next normals are drawn in that order.
            out = torch.empty_like(output, dtype=torch.float32)
        if prediction == "v":
            # x0 needs x_t itself, and so a pass of its own. It makes x̃ too, in the noise's place.
            x0 = torch.empty_like(x) if x0_out is None else x0_out
            STEP(x, output, from_v, row, noise=x, prediction="v", out=scaled, x0_out=x0)
            x_s, _ = STEP(scaled, x0, table, row, noise=z, prediction="sample", out=out)
        else:
            torch.mul(x, scale[i], out=scaled)
            given: dict[str, Any] = {"prediction": prediction, "want_x0": conditioned or last}
            x_s, x0 = STEP(scaled, output, table, row, noise=z, out=out, x0_out=x0_out, **given)
        states.keep(x_s)
        if x0 is not None:
            x0s.keep(x0)
        if x_s.stride() != x.stride():
            scaled = torch.empty_like(x_s)
            draw = drawn(scaled)
        x = x0 if last and x0 is not None else x_s
        del output, x_s  # nobody needs them while the model runs
    if kept is not None:
        kept[:, S] = x
    result: Tensor = diffusion.unnormalize(x if kept is None else kept)
    return result


def _tables(diffusion: Any, times: list[int], eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """√(1/ᾱ_t), the step's rows, the last for x0 alone, and rows that make x0 and x̃ of x_t and v.

    In x̃ = √(1/ᾱ_t)·x_t the original's lines are the op's own, bit for bit, with 1 in √ᾱ_t's place
    and √(1/ᾱ_t − 1) in √(1−ᾱ_t)'s: x0 = (x̃ − √(1/ᾱ_t − 1)·ε)/1, ε = (x̃ − 1·x0)/√(1/ᾱ_t − 1).
    """
    levels, a_t, b_t, scale, shift = (getattr(diffusion, name)[times] for name in BUFFERS)
    at, at_s = levels[:-1], levels[1:]

    def factors(eta: float) -> tuple[Tensor, Tensor]:
        sigma = eta * ((1 - at / at_s) * (1 - at_s) / (1 - at)).sqrt()
        return sigma, (1 - at_s - sigma**2).sqrt()

    c1, c2 = checked_factors(factors, eta, f"these {len(times)} steps")
    a_s, c1, c2 = (pad(column, (0, 1)) for column in (at_s.sqrt(), c1, c2))
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    return scale, pack_rows(one, shift, a_s, c1, c2), pack_rows(a_t, b_t, zero, scale, zero)


def pack_rows(a_t: Tensor, b_t: Tensor, a_s: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    return torch.stack([a_t, 1 / a_t, b_t, 1 / b_t, a_s, c1, c2], dim=1)


def _checked(diffusion: Any, shape: Any, all_timesteps: Any) -> tuple[int, float, list[int]]:
    """S, η and the shape; refuses what cannot be done."""
    check_untransformed("ddim_sample")
    cls, known = type(diffusion), "a GaussianDiffusion of denoising-diffusion-pytorch"
    for name in (*METHODS, *BUFFERS):
        if not hasattr(cls if name in METHODS else diffusion, name):
            raise TypeError(f"diffusion must be {known}, got {kind(diffusion)}, without {name}")
    theirs = next(vars(base) for base in cls.__mro__ if "ddim_sample" in vars(base))
    takes = ", ".join(inspect.signature(theirs["ddim_sample"]).parameters)
    if takes != "self, shape, return_all_timesteps":
        raise TypeError(f"diffusion must be {known}, got one with ddim_sample({takes})")
    for name in METHODS[1:]:
        if getattr(cls, name) is not theirs.get(name) or name in vars(diffusion):
            raise TypeError(f"diffusion must be {known}, got one with a {name} of its own")
    if (got := diffusion.objective) not in list(PREDICTIONS):
        raise ValueError(f"diffusion.objective must be one of {[*PREDICTIONS]}, got {shown(got)}")
    T = whole("diffusion.num_timesteps", diffusion.num_timesteps, low=1)
    S = whole("diffusion.sampling_timesteps", diffusion.sampling_timesteps, low=1, high=T)
    eta = finite("diffusion.ddim_sampling_eta", diffusion.ddim_sampling_eta)
    if eta < 0:
        raise ValueError(f"diffusion.ddim_sampling_eta must be ≥ 0, got {eta:g}")
    for name in BUFFERS:
        _check(f"diffusion.{name} must be float32", getattr(diffusion, name), (T,), OUTPUTS[:1])
    if not isinstance(shape, (tuple, list)) or not shape:
        raise TypeError(f"shape must be a tuple or list (batch, ...), got {shown(shape)}")
    if not isinstance(all_timesteps, bool):
        raise TypeError(f"return_all_timesteps must be a bool, got {shown(all_timesteps)}")
    if torch.get_default_dtype() != torch.float32:
        raise TypeError(f"torch's default dtype must be float32, got {torch.get_default_dtype()}")
    return S, eta, [whole(f"shape[{i}]", n, low=0) for i, n in enumerate(shape)]


def _check(must: str, tensor: Any, shape: Any, dtypes: Any) -> None:
    is_tensor = isinstance(tensor, Tensor)
    if not is_tensor or tensor.shape != shape or tensor.dtype not in dtypes:
        got = f"{str(tensor.dtype)[6:]} {tuple(tensor.shape)}" if is_tensor else kind(tensor)
        raise TypeError(f"{must} of shape {tuple(shape)}, got {got}")
