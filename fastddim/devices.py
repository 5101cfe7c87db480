"""The device to sample on must exist, and no CUDA graph may be in capture there."""

from __future__ import annotations

import torch

from fastddim.predict import Model, device_of


def place_of(device: torch.device | str | None, model: Model) -> torch.device:
    """Returns the device to sample on: ``device``, else the model's, else torch's default."""
    here = device_of(model) if device is None else None
    return usable(device) if here is None else here


def usable(device: torch.device | str | None) -> torch.device:
    """Returns the device with its index; raises ``ValueError`` if no tensor can be made there."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {str(device)!r} cannot be used: {reason}") from None


def check_not_capturing(device: torch.device) -> None:
    """Raises ``RuntimeError`` while the caller captures a CUDA graph.

    Such a graph would hold copies from the host, and the addresses of tables that die with the
    call.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "sampling cannot begin while a CUDA graph is being captured: call DDIM.capture before "
            "it and replay what that returns, or capture steps (fastddim.ddim_step)"
        )
