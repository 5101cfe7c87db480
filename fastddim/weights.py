"""Weights in files: a file is read whole or refused, runs no code, and fits the model exactly."""

from __future__ import annotations

import importlib
import importlib.util
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns (tensors by name, metadata) of a safetensors file.

    Raises:
        FileNotFoundError: ``path`` is missing.
        ValueError: the file is a pickle, truncated, or of another format.
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
    """Returns whether a file with this start is from torch.save (a zip) or a bare pickle."""
    return start.startswith(b"PK") or (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5")


# NumPy 2 has moved the module, and files name it as the NumPy that wrote them did.
_CORE = "numpy._core" if importlib.util.find_spec("numpy._core") else "numpy.core"
_NUMPY: list[Any] = [
    np.dtype,
    *{type(np.dtype(code)) for code in "?bhilqBHILQefdFD"},
    *(
        (
            getattr(importlib.import_module(f"{_CORE}.multiarray"), name),
            f"numpy.{core}.multiarray.{name}",
        )
        for name in ("scalar", "_reconstruct")
        for core in ("core", "_core")
    ),
    np.ndarray,
]
"""NumPy's numbers and arrays, which run no code: losses and step counts are often stored so."""


def unpickle(path: Path) -> Any:
    """Reads a file of ``torch.save``: tensors, numbers (NumPy's too), strings and their containers.

    Raises:
        ValueError: the file holds anything else, which is not run, or is truncated.
    """
    try:
        with (  # by content, not by the name
            path.open("rb") as file,
            warnings.catch_warnings(),
            torch.serialization.safe_globals(_NUMPY),
        ):
            warnings.simplefilter("ignore")  # of the protocol of bare pickles, refused below
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of many types; their messages advise weights_only=False
        wanted = re.search(r"(?:GLOBAL |but got <class ')([^\s']+)", str(error))
    with path.open("rb") as file:
        bare = file.read(2) in (b"\x80\3", b"\x80\4", b"\x80\5")
    if not wanted and not bare:
        raise ValueError(f"{path} is truncated, or no checkpoint that torch.save wrote")
    what = f"wants code ({wanted[1]})" if wanted else "torch.save did not write"
    raise ValueError(
        f"{path} is a pickle that {what}, like EDM's .pkl files; of its code none is run: load it "
        f"with that code and save the network's state_dict(), or name a function that builds it "
        f"(--model)"
    )


def fill(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    source: Path,
    called: Callable[[str], str] = str,
    left_over: Iterable[str] = (),
) -> None:
    """Puts ``tensors`` into ``module``, all of whose tensors must be there, and no others.

    Args:
        called: maps the module's names to ``source``'s, for the messages.
        left_over: the names of other tensors in ``source``.

    Raises:
        ValueError: naming the first few tensors that are missing, left over or of another shape.
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
    """Returns the first ``most`` names in order, joined for a message."""
    names = sorted(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
