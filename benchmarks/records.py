"""The record files: one JSON file a machine, in which each command writes its own section."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.timing import Record
from fastddim.tools.provenance import cpu_name

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numba", "triton", "diffusers")


def commit(where: Path = RESULTS.parent) -> str:
    """The commit that is checked out at ``where``, or "unknown"."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=where)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return out.stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages among ``PACKAGES``."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def slug(name: str) -> str:
    """A machine's name as a file name: "NVIDIA H200" gives "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("(r)", "")).strip("-")


def write(path: Path, record: Record) -> None:
    """Writes the file atomically: a reader sees the old record or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(path)


def provenance(command: str) -> Record:
    """A section's content beside its rows: command, date, commit, versions and threads."""
    return {
        "command": " ".join([command, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }


def keep(section: str, content: Record, where: Path = RESULTS, name: str | None = None) -> Path:
    """Writes the section into the machine's file, replaces an older one, and returns the path.

    ``name`` is the GPU; None means this CPU. A GPU's file has the suffix ``-loops``, because
    benchmarks/gpu.py writes the file without it.
    """
    suffix = "" if name is None else "-loops"
    name = name or cpu_name()
    path = where / f"{slug(name)}{suffix}.json"
    record: Record = {"machine": name, "cores": os.cpu_count()}
    if path.exists():
        record = json.loads(path.read_text())
    write(path, record | {section: content})
    return path
