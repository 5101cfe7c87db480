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
from fastddim import DDIM, NoiseSchedule, checkpoints, embedded, images
from fastddim.__main__ import main
from fastddim.cli import MOST_IMAGES, parse_seeds
from fastddim.reconstruction import errors
from fastddim.timesteps import SPACINGS

GUIDED = Path(__file__).with_name("golden") / "guided-tiny.pt"
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
    monkeypatch.setattr("fastddim.cli.DRAWN", drawn := DDIM(3))
    assert main(["reconstruct", *QUICK, "--seeds", "7,2-3", "--steps", "2"]) == 0
    before, rows, after = table(capfd.readouterr().out)
    assert before.startswith("3 images drawn by the model, seeds 7,2-3, refine 0, uniform spacing.")
    assert after == ""
    model = embedded.load()
    x0 = torch.cat(list(images.by_seed(drawn, model, [7, 2, 3], embedded.SHAPE, 2)))
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

    monkeypatch.setattr("fastddim.reconstruction.errors", nothing)
    monkeypatch.setattr("fastddim.cli.DRAWN", DDIM(1))
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
    monkeypatch.setattr("fastddim.cli.DRAWN", DDIM(1))
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
    monkeypatch.setattr("fastddim.cli.DRAWN", DDIM(1))
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
    assert err == (
        f"checkpoint {GUIDED}: guided-diffusion, 0.4 M parameters, 3x8x16, learned variance, "
        f"cosine noise, T = 1000\n"
    )
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
        "from fastddim.checkpoints import Loaded\n"
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
    assert capfd.readouterr().err == "model grey:make: 1x4x4\n"
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
        (NEW[2:], ["--images", "none.npy"], "got 'none.npy', which is no file"),
        (NEW[2:], ["--images", "."], "got '.', which is no file"),
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
        f"import fastddim.evaluate, fastddim.profile, fastddim.reconstruction\n"
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
