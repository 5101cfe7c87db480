"""Section "loops": whole loops without a model, beside the original loop."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import plain
from benchmarks.children import Deadline
from benchmarks.loop import ORIGINAL, contenders, others
from benchmarks.sections import scale
from benchmarks.timing import (
    Record,
    WrongResultError,
    by,
    interval,
    limit,
    rounded,
    times,
    wall_seconds,
)


def loops(shape: tuple[int, ...], steps: int, eta: float, deadline: Deadline) -> Iterator[Record]:
    """Checks the result of every loop, then times the loops in turns."""
    label = {"shape": list(shape), "eta": eta, "steps": steps}
    with limit(deadline.left()):
        try:
            runs = contenders(shape, steps, eta, scale.DEVICE)
        except SystemExit as differs:
            raise WrongResultError(f"at {by(shape)}, eta {eta:g}: {differs}") from None
        found, missing = others(shape, steps, eta, scale.DEVICE)
    runs |= found
    taken = wall_seconds(runs, torch.cuda.synchronize, min(5.0, deadline.left()))
    held = plain.NUMBERS in taken
    for name, seconds in taken.items():
        yield label | {
            "loop": name,
            "us_per_step": [rounded(s / steps * 1e6) for s in interval(seconds)],
            "times_faster": times(taken[ORIGINAL], seconds),
            **({"times_plain": times(taken[plain.NUMBERS], seconds)} if held else {}),
            "rounds": len(seconds),
        }
    for name, reason in missing.items():
        yield label | {"loop": name, "failed": reason}
