"""The step of DiffSynth-Studio's DDIM scheduler, in one pass over memory.

    pipe.scheduler.step = partial(diffsynth.step, pipe.scheduler)

The scheduler is the user's own: ``DDIMScheduler``, or ``EnhancedDDIMScheduler`` as earlier versions
name it. The module imports nothing of DiffSynth-Studio's.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from fastddim.check import kind
from fastddim.dropins._scheduler import like
from fastddim.dropins._shared import Own, as_eager, pack_rows, rounds, stream_of
from fastddim.dropins._tables import CPU
from fastddim.dropins._transfer import sent
from fastddim.step.arguments import transformed
from fastddim.step.buffers import FRESH

_OWN = Own()


def step(
    scheduler: Any, model_output: Tensor, timestep: Any, sample: Tensor, to_final: bool = False
) -> Tensor:
    """Returns x_s = w·x_t + e·output of the step from ``timestep`` to the next of the timesteps.

        ε:  w = √(ᾱ_s/ᾱ_t),                   e = √(1−ᾱ_s) − √(ᾱ_s·(1−ᾱ_t)/ᾱ_t)
        v:  w = √(ᾱ_t·ᾱ_s) + √((1−ᾱ_t)(1−ᾱ_s)),   e = √(ᾱ_t·(1−ᾱ_s)) − √(ᾱ_s·(1−ᾱ_t))

    This is DDIM at η = 0. The factors are Python numbers, which the scheduler's own ``denoise``
    computes. The results are bit-identical. ``denoise`` itself takes the step where its three
    operations cost no more than a launch (small states on a CPU), where the backend does not round
    the state's dtype as PyTorch does, where shapes or dtypes differ, under autograd and in
    ``torch.compile``.

    Args:
        scheduler: the function reads ``alphas_cumprod`` (a list), ``timesteps`` (a list or a
            tensor) and ``denoise``.
        model_output: ε or v, of sample's shape and dtype.
        timestep: a number or a tensor of one number.
        sample: x_t, (batch, ...).
        to_final: whether the step goes to ᾱ = 1, as the step from the last timestep does.

    Raises:
        TypeError: ``scheduler`` is no scheduler of DiffSynth-Studio's.
    """
    levels = _levels(scheduler, timestep, to_final)
    if levels is None:
        original = type(scheduler).step
        return cast(Tensor, original(scheduler, model_output, timestep, sample, to_final))
    at, at_s, last = levels
    if not _fits(model_output, sample):
        return cast(Tensor, scheduler.denoise(model_output, sample, at, at_s))
    # ``denoise`` is linear, so that its values at (0, 1) and (1, 0) are the factors.
    w, e = scheduler.denoise(0.0, 1.0, at, at_s), scheduler.denoise(1.0, 0.0, at, at_s)
    device = sample.device
    table = _table(w, e, device, stream_of(device), sample.dtype)
    x_s, _ = _OWN.stepped(table, sample, model_output, 0, want_x0=False, checked=True)
    if last:
        _OWN.clear()
    return x_s


def _fits(output: Any, sample: Any) -> bool:
    """Tells whether the fused step equals the original's operations, and costs less."""
    return (
        not (torch.compiler.is_compiling() or transformed())
        and isinstance(sample, Tensor)
        and (sample.numel() >= FRESH or not sample.is_cpu)
        and sample.dim() > 0
        and like(output, sample)
        and (sample.dtype == torch.float32 or rounds(sample, None))
        and not (torch.is_grad_enabled() and (sample.requires_grad or output.requires_grad))
    )


def _levels(scheduler: Any, timestep: Any, to_final: bool) -> tuple[float, float, bool] | None:
    """Returns ᾱ_t, ᾱ_s and whether no step follows, or None where the original's step decides."""
    try:
        abar, timesteps, _ = scheduler.alphas_cumprod, scheduler.timesteps, scheduler.denoise
    except AttributeError as error:
        raise TypeError(
            f"scheduler must be a DDIM scheduler of DiffSynth-Studio, got {kind(scheduler)} "
            f"({error})"
        ) from None
    if not isinstance(abar, list):
        return None
    if not isinstance(timestep, (int, Tensor)) or (
        isinstance(timestep, Tensor) and timestep.numel() != 1
    ):
        return None
    t = int(timestep)
    chosen = timesteps.tolist() if isinstance(timesteps, Tensor) else timesteps
    if timestep != t or t not in chosen or not 0 <= t < len(abar):
        return None  # The original takes the nearest timestep, or raises.
    following = chosen.index(t) + 1
    last = to_final or following >= len(chosen)
    return abar[t], 1.0 if last else abar[int(chosen[following])], last


@lru_cache(maxsize=2048)
def _table(w: float, e: float, device: torch.device, stream: int, dtype: torch.dtype) -> Tensor:
    """Returns the step x → w·x + e·ε, which is the one from clean data: x0 = (x − 0·ε)/1.

    The results are cached, each for its ``stream``, because making them waits for the device.
    """
    one, zero, w_, e_ = (torch.tensor([value], device=CPU) for value in (1.0, 0.0, w, e))
    rows = pack_rows(one, zero, w_, zero, e_)
    # PyTorch rounds no Python number to the state's dtype, on whichever device the state is.
    return sent(as_eager(rows, torch.device("meta"), dtype), device)
