"""What DiffSynth-Studio's DDIM schedulers compute, in our own words."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class Described:
    """The scheduler of DiffSynth-Studio fed7b18f: levels and factors are Python numbers."""

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_schedule: str = "scaled_linear",
        prediction_type: str = "epsilon",
        rescale_zero_terminal_snr: bool = False,
    ) -> None:
        ends = [0.00085, 0.012]
        if beta_schedule == "scaled_linear":
            low, high = (math.sqrt(end) for end in ends)
            betas = torch.linspace(low, high, num_train_timesteps, dtype=torch.float32) ** 2
        else:
            betas = torch.linspace(ends[0], ends[1], num_train_timesteps, dtype=torch.float32)
        abar = torch.cumprod(1.0 - betas, dim=0)
        if rescale_zero_terminal_snr:
            root = abar.sqrt()
            first, end = root[0].clone(), root[-1].clone()
            abar = ((root - end) * (first / (first - end))) ** 2
        self.num_train_timesteps = num_train_timesteps
        self.alphas_cumprod: Any = abar.tolist()
        self.prediction_type = prediction_type
        self.timesteps: Any = None
        self.set_timesteps(10)

    def chosen(self, steps: int, strength: float) -> list[int]:
        """The timesteps from the highest to 0, evenly spread and rounded."""
        top = max(round(self.num_train_timesteps * strength) - 1, 0)
        steps = min(steps, top + 1)
        return [top] if steps == 1 else [round(top - i * (top / (steps - 1))) for i in range(steps)]

    def set_timesteps(self, steps: int, denoising_strength: float = 1.0) -> None:
        self.timesteps = torch.tensor(self.chosen(steps, denoising_strength), dtype=torch.float32)

    def denoise(self, output: Any, x: Any, at: float, at_s: float) -> Any:
        if self.prediction_type == "epsilon":
            e = math.sqrt(1 - at_s) - math.sqrt(at_s * (1 - at) / at)
            w = math.sqrt(at_s / at)
        else:
            e = -math.sqrt(at_s * (1 - at)) + math.sqrt(at * (1 - at_s))
            w = math.sqrt(at * at_s) + math.sqrt((1 - at) * (1 - at_s))
        return x * w + output * e

    def step(self, output: Tensor, t: Tensor, x: Tensor, to_final: bool = False) -> Any:
        place = int(torch.argmin((self.timesteps - t.cpu()).abs()))
        last = to_final or place + 1 >= len(self.timesteps)
        at_s = 1.0 if last else self.alphas_cumprod[int(self.timesteps[place + 1])]
        return self.denoise(output, x, self.alphas_cumprod[int(t.flatten()[0])], at_s)


class Earlier(Described):
    """The ``EnhancedDDIMScheduler`` of earlier versions, whose timesteps are a list of integers."""

    def set_timesteps(self, steps: int, denoising_strength: float = 1.0) -> None:
        self.timesteps = self.chosen(steps, denoising_strength)

    def step(self, output: Tensor, t: Any, x: Tensor, to_final: bool = False) -> Any:
        place = self.timesteps.index(t)
        last = to_final or place + 1 >= len(self.timesteps)
        at_s = 1.0 if last else self.alphas_cumprod[self.timesteps[place + 1]]
        return self.denoise(output, x, self.alphas_cumprod[t], at_s)
