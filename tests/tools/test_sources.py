"""Images are the same wherever they are: in a generated folder, a folder of pictures, a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import fastddim
from fastddim import DDIM, embedded
from fastddim.__main__ import main
from fastddim.tools import distance, evaluate, images, sources
from fastddim.tools.folder import Folder
from fastddim.tools.quality import Gaussian, frechet_distance
from tests.refusals import refused

PIXELS = torch.randint(256, (7, 3, 4, 6), dtype=torch.uint8)


def garments(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, 1, 28, 28), generator=generator, dtype=torch.uint8)


def pictures(folder: Path, pixels: Tensor, inside: str = "") -> Path:
    (folder / inside).mkdir(parents=True)
    for i, image in enumerate(pixels):
        images.save_png(image, folder / inside / f"{i:03d}.png")
    return folder


def everything(source: sources.Source) -> Tensor:
    parts = [source.part(k) for k in range(len(source))]
    assert [len(part) for part in parts[:-1]] == [source.part_size] * (len(source) - 1)
    return torch.cat(parts)


@pytest.mark.parametrize("kind", ["png", "npy", "npz", "pictures", "inside", "arrays", "file"])
def test_every_kind_holds_the_same_images(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    array = PIXELS.movedim(1, -1).numpy()
    if kind in ("png", "npy", "npz"):
        fastddim.generate(
            DDIM(1), Gaussian(0.0, 0.5), (3, 4, 6), range(7), path, 2, format=kind, shard_size=4
        )
        folder = Folder.read(path)
        expected = torch.cat([folder.pictures(k) for k in range(len(folder))])
    else:
        expected = PIXELS
        if kind in ("pictures", "inside"):
            pictures(path, PIXELS, "000" if kind == "inside" else "")
            (path / "notes.txt").write_text("no picture")
            (path / ".hidden.png").touch()
        elif kind == "arrays":
            path.mkdir()
            np.save(path / "0.npy", array[:4])
            np.savez(path / "1.npz", array[4:])
        else:
            path = tmp_path / "a.npy"
            np.save(path, array)
    source = sources.opened(path, (3, 4, 6))
    assert (source.path, source.shape, source.count) == (path, (3, 4, 6), 7)
    assert torch.equal(everything(source), expected)
    assert torch.equal(source.first(5), expected[:5])
    source.verify()
    refused(lambda: source.first(8), ValueError, "count must be an integer in [1, 7]", "got 8")
    refused(lambda: sources.opened(path, (1, 4, 6)), ValueError, "images must all be 4x6", "a")


def test_many_pictures_come_in_parts(tmp_path: Path) -> None:
    pixels = torch.randint(256, (300, 1, 2, 2), dtype=torch.uint8)
    source = sources.opened(pictures(tmp_path / "a", pixels))
    assert len(source) == 2
    assert torch.equal(everything(source), pixels)


def test_pictures_of_every_mode(tmp_path: Path) -> None:
    grey, colour = PIXELS[0, 0], PIXELS[0].movedim(0, -1)
    rgb = Image.fromarray(colour.numpy())
    opaque = rgb.copy()
    opaque.putalpha(255)
    for name, picture, expected in (
        ("grey.png", Image.fromarray(grey.numpy()), grey[None]),
        ("colour.png", rgb, PIXELS[0]),
        ("colour.bmp", rgb, PIXELS[0]),
        ("opaque.png", opaque, PIXELS[0]),
        ("few.png", rgb.quantize(256), PIXELS[0]),
        ("black.png", Image.new("1", (6, 4)), torch.zeros(1, 4, 6, dtype=torch.uint8)),
        ("a.png", Image.fromarray(grey.numpy()).convert("LA"), grey[None]),
    ):
        picture.save(tmp_path / name)
        assert torch.equal(images.read(tmp_path / name)[0], expected), name
    Image.new("RGB", (6, 4), (255, 0, 0)).save(tmp_path / "red.jpg", quality=95)
    assert images.read(tmp_path / "red.jpg")[0, 0].min() >= 250
    half = rgb.copy()
    half.putalpha(128)
    for name, picture, said in (
        ("half.png", half, "not opaque"),
        # Pillow before 11.0 opens 16 bits as mode I.
        ("deep.png", Image.new("I;16", (6, 4)), "a picture of mode I"),
        ("print.tif", Image.new("CMYK", (6, 4)), "mode CMYK"),
    ):
        picture.save(tmp_path / name)
        refused(
            lambda name=name: images.read(tmp_path / name),  # type: ignore[misc]
            ValueError,
            "images must be a picture",
            name,
            said,
        )
    (tmp_path / "cut.png").write_bytes((tmp_path / "grey.png").read_bytes()[:-30])
    refused(lambda: images.read(tmp_path / "cut.png"), ValueError, "images must be", "cut.png")


def test_sources_without_images_of_one_size_are_refused(tmp_path: Path) -> None:
    said = "images must be a folder that fastddim generate has filled, a folder of pictures, or"
    refused(lambda: sources.opened(tmp_path / "no"), FileNotFoundError, said, "does not exist")
    refused(lambda: sources.opened(tmp_path), FileNotFoundError, said, "which holds none")
    folder = pictures(tmp_path / "two", PIXELS)
    images.save_png(PIXELS[0, :, :2], folder / "100.png")
    source = sources.opened(folder)
    refused(lambda: source.part(0), ValueError, "images must all be 4x6 with 3", "2x6", "100.png")
    np.save(folder / "a.npy", PIXELS[:, 0].numpy())
    refused(lambda: sources.opened(folder), ValueError, "images must be pictures or arrays")


def test_fd_clf_of_plain_pictures(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pixels = garments(20)
    real = distance.load()
    features = real.critic.features(images.from_uint8(pixels))
    expected = frechet_distance(features, real.moments)
    folder = pictures(tmp_path / "a", pixels)
    judged = evaluate.garments(sources.opened(folder))
    assert judged.distance == pytest.approx(expected, rel=1e-6)
    assert judged.floor == real.floor(20)
    assert main(["evaluate", str(folder)]) == 0
    assert capfd.readouterr().out.startswith(f"FD-clf {expected:.4f} of 20 images;")
    array = tmp_path / "a.npy"
    np.save(array, pixels[:, 0].numpy())
    assert main(["evaluate", str(array)]) == 0
    assert capfd.readouterr().out.startswith(f"FD-clf {expected:.4f} of 20 images;")


def test_reconstruct_reads_pictures_and_generated_folders(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    x = DDIM(2).sample(embedded.load(), shape=(4, 1, 28, 28), seeds=range(4))
    np.save(tmp_path / "a.npy", images.to_uint8(x)[:, 0].numpy())
    pictures(tmp_path / "plain", images.to_uint8(x))
    made = tmp_path / "made"
    fastddim.generate(DDIM(2), embedded.load(), (1, 28, 28), range(4), made, 4, format="png")
    rows = []
    for path in ("a.npy", "plain", "made"):
        asked = ("--images", str(tmp_path / path), "--steps", "2", "--batch-size", "4")
        assert main(["reconstruct", *asked, "--device", "cpu"]) == 0
        rows.append(capfd.readouterr().out.splitlines()[-1].split()[:3])
    assert rows[0][0] == "2"
    assert rows[0] == rows[1] == rows[2]
    picture = str(tmp_path / "plain/000.png")
    assert main(["reconstruct", "--images", picture, "--steps", "2", "--device", "cpu"]) == 0
    assert capfd.readouterr().out.startswith("The first 1 image of")
