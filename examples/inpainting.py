"""Inpainting: keeps the upper half of a garment and draws the lower half anew.

The script draws one garment with the model that ships, then four garments whose upper half is that
of the first, and writes all five side by side. It needs the extra ``cli``.

    python examples/inpainting.py --out inpainting.png
"""

from __future__ import annotations

import argparse

import torch

import fastddim
from fastddim import embedded
from fastddim.tools import images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", default="inpainting.png", help="the PNG file to write")
    arguments = parser.parse_args()

    model = embedded.load()
    ddim = fastddim.DDIM(steps=arguments.steps, eta=1.0)
    known = ddim.sample(model, shape=(1, 1, 28, 28), seeds=[0])
    mask = torch.zeros(1, 1, 28, 28)
    mask[..., :14, :] = 1  # The image is kept where the mask is 1.
    drawn = ddim.sample(
        model,
        shape=(4, 1, 28, 28),
        seeds=range(1, 5),
        known=known.expand(4, -1, -1, -1),
        mask=mask,
    )

    sheet = images.grid(images.to_uint8(torch.cat([known, drawn])), columns=5)
    images.save_png(sheet, arguments.out)
    kept = torch.equal(drawn[..., :14, :], known[..., :14, :].expand(4, -1, -1, -1))
    print(f"{arguments.out}: the upper halves are those of the first image: {kept}")


if __name__ == "__main__":
    main()
