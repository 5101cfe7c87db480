"""The device to sample on must exist, and no CUDA graph may be in capture there."""

from __future__ import annotations

import torch

from fastddim.loop.model import Model, device_of


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


def usable_device(name: str | None) -> torch.device:
    """The device of that name, or the one to take where none is given: CUDA, else the CPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).cpu()
        return torch.device(name)
    except Exception:  # each backend has its own for not being there, and few name what is missing
        raise ValueError(
            f"device must be one that torch can use here ({', '.join(devices())}), got {name!r}"
        ) from None


def devices() -> list[str]:
    """The devices that this PyTorch finds here."""
    if not torch.accelerator.is_available():
        return ["cpu"]
    accelerator = torch.accelerator.current_accelerator()
    kind = "cuda" if accelerator is None else accelerator.type
    n = torch.accelerator.device_count()
    return ["cpu", *([f"{kind}:{i}" for i in range(n)] if n > 1 else [kind])]
