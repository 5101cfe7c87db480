"""What is measured on a GPU, one section a process: ``benchmarks.gpu`` starts them.

    python -m benchmarks.gpu_sections variants --seconds 60    # one alone: JSON lines, nothing kept

Device times are those of CUDA graphs, whose launches wait for no Python: contenders take turns,
and each launch reads memory that no launch before it left in the cache. Nothing is timed whose
results, those of the very graph, were not found right first; what is wrong gives a row that says
so. A section is a list of parts. One that raises costs itself alone, and where it leaves the GPU
unusable (an illegal address ends every later launch of a process), this process ends with
``DEAD``: a new one can go on with the next part (``--begin``).
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import fastddim
from benchmarks import ladder, plain, sanitizer
from benchmarks.checks import Given, as_step, checked_graph, differ, differing
from benchmarks.children import Deadline, Pipe
from benchmarks.loop import SEED, contenders, others
from benchmarks.peers import PEERS, SIGMAS, Loops, simplified, simplified_factors, simplified_noisy
from benchmarks.timing import (
    LEFT_OUT,
    Call,
    Record,
    WrongResultError,
    by,
    captured,
    device_seconds,
    host_seconds,
    interval,
    last_line,
    limit,
    rounded,
    times,
    wall_seconds,
)
from benchmarks.variants import VARIANTS, Variant, launch_arguments
from fastddim.step import backends, reference
from fastddim.step.bound import Bound
from fastddim.step.philox import STEP_STREAM

DEVICE = "cuda"
ELEMENTS = 64 * 3 * 256 * 256
FOOTPRINT = 8
"""The memory that launches go round in, in sizes of the L2."""
LAUNCHES = 64
ROUNDS = 25
SMALL = (4, 8, 8)
"""A sample too small for its step to matter, beside the Python of a call."""
CHUNK = 1 << 20
"""The size of a copy's tensors is a multiple of these bytes. On an H200 a copy of 76,079,248 bytes
ran at 2690 GB/s, and one of 75,497,472 at 4080: the slower one would be no yardstick."""
TUNED = ("epsilon philox", "epsilon philox rows x0", "epsilon")
CHOICES = (
    *((256, parts, warps) for warps in (4, 8) for parts in (1, 2, 4, 8)),
    *((fours, parts, 4) for fours in (128, 512) for parts in (1, 4)),
)
"""Elements of a program's block in fours, its blocks and its warps."""
LOOPS = (((1, 16, 7), 10), ((64, 3, 32, 32), 50), ((1, 4, 64, 64), 50), ((64, 3, 256, 256), 20))
"""Shapes and steps of the loops without their model: a robot's actions, CIFAR-10, latents, large
images."""
LARGE = 1 << 20
NODES = ((1, 4, 64, 64), (4, 3, 32, 32))
"""Shapes of the steps that are captured by hand, and how many of them a graph holds."""
STEPS = 50
DEAD = 3
"""The exit status of a process whose GPU does not answer any more."""
Rows: TypeAlias = Iterator[tuple[str, Record]]


@dataclass(frozen=True)
class Sizes:
    """How much is measured, and of what.

    Attributes:
        elements: of a variant's state, at least.
        rounds: of the section "variants" and "peers".
        variants: the names of the variants that are measured.
    """

    elements: int = ELEMENTS
    rounds: int = ROUNDS
    variants: tuple[str, ...] = tuple(VARIANTS)


@dataclass(frozen=True)
class Part:
    """Some rows of a section that are measured together.

    Attributes:
        key: the record's, under which its rows stand.
        label: what a row says of itself where it has nothing else to say.
        rows: measures them in the time that it is given.
        weight: its share of the section's time, beside the weights of the later parts.
    """

    key: str
    label: Record
    rows: Callable[[Deadline], Iterable[Record]] = field(repr=False)
    weight: float = 1.0


# What is asked


def asked(v: Variant) -> float:
    """The part of a copy's bytes per second that this variant must reach: the least of its kinds.

    A step without noise can be as fast as a copy; each further stream, and each narrower access,
    costs some of that on every GPU.
    """
    found = [0.99]
    if v.noise == "philox":
        found.append(0.975)
    if v.dtype != torch.float32 or v.next_inputs:
        found.append(0.955)
    if v.want_x0 or v.guidance or v.threshold:
        found.append(0.955)
    if v.channels_last and v.noise != "none" and v.shape[0] in (3, 4):
        found.append(0.93)
    if v.mixed:
        found.append(0.93)
    if v.channels_last and v.learned:
        found.append(0.90)
    return min(found)


AGAINST_COMPILED = 1.0
"""How often a step must fit into that of ``torch.compile`` of the simplified maths, at least."""


# What is timed, and how


def moved_bytes(v: Variant) -> int:
    """Read and written for an element: ``bytes_per_element``, in whole sectors of 32 bytes.

    A learned variance that lies between the pixels is read along with them.
    """
    between = v.dtype.itemsize if v.learned and v.channels_last else 0
    return v.bytes_per_element + between


def sets_of(set_bytes: int) -> int:
    """How many sets of tensors to go round in."""
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, -(-FOOTPRINT * l2 // set_bytes))


def copies(total: int, count: int) -> tuple[dict[str, Call], dict[str, int]]:
    """A copy and an addition, and the bytes that each moves: ``total``, in whole chunks."""
    streams = {"copy": 2, "add": 3}
    size = {name: -(-total // (n * CHUNK)) * CHUNK for name, n in streams.items()}

    def tensors(name: str) -> list[list[Tensor]]:
        """``count`` tensors for each of its streams."""
        n = size[name] // 4
        return [[torch.randn(n, device=DEVICE) for _ in range(count)] for _ in range(streams[name])]

    a, b = tensors("copy")
    p, q, r = tensors("add")

    def copy(i: int) -> object:
        return b[i % count].copy_(a[i % count])

    def add(i: int) -> object:
        return torch.add(p[i % count], q[i % count], out=r[i % count])

    return {"copy": copy, "add": add}, {name: n * size[name] for name, n in streams.items()}


def launches_of(v: Variant, elements: int) -> tuple[list[Given], int]:
    """Sets of arguments for the launcher, and the bytes that a launch on one of them moves."""
    n = v.shape[0] * v.shape[1] * v.shape[2]
    batch = -(-elements // n)
    total = moved_bytes(v) * batch * n
    return [launch_arguments(v, batch, DEVICE, seed=i) for i in range(sets_of(total))], total


# The measurements


def variant(name: str, sizes: Sizes, deadline: Deadline) -> Iterator[Record]:
    """A variant's bytes per second beside those of a copy and an addition."""
    v = VARIANTS[name]
    sets, total = launches_of(v, sizes.elements)
    graphs = {"step": checked_graph(name, sets, LAUNCHES)}
    calls, moved = copies(total, len(sets))
    moved["step"] = total
    graphs |= {k: captured(c, LAUNCHES) for k, c in calls.items()}
    taken = device_seconds({k: g.replay for k, (g, _) in graphs.items()}, LAUNCHES, sizes.rounds)
    per_byte = {k: [second / moved[k] for second in s] for k, s in taken.items()}
    gb_per_s = {k: rounded(1e-9 / statistics.median(s)) for k, s in per_byte.items()}
    of_copy = times(per_byte["copy"], per_byte["step"])
    yield {
        "variant": name,
        "shape": list(sets[0]["x"].shape),
        "bytes_per_element": v.bytes_per_element,
        "bytes_moved": moved_bytes(v),
        "us": [rounded(s * 1e6) for s in interval(taken["step"])],
        "gb_per_s": gb_per_s["step"],
        "copy_gb_per_s": gb_per_s["copy"],
        "add_gb_per_s": gb_per_s["add"],
        "of_copy": of_copy,
        "of_add": times(per_byte["add"], per_byte["step"]),
        "asked": asked(v),
        "met": of_copy[0] >= asked(v),
    }


def yardsticks(sizes: Sizes, deadline: Deadline) -> Iterator[Record]:
    """The copy that all is held against, as a graph's node and as a plain call: alike, or not?"""
    total = 12 * sizes.elements
    count = sets_of(total)
    calls, moved = copies(total, count)
    graph, _ = captured(calls["copy"], LAUNCHES)

    def on_a_stream() -> None:
        for i in range(LAUNCHES):
            calls["copy"](i)

    taken = device_seconds({"graph": graph.replay, "stream": on_a_stream}, LAUNCHES, sizes.rounds)
    rates = {name: moved["copy"] / statistics.median(s) / 1e9 for name, s in taken.items()}
    # The clocks are read while the device is at work, for a second or so.
    for _ in range(int(1.5 / (LAUNCHES * statistics.median(taken["graph"])))):
        graph.replay()
    found: Record = {f"copy_{name}_gb_per_s": rounded(rate) for name, rate in rates.items()}
    found["clocks_under_load"] = clocks()
    torch.cuda.synchronize()
    yield found


COMPILED = "torch.compile, simplified"
BY_NUMBERS = "eager, factors made before as numbers"
STEP_TOLERANCE = 1e-3
"""How far a step may be from the reference whose factors are rounded otherwise."""


def peers(sizes: Sizes, deadline: Deadline) -> Iterator[Record]:
    """One step as people run it: eager PyTorch, and the simplified maths compiled."""
    launches = min(24, LAUNCHES)
    sets, _ = launches_of(VARIANTS["epsilon"], sizes.elements)
    noisy, _ = launches_of(VARIANTS["epsilon philox"], sizes.elements)
    count = len(sets)
    xs, outputs = [s["x"] for s in sets], [s["output"] for s in sets]
    row = sets[0]["table"][0]
    p, q, c1 = simplified_factors(row)

    def eager(i: int) -> object:
        return reference.ddim_step(xs[i % count], outputs[i % count], row)

    def eager_noisy(i: int) -> object:
        x = xs[i % count]
        return reference.ddim_step(x, outputs[i % count], row, torch.randn_like(x))

    factors = plain.numbers(row[None])

    def by_numbers(i: int) -> Tensor:
        output = outputs[i % count]
        return plain.plain(lambda x, t: output, xs[i % count], factors, [False], [None])

    graphs = {
        "fastddim": checked_graph("epsilon", sets, launches),
        "fastddim, counter noise": checked_graph("epsilon philox", noisy, launches),
        "eager": captured(eager, launches),
        "eager, randn_like (the original loop's step)": captured(eager_noisy, launches),
    }
    without: dict[str, Record] = {}
    gap = (by_numbers(0) - reference.ddim_step(xs[0], outputs[0], row)[0]).abs().max().item()
    if gap <= STEP_TOLERANCE:
        graphs[BY_NUMBERS] = captured(by_numbers, launches)
    else:
        without[BY_NUMBERS] = {"wrong": f"{BY_NUMBERS}: off by {gap:g}"}

    def compiled(name: str, function: Any, *factors: Tensor) -> None:
        try:
            with limit(deadline.left()):
                fast: Any = torch.compile(function, dynamic=False)
                exact, _ = reference.ddim_step(xs[0], outputs[0], row)
                rest = fast(xs[0], outputs[0], *factors) - exact
                error = rest.abs().max().item()
                moments = (rest / c1).mean().item(), (rest / c1).std().item() - 1
                graph = captured(
                    lambda i: fast(xs[i % count], outputs[i % count], *factors), launches
                )
        except Exception as failure:  # of a compiler that this machine lacks, say
            without[name] = {"failed": last_line(failure)}
            return
        # Of its own noise, as of normals, mean and deviation are known.
        allowed = max(0.01, SIGMAS / math.sqrt(rest.numel()))
        if error > STEP_TOLERANCE if len(factors) == 2 else max(map(abs, moments)) > allowed:
            without[name] = {"wrong": f"{name}: off by {error:g}, noise by {moments}"}
            return
        graphs[name] = graph

    compiled(COMPILED, simplified, p, q)
    compiled(f"{COMPILED}, randn_like", simplified_noisy, p, q, c1)
    taken = device_seconds({k: g.replay for k, (g, _) in graphs.items()}, launches, sizes.rounds)
    for name, seconds in taken.items():
        found: Record = {
            "step": name,
            "us": [rounded(s * 1e6) for s in interval(seconds)],
            "times_fastddim": times(seconds, taken["fastddim"]),
        }
        if name == COMPILED:
            met = found["times_fastddim"][0] >= AGAINST_COMPILED
            found |= {"asked": AGAINST_COMPILED, "met": met}
        yield found
    for name, reason in without.items():
        yield {"step": name, **reason}


class WithWarps:
    """The kernel, launched with another number of warps."""

    def __init__(self, kernel: Any, warps: int) -> None:
        self.kernel, self.warps = kernel, warps

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        launched = self.kernel[grid]
        return lambda *args, **options: launched(*args, **(options | {"num_warps": self.warps}))


@contextmanager
def block(fours: int, parts: int, warps: int) -> Iterator[None]:
    """Every step's launch takes these instead of what ``geometry.block_of`` chooses."""
    import fastddim_kernels.geometry
    import fastddim_kernels.launch

    geometry: Any = fastddim_kernels.geometry
    launch: Any = fastddim_kernels.launch

    with (
        mock.patch.object(geometry, "block_of", return_value=(fours, parts)),
        mock.patch.object(launch, "ddim_step_kernel", WithWarps(launch.ddim_step_kernel, warps)),
    ):
        yield


def tuning(names: tuple[str, ...], sizes: Sizes, deadline: Deadline) -> Iterator[Record]:
    """How the time depends on the constants of ``geometry.block_of``, as far as there is time.

    This is exploratory: nothing is claimed of it, and the launcher does not read it.
    """
    tensors = {name: launches_of(VARIANTS[name], sizes.elements) for name in names}
    launches = min(32, LAUNCHES)
    for fours, parts, warps in CHOICES:
        for name, (sets, total) in tensors.items():
            if deadline.over():
                return
            choice = {"variant": name, "fours": fours, "parts": parts, "warps": warps}
            with block(fours, parts, warps):
                what = f"{name} {fours, parts, warps}"
                graph, _ = checked_graph(what, sets, launches, every=False)
            taken = device_seconds({"step": graph.replay}, launches, 9)["step"]
            yield choice | {
                "us": [rounded(s * 1e6) for s in interval(taken)],
                "gb_per_s": rounded(total / statistics.median(taken) / 1e9),
            }


ADD, DDIM_STEP, SAMPLE = "torch.add(out=)", "fastddim.ddim_step", "DDIM.sample"
TOLD: dict[str, Callable[[Tensor], Any]] = {
    "told numbers": Tensor.tolist,
    "told CUDA tensors": Tensor.unbind,
}
FAST, THEIRS = (
    {how: f"{name}, {how}" for how in TOLD}
    for name in ("FastDDIMScheduler", "diffusers' DDIMScheduler")
)
OF_ADD = {DDIM_STEP: 4.0, SAMPLE: 2.5, **dict.fromkeys(FAST.values(), 4.0)}
"""How many times ``torch.add(out=)`` each may cost the host, at most."""
AGAINST_DIFFUSERS = 8.0
"""How often our scheduler must fit into diffusers', both being told CUDA tensors, at least."""
HOST_ROUNDS = 60


def loops_of_host() -> tuple[dict[str, Callable[[], object]], dict[str, Record]]:
    """Loops of ``STEPS`` steps whose results are right, and why others are not there."""
    made = Loops((1, *SMALL), STEPS, 0.0, DEVICE)
    right = partial(made.equal, want=lambda: made.eager(None))
    wanted: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
        SAMPLE: (lambda: made.sample, right),
        plain.NUMBERS: (lambda: PEERS["plain"].make(made), made.as_reference),
    }
    for how, told in TOLD.items():
        for name, ours in (("FastDDIMScheduler", True), ("DDIMScheduler", False)):
            title = (FAST if ours else THEIRS)[how]
            wanted[title] = partial(made.scheduled, name, told), made.near
    runs: dict[str, Callable[[], object]] = {}
    without: dict[str, Record] = {}
    for name, (make, check) in wanted.items():
        try:
            run = make()
            check(run)
        except WrongResultError as error:  # noqa: PERF203 (each on its own)
            without[name] = {"wrong": f"{name}: {error}"}
        except ImportError as error:  # of diffusers, say
            without[name] = {"failed": last_line(error)}
        else:
            runs[name] = run
    return runs, without


def repeated(call: Callable[[], object]) -> Callable[[], None]:
    """The call as often as a loop takes a step."""

    def run() -> None:
        for _ in range(STEPS):
            call()

    return run


def host(deadline: Deadline) -> Iterator[Record]:
    """Microseconds of the host for a call or a loop's step, on a tensor too small to matter."""
    import fastddim_kernels.launch

    launch: Any = fastddim_kernels.launch
    v = VARIANTS["epsilon"]
    found = launch_arguments(v, 1, DEVICE, shape=SMALL)
    fastddim_kernels.ddim_step(**found)
    differ(f"the step on 1x{by(SMALL)}", differing(found))
    step = as_step(found)
    op = torch.ops.fastddim.ddim_step.default
    of_op = found | {"rows": None, "row": found["rows"]}
    in_order = [of_op.get(argument.name) for argument in op._schema.arguments]
    launches: list[tuple[Any, Any, Any]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
            return lambda *args, **options: launches.append((grid, args, options))

    kernel = launch.ddim_step_kernel
    with mock.patch.object(launch, "ddim_step_kernel", Recorder()):
        fastddim_kernels.ddim_step(**found)
    ((grid, args, options),) = launches
    x, output, table, into = (found[name] for name in ("x", "output", "table", "out"))
    rest = None, None, None, None, into, None, None
    launched = Bound(backends.backend(DEVICE, "triton"), backends.Fixed()).launch(
        x, output, table, 0, *rest
    )
    into.fill_(float("nan"))
    launched(x, output, table, 0, *rest)
    bound = fastddim.bind(table)
    want, _ = reference.ddim_step(x, output, table[0])
    for name, got in (("bound launch", into), ("bound step", bound(x, output, 0)[0])):
        if not torch.equal(got, want):
            differ(f"the {name} on 1x{by(SMALL)}", ["out"])
    runs, without = loops_of_host()
    calls: dict[str, Callable[[], object]] = {
        ADD: lambda: torch.add(x, output, out=into),
        "bound launch": lambda: launched(x, output, table, 0, *rest),
        "fastddim.bind": lambda: bound(x, output, 0, want_x0=False),
        DDIM_STEP: lambda: fastddim.ddim_step(**step),
        "fastddim.ddim_step(out=)": lambda: fastddim.ddim_step(**step, out=into),
        "torch.ops.fastddim.ddim_step": lambda: op(*in_order),
        "fastddim_kernels.ddim_step": lambda: fastddim_kernels.ddim_step(**found),
        "Triton's own launch": lambda: kernel[grid](*args, **options),
    }
    runs = {name: repeated(call) for name, call in calls.items()} | runs
    taken = host_seconds(runs, HOST_ROUNDS, 1)
    for name, seconds in taken.items():
        of_add = seconds / taken[ADD]
        row: Record = {
            "call": name,
            "us": rounded(seconds / STEPS * 1e6),
            "of_add": rounded(of_add),
        }
        if name in OF_ADD:
            row |= {"asked": OF_ADD[name], "met": of_add <= OF_ADD[name]}
        yield row
    for name, why in without.items():
        yield {"call": name, **why}
    ours, theirs = (of["told CUDA tensors"] for of in (FAST, THEIRS))
    if ours in taken and theirs in taken:
        ratio = taken[theirs] / taken[ours]
        yield {
            "call": f"{theirs} / {ours}",
            "times": rounded(ratio),
            "asked_at_least": AGAINST_DIFFUSERS,
            "met": ratio >= AGAINST_DIFFUSERS,
        }


def replays(deadline: Deadline) -> Iterator[Record]:
    """The steps captured by hand, their model's output made beforehand: what a node costs."""
    steps = STEPS
    for shape in NODES:
        for eta in (0.0, 1.0):
            ddim = fastddim.DDIM(steps=steps, eta=eta)
            table = torch.tensor(ddim.table, device=DEVICE)
            rows = torch.arange(steps, dtype=torch.int32, device=DEVICE).unbind()
            seeds = torch.arange(shape[0], device=DEVICE) if eta else None
            x_T, eps = (torch.randn(shape, device=DEVICE) for _ in range(2))

            def run(
                _: int,
                table: Tensor = table,
                rows: tuple[Tensor, ...] = rows,
                seeds: Tensor | None = seeds,
                x_T: Tensor = x_T,
                eps: Tensor = eps,
            ) -> Tensor:
                x = x_T
                for row in rows:
                    x = fastddim.ddim_step(x, eps, table, row, seeds, want_x0=False)[0]
                return x

            graph, (last,) = captured(run, 1)
            assert isinstance(last, Tensor)
            last.fill_(float("nan"))
            graph.replay()
            want, z = x_T, torch.empty_like(x_T) if eta else None
            for row in range(steps):
                if z is not None and seeds is not None:
                    same_row = rows[row].expand(shape[0])
                    torch.ops.fastddim.normal_(z, seeds, same_row, STEP_STREAM)
                want, _ = reference.ddim_step(want, eps, table[row], z)
            if not torch.equal(last, want):
                differ(f"{steps} captured steps at {shape}, eta {eta:g}", ["x"])

            def ten(graph: torch.cuda.CUDAGraph = graph) -> None:
                for _ in range(10):
                    graph.replay()

            device = device_seconds({"replay": ten}, 10 * steps, 30)["replay"]
            returned = host_seconds({"replay": graph.replay}, 100, 2)["replay"]
            yield {
                "shape": list(shape),
                "eta": eta,
                "us_per_node": [rounded(s * 1e6) for s in interval(device)],
                "host_us_per_replay": rounded(returned * 1e6),
                "nodes": steps,
            }


def loops(shape: tuple[int, ...], steps: int, eta: float, deadline: Deadline) -> Iterator[Record]:
    """The loop without its model against the original loop, results of all being checked."""
    label = {"shape": list(shape), "eta": eta, "steps": steps}
    with limit(deadline.left()):
        try:
            runs = contenders(shape, steps, eta, DEVICE)
        except SystemExit as differs:
            raise WrongResultError(f"at {by(shape)}, eta {eta:g}: {differs}") from None
        found, missing = others(shape, steps, eta, DEVICE)
    runs |= found
    taken = wall_seconds(runs, torch.cuda.synchronize, min(5.0, deadline.left()))
    held = plain.NUMBERS in taken
    for name, seconds in taken.items():
        yield label | {
            "loop": name,
            "us_per_step": [rounded(s / steps * 1e6) for s in interval(seconds)],
            "times_faster": times(taken[SEED], seconds),
            **({"times_plain": times(taken[plain.NUMBERS], seconds)} if held else {}),
            "rounds": len(seconds),
        }
    for name, reason in missing.items():
        yield label | {"loop": name, "failed": reason}


# The machine


def smi(*fields: str) -> dict[str, str] | None:
    """What nvidia-smi says of the current device, where it says anything."""
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    command += [] if uuid is None else ["-i", f"GPU-{str(uuid).removeprefix('GPU-')}"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    values = out.stdout.strip().splitlines()[0].split(", ") if out.stdout.strip() else []
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else None


def clocks() -> dict[str, str] | None:
    """The clocks and what bears on them, or None where they cannot be read."""
    names = ("sm", "mem", "max.sm", "max.mem")
    return smi(*(f"clocks.{name}" for name in names), "temperature.gpu", "power.draw")


def describe() -> Record:
    """The machine and the versions that the figures are of."""
    import triton

    driver = smi("driver_version")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": rounded(properties.L2_cache_size / 2**20),
        "memory_gib": rounded(properties.total_memory / 2**30),
        "driver": driver["driver_version"] if driver else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def unusable() -> str | None:
    """Why nothing can be measured here, in one line."""
    if not torch.cuda.is_available():
        return "there is no CUDA device here: nothing was measured"
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes"):
        return "TRITON_INTERPRET is set: the kernels would be interpreted, nothing was measured"
    try:
        import fastddim_kernels  # noqa: F401
    except ImportError as error:
        return f"the kernels cannot be imported ({last_line(error)}): nothing was measured"
    return None


def machine(_: Deadline) -> Iterator[Record]:
    """The machine, or why nothing can be measured on it."""
    reason = unusable()
    yield {"unusable": reason} if reason else describe()


# The sections


def every_machine(_: Sizes) -> list[Part]:
    return [Part("machine", {}, machine)]


def every_variant(sizes: Sizes) -> list[Part]:
    first = Part("yardsticks", {}, partial(yardsticks, sizes))
    names = sizes.variants
    return [first, *(Part("variants", {"variant": n}, partial(variant, n, sizes)) for n in names)]


def every_host(_: Sizes) -> list[Part]:
    return [Part("host", {}, host)]


def every_graph(_: Sizes) -> list[Part]:
    found = []
    for shape in ladder.SHAPES:
        for eta in (0.0, 1.0):
            label = {"shape": list(shape), "eta": eta}
            found.append(Part("marginal", label, partial(ladder.marginal, shape, eta, DEVICE)))
    return [*found, Part("graph", {}, replays)]


def every_peer(sizes: Sizes) -> list[Part]:
    return [Part("peers", {}, partial(peers, sizes))]


def every_loop(_: Sizes) -> list[Part]:
    found = []
    for shape, steps in LOOPS:
        for eta in (0.0, 1.0):
            label = {"shape": list(shape), "eta": eta}
            # The original loop takes a second for its copies of large images to the CPU.
            weight = 3.0 if math.prod(shape) > LARGE else 1.0
            found.append(Part("loops", label, partial(loops, shape, steps, eta), weight))
    return found


def every_rung(_: Sizes) -> list[Part]:
    return [
        Part("ladder", {"case": name}, partial(ladder.ladder, case, rungs, DEVICE), weight)
        for name, case, rungs, weight in ladder.plan()
    ]


def every_check(_: Sizes) -> list[Part]:
    return [
        Part(
            "sanitizer",
            {"tool": check.tool, "of": check.of},
            partial(sanitizer.run, check),
            float(len(check.tests)),
        )
        for check in sanitizer.CHECKS
    ]


def every_choice(sizes: Sizes) -> list[Part]:
    names = tuple(name for name in TUNED if name in sizes.variants)
    return [Part("tuning", {}, partial(tuning, names, sizes))]


SECTIONS: dict[str, Callable[[Sizes], list[Part]]] = {
    "machine": every_machine,
    "variants": every_variant,
    "host": every_host,
    "graph": every_graph,
    "peers": every_peer,
    "loops": every_loop,
    "ladder": every_rung,
    "sanitizer": every_check,
    "tuning": every_choice,
}


def alive() -> bool:
    """Whether the GPU still answers this process."""
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


def run(parts: list[Part], deadline: Deadline, pipe: Pipe, begin: int = 0) -> int:
    """Measures the parts from ``begin`` on, and writes each row when it is there.

    Returns:
        0, or ``DEAD`` where a part has left the GPU unusable.
    """
    for k, part in enumerate(parts[begin:], begin):
        pipe.write({"part": k, "key": part.key, "label": part.label})
        if deadline.over():
            pipe.write({"key": part.key, "row": part.label | LEFT_OUT})
            continue
        share = part.weight / sum(later.weight for later in parts[k:])
        try:
            for row in part.rows(deadline.part(share)):
                pipe.write({"key": part.key, "row": row})
        except WrongResultError as error:
            pipe.write({"key": part.key, "row": part.label | {"wrong": str(error)}})
        except Exception as error:
            traceback.print_exc()
            row = part.label | {"failed": last_line(error)}
            pipe.write({"key": part.key, "row": row, "raised": True})
            if not alive():
                return DEAD
        gc.collect()
        torch.cuda.empty_cache()
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("section", choices=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--until", type=float, help="the same, as a time of time.monotonic()")
    parser.add_argument("--rows", help="the file that rows are written to, by default stdout")
    parser.add_argument("--begin", type=int, default=0, help="the first part, by number")
    parser.add_argument("--elements", type=int, default=ELEMENTS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    args = parser.parse_args(arguments)
    # Counted from its start by who started it, for to import all this takes seconds.
    left = args.seconds if args.until is None else args.until - time.monotonic()
    deadline = Deadline(left)
    sizes = Sizes(args.elements, args.rounds, tuple(args.variants))
    return run(SECTIONS[args.section](sizes), deadline, Pipe(args.rows), args.begin)


if __name__ == "__main__":
    sys.exit(main())
