"""Memory that a later step may write again: the states and inputs that nobody holds any more."""

from __future__ import annotations

import sys
from collections import deque

import torch
from torch import Tensor


class Spare:
    """Tensors of one kind, kept for a later step to write if nobody else holds them by then.

    Fresh memory costs a CPU more than the step itself (page faults: 120 ms against 51 ms for
    50 MB). The caching allocator of a GPU gives it back for nothing, in stream order: there,
    nothing is kept.
    Only what a loop has made itself may be kept: the memory of a caller's tensor may be somebody's
    (a numpy array's, say) without a reference that could be counted.
    """

    def __init__(self, *fresh: Tensor) -> None:
        self._boxes: deque[list[Tensor]] = deque(([tensor] for tensor in fresh), maxlen=2)

    def keep(self, tensor: Tensor) -> None:
        if tensor.is_cpu:
            self._boxes.append([tensor])

    def take(self) -> Tensor | None:
        """One that its box alone holds, the one kept first, or None."""
        for i, box in enumerate(self._boxes):
            # Another process may read what is in shared memory, and is not counted.
            if _holders(box) == _ALONE and not box[0].untyped_storage().is_shared():
                del self._boxes[i]
                return box[0]
        return None


def fitting(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    """A buffer, if it is laid out as x, and one that inference mode made if that is on."""
    fits = (
        tensor is not None
        and tensor.shape == x.shape
        and tensor.stride() == x.stride()
        and tensor.dtype == x.dtype
        and tensor.device == x.device
        and tensor.is_inference() == torch.is_inference_mode_enabled()
    )
    return tensor if fits else None


def _holders(box: list[Tensor]) -> tuple[int, int, int, int]:
    """Who holds box[0]: Python names, C++ references, and the same two of its storage (views)."""
    storage = box[0].untyped_storage()
    return (
        sys.getrefcount(box[0]),
        box[0]._use_count(),  # type: ignore[attr-defined]
        sys.getrefcount(storage),
        torch._C._storage_Use_Count(storage._cdata),
    )


_ALONE = _holders([torch.empty(1, device="cpu")])
