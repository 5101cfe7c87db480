"""The DDIM methods of openai's guided-diffusion and improved-diffusion, as functions.

    sample_fn = partial(guided.ddim_sample_loop, diffusion)  # was diffusion.ddim_sample_loop

Each takes the diffusion object first (the user's own, or a ``Diffusion``), then the method's own
arguments, and returns what the method returns: bit-identical in float32 on the same device.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastddim.check import finite, kind, shown, whole
from fastddim.dropins._shared import Buffers, checked_factors, pack_rows, passed_over, stream_of
from fastddim.dropins._transfer import sent
from fastddim.schedule import Float64, NoiseSchedule, guided_diffusions
from fastddim.step.arguments import OUTPUTS, check_untransformed
from fastddim.step.buffers import fitting

Denoised: TypeAlias = Callable[[Tensor], Tensor] | None
Condition: TypeAlias = Callable[..., Tensor] | None
Keywords: TypeAlias = Mapping[str, Any] | None
Out: TypeAlias = dict[str, Tensor]


class Diffusion:
    """What guided-diffusion makes of these arguments, as far as DDIM reads it.

    Args:
        diffusion_steps: T, the noise levels the model was trained on.
        timestep_respacing: the steps to take: ``"ddimN"``, N of them an integer stride apart;
            ``"10,15,20"``, so many from each third, spread evenly; ``""``, all.
        noise_schedule: ``"linear"``, β from 0.1/T to 20/T (T > 20), or ``"cosine"``.
        learn_sigma: the model returns a variance too, in as many channels again.
        predict_xstart: it returns x0 and not ε.
        rescale_timesteps: it is called with t·1000/T, float32, and not with t, int64.

    Raises:
        TypeError, ValueError: naming the argument, the value and what is allowed.
    """

    def __init__(
        self,
        diffusion_steps: int = 1000,
        timestep_respacing: str | Sequence[int] | None = "ddim25",
        noise_schedule: str = "linear",
        learn_sigma: bool = False,
        predict_xstart: bool = False,
        rescale_timesteps: bool = False,
    ) -> None:
        T = whole("diffusion_steps", diffusion_steps, low=21 if noise_schedule == "linear" else 1)
        if noise_schedule not in ("linear", "cosine"):
            raise ValueError(
                f"noise_schedule must be linear or cosine, got {shown(noise_schedule)}"
            )
        schedule = guided_diffusions(noise_schedule, T)
        self.timestep_map = _respaced(timestep_respacing, T)
        self.use_timesteps = set(self.timestep_map)
        self.original_num_steps = T
        self.num_timesteps = len(self.timestep_map)
        kept = schedule.alphas_cumprod[self.timestep_map]
        # Not ``kept`` itself: the original multiplies up again what it has divided.
        self.betas: Float64 = 1 - kept / np.append(1.0, kept[:-1])
        self.alphas_cumprod: Float64 = np.cumprod(1 - self.betas, dtype=np.float64)
        self.model_mean_type = "START_X" if predict_xstart else "EPSILON"
        self.model_var_type = "LEARNED_RANGE" if learn_sigma else "FIXED_LARGE"
        self.rescale_timesteps = rescale_timesteps


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
    """One step, from timestep t of the diffusion's own to the one before it.

        x0  = √(1/ᾱ_t)·x_t − √(1/ᾱ_t − 1)·ε(x_t, t), then denoised_fn, then clamped to ±1
        ε   = (√(1/ᾱ_t)·x_t − x0)/√(1/ᾱ_t − 1)
        x_s = √ᾱ_s·x0 + √(1 − ᾱ_s − σ²)·ε + σ·z

    With ``cond_fn``, ε is moved by −√(1−ᾱ_t)·cond_fn(x_t, t) before the last line and x0 follows
    from it, unclamped (Dhariwal and Nichol 2021, algorithm 2). Noise is drawn at η = 0 too.

    Args:
        diffusion: read are ``alphas_cumprod``, ``model_mean_type`` (EPSILON or START_X),
            ``model_var_type`` and, where it has them, ``timestep_map``, ``original_num_steps``
            and ``rescale_timesteps``.
        model: ``model(x, t, **model_kwargs)``, as ``cond_fn``, with t as the model was trained.
        x: x_t, (batch, channels, ...): float32, or bfloat16 or float16, which become float32.
        t: int64 of shape (batch,), each in [0, number of steps).
        eta: η ≥ 0.

    Returns:
        ``"sample"``, x_s, and ``"pred_xstart"``, x0: float32 of x's shape, without gradients.

    Raises:
        TypeError, ValueError: naming the argument, the value and what is allowed. Where the
            original would give NaN for a large η, the largest that works is named.
    """
    step = _Step(
        diffusion, model, clip_denoised, denoised_fn, cond_fn, model_kwargs, _device_of(x), eta
    )
    return step(x, _timesteps(t, x, step.count))


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
    """One step of the ODE towards noise, from timestep t to the one after it; as ``ddim_sample``.

    The model is called at t, where the step begins. After the last timestep ᾱ is 0.

    Raises:
        TypeError, ValueError: as ``ddim_sample``, and for an eta that is not 0.
    """
    if finite("eta", eta) != 0:
        raise ValueError(f"eta must be 0 for a step towards noise, got {eta:g}")
    step = _Step(
        diffusion, model, clip_denoised, denoised_fn, None, model_kwargs, _device_of(x), None
    )
    return step(x, _timesteps(t, x, step.count))


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
) -> Tensor:
    """The last ``"sample"`` of ``ddim_sample_loop_progressive``, from the same arguments."""
    steps = _loop(
        diffusion,
        model,
        shape,
        noise,
        clip_denoised,
        denoised_fn,
        cond_fn,
        model_kwargs,
        device,
        progress,
        eta,
        want_x0=False,
    )
    (final,) = deque(steps, maxlen=1)
    return final["sample"]


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
) -> Iterator[Out]:
    """The result of each ``ddim_sample``, from the last timestep down to 0.

    What the caller puts in a result's ``"sample"`` is what the next step starts from. A tensor
    that was returned is written again once nobody holds it: what is kept never changes.

    Args:
        shape: of x_T, a tuple or list. Of ``noise`` the batch alone is compared with it.
        noise: x_T; by default drawn from the device's global generator.
        device: by default noise's or, where there is none, that of the model's parameters.
        progress: a bar, by tqdm.

    Other arguments and what is raised are ``ddim_sample``'s; arguments are checked at the call.
    """
    return _loop(
        diffusion,
        model,
        shape,
        noise,
        clip_denoised,
        denoised_fn,
        cond_fn,
        model_kwargs,
        device,
        progress,
        eta,
        want_x0=True,
    )


def _loop(
    diffusion: Any,
    model: Callable[..., Tensor],
    shape: Sequence[int],
    noise: Tensor | None,
    clip_denoised: bool,
    denoised_fn: Denoised,
    cond_fn: Condition,
    model_kwargs: Keywords,
    device: torch.device | str | None,
    progress: bool,
    eta: float,
    want_x0: bool,
) -> Iterator[Out]:
    if not isinstance(shape, (tuple, list)) or len(shape) < 2:
        raise TypeError(f"shape must be a tuple or list (batch, channels, ...), got {shown(shape)}")
    batch, *_ = (whole(f"shape[{i}]", n, low=0) for i, n in enumerate(shape))
    if noise is not None:
        _check_state("noise", noise)
        if len(noise) != batch:
            raise ValueError(f"noise must have the batch of shape, {batch}, got {len(noise)}")
    device = _device(model, noise, device)
    step = _Step(diffusion, model, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, eta)
    bar = _bar() if progress else iter

    def steps() -> Iterator[Out]:
        x = torch.randn(*shape, device=device) if noise is None else noise
        for i in bar(range(step.count)[::-1]):
            t = torch.full((batch,), i, device=device)
            out = step(x, t, step.rows[i], want_x0)
            yield out
            x = out["sample"]
            _check_state("sample", x)

    return steps()


class _Step:
    """One call's arguments, checked, and its tables; then a step at a time.

    In x̃ = √(1/ᾱ_t)·x_t the original's lines are the op's own, bit for bit, with 1 in √ᾱ_t's place
    and √(1/ᾱ_t − 1) in √(1−ᾱ_t)'s: x0 = (x̃ − √(1/ᾱ_t − 1)·ε)/1, ε = (x̃ − 1·x0)/√(1/ᾱ_t − 1).
    """

    def __init__(
        self,
        diffusion: Any,
        model: Callable[..., Tensor],
        clip_denoised: bool,
        denoised_fn: Denoised,
        cond_fn: Condition,
        model_kwargs: Keywords,
        device: torch.device,
        eta: float | None,
    ) -> None:
        """``eta`` None: towards noise."""
        for name in ("alphas_cumprod", "model_mean_type", "model_var_type"):
            if not hasattr(diffusion, name):
                raise TypeError(
                    f"diffusion must be a GaussianDiffusion, a SpacedDiffusion or a "
                    f"guided.Diffusion, got {kind(diffusion)}, which has no {name}"
                )
        if not callable(model):
            raise TypeError(f"model must be callable, got {kind(model)}")
        for name, function in (("denoised_fn", denoised_fn), ("cond_fn", cond_fn)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be callable or None, got {shown(function)}")
        self.eta = None if eta is None else finite("eta", eta)
        if self.eta is not None and self.eta < 0:
            raise ValueError(f"eta must be ≥ 0, got {eta:g}")
        self.prediction = _one_of(diffusion, "model_mean_type", EPSILON="epsilon", START_X="sample")
        self.times_channels = _one_of(
            diffusion, "model_var_type", FIXED_SMALL=1, FIXED_LARGE=1, LEARNED=2, LEARNED_RANGE=2
        )
        self.model, self.denoised_fn, self.cond_fn = model, denoised_fn, cond_fn
        self.model_kwargs = dict(model_kwargs or {})
        self.clip = 1.0 if clip_denoised else None

        schedule = NoiseSchedule.from_alphas_cumprod(diffusion.alphas_cumprod)
        self.count = len(schedule)
        self.rows = torch.arange(self.count, dtype=torch.int32, device=device)
        abar = schedule.alphas_cumprod.tobytes()
        self.scale, self.shift, *tables = _tables(abar, self.eta, device, stream_of(device))
        self.table, self.only_x0, self.only_eps = tables
        seen = getattr(diffusion, "timestep_map", range(self.count))
        self.seen = sent(torch.from_numpy(np.array(seen, dtype=np.int64)), device)
        if getattr(diffusion, "rescale_timesteps", False):
            T = getattr(diffusion, "original_num_steps", self.count)
            self.seen = self.seen.float() * (1000.0 / T)
        self.buffers, self.between = Buffers(), Buffers()
        self.scaled: Tensor | None = None

    @torch.no_grad()
    def __call__(
        self, x: Tensor, t: Tensor, rows: Tensor | None = None, want_x0: bool = True
    ) -> Out:
        """``ddim_sample``'s result; ``rows`` is t, int32, of shape () where all samples agree."""
        rows = t.int() if rows is None else rows
        each = (-1, *[1] * (x.dim() - 1))
        seen = self.seen[t]
        shape = [x.shape[0], self.times_channels * x.shape[1], *x.shape[2:]]
        said = _checked("model", self.model(x, seen, **self.model_kwargs), shape)
        said = said[:, : x.shape[1]]
        prediction, clip = self.prediction, self.clip
        scaled = fitting(self.scaled, x)
        if scaled is None:
            scaled = self.scaled = torch.empty_like(x, dtype=torch.float32)
        torch.mul(x, self.scale[t].view(each), out=scaled)
        between = self.between.stepped
        if self.denoised_fn is not None:
            x0 = said
            if prediction == "epsilon":
                x0, _ = between(self.only_x0, scaled, said, rows, want_x0=False)
            said = _checked("denoised_fn", self.denoised_fn(x0), x.shape)
            prediction = "sample"
        if self.cond_fn is not None:
            said, _ = between(
                self.only_eps,
                scaled,
                said,
                rows,
                prediction=prediction,
                clip=clip,
                rederive=True,
                want_x0=False,
            )
            score = _checked("cond_fn", self.cond_fn(x, seen, **self.model_kwargs), x.shape)
            said -= self.shift[t].view(each) * score
            prediction, clip = "epsilon", None
        x_s, x0_or_none = self.buffers.stepped(
            self.table,
            scaled,
            said,
            rows,
            prediction=prediction,
            clip=clip,
            rederive=True,
            want_x0=want_x0,
            noise=self._noise(x),
        )
        out = {"sample": x_s}
        if x0_or_none is not None:
            out["pred_xstart"] = x0_or_none
        return out

    def _noise(self, x: Tensor) -> Tensor | None:
        """z, drawn as ``torch.randn_like(x)`` draws it; None where it has no effect."""
        if self.eta is None:
            return None
        if self.eta == 0:
            passed_over(x)()
            return None
        return self.buffers.drawn(x).float()


@lru_cache(maxsize=16)
def _tables(
    levels: bytes, eta: float | None, device: torch.device, stream: int
) -> tuple[Tensor, ...]:
    """√(1/ᾱ_t), √(1−ᾱ_t) and three tables, by the original's own float32 operations.

    With the first table the op returns x_s, with the second x0 in its place, with the third ε.
    ``levels`` are ᾱ, float64. The results are kept, for each ``stream`` its own, which need not
    wait for another's: a loop of single steps asks for the same ones at each, and making them
    waits for the device.
    """
    abar = np.frombuffer(levels)
    if abar[-1] == 0:
        raise ValueError("diffusion.alphas_cumprod must be > 0, got 0 at the last timestep")

    def on_device(values: Float64) -> Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(device)

    at, b = on_device(abar), on_device(np.sqrt(1.0 / abar - 1))
    upwards = eta is None
    at_s = on_device(np.append(abar[1:], 0.0) if upwards else np.append(1.0, abar[:-1]))

    def factors(eta: float) -> tuple[Tensor, Tensor]:
        c1 = eta * ((1 - at_s) / (1 - at)).sqrt() * (1 - at / at_s).sqrt()
        return c1, (1 - at_s - c1**2).sqrt()

    one, none = torch.ones_like(at), torch.zeros_like(at)
    c1, c2 = none, (1 - at_s).sqrt()
    if eta:
        c1, c2 = checked_factors(factors, eta, "these timesteps")
    returned = (at_s.sqrt(), c1, c2), (one, none, none), (none, none, one)
    tables = [pack_rows(one, b, *last) for last in returned]
    return on_device(np.sqrt(1.0 / abar)), (1 - at).sqrt(), *tables


def _respaced(respacing: str | Sequence[int] | None, T: int) -> list[int]:
    """The timesteps of T to keep, rising, as the original chooses them."""
    allowed = 'timestep_respacing must be "ddimN", counts as "10,15,20", or ""'
    if not isinstance(respacing, (str, Sequence, type(None))):
        raise TypeError(f"{allowed}, got {shown(respacing)}")
    text = respacing if isinstance(respacing, str) else ",".join(map(str, respacing or ()))
    found = re.fullmatch(r"ddim(\d+)|(\d+(?:,\d+)*)|", text)
    if not found:
        raise ValueError(f"{allowed}, got {shown(respacing)}")
    if found[1]:
        return _strided(int(found[1]), T)
    counts = [int(count) for count in (found[2] or str(T)).split(",")]
    start, kept = 0, []
    for i, count in enumerate(counts):
        size = T // len(counts) + (i < T % len(counts))
        if count > size:
            raise ValueError(
                f"timestep_respacing must take at most {size} steps from section {i + 1} of "
                f"{len(counts)}, got {count}"
            )
        place, stride = 0.0, (size - 1) / max(count - 1, 1)
        for _ in range(count):
            kept.append(start + round(place))
            place += stride  # a product would round to other timesteps here and there
        start += size
    if not kept:
        raise ValueError(f"timestep_respacing must take a step or more, got {shown(respacing)}")
    return sorted(set(kept))


def _strided(steps: int, T: int) -> list[int]:
    """So many timesteps an integer stride apart, where there is such a stride: the least one's."""
    strides = {len(range(0, T, stride)): stride for stride in range(max(T - 1, 1), 0, -1)}
    if steps not in strides:
        lower = max((n for n in strides if n < steps), default=0)
        higher = min((n for n in strides if n > steps), default=0)
        near = " and ".join(f"ddim{n}" for n in (lower, higher) if n)
        raise ValueError(
            f"timestep_respacing must be a ddimN that an integer stride gives, near it {near}, "
            f"got 'ddim{steps}'"
        )
    return list(range(0, T, strides[steps]))


def _one_of(diffusion: Any, name: str, **allowed: Any) -> Any:
    """What an enum's member, known by its name, stands for."""
    value = getattr(diffusion, name)
    found = getattr(value, "name", value)
    if found not in allowed:
        raise ValueError(f"diffusion.{name} must be one of {', '.join(allowed)}, got {found}")
    return allowed[found]


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


def _checked(name: str, output: Any, shape: Sequence[int]) -> Tensor:
    """What the caller's function returned."""
    if not isinstance(output, Tensor):
        raise TypeError(f"{name} must return a tensor, got {kind(output)}")
    if list(output.shape) != list(shape):
        raise ValueError(f"{name} must return shape {tuple(shape)}, got {tuple(output.shape)}")
    if output.dtype not in OUTPUTS:
        dtype = str(output.dtype)[6:]
        raise TypeError(f"{name} must return float32, bfloat16 or float16, got {dtype}")
    return output


def _timesteps(t: Any, x: Tensor, count: int) -> Tensor:
    if not isinstance(t, Tensor) or t.dtype != torch.int64 or t.shape != x.shape[:1]:
        got = f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else kind(t)
        raise TypeError(f"t must be int64 of shape ({len(x)},), got {got}")
    if t.device != x.device:
        raise ValueError(f"t must be on {x.device} with x, got {t.device}")
    # On a GPU, looking would wait for the device.
    if t.device.type == "cpu" and ((t < 0) | (t >= count)).any():
        raise ValueError(f"t must lie in [0, {count}), got {t.min()} to {t.max()}")
    return t


def _device_of(x: Tensor) -> torch.device:
    _check_state("x", x)
    return x.device


def _device(model: Any, noise: Tensor | None, device: torch.device | str | None) -> torch.device:
    if noise is not None:
        if device is not None and torch.empty(0, device=device).device != noise.device:
            raise ValueError(f"noise must be on device, {device}, got {noise.device}")
        return noise.device
    if device is None:
        try:
            first: Tensor = next(model.parameters())
        except (AttributeError, StopIteration):
            raise ValueError("device must be given where model has no parameters") from None
        return first.device
    return torch.empty(0, device=device).device


def _bar() -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from None
    return tqdm
