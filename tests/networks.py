"""The networks of ermongroup/ddim and guided-diffusion, written from their description.

This module has the names and shapes of their tensors, and guided-diffusion's forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes: TypeAlias = dict[str, tuple[int, ...]]


def layer(name: str, *shape: int) -> Shapes:
    """Shapes of a linear layer or convolution with this weight, or of a norm (one dimension)."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def random(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Random weights, scaled so that activations neither vanish nor explode."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) / max(1, math.prod(shape[1:])) ** 0.5
        for name, shape in shapes.items()
    }


def empty(shapes: Shapes) -> dict[str, Tensor]:
    """Tensors that each share one number, so that the largest network is a small file."""
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


def ermongroup(multiples: Sequence[int], size: int, width: int = 128, blocks: int = 2) -> Shapes:
    """Shapes of ermongroup/ddim's network, with attention at width 16 as in its configurations."""
    inner = 4 * width

    def block(name: str, n: int, m: int) -> Shapes:
        return {
            **layer(f"{name}.norm1", n),
            **layer(f"{name}.conv1", m, n, 3, 3),
            **layer(f"{name}.temb_proj", m, inner),
            **layer(f"{name}.norm2", m),
            **layer(f"{name}.conv2", m, m, 3, 3),
            **(layer(f"{name}.nin_shortcut", m, n, 1, 1) if n != m else {}),
        }

    def attention(name: str, n: int) -> Shapes:
        parts = [layer(f"{name}.{part}", n, n, 1, 1) for part in ("q", "k", "v", "proj_out")]
        return {k: v for part in (layer(f"{name}.norm", n), *parts) for k, v in part.items()}

    shapes = layer("temb.dense.0", inner, width) | layer("temb.dense.1", inner, inner)
    shapes |= layer("conv_in", width, 3, 3, 3)
    skips, n, last = [width], width, len(multiples) - 1
    for level, multiple in enumerate(multiples):
        for j in range(blocks):
            shapes |= block(f"down.{level}.block.{j}", n, n := width * multiple)
            if size >> level == 16:
                shapes |= attention(f"down.{level}.attn.{j}", n)
            skips.append(n)
        if level != last:
            shapes |= layer(f"down.{level}.downsample.conv", n, n, 3, 3)
            skips.append(n)
    shapes |= block("mid.block_1", n, n) | attention("mid.attn_1", n) | block("mid.block_2", n, n)
    for level in reversed(range(last + 1)):
        for j in range(blocks + 1):
            m = width * multiples[level]
            shapes |= block(f"up.{level}.block.{j}", n + skips.pop(), m)
            n = m
            if size >> level == 16:
                shapes |= attention(f"up.{level}.attn.{j}", n)
        if level:
            shapes |= layer(f"up.{level}.upsample.conv", n, n, 3, 3)
    assert not skips
    return shapes | layer("norm_out", n) | layer("conv_out", 3, n, 3, 3)


Part: TypeAlias = tuple[str, str, int, int]
"""(kind, prefix of the tensors' names, input channels, output channels)."""


@dataclass(frozen=True)
class Guided:
    """A ``UNetModel``.

    ``attention`` lists the downsampling factors with attention. ``heads`` is the number of heads,
    or 0 for heads of ``head_channels`` channels.
    """

    width: int
    multiples: Sequence[float]
    blocks: int
    attention: Sequence[int]
    heads: int = 0
    head_channels: int = 64
    new_order: bool = False
    scale_shift: bool = True
    updown: bool = True
    out: int = 6

    def parts(self) -> tuple[list[list[Part]], list[Part], list[list[Part]]]:
        """The parts of the input blocks, of the middle block and of the output blocks."""
        n = int(self.width * self.multiples[0])
        inputs: list[list[Part]] = [[("conv", "input_blocks.0.0", 3, n)]]
        skips, last = [n], len(self.multiples) - 1
        for level, multiple in enumerate(self.multiples):
            for _ in range(self.blocks):
                name, m = f"input_blocks.{len(inputs)}", int(self.width * multiple)
                inputs.append([("block", f"{name}.0", n, m)])
                n = m
                if 2**level in self.attention:
                    inputs[-1].append(("attention", f"{name}.1", n, n))
                skips.append(n)
            if level != last:
                inputs.append([(self._way("down"), f"input_blocks.{len(inputs)}.0", n, n)])
                skips.append(n)
        middle = [
            ("block", "middle_block.0", n, n),
            ("attention", "middle_block.1", n, n),
            ("block", "middle_block.2", n, n),
        ]
        outputs: list[list[Part]] = []
        for level in reversed(range(last + 1)):
            for j in range(self.blocks + 1):
                name, m = f"output_blocks.{len(outputs)}", int(self.width * self.multiples[level])
                parts: list[Part] = [("block", f"{name}.0", n + skips.pop(), m)]
                n = m
                if 2**level in self.attention:
                    parts.append(("attention", f"{name}.1", n, n))
                if level and j == self.blocks:
                    parts.append((self._way("up"), f"{name}.{len(parts)}", n, n))
                outputs.append(parts)
        assert not skips
        return inputs, middle, outputs

    def _way(self, way: str) -> str:
        return f"block {way}" if self.updown else way

    def shapes(self) -> Shapes:
        inner = 4 * self.width
        shapes = layer("time_embed.0", inner, self.width) | layer("time_embed.2", inner, inner)
        inputs, middle, outputs = self.parts()
        for kind, name, n, m in (part for parts in (*inputs, middle, *outputs) for part in parts):
            if kind == "conv":
                shapes |= layer(name, m, n, 3, 3)
            elif kind == "down":
                shapes |= layer(f"{name}.op", m, n, 3, 3)
            elif kind == "up":
                shapes |= layer(f"{name}.conv", m, n, 3, 3)
            elif kind == "attention":
                shapes |= layer(f"{name}.norm", n) | layer(f"{name}.qkv", 3 * n, n, 1)
                shapes |= layer(f"{name}.proj_out", n, n, 1)
            else:
                shapes |= layer(f"{name}.in_layers.0", n)
                shapes |= layer(f"{name}.in_layers.2", m, n, 3, 3)
                shapes |= layer(f"{name}.emb_layers.1", m * (1 + self.scale_shift), inner)
                shapes |= layer(f"{name}.out_layers.0", m)
                shapes |= layer(f"{name}.out_layers.3", m, m, 3, 3)
                if n != m:
                    shapes |= layer(f"{name}.skip_connection", m, n, 1, 1)
        n = int(self.width * self.multiples[0])
        return shapes | layer("out.0", n) | layer("out.2", self.out, n, 3, 3)

    def __call__(self, tensors: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
        def of(name: str) -> tuple[Tensor, Tensor]:
            return tensors[f"{name}.weight"], tensors[f"{name}.bias"]

        def norm(name: str, h: Tensor) -> Tensor:
            return F.group_norm(h, 32, *of(name), eps=1e-5)

        def conv(name: str, h: Tensor, **rest: Any) -> Tensor:
            weight, bias = of(name)
            return F.conv2d(h, weight, bias, padding=weight.shape[-1] // 2, **rest)

        def block(way: str, name: str, h: Tensor) -> Tensor:
            inner = F.silu(norm(f"{name}.in_layers.0", h))
            if way == "block down":
                h, inner = F.avg_pool2d(h, 2), F.avg_pool2d(inner, 2)
            elif way == "block up":
                h, inner = twice(h), twice(inner)
            inner = conv(f"{name}.in_layers.2", inner)
            e = F.linear(F.silu(emb), *of(f"{name}.emb_layers.1"))[:, :, None, None]
            if self.scale_shift:
                scale, shift = e.chunk(2, 1)
                inner = norm(f"{name}.out_layers.0", inner) * (1 + scale) + shift
            else:
                inner = norm(f"{name}.out_layers.0", inner + e)
            inner = conv(f"{name}.out_layers.3", F.silu(inner))
            skip = f"{name}.skip_connection"
            return (conv(skip, h) if f"{skip}.weight" in tensors else h) + inner

        def attention(name: str, h: Tensor) -> Tensor:
            channels = h.shape[1]
            heads = self.heads or channels // self.head_channels
            qkv = F.conv1d(norm(f"{name}.norm", h).flatten(2), *of(f"{name}.qkv"))
            if self.new_order:  # q, k, v, each for all heads
                q, k, v = qkv.unflatten(1, (3, heads, -1)).unbind(1)
            else:  # for each head q, k, v
                q, k, v = qkv.unflatten(1, (heads, 3, -1)).unbind(2)
            weight = torch.einsum("bhct,bhcs->bhts", q, k) / (channels // heads) ** 0.5
            a = torch.einsum("bhts,bhcs->bhct", weight.softmax(-1), v).flatten(1, 2)
            return h + F.conv1d(a, *of(f"{name}.proj_out")).view_as(h)

        def run(parts: list[Part], h: Tensor) -> Tensor:
            for kind, name, _, _ in parts:
                if kind == "conv":
                    h = conv(name, h)
                elif kind == "down":
                    h = conv(f"{name}.op", h, stride=2)
                elif kind == "up":
                    h = conv(f"{name}.conv", twice(h))
                else:
                    h = attention(name, h) if kind == "attention" else block(kind, name, h)
            return h

        half = self.width // 2
        angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
        emb = torch.cat([angles.cos(), angles.sin()], 1).to(x.dtype)
        emb = F.linear(F.silu(F.linear(emb, *of("time_embed.0"))), *of("time_embed.2"))
        inputs, middle, outputs = self.parts()
        h, skips = x, []
        for parts in inputs:
            h = run(parts, h)
            skips.append(h)
        h = run(middle, h)
        for parts in outputs:
            h = run(parts, torch.cat([h, skips.pop()], 1))
        return conv("out.2", F.silu(norm("out.0", h)))


def twice(h: Tensor) -> Tensor:
    return F.interpolate(h, scale_factor=2.0, mode="nearest")
