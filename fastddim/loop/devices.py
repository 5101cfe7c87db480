"""The device to sample on must be usable, and no CUDA graph may be in capture there."""

from __future__ import annotations

import torch

from fastddim.loop.model import Model, device_of


def place_of(device: torch.device | str | None, model: Model) -> torch.device:
    """Returns the device to sample on: ``device``, else the model's, else torch's default."""
    here = device_of(model) if device is None else None
    return usable_device(device) if here is None else here


def usable_device(
    device: torch.device | str | None = None, *, computes: bool = False
) -> torch.device:
    """Returns the device with its index, where torch can make a tensor on it.

    Args:
        device: torch's default device if left out.
        computes: whether the device must also compute and copy to the host, which costs a host
            sync. The device ``meta`` cannot, nor a GPU that this torch has no kernels for.

    Raises:
        ValueError: naming the devices that torch can use here.
    """
    try:
        if computes:
            torch.zeros(1, device=device).cpu()
        return torch.empty(0, device=device).device
    except Exception as error:  # Each backend has its own exception for a missing device.
        raise ValueError(
            f"device must be one that torch can use here ({', '.join(devices())}), "
            f"got {str(device)!r}"
        ) from error


def preferred_device() -> str:
    """Returns the device for commands that name none: CUDA if torch finds it, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def devices() -> list[str]:
    """Returns the devices that this PyTorch finds here."""
    if not torch.accelerator.is_available():
        return ["cpu"]
    accelerator = torch.accelerator.current_accelerator()
    kind = "cuda" if accelerator is None else accelerator.type
    n = torch.accelerator.device_count()
    return ["cpu", *([f"{kind}:{i}" for i in range(n)] if n > 1 else [kind])]


def check_not_capturing(device: torch.device) -> None:
    """Raises ``RuntimeError`` while the caller captures a CUDA graph.

    Such a graph would hold copies from the host, and the addresses of tables that are freed when
    the call returns.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "sampling cannot begin while a CUDA graph is being captured: call DDIM.capture before "
            "the capture and replay its result, or capture steps (fastddim.ddim_step)"
        )
