"""Measures FD-clf against the number of model calls, for all samplers on the same seeds.

    python -m benchmarks.calls                        # 2,000 seeds, under ten minutes
    python -m benchmarks.calls --seeds 64 --results /tmp/record

Images of one set differ more from those of another set than good samplers do from each other, so
all samplers draw the same seeds, and a ratio has the interval of a bootstrap over seeds (95%). The
seeds are not those of the search of ``benchmarks/tau.json``, which ``fastddim tune --out
benchmarks/tau.json`` has written. Features of a finished sampler are kept in ``--features``, and a
later run with the same folder goes on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.records import RESULTS, keep, provenance
from benchmarks.timing import Record, rounded
from fastddim import DDIM, Tuned, embedded
from fastddim.step.op import initial_noise
from fastddim.tools import distance, draw
from fastddim.tools.quality import frechet_distance

FIRST = 10_000
"""The first seed; the search of ``tau.json`` uses seeds from 0."""
BATCH = 100
DRAWS = 200
TAU = Path(__file__).with_name("tau.json")
MIXED = 8
"""The number of steps of diffusers' scheduler, on the timesteps of ``mixed``."""


def samplers() -> dict[str, DDIM]:
    """The samplers by the name that they have in the record."""
    tuned = Tuned.read(TAU)
    found = {f"{S} order 1": DDIM(S) for S in (6, 8, 10, 16, 20, 50)}
    for spacing in ("uniform", "linspace", "mixed", "trailing", "logsnr", "karras"):
        for S in (6, 8, 10) if spacing in ("uniform", "mixed") else (6, 8):
            found[f"{S} order 2 {spacing}"] = DDIM(S, order=2, spacing=spacing)
    for S in tuned.steps:
        found[f"{S} order 2 tuned"] = DDIM(S, order=2, spacing=tuned)
    for S, order in ((10, 2), (20, 1), (10, 1), (20, 2)):
        found[f"{S} order {order} eta 1"] = DDIM(S, eta=1.0, order=order)
    return found


def ratios(names: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of samplers that are compared."""
    best = [(f"{S} order 2 tuned", f"{S} order 2 mixed") for S in (6, 8, 10)]
    wanted = [
        ("8 order 2 mixed", "50 order 1"),
        ("10 order 2 mixed", "50 order 1"),
        ("10 order 2 uniform", "50 order 1"),
        ("6 order 2 mixed", "16 order 1"),
        ("10 order 2 eta 1", "20 order 1 eta 1"),
        *best,
        (f"{MIXED} diffusers mixed", f"{MIXED} order 2 mixed"),
    ]
    return [(a, b) for a, b in wanted if a in names and b in names]


def features(ddim: DDIM, seeds: range, model: Any, real: distance.Real) -> Tensor:
    batches = draw.by_seed(ddim, model, seeds, embedded.SHAPE, min(BATCH, len(seeds)))
    return torch.cat([real.of(x) for x in batches])


def of_diffusers(seeds: range, model: Any, real: distance.Real) -> Tensor:
    """The features that DPMSolverMultistepScheduler draws from the same x_T on the same τ."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    timesteps = [t for t, _ in DDIM(MIXED, spacing="mixed").pairs]
    found = []
    for first in range(seeds.start, seeds.stop, BATCH):
        keys = torch.arange(first, min(first + BATCH, seeds.stop))
        scheduler = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02)
        scheduler.set_timesteps(timesteps=timesteps)
        x = initial_noise(keys, (len(keys), *embedded.SHAPE))
        with torch.inference_mode():
            for t in scheduler.timesteps:
                output = model(x, t.expand(len(x)))
                (x,) = scheduler.step(output, t, x, return_dict=False)
        found.append(real.of(x))
    return torch.cat(found)


def interval(a: Tensor, b: Tensor, real: distance.Real) -> list[float]:
    """The ratio of two distances, with the 95% interval of a bootstrap over the seeds."""
    drawn = np.random.default_rng(0).integers(0, len(a), (DRAWS, len(a)))
    found = [
        frechet_distance(a[index], real.moments) / frechet_distance(b[index], real.moments)
        for index in torch.from_numpy(drawn)
    ]
    ratio = frechet_distance(a, real.moments) / frechet_distance(b, real.moments)
    return [rounded(v) for v in (ratio, *np.quantile(found, [0.025, 0.975]).tolist())]


def measured(folder: Path | None, seeds: range) -> Mapping[str, Tensor]:
    """The features of every sampler; a finished one is read from ``folder``."""
    model, real = embedded.load(), distance.load()
    found: dict[str, Tensor] = {}
    todo: dict[str, Any] = {**samplers(), f"{MIXED} diffusers mixed": None}
    for name, ddim in todo.items():
        path = None if folder is None else folder / f"{name}.pt"
        if path is not None and path.exists():
            found[name] = torch.load(path)
            continue
        begin = time.perf_counter()
        if ddim is None:
            found[name] = of_diffusers(seeds, model, real)
        else:
            found[name] = features(ddim, seeds, model, real)
        if path is not None:
            torch.save(found[name], path)
        print(
            f"{name}: FD-clf {frechet_distance(found[name], real.moments):.4f} "
            f"({time.perf_counter() - begin:.0f} s)",
            flush=True,
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2000, help="number of images a sampler")
    parser.add_argument("--features", type=Path, help="folder that keeps finished samplers")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    args = parser.parse_args(arguments)
    if args.seeds < 8:
        parser.error(f"--seeds must be at least 8, got {args.seeds}")
    if args.features is not None:
        args.features.mkdir(parents=True, exist_ok=True)
    seeds = range(FIRST, FIRST + args.seeds)
    found = measured(args.features, seeds)
    real = distance.load()
    rows = [
        {"sampler": name, "fd_clf": rounded(frechet_distance(x, real.moments))}
        for name, x in found.items()
    ]
    compared: list[Record] = []
    for a, b in ratios(list(found)):
        compared.append({"sampler": a, "beside": b, "ratio": interval(found[a], found[b], real)})
        print("  ".join(map(str, compared[-1].values())), flush=True)
    content = {
        **provenance("python -m benchmarks.calls"),
        "seeds": f"{FIRST}-{seeds.stop - 1}",
        "real": [rounded(real.floor(args.seeds)), rounded(real.spread(args.seeds))],
        "rows": rows,
        "ratios": compared,
    }
    print(f"wrote {keep('calls', content, args.results)}")


if __name__ == "__main__":
    main()
