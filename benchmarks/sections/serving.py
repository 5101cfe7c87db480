"""Section "serving": what a tick of the engine costs, and the engine's samples a second."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fastddim
from benchmarks.children import Deadline
from benchmarks.networks import CIFAR10, UNet
from benchmarks.sections import scale
from benchmarks.sections.graph import HEAD_START
from benchmarks.sections.ladder import TOLERANCE, compared
from benchmarks.timing import (
    Record,
    WrongResultError,
    device_seconds,
    host_seconds,
    interval,
    limit,
    rounded,
    times,
    wall_seconds,
)
from fastddim import DDIM, Engine, Request
from fastddim.loop.recording import capture

MODEL, TICK = "the model's graph", "a tick beside its model"
STEP, BOUND = "a fused step beside its model, in a graph", "a bound step beside its model"
HOST_BOUND, HOST_TICK = "the host's time for a bound step", "the host's time for a tick"
HOST_REFILL = "the host's time to finish and refill a slot"
STATIC, CAPTURED, ENGINE = "DDIM.sample", "DDIM.capture", "Engine"
US = 5.0
"""Most microseconds of a tick beside its model on the device, at 32x4x64x64."""
OF_BOUND = 2.0
"""Greatest (host's time for a tick) / (host's time for a bound step)."""
OF_STATIC = 0.95
"""Least (samples a second of the engine) / (those of DDIM.sample), with requests that are alike."""
TOGETHER = 10
"""Replays that are timed together."""
REPEATS = 50
"""Rounds of the host's times. A request of ``T`` steps must outlive them."""
T = 1000
SECONDS = 4.0
"""Seconds for timing the samples of one batch size, which always get three rounds."""


def halved(x: Tensor, t: Tensor) -> Tensor:
    """A model of one kernel."""
    return 0.5 * x


def busy(refills: int = 0) -> Engine:
    """An engine whose slots are full, and whose samples have the bits of ``DDIM.sample``.

    With ``refills`` one slot finishes and takes another request at each of as many ticks.
    """
    shape, slots = scale.SERVED, scale.SLOTS
    engine = Engine(halved, shape, slots, device=scale.DEVICE, limit=None)
    mix = [DDIM(steps, eta=1.0) for steps in (2, 3)]
    want = [
        ddim.sample(halved, shape=(slots, *shape), seeds=range(slots), device=scale.DEVICE)
        for ddim in mix
    ]
    for i, x in engine.run(Request(seed, ddim=mix[seed % 2]) for seed in range(slots)):
        if not torch.equal(x, want[i % 2][i]):
            raise WrongResultError(f"the engine's sample of seed {i} is not DDIM.sample's")
    for seed in range(slots):
        if seed or not refills:
            engine.submit(Request(seed, ddim=DDIM(T, eta=1.0)))
    for seed in range(refills):
        engine.submit(Request(seed, ddim=DDIM(1, eta=1.0)))
    for _ in range(2):  # Each side of the slots' memory has its graph then.
        engine.step()
    return engine


def bound_step() -> Callable[..., tuple[Tensor, Tensor | None]]:
    return fastddim.bind(torch.tensor(DDIM(T, eta=1.0).table, device=scale.DEVICE))


def ticks(rounds: int, deadline: Deadline) -> Iterator[Record]:
    """Times the tick's graphs on the device, beside a fused step with the same model."""
    with limit(deadline.left()):
        (batch,) = busy()._batches._batches
        slots, step = batch.memory, bound_step()
        even, odd = batch.tick._replays
        assert even is not None
        assert odd is not None
        # The engine does not count these replays: a slot that moved on would leave its rows.
        slots.moves.zero_()
        x, out = slots.x[0], torch.empty_like(slots.x[0])

        def moved(output: Tensor) -> object:
            return step(x, output, 0, slots.seeds, want_x0=False, out=out)

        alone = capture(lambda: halved(x, slots.t), x.device)
        fused = capture(lambda: moved(halved(x, slots.t)), x.device)
    replays: dict[str, list[Callable[[], object]]] = {
        MODEL: [alone],
        TICK: [even, odd],
        STEP: [fused],
        BOUND: [lambda: moved(alone())],
    }

    def together(some: list[Callable[[], object]]) -> None:
        for k in range(TOGETHER):
            some[k % len(some)]()

    runs = {name: functools.partial(together, some) for name, some in replays.items()}
    taken = device_seconds(runs, TOGETHER, rounds, HEAD_START)
    us = {
        name: [(a - b) * 1e6 for a, b in zip(seconds, taken[MODEL], strict=True)]
        for name, seconds in taken.items()
    }
    of_all: Record = {"shape": [scale.SLOTS, *scale.SERVED]}
    tick = interval(us[TICK])
    yield of_all | {"figure": TICK, "us": tick, "required_us": US, "met": tick[0] <= US}
    for name in (STEP, BOUND):
        ratio = times(us[TICK], us[name])
        yield of_all | {"figure": name, "us": interval(us[name]), "tick_over_it": ratio}


def on_the_host(deadline: Deadline) -> Iterator[Record]:
    """Times ``Engine.step`` with all slots in use, and with one that finishes at each tick."""
    with limit(deadline.left()):
        engine, refilled = busy(), busy(refills=(TOGETHER + 2) * REPEATS)
        step, size = bound_step(), (scale.SLOTS, *scale.SERVED)
        x, output, out = (torch.zeros(size, device=scale.DEVICE) for _ in range(3))
    calls: dict[str, Callable[[], object]] = {
        HOST_BOUND: lambda: step(x, output, 3, want_x0=False, out=out),
        HOST_TICK: engine.step,
        HOST_REFILL: refilled.step,
    }
    taken = host_seconds(calls, REPEATS, TOGETHER, deadline.left())
    full, turning = engine.metrics(), refilled.metrics()
    # After its tick the slot of a finished request is free until the next one.
    if (full.active, turning.active) != (scale.SLOTS, scale.SLOTS - 1) or not turning.queued:
        raise WrongResultError("other slots were in use than those that were to be timed")
    us = {name: seconds * 1e6 for name, seconds in taken.items()}
    ratio = rounded(us[HOST_TICK] / us[HOST_BOUND])
    of_all: Record = {"shape": list(size)}
    yield of_all | {"figure": HOST_BOUND, "us": rounded(us[HOST_BOUND])}
    yield of_all | {
        "figure": HOST_TICK,
        "us": rounded(us[HOST_TICK]),
        "of_bound": ratio,
        "required": OF_BOUND,
        "met": ratio <= OF_BOUND,
    }
    yield of_all | {"figure": HOST_REFILL, "us": rounded(us[HOST_REFILL] - us[HOST_TICK])}


@functools.cache
def network() -> UNet:
    """The U-Net of both batch sizes, with random weights."""
    torch.manual_seed(0)
    return UNet(**CIFAR10).to(scale.DEVICE).eval().requires_grad_(False)


def alike(parts: int, deadline: Deadline) -> Iterator[Record]:
    """Times requests that are alike beside full static batches of ``slots / parts`` samples.

    The engine's model runs in a graph, where libraries may choose other kernels. Hence its samples
    may be as far from those of ``DDIM.sample`` as a rung of the ladder may.
    """
    slots, shape, device = scale.SLOTS, scale.SERVED_IMAGE, scale.DEVICE
    size, count = slots // parts, 2 * slots
    ddim = DDIM(scale.SERVED_STEPS)
    with limit(deadline.left()):
        model = network()
        engine = Engine(model, shape, slots, batch_size=size, ddim=ddim, device=device)
        loop = ddim.capture(model, (size, *shape), device=device)

        def static() -> Tensor:
            all_ = (count, *shape)
            return ddim.sample(
                model, shape=all_, seeds=range(count), batch_size=size, device=device
            )

        def captured() -> Tensor:
            return torch.cat([loop(seeds=range(i, i + size)) for i in range(0, count, size)])

        def served() -> Tensor:
            found = dict(engine.run(Request(seed) for seed in range(count)))
            return torch.stack([found[i] for i in range(count)])

        runs = {CAPTURED: captured, ENGINE: served}
        want, most = static(), TOLERANCE[torch.float32]
        found = {name: compared(name, run(), want, most) for name, run in runs.items()}
        runs[STATIC] = static
    taken = wall_seconds(runs, torch.cuda.synchronize, min(SECONDS, deadline.left()))
    for name, seconds in taken.items():
        of_static = times(taken[STATIC], seconds)
        row: Record = {
            "figure": name,
            "shape": [size, *shape],
            "slots": slots,
            "samples_per_s": interval([count / s for s in seconds]),
            "of_sample": of_static,
        }
        if name == ENGINE:
            row |= {"required": OF_STATIC, "met": of_static[0] >= OF_STATIC}
        yield row | {"rounds": len(seconds)} | found.get(name, {})
