"""What MONAI's ``DDIMScheduler`` computes, and loops to compare on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def betas_of(schedule: str, T: int, low: float, high: float) -> Tensor:
    """The β of MONAI's schedules, in float32."""
    if schedule == "linear_beta":
        return torch.linspace(low, high, T, dtype=torch.float32)
    if schedule == "scaled_linear_beta":
        return torch.linspace(low**0.5, high**0.5, T, dtype=torch.float32) ** 2
    if schedule == "sigmoid_beta":
        return torch.sigmoid(torch.linspace(-6, 6, T)) * (high - low) + low
    u = torch.linspace(0, T, T + 1) / T
    abar = torch.cos((u + 8e-3) / (1 + 8e-3) * torch.pi * 0.5) ** 2
    abar = abar / abar[0].item()
    return (1.0 - abar[1:] / abar[:-1]).clip(0.0, 0.999)


class Described(torch.nn.Module):
    """What MONAI 1.6.1 computes in ``step`` and ``reversed_step``, in our own words."""

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        schedule: str = "linear_beta",
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        clip_sample_min: float = -1.0,
        clip_sample_max: float = 1.0,
        beta_start: float = 1e-4,
        beta_end: float = 2e-2,
    ) -> None:
        super().__init__()
        self.betas = betas_of(schedule, num_train_timesteps, beta_start, beta_end)
        self.alphas_cumprod = torch.cumprod(1.0 - self.betas, dim=0)
        self.final_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]
        self.num_train_timesteps, self.steps_offset = num_train_timesteps, steps_offset
        self.prediction_type, self.clip_sample = prediction_type, clip_sample
        self.clip_sample_values = [clip_sample_min, clip_sample_max]
        self.set_timesteps(num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self.num_inference_steps = num_inference_steps
        last = self.num_train_timesteps - 1 - self.steps_offset
        spaced = torch.linspace(last, 0, num_inference_steps, device=device).round().long()
        self.timesteps = spaced + self.steps_offset

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        self.alphas_cumprod = self.alphas_cumprod.to(x0.device, x0.dtype)
        abar = self.alphas_cumprod[t.to(x0.device)].view(-1, *[1] * (x0.dim() - 1))
        return abar**0.5 * x0 + (1 - abar) ** 0.5 * noise

    def level(self, s: Any) -> Tensor:
        return self.alphas_cumprod[s] if s >= 0 else self.final_alpha_cumprod

    def _get_variance(self, t: Any, s: Any) -> Tensor:
        at, at_s = self.alphas_cumprod[t], self.level(s)
        return ((1 - at_s) / (1 - at)) * (1 - at / at_s)

    def predicted(self, output: Tensor, t: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """x0, clamped, and ε."""
        a, b = self.alphas_cumprod[t] ** 0.5, (1 - self.alphas_cumprod[t]) ** 0.5
        if self.prediction_type == "epsilon":
            x0, eps = (x - b * output) / a, output
        elif self.prediction_type == "sample":
            x0, eps = output, (x - a * output) / b
        else:
            x0, eps = a * x - b * output, a * output + b * x
        return (x0.clamp(*self.clip_sample_values) if self.clip_sample else x0), eps

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, eta: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        s = timestep - self.num_train_timesteps // self.num_inference_steps
        x0, eps = self.predicted(model_output, timestep, sample)
        sigma = eta * self._get_variance(timestep, s) ** 0.5
        x = self.level(s) ** 0.5 * x0 + (1 - self.level(s) - sigma**2) ** 0.5 * eps
        if eta > 0:
            given: Any = {"dtype": model_output.dtype, "device": model_output.device}
            x = x + sigma * torch.randn(model_output.shape, generator=generator, **given)
        return x, x0

    def reversed_step(
        self, model_output: Tensor, timestep: Any, sample: Tensor
    ) -> tuple[Tensor, Tensor]:
        s = timestep + self.num_train_timesteps // self.num_inference_steps
        x0, eps = self.predicted(model_output, timestep, sample)
        return self.level(s) ** 0.5 * x0 + (1 - self.level(s)) ** 0.5 * eps, x0


def model(x: Tensor, t: Any) -> Tensor:
    """Nonlinear, and large enough that x0 is clamped."""
    return 1.3 * x.clamp(-1.5, 1.5) + 1e-3 * (int(t) % 97)


def loop(
    scheduler: Any, x: Tensor, eta: float = 0.0, seed: int | None = None, net: Any = model
) -> list[Tensor]:
    """Every x_s and x0, and the state that the generator ends in."""
    torch.manual_seed(5)
    generator = None if seed is None else torch.Generator(x.device).manual_seed(seed)
    every = []
    for t in scheduler.timesteps:
        x, x0 = scheduler.step(net(x, t), t, x, eta, generator)
        every += [x, x0]
    return [*every, torch.get_rng_state() if generator is None else generator.get_state()]


def reversed_loop(scheduler: Any, x: Tensor) -> list[Tensor]:
    """Every x_s and x0 of the steps towards noise that stay in the table."""
    every = []
    stride = scheduler.num_train_timesteps // scheduler.num_inference_steps
    for t in scheduler.timesteps.flip(0):
        if int(t) + stride < scheduler.num_train_timesteps:
            x, x0 = scheduler.reversed_step(model(x, t), t, x)
            every += [x, x0]
    return every
