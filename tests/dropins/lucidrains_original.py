"""What denoising-diffusion-pytorch computes in ``ddim_sample``, and a model to compare on."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor


class Described(torch.nn.Module):
    """What denoising-diffusion-pytorch 2.3.4 computes in ``ddim_sample``, in our own words."""

    def __init__(
        self,
        model: Any,
        *,
        image_size: int,
        timesteps: int,
        sampling_timesteps: int,
        objective: str,
        beta_schedule: str = "linear",
        ddim_sampling_eta: float = 0.0,
        auto_normalize: bool = True,
    ) -> None:
        super().__init__()
        self.model, self.objective, self.image_size = model, objective, image_size
        self.self_condition = model.self_condition
        self.num_timesteps, self.sampling_timesteps = timesteps, sampling_timesteps
        self.ddim_sampling_eta = ddim_sampling_eta
        self.unnormalize: Any = (lambda x: (x + 1) * 0.5) if auto_normalize else (lambda x: x)
        if beta_schedule == "linear":
            ends = 0.1 / timesteps, 20 / timesteps
            betas = torch.linspace(*ends, timesteps, dtype=torch.float64)
        else:
            u = torch.linspace(0, timesteps, timesteps + 1, dtype=torch.float64) / timesteps
            abar = torch.cos((u + 0.008) / 1.008 * torch.pi * 0.5) ** 2
            abar = abar / abar[0]
            betas = (1 - abar[1:] / abar[:-1]).clip(0, 0.999)
        abar = torch.cumprod(1.0 - betas, 0)
        self.register_buffer("alphas_cumprod", abar.float())
        self.register_buffer("sqrt_alphas_cumprod", abar.sqrt().float())
        self.register_buffer("sqrt_one_minus_alphas_cumprod", (1.0 - abar).sqrt().float())
        self.register_buffer("sqrt_recip_alphas_cumprod", (1.0 / abar).sqrt().float())
        self.register_buffer("sqrt_recipm1_alphas_cumprod", (1.0 / abar - 1).sqrt().float())

    def at(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        table: Tensor = getattr(self, name)
        return table[t].view(-1, *[1] * (x.dim() - 1))

    def predict_start_from_noise(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        scale = self.at("sqrt_recip_alphas_cumprod", t, x)
        return scale * x - self.at("sqrt_recipm1_alphas_cumprod", t, x) * noise

    def predict_start_from_v(self, x: Tensor, t: Tensor, v: Tensor) -> Tensor:
        a, b = (self.at(f"sqrt_{name}", t, x) for name in ("alphas_cumprod", *ONE_MINUS))
        return a * x - b * v

    def predict_noise_from_start(self, x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        scale = self.at("sqrt_recip_alphas_cumprod", t, x)
        return (scale * x - x0) / self.at("sqrt_recipm1_alphas_cumprod", t, x)

    def model_predictions(self, x: Tensor, t: Tensor, before: Tensor | None) -> list[Tensor]:
        output = self.model(x, t, before)
        starts = {
            "pred_noise": self.predict_start_from_noise,
            "pred_x0": lambda x, t, output: output,
            "pred_v": self.predict_start_from_v,
        }
        x0 = starts[self.objective](x, t, output).clamp(-1.0, 1.0)
        return [self.predict_noise_from_start(x, t, x0), x0]

    @torch.inference_mode()
    def ddim_sample(self, shape: Any, return_all_timesteps: bool = False) -> Tensor:
        abar: Any = self.alphas_cumprod
        tau = torch.linspace(-1, self.num_timesteps - 1, self.sampling_timesteps + 1).int().tolist()
        x, x0 = torch.randn(shape, device=abar.device), None
        states = [x]
        for t, s in zip(tau[:0:-1], tau[-2::-1], strict=True):
            seen = torch.full((len(x),), t, device=x.device)
            eps, x0 = self.model_predictions(x, seen, x0 if self.self_condition else None)
            if s < 0:
                x = x0
            else:
                a, a_s = abar[t], abar[s]
                sigma = self.ddim_sampling_eta * ((1 - a / a_s) * (1 - a_s) / (1 - a)).sqrt()
                c = (1 - a_s - sigma**2).sqrt()
                z = torch.randn_like(x)
                x = x0 * a_s.sqrt() + c * eps + sigma * z
            states.append(x)
        result: Tensor = self.unnormalize(torch.stack(states, 1) if return_all_timesteps else x)
        return result

    def sample(self, batch_size: int) -> Tensor:
        size = self.image_size
        loop: Any = self.ddim_sample  # which an instance may have replaced
        samples: Tensor = loop((batch_size, self.model.channels, size, size))
        return samples


def flat(cls: type[Described]) -> type[Described]:
    """The class with the methods below its loop as its own, as the package's classes have them."""
    for name in ("model_predictions", "predict_noise_from_start", *STARTS):
        setattr(cls, name, getattr(cls, name))
    return cls


STARTS = ("predict_start_from_noise", "predict_start_from_v")


class DescribedAgain(Described):
    """The loop of the package's other classes, whose ε stays the output of a pred_noise model."""

    def predictions(self, output: Tensor, x: Tensor, t: Tensor, clip: bool) -> list[Tensor]:
        starts = {
            "pred_noise": self.predict_start_from_noise,
            "pred_x0": lambda x, t, output: output,
            "pred_v": self.predict_start_from_v,
        }
        x0 = starts[self.objective](x, t, output)
        x0 = x0.clamp(-1.0, 1.0) if clip else x0
        of_noise = self.objective == "pred_noise"
        return [output if of_noise else self.predict_noise_from_start(x, t, x0), x0]

    def states(self, shape: Any, called: Callable[..., Any], clip: bool = True) -> list[Tensor]:
        """x_T and the state after each step; the last is the samples before ``unnormalize``."""
        abar: Any = self.alphas_cumprod
        tau = torch.linspace(-1, self.num_timesteps - 1, self.sampling_timesteps + 1).int().tolist()
        x, x0 = torch.randn(shape, device=abar.device), None
        states, self.drawn = [x], x
        for t, s in zip(tau[:0:-1], tau[-2::-1], strict=True):
            seen = torch.full((len(x),), t, device=x.device)
            output = called(x, seen, x0 if self.self_condition else None)
            eps, x0 = self.predictions(output, x, seen, clip)
            if s < 0:
                x = x0
            else:
                a, a_s = abar[t], abar[s]
                sigma = self.ddim_sampling_eta * ((1 - a / a_s) * (1 - a_s) / (1 - a)).sqrt()
                c = (1 - a_s - sigma**2).sqrt()
                self.drawn = torch.randn_like(x)
                x = x0 * a_s.sqrt() + c * eps + sigma * self.drawn
            states.append(x)
        return states


@flat
class Described1D(DescribedAgain):
    """What GaussianDiffusion1D of 2.3.4 computes: the noise it returns is the last that it drew."""

    def __init__(self, model: Any, *, seq_length: int, **given: Any) -> None:
        super().__init__(model, image_size=seq_length, **given)
        self.register_buffer("betas", torch.zeros(1))

    @torch.no_grad()
    def ddim_sample(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        shape: Any,
        clip_denoised: bool = True,
        model_forward_kwargs: Any = None,
        return_noise: bool = False,
    ) -> Any:
        def called(x: Tensor, t: Tensor, x0: Tensor | None) -> Any:
            more = {} if x0 is None else {"x_self_cond": x0}
            return self.model(x, t, **{**(model_forward_kwargs or {}), **more})

        states = self.states(shape, called, clip_denoised)
        samples = self.unnormalize(states[-1])
        return (samples, self.drawn) if return_noise else samples


@flat
class DescribedClasses(DescribedAgain):
    """What 2.3.4's GaussianDiffusion for classifier-free guidance computes in ``ddim_sample``."""

    @torch.no_grad()
    def ddim_sample(  # type: ignore[override]
        self,
        classes: Tensor,
        shape: Any,
        cond_scale: float = 6.0,
        rescaled_phi: float = 0.7,
        clip_denoised: bool = True,
    ) -> Tensor:
        def called(x: Tensor, t: Tensor, x0: Tensor | None) -> Any:
            guided: Any = self.model.forward_with_cond_scale
            return guided(x, t, classes, cond_scale=cond_scale, rescaled_phi=rescaled_phi)[0]

        return (self.states(shape, called, clip_denoised)[-1] + 1) * 0.5


@flat
class DescribedGuided(DescribedAgain):
    """What GaussianDiffusion of 2.3.4's ``guided_diffusion`` computes in ``ddim_sample``."""

    @torch.no_grad()
    def ddim_sample(
        self,
        shape: Any,
        return_all_timesteps: bool = False,
        cond_fn: Any = None,
        guidance_kwargs: Any = None,
    ) -> Tensor:
        states = self.states(shape, self.model)
        every = torch.stack([states[0], *states[:-1]], 1)
        found: Tensor = self.unnormalize(every if return_all_timesteps else states[-1])
        return found


ONE_MINUS = ("one_minus_alphas_cumprod",)


class Net(torch.nn.Module):
    """Nonlinear, and large enough that x0 is clamped; ``then`` changes what it returns."""

    channels = out_dim = 3

    def __init__(self, self_condition: bool = False, then: Callable[..., Any] | None = None):
        super().__init__()
        self.self_condition, self.then = self_condition, then
        self.seen: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, t: Tensor, before: Tensor | None = None) -> Any:
        assert torch.is_inference_mode_enabled()
        assert t.dtype == torch.int64
        self.seen.append((x, t, before))
        output = 1.3 * x.clamp(-1.5, 1.5) + 1e-3 * (t % 97).view(-1, *[1] * (x.dim() - 1))
        if before is not None:
            output = output - 0.2 * before
        return output if self.then is None else self.then(output, x, before)


def package(module: str = "denoising_diffusion_pytorch", name: str = "GaussianDiffusion") -> Any:
    """A class of the package; what it imports and sampling does not use may be missing."""
    if importlib.util.find_spec("denoising_diffusion_pytorch") is None:
        pytest.skip("denoising-diffusion-pytorch is not installed")
    unused = ("torchvision", "ema_pytorch", "accelerate", "pytorch_fid")
    missing = [name for name in unused if importlib.util.find_spec(name) is None]
    sys.modules.update({name: MagicMock() for name in missing})
    try:
        found = importlib.import_module(f"denoising_diffusion_pytorch.{module}")
    finally:
        for absent in missing:
            del sys.modules[absent]
    return getattr(found, name)
