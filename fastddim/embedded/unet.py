"""The U-Net of the garment model, in plain PyTorch.

Its tensors have the names of diffusers' ``UNet2DModel``. It computes the same operations in the
same order, so that its outputs are bit-identical. Importing diffusers takes longer than drawing an
image, and fails if one of its many optional packages is broken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-5


class UNet(nn.Module):
    """A ``UNet2DModel`` of diffusers with residual blocks, and attention at the coarsest level.

    The arguments are diffusers'. For diffusers' other arguments, its defaults hold.

    Args:
        sample_size: the height and width of an image, kept for ``config`` only.
        in_channels, out_channels: the channels of x and of the output.
        block_out_channels: the channels of each level's blocks, the finest level first.
        layers_per_block: the number of residual blocks of a level on the way down; there is one
            more on the way up.
        down_block_types, up_block_types: for each level, in the order of the forward pass, whether
            its blocks have attention: ``AttnDownBlock2D`` or ``DownBlock2D``.
        norm_num_groups: the groups of each group normalisation.
        attention_head_dim: the channels of a head.
    """

    def __init__(
        self,
        *,
        sample_size: int,
        in_channels: int,
        out_channels: int,
        block_out_channels: Sequence[int],
        layers_per_block: int,
        down_block_types: Sequence[str],
        up_block_types: Sequence[str],
        norm_num_groups: int,
        attention_head_dim: int,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "sample_size": sample_size,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "block_out_channels": list(block_out_channels),
            "layers_per_block": layers_per_block,
            "down_block_types": list(down_block_types),
            "up_block_types": list(up_block_types),
            "norm_num_groups": norm_num_groups,
            "attention_head_dim": attention_head_dim,
        }
        for way, names in (("Down", down_block_types), ("Up", up_block_types)):
            if other := set(names) - {f"{way}Block2D", f"Attn{way}Block2D"}:
                raise ValueError(f"the garment model has no {min(other)}")
        widths, groups, head = list(block_out_channels), norm_num_groups, attention_head_dim
        first, last = widths[0], widths[-1]
        embedded = 4 * first
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        self.time_embedding = TimeEmbedding(first, embedded)
        self.down_blocks = nn.ModuleList()
        skips, before = [first], first
        for level, width in enumerate(widths):
            inputs = [before] + [width] * (layers_per_block - 1)
            block = Block(
                inputs, width, embedded, groups, head if "Attn" in down_block_types[level] else 0
            )
            if level < len(widths) - 1:
                block.downsamplers = nn.ModuleList([Downsample(width)])
            self.down_blocks.append(block)
            skips += [width] * (layers_per_block + (level < len(widths) - 1))
            before = width
        self.mid_block = Block([last, last], last, embedded, groups, head, attentions=1)
        self.up_blocks = nn.ModuleList()
        for level, width in enumerate(reversed(widths)):
            inputs = []
            for _ in range(layers_per_block + 1):
                inputs.append(before + skips.pop())
                before = width
            block = Block(
                inputs, width, embedded, groups, head if "Attn" in up_block_types[level] else 0
            )
            if level < len(widths) - 1:
                block.upsamplers = nn.ModuleList([Upsample(width)])
            self.up_blocks.append(block)
        self.conv_norm_out = nn.GroupNorm(groups, first, eps=EPS)
        self.conv_out = nn.Conv2d(first, out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns the output for x, (batch, in_channels, H, W), at timesteps t, (batch,)."""
        width = self.config["block_out_channels"][0]
        emb = self.time_embedding(sinusoids(t, width).to(x.dtype))
        x = self.conv_in(x)
        skips = [x]
        for block in _blocks(self.down_blocks):
            for i, resnet in enumerate(block.resnets):
                x = block.attend(resnet(x, emb), i)
                skips.append(x)
            for downsample in block.downsamplers:
                x = downsample(x)
                skips.append(x)
        first, second = self.mid_block.resnets
        x = second(self.mid_block.attend(first(x, emb), 0), emb)
        for block in _blocks(self.up_blocks):
            for i, resnet in enumerate(block.resnets):
                x = block.attend(resnet(torch.cat([x, skips.pop()], 1), emb), i)
            for upsample in block.upsamplers:
                x = upsample(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # type: ignore[no-any-return]


def sinusoids(t: Tensor, width: int) -> Tensor:
    """Returns cos and sin of t·10000^(−i/(width/2)), i = 0, 1, ..., joined: (batch, width)."""
    half = width // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t[:, None].float() * torch.exp(exponent)[None, :]
    return torch.cat([torch.cos(angles), torch.sin(angles)], -1)


class TimeEmbedding(nn.Module):
    """Two linear layers on the sinusoids of t."""

    def __init__(self, width: int, embedded: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, embedded)
        self.linear_2 = nn.Linear(embedded, embedded)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """The residual blocks of a level, and their attentions if ``head``, their width, is not 0."""

    def __init__(
        self,
        inputs: Sequence[int],
        width: int,
        embedded: int,
        groups: int,
        head: int,
        attentions: int | None = None,
    ) -> None:
        super().__init__()
        n = len(inputs) if attentions is None else attentions
        self.resnets = nn.ModuleList(Resnet(c, width, embedded, groups) for c in inputs)
        self.attentions = nn.ModuleList(Attention(width, groups, head) for _ in range(n) if head)
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def attend(self, x: Tensor, i: int) -> Tensor:
        """Applies the ``i``-th attention, if there is one."""
        return self.attentions[i](x) if i < len(self.attentions) else x


def _blocks(modules: nn.ModuleList) -> Iterator[Block]:
    for module in modules:
        assert isinstance(module, Block)
        yield module


class Resnet(nn.Module):
    """A residual block that adds the embedding of t."""

    def __init__(self, inputs: int, width: int, embedded: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=EPS)
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedded, width)
        self.norm2 = nn.GroupNorm(groups, width, eps=EPS)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, width, 1) if inputs != width else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Self-attention between all positions of an image."""

    def __init__(self, width: int, groups: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.group_norm = nn.GroupNorm(groups, width, eps=EPS)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        # Normalise in diffusers' layout, because another layout may round differently.
        places = x.view(batch, channels, height * width).transpose(1, 2)
        places = self.group_norm(places.transpose(1, 2)).transpose(1, 2)
        q, k, v = (
            layer(places).view(batch, -1, channels // self.head, self.head).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        out = self.to_out[0](attended.transpose(1, 2).reshape(batch, -1, channels))
        return out.transpose(-1, -2).reshape(x.shape) + x  # type: ignore[no-any-return]


class Downsample(nn.Module):
    """Halves the height and width by a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Doubles the height and width by nearest neighbours, then convolves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # type: ignore[no-any-return]
