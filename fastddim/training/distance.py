"""Measures what FD-clf compares with: the features of real garments.

    python -m fastddim.training.distance

makes the file that ships, of the images of Debian's package ``dataset-fashion-mnist`` (or ``--data
DIR`` with the same four files): the mean and the covariance of the features of the 10,000 test
images, and the mean and standard deviation, over draws, of the distance of N real images.
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
    """FD-clf of ``n`` of the features ``real``, drawn at random, to the rest: (mean, deviation)."""
    found = []
    for _ in range(draws):
        order = torch.randperm(len(real), generator=generator)
        found.append(frechet_distance(real[order[:n]], real[order[n:]]))
    return statistics.fmean(found), statistics.pstdev(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the four idx files")
    parser.add_argument("--draws", type=int, default=200, help="for each number of images")
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
