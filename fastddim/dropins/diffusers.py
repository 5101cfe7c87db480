"""diffusers' DDIM schedulers: the same configuration, the same calls, one pass a step.

    pipe.scheduler = FastDDIMScheduler.from_config(pipe.scheduler.config)

``DDIMPipeline`` makes a plain scheduler of whatever its constructor is given: assign afterwards.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch

try:
    from diffusers.configuration_utils import register_to_config
except ModuleNotFoundError as error:
    from fastddim.extras import explained

    raise explained(error) from None
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

# A saved pipeline is loaded through this module, which must then know the classes' own base.
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastddim.buffers import Spare, fitting
from fastddim.check import kind, whole
from fastddim.coefficients import PREDICTIONS, make_table
from fastddim.ops import OUTPUTS, STEP, ddim_step, initial_noise
from fastddim.run import checked_seeds
from fastddim.schedule import NoiseSchedule
from fastddim.timesteps import Pair, make_pairs
from fastddim.transfer import sent, sent_pinned

NAMES = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
_CPU = torch.device("cpu")
NEARLY_ZERO = 2.0**-24
"""ᾱ_T of an ε model on a schedule that ends at 0, where ε alone says nothing of x0: what
diffusers' own Euler and DDPM schedulers put there."""


class Tables(NamedTuple):
    """The coefficients of every step a scheduler may be asked for, on the samples' device."""

    table: Tensor
    rows: Tensor
    """Of each row its number, int32, so that a step takes its own without a copy to the device."""
    row_of: Tensor | None
    """Strict: the row of each timestep, and of one more. The last row, which is of NaN, is that of
    the timesteps that are not chosen."""

    def rows_at(self, t: Tensor) -> Tensor:
        """Strict: the row of each of these timesteps, which are on the device.

        Nothing is asked of the device. What is no timestep at all gets the row of NaN as well:
        −1 counts from the end, and an index beyond it would end the process's use of the GPU.
        """
        assert self.row_of is not None
        return self.row_of[t.long().clamp(-1, len(self.row_of) - 1)]


class _Fast:
    """What the three schedulers share. ``strict`` is in their configuration."""

    _parent: type[Any]
    _upwards = False
    _seeds: Tensor | None = None
    _chosen: tuple[Tensor, int, list[int]] | None = None
    """``timesteps`` as they were read last, their version then, and the numbers in them."""
    _tables: dict[Any, tuple[Any, Tables]] | None = None
    _spare: tuple[Spare, Spare] | None = None
    """Of (x_s, x0), those returned that a later step may write if the caller has let go of them."""
    _noise: Tensor | None = None
    """Memory for the next normals."""
    _shadow: tuple[Tensor, int, Tensor] | None = None
    """The latest half precision sample returned, its version then, and the float32 state."""

    def use_seeds(self: Any, seeds: Sequence[int] | Tensor | None) -> None:
        """From now on an image's noise comes from its own seed (strict only); None ends it.

        Steps then ignore ``generator``, which pipelines pass on. Where the noise of a step comes
        from is described in ``fastddim.noise``; rows are counted along the chosen timesteps.
        """
        if seeds is not None and not self.config.strict:
            raise ValueError("seeds need strict=True: the original draws from a generator")
        self._seeds = None if seeds is None else checked_seeds(seeds, len(seeds))

    def initial_latents(
        self: Any,
        shape: Sequence[int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """x_T of the seeds in use, for a pipeline's ``latents=``."""
        if self._seeds is None:
            raise ValueError("seeds must be in use for their latents: call use_seeds first")
        if not shape or shape[0] != len(self._seeds):
            raise ValueError(
                f"shape must begin with {len(self._seeds)}, a sample for each seed, "
                f"got {tuple(shape)}"
            )
        return initial_noise(self._seeds, shape, device).to(dtype or torch.float32)

    def set_timesteps(
        self: Any, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """As the original; with ``strict``, exactly S distinct steps for every S and spacing."""
        if self.config.strict:
            steps = whole("num_inference_steps", num_inference_steps, 1, len(self.alphas_cumprod))
            self.num_inference_steps = steps
            levels = _strict_timesteps(self.config, steps, len(self.alphas_cumprod))
            ordered = levels if self._upwards else levels[::-1]
            self.timesteps = torch.tensor(ordered, device=_CPU if device is None else device)
        else:
            self._parent.set_timesteps(self, num_inference_steps, device)
        self._levels()
        self._shadow = self._spare = self._noise = None

    def __getstate__(self: Any) -> dict[str, Any]:
        """Copies and pickles of a scheduler make their own tables and buffers."""
        own = ("_tables", "_spare", "_noise", "_shadow")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def _stepped(
        self: Any,
        x: Tensor,
        output: Tensor,
        tables: Tables,
        rows: Tensor,
        seeds: Tensor | None = None,
        noise: Tensor | None = None,
        rederive: bool = False,
        next_input: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(x_s, x0), in memory that an earlier step returned where nobody holds that any more.

        The arguments have been looked at: this is ``ddim_step`` without its own looking.
        """
        clip, threshold = self._bounds(x, output, tables, rows)
        states, x0s = self._spare = self._spare or (Spare(), Spare())
        x_s, x0 = (
            torch.empty_like(x) if spare is None else spare
            for spare in (fitting(states.take(), x), fitting(x0s.take(), x))
        )
        STEP(
            x,
            output,
            tables.table,
            rows,
            seeds,
            noise,
            None,
            threshold,
            PREDICTIONS.index(NAMES[self.config.prediction_type]),
            False,
            clip,
            rederive,
            x_s,
            x0,
            next_input,
        )
        states.keep(x_s)
        x0s.keep(x0)
        return x_s, x0

    def _drawn(self: Any, like: Tensor, generator: Any) -> Tensor:
        """float32 normals as the original draws them, on a CPU into the same memory each time."""
        if like.device != _CPU and _are_the_cpus(generator):
            drawn = randn_tensor(like.shape, generator=generator, device=_CPU, dtype=torch.float32)
            return sent_pinned(drawn, like.device)
        for_cpu = generator is None or getattr(generator, "device", None) == _CPU
        if not for_cpu or like.device != _CPU or not like.is_contiguous():
            return cast(
                Tensor,
                randn_tensor(
                    like.shape, generator=generator, device=like.device, dtype=torch.float32
                ),
            )
        z = fitting(self._noise, like)
        z = self._noise = torch.empty_like(like) if z is None else z
        return z.normal_(generator=generator)

    def _levels(self: Any) -> list[int]:
        """The chosen timesteps as numbers, read again only where somebody has put in others."""
        levels, chosen = self.timesteps, self._chosen
        if chosen is None or chosen[0] is not levels or chosen[1] != _version(levels):
            chosen = self._chosen = levels, _version(levels), levels.tolist()
        return cast("list[int]", chosen[2])

    def _forget_after(self: Any, row: int | Tensor | None) -> None:
        """Keeps nothing beyond the last of the chosen timesteps."""
        if self._chosen is not None and isinstance(row, int) and [row] == self._chosen[2][-1:]:
            self._shadow = self._spare = self._noise = None

    def _row(self: Any, timestep: Any) -> int | Tensor | None:
        """The timestep as a number where the host knows it, else as a tensor on its device.

        A timestep taken from ``self.timesteps``, as every pipeline does, is known by its place
        there: nothing is asked of the device.
        """
        if isinstance(timestep, Tensor):
            if timestep.dim() or timestep.is_floating_point() or timestep.dtype == torch.bool:
                return None
            if timestep.device.type == "cpu":
                return int(timestep)
            if self._chosen is not None:
                chosen, version, levels = self._chosen
                same = timestep.untyped_storage().data_ptr() == chosen.untyped_storage().data_ptr()
                if same and version == _version(chosen):
                    return cast(int, levels[timestep.storage_offset() - chosen.storage_offset()])
            return timestep
        try:
            return None if isinstance(timestep, bool) else operator.index(timestep)
        except TypeError:
            return None

    def _of(self: Any, key: Any, device: torch.device, make: Any) -> Tables:
        """``make()``'s table, kept until something it was made from is another."""
        final = getattr(self, "final_alpha_cumprod", None)
        made_from = [self.alphas_cumprod, final, self.timesteps if self.config.strict else None]
        state = (
            self.num_inference_steps,
            self.config.num_train_timesteps,
            *((id(a), _version(a)) for a in made_from if a is not None),
        )
        tables = self._tables = self._tables or {}
        held = tables.get((key, device))
        if held is not None and held[0][0] == state:
            return cast(Tables, held[1])
        if len(tables) >= 16:
            tables.clear()
        table, row_of = make()
        rows = torch.arange(len(table), dtype=torch.int32, device=device)
        found = Tables(
            sent(table.to(torch.float32), device),
            rows,
            None if row_of is None else sent(row_of, device),
        )
        # With what it was made from, or another tensor could take an id.
        tables[key, device] = ((state, made_from), found)
        return found

    def _loose_rows(self: Any, row: int | Tensor, tables: Tables, batch: int) -> Tensor:
        shift = len(tables.rows) // 2
        if isinstance(row, Tensor):
            return (row + shift).to(torch.int32).expand(batch)
        return tables.rows.as_strided((batch,), (0,), row + shift)

    def _strict_of(self: Any, eta: float, device: torch.device) -> Tables:
        """Each step to the next of the chosen timesteps, in float64 (``make_table``)."""

        def make() -> tuple[Tensor, Tensor]:
            abar = np.cumprod(1 - self.betas.detach().cpu().double().numpy())
            if self.config.prediction_type == "epsilon" and abar[-1] <= 0:
                abar[-1] = min(NEARLY_ZERO, abar[-2] / 2)
            schedule = NoiseSchedule.from_alphas_cumprod(abar)
            chosen = self._levels()
            pairs: list[Pair]
            if self._upwards:
                pairs = list(zip([-1, *chosen[:-1]], chosen, strict=True))
            else:
                pairs = list(zip(chosen, [*chosen[1:], -1], strict=True))
            final = 1.0 if self.config.set_alpha_to_one else float(abar[0])
            table = torch.from_numpy(make_table(schedule, pairs, eta, final))
            row_of = torch.full((len(abar) + 1,), len(pairs), dtype=torch.int32, device=_CPU)
            numbers = torch.arange(len(pairs), dtype=torch.int32, device=_CPU)
            row_of[torch.tensor(chosen, device=_CPU)] = numbers
            return torch.cat([table, table.new_full((1, table.shape[1]), torch.nan)]), row_of

        return cast(Tables, self._of(("strict", eta), device, make))

    def _bounds(
        self: Any, x: Tensor, output: Tensor, tables: Tables, rows: Tensor
    ) -> tuple[float | None, Tensor | None]:
        """(clip, threshold) of the step, as the configuration has it."""
        config = self.config
        if getattr(config, "thresholding", False):
            _, x0 = ddim_step(
                x, output, tables.table, rows, prediction=NAMES[config.prediction_type]
            )
            assert x0 is not None
            s = torch.quantile(x0.flatten(1).abs(), config.dynamic_thresholding_ratio, dim=1)
            return None, s.clamp(min=1, max=config.sample_max_value)
        return config.clip_sample_range if config.clip_sample else None, None

    def _strict_step(
        self: Any,
        output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float,
        rederive: bool,
        generator: Any,
        noise: Tensor | None,
        seeds: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(x_s, x0) in sample's dtype; the state stays float32 from one step to the next."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step: no timesteps are chosen")
        for name, tensor in (("model_output", output), ("sample", sample)):
            if not isinstance(tensor, Tensor) or tensor.dtype not in OUTPUTS:
                got = tensor.dtype if isinstance(tensor, Tensor) else kind(tensor)
                raise TypeError(f"{name} must be float32, bfloat16 or float16, got {got}")
            if _has_grad(tensor):
                raise ValueError(f"{name} requires grad, which strict does not carry: detach it")
            if tensor.device != sample.device:
                raise ValueError(
                    f"{name} must be on {sample.device} with sample, got {tensor.device}"
                )
        if sample.dim() < 2:
            raise ValueError(f"sample must have shape (batch, ...), got {tuple(sample.shape)}")
        if output.shape != sample.shape:
            raise ValueError(
                f"model_output must have sample's shape, {tuple(sample.shape)}, "
                f"got {tuple(output.shape)}"
            )
        if seeds is not None and len(seeds) != len(sample):
            raise ValueError(
                f"sample must hold one for each of the {len(seeds)} seeds in use, got {len(sample)}"
            )
        if noise is not None and not _like(noise, sample, getattr(noise, "dtype", None)):
            is_one = isinstance(noise, Tensor)
            raise ValueError(
                f"variance_noise must have sample's shape and device, {tuple(sample.shape)} on "
                f"{sample.device}, got "
                + (f"{tuple(noise.shape)} on {noise.device}" if is_one else kind(noise))
            )
        tables = self._strict_of(float(eta), sample.device)
        rows = self._strict_rows(timestep, tables).expand(len(sample))
        x = sample.float()
        if self._shadow is not None and self._shadow[0] is sample:
            _, version, state = self._shadow
            if sample.is_inference() or version != sample._version:
                # What the caller has written into it since is no rounding of the state.
                state = torch.where(state.to(sample.dtype) == sample, state, x)
            x = state
        if eta and noise is None and seeds is None:
            noise = self._drawn(x, generator)
        half = None if sample.dtype == torch.float32 else torch.empty_like(sample)
        if seeds is not None and seeds.device != sample.device:
            seeds = self._seeds = sent(seeds, sample.device)
        x_s, x0 = self._stepped(
            x,
            output,
            tables,
            rows,
            seeds=None if noise is not None else seeds,
            noise=None if noise is None or not eta else noise.float(),
            rederive=rederive,
            next_input=half,
        )
        self._shadow = None if half is None else (half, _version(half), x_s)
        self._forget_after(self._row(timestep))
        return cast("tuple[Tensor, Tensor]", (x_s, x0) if half is None else (half, x0.to(half)))

    def _strict_rows(self: Any, timestep: Any, tables: Tables) -> Tensor:
        t = self._row(timestep)
        if isinstance(t, Tensor):
            # As one of several: an index of no dimensions is read as a number, and reading waits.
            return tables.rows_at(t.view(1))
        levels = self._levels()
        if t not in levels:
            raise ValueError(
                f"timestep must be one of the {len(levels)} chosen by set_timesteps, got {timestep}"
            )
        return tables.rows[levels.index(t)]


class _FastForwards(_Fast):
    """The constructor and the step of the two schedulers that go from noise to data."""

    _result: type[Any] = DDIMSchedulerOutput

    @register_to_config
    def __init__(
        self: Any,
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
        _checked_config(self.config)

    def step(
        self: Any,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """(prev_sample, pred_original_sample), as the original's ``step``; see the class."""
        if self.config.strict:
            if eta > 0 and variance_noise is not None and generator is not None:
                raise ValueError("noise has one source, got generator and variance_noise")
            found = self._strict_step(
                model_output,
                timestep,
                sample,
                eta,
                use_clipped_model_output,
                generator,
                variance_noise,
                self._seeds,
            )
            return self._output(found, return_dict)
        row = self._row(timestep)
        number = isinstance(eta, (int, float))
        z = variance_noise if number and eta > 0 else None
        if (
            row is None
            or not number
            or not _fits(self, model_output, sample, row)
            or (z is not None and (generator is not None or not _like(z, sample) or _has_grad(z)))
        ):
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
        tables = self._loose_of(float(eta), sample.device, self.final_alpha_cumprod)
        rows = self._loose_rows(row, tables, len(sample))
        if eta > 0 and z is None:
            z = self._drawn(model_output, generator)
        found = self._stepped(
            sample, model_output, tables, rows, noise=z, rederive=use_clipped_model_output
        )
        self._forget_after(row)
        return self._output(found, return_dict)

    def _output(self: Any, found: tuple[Tensor, Tensor], return_dict: bool) -> Any:
        if not return_dict:
            return found
        return self._result(prev_sample=found[0], pred_original_sample=found[1])

    def _loose_of(self: Any, eta: float, device: torch.device, final: Tensor) -> Tables:
        """The original's step from each timestep, the negative ones as its indices count them.

        By its own float32 operations, on the device where it would do them.
        """
        steps = self.num_inference_steps
        assert steps is not None

        def make() -> tuple[Tensor, None]:
            abar = self.alphas_cumprod
            t = torch.arange(-len(abar), len(abar), device=abar.device)
            s = t - self.config.num_train_timesteps // steps
            at, last = abar[t], final.to(abar.device)
            at_prev = torch.where(s >= 0, abar[s.clamp(min=0)], last)
            variance = ((1 - at_prev) / (1 - at)) * (1 - at / at_prev)
            sigma = eta * variance**0.5
            direction = (1 - at_prev - sigma**2) ** 0.5
            a, b = at**0.5, (1 - at) ** 0.5
            return torch.stack([a, 1 / a, b, 1 / b, at_prev**0.5, sigma, direction], 1), None

        return cast(Tables, self._of((eta, id(final)), device, make))


class FastDDIMScheduler(_FastForwards, DDIMScheduler):
    """``diffusers.DDIMScheduler`` with the step as one pass over memory.

    The same configuration, attributes and arguments; in float32 the same results, bit for bit on
    a CPU, and the same draws from the generators. Anything but float32 samples of one shape
    without gradients is the original's own step.

    Args:
        strict: the schedule done right, kept in the saved configuration. Each step goes to the
            next of the chosen timesteps, of which there are exactly S for every spacing, the last
            to ``final_alpha_cumprod``; an η too large is refused; a terminal SNR of zero stays
            finite; coefficients are float64's; half precision samples keep a float32 state from
            step to step; noise may come from a seed for each image (``use_seeds``).

    All other arguments are the original's.
    """

    _parent = DDIMScheduler


class FastDDIMParallelScheduler(_FastForwards, DDIMParallelScheduler):
    """``diffusers.DDIMParallelScheduler`` likewise: samples at different timesteps in one pass."""

    _parent = DDIMParallelScheduler
    _result = DDIMParallelSchedulerOutput

    def batch_step_no_noise(
        self: Any,
        model_output: Tensor,
        timesteps: Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
    ) -> Tensor:
        """x_s of each sample from its own timestep, as the original (η = 0).

        The original ends at ᾱ = 1 here whatever ``set_alpha_to_one`` says; ``strict`` does not.
        """
        fits = (
            eta == 0
            and isinstance(timesteps, Tensor)
            and timesteps.shape == sample.shape[:1]
            and not timesteps.is_floating_point()
            and self.num_inference_steps is not None
            and _fits(self, model_output, sample, 0)
        )
        if not fits:
            if self.config.strict:
                raise ValueError(
                    "batch_step_no_noise needs float32 samples of model_output's shape, a timestep "
                    "for each of them and eta = 0"
                )
            return cast(
                Tensor,
                self._parent.batch_step_no_noise(
                    self, model_output, timesteps, sample, eta, use_clipped_model_output
                ),
            )
        if self.config.strict:
            tables = self._strict_of(0.0, sample.device)
            rows = tables.rows_at(sent(timesteps, sample.device))
        else:
            one = self._one = getattr(self, "_one", torch.tensor(1.0, device=_CPU))
            tables = self._loose_of(0.0, sample.device, one)
            rows = sent((timesteps + len(self.alphas_cumprod)).to(torch.int32), sample.device)
        clip, threshold = self._bounds(sample, model_output, tables, rows)
        x_s, _ = ddim_step(
            sample,
            model_output,
            tables.table,
            rows,
            prediction=NAMES[self.config.prediction_type],
            clip=clip,
            threshold=threshold,
            rederive=use_clipped_model_output,
            noise_first=False,
            want_x0=False,
        )
        return x_s


class FastDDIMInverseScheduler(_Fast, DDIMInverseScheduler):
    """``diffusers.DDIMInverseScheduler`` likewise: from data to noise.

    With ``strict`` each step comes from the timestep chosen before it, the first from data, so
    that it is the mirror of ``FastDDIMScheduler(strict=True)``; ``linspace`` works as well.
    """

    _parent = DDIMInverseScheduler
    _upwards = True

    @register_to_config
    def __init__(
        self: Any,
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
        _checked_config(self.config)

    def step(
        self: Any,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> Any:
        """(prev_sample, pred_original_sample), as the original's ``step``; see the class."""
        if self.config.strict:
            found = self._strict_step(model_output, timestep, sample, 0.0, False, None, None, None)
        else:
            row = self._row(timestep)
            if row is None or not _fits(self, model_output, sample, row):
                return self._parent.step(self, model_output, timestep, sample, return_dict)
            tables = self._of("inverse", sample.device, self._loose)
            found = self._stepped(
                sample, model_output, tables, self._loose_rows(row, tables, len(sample))
            )
            self._forget_after(row)
        if not return_dict:
            return found
        return DDIMInverseSchedulerOutput(prev_sample=found[0], pred_original_sample=found[1])

    def _loose(self: Any) -> tuple[Tensor, None]:
        """The original's step to each timestep, by its own float32 operations."""
        abar = self.alphas_cumprod
        steps, T = self.num_inference_steps, self.config.num_train_timesteps
        to = torch.arange(-len(abar), len(abar), device=abar.device)
        at = (to - T // steps).clamp(max=T - 1)
        first = self.initial_alpha_cumprod.to(abar.device)
        abar_t = torch.where(at >= 0, abar[at.clamp(0, len(abar) - 1)], first)
        abar_s = abar[to]
        a, b = abar_t**0.5, (1 - abar_t) ** 0.5
        direction = (1 - abar_s) ** 0.5
        none = torch.zeros_like(a)
        return torch.stack([a, 1 / a, b, 1 / b, abar_s**0.5, none, direction], 1), None


def _fits(scheduler: Any, output: Any, sample: Any, row: int | Tensor) -> bool:
    """Whether the fused step computes what the original's would."""
    config, count = scheduler.config, len(scheduler.alphas_cumprod)
    return (
        scheduler.num_inference_steps is not None
        and isinstance(sample, Tensor)
        and sample.dim() > 1
        and _like(output, sample)
        and sample.dtype == torch.float32
        and scheduler.alphas_cumprod.dtype == torch.float32
        and (isinstance(row, Tensor) or -count <= row < count)
        and config.prediction_type in NAMES
        and (not config.clip_sample or config.clip_sample_range > 0)
        and not (_has_grad(sample) or _has_grad(output))
    )


def _are_the_cpus(generator: Any) -> bool:
    """Whether it is a CPU's generator, or a list of them."""
    each = generator if isinstance(generator, list) else [generator]
    return all(isinstance(g, torch.Generator) and g.device == _CPU for g in each)


def _has_grad(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def _version(tensor: Tensor) -> int:
    """How often it was written in place; tensors of inference mode do not count that."""
    return 0 if tensor.is_inference() else tensor._version


def _like(tensor: Any, sample: Tensor, dtype: torch.dtype | None = None) -> bool:
    return (
        isinstance(tensor, Tensor)
        and tensor.shape == sample.shape
        and tensor.dtype == (dtype or sample.dtype)
        and tensor.device == sample.device
    )


def _checked_config(config: Any) -> None:
    """What ``strict`` refuses of a configuration that the original takes."""
    if not isinstance(config.strict, bool):
        raise TypeError(f"strict must be True or False, got {config.strict!r}")
    if not config.strict:
        return
    if config.prediction_type not in NAMES:
        raise ValueError(
            f"prediction_type must be one of {', '.join(NAMES)}, got {config.prediction_type!r}"
        )
    if config.timestep_spacing not in ("leading", "trailing", "linspace"):
        raise ValueError(
            f"timestep_spacing must be leading, trailing or linspace, "
            f"got {config.timestep_spacing!r}"
        )


def _strict_timesteps(config: Any, steps: int, T: int) -> list[int]:
    """Exactly S distinct timesteps, rising. ``steps_offset`` moves the leading ones as far as it
    can without leaving the schedule."""
    chosen = sorted(t for t, _ in make_pairs(config.timestep_spacing, steps, T))
    if config.timestep_spacing == "leading":
        offset = min(config.steps_offset, T - 1 - chosen[-1])
        chosen = [t + offset for t in chosen]
    return chosen
