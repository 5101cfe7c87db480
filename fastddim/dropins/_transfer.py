"""Copies from the host to a device, without making the host wait."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns ``tensor`` on ``device``; a copy to a GPU does not make the host wait.

    This is for tensors that are small or copied once. CUDA has read memory that is not pinned when
    the call returns, so the caller may free ``tensor``; but for a large one it first waits for the
    stream.
    """
    return tensor.to(device, non_blocking=_non_blocking(device))


def sent_pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a large ``tensor`` on ``device``, by way of pinned memory, which PyTorch reuses."""
    return sent(tensor.pin_memory() if _non_blocking(device) else tensor, device)


def _non_blocking(device: torch.device) -> bool:
    # On other devices, ``non_blocking`` may read memory after it was freed. So would each replay of
    # a captured copy; a blocking copy makes the capture fail instead.
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
