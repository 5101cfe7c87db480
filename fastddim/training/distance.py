"""Measures the features of real garments, with which FD-clf compares.

    python -m fastddim.training.distance

The script writes the file that ships. It needs the images of Debian's package
``dataset-fashion-mnist`` (or ``--data DIR`` with the same four files). The file holds the mean and
the covariance (as a root) of the features of the 10,000 test images. For several N, it also holds
the mean and the standard deviation of the distance of N real images, over random draws of them.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastddim.embedded import classifier
from fastddim.tools.distance import FILE, SIZES, features
from fastddim.tools.quality import frechet_distance, moments
from fastddim.training.model import DATA
from fastddim.training.model import images as read


def measured(real: Tensor, n: int, draws: int, generator: torch.Generator) -> tuple[float, float]:
    """Returns mean and deviation of FD-clf between ``n`` random rows of ``real`` and the rest."""
    distances = []
    for _ in range(draws):
        order = torch.randperm(len(real), generator=generator)
        distances.append(frechet_distance(real[order[:n]], real[order[n:]]))
    return statistics.fmean(distances), statistics.pstdev(distances)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the four idx files")
    parser.add_argument(
        "--draws", type=int, default=200, help="random draws for each number of images"
    )
    parser.add_argument("--out", type=Path, default=FILE, help="the file to write")
    args = parser.parse_args()

    torch.set_num_threads(1)
    real = features(classifier.load(), read("t10k", args.data))
    generator = torch.Generator().manual_seed(0)
    scores = [measured(real, n, args.draws, generator) for n in SIZES]
    floors, spreads = zip(*scores, strict=True)
    mean, root = moments(real)
    tensors = {
        "mean": mean,
        "root": root,
        "floors": torch.tensor(floors),
        "spreads": torch.tensor(spreads),
    }
    command = f"python -m fastddim.training.distance --draws {args.draws}"
    save_file(
        {k: v.float().contiguous() for k, v in tensors.items()}, args.out, {"command": command}
    )
    for n, floor, spread in zip(SIZES, floors, spreads, strict=True):
        print(f"{n:>6,} real images {floor:10.4f} ± {spread:.4f}")


if __name__ == "__main__":
    main()
