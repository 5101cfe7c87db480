"""Tensors kept between steps: spare buffers, and the float32 states of half precision samples."""

from __future__ import annotations

import sys
import weakref
from collections import deque
from typing import Any, NamedTuple
from weakref import getweakrefcount

import torch
from torch import Tensor

FRESH = 1 << 15
"""Below this many elements fresh memory costs a CPU no more than a search for a free buffer."""


class Spare:
    """Buffers that later steps reuse once nobody references them.

    Fresh memory costs a CPU more than the step itself (page faults: 120 ms against 51 ms for
    50 MB). The caching allocator of a GPU reuses memory for nothing, in stream order, so no tensor
    on a GPU is kept.
    Only tensors that a loop has allocated may be kept: an object that shares memory with a caller's
    tensor, a NumPy array for example, need not hold a reference that can be counted. A tensor that
    a caller has marked (requires_grad, attributes, weak references) is not reused.
    A ``Spare`` belongs to one thread.
    """

    def __init__(self, *fresh: Tensor) -> None:
        self._boxes: deque[list[Tensor]] = deque(([tensor] for tensor in fresh), maxlen=2)

    def keep(self, tensor: Tensor) -> None:
        """Keeps a tensor that a step has just written."""
        if tensor.is_cpu:
            self._boxes.append([tensor])

    def take(self) -> Tensor | None:
        """Removes and returns the oldest unreferenced tensor; returns None if there is none."""
        for i, box in enumerate(self._boxes):
            storage = box[0].untyped_storage()
            # Another process may read shared memory, and its references are not counted.
            if _holders(box, storage) == _ALONE and not storage.is_shared():
                del self._boxes[i]
                tensor = box[0]
                marked = tensor.requires_grad or tensor.__dict__ or getweakrefcount(tensor)
                return None if marked else tensor
        return None


class _Shadow(NamedTuple):
    half: weakref.ref[Tensor]
    state: Tensor
    address: int
    view: Any
    """The memory of ``half`` as a NumPy array, if it is on a CPU."""
    written: bytes
    """The bytes that a step wrote there."""


class Shadows:
    """The float32 states of half precision tensors, each kept for as long as its tensor lives.

    The state belongs to the tensor object, as an attribute would, but does not go into copies and
    files of the tensor. So no other trajectory can take the state, and a step from the same tensor
    gives the same result whatever steps were taken in between.
    """

    def __init__(self) -> None:
        self._kept: dict[int, _Shadow] = {}

    def put(self, half: Tensor, state: Tensor) -> None:
        """Keeps ``state``, which ``half`` holds rounded."""
        key, kept = id(half), self._kept
        # The callback runs before the tensor's id can be another's.
        ref = weakref.ref(half, lambda _: kept.pop(key, None))
        view, written = None, b""
        if half.is_cpu:
            view = half.detach().view(torch.int16).numpy()
            written = view.tobytes()
        kept[key] = _Shadow(ref, state, half.data_ptr(), view, written)

    def state_of(self, x: Tensor) -> Tensor:
        """Returns x in float32: its state, but x itself where the caller has written to x since.

        This compares values, because the version counter does not count ``x.data[...] = 0`` and
        ``x.numpy()[...] = 0``.
        """
        found = self._kept.get(id(x))
        if found is None or found.half() is not x:
            return x.float()
        state = found.state
        if x.shape != state.shape or x.device != state.device:  # x.resize_(), x.data = ...
            return x.float()
        # Half precision arithmetic costs a CPU more than the whole step, and comparing bytes less.
        # On a GPU a comparison here would be a host sync: three more passes over memory cost less.
        if (
            found.view is not None
            and x.data_ptr() == found.address
            and x.stride() == state.stride()
            and found.view.tobytes() == found.written
        ):
            return state
        return torch.where(state.to(x.dtype) == x, state, x)


def fitting(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    """Returns the buffer if it is laid out as x and fits the inference mode, else None."""
    fits = (
        tensor is not None
        and tensor.shape == x.shape
        and tensor.stride() == x.stride()
        and tensor.dtype == x.dtype
        and ((tensor.is_cpu and x.is_cpu) or tensor.device == x.device)
        and tensor.is_inference() == torch.is_inference_mode_enabled()
    )
    return tensor if fits else None


def memory(spare: Spare, x: Tensor) -> Tensor:
    """Returns memory laid out as x: a spare buffer, or a new one."""
    found = fitting(spare.take(), x)
    return torch.empty_like(x) if found is None else found


def _holders(box: list[Tensor], storage: torch.UntypedStorage) -> tuple[int, int, int, int]:
    """Counts the references to box[0] in Python and in C++, and those to its storage (views)."""
    return (
        sys.getrefcount(box[0]),
        box[0]._use_count(),  # type: ignore[attr-defined]
        sys.getrefcount(storage),
        torch._C._storage_Use_Count(storage._cdata),
    )


def _alone() -> tuple[int, int, int, int]:
    """Returns the counts where one box alone holds a tensor, taken as ``Spare.take`` takes them."""
    box = [torch.empty(1, device="cpu")]
    storage = box[0].untyped_storage()
    return _holders(box, storage)


_ALONE = _alone()
