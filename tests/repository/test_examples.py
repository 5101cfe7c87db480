"""Each script in examples/ runs, and prints what its docstring says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
ARGUMENTS = {
    "edit": ["--steps", "10"],
    "guidance": ["--points", "500"],
    "inpainting": ["--steps", "5"],
    "policy": ["--ticks", "3"],
}


class Printed:
    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys

    def by(self, name: str) -> str:
        path = FOLDER / f"{name}.py"
        self.monkeypatch.chdir(self.folder)
        self.monkeypatch.setattr("sys.argv", [str(path), *ARGUMENTS[name]])
        runpy.run_path(str(path), run_name="__main__")
        return self.capsys.readouterr().out


@pytest.fixture
def printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Printed:
    """Runs a script in an empty folder, as ``python examples/...`` would."""
    return Printed(tmp_path, monkeypatch, capsys)


def test_every_example_is_run_here_and_says_how_to_run_it() -> None:
    scripts = {path.stem: path.read_text() for path in FOLDER.glob("*.py")}
    assert sorted(scripts) == sorted(ARGUMENTS)
    for name, text in scripts.items():
        assert f"    python examples/{name}.py" in text.split('"""')[1]


def test_policy_captures_what_sample_gives(printed: Printed) -> None:
    assert "equal those of DDIM.sample: True" in printed.by("policy")


def test_guidance_moves_points_away_and_together(printed: Printed) -> None:
    found = re.findall(r"mean (\S+), deviation (\S+)", printed.by("guidance"))
    means, deviations = ([float(n) for n in column] for column in zip(*found, strict=True))
    assert len(means) == 3
    assert means[0] == pytest.approx(1.0, abs=0.1)
    assert deviations[0] == pytest.approx(0.5, abs=0.05)
    assert means == sorted(means)
    assert deviations == sorted(deviations, reverse=True)


def test_inpainting_keeps_the_upper_half(printed: Printed) -> None:
    assert "those of the first image: True" in printed.by("inpainting")
    assert (printed.folder / "inpainting.png").stat().st_size > 500


def test_edit_prints_errors_that_refinement_lessens(printed: Printed) -> None:
    found = re.findall(r"refine=(\d): root mean square error (\S+)", printed.by("edit"))
    (_, plain), (_, refined) = found
    assert float(refined) < 0.5 * float(plain)
    assert (printed.folder / "edit.png").stat().st_size > 300
