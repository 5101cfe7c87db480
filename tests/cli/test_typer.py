"""The command line with other versions of Typer that the package's metadata allow."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSIONS = ("0.26.0", "0.26.8", "0.27.0", "0.27.2", "0.28.0")
"""The lowest, some between, and two of those that take the metavar for an option's name."""

CODE = """
import contextlib, io, typer
from fastddim.__main__ import main

def said(*asked, status=0):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(list(asked)) == status, (asked, out.getvalue(), err.getvalue())
    return out.getvalue(), err.getvalue()

commands = "sample interpolate sequence reconstruct generate evaluate profile info".split()
for command in commands:
    out, _ = said(command, "--help")
    assert "--device" in out and "--quiet" in out, out
    assert said(command, "-h")[0] == out
assert all(command in said("--help")[0] for command in commands)
assert "got 'x'" in said("sample", "--seeds", "x", status=2)[1]
assert "must be an integer, got 'many'" in said("sample", "--steps", "many", status=2)[1]
assert "--stesp" in said("sample", "--stesp", "3", status=2)[1]
assert "did you mean sample?" in said("smaple", status=2)[1]
assert "fastddim" in said("--version")[0]
print(typer.__version__)
"""


def test_the_lowest_is_the_one_in_the_metadata() -> None:
    lowest = re.search(r'"typer>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert lowest is not None
    assert VERSIONS[0] == f"{lowest[1]}.0"


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_the_command_line_works_with(version: str, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path)]
    install = subprocess.run([*pip, f"typer=={version}"], capture_output=True, text=True)
    if install.returncode:
        pytest.skip(f"Typer {version} cannot be installed: {install.stderr.splitlines()[-1]}")
    run = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{version}\n"
