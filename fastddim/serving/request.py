"""A request for one sample, and its checks: all that can be refused is refused before it waits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastddim.check import finite, kind, shown, truth, whole
from fastddim.coefficients import Prediction
from fastddim.loop.options import Guidance, checked_guidance
from fastddim.loop.sampler import DDIM
from fastddim.serving.program import Program, program_of


@dataclass(frozen=True, eq=False)
class Request:
    """One sample that an ``Engine`` is asked for. Shapes have no batch.

    Args:
        seed: an integer in [0, 2⁶³), from which the noise comes. It may be left out if x_T is
            given and no step adds noise.
        ddim: the sampler; the engine's by default. S, η, the spacing, the order and the path are
            the request's own, prediction and clip are the engine's.
        cond: the model's keyword arguments, tensors of the engine's shapes and dtypes.
        uncond: the tensors that replace those of ``cond`` without the condition.
        guidance: w of u + w·(c − u), a number, (rows, 1) for each step, or a function of t. It
            needs an engine with ``guided=True``.
        x_T: the state to begin with, of the engine's shape, float32, bfloat16 or float16; with
            ``reverse`` the data. The default is noise of the first level. The result has its dtype.
        start: the row to begin with; x_T is then x at that row's t, as in ``DDIM.sample``.
        reverse: whether the loop runs backwards, from data to noise, as ``DDIM.invert`` without
            ``refine``. It needs a model of ε.
        until: with ``reverse``, the row to stop at.
        deadline: the time in seconds from ``submit`` in which the sample is due. An engine with
            ``order="deadline"`` starts the earliest deadline first, and ``late`` in its metrics
            counts the samples that came later.
        check_finite: whether a sample that holds NaN or an infinity is a failure,
            ``FloatingPointError``; the engine's choice by default.

    Example:
        >>> Request(7, ddim=DDIM(steps=10)).seed
        7
    """

    seed: int | None = None
    ddim: DDIM | None = None
    cond: Mapping[str, Tensor] | None = None
    uncond: Mapping[str, Tensor] | None = None
    guidance: Guidance | None = None
    x_T: Tensor | None = None
    start: int = 0
    reverse: bool = False
    until: int | None = None
    deadline: float | None = None
    check_finite: bool | None = None


class Spec(NamedTuple):
    """The shape, without the batch, and the dtype of a condition."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Network:
    """The facts about a network that a request must fit.

    Attributes:
        ddim: the engine's sampler, which says what the network was trained for.
        shape: of a sample.
        cond: the condition of each name.
        guided: whether the model gets two samples for each slot.
        check_finite: whether samples are checked.
        on_gpu: whether the slots lie on a GPU.
    """

    ddim: DDIM
    shape: tuple[int, ...]
    cond: dict[str, Spec]
    guided: bool
    check_finite: bool
    on_gpu: bool
    programs: dict[Any, Program] = field(default_factory=dict)
    """The programs of the latest requests."""

    @property
    def prediction(self) -> Prediction:
        return self.ddim._prediction

    def program(self, ddim: DDIM, start: int, reverse: bool, until: int | None) -> Program:
        """Returns a program, the same one for equal samplers."""
        key = ddim, start, reverse, until
        found = self.programs.get(key)
        if found is None:
            found = program_of(*key)
            if len(self.programs) >= _KEPT:
                self.programs.clear()
            self.programs[key] = found
        return found


_KEPT = 256
"""The most programs that are kept."""


class Work(NamedTuple):
    """A request, checked: everything that its steps need.

    Attributes:
        program: the rows.
        first: the place of the first step among the program's rows.
        seed: the noise's seed.
        x_T: the state to begin with, a copy, or None.
        cond, uncond: a copy of each condition. They are equal without guidance.
        guidance: w of each step.
        dtype: the result's dtype.
        check_finite: whether the result is checked.
        ready: the end of the copies on each GPU that holds tensors of the request.
    """

    program: Program
    first: int
    seed: int
    x_T: Tensor | None
    cond: dict[str, Tensor]
    uncond: dict[str, Tensor]
    guidance: list[float]
    dtype: torch.dtype
    check_finite: bool
    ready: dict[torch.device, torch.cuda.Event]

    @property
    def steps(self) -> int:
        return len(self.program) - self.first

    def without_tensors(self) -> Work:
        """Returns the facts that remain of interest once the sample is made."""
        return self._replace(x_T=None, cond={}, uncond={}, guidance=[])

    def await_copies(self) -> None:
        """Makes the current stream of each GPU wait for the copies that another stream made."""
        if not self.ready:
            return
        for tensor in (self.x_T, *self.cond.values(), *self.uncond.values()):
            if tensor is not None and tensor.is_cuda:
                stream = torch.cuda.current_stream(tensor.device)
                stream.wait_event(self.ready[tensor.device])
                tensor.record_stream(stream)


def checked(request: Request, network: Network) -> Work:
    """Returns the request's work.

    Raises:
        TypeError, ValueError: naming the argument, the value and what is allowed.
    """
    if not isinstance(request, Request):
        raise TypeError(f"submit takes a fastddim.Request, got {kind(request)}")
    ddim = network.ddim if request.ddim is None else request.ddim
    _check_sampler(ddim, network)
    if not isinstance(request.reverse, bool):
        raise TypeError(f"reverse must be True or False, got {shown(request.reverse)}")
    if request.until is not None and not request.reverse:
        raise ValueError(f"until belongs to reverse=True, got {shown(request.until)} without it")
    start = whole("start", request.start, low=0, high=len(ddim.pairs) - 1)
    if request.reverse and start:
        raise ValueError(f"start has no place in a loop that runs backwards, got {start}")
    # At order 2 the first step differs from the same row's step in a longer run.
    shared = ddim.order == 1 and not request.reverse
    program = network.program(ddim, 0 if shared else start, request.reverse, request.until)
    first = start if shared else 0
    x_T, dtype = _state(request, network, start), torch.float32
    if request.seed is None and (x_T is None or program.noisy):
        needed = "without x_T" if x_T is None else "where steps add noise"
        raise ValueError(f"seed must be an integer in [0, 2⁶³) {needed}, got None")
    seed = 0 if request.seed is None else whole("seed", request.seed, low=0, high=2**63 - 1)
    if request.deadline is not None and finite("deadline", request.deadline) <= 0:
        raise ValueError(f"deadline must be > 0 seconds, got {request.deadline}")
    check_finite = network.check_finite
    if request.check_finite is not None:
        check_finite = truth("check_finite", request.check_finite)
    w = _weights(request, network, program)[first:]
    given, pins = _condition("cond", request.cond, network.cond), network.on_gpu
    cond = uncond = {name: _copy(value, pins) for name, value in given.items()}
    if any(weight != 1 for weight in w):
        other = _condition("uncond", {**given, **(request.uncond or {})}, network.cond)
        uncond = {name: _copy(value, pins) for name, value in other.items()}
    if x_T is not None:
        x_T, dtype = _copy(x_T.to(torch.float32), pins), x_T.dtype
    ready: dict[torch.device, torch.cuda.Event] = {}
    for value in (x_T, *cond.values(), *uncond.values()):
        if value is not None and value.is_cuda and value.device not in ready:
            # Without a stream, ``record`` takes the stream of the current device.
            ready[value.device] = torch.cuda.Event()
            ready[value.device].record(torch.cuda.current_stream(value.device))
    return Work(
        program,
        first,
        seed,
        x_T,
        cond,
        uncond,
        w,
        dtype,
        check_finite,
        ready,
    )


def sampler_program(ddim: DDIM | None, network: Network) -> Program:
    """Returns the program of a request that names only its sampler.

    Raises:
        TypeError, ValueError: naming the argument, the value and what is allowed.
    """
    ddim = network.ddim if ddim is None else ddim
    _check_sampler(ddim, network)
    return network.program(ddim, 0, False, None)


def _copy(tensor: Tensor, pins: bool) -> Tensor:
    """Returns a copy, which the caller of ``submit`` cannot overwrite.

    With ``pins`` a copy on the host is pinned, so that no copy to the device waits for the device.
    """
    copied = tensor.detach().clone(memory_format=torch.contiguous_format)
    return copied.pin_memory() if pins and copied.is_cpu else copied


def _check_sampler(ddim: Any, network: Network) -> None:
    if not isinstance(ddim, DDIM):
        raise TypeError(f"ddim must be a fastddim.DDIM, got {kind(ddim)}")
    own = network.ddim
    if ddim is own:
        return
    for name, given, fixed in (
        ("prediction", ddim._prediction, own._prediction),
        ("clip", ddim.clip, own.clip),
    ):
        if given != fixed:
            raise ValueError(
                f"ddim must have the engine's {name}, {fixed!r}, which all slots share, got "
                f"{given!r}"
            )
    if ddim.schedule.continuous != own.schedule.continuous:
        kinds = ("a table of levels", "a continuous path")
        raise ValueError(
            f"ddim must have {kinds[own.schedule.continuous]} as the engine's network, got "
            f"{ddim.schedule}"
        )
    if not own.schedule.continuous and len(ddim.schedule) != len(own.schedule):
        raise ValueError(
            f"ddim must have the T of the engine's network, {len(own.schedule)}, got "
            f"{len(ddim.schedule)}"
        )
    ours, theirs = (each.schedule.times(each.pairs[0][:1]).dtype for each in (own, ddim))
    if ours != theirs:
        raise ValueError(f"ddim must have t of the engine's dtype, {ours}, got {theirs}")


def _state(request: Request, network: Network, start: int) -> Tensor | None:
    x_T = request.x_T
    if x_T is None:
        if request.reverse:
            raise ValueError("x_T must be the data with reverse=True, got None")
        if start:
            raise ValueError(f"x_T must be given with start = {start}: noise is at row 0")
        return None
    if not isinstance(x_T, Tensor):
        raise TypeError(f"x_T must be a tensor, got {kind(x_T)}")
    if tuple(x_T.shape) != network.shape:
        raise ValueError(
            f"x_T must have the engine's shape, {network.shape}, without a batch, got "
            f"{tuple(x_T.shape)}"
        )
    if x_T.layout != torch.strided:
        raise TypeError(f"x_T must be dense, got {x_T.layout}")
    if x_T.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"x_T must be float32, bfloat16 or float16, got {x_T.dtype}")
    if x_T.requires_grad:
        raise ValueError("x_T requires grad, which sampling does not carry: pass x_T.detach()")
    return x_T


def _weights(request: Request, network: Network, program: Program) -> list[float]:
    """Returns w of each of the program's steps: 1 without guidance."""
    w = checked_guidance(request.guidance, request.uncond, 1, program.all_times.tolist())
    if w is None or (w == 1).all():
        return [1.0] * len(program)
    if not network.guided:
        raise ValueError(
            f"guidance needs an engine with guided=True, whose model gets two samples for each "
            f"slot, got {shown(request.guidance)}"
        )
    if not isinstance(request.uncond, Mapping):
        raise TypeError(f"uncond must map names to tensors, got {kind(request.uncond)}")
    if not request.uncond:
        raise ValueError("uncond must replace a tensor of cond, got an empty mapping")
    return [float(weight) for weight in w[list(program.numbers), 0].astype(np.float32)]


def _condition(name: str, given: Any, specs: dict[str, Spec]) -> dict[str, Tensor]:
    """Returns the condition of each name, checked."""
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} must map names to tensors, got {kind(given)}")
    for key in given:
        if key not in specs:
            known = ", ".join(map(repr, specs)) or "nothing"
            raise ValueError(f"{name} must hold the engine's names, {known}, got {key!r}")
    found = {}
    for key, (shape, dtype) in specs.items():
        value = given.get(key)
        if not isinstance(value, Tensor) or tuple(value.shape) != shape or value.dtype != dtype:
            got = "nothing" if key not in given else kind(value)
            if isinstance(value, Tensor):
                got = f"{value.dtype} {tuple(value.shape)}"
            raise ValueError(
                f"{name}[{key!r}] must be {dtype} {shape}, as in the engine, got {got}"
            )
        if value.layout != torch.strided:
            raise TypeError(f"{name}[{key!r}] must be dense, got {value.layout}")
        found[key] = value
    return found


def checked_shape(shape: Any) -> tuple[int, ...]:
    """Returns the shape of a sample."""
    if isinstance(shape, (str, bytes)) or not isinstance(shape, Sequence):
        raise TypeError(f"shape must be a sequence of integers, got {kind(shape)}")
    size = tuple(whole(f"shape[{i}]", n, low=1) for i, n in enumerate(shape))
    if not size:
        raise ValueError("shape must have one dimension or more, without the batch, got ()")
    return size


def specs_of(cond: Any, dtype: torch.dtype) -> dict[str, Spec]:
    """Returns what an engine's ``cond`` says of the conditions."""
    if cond is not None and not isinstance(cond, Mapping):
        raise TypeError(f"cond must map names to shapes or tensors, got {kind(cond)}")
    found = {}
    for name, given in (cond or {}).items():
        if isinstance(given, Tensor):
            found[name] = Spec(tuple(given.shape), given.dtype)
        elif isinstance(given, Sequence) and not isinstance(given, str):
            shape = (whole(f"cond[{name!r}][{i}]", n, low=0) for i, n in enumerate(given))
            found[name] = Spec(tuple(shape), dtype)
        else:
            raise TypeError(
                f"cond[{name!r}] must be a shape without the batch or a tensor, got {shown(given)}"
            )
    return found
