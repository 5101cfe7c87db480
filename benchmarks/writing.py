"""Times the work of ``fastddim.generate`` beside the sampling: encoding, writing and hashing.

    python -m benchmarks.writing    # "writing" of benchmarks/results/<machine>.json

The sampler's calls are timed within each run of the embedded model. The rest of the run is the cost
of ``generate``, from the checks of its arguments to the finished manifest. Then the peak memory of
processes that make few and many images is measured, with a model that costs nothing.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import fastddim
from benchmarks.records import keep, provenance
from benchmarks.timing import Record, rounded
from fastddim import DDIM, embedded
from fastddim.tools.folder import FORMATS, Folder
from fastddim.tools.quality import Gaussian

STEPS, BATCH, SHAPE = 50, 64, (1, 28, 28)
COUNTS = (1_000, 100_000)


def shares(format: str, count: int, out: Path) -> Record:
    """The seconds of a run of ``count`` images, and the share of them outside the sampler."""
    sampling, sample = 0.0, DDIM.sample

    def clocked(*args: Any, **keywords: Any) -> Any:
        nonlocal sampling
        begin = time.perf_counter()
        x = sample(*args, **keywords)
        sampling += time.perf_counter() - begin
        return x

    model, ddim = embedded.load(), DDIM(steps=STEPS)
    begin = time.perf_counter()
    with mock.patch.object(DDIM, "sample", clocked):
        fastddim.generate(ddim, model, SHAPE, range(count), out, BATCH, format=format)
    seconds = time.perf_counter() - begin
    Folder.read(out).verify()
    return {
        "format": format,
        "images": count,
        "steps": STEPS,
        "batch": BATCH,
        "seconds": rounded(seconds),
        "outside": (seconds - sampling) / seconds,
        "us_an_image": rounded((seconds - sampling) / count * 1e6),
    }


def peak(count: int) -> float:
    """Peak memory in MiB of a new process that makes ``count`` images."""
    with tempfile.TemporaryDirectory() as folder:
        code = f"from benchmarks.writing import alone; alone({count}, {folder + '/out'!r})"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
    return rounded(int(done.stdout) / 1024)


def alone(count: int, out: str) -> None:
    """Makes the images and prints the process's peak memory in KiB."""
    fastddim.generate(DDIM(steps=1), Gaussian(0.0, 0.5), (1, 8, 8), range(count), out, 64)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=512, help="images of the embedded model")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for format in FORMATS:
            shares(format, BATCH, Path(folder) / f"first-{format}")  # loads modules and weights
            rows.append(shares(format, args.count, Path(folder) / format))
            row = rows[-1]
            print(
                f"{format}: {row['images']} images in {row['seconds']} s, {row['outside']:.2%} of "
                f"it outside the sampler, {row['us_an_image']} µs an image",
                flush=True,
            )
    memory = [{"images": count, "peak_mib": peak(count)} for count in COUNTS]
    for row in memory:
        print(f"{row['images']} images: at most {row['peak_mib']} MiB")
    section = provenance("python -m benchmarks.writing") | {"rows": rows, "memory": memory}
    print(f"wrote {keep('writing', section)}")


if __name__ == "__main__":
    main()
