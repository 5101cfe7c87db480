"""diffusers' DDIM schedulers: the same configuration, the same calls, one pass a step.

    pipe.scheduler = FastDDIMScheduler.from_config(pipe.scheduler.config)

``DDIMPipeline`` makes a plain scheduler of whatever its constructor is given: assign afterwards.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

from fastddim.buffers import Own, Shadows, fitting
from fastddim.check import kind, whole
from fastddim.coefficients import PREDICTIONS, make_table, pack
from fastddim.dropins._shared import stream_of
from fastddim.ops import (
    OUTPUTS,
    STEP,
    check_untransformed,
    ddim_step,
    initial_noise,
    transformed,
)
from fastddim.options import checked_seeds
from fastddim.schedule import NoiseSchedule
from fastddim.timesteps import Pair, make_pairs
from fastddim.transfer import sent, sent_pinned

NAMES = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
_CPU = torch.device("cpu")
NEARLY_ZERO = 2.0**-24
"""ᾱ_T of an ε model on a schedule that ends at 0, where ε alone says nothing of x0: what
diffusers' own Euler and DDPM schedulers put there."""


_SHADOWS = Shadows()
"""The float32 states of the half precision samples that strict steps have returned."""


class _Source:
    """A small tensor that tables were made from, and whether it still holds the same numbers.

    On a CPU its bytes are compared, as the version counter does not count ``x.data[...] = 0``. On a
    GPU looking would wait for the device: there the version decides.
    """

    __slots__ = ("_address", "_bytes", "_view", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor, _version(tensor)
        self._view: Any = None
        self._bytes, self._address = b"", 0
        try:
            self._view = tensor.detach().numpy()
        except (RuntimeError, TypeError, AttributeError):  # not on a CPU, or no NumPy dtype
            return
        self._bytes, self._address = self._view.tobytes(), tensor.data_ptr()

    def unchanged(self, tensor: Any) -> bool:
        if tensor is not self.tensor:
            return False
        if self._view is None:
            return _version(tensor) == self.version
        same_memory = tensor.data_ptr() == self._address  # what ``x.data = ...`` changes
        return same_memory and bool(self._view.tobytes() == self._bytes)


class Tables(NamedTuple):
    """The coefficients of every step a scheduler may be asked for, on the samples' device."""

    table: Tensor
    rows: Tensor
    """Of each row its number, int32, so that a step takes its own without a copy to the device."""
    row_of: Tensor | None
    """Strict: the row of each timestep, and of one more. The last row, which is of NaN, is that of
    the timesteps that are not chosen, and of those that are chosen more than once."""
    to_eps: Tensor | None
    """Strict, towards noise, where the model returns no ε: rows that turn its output into ε."""

    views: dict[int, Tensor]
    """Views of ``rows`` that steps have taken: making one costs a small step a thirtieth."""

    def row(self, row: int, batch: int) -> Tensor:
        """One row's number for each sample of a batch."""
        found = self.views.get(row)
        if found is None or found.shape[0] != batch:
            found = self.views[row] = self.rows.as_strided((batch,), (0,), row)
        return found

    def rows_at(self, t: Tensor) -> Tensor:
        """Strict: the row of each of these timesteps, which are on the device.

        Nothing is asked of the device. What is no timestep at all gets the row of NaN as well:
        −1 counts from the end, and an index beyond it would end the process's use of the GPU.
        """
        assert self.row_of is not None
        return self.row_of[t.long().clamp(-1, len(self.row_of) - 1)]


@dataclass(frozen=True, eq=False)
class _Chosen:
    """``timesteps`` as they were read last. One is another's equal if it is the same object."""

    source: _Source
    levels: list[int]
    place: dict[int, int]
    """The position of each of them that is there once."""

    def position(self, timestep: Any) -> int | None:
        """Where in ``timesteps`` this tensor is, if it is an element of it and no copy."""
        whole = self.source.tensor
        if not isinstance(timestep, Tensor) or timestep.dtype != whole.dtype:
            return None
        if timestep.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            return None
        offset, stride = timestep.storage_offset() - whole.storage_offset(), whole.stride(0)
        if stride == 0 or offset % stride or not 0 <= offset // stride < len(self.levels):
            return None
        return int(offset // stride)


class _Fast:
    """What the three schedulers share. ``strict`` is in their configuration.

    Many threads may step one scheduler, and many trajectories in turn: what a step keeps belongs
    to its thread (``_own``) or to the tensor it returned (``_SHADOWS``). What describes the
    schedule is shared: the timesteps and the seeds in use hold for all.
    """

    _parent: type[Any]
    _upwards = False
    _ends = "final_alpha_cumprod"
    _as_parent = True
    """Whether the methods that the original's step calls are the ones the fused step stands for."""
    _seeds: Tensor | None = None
    _read: _Chosen | None = None
    _tables: dict[Any, tuple[Any, Tables]] | None = None
    _moved: tuple[Tensor, int, Tensor] | None = None
    """alphas_cumprod as ``add_noise`` moved it to a device, its version then, and the source."""
    _own_memory: Own | None = None

    @classmethod
    def _get_compatibles(cls: Any) -> list[Any]:
        """What the original is compatible with, the original, and this class."""
        return [*cls._parent._get_compatibles(), cls]

    @property
    def _own(self) -> Own:
        found = self._own_memory
        # setdefault: two threads that come here at once get the same one.
        return self.__dict__.setdefault("_own_memory", Own()) if found is None else found

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
        self._chosen()
        self._own.clear()

    def __getstate__(self: Any) -> dict[str, Any]:
        """Copies and pickles of a scheduler make their own tables and buffers."""
        own = ("_tables", "_own_memory", "_read", "_moved")
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
        own = self._own
        x_s, x0 = fitting(own.states.take(), x), fitting(own.x0s.take(), x)
        x_s = torch.empty_like(x) if x_s is None else x_s
        x0 = torch.empty_like(x) if x0 is None else x0
        STEP(
            x,
            output,
            tables.table,
            rows,
            seeds,
            noise,
            None,
            threshold,
            PREDICTIONS.index(NAMES[self.config.prediction_type]) if tables.to_eps is None else 0,
            False,
            clip,
            rederive,
            x_s,
            x0,
            next_input,
        )
        own.states.keep(x_s)
        own.x0s.keep(x0)
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
        own = self._own
        z = fitting(own.noise, like)
        z = own.noise = torch.empty_like(like) if z is None else z
        return z.normal_(generator=generator)

    def _chosen(self: Any) -> _Chosen:
        """The chosen timesteps as numbers, read again only where somebody has put in others."""
        read, timesteps = self._read, self.timesteps
        if read is not None and read.source.unchanged(timesteps):
            return cast(_Chosen, read)
        if not isinstance(timesteps, Tensor) or timesteps.dim() != 1:
            got = tuple(timesteps.shape) if isinstance(timesteps, Tensor) else kind(timesteps)
            raise TypeError(f"timesteps must be a tensor of one dimension, got {got}")
        source, levels = _Source(timesteps), [int(t) for t in timesteps.tolist()]
        times = Counter(levels)
        place = {t: i for i, t in enumerate(levels) if times[t] == 1}
        read = self._read = _Chosen(source, levels, place)
        return read

    def _forget_after(self: Any, row: int | Tensor | None) -> None:
        """Keeps no memory beyond the last of the chosen timesteps."""
        read = self._read
        if read is not None and type(row) is int and read.levels and row == read.levels[-1]:
            self._own.clear()

    def _row(self: Any, timestep: Any) -> int | Tensor | None:
        """The timestep as a number where the host knows it, else as a tensor on its device.

        A timestep taken from ``self.timesteps``, as every pipeline does, is known by its place
        there: nothing is asked of the device.
        """
        if isinstance(timestep, Tensor):
            if timestep.dim() or timestep.is_floating_point() or timestep.dtype == torch.bool:
                return None
            if timestep.is_cpu:
                return int(timestep)
            read = self._read
            if read is not None and read.source.unchanged(read.source.tensor):
                position = read.position(timestep)
                if position is not None:
                    return cast(int, read.levels[position])
            return timestep
        try:
            return None if isinstance(timestep, bool) else operator.index(timestep)
        except TypeError:
            return None

    def _place(self: Any, timestep: Any, chosen: _Chosen) -> int | Tensor:
        """Strict: which of the chosen timesteps it is; a tensor where the host does not know."""
        t = self._row(timestep)
        if isinstance(t, Tensor):
            position = chosen.position(t)
            return t if position is None else position
        place = chosen.place.get(t)
        if place is not None:
            return place
        times = chosen.levels.count(t)
        if not times:
            raise ValueError(
                f"timestep must be one of the {len(chosen.levels)} chosen by set_timesteps, "
                f"got {timestep}"
            )
        position = chosen.position(timestep)
        if position is None or chosen.levels[position] != t:
            raise ValueError(
                f"timestep must be an element of scheduler.timesteps itself where the list has it "
                f"more than once, got {t}, which is there {times} times"
            )
        return position

    def _of(
        self: Any,
        key: Any,
        device: torch.device,
        made_from: tuple[Tensor, Any],
        settings: tuple[Any, ...],
        make: Callable[[], tuple[Tensor, Tensor | None, Tensor | None]],
    ) -> Tables:
        """``make()``'s tables, kept until something that they were made from is another.

        ``made_from``: ᾱ and the end's, tensors that may be written; the second may be a number.
        """
        tables = self._tables
        if tables is None:
            tables = self.__dict__.setdefault("_tables", {})
        # Another stream would have to wait for the one that makes them.
        key = (key, device, 0 if device.type == "cpu" else stream_of(device))
        held = tables.get(key)
        abar, end = made_from
        if held is not None:
            before, abar_before, end_before, found = held
            if (
                before == settings
                and abar_before.unchanged(abar)
                and (
                    end_before.unchanged(end)
                    if type(end_before) is _Source
                    else not isinstance(end, Tensor) and end_before == end
                )
            ):
                return cast(Tables, found)
        if len(tables) >= 16:
            tables.clear()
        sources = _Source(abar), _Source(end) if isinstance(end, Tensor) else end
        table, row_of, to_eps = make()
        found = Tables(
            sent(table.to(torch.float32), device),
            torch.arange(len(table), dtype=torch.int32, device=device),
            None if row_of is None else sent(row_of, device),
            None if to_eps is None else sent(to_eps, device),
            {},
        )
        tables[key] = settings, *sources, found
        return found

    def _loose_rows(self: Any, row: int | Tensor, tables: Tables, batch: int) -> Tensor:
        shift = tables.rows.shape[0] // 2
        if isinstance(row, Tensor):
            return (row + shift).to(torch.int32).expand(batch)
        return tables.row(row + shift, batch)

    def _end(self: Any) -> Any:
        """ᾱ of what is no timestep: the last step's s, or where the first step up begins."""
        return getattr(self, self._ends)

    def _abar(self: Any) -> Tensor:
        """``alphas_cumprod``, or where ``add_noise`` moved it to another device, what it moved."""
        abar, moved = self.alphas_cumprod, self._moved
        if moved is not None and moved[0] is abar and moved[1] == _version(abar):
            return cast(Tensor, moved[2])
        return cast(Tensor, abar)

    def _levels(self: Any) -> tuple[NoiseSchedule, float]:
        """Strict: ᾱ in float64, and the end's.

        Read from ``alphas_cumprod``. Where that is what ``betas`` give, which float32 has rounded
        at each of its products, they are multiplied again in float64.
        """
        abar, betas, end = self._abar(), self.betas, self._end()
        if abar.is_meta:  # made under torch.device("meta")
            with _CPU:
                again = type(self).from_config(self.config)
            abar, betas, end = again.alphas_cumprod, again.betas, again._end()
        end = float(end)
        given = abar.detach().cpu()
        found = given.double().numpy().copy()
        if betas.shape == given.shape:
            made = torch.cumprod(1.0 - betas.detach(), dim=0).cpu()
            _make_finite(made, self.config)
            if torch.equal(made.to(given.dtype), given):
                found = np.cumprod(1 - betas.detach().cpu().double().numpy())
        _make_finite(found, self.config)
        if not 0 < end <= 1:
            raise ValueError(f"{self._ends} must lie in (0, 1], got {end:g}")
        return NoiseSchedule.from_alphas_cumprod(found), (
            float(found[0]) if end == float(given[0]) else end
        )

    def _strict_pairs(self: Any, chosen: _Chosen) -> list[Pair]:
        """The (t, s) of each step, in order; towards noise t is where the step before it ended."""
        levels, T = chosen.levels, len(self.alphas_cumprod)
        for t in levels:
            if not 0 <= t < T:
                raise ValueError(f"timesteps must lie in [0, {T - 1}], got {t}")
        if self._upwards:
            return list(zip([-1, *levels[:-1]], levels, strict=True))
        return list(zip(levels, [*levels[1:], -1], strict=True))

    def _strict_of(
        self: Any, eta: float, device: torch.device, read: _Chosen | None = None
    ) -> Tables:
        """Each step to the next of the chosen timesteps, in float64 (``make_table``)."""
        chosen = self._chosen() if read is None else read
        prediction = self.config.prediction_type

        def make() -> tuple[Tensor, Tensor, Tensor | None]:
            schedule, end = self._levels()
            pairs = self._strict_pairs(chosen)
            table = _with_nan(make_table(schedule, pairs, eta, end))
            row_of = torch.full((len(schedule) + 1,), len(pairs), dtype=torch.int32, device=_CPU)
            for t, place in chosen.place.items():
                row_of[t] = place
            to_eps = None
            if self._upwards and prediction != "epsilon":
                # The model is told where the step goes, and means ε at that level.
                told = schedule.alphas_cumprod[chosen.levels]
                zeros, ones = np.zeros_like(told), np.ones_like(told)
                to_eps = _with_nan(pack(told, zeros, zeros, ones))
            return table, row_of, to_eps

        made_from, settings = (self._abar(), self._end()), (chosen, prediction)
        return cast(Tables, self._of(("strict", eta), device, made_from, settings, make))

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
        check_untransformed("step with strict=True")
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
        if torch.is_grad_enabled():
            ends = self._ends, self._end()
            abar = "alphas_cumprod", self.alphas_cumprod
            for name, value in (abar, ends, ("variance_noise", noise), ("eta", eta)):
                if isinstance(value, Tensor) and value.requires_grad:
                    raise ValueError(
                        f"{name} requires grad, which strict does not carry: detach it"
                    )
        chosen = self._chosen()
        tables = self._strict_of(float(eta), sample.device, chosen)
        place = self._place(timestep, chosen)
        # As one of several: an index of no dimensions is read as a number, and reading waits.
        if isinstance(place, Tensor):
            rows = tables.rows_at(place.view(1)).expand(len(sample))
        else:
            rows = tables.row(place, sample.shape[0])
        half = None if sample.dtype == torch.float32 else torch.empty_like(sample)
        x = sample if half is None else _SHADOWS.state_of(sample)
        if eta and noise is None and seeds is None:
            noise = self._drawn(x, generator)
        if seeds is not None and seeds.device != sample.device:
            moved = sent(seeds, sample.device)
            if self._seeds is seeds:  # and no other thread has put in others
                self._seeds = moved
            seeds = moved
        if tables.to_eps is not None:
            output, _ = ddim_step(
                x,
                output,
                tables.to_eps,
                rows,
                prediction=NAMES[self.config.prediction_type],
                want_x0=False,
            )
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
        last = place == len(chosen.levels) - 1 if isinstance(place, int) else False
        if last:
            self._own.clear()
        if half is None:
            return x_s, x0
        if not last:
            _SHADOWS.put(half, x_s)
        return half, x0.to(half)


class _FastForwards(_Fast):
    """The constructor and the step of the two schedulers that go from noise to data."""

    _result: type[Any] = DDIMSchedulerOutput

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        bounds = getattr(cls, "_threshold_sample", None)
        cls._as_parent = cls._get_variance.__module__ == __name__ and (
            bounds is None or bounds.__module__.startswith("diffusers.")
        )

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
        if strict and not self.alphas_cumprod.is_meta:
            _make_finite(self.alphas_cumprod, self.config)

    def add_noise(
        self: Any, original_samples: Tensor, noise: Tensor, timesteps: torch.IntTensor
    ) -> Tensor:
        """As the original, which moves ``alphas_cumprod`` to the samples' device for good."""
        source = self._abar()
        found = self._parent.add_noise(self, original_samples, noise, timesteps)
        self._note_moved(source)
        return cast(Tensor, found)

    def get_velocity(
        self: Any, sample: Tensor, noise: Tensor, timesteps: torch.IntTensor
    ) -> Tensor:
        """As the original, which moves ``alphas_cumprod`` to the samples' device for good."""
        source = self._abar()
        found = self._parent.get_velocity(self, sample, noise, timesteps)
        self._note_moved(source)
        return cast(Tensor, found)

    def _note_moved(self: Any, source: Tensor) -> None:
        """Keeps what was moved: strict need not read it back, for which a GPU would be awaited."""
        abar = self.alphas_cumprod
        if abar is not source and (self._moved is None or self._moved[0] is not abar):
            self._moved = abar, _version(abar), source

    def previous_timestep(self: Any, timestep: int | Tensor) -> int:
        """The timestep that the step from ``timestep`` goes to; below 0 it is the last step.

        The original has no such method. Its step goes to t − T // S, whatever the next timestep
        is, which the plain scheduler repeats; strict goes to the next of the chosen ones, and to
        −1 after the last. ``_get_variance(t, previous_timestep(t))`` is σ² of that step at η = 1.
        """
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps first: no timesteps are chosen")
        if not self.config.strict:
            return int(timestep) - int(self.config.num_train_timesteps // self.num_inference_steps)
        chosen = self._chosen()
        place = self._place(timestep, chosen)
        if isinstance(place, Tensor):
            place = self._place(int(timestep), chosen)
        return cast(int, self._strict_pairs(chosen)[place][1])

    def _get_variance(self: Any, timestep: int | Tensor, prev_timestep: Any) -> Tensor:
        """σ² at η = 1, as the original's; with ``strict`` that of the step which is taken.

        Strict refuses any ``prev_timestep`` but the one its step goes to: code that computes it as
        t − T // S would find another mean and another variance than the samples have.
        """
        if not self.config.strict or self.num_inference_steps is None:
            return cast(Tensor, self._parent._get_variance(self, timestep, prev_timestep))
        t, s = int(timestep), max(int(prev_timestep), -1)
        schedule, end = self._levels()
        pairs = self._strict_pairs(self._chosen())
        if (t, s) not in pairs:
            allowed = sorted({there for here, there in pairs if here == t})
            if not allowed:
                raise ValueError(
                    f"timestep must be one of the {len(pairs)} chosen by set_timesteps, got {t}"
                )
            raise ValueError(
                f"prev_timestep must be {' or '.join(map(str, allowed))}, where the strict step "
                f"from {t} goes (previous_timestep says so), got {s}"
            )
        table = make_table(schedule, [(t, s)], 1.0, end).astype(np.float64)
        return torch.tensor(table[0, 5] ** 2, dtype=torch.float32, device=self._abar().device)

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
            strict: Any = _untraced if torch.compiler.is_compiling() else _Fast._strict_step
            found = strict(
                self,
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
        eager = torch.compiler.is_compiling() or transformed()
        row = None if eager else self._row(timestep)
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
        rows = self._loose_rows(row, tables, sample.shape[0])
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

    def _loose_of(self: Any, eta: float, device: torch.device, final: Tensor | float) -> Tables:
        """The original's step from each timestep, the negative ones as its indices count them.

        By its own float32 operations, on the device where it would do them.
        """
        abar, steps, T = (
            self.alphas_cumprod,
            self.num_inference_steps,
            self.config.num_train_timesteps,
        )

        def make() -> tuple[Tensor, None, None]:
            t = torch.arange(-len(abar), len(abar), device=abar.device)
            s = t - T // steps
            at, last = abar[t], torch.as_tensor(final, dtype=abar.dtype, device=abar.device)
            at_prev = torch.where(s >= 0, abar[s.clamp(min=0)], last)
            variance = ((1 - at_prev) / (1 - at)) * (1 - at / at_prev)
            sigma = eta * variance**0.5
            direction = (1 - at_prev - sigma**2) ** 0.5
            a, b = at**0.5, (1 - at) ** 0.5
            columns = [a, 1 / a, b, 1 / b, at_prev**0.5, sigma, direction]
            return torch.stack(columns, 1), None, None

        key = eta, type(final)  # a batch ends at 1 whatever the attribute says
        return cast(Tables, self._of(key, device, (abar, final), (steps, T), make))


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

    def _get_variance(
        self: Any, timestep: int | Tensor, prev_timestep: int | Tensor | None = None
    ) -> Tensor:
        """As ``FastDDIMScheduler``'s; by default of the step that is taken from ``timestep``."""
        if prev_timestep is None and self.config.strict and self.num_inference_steps is not None:
            prev_timestep = self.previous_timestep(timestep)
        return cast(Tensor, _FastForwards._get_variance(self, timestep, prev_timestep))

    def _batch_get_variance(self: Any, t: Tensor, prev_t: Tensor) -> Tensor:
        """``_get_variance`` of each pair."""
        if not self.config.strict or self.num_inference_steps is None:
            return cast(Tensor, self._parent._batch_get_variance(self, t, prev_t))
        pairs = zip(t.tolist(), prev_t.tolist(), strict=True)
        return torch.stack([self._get_variance(*pair) for pair in pairs])

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
        eager = torch.compiler.is_compiling() or transformed()
        fits = (
            not eager
            and eta == 0
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
                    "for each of them and eta = 0, outside of torch.func, forward-mode "
                    "differentiation and torch.compile"
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
            tables = self._loose_of(0.0, sample.device, 1.0)
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
    _ends = "initial_alpha_cumprod"

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
        if strict and not self.alphas_cumprod.is_meta:
            _make_finite(self.alphas_cumprod, self.config)

    def step(
        self: Any,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> Any:
        """(prev_sample, pred_original_sample), as the original's ``step``; see the class."""
        if self.config.strict:
            strict: Any = _untraced if torch.compiler.is_compiling() else _Fast._strict_step
            found = strict(self, model_output, timestep, sample, 0.0, False, None, None, None)
        else:
            eager = torch.compiler.is_compiling() or transformed()
            row = None if eager else self._row(timestep)
            if row is None or not _fits(self, model_output, sample, row):
                return self._parent.step(self, model_output, timestep, sample, return_dict)
            tables = self._loose_up(sample.device)
            found = self._stepped(
                sample, model_output, tables, self._loose_rows(row, tables, len(sample))
            )
            self._forget_after(row)
        if not return_dict:
            return found
        return DDIMInverseSchedulerOutput(prev_sample=found[0], pred_original_sample=found[1])

    def _loose_up(self: Any, device: torch.device) -> Tables:
        """The original's step to each timestep, by its own float32 operations."""
        abar, initial = self.alphas_cumprod, self.initial_alpha_cumprod
        steps, T = self.num_inference_steps, self.config.num_train_timesteps

        def make() -> tuple[Tensor, None, None]:
            to = torch.arange(-len(abar), len(abar), device=abar.device)
            at = (to - T // steps).clamp(max=T - 1)
            first = initial.to(abar.device)
            abar_t = torch.where(at >= 0, abar[at.clamp(0, len(abar) - 1)], first)
            abar_s = abar[to]
            a, b = abar_t**0.5, (1 - abar_t) ** 0.5
            direction = (1 - abar_s) ** 0.5
            none = torch.zeros_like(a)
            columns = [a, 1 / a, b, 1 / b, abar_s**0.5, none, direction]
            return torch.stack(columns, 1), None, None

        return cast(Tables, self._of("inverse", device, (abar, initial), (steps, T), make))


@torch.compiler.disable
def _untraced(scheduler: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The strict step in the middle of what torch.compile traces: it stays a call of its own."""
    return scheduler._strict_step(*arguments)  # type: ignore[no-any-return]


def _fits(scheduler: Any, output: Any, sample: Any, row: int | Tensor) -> bool:
    """Whether the fused step computes what the original's would."""
    config, abar, end = scheduler.config, scheduler.alphas_cumprod, scheduler._end()
    return (
        scheduler.num_inference_steps is not None
        and isinstance(sample, Tensor)
        and sample.dim() > 1
        and _like(output, sample)
        and sample.dtype == torch.float32
        and (isinstance(row, Tensor) or -abar.shape[0] <= row < abar.shape[0])
        # The original computes with a Python number in float64, and with other dtypes in theirs.
        and isinstance(end, Tensor)
        and end.dtype == abar.dtype == torch.float32
        and not end.dim()
        and config.prediction_type in NAMES
        and (not config.clip_sample or config.clip_sample_range > 0)
        and scheduler._as_parent
        and not (
            (
                sample.requires_grad
                or output.requires_grad
                or abar.requires_grad
                or end.requires_grad
            )
            and torch.is_grad_enabled()
        )
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


def _make_finite(levels: Any, config: Any) -> None:
    """ᾱ_T of an ε model where it is 0, in place: see ``NEARLY_ZERO``."""
    if config.prediction_type == "epsilon" and len(levels) > 1 and levels[-1] <= 0:
        levels[-1] = min(NEARLY_ZERO, float(levels[-2]) / 2)


def _with_nan(table: Any) -> Tensor:
    """The table, and one more row, of NaN."""
    rows = torch.from_numpy(table)
    return torch.cat([rows, rows.new_full((1, rows.shape[1]), torch.nan)])


def _strict_timesteps(config: Any, steps: int, T: int) -> list[int]:
    """Exactly S distinct timesteps, rising. ``steps_offset`` moves the leading ones as far as it
    can without leaving the schedule."""
    chosen = sorted(t for t, _ in make_pairs(config.timestep_spacing, steps, T))
    if config.timestep_spacing == "leading":
        offset = min(config.steps_offset, T - 1 - chosen[-1])
        chosen = [t + offset for t in chosen]
    return chosen
