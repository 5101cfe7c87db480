"""Turns other systems' U-Nets into diffusers' UNet2DModel: layout, settings, names of tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from fastddim import weights
from fastddim.check import whole
from fastddim.schedule import NoiseSchedule, guided_diffusions

Tensors: TypeAlias = Mapping[str, Tensor]

BUILT_ON = torch.device("cpu")
"""Networks are built on this device, whatever torch's default device is, and then filled."""


class Layout(NamedTuple):
    """The sizes in which one system's networks differ, the finest level first."""

    channels: tuple[int, ...]
    """The channels of each level's blocks."""
    layers: int
    """The number of residual blocks of a level on the way down; there is one more on the way up."""
    attention: tuple[bool, ...]
    """For each level, whether attention follows its blocks."""


def ermongroup_layout(tensors: Tensors, source: Path) -> Layout:
    """Returns the layout of a network of ermongroup/ddim (``models/diffusion.py``).

    Raises:
        ValueError: the tensors are not such a network's.
    """
    levels = range(_count(tensors, r"down\.(\d+)\."))
    return Layout(
        tuple(_sizes(tensors, f"down.{i}.block.0.conv1.weight", 4, source)[0] for i in levels),
        _count(tensors, r"down\.0\.block\.(\d+)\."),
        tuple(any(name.startswith(f"down.{i}.attn.") for name in tensors) for i in levels),
    )


def ermongroup(tensors: Tensors, layout: Layout, source: Path) -> nn.Module:
    """Returns a network of ermongroup/ddim with its weights.

    Raises:
        ValueError: naming the first few tensors that are missing, left over or of another shape.
    """
    last = len(layout.channels) - 1

    def called(name: str) -> str:
        name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{last - int(match[1])}", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = re.sub(r"linear_(\d)", lambda match: f"dense.{int(match[1]) - 1}", name)
        return _replaced(name, _ERMONGROUP)

    model = _built(
        layout,
        source,
        in_channels=_sizes(tensors, "conv_in.weight", 4, source)[1],
        out_channels=_sizes(tensors, "conv_out.weight", 4, source)[0],
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_padding=0,
        norm_eps=1e-6,
    )
    _fill(model, tensors, source, called, _flat)
    return model


# The order matters: "to_" must come after "to_out.0", which contains it.
_ERMONGROUP = {
    "down_blocks.": "down.",
    "mid_block.attentions.0": "mid.attn_1",
    ".resnets.": ".block.",
    ".attentions.": ".attn.",
    "samplers.0": "sample",
    "time_embedding": "temb",
    "time_emb_proj": "temb_proj",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_out.0": "proj_out",
    "to_": "",
}


def guided_layout(tensors: Tensors, source: Path) -> Layout:
    """Returns the layout of a ``UNetModel`` of guided-diffusion or improved-diffusion.

    Raises:
        ValueError: the tensors are not such a network's.
    """
    # Each level except the finest ends with an upsampling: a convolution, or a residual block.
    levels = 1 + _count(tensors, r"output_blocks\.(\d+)\.[12]\.(?:conv|in_layers)\.")
    ends = [_count(tensors, rf"{end}put_blocks\.(\d+)\.") for end in ("in", "out")]
    layers = ends[1] // levels - 1
    if ends != 2 * [levels * (layers + 1)] or layers < 1:
        raise ValueError(
            f"{source} must have as many input_blocks as output_blocks, a multiple of its levels, "
            f"got {ends[0]} and {ends[1]} on {levels} levels"
        )
    first = [1 + level * (layers + 1) for level in range(levels)]
    return Layout(
        tuple(
            _sizes(tensors, f"input_blocks.{n}.0.in_layers.2.weight", 4, source)[0] for n in first
        ),
        layers,
        tuple(any(name.startswith(f"input_blocks.{n}.1.") for name in tensors) for n in first),
    )


def guided_facts(tensors: Tensors, layout: Layout, source: Path) -> dict[str, Any]:
    """Returns those of the original's flags that the shapes of the tensors determine.

    Raises:
        ValueError: such a tensor is missing or has the wrong number of dimensions.
    """
    embedded = _sizes(tensors, "input_blocks.1.0.emb_layers.1.weight", 2, source)[0]
    channels = _sizes(tensors, "input_blocks.0.0.weight", 4, source)[1]
    return {
        "num_channels": _sizes(tensors, "time_embed.0.weight", 2, source)[1],
        "num_res_blocks": layout.layers,
        "learn_sigma": _sizes(tensors, "out.2.weight", 4, source)[0] == 2 * channels,
        "class_cond": "label_emb.weight" in tensors,
        "use_scale_shift_norm": embedded == 2 * layout.channels[0],
        "resblock_updown": f"input_blocks.{layout.layers + 1}.0.in_layers.0.weight" in tensors,
    }


@dataclass(frozen=True)
class Flags:
    """Those of guided-diffusion's flags that the tensors do not determine, with its defaults.

    ``image_size`` 0 stands for the size for which guided-diffusion chooses the network's widths.
    """

    image_size: int = 0
    num_heads: int = 4
    num_head_channels: int = -1
    use_new_attention_order: bool = False
    diffusion_steps: int = 1000
    noise_schedule: str = "linear"
    predict_xstart: bool = False
    rescale_timesteps: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any], facts: Mapping[str, Any], source: Path) -> Flags:
        """Returns the flags ``given`` for the original's scripts, which must agree with ``facts``.

        Raises:
            ValueError: naming ``source``, the flag, its value and what is allowed.
        """
        own = vars(cls())
        for name, value in given.items():
            if name not in {*own, *facts, *_PASSED_OVER}:
                raise ValueError(f"{source} must hold guided-diffusion's flags, got {name!r}")
            if name in own and type(value) is not type(own[name]):
                what = type(own[name]).__name__
                raise ValueError(f"{source} must have {name} of type {what}, got {value!r}")
            if name in facts and value != facts[name]:
                raise ValueError(f"{source} has {name} = {value!r}, the tensors {facts[name]!r}")
        flags = cls(**{name: value for name, value in given.items() if name in own})
        for name in ("image_size", "num_heads", "diffusion_steps"):
            if name in given:
                whole(f"{source}: {name}", given[name], low=1)
        if flags.noise_schedule not in ("linear", "cosine"):
            raise ValueError(
                f"{source} must have noise_schedule linear or cosine, got {flags.noise_schedule!r}"
            )
        if flags.diffusion_steps != 1000 and "rescale_timesteps" not in given:
            raise ValueError(
                f"{source} must have rescale_timesteps where diffusion_steps is not 1000: left "
                f"out, it is false in guided-diffusion and true in improved-diffusion"
            )
        if (upwards := given.get("num_heads_upsample", -1)) not in (-1, flags.num_heads):
            raise ValueError(f"{source} must have num_heads_upsample -1, got {upwards!r}")
        return flags

    @property
    def schedule(self) -> NoiseSchedule:
        return guided_diffusions(self.noise_schedule, self.diffusion_steps)

    def heads(self, channels: int, source: Path) -> int:
        """Returns the number of heads of an attention with ``channels`` channels."""
        each = self.num_head_channels
        if each == -1 and channels % self.num_heads == 0:
            return self.num_heads
        if each >= 1 and channels % each == 0:
            return channels // each
        raise ValueError(
            f"{source} has an attention of {channels} channels, which num_heads = "
            f"{self.num_heads}, num_head_channels = {each} do not divide"
        )


_PASSED_OVER = {
    *(
        "attention_resolutions",
        "channel_mult",
        "num_heads_upsample",
    ),  # The tensors determine these.
    *("dropout", "use_checkpoint", "use_fp16"),  # These have no effect in evaluation and float32.
    *(
        "timestep_respacing",
        "use_kl",
        "sigma_small",
        "rescale_learned_sigmas",
    ),  # The model ignores these.
}

PUBLISHED = Flags(num_head_channels=64)
"""The flags of guided-diffusion's published unconditional models."""

IMAGE_SIZES: dict[tuple[float, ...], int] = {
    (1, 2, 2, 2): 32,
    (1, 2, 3, 4): 64,
    (1, 1, 2, 3, 4): 128,
    (1, 1, 2, 2, 4, 4): 256,
    (1, 2, 2, 4, 4, 8, 8): 512,
}
"""The size for which guided-diffusion chooses widths of these ratios by default."""


def guided(tensors: Tensors, layout: Layout, source: Path, flags: Flags) -> nn.Module:
    """Returns a ``UNetModel`` of guided-diffusion or improved-diffusion with its weights.

    Raises:
        ValueError: naming the first few tensors that are missing, left over or of another shape.
    """
    from diffusers.models.attention_processor import Attention
    from diffusers.models.embeddings import TimestepEmbedding, Timesteps

    per_level, last = layout.layers + 1, len(layout.channels) - 1
    facts = guided_facts(tensors, layout, source)
    width = facts["num_channels"]

    def called(name: str) -> str:
        def place(match: re.Match[str]) -> str:
            way, level, what, j = match[1], int(match[2]), match[3], int(match[4])
            block = level * per_level + j
            if what == "downsamplers":
                return f"input_blocks.{(level + 1) * per_level}.0"
            if what == "upsamplers":  # The level's last block and its attention come before.
                return f"output_blocks.{block + per_level - 1}.{1 + layout.attention[last - level]}"
            which = int(what == "attentions")
            return (
                f"input_blocks.{block + 1}.{which}"
                if way == "down"
                else f"output_blocks.{block}.{which}"
            )

        name = re.sub(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)", place, name)
        name = re.sub(r"^(input_blocks.*)\.conv\.", r"\1.op.", name)
        return _replaced(name, _GUIDED)

    def converted(name: str, tensor: Tensor, own: Tensor) -> Tensor:
        part = re.search(r"\.to_([qkv])\.", name)
        if part is None or tensor.shape[:1] != (3 * len(own),):
            return _flat(name, tensor, own)
        # The new order is (q, k, v) × heads, the old order heads × (q, k, v).
        n = flags.heads(len(own), source)
        parts, dim = ((3, n), 0) if flags.use_new_attention_order else ((n, 3), 1)
        split = tensor.unflatten(0, (*parts, len(own) // n))
        return _flat(name, split.select(dim, "qkv".index(part[1])).flatten(0, 1), own)

    model = _built(
        layout,
        source,
        resnet=facts["resblock_updown"],
        in_channels=_sizes(tensors, "input_blocks.0.0.weight", 4, source)[1],
        out_channels=_sizes(tensors, "out.2.weight", 4, source)[0],
        time_embedding_dim=4 * width,
        flip_sin_to_cos=True,
        freq_shift=0,
        downsample_padding=1,
        norm_eps=1e-5,
        attn_norm_num_groups=32,
        num_class_embeds=len(tensors["label_emb.weight"]) if facts["class_cond"] else None,
        resnet_time_scale_shift="scale_shift" if facts["use_scale_shift_norm"] else "default",
    )
    if width != layout.channels[0]:  # The finest level of the 512 model is half as wide.
        model.time_proj = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)
        with BUILT_ON:
            model.time_embedding = TimestepEmbedding(width, 4 * width)
    for module in model.modules():
        # diffusers' configuration fixes the channels per head; the original may fix the number of
        # heads instead.
        if isinstance(module, Attention):
            module.heads = flags.heads(module.inner_dim, source)
            module.scale = (module.inner_dim // module.heads) ** -0.5
    _fill(model, tensors, source, called, converted)
    return model


class Rescaled(nn.Module):
    """Calls a network with t·1000/T, as guided-diffusion's rescale_timesteps does."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model = model
        self.factor = factor

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Any:
        return self.model(x, t * self.factor, **cond)


_GUIDED = {
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "group_norm": "norm",
    "to_out.0": "proj_out",
    "to_q": "qkv",
    "to_k": "qkv",
    "to_v": "qkv",
}


def _built(layout: Layout, source: Path, *, resnet: bool = False, **rest: Any) -> nn.Module:
    """Returns a UNet2DModel of ``layout``. With ``resnet``, residual blocks change the level."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    def kinds(way: str) -> tuple[str, ...]:
        plain = f"Resnet{way}sampleBlock2D" if resnet else f"{way}Block2D"
        return tuple(f"Attn{way}Block2D" if has else plain for has in layout.attention)

    sampling = "resnet" if resnet else "conv"
    try:
        with BUILT_ON:
            model: nn.Module = UNet2DModel(
                block_out_channels=layout.channels,
                layers_per_block=layout.layers,
                down_block_types=kinds("Down"),
                up_block_types=kinds("Up")[::-1],
                downsample_type=sampling,
                upsample_type=sampling,
                attention_head_dim=None,  # This stands for one head.
                **rest,
            )
    except Exception as error:  # diffusers raises errors of many types for a bad layout
        raise ValueError(f"{source} builds no UNet2DModel: {error}") from None
    return model


def _fill(
    model: nn.Module,
    tensors: Tensors,
    source: Path,
    called: Callable[[str], str],
    converted: Callable[[str, Tensor, Tensor], Tensor],
) -> None:
    """Fills ``model``: ``called`` gives a tensor's name in the file, ``converted`` its own form."""
    own = model.state_dict()
    names = {name: called(name) for name in own}
    taken = {
        name: converted(name, tensors[theirs], own[name])
        for name, theirs in names.items()
        if theirs in tensors
    }
    weights.fill(model, taken, source, called, set(tensors).difference(names.values()))


def _flat(name: str, tensor: Tensor, own: Tensor) -> Tensor:
    """Turns the 1x1 convolutions of attention into the linear layers that diffusers has."""
    flat = ".attentions." in name and tensor.shape[2:].numel() == 1 and tensor.dim() > 2
    return tensor.flatten(1) if flat else tensor


def _replaced(name: str, parts: Mapping[str, str]) -> str:
    for ours, theirs in parts.items():
        name = name.replace(ours, theirs)
    return name


def _count(tensors: Tensors, pattern: str) -> int:
    """Returns how many different numbers ``pattern`` finds in the names."""
    return len({match[1] for name in tensors if (match := re.match(pattern, name))})


def _sizes(tensors: Tensors, name: str, dims: int, source: Path) -> tuple[int, ...]:
    """Returns the shape of a tensor, or refuses one that is missing or has other dimensions."""
    if name not in tensors:
        raise ValueError(f"{source} does not hold the model's weights: {name} is missing")
    if tensors[name].dim() != dims:
        raise ValueError(
            f"{source}: {name} must have {dims} dimensions, got {tuple(tensors[name].shape)}"
        )
    return tuple(tensors[name].shape)
