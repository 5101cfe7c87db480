"""Trains the classifier that ships.

    python -m fastddim.training.classifier --seed 0

The script needs the images of Debian's package ``dataset-fashion-mnist`` (or ``--data DIR`` with
the same four files). It trains on one thread with cross-entropy and mirrored images. It takes few
epochs to keep the probabilities calibrated: more epochs raise confidence faster than accuracy. A
batch normalisation follows each convolution during training, and is folded into it at the end.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastddim.embedded.classifier import WEIGHTS, Classifier
from fastddim.tools.quality import garment_share
from fastddim.training.model import DATA, images, labels


def train(x: Tensor, y: Tensor, epochs: int, seed: int, batch: int = 128) -> Classifier:
    """Returns a classifier fitted to images ``x`` and classes ``y``."""
    torch.manual_seed(seed)
    model = Classifier()
    convs = [conv for conv in model.convs if isinstance(conv, nn.Conv2d)]
    norms = [nn.BatchNorm2d(conv.out_channels) for conv in convs]
    blocks = [nn.Sequential(*pair, nn.ReLU()) for pair in zip(convs, norms, strict=True)]
    network = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.head)

    steps = epochs * (len(x) // batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=6e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps, pct_start=0.2)
    for _ in range(epochs):
        for rows in torch.randperm(len(x))[: len(x) // batch * batch].view(-1, batch):
            mirrored = torch.rand(batch, 1, 1, 1) < 0.5
            picture = torch.where(mirrored, x[rows].flip(3), x[rows])
            loss = F.cross_entropy(network(picture), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()

    network.eval()
    model.convs = nn.ModuleList(fuse_conv_bn_eval(*pair) for pair in zip(convs, norms, strict=True))
    return model


def save(model: Classifier, path: Path, metadata: dict[str, str]) -> None:
    """Writes the weights in float16; ``path`` is never incomplete, because a rename replaces it."""
    temporary = path.with_name(path.name + ".tmp")
    half = {name: p.detach().half().contiguous() for name, p in model.state_dict().items()}
    save_file(half, temporary, metadata)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=6, help="passes over the 60,000 images")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="file for the weights")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the four idx files")
    args = parser.parse_args()

    torch.set_num_threads(1)
    start = time.time()
    model = train(images("train", args.data), labels("train", args.data), args.epochs, args.seed)
    seconds = time.time() - start

    x, y = images("t10k", args.data), labels("t10k", args.data)
    # Test the model as it will be loaded, rounded to float16.
    model = model.half().float().eval()
    with torch.no_grad():
        logits = torch.cat([model(part) for part in torch.split(x, 500)])
    result = {
        "accuracy": f"{(logits.argmax(1) == y).double().mean():.4f}",
        "cross_entropy": f"{F.cross_entropy(logits, y):.4f}",
        "mean_confidence": f"{logits.softmax(1).amax(1).mean():.4f}",
        "confident_share": f"{garment_share(logits):.4f}",
        "seconds": f"{seconds:.0f}",
        "seed": str(args.seed),
        "command": f"python -m fastddim.training.classifier "
        f"--seed {args.seed} --epochs {args.epochs}",
    }
    save(model, args.out, result)
    for name, value in result.items():
        print(f"{name:16} {value}")


if __name__ == "__main__":
    main()
