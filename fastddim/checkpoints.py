"""Files people have → a model. Nothing is unpickled, and nothing is fetched.

A new kind is a row of ``KINDS``: what to call it, how its content is known, how it is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from fastddim import embedded, weights

Loaded: TypeAlias = tuple[nn.Module, tuple[int, int, int]]
"""A model in evaluation mode, float32, on the CPU; and (channels, height, width)."""


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint.

    Attributes:
        what: what the messages call it.
        known: whether a path that exists holds one, by its content; asks no more than it must.
        load: its model, or one line about what is wrong.
    """

    what: str
    known: Callable[[Path], bool]
    load: Callable[[Path], Loaded]


def load(path: Path | str | None = None) -> Loaded:
    """The model of a checkpoint and the shape of one of its samples.

    Args:
        path: a file of garment weights, or a folder with a diffusers ``UNet2DModel`` (or with one
            in ``unet/``, as pipelines have it). None: the garment model that ships.

    The model predicts ε on the paper's schedule (linear β, T = 1000).

    Raises:
        FileNotFoundError, ValueError: one line naming what was given and what is
            allowed.
    """
    if path is None:
        return embedded.load(), embedded.SHAPE
    path = Path(path)
    allowed = " or ".join(kind.what for kind in KINDS)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}; allowed: {allowed}")
    kind = next((kind for kind in KINDS if kind.known(path)), None)
    if kind is None:
        raise ValueError(f"checkpoint {path} is {_description(path)}; allowed: {allowed}")
    return kind.load(path)


def _is_safetensors(path: Path) -> bool:
    # Eight bytes of length, then JSON. Truncation beyond that is for the loader to name.
    return path.is_file() and _start(path)[8:9] == b"{"


def _load_garments(path: Path) -> Loaded:
    return embedded.load(path), embedded.SHAPE


def _is_diffusers(path: Path) -> bool:
    return any((folder / "config.json").is_file() for folder in (path, path / "unet"))


def _load_diffusers(path: Path) -> Loaded:
    folder = path if (path / "config.json").is_file() else path / "unet"
    source = folder / "config.json"
    config = _json(source)
    kind = config.get("_class_name")
    if kind != "UNet2DModel":
        raise ValueError(f"{source} must be of a UNet2DModel, got {kind!r}")
    for name in ("class_embed_type", "num_class_embeds"):
        if config.get(name) is not None:
            raise ValueError(
                f"{source} must be of an unconditional model, got {name} = {config[name]!r}"
            )
    if config.get("time_embedding_type") == "fourier":
        raise ValueError(
            f"{source} must be of a model that is told t, got time_embedding_type = 'fourier', "
            f"which is told a noise level σ"
        )
    for schedule in (path / "scheduler_config.json", path / "scheduler" / "scheduler_config.json"):
        if schedule.is_file():
            _check_schedule(schedule)

    from diffusers.models.unets.unet_2d import UNet2DModel

    fields = {name: value for name, value in config.items() if not name.startswith("_")}
    try:
        # Not from_config, which passes over what it does not know and builds another model.
        model: nn.Module = UNet2DModel(**fields)
    except Exception as error:  # whatever diffusers makes of a configuration that is none
        raise ValueError(f"{source} builds no UNet2DModel: {error}") from None
    shape = _shape(model.config, source)
    file = folder / "diffusion_pytorch_model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"no {file.name} in {folder}; .bin files and shards are not read")
    tensors, _ = weights.read(file)
    weights.fill(model, {_renamed(name): tensor for name, tensor in tensors.items()}, file)
    return model.eval().requires_grad_(False), shape


def _shape(config: Any, source: Path) -> tuple[int, int, int]:
    channels = config.in_channels
    if config.out_channels != channels:
        raise ValueError(
            f"{source} must have as many out_channels as in_channels, got {config.out_channels} "
            f"and {channels}"
        )
    size = config.sample_size
    sides = [size, size] if isinstance(size, int) else size
    if not (
        isinstance(sides, (list, tuple))
        and len(sides) == 2
        and all(isinstance(n, int) and n > 0 for n in sides)
    ):
        raise ValueError(f"{source} must have a sample_size, n or [height, width], got {size!r}")
    return channels, sides[0], sides[1]


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


KINDS = (
    Kind("a safetensors file of garment weights", _is_safetensors, _load_garments),
    Kind(
        "a folder with a diffusers UNet2DModel (config.json and "
        "diffusion_pytorch_model.safetensors, there or in unet/)",
        _is_diffusers,
        _load_diffusers,
    ),
)
