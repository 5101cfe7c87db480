"""FD-clf: the Fréchet distance of drawn garments to real ones, in the classifier's features.

    python -m fastddim.embedded.distance

makes the file that ships, of the images of Debian's package ``dataset-fashion-mnist`` (or ``--data
DIR`` with the same four files): the mean and the covariance of the features of the 10,000 test
images, and the floor, what N real ones score. No image is needed to measure with it. It is a
distance in these 64 features and no FID.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastddim import images, weights
from fastddim.embedded import classifier
from fastddim.quality import Moments, frechet_distance, moments

FILE = Path(__file__).with_name("real.safetensors")

SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 5000)
"""The N whose floor is measured; at the last it is the distance of two halves of the test set."""


@dataclass(frozen=True)
class Real:
    """What is known of real garments.

    Attributes:
        critic: the classifier whose features are compared.
        moments: of the features of the test images, float64.
        floors: the floor for each of ``SIZES``, float64.
    """

    critic: classifier.Classifier
    moments: Moments
    floors: Tensor

    def distance(self, x: Tensor) -> float:
        """FD-clf of images (N, 1, 28, 28) in [-1, 1], N ≥ 2, as the 8-bit pictures they become.

        It falls with N, which is why the floor is that of as many images.
        """
        return frechet_distance(features(self.critic, x), self.moments)

    def floor(self, n: int) -> float:
        """What a perfect model scores: the mean distance of ``n`` real images to the rest of them.

        Interpolated between ``SIZES``, in logarithms; beyond 5,000, half the test set, it is that
        of 5,000.
        """
        return float(np.exp(np.interp(np.log(n), np.log(SIZES), self.floors.log().numpy())))


def load(path: Path = FILE) -> Real:
    """What ships.

    Raises:
        FileNotFoundError, ValueError: ``path`` is missing, or not such a file.
    """
    tensors, _ = weights.read(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != {"mean": (64,), "root": (64, 64), "floors": (len(SIZES),)}:
        raise ValueError(f"{path} holds no features of garments")
    mean, root, floors = (tensors[name].double() for name in ("mean", "root", "floors"))
    return Real(classifier.load(), Moments(mean, root), floors)


def features(critic: classifier.Classifier, x: Tensor) -> Tensor:
    """Those of images (N, 1, 28, 28) in [-1, 1] once they are 8-bit pictures, (N, 64)."""
    pictures = images.from_uint8(images.to_uint8(x))
    return torch.cat([critic.features(part) for part in pictures.split(500)])


def measured_floor(real: Tensor, n: int, draws: int, generator: torch.Generator) -> float:
    """The mean FD-clf of ``n`` of the features ``real``, drawn at random, to the rest of them."""
    total = 0.0
    for _ in range(draws):
        order = torch.randperm(len(real), generator=generator)
        total += frechet_distance(real[order[:n]], real[order[n:]])
    return total / draws


def main() -> None:
    from safetensors.torch import save_file

    from fastddim.embedded.train import DATA
    from fastddim.embedded.train import images as read

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the four idx files")
    parser.add_argument("--draws", type=int, default=200, help="for each size of the floor")
    parser.add_argument("--out", type=Path, default=FILE, help="the file to write")
    args = parser.parse_args()

    torch.set_num_threads(1)
    real = features(classifier.load(), read("t10k", args.data))
    generator = torch.Generator().manual_seed(0)
    floors = [measured_floor(real, n, args.draws, generator) for n in SIZES]
    mean, root = moments(real)
    tensors = {"mean": mean, "root": root, "floors": torch.tensor(floors)}
    command = f"python -m fastddim.embedded.distance --draws {args.draws}"
    save_file(
        {k: v.float().contiguous() for k, v in tensors.items()}, args.out, {"command": command}
    )
    for n, floor in zip(SIZES, floors, strict=True):
        print(f"{n:>6,} real images {floor:10.4f}")


if __name__ == "__main__":
    main()
