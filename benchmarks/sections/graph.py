"""Section "graph": the cost of one more step inside a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fastddim
from benchmarks.checks import differ
from benchmarks.children import Deadline
from benchmarks.sections import scale
from benchmarks.sections.rungs import Replayed, Run
from benchmarks.timing import (
    Record,
    WrongResultError,
    captured,
    device_seconds,
    host_seconds,
    interval,
    rounded,
    times,
)
from fastddim.loop.recording import capture
from fastddim.step import reference
from fastddim.step.philox import STEP_STREAM

SHORT, LONG = 10, 60
"""Steps of the two graphs: (time of the long one - time of the short one) / 50 is one step's."""
HEAD_START = 2_000_000
"""Cycles that the device sleeps, about 1 ms: the host needs less to enqueue ten replays."""
IN_A_GRAPH = 1.3
"""Greatest (time of a step in a graph) / (time of an empty node), at the shapes in ``SMALL``."""
SMALL = ((1, 16, 7), (4, 3, 32, 32))
SHAPES = (*SMALL, (64, 3, 32, 32))


def chain(shape: tuple[int, ...], eta: float, steps: int, device: str) -> tuple[Run, Run]:
    """(replay of the sampler's graph, whose model launches nothing, of as many tiny kernels)."""
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
    """Times one more step in a graph whose model launches nothing.

    The yardstick is one more kernel that adds to a single element, in effect an empty node.
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
        row |= {"required": IN_A_GRAPH, "met": row["of_small_kernel"][0] <= IN_A_GRAPH}
    yield row | {
        f"us_{steps}_{what}": interval(us[f"{name} {steps}"])[0]
        for name, what in (("step", "steps"), ("small", "small_kernels"))
        for steps in (SHORT, LONG)
    }


def replays(deadline: Deadline) -> Iterator[Record]:
    """Times a node of graphs in which ``fastddim.ddim_step`` is captured without a model."""
    steps = scale.STEPS
    for shape in scale.NODES:
        for eta in (0.0, 1.0):
            ddim = fastddim.DDIM(steps=steps, eta=eta)
            table = torch.tensor(ddim.table, device=scale.DEVICE)
            rows = torch.arange(steps, dtype=torch.int32, device=scale.DEVICE).unbind()
            seeds = torch.arange(shape[0], device=scale.DEVICE) if eta else None
            x_T, eps = (torch.randn(shape, device=scale.DEVICE) for _ in range(2))

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
