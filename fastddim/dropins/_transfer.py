"""Copies from the host to a device that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; on a GPU the host goes on while it is copied.

    For what is small or copied once: CUDA has read memory that is not pinned by the time the call
    returns, so that it may be freed, but first waits for the stream where there is much of it.
    """
    return tensor.to(device, non_blocking=_goes_on(device))


def sent_pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """The same for what is large, by way of pinned memory, which PyTorch keeps for later copies."""
    return sent(tensor.pin_memory() if _goes_on(device) else tensor, device)


def _goes_on(device: torch.device) -> bool:
    # On other devices ``non_blocking`` may read memory that has been freed by then. So would every
    # replay of a graph that holds such a copy: a copy that waits is refused in a capture.
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
