"""The command ``tune``: its file, what other commands make of it, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastddim import DDIM, Tuned, embedded
from fastddim.__main__ import main
from fastddim.tools import provenance, sheet, tuning
from tests.cli.commands import QUICK, _here, no_work, refused

__all__ = ["_here", "no_work", "refused"]

FEW = ("--device", "cpu", "--threads", "1", "--batch-size", "8")
TUNE = ("tune", "--steps", "2", "--seeds", "0-7", *FEW)


@pytest.fixture
def tau() -> str:
    model = provenance.digest(embedded.load())
    tuned = Tuned(timesteps=((999, 500, 20),), order=2, T=1000, model=model)
    tuned.write("tau.json")
    return "tau.json"


def test_tune_writes_a_file_that_samplers_take(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*TUNE]) == 0
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("28 model calls of 8 images at most, about ")
    assert lines[-1] == "tau.json"
    assert err == ""
    tuned = Tuned.read("tau.json")
    assert tuned.steps == (2,)
    assert tuned.order == 2
    assert tuned.tau(2)[0] == 999
    assert " ".join(map(str, tuned.tau(2))) in out
    assert tuned.model == provenance.digest(embedded.load())
    assert json.loads(tuned.about)["seeds"] == list(range(8))
    assert DDIM(2, order=2, spacing=tuned).pairs[-1][1] == -1
    assert [path.name for path in Path().iterdir()] == ["tau.json"]
    assert main([*TUNE, "--quiet"]) == 0
    assert Tuned.read("tau.json") == tuned
    assert "tau.json" not in capfd.readouterr().out


def test_an_interrupted_tune_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    put = tuning.Memory.put
    kept: list[Any] = []

    def interrupted(self: Any, *found: Any) -> None:
        put(self, *found)
        kept.append(found)
        if len(kept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(tuning.Memory, "put", interrupted)
    assert main([*TUNE]) == 130
    assert [path.name for path in Path().iterdir()] == ["tau.json.search"]
    assert main([*TUNE]) == 0
    assert [path.name for path in Path().iterdir()] == ["tau.json"]
    taus = [tau for tau, _ in kept]
    assert len(taus) == len(set(taus))  # none is measured twice


def test_the_search_of_other_seeds_is_refused(refused: Callable[..., str]) -> None:
    Path("tau.json.search").write_text("{}\n")
    assert "tau.json.search" in refused(*TUNE)


def test_a_recipe_names_the_tuned_timesteps(tau: str, capfd: pytest.CaptureFixture[str]) -> None:
    sample = ("sample", "--seeds", "0-1", *QUICK, "--steps", "3", "--spacing", tau)
    assert main([*sample, "--order", "2"]) == 0
    recipe = sheet.recipe_of(Path("garments.png"))
    assert recipe["spacing"] == "tuned"
    assert recipe["timesteps"] == [999, 500, 20]
    assert capfd.readouterr().err == ""
    generate = (
        "generate",
        "--seeds",
        "0-1",
        *QUICK,
        "--steps",
        "3",
        "--spacing",
        tau,
        "--out",
        "o",
    )
    assert main([*generate, "--order", "2"]) == 0
    assert main([*generate, "--order", "2"]) == 0  # the same recipe again


@pytest.mark.slow
def test_another_order_and_other_weights_give_one_line() -> None:
    Tuned(timesteps=((999, 20),), order=2, T=1000, model="ab" * 32).write("tau.json")
    arguments = ("sample", "--seeds", "0", *QUICK, "--steps", "2", "--spacing", "tau.json")
    code = f"from fastddim.__main__ import main; assert main({arguments!r}) == 0"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = ran.stderr.splitlines()
    assert lines[0] == "fastddim: the timesteps were tuned for order 2, and are used with order 1"
    assert lines[1].startswith("fastddim: the timesteps were tuned for the weights abababababab, ")
    assert len(lines) == 2


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--steps", "1"), ("steps", "2")),
        (("--steps", "8,8"), ("steps", "8")),
        (("--steps", "100"), ("steps", "99", "100")),
        (("--steps", "x"), ("steps", "'x'")),
        (("--order", "3"), ("order", "3")),
        (("--seeds", "0-6"), ("seeds", "8", "7")),
        (("--fine", "2"), ("fine", "3", "2")),
        (("--fine", "1001"), ("fine", "1000", "1001")),
        (("--batch-size", "0"), ("batch-size", "0")),
        (("--out", "tau.txt"), ("out", ".json", "tau.txt")),
        (("--out", "no/tau.json"), ("out", "no/tau.json")),
    ],
)
def test_bad_arguments_are_refused(
    refused: Callable[..., str], arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    line = refused("tune", "--device", "cpu", *arguments)
    assert all(word in line for word in words), line


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("spacing", "words"),
    [("no.json", ("spacing", "no.json")), ("bad.json", ("bad.json", "fastddim tune"))],
)
def test_other_files_are_refused(
    tmp_path: Path, refused: Callable[..., str], spacing: str, words: tuple[str, ...]
) -> None:
    (tmp_path / "bad.json").write_text("{}")
    line = refused("sample", "--spacing", spacing)
    assert all(word in line for word in words), line


@pytest.mark.usefixtures("no_work")
def test_a_number_of_steps_without_a_tau_is_refused(tau: str, refused: Callable[..., str]) -> None:
    assert "steps must be 3" in refused("sample", "--steps", "4", "--spacing", tau, "--order", "2")
