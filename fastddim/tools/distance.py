"""FD-clf: the Fréchet distance of drawn garments to real garments, in the classifier's features.

A file ships with the mean and the covariance of the features of the 10,000 test images, and with
the distances of N real images, so measuring needs no data set. FD-clf is a distance in these 64
features and not FID. ``python -m fastddim.training.distance`` makes the file.
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
"""The N for which the file has the FD-clf of N real images; 5,000 is half of the test set."""


@dataclass(frozen=True)
class Real:
    """The features of real garments, with which FD-clf compares images.

    Attributes:
        critic: the classifier whose features are compared.
        moments: the mean and covariance of the test images' features, float64.
        floors: the mean FD-clf of N real images for each N of ``SIZES``, float64.
        spreads: the standard deviation of their FD-clf over draws for each N, float64.
    """

    critic: classifier.Classifier
    moments: Moments
    floors: Tensor
    spreads: Tensor

    def of(self, x: Tensor) -> Tensor:
        """Returns the features (N, 64) of images (N, 1, 28, 28), rounded to 8 bits."""
        return features(self.critic, x)

    def distance(self, x: Tensor) -> float:
        """Returns the FD-clf of images (N, 1, 28, 28) in [-1, 1], N ≥ 2, rounded to 8 bits.

        FD-clf falls as N grows: compare it with ``floor(N)``.
        """
        return frechet_distance(self.of(x), self.moments)

    def floor(self, n: int) -> float:
        """Returns the mean FD-clf of a perfect model: that of ``n`` real images to the others.

        It is no lower bound: about half of the draws of real images score less, see ``spread``.
        The value is interpolated between ``SIZES`` in logarithms, and constant beyond 5,000, half
        of the test set.
        """
        return _between(n, self.floors)

    def spread(self, n: int) -> float:
        """Returns the standard deviation of the FD-clf of ``n`` real images over draws."""
        return _between(n, self.spreads)


def _between(n: int, values: Tensor) -> float:
    return float(np.exp(np.interp(np.log(n), np.log(SIZES), values.log().numpy())))


def load(path: Path = FILE) -> Real:
    """Returns the features of real garments that ship with the package.

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
    """Returns the features (N, 64) of images (N, 1, 28, 28) in [-1, 1], rounded to 8 bits."""
    pictures = images.from_uint8(images.to_uint8(x))
    return torch.cat([critic.features(part) for part in pictures.split(500)])
