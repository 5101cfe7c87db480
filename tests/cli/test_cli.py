"""The command line: what it prints, what it writes, and what it refuses in one line."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastddim import DDIM, NoiseSchedule, checkpoints, embedded
from fastddim.__main__ import main
from fastddim.tools import draw, images, timing
from fastddim.tools.reconstruction import errors
from tests.cases import some
from tests.cli.commands import FEW, GUIDED, QUICK, _here

__all__ = ["_here"]


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
    monkeypatch.setattr(timing, "warm_up", lambda *_, **__: None)
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


@pytest.mark.parametrize("width", some(["31", "100"], 2))
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
