"""Exactly N images, once each and the same bytes, whatever number of processes and kills."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastddim import DDIM, embedded
from fastddim.tools import draw, images
from fastddim.tools.folder import FORMATS, MANIFEST, Folder
from fastddim.tools.quality import Gaussian
from fastddim.tools.shards import pictures
from tests.tools.sharding import LAUNCHERS, MODEL, SHAPE, Killed, _alone, content, make, pixels

__all__ = ["_alone"]


@pytest.mark.parametrize("format", FORMATS)
def test_exactly_the_seeds_in_order(tmp_path: Path, format: str) -> None:
    ddim = DDIM(3, eta=1.0)
    assert make(tmp_path / "out", ddim=ddim, format=format)
    expected = torch.cat(list(draw.by_seed(ddim, MODEL, range(53), SHAPE, 4)))
    assert torch.equal(pixels(tmp_path / "out"), images.to_uint8(expected))
    Folder.read(tmp_path / "out").verify()
    names = set(content(tmp_path / "out"))
    if format == "png":
        assert names == {MANIFEST, *(f"000/{seed:06d}.png" for seed in range(53))}
        with Image.open(tmp_path / "out/000/000007.png") as picture:
            assert np.array_equal(np.array(picture), pictures(expected[7:8])[0].numpy())
    else:
        assert names == {MANIFEST, *(f"{k:05d}.{format}" for k in range(6))}
        last = np.load(tmp_path / f"out/00005.{format}")
        array = last["arr_0"] if format == "npz" else last
        assert np.array_equal(array, pictures(expected[50:]).numpy())


@pytest.mark.parametrize("n", [1003, pytest.param(50_000, marks=pytest.mark.slow)])
def test_no_image_is_lost_where_batches_and_shards_do_not_divide(tmp_path: Path, n: int) -> None:
    def nothing(x: Tensor, t: Tensor) -> Tensor:
        assert len(x) == 64
        return x

    options: dict[str, Any] = {
        "ddim": DDIM(1),
        "model": nothing,
        "shape": (1, 1, 1),
        "batch_size": 64,
    }
    for size, expected in ((100, 100), (None, 256)):
        out = tmp_path / str(size)
        assert make(out, n=n, shard_size=size, **options)
        folder = Folder.read(out)
        assert folder.recipe["shard_size"] == expected
        assert sum(len(np.load(folder.files(k)[0])) for k in range(len(folder))) == n


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_world_size_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eta: float
) -> None:
    for format in FORMATS if eta == 1 else ("npy",):
        found = []
        for world in (1, 2, 3, 9) if format == "npy" else (1, 3):  # nine for six shards
            out = tmp_path / f"{format}-{world}"
            for rank in reversed(range(world)):
                for name, value in zip(LAUNCHERS, (rank, world, rank), strict=True):
                    monkeypatch.setenv(name, str(value))
                complete = make(out, ddim=DDIM(3, eta=eta), format=format)
                assert complete == (rank == 0)
            found.append(content(out))
        assert all(one == found[0] for one in found)


def test_world_size_changes_no_garment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = embedded.load(), []
    for world in (1, 2, 3):
        for rank in range(world):
            for name, value in zip(LAUNCHERS, (rank, world, rank), strict=True):
                monkeypatch.setenv(name, str(value))
            make(tmp_path / str(world), ddim=DDIM(2, eta=1.0), n=7, shape=embedded.SHAPE,
                 model=model, batch_size=2, shard_size=2)  # fmt: skip
        found.append(content(tmp_path / str(world)))
    assert found[0] == found[1] == found[2]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("format", ["npy", "png"])
def test_killed_at_every_rename_and_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    small: dict[str, Any] = {
        "n": 5,
        "batch_size": 2,
        "shard_size": 2,
        "shape": (1, 2, 2),
        "format": format,
    }
    make(tmp_path / "whole", **small)
    whole = content(tmp_path / "whole")
    done, n = False, 0
    while not done:
        calls = iter(range(100))

        def counted(
            real: Callable[..., Any], *arguments: Any, calls: Any = calls, n: int = n
        ) -> None:
            if next(calls) == n:
                raise Killed
            real(*arguments)

        out = tmp_path / str(n)
        with monkeypatch.context() as patch:
            for name in ("replace", "link", "fsync"):
                patch.setattr(os, name, partial(counted, getattr(os, name)))
            patch.setattr(Path, "unlink", lambda *_, **__: None)
            try:
                done = make(out, **small)
            except Killed:
                if (out / MANIFEST).exists():
                    folder = Folder.read(out)
                    for k in filter(folder.has, range(len(folder))):  # what counts is whole
                        for file in folder.files(k):
                            assert file.read_bytes() == whole[str(file.relative_to(out))]
        n += not done
        assert make(out, **small)
        assert content(out) == whole
    assert n > 15


def test_files_left_by_a_process_are_cleared_by_their_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ZeroDivisionError):
        make(tmp_path / "out", progress=lambda n: 1 // n)
    (parts,) = (tmp_path / "out").glob(".parts-*")
    for name in ("2.aa.tmp", "3.bb.tmp", "manifest.cc.tmp"):
        (parts / name).write_bytes(b"half")
    for name, value in zip(LAUNCHERS, ("1", "2", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert not make(tmp_path / "out")
    assert {file.name for file in parts.iterdir()} == {
        "2.aa.tmp", "manifest.cc.tmp", "1.sha256", "3.sha256", "5.sha256",
    }  # fmt: skip


def test_existing_shards_are_not_made_again(tmp_path: Path) -> None:
    calls: list[int] = []

    class Counting(Gaussian):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            calls.append(len(x))
            return super().forward(x, t)

    model = Counting(0.0, 0.5)
    make(tmp_path / "out", model=model)
    assert set(calls) == {4}
    before = content(tmp_path / "out")
    calls.clear()
    assert make(tmp_path / "out", model=model)
    assert calls == []
    (tmp_path / "out/00002.npy").unlink()
    assert make(tmp_path / "out", model=model)
    assert len(calls) == 3 * 3  # three batches of three steps
    assert content(tmp_path / "out") == before


def test_two_that_finish_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Folder._known
    inside: list[bool] = []

    def slow(self: Folder, k: int) -> tuple[str, list[int]] | None:
        found = real(self, k)
        if k == 3 and found and not inside and len(self._whole()) == len(self):
            inside.append(True)
            assert Folder.read(self.path).finish()  # the other is through in the meantime
        return found

    monkeypatch.setattr(Folder, "_known", slow)
    assert make(tmp_path / "out")
    assert inside
    Folder.read(tmp_path / "out").verify()
    assert not list((tmp_path / "out").glob(".parts*"))
