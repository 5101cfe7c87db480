"""Keeps a model's weights alive for a CUDA graph, which has only their addresses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor, nn


def holding(replay: Callable[[], Any], *functions: Any) -> Callable[[], Any]:
    """Returns ``replay``, which then also holds the current weights of these functions' modules.

    Call ``holding`` after the capture, because the first call of a model makes lazy weights. Each
    graph holds its own weights: a later graph of the same model may have read other weights.
    """
    return partial(_replayed, replay, weights_of(*functions))


def _replayed(replay: Callable[[], Any], weights: list[Tensor]) -> Any:
    """Replays a graph; the argument ``weights`` only keeps the weights alive."""
    return replay()


def weights_of(*functions: Any) -> list[Tensor]:
    """Returns the current parameters, buffers and caches of the modules that these functions use.

    A module that moves (``.to``) or gets other weights (``load_state_dict(assign=True)``) frees the
    former memory, although its parameters may be the same objects. So the returned tensors are new
    objects on the same memory.
    """
    return [tensor.detach() for module in modules_of(*functions) for tensor in _tensors_of(module)]


def _tensors_of(module: nn.Module) -> list[Tensor]:
    """Returns the tensors in the attributes of a module and of its parts.

    Beside parameters and buffers these are caches, which a later call with other shapes may
    replace: tables of rotary embeddings, for example.
    """
    found: list[Tensor] = []
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, dict):
                value = list(value.values())
            values = value if isinstance(value, (list, tuple)) else [value]
            found += [each for each in values if isinstance(each, Tensor)]
    return found


def modules_of(*functions: Any) -> list[nn.Module]:
    """Returns the modules that a function is, is bound to, wraps, closes over or names."""
    found: list[nn.Module] = []
    seen: set[int] = set()
    waiting = list(functions)
    while waiting:
        value = waiting.pop()
        if id(value) in seen or not callable(value) or isinstance(value, type):
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found.append(value)
        elif isinstance(value, partial):
            waiting += [value.func, *value.args, *value.keywords.values()]
        elif inspect.ismethod(value):
            waiting += [value.__self__, value.__func__]
        elif inspect.isfunction(value):
            for cell in value.__closure__ or ():
                with suppress(ValueError):  # A name that has no value yet has an empty cell.
                    waiting.append(cell.cell_contents)
            waiting += [value.__globals__.get(name) for name in value.__code__.co_names]
            waiting.append(getattr(value, "__wrapped__", None))
        else:
            waiting += getattr(value, "__dict__", {}).values()
    return found
