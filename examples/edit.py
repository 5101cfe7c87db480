"""An edit by inversion: blends two images by the noise halfway between them.

``DDIM.invert`` runs the loop backwards, from an image to the noise that it comes from. The script
draws two garments with the model that ships, inverts both, samples them back and prints the error
without refinement and with it. Then it samples from the noise halfway between the two, and writes
the three images side by side. It needs the extra ``cli``.

    python examples/edit.py --out edit.png
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
    parser.add_argument("--out", default="edit.png", help="the PNG file to write")
    arguments = parser.parse_args()

    model = embedded.load()
    ddim = fastddim.DDIM(steps=arguments.steps)
    garments = ddim.sample(model, shape=(2, 1, 28, 28), seeds=range(2))
    for refine in (0, 2):
        noise = ddim.invert(model, garments, refine=refine)
        back = ddim.sample(model, noise)
        error = (back - garments).square().mean().sqrt()
        print(f"refine={refine}: root mean square error {error:.2g}")

    between = fastddim.slerp(noise[:1], noise[1:], 0.5)
    halfway = ddim.sample(model, between)
    sheet = images.grid(images.to_uint8(torch.cat([back[:1], halfway, back[1:]])), columns=3)
    images.save_png(sheet, arguments.out)
    print(f"{arguments.out}: an image, the one halfway, and the other")


if __name__ == "__main__":
    main()
