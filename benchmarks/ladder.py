"""What each idea gains: from the loop people run, rung by rung, to one graph a sample.

``benchmarks.gpu`` runs this as its sections "marginal" and "ladder". A rung is a whole call, from
x_T on the device to the last x. Its results are compared with those of the loop people run before
anything is timed. What it takes beyond its model, called as often, in the same way and with nothing
in between, is the sampler's.
"""

from __future__ import annotations

import copy
import functools
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

import fastddim
from benchmarks import peers
from benchmarks.timing import (
    Record,
    WrongResultError,
    device_seconds,
    last_line,
    rounded,
    wall_seconds,
)
from fastddim import reference
from fastddim.dropins import ermongroup
from fastddim.graph import record
from fastddim.predict import stacked

Model: TypeAlias = Callable[..., Tensor]
Run: TypeAlias = Callable[[], Tensor]

DEVICE = "cuda"
T = 1000
TOLERANCE = {torch.float32: 2e-2, torch.bfloat16: 1e-1}
"""How far results may be from the seed's loop, root mean square by root mean square.

Between two model calls the arithmetic is the same to the last bit, but for diffusers'. In the model
it need not be: in a graph or compiled, libraries may choose other kernels, and by default these
round a convolution's float32 operands to the 11 bits of TF32.
"""
SECONDS = 5.0
"""For the timing of one case, which takes three rounds at least."""
LIMIT = 60.0
"""For the preparation of one rung."""
COMPILE_LIMIT = 120.0
COMPILE_SECONDS = 60.0
"""After which no further model is compiled, counted from the first."""
SHORT, LONG = 10, 60
"""Steps of the two graphs whose difference is the cost of a step."""
HEAD_START = 2_000_000
"""Cycles, about a millisecond: more than the host needs to enqueue ten replays."""
SHAPES = ((64, 3, 32, 32), (1, 16, 7))


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
    """From the model that costs the least to the one that costs the most."""
    policy = Case("robot policy", Policy, (1, 16, 7), 10, cond={"global_cond": (64,)})
    unet = functools.cache(lambda: UNet(**CIFAR10))  # made once for all four
    images = [
        Case(f"CIFAR-10 U-Net, {batch}", unet, (batch, 3, 32, 32), 20, dtype)
        for batch in (4, 64)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    latents = functools.cache(lambda: UNet(**LATENTS))
    by_class: Record = {"cond": {"class_labels": 3}, "uncond": {"class_labels": 1000}}
    return [policy, *images, Case("guided latents", latents, (1, 4, 64, 64), 20, **by_class)]


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
    # Its own table is made in float64, and up to 2e-4 from the seed's. With the seed's it is as
    # fast, and its results can be equal.
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
    """x and the model in four dimensions, which is how many the seed's factors have."""
    x, eps = ready.x, eps_of(ready, ready.model)
    if x.dim() == 4:
        return x, eps
    return x[:, None], lambda x, t: eps(x[:, 0], t)[:, None]


def seeds_loop(ready: Ready) -> Run:
    """The loop people run, as it is."""
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


def in_a_graph(run: Run, ready: Ready) -> Run:
    return record(run, ready.x.device)


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
SEED = "the seed's loop"
TORCH_COMPILE = "eager step, torch.compile(reduce-overhead) of the model"
CAPTURE = "DDIM.capture"
RUNGS: dict[str, tuple[Callable[[Ready], Run], str]] = {
    SEED: (seeds_loop, EAGER),
    "without its copies to the CPU": (without_copies, EAGER),
    "eager step, factors made before": (lambda r: eager_step(r, r.model), EAGER),
    "the same in a graph": (lambda r: in_a_graph(eager_step(r, r.model), r), GRAPH),
    TORCH_COMPILE: (lambda r: eager_step(r, r.fast()), COMPILED),
    "DDIM.sample": (fused, EAGER),
    CAPTURE: (fused_in_a_graph, GRAPH),
    "diffusers' DDIMScheduler": (diffusers_loop, EAGER),
    "the same, told numbers": (diffusers_by_number, EAGER),
    "the same in a graph, told numbers": (lambda r: in_a_graph(diffusers_by_number(r), r), GRAPH),
}
"""How each is made, and which calls of the model it is held against."""
PLAIN = tuple(name for name in RUNGS if name != TORCH_COMPILE)
BESIDE_COMPILE = (SEED, TORCH_COMPILE, CAPTURE)
"""Apart from the others and after them, for it takes long and may not be had at all."""


# The measurements


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raises ``TimeoutError`` in what takes longer, be it waiting for others."""

    def over(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Stopwatch:
    """Whether there is time left, from the first question on."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.end: float | None = None

    def over(self) -> bool:
        now = time.monotonic()
        self.end = now + self.seconds if self.end is None else self.end
        return now >= self.end


def compared(what: str, got: Tensor, want: Tensor, tolerance: float) -> Record:
    """How far from what the seed's loop gives; beyond the tolerance it is wrong."""
    got, want = got.cpu(), want.cpu()
    gap = got.double() - want.double()
    off = (gap.square().mean() / want.double().square().mean()).sqrt().item()
    if got.shape != want.shape or not off <= tolerance:  # NaN is beyond it too
        raise WrongResultError(f"{what} is {off:.3g} off the seed's loop, allowed: {tolerance:g}")
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


def ladder(
    case: Case,
    names: tuple[str, ...] = PLAIN,
    device: str = DEVICE,
    seconds: float = SECONDS,
    watch: Stopwatch | None = None,
) -> Iterator[Record]:
    """These rungs of one case, the first being the seed's loop. One that cannot be had says why."""
    shown = {
        "case": case.name if names == PLAIN else f"{case.name}, beside torch.compile",
        "shape": list(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "steps": case.steps,
    }
    failures: dict[str, str] = {}
    runs: dict[str, Run] = {}
    found: dict[str, Record] = {}

    def have(name: str, make: Callable[[], Run], seconds: float) -> Tensor | None:
        try:
            runs[name], result = tried(make, seconds)
        except Exception as error:
            traceback.print_exc()
            failures[name] = last_line(error)
            return None
        return result

    try:
        if watch is not None and watch.over():
            raise TimeoutError(f"left out: {watch.seconds:g} s are over")
        with limit(LIMIT):
            ready = prepared(case, device)
    except Exception as error:
        yield shown | {"rung": names[1], "failed": last_line(error)}
        return
    want = None
    for name in names:
        make = functools.partial(RUNGS[name][0], ready)
        got = have(name, make, COMPILE_LIMIT if name == TORCH_COMPILE else LIMIT)
        want = got if name == SEED else want
        if want is None:
            yield shown | {"rung": name, "failed": failures[name]}
            return
        if got is not None:
            what = f"{case.name}, {shown['dtype']}: {name}"
            found[name] = compared(what, got, want, TOLERANCE[case.dtype])
    for model in dict.fromkeys(RUNGS[name][1] for name in found):
        have(model, functools.partial(MODELS[model], ready), LIMIT)
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    taken = wall_seconds(runs, wait, seconds)
    ms = {name: statistics.median(s) * 1e3 for name, s in taken.items()}
    for name in (*names, *(model for model in MODELS if model in runs or model in failures)):
        row = shown | {"rung": name}
        if name in failures:
            yield row | {"failed": failures[name]}
            continue
        row |= {
            "ms": rounded(ms[name]),
            "ms_low": rounded(min(taken[name]) * 1e3),
            "ms_high": rounded(max(taken[name]) * 1e3),
            "ms_per_step": rounded(ms[name] / case.steps),
        }
        if name in found:
            model = RUNGS[name][1]
            row |= {
                "ms_per_step_beside_model": rounded((ms[name] - ms[model]) / case.steps)
                if model in ms
                else None,
                "times_faster": rounded(ms[SEED] / ms[name]),
                **found[name],
            }
        yield row | {"rounds": len(taken[name])}


def ladders(seconds: float = SECONDS, compile_seconds: float = COMPILE_SECONDS) -> list[Any]:
    """Every case, and then those whose model can be compiled as long as there is time."""
    watch, every = Stopwatch(compile_seconds), cases()
    plain = [ladder(case, seconds=seconds) for case in every]
    beside = [ladder(case, BESIDE_COMPILE, seconds=seconds, watch=watch) for case in every]
    return [*plain, *beside]


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

    return act._replay, record(small, one.device)


def marginal(
    shape: tuple[int, ...], eta: float, rounds: int = 30, device: str = DEVICE
) -> Iterator[Record]:
    """What one more step costs in a graph, between model calls that cost nothing."""
    together = 10
    runs: dict[str, Callable[[], object]] = {}
    for steps in (SHORT, LONG):
        for name, replay in zip(("step", "small"), chain(shape, eta, steps, device), strict=True):

            def some(replay: Run = replay) -> None:
                for _ in range(together):
                    replay()

            runs[f"{name} {steps}"] = some
    taken = device_seconds(runs, together, rounds, HEAD_START)
    us = {name: statistics.median(s) * 1e6 for name, s in taken.items()}
    each = {n: (us[f"{n} {LONG}"] - us[f"{n} {SHORT}"]) / (LONG - SHORT) for n in ("step", "small")}
    yield {
        "shape": list(shape),
        "eta": eta,
        "us_per_step": rounded(each["step"]),
        "us_per_small_kernel": rounded(each["small"]),
        "us_beyond_it": rounded(each["step"] - each["small"]),
        f"us_{SHORT}_steps": rounded(us[f"step {SHORT}"]),
        f"us_{LONG}_steps": rounded(us[f"step {LONG}"]),
        f"us_{SHORT}_small_kernels": rounded(us[f"small {SHORT}"]),
        f"us_{LONG}_small_kernels": rounded(us[f"small {LONG}"]),
    }


def marginals() -> list[Iterator[Record]]:
    return [marginal(shape, eta) for shape in SHAPES for eta in (0.0, 1.0)]
