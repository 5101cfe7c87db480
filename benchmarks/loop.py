"""The loop without its model, against the loop people run: medians of interleaved runs.

    python -m benchmarks.loop                 # writes benchmarks/results/loop-<machine>.json
    python -m benchmarks.loop --busy          # beside one other busy process

The model returns a tensor made beforehand, so that all that is timed stands between two model
calls. Every contender's result is checked before anything is timed: the drop-in against the
seed's loop, ``DDIM.sample`` against the reference step on its own table, all bit for bit. Where
numba is installed each runs twice, on PyTorch's operations and on the fused pass.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import multiprocessing
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

import fastddim
from fastddim import cpu, reference
from fastddim.noise import STEP

Run = Callable[[], Tensor]
Backend = Callable[[], contextlib.AbstractContextManager[str]]
RESULTS = Path(__file__).parent / "results"


def contenders(
    shape: tuple[int, ...], steps: int, eta: float, device: str = "cpu"
) -> dict[str, Run]:
    """Each loop as a call without arguments that returns the last x; the seed's comes first."""

    def stream(seed: int) -> torch.Generator:
        return torch.Generator(device).manual_seed(seed)

    x = torch.randn(shape, generator=stream(1), device=device)
    eps = torch.randn(shape, generator=stream(2), device=device)
    betas = torch.linspace(1e-4, 0.02, 1000, device=device)
    seq = range(0, 1000, 1000 // steps)
    ddim = fastddim.DDIM(steps=steps, eta=eta)
    table, noisy = torch.tensor(ddim.table, device=device), (ddim.table[:, 5] != 0).tolist()
    seeds = torch.arange(shape[0], device=device)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return eps

    def seed_loop() -> Tensor:
        return reference.generalized_steps(x, seq, model, betas, eta)[0][-1]

    def drop_in() -> Tensor:
        return fastddim.generalized_steps(x, seq, model, betas, eta)[0][-1]

    def drop_in_last() -> Tensor:
        return fastddim.generalized_steps(x, seq, model, betas, eta, keep="last")[0][-1]

    def native() -> Tensor:
        return ddim.sample(model, x, generator=stream(3))

    def native_seeds() -> Tensor:
        return ddim.sample(model, x, seeds=range(shape[0]))

    def eager() -> Tensor:
        state, generator = x, stream(3)
        for row, draw in zip(table.unbind(), noisy, strict=True):
            z = torch.randn(shape, generator=generator, device=device) if draw else None
            state, _ = reference.ddim_step(state, eps, row, z)
        return state

    def eager_seeds() -> Tensor:
        state, z = x, torch.empty_like(x)
        rows = torch.arange(steps, dtype=torch.int32, device=device)
        for row in range(steps):
            torch.ops.fastddim.normal_(z, seeds, rows[row].expand(shape[0]), STEP)
            state, _ = reference.ddim_step(state, eps, table[row], z)
        return state

    rng_state = torch.get_rng_state if device == "cpu" else torch.cuda.get_rng_state
    torch.manual_seed(4)
    wanted, left = seed_loop(), rng_state()
    wanted_native = eager()
    runs: dict[str, Run] = {"seed's loop": seed_loop}
    if device != "cpu":  # where what the seed's loop pays for most is its copies to the CPU
        runs["reference.ddim_step"] = eager
    for path in paths(device):
        with path() as name:
            for run in (drop_in, drop_in_last):
                torch.manual_seed(4)
                if not (torch.equal(run(), wanted) and torch.equal(rng_state(), left)):
                    raise SystemExit(f"{run.__name__}{name} is not the seed's loop: nothing timed")
            if not torch.equal(native(), wanted_native):
                raise SystemExit(f"DDIM.sample{name} is not the reference: nothing was timed")
            if eta and path is not pytorch and not torch.equal(native_seeds(), eager_seeds()):
                raise SystemExit(f"DDIM.sample(seeds=){name} is not the reference: nothing timed")
        found: dict[str, Run] = {
            "generalized_steps": drop_in,
            'generalized_steps(keep="last")': drop_in_last,
            "DDIM.sample(generator=)": native,
        }
        # Philox in numpy takes minutes here and is nobody's choice where numba is installed.
        found |= {"DDIM.sample(seeds=)": native_seeds} if eta and path is not pytorch else {}
        runs |= {loop + name: on(path, run) for loop, run in found.items()}
    return runs


@contextlib.contextmanager
def pytorch() -> Iterator[str]:
    """The step's PyTorch operations, where numba is installed too."""
    usual = cpu._fused
    cpu._fused = lambda: None  # type: ignore[assignment]
    try:
        yield ", PyTorch"
    finally:
        cpu._fused = usual


@contextlib.contextmanager
def numba() -> Iterator[str]:
    yield ", numba"


def paths(device: str) -> list[Backend]:
    if device != "cpu":
        return [lambda: contextlib.nullcontext("")]
    return [pytorch, numba] if cpu._fused() else [lambda: contextlib.nullcontext(", PyTorch")]


def on(path: Backend, run: Run) -> Run:
    def there() -> Tensor:
        with path():
            return run()

    return there


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
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            wait()
            seconds[name].append(time.perf_counter() - begin)
            gc.collect()
    gc.enable()
    return seconds


def spin() -> None:
    while True:
        math.sqrt(2.0)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        out = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=RESULTS.parent
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return out.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs="+", default=[64, 3, 256, 256])
    # Memory touched for the first time costs more than a step, once in a run.
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
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
            seconds = measure(contenders(shape, args.steps, eta), args.repeats)
            base = seconds["seed's loop"]
            for name, took in seconds.items():
                ratios = [b / a for a, b in zip(took, base, strict=True)]
                rows.append(
                    {
                        "eta": eta,
                        "loop": name,
                        "ms_per_step": round(statistics.median(took) / args.steps * 1e3, 2),
                        "ratio": round(statistics.median(base) / statistics.median(took), 2),
                        "ratio_low": round(min(ratios), 2),
                        "ratio_high": round(max(ratios), 2),
                    }
                )
    finally:
        if args.busy:
            other.terminate()
    print(f"{'x'.join(map(str, shape))}, {args.steps} steps, {args.threads} threads, {cpu_name()}")
    print(f"{'eta':>4}  {'loop':<41}{'ms/step':>9}{'seed/it':>9}{'(least to most)':>18}")
    for r in rows:
        span = f"({r['ratio_low']} to {r['ratio_high']})"
        print(f"{r['eta']:>4.0f}  {r['loop']:<41}{r['ms_per_step']:>9}{r['ratio']:>9}{span:>18}")
    record = {
        "command": " ".join(["python -m benchmarks.loop", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": cpu_name(),
        "commit": commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | ({"numba": version("numba")} if cpu._fused() else {}),
        "shape": shape,
        "steps": args.steps,
        "repeats": args.repeats,
        "threads": args.threads,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    name = "-".join(cpu_name().lower().replace("(r)", "").split()[:3])
    path = RESULTS / f"loop-{name}{'-busy' * args.busy}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
