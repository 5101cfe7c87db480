"""Images by seed are the same whatever else is asked for, and pictures hold them exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastddim import DDIM, embedded, images

SHAPE = (1, 4, 6)


def halves(x: Tensor, t: Tensor) -> Tensor:
    return x / 2


def seeds_as_images(calls: list[list[int]]) -> Any:
    """A stand-in for DDIM whose samples are their seeds."""

    class Fake:
        def sample(self, model: Any, *, shape: Any, seeds: list[int], **_: Any) -> Tensor:
            assert shape == (len(seeds), *SHAPE)
            calls.append(seeds)
            return torch.tensor(seeds).view(-1, 1, 1, 1).expand(shape).float()

    return Fake()


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_garment_is_the_same_whatever_else_is_asked_for(eta: float) -> None:
    ddim, model = DDIM(2, eta=eta), embedded.load()

    def ask(*seeds: int) -> dict[int, Tensor]:
        batches = images.by_seed(ddim, model, seeds, embedded.SHAPE, 3)
        return dict(zip(seeds, torch.cat(list(batches)), strict=True))

    alone = ask(5)[5]
    for others in [(5, 1, 2), (1, 2, 5), (9, 8, 7, 6, 5), (0, 1, 2, 5)]:
        assert torch.equal(ask(*others)[5], alone), others
    assert not torch.equal(ask(6)[6], alone)


def test_batches_are_full_and_the_padding_is_left_out() -> None:
    calls: list[list[int]] = []
    out = list(images.by_seed(seeds_as_images(calls), halves, range(10, 17), SHAPE, 3))
    assert calls == [[10, 11, 12], [13, 14, 15], [16, 16, 16]]
    assert [len(x) for x in out] == [3, 3, 1]
    assert torch.cat(out)[:, 0, 0, 0].tolist() == list(range(10, 17))


def test_by_seed_checks_before_the_first_batch() -> None:
    for seeds, size in [([0], 0), ([0], 1.5), ([0], 10**9), ([-1], 1), ([2**63], 1), (["a"], 1)]:
        with pytest.raises((TypeError, ValueError), match=r"(batch_size|seeds\[0\]) must be"):
            images.by_seed(DDIM(1), halves, seeds, SHAPE, size)  # type: ignore[arg-type]
    assert list(images.by_seed(DDIM(1), halves, [], SHAPE, 1)) == []


def test_timed_counts_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def slow(x: Tensor, t: Tensor, *, scale: int) -> Tensor:
        clock[0] += 3.0
        return x * scale

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    timed = images.Timed(slow, torch.device("cpu"))
    timed(torch.ones(1), torch.zeros(1), scale=1)
    timed.start()
    clock[0] += 2.0
    assert timed(torch.ones(1), torch.zeros(1), scale=2) == 2
    assert timed(torch.ones(1), torch.zeros(1), scale=3) == 3
    assert timed.summary(2) == (
        "2 images in 8.0 s: 0.25 images/s, 25.0% of the time outside the model"
    )
    assert timed.summary(1).startswith("1 image in 8.0 s")


def test_warm_up_takes_a_step_of_each_kind() -> None:
    seen: list[tuple[int, ...]] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append((*x.shape, int(t[0])))
        return x

    images.warm_up(DDIM(10, eta=1.0), model, SHAPE, 3, torch.device("cpu"))
    assert seen == [(3, *SHAPE, 900), (3, *SHAPE, 0)]


def test_every_grey_level_survives() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(images.to_uint8(levels / 127.5 - 1), levels)


def test_to_uint8_rounds_clamps_and_draws_nan_black() -> None:
    x = torch.tensor([-1.0, -0.997, -0.99, 0.995, 0.997, 1.0, 1.5, -7.0])
    assert images.to_uint8(x).tolist() == [0, 0, 1, 254, 255, 255, 255, 0]
    odd = torch.tensor([float("nan"), float("inf"), -float("inf")])
    assert images.to_uint8(odd).tolist() == [0, 255, 0]
    assert images.to_uint8(x.bfloat16()).dtype == torch.uint8


@pytest.mark.parametrize(
    ("n", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (3, 2, 2), (5, 2, 3), (9, 3, 3), (64, 8, 8)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_grid_lays_images_out_row_by_row(n: int, rows: int, columns: int, channels: int) -> None:
    g = torch.Generator().manual_seed(n)
    x = torch.randint(1, 256, (n, channels, 4, 6), generator=g, dtype=torch.uint8)
    sheet = images.grid(x)
    assert sheet.shape == (channels, rows * 6 + 2, columns * 8 + 2)
    for i in range(n):
        top, left = i // columns * 6 + 2, i % columns * 8 + 2
        assert torch.equal(sheet[:, top : top + 4, left : left + 6], x[i])
        sheet[:, top : top + 4, left : left + 6] = 0
    assert not sheet.any()  # nothing is drawn anywhere else


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_png_holds_the_exact_pixels(tmp_path: Path, channels: int, mode: str) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randint(256, (channels, 5, 9), generator=g, dtype=torch.uint8)
    path = tmp_path / "a.png"
    images.save_png(x, path)
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", mode)
        pixels = torch.from_numpy(np.array(picture)).view(5, 9, channels)
    assert torch.equal(pixels.permute(2, 0, 1), x)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_png_of_two_channels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 channel"):
        images.save_png(torch.zeros(2, 3, 3, dtype=torch.uint8), tmp_path / "a.png")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failing_halfway_leaves_the_old_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"the old picture")

    def save(self: Image.Image, file: Any, **_: Any) -> None:
        if isinstance(file, (str, Path)):
            file = Path(file).open("wb")  # noqa: SIM115
        file.write(b"half")
        file.flush()
        raise error

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(type(error)):
        images.save_png(torch.zeros(1, 3, 3, dtype=torch.uint8), path)
    assert path.read_bytes() == b"the old picture"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_check_png_touches_nothing(tmp_path: Path) -> None:
    assert images.check_png(tmp_path / "a.PNG") == tmp_path / "a.PNG"
    assert not list(tmp_path.iterdir())


def test_usable_device() -> None:
    assert images.usable_device("cpu").type == "cpu"
    assert images.usable_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("nonsense", "cuda:999", "meta", ""):
        with pytest.raises(ValueError, match="device must be one that torch can use") as caught:
            images.usable_device(name)
        assert "\n" not in str(caught.value)
