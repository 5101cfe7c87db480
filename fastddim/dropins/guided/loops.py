"""guided-diffusion's methods as functions: checks of their arguments, and the loop over steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastddim.check import finite, kind, shown, whole
from fastddim.dropins.guided.ancestral import AncestralStep
from fastddim.dropins.guided.call import Call, Condition, Denoised, Keywords, Out
from fastddim.dropins.guided.start import Start
from fastddim.dropins.guided.step import Step
from fastddim.loop.devices import usable_device
from fastddim.step.arguments import OUTPUTS, check_untransformed
from fastddim.untraced import untraced

_DEFAULT = Start()


@untraced
def ddim_sample(
    diffusion: Any,
    model: Callable[..., Tensor],
    x: Tensor,
    t: Tensor,
    clip_denoised: bool = True,
    denoised_fn: Denoised = None,
    cond_fn: Condition = None,
    model_kwargs: Keywords = None,
    eta: float = 0.0,
) -> Out:
    """Takes one step, from the diffusion's timestep t to the timestep before it.

        x0  = √(1/ᾱ_t)·x_t − √(1/ᾱ_t − 1)·ε(x_t, t), then denoised_fn(x0), clamped to [−1, 1]
        ε   = (√(1/ᾱ_t)·x_t − x0)/√(1/ᾱ_t − 1)
        x_s = √ᾱ_s·x0 + √(1 − ᾱ_s − σ²)·ε + σ·z

    With ``cond_fn``, −√(1−ᾱ_t)·cond_fn(x_t, t) is added to ε before the last line, and the new ε
    gives an x0 that is not clamped (Dhariwal and Nichol 2021, algorithm 2). Noise is drawn at
    η = 0 too.

    Args:
        diffusion: the function reads ``alphas_cumprod``, ``model_mean_type`` (EPSILON or START_X),
            ``model_var_type`` and, if they exist, ``timestep_map``, ``original_num_steps`` and
            ``rescale_timesteps``.
        model: called as ``model(x, t, **model_kwargs)``, with t in the model's own timesteps.
        x: x_t, (batch, channels, ...): float32, or bfloat16 or float16, which become float32.
        t: int64 of shape (batch,), each in [0, number of steps).
        clip_denoised: whether x0 is clamped.
        denoised_fn: a function of x0 whose result replaces x0.
        cond_fn: called as ``cond_fn(x, t, **model_kwargs)``; returns ∇_x log p(y | x_t).
        model_kwargs: keyword arguments of ``model`` and ``cond_fn``.
        eta: η ≥ 0.

    Returns:
        ``"sample"``, x_s, and ``"pred_xstart"``, x0: float32 of x's shape, without gradients.

    Raises:
        TypeError, ValueError: naming the argument, the value and what is allowed. If the original
            would give NaN for this η, the message names the largest η that works.
    """
    step = Step(
        diffusion, model, clip_denoised, denoised_fn, cond_fn, model_kwargs, _device_of(x), eta
    )
    return step(x, _timesteps(t, x, step.count))


@untraced
def ddim_reverse_sample(
    diffusion: Any,
    model: Callable[..., Tensor],
    x: Tensor,
    t: Tensor,
    clip_denoised: bool = True,
    denoised_fn: Denoised = None,
    model_kwargs: Keywords = None,
    eta: float = 0.0,
) -> Out:
    """Takes one step of the ODE towards noise, from timestep t to the timestep after it.

    The model is called at t, where the step begins. After the last timestep ᾱ is 0. Arguments and
    result are those of ``ddim_sample``.

    Raises:
        TypeError, ValueError: as ``ddim_sample``, and for an eta that is not 0.
    """
    if finite("eta", eta) != 0:
        raise ValueError(f"eta must be 0 for a step towards noise, got {eta:g}")
    step = Step(
        diffusion, model, clip_denoised, denoised_fn, None, model_kwargs, _device_of(x), None
    )
    return step(x, _timesteps(t, x, step.count))


@untraced
def ddim_reverse_sample_loop(
    diffusion: Any,
    model: Callable[..., Tensor],
    image: Tensor,
    clip_denoised: bool = True,
    denoised_fn: Denoised = None,
    cond_fn: Condition = None,
    model_kwargs: Keywords = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    eta: float = 0.0,
) -> Tensor:
    """Returns the last ``"sample"`` of ``ddim_reverse_sample_loop_progressive``."""
    given = image, clip_denoised, denoised_fn, model_kwargs, device, progress, eta
    return _last(_reversed(diffusion, model, *given, want_x0=False))


@untraced
def ddim_reverse_sample_loop_progressive(
    diffusion: Any,
    model: Callable[..., Tensor],
    image: Tensor,
    clip_denoised: bool = True,
    denoised_fn: Denoised = None,
    cond_fn: Condition = None,
    model_kwargs: Keywords = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    eta: float = 0.0,
) -> Iterator[Out]:
    """Yields the result of each ``ddim_reverse_sample``, from timestep 0 up to the last.

    Openai's code has no such loop; names and arguments are those of DDIB (Su et al. 2023). ᾱ is 0
    where the last step ends.

    Args:
        image: data, (batch, channels, ...): float32, bfloat16 or float16.
        cond_fn: ignored, as in DDIB.

    Other arguments and what is raised are those of ``ddim_reverse_sample``; the yielded
    dictionaries are as in ``ddim_sample_loop_progressive``.
    """
    given = image, clip_denoised, denoised_fn, model_kwargs, device, progress, eta
    return _reversed(diffusion, model, *given, want_x0=True)


@untraced
def ddim_sample_loop(
    diffusion: Any,
    model: Callable[..., Tensor],
    shape: Sequence[int],
    noise: Tensor | None = None,
    clip_denoised: bool = True,
    denoised_fn: Denoised = None,
    cond_fn: Condition = None,
    model_kwargs: Keywords = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    eta: float = 0.0,
    skip_timesteps: int = 0,
    init_image: Tensor | None = None,
    randomize_class: bool = False,
    cond_fn_with_grad: bool = False,
) -> Tensor:
    """Returns the last ``"sample"`` of ``ddim_sample_loop_progressive`` of the same arguments."""
    start = Start(skip_timesteps, init_image, randomize_class, cond_fn_with_grad)
    step = partial(
        Step, diffusion, model, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta=eta
    )
    return _last(_loop(step, model, shape, noise, device, progress, want_x0=False, start=start))


@untraced
def ddim_sample_loop_progressive(
    diffusion: Any,
    model: Callable[..., Tensor],
    shape: Sequence[int],
    noise: Tensor | None = None,
    clip_denoised: bool = True,
    denoised_fn: Denoised = None,
    cond_fn: Condition = None,
    model_kwargs: Keywords = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    eta: float = 0.0,
    skip_timesteps: int = 0,
    init_image: Tensor | None = None,
    randomize_class: bool = False,
    cond_fn_with_grad: bool = False,
) -> Iterator[Out]:
    """Yields the result of each ``ddim_sample``, from the last timestep down to 0.

    The next step starts from the ``"sample"`` of the yielded dictionary, which the caller may
    replace. A later step may reuse the memory of a yielded tensor once nobody references the
    tensor; a tensor that the caller keeps never changes.

    Args:
        shape: the shape of x_T, a tuple or list. If ``noise`` is given, only its batch must agree.
        noise: x_T; by default drawn from the device's global generator.
        device: by default the device of ``noise`` or, without it, of the model's parameters.
        progress: whether tqdm shows a progress bar.
        skip_timesteps: how many of the noisiest timesteps the loop leaves out, as in crowsonkb's
            fork, which Disco Diffusion uses.
        init_image: the loop starts from x_t = √ᾱ_t·init_image + √(1−ᾱ_t)·noise at its first
            timestep t; 0 if not given and timesteps are skipped. It has the shape of x_T.
        randomize_class: whether ``model_kwargs["y"]`` is drawn again before each step, from
            ``range(model.num_classes)``.
        cond_fn_with_grad: must be False, because no step carries gradients of the model.

    Other arguments and what is raised are those of ``ddim_sample``; all arguments are checked
    at the call, before the first result is taken.
    """
    start = Start(skip_timesteps, init_image, randomize_class, cond_fn_with_grad)
    step = partial(
        Step, diffusion, model, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta=eta
    )
    return _loop(step, model, shape, noise, device, progress, want_x0=True, start=start)


@untraced
def p_sample(
    diffusion: Any,
    model: Callable[..., Tensor],
    x: Tensor,
    t: Tensor,
    clip_denoised: bool = True,
    denoised_fn: Denoised = None,
    cond_fn: Condition = None,
    model_kwargs: Keywords = None,
) -> Out:
    """Takes one ancestral step of DDPM, from the diffusion's timestep t to the timestep before it.

        x0  = √(1/ᾱ_t)·x_t − √(1/ᾱ_t − 1)·ε(x_t, t), then denoised_fn(x0), clamped to [−1, 1]
        x_s = p·x0 + q·x_t + Σ·cond_fn(x_t, t) + √Σ·z,
        p   = √ᾱ_s·β_t/(1−ᾱ_t),   q = √(1−β_t)·(1−ᾱ_s)/(1−ᾱ_t)

    Ho et al. 2020, eq. 7; the shift of the mean is that of Dhariwal and Nichol 2021, algorithm 1.
    The variance Σ is β_t (FIXED_LARGE), β̃_t = β_t·(1−ᾱ_s)/(1−ᾱ_t) (FIXED_SMALL), exp(v)
    (LEARNED) or exp(f·log β_t + (1−f)·log β̃_t) with f = (v + 1)/2 (LEARNED_RANGE; Nichol and
    Dhariwal 2021, eq. 15), where v is the second half of the output's channels. At t = 0 noise is
    drawn and not added.

    Args:
        diffusion: the function reads ``betas``, ``model_mean_type`` (EPSILON or START_X),
            ``model_var_type`` and, if they exist, ``timestep_map``, ``original_num_steps`` and
            ``rescale_timesteps``.

    Other arguments and the result are those of ``ddim_sample``.

    Raises:
        TypeError, ValueError: naming the argument, the value and what is allowed.
    """
    step = AncestralStep(
        diffusion, model, clip_denoised, denoised_fn, cond_fn, model_kwargs, _device_of(x)
    )
    return step(x, _timesteps(t, x, step.count))


@untraced
def p_sample_loop(
    diffusion: Any,
    model: Callable[..., Tensor],
    shape: Sequence[int],
    noise: Tensor | None = None,
    clip_denoised: bool = True,
    denoised_fn: Denoised = None,
    cond_fn: Condition = None,
    model_kwargs: Keywords = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    skip_timesteps: int = 0,
    init_image: Tensor | None = None,
    randomize_class: bool = False,
    cond_fn_with_grad: bool = False,
) -> Tensor:
    """Returns the last ``"sample"`` of ``p_sample_loop_progressive`` of the same arguments."""
    start = Start(skip_timesteps, init_image, randomize_class, cond_fn_with_grad)
    step = partial(
        AncestralStep, diffusion, model, clip_denoised, denoised_fn, cond_fn, model_kwargs
    )
    return _last(_loop(step, model, shape, noise, device, progress, want_x0=False, start=start))


@untraced
def p_sample_loop_progressive(
    diffusion: Any,
    model: Callable[..., Tensor],
    shape: Sequence[int],
    noise: Tensor | None = None,
    clip_denoised: bool = True,
    denoised_fn: Denoised = None,
    cond_fn: Condition = None,
    model_kwargs: Keywords = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    skip_timesteps: int = 0,
    init_image: Tensor | None = None,
    randomize_class: bool = False,
    cond_fn_with_grad: bool = False,
) -> Iterator[Out]:
    """Yields the result of each ``p_sample``, from the last timestep down to 0.

    Arguments, what is raised and the yielded dictionaries are as in
    ``ddim_sample_loop_progressive``.

    Example::

        diffusion = guided.Diffusion(1000, "250", learn_sigma=True)
        for out in guided.p_sample_loop_progressive(diffusion, model, (4, 3, 64, 64)):
            show(out["pred_xstart"])
    """
    start = Start(skip_timesteps, init_image, randomize_class, cond_fn_with_grad)
    step = partial(
        AncestralStep, diffusion, model, clip_denoised, denoised_fn, cond_fn, model_kwargs
    )
    return _loop(step, model, shape, noise, device, progress, want_x0=True, start=start)


def _reversed(
    diffusion: Any,
    model: Callable[..., Tensor],
    image: Tensor,
    clip_denoised: bool,
    denoised_fn: Denoised,
    model_kwargs: Keywords,
    device: torch.device | str | None,
    progress: bool,
    eta: float,
    want_x0: bool,
) -> Iterator[Out]:
    if finite("eta", eta) != 0:
        raise ValueError(f"eta must be 0 for a step towards noise, got {eta:g}")
    _check_state("image", image)
    step = partial(Step, diffusion, model, clip_denoised, denoised_fn, None, model_kwargs, eta=None)
    return _loop(step, model, tuple(image.shape), image, device, progress, want_x0, upwards=True)


def _loop(
    made: Callable[..., Call],
    model: Callable[..., Tensor],
    shape: Sequence[int],
    noise: Tensor | None,
    device: torch.device | str | None,
    progress: bool,
    want_x0: bool,
    start: Start = _DEFAULT,
    upwards: bool = False,
) -> Iterator[Out]:
    """Returns the steps' results; ``made(device=device)`` checks and makes the step."""
    if not isinstance(shape, (tuple, list)) or len(shape) < 2:
        raise TypeError(f"shape must be a tuple or list (batch, channels, ...), got {shown(shape)}")
    batch, *_ = (whole(f"shape[{i}]", n, low=0) for i, n in enumerate(shape))
    if noise is not None:
        _check_state("noise", noise)
        if len(noise) != batch:
            raise ValueError(f"noise must have the batch of shape, {batch}, got {len(noise)}")
    device = _device(model, noise, device)
    step = made(device=device)
    start.check(model, step, shape if noise is None else noise.shape, device)
    bar = _bar() if progress else iter

    def steps() -> Iterator[Out]:
        x = torch.randn(*shape, device=device) if noise is None else noise
        x = start.state(step, x)
        for i in bar(range(step.count - start.skip_timesteps)[:: 1 if upwards else -1]):
            t = torch.full((batch,), i, device=device)
            start.changed(model, step)
            out = step(x, t, i, want_x0)
            yield out
            x = out["sample"]
            _check_state("sample", x)

    return steps()


def _last(steps: Iterator[Out]) -> Tensor:
    (final,) = deque(steps, maxlen=1)
    return final["sample"]


def _check_state(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {kind(x)}")
    if x.dim() < 2:
        raise ValueError(f"{name} must have shape (batch, channels, ...), got {tuple(x.shape)}")
    if x.dtype not in OUTPUTS:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {str(x.dtype)[6:]}")
    if x.requires_grad:
        raise ValueError(f"{name} requires grad, which sampling does not carry: pass x.detach()")
    check_untransformed(f"{name}: the step")


def _timesteps(t: Any, x: Tensor, count: int) -> Tensor:
    if not isinstance(t, Tensor) or t.dtype != torch.int64 or t.shape != x.shape[:1]:
        got = f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else kind(t)
        raise TypeError(f"t must be int64 of shape ({len(x)},), got {got}")
    if t.device != x.device:
        raise ValueError(f"t must be on {x.device} with x, got {t.device}")
    # On a GPU, this check would be a host sync.
    if t.device.type == "cpu" and ((t < 0) | (t >= count)).any():
        raise ValueError(f"t must lie in [0, {count}), got {t.min()} to {t.max()}")
    return t


def _device_of(x: Tensor) -> torch.device:
    _check_state("x", x)
    return x.device


def _device(model: Any, noise: Tensor | None, device: torch.device | str | None) -> torch.device:
    if noise is not None:
        if device is not None and usable_device(device) != noise.device:
            raise ValueError(f"noise must be on device, {device}, got {noise.device}")
        return noise.device
    if device is None:
        try:
            first: Tensor = next(model.parameters())
        except (AttributeError, StopIteration):
            raise ValueError("device must be given where model has no parameters") from None
        return first.device
    return usable_device(device)


def _bar() -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from None
    return tqdm
