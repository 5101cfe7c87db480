"""The interface of a strategy, and the state and helpers of schedulers that both strategies use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastddim.dropins._compiled import Kind, Maths
from fastddim.dropins._scheduler import NAMES, Scheduler, levels_fit, like
from fastddim.dropins._shared import Buffers, rounds
from fastddim.dropins._tables import (
    CPU,
    Tables,
    version,
)
from fastddim.dropins._transfer import sent_pinned
from fastddim.step.arguments import transformed

Generators: TypeAlias = torch.Generator | list[torch.Generator] | None


class Strategy(Protocol):
    """Decides how a scheduler takes its steps.

    A strategy has no state, so that schedulers can be copied and freed: each method takes the
    scheduler as an argument.
    """

    def begin(self, scheduler: Base) -> None:
        """Checks the configuration, and changes the original's tensors where the strategy must."""
        ...

    def checked_seeds(self, seeds: Sequence[int] | Tensor | None) -> Tensor | None:
        """Checks the seeds of ``use_seeds``, and returns them as a tensor."""
        ...

    def set_timesteps(
        self,
        scheduler: Base,
        num_inference_steps: int | None,
        device: str | torch.device | None,
        timesteps: Sequence[int] | Tensor | None,
    ) -> None:
        """Chooses the timesteps."""
        ...

    def step(
        self,
        scheduler: Base,
        output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float,
        rederive: bool,
        generator: Generators,
        noise: Tensor | None,
    ) -> tuple[Tensor, Tensor] | None:
        """Returns (x_s, x0), or None if the scheduler must call the original's step."""
        ...

    def tables(
        self, scheduler: Base, kind: Kind, device: torch.device, dtype: torch.dtype
    ) -> Tables | None:
        """Returns the tables of all steps with this η, or of ``batch_step`` for BATCH, or None."""
        ...

    def batch_step(
        self,
        scheduler: Base,
        output: Tensor,
        timesteps: Tensor,
        sample: Tensor,
        eta: float,
        rederive: bool,
    ) -> Tensor | None:
        """Returns x_s of samples at different timesteps, or None, as ``step`` does."""
        ...

    def previous_timestep(self, scheduler: Base, timestep: int | Tensor) -> int:
        """Returns the timestep that the step from ``timestep`` goes to."""
        ...

    def variance(self, scheduler: Base, timestep: int | Tensor, prev_timestep: Any) -> Tensor:
        """Returns σ² of this step at η = 1."""
        ...

    def variances(self, scheduler: Base, t: Tensor, prev_t: Tensor) -> Tensor:
        """Returns the ``variance`` of each pair."""
        ...


class Base(Scheduler):
    """Holds the attributes and helpers that a strategy uses. Names without _ are diffusers'.

    Many threads may step one scheduler, and many trajectories may take turns: the state that a
    step keeps belongs to its thread (``_own``) or to the tensor it returned. All threads share the
    schedule: the timesteps and the seeds in use.
    """

    if TYPE_CHECKING:

        @property
        def config(self) -> Any: ...

    betas: Tensor
    num_inference_steps: int | None

    _parent: Any
    """The class of diffusers that the scheduler replaces."""
    _upwards = False
    """True for the inverse scheduler, which steps from data to noise."""
    _as_parent = True
    """False if a subclass overrides a method of the original's step, which then runs itself."""
    _seeds: Tensor | None = None
    _moved: tuple[Tensor, int, Tensor] | None = None
    """``add_noise`` moves ``alphas_cumprod`` to a device. Here are the moved tensor, its version,
    and the tensor before."""
    _unsaved = (*Scheduler._unsaved, "_moved")

    def _abar(self) -> Tensor:
        """Returns ``alphas_cumprod``, or the tensor before ``add_noise`` moved it to a device."""
        abar, moved = self.alphas_cumprod, self._moved
        if moved is not None and moved[0] is abar and moved[1] == version(abar):
            return moved[2]
        return abar

    def _note_moved(self, source: Tensor) -> None:
        """Keeps the tensor before the move, because reading the moved one is a host sync."""
        abar = self.alphas_cumprod
        if abar is not source and (self._moved is None or self._moved[0] is not abar):
            self._moved = abar, version(abar), source

    @classmethod
    def _get_compatibles(cls) -> list[Any]:
        """Returns the original, the classes compatible with it, and this class."""
        return [*cls._parent._get_compatibles(), cls]

    def _drawn(self, like: Tensor, generator: Any) -> Tensor:
        """Draws normals as the original does, on a CPU always into the same memory."""
        if torch.compiler.is_compiling():  # The scheduler's memory is no input of a graph.
            return torch.randn(like.shape, device=like.device, dtype=like.dtype)
        if like.device != CPU and _are_the_cpus(generator):
            drawn = randn_tensor(like.shape, generator=generator, device=CPU, dtype=like.dtype)
            return sent_pinned(drawn, like.device)
        for_cpu = generator is None or getattr(generator, "device", None) == CPU
        if not for_cpu or like.device != CPU or not like.is_contiguous():
            return cast(
                Tensor,
                randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype),
            )
        return self._own.drawn(like, generator)

    def _quantile(self, x0: Tensor) -> Tensor:
        """Returns the s of dynamic thresholding for each sample."""
        config = self.config
        s = torch.quantile(x0.flatten(1).float().abs(), config.dynamic_thresholding_ratio, dim=1)
        return s.clamp(min=1, max=config.sample_max_value)

    def _stepped(
        self,
        buffers: Buffers | Maths,
        tables: Tables,
        x: Tensor,
        output: Tensor,
        rows: Tensor | int,
        *,
        rederive: bool = False,
        want_x0: bool = True,
        seeds: Tensor | None = None,
        noise: Tensor | None = None,
        next_input: Tensor | None = None,
        posterior: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Takes a step without checks, and bounds x0 as the configuration demands."""
        config = self.config
        own = NAMES[config.prediction_type]
        clip = threshold = None
        if getattr(config, "thresholding", False):
            x0 = buffers.stepped(tables.table, x, output, rows, prediction=own, checked=True)[1]
            assert x0 is not None
            threshold = self._quantile(x0)
            del x0  # The step below can then reuse this memory.
        elif config.clip_sample:
            clip = config.clip_sample_range
        return buffers.stepped(
            tables.table,
            x,
            output,
            rows,
            prediction=own if tables.to_eps is None else "epsilon",
            clip=clip,
            rederive=rederive,
            want_x0=want_x0,
            seeds=seeds,
            noise=noise,
            threshold=threshold,
            next_input=next_input,
            posterior=posterior,
            checked=True,
        )


def output_of(made_as: Any, **fields: Tensor) -> Any:
    """Returns ``made_as(**fields)`` of one of diffusers' output classes.

    Calling the class would take as long as a small step, because its constructor inspects the
    fields each time. This sets the attributes and items that the constructor would set.
    """
    result = made_as.__new__(made_as)
    attributes = result.__dict__
    for name, value in fields.items():
        attributes[name] = value
        OrderedDict.__setitem__(result, name, value)
    return result


TRACED = torch.float32, torch.bfloat16, torch.float16, torch.float64
"""The dtypes of steps inside torch.compile, which are operations on tensors as the original's."""
BATCH = "batch"
"""The kind of tables that ``batch_step`` takes."""


def fits(scheduler: Base, output: Any, sample: Any) -> bool:
    """Tells whether our step equals the original's step for these tensors."""
    config = scheduler.config
    return (
        scheduler.num_inference_steps is not None
        and isinstance(sample, Tensor)
        and like(output, sample)
        and sample.dim() > 1
        and config.prediction_type in NAMES
        and (not config.clip_sample or config.clip_sample_range > 0)
        and rounds_alike(sample, config)
        and scheduler._as_parent
        and not (
            torch.is_grad_enabled()
            and (
                sample.requires_grad
                or output.requires_grad
                or scheduler.alphas_cumprod.requires_grad
                or getattr(scheduler._end(), "requires_grad", False)
            )
        )
    )


def rounds_alike(sample: Tensor, config: Any) -> bool:
    """Tells whether our step from ``sample`` rounds where the original's does."""
    if sample.dtype == torch.float32:
        return True
    if torch.compiler.is_compiling():
        return sample.dtype in TRACED
    return rounds(sample, config.clip_sample_range if config.clip_sample else None)


def batch_fits(scheduler: Base, output: Any, timesteps: Any, sample: Any, eta: float) -> bool:
    """Tells whether the fused step equals ``batch_step_no_noise`` of the original."""
    return (
        (torch.compiler.is_compiling() or not transformed())
        and eta == 0
        and isinstance(timesteps, Tensor)
        and timesteps.shape == sample.shape[:1]
        and not timesteps.is_floating_point()
        and sample.dtype == torch.float32
        and fits(scheduler, output, sample)
        and levels_fit(scheduler)
    )


def of_each(timestep: Any, sample: Any) -> bool:
    """Tells whether ``timestep`` holds a timestep for each sample of the batch."""
    return (
        isinstance(timestep, Tensor)
        and isinstance(sample, Tensor)
        and timestep.dim() == 1
        and timestep.shape == sample.shape[:1]
        and timestep.dtype != torch.bool
        and not (timestep.is_floating_point() or timestep.is_complex())
    )


def has_grad(tensor: Tensor) -> bool:
    """Tells whether autograd would record operations on ``tensor``."""
    return tensor.requires_grad and torch.is_grad_enabled()


def _are_the_cpus(generator: Any) -> bool:
    """Tells whether ``generator`` is a CPU's, or a list of such generators."""
    each = generator if isinstance(generator, list) else [generator]
    return all(isinstance(g, torch.Generator) and g.device == CPU for g in each)
