"""diffusers' ``FlowMatchEulerDiscreteScheduler``, on the fused step."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchEulerDiscreteSchedulerOutput,
)
from torch import Tensor

from fastddim.dropins._shared import pack_rows
from fastddim.dropins.diffusers.base import Generators, output_of
from fastddim.dropins.diffusers.euler import Euler

_TAKES_GENERATOR = "randn_tensor" in FlowMatchEulerDiscreteScheduler.step.__code__.co_names
"""False for diffusers 0.37, whose step accepts a generator and draws by ``torch.randn_like``."""


class FastFlowMatchEulerDiscreteScheduler(Euler, FlowMatchEulerDiscreteScheduler):
    """``diffusers.FlowMatchEulerDiscreteScheduler`` with a step that is one pass over memory.

        pipe.scheduler = FastFlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)

        x_s = x_t + (σ_s − σ_t)·u                               (Liu et al. 2022, section 2.2)
        x_s = (1 − σ_s)·(x_t − σ_t·u) + σ_s·z                   with ``stochastic_sampling``

    The first is Euler's step along the path x = (1 − σ)·x0 + σ·ε, and u = ε − x0 is the model's
    output. The class takes the original's configuration and arguments, and has its attributes. In
    float32, bfloat16 and float16 its results equal the original's, bit for bit on a CPU, and it
    draws the same normals from the generators. The original's own step runs for float64, for
    ``stochastic_sampling`` in half precision, for ``per_token_timesteps``, for samples and outputs
    of different dtypes or shapes, and under autograd. As in the original, the step ignores
    ``s_churn``, ``s_tmin``, ``s_tmax`` and ``s_noise``.
    """

    _parent = FlowMatchEulerDiscreteScheduler
    _kinds = 2

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Chooses timesteps and ``sigmas`` as the original does."""
        self._parent.set_timesteps(self, num_inference_steps, device, sigmas, mu, timesteps)
        self._begin()

    def _rows(self, sigmas: Tensor) -> Tensor:
        sigma, sigma_next = sigmas[:-1], sigmas[1:]
        one, none = torch.ones_like(sigma), torch.zeros_like(sigma)
        # First come the steps dt·u + 1·x_t, and then the stochastic steps.
        steps = pack_rows(one, one, sigma_next - sigma, none, one)
        noisy = pack_rows(one, sigma, 1.0 - sigma_next, sigma_next, none)
        return torch.cat([steps, noisy])

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Returns (prev_sample,), as the original's ``step`` does."""
        found = None
        if per_token_timesteps is None:
            # The original's stochastic step keeps a float32 x0 and draws float32 noise.
            halves = not self.config.stochastic_sampling
            found = self._found(model_output, timestep, sample, generator, halves)
        if found is None:
            return self._parent.step(
                self, model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator,
                per_token_timesteps, return_dict,
            )  # fmt: skip
        table, place, steps = found
        if self.config.stochastic_sampling:
            own = self._taker
            noise = self._drawn(sample, generator) if _TAKES_GENERATOR else own.drawn(sample)
            x_s, _ = own.stepped(
                table,
                sample,
                model_output,
                place + steps,
                prediction="flow",
                posterior=True,  # The factor of x_t is 0: x_t costs a pass less than ε does.
                noise_first=True,
                want_x0=False,
                noise=noise,
                checked=True,
            )
        else:
            x_s = self._sum(table, place, sample, model_output, kept=True)
        self._advance(place, steps)
        if return_dict:
            return output_of(FlowMatchEulerDiscreteSchedulerOutput, prev_sample=x_s)
        return (x_s,)
