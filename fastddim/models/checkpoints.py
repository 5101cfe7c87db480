"""Files people have, and functions that build a network → a model. Nothing is fetched.

No code in a file is ever run. A new kind of file is a row of ``KINDS``: what to call it, how its
content is known, how it is loaded. What other systems' tensors mean is ``fastddim.models.unets``'s.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from fastddim import embedded, weights
from fastddim.check import kind as type_of
from fastddim.coefficients import Prediction, checked_prediction
from fastddim.loop.model import Model
from fastddim.loop.sampler import DDIM
from fastddim.models import statedicts, trained, unets
from fastddim.models.statedicts import File
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
        clip: what the x0 it implies is clamped to, where its scheduler's configuration says so.
        classes: how many classes the model knows, of which it is told one as ``class_labels``;
            None for a model that is told none.
        null_class: the one of them that stands for none, which guidance needs.
    """

    model: Model
    shape: Shape
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule.linear)
    prediction: Prediction = "epsilon"
    description: str = ""
    classes: int | None = None
    null_class: int | None = None
    clip: float | None = None

    def ddim(self, steps: int | None = None, **options: Any) -> DDIM:
        """A sampler on the model's own schedule, which clips as the model's own does."""
        own = {"schedule": self.schedule, "prediction": self.prediction, "clip": self.clip}
        return DDIM(steps, **{**own, **options})


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
    path: Path | str | None = None,
    *,
    config: str | None = None,
    shape: Sequence[int] | None = None,
    ema: bool | None = None,
    schedule: NoiseSchedule | None = None,
    prediction: str | None = None,
) -> Loaded:
    """The model of a checkpoint.

    What a file holds is found out from its content, whatever its name. The networks of
    ermongroup/ddim and of guided-diffusion become diffusers' ``UNet2DModel``, equal to 2e-6.

    Args:
        path: one of these; None is the garment model that ships.
            A folder with a diffusers ``UNet2DModel``, or with one in ``unet/`` or ``unet_ema/``;
            or its weights, with ``config.json`` beside them. How it was trained is read from its
            scheduler's configuration: there, in ``scheduler/`` beside ``unet/``, or beside the
            ``checkpoint-N`` it is in. Weights may be in several files, or a variant such as fp16.
            A file of ermongroup/ddim: a state dict, or [model, optimizer, epoch, step, ema].
            A file of guided-diffusion or improved-diffusion: a state dict.
            A file of garment weights.
            Files are safetensors, or what ``torch.save`` writes: a state dict, or a dictionary
            with one as "state_dict", "model", "ema", ... . What compiling or a wrapper has put
            before every name is left out.
        config: what the tensors do not tell. ermongroup: one of ``CONFIGS``, which then must fit;
            needed for none of these. guided-diffusion: a JSON file with the flags of its scripts,
            {"image_size": 64, "num_heads": 4, "noise_schedule": "cosine", ...}; what it leaves
            out is guided-diffusion's default. Without it, a network such as the published ones is
            taken to have their 64 channels a head, their order of attention and linear noise.
            diffusers: its ``config.json``, where that is not beside the weights.
        shape: (channels, height, width) of a sample, where it is not the one that the
            configuration says, or nothing says it.
        ema: whether to take the average of the weights over the training (EMA), which draws
            better; by default where there is one.
        schedule, prediction: what the model was trained on and returns, where the files do not
            say it or say something else.

    Raises:
        FileNotFoundError, ValueError: one line naming what was given and what is allowed; a file
            that wants code, is truncated, or has tensors missing, left over or of another shape.
    """
    size = None if shape is None else _checked_shape(shape)
    if config is not None and config not in CONFIGS and not Path(config).is_file():
        raise ValueError(f"config must be one of {', '.join(CONFIGS)}, or a file, got {config!r}")
    prediction = None if prediction is None else checked_prediction(prediction)
    if schedule is not None and not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, got {type_of(schedule)}")
    if path is None:
        if ema is not None:
            raise ValueError(f"ema must be left out with the model that ships, got {ema}")
        loaded = _garments(File(embedded.WEIGHTS, {}, {}), config, size)
        return _told(loaded, schedule, prediction)
    path = Path(path)
    whats = " or ".join(kind.what for kind in KINDS)
    allowed = f"allowed: {_FOLDER}, or a file with the weights of {whats}"
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}; {allowed}")
    if folder := _unet(path, ema):
        _no_config(config, path)
        return _told(_diffusers(folder, None, size), schedule, prediction)
    if not path.is_file() or not statedicts.is_one(path):
        raise ValueError(f"checkpoint {path} is {_description(path)}; {allowed}")
    opened = statedicts.read(path, ema)
    for tensors in statedicts.prefixes(opened.tensors):
        file = replace(opened, tensors=tensors)
        for kind in KINDS:
            if kind.known(file):
                return _told(kind.load(file, config, size), schedule, prediction)
    raise ValueError(
        f"checkpoint {path} has tensors of no kind known here "
        f"({weights.few(opened.tensors)}); {allowed}"
    )


def _told(loaded: Loaded, schedule: NoiseSchedule | None, prediction: str | None) -> Loaded:
    """``loaded`` with what its user knows better."""
    given = [
        f"{prediction} predicted as said" if prediction else "",
        f"{schedule.name} noise, T = {len(schedule)}, as said" if schedule else "",
    ]
    return replace(
        loaded,
        schedule=schedule or loaded.schedule,
        prediction=checked_prediction(prediction or loaded.prediction),
        description=", ".join(filter(None, (loaded.description, *given))),
    )


def _unet(path: Path, ema: bool | None) -> File | None:
    """The weights of the diffusers network in a folder, or None where there is none.

    diffusers' training script leaves both the average of the weights, in ``unet_ema/``, and the
    last weights, in ``unet/``.
    """
    has = {name: (path / name / "config.json").is_file() for name in ("", "unet", "unet_ema")}
    if not any(has.values()):
        return None
    if has[""]:
        part = "unet_ema" if path.absolute().name == "unet_ema" else ""
        if ema is not None and ema != bool(part):
            raise ValueError(f"ema must be left out or {bool(part)} with {path}, got {ema}")
        name = ""
    else:
        wanted = has["unet_ema"] if ema is None else ema
        name = part = "unet_ema" if wanted else "unet"
        if not has[name]:
            raise ValueError(
                f"ema must be left out or {not ema} with {path}, which has no {name}/, got {ema}"
            )
    file = statedicts.in_folder(path / name)
    said = {"unet_ema": "EMA", "unet": "no EMA" if has["unet_ema"] else ""}.get(part, "")
    if not name or not has["unet_ema"] or not has["unet"]:
        both = ""
    else:
        both = "; unet/ has the last weights" if said == "EMA" else "; unet_ema/ has it"
    return replace(file, part=", ".join(filter(None, (said + both, file.part))))


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
    assumed = ""
    if config is not None:
        flags = unets.Flags.of(statedicts.read_json(Path(config)), facts, Path(config))
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
        classes=len(file.tensors["label_emb.weight"]) if facts["class_cond"] else None,
        description=f"{loaded.description}{variance}{assumed}, {noise}",
    )


def _diffusers(file: File, config: str | None, shape: Shape | None) -> Loaded:
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
            f"{source} must be of a model that is told no class or its number, got "
            f"class_embed_type = {fields['class_embed_type']!r}"
        )
    if fields.get("time_embedding_type") == "fourier":
        raise ValueError(
            f"{source} must be of a model that is told t, got time_embedding_type = 'fourier', "
            f"which is told a noise level σ"
        )
    known = {
        name: value
        for name, value in fields.items()
        if not name.startswith("_") and name not in _EMA_FIELDS
    }
    how, said = _trained(file.path.absolute().parent)

    from diffusers.models.unets.unet_2d import UNet2DModel

    try:
        # Not from_config, which passes over what it does not know and builds another model.
        with unets.BUILT_ON:
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
    loaded = _loaded(file, ", ".join(filter(None, ("diffusers", file.part))), model, shape)
    return replace(
        loaded,
        classes=model.config.num_class_embeds,
        schedule=how.schedule,
        prediction=checked_prediction(how.prediction),
        clip=how.clip,
        description=f"{loaded.description}, {said}",
    )


def _trained(folder: Path) -> tuple[trained.Trained, str]:
    """How the network in ``folder`` was trained, and one phrase about where that is from."""
    root = folder.parent if folder.name in ("unet", "unet_ema") else folder
    roots = [folder, root]
    if re.fullmatch(r"checkpoint-\d+", root.name):  # which the training script leaves on its way
        roots.append(root.parent)
    latents = next((name for name in ("vae", "vqvae") if (root / name).is_dir()), None)
    drawn = "" if latents is None else f", in latents that {latents}/ decodes, which is not done"
    for place in roots:
        for name in ("scheduler_config.json", "scheduler/scheduler_config.json"):
            if (source := place / name).is_file():
                # The wrong schedule or prediction does not fail: it draws bad pictures.
                how = trained.read(statedicts.read_json(source), source)
                clip = "" if how.clip is None else f", x0 clipped to ±{how.clip:g}"
                return how, (
                    f"{how.prediction} on {how.schedule.name} noise, T = {len(how.schedule)}{clip} "
                    f"({source.relative_to(place)}){drawn}"
                )
    how = trained.Trained(NoiseSchedule.linear(), "epsilon", None)
    return how, f"no scheduler_config.json: taken to predict ε on linear noise, T = 1000{drawn}"


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


_FOLDER = (
    "a folder with a diffusers UNet2DModel (config.json and "
    "diffusion_pytorch_model.safetensors or .bin, there or in unet/ or unet_ema/)"
)
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


_EMA_FIELDS = {
    *("decay", "min_decay", "optimization_step", "update_after_step"),
    *("use_ema_warmup", "inv_gamma", "power"),
}
"""What diffusers' ``EMAModel`` adds to the configuration of the network it averages."""


def _renamed(name: str) -> str:
    """Attention before diffusers 0.14, as google/ddpm-* have it, to today's names."""
    head, _, leaf = name.rpartition(".")
    block, _, layer = head.rpartition(".")
    if ".attentions." in head and layer in _OLD_NAMES:
        return f"{block}.{_OLD_NAMES[layer]}.{leaf}"
    return name


def _description(path: Path) -> str:
    """What a path of no known kind is."""
    if path.is_dir():
        return "a folder without config.json"
    if not path.is_file():
        return "neither a file nor a folder"
    start = statedicts.start_of(path)
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
