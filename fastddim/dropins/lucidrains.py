"""``ddim_sample`` of lucidrains' denoising-diffusion-pytorch, bit-identical in float32.

    diffusion.ddim_sample = partial(lucidrains.ddim_sample, diffusion)

After this line, ``diffusion.sample(batch_size=16)`` calls this function. The package has other
classes with the same loop and other arguments: ``ddim_sample_1d``, ``ddim_sample_of_classes`` and
``ddim_sample_guided`` are their methods. The module imports nothing of lucidrains' package.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastddim.check import finite, kind, shown, whole
from fastddim.coefficients import Prediction
from fastddim.dropins._shared import Buffers, checked_factors, pack_rows, passed_over
from fastddim.step.arguments import OUTPUTS, check_untransformed
from fastddim.untraced import untraced

PREDICTIONS: dict[str, Prediction] = {
    "pred_noise": "epsilon",
    "pred_x0": "sample",
    "pred_v": "sample",
}

Called: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Any]
"""The model's call: (x_t, t, the x0 before or None) → output."""

TAKES = {
    "ddim_sample": "self, shape, return_all_timesteps",
    "ddim_sample_1d": "self, shape, clip_denoised, model_forward_kwargs, return_noise",
    "ddim_sample_of_classes": "self, classes, shape, cond_scale, rescaled_phi, clip_denoised",
    "ddim_sample_guided": "self, shape, return_all_timesteps, cond_fn, guidance_kwargs",
}
"""The arguments of the methods that the functions of this module replace."""

STARTS = ("predict_start_from_noise", "predict_start_from_v")
METHODS = ("ddim_sample", "model_predictions", "predict_noise_from_start", *STARTS)
ROOTS = ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
_NONE: Mapping[str, Any] = {}
BUFFERS = ("alphas_cumprod", *ROOTS, "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")


@torch.inference_mode()
@untraced
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
    _check_flag("return_all_timesteps", return_all_timesteps)
    S, eta, size = _checked(diffusion, shape, "ddim_sample")
    final, states = _sampled(diffusion, S, eta, size, diffusion.model, 1.0, return_all_timesteps)
    result: Tensor = diffusion.unnormalize(final if states is None else states)
    return result


@torch.no_grad()
def ddim_sample_1d(
    diffusion: Any,
    shape: Sequence[int],
    clip_denoised: bool = True,
    model_forward_kwargs: Mapping[str, Any] = _NONE,
    return_noise: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Samples as the method of the user's own GaussianDiffusion1D does.

    The loop is that of ``ddim_sample``, but ε stays the output of a ``pred_noise`` model where x0
    has been clamped.

    Args:
        diffusion: a GaussianDiffusion1D.
        shape: the shape of the samples, (batch, channels, length) or (batch, length, channels).
        clip_denoised: whether x0 is clamped to [−1, 1].
        model_forward_kwargs: further arguments of the model. With self-conditioning, the model gets
            ``x_self_cond`` too after the first step.
        return_noise: whether to return (samples, x_T); the original returns the noise of the last
            step in the place of x_T.

    Raises:
        TypeError, ValueError: as ``ddim_sample``.
    """
    _check_flag("clip_denoised", clip_denoised)
    _check_flag("return_noise", return_noise)
    S, eta, size = _checked(diffusion, shape, "ddim_sample_1d")

    def called(x: Tensor, t: Tensor, x0: Tensor | None) -> Any:
        more = {} if x0 is None else {"x_self_cond": x0}
        return diffusion.model(x, t, **{**model_forward_kwargs, **more})

    noise = torch.randn(size, device=diffusion.betas.device)
    clip = 1.0 if clip_denoised else None
    final, _ = _sampled(diffusion, S, eta, size, called, clip, rederive=False, noise=noise)
    samples: Tensor = diffusion.unnormalize(final)
    return (samples, noise) if return_noise else samples


@torch.no_grad()
def ddim_sample_of_classes(
    diffusion: Any,
    classes: Tensor,
    shape: Sequence[int],
    cond_scale: float = 6.0,
    rescaled_phi: float = 0.7,
    clip_denoised: bool = True,
) -> Tensor:
    """Samples as the GaussianDiffusion of the package's ``classifier_free_guidance`` does.

    The loop is that of ``ddim_sample_1d``. The guided output is that of the model's own
    ``forward_with_cond_scale``.

    Args:
        diffusion: a GaussianDiffusion of that module, without ``use_cfg_plus_plus``.
        classes: the class of each sample, as the model takes it.
        shape: the shape of the samples, (batch, ...).
        cond_scale: w; the original fails at 1, where the model returns one output instead of two.
        rescaled_phi: the share of the output that is scaled to the standard deviation of the
            conditional one.
        clip_denoised: whether x0 is clamped to [−1, 1].

    Raises:
        TypeError, ValueError: as ``ddim_sample``.
    """
    _check_flag("clip_denoised", clip_denoised)
    if finite("cond_scale", cond_scale) == 1:
        raise ValueError("cond_scale must not be 1, where the original fails, got 1")
    S, eta, size = _checked(diffusion, shape, "ddim_sample_of_classes")
    if not hasattr(diffusion.model, "forward_with_cond_scale"):
        raise TypeError(
            f"diffusion.model must have forward_with_cond_scale, got {kind(diffusion.model)}"
        )
    if getattr(diffusion, "use_cfg_plus_plus", False):
        raise ValueError(
            "diffusion.use_cfg_plus_plus must be False, got True: a step has one ε for both terms"
        )

    def called(x: Tensor, t: Tensor, x0: Tensor | None) -> Any:
        guided = diffusion.model.forward_with_cond_scale
        return guided(x, t, classes, cond_scale=cond_scale, rescaled_phi=rescaled_phi)[0]

    clip = 1.0 if clip_denoised else None
    final, _ = _sampled(diffusion, S, eta, size, called, clip, rederive=False)
    return (final + 1) * 0.5


@torch.no_grad()
def ddim_sample_guided(
    diffusion: Any,
    shape: Sequence[int],
    return_all_timesteps: bool = False,
    cond_fn: Any = None,
    guidance_kwargs: Any = None,
) -> Tensor:
    """Samples as the GaussianDiffusion of the package's ``guided_diffusion`` does.

    The loop is that of ``ddim_sample_1d``. As in the original, ``cond_fn`` and ``guidance_kwargs``
    have no effect, and the states of ``return_all_timesteps`` begin with x_T twice and end before
    the samples.

    Raises:
        TypeError, ValueError: as ``ddim_sample``.
    """
    _check_flag("return_all_timesteps", return_all_timesteps)
    S, eta, size = _checked(diffusion, shape, "ddim_sample_guided")
    every = return_all_timesteps
    final, states = _sampled(diffusion, S, eta, size, diffusion.model, 1.0, every, rederive=False)
    if states is not None:
        final = states[:, [0, *range(S)]]
    result: Tensor = diffusion.unnormalize(final)
    return result


def _sampled(
    diffusion: Any,
    S: int,
    eta: float,
    size: list[int],
    called: Called,
    clip: float | None,
    every: bool = False,
    rederive: bool = True,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns the samples and, if ``every`` is true, all states, before they are unnormalised.

    ``rederive`` tells whether ε is computed again from the clamped x0 of a ``pred_noise`` model.
    ``noise`` is x_T, which is drawn if not given.
    """
    # Call linspace as the original does, because its rounding decides the timesteps.
    times = torch.linspace(-1, diffusion.num_timesteps - 1, steps=S + 1).int().tolist()[:0:-1]
    scale, table, from_v = _tables(diffusion, times, eta)
    prediction, of_v = PREDICTIONS[diffusion.objective], diffusion.objective == "pred_v"
    rederive = rederive or prediction != "epsilon"
    conditioned = bool(getattr(diffusion, "self_condition", False))
    x = torch.randn(size, device=table.device) if noise is None else noise
    x0, buffers, between = None, Buffers(), Buffers()
    kept = x.new_empty(len(x), S + 1, *x.shape[1:]) if every else None
    scaled = torch.empty_like(x)
    buffers.states.keep(x)
    skip = passed_over(scaled)
    for i, t in enumerate(times):
        last, seen = i == S - 1, torch.full((len(x),), t, device=x.device)
        output: Any = called(x, seen, x0 if conditioned else None)
        _check("diffusion.model must return float32 or half precision", output, x.shape, OUTPUTS)
        if output.device != x.device:
            raise ValueError(f"diffusion.model must return to {x.device}, got {output.device}")
        if kept is not None:
            kept[:, i] = x  # After the model, which may write to x: the original keeps that too.
        z = None if last else buffers.drawn(x) if eta else skip()
        options: dict[str, Any] = {"rows": i, "clip": clip, "rederive": rederive, "checked": True}
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
    return x, kept


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


def _checked(diffusion: Any, shape: Any, function: str) -> tuple[int, float, list[int]]:
    """Checks the diffusion and the shape for ``function``, and returns S, η and the shape."""
    check_untransformed(function)
    cls, known = type(diffusion), "a GaussianDiffusion of denoising-diffusion-pytorch"
    for name in (*METHODS, *BUFFERS):
        if not hasattr(cls if name in METHODS else diffusion, name):
            raise TypeError(f"diffusion must be {known}, got {kind(diffusion)}, without {name}")
    theirs = next(vars(base) for base in cls.__mro__ if "ddim_sample" in vars(base))
    takes = ", ".join(inspect.signature(theirs["ddim_sample"]).parameters)
    if takes != TAKES[function]:
        fit = [name for name, arguments in TAKES.items() if arguments == takes]
        advice = f": call {fit[0]}" if fit else ""
        raise TypeError(f"diffusion must be {known}, got one with ddim_sample({takes}){advice}")
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
    if torch.get_default_dtype() != torch.float32:
        raise TypeError(f"torch's default dtype must be float32, got {torch.get_default_dtype()}")
    return S, eta, [whole(f"shape[{i}]", n, low=0) for i, n in enumerate(shape)]


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {shown(value)}")


def _check(must: str, tensor: Any, shape: Any, dtypes: Any) -> None:
    is_tensor = isinstance(tensor, Tensor)
    if not is_tensor or tensor.shape != shape or tensor.dtype not in dtypes:
        got = f"{str(tensor.dtype)[6:]} {tuple(tensor.shape)}" if is_tensor else kind(tensor)
        raise TypeError(f"{must} of shape {tuple(shape)}, got {got}")
