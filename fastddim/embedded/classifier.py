"""The small classifier that judges garments, and whose features compare sets of images.

Its weights ship beside this file; ``fastddim.training.classifier`` made them. The Fréchet distance
of its features is called FD-clf. It is not FID, which uses another network's features.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("classifier.safetensors")

CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


class Classifier(nn.Module):
    """p(class | x) for Fashion-MNIST in [-1, 1]: four convolutions, their mean, one linear layer.

    ``x``: (N, 1, 28, 28) float32; any other shape raises ``ValueError``. 76,330 parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(1, 24, 5, stride=2, padding=2),
                nn.Conv2d(24, 48, 3, stride=2, padding=1),
                nn.Conv2d(48, 64, 3, stride=2, padding=1),
                nn.Conv2d(64, 64, 3, padding=1),
            ]
        )
        self.head = nn.Linear(64, len(CLASSES))

    def features(self, x: Tensor) -> Tensor:
        """Returns the input of the linear layer, (N, 64), each value ≥ 0."""
        if x.shape[1:] != (1, 28, 28):
            raise ValueError(f"x must have shape (N, 1, 28, 28), got {tuple(x.shape)}")
        for conv in self.convs:
            x = conv(x).relu()
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits, (N, 10), in the order of ``CLASSES``."""
        logits: Tensor = self.head(self.features(x))
        return logits


def load(path: str | os.PathLike[str] = WEIGHTS) -> Classifier:
    """Returns the trained classifier in evaluation mode, float32, on the CPU, with frozen weights.

    Args:
        path: float16 or float32 safetensors; by default the weights that ship.

    Raises:
        FileNotFoundError, ValueError: ``path`` is missing, or is no file of classifier weights.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    with torch.device("cpu"):
        model = Classifier()
    try:
        weights = load_file(path)
        odd = {p.dtype for p in weights.values()} - {torch.float16, torch.float32}
        if odd:
            raise ValueError(f"weights must be float16 or float32, got {odd.pop()}")
        model.load_state_dict(weights)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is no file of classifier weights: {error}") from None
    return model.eval().requires_grad_(False)
