"""What each idea gains: from the original loop, rung by rung, to one graph a sample.

``benchmarks.gpu`` runs this as its section "ladder", and ``marginal`` as a part of its section
"graph". A rung is a whole call, from x_T on the device to the last x. Its results are compared with
those of the original loop, which is the one people run, before it is timed. What it takes beyond
its model, called as often, in the same way and with nothing in between, is the sampler's.

Cases, and the rungs of a case, stand in the order of their worth: what there is no time for is at
the end, and says so in a row of its own.
"""

from __future__ import annotations

import copy
import functools
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

import fastddim
from benchmarks import peers, plain
from benchmarks.children import Deadline
from benchmarks.timing import (
    LEFT_OUT,
    Record,
    WrongResultError,
    device_seconds,
    interval,
    last_line,
    limit,
    rounded,
    times,
    wall_seconds,
)
from fastddim.dropins import ermongroup
from fastddim.loop.graph import capture
from fastddim.loop.model import stacked
from fastddim.step import reference

Model: TypeAlias = Callable[..., Tensor]
Run: TypeAlias = Callable[[], Tensor]

DEVICE = "cuda"
T = 1000
TOLERANCE = {torch.float32: 2e-2, torch.bfloat16: 1e-1}
"""How far results may be from the original loop's, root mean square by root mean square.

Between two model calls the arithmetic is the same to the last bit, but for diffusers'. In the model
it need not be: in a graph or compiled, libraries may choose other kernels, and by default these
round a convolution's float32 operands to the 11 bits of TF32.
"""
SECONDS = 5.0
"""For the timing of one case, which takes three rounds at least."""
PREPARING = 0.7
"""The part of a case's time in which its rungs are made and checked. The rest is for the timing."""
SHORT, LONG = 10, 60
"""Steps of the two graphs whose difference is the cost of a step."""
HEAD_START = 2_000_000
"""Cycles, about a millisecond: more than the host needs to enqueue ten replays."""
IN_A_GRAPH = 1.3
"""How many empty nodes a step in a graph may take, at most, at the shapes in ``SMALL``."""
SMALL = ((1, 16, 7), (4, 3, 32, 32))
SHAPES = (*SMALL, (64, 3, 32, 32))


# The models


class Block(nn.Module):
    """Two 1-D convolutions beside a skip; the condition scales and shifts what is between them."""

    def __init__(self, into: int, out: int, cond: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv1d(into, out, 5, padding=2), nn.GroupNorm(8, out), nn.Mish()
        )
        self.film = nn.Sequential(nn.Mish(), nn.Linear(cond, 2 * out))
        self.second = nn.Sequential(
            nn.Conv1d(out, out, 5, padding=2), nn.GroupNorm(8, out), nn.Mish()
        )
        self.skip = nn.Conv1d(into, out, 1) if into != out else nn.Identity()

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.film(cond)[:, :, None].chunk(2, 1)
        out: Tensor = self.second(self.first(x) * scale + shift) + self.skip(x)
        return out


class Policy(nn.Module):
    """A small 1-D U-Net over a horizon of actions, as diffusion policies are (Chi et al. 2023)."""

    frequencies: Tensor

    def __init__(
        self, actions: int = 7, cond: int = 64, widths: tuple[int, ...] = (64, 128, 256)
    ) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(0, -4, 32), persistent=False)
        self.time = nn.Sequential(nn.Linear(64, 256), nn.Mish(), nn.Linear(256, 64))
        c = 64 + cond
        self.down = nn.ModuleList(
            Block(a, b, c) for a, b in zip((actions, *widths[:-1]), widths, strict=True)
        )
        self.middle = nn.ModuleList(Block(widths[-1], widths[-1], c) for _ in range(2))
        self.up = nn.ModuleList(
            Block(a + b, a, c) for a, b in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.last = nn.Conv1d(widths[0], actions, 1)

    def forward(self, x: Tensor, t: Tensor, global_cond: Tensor) -> Tensor:
        angles = t.float()[:, None] * self.frequencies
        embedded = self.time(torch.cat([angles.sin(), angles.cos()], 1).to(x.dtype))
        cond = torch.cat([embedded, global_cond], 1)
        x, kept = x.transpose(1, 2), []
        for i, block in enumerate(self.down):
            x = block(nn.functional.avg_pool1d(x, 2) if i else x, cond)
            kept.append(x)
        x = kept.pop()
        for block in self.middle:
            x = block(x, cond)
        for block in self.up:
            wide = nn.functional.interpolate(x, scale_factor=2.0)
            x = block(torch.cat([wide, kept.pop()], 1), cond)
        out: Tensor = self.last(x).transpose(1, 2)
        return out


class UNet(nn.Module):
    """diffusers' UNet2DModel, returning its tensor alone."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        from diffusers import UNet2DModel  # pyright: ignore[reportPrivateImportUsage]

        self.unet = UNet2DModel(**config)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        out: Tensor = self.unet(x, t, class_labels, return_dict=False)[0]
        return out


CIFAR10: Record = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
}
"""google/ddpm-cifar10-32: 35.7 M parameters."""
LATENTS: Record = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (128, 256, 384, 512),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "num_class_embeds": 1001,
}
"""Latents by class. The last class is none."""


@dataclass(frozen=True)
class Case:
    """A model, and what is sampled from it."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    steps: int
    dtype: torch.dtype = torch.float32
    cond: Mapping[str, int | tuple[int, ...]] | None = None
    """The model's arguments: the number of a class, or the size of a sample's random numbers."""
    uncond: Mapping[str, int | tuple[int, ...]] | None = None
    guidance: float = 7.5


def cases() -> list[Case]:
    """In the order of their worth: a small, a middling and a guided model, then other sizes."""
    unet = functools.cache(lambda: UNet(**CIFAR10))  # made once for all four
    latents = functools.cache(lambda: UNet(**LATENTS))

    def images(batch: int, dtype: torch.dtype) -> Case:
        return Case(f"CIFAR-10 U-Net, {batch}", unet, (batch, 3, 32, 32), 20, dtype)

    by_class: Record = {"cond": {"class_labels": 3}, "uncond": {"class_labels": 1000}}
    return [
        Case("robot policy", Policy, (1, 16, 7), 10, cond={"global_cond": (64,)}),
        images(64, torch.bfloat16),
        Case("guided latents", latents, (1, 4, 64, 64), 20, **by_class),
        images(64, torch.float32),
        images(4, torch.bfloat16),
        images(4, torch.float32),
    ]


# The rungs


@dataclass(frozen=True)
class Ready:
    """A case on its device: all that its rungs read."""

    case: Case
    model: Model
    fast: Callable[[], Model]
    """The model compiled."""
    x: Tensor
    betas: Tensor
    seq: range
    table: Tensor
    ddim: fastddim.DDIM
    ts: tuple[Tensor, ...]
    """What the model is told, int64 (batch,), from the noisiest level on."""
    cond: dict[str, Tensor]
    uncond: dict[str, Tensor] | None
    both: dict[str, Tensor]

    @property
    def conditions(self) -> dict[str, Any]:
        """What the sampler is told of them."""
        if self.uncond is None:
            return {"cond": self.cond}
        return {"cond": self.cond, "uncond": self.uncond, "guidance": self.case.guidance}


def prepared(case: Case, device: str) -> Ready:
    """The model with random weights, x_T and conditions, which are random too."""
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
    # Its own table is made in float64, and up to 2e-4 from the original loop's float32 factors.
    # With these it is as fast, and its results can be equal.
    object.__setattr__(ddim, "table", table.cpu().numpy())
    ts = torch.tensor(levels, device=device)[:, None].expand(-1, batch).unbind()
    fast = functools.cache(lambda: compiled(model))
    return Ready(case, model, fast, x, betas, seq, table, ddim, ts, cond, uncond, both)


def compiled(model: Model) -> Model:
    """The model by torch.compile, in its own graphs."""
    torch.compiler.reset()
    fast: Model = torch.compile(model, mode="reduce-overhead", dynamic=False)

    def call(*args: Any, **more: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # what the last call returned has been read
        return fast(*args, **more)

    return call


def eps_of(ready: Ready, model: Model) -> Model:
    """The model as loops written by hand call it: x cast, and asked twice where it is guided."""
    dtype, w = ready.case.dtype, ready.case.guidance

    def eps(x: Tensor, t: Tensor) -> Tensor:
        x = x.to(dtype)
        if ready.uncond is None:
            return model(x, t, **ready.cond)
        u, c = model(torch.cat([x, x]), torch.cat([t, t]), **ready.both).float().chunk(2)
        return u + w * (c - u)

    return eps


def as_image(ready: Ready) -> tuple[Tensor, Model]:
    """x and the model in four dimensions, as many as the original loop's factors have."""
    x, eps = ready.x, eps_of(ready, ready.model)
    if x.dim() == 4:
        return x, eps
    return x[:, None], lambda x, t: eps(x[:, 0], t)[:, None]


def seeds_loop(ready: Ready) -> Run:
    """The original loop, as it is."""
    x, eps = as_image(ready)

    def run() -> Tensor:
        last = reference.generalized_steps(x, ready.seq, eps, ready.betas)[0][-1]
        return last.view(ready.x.shape)

    return run


def without_copies(ready: Ready) -> Run:
    """The same, its states left where they are."""
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
    """The step alone: its factors, and each t, are on the device before the first."""
    eps, rows = eps_of(ready, model), ready.table.unbind()

    def run() -> Tensor:
        x = ready.x
        for row, t in zip(rows, ready.ts, strict=True):
            # float(): a factor without dimensions would not raise bfloat16 to its own type.
            x, _ = reference.ddim_step(x, eps(x, t).float(), row)
        return x

    return run


def plain_loop(ready: Ready) -> Run:
    """The six lines, their factors being Python floats, which no launch has to read."""
    eps, rows = eps_of(ready, ready.model), plain.numbers(ready.table)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return eps(x, t).float()

    return lambda: plain.plain(model, ready.x, rows, [False] * len(rows), ready.ts)


def fused(ready: Ready) -> Run:
    options: Any = ready.conditions | {"dtype": ready.case.dtype}
    return lambda: ready.ddim.sample(ready.model, ready.x, **options)


def fused_in_a_graph(ready: Ready) -> Run:
    options: Any = ready.conditions | {"dtype": ready.case.dtype, "device": ready.x.device}
    act = ready.ddim.capture(ready.model, ready.case.shape, **options)
    return lambda: act(x_T=ready.x)


def diffusers_loop(ready: Ready) -> Run:
    """The scheduler as diffusers' pipelines run it: each t a tensor on the device."""
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
    """The scheduler told each t as a number, without which it asks the device for its value."""
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
    """A graph's replay, beside what owns the memory that the graph reads."""

    replay: Run
    owner: object

    def __call__(self) -> Tensor:
        return self.replay()


def in_a_graph(run: Run, ready: Ready) -> Run:
    return Replayed(capture(run, ready.x.device), run)


def model_alone(ready: Ready, model: Model) -> Run:
    """As many calls of the model as there are steps, all they read being made beforehand."""
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
}
EAGER, COMPILED, GRAPH = MODELS
SEED = "the original loop"
TORCH_COMPILE = "eager step, torch.compile(reduce-overhead) of the model"
CAPTURE = "DDIM.capture"
RUNGS: dict[str, tuple[Callable[[Ready], Run], str]] = {
    SEED: (seeds_loop, EAGER),
    "DDIM.sample": (fused, EAGER),
    CAPTURE: (fused_in_a_graph, GRAPH),
    "eager step, factors made before": (lambda r: eager_step(r, r.model), EAGER),
    TORCH_COMPILE: (lambda r: eager_step(r, r.fast()), COMPILED),
    plain.NUMBERS: (plain_loop, EAGER),
    "diffusers' DDIMScheduler": (diffusers_loop, EAGER),
    "the original loop, without its copies to the CPU": (without_copies, EAGER),
    "eager step, factors made before, in a graph": (
        lambda r: in_a_graph(eager_step(r, r.model), r),
        GRAPH,
    ),
    "diffusers' DDIMScheduler, told numbers": (diffusers_by_number, EAGER),
    "diffusers' DDIMScheduler, told numbers, in a graph": (
        lambda r: in_a_graph(diffusers_by_number(r), r),
        GRAPH,
    ),
}
"""How each is made, and which calls of the model it is held against: the worthiest first."""
PLAIN = tuple(name for name in RUNGS if name != TORCH_COMPILE)
BESIDE_COMPILE = (SEED, TORCH_COMPILE, CAPTURE)
"""A case of its own beside the others, for it takes long and may not be had at all."""


# The measurements


def compared(what: str, got: Tensor, want: Tensor, tolerance: float) -> Record:
    """How far from what the original loop gives; beyond the tolerance it is wrong."""
    got, want = got.cpu(), want.cpu()
    gap = got.double() - want.double()
    off = (gap.square().mean() / want.double().square().mean()).sqrt().item()
    if got.shape != want.shape or not off <= tolerance:  # NaN is beyond it too
        raise WrongResultError(f"{what} is {off:.3g} off the original loop, allowed: {tolerance:g}")
    return {
        "bit_equal": torch.equal(got, want),
        "max_difference": rounded(gap.abs().max().item()),
        "relative_difference": rounded(off),
        "tolerance": tolerance,
    }


def tried(make: Callable[[], Run], seconds: float) -> tuple[Run, Tensor]:
    """A run, and what it gives the second time: nothing that is left of the first may show."""
    with limit(seconds):
        run = make()
        run()
        return run, run().clone()


class Rungs:
    """The rungs of one case that could be had, and why the others could not.

    Attributes:
        runs: those that are right, by name, and the models' calls that they are held against.
        found: how far each rung's result is from the original loop's.
        without: for each other rung and model, what its row says instead.
    """

    def __init__(self, ready: Ready, names: tuple[str, ...], deadline: Deadline) -> None:
        self.runs: dict[str, Run] = {}
        self.found: dict[str, Record] = {}
        self.without: dict[str, Record] = {}
        want: Tensor | None = None
        for name in names:
            make, model = RUNGS[name]
            got = self._have(name, functools.partial(make, ready), deadline)
            want = got if name == SEED else want
            if want is None:
                # There is nothing to compare with, and nothing is timed that was not compared.
                return
            if got is None:
                continue
            try:
                dtype = ready.case.dtype
                what = f"{ready.case.name}, {dtype}: {name}"
                self.found[name] = compared(what, got, want, TOLERANCE[dtype])
            except WrongResultError as error:
                del self.runs[name]
                self.without[name] = {"wrong": str(error)}
                continue
            if model not in self.runs and model not in self.without:
                self._have(model, functools.partial(MODELS[model], ready), deadline)

    def _have(self, name: str, make: Callable[[], Run], deadline: Deadline) -> Tensor | None:
        if deadline.over():
            self.without[name] = LEFT_OUT
            return None
        try:
            self.runs[name], result = tried(make, deadline.left())
        except TimeoutError as error:
            self.without[name] = {"left_out": f"no time: it {error}"}
        except Exception as error:
            traceback.print_exc()
            self.without[name] = {"failed": last_line(error)}
        else:
            return result
        return None


def ladder(case: Case, names: tuple[str, ...], device: str, deadline: Deadline) -> Iterator[Record]:
    """These rungs of one case, the first being the original loop. What cannot be had says why."""
    shown = {
        "case": case.name if names == PLAIN else f"{case.name}, beside torch.compile",
        "shape": list(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "steps": case.steps,
    }
    preparing = deadline.part(PREPARING)
    try:
        with limit(preparing.left()):
            ready = prepared(case, device)
    except Exception as error:
        late = isinstance(error, TimeoutError)
        yield shown | (LEFT_OUT if late else {"failed": last_line(error)})
        return
    rungs = Rungs(ready, names, preparing)
    if SEED not in rungs.runs:
        yield shown | {"rung": SEED, **rungs.without[SEED]}
        return
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    taken = wall_seconds(rungs.runs, wait, min(SECONDS, deadline.left()))
    for name in (*names, *MODELS):
        row = shown | {"rung": name}
        if name in rungs.without:
            yield row | rungs.without[name]
        elif name in taken:
            yield row | timed(name, taken, case.steps) | rungs.found.get(name, {})


def timed(name: str, taken: dict[str, list[float]], steps: int) -> Record:
    """What a rung took, beside the original loop and beside its model's calls alone."""
    seconds = taken[name]
    row: Record = {
        "ms": [rounded(s * 1e3) for s in interval(seconds)],
        "ms_per_step": rounded(interval(seconds)[0] * 1e3 / steps),
        "rounds": len(seconds),
    }
    if name in MODELS:
        return row
    row["times_faster"] = times(taken[SEED], seconds)
    model = taken.get(RUNGS[name][1])
    if model is not None:
        beside = [(a - b) / steps for a, b in zip(seconds, model, strict=True)]
        row["us_per_step_beside_model"] = [rounded(s * 1e6) for s in interval(beside)]
    return row


def plan() -> list[tuple[str, Case, tuple[str, ...], float]]:
    """(name, case, rungs, share of the time) in the order of their worth.

    The first three cases come before any other, each with the model compiled too. Compiling takes
    most of its case's time.
    """
    every = cases()
    policy, images, latents, *rest = every
    order = [
        (policy, PLAIN, 1.0),
        (images, PLAIN, 3.0),
        (latents, PLAIN, 3.0),
        (policy, BESIDE_COMPILE, 3.0),
        (images, BESIDE_COMPILE, 5.0),
        (latents, BESIDE_COMPILE, 5.0),
    ]
    order += [(case, PLAIN, 2.0) for case in rest]
    names = {PLAIN: "", BESIDE_COMPILE: ", beside torch.compile"}
    return [
        (f"{case.name}{names[rungs]}, {str(case.dtype).removeprefix('torch.')}", case, rungs, share)
        for case, rungs, share in order
    ]


def chain(shape: tuple[int, ...], eta: float, steps: int, device: str) -> tuple[Run, Run]:
    """Replays of the sampler's graph whose model launches nothing, and of as many small kernels."""
    ddim, eps = fastddim.DDIM(steps=steps, eta=eta), torch.randn(shape, device=device)
    seeds, one = range(shape[0]), torch.zeros(1, device=device)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return eps

    act = ddim.capture(model, shape, device=device)
    want = ddim.sample(model, shape=shape, seeds=seeds, device=device)
    if not all(torch.equal(act(seeds=seeds), want) for _ in range(2)):
        raise WrongResultError(f"DDIM.capture at {shape}, eta {eta:g}, {steps} steps is not sample")

    def small() -> Tensor:
        for _ in range(steps):
            one.add_(1)
        return one

    return Replayed(act._replay, act), Replayed(capture(small, one.device), one)


def marginal(
    shape: tuple[int, ...], eta: float, device: str, deadline: Deadline, rounds: int = 30
) -> Iterator[Record]:
    """What one more step costs in a graph, between model calls that cost nothing.

    It is held against one more kernel that adds to a single element, as good as an empty node.
    """
    together = 10
    runs: dict[str, Callable[[], object]] = {}
    for steps in (SHORT, LONG):
        for name, replay in zip(("step", "small"), chain(shape, eta, steps, device), strict=True):

            def some(replay: Run = replay) -> None:
                for _ in range(together):
                    replay()

            runs[f"{name} {steps}"] = some
    taken = device_seconds(runs, together, rounds, HEAD_START)
    us = {name: [second * 1e6 for second in seconds] for name, seconds in taken.items()}

    def each(name: str) -> list[float]:
        pairs = zip(us[f"{name} {LONG}"], us[f"{name} {SHORT}"], strict=True)
        return [(long - short) / (LONG - SHORT) for long, short in pairs]

    step, small = each("step"), each("small")
    row: Record = {
        "shape": list(shape),
        "eta": eta,
        "us_per_step": interval(step),
        "us_per_small_kernel": interval(small),
        "of_small_kernel": times(step, small),
    }
    if shape in SMALL:
        row |= {"asked": IN_A_GRAPH, "met": row["of_small_kernel"][0] <= IN_A_GRAPH}
    yield row | {
        f"us_{steps}_{what}": interval(us[f"{name} {steps}"])[0]
        for name, what in (("step", "steps"), ("small", "small_kernels"))
        for steps in (SHORT, LONG)
    }
