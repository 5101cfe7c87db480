"""``ddim_sample`` of lucidrains' denoising-diffusion-pytorch, bit-identical in float32.

    diffusion.ddim_sample = partial(lucidrains.ddim_sample, diffusion)

After this line, ``diffusion.sample(batch_size=16)`` calls this function. The module imports nothing
of lucidrains' package.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastddim.check import finite, kind, shown, whole
from fastddim.coefficients import Prediction
from fastddim.dropins._shared import Buffers, checked_factors, pack_rows, passed_over
from fastddim.step.arguments import OUTPUTS, check_untransformed

PREDICTIONS: dict[str, Prediction] = {
    "pred_noise": "epsilon",
    "pred_x0": "sample",
    "pred_v": "sample",
}

STARTS = ("predict_start_from_noise", "predict_start_from_v")
METHODS = ("ddim_sample", "model_predictions", "predict_noise_from_start", *STARTS)
ROOTS = ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
BUFFERS = ("alphas_cumprod", *ROOTS, "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")


@torch.inference_mode()
def ddim_sample(diffusion: Any, shape: Sequence[int], return_all_timesteps: bool = False) -> Tensor:
    """Samples as the method of the user's own GaussianDiffusion does, with the same arguments.

        x0  = √(1/ᾱ_t)·x_t − √(1/ᾱ_t − 1)·ε,  or √ᾱ_t·x_t − √(1−ᾱ_t)·v,  clamped to [−1, 1]
        ε   = (√(1/ᾱ_t)·x_t − x0)/√(1/ᾱ_t − 1)
        x_s = √ᾱ_s·x0 + √(1 − ᾱ_s − σ²)·ε + σ·z

    The last step returns x0. Every other step draws noise, at η = 0 too, as the original does.

    Args:
        diffusion: a GaussianDiffusion, which holds S, η, the model and the schedule.
        shape: the shape of the samples, (batch, ...).
        return_all_timesteps: whether to return all states, (batch, S + 1, ...).

    Raises:
        TypeError, ValueError: naming the argument, the value and what is allowed. If the original
            would give NaN for this η, the message names the largest η that works.
    """
    S, eta, size = _checked(diffusion, shape, return_all_timesteps)
    # Call linspace as the original does, because its rounding decides the timesteps.
    times = torch.linspace(-1, diffusion.num_timesteps - 1, steps=S + 1).int().tolist()[:0:-1]
    scale, table, from_v = _tables(diffusion, times, eta)
    prediction, of_v = PREDICTIONS[diffusion.objective], diffusion.objective == "pred_v"
    conditioned = bool(diffusion.self_condition)
    x, x0, buffers, between = torch.randn(size, device=table.device), None, Buffers(), Buffers()
    kept = x.new_empty(len(x), S + 1, *x.shape[1:]) if return_all_timesteps else None
    scaled = torch.empty_like(x)
    buffers.states.keep(x)
    skip = passed_over(scaled)
    for i, t in enumerate(times):
        last, seen = i == S - 1, torch.full((len(x),), t, device=x.device)
        output: Any = diffusion.model(x, seen, x0 if conditioned else None)
        _check("diffusion.model must return float32 or half precision", output, x.shape, OUTPUTS)
        if output.device != x.device:
            raise ValueError(f"diffusion.model must return to {x.device}, got {output.device}")
        if kept is not None:
            kept[:, i] = x  # After the model, which may write to x: the original keeps that too.
        z = None if last else buffers.drawn(x) if eta else skip()
        options: dict[str, Any] = {"rows": i, "clip": 1.0, "rederive": True, "checked": True}
        if of_v:
            # x0 needs x_t itself, hence a separate pass. The pass also makes x̃, as its noise term.
            scaled, output = between.stepped(from_v, x, output, prediction="v", noise=x, **options)
        else:
            if prediction == "sample" and output.stride() != scaled.stride():
                # The original's state gets x0's strides, and its next normals follow their order.
                scaled = torch.empty_like(output, dtype=torch.float32)
            torch.mul(x, scale[i], out=scaled)
        options |= {"prediction": prediction, "want_x0": (conditioned or last) and not of_v}
        x_s, x0 = buffers.stepped(table, scaled, output, noise=z, **options)
        if of_v:
            x0 = output
        if x_s.stride() != x.stride():
            skip = passed_over(torch.empty_like(x_s))
        x = x0 if last and x0 is not None else x_s
        del output, x_s  # Drop our references: the next step can reuse this memory.
    if kept is not None:
        kept[:, S] = x
    result: Tensor = diffusion.unnormalize(x if kept is None else kept)
    return result


def _tables(diffusion: Any, times: list[int], eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns √(1/ᾱ_t), the table of the steps, and the table that makes x0 and x̃ of x_t and v.

    The original's order of operations differs from the fused step's. Both agree bit for bit if the
    step gets x̃ = √(1/ᾱ_t)·x_t for x_t, 1 for √ᾱ_t and √(1/ᾱ_t − 1) for √(1−ᾱ_t):
    x0 = (x̃ − √(1/ᾱ_t − 1)·ε)/1 and ε = (x̃ − 1·x0)/√(1/ᾱ_t − 1).
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


def _checked(diffusion: Any, shape: Any, all_timesteps: Any) -> tuple[int, float, list[int]]:
    """Checks ``ddim_sample``'s arguments, and returns S, η and the shape."""
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
