"""diffusers' ``CogVideoXDDIMScheduler``: its constructor and methods, on the fused step."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim_cogvideox import (
    CogVideoXDDIMScheduler,
    DDIMSchedulerOutput,
)
from torch import Tensor

from fastddim.dropins._scheduler import NAMES
from fastddim.dropins._shared import pack_rows
from fastddim.dropins._tables import Made, Tables, with_nan
from fastddim.dropins.diffusers.base import Base, Generators, fits, output_of
from fastddim.dropins.diffusers.plain import rows_at
from fastddim.step.arguments import transformed


class FastCogVideoXDDIMScheduler(Base, CogVideoXDDIMScheduler):
    """``diffusers.CogVideoXDDIMScheduler`` with a step that is one pass over memory.

    The class takes the original's configuration and arguments, and has its attributes. A step is

        x_s = a·x_t + b·x0,   a = √((1−ᾱ_s)/(1−ᾱ_t)),   b = √ᾱ_s − √ᾱ_t·a

    which is DDIM at η = 0 with ε replaced by (x_t − √ᾱ_t·x0)/√(1−ᾱ_t). The ᾱ are those of β,
    shifted to ᾱ/(c + (1−c)·ᾱ), c = ``snr_shift_scale`` (Yang et al. 2024, "CogVideoX"). The
    original's own operations make the factors, in ᾱ's dtype (float64 for ``scaled_linear``), and
    float32 rounds them once. The results are bit-identical in float32 on a CPU. As in the original,
    ``eta``, ``use_clipped_model_output``, the generators and ``clip_sample`` have no effect.

    The original's own step runs for other dtypes than float32; for samples and outputs of different
    shapes; under autograd and in ``torch.compile``.

    Example::

        pipe.scheduler = FastCogVideoXDDIMScheduler.from_config(
            pipe.scheduler.config, timestep_spacing="trailing"
        )
    """

    _parent = CogVideoXDDIMScheduler

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.0120,
        beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear",
        trained_betas: Any = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading",
        rescale_betas_zero_snr: bool = False,
        snr_shift_scale: float = 3.0,
    ) -> None:
        self._parent.__init__(
            self,
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            clip_sample=clip_sample,
            set_alpha_to_one=set_alpha_to_one,
            steps_offset=steps_offset,
            prediction_type=prediction_type,
            clip_sample_range=clip_sample_range,
            sample_max_value=sample_max_value,
            timestep_spacing=timestep_spacing,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
            snr_shift_scale=snr_shift_scale,
        )

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Chooses timesteps as the original does."""
        self._parent.set_timesteps(self, num_inference_steps, device)
        self._follow_timesteps()

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Returns (prev_sample, pred_original_sample), as the original's ``step`` does."""
        found = self._taken(model_output, timestep, sample)
        if found is None:
            return self._parent.step(
                self,
                model_output,
                timestep,
                sample,
                eta,
                use_clipped_model_output,
                generator,
                variance_noise,
                return_dict,
            )
        if not return_dict:
            return found
        x_s, x0 = found
        return output_of(DDIMSchedulerOutput, prev_sample=x_s, pred_original_sample=x0)

    def _taken(self, output: Tensor, timestep: Any, sample: Tensor) -> tuple[Tensor, Tensor] | None:
        """Returns (x_s, x0), or None if the original's own step must run."""
        if torch.compiler.is_compiling() or transformed():
            return None
        t = self._row(timestep)
        if t is None or not fits(self, output, sample) or sample.dtype != torch.float32:
            return None
        tables = self._tables_of(sample.device)
        if tables is None:
            return None
        count = len(self.alphas_cumprod)
        row: Tensor | int
        if isinstance(t, Tensor):
            row = rows_at(t, count, sample.device).expand(len(sample))
        elif -count <= t < count:
            row = t + count
        else:
            return None
        own, read = self._own, self._read
        x_s, x0 = own.stepped(
            tables.table,
            sample,
            output,
            row,
            prediction=NAMES[self.config.prediction_type],
            posterior=True,
            checked=True,
        )
        if read is not None and type(t) is int and read.levels and t == read.levels[-1]:
            own.clear()
        return x_s, cast(Tensor, x0)

    def _tables_of(self, device: torch.device) -> Tables | None:
        """Returns the original's step from each timestep, by its own operations in ᾱ's dtype.

        A negative timestep counts from the end, as an index does in the original. Returns None if
        the original mixes other dtypes.
        """
        abar, end, steps = self.alphas_cumprod, self._end(), self.num_inference_steps
        assert steps is not None
        T = self.config.num_train_timesteps
        given = "cogvideox", device, abar, end, (steps, T)
        found = self._cache.found(*given)
        if found is not None or not _levels_fit(abar, end):
            return found
        t = torch.arange(-T, T, device=abar.device)
        s = t - T // steps
        at, last = abar[t], end.to(abar.device, abar.dtype)
        at_s = torch.where(s >= 0, abar[s.clamp(min=0)], last)
        a = ((1 - at_s) / (1 - at)) ** 0.5
        b = at_s**0.5 - at**0.5 * a
        rows = pack_rows(at**0.5, (1 - at) ** 0.5, b, torch.zeros_like(a), a)
        return self._cache.keep(*given, Made(with_nan(rows)))


def _levels_fit(abar: Tensor, end: Any) -> bool:
    """Tells whether ᾱ's dtype is that of all the original's factors; an end of 1 has no dtype."""
    return (
        abar.dtype in (torch.float32, torch.float64)
        and isinstance(end, Tensor)
        and not end.dim()
        and (end.dtype == abar.dtype or (end.is_cpu and float(end) == 1))
    )
