"""diffusers' ``DDPMScheduler``: its constructor and methods, on the fused step."""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler, DDPMSchedulerOutput
from torch import Tensor

from fastddim.dropins._compiled import MATHS, Kind, compiled_tables, rows_of
from fastddim.dropins._scheduler import NAMES, levels_fit, like
from fastddim.dropins._shared import as_eager, pack_rows
from fastddim.dropins._tables import CPU, Chosen, Made, Tables, with_nan
from fastddim.dropins._transfer import sent
from fastddim.dropins.diffusers.base import Base, Generators, output_of, rounds_alike
from fastddim.step.arguments import transformed

_OF_THE_STEP = ("_get_variance", "_threshold_sample", "previous_timestep")
"""The methods that make up the original's step. Where a subclass has its own, that step runs."""
_LEARNED = ("learned", "learned_range")


class FastDDPMScheduler(Base, DDPMScheduler):
    """``diffusers.DDPMScheduler`` with a step that is one pass over memory.

    The class takes the original's configuration and arguments, and has its attributes. A step is

        x_s = p·x0 + q·x_t + c1·z,   p = √ᾱ_s·β/(1−ᾱ_t),   q = √(1−β)·(1−ᾱ_s)/(1−ᾱ_t)

    with β = 1 − ᾱ_t/ᾱ_s, and c1 as ``variance_type`` says (Ho et al. 2020, eq. 7). The original's
    own float32 operations make the factors, once for each ``set_timesteps``. In float32,
    bfloat16 and float16 the results equal the original's, bit for bit on a CPU, and the generators
    end in the same states.

    The original's own step runs where a ``variance_type`` is learned, because the fused step has
    one c1 for all elements of a sample; for float64; for samples and outputs of different dtypes or
    shapes; and under autograd.

    Example::

        scheduler = FastDDPMScheduler(beta_schedule="squaredcos_cap_v2")
        scheduler.set_timesteps(100)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t), t, x, generator=generator).prev_sample
    """

    _parent = DDPMScheduler
    _ends = "one"
    custom_timesteps: bool
    variance_type: str

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        made = [getattr(cls, name) for name in _OF_THE_STEP]
        cls._as_parent = all(
            getattr(method, "__module__", "").startswith("diffusers.") for method in made
        )

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        variance_type: Literal[
            "fixed_small",
            "fixed_small_log",
            "fixed_large",
            "fixed_large_log",
            "learned",
            "learned_range",
        ] = "fixed_small",
        clip_sample: bool = True,
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: Literal["linspace", "leading", "trailing"] = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._parent.__init__(
            self,
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            variance_type=variance_type,
            clip_sample=clip_sample,
            prediction_type=prediction_type,
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            clip_sample_range=clip_sample_range,
            sample_max_value=sample_max_value,
            timestep_spacing=timestep_spacing,
            steps_offset=steps_offset,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Chooses timesteps as the original does."""
        self._parent.set_timesteps(self, num_inference_steps, device, timesteps)
        self._follow_timesteps()

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        """Returns (prev_sample, pred_original_sample), as the original's ``step`` does.

        Elements of ``timesteps`` and numbers cause no host sync. Any other tensor on a GPU causes
        one, because the host decides by its value whether to draw noise.
        """
        found = self._taken(model_output, timestep, sample, generator)
        if found is None:
            return self._parent.step(self, model_output, timestep, sample, generator, return_dict)
        if not return_dict:
            return found
        x_s, x0 = found
        return output_of(DDPMSchedulerOutput, prev_sample=x_s, pred_original_sample=x0)

    def _taken(
        self, output: Tensor, timestep: Any, sample: Tensor, generator: Generators
    ) -> tuple[Tensor, Tensor] | None:
        """Returns (x_s, x0), or None if the original's own step must run."""
        if torch.compiler.is_compiling():
            return self._traced(output, timestep, sample, generator)
        if transformed():
            return None
        chosen = self._chosen() if self.custom_timesteps or self.num_inference_steps else None
        t = self._row(timestep)
        if t is None or not self._fits(output, sample):
            return None
        t = int(t)
        row = self._place(chosen, t)
        if row is None:
            return None
        tables = self._tables_of(chosen, sample.device, sample.dtype)
        if tables is None:
            return None
        own = self._own
        z = self._drawn(output, generator) if t > 0 else None
        x_s, x0 = self._stepped(own, tables, sample, output, row, noise=z, posterior=True)
        if chosen is not None and t == chosen.levels[-1]:
            own.clear()
        assert x0 is not None
        return x_s, x0

    def _traced(
        self, output: Tensor, timestep: Any, sample: Tensor, generator: Generators
    ) -> tuple[Tensor, Tensor] | None:
        """Takes the step as torch.compile traces it, with noise of factor 0 in the last step."""
        rows = rows_of(timestep, sample.device)
        if rows is None or generator is not None or not self._fits(output, sample):
            return None
        tables = compiled_tables(self, 0.0, sample)
        if tables is None:
            return None
        x_s, x0 = self._stepped(
            MATHS,
            tables,
            sample,
            output,
            tables.rows_at(rows),
            noise=self._drawn(output, None),
            posterior=True,
        )
        assert x0 is not None
        return x_s, x0

    def _behind_tables(self) -> tuple[Any, ...]:
        return self.alphas_cumprod, self.one, self.timesteps

    def _tables_for(self, kind: Kind, device: torch.device, dtype: torch.dtype) -> Tables | None:
        chosen = self._chosen() if self.custom_timesteps or self.num_inference_steps else None
        tables = self._tables_of(chosen, device, dtype)
        if tables is None:
            return None
        T = len(self.alphas_cumprod)
        row_of = torch.full((T + 1,), len(tables.table), dtype=torch.int32, device=CPU)
        for t in range(T) if chosen is None else chosen.levels:
            place = self._place(chosen, t)
            if place is not None and t >= 0:
                row_of[t] = place
        return Tables(with_nan(tables.table), row_of.to(device), None)

    def _tables_of(
        self, chosen: Chosen | None, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Tables | None:
        """Returns the tables on ``device``, or None if the original's factors are not float32."""
        kinds = self.variance_type, self.config.variance_type
        given = ("ddpm", dtype), device, self.alphas_cumprod, self.one, (chosen, kinds)
        tables = self._cache.found(*given)
        if tables is None:
            made = self._made(chosen)
            if made is not None:
                tables = self._cache.keep(*given, Made(as_eager(made.table, device, dtype)))
        return tables

    def _place(self, chosen: Chosen | None, t: int) -> int | None:
        """Returns the row of timestep t, or None if the original refuses t."""
        if chosen is None:
            T = len(self.alphas_cumprod)
            return t + T if -T <= t < T else None
        row = chosen.place.get(t)
        if row is None and t in chosen.levels:  # The original takes the first of equal timesteps.
            row = chosen.levels.index(t)
        return row

    def _made(self, chosen: Chosen | None) -> Made | None:
        """Returns the rows of all timesteps, or None if the original's factors are not float32.

        Without chosen timesteps, a step goes from t to t − 1. A negative t counts from the end, as
        an index does in the original. The operations run where the original's would.
        """
        abar, T = self.alphas_cumprod, len(self.alphas_cumprod)
        if not levels_fit(self):
            return None
        if chosen is None:
            levels = list(range(-T, T))
            ends = [t - 1 for t in levels]
        else:
            levels = chosen.levels
            ends = [*levels[1:], -1]
            if self.timesteps.is_floating_point() or not -T <= min(levels) <= max(levels) < T:
                return None
        t, s = (sent(torch.tensor(of, device=CPU), abar.device) for of in (levels, ends))
        at = abar[t]
        at_prev = torch.where(s >= 0, abar[s.clamp(min=0)], sent(self.one, abar.device))
        beta_t, beta_prev = 1 - at, 1 - at_prev
        alpha = at / at_prev
        beta = 1 - alpha
        from_x0 = (at_prev**0.5 * beta) / beta_t
        from_x = alpha**0.5 * beta_prev / beta_t
        variance = torch.clamp(beta_prev / beta_t * beta, min=1e-20)
        kind = self.config.variance_type
        if kind == "fixed_small_log":
            variance = torch.exp(0.5 * torch.log(variance))
        elif kind == "fixed_large":
            variance = beta
        elif kind == "fixed_large_log":
            variance = torch.log(beta)
        sigma = variance if self.variance_type == "fixed_small_log" else variance**0.5
        sigma = torch.where(t > 0, sigma, torch.zeros_like(sigma))
        return Made(pack_rows(at**0.5, beta_t**0.5, from_x0, sigma, from_x))

    def _fits(self, output: Any, sample: Any) -> bool:
        """Tells whether the fused step equals the original's step for these tensors."""
        config = self.config
        return (
            isinstance(sample, Tensor)
            and like(output, sample)
            # The original's thresholding needs a third dimension.
            and sample.dim() > (2 if config.thresholding else 1)
            and config.prediction_type in NAMES
            and (not config.clip_sample or config.clip_sample_range > 0)
            and rounds_alike(sample, config)
            and self.variance_type not in _LEARNED
            and config.variance_type not in _LEARNED
            and self._as_parent
            and not (
                torch.is_grad_enabled()
                and (
                    sample.requires_grad
                    or output.requires_grad
                    or self.alphas_cumprod.requires_grad
                    or self.one.requires_grad
                )
            )
        )
