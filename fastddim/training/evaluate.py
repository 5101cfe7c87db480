"""Judges the garments that the shipped model draws, beside real ones.

    python -m fastddim.training.evaluate --count 1000 --steps 50 --eta 0

The script needs the images of Debian's package ``dataset-fashion-mnist`` (or ``--data DIR`` with
the same four files). It draws the images of seeds 0 … count−1. For them, and for the first
``count`` real test images, it prints three figures: the share of images that the classifier takes
for some garment with a confidence above 0.9, the classifier's mean confidence, and FD-clf, the
Fréchet distance of its features to those of test images. (FD-clf is not FID, and depends on the
count.) Drawn images are compared with all 10,000 test images, and real ones with the rest of the
test set. A perfect model would score like the real images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastddim import DDIM
from fastddim.embedded import SHAPE, WEIGHTS, classifier, load
from fastddim.tools.quality import frechet_distance, garment_share
from fastddim.training.model import DATA, images
from fastddim.variances import Eta


def draw(ddim: DDIM, model: Callable[..., Tensor], count: int, batch: int) -> Tensor:
    """Returns the images of seeds 0 … count−1, (count, 1, 28, 28), in [-1, 1], rounded to 8 bits.

    Every batch is full, and surplus images of the last batch are dropped, because a network rounds
    differently at another batch size.
    """
    drawn = [
        ddim.sample(model, shape=(batch, *SHAPE), seeds=range(first, first + batch))
        for first in range(0, count, batch)
    ]
    x = torch.cat(drawn)[:count]
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


@torch.no_grad()
def judge(critic: classifier.Classifier, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the features and the logits of images ``x``."""
    features = torch.cat([critic.features(part) for part in torch.split(x, 500)])
    return features, critic.head(features)


def _eta(text: str) -> Eta:
    return "hat" if text == "hat" else float(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="file of the garment model")
    parser.add_argument("--count", type=int, default=1000, help="images, at most 9,000")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--eta", type=_eta, default=0.0, help='a number or "hat"')
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the four idx files")
    args = parser.parse_args()
    if not 2 <= args.count <= 9000:
        parser.error(f"--count must lie in 2 … 9000, got {args.count}")
    if args.batch < 1:
        parser.error(f"--batch must be ≥ 1, got {args.batch}")

    torch.set_num_threads(args.threads)
    ddim = DDIM(steps=args.steps, eta=args.eta)
    model = load(args.weights)
    critic = classifier.load()
    test, test_logits = judge(critic, images("t10k", args.data))

    start = time.time()
    drawn = draw(ddim, model, args.count, args.batch)
    seconds = time.time() - start

    features, logits = judge(critic, drawn)
    rows = {
        f"{args.count:,} drawn, S = {args.steps}, eta = {ddim.eta}": (features, logits, test),
        f"{args.count:,} real": (
            test[: args.count],
            test_logits[: args.count],
            test[args.count :],
        ),
    }
    print(f"{'':34}{'above 0.9':>10}{'mean confidence':>17}{'FD-clf':>9}")
    for name, (own, own_logits, others) in rows.items():
        mean = own_logits.softmax(1).amax(1).mean()
        distance = frechet_distance(own, others)
        print(f"{name:34}{garment_share(own_logits):>10.3f}{mean:>17.4f}{distance:>9.4f}")
    per_class = torch.bincount(logits.argmax(1), minlength=len(classifier.CLASSES)).tolist()
    counts = (f"{n} {name}" for name, n in zip(classifier.CLASSES, per_class, strict=True))
    print(f"drawn: {', '.join(counts)}")
    print(f"{seconds:.0f} s to draw, {args.threads} thread(s), batches of {args.batch}")


if __name__ == "__main__":
    main()
