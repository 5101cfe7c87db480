"""The examples with Ray: samples and folders have the bytes of one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

from fastddim.__main__ import main

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(util.find_spec("ray") is None, reason="ray is missing: .ci/run installs it"),
]


def environment() -> dict[str, str]:
    """The environment of a script: without the token that Ray else keeps in the home folder."""
    path = [str(ROOT), str(ROOT / "kernels" / "torch-ext")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "RAY_AUTH_MODE": "disabled"}


def printed(folder: Path, name: str, *arguments: str) -> str:
    """Runs a script in ``folder``."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def content(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_ray_makes_the_folder_of_generate_despite_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--steps", "4", "--batch-size", "4", "--shard-size", "4", "--threads", "1")
    out = printed(tmp_path, "generate_ray", "--seeds", "14", "--out", "ray", "--kill", *options)
    assert "ray: 14 images, finished: True" in out
    assert "a worker was killed: True" in out
    monkeypatch.chdir(tmp_path)
    one = ("--seeds", "0-13", "--out", "one", "--device", "cpu")
    done = subprocess.run(
        [sys.executable, "-m", "fastddim", "generate", *one, *options],
        cwd=tmp_path,
        env=environment(),
        timeout=300,
    )
    assert done.returncode == 0
    assert content(tmp_path / "ray") == content(tmp_path / "one")
    assert main(["generate", "--verify", "ray"]) == 0


def test_ray_serve_returns_the_bits_of_sample(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = printed(tmp_path, "serve_ray", "--requests", "6", "--port", str(port))
    assert "6 samples, equal to those of DDIM.sample: True" in out
    assert "by HTTP: image/png of " in out
