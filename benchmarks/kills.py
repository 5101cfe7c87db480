"""Kills ``fastddim generate`` at random moments, lets it finish, and compares every byte.

    python -m benchmarks.kills --trials 20           # kills one of two workers, under
    --max-restarts python -m benchmarks.kills --trials 5 --tree     # kills torchrun, then all
    processes of a rerun

Each trial makes the same images as an undisturbed run and compares all files, the manifest among
them, with that run's files. The model is an exact ε that sleeps in each call.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from os import kill
from pathlib import Path

from torch import Tensor

from fastddim.tools.folder import MANIFEST, Folder
from fastddim.tools.quality import Gaussian

SHAPE = (3, 8, 8)
FORMATS = ("npy", "png")


class Slow(Gaussian):
    """The exact ε of data from N(0, ¼), 10 ms a call."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time.sleep(0.01)
        return super().forward(x, t)


def model() -> tuple[Slow, tuple[int, int, int]]:
    """The model and its shape, as ``--model`` loads them."""
    return Slow(0.0, 0.5), SHAPE


def start(out: Path, format: str, count: int) -> subprocess.Popen[str]:
    """Starts two workers under torchrun that make ``count`` images in ``out``."""
    command = (
        f"-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 3 "
        f"-m fastddim generate --seeds 0-{count - 1} --out {out} --format {format} "
        f"--model benchmarks.kills:model --device cpu "
        f"--steps 5 --eta 1 --batch-size 16 --shard-size 48"
    )
    return subprocess.Popen(
        [sys.executable, *command.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def workers(parent: int) -> list[int]:
    """The child processes of ``parent``."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def alive(pid: int) -> bool:
    """True if the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def content(out: Path) -> dict[str, bytes]:
    """The bytes of all files by name, including hidden files."""
    files = (file for file in out.rglob("*") if file.is_file())
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def begun(out: Path) -> None:
    """Waits until the manifest exists, which a run writes first."""
    while not (out / MANIFEST).exists():
        time.sleep(0.01)


def ended(run: subprocess.Popen[str]) -> None:
    """Waits for the run's end, and raises if it has failed."""
    output, _ = run.communicate(timeout=300)
    if run.returncode:
        raise SystemExit(f"torchrun ended with {run.returncode}:\n{output}")


def one_worker(out: Path, format: str, count: int, moment: float) -> str:
    """Kills a random worker ``moment`` seconds after the work has begun."""
    run = start(out, format, count)
    begun(out)
    time.sleep(moment)
    there = Folder.read(out).count()
    if not (victims := workers(run.pid)):
        ended(run)
        return "no worker was left"
    victim = random.choice(victims)
    with suppress(ProcessLookupError):
        kill(victim, signal.SIGKILL)
    ended(run)
    return f"worker {victims.index(victim)} killed at {moment:.2f} s with {there} images there"


def whole_tree(out: Path, format: str, count: int, moment: float) -> str:
    """Kills torchrun, whose workers must then end; reruns and kills all processes; reruns."""
    run = start(out, format, count)
    begun(out)
    time.sleep(moment / 2)
    left = workers(run.pid)
    run.kill()
    killed = time.perf_counter()
    while any(map(alive, left)):
        if time.perf_counter() - killed > 10:
            raise SystemExit(f"workers {left} have outlived torchrun")
        time.sleep(0.01)
    outlived = time.perf_counter() - killed
    run.communicate()
    first = Folder.read(out).count()
    run = start(out, format, count)
    while not (now := workers(run.pid)):
        time.sleep(0.01)
    time.sleep(moment / 2 + 3)  # importing takes about 3 s
    for pid in (run.pid, *now):
        with suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)
    run.communicate()
    second = Folder.read(out).count()
    ended(start(out, format, count))
    return (
        f"torchrun killed with {first} images there, its workers gone {outlived:.2f} s later; "
        f"all killed with {second}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--trials", type=int, default=20, help="number of trials")
    parser.add_argument("--count", type=int, default=1003, help="images in each trial")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--tree", action="store_true", help="kill torchrun, then all processes")
    args = parser.parse_args()
    random.seed(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    try:
        undisturbed, seconds = {}, {}
        for format in FORMATS:
            run = start(folder / format, format, args.count)
            begun(folder / format)
            before = time.perf_counter()
            while not Folder.read(folder / format).checksums and run.poll() is None:
                time.sleep(0.01)
            seconds[format] = time.perf_counter() - before
            ended(run)
            undisturbed[format] = content(folder / format)
        for trial in range(args.trials):
            format = FORMATS[trial % len(FORMATS)]
            out = folder / f"trial-{trial}"
            disturb = whole_tree if args.tree else one_worker
            report = disturb(out, format, args.count, random.uniform(0, seconds[format]))
            Folder.read(out).verify()
            if content(out) != undisturbed[format]:
                raise SystemExit(f"trial {trial}: {report}; other bytes, kept in {out}")
            print(f"trial {trial}, {format}: {report}; complete, the same bytes", flush=True)
            shutil.rmtree(out)
        print(f"{args.trials} of {args.trials} trials complete and byte-identical")
    except BaseException:
        print(f"the files are left in {folder}", file=sys.stderr)
        raise
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
