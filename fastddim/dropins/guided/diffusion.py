"""guided-diffusion's schedule, and the timesteps it keeps of it, for those without its object."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from fastddim.check import shown, truth, whole
from fastddim.levels import Float64
from fastddim.schedule import guided_diffusions


class Diffusion:
    """Stands for guided-diffusion's ``SpacedDiffusion``, with the attributes that the steps read.

    Args:
        diffusion_steps: T, the number of noise levels the model was trained on.
        timestep_respacing: the timesteps to keep. ``"ddimN"`` keeps N of them, an integer stride
            apart; ``"10,15,20"`` keeps 10, 15 and 20 of the three thirds, spread evenly; ``""``
            keeps all.
        noise_schedule: ``"linear"``, β from 0.1/T to 20/T (T > 20), or ``"cosine"``.
        learn_sigma: whether the model returns a variance too, as additional channels.
        predict_xstart: whether the model returns x0 instead of ε.
        rescale_timesteps: whether the model is called with t·1000/T, float32, instead of t, int64.
        sigma_small: whether the variance of ``p_sample`` is β̃_t instead of β_t, if the model learns
            none.

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
        sigma_small: bool = False,
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
        # The original recomputes ᾱ from β; the round trip changes the last bits.
        self.betas: Float64 = 1 - kept / np.append(1.0, kept[:-1])
        self.alphas_cumprod: Float64 = np.cumprod(1 - self.betas, dtype=np.float64)
        self.model_mean_type = "START_X" if truth("predict_xstart", predict_xstart) else "EPSILON"
        fixed = "FIXED_SMALL" if truth("sigma_small", sigma_small) else "FIXED_LARGE"
        self.model_var_type = "LEARNED_RANGE" if truth("learn_sigma", learn_sigma) else fixed
        self.rescale_timesteps = truth("rescale_timesteps", rescale_timesteps)


def _respaced(respacing: str | Sequence[int] | None, T: int) -> list[int]:
    """Returns which of the T timesteps the original keeps, rising."""
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
            place += stride  # A product would round to other timesteps here and there.
        start += size
    if not kept:
        raise ValueError(f"timestep_respacing must take a step or more, got {shown(respacing)}")
    return sorted(set(kept))


def _strided(steps: int, T: int) -> list[int]:
    """Returns ``steps`` timesteps, the least integer stride apart that gives this number."""
    strides = {len(range(0, T, stride)): stride for stride in range(max(T - 1, 1), 0, -1)}
    if steps not in strides:
        lower = max((n for n in strides if n < steps), default=0)
        higher = min((n for n in strides if n > steps), default=0)
        near = " and ".join(f"ddim{n}" for n in (lower, higher) if n)
        raise ValueError(
            f"timestep_respacing must be a ddimN that an integer stride gives (nearest: {near}), "
            f"got 'ddim{steps}'"
        )
    return list(range(0, T, strides[steps]))
