"""Times the loops without a model, beside the original loop: the README's table.

    python -m benchmarks.loop           # "loop" of benchmarks/results/<machine>.json
    python -m benchmarks.loop --busy    # "loop-busy", beside another busy process
    python -m benchmarks.loop --shape 1 16 7 --repeats 20    # another shape; not kept

The result of every loop is checked before anything is timed: the drop-in's against the original
loop's and ``DDIM.sample``'s against the reference step on its own table, bit for bit, and other
people's as ``benchmarks.peers`` describes. Where numba is installed, fastddim's loops run twice: on
PyTorch's operations and on the fused pass.
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
    first_line,
    interval,
    rounded,
    times,
    turn,
)
from fastddim.step import backends
from fastddim.tools.provenance import cpu_name

ORIGINAL = "original loop"
SHAPE = (64, 3, 256, 256)
LEAST = 6
"""Fewest repeats whose least and greatest values are a 95% interval."""


def contenders(
    shape: tuple[int, ...], steps: int, eta: float, device: str = "cpu"
) -> dict[str, Run]:
    """Loops as calls without arguments that return the last x; the original loop comes first."""
    loops = Loops(shape, steps, eta, device)

    def native_eager() -> torch.Tensor:
        return loops.eager(loops.stream(3))

    rng_state = torch.get_rng_state if device == "cpu" else torch.cuda.get_rng_state
    torch.manual_seed(4)
    wanted, left = loops.original(), rng_state()
    wanted_native = native_eager()
    runs: dict[str, Run] = {ORIGINAL: loops.original}
    drop_ins = [loops.drop_in, loops.drop_in_last] if len(shape) == 4 else []  # of images
    if device != "cpu":  # a second base: most of the original's time is copies to the CPU
        runs["reference.ddim_step"] = native_eager
    for path in paths(device):
        with path() as name:
            for run in drop_ins:
                torch.manual_seed(4)
                if not (torch.equal(run(), wanted) and torch.equal(rng_state(), left)):
                    raise SystemExit(
                        f"{run.__name__}{name} differs from the original loop: nothing was timed"
                    )
            if not torch.equal(loops.sample(), wanted_native):
                raise SystemExit(f"DDIM.sample{name} differs from the reference: nothing was timed")
            counter = bool(eta) and path is not pytorch
            if counter and not torch.equal(loops.sample_seeds(), loops.eager_seeds()):
                raise SystemExit(
                    f"DDIM.sample(seeds=){name} differs from the reference: nothing was timed"
                )
        found: dict[str, Run] = {}
        if drop_ins:
            found["generalized_steps"], found['generalized_steps(keep="last")'] = drop_ins
        found["DDIM.sample(generator=)"] = loops.sample
        # Philox in NumPy takes minutes, and is not used where numba is installed.
        found |= {"DDIM.sample(seeds=)": loops.sample_seeds} if counter else {}
        runs |= {loop + name: on(path, run) for loop, run in found.items()}
    return runs


def others(
    shape: tuple[int, ...], steps: int, eta: float, device: str = "cpu"
) -> tuple[dict[str, Run], dict[str, str]]:
    """(the other peers, why some are missing).

    On a GPU the peers are the plain loop, diffusers' scheduler and ours; compiled steps are timed
    in the section "peers".
    """
    loops = Loops(shape, steps, eta, device)
    found: dict[str, Run] = {}
    missing: dict[str, str] = {}
    # On a GPU the contender reference.ddim_step already has its factors as tensors.
    on_cpu = ("tensors", "compile", "same") if device == "cpu" else ()
    for name in ("plain", *on_cpu, "diffusers"):
        peer = PEERS[name]
        try:
            found[peer.title] = peer.ready(loops)
        except MissingError as error:
            missing[peer.title] = str(error)
    scheduler = PEERS["scheduler"]
    if device != "cpu":
        # Bit identity is promised on a CPU; a GPU's eager PyTorch divides by a scalar differently.
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
        # A GPU's machine may have diffusers without the packages that it imports.
        missing[scheduler.title] = first_line(error)
    return found, missing


def paths(device: str) -> list[Backend]:
    """The backends that take fastddim's steps in turn."""
    if device != "cpu":
        return [lambda: contextlib.nullcontext("")]
    return [pytorch, numba] if "numba" in backends.available("cpu") else [pytorch]


def measure(
    runs: dict[str, Run], repeats: int, wait: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each run, taken in turns so that a slow minute falls on all runs alike.

    ``wait`` returns once the device has finished.
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
            "times_original": times(seconds[ORIGINAL], took),
        }
        | {key: times(seconds[base], took) for key, base in bases.items() if base in seconds}
        for name, took in seconds.items()
    ]


def spin() -> None:
    """Keeps a core busy."""
    while True:
        math.sqrt(2.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs="+", default=SHAPE, help="shape of x")
    # The first touch of memory costs more than a step, so a run takes many steps.
    parser.add_argument("--steps", type=int, default=50, help="steps of each loop")
    parser.add_argument("--repeats", type=int, default=LEAST, help="timed runs of each loop")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's threads")
    parser.add_argument("--busy", action="store_true", help="run beside another busy process")
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
    bases = ("original", "plain", "tensors", "same")
    print("plain, tensors: a plain loop, its factors precomputed as numbers, or as tensors")
    print("same: torch.compile of the reference step")
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
