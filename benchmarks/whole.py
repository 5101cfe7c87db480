"""Times whole calls with a model, and the share of the time that is spent outside the model.

    python -m benchmarks.whole    # "whole" of benchmarks/results/<machine>.json

The model's calls are timed within each run; on a CPU the rest of the run is the loop's own time.
All loops begin at the same x_T, and their results are compared with the original loop's before
anything is timed. The embedded model draws 16 images in 50 steps, and a model of CIFAR-10's size
(35.7 M parameters, random weights) draws 4 images in 10 steps.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.networks import CIFAR10, UNet
from benchmarks.peers import PEERS, Loops, Run, scheduler
from benchmarks.records import keep, provenance
from benchmarks.sections.ladder import TOLERANCE
from benchmarks.timing import Record, WrongResultError, interval, rounded, times, turn
from fastddim import embedded

ORIGINAL, PIPELINE = "original loop", "DDIMPipeline"


class Clocked:
    """A model with the seconds that its calls have taken; a pipeline accepts it as its U-Net."""

    dtype = torch.float32

    def __init__(self, model: nn.Module, shape: tuple[int, ...]) -> None:
        self.model, self.seconds = model, 0.0
        self.config = SimpleNamespace(in_channels=shape[1], sample_size=shape[2])

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        begin = time.perf_counter()
        output: Tensor = self.model(x, t)
        self.seconds += time.perf_counter() - begin
        return output


def pipeline(loops: Loops, model: Clocked, name: str) -> Run:
    """diffusers' pipeline with this scheduler; it draws the loops' x_T."""
    made: Any = importlib.import_module("diffusers").DDIMPipeline(
        # A pipeline passes one t for the whole batch; these models read one for each sample.
        unet=lambda x, t: SimpleNamespace(sample=model(x, t.expand(len(x)))),
        scheduler=scheduler("DDIMScheduler", loops.steps, "cpu"),
    )
    made.unet.config, made.unet.dtype = model.config, model.dtype
    made.scheduler = scheduler(name, loops.steps, "cpu")
    made.set_progress_bar_config(disable=True)

    def run() -> Tensor:
        images: Tensor = made(
            batch_size=loops.shape[0],
            generator=loops.stream(1),
            eta=loops.eta,
            num_inference_steps=loops.steps,
            output_type="pt",
        ).images
        return images

    return run


def garments() -> nn.Module:
    """The embedded model."""
    return embedded.load()


def cifar10() -> nn.Module:
    """A model of CIFAR-10's size with random weights."""
    torch.manual_seed(0)
    return UNet(**CIFAR10).eval().requires_grad_(False)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "embedded": (garments, (16, 1, 28, 28), 50),
    "CIFAR-10 size": (cifar10, (4, 3, 32, 32), 10),
}


def whole(name: str, rounds: int) -> list[Record]:
    """Checks and times the loops around one model, in turns."""
    make, shape, steps = CASES[name]
    model = Clocked(make(), shape)
    loops = Loops(shape, steps, 0.0, model=model)
    runs: dict[str, Run] = {
        ORIGINAL: loops.original,
        PIPELINE: pipeline(loops, model, "DDIMScheduler"),
        f"{PIPELINE}, FastDDIMScheduler": pipeline(loops, model, "FastDDIMScheduler"),
        PEERS["plain"].title: PEERS["plain"].make(loops),
        "DDIM.sample": loops.sample,
    }
    want = loops.original()
    for loop, run in runs.items():
        expected = (want / 2 + 0.5).clamp(0, 1) if loop.startswith(PIPELINE) else want
        off = ((run() - expected).norm() / expected.norm()).item()
        if not off <= TOLERANCE[torch.float32]:
            raise WrongResultError(f"{name}: {loop} is {off:.3g} off the original loop")
    total: dict[str, list[float]] = {loop: [] for loop in runs}
    outside: dict[str, list[float]] = {loop: [] for loop in runs}
    gc.disable()
    for k in range(rounds):
        for loop in turn(list(runs), k):
            model.seconds, begin = 0.0, time.perf_counter()
            runs[loop]()
            total[loop].append(time.perf_counter() - begin)
            outside[loop].append(total[loop][-1] - model.seconds)
            gc.collect()
    gc.enable()
    return [
        {
            "model": name,
            "shape": list(shape),
            "steps": steps,
            "loop": loop,
            "ms": [rounded(s * 1e3) for s in interval(total[loop])],
            "outside_us_per_step": [rounded(s / steps * 1e6) for s in interval(outside[loop])],
            "outside": times(outside[loop], total[loop]),
            "times_pipeline": times(total[PIPELINE], total[loop]),
            "rounds": rounds,
        }
        for loop in runs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each loop")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [row for name in args.models for row in whole(name, args.rounds)]
    for r in rows:
        share, us, faster = r["outside"], r["outside_us_per_step"], r["times_pipeline"]
        print(
            f"{r['model']:<14}{r['loop']:<36}{r['ms'][0]:>8} ms  outside {share[0]:.2%} "
            f"({share[1]:.2%} to {share[2]:.2%}), {us[0]} µs a step  "
            f"{PIPELINE} / it {faster[0]} ({faster[1]} to {faster[2]})"
        )
    if set(args.models) == set(CASES):  # or the record would lose the other models
        print(f"wrote {keep('whole', provenance('python -m benchmarks.whole') | {'rows': rows})}")


if __name__ == "__main__":
    main()
