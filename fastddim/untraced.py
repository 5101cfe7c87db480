"""Functions that torch.compile leaves untraced, behind one graph break."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch.compiler import is_compiling

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function that torch.compile calls without a look inside.

    fastddim's loops plan their steps in NumPy and choose a backend by the installed packages.
    torch.compile would break its graph two dozen times there, and compile the pieces between for
    no gain. A model that is compiled itself stays compiled.
    """

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if is_compiling():
            # torch.compile does not trace ``disable`` either, and breaks the graph here. Called
            # without torch.compile, ``disable`` would import its compiler, which takes a second.
            return torch.compiler.disable(_aside)(function, args, kwargs)  # type: ignore[no-any-return]
        return function(*args, **kwargs)

    # torch.compile counts its compilations by code object: each function gets its own.
    plain: Any = called
    plain.__code__ = plain.__code__.replace(co_name=function.__name__)
    return called


def _aside(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    found = function(*args, **kwargs)
    if isinstance(found, Iterator):
        # The steps of an iterator run later, where torch.compile would look inside again.
        following: Any = torch.compiler.disable(functools.partial(next, found, _END))
        return iter(following, _END)
    return found


_END = object()
