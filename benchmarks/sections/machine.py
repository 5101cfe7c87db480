"""Section "machine": the GPU and the versions, or why nothing can be measured on this machine."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.children import Deadline
from benchmarks.timing import Record, first_line, rounded


def smi(*fields: str) -> dict[str, str] | None:
    """The current device's values of these nvidia-smi fields, or None where nvidia-smi fails."""
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    command += [] if uuid is None else ["-i", f"GPU-{str(uuid).removeprefix('GPU-')}"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    values = out.stdout.strip().splitlines()[0].split(", ") if out.stdout.strip() else []
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else None


def clocks() -> dict[str, str] | None:
    """The clocks, temperature and power, or None where nvidia-smi fails."""
    names = ("sm", "mem", "max.sm", "max.mem")
    return smi(*(f"clocks.{name}" for name in names), "temperature.gpu", "power.draw")


def describe() -> Record:
    """The GPU and the versions that produce the figures."""
    import triton

    driver = smi("driver_version")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": rounded(properties.L2_cache_size / 2**20),
        "memory_gib": rounded(properties.total_memory / 2**30),
        "driver": driver["driver_version"] if driver else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def unusable() -> str | None:
    """The reason, in one line, why nothing can be measured on this machine, or None."""
    if not torch.cuda.is_available():
        return "there is no CUDA device here: nothing was measured"
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes"):
        return "TRITON_INTERPRET is set: the kernels would be interpreted, nothing was measured"
    try:
        import fastddim_kernels  # noqa: F401
    except ImportError as error:
        return f"the kernels cannot be imported ({first_line(error)}): nothing was measured"
    return None


def machine(_: Deadline) -> Iterator[Record]:
    """The row of the machine, or the reason why nothing can be measured."""
    reason = unusable()
    yield {"unusable": reason} if reason else describe()
