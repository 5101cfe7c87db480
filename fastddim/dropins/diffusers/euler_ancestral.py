"""diffusers' ``EulerAncestralDiscreteScheduler``, on the fused step."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.schedulers.scheduling_euler_ancestral_discrete import (
    EulerAncestralDiscreteScheduler,
    EulerAncestralDiscreteSchedulerOutput,
)
from torch import Tensor

from fastddim.coefficients import COLUMNS
from fastddim.dropins._shared import pack_rows
from fastddim.dropins._tables import CPU
from fastddim.dropins.diffusers.base import Generators, has_grad, output_of
from fastddim.dropins.diffusers.euler import Euler

B_T = COLUMNS.index("sqrt_1m_abar_t")
"""The column of the factor of ε in x_t."""


class FastEulerAncestralDiscreteScheduler(Euler, EulerAncestralDiscreteScheduler):
    """``diffusers.EulerAncestralDiscreteScheduler`` with a step of two passes over memory.

        pipe.scheduler = FastEulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)

        x0  = x_t − σ_t·ε
        x_s = x_t + (σ_down − σ_t)·(x_t − x0)/σ_t + σ_up·z
        σ_up² = σ_s²·(σ_t² − σ_s²)/σ_t²,   σ_down² = σ_s² − σ_up²

    The source is ``sample_euler_ancestral`` of crowsonkb/k-diffusion. This is DDIM with η = 1 along
    levels (α, σ) = (1, σ). A v model has x0 = x_t/(σ_t² + 1) − v·σ_t/√(σ_t² + 1), which takes a
    third pass. The class takes the original's configuration and arguments, and has its attributes.
    In float32 its results equal the original's, bit for bit on a CPU, and it draws the same normals
    from the generators. The original's own step runs for other dtypes, for samples and outputs of
    different shapes, under autograd, and where ``scale_model_input`` has
    never been called, of which the original warns.
    """

    _parent = EulerAncestralDiscreteScheduler
    _kinds = 3
    is_scale_input_called: bool

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Chooses timesteps and ``sigmas`` as the original does."""
        self._parent.set_timesteps(self, num_inference_steps, device)
        self._begin()

    def _rows(self, sigmas: Tensor) -> Tensor:
        sigma, sigma_to = sigmas[:-1], sigmas[1:]
        one, none = torch.ones_like(sigma), torch.zeros_like(sigma)
        up = (sigma_to**2 * (sigma**2 - sigma_to**2) / sigma**2) ** 0.5
        down = (sigma_to**2 - up**2) ** 0.5
        square = sigma**2 + 1
        # The state x_t takes the place of the noise in the first rows, with the factor 1.
        ahead = pack_rows(one, sigma, none, one, down - sigma)
        # The step does not read b_t of these rows: it holds the divisor of the model's input.
        noise = pack_rows(one, square**0.5, up, none, one)
        x0_of_v = pack_rows(none, square, -sigma / square**0.5, none, one)
        return torch.cat([ahead, noise, x0_of_v])

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """Returns x_t/√(σ_t² + 1), as the original does."""
        table = None
        if torch.compiler.is_compiling():
            found = None
            if sample.dtype == torch.float32 and not has_grad(sample):
                found = self._traced(timestep, sample)
            if found is not None:
                self.is_scale_input_called = True
                traced, at, steps = found
                return sample / traced.index_select(0, at + steps)[0, B_T]
        # Autograd cannot keep a divisor that was made in inference mode.
        elif not has_grad(sample):
            # A GPU multiplies by the reciprocal of a CPU's number, as the original does.
            table = self._table_on(CPU)
        if table is not None:
            if self._step_index is None:
                self._init_step_index(timestep)
            place, steps = self._step_index, table.shape[0] // self._kinds
            if isinstance(place, int) and 0 <= place < steps:
                self.is_scale_input_called = True
                return sample / self._column(table, B_T)[steps + place]
        scaled: Tensor = self._parent.scale_model_input(self, sample, timestep)
        return scaled

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        """Returns (prev_sample, pred_original_sample), as the original's ``step`` does."""
        prediction, found = self.config.prediction_type, None
        if self.is_scale_input_called and prediction in ("epsilon", "v_prediction"):
            found = self._found(model_output, timestep, sample, generator)
        if found is None:
            return self._parent.step(self, model_output, timestep, sample, generator, return_dict)
        table, place, steps = found
        own = self._taker
        if prediction == "epsilon":
            ahead, x0 = own.stepped(
                table, sample, model_output, place, rederive=True, noise=sample, checked=True
            )
        else:
            x0, _ = own.stepped(
                table,
                sample,
                model_output,
                place + 2 * steps,
                prediction="sample",
                want_x0=False,
                checked=True,
            )
            ahead, _ = own.stepped(
                table,
                sample,
                x0,
                place,
                prediction="sample",
                want_x0=False,
                noise=sample,
                checked=True,
            )
        assert x0 is not None
        noise = self._drawn(model_output, generator)
        x_s = self._sum(table, place + steps, ahead, noise, kept=False)
        self._advance(place, steps)
        if not return_dict:
            return x_s, x0
        return output_of(
            EulerAncestralDiscreteSchedulerOutput, prev_sample=x_s, pred_original_sample=x0
        )
