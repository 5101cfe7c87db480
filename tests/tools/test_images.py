"""Images by seed are the same whatever else is asked for, and pictures hold them exactly."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastddim import DDIM, embedded
from fastddim.loop import devices
from fastddim.tools import draw, images, timing
from tests.refusals import refused

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
        batches = draw.by_seed(ddim, model, seeds, embedded.SHAPE, 3)
        return dict(zip(seeds, torch.cat(list(batches)), strict=True))

    alone = ask(5)[5]
    for others in [(5, 1, 2), (1, 2, 5), (9, 8, 7, 6, 5), (0, 1, 2, 5)]:
        assert torch.equal(ask(*others)[5], alone), others
    assert not torch.equal(ask(6)[6], alone)


def test_batches_are_full_and_the_padding_is_left_out() -> None:
    calls: list[list[int]] = []
    out = list(draw.by_seed(seeds_as_images(calls), halves, range(10, 17), SHAPE, 3))
    assert calls == [[10, 11, 12], [13, 14, 15], [16, 16, 16]]
    assert [len(x) for x in out] == [3, 3, 1]
    assert torch.cat(out)[:, 0, 0, 0].tolist() == list(range(10, 17))


def test_by_seed_checks_before_the_first_batch() -> None:
    for seeds, size in [([0], 0), ([0], 1.5), ([0], 10**9), ([-1], 1), ([2**63], 1), (["a"], 1)]:
        with pytest.raises((TypeError, ValueError), match=r"(batch_size|seeds\[0\]) must be"):
            draw.by_seed(DDIM(1), halves, seeds, SHAPE, size)  # type: ignore[arg-type]
    assert list(draw.by_seed(DDIM(1), halves, [], SHAPE, 1)) == []


def test_timed_counts_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def slow(x: Tensor, t: Tensor, *, scale: int) -> Tensor:
        clock[0] += 3.0
        return x * scale

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    timed = timing.Timed(slow, torch.device("cpu"))
    timed(torch.ones(1), torch.zeros(1), scale=1)
    timed.start()
    clock[0] += 2.0
    assert timed(torch.ones(1), torch.zeros(1), scale=2) == 2
    assert timed(torch.ones(1), torch.zeros(1), scale=3) == 3
    assert timed.summary(2) == (
        "2 images in 8.0 s: 0.25 images/s, 25.0% of the time outside the model"
    )
    assert timed.summary(1).startswith("1 image in 8.0 s")


def test_warm_up_takes_a_step_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    taken: list[float] = []
    plain = DDIM.sample

    def sample(self: DDIM, *arguments: Any, **rest: Any) -> Any:
        taken.append(float(self.table[0, 5]))
        return plain(self, *arguments, **rest)

    monkeypatch.setattr(DDIM, "sample", sample)

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append((*x.shape, int(t[0])))
        return x

    timing.warm_up(DDIM(10, eta=1.0), model, SHAPE, 3, torch.device("cpu"))
    assert seen == [(3, *SHAPE, 900)]  # the model is prepared by one call
    assert taken[0] > 0
    assert taken[1:] == [0.0]


def test_every_grey_level_survives() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(images.to_uint8(levels / 127.5 - 1), levels)


def test_to_uint8_rounds_clamps_and_draws_nan_black() -> None:
    x = torch.tensor([-1.0, -0.997, -0.99, 0.995, 0.997, 1.0, 1.5, -7.0])
    assert images.to_uint8(x).tolist() == [0, 0, 1, 254, 255, 255, 255, 0]
    odd = torch.tensor([float("nan"), float("inf"), -float("inf")])
    assert images.to_uint8(odd).tolist() == [0, 255, 0]
    assert images.to_uint8(x.bfloat16()).dtype == torch.uint8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_samples_that_are_not_finite_are_found(dtype: torch.dtype) -> None:
    x = torch.zeros(7, *SHAPE, dtype=dtype)
    for place, value in ((1, "nan"), (4, "inf"), (6, "-inf")):
        x[place, 0, 3, place - 1] = float(value)
    assert images.not_finite(x) == [1, 4, 6]
    assert images.not_finite(x[:1]) == images.not_finite(x[:0]) == []
    x[0] = torch.finfo(dtype).max
    pictures, odd = images.drawn([x[:3], x[3:]])
    assert odd == [1, 4, 6]
    assert torch.equal(pictures, images.to_uint8(x))


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
    assert not images.save_png(x, path)
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", mode)
        pixels = torch.from_numpy(np.array(picture)).view(5, 9, channels)
    assert torch.equal(pixels.permute(2, 0, 1), x)
    assert images.save_png(x, path)  # in place of another
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
    preferred = devices.preferred_device()
    assert preferred == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("cpu", preferred):
        assert devices.usable_device(name, computes=True).type == name
    for name in ("nonsense", "cuda:999", "meta", ""):
        with pytest.raises(ValueError, match="device must be one that torch can use") as caught:
            devices.usable_device(name, computes=True)
        assert "\n" not in str(caught.value)


def test_from_uint8_is_the_way_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    x = images.from_uint8(levels)
    assert x.dtype == torch.float32
    assert (float(x[0]), float(x[-1])) == (-1.0, 1.0)
    assert torch.equal(images.to_uint8(x), levels)


def test_grid_of_given_columns() -> None:
    x = torch.arange(1, 7, dtype=torch.uint8).view(6, 1, 1, 1)
    assert images.grid(x, 0, columns=3)[0].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert images.grid(x, 0, columns=4)[0].tolist() == [[1, 2, 3, 4], [5, 6, 0, 0]]


def test_kept_rows_are_even_and_end_with_the_last() -> None:
    assert draw.kept_rows(DDIM(50), 10) == [4, 9, 14, 19, 24, 29, 34, 39, 44, 49]
    assert draw.kept_rows(DDIM(5), 5) == [0, 1, 2, 3, 4]
    assert draw.kept_rows(DDIM(1000), 1) == [999]
    for steps in (7, 10, 13):
        for columns in range(1, steps + 1):
            rows = draw.kept_rows(DDIM(steps), columns)
            gaps = {b - a for a, b in zip([-1, *rows], rows, strict=False)}
            assert len(rows) == columns
            assert rows[-1] == steps - 1
            assert gaps <= {steps // columns, -(-steps // columns)}


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sequences_hold_each_step_and_end_with_the_sample(eta: float) -> None:
    ddim, seeds = DDIM(6, eta=eta), [3, 1, 4, 1, 5]
    samples = torch.cat(list(draw.by_seed(ddim, halves, seeds, SHAPE, 2)))
    steps = list(ddim.iterate(halves, shape=(5, *SHAPE), seeds=seeds))
    for state in (False, True):
        batches = list(draw.sequences(ddim, halves, seeds, SHAPE, 2, 3, state=state))
        assert [tuple(x.shape[:2]) for x in batches] == [(2, 3), (2, 3), (1, 3)]
        along = torch.cat(batches)
        assert torch.equal(along[:, -1], samples)
        for column, row in enumerate([1, 3, 5]):
            expected = steps[row].x if state else steps[row].x0
            assert torch.equal(along[:, column], expected)
    assert not torch.equal(along[:, 0], samples)


def test_interpolations_end_in_the_samples_of_their_seeds() -> None:
    ddim, model, seeds = DDIM(2), embedded.load(), [5, 8, 2, 2]
    rows = draw.interpolations(ddim, model, seeds, embedded.SHAPE, 3, 4)
    assert rows.shape == (2, 4, *embedded.SHAPE)
    ends = torch.cat(list(draw.by_seed(ddim, model, seeds, embedded.SHAPE, 3)))
    assert torch.equal(rows[:, 0], ends[0::2])
    assert torch.equal(rows[:, -1], ends[1::2])
    assert not torch.equal(rows[0, 1], rows[0, 0])
    torch.testing.assert_close(rows[1, 1], rows[1, 0])  # from a seed to itself


def test_between_two_seeds_the_noise_goes_along_the_sphere() -> None:
    # ε = 0 scales x_T by one factor. Its norms differ by a percent, and so do slerp's angles.
    out = draw.interpolations(DDIM(3), lambda x, t: 0 * x, [7, 9], (2, 64, 64), 4, 5)[0]
    first, last, norms = out[0].flatten(), out[-1].flatten(), out.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, norms[:1].expand(5), rtol=0.02, atol=0)
    cosine = float(first @ last / first.norm() / last.norm())
    for i, x in enumerate(out.flatten(1)):
        angle = torch.arccos((first @ x / first.norm() / x.norm()).clamp(-1, 1))
        assert float(angle) == pytest.approx(i / 4 * float(np.arccos(cosine)), abs=1e-2)


def test_sequences_and_interpolations_check_before_any_work() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        pytest.fail("work began")

    def along(columns: Any, size: Any = 2) -> Any:
        return lambda: draw.sequences(DDIM(4), model, [1, 2], SHAPE, size, columns)

    def between(seeds: list[int], columns: Any = 3, eta: float = 0.0, size: Any = 2) -> Any:
        ddim = DDIM(4, eta=eta)
        return lambda: draw.interpolations(ddim, model, seeds, SHAPE, size, columns)

    refused(along(0), ValueError, "columns must be an integer in [1, 4], got 0")
    refused(along(5), ValueError, "columns must be an integer in [1, 4], got 5")
    refused(along(2, 0), ValueError, "batch_size must be")
    refused(between([1]), ValueError, "seeds must be pairs, an even number of them, got 1")
    refused(between([]), ValueError, "seeds must be pairs", "got 0")
    refused(between([1, -1]), ValueError, "seeds[1] must be an integer in")
    refused(between([1, 2], 1), ValueError, "columns must be an integer ≥ 2, got 1")
    refused(between([1, 2], eta=1.0), ValueError, "eta must be 0", "got 1.0")
    refused(between([1, 2], size=0), ValueError, "batch_size must be")


PIXELS = np.random.default_rng(0).integers(0, 256, (3, 4, 5), np.uint8)


def idx(array: Any) -> bytes:
    sizes = np.array(array.shape, ">u4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + sizes + bytes(array.tobytes())


def test_read_takes_every_kind_of_file_by_its_content(tmp_path: Path) -> None:
    colour = np.stack([PIXELS, 255 - PIXELS, PIXELS // 2], -1)
    np.save(tmp_path / "grey.npy", PIXELS)
    np.save(tmp_path / "colour.npy", colour)
    np.save(tmp_path / "order.npy", np.asfortranarray(colour))
    np.savez(tmp_path / "one.npz", any_name=PIXELS)
    np.savez_compressed(tmp_path / "several.npz", colour, mean=np.zeros(3))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(PIXELS))
    (tmp_path / "idx4").write_bytes(idx(colour))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(PIXELS)))
    expected = {1: torch.from_numpy(PIXELS)[:, None], 3: torch.from_numpy(colour).movedim(3, 1)}
    files = sorted(tmp_path.iterdir())
    assert len(files) == 8
    for path in files:
        whole = images.read(path)
        channels = whole.shape[1]
        assert channels == (3 if path.stem in ("colour", "order", "several", "idx4") else 1)
        assert torch.equal(whole, expected[channels]), path
        assert torch.equal(images.read(path, (channels, 4, 5), 2), whole[:2]), path
        assert torch.equal(images.read(path, count=3), whole), path


def test_read_refuses_what_holds_no_such_images(tmp_path: Path) -> None:
    def file(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    np.save(tmp_path / "float.npy", PIXELS / 255)
    np.save(tmp_path / "one.npy", PIXELS[0])
    np.save(tmp_path / "none.npy", PIXELS[:0])
    np.save(tmp_path / "pickle.npy", np.array([print], object), allow_pickle=True)
    np.savez(tmp_path / "two.npz", a=PIXELS, b=PIXELS)
    np.savez(tmp_path / "no.npz")
    np.savez(tmp_path / "pickle.npz", np.array([print], object))
    npy = file("good.npy", (tmp_path / "one.npy").read_bytes())
    zipped = gzip.compress(idx(PIXELS))
    wrong = "images must be a picture such as a .png, a .npy or .npz of uint8"
    for path, said in [
        (tmp_path / "float.npy", "got float64 (3, 4, 5) in"),
        (tmp_path / "one.npy", "got uint8 (4, 5) in"),
        (tmp_path / "none.npy", "got uint8 (0, 4, 5) in"),
        (tmp_path / "pickle.npy", "allow_pickle"),
        (tmp_path / "pickle.npz", "allow_pickle"),
        (tmp_path / "two.npz", "holds a, b"),
        (tmp_path / "no.npz", "holds no array"),
        (file("cut.npy", npy.read_bytes()[:-1]), "cut.npy: "),
        (file("header.npy", npy.read_bytes()[:20]), "header.npy: "),
        (file("cut.npz", (tmp_path / "two.npz").read_bytes()[:200]), "cut.npz: "),
        (file("cut.gz", zipped[:-15]), "cut.gz: "),
        (file("bad.gz", zipped[:30] + b"?" + zipped[31:]), "bad.gz: "),
        (file("text.gz", gzip.compress(b"text")), "another kind of file"),
        (file("cut.idx", idx(PIXELS)[:-1]), "truncated"),
        (file("head.idx", idx(PIXELS)[:9]), "truncated"),
        (file("huge.idx", b"\0\0\x08\x03" + b"\xff" * 12), "huge.idx: "),
        (file("labels.idx", idx(PIXELS[0, 0])), "another kind of file"),
        (file("int.idx", b"\0\0\x0c\x03" + idx(PIXELS)[4:]), "another kind of file"),
        (file("text.npy", b"text"), "another kind of file"),
        (file("empty", b""), "another kind of file"),
        (tmp_path, "is no file"),
    ]:
        with pytest.raises(ValueError if path != tmp_path else FileNotFoundError) as caught:
            images.read(path)
        message = str(caught.value)
        assert message.startswith(wrong), message
        assert said in message
        assert path.name in message
        assert "\n" not in message
    refused(lambda: images.read("nothing"), FileNotFoundError, "images must be", "'nothing'")


def test_read_refuses_another_size_or_count(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", PIXELS)
    (tmp_path / "a.idx").write_bytes(idx(PIXELS))
    for path in (tmp_path / "a.npy", tmp_path / "a.idx"):
        said = "count must be an integer in [1, 3] for"
        refused(lambda: images.read(path, count=4), ValueError, said, "got 4")  # noqa: B023
        refused(lambda: images.read(path, count=0), ValueError, "count must be")  # noqa: B023
        refused(
            lambda: images.read(path, (3, 4, 4)),  # noqa: B023
            ValueError,
            "images must all be 4x4 with 3 channels, got 4x5 with 1 channel in",
        )
