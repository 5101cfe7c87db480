"""Weights in safetensors files: read whole or not at all, put where they fit exactly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

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


def fill(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Puts ``tensors`` into ``module``: every one it has, and nothing else.

    Raises:
        ValueError: naming the first few that are missing, left over or of another shape.
    """
    own = module.state_dict()
    wrong = {
        "missing": [name for name in own if name not in tensors],
        "left over": [name for name in tensors if name not in own],
        "of another shape": [
            f"{name} {tuple(tensor.shape)} for {tuple(own[name].shape)}"
            for name, tensor in tensors.items()
            if name in own and tensor.shape != own[name].shape
        ],
    }
    found = [f"{len(names)} {what} ({_few(names)})" for what, names in wrong.items() if names]
    if found:
        raise ValueError(f"{source} does not hold the model's weights: {', '.join(found)}")
    module.load_state_dict(tensors)


def _few(names: Iterable[str], most: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
