"""Section "ladder": the gain of each idea between the original loop and one graph a sample.

A rung (``benchmarks.sections.rungs``) is a whole call, from x_T on the device to the last x. Its
result is compared with the original loop's before it is timed. The sampler's share is the rung's
time minus the time of its model alone, called as often and in the same way.

The most important cases and rungs come first. One that there is no time for gets a row that says
so.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.children import Deadline
from benchmarks.networks import CIFAR10, LATENTS, Policy, UNet
from benchmarks.peers import compiler_loaded
from benchmarks.sections.rungs import (
    BESIDE_COMPILE,
    MODELS,
    ORIGINAL,
    PLAIN,
    RUNGS,
    TORCH_COMPILE,
    Case,
    Ready,
    Run,
    prepared,
)
from benchmarks.timing import (
    LEFT_OUT,
    Record,
    WrongResultError,
    first_line,
    interval,
    limit,
    rounded,
    times,
    wall_seconds,
)

TOLERANCE = {torch.float32: 2e-2, torch.bfloat16: 1e-1}
"""Greatest (root mean square difference from the original loop) / (its root mean square).

Between two model calls the arithmetic is bit-identical, except in diffusers. Inside the model it
need not be: in a graph or compiled, libraries may choose other kernels, and by default these round
a convolution's float32 operands to the 11 bits of TF32.
"""
SECONDS = 6.0
"""Seconds for timing one case, which always gets three rounds."""
PREPARING = 0.6
"""Share of a case's time for making and checking its rungs; the rest is for timing them."""
COMPILING = 40.0
"""Seconds that a case beside torch.compile needs. On an H200 with cold caches the latents' U-Net
filled 15 s of preparation, and the compilation of the CIFAR-10 U-Net had not ended after 9."""


def cases() -> list[Case]:
    """The cases by importance: a small, a medium and a guided model, then other sizes."""
    unet = functools.cache(lambda: UNet(**CIFAR10))  # one network for all four cases
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


def compared(what: str, got: Tensor, want: Tensor, tolerance: float) -> Record:
    """The difference from the original loop's result; raises where it exceeds the tolerance."""
    got, want = got.cpu(), want.cpu()
    gap = got.double() - want.double()
    off = (gap.square().mean() / want.double().square().mean()).sqrt().item()
    if got.shape != want.shape or not off <= tolerance:  # `not <=` also catches NaN
        raise WrongResultError(f"{what} is {off:.3g} off the original loop, allowed: {tolerance:g}")
    return {
        "bit_equal": torch.equal(got, want),
        "max_difference": rounded(gap.abs().max().item()),
        "relative_difference": rounded(off),
        "tolerance": tolerance,
    }


def tried(make: Callable[[], Run], seconds: float) -> tuple[Run, Tensor]:
    """The run and its second result: a run that works only once must not pass."""
    with limit(seconds):
        run = make()
        run()
        return run, run().clone()


class Rungs:
    """The rungs of one case that can be timed, and the reasons why the others cannot.

    Attributes:
        runs: the rungs whose results are right, by name, and the calls of their models alone.
        found: the difference of each rung's result from the original loop's.
        without: content of the row of every other rung and model.
    """

    def __init__(self, ready: Ready, names: tuple[str, ...], deadline: Deadline) -> None:
        self.runs: dict[str, Run] = {}
        self.found: dict[str, Record] = {}
        self.without: dict[str, Record] = {}
        want: Tensor | None = None
        for name in names:
            make, model = RUNGS[name]
            got = self._have(name, functools.partial(make, ready), deadline)
            want = got if name == ORIGINAL else want
            if want is None:
                # Without the original loop's result nothing can be checked, so nothing is timed.
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
            self.without[name] = {"failed": first_line(error)}
        else:
            return result
        return None


def ladder(case: Case, names: tuple[str, ...], device: str, deadline: Deadline) -> Iterator[Record]:
    """Checks and times these rungs of one case, of which the original loop is the first."""
    shown = {
        "case": case.name if names == PLAIN else f"{case.name}, beside torch.compile",
        "shape": list(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "steps": case.steps,
    }
    if TORCH_COMPILE in names:
        compiler_loaded(device)
    preparing = deadline.part(PREPARING)
    try:
        with limit(preparing.left()):
            ready = prepared(case, device)
    except Exception as error:
        late = isinstance(error, TimeoutError)
        yield shown | (LEFT_OUT if late else {"failed": first_line(error)})
        return
    rungs = Rungs(ready, names, preparing)
    if ORIGINAL not in rungs.runs:
        yield shown | {"rung": ORIGINAL, **rungs.without[ORIGINAL]}
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
    """A rung's time, beside those of the original loop and of its model alone."""
    seconds = taken[name]
    row: Record = {
        "ms": [rounded(s * 1e3) for s in interval(seconds)],
        "ms_per_step": rounded(interval(seconds)[0] * 1e3 / steps),
        "rounds": len(seconds),
    }
    if name in MODELS:
        return row
    row["times_faster"] = times(taken[ORIGINAL], seconds)
    model = taken.get(RUNGS[name][1])
    if model is not None:
        beside = [(a - b) / steps for a, b in zip(seconds, model, strict=True)]
        row["us_per_step_beside_model"] = [rounded(s * 1e6) for s in interval(beside)]
    return row


def plan() -> list[tuple[str, Case, tuple[str, ...], float, float]]:
    """(name, case, rungs, share of the time, least seconds), the most important first.

    The cases beside torch.compile come last: compiling takes most of their time, and other rows
    must not lose theirs to it. The share of the first of them leaves it ``COMPILING`` seconds of a
    section of 100.
    """
    every = cases()
    policy, images, latents, *rest = every
    order = [
        (policy, PLAIN, 9.0),
        (images, PLAIN, 16.0),
        (latents, PLAIN, 15.0),
        *((case, PLAIN, 6.0) for case in rest),
        (images, BESIDE_COMPILE, COMPILING),
        (policy, BESIDE_COMPILE, 1.0),
        (latents, BESIDE_COMPILE, 1.0),
    ]
    names = {PLAIN: "", BESIDE_COMPILE: ", beside torch.compile"}
    least = {PLAIN: 0.0, BESIDE_COMPILE: COMPILING}
    return [
        (
            f"{case.name}{names[rungs]}, {str(case.dtype).removeprefix('torch.')}",
            *(case, rungs, share, least[rungs]),
        )
        for case, rungs, share in order
    ]
