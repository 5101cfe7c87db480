"""The three schedulers: diffusers' constructors and methods, whose steps a strategy takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMScheduler, DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddim_inverse import (
    DDIMInverseScheduler,
)
from diffusers.schedulers.scheduling_ddim_inverse import (
    DDIMSchedulerOutput as DDIMInverseSchedulerOutput,
)
from diffusers.schedulers.scheduling_ddim_parallel import (
    DDIMParallelScheduler,
    DDIMParallelSchedulerOutput,
)
from torch import Tensor

from fastddim.dropins._compiled import Kind
from fastddim.dropins._tables import Tables
from fastddim.dropins.diffusers.base import Base, Generators, Strategy, output_of
from fastddim.dropins.diffusers.plain import Plain
from fastddim.dropins.diffusers.strict import Strict
from fastddim.step.op import initial_noise

_PLAIN, _STRICT = Plain(), Strict()


class _Fast(Base):
    """Base of the three schedulers. The configuration selects the strategy."""

    _result: type[Any]

    @property
    def _strategy(self) -> Strategy:
        return _STRICT if self.config.strict else _PLAIN

    def _begin(self) -> None:
        """Checks the configuration, after the original's constructor."""
        if not isinstance(self.config.strict, bool):
            raise TypeError(f"strict must be True or False, got {self.config.strict!r}")
        self._strategy.begin(self)

    def use_seeds(self, seeds: Sequence[int] | Tensor | None) -> None:
        """Makes later steps draw each image's noise from its own seed (strict only).

        ``seeds`` has one integer per image; None returns to generators. With seeds, steps ignore
        the ``generator`` that pipelines pass. ``fastddim.step.philox`` defines the noise of
        (seed, row, element); the row of a step is its position in the chosen timesteps.
        """
        self._seeds = self._strategy.checked_seeds(seeds)

    def initial_latents(
        self,
        shape: Sequence[int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Returns x_T of the seeds in use, for a pipeline's ``latents=``."""
        if self._seeds is None:
            raise ValueError("seeds must be in use for their latents: call use_seeds first")
        if not shape or shape[0] != len(self._seeds):
            raise ValueError(
                f"shape must begin with {len(self._seeds)}, a sample for each seed, "
                f"got {tuple(shape)}"
            )
        return initial_noise(self._seeds, shape, device).to(dtype or torch.float32)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Chooses timesteps as the original does; ``strict`` chooses exactly S distinct ones.

        ``strict`` also takes the timesteps themselves, in the order of the steps, in place of
        their number: ``pipe(timesteps=[999, 700, 300])``.
        """
        self._strategy.set_timesteps(self, num_inference_steps, device, timesteps)
        self._follow_timesteps()

    def _behind_tables(self) -> tuple[Any, ...]:
        return self.alphas_cumprod, self._end(), self.timesteps

    def _tables_for(self, kind: Kind, device: torch.device, dtype: torch.dtype) -> Tables | None:
        return self._strategy.tables(self, kind, device, dtype)

    def _output(self, found: tuple[Tensor, Tensor], return_dict: bool) -> Any:
        if not return_dict:
            return found
        x_s, x0 = found
        return output_of(self._result, prev_sample=x_s, pred_original_sample=x0)


class _FastForwards(_Fast):
    """Constructor and step of the two schedulers that go from noise to data."""

    _result: type[Any] = DDIMSchedulerOutput

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        bounds = getattr(cls, "_threshold_sample", None)
        cls._as_parent = cls._get_variance.__module__ == __name__ and (
            bounds is None or bounds.__module__.startswith("diffusers.")
        )

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading",
        rescale_betas_zero_snr: bool = False,
        strict: bool = False,
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
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            clip_sample_range=clip_sample_range,
            sample_max_value=sample_max_value,
            timestep_spacing=timestep_spacing,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )
        self._begin()

    def add_noise(
        self, original_samples: Tensor, noise: Tensor, timesteps: torch.IntTensor
    ) -> Tensor:
        """Calls the original, which moves ``alphas_cumprod`` to the samples' device for good."""
        source = self._abar()
        found = self._parent.add_noise(self, original_samples, noise, timesteps)
        self._note_moved(source)
        return cast(Tensor, found)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: torch.IntTensor) -> Tensor:
        """Calls the original, which moves ``alphas_cumprod`` to the samples' device for good."""
        source = self._abar()
        found = self._parent.get_velocity(self, sample, noise, timesteps)
        self._note_moved(source)
        return cast(Tensor, found)

    def previous_timestep(self, timestep: int | Tensor) -> int:
        """Returns the timestep that the step from ``timestep`` goes to, below 0 after the last.

        The original has no such method. Its step goes to t − T // S, whatever the next timestep
        is, and the plain scheduler's step does the same. A strict step goes to the next of the
        chosen timesteps, and to −1 after the last. ``_get_variance(t, previous_timestep(t))`` is
        σ² of that step at η = 1.
        """
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps first: no timesteps are chosen")
        return self._strategy.previous_timestep(self, timestep)

    def _get_variance(self, timestep: int | Tensor, prev_timestep: Any) -> Tensor:
        """Returns σ² at η = 1 as the original does; with ``strict``, σ² of the strict step.

        Strict accepts only the ``prev_timestep`` that its step goes to. With t − T // S, code would
        compute another mean and another variance than those of the samples.
        """
        return self._strategy.variance(self, timestep, prev_timestep)

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
        """Returns (prev_sample, pred_original_sample), as the original's ``step`` does.

        ``timestep`` may also hold a timestep for each sample, integers of shape (batch,): each
        sample then takes its own step. The original fails there.
        """
        found = self._strategy.step(
            self,
            model_output,
            timestep,
            sample,
            eta,
            use_clipped_model_output,
            generator,
            variance_noise,
        )
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
        return self._output(found, return_dict)


class FastDDIMScheduler(_FastForwards, DDIMScheduler):
    """``diffusers.DDIMScheduler`` with a step that is one pass over memory.

    The class takes the original's configuration and arguments, and has its attributes. In float32,
    bfloat16 and float16 its results equal the original's, bit for bit on a CPU, and it draws the
    same normals from the generators. In half precision the step rounds after each operation, as
    eager PyTorch does. The original's own step runs for float64, for samples and outputs of
    different dtypes or shapes, and under autograd.

    Args:
        strict: whether the steps follow the papers; kept in the saved configuration. Each strict
            step goes to the next of the chosen timesteps. There are exactly S of them for every
            spacing, and the last step goes to ``final_alpha_cumprod``. An η that would give NaN is
            refused, and a terminal SNR of zero gives finite results. Coefficients are computed in
            float64, and half precision samples keep a float32 state from step to step. Noise may
            come from one seed per image (``use_seeds``).

    All other arguments are the original's.
    """

    _parent = DDIMScheduler


class FastDDIMParallelScheduler(_FastForwards, DDIMParallelScheduler):
    """``FastDDIMScheduler`` in place of ``diffusers.DDIMParallelScheduler``."""

    _parent = DDIMParallelScheduler
    _result = DDIMParallelSchedulerOutput

    def _get_variance(
        self, timestep: int | Tensor, prev_timestep: int | Tensor | None = None
    ) -> Tensor:
        """Returns σ² as ``FastDDIMScheduler`` does, by default of the step from ``timestep``."""
        return super()._get_variance(timestep, prev_timestep)

    def _batch_get_variance(self, t: Tensor, prev_t: Tensor) -> Tensor:
        """Returns ``_get_variance`` of each pair."""
        return self._strategy.variances(self, t, prev_t)

    def batch_step_no_noise(
        self,
        model_output: Tensor,
        timesteps: Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
    ) -> Tensor:
        """Returns x_s of each sample from its own timestep, as the original does (η = 0).

        The original ignores ``set_alpha_to_one`` here and ends at ᾱ = 1; ``strict`` obeys it.
        """
        x_s = self._strategy.batch_step(
            self, model_output, timesteps, sample, eta, use_clipped_model_output
        )
        if x_s is None:
            x_s = self._parent.batch_step_no_noise(
                self, model_output, timesteps, sample, eta, use_clipped_model_output
            )
        return cast(Tensor, x_s)


class FastDDIMInverseScheduler(_Fast, DDIMInverseScheduler):
    """``FastDDIMScheduler`` in place of ``diffusers.DDIMInverseScheduler``: from data to noise.

    With ``strict``, each step starts at the timestep where the step before it ended, and the first
    starts at data. The steps therefore mirror those of ``FastDDIMScheduler(strict=True)``, and
    ``linspace`` works too.
    """

    _parent = DDIMInverseScheduler
    _result = DDIMInverseSchedulerOutput
    _upwards = True
    _ends = "initial_alpha_cumprod"

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear",
        trained_betas: Any = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        clip_sample_range: float = 1.0,
        timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading",
        rescale_betas_zero_snr: bool = False,
        strict: bool = False,
        **kwargs: Any,
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
            timestep_spacing=timestep_spacing,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
            **kwargs,
        )
        self._begin()

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> Any:
        """Returns (prev_sample, pred_original_sample), as the original's ``step`` does."""
        found = self._strategy.step(self, model_output, timestep, sample, 0.0, False, None, None)
        if found is None:
            return self._parent.step(self, model_output, timestep, sample, return_dict)
        return self._output(found, return_dict)
