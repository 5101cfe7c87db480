"""The kernels as the Hugging Face Kernel Hub hands them out: a folder, loaded by ``kernels``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastddim_kernels

SOURCE = Path(__file__).parents[2] / "kernels"

# Loads both folders it is given, steps with each, and writes what came out.
USER = """
import sys
from pathlib import Path

import kernels
import torch
from kernels._rust import Backend, Build
from kernels.compat import tomllib

source, *folders, results = map(Path, sys.argv[1:])
assert Build.open(source).general.backends == [Backend.CUDA, Backend.ROCm]
general = tomllib.loads((source / "build.toml").read_text())["general"]
assert (source / "torch-ext" / general["name"].replace("-", "_") / "__init__.py").is_file()

x, output, table, rows, seeds = torch.load(results)
found = []
for folder in folders:
    loaded = kernels.get_local_kernel(folder, backend="cpu")
    out = torch.empty_like(x)
    loaded.ddim_step(x, output, table, rows, out, seeds=seeds)
    noise = torch.empty_like(x)
    loaded.normal_(noise, seeds, rows, 1)
    found += [out, noise]
assert len({k.module for k in kernels.get_loaded_kernels()}) == len(folders)
assert not [m for m in sys.modules if m.split(".")[0] in ("fastddim", "fastddim_kernels")]
torch.save(found, results)
"""


def built(folder: Path, version: int) -> Path:
    """What the Hub's builder makes of the source: one folder a backend, metadata beside it."""
    variant = folder / "build" / "torch-cpu"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(SOURCE / "torch-ext" / "fastddim_kernels", variant, ignore=ignored)
    metadata = {
        "id": f"_fastddim_kernels_cpu_{version}",
        "name": "fastddim-kernels",
        "version": version,
        "license": "apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata))
    return folder


@pytest.mark.slow
def test_the_hubs_loader_runs_two_versions_side_by_side(tmp_path: Path) -> None:
    x, output, table = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4), torch.rand(3, 7)
    rows, seeds = torch.tensor([2, 0], dtype=torch.int32), torch.tensor([5, 2**40])
    results = tmp_path / "results.pt"
    torch.save([x, output, table, rows, seeds], results)
    folders = [built(tmp_path / str(version), version) for version in (1, 2)]
    (tmp_path / "user.py").write_text(USER)

    # Elsewhere, with nothing of this repository to import: its folder kernels/ least of all.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-W", "error", "user.py", SOURCE, *folders, results]
    run = subprocess.run(
        [str(part) for part in command], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]

    out, noise = torch.empty_like(x), torch.empty_like(x)
    fastddim_kernels.ddim_step(x, output, table, rows, out, seeds=seeds)
    fastddim_kernels.normal_(noise, seeds, rows, 1)
    found = torch.load(results)
    assert len(found) == 4
    for tensor, expected in zip(found, [out, noise] * 2, strict=True):
        assert torch.equal(tensor, expected)
