"""The command line: what it prints, what it writes, and what it refuses in one line."""

from __future__ import annotations

import builtins
import io
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastddim
from fastddim import DDIM, embedded, images
from fastddim.__main__ import main
from fastddim.cli import MOST_IMAGES, parse_seeds
from fastddim.timesteps import SPACINGS

FEW = ("--device", "cpu", "--steps", "2", "--batch-size", "2")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    def run(*arguments: str, status: int = 2) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main(arguments) == status
        out, err = capfd.readouterr()
        assert out == ""
        assert re.fullmatch(r"fastddim: [^\n]+\n", err), err
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return run


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(*_: Any, **__: Any) -> None:
        pytest.fail("sampling began")

    monkeypatch.setattr(DDIM, "sample", sample)


def test_sample_draws_the_seeds(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = ("--seeds", "5,8-9", "--eta", "1", "--spacing", "quad", "--out", "three.png")
    assert main(["sample", *FEW, *asked]) == 0
    out, err = capfd.readouterr()
    assert err == ""  # no bar where nobody looks
    assert re.fullmatch(
        r"three\.png: 3 images in \d+\.\d s: \d+\.\d\d images/s, "
        r"\d{1,2}\.\d% of the time outside the model\n",
        out,
    )
    assert [p.name for p in tmp_path.iterdir()] == ["three.png"]
    ddim, model = DDIM(2, eta=1.0, spacing="quad"), embedded.load()
    expected = [
        ddim.sample(model, shape=(2, *embedded.SHAPE), seeds=pair) for pair in ([5, 8], [9, 0])
    ]
    sheet = images.grid(images.to_uint8(torch.cat(expected)[:3]))
    with Image.open("three.png") as picture:
        assert picture.mode == "L"
        assert np.array_equal(np.array(picture), sheet[0].numpy())


def test_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def by_seed(ddim: DDIM, model: Any, seeds: Sequence[int], *rest: Any, **_: Any) -> Any:
        asked.update(ddim=ddim, seeds=seeds, rest=rest)
        return iter([torch.zeros(64, *embedded.SHAPE)])

    monkeypatch.setattr(images, "by_seed", by_seed)
    monkeypatch.setattr(images, "warm_up", lambda *_: None)
    assert main(["sample"]) == 0
    assert asked == {"ddim": asked["ddim"], "seeds": list(range(64)), "rest": (embedded.SHAPE, 16)}
    ddim = asked["ddim"]
    assert (ddim.steps, ddim.eta, ddim.spacing) == (50, 0.0, "uniform")
    assert [p.name for p in tmp_path.iterdir()] == ["garments.png"]


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert main(["sample", *FEW, "--seeds", "0-2"]) == 0
    assert "sampling" in terminal.getvalue()
    assert "4/4" in terminal.getvalue()  # two batches of two steps


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
        (["--seeds", "0-1000000000000"], "at most 10000 for one picture, got 1000000000001"),
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
        (["--checkpoint", ""], "allowed: a safetensors file"),
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
    assert "a.ckpt is a pickle" in refused("sample", "--checkpoint", "a.ckpt")


@pytest.mark.usefixtures("no_work")
def test_pictures_that_are_no_png_are_refused(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastddim.checkpoints.load", lambda _: (torch.nn.Identity(), (4, 8, 8)))
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

    monkeypatch.delitem(sys.modules, "fastddim.cli")
    monkeypatch.delattr(fastddim, "cli")
    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(DDIM, "sample", lambda *_, **__: pytest.fail("sampling began"))
    assert "pip install 'fastddim[cli]'" in refused("sample", *FEW)


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
    assert "sample" in out
    assert "--version" in out


def test_help_is_the_manual(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--help"]) == 0
    out = re.sub(r"[\s│]+", " ", capfd.readouterr().out).partition(" Options ")[2]
    options = ("seeds", "steps", "eta", "spacing", "batch-size", "device", "checkpoint", "out")
    defaults = ("0-63", "50", "0", "uniform", "16", "(cuda if", "(the garment", "garments.png")
    for option, default in zip(options, defaults, strict=True):
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
    extras = ("typer", "click", "rich", "PIL", "safetensors", "diffusers", "matplotlib")
    code = (
        f"import fastddim, fastddim.__main__, fastddim.images, fastddim.checkpoints, sys\n"
        f"print([m for m in {extras} if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(fastddim.__file__).parents[1],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "[]\n"


def test_python_dash_m(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: Sequence[str]) -> int:
        monkeypatch.setattr(sys, "argv", ["fastddim", *arguments])
        monkeypatch.delitem(sys.modules, "fastddim.__main__")
        with pytest.raises(SystemExit) as caught:
            runpy.run_module("fastddim", run_name="__main__")
        assert isinstance(caught.value.code, int)
        return caught.value.code

    monkeypatch.setitem(globals(), "main", run)
    assert "seeds must be" in refused("sample", "--seeds", "x")
