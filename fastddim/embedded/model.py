"""The small model that ships: a U-Net that draws Fashion-MNIST garments, 28x28, grey."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastddim.embedded.unet import UNet
from fastddim.schedule import NoiseSchedule

SHAPE = (1, 28, 28)

UNET: dict[str, Any] = {
    "sample_size": 14,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [64, 96],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 16,
    "attention_head_dim": 32,
}


class GarmentModel(nn.Module):
    """ε_θ(x_t, t) for Fashion-MNIST in [-1, 1], on the paper's schedule (linear β, T = 1000).

    The network sees each 2x2 patch as four channels (14x14x4), which quarters its cost, and
    predicts v (Salimans and Ho 2022, section 4), whose error in x0 stays bounded at every noise
    level. The module returns ε = √ᾱ_t·v + √(1−ᾱ_t)·x, so that it fits every loop for the paper's
    models.

    ``x``: (batch, 1, 28, 28) float32. ``t``: (batch,) timesteps in [0, 1000), any real dtype.
    """

    alphas_cumprod: Tensor

    def __init__(self, unet: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.unet = UNet(**(unet or UNET))
        alphas_cumprod = torch.from_numpy(NoiseSchedule.linear().alphas_cumprod.copy())
        self.register_buffer("alphas_cumprod", alphas_cumprod.float(), persistent=False)

    def v(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns the network's prediction of v = √ᾱ_t·ε − √(1−ᾱ_t)·x0."""
        return F.pixel_shuffle(self.unet(F.pixel_unshuffle(x, 2), t), 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        abar = self.alphas_cumprod[t.long()].view(-1, 1, 1, 1)
        return abar.sqrt() * self.v(x, t) + (1 - abar).sqrt() * x
