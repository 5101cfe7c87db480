"""The weights of a model, as they must be held by whoever has nothing but their addresses."""

from __future__ import annotations

import inspect
from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor, nn


def weights_of(*functions: Any) -> list[Tensor]:
    """The parameters and buffers of the modules that these functions are or name, as they are now.

    A module that is moved (``.to``) or given other weights (``load_state_dict(assign=True)``) lets
    go of the memory of the former ones, its parameters often being the same objects as before.
    Hence what is returned are other tensors on the same memory.
    """
    return [
        tensor.detach()
        for module in _modules(functions)
        for tensor in (*module.parameters(), *module.buffers())
    ]


def _modules(functions: tuple[Any, ...]) -> list[nn.Module]:
    """Those that a function is, is bound to, is a partial of, closes over or names."""
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
