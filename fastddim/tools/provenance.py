"""What a result depends on beside its arguments, as plain values: weights, machine, versions."""

from __future__ import annotations

import hashlib
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path

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


def cpu_name() -> str:
    """The processor as it calls itself, where the system says."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def machine(device: torch.device) -> str:
    """What rounds: the accelerator's name, or of a CPU its name, instructions and threads."""
    name, n = architecture(device), threads(device)
    return name if n is None else f"{name}, threads: {n}"


def threads(device: torch.device) -> int | None:
    """On how many threads PyTorch computes there, if they are this process's."""
    return torch.get_num_threads() if device.type == "cpu" else None


def architecture(device: torch.device) -> str:
    """The accelerator's name, or of a CPU its name and instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{cpu_name()}, {platform.machine()} {capability}"


def packages(model: nn.Module) -> set[str]:
    """Where a network's classes come from."""
    return {type(module).__module__.partition(".")[0] for module in model.modules()}


def versions(*names: str) -> dict[str, str]:
    """Of those packages that are installed."""
    found = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            # PyTorch's own says which build it is.
            found[name] = str(torch.__version__) if name == "torch" else metadata.version(name)
    return found
