"""The networks of whole calls: a small policy, and diffusers' U-Nets at two configurations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import Record


class Block(nn.Module):
    """Two 1-D convolutions and a skip; the condition scales and shifts the first one's output."""

    def __init__(self, into: int, out: int, cond: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv1d(into, out, 5, padding=2), nn.GroupNorm(8, out), nn.Mish()
        )
        self.film = nn.Sequential(nn.Mish(), nn.Linear(cond, 2 * out))
        self.second = nn.Sequential(
            nn.Conv1d(out, out, 5, padding=2), nn.GroupNorm(8, out), nn.Mish()
        )
        self.skip = nn.Conv1d(into, out, 1) if into != out else nn.Identity()

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.film(cond)[:, :, None].chunk(2, 1)
        out: Tensor = self.second(self.first(x) * scale + shift) + self.skip(x)
        return out


class Policy(nn.Module):
    """A small 1-D U-Net over a horizon of actions, like a diffusion policy (Chi et al. 2023)."""

    frequencies: Tensor

    def __init__(
        self, actions: int = 7, cond: int = 64, widths: tuple[int, ...] = (64, 128, 256)
    ) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(0, -4, 32), persistent=False)
        self.time = nn.Sequential(nn.Linear(64, 256), nn.Mish(), nn.Linear(256, 64))
        c = 64 + cond
        self.down = nn.ModuleList(
            Block(a, b, c) for a, b in zip((actions, *widths[:-1]), widths, strict=True)
        )
        self.middle = nn.ModuleList(Block(widths[-1], widths[-1], c) for _ in range(2))
        self.up = nn.ModuleList(
            Block(a + b, a, c) for a, b in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.last = nn.Conv1d(widths[0], actions, 1)

    def forward(self, x: Tensor, t: Tensor, global_cond: Tensor) -> Tensor:
        angles = t.float()[:, None] * self.frequencies
        embedded = self.time(torch.cat([angles.sin(), angles.cos()], 1).to(x.dtype))
        cond = torch.cat([embedded, global_cond], 1)
        x, kept = x.transpose(1, 2), []
        for i, block in enumerate(self.down):
            x = block(nn.functional.avg_pool1d(x, 2) if i else x, cond)
            kept.append(x)
        x = kept.pop()
        for block in self.middle:
            x = block(x, cond)
        for block in self.up:
            wide = nn.functional.interpolate(x, scale_factor=2.0)
            x = block(torch.cat([wide, kept.pop()], 1), cond)
        out: Tensor = self.last(x).transpose(1, 2)
        return out


class UNet(nn.Module):
    """diffusers' UNet2DModel, returning its tensor alone."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        from diffusers import UNet2DModel  # pyright: ignore[reportPrivateImportUsage]

        self.unet = UNet2DModel(**config)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        out: Tensor = self.unet(x, t, class_labels, return_dict=False)[0]
        return out


CIFAR10: Record = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
}
"""google/ddpm-cifar10-32: 35.7 M parameters."""
LATENTS: Record = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (128, 256, 384, 512),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "num_class_embeds": 1001,
}
"""A class-conditional model of latents. The last class stands for "no class"."""
