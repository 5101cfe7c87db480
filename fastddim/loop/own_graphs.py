"""A compiled model's own CUDA graphs, switched off while a graph around the model is captured."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastddim.loop.held import modules_of

_GRAPHS = "triton.cudagraphs"


@contextmanager
def own_graphs_off(holder: Any, *names: str) -> Iterator[None]:
    """Within the block, compiled modules behind these attributes of ``holder`` have no own graphs.

    ``torch.compile(model, mode="reduce-overhead")`` and ``mode="max-autotune"`` capture the model,
    and no capture may begin inside of another. The block compiles such a model once more, with its
    other options, and puts the result in the first one's place; a warning tells of it. A compiled
    function is found where it is the attribute itself, a compiled module also where the attribute
    closes over it.
    """
    replaced: list[tuple[Any, str, Any]] = []
    try:
        for owner, name in _places(holder, names):
            compiled = getattr(owner, name)
            settled = owner if name == "forward" else compiled
            without = _without_graphs(settled)
            if without is not None:
                replaced.append((owner, name, compiled))
                # A frozen owner, and a compiled module that would hand the attribute on.
                object.__setattr__(owner, name, without.forward if name == "forward" else without)
        if replaced:
            warnings.warn(
                "the compiled model captures CUDA graphs of its own, which are off in the captured "
                "loop or tick: that is one graph, and compiles the model once more",
                # The caller of ``DDIM.capture``: above are ``__enter__``, ``Captured``, the method
                # and its decorator.
                stacklevel=6,
            )
        yield
    finally:
        for owner, name, compiled in replaced:
            object.__setattr__(owner, name, compiled)


def _places(holder: Any, names: tuple[str, ...]) -> Iterator[tuple[Any, str]]:
    """Yields (owner, attribute) of everything callable that may be compiled."""
    for name in names:
        if not isinstance(getattr(holder, name), nn.Module):
            yield holder, name
    seen: set[int] = set()
    for module in modules_of(*(getattr(holder, name) for name in names)):
        for part in module.modules():
            if id(part) not in seen:
                seen.add(id(part))
                yield part, "forward" if hasattr(part, "_orig_mod") else "_compiled_call_impl"


def _without_graphs(compiled: Any) -> Any:
    """Returns ``compiled`` compiled again without graphs, or None if it has none of its own."""
    settings = getattr(compiled, "get_compiler_config", None)
    config = None if settings is None else settings()
    if not config or not config.get(_GRAPHS):
        return None
    from torch._inductor.config import get_config_copy

    usual: dict[str, Any] = get_config_copy()
    changed = {name: value for name, value in config.items() if usual.get(name) != value}
    inner = getattr(compiled, "_orig_mod", None) or compiled._torchdynamo_orig_callable
    return torch.compile(inner, options={**changed, _GRAPHS: False})
