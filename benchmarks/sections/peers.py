"""Section "peers": one step by eager PyTorch and by ``torch.compile``, beside fastddim's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import plain
from benchmarks.checks import checked_graph
from benchmarks.children import Deadline
from benchmarks.peers import (
    SIGMAS,
    compiler_loaded,
    simplified,
    simplified_factors,
    simplified_noisy,
)
from benchmarks.sections import scale
from benchmarks.sections.launches import launches_of
from benchmarks.timing import (
    Record,
    captured,
    device_seconds,
    first_line,
    interval,
    limit,
    rounded,
    times,
)
from benchmarks.variants import VARIANTS
from fastddim.step import reference

OURS = "fastddim"
COMPILED = "torch.compile, simplified"
BY_NUMBERS = "eager, factors precomputed as numbers"
STEP_TOLERANCE = 1e-3
"""Greatest difference from the reference for a step whose factors are rounded differently."""
AGAINST_COMPILED = 1.0
"""Least (time of the simplified maths by ``torch.compile``) / (time of fastddim's step)."""


def peers(sizes: scale.Sizes, deadline: Deadline) -> Iterator[Record]:
    """Times one step by fastddim, by eager PyTorch, and by the simplified maths compiled."""
    launches = min(24, scale.LAUNCHES)
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
        OURS: checked_graph("epsilon", sets, launches),
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
        except Exception as failure:  # this machine may lack a compiler
            without[name] = {"failed": first_line(failure)}
            return
        # The compiled function draws its own noise: only mean and deviation can be checked.
        allowed = max(0.01, SIGMAS / math.sqrt(rest.numel()))
        if error > STEP_TOLERANCE if len(factors) == 2 else max(map(abs, moments)) > allowed:
            without[name] = {"wrong": f"{name}: off by {error:g}, noise by {moments}"}
            return
        graphs[name] = graph

    def timed(names: Iterable[str]) -> Iterator[Record]:
        runs = {name: graphs[name][0].replay for name in names}
        taken = device_seconds(runs, launches, sizes.rounds)
        for name, seconds in taken.items():
            found: Record = {
                "step": name,
                "us": [rounded(s * 1e6) for s in interval(seconds)],
                "times_fastddim": times(seconds, taken[OURS]),
            }
            if name == COMPILED:
                met = found["times_fastddim"][0] >= AGAINST_COMPILED
                found |= {"required": AGAINST_COMPILED, "met": met}
            yield found

    # The compiler may take longer than the section has, which must not cost the rows without it.
    eager_too = tuple(graphs)
    yield from timed(eager_too)
    compiler_loaded(scale.DEVICE)
    compiled(COMPILED, simplified, p, q)
    compiled(f"{COMPILED}, randn_like", simplified_noisy, p, q, c1)
    for found in timed((OURS, *(name for name in graphs if name not in eager_too))):
        if found["step"] != OURS:
            yield found
    for name, reason in without.items():
        yield {"step": name, **reason}
