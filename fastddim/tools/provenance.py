"""The weights, the machine and the versions that a result depends on, as plain values."""

from __future__ import annotations

import hashlib
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch
from torch import nn


def digest(model: nn.Module) -> str:
    """Returns the SHA-256 of a network's weights and their names, independent of their file."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous().view(-1)
        if len(values):  # PyTorch views no empty tensor as bytes
            sha.update(values.view(torch.uint8).numpy())
    return sha.hexdigest()


def cpu_name() -> str:
    """Returns the processor's name, as far as the system gives one."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def machine(device: torch.device) -> str:
    """Returns all of a device that rounding depends on: its architecture, and a CPU's threads."""
    name, n = architecture(device), threads(device)
    return name if n is None else f"{name}, threads: {n}"


def threads(device: torch.device) -> int | None:
    """Returns the number of PyTorch's threads if ``device`` is the CPU, else None."""
    return torch.get_num_threads() if device.type == "cpu" else None


def architecture(device: torch.device) -> str:
    """Returns an accelerator's name, or a CPU's name and instruction set."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{cpu_name()}, {platform.machine()} {capability}"


def packages(model: nn.Module) -> set[str]:
    """Returns the names of the packages that define a network's modules."""
    return {type(module).__module__.partition(".")[0] for module in model.modules()}


def versions(*names: str) -> dict[str, str]:
    """Returns the versions of those packages of ``names`` that are installed."""
    found = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            # torch.__version__ also names the build, such as +cpu.
            found[name] = str(torch.__version__) if name == "torch" else metadata.version(name)
    return found
