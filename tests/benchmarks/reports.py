"""Rows that the tests of the reports share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def row(peer: str, eta: int, shape: list[int], **ratios: list[float]) -> dict[str, Any]:
    return {
        "shape": shape,
        "eta": eta,
        "peer": peer,
        "noise": "none",
        "bytes_per_element": 12,
        "us_per_step": [12345.0, 12000.0, 13000.0],
        "gb_per_s": 12.3,
        "of_copy": [0.9, 0.8, 1.0],
        **ratios,
    }


def asked(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    # Beside other workers of pytest-xdist, this is still a run of its own.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=env)
