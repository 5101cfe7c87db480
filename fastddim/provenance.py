"""What a result depends on beside its arguments, as plain values: weights, machine, versions."""

from __future__ import annotations

import hashlib
import platform
from importlib import metadata, util

import torch
from torch import nn


def digest(model: nn.Module) -> str:
    """SHA-256 of a network's weights, by name, whatever file they came from."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous().view(-1)
        sha.update(values.view(torch.uint8).numpy())
    return sha.hexdigest()


def machine(device: torch.device) -> str:
    """What rounds: the accelerator's name, or of a CPU its instructions and the threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    capability = torch.backends.cpu.get_cpu_capability()
    return f"cpu {platform.machine()} {capability}, threads: {torch.get_num_threads()}"


def versions(*names: str) -> dict[str, str]:
    """Of those packages that are there."""
    return {name: metadata.version(name) for name in names if util.find_spec(name) is not None}
