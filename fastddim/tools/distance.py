"""FD-clf: the Fréchet distance of drawn garments to real ones, in the classifier's features.

The mean and the covariance of the features of the 10,000 test images ship, and the distances that N
real images have, so no image is needed to measure with it. It is a distance in these 64 features
and no FID. ``python -m fastddim.training.distance`` makes the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastddim import weights
from fastddim.embedded import classifier
from fastddim.tools import images
from fastddim.tools.quality import Moments, frechet_distance

FILE = classifier.WEIGHTS.with_name("real.safetensors")

SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 5000)
"""The N of whose real images the score is measured; the last are two halves of the test set."""


@dataclass(frozen=True)
class Real:
    """What is known of real garments.

    Attributes:
        critic: the classifier whose features are compared.
        moments: of the features of the test images, float64.
        floors: what so many real images score on average, for each of ``SIZES``, float64.
        spreads: the standard deviation of that over draws of them, likewise.
    """

    critic: classifier.Classifier
    moments: Moments
    floors: Tensor
    spreads: Tensor

    def distance(self, x: Tensor) -> float:
        """FD-clf of images (N, 1, 28, 28) in [-1, 1], N ≥ 2, as the 8-bit pictures they become.

        It falls with N, which is why ``floor`` is that of as many images.
        """
        return frechet_distance(features(self.critic, x), self.moments)

    def floor(self, n: int) -> float:
        """What a perfect model scores on average: the distance of ``n`` real images to the rest.

        It is no bound: about half of the draws of real images score less, see ``spread``.
        Interpolated between ``SIZES``, in logarithms; beyond 5,000, half the test set, it is that
        of 5,000.
        """
        return _between(n, self.floors)

    def spread(self, n: int) -> float:
        """By how much that differs from draw to draw: the standard deviation."""
        return _between(n, self.spreads)


def _between(n: int, values: Tensor) -> float:
    return float(np.exp(np.interp(np.log(n), np.log(SIZES), values.log().numpy())))


def load(path: Path = FILE) -> Real:
    """What ships.

    Raises:
        FileNotFoundError, ValueError: ``path`` is missing, or not such a file.
    """
    tensors, _ = weights.read(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    many = (len(SIZES),)
    if shapes != {"mean": (64,), "root": (64, 64), "floors": many, "spreads": many}:
        raise ValueError(f"{path} holds no features of garments")
    mean, root, floors, spreads = (
        tensors[name].double() for name in ("mean", "root", "floors", "spreads")
    )
    return Real(classifier.load(), Moments(mean, root), floors, spreads)


def features(critic: classifier.Classifier, x: Tensor) -> Tensor:
    """Those of images (N, 1, 28, 28) in [-1, 1] once they are 8-bit pictures, (N, 64)."""
    pictures = images.from_uint8(images.to_uint8(x))
    return torch.cat([critic.features(part) for part in pictures.split(500)])
