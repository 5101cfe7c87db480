"""What the command line refuses in one line, and interruptions."""

from __future__ import annotations

import builtins
import os
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastddim
from fastddim import DDIM, checkpoints, embedded
from fastddim.__main__ import main
from fastddim.cli.values import MOST_IMAGES, parse_seeds
from fastddim.timesteps import SPACINGS
from tests.cli.commands import FEW, GUIDED, _here, no_work, refused
from tests.processes import ran

__all__ = ["_here", "no_work", "refused"]


@pytest.mark.parametrize(
    ("command", "rest"),
    [
        ("sample", ["--seeds", "0-1"]),
        ("interpolate", ["--seeds", "0-1", "--columns", "2"]),
        ("sequence", ["--seeds", "0-1"]),
        ("reconstruct", ["--seeds", "0-1", "--out", "a.png"]),
    ],
)
def test_every_command_takes_ones_own_model(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    rest: list[str],
) -> None:
    Path("grey.py").write_text(
        "from fastddim import NoiseSchedule\n"
        "from fastddim.models.checkpoints import Loaded\n"
        "def make(): return Loaded(lambda x, t: x / 2, (1, 4, 4), NoiseSchedule.cosine(), 'v')\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "grey", raising=False)
    kept: list[DDIM] = []
    plain = DDIM.__post_init__

    def made(self: DDIM) -> None:
        plain(self)
        kept.append(self)

    monkeypatch.setattr(DDIM, "__post_init__", made)
    assert main([command, *FEW, "--model", "grey:make", *rest]) == 0
    first, second = capfd.readouterr().err.splitlines()
    assert first == "model grey:make: 1x4x4"
    assert second.startswith("it is taken to predict v on cosine noise, T = 1000 (--prediction,")
    assert kept
    assert all((d.schedule.name, d.prediction) == ("cosine", "v") for d in kept)


NEW = ("interpolate", "sequence", "reconstruct")


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("commands", "arguments", "said"),
    [
        (NEW, ["--seeds", "9-3"], "ranges that go up"),
        (NEW, ["--seeds", ""], "seeds must be such as"),
        (NEW, ["--seeds", "0-10001"], "at most 10000"),
        (NEW, ["--batch-size", "0"], "batch-size must be an integer in [1, 65536], got 0"),
        (NEW, ["--steps", "0"], "steps must be an integer in [1, 1000], got 0"),
        (NEW, ["--steps", "many"], "got 'many'"),
        (NEW, ["--spacing", "even"], "spacing must be one of uniform, quad"),
        (NEW, ["--spacing", "even"], "quad-ermongroup, or a file of fastddim tune (.json), got"),
        (NEW, ["--device", "quantum"], "device must be one that torch can use here"),
        (NEW, ["--checkpoint", "none"], "no checkpoint none; allowed: "),
        (NEW, ["--out", "a.jpg"], "ends in .png, got 'a.jpg'"),
        (NEW, ["--out", "nowhere/a.png"], "in a folder that exists, got nowhere/a.png"),
        (NEW, ["extra"], "extra"),
        (NEW[:1], ["--seeds", "0-2"], "seeds must be pairs, an even number of them, got 3"),
        (NEW[:1], ["--columns", "1"], "columns must be an integer ≥ 2, got 1"),
        (
            NEW[:1],
            ["--columns", "2501"],
            "seeds x columns must be at most 10000 images for one picture, got 4 x",
        ),
        (NEW[:1], ["--eta", "1"], "--eta"),
        (NEW[1:2], ["--columns", "0"], "columns must be an integer in [1, 50], got 0"),
        (NEW[1:2], ["--columns", "51"], "columns must be an integer in [1, 50], got 51"),
        (NEW[1:2], ["--seeds", "0-1000"], "seeds x columns must be at most 10000 images"),
        (NEW[1:2], ["--eta", "-1"], "eta must be a number ≥ 0"),
        (NEW[:2], ["--columns", "x"], "must be an integer, got 'x'"),
        (NEW[2:], ["--steps", ""], "steps must be such as 50 or 10,20,50"),
        (NEW[2:], ["--steps", "10,,20"], "steps must be such as"),
        (NEW[2:], ["--steps", "10,1001"], "steps must be an integer in [1, 1000], got 1001"),
        (NEW[2:], ["--steps", "10-20"], "got '10-20'"),
        (NEW[2:], ["--refine", "-1"], "refine must be an integer ≥ 0, got -1"),
        (NEW[2:], ["--refine", "1.5"], "must be an integer, got '1.5'"),
        (NEW[2:], ["--count", "3"], "count must be left out without images, got 3"),
        (NEW[2:], ["--images", "a.npy", "--seeds", "1"], "seeds must be left out with images"),
        (NEW[2:], ["--images", "a.npy", "--count", "0"], "count must be an integer in [1, 10000]"),
        (NEW[2:], ["--images", "none.npy"], "got none.npy, which does not exist"),
        (NEW[2:], ["--images", "."], "must all be 28x28 with 1 channel, got 4x5"),
        (NEW[2:], ["--images", "text.npy"], "got text.npy: another kind of file"),
        (NEW[2:], ["--images", "small.npy"], "28x28 with 1 channel, got 4x5 with 1 channel"),
        (NEW[2:], ["--images", "a.npy", "--count", "4"], "count must be an integer in [1, 3]"),
        (
            [NEW[2]],
            ["--seeds", "0-2499", "--steps", "1,2,3,4", "--out", "a.png"],
            "(1 + steps) x images must be at most 10000 images for one picture, got 5 x 2500",
        ),
    ],
)
def test_more_nonsense_is_refused(
    refused: Callable[..., str], commands: Sequence[str], arguments: list[str], said: str
) -> None:
    np.save("a.npy", np.zeros((3, 28, 28), np.uint8))
    np.save("small.npy", np.zeros((3, 4, 5), np.uint8))
    Path("text.npy").write_text("text")
    for command in commands:
        assert said in refused(command, *arguments), command


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seeds", "9-3"], "ranges that go up"),
        (["--seeds", "-3"], "seeds must be such as 7, 0-63"),
        (["--seeds", "0--3"], "seeds must be such as"),
        (["--seeds", ""], "seeds must be such as"),
        (["--seeds", "1,,2"], "seeds must be such as"),
        (["--seeds", "one"], "got 'one'"),
        (["--seeds", "1.5"], "got '1.5'"),
        (["--seeds", "٣"], "got '٣'"),
        (["--seeds", "9223372036854775808"], "2^63-1"),
        (["--seeds", "9" * 5000], "2^63-1"),
        (["--seeds", "0-1000000000000"], "seeds must be at most 10000, got 1000000000001"),
        (["--seeds", "0-9223372036854775807"], "at most 10000"),
        (["--steps", "0"], "steps must be an integer in [1, 1000], got 0"),
        (["--steps", "1001"], "steps must be an integer in [1, 1000], got 1001"),
        (["--steps", "many"], "must be an integer, got 'many'"),
        (["--eta", "-1"], "eta must be a number ≥ 0"),
        (["--eta", "hut"], "or \"hat\", got 'hut'"),
        (["--eta", "nan"], "eta must be finite, got nan"),
        (["--eta", "1e9"], "eta must be at most"),
        (["--spacing", "even"], "spacing must be one of uniform, quad"),
        (["--batch-size", "0"], "batch-size must be an integer in [1, 65536], got 0"),
        (["--batch-size", "1e3"], "must be an integer, got '1e3'"),
        (["--device", "quantum"], "device must be one that torch can use here"),
        (["--checkpoint", "none.safetensors"], "no checkpoint none.safetensors; allowed: "),
        (["--checkpoint", ""], "allowed: a folder with"),
        (["--config", "cifar"], "config must be one of cifar10, celeba64, lsun256, or a file, got"),
        (["--config", "cifar10"], "config must be left out with"),
        (["--shape", "3,32"], "shape must be C,H,W, such as 3,32,32, got '3,32'"),
        (["--shape", "3x32x32"], "shape must be C,H,W"),
        (["--shape", "3,0,32"], "each ≥ 1, got (3, 0, 32)"),
        (["--shape", "3,32,32"], "shape must be left out with garment weights"),
        (["--model", "nowhere:none"], "model nowhere:none failed: ModuleNotFoundError"),
        (["--model", "nowhere"], "model must be package.module:factory, got 'nowhere'"),
        (["--model", "a:b", "--checkpoint", "c"], "model must be given without checkpoint and"),
        (["--model", "a:b", "--config", "cifar10"], "model must be given without checkpoint and"),
        (["--out", "a.jpg"], "ends in .png, got 'a.jpg'"),
        (["--out", "png"], "ends in .png, got 'png'"),
        (["--out", ""], "ends in .png"),
        (["--out", "nowhere/a.png"], "in a folder that exists, got nowhere/a.png"),
        (["--out", "/proc/a.png"], "can be written to, got /proc/a.png"),
        (["--out", "a" * 300 + ".png"], "File name too long"),
        (["--nonsense"], "--nonsense"),
        (["extra"], "extra"),
    ],
)
def test_nonsense_is_refused(refused: Callable[..., str], arguments: list[str], said: str) -> None:
    assert said in refused("sample", *arguments)


@pytest.mark.usefixtures("no_work")
def test_bad_checkpoints_are_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(embedded.WEIGHTS.read_bytes()[:100_000])
    assert "cut.safetensors is truncated" in refused("sample", "--checkpoint", "cut.safetensors")
    torch.save({}, tmp_path / "a.ckpt")
    assert "a.ckpt must hold tensors by name, got" in refused("sample", "--checkpoint", "a.ckpt")


@pytest.mark.usefixtures("no_work")
def test_pictures_that_are_no_png_are_refused(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = checkpoints.Loaded(torch.nn.Identity(), (4, 8, 8))
    monkeypatch.setattr("fastddim.checkpoints.load", lambda *_, **__: loaded)
    assert "1 channel (grey) or 3 (RGB), got 4" in refused("sample")
    os.mkdir("a.png")
    assert "got the folder a.png" in refused("sample", "--out", "a.png")


def test_no_such_command(refused: Callable[..., str]) -> None:
    assert "nonsense" in refused("nonsense")


@pytest.mark.parametrize(
    ("error", "status"), [(OSError(28, "disk full"), 2), (KeyboardInterrupt(), 130)]
)
def test_a_picture_half_written_is_none(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int
) -> None:
    def save(self: Image.Image, file: Any, **_: Any) -> None:
        file.write(b"half")
        file.flush()
        raise error

    monkeypatch.setattr(Image.Image, "save", save)
    Path("garments.png").write_bytes(b"old")
    said = refused("sample", *FEW, "--seeds", "0", status=status)
    assert ("disk full" if status == 2 else "interrupted") in said
    assert Path("garments.png").read_bytes() == b"old"


def test_ctrl_c_while_sampling(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DDIM, "sample", sample)
    assert refused("sample", status=130) == "fastddim: interrupted\n"


@pytest.mark.parametrize("missing", ["typer", "rich.console", "PIL", "safetensors", "diffusers"])
def test_missing_extra(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    plain = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == missing or name.startswith(f"{missing}."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return plain(name, *rest)

    for name in [name for name in sys.modules if name.startswith("fastddim.cli")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(fastddim, "cli")
    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(DDIM, "sample", lambda *_, **__: pytest.fail("sampling began"))
    # The garment model needs no diffusers.
    of = ["--checkpoint", str(GUIDED)] if missing == "diffusers" else []
    flags = Path("flags.json")
    if of:
        flags.write_text('{"num_head_channels": 32}')
        of += ["--config", "flags.json", "--shape", "3,8,16"]
    assert "pip install 'fastddim[cli]'" in refused("sample", *FEW, *of)


def test_errors_that_are_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(DDIM, "sample", sample)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["sample"])


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_the_commands(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert all(name in out for name in ("sample", "generate", "evaluate", "profile", *NEW))
    assert "--version" in out


COMMON = {
    "spacing": "uniform",
    "batch-size": "16",
    "device": "(cuda if",
    "checkpoint": "(the garment",
    "model": "(none)",
    "config": "(the file beside",
    "shape": "(the model's own)",
}


@pytest.mark.parametrize(
    ("command", "defaults"),
    [
        ("sample", {"seeds": "0-63", "steps": "50", "eta": "0", "out": "garments.png"}),
        ("interpolate", {"seeds": "0-7", "columns": "11", "steps": "50", "out": "interpolation."}),
        ("sequence", {"seeds": "0-7", "columns": "(10,", "eta": "0", "out": "sequence.png"}),
        (
            "reconstruct",
            {
                "images": "(drawn",
                "count": "(16,",
                "seeds": "(0-15)",
                "steps": "10,20,50,100,200]",
                "refine": "0",
                "out": "(no picture)",
            },
        ),
    ],
)
def test_help_is_the_manual(
    capfd: pytest.CaptureFixture[str], command: str, defaults: dict[str, str]
) -> None:
    assert main([command, "--help"]) == 0
    out = re.sub(r"[\s│]+", " ", capfd.readouterr().out).partition(" Options ")[2]
    for option, default in (defaults | COMMON).items():
        described = out.partition(f"--{option} ")[2]
        assert described.partition("[default: ")[2].startswith(default), option
    assert all(name in out for name in SPACINGS)
    assert f"at most {MOST_IMAGES}" in out


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == f"fastddim {fastddim.__version__}\n"


def test_seeds() -> None:
    assert parse_seeds("7") == [7]
    assert parse_seeds("0-3, 20,9-9,1") == [0, 1, 2, 3, 20, 9, 1]
    assert parse_seeds(f"{2**63 - 2}-{2**63 - 1}") == [2**63 - 2, 2**63 - 1]
    assert len(parse_seeds(f"1-{MOST_IMAGES}")) == MOST_IMAGES


def test_import_needs_no_extra() -> None:
    extras = ("typer", "click", "rich", "PIL", "safetensors", "diffusers", "matplotlib", "jinja2")
    code = (
        f"import fastddim, fastddim.__main__, fastddim.checkpoints, sys\n"
        f"import fastddim.tools.evaluate, fastddim.profile, fastddim.tools.reconstruction\n"
        f"print([m for m in {extras} if m in sys.modules])"
    )
    done = ran(code, strict=False)
    assert done.stdout == "[]\n", done.stderr


def test_python_dash_m(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: Sequence[str]) -> int:
        monkeypatch.setattr(sys, "argv", ["fastddim", *arguments])
        monkeypatch.delitem(sys.modules, "fastddim.__main__")
        with pytest.raises(SystemExit) as caught:
            runpy.run_module("fastddim", run_name="__main__")
        assert isinstance(caught.value.code, int)
        return caught.value.code

    monkeypatch.setattr("tests.cli.commands.main", run)
    assert "seeds must be" in refused("sample", "--seeds", "x")
