"""The rungs of the ladder: each idea between the original loop and one graph a sample."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

import fastddim
from benchmarks import peers, plain
from fastddim.dropins import ermongroup
from fastddim.loop.model import stacked
from fastddim.loop.own_graphs import own_graphs_off
from fastddim.loop.recording import capture
from fastddim.step import reference

Model: TypeAlias = Callable[..., Tensor]
Run: TypeAlias = Callable[[], Tensor]
T = 1000


@dataclass(frozen=True)
class Case:
    """A model, and the shape, steps and conditions of the sampling."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    steps: int
    dtype: torch.dtype = torch.float32
    cond: Mapping[str, int | tuple[int, ...]] | None = None
    """The model's arguments: a class number, or the shape of a sample's random values."""
    uncond: Mapping[str, int | tuple[int, ...]] | None = None
    guidance: float = 7.5


@dataclass(frozen=True)
class Ready:
    """A case on its device: everything that its rungs read."""

    case: Case
    model: Model
    fast: Callable[[], Model]
    """Returns the model by ``torch.compile``; compiled at the first call."""
    x: Tensor
    betas: Tensor
    seq: range
    table: Tensor
    ddim: fastddim.DDIM
    ts: tuple[Tensor, ...]
    """The model's t of each step, int64 (batch,), from the noisiest level on."""
    cond: dict[str, Tensor]
    uncond: dict[str, Tensor] | None
    both: dict[str, Tensor]

    @property
    def conditions(self) -> dict[str, Any]:
        """The conditions as the sampler's arguments."""
        if self.uncond is None:
            return {"cond": self.cond}
        return {"cond": self.cond, "uncond": self.uncond, "guidance": self.case.guidance}


def prepared(case: Case, device: str) -> Ready:
    """A case with random weights, x_T and conditions."""
    torch.manual_seed(0)
    model = copy.deepcopy(case.make()).to(device, case.dtype).eval().requires_grad_(False)
    batch, x = case.shape[0], torch.randn(case.shape).to(device)

    def given(value: int | tuple[int, ...]) -> Tensor:
        if isinstance(value, int):
            return torch.full((batch,), value, device=device)
        return torch.randn(batch, *value).to(device, case.dtype)

    cond = {name: given(value) for name, value in (case.cond or {}).items()}
    uncond, both = None, {}
    if case.uncond is not None:
        uncond = {name: given(value) for name, value in case.uncond.items()}
        both = stacked(uncond, cond, batch)
    betas, seq = torch.linspace(1e-4, 0.02, T, device=device), range(0, T, T // case.steps)
    levels = [*reversed(seq)]
    table = ermongroup._table(list(seq), betas, 0.0)
    ddim = fastddim.DDIM(spacing=list(zip(levels, [*levels[1:], -1], strict=True)))
    # DDIM computes its table in float64, up to 2e-4 from the original loop's float32 factors. With
    # the original's factors it is as fast, and its results can be equal.
    object.__setattr__(ddim, "table", table.cpu().numpy())
    ts = torch.tensor(levels, device=device)[:, None].expand(-1, batch).unbind()
    fast = functools.cache(lambda: compiled(model))
    return Ready(case, model, fast, x, betas, seq, table, ddim, ts, cond, uncond, both)


def compiled(model: Model) -> Model:
    """The model by ``torch.compile``, which captures its own CUDA graphs."""
    torch.compiler.reset()
    fast: Model = torch.compile(model, mode="reduce-overhead", dynamic=False)

    def call(*args: Any, **more: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # the last result has been read
        return fast(*args, **more)

    return call


def eps_of(ready: Ready, model: Model) -> Model:
    """ε(x, t) as handwritten loops compute it: x cast, one call for both halves of guidance."""
    dtype, w = ready.case.dtype, ready.case.guidance

    def eps(x: Tensor, t: Tensor) -> Tensor:
        x = x.to(dtype)
        if ready.uncond is None:
            return model(x, t, **ready.cond)
        u, c = model(torch.cat([x, x]), torch.cat([t, t]), **ready.both).float().chunk(2)
        return u + w * (c - u)

    return eps


def as_image(ready: Ready) -> tuple[Tensor, Model]:
    """x and the model in four dimensions, as the original loop's factors require."""
    x, eps = ready.x, eps_of(ready, ready.model)
    if x.dim() == 4:
        return x, eps
    return x[:, None], lambda x, t: eps(x[:, 0], t)[:, None]


def original_loop(ready: Ready) -> Run:
    """The original loop, unchanged."""
    x, eps = as_image(ready)

    def run() -> Tensor:
        last = reference.generalized_steps(x, ready.seq, eps, ready.betas)[0][-1]
        return last.view(ready.x.shape)

    return run


def without_copies(ready: Ready) -> Run:
    """The original loop without its copies of each state to the CPU and back."""
    first, eps = as_image(ready)
    b, device, n = ready.betas, first.device, len(first)

    def run() -> Tensor:
        x = first
        for i, j in zip(reversed(ready.seq), [*reversed(ready.seq[:-1]), -1], strict=True):
            t = (torch.ones(n) * i).to(device)
            next_t = (torch.ones(n) * j).to(device)
            at = reference.compute_alpha(b, t.long())
            at_next = reference.compute_alpha(b, next_t.long())
            et = eps(x, t)
            x0_t = (x - et * (1 - at).sqrt()) / at.sqrt()
            c1 = 0.0 * ((1 - at / at_next) * (1 - at_next) / (1 - at)).sqrt()
            c2 = ((1 - at_next) - c1**2).sqrt()
            x = at_next.sqrt() * x0_t + c1 * torch.randn_like(x) + c2 * et
        return x.view(ready.x.shape)

    return run


def eager_step(ready: Ready, model: Model) -> Run:
    """The reference step; factors and timesteps are on the device before the first step."""
    eps, rows = eps_of(ready, model), ready.table.unbind()

    def run() -> Tensor:
        x = ready.x
        for row, t in zip(rows, ready.ts, strict=True):
            # float(): a zero-dimensional float32 factor would leave the product in bfloat16.
            x, _ = reference.ddim_step(x, eps(x, t).float(), row)
        return x

    return run


def plain_loop(ready: Ready) -> Run:
    """The plain loop with its factors as Python floats, which no kernel has to read from memory."""
    eps, rows = eps_of(ready, ready.model), plain.numbers(ready.table)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return eps(x, t).float()

    return lambda: plain.plain(model, ready.x, rows, [False] * len(rows), ready.ts)


def fused(ready: Ready) -> Run:
    options: Any = ready.conditions | {"dtype": ready.case.dtype}
    return lambda: ready.ddim.sample(ready.model, ready.x, **options)


def fused_in_a_graph(ready: Ready, model: Model | None = None) -> Run:
    options: Any = ready.conditions | {"dtype": ready.case.dtype, "device": ready.x.device}
    act = ready.ddim.capture(model or ready.model, ready.case.shape, **options)
    return lambda: act(x_T=ready.x)


def compiled_in_a_graph(ready: Ready) -> Run:
    """The captured loop around the compiled model, whose own CUDA graphs are off in the capture."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the compiled model captures CUDA graphs of its own")
        return fused_in_a_graph(ready, ready.fast())


def compiled_alone_in_a_graph(ready: Ready) -> Run:
    owner = SimpleNamespace(model=ready.fast())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the compiled model captures CUDA graphs of its own")
        with own_graphs_off(owner, "model"):
            return in_a_graph(model_alone(ready, owner.model), ready)


def diffusers_loop(ready: Ready) -> Run:
    """diffusers' scheduler as its pipelines call it: each t is a tensor on the device."""
    scheduler = peers.scheduler("DDIMScheduler", ready.case.steps, ready.x.device)
    eps = eps_of(ready, ready.model)

    def run() -> Tensor:
        x = ready.x
        for t in scheduler.timesteps:
            output = eps(x, t.expand(len(x))).float()
            x = scheduler.step(output, t, x).prev_sample
        return x

    return run


def diffusers_by_number(ready: Ready) -> Run:
    """diffusers' scheduler with each t as a number, which saves its host syncs."""
    scheduler = peers.scheduler("DDIMScheduler", ready.case.steps, ready.x.device)
    eps = eps_of(ready, ready.model)
    numbers = scheduler.timesteps.tolist()

    def run() -> Tensor:
        x = ready.x
        for number, t in zip(numbers, ready.ts, strict=True):
            x = scheduler.step(eps(x, t).float(), number, x).prev_sample
        return x

    return run


@dataclass(frozen=True)
class Replayed:
    """A graph's replay. ``owner`` keeps the memory alive that the graph reads."""

    replay: Run
    owner: object

    def __call__(self) -> Tensor:
        return self.replay()


def in_a_graph(run: Run, ready: Ready) -> Run:
    return Replayed(capture(run, ready.x.device), run)


def model_alone(ready: Ready, model: Model) -> Run:
    """One call of the model a step and nothing in between; inputs are made beforehand."""
    twice, x = ready.uncond is not None, ready.x.to(ready.case.dtype)
    x = torch.cat([x, x]) if twice else x
    ts = [torch.cat([t, t]) if twice else t for t in ready.ts]
    keywords = ready.both if twice else ready.cond

    def run() -> Tensor:
        out = x
        for t in ts:
            out = model(x, t, **keywords)
        return out

    return run


MODELS: dict[str, Callable[[Ready], Run]] = {
    "the model alone": lambda r: model_alone(r, r.model),
    "the model alone, compiled": lambda r: model_alone(r, r.fast()),
    "the model alone, in a graph": lambda r: in_a_graph(model_alone(r, r.model), r),
    "the model alone, compiled, in a graph": compiled_alone_in_a_graph,
}
EAGER, COMPILED, GRAPH, COMPILED_GRAPH = MODELS
ORIGINAL = "the original loop"
TORCH_COMPILE = "eager step, torch.compile(reduce-overhead) of the model"
CAPTURE = "DDIM.capture"
COMPILED_CAPTURE = "DDIM.capture of the compiled model"
RUNGS: dict[str, tuple[Callable[[Ready], Run], str]] = {
    ORIGINAL: (original_loop, EAGER),
    CAPTURE: (fused_in_a_graph, GRAPH),
    "eager step, factors precomputed, in a graph": (
        lambda r: in_a_graph(eager_step(r, r.model), r),
        GRAPH,
    ),
    "DDIM.sample": (fused, EAGER),
    "eager step, factors precomputed": (lambda r: eager_step(r, r.model), EAGER),
    TORCH_COMPILE: (lambda r: eager_step(r, r.fast()), COMPILED),
    COMPILED_CAPTURE: (compiled_in_a_graph, COMPILED_GRAPH),
    plain.NUMBERS: (plain_loop, EAGER),
    "diffusers' DDIMScheduler": (diffusers_loop, EAGER),
    "the original loop, without its copies to the CPU": (without_copies, EAGER),
    "diffusers' DDIMScheduler, timesteps as numbers": (diffusers_by_number, EAGER),
    "diffusers' DDIMScheduler, timesteps as numbers, in a graph": (
        lambda r: in_a_graph(diffusers_by_number(r), r),
        GRAPH,
    ),
}
"""{name: (how the rung is made, the calls of its model alone)}, the most important first."""
BESIDE_COMPILE = (ORIGINAL, TORCH_COMPILE, CAPTURE, COMPILED_CAPTURE)
"""The rungs of a separate case: compiling takes long and may fail."""
PLAIN = tuple(name for name in RUNGS if name not in (TORCH_COMPILE, COMPILED_CAPTURE))
