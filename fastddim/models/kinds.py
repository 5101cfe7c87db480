"""The kinds of checkpoint file: how each is recognised by its content, and how it is loaded.

A new kind is a new row of ``KINDS``. ``fastddim.models.unets`` knows the meaning of other systems'
tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from fastddim import embedded, weights
from fastddim.coefficients import checked_prediction
from fastddim.models import statedicts, trained, unets
from fastddim.models.loaded import Loaded, Shape, measured, size_text
from fastddim.models.statedicts import File
from fastddim.schedule import NoiseSchedule


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        what: the name of the kind in messages.
        known: tells by the content whether a file is of this kind.
        load: returns the model of a file, given the ``config`` and ``shape`` of
            ``checkpoints.load``.
    """

    what: str
    known: Callable[[File], bool]
    load: Callable[[File, str | None, Shape | None], Loaded]


def _published(size: int, *multiples: int) -> tuple[unets.Layout, int]:
    """Returns a layout of 128 channels and multiples, with attention at 16 × 16, and ``size``."""
    attention = tuple(size >> level == 16 for level in range(len(multiples)))
    return unets.Layout(tuple(128 * n for n in multiples), 2, attention), size


CONFIGS = {
    "cifar10": _published(32, 1, 2, 2, 2),
    "celeba64": _published(64, 1, 2, 2, 2, 4),
    "lsun256": _published(256, 1, 1, 2, 2, 4, 4),
}
"""The networks of ermongroup/ddim's own configurations, and the width of their images."""


def garments(file: File, config: str | None, shape: Shape | None) -> Loaded:
    refuse_config(config, file.path)
    if shape not in (None, embedded.SHAPE):
        raise ValueError(
            f"shape must be left out with garment weights, which draw {size_text(embedded.SHAPE)}, "
            f"got {size_text(shape)}"
        )
    model = embedded.load(file.path)
    return _loaded(file, "garment weights", model, embedded.SHAPE)


def _ermongroup(file: File, config: str | None, shape: Shape | None) -> Loaded:
    if config is not None and config not in CONFIGS:
        raise ValueError(
            f"config must be one of {', '.join(CONFIGS)} for {file.path}, a network of "
            f"ermongroup/ddim, got {config!r}"
        )
    layout = CONFIGS[config][0] if config else unets.ermongroup_layout(file.tensors, file.path)
    model = unets.ermongroup(file.tensors, layout, file.path)
    name = next((name for name, (known, _) in CONFIGS.items() if known == layout), "")
    sides = 2 * [CONFIGS[name][1]] if name else None
    shape = _sized(file.path, model, sides, shape)
    what = ", ".join(filter(None, ("ermongroup", file.part, name)))
    return _loaded(file, what, model, shape)


def _guided(file: File, config: str | None, shape: Shape | None) -> Loaded:
    if config in CONFIGS:
        raise ValueError(
            f"config must be a JSON file of guided-diffusion's flags for {file.path}, one of its "
            f"networks, got {config!r}"
        )
    layout = unets.guided_layout(file.tensors, file.path)
    facts = unets.guided_facts(file.tensors, layout, file.path)
    assumed = ""
    if config is not None:
        flags = unets.Flags.of(statedicts.read_json(Path(config)), facts, Path(config))
    elif (
        facts["resblock_updown"]
        and facts["use_scale_shift_norm"]
        and not any(n % 64 for n in layout.channels)
    ):
        flags = unets.PUBLISHED
        assumed = ", assumed to be as published: 64 channels per head, old order of attention"
    else:
        raise ValueError(
            f"{file.path} is none of guided-diffusion's published networks, and its tensors "
            f"contain neither heads nor noise: give them with --config FLAGS.json, such as "
            f'{{"image_size": 64, "num_heads": 4, "noise_schedule": "cosine"}}'
        )
    model = unets.guided(file.tensors, layout, file.path, flags)
    ratios = tuple(n / layout.channels[0] for n in layout.channels)
    size = flags.image_size or unets.IMAGE_SIZES.get(ratios)
    shape = _sized(file.path, model, 2 * [size] if size else None, shape)
    if flags.rescale_timesteps and flags.diffusion_steps != 1000:
        model = unets.Rescaled(model, 1000 / flags.diffusion_steps)
    loaded = _loaded(file, "guided-diffusion", model, shape)
    variance = ", learned variance" if facts["learn_sigma"] else ""
    noise = f"{flags.noise_schedule} noise, T = {flags.diffusion_steps}"
    return replace(
        loaded,
        schedule=flags.schedule,
        prediction="sample" if flags.predict_xstart else "epsilon",
        classes=len(file.tensors["label_emb.weight"]) if facts["class_cond"] else None,
        description=f"{loaded.description}{variance}{assumed}, {noise}",
    )


def diffusers(file: File, config: str | None, shape: Shape | None) -> Loaded:
    source = file.path.with_name("config.json") if config is None else Path(config)
    if config in CONFIGS or not source.is_file():
        raise ValueError(
            f"{file.path} has a diffusers UNet2DModel's weights: its config.json must be beside "
            f"it, or config name it, got {config!r}"
        )
    fields = statedicts.read_json(source)
    kind = fields.get("_class_name")
    if kind != "UNet2DModel":
        raise ValueError(f"{source} must be of a UNet2DModel, got {kind!r}")
    if fields.get("class_embed_type") is not None:
        raise ValueError(
            f"{source} must be of a model that takes no class or a class number, got "
            f"class_embed_type = {fields['class_embed_type']!r}"
        )
    if fields.get("time_embedding_type") == "fourier":
        raise ValueError(
            f"{source} must be of a model that takes t, got time_embedding_type = 'fourier', "
            f"which takes a noise level σ"
        )
    known = {
        name: value
        for name, value in fields.items()
        if not name.startswith("_") and name not in _EMA_FIELDS
    }
    how, source_text = _trained(file.path.absolute().parent)

    from diffusers.models.unets.unet_2d import UNet2DModel

    try:
        # from_config would ignore unknown fields, and build another model.
        with unets.BUILT_ON:
            model: Any = UNet2DModel(**known)
    except Exception as error:  # diffusers raises errors of many types for a bad configuration
        raise ValueError(f"{source} builds no UNet2DModel: {error}") from None
    size = model.config.sample_size
    sides = size if isinstance(size, (list, tuple)) else [size, size]
    if shape is None and not (len(sides) == 2 and all(isinstance(n, int) and n > 0 for n in sides)):
        raise ValueError(
            f"{source} must have a sample_size, n or [height, width], got {size!r}; or give the "
            f"shape (--shape)"
        )
    shape = _sized(source, model, sides, shape)
    weights.fill(model, {_renamed(name): w for name, w in file.tensors.items()}, file.path)
    loaded = _loaded(file, ", ".join(filter(None, ("diffusers", file.part))), model, shape)
    return replace(
        loaded,
        classes=model.config.num_class_embeds,
        schedule=how.schedule,
        prediction=checked_prediction(how.prediction),
        clip=how.clip,
        description=f"{loaded.description}, {source_text}",
    )


def _trained(folder: Path) -> tuple[trained.Trained, str]:
    """Returns how the network in ``folder`` was trained, and a phrase that names the source."""
    root = folder.parent if folder.name in ("unet", "unet_ema") else folder
    roots = [folder, root]
    if re.fullmatch(r"checkpoint-\d+", root.name):  # The training script writes these.
        roots.append(root.parent)
    latents = next((name for name in ("vae", "vqvae") if (root / name).is_dir()), None)
    drawn = (
        "" if latents is None else f", in latents, which {latents}/ would decode (not done here)"
    )
    for place in roots:
        for name in ("scheduler_config.json", "scheduler/scheduler_config.json"):
            if (source := place / name).is_file():
                # A wrong schedule or prediction raises nothing, but gives bad images.
                how = trained.read(statedicts.read_json(source), source)
                clip = "" if how.clip is None else f", x0 clipped to ±{how.clip:g}"
                return how, (
                    f"{how.prediction} on {how.schedule.name} noise, T = {len(how.schedule)}{clip} "
                    f"({source.relative_to(place)}){drawn}"
                )
    how = trained.Trained(NoiseSchedule.linear(), "epsilon", None)
    return how, f"no scheduler_config.json: assumed to predict ε on linear noise, T = 1000{drawn}"


def _loaded(file: File, what: str, model: nn.Module, shape: Shape) -> Loaded:
    description = f"checkpoint {file.path}: {what}, {measured(model, shape)}"
    return Loaded(model.eval().requires_grad_(False), shape, description=description)


def _sized(source: Path, model: Any, sides: Sequence[int] | None, shape: Shape | None) -> Shape:
    """Returns ``shape``, or by default the one of height and width ``sides``, checked."""
    channels = model.config.in_channels
    if model.config.out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"{source} must have as many out_channels as in_channels, or twice as many, got "
            f"{model.config.out_channels} and {channels}"
        )
    if shape is None:
        if sides is None:
            raise ValueError(
                f"{source} does not contain the size of its images: give its shape (--shape), such "
                f"as {channels},32,32"
            )
        shape = channels, sides[0], sides[1]
    factor = 2 ** (len(model.config.block_out_channels) - 1)
    if shape[0] != channels or shape[1] % factor or shape[2] % factor:
        raise ValueError(
            f"shape must be {channels},H,W with H and W multiples of {factor} for {source}, got "
            f"{','.join(map(str, shape))}"
        )
    return shape


def refuse_config(config: str | None, path: Path) -> None:
    """Refuses a ``config`` beside weights that have their own."""
    if config is not None:
        raise ValueError(f"config must be left out with {path}, which has its own, got {config!r}")


_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

_EMA_FIELDS = {
    *("decay", "min_decay", "optimization_step", "update_after_step"),
    *("use_ema_warmup", "inv_gamma", "power"),
}
"""The fields that diffusers' ``EMAModel`` adds to the configuration of its network."""


def _renamed(name: str) -> str:
    """Translates the names of attention before diffusers 0.14 (google/ddpm-*) into today's."""
    head, _, leaf = name.rpartition(".")
    block, _, layer = head.rpartition(".")
    if ".attentions." in head and layer in _OLD_NAMES:
        return f"{block}.{_OLD_NAMES[layer]}.{leaf}"
    return name


def _named(*starts: str) -> Callable[[File], bool]:
    return lambda file: any(name.startswith(starts) for name in file.tensors)


KINDS = (
    Kind("garments", lambda file: "unet" in file.metadata, garments),
    Kind("ermongroup/ddim", _named("temb.dense."), _ermongroup),
    Kind("guided-diffusion", _named("input_blocks.", "output_blocks."), _guided),
    Kind("a diffusers UNet2DModel with config.json beside it", _named("down_blocks."), diffusers),
)
