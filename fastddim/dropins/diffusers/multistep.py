"""diffusers' ``DPMSolverMultistepScheduler``: its constructor and methods, on the fused step."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_singlestep import DPMSolverSinglestepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fastddim.check import shown
from fastddim.dropins._compiled import MATHS, Kind, Maths, compiled_tables, places_of
from fastddim.dropins._scheduler import NAMES, like
from fastddim.dropins._tables import Made, Tables, with_nan
from fastddim.dropins.diffusers.base import Base, Generators, has_grad, output_of
from fastddim.dropins.diffusers.multistep_table import make_rows
from fastddim.step.arguments import OUTPUTS, transformed

ETA = {"dpmsolver++": 0.0, "sde-dpmsolver++": 1.0}
"""η of each algorithm: its first order is DDIM with this η."""

_OF_THE_STEP = (
    "convert_model_output",
    "dpm_solver_first_order_update",
    "multistep_dpm_solver_second_order_update",
    "_sigma_to_alpha_sigma_t",
    "_threshold_sample",
)
"""The methods that make up the original's step. Where a subclass has its own, that step runs."""


class FastDPMSolverMultistepScheduler(Base, DPMSolverMultistepScheduler):
    """``diffusers.DPMSolverMultistepScheduler`` with a step that is one pass over memory.

    The class takes the original's configuration and arguments, and has its attributes. A step takes
    its levels from ``sigmas``, and has factors of float64, rounded once. In float32 its error
    against the original's step in float64 is no larger than the original's, and the generators end
    in the same states. Half precision samples and outputs are computed in float32, and each state
    is rounded as the original's.

        algorithm_type "dpmsolver++":     DPM-Solver++(2M), which is DDIM in its first order
        algorithm_type "sde-dpmsolver++": its SDE form, which is DDIM with η = 1 in its first order

    ``model_outputs`` holds the x0 of the last two steps, float32. The original's own step runs for
    float64, for samples and outputs of different shapes, and under autograd.

    Raises:
        ValueError: the configuration has ``solver_order=3``, the algorithms ``dpmsolver`` or
            ``sde-dpmsolver``, flow matching, or a learned variance; or it is that of another class,
            ``DPMSolverSinglestepScheduler``, which ``from_config`` refuses.
    """

    _parent = DPMSolverMultistepScheduler
    model_outputs: list[Tensor | None]
    lower_order_nums: int
    _step_index: int | None
    sigmas: Tensor

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
        solver_order: int = 2,
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: Literal["dpmsolver++", "sde-dpmsolver++"] = "dpmsolver++",
        solver_type: Literal["midpoint", "heun"] = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        final_sigmas_type: Literal["zero", "sigma_min"] = "zero",
        lambda_min_clipped: float = -float("inf"),
        variance_type: Literal["learned", "learned_range"] | None = None,
        timestep_spacing: Literal["linspace", "leading", "trailing"] = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: Literal["exponential"] = "exponential",
    ) -> None:
        # diffusers turns "deis" into "dpmsolver++", so that pipelines with DEIS can be converted.
        _check_one_of("algorithm_type", algorithm_type, (*ETA, "deis"), (*ETA,))
        _check_one_of("solver_order", solver_order, (1, 2))
        _check_one_of("prediction_type", prediction_type, (*NAMES,))
        _check_one_of("variance_type", variance_type, (None,))
        _check_one_of("use_flow_sigmas", use_flow_sigmas, (False,))
        _check_one_of("use_dynamic_shifting", use_dynamic_shifting, (False,))
        self._parent.__init__(
            self,
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            solver_order=solver_order,
            prediction_type=prediction_type,
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            sample_max_value=sample_max_value,
            algorithm_type=algorithm_type,
            solver_type=solver_type,
            lower_order_final=lower_order_final,
            euler_at_final=euler_at_final,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            use_lu_lambdas=use_lu_lambdas,
            use_flow_sigmas=use_flow_sigmas,
            flow_shift=flow_shift,
            final_sigmas_type=final_sigmas_type,
            lambda_min_clipped=lambda_min_clipped,
            variance_type=variance_type,
            timestep_spacing=timestep_spacing,
            steps_offset=steps_offset,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
            use_dynamic_shifting=use_dynamic_shifting,
            time_shift_type=time_shift_type,
        )

    @classmethod
    def from_config(
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Makes a scheduler from the configuration of any compatible one, as the original does."""
        if isinstance(config, dict) and _is_singlestep(config):
            raise ValueError(
                "config must be that of DPMSolverMultistepScheduler or a compatible class, got "
                "DPMSolverSinglestepScheduler's, whose steps of order 2 span two timesteps"
            )
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        mu: float | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Chooses timesteps and ``sigmas`` as the original does, and restarts at order 1."""
        self._parent.set_timesteps(self, num_inference_steps, device, mu, timesteps)
        self._stateless = False
        self._follow_timesteps()

    def _init_step_index(self, timestep: Any) -> None:
        """Finds the first step's place as the original does, without waiting for the device."""
        if self._stateless:  # The index where the loop began is that of another step.
            self._step_index = self._chosen().levels.index(int(timestep))
            return
        if self._begin_index is None:
            chosen = self._chosen()
            # The place of an element of ``timesteps`` itself is known even where its value repeats.
            self._step_index = chosen.position(timestep)
            if self._step_index is not None:
                return
            if isinstance(t := self._row(timestep), int):
                at = torch.tensor(chosen.levels, device="cpu")
                self._step_index = self.index_for_timestep(t, at)
                return
        self._parent._init_step_index(self, timestep)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Returns (prev_sample,), as the original's ``step`` does."""
        fits = self._fits(model_output, sample, variance_noise)
        if torch.compiler.is_compiling():
            fits = fits and generator is None and self._compiled_table(sample) is not None
        if not fits:
            return self._parent.step(
                self, model_output, timestep, sample, generator, variance_noise, return_dict
            )
        if torch.compiler.is_compiling():
            return self._traced(timestep, model_output, sample, variance_noise, return_dict)
        if self._step_index is None:
            self._init_step_index(timestep)
        i, S = self._step_index, len(self.sigmas) - 1
        assert i is not None
        if not 0 <= i < S:
            raise IndexError(
                f"step_index must lie in [0, {S - 1}], got {i}: call set_timesteps before each loop"
            )
        x = sample.float()
        eta, order = self._eta_and_order()
        table = self._rows_on(x.device, eta, order)
        noise = None
        if eta:
            noise = variance_noise
            noise = self._drawn(x, generator) if noise is None else noise.to(torch.float32)
        # The first S rows are of order 1 and use no element of the history: any tensor will do.
        history, row = x, i
        if order == 2:
            latest = self.model_outputs[-1]
            if latest is not None and not self._is_first_order(i):
                history, row = latest.to(torch.float32), S + i
            self.model_outputs[0] = latest  # the x0 before it is free for this step's results
            del latest
        x_s, x0, half = self._taken(table, x, model_output, row, noise, history, sample)
        self.model_outputs[-1] = x0
        self.lower_order_nums = min(self.lower_order_nums + 1, order)
        self._step_index = i + 1
        if i == S - 1:
            self._own.clear()
        found = x_s if half is None else half
        return output_of(SchedulerOutput, prev_sample=found) if return_dict else (found,)

    def _traced(
        self,
        timestep: Any,
        output: Tensor,
        sample: Tensor,
        noise: Tensor | None,
        return_dict: bool,
    ) -> Any:
        """Takes the step as torch.compile traces it, with a place that is that of the timestep."""
        table = self._compiled_table(sample)
        assert table is not None
        x = sample.float()
        eta, order = self._eta_and_order()
        place, steps = places_of(timestep, self.timesteps, table, order)
        if eta:
            noise = self._drawn(x, None) if noise is None else noise.to(torch.float32)
        history, rows = x, place
        if order == 2:
            latest = self.model_outputs[-1]
            if latest is not None and self.lower_order_nums >= 1:
                history = latest.to(torch.float32)
                seconds = steps - 1 if self._ends_first() else steps
                rows = torch.where(place < seconds, place + steps, place)
            self.model_outputs[0] = latest
        x_s, x0, _ = self._taken(table, x, output.float(), rows, noise if eta else None, history, x)
        self.model_outputs[-1] = x0
        self.lower_order_nums = min(self.lower_order_nums + 1, order)
        self._stateless, self._step_index = True, None
        if self.config.prediction_type == "sample":
            x_s = x_s.to(output.dtype)
        else:
            x_s = x_s.to(torch.promote_types(sample.dtype, output.dtype))
        return output_of(SchedulerOutput, prev_sample=x_s) if return_dict else (x_s,)

    def _compiled_table(self, sample: Tensor) -> Tensor | None:
        tables = compiled_tables(self, self._eta_and_order()[0], sample)
        return None if tables is None else tables.table

    def _behind_tables(self) -> tuple[Any, ...]:
        return self.sigmas, self.timesteps

    def _tables_for(self, kind: Kind, device: torch.device, dtype: torch.dtype) -> Tables | None:
        levels = self._chosen().levels
        if len({*levels}) < len(levels) or len(self.sigmas) != len(levels) + 1:
            return None
        eta, order = self._eta_and_order()
        return Tables(with_nan(self._rows_on(device, eta, order)), None, None)

    def _taken(
        self,
        table: Tensor,
        x: Tensor,
        output: Tensor,
        row: Any,
        noise: Tensor | None,
        history: Tensor,
        sample: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns (x_s, x0), and x_s in the dtype of the original's result if that is a half."""
        config, own = self.config, MATHS if torch.compiler.is_compiling() else self._own
        prediction = NAMES[config.prediction_type]
        # The original's result has the dtype of its x0, which a "sample" model returns itself.
        kept = output.dtype
        if prediction != "sample":
            kept = torch.promote_types(sample.dtype, output.dtype)
        half = None if kept == torch.float32 else torch.empty_like(sample, dtype=kept)
        threshold = None
        if config.thresholding:
            between = own if isinstance(own, Maths) else own.between
            _, x0 = between.stepped(
                table, x, output, row, prediction=prediction, history=history, checked=True
            )
            assert x0 is not None
            threshold = self._quantile(x0)
            del x0  # The step below can then reuse this memory.
        x_s, x0 = own.stepped(
            table,
            x,
            output,
            row,
            prediction=prediction,
            noise=noise,
            threshold=threshold,
            next_input=half,
            history=history,
            checked=True,
        )
        assert x0 is not None
        return x_s, x0, half

    def _is_first_order(self, i: int) -> bool:
        """Tells whether the original takes step i with order 1."""
        return self.lower_order_nums < 1 or (i == len(self.timesteps) - 1 and self._ends_first())

    def _ends_first(self) -> bool:
        """Tells whether the original takes the last step with order 1."""
        config = self.config
        return bool(
            config.euler_at_final
            or (config.lower_order_final and len(self.timesteps) < 15)
            or config.final_sigmas_type == "zero"
        )

    def _eta_and_order(self) -> tuple[float, int]:
        config = self.config
        return ETA[config.algorithm_type], config.solver_order

    def _rows_on(self, device: torch.device, eta: float, order: int) -> Tensor:
        """Returns the table of all steps along ``sigmas``, made again only if they have changed."""
        sigmas, heun = self.sigmas, self.config.solver_type == "heun"
        given = "multistep", device, sigmas, None, (eta, order, heun)
        found = self._cache.found(*given)
        if found is None:
            rows = make_rows(sigmas.detach().cpu().double().numpy(), order, eta, heun)
            found = self._cache.keep(*given, Made(torch.from_numpy(rows)))
        return found.table

    def _fits(self, output: Any, sample: Any, noise: Any) -> bool:
        """Tells whether the fused step can take these tensors in place of the original's step."""
        return (
            self.num_inference_steps is not None
            and isinstance(sample, Tensor)
            and isinstance(output, Tensor)
            and sample.dtype in OUTPUTS
            and output.dtype in OUTPUTS
            and sample.dim() > 1
            and self._as_parent
            and (torch.compiler.is_compiling() or not transformed())
            and not (has_grad(sample) or has_grad(self.sigmas))
            and all(_lies_as(sample, t) for t in (output, noise, *self.model_outputs))
        )


def _lies_as(sample: Tensor, other: Any) -> bool:
    """Tells whether the step can take ``other`` beside ``sample``; None stands for no tensor."""
    return other is None or (
        like(other, sample, getattr(other, "dtype", None)) and not has_grad(other)
    )


def _is_singlestep(config: Mapping[str, Any]) -> bool:
    """Tells whether this is a whole configuration of ``DPMSolverSinglestepScheduler``."""
    name = config.get("_class_name")
    if isinstance(name, str):
        return bool(name == DPMSolverSinglestepScheduler.__name__)
    options = [
        set(inspect.signature(cls.__init__).parameters) - {"self"}
        for cls in (DPMSolverSinglestepScheduler, DPMSolverMultistepScheduler)
    ]
    return options[0] <= config.keys() and not (options[1] - options[0]) & config.keys()


def _check_one_of(
    name: str, value: Any, accepted: tuple[Any, ...], named: tuple[Any, ...] | None = None
) -> None:
    if value not in accepted:
        allowed = " or ".join(map(repr, named or accepted))
        raise ValueError(
            f"{name} must be {allowed} for FastDPMSolverMultistepScheduler, got {shown(value)}"
        )
