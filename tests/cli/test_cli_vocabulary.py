"""One vocabulary and grammar for all commands, and the options of a model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastddim import DDIM, checkpoints
from fastddim.__main__ import main
from fastddim.cli import app, values
from fastddim.timesteps import SPACINGS
from fastddim.tools import draw, images
from tests.cli.commands import FEW, QUICK, _here, no_work, refused

__all__ = ["_here", "no_work", "refused"]


# One vocabulary.

EVERYWHERE = ("--device", "--threads", "--quiet")


OF_A_MODEL = (
    *("--checkpoint", "--model", "--config", "--shape", "--prediction", "--schedule"),
    *("--train-steps", "--class", "--guidance", "--no-class", "--dtype"),
)


DRAWING = ("sample", "interpolate", "sequence", "reconstruct", "generate", "profile")


def declared(command: str) -> dict[str, Any]:
    """The options of a command by their names on the command line."""
    import typer.main

    group: Any = typer.main.get_command(app)
    return {name: p for p in group.commands[command].params for name in p.opts}


def test_every_command_takes_the_same_options() -> None:
    for command in (*DRAWING, "evaluate", "info", "serve-bench"):
        assert set(EVERYWHERE) <= set(declared(command)), command
    for command in DRAWING:
        assert set(OF_A_MODEL) <= set(declared(command)), command
    first = declared("sample")
    for command in DRAWING:
        for name in (*EVERYWHERE, *OF_A_MODEL):
            assert declared(command)[name].help == first[name].help, (command, name)


def test_the_vocabulary_is_the_librarys() -> None:
    from fastddim.cli.network import SCHEDULES
    from fastddim.coefficients import ORDERS, VP_PREDICTIONS
    from fastddim.tools import folder
    from fastddim.tools.profile import PATHS

    assert SPACINGS == values.SPACINGS
    assert tuple(checkpoints.CONFIGS) == values.CONFIGS
    assert folder.FORMATS == values.FORMATS
    assert tuple(VP_PREDICTIONS) == values.PREDICTIONS
    assert ORDERS == values.ORDERS
    assert draw.LARGEST_BATCH == values.LARGEST_BATCH
    assert tuple(SCHEDULES) == values.SCHEDULES
    assert tuple(PATHS) == values.PATHS
    for name, make in SCHEDULES.items():
        assert make(7).name.partition("(")[0] == name
        assert len(make(7)) == 7
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in values.DTYPES)


def test_no_option_has_the_name_of_its_metavar() -> None:
    # Typer 0.27.0 to 0.27.3 take the metavar for the name where there is no other.
    for command in (*DRAWING, "evaluate", "info", "serve-bench"):
        names = set(declared(command)) - {"folder", "--help", "-h"}
        assert all(name.startswith("--") and name == name.lower() for name in names), names


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("commands", "arguments", "said"),
    [
        (("evaluate",), ["out", "--device", "nonsense"], "device must be one that torch can use"),
        (DRAWING, ["--device", "mps"], "can use here (cpu), got 'mps'"),
        (DRAWING, ["--threads", "0"], "threads must be an integer in [1, 1024], got 0"),
        (DRAWING, ["--dtype", "float17"], "got 'float17'; did you mean float16?"),
        (DRAWING, ["--spacing", "unifrom"], "'unifrom'; did you mean uniform?"),
        (DRAWING, ["--spacing", "nothing like it"], "tune (.json), got 'nothing like it'\n"),
        (DRAWING, ["--schedule", "cosin", "--model", "a:b"], "did you mean cosine?"),
        (DRAWING, ["--schedule", "cosine"], "schedule must be left out with the garment model"),
        (DRAWING, ["--prediction", "x0", "--model", "a:b"], "one of epsilon, v, sample, got 'x0'"),
        (DRAWING, ["--prediction", "v"], "prediction must be left out with the garment model"),
        (
            DRAWING,
            ["--train-steps", "0", "--model", "a:b"],
            "train-steps must be an integer in [1, 1000000], got 0",
        ),
        (DRAWING, ["--class", "3"], "class must be left out with the garment model, got 3"),
        (DRAWING, ["--class", "-1", "--model", "a:b"], "class must be an integer ≥ 0, got -1"),
        (DRAWING, ["--guidance", "2"], "guidance must be given with class, got 2 alone"),
        (DRAWING, ["--no-class", "2"], "no-class must be left out without guidance, got 2"),
        (
            DRAWING,
            ["--guidance", "much", "--class", "1", "--model", "a:b"],
            "guidance must be a finite number, got 'much'",
        ),
        (
            DRAWING,
            ["--guidance", "nan", "--class", "1", "--model", "a:b"],
            "guidance must be a finite number, got 'nan'",
        ),
        (DRAWING, ["--threads", "99999999999999999999"], "threads must be an integer in [1, 1024]"),
        (("reconstruct",), ["--steps", "20,10,10"], "steps must differ from each other, got 10"),
        (("profile",), ["--eta", "0,,"], "eta must be such as 0 or 0,0.5,1,hat, got '0,,'"),
        (("sample",), ["--stesp", "3"], "--steps"),
    ],
)
def test_one_grammar_for_all_commands(
    refused: Callable[..., str], commands: Sequence[str], arguments: list[str], said: str
) -> None:
    for command in commands:
        more = ["--seeds", "0-1", "--out", "out"] if command == "generate" else []
        assert said in refused(command, *more, *arguments), command


def test_a_command_that_is_nearly_one(refused: Callable[..., str]) -> None:
    said = refused("smaple")
    assert "command must be one of sample, interpolate, " in said
    assert "got 'smaple'; did you mean sample?" in said
    assert "did you mean" not in refused("xyz")


@pytest.mark.parametrize("command", [[], ["sample"], ["generate"]])
def test_h_is_help(capfd: pytest.CaptureFixture[str], command: list[str]) -> None:
    assert main([*command, "--help"]) == 0
    said = capfd.readouterr().out
    assert main([*command, "-h"]) == 0
    assert capfd.readouterr().out == said


def test_completion_is_offered(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_FASTDDIM_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "fastddim seq")
    monkeypatch.setenv("COMP_CWORD", "1")
    with pytest.raises(SystemExit):
        main([])
    assert capfd.readouterr().out.split() == ["sequence"]


# The model that is asked.

CLASSES = (
    "import torch\n"
    "from fastddim.models.checkpoints import Loaded\n"
    "class Net(torch.nn.Module):\n"
    "    def __init__(self):\n"
    "        super().__init__()\n"
    "        self.embedding = torch.nn.Embedding(5, 16)\n"
    "        self.calls = []\n"
    "    def forward(self, x, t, class_labels):\n"
    "        self.calls.append((x.dtype, class_labels.tolist()))\n"
    "        made = self.embedding(class_labels).view(-1, 1, 4, 4)\n"
    "        return (x + made).to(x.dtype)\n"
    "torch.manual_seed(0)\n"
    "net = Net()\n"
    "def make(): return Loaded(net, (1, 4, 4), classes=5)\n"
    "def other(): return Loaded(net, (1, 4, 4), classes=5, null_class=4)\n"
    "def plain(): return lambda x, t: x / 2, (1, 4, 4)\n"
)


@pytest.fixture
def classes(monkeypatch: pytest.MonkeyPatch) -> Any:
    Path("classy.py").write_text(CLASSES)
    monkeypatch.setattr(sys, "path", [os.getcwd(), *sys.path])
    monkeypatch.delitem(sys.modules, "classy", raising=False)
    import classy  # type: ignore[import-not-found]

    yield classy.net
    monkeypatch.delitem(sys.modules, "classy", raising=False)


@pytest.mark.parametrize("command", DRAWING)
def test_a_class_is_drawn_with_guidance(classes: Any, command: str) -> None:
    out = "out" if command in ("generate", "profile") else "a.png"
    asked = ["--seeds", "0-1", "--steps", "2", "--batch-size", "2", "--device", "cpu", "--out", out]
    told = ["--model", "classy:other", "--class", "3", "--guidance", "2"]
    assert main([command, *asked, *told]) == 0
    assert all(said == [4, 4, 3, 3] for _, said in classes.calls if len(said) == 4)
    assert any(said == [4, 4, 3, 3] for _, said in classes.calls)


def test_guidance_is_the_samplers(classes: Any) -> None:
    asked = ["--model", "classy:make", "--class", "3", "--guidance", "2", "--no-class", "1"]
    assert main(["sample", *FEW, "--seeds", "0-1", *asked]) == 0

    def labels(k: int) -> dict[str, torch.Tensor]:
        return {"class_labels": torch.tensor([k, k])}

    expected = DDIM(2).sample(
        classes, shape=(2, 1, 4, 4), seeds=[0, 1], cond=labels(3), uncond=labels(1), guidance=2.0
    )
    with Image.open("garments.png") as picture:
        assert np.array_equal(np.array(picture), images.grid(images.to_uint8(expected))[0].numpy())


@pytest.mark.parametrize("command", ["sample", "reconstruct", "profile", "generate"])
def test_the_dtype_is_what_the_model_computes_in(classes: Any, command: str) -> None:
    out = "out" if command in ("generate", "profile") else "a.png"
    asked = ["--seeds", "0-1", "--steps", "2", "--batch-size", "2", "--device", "cpu", "--out", out]
    told = ["--model", "classy:make", "--class", "0", "--dtype", "bfloat16"]
    assert main([command, *asked, *told]) == 0
    assert {dtype for dtype, _ in classes.calls} == {torch.bfloat16}


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--model", "classy:make"], "class must be an integer in [0, 4] for a network of 5"),
        (["--model", "classy:make", "--class", "5"], "class must be an integer in [0, 4], got 5"),
        (["--model", "classy:plain", "--class", "1"], "class must be left out with a network"),
        (
            ["--model", "classy:make", "--class", "1", "--guidance", "3"],
            "no-class must be given with guidance, got none: the class in [0, 4]",
        ),
    ],
)
@pytest.mark.usefixtures("classes")
def test_a_class_is_given_where_one_is_needed(
    capfd: pytest.CaptureFixture[str], asked: list[str], said: str
) -> None:
    assert main(["sample", *FEW, *asked]) == 2
    assert said in capfd.readouterr().err
    assert not Path("garments.png").exists()


@pytest.mark.usefixtures("classes")
def test_schedule_and_prediction_overrule_what_was_assumed(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[DDIM] = []
    plain = DDIM.sample

    def sample(self: DDIM, *arguments: Any, **rest: Any) -> Any:
        kept.append(self)
        return plain(self, *arguments, **rest)

    monkeypatch.setattr(DDIM, "sample", sample)
    asked = ["--schedule", "cosine", "--train-steps", "100", "--prediction", "sample"]
    assert main(["sample", *FEW, "--seeds", "0", "--model", "classy:plain", *asked]) == 0
    assert {(d.schedule.name, len(d.schedule), d.prediction) for d in kept} == {
        ("cosine", 100, "sample")
    }
    assert "it is taken to predict sample on cosine noise, T = 100" in capfd.readouterr().err


def test_quiet_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    for command in ("sample", "interpolate", "sequence"):
        assert main([command, *FEW, "--seeds", "0-1", "--quiet"]) == 0
        assert capfd.readouterr() == ("", "")
    assert main(["reconstruct", *QUICK, "--seeds", "0", "--steps", "1", "--quiet"]) == 0
    out, err = capfd.readouterr()
    assert "S  calls" in out  # what was measured
    assert err == ""


def test_threads_are_set_for_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert main(["sample", *FEW, "--seeds", "0", "--threads", "3"]) == 0
    assert main(["info", "--threads", "2"]) == 0
    assert asked == [3, 2]
