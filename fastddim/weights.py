"""Weights in files: read whole or not at all, no code run, put where they fit exactly."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name, metadata) of a safetensors file.

    Raises:
        FileNotFoundError, ValueError: ``path`` is missing; or it is a pickle, truncated or
            something else.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    with path.open("rb") as file:
        start = file.read(4)
    if is_pickle(start):
        raise ValueError(f"{path} is a pickle, which can run code when it is read")
    try:
        with safe_open(path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return tensors, opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated, or no safetensors file: {error}") from None


def is_pickle(start: bytes) -> bool:
    """Whether a file that begins so is what torch.save writes (a zip) or a bare pickle."""
    return start.startswith(b"PK") or (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5")


_NUMPY: list[Any] = [
    np.dtype,
    *{type(np.dtype(code)) for code in "?bhilqBHILQefdFD"},
    *(
        (
            getattr(importlib.import_module("numpy._core.multiarray"), name),
            f"numpy.{core}.multiarray.{name}",
        )
        for name in ("scalar", "_reconstruct")
        for core in ("core", "_core")  # before NumPy 2 and since
    ),
    np.ndarray,
]
"""NumPy's numbers and arrays of numbers: a loss or a step count is often one. They run nothing."""


def unpickle(path: Path) -> Any:
    """What ``torch.save`` wrote: tensors, numbers, strings and containers of them, NumPy's too.

    Raises:
        ValueError: it holds anything else, of which nothing is run; or it is truncated.
    """
    try:
        with (  # by content, not by the name
            path.open("rb") as file,
            warnings.catch_warnings(),
            torch.serialization.safe_globals(_NUMPY),
        ):
            warnings.simplefilter("ignore")  # the protocol of bare pickles, which end in an error
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # as many types as ways to be no checkpoint; their advice is unsafe
        wanted = re.search(r"(?:GLOBAL |but got <class ')([^\s']+)", str(error))
    with path.open("rb") as file:
        bare = file.read(2) in (b"\x80\3", b"\x80\4", b"\x80\5")
    if not wanted and not bare:
        raise ValueError(f"{path} is truncated, or no checkpoint that torch.save wrote")
    what = f"wants code ({wanted[1]})" if wanted else "torch.save did not write"
    raise ValueError(
        f"{path} is a pickle that {what}, as EDM's .pkl do, and none is run: load it with its own "
        f"code and save the network's state_dict(), or name a function that builds it (--model)"
    )


def fill(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    source: Path,
    called: Callable[[str], str] = str,
    left_over: Iterable[str] = (),
) -> None:
    """Puts ``tensors`` into ``module``: every one it has, and nothing else.

    Args:
        called: what ``source`` calls the module's own names, for the messages.
        left_over: what else ``source`` holds, by its own names.

    Raises:
        ValueError: naming the first few that are missing, left over or of another shape.
    """
    own = module.state_dict()
    wrong = {
        "missing": {called(name) for name in own if name not in tensors},
        "left over": {name for name in tensors if name not in own}.union(left_over),
        "of another shape": {
            f"{called(name)} {tuple(tensor.shape)} for {tuple(own[name].shape)}"
            for name, tensor in tensors.items()
            if name in own and tensor.shape != own[name].shape
        },
    }
    found = [f"{len(names)} {what} ({few(names)})" for what, names in wrong.items() if names]
    if found:
        raise ValueError(f"{source} does not hold the model's weights: {', '.join(found)}")
    module.load_state_dict(tensors)


def few(names: Iterable[str], most: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
