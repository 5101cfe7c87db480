"""Section "host": the host's time for a single call, and for a step of a loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastddim
from benchmarks import plain
from benchmarks.checks import as_step, differ, differing
from benchmarks.children import Deadline
from benchmarks.peers import PEERS, Loops
from benchmarks.sections import scale
from benchmarks.timing import Record, WrongResultError, by, first_line, host_seconds, rounded
from benchmarks.variants import VARIANTS, launch_arguments
from fastddim.step import backends, reference
from fastddim.step.bound import Bound

ADD, DDIM_STEP, SAMPLE = "torch.add(out=)", "fastddim.ddim_step", "DDIM.sample"
FORMS: dict[str, Callable[[Tensor], Any]] = {
    "timesteps as numbers": Tensor.tolist,
    "timesteps as CUDA tensors": Tensor.unbind,
}
"""How a scheduler gets its timesteps."""
FAST, THEIRS = (
    {how: f"{name}, {how}" for how in FORMS}
    for name in ("FastDDIMScheduler", "diffusers' DDIMScheduler")
)
OF_ADD = {DDIM_STEP: 4.0, SAMPLE: 2.5, **dict.fromkeys(FAST.values(), 4.0)}
"""Greatest (host's time for a step) / (host's time for ``torch.add(out=)``)."""
AGAINST_DIFFUSERS = 8.0
"""Least (time of diffusers' scheduler) / (time of ours), both with timesteps as CUDA tensors."""
HOST_ROUNDS = 60


def loops_of_host() -> tuple[dict[str, Callable[[], object]], dict[str, Record]]:
    """(loops of ``scale.STEPS`` steps that passed their check, why the others are missing)."""
    made = Loops((1, *scale.SMALL), scale.STEPS, 0.0, scale.DEVICE)
    right = partial(made.equal, want=lambda: made.eager(None))
    wanted: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
        SAMPLE: (lambda: made.sample, right),
        plain.NUMBERS: (lambda: PEERS["plain"].make(made), made.as_reference),
    }
    for how, form in FORMS.items():
        for name, ours in (("FastDDIMScheduler", True), ("DDIMScheduler", False)):
            title = (FAST if ours else THEIRS)[how]
            wanted[title] = partial(made.scheduled, name, form), made.near
    runs: dict[str, Callable[[], object]] = {}
    without: dict[str, Record] = {}
    for name, (make, check) in wanted.items():
        try:
            run = make()
            check(run)
        except WrongResultError as error:  # noqa: PERF203 (each loop is tried separately)
            without[name] = {"wrong": f"{name}: {error}"}
        except ImportError as error:  # diffusers may not be installed
            without[name] = {"failed": first_line(error)}
        else:
            runs[name] = run
    return runs, without


def repeated(call: Callable[[], object]) -> Callable[[], None]:
    """Runs the call ``scale.STEPS`` times, as often as a loop takes a step."""

    def run() -> None:
        for _ in range(scale.STEPS):
            call()

    return run


def host(deadline: Deadline) -> Iterator[Record]:
    """Times calls and loops on a tensor so small that the device's work does not matter."""
    import fastddim_kernels.launch

    launch: Any = fastddim_kernels.launch
    v = VARIANTS["epsilon"]
    found = launch_arguments(v, 1, scale.DEVICE, shape=scale.SMALL)
    fastddim_kernels.ddim_step(**found)
    differ(f"the step on 1x{by(scale.SMALL)}", differing(found))
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
    launched = Bound(backends.backend(scale.DEVICE, "triton"), backends.Fixed()).launch(
        x, output, table, 0, *rest
    )
    into.fill_(float("nan"))
    launched(x, output, table, 0, *rest)
    bound = fastddim.bind(table)
    want, _ = reference.ddim_step(x, output, table[0])
    for name, got in (("bound launch", into), ("bound step", bound(x, output, 0)[0])):
        if not torch.equal(got, want):
            differ(f"the {name} on 1x{by(scale.SMALL)}", ["out"])
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
    taken = host_seconds(runs, HOST_ROUNDS, 1, deadline.left())
    for name, seconds in taken.items():
        of_add = seconds / taken[ADD]
        row: Record = {
            "call": name,
            "us": rounded(seconds / scale.STEPS * 1e6),
            "of_add": rounded(of_add),
        }
        if name in OF_ADD:
            row |= {"required": OF_ADD[name], "met": of_add <= OF_ADD[name]}
        yield row
    for name, why in without.items():
        yield {"call": name, **why}
    ours, theirs = (of["timesteps as CUDA tensors"] for of in (FAST, THEIRS))
    if ours in taken and theirs in taken:
        ratio = taken[theirs] / taken[ours]
        yield {
            "call": f"{theirs} / {ours}",
            "times": rounded(ratio),
            "required_at_least": AGAINST_DIFFUSERS,
            "met": ratio >= AGAINST_DIFFUSERS,
        }
