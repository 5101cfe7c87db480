"""A CUDA graph on any device: records operations with their memory and replays them in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastddim.loop import recording

aten: Any = torch.ops.aten
ALLOCATIONS = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
}


class FreedError(RuntimeError):
    """A graph holds the address of freed memory."""


class Place(NamedTuple):
    """A tensor's address and layout, without a reference that keeps its memory alive."""

    storage: StorageWeakRef
    dtype: torch.dtype
    offset: Any
    size: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Place:
        return cls(
            StorageWeakRef(tensor.untyped_storage()),
            tensor.dtype,
            tensor.storage_offset(),
            tensor.size(),
            tensor.stride(),
        )

    def tensor(self) -> Tensor:
        if self.storage.expired():
            raise FreedError(f"a graph reads or writes freed memory: {self.dtype} {self.size}")
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)


class Tape(TorchDispatchMode):
    """Records the operations within its block, and replays them.

    As with a CUDA graph, a replay runs no Python and uses the recorded addresses, and reading a
    value during the recording raises. Like a graph's pool, the tape keeps only the memory alive
    that was allocated within its block. Other memory that it reads or writes must be kept alive by
    its owner.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.done: list[tuple[Any, Any, Any, list[Place]]] = []
        self.pool: dict[int, torch.UntypedStorage] = {}
        self.outside: dict[int, Place] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            raise RuntimeError("a graph cannot read values")
        kwargs = kwargs or {}
        for tensor in tensors_of((args, kwargs)):
            if tensor.untyped_storage()._cdata not in self.pool:
                self.outside[tensor.untyped_storage()._cdata] = Place.of(tensor)
        out = func(*args, **kwargs)
        for tensor in tensors_of(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.outside:
                self.pool[storage._cdata] = storage
        outs = [self._noted(tensor) for tensor in tensors_of(out)]
        self.done.append((func, self._noted(args), self._noted(kwargs), outs))
        return out

    def _noted(self, value: Any) -> Any:
        """``value`` with the tensors beside the pool as places: the tape holds the pool alone."""
        if isinstance(value, Tensor):
            outside = value.untyped_storage()._cdata in self.outside
            return Place.of(value) if outside else Place.of(value).tensor()
        return _each(self._noted, value)

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, places in self.done:
                outs = [_there(place) for place in places]
                if func in ALLOCATIONS:
                    for out in outs:  # an allocation leaves any values
                        out.fill_(float("nan") if out.is_floating_point() else 1)
                    continue
                again = tensors_of(func(*_there(args), **_there(kwargs)))
                for into, value in zip(outs, again, strict=True):
                    if into.data_ptr() != value.data_ptr() and into.numel():
                        into.copy_(value)

    @property
    def freed(self) -> list[Place]:
        """Freed memory outside the pool that the graph reads or writes."""
        return [place for place in self.outside.values() if place.storage.expired()]


def _there(value: Any) -> Any:
    """``value`` with the tensors that its places name."""
    return value.tensor() if isinstance(value, Place) else _each(_there, value)


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    """``value`` with each element changed, where it is a container that operations take."""
    if isinstance(value, dict):
        return {key: change(item) for key, item in value.items()}
    return type(value)(map(change, value)) if type(value) in (list, tuple) else value


def tensors_of(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def tapes_for_graphs(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Makes ``capture`` record tapes on a CPU, and returns the list that collects them."""
    tapes: list[Tape] = []

    class Stream:
        def __init__(self, device: object = None) -> None:
            pass

        def wait_stream(self, other: object) -> None:
            pass

    def made() -> Tape:
        tapes.append(Tape())
        return tapes[-1]

    @contextmanager
    def captured(tape: Tape, pool: object, stream: object, **mode: str) -> Iterator[None]:
        with tape:
            yield

    cuda = {
        "device": lambda _: nullcontext(),
        "stream": lambda _: nullcontext(),
        "Stream": Stream,
        "current_stream": Stream,
        "CUDAGraph": made,
        "graph": captured,
        "graph_pool_handle": object,
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(recording.Memory, "on", recording.Memory)
    monkeypatch.setattr(recording, "_warm_ups", {})
    monkeypatch.setattr(recording, "_stream_of", WeakKeyDictionary())
    monkeypatch.setattr(recording, "_abandon", lambda tape, *place: tapes.remove(tape))
    return tapes
