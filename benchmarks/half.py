"""Times a step of a half precision state: FastDDIMScheduler beside the original, on a CPU.

    python -m benchmarks.half

Both take the same steps of a loop without a model, whose states must be equal, bit for bit, before
they are timed in turns. With η = 1 the noise is given, so that no draw hides the step. The loop
keeps its last state alone, as a pipeline does.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from benchmarks.markdown import duration, grid, met, span
from benchmarks.timing import WrongResultError, by, interval, times, wall_seconds
from fastddim.dropins.diffusers import FastDDIMScheduler

SHAPES: dict[tuple[int, ...], tuple[int, float | None]] = {
    (1, 16, 7): (50, None),
    (4, 4, 64, 64): (50, 1.0),
    (64, 3, 256, 256): (8, 3.0),
}
"""The steps of a loop, and how many times as fast as the original the drop-in must be."""
HALVES = (torch.bfloat16, torch.float16)
Run: TypeAlias = Callable[[], Tensor]
diffusers: Any = importlib.import_module("diffusers")  # without its types


def loop(scheduler: Any, x: Tensor, output: Tensor, z: Tensor, eta: float, steps: int) -> Run:
    """The first steps of a loop of 50: after the last, the drop-in frees its memory."""
    made = scheduler(clip_sample=False)
    made.set_timesteps(50)

    def run() -> Tensor:
        x_s = x
        for t in made.timesteps[:steps]:
            x_s = made.step(output, t, x_s, eta=eta, variance_noise=z if eta else None).prev_sample
        return x_s

    return run


def row(
    shape: tuple[int, ...], dtype: torch.dtype, eta: float, seconds: float, least: int
) -> list[str]:
    """The times of a step and their ratio."""
    steps, required = SHAPES[shape]
    g = torch.Generator().manual_seed(0)
    x, output, z = (torch.randn(shape, generator=g).to(dtype) for _ in range(3))
    given = x, output, z, eta, steps
    runs = {
        "original": loop(diffusers.DDIMScheduler, *given),
        "fast": loop(FastDDIMScheduler, *given),
    }
    if not torch.equal(runs["original"](), runs["fast"]()):
        raise WrongResultError(f"{by(shape)}, {dtype}: the states differ")
    taken = wall_seconds(runs, lambda: None, seconds, least, 200)
    ratio = times(taken["original"], taken["fast"])
    us = {name: duration(interval(of)[0] / steps * 1e6) for name, of in taken.items()}
    verdict = (
        "" if required is None else f"; required: ≥ {required:g}×, met: {met(ratio, required)}"
    )
    name = f"{by(shape)}, {str(dtype).removeprefix('torch.')}, η = {eta:g}"
    return [name, us["original"], us["fast"], span(ratio) + verdict]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="of each row (default: 3)")
    parser.add_argument("--rounds", type=int, default=9, help="at least, of each row (default: 9)")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    head = ["a step", "diffusers", "fastddim", "times diffusers"]
    rows = [
        row(shape, dtype, eta, args.seconds, args.rounds)
        for shape in SHAPES
        for dtype in HALVES
        for eta in (0.0, 1.0)
    ]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print(grid(head, *rows))


if __name__ == "__main__":
    main()
