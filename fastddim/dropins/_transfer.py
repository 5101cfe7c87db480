"""Copies from the host to a device, without making the host wait."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns ``tensor`` on ``device``; a copy to a GPU does not make the host wait.

    This is for tensors that are small or copied once. CUDA has read memory that is not pinned when
    the call returns, so the caller may free ``tensor``; but for a large one it first waits for the
    stream.

    Raises:
        RuntimeError: a CUDA graph is being captured and ``tensor`` is on the CPU.
    """
    if tensor.device.type == "cpu":
        check_no_copy_is_captured(device)
    # On other devices, ``non_blocking`` may read memory after it was freed.
    return tensor.to(device, non_blocking=device.type == "cuda")


def sent_pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a large ``tensor`` on ``device``, by way of pinned memory, which PyTorch reuses."""
    check_no_copy_is_captured(device)
    return sent(tensor.pin_memory() if device.type == "cuda" else tensor, device)


def check_no_copy_is_captured(device: torch.device) -> None:
    """Raises ``RuntimeError`` while a CUDA graph is captured.

    Each replay would copy again, from memory that may have been freed.
    """
    if capturing(device):
        raise RuntimeError(
            f"a CUDA graph cannot capture a copy from the CPU to {device}: take the same step once "
            f"before the capture, with every tensor and generator on {device}"
        )


def capturing(device: torch.device) -> bool:
    """Tells whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
