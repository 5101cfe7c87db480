"""Everything that is claimed of a GPU, measured on it: one record, named after the GPU.

    benchmarks/gpu.sh                           # the GPU tests, then this if all of them passed
    python -m benchmarks.gpu                    # this alone: prints, and keeps nothing
    python -m benchmarks.gpu --sections ladder  # a part of it, in a record of its own

Device times are those of CUDA graphs, whose launches wait for no Python: contenders take turns,
each launch reads memory that no launch before it left in the cache, and medians are kept. Nothing
is timed whose results, those of the very graph, were not found right first.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

import fastddim
from benchmarks import ladder
from benchmarks.loop import contenders, measure
from benchmarks.peers import simplified, simplified_factors, simplified_noisy
from benchmarks.records import RESULTS, commit, slug, write
from benchmarks.timing import (
    Call,
    Record,
    WrongResultError,
    captured,
    device_seconds,
    host_seconds,
    last_line,
    rounded,
)
from benchmarks.variants import VARIANTS, Variant, launch_arguments
from fastddim import reference
from fastddim.coefficients import PREDICTIONS
from fastddim.noise import STEP, normals

Given: TypeAlias = dict[str, Any]
"""The arguments of ``fastddim.ddim_step``, or of ``fastddim_kernels.ddim_step``."""

DEVICE = "cuda"
ELEMENTS = 64 * 3 * 256 * 256
FOOTPRINT = 8
"""The memory that launches go round in, in sizes of the L2."""
LAUNCHES = 64
ROUNDS = 25
ASKED = {False: 0.95, True: 0.92}
"""Part of a copy's bytes per second, without noise and with it."""
TUNED = ("epsilon", "epsilon philox")
SECTIONS = (
    "yardsticks",
    "variants",
    "peers",
    "host",
    "graph",
    "marginal",
    "loop",
    "ladder",
    "tuning",
)
LOOPS = (((4, 3, 32, 32), 50, 20), ((1, 4, 64, 64), 50, 20), ((64, 3, 256, 256), 20, 3))
"""Shape, steps and repeats of the loop without its model."""
NORMAL_MAX = 1e-3
"""How far normals drawn on a CPU and a GPU may be apart (fastddim.noise)."""


# What is right


def zeros_as(tensor: Tensor) -> Tensor:
    """Zeros where ``tensor``'s elements lie, gaps included: ``zeros_like`` would close them."""
    room = torch.zeros(
        tensor.untyped_storage().nbytes() // tensor.itemsize,
        dtype=tensor.dtype,
        device=tensor.device,
    )
    return room.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def kernel_noise(given: Given) -> Tensor | None:
    """z as this specialisation of the step draws it: from x = ε = 0, with c1 = 1, x_s is z."""
    if given.get("seeds") is None:
        return given.get("noise")
    table = torch.zeros_like(given["table"])
    table[:, :4] = 1
    table[:, 5] = 1
    zeros = {name: zeros_as(given[name]) for name in ("x", "output")}
    if given.get("next_input") is not None:
        zeros["next_input"] = zeros_as(given["next_input"])
    z, _ = fastddim.ddim_step(**{**given, **zeros, "table": table, "out": None})
    return z


def by_reference(given: Given, z: Tensor | None) -> tuple[Tensor, Tensor]:
    """(x_s, x0) of ``fastddim.ddim_step(**given)`` in eager PyTorch, where the tensors are."""
    x, each = given["x"], (-1, *[1] * (given["x"].dim() - 1))

    def by_sample(name: str) -> Tensor | None:
        value = given.get(name)
        return value.reshape(each) if isinstance(value, Tensor) else value

    return reference.ddim_step(
        x,
        given["output"].float(),
        given["table"][given["rows"].long()].view(*each, 7),
        z,
        given.get("prediction", "epsilon"),
        given.get("clip"),
        given.get("noise_first", True),
        by_sample("guidance"),
        by_sample("threshold"),
        given.get("rederive", False),
    )


def as_step(launch: Given) -> Given:
    """What ``fastddim.ddim_step`` would be called with in place of this launch."""
    given = {name: value for name, value in launch.items() if name not in ("out", "x0")}
    given["prediction"] = PREDICTIONS[launch["prediction"]]
    return given | {"want_x0": launch["x0"] is not None}


def contract_error(given: Given, z: Tensor, samples: tuple[int, ...]) -> Tensor:
    """How far the noise of these samples is from what ``fastddim.noise`` says it is."""
    chosen = list(samples)
    truth = normals(
        given["seeds"][chosen].cpu().numpy(),
        given["rows"][chosen].cpu().numpy(),
        z[0].numel(),
        STEP,
    )
    drawn = z[chosen].cpu().reshape(len(chosen), -1)
    return (drawn.double() - torch.from_numpy(truth).double()).abs()


def differing(launch: Given) -> list[str]:
    """What a launch has written that is not what the reference gives, by name."""
    given = as_step(launch)
    z = kernel_noise(given)
    x_s, x0 = by_reference(given, z)
    wrong = [] if torch.equal(launch["out"], x_s) else ["out"]
    if launch["x0"] is not None and not torch.equal(launch["x0"], x0):
        wrong.append("x0")
    next_input = launch.get("next_input")
    if next_input is not None:
        halves = next_input.chunk(len(next_input) // len(x_s))
        if not all(torch.equal(half, x_s.to(half.dtype)) for half in halves):
            wrong.append("next_input")
    if z is None or given.get("seeds") is None:
        return wrong
    error = contract_error(given, z, (0, len(z) - 1)).max().item()
    return wrong if error <= NORMAL_MAX else [*wrong, "noise"]


def poison(launch: Given) -> None:
    """NaN in all that the launch is to write."""
    for name in ("out", "x0", "next_input"):
        if launch.get(name) is not None:
            launch[name].fill_(float("nan"))


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


def copies(total: int, count: int) -> dict[str, Call]:
    """A copy and an addition that move as many bytes as one launch of what they are beside."""
    a, b = ([torch.randn(total // 8, device=DEVICE) for _ in range(count)] for _ in range(2))
    p, q, r = ([torch.randn(total // 12, device=DEVICE) for _ in range(count)] for _ in range(3))

    def copy(i: int) -> object:
        return b[i % count].copy_(a[i % count])

    def add(i: int) -> object:
        return torch.add(p[i % count], q[i % count], out=r[i % count])

    return {"copy": copy, "add": add}


def launches_of(v: Variant, elements: int) -> tuple[list[Given], int]:
    """Sets of arguments for the launcher, and the bytes that a launch on one of them moves."""
    n = v.shape[0] * v.shape[1] * v.shape[2]
    batch = -(-elements // n)
    total = moved_bytes(v) * batch * n
    return [launch_arguments(v, batch, DEVICE, seed=i) for i in range(sets_of(total))], total


def differ(what: str, names: list[str]) -> None:
    """Raises if there are any."""
    if names:
        raise WrongResultError(f"{what}: {', '.join(names)} differs from the reference")


def checked_graph(
    name: str, sets: list[Given], launches: int, every: bool = True
) -> tuple[torch.cuda.CUDAGraph, list[object]]:
    """The graph of launches that go round these sets, its own results having been checked."""
    import fastddim_kernels

    def call(i: int) -> None:
        fastddim_kernels.ddim_step(**sets[i % len(sets)])

    graph, returned = captured(call, launches)
    for launch in sets:
        poison(launch)
    graph.replay()
    for launch in sets if every else sets[:1]:
        differ(name, differing(launch))
    return graph, returned


# The measurements


def variant(name: str, elements: int, rounds: int) -> Iterator[Record]:
    """A variant's bytes per second beside those of a copy and an addition."""
    v = VARIANTS[name]
    sets, total = launches_of(v, elements)
    graphs = {"step": checked_graph(name, sets, LAUNCHES)}
    graphs |= {k: captured(c, LAUNCHES) for k, c in copies(total, len(sets)).items()}
    taken = device_seconds({k: g.replay for k, (g, _) in graphs.items()}, LAUNCHES, rounds)
    per_second = {k: total / statistics.median(s) for k, s in taken.items()}
    ratios = [c / s for s, c in zip(taken["step"], taken["copy"], strict=True)]
    noisy, part = v.noise != "none", per_second["step"] / per_second["copy"]
    yield {
        "variant": name,
        "shape": list(sets[0]["x"].shape),
        "bytes_per_element": v.bytes_per_element,
        "bytes_moved": moved_bytes(v),
        "us": rounded(statistics.median(taken["step"]) * 1e6),
        "gb_per_s": rounded(per_second["step"] / 1e9),
        "copy_gb_per_s": rounded(per_second["copy"] / 1e9),
        "add_gb_per_s": rounded(per_second["add"] / 1e9),
        "of_copy": rounded(part),
        "low": rounded(min(ratios)),
        "high": rounded(max(ratios)),
        "of_add": rounded(per_second["step"] / per_second["add"]),
        "asked": ASKED[noisy],
        "met": part >= ASKED[noisy],
    }


def yardsticks(elements: int, rounds: int) -> Iterator[Record]:
    """The copy that all is held against, as a graph's node and as a plain call: alike, or not?"""
    total = 12 * elements
    count = sets_of(total)
    calls = copies(total, count)
    graph, _ = captured(calls["copy"], LAUNCHES)

    def on_a_stream() -> None:
        for i in range(LAUNCHES):
            calls["copy"](i)

    taken = device_seconds({"graph": graph.replay, "stream": on_a_stream}, LAUNCHES, rounds)
    rates = {name: total / statistics.median(s) / 1e9 for name, s in taken.items()}
    # The clocks are read while the device is at work, for a second or so.
    for _ in range(int(1.5 / (LAUNCHES * statistics.median(taken["graph"])))):
        graph.replay()
    found: Record = {f"copy_{name}_gb_per_s": rounded(rate) for name, rate in rates.items()}
    found["clocks_under_load"] = clocks()
    torch.cuda.synchronize()
    yield found


def peers(elements: int, rounds: int) -> Iterator[Record]:
    """One step as people run it: eager PyTorch, and the simplified maths compiled."""
    launches = 24
    sets, _ = launches_of(VARIANTS["epsilon"], elements)
    noisy, _ = launches_of(VARIANTS["epsilon philox"], elements)
    count = len(sets)
    xs, outputs = [s["x"] for s in sets], [s["output"] for s in sets]
    row = sets[0]["table"][0]
    p, q, c1 = simplified_factors(row)

    def eager(i: int) -> object:
        return reference.ddim_step(xs[i % count], outputs[i % count], row)

    def eager_noisy(i: int) -> object:
        x = xs[i % count]
        return reference.ddim_step(x, outputs[i % count], row, torch.randn_like(x))

    graphs = {
        "fastddim": checked_graph("epsilon", sets, launches),
        "fastddim, counter noise": checked_graph("epsilon philox", noisy, launches),
        "eager": captured(eager, launches),
        "eager, randn_like (the seed's step)": captured(eager_noisy, launches),
    }
    failures: dict[str, str] = {}

    def compiled(name: str, function: Any, *factors: Tensor) -> None:
        try:
            fast: Any = torch.compile(function, dynamic=False)
            exact, _ = reference.ddim_step(xs[0], outputs[0], row)
            rest = fast(xs[0], outputs[0], *factors) - exact
            error = rest.abs().max().item()
            moments = (rest / c1).mean().item(), (rest / c1).std().item() - 1
            graphs[name] = captured(
                lambda i: fast(xs[i % count], outputs[i % count], *factors), launches
            )
        except Exception as failure:  # of a compiler that this machine lacks, say
            failures[name] = last_line(failure)
            return
        if error > 1e-3 if len(factors) == 2 else max(map(abs, moments)) > 0.01:
            raise WrongResultError(f"{name}: off by {error:g}, noise by {moments}")

    compiled("torch.compile, simplified", simplified, p, q)
    compiled("torch.compile, simplified, randn_like", simplified_noisy, p, q, c1)
    taken = device_seconds({k: g.replay for k, (g, _) in graphs.items()}, launches, rounds)
    base = statistics.median(taken["fastddim"])
    for name, seconds in taken.items():
        median = statistics.median(seconds)
        yield {
            "step": name,
            "us": rounded(median * 1e6),
            "us_low": rounded(min(seconds) * 1e6),
            "us_high": rounded(max(seconds) * 1e6),
            "times_fastddim": rounded(median / base),
        }
    for name, reason in failures.items():
        yield {"step": name, "us": None, "failed": reason}


class WithWarps:
    """The kernel, launched with another number of warps."""

    def __init__(self, kernel: Any, warps: int) -> None:
        self.kernel, self.warps = kernel, warps

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        launched = self.kernel[grid]
        return lambda *args, **options: launched(*args, **(options | {"num_warps": self.warps}))


@contextmanager
def block(fours: int, parts: int, warps: int) -> Iterator[None]:
    """Every step's launch takes these instead of what ``launch._block`` chooses."""
    import fastddim_kernels.launch

    launch: Any = fastddim_kernels.launch

    with (
        mock.patch.object(launch, "_block", return_value=(fours, parts)),
        mock.patch.object(launch, "ddim_step_kernel", WithWarps(launch.ddim_step_kernel, warps)),
    ):
        yield


def tuning(names: list[str], elements: int, rounds: int, seconds: float) -> Iterator[Record]:
    """How the time depends on the constants of ``launch._block``, as far as there is time.

    Exploratory: nothing is claimed of it, and the launcher does not read it.
    """
    deadline = time.monotonic() + seconds
    choices = [(256, 4, 4)]  # the launcher's own
    choices += [(256, parts, warps) for parts in (1, 2, 4, 8) for warps in (4, 8)]
    choices += [(f, parts, warps) for f in (128, 512) for parts in (1, 2, 4) for warps in (4, 8)]
    choices = list(dict.fromkeys(choices))
    tensors = {name: launches_of(VARIANTS[name], elements) for name in names}
    for fours, parts, warps in choices:
        for name, (sets, total) in tensors.items():
            choice = {"variant": name, "fours": fours, "parts": parts, "warps": warps}
            if time.monotonic() > deadline:
                yield choice | {"us": None, "failed": "left out: no time"}
                continue
            with block(fours, parts, warps):
                graph, _ = checked_graph(f"{name} {fours, parts, warps}", sets, 32, every=False)
            taken = device_seconds({"step": graph.replay}, 32, rounds)["step"]
            median = statistics.median(taken)
            yield choice | {
                "us": rounded(median * 1e6),
                "us_low": rounded(min(taken) * 1e6),
                "us_high": rounded(max(taken) * 1e6),
                "gb_per_s": rounded(total / median / 1e9),
            }


def host() -> Iterator[Record]:
    """Microseconds of Python a call costs, on a tensor too small to matter."""
    import fastddim_kernels.launch

    launch: Any = fastddim_kernels.launch
    v = VARIANTS["epsilon"]
    found = launch_arguments(v, 1, DEVICE, shape=(4, 8, 8))
    fastddim_kernels.ddim_step(**found)
    differ("the step on 1x4x8x8", differing(found))
    step = as_step(found)
    op = torch.ops.fastddim.ddim_step.default
    in_order = [found.get(argument.name) for argument in op._schema.arguments]
    launches: list[tuple[Any, Any, Any]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
            return lambda *args, **options: launches.append((grid, args, options))

    kernel = launch.ddim_step_kernel
    with mock.patch.object(launch, "ddim_step_kernel", Recorder()):
        fastddim_kernels.ddim_step(**found)
    ((grid, args, options),) = launches
    into = found["out"]
    calls: dict[str, Callable[[], object]] = {
        "fastddim.ddim_step": lambda: fastddim.ddim_step(**step),
        "fastddim.ddim_step(out=)": lambda: fastddim.ddim_step(**step, out=into),
        "torch.ops.fastddim.ddim_step": lambda: op(*in_order),
        "fastddim_kernels.ddim_step": lambda: fastddim_kernels.ddim_step(**found),
        "Triton's own launch": lambda: kernel[grid](*args, **options),
        "torch.add(out=)": lambda: torch.add(found["x"], found["output"], out=into),
    }
    for name, seconds in host_seconds(calls).items():
        yield {"call": name, "us": rounded(seconds * 1e6)}


def replays(steps: int = 50) -> Iterator[Record]:
    """The steps captured by hand, their model's output made beforehand: what a node costs."""
    for shape in ((1, 4, 64, 64), (4, 3, 32, 32)):
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
                    torch.ops.fastddim.normal_(z, seeds, same_row, STEP)
                want, _ = reference.ddim_step(want, eps, table[row], z)
            if not torch.equal(last, want):
                differ(f"fifty captured steps at {shape}, eta {eta:g}", ["x"])

            def ten(graph: torch.cuda.CUDAGraph = graph) -> None:
                for _ in range(10):
                    graph.replay()

            device = device_seconds({"replay": ten}, 10 * steps, 30)["replay"]
            returned = host_seconds({"replay": graph.replay}, 100, 2)["replay"]
            yield {
                "shape": list(shape),
                "eta": eta,
                "us_per_node": rounded(statistics.median(device) * 1e6),
                "host_us_per_replay": rounded(returned * 1e6),
                "nodes": steps,
            }


def loops() -> Iterator[Record]:
    """The loop without its model against the loop people run, results of all being equal."""
    for shape, steps, repeats in LOOPS:
        for eta in (0.0, 1.0):
            try:
                runs = contenders(shape, steps, eta, DEVICE)
            except SystemExit as differs:
                raise WrongResultError(f"at {shape}, eta {eta:g}: {differs}") from None
            seconds = measure(runs, repeats, torch.cuda.synchronize)
            base = statistics.median(seconds["seed's loop"])
            for name, taken in seconds.items():
                median = statistics.median(taken)
                yield {
                    "shape": list(shape),
                    "eta": eta,
                    "loop": name,
                    "steps": steps,
                    "ms_per_step": rounded(median / steps * 1e3),
                    "ms_low": rounded(min(taken) / steps * 1e3),
                    "ms_high": rounded(max(taken) / steps * 1e3),
                    "times_faster": rounded(base / median),
                }


# The record


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


def tests_of(report: Path) -> dict[str, int]:
    """How many tests a JUnit report tells of, by outcome."""
    found = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        for name in found:
            found[name] += int(suite.get(name, "0"))
    bad = found["failures"] + found["errors"]
    passed = found["tests"] - bad - found["skipped"]
    return {"passed": passed, "skipped": found["skipped"], "failed": bad}


def table(rows: list[Record]) -> str:
    """Rows of one kind as aligned text; lists as 64x3x256x256, what is missing as nothing."""
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def cell(value: object) -> str:
        if isinstance(value, (list, tuple)):
            return "x".join(map(str, value))
        if isinstance(value, bool):
            return "yes" if value else "NO"
        return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

    text = [columns, *([cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in text) for i in range(len(columns))]
    words = [i for i, name in enumerate(columns) if any(isinstance(r.get(name), str) for r in rows)]

    def aligned(line: list[str]) -> str:
        cells = zip(line, widths, strict=True)
        put = (c.ljust(w) if i in words else c.rjust(w) for i, (c, w) in enumerate(cells))
        return "  ".join(put).rstrip()

    return "\n".join(map(aligned, text))


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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--describe", action="store_true", help="name the GPU and do no more")
    parser.add_argument("--tests", type=Path, help="the JUnit report of the GPU tests")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the record goes")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--elements", type=int, default=ELEMENTS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--tune", nargs="*", choices=list(VARIANTS), default=list(TUNED))
    parser.add_argument("--tune-seconds", type=float, default=60.0)
    parser.add_argument("--ladder-seconds", type=float, default=ladder.SECONDS)
    parser.add_argument("--compile-seconds", type=float, default=ladder.COMPILE_SECONDS)
    args = parser.parse_args(arguments)
    if args.elements < ELEMENTS:
        parser.error(f"--elements must be at least {ELEMENTS}, got {args.elements}")
    reason = unusable()
    if reason:
        print(reason, file=sys.stderr)
        return 2
    machine = describe()
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    if args.describe:
        return 0
    tests = None if args.tests is None else tests_of(args.tests)
    if tests is not None and (tests["failed"] or not tests["passed"]):
        print(f"the GPU tests did not pass ({tests}): nothing was measured", file=sys.stderr)
        return 1

    record: Record = machine | {
        "command": " ".join(["python -m benchmarks.gpu", *(arguments or sys.argv[1:])]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "tests": tests,
        "elements": args.elements,
        "rounds": args.rounds,
        "clocks_before": clocks(),
    }
    if record["commit"] == "unknown":  # a copy of the tree without its history
        record["commit"] = os.environ.get("COMMIT", "unknown")
    size = args.elements, args.rounds
    sections: dict[str, Callable[[], list[Iterator[Record]]]] = {
        "yardsticks": lambda: [yardsticks(*size)],
        "variants": lambda: [variant(name, *size) for name in args.variants],
        "peers": lambda: [peers(*size)],
        "host": lambda: [host()],
        "graph": lambda: [replays()],
        "marginal": ladder.marginals,
        "loop": lambda: [loops()],
        "ladder": lambda: ladder.ladders(args.ladder_seconds, args.compile_seconds),
        "tuning": lambda: [tuning(args.tune, args.elements, 9, args.tune_seconds)],
    }
    wrong: list[str] = []
    failed: list[str] = []

    def collected(rows: Iterator[Record]) -> Iterator[Record]:
        """The rows up to one that is wrong or cannot be had: it keeps no others from being seen."""
        try:
            yield from rows
        except WrongResultError as error:
            wrong.append(str(error))
            yield {"failed": str(error)}
        except Exception as error:
            traceback.print_exc()
            failed.append(last_line(error))
            yield {"failed": last_line(error)}
        gc.collect()
        torch.cuda.empty_cache()

    asked = [name for name in SECTIONS if name in args.sections]
    part = "" if len(asked) == len(SECTIONS) else f"-{'-'.join(asked)}"
    path = args.results / f"{slug(machine['gpu'])}{part}.json"

    def keep(complete: bool = False) -> None:
        """What there is so far, that a run which is cut short be not lost."""
        if wrong:
            path.unlink(missing_ok=True)
        elif tests is not None:
            write(path, record | {"complete": complete})

    for name in asked:
        begin = time.monotonic()
        record[name] = []
        for rows in sections[name]():
            record[name].extend(collected(rows))
            keep()
        took = time.monotonic() - begin
        print(f"\n{name} ({took:.0f} s)\n{table(record[name])}", flush=True)
    record["clocks_after"] = clocks()
    keep(complete=True)
    for line in wrong:
        print(f"WRONG: {line}", file=sys.stderr)
    if tests is None:
        print("nothing is kept of a run without its tests: see benchmarks/gpu.sh")
    elif wrong:
        print("nothing is kept of a run with wrong results", file=sys.stderr)
    else:
        print(f"\n{path}")
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    sys.exit(main())
