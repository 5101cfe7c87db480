"""Loads the model of a file or folder, or the model that a function returns.

Nothing is downloaded, and no code in a file is ever run. ``fastddim.models.kinds`` lists the kinds
of file.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from fastddim import embedded, weights
from fastddim.check import kind as type_of
from fastddim.coefficients import checked_prediction
from fastddim.models import statedicts
from fastddim.models.kinds import CONFIGS as CONFIGS
from fastddim.models.kinds import KINDS as KINDS
from fastddim.models.kinds import Kind as Kind
from fastddim.models.kinds import diffusers, garments, refuse_config
from fastddim.models.loaded import Loaded as Loaded
from fastddim.models.loaded import Shape as Shape
from fastddim.models.loaded import checked_shape, measured
from fastddim.models.statedicts import File
from fastddim.schedule import NoiseSchedule


def load(
    path: Path | str | None = None,
    *,
    config: str | None = None,
    shape: Sequence[int] | None = None,
    ema: bool | None = None,
    schedule: NoiseSchedule | None = None,
    prediction: str | None = None,
) -> Loaded:
    """Returns the model of a checkpoint.

    The content of a file, not its name, decides its kind. The networks of ermongroup/ddim and of
    guided-diffusion become diffusers' ``UNet2DModel``, whose outputs agree to 2e-6.

    Args:
        path: one of the following. None stands for the garment model that ships.
            A folder with a diffusers ``UNet2DModel``, or with one in ``unet/`` or ``unet_ema/``;
            or the file of its weights, with ``config.json`` beside the file. The weights may be
            split into several files, or be a variant such as fp16. The noise schedule and the
            prediction come from the scheduler's configuration: in the same folder, in
            ``scheduler/`` beside ``unet/``, or beside the ``checkpoint-N`` that holds the network.
            A file of ermongroup/ddim: a state dict, or [model, optimizer, epoch, step, ema].
            A file of guided-diffusion or improved-diffusion: a state dict.
            A file of garment weights.
            Files are safetensors, or pickles of ``torch.save``: a state dict, or a dictionary that
            holds one as "state_dict", "model", "ema", ... . Prefixes that ``torch.compile`` or a
            wrapper has put before every name are removed.
        config: facts that the tensors do not contain. ermongroup: one of ``CONFIGS``, which the
            tensors must then fit; never necessary. guided-diffusion: a JSON file with the flags of
            its scripts, {"image_size": 64, "num_heads": 4, "noise_schedule": "cosine", ...};
            missing flags have guided-diffusion's defaults. Without the file, a network like the
            published ones is assumed to have their 64 channels per head, their order of attention
            and linear noise. diffusers: its ``config.json``, if the file is not beside the weights.
        shape: (channels, height, width) of a sample, if the configuration contains none, or to
            replace it.
        ema: whether to load the average of the weights over the training (EMA), which gives better
            images. By default it is loaded if the checkpoint has it.
        schedule, prediction: the schedule that the model was trained on and the quantity that it
            returns, if the files contain neither, or to replace theirs.

    Raises:
        FileNotFoundError, ValueError: one line naming the argument, the value and what is allowed.
            A file is refused that needs code, is truncated, or has tensors that are missing, left
            over or of another shape.
    """
    size = None if shape is None else checked_shape(shape)
    if config is not None and config not in CONFIGS and not Path(config).is_file():
        raise ValueError(f"config must be one of {', '.join(CONFIGS)}, or a file, got {config!r}")
    prediction = None if prediction is None else checked_prediction(prediction)
    if schedule is not None and not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, got {type_of(schedule)}")
    if path is None:
        if ema is not None:
            raise ValueError(f"ema must be left out with the model that ships, got {ema}")
        loaded = garments(File(embedded.WEIGHTS, {}, {}), config, size)
        return _overridden(loaded, schedule, prediction)
    path = Path(path)
    whats = " or ".join(kind.what for kind in KINDS)
    allowed = f"allowed: {_FOLDER}, or a file with the weights of {whats}"
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}; {allowed}")
    if folder := _unet(path, ema):
        refuse_config(config, path)
        return _overridden(diffusers(folder, None, size), schedule, prediction)
    if not path.is_file() or not statedicts.is_one(path):
        raise ValueError(f"checkpoint {path} is {_description(path)}; {allowed}")
    opened = statedicts.read(path, ema)
    for tensors in statedicts.prefixes(opened.tensors):
        file = replace(opened, tensors=tensors)
        for kind in KINDS:
            if kind.known(file):
                return _overridden(kind.load(file, config, size), schedule, prediction)
    raise ValueError(
        f"checkpoint {path} has tensors of no kind known here "
        f"({weights.few(opened.tensors)}); {allowed}"
    )


def _overridden(loaded: Loaded, schedule: NoiseSchedule | None, prediction: str | None) -> Loaded:
    """Returns ``loaded`` with the schedule and the prediction that the caller gave."""
    given = [
        f"{prediction} predicted as given" if prediction else "",
        f"{schedule.name} noise, T = {len(schedule)}, as given" if schedule else "",
    ]
    return replace(
        loaded,
        schedule=schedule or loaded.schedule,
        prediction=checked_prediction(prediction or loaded.prediction),
        description=", ".join(filter(None, (loaded.description, *given))),
    )


def _unet(path: Path, ema: bool | None) -> File | None:
    """Returns the weights of the diffusers network in a folder, or None if there is no network.

    diffusers' training script writes the average of the weights to ``unet_ema/`` and the last
    weights to ``unet/``.
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
    label = {"unet_ema": "EMA", "unet": "no EMA" if has["unet_ema"] else ""}.get(part, "")
    if not name or not has["unet_ema"] or not has["unet"]:
        both = ""
    else:
        both = "; unet/ has the last weights" if label == "EMA" else "; unet_ema/ has it"
    return replace(file, part=", ".join(filter(None, (label + both, file.part))))


def build(name: str, shape: Sequence[int] | None = None) -> Loaded:
    """Returns the model that a function in the current folder or on Python's path makes.

    Args:
        name: ``package.module:factory``. The factory takes no arguments and returns a model, or
            (model, (channels, height, width)), or a ``Loaded`` with a schedule of its own. The
            name may also be that of a network instead of a factory.
        shape: (channels, height, width) of a sample, if the factory returns none, or to replace it.

    Raises:
        ValueError: one line; its cause is the error that the import or the factory raised.
    """
    if re.fullmatch(r"[\w.]+:[\w.]+", name) is None:
        raise ValueError(f"model must be package.module:factory, got {name!r}")
    size = None if shape is None else checked_shape(shape)
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
        made, size = made[0], size or checked_shape(made[1])
    if isinstance(made, Loaded):
        found = replace(made, shape=size or made.shape)
    elif not callable(made):
        raise ValueError(
            f"model {name} must return a model, (model, (channels, height, width)) or a Loaded, "
            f"got {type_of(made)}"
        )
    elif size is None:
        raise ValueError(f"model {name} does not return its shape: add --shape, such as 3,32,32")
    else:
        found = Loaded(made, size, description="assumed to predict ε on linear noise, T = 1000")
    if isinstance(found.model, nn.Module):
        found.model.eval().requires_grad_(False)
    what = f"model {name}: {measured(found.model, found.shape)}"
    return replace(found, description=", ".join(filter(None, (what, found.description))))


def _description(path: Path) -> str:
    """Describes a path that holds no known kind of model."""
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


_FOLDER = (
    "a folder with a diffusers UNet2DModel (config.json and "
    "diffusion_pytorch_model.safetensors or .bin, there or in unet/ or unet_ema/)"
)
