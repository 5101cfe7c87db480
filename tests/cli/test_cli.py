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
from fastddim import DDIM, NoiseSchedule, checkpoints, embedded
from fastddim.__main__ import main
from fastddim.cli import app, bars, options
from fastddim.cli.options import MOST_IMAGES, parse_seeds
from fastddim.step import backends
from fastddim.timesteps import SPACINGS
from fastddim.tools import draw, images, sheet, timing
from fastddim.tools.pace import There
from fastddim.tools.reconstruction import errors
from tests.processes import ran

GUIDED = Path(__file__).parents[1] / "golden" / "guided-tiny.pt"
QUICK = ("--device", "cpu", "--batch-size", "2")
FEW = (*QUICK, "--steps", "2")


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

    monkeypatch.setattr(draw, "by_seed", by_seed)
    monkeypatch.setattr(timing, "warm_up", lambda *_: None)
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


def cells(file: str, rows: int, columns: int) -> Any:
    """The pictures of a grid of garments, (rows, columns, 28, 28)."""
    with Image.open(file) as picture:
        sheet = np.array(picture)
    assert sheet.shape == (30 * rows + 2, 30 * columns + 2)
    return sheet[2:, 2:].reshape(rows, 30, columns, 30).swapaxes(1, 2)[:, :, :28, :28]


def test_interpolate_goes_from_seed_to_seed(capfd: pytest.CaptureFixture[str]) -> None:
    asked = ("--seeds", "5,8,3-4", "--spacing", "quad")
    assert main(["interpolate", *FEW, *asked, "--columns", "3", "--out", "way.png"]) == 0
    assert capfd.readouterr() == ("way.png: 2 rows of 3 images\n", "")
    assert main(["sample", *FEW, *asked, "--out", "ends.png"]) == 0
    way, ends = cells("way.png", 2, 3), cells("ends.png", 2, 2)
    assert np.array_equal(way[:, [0, -1]], ends)
    assert (way[:, 1] != ends[:, 0]).any()
    assert (way[:, 1] != ends[:, 1]).any()


@pytest.mark.parametrize("state", [False, True])
def test_sequence_ends_in_the_sample(capfd: pytest.CaptureFixture[str], state: bool) -> None:
    asked = (*QUICK, "--steps", "5", "--eta", "1", "--seeds", "5,8,3")
    flag = ["--state"] if state else []
    assert main(["sequence", *asked, *flag, "--columns", "2"]) == 0
    assert main(["sample", *asked]) == 0
    out, err = capfd.readouterr()
    shown = "x_t at t = 400, the image" if state else "x0 predicted at t = 600, 0"
    assert out.splitlines()[0] == f"sequence.png: {shown}"
    assert err == ""
    along, samples = cells("sequence.png", 3, 2), cells("garments.png", 2, 2)
    assert np.array_equal(along[:, -1], samples.reshape(4, 28, 28)[:3])
    ddim, model = DDIM(5, eta=1.0), embedded.load()
    steps = list(ddim.iterate(model, shape=(2, *embedded.SHAPE), seeds=[5, 8]))
    x = steps[1].x if state else steps[1].x0
    assert np.array_equal(along[:2, 0], images.to_uint8(x)[:, 0].numpy())


def test_sequence_shows_ten_steps_or_as_many_as_there_are() -> None:
    assert main(["sequence", *FEW, "--seeds", "0"]) == 0
    cells("sequence.png", 1, 2)
    assert main(["sequence", *FEW, "--seeds", "0", "--steps", "12"]) == 0
    cells("sequence.png", 1, 10)


def table(out: str) -> tuple[str, list[list[str]], str]:
    """What is printed before the table, its rows, and what comes after."""
    lines = [line.strip() for line in out.splitlines()]
    head = next(i for i, line in enumerate(lines) if line.split() == HEAD)
    rows = [line.split() for line in lines[head + 1 :]]
    numbers = [row for row in rows if len(row) == 4 and row[0].isdecimal()]
    return " ".join(lines[:head]), numbers, "\n".join(lines[head + 1 + len(numbers) :])


HEAD = ["S", "calls", "error", "seconds"]


@pytest.mark.parametrize("width", ["31", "100"])
def test_reconstruct_measures_images_of_a_file(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: str
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)
    np.save("five[b].npy", pixels)
    asked = ("--images", "five[b].npy", "--count", "3", "--refine", "1", "--spacing", "quad")
    assert main(["reconstruct", *QUICK, *asked, "--steps", "4, 2", "--out", "r.png"]) == 0
    out, err = capfd.readouterr()
    before, rows, after = table(out)
    assert err == ""
    assert "The first 3 images of five[b].npy, refine 1, quad spacing." in before
    assert after == "r.png: the images, then S = 4, 2"
    x0 = images.from_uint8(torch.from_numpy(pixels[:3])[:, None])
    ddims = [DDIM(4, spacing="quad"), DDIM(2, spacing="quad")]
    expected = list(errors(ddims, embedded.load(), x0, refine=1, batch_size=2))
    assert [row[:3] for row in rows] == [
        ["4", "12", f"{expected[0].error:.2e}"],
        ["2", "6", f"{expected[1].error:.2e}"],
    ]
    drawn = cells("r.png", 3, 3)
    assert np.array_equal(drawn[0], pixels[:3])
    for row, result in zip(drawn[1:], expected, strict=True):
        assert np.array_equal(row, images.to_uint8(result.images)[:, 0].numpy())


def test_reconstruct_measures_images_it_has_drawn(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("fastddim.cli.measure.DRAWN", 3)
    drawn = DDIM(3)
    assert main(["reconstruct", *QUICK, "--seeds", "7,2-3", "--steps", "2"]) == 0
    before, rows, after = table(capfd.readouterr().out)
    assert before.startswith("3 images drawn by the model, seeds 7,2-3, refine 0, uniform spacing.")
    assert after == ""
    model = embedded.load()
    x0 = torch.cat(list(draw.by_seed(drawn, model, [7, 2, 3], embedded.SHAPE, 2)))
    expected = next(errors([DDIM(2)], model, x0, batch_size=2))
    assert [row[:3] for row in rows] == [["2", "4", f"{expected.error:.2e}"]]
    assert not list(tmp_path.iterdir())


def test_reconstruct_takes_sixteen_by_default(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []

    def nothing(ddims: Sequence[DDIM], model: Any, x0: torch.Tensor, **_: Any) -> Any:
        asked.append((len(x0), *(len(ddim.pairs) for ddim in ddims)))
        return iter([])

    monkeypatch.setattr("fastddim.tools.reconstruction.errors", nothing)
    monkeypatch.setattr("fastddim.cli.measure.DRAWN", 1)
    for count in (20, 3):
        np.save("some.npy", np.zeros((count, 28, 28), np.uint8))
        assert main(["reconstruct", "--images", "some.npy", "--device", "cpu"]) == 0
    assert main(["reconstruct", "--device", "cpu"]) == 0
    assert asked[1::2] == [(n, 10, 20, 50, 100, 200) for n in (16, 3, 16)]
    assert capfd.readouterr() == ("", "")


def test_ctrl_c_prints_what_is_done(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain, sizes = DDIM.sample, []

    def sample(self: DDIM, *args: Any, **rest: Any) -> Any:
        sizes.append(self.steps)
        if self.steps == 3:
            raise KeyboardInterrupt
        return plain(self, *args, **rest)

    monkeypatch.setattr(DDIM, "sample", sample)
    asked = ("--seeds", "0", "--steps", "2,3,4", "--out", "r.png")
    monkeypatch.setattr("fastddim.cli.measure.DRAWN", 1)
    assert main(["reconstruct", *QUICK, *asked]) == 130
    out, err = capfd.readouterr()
    assert [row[:2] for row in table(out)[1]] == [["2", "4"]]
    assert err == "fastddim: interrupted\n"
    assert sizes[-1] == 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["interpolate", "sequence", "reconstruct"])
def test_each_command_has_a_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr("fastddim.cli.measure.DRAWN", 1)
    assert main([command, *FEW, "--seeds", "0-3"]) == 0
    # Batches of two: eleven columns and two rows; four samples; one step to draw four, and there
    # and back.
    total = {"interpolate": 22, "sequence": 4, "reconstruct": 2 + 2 * 4}[command]
    assert f"{total}/{total}" in terminal.getvalue()


def test_the_checkpoint_is_sampled_on_its_own_schedule(capfd: pytest.CaptureFixture[str]) -> None:
    Path("flags.json").write_text(
        '{"num_head_channels": 32, "noise_schedule": "cosine", "predict_xstart": true}'
    )
    asked = ("--checkpoint", str(GUIDED), "--config", "flags.json", "--shape", "3,8,16")
    assert main(["sample", *FEW, *asked, "--seeds", "0-1"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("garments.png: 2 images in ")
    first, second = err.splitlines()
    assert first == (
        f"checkpoint {GUIDED}: guided-diffusion, 0.4 M parameters, 3x8x16, learned variance, "
        f"cosine noise, T = 1000"
    )
    assert second.startswith("it is taken to predict sample on cosine noise, T = 1000 (")
    loaded = checkpoints.load(GUIDED, config="flags.json", shape=(3, 8, 16))
    ddim = DDIM(2, schedule=NoiseSchedule.cosine(), prediction="sample")
    expected = ddim.sample(loaded.model, shape=(2, 3, 8, 16), seeds=[0, 1])
    with Image.open("garments.png") as picture:
        sheet = images.grid(images.to_uint8(expected))
        assert np.array_equal(np.array(picture), sheet.permute(1, 2, 0).numpy())


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
    "config": "(what is beside",
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
    extras = ("typer", "click", "rich", "PIL", "safetensors", "diffusers", "matplotlib")
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

    monkeypatch.setitem(globals(), "main", run)
    assert "seeds must be" in refused("sample", "--seeds", "x")


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
    for command in (*DRAWING, "evaluate", "info"):
        assert set(EVERYWHERE) <= set(declared(command)), command
    for command in DRAWING:
        assert set(OF_A_MODEL) <= set(declared(command)), command
    first = declared("sample")
    for command in DRAWING:
        for name in (*EVERYWHERE, *OF_A_MODEL):
            assert declared(command)[name].help == first[name].help, (command, name)


def test_the_vocabulary_is_the_librarys() -> None:
    from fastddim.cli.network import SCHEDULES
    from fastddim.coefficients import PREDICTIONS
    from fastddim.tools import folder

    assert SPACINGS == options.SPACINGS
    assert tuple(checkpoints.CONFIGS) == options.CONFIGS
    assert folder.FORMATS == options.FORMATS
    assert tuple(PREDICTIONS) == options.PREDICTIONS
    assert draw.LARGEST_BATCH == options.LARGEST_BATCH
    assert tuple(SCHEDULES) == options.SCHEDULES
    for name, make in SCHEDULES.items():
        assert make(7).name.partition("(")[0] == name
        assert len(make(7)) == 7
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in options.DTYPES)


def test_no_option_has_the_name_of_its_metavar() -> None:
    # Typer 0.27.0 to 0.27.3 take the metavar for the name where there is no other.
    for command in (*DRAWING, "evaluate", "info"):
        names = set(declared(command)) - {"folder", "--help", "-h"}
        assert all(name.startswith("--") and name == name.lower() for name in names), names


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("commands", "arguments", "said"),
    [
        (("evaluate",), ["out", "--device", "nonsense"], "device must be one that torch can use"),
        (DRAWING, ["--device", "mps"], "can use here (cpu), got 'mps'"),
        (DRAWING, ["--threads", "0"], "threads must be an integer in [1, 1024], got 0"),
        (DRAWING, ["--dtype", "float17"], "got 'float17'; did you mean float16?"),
        (DRAWING, ["--spacing", "unifrom"], "'unifrom'; did you mean uniform?"),
        (DRAWING, ["--spacing", "nothing like it"], "quad-ermongroup, got 'nothing like it'\n"),
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
    monkeypatch.setenv("COMP_WORDS", "fastddim se")
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


# Pictures.


def test_a_picture_knows_what_it_was_made_from() -> None:
    assert main(["sample", *FEW, "--seeds", "5, 8-9", "--eta", "1", "--spacing", "quad"]) == 0
    found = sheet.recipe_of(Path("garments.png"))
    asked = {
        "command": "sample",
        "seeds": "5,8-9",
        "steps": 2,
        "eta": 1.0,
        "spacing": "quad",
        "batch_size": 2,
    }
    assert found.items() >= asked.items()
    assert found["versions"]["fastddim"] == fastddim.__version__
    assert found["device"].endswith(f"threads: {torch.get_num_threads()}")
    Image.new("L", (3, 3)).save("other.png")
    assert sheet.recipe_of(Path("other.png")) == {}


@pytest.mark.parametrize(
    ("command", "rest", "rows", "columns"),
    [
        ("sample", ["--seeds", "0-3"], 2, 2),
        ("interpolate", ["--seeds", "0-3", "--columns", "3"], 2, 3),
        ("sequence", ["--seeds", "0-1"], 2, 2),
        ("reconstruct", ["--seeds", "0-1", "--out", "reconstruct.png"], 2, 2),
    ],
)
def test_labels_stand_beside_the_images(
    command: str, rest: list[str], rows: int, columns: int
) -> None:
    if command == "reconstruct":
        rest = [*rest, "--steps", "1"]
    else:
        rest = [*rest, "--out", f"{command}.png"]
    steps = [] if command == "reconstruct" else ["--steps", "2"]
    assert main([command, *QUICK, *steps, *rest]) == 0
    with Image.open(f"{command}.png") as picture:
        bare = np.array(picture)
    assert main([command, *QUICK, *steps, *rest, "--labels"]) == 0
    with Image.open(f"{command}.png") as picture:
        labelled = np.array(picture)
    height, width = bare.shape
    if command == "sample":  # each image has its seed below it
        assert labelled.shape == (height + rows * sheet.HEIGHT, width)
        assert np.array_equal(labelled[2:30], bare[2:30])
        assert labelled[30 : 30 + sheet.HEIGHT].max() > 100
    else:
        assert np.array_equal(labelled[-height:, -width:], bare)
        assert labelled[:, :-width].max() > 100  # the rows'
    assert (columns, rows) > (0, 0)


# Tables.


def test_a_table_is_not_broken_where_it_is_piped(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS")
    names = [f"a long name {i}" for i in range(12)]
    bars.print_table("A heading " * 20, names, [["1" * 10] * 12])
    heading, head, row = capfd.readouterr().out.splitlines()
    assert heading == "A heading " * 20
    assert " ".join(head.split()) == " ".join(names)
    assert row.split() == ["1" * 10] * 12


# What is installed.


def test_info(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert out.startswith(f"fastddim {fastddim.__version__}, Python ")
    assert f"torch {torch.__version__}" in out
    assert "fastddim[cli] is installed: the command line" in out
    line = next(line for line in out.splitlines() if line.startswith("cpu: "))
    takes = backends.backend("cpu").name
    assert line.endswith("a step is one pass compiled by numba") == (takes == "numba")


def test_info_says_what_an_extra_would_add(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastddim.cli.info.util.find_spec", lambda name: None)
    with backends.using("torch"):
        assert main(["info"]) == 0
    out = capfd.readouterr().out
    assert "a step is PyTorch's own operations" in out
    assert "fastddim[cpu] would add a step on a CPU as one fused pass" in out
    assert "(numba missing): pip install 'fastddim[cpu]'" in out


# Under a launcher.


@pytest.mark.parametrize(
    "asked",
    [
        ["--spacing", "even"],
        ["--steps", "1001"],
        ["--nonsense"],
        ["--steps", "many"],
        ["--checkpoint", "none"],
        ["--dtype", "int8"],
    ],
)
def test_a_refusal_is_said_once(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    said = []
    for restart in ("0", "1"):
        for rank in ("0", "1", "2"):
            monkeypatch.setenv("RANK", rank)
            monkeypatch.setenv("LOCAL_RANK", rank)
            monkeypatch.setenv("WORLD_SIZE", "3")
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart)
            command = ["generate", "--seeds", "0", "--out", "out", "--device", "cpu", *asked]
            assert main(command) == 2
            said.append(capfd.readouterr().err.count("\n"))
    assert said == [1, 0, 0, 0, 0, 0]


def test_a_fault_of_one_process_is_said_by_that_process(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert main(["generate", "--seeds", "0", "--out", "nowhere/out", "--device", "cpu"]) == 2
    assert "nowhere/out" in capfd.readouterr().err


def told(n: int, left: float | None = None, rate: float | None = None) -> There:
    count = There(n)
    count.total, count.left, count.rate = 100, left, rate
    return count


def test_generate_speaks_at_once_and_soon_after(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 2.0, 5.0, 64.0, 65.0, 66.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    for quiet in (True, False):
        with bars.bar_of_images(100, quiet) as there:
            for n in (0, 4, 8, 12):
                there(told(n))
            there(told(20, 162.4, 0.5))
            there(told(100, 0, 0.5))
    assert capfd.readouterr().err.splitlines() == [
        "0 of 100 images are there",
        "8 of 100 images are there",
        "20 of 100 images, 0.5 images/s, 0:02:42 left",
    ]


def test_who_ends_last_has_the_last_word(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("generate", "--seeds", "0-9", "--steps", "2", "--batch-size", "4", "--shard-size", "8")
    found = []
    for rank in ("0", "1", "1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main([*asked, "--device", "cpu", "--out", "out"]) == 0
        found.append(capfd.readouterr())
    assert [out for out, _ in found] == ["", "out: 10 images\n", "", "out: 10 images\n"]
    assert found[0].err.splitlines()[-1] == (
        "out: 8 of 10 images; other processes are still at the rest, and fastddim generate "
        "--verify out says when all are there"
    )


# Help and start.


def test_help_and_version_import_no_torch() -> None:
    code = (
        "import sys\n"
        "from fastddim.__main__ import main\n"
        "for asked in (['--version'], ['--help'], ['sample', '--help'], ['profile', '--help'],\n"
        "              ['sample', '--seeds', 'x'], ['sample', '--spacing', 'even'],\n"
        "              ['generate', '--seeds', '1', '--out', 'o', '--eta', 'hut']):\n"
        "    main(asked)\n"
        "found = {'torch', 'numpy', 'triton', 'diffusers', 'PIL'} & set(sys.modules)\n"
        "sys.exit(str(found) if found else 0)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(fastddim.__file__).parents[1],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


def test_a_sample_of_the_garment_model_imports_no_diffusers(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('diffusers', 'transformers', 'torchvision', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "from fastddim.__main__ import main\n"
        f"sys.exit(main(['sample', '--seeds', '0', '--steps', '1', '--batch-size', '1',\n"
        f"               '--device', 'cpu', '--out', {str(tmp_path / 'a.png')!r}]))\n"
    )
    done = ran(code, strict=False)
    assert done.returncode == 0, done.stderr


def test_diffusers_is_imported_without_what_a_unet_does_not_use() -> None:
    code = (
        "import sys\n"
        "from fastddim.cli.network import HIDDEN, lean_imports\n"
        "with lean_imports():\n"
        "    from diffusers.models.unets.unet_2d import UNet2DModel\n"
        "assert not set(HIDDEN) & set(sys.modules)\n"
        "import transformers\n"  # the process is as it was
    )
    done = ran(code, strict=False)
    assert done.returncode == 0, done.stderr


def test_a_spinner_shows_before_torch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    seen: list[str] = []

    def check_png(path: Path) -> Path:
        seen.append(terminal.getvalue())
        raise ValueError("enough")

    monkeypatch.setattr(images, "check_png", check_png)
    assert main(["sample"]) == 2
    assert "loading" in seen[0]


def test_diffusers_prints_nothing_while_a_checkpoint_is_loaded() -> None:
    code = (
        "from fastddim.cli.network import lean_imports\n"
        "with lean_imports():\n"
        "    import diffusers, warnings\n"
        "    warnings.warn('of no use here')\n"
        "    diffusers.utils.logging.get_logger('diffusers.models').warning('nor this')\n"
    )
    done = ran(code, strict=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("kind", ["generated npy", "generated png", "PNGs", "one PNG"])
def test_reconstruct_reads_folders_and_pngs(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    given: list[torch.Tensor] = []
    plain = errors

    def kept(ddims: Any, model: Any, x0: torch.Tensor, **rest: Any) -> Any:
        given.append(x0)
        return plain(ddims, model, x0, **rest)

    monkeypatch.setattr("fastddim.tools.reconstruction.errors", kept)
    asked = ["generate", "--seeds", "0-4", *FEW, "--shard-size", "2", "--quiet", "--out", "out"]
    assert main([*asked, "--format", "npy" if kind == "generated npy" else "png"]) == 0
    x = torch.cat(list(draw.by_seed(DDIM(2), embedded.load(), range(5), embedded.SHAPE, 2)))
    path, n = "out", 3
    if kind == "PNGs":
        Path("out/manifest.json").unlink()
    elif kind == "one PNG":
        path, n = "out/000/000000.png", 1
    assert main(["reconstruct", *QUICK, "--images", path, "--count", str(n), "--steps", "1"]) == 0
    assert torch.equal(given[-1], images.from_uint8(images.to_uint8(x))[:n])
    assert f"The first {options.counted(n, 'image')} of {path}" in capfd.readouterr().out


@pytest.mark.usefixtures("no_work")
def test_folders_and_pngs_that_do_not_fit_are_refused(refused: Callable[..., str]) -> None:
    os.mkdir("empty")
    os.mkdir("few")
    Image.new("L", (28, 28)).save("few/a.png")
    Image.new("RGB", (28, 28)).save("colour.png")
    Image.new("L", (5, 4)).save("small.png")
    Path("cut.png").write_bytes(Path("colour.png").read_bytes()[:40])
    for path, said in {
        "empty": "got empty, which holds none",
        "colour.png": "28x28 with 1 channel, got 28x28 with 3 channels in colour.png",
        "small.png": "28x28 with 1 channel, got 4x5 with 1 channel in small.png",
        "cut.png": "got cut.png: ",
    }.items():
        assert said in refused("reconstruct", "--images", path, "--device", "cpu")
    said = refused("reconstruct", "--images", "few", "--count", "2", "--device", "cpu")
    assert "count must be an integer in [1, 1] for few, got 2" in said


def test_a_folder_that_cannot_be_made_has_no_shards(refused: Callable[..., str]) -> None:
    said = refused("generate", "--seeds", "0", "--device", "cpu", "--out", "/proc/q")
    assert "can be written to and has room, got /proc/q" in said
    assert "shards" not in said
