"""Finds the tensors by name in a checkpoint, whatever dictionaries and wrappers are around them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastddim import weights
from fastddim.check import kind as type_of
from fastddim.check import shown

EMA = (
    *("ema", "ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "ema_model_state_dict"),
    *("ema_unet", "unet_ema", "ema_params"),
)
"""Dictionaries use these keys for the average of the weights over the training."""

LAST = ("state_dict", "model", "model_state_dict", "unet", "net", "network", "params", "module")
"""Dictionaries use these keys for the weights of the last step, or for the only weights."""

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that DataParallel and averages, torch.compile, FSDP and checkpointing add."""

COUNTERS = ("n_averaged", "num_updates", "decay")
"""Averages of weights store these numbers beside the weights, as tensors."""

NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
"""The names of the file of weights in a diffusers folder."""


@dataclass(frozen=True)
class File:
    """The content of a file of weights."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    part: str = ""
    """Says which of a checkpoint's networks the tensors are, if it can hold several."""


def read(path: Path, ema: bool | None = None) -> File:
    """Returns the tensors of a safetensors file, or of a pickle without code.

    Args:
        ema: whether to read the average of the weights. By default it is read if there is one.

    Raises:
        ValueError: one line; the file is neither, or has no such weights.
    """
    if not weights.is_pickle(start_of(path)):
        tensors, metadata = weights.read(path)
        held: Any = tensors
    else:
        held, metadata = weights.unpickle(path), {}
    held, part = _chosen(path, held, ema)
    if ema and part != "EMA":
        raise ValueError(f"ema must be left out or False with {path}, in which none is named")
    return File(path, _checked(path, held), metadata, part)


def in_folder(folder: Path) -> File:
    """Returns the weights in a diffusers folder: in one file, in several, or of a variant.

    Raises:
        FileNotFoundError: the folder has no weights, or one of several files is missing.
        ValueError: one line; a file holds no weights, or there are several variants.
    """
    for name in NAMES:
        if (folder / name).is_file():
            return read(folder / name)
        if (index := folder / f"{name}.index.json").is_file():
            return _sharded(index)
    variants = sorted(path for path in folder.iterdir() if _VARIANT.fullmatch(path.name))
    by_name = {_VARIANT.sub(r"\1\2", path.name): path for path in reversed(variants)}
    for name in ("fp16", "bf16", *([] if len(by_name) > 1 else by_name)):
        if name in by_name:
            path = by_name[name]
            file = _sharded(path) if path.suffix == ".json" else read(path)
            return File(file.path, file.tensors, file.metadata, f"{name} variant")
    if by_name:
        raise ValueError(
            f"{folder} has several variants of its weights, {', '.join(sorted(by_name))}: name "
            f"the file of one"
        )
    raise FileNotFoundError(f"no {' or '.join(NAMES)} in {folder}, nor shards or a variant of them")


_VARIANT = re.compile(
    r"diffusion_pytorch_model\.(?:(?!safetensors|bin)([\w-]+)\.(?:safetensors|bin)(?:\.index\.json)?"
    r"|(?:safetensors|bin)\.index\.([\w-]+)\.json)"
)


def _sharded(index: Path) -> File:
    held = read_json(index)
    names = held.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} must name the file of each tensor in weight_map")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(map(str, names.values()))):
        path = index.parent / name
        if Path(name).name != name or not path.is_file():
            raise FileNotFoundError(f"{index} names {shown(name)}, which is no file in its folder")
        tensors |= read(path).tensors
    if wrong := set(tensors) ^ {unwrapped(str(name)) for name in names}:
        raise ValueError(f"{index} and its files must name the same tensors: {weights.few(wrong)}")
    return File(index, tensors, {})


def _chosen(path: Path, held: Any, ema: bool | None) -> tuple[Any, str]:
    """Returns the mapping of tensors by name inside ``held``, and which part of ``held`` it is."""
    if isinstance(held, (list, tuple)):
        if len(held) not in (4, 5):
            raise ValueError(
                f"checkpoint {path} is a list of {len(held)}; ermongroup's is [model, optimizer, "
                f"epoch, step, ema] or the first four"
            )
        if len(held) == 5 and ema is not False:
            return held[4], "EMA"
        return held[0], "no EMA"
    if not isinstance(held, Mapping) or _has_tensors(held):
        return held, ""
    for names, part in ((EMA, "EMA"), (LAST, "no EMA")):
        for name in names:
            if name not in held or (part == "EMA" and ema is False):
                continue
            inner, which = _chosen(path, held[name], ema)
            if _has_tensors(inner):
                return inner, part if part == "EMA" else which or _without(held)
            if part == "EMA":
                raise ValueError(
                    f"checkpoint {path} must hold tensors by name as {name!r}, got "
                    f"{type_of(inner)} without any: to take the last weights, ema must be False"
                )
    return held, ""


def _has_tensors(held: Any) -> bool:
    return isinstance(held, Mapping) and any(isinstance(value, Tensor) for value in held.values())


def _without(held: Mapping[Any, Any]) -> str:
    return "no EMA" if any(name in held for name in EMA) else ""


def unwrapped(name: str) -> str:
    """Returns ``name`` without the parts that wrappers have added."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _checked(path: Path, held: Any) -> dict[str, Tensor]:
    if not isinstance(held, Mapping) or not held:
        raise ValueError(f"checkpoint {path} must hold tensors by name, got {type_of(held)}")
    tensors: dict[str, Tensor] = {}
    for name, value in held.items():
        if name in COUNTERS and not (isinstance(value, Tensor) and value.dim()):
            continue
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
        if (plain := unwrapped(name)) in tensors:
            raise ValueError(f"checkpoint {path} must hold each tensor once, got {plain} twice")
        tensors[plain] = value
    return tensors


def prefixes(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yields ``tensors``, and then without each prefix that all names share: "unet.", ..."""
    tensors = dict(tensors)
    yield tensors
    while len(starts := {name.partition(".")[0] for name in tensors}) == 1:
        start = f"{starts.pop()}."
        if not all(name.startswith(start) and len(name) > len(start) for name in tensors):
            return
        tensors = {name.removeprefix(start): value for name, value in tensors.items()}
        yield tensors


def is_one(path: Path) -> bool:
    """Tells whether a file begins like the kinds of file that ``read`` accepts."""
    start = start_of(path)
    return start[8:9] == b"{" or weights.is_pickle(start)


def start_of(path: Path) -> bytes:
    """Returns the first nine bytes, which tell safetensors and pickles apart."""
    with path.open("rb") as file:
        return file.read(9)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        ValueError: the file is no JSON, or holds another value than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
