"""Files people have, and functions that build a network → a model. Nothing is fetched.

No code in a file is ever run. A new kind of file is a row of ``KINDS``: what to call it, how its
content is known, how it is loaded. What other systems' tensors mean is ``fastddim.unets``'s.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastddim import embedded, unets, weights
from fastddim.check import kind as type_of
from fastddim.check import shown
from fastddim.coefficients import Prediction
from fastddim.predict import Model
from fastddim.sampler import DDIM
from fastddim.schedule import NoiseSchedule

Shape: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True)
class Loaded:
    """A model and what is known of it.

    Attributes:
        model: networks are in evaluation mode and on the CPU; those of a file are float32.
        shape: (channels, height, width) of one sample.
        schedule: what it was trained on.
        prediction: what it returns, as ``DDIM`` has it.
        description: one line for people, with what was assumed.
    """

    model: Model
    shape: Shape
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule.linear)
    prediction: Prediction = "epsilon"
    description: str = ""

    def ddim(self, steps: int | None = None, **options: Any) -> DDIM:
        """A sampler on the model's own schedule."""
        return DDIM(steps, schedule=self.schedule, prediction=self.prediction, **options)


@dataclass(frozen=True)
class File:
    """What a file of weights holds."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    part: str = ""
    """Which of the networks in it the tensors are, if there can be several."""


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        what: what the messages call it.
        known: whether a file is one, by its content.
        load: its model, given ``config`` and ``shape`` as ``load`` is.
    """

    what: str
    known: Callable[[File], bool]
    load: Callable[[File, str | None, Shape | None], Loaded]


def _published(size: int, *multiples: int) -> tuple[unets.Layout, int]:
    """128 channels and their multiples, attention where images are 16 wide."""
    attention = tuple(size >> level == 16 for level in range(len(multiples)))
    return unets.Layout(tuple(128 * n for n in multiples), 2, attention), size


CONFIGS = {
    "cifar10": _published(32, 1, 2, 2, 2),
    "celeba64": _published(64, 1, 2, 2, 2, 4),
    "lsun256": _published(256, 1, 1, 2, 2, 4, 4),
}
"""The networks of ermongroup/ddim's own configurations, and the size of their images."""


def load(
    path: Path | str | None = None, *, config: str | None = None, shape: Sequence[int] | None = None
) -> Loaded:
    """The model of a checkpoint.

    What a file holds is found out from its content, whatever its name. The networks of
    ermongroup/ddim and of guided-diffusion become diffusers' ``UNet2DModel``, equal to 2e-6.

    Args:
        path: one of these; None is the garment model that ships.
            A folder with a diffusers ``UNet2DModel``, or with one in ``unet/``; or its weights,
            with ``config.json`` beside them.
            A file of ermongroup/ddim: a state dict, or [model, optimizer, epoch, step, ema], of
            which the EMA is taken.
            A file of guided-diffusion or improved-diffusion: a state dict.
            A file of garment weights.
            Files are safetensors, or what ``torch.save`` writes.
        config: what the tensors do not tell. ermongroup: one of ``CONFIGS``, which then must fit;
            needed for none of these. guided-diffusion: a JSON file with the flags of its scripts,
            {"image_size": 64, "num_heads": 4, "noise_schedule": "cosine", ...}; what it leaves
            out is guided-diffusion's default. Without it, a network such as the published ones is
            taken to have their 64 channels a head, their order of attention and linear noise.
            diffusers: its ``config.json``, where that is not beside the weights.
        shape: (channels, height, width) of a sample, where it is not the one that the
            configuration says, or nothing says it.

    Raises:
        FileNotFoundError, ValueError: one line naming what was given and what is allowed; a file
            that wants code, is truncated, or has tensors missing, left over or of another shape.
    """
    size = None if shape is None else _checked_shape(shape)
    if config is not None and config not in CONFIGS and not Path(config).is_file():
        raise ValueError(f"config must be one of {', '.join(CONFIGS)}, or a file, got {config!r}")
    if path is None:
        return _garments(File(embedded.WEIGHTS, {}, {}), config, size)
    path = Path(path)
    whats = " or ".join(kind.what for kind in KINDS)
    allowed = f"allowed: {_FOLDER}, or a file with the weights of {whats}"
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}; {allowed}")
    for folder in (path, path / "unet"):
        if (folder / "config.json").is_file():
            _no_config(config, path)
            file = next((folder / name for name in _DIFFUSERS if (folder / name).is_file()), None)
            if file is None:
                raise FileNotFoundError(
                    f"no {' or '.join(_DIFFUSERS)} in {folder}; shards are not read"
                )
            return _diffusers(_read(file), None, size)
    if not path.is_file() or not _readable(path):
        raise ValueError(f"checkpoint {path} is {_description(path)}; {allowed}")
    opened = _read(path)
    kind = next((kind for kind in KINDS if kind.known(opened)), None)
    if kind is None:
        raise ValueError(
            f"checkpoint {path} has tensors of no kind known here "
            f"({weights.few(opened.tensors)}); {allowed}"
        )
    return kind.load(opened, config, size)


def build(name: str, shape: Sequence[int] | None = None) -> Loaded:
    """The model that a function returns, in the current folder or anywhere on Python's path.

    Args:
        name: ``package.module:factory``. The factory takes no arguments and returns a model, or
            (model, (channels, height, width)), or a ``Loaded`` with a schedule of its own. A
            network itself stands for the factory that returns it.
        shape: of a sample, where the factory does not say it, or another.

    Raises:
        ValueError: one line; whatever the import or the factory raised is its cause.
    """
    if re.fullmatch(r"[\w.]+:[\w.]+", name) is None:
        raise ValueError(f"model must be package.module:factory, got {name!r}")
    size = None if shape is None else _checked_shape(shape)
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    module, _, attributes = name.partition(":")
    try:
        made: Any = importlib.import_module(module)
        for attribute in attributes.split("."):
            made = getattr(made, attribute)
        if not isinstance(made, nn.Module):
            made = made()
    except (Exception, SystemExit) as error:
        places = [
            f" ({place.filename}:{place.lineno})"
            for place in traceback.extract_tb(error.__traceback__)
            if place.filename not in (__file__, importlib.__file__) and place.filename[0] != "<"
        ]
        what = f"model {name} failed: {type(error).__name__}: {error}"
        raise ValueError(what + "".join(places[-1:])) from error
    if isinstance(made, tuple) and len(made) == 2:
        made, size = made[0], size or _checked_shape(made[1])
    if isinstance(made, Loaded):
        found = replace(made, shape=size or made.shape)
    elif not callable(made):
        raise ValueError(
            f"model {name} must return a model, (model, (channels, height, width)) or a Loaded, "
            f"got {type_of(made)}"
        )
    elif size is None:
        raise ValueError(f"model {name} does not say its shape: add --shape, such as 3,32,32")
    else:
        found = Loaded(made, size, description="taken to predict ε on linear noise, T = 1000")
    if isinstance(found.model, nn.Module):
        found.model.eval().requires_grad_(False)
    what = f"model {name}: {_measured(found.model, found.shape)}"
    return replace(found, description=", ".join(filter(None, (what, found.description))))


def _garments(file: File, config: str | None, shape: Shape | None) -> Loaded:
    _no_config(config, file.path)
    if shape not in (None, embedded.SHAPE):
        raise ValueError(
            f"shape must be left out with garment weights, which draw {_shown(embedded.SHAPE)}, "
            f"got {_shown(shape)}"
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
    if facts["class_cond"]:
        raise ValueError(
            f"{file.path} must be of an unconditional model, got one with classes (label_emb): "
            f"name a function that builds it and fills in the class (--model)"
        )
    assumed = ""
    if config is not None:
        flags = unets.Flags.of(_json(Path(config)), facts, Path(config))
    elif (
        facts["resblock_updown"]
        and facts["use_scale_shift_norm"]
        and not any(n % 64 for n in layout.channels)
    ):
        flags = unets.PUBLISHED
        assumed = ", taken to be as published: 64 channels a head, in the old order"
    else:
        raise ValueError(
            f"{file.path} is none of guided-diffusion's published networks, and neither heads nor "
            f"noise are in its tensors: say them with --config FLAGS.json, such as "
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
        description=f"{loaded.description}{variance}{assumed}, {noise}",
    )


def _diffusers(file: File, config: str | None, shape: Shape | None) -> Loaded:
    source = file.path.with_name("config.json") if config is None else Path(config)
    if config in CONFIGS or not source.is_file():
        raise ValueError(
            f"{file.path} has a diffusers UNet2DModel's weights: its config.json must be beside "
            f"it, or config name it, got {config!r}"
        )
    fields = _json(source)
    kind = fields.get("_class_name")
    if kind != "UNet2DModel":
        raise ValueError(f"{source} must be of a UNet2DModel, got {kind!r}")
    for name in ("class_embed_type", "num_class_embeds"):
        if fields.get(name) is not None:
            raise ValueError(
                f"{source} must be of an unconditional model, got {name} = {fields[name]!r}"
            )
    if fields.get("time_embedding_type") == "fourier":
        raise ValueError(
            f"{source} must be of a model that is told t, got time_embedding_type = 'fourier', "
            f"which is told a noise level σ"
        )
    folder = file.path.absolute().parent
    for root in (folder, folder.parent) if folder.name == "unet" else (folder,):
        for schedule in (root / "scheduler_config.json", root / "scheduler/scheduler_config.json"):
            if schedule.is_file():
                _check_schedule(schedule)

    from diffusers.models.unets.unet_2d import UNet2DModel

    known = {name: value for name, value in fields.items() if not name.startswith("_")}
    try:
        # Not from_config, which passes over what it does not know and builds another model.
        with torch.device("cpu"):
            model: Any = UNet2DModel(**known)
    except Exception as error:  # whatever diffusers makes of a configuration that is none
        raise ValueError(f"{source} builds no UNet2DModel: {error}") from None
    size = model.config.sample_size
    sides = size if isinstance(size, (list, tuple)) else [size, size]
    if shape is None and not (len(sides) == 2 and all(isinstance(n, int) and n > 0 for n in sides)):
        raise ValueError(
            f"{source} must have a sample_size, n or [height, width], got {size!r}; or say the "
            f"shape (--shape)"
        )
    shape = _sized(source, model, sides, shape)
    weights.fill(model, {_renamed(name): w for name, w in file.tensors.items()}, file.path)
    return _loaded(file, "diffusers", model, shape)


def _loaded(file: File, what: str, model: nn.Module, shape: Shape) -> Loaded:
    description = f"checkpoint {file.path}: {what}, {_measured(model, shape)}"
    return Loaded(model.eval().requires_grad_(False), shape, description=description)


def _measured(model: Any, shape: Shape) -> str:
    n = sum(p.numel() for p in model.parameters()) if isinstance(model, nn.Module) else None
    return _shown(shape) if n is None else f"{n / 1e6:.1f} M parameters, {_shown(shape)}"


def _shown(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _sized(source: Path, model: Any, sides: Sequence[int] | None, shape: Shape | None) -> Shape:
    """The shape that was asked for or that goes with ``sides``, found to suit the network."""
    channels = model.config.in_channels
    if model.config.out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"{source} must have as many out_channels as in_channels, or twice as many, got "
            f"{model.config.out_channels} and {channels}"
        )
    if shape is None:
        if sides is None:
            raise ValueError(
                f"{source} does not tell the size of its images: say its shape (--shape), such "
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


def _checked_shape(shape: Any) -> Shape:
    if not (
        isinstance(shape, Sequence)
        and len(shape) == 3
        and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape)
    ):
        raise ValueError(f"shape must be (channels, height, width), each ≥ 1, got {shape!r}")
    return shape[0], shape[1], shape[2]


def _no_config(config: str | None, path: Path) -> None:
    if config is not None:
        raise ValueError(f"config must be left out with {path}, which has its own, got {config!r}")


def _readable(path: Path) -> bool:
    start = _start(path)
    return start[8:9] == b"{" or weights.is_pickle(start)


def _read(path: Path) -> File:
    """The tensors of a safetensors file, or of a pickle without code."""
    if not weights.is_pickle(_start(path)):
        tensors, metadata = weights.read(path)
        return File(path, _checked_tensors(path, tensors), metadata)
    held, part = weights.unpickle(path), ""
    if isinstance(held, (list, tuple)):
        if len(held) not in (4, 5):
            raise ValueError(
                f"checkpoint {path} is a list of {len(held)}; ermongroup's is [model, optimizer, "
                f"epoch, step, ema] or the first four"
            )
        held, part = (held[4], "EMA") if len(held) == 5 else (held[0], "no EMA")
    return File(path, _checked_tensors(path, held), {}, part)


def _checked_tensors(path: Path, held: Any) -> dict[str, Tensor]:
    if not isinstance(held, dict) or not held:
        raise ValueError(f"checkpoint {path} must hold tensors by name, got {type_of(held)}")
    for name, value in held.items():
        if (
            not isinstance(name, str)
            or not isinstance(value, Tensor)
            or not value.is_floating_point()
            or (value.layout, value.device.type) != (torch.strided, "cpu")
        ):
            got = value.dtype if isinstance(value, Tensor) else type_of(value)
            raise ValueError(
                f"checkpoint {path} must hold tensors of floating point by name, got {got} as "
                f"{shown(name)}"
            )
    # DataParallel puts it before every name, and ermongroup trains so.
    prefix = "module." if all(name.startswith("module.") for name in held) else ""
    return {name.removeprefix(prefix): value for name, value in held.items()}


_FOLDER = (
    "a folder with a diffusers UNet2DModel (config.json and "
    "diffusion_pytorch_model.safetensors or .bin, there or in unet/)"
)
_DIFFUSERS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


_PAPER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}
"""What a scheduler's configuration says, or leaves out, of a model this module returns."""


def _check_schedule(source: Path) -> None:
    # The wrong schedule or prediction does not fail: it draws bad pictures.
    config = _json(source)
    for name, expected in _PAPER.items():
        if (value := config.get(name, expected)) != expected:
            raise ValueError(f"{source} must have {name} = {expected!r}, got {value!r}")


_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _renamed(name: str) -> str:
    """Attention before diffusers 0.14, as google/ddpm-* have it, to today's names."""
    head, _, leaf = name.rpartition(".")
    block, _, layer = head.rpartition(".")
    if ".attentions." in head and layer in _OLD_NAMES:
        return f"{block}.{_OLD_NAMES[layer]}.{leaf}"
    return name


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(9)


def _description(path: Path) -> str:
    """What a path of no known kind is."""
    if path.is_dir():
        return "a folder without config.json"
    if not path.is_file():
        return "neither a file nor a folder"
    start = _start(path)
    if not start:
        return "an empty file"
    if weights.is_pickle(start):
        return "a pickle, which can run code when it is read"
    return "a file of another kind, or truncated"


def _named(*starts: str) -> Callable[[File], bool]:
    return lambda file: any(name.startswith(starts) for name in file.tensors)


KINDS = (
    Kind("garments", lambda file: "unet" in file.metadata, _garments),
    Kind("ermongroup/ddim", _named("temb.dense."), _ermongroup),
    Kind("guided-diffusion", _named("input_blocks.", "output_blocks."), _guided),
    Kind("a diffusers UNet2DModel with config.json beside it", _named("down_blocks."), _diffusers),
)
