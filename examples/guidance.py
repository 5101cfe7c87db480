"""Classifier-free guidance of a class-conditional model.

The data are points in a plane: class 0 lies around (-1, 0), class 1 around (1, 0). For such data
the exact ε is known, so the model below needs no training. Label -1 is the unconditional model. The
script prints the mean and the deviation of class 1's points for several scales: the larger the
scale, the farther the points are from the other class, and the closer together.

    python examples/guidance.py
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import fastddim

SCHEDULE = fastddim.NoiseSchedule.linear()
ABAR = torch.from_numpy(SCHEDULE.alphas_cumprod.copy()).float()
MEANS = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
DEVIATION = 0.5


def model(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """The exact ε(x, t) of one class, or of both together where ``label`` is -1.

    Under class k, x_t is normal with mean √ᾱ·m_k and variance v = ᾱ·d² + 1 − ᾱ, and
    ε = √(1−ᾱ)·(x − √ᾱ·m_k)/v. Without a label, ε is the mean of both, weighted by the classes'
    probabilities.
    """
    abar = ABAR[t].view(-1, 1)
    variance = abar * DEVIATION**2 + 1 - abar
    offsets = x.unsqueeze(1) - abar.sqrt().unsqueeze(2) * MEANS  # (batch, classes, 2)
    weights = torch.softmax(-offsets.square().sum(2) / (2 * variance), 1)
    chosen = torch.nn.functional.one_hot(label.clamp(min=0), len(MEANS)).to(x.dtype)
    weights = torch.where(label.view(-1, 1) >= 0, chosen, weights)
    return (1 - abar).sqrt() * (weights.unsqueeze(2) * offsets).sum(1) / variance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=2000, help="how many points are sampled")
    points = parser.parse_args().points

    ddim = fastddim.DDIM(steps=50, schedule=SCHEDULE)
    for scale in (1.0, 2.0, 4.0):
        x = ddim.sample(
            model,
            shape=(points, 2),
            seeds=range(points),
            cond={"label": torch.ones(points, dtype=torch.int64)},
            uncond={"label": torch.full((points,), -1)},
            guidance=scale,
        )
        first = x[:, 0]
        print(f"guidance {scale:g}: mean {first.mean():.2f}, deviation {first.std():.2f}")


if __name__ == "__main__":
    main()
