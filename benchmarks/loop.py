"""The loop without its model, against the original loop: the README's table.

    python -m benchmarks.loop           # keeps it as "loop" of benchmarks/results/<machine>.json
    python -m benchmarks.loop --busy    # beside one other busy process, as "loop-busy"
    python -m benchmarks.loop --shape 1 16 7 --repeats 20    # any other shape, not kept

Every contender's result is checked before anything is timed: the drop-in against the original loop,
``DDIM.sample`` against the reference step on its own table, all bit for bit, and other people's
steps as ``benchmarks.peers`` says. Where numba is installed fastddim's run twice, on PyTorch's
operations and on the fused pass.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.peers import PEERS, Backend, Loops, MissingError, Run, numba, on, pytorch
from benchmarks.records import keep, provenance
from benchmarks.timing import (
    Record,
    WrongResultError,
    by,
    interval,
    last_line,
    rounded,
    times,
    turn,
)
from fastddim.step import backends
from fastddim.tools.provenance import cpu_name

SEED = "original loop"
SHAPE = (64, 3, 256, 256)
LEAST = 6
"""The fewest repeats of which the least and the greatest are a 95% interval."""


def contenders(
    shape: tuple[int, ...], steps: int, eta: float, device: str = "cpu"
) -> dict[str, Run]:
    """Each loop as a call without arguments that returns the last x; the seed's comes first."""
    loops = Loops(shape, steps, eta, device)

    def native_eager() -> torch.Tensor:
        return loops.eager(loops.stream(3))

    rng_state = torch.get_rng_state if device == "cpu" else torch.cuda.get_rng_state
    torch.manual_seed(4)
    wanted, left = loops.seed(), rng_state()
    wanted_native = native_eager()
    runs: dict[str, Run] = {SEED: loops.seed}
    drop_ins = [loops.drop_in, loops.drop_in_last] if len(shape) == 4 else []  # theirs is of images
    if device != "cpu":  # where what the original loop pays for most is its copies to the CPU
        runs["reference.ddim_step"] = native_eager
    for path in paths(device):
        with path() as name:
            for run in drop_ins:
                torch.manual_seed(4)
                if not (torch.equal(run(), wanted) and torch.equal(rng_state(), left)):
                    raise SystemExit(
                        f"{run.__name__}{name} is not the original loop: nothing was timed"
                    )
            if not torch.equal(loops.sample(), wanted_native):
                raise SystemExit(f"DDIM.sample{name} is not the reference: nothing was timed")
            counter = bool(eta) and path is not pytorch
            if counter and not torch.equal(loops.sample_seeds(), loops.eager_seeds()):
                raise SystemExit(f"DDIM.sample(seeds=){name} is not the reference: nothing timed")
        found: dict[str, Run] = {}
        if drop_ins:
            found["generalized_steps"], found['generalized_steps(keep="last")'] = drop_ins
        found["DDIM.sample(generator=)"] = loops.sample
        # Philox in numpy takes minutes here and is nobody's choice where numba is installed.
        found |= {"DDIM.sample(seeds=)": loops.sample_seeds} if counter else {}
        runs |= {loop + name: on(path, run) for loop, run in found.items()}
    return runs


def others(
    shape: tuple[int, ...], steps: int, eta: float, device: str = "cpu"
) -> tuple[dict[str, Run], dict[str, str]]:
    """The peers that are no function of the original loop's, and why others cannot be had here.

    On a GPU these are a plain loop, diffusers' scheduler and ours: a compiled step has a section of
    its own.
    """
    loops = Loops(shape, steps, eta, device)
    found: dict[str, Run] = {}
    missing: dict[str, str] = {}
    # On a GPU the reference step, one of the contenders, has its factors as tensors already.
    on_cpu = ("tensors", "compile", "same") if device == "cpu" else ()
    for name in ("plain", *on_cpu, "diffusers"):
        peer = PEERS[name]
        try:
            found[peer.title] = peer.ready(loops)
        except MissingError as error:
            missing[peer.title] = str(error)
    scheduler = PEERS["scheduler"]
    if device != "cpu":
        # Bit for bit is promised on a CPU: on a GPU eager PyTorch divides by a scalar otherwise.
        scheduler = replace(scheduler, check=Loops.near)
    try:
        for path in paths(device):
            with path() as name:
                ours = scheduler.ready(loops)
            found[scheduler.title + name] = on(path, ours)
    except MissingError as error:
        missing[scheduler.title] = str(error)
    except WrongResultError:
        raise
    except Exception as error:
        if device == "cpu":
            raise
        # A GPU's machine may have diffusers without all that it imports.
        missing[scheduler.title] = last_line(error)
    return found, missing


def paths(device: str) -> list[Backend]:
    if device != "cpu":
        return [lambda: contextlib.nullcontext("")]
    return [pytorch, numba] if "numba" in backends.available("cpu") else [pytorch]


def measure(
    runs: dict[str, Run], repeats: int, wait: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each run, taken in turns so that a slow minute falls on all alike.

    ``wait`` returns once the device has done what it was given.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    wait()
    gc.disable()
    for k in range(repeats):
        for name in turn(list(runs), k):
            begin = time.perf_counter()
            runs[name]()
            wait()
            seconds[name].append(time.perf_counter() - begin)
            gc.collect()
    gc.enable()
    return seconds


def rows_of(seconds: dict[str, list[float]], eta: float, steps: int) -> list[Record]:
    bases = {f"times_{name}": PEERS[name].title for name in ("plain", "tensors", "same")}
    return [
        {
            "eta": eta,
            "loop": name,
            "ms_per_step": [rounded(s / steps * 1e3) for s in interval(took)],
            "times_seed": times(seconds[SEED], took),
        }
        | {key: times(seconds[base], took) for key, base in bases.items() if base in seconds}
        for name, took in seconds.items()
    ]


def spin() -> None:
    while True:
        math.sqrt(2.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs="+", default=SHAPE)
    # Memory touched for the first time costs more than a step, once in a run.
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=LEAST)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", action="store_true", help="beside one other busy process")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape, rows = tuple(args.shape), []
    other = multiprocessing.get_context("spawn").Process(target=spin, daemon=True)
    if args.busy:
        other.start()
    try:
        for eta in (0.0, 1.0):
            case = shape, args.steps, eta
            seconds = measure(contenders(*case) | others(*case)[0], args.repeats)
            rows += rows_of(seconds, eta, args.steps)
    finally:
        if args.busy:
            other.terminate()
    print(f"{by(shape)}, {args.steps} steps, {args.threads} threads, {cpu_name()}")
    bases = ("seed", "plain", "tensors", "same")
    print("plain, tensors: a plain loop, its factors made before as numbers, or as tensors")
    print("same: torch.compile of the reference step, the very same maths")
    head = "".join(f"{f'{base}/it':>11}{'(95% interval)':>21}" for base in bases)
    print(f"{'eta':>4}  {'loop':<45}{'ms/step':>9}{head}")
    for r in rows:
        print(f"{r['eta']:>4.0f}  {r['loop']:<45}{r['ms_per_step'][0]:>9}", end="")
        for base in bases:
            ratio, low, high = r.get(f"times_{base}", ("", "", ""))
            print(f"{ratio:>11}{f'({low} to {high})' if low else '':>21}", end="")
        print()
    section = provenance("python -m benchmarks.loop") | {
        "shape": shape,
        "steps": args.steps,
        "repeats": args.repeats,
        "rows": rows,
    }
    if shape == SHAPE and args.repeats >= LEAST:
        print(f"wrote {keep('loop' + '-busy' * args.busy, section)}")


if __name__ == "__main__":
    main()
