"""The sampling loops of LeRobot and diffusion_policy, written from their description."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.dropins.scheduler_cases import diffusers

HORIZON, ACTIONS, OBSERVED = 16, 7, 10
SCHEDULERS: dict[str, Any] = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
}
COSINE = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2"}


class Unet(nn.Module):
    """A small 1-D convolutional network of (x, t, conditions), with random weights."""

    def __init__(self, channels: int = ACTIONS, seed: int = 0, width: int = 16) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Conv1d(channels, width, 5, padding=2)
            self.film = nn.Linear(width + OBSERVED, 2 * width)
            self.local = nn.Conv1d(OBSERVED, width, 1)
            self.norm = nn.GroupNorm(4, width)
            self.last = nn.Conv1d(width, channels, 5, padding=2)
        self.frequencies = nn.Buffer(torch.exp(torch.linspace(0, -9, width // 2)))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        local_cond: Tensor | None = None,
        global_cond: Tensor | None = None,
    ) -> Tensor:
        t = (t[None] if t.dim() == 0 else t).expand(len(x))
        angles = t[:, None].to(x.device) * self.frequencies
        told = x.new_zeros(len(x), OBSERVED) if global_cond is None else global_cond
        film = self.film(torch.cat([angles.sin(), angles.cos(), told], 1))
        scale, shift = film[:, :, None].chunk(2, 1)
        h = self.norm(self.first(x.transpose(1, 2))) * scale + shift
        if local_cond is not None:
            h = h + self.local(local_cond.transpose(1, 2))
        out: Tensor = self.last(F.mish(h))
        return out.transpose(1, 2)


def get_device_from_parameters(module: nn.Module) -> torch.device:
    return next(iter(module.parameters())).device


def get_dtype_from_parameters(module: nn.Module) -> torch.dtype:
    return next(iter(module.parameters())).dtype


class DiffusionModel(nn.Module):
    """LeRobot's: x_T comes from a generator or from ``noise``."""

    def __init__(self, scheduler: Any, steps: int | None = None, network: Any = None) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            horizon=HORIZON, action_feature=SimpleNamespace(shape=(ACTIONS,))
        )
        self.unet = Unet() if network is None else network
        self.noise_scheduler = scheduler
        self.num_inference_steps = scheduler.config.num_train_timesteps if steps is None else steps

    def conditional_sample(
        self,
        batch_size: int,
        global_cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        device = get_device_from_parameters(self)
        dtype = get_dtype_from_parameters(self)
        sample = (
            noise
            if noise is not None
            else torch.randn(
                size=(batch_size, self.config.horizon, self.config.action_feature.shape[0]),
                dtype=dtype,
                device=device,
                generator=generator,
            )
        )
        self.noise_scheduler.set_timesteps(self.num_inference_steps)
        for t in self.noise_scheduler.timesteps:
            output = self.unet(
                sample,
                torch.full(sample.shape[:1], t, dtype=torch.long, device=sample.device),
                global_cond=global_cond,
            )
            sample = self.noise_scheduler.step(output, t, sample, generator=generator).prev_sample
        return sample


class EarlierDiffusionModel(DiffusionModel):
    """LeRobot's of earlier versions: another configuration, and no ``noise``."""

    def __init__(self, scheduler: Any, steps: int | None = None) -> None:
        super().__init__(scheduler, steps)
        self.config = SimpleNamespace(horizon=HORIZON, output_shapes={"action": [ACTIONS]})

    def conditional_sample(  # type: ignore[override]
        self,
        batch_size: int,
        global_cond: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        device = get_device_from_parameters(self)
        dtype = get_dtype_from_parameters(self)
        sample = torch.randn(
            size=(batch_size, self.config.horizon, self.config.output_shapes["action"][0]),
            dtype=dtype,
            device=device,
            generator=generator,
        )
        self.noise_scheduler.set_timesteps(self.num_inference_steps)
        for t in self.noise_scheduler.timesteps:
            output = self.unet(
                sample,
                torch.full(sample.shape[:1], t, dtype=torch.long, device=sample.device),
                global_cond=global_cond,
            )
            sample = self.noise_scheduler.step(output, t, sample, generator=generator).prev_sample
        return sample


class LeRobotPolicy(nn.Module):
    """LeRobot's outer policy."""

    def __init__(self, diffusion: DiffusionModel) -> None:
        super().__init__()
        self.diffusion = diffusion

    @torch.no_grad()
    def select_action(self, observation: Tensor) -> Tensor:
        return self.diffusion.conditional_sample(len(observation), global_cond=observation)[:, 0]


class UnetPolicy(nn.Module):
    """diffusion_policy's: the observation is a condition, or known channels of the trajectory."""

    def __init__(
        self, scheduler: Any, steps: int | None = None, network: Any = None, **kwargs: Any
    ) -> None:
        super().__init__()
        self.model = Unet() if network is None else network
        self.noise_scheduler = scheduler
        self.num_inference_steps = scheduler.config.num_train_timesteps if steps is None else steps
        self.kwargs = kwargs

    def conditional_sample(
        self,
        condition_data: Tensor,
        condition_mask: Tensor,
        local_cond: Tensor | None = None,
        global_cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Tensor:
        model = self.model
        scheduler = self.noise_scheduler
        trajectory = torch.randn(
            size=condition_data.shape,
            dtype=condition_data.dtype,
            device=condition_data.device,
            generator=generator,
        )
        scheduler.set_timesteps(self.num_inference_steps)
        for t in scheduler.timesteps:
            trajectory[condition_mask] = condition_data[condition_mask]
            output = model(trajectory, t, local_cond=local_cond, global_cond=global_cond)
            trajectory = scheduler.step(
                output, t, trajectory, generator=generator, **kwargs
            ).prev_sample
        trajectory[condition_mask] = condition_data[condition_mask]
        return trajectory

    @torch.no_grad()
    def predict(self, observation: Tensor) -> Tensor:
        data = torch.zeros(len(observation), HORIZON, ACTIONS)
        mask = torch.zeros_like(data, dtype=torch.bool)
        return self.conditional_sample(data, mask, global_cond=observation, **self.kwargs)


def scheduler_of(name: str, **config: Any) -> Any:
    return SCHEDULERS[name](**{**COSINE, **config})
