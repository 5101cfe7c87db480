"""Exactly N images, once each and the same bytes, whatever number of processes and kills."""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import importlib
import inspect
import io
import itertools
import json
import os
import pickle
import pkgutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import fastddim
from fastddim import DDIM, NoiseSchedule, embedded
from fastddim.__main__ import main
from fastddim.step import backends
from fastddim.step.op import initial_noise
from fastddim.tools import distance, draw, evaluate, images, provenance
from fastddim.tools.folder import FORMATS, MANIFEST, Folder, Seeds
from fastddim.tools.pace import There
from fastddim.tools.quality import Gaussian, frechet_distance
from fastddim.tools.shards import Worker, pictures, shard
from tests.paths import CPU, use
from tests.refusals import refused

MODULE = sys.modules["fastddim.tools.shards"]
SHAPE = (3, 4, 6)
MODEL = Gaussian(0.0, 0.5)
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MODULE, "_end_with_parent", lambda: None)
    for name in os.environ:
        if name in LAUNCHERS or name.startswith("SLURM_"):
            monkeypatch.delenv(name)


def make(out: Path, *, ddim: DDIM | None = None, n: int = 53, **changes: Any) -> bool:
    """53 images in shards of 10 and batches of 4, which divide nothing."""
    options = {"batch_size": 4, "shard_size": 10, "seeds": range(n), "shape": SHAPE, **changes}
    model = options.pop("model", MODEL)
    return fastddim.generate(ddim or DDIM(3, eta=1.0), model, out=out, **options)


def content(out: Path) -> dict[str, bytes]:
    files = (file for file in out.rglob("*") if file.is_file())
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def pixels(out: Path) -> Tensor:
    folder = Folder.read(out)
    return torch.cat([folder.pictures(k) for k in range(len(folder))])


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


class Killed(BaseException):
    """As SIGKILL: nothing may be tidied up after it."""


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


def test_the_manifest_is_the_recipe(tmp_path: Path) -> None:
    ddim = DDIM(3, eta=0.5, schedule=NoiseSchedule.cosine(100), clip=1.0)
    make(tmp_path / "out", ddim=ddim, seeds=[9, 3, 4, 5], notes={"prompts": "a.txt"})
    recipe = json.loads((tmp_path / "out" / MANIFEST).read_text())["recipe"]
    assert recipe["seeds"] == "9,3-5"
    assert recipe["images"] == 4
    assert recipe["pairs"] == [list(pair) for pair in ddim.pairs]
    assert (recipe["steps"], recipe["eta"], recipe["spacing"]) == (3, 0.5, "uniform")
    assert (recipe["batch_size"], recipe["shard_size"], recipe["format"]) == (4, 10, "npy")
    assert recipe["schedule"]["name"] == "cosine"
    assert len(recipe["model"]["weights"]) == 64
    assert recipe["versions"]["torch"] == torch.__version__
    assert recipe["versions"]["numpy"] == np.__version__
    assert recipe["architecture"].startswith(f"{provenance.cpu_name()}, ")
    assert recipe["backend"].startswith("cpu, ")
    assert recipe["notes"] == {"prompts": "a.txt"}


@pytest.mark.parametrize("backend", CPU)
def test_the_recipe_names_the_backend_that_takes_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    calls: list[str] = []

    def noted(owner: Any, name: str, backend: str) -> None:
        real = getattr(owner, name)

        def step(*arguments: Any) -> Any:
            calls.append(backend)
            return real(*arguments)

        monkeypatch.setattr(owner, name, step)

    with use(backend):
        noted(importlib.import_module("fastddim.step.on_torch"), "_step", "torch")
        if "numba" in backends.available("cpu"):
            noted(importlib.import_module("fastddim.step.on_numba")._Calls, "__call__", "numba")
        make(tmp_path / "out", n=4)
    recipe = Folder.read(tmp_path / "out").recipe
    assert recipe["backend"] == f"cpu, {calls[0]}"
    assert ("numba" in recipe["versions"]) == (backend == "numba")
    assert set(calls) == {backend}


def test_a_device_without_kernels_takes_its_steps_in_pytorch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def taken(device: torch.device | str) -> str:
        backends._found.cache_clear()
        return backends.backend(device).name

    assert taken("mps") == taken(torch.device("meta")) == "torch"
    assert taken("cuda:1") == "triton"
    monkeypatch.setitem(sys.modules, "fastddim.step.on_triton", None)
    assert taken("cuda") == "torch"
    monkeypatch.undo()
    assert taken("cuda") == "triton"


def test_no_name_of_a_package_hides_one_of_its_modules() -> None:
    """``import a.b as m`` takes the package's attribute, so that it has to be the module."""
    packages = {"fastddim", "fastddim.cli", "fastddim.embedded", "fastddim.dropins"}
    packages |= {"fastddim_kernels"}
    for package in map(importlib.import_module, sorted(packages)):
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if info.name == "fastddim.__main__":
                continue
            module = importlib.import_module(info.name)
            assert getattr(package, info.name.rpartition(".")[2]) is module, info.name


def test_the_function_and_the_module_of_one_name() -> None:
    module: Any = importlib.import_module("fastddim.tools.shards")

    assert module.shard is shard
    assert module.Worker is Worker
    assert callable(fastddim.generate)
    assert inspect.signature(fastddim.generate) == inspect.signature(module.generate)
    assert pickle.loads(pickle.dumps(fastddim.generate)) is fastddim.generate
    assert callable(copy.deepcopy(partial(fastddim.generate, DDIM(1))).func)


CHANGES: dict[str, dict[str, Any]] = {
    "eta (1.0 there, 0.5 here)": {"ddim": DDIM(3, eta=0.5)},
    "steps (3 there, 4 here), pairs": {"ddim": DDIM(4, eta=1.0)},
    "schedule.name": {"ddim": DDIM(3, eta=1.0, schedule=NoiseSchedule.cosine())},
    "images (53 there, 52 here), seeds ('0-52' there, '0-51' here)": {"n": 52},
    "seeds ('0-52' there, '1-60' here)": {"seeds": range(1, 61)},
    "shape": {"shape": (3, 6, 4)},
    "format ('npy' there, 'png' here)": {"format": "png"},
    "shard_size (10 there, 12 here)": {"shard_size": 12},
    "batch_size (4 there, 5 here)": {"batch_size": 5},
    "model.weights": {"model": Gaussian(0.0, 0.25)},
    "model.name": {"model": embedded.load()},
    "cond (None there, 'tests.tools.test_shards.": {"cond": lambda seeds: {}},
    "dtype (None there, 'torch.float16' here)": {"dtype": torch.float16},
    "guidance": {"guidance": 2.0, "uncond": lambda seeds: {}},
    "notes.a (None there, 1 here)": {"notes": {"a": 1}},
}


def test_another_recipe_is_refused_with_the_difference_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "out")
    before = content(tmp_path / "out")
    for said, change in CHANGES.items():
        refused(partial(make, tmp_path / "out", **change), ValueError, "out must be", said)
    torch.set_num_threads(2)
    try:
        said = "threads (1 there, 2 here). Go on with as many threads: --threads 1"
        refused(partial(make, tmp_path / "out"), ValueError, "out must be", said)
    finally:
        torch.set_num_threads(1)
    monkeypatch.setattr(fastddim, "__version__", "0.0.0")
    refused(partial(make, tmp_path / "out"), ValueError, "out must be", "versions.fastddim")
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("begun", ["finished", "killed"])
def test_more_seeds_go_on_with_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, begun: str
) -> None:
    ddim = DDIM(3, spacing="trailing")
    options: dict[str, Any] = {"ddim": ddim, "model": spoilt, "format": format}
    make(tmp_path / "whole", **options)
    calls: list[int] = []

    def counted(x: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        return spoilt(x, t)

    counted.__module__, counted.__qualname__ = spoilt.__module__, spoilt.__qualname__
    if begun == "finished":
        assert make(tmp_path / "out", n=32, **options)
    else:
        with pytest.raises(ZeroDivisionError):
            make(tmp_path / "out", n=32, progress=lambda n: 1 // (n < 31), **options)
    for name, value in zip(LAUNCHERS, (0, 1, 0), strict=True):
        monkeypatch.setenv(name, str(value))
    assert make(tmp_path / "out", **{**options, "model": counted})
    assert len(calls) == 3 * (3 + 3 + 1)  # three whole shards were there: 10 + 10 + 3 images
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    Folder.read(tmp_path / "out").verify()


def test_other_ranks_wait_until_rank_0_has_added_the_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "out", n=32)
    make(tmp_path / "whole")
    monkeypatch.setattr("fastddim.tools.folder._PATIENCE", 0.2)
    for name, value in zip(LAUNCHERS, (1, 2, 1), strict=True):
        monkeypatch.setenv(name, str(value))
    said = "images (32 there, 53 here), seeds ('0-31' there, '0-52' here)"
    refused(partial(make, tmp_path / "out"), ValueError, "out must be", said)  # none came
    Folder.read(tmp_path / "out").verify()

    def rank_0(seconds: float) -> None:
        monkeypatch.setenv("RANK", "0")
        make(tmp_path / "out", seeds=Seeds([range(32), range(32, 53)]))
        monkeypatch.setenv("RANK", "1")

    monkeypatch.setattr("time.sleep", rank_0)
    assert make(tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("at", range(12))
def test_killed_while_seeds_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    make(tmp_path / "whole")
    make(tmp_path / "out", n=32)
    real, calls = os.replace, iter(range(1000))

    def replace(source: Path, target: Path) -> None:
        if next(calls) == at:
            raise Killed
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with contextlib.suppress(Killed):
        make(tmp_path / "out")
    assert make(tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_of_two_recipes_at_once_the_first_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "other", ddim=DDIM(3))
    theirs = (tmp_path / "other" / MANIFEST).read_bytes()
    real = os.link

    def link(source: Path, target: Path) -> None:
        target.write_bytes(theirs)  # in the last moment before ours
        real(source, target)

    monkeypatch.setattr(os, "link", link)
    refused(partial(make, tmp_path / "out"), ValueError, "out must be", "eta (0.0 there, 1.0 here)")
    assert (tmp_path / "out" / MANIFEST).read_bytes() == theirs


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    assert make(tmp_path / "out")
    Folder.read(tmp_path / "out").verify()


def test_nonsense_is_refused_before_any_work(tmp_path: Path) -> None:
    out = tmp_path / "out"
    values: dict[str, dict[str, Any]] = {
        "format must be one of npy, png, npz, got 'jpg'": {"format": "jpg"},
        "shard_size must be an integer ≥ 1, got 0": {"shard_size": 0},
        "batch_size must be an integer in [1, 65536], got 0": {"batch_size": 0},
        "seeds must be at least 1": {"seeds": []},
        "seeds must be there once each, got 3 twice": {"seeds": [1, 2, 3, 3]},
        "seeds[1] must be an integer in [0, 9223372036854775807], got -1": {"seeds": [0, -1]},
        "seeds[-1] must be an integer in": {"seeds": range(2**63, 2**63 + 2)},
        "postprocess must be given for shape (4, 8, 8)": {"shape": (4, 8, 8)},
        "postprocess must be given for shape (3,)": {"shape": (3,)},
    }
    for said, change in values.items():
        refused(partial(make, out, **change), ValueError, said)
    kinds: dict[str, dict[str, Any]] = {
        "cond must be a function of a batch's seeds, got dict": {"cond": {}},
        "postprocess must be callable, got int": {"postprocess": 3},
        "guidence is none of cond, uncond, guidance": {"guidence": 3.0},
    }
    for said, change in kinds.items():
        refused(partial(make, out, **change), TypeError, said)
    assert not out.exists()
    refused(partial(make, tmp_path / "a/b"), FileNotFoundError, "out must be a folder that can")
    (tmp_path / "file").touch()
    refused(partial(make, tmp_path / "file"), FileExistsError, "out must be a folder that can")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/cat.png").touch()
    refused(partial(make, tmp_path / "theirs"), ValueError, "out must be a new folder", "cat.png")
    (tmp_path / "theirs" / MANIFEST).write_text('{"recipe": {}}')
    refused(partial(make, tmp_path / "theirs"), ValueError, "", "is damaged")


def test_verify_reads_every_byte(tmp_path: Path) -> None:
    for format in FORMATS:
        out = tmp_path / format
        make(out, n=5, batch_size=2, shard_size=2, shape=(1, 2, 2), format=format)
        for file in sorted(out.rglob(f"*.{format}")):
            name, whole = str(file.relative_to(out)), file.read_bytes()
            for at in (0, len(whole) // 2, len(whole) - 1):
                file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
                refused(Folder.read(out).verify, ValueError, str(out), "changed")
            file.write_bytes(whole[:-1])
            refused(Folder.read(out).verify, ValueError, str(out), "changed")
            file.unlink()
            refused(Folder.read(out).verify, ValueError, str(out), f"{name} is missing")
            file.write_bytes(whole)
            twice = file.with_name(f"copy.{format}")
            twice.write_bytes(whole)
            refused(Folder.read(out).verify, ValueError, str(out), "copy", "none of its files")
            twice.unlink()
            Folder.read(out).verify()


def spoilt(x: Tensor, t: Tensor) -> Tensor:
    """ε of N(0, 0.5²), but for samples whose first element is above 1 at the start: NaN, ±inf."""
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf])[(x.flatten(1)[:, 1] * 8).long() % 3]
    where = (t == 999) & (x.flatten(1)[:, 0] > 1)
    return torch.where(where.view(-1, 1, 1, 1), odd.view(-1, 1, 1, 1), MODEL(x, t))


def spoilt_seeds(seeds: Sequence[int]) -> list[int]:
    """Those of which ``spoilt`` makes nothing: told from x_T, not from the pictures."""
    x = initial_noise(torch.tensor(seeds), (len(seeds), *SHAPE))
    return [seed for seed, sample in zip(seeds, x, strict=True) if sample.flatten()[0] > 1]


@pytest.mark.parametrize("format", FORMATS)
def test_the_manifest_counts_images_that_are_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    ddim = DDIM(3, spacing="trailing")
    expected = spoilt_seeds(range(53))
    assert 3 <= len(expected) <= 20
    for rank in (1, 0):
        for name, value in zip(LAUNCHERS, (rank, 2, rank), strict=True):
            monkeypatch.setenv(name, str(value))
        make(tmp_path / "out", ddim=ddim, model=spoilt, format=format)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["not_finite"] == {"images": len(expected), "seeds": str(Seeds.of(expected))}
    folder = Folder.read(tmp_path / "out")
    assert folder.not_finite == expected
    warning = folder.warning()
    assert warning is not None
    assert warning.startswith(f"{len(expected)} images hold NaN or infinity")
    assert warning.endswith(f"seeds {Seeds.of(expected)}")
    folder.verify()  # every byte is as it was made
    # A lost shard that is made again is counted once more, and the others are remembered.
    before = content(tmp_path / "out")
    folder.files(expected[0] // 10)[0].unlink()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert make(tmp_path / "out", ddim=ddim, model=spoilt, format=format)
    assert content(tmp_path / "out") == before


def test_finite_images_give_no_warning(tmp_path: Path) -> None:
    make(tmp_path / "out", n=5)
    folder = Folder.read(tmp_path / "out")
    assert (folder.not_finite, folder.warning()) == ([], None)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["not_finite"] == {"images": 0, "seeds": ""}
    del manifest["not_finite"]  # as manifests were before
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(manifest))
    assert Folder.read(tmp_path / "out").warning() is None
    assert make(tmp_path / "out", n=5)


def test_shard_warns_of_images_that_are_not_finite() -> None:
    ddim = DDIM(3, spacing="trailing")
    expected = spoilt_seeds(range(20))
    with pytest.warns(RuntimeWarning, match=f"NaN or infinity.* {Seeds.of(expected)}$"):
        array = shard(ddim, spoilt, SHAPE, range(20), 8)
    assert array.shape == (20, *SHAPE[1:], 3)
    # A decoder may overflow where the latents do not, as in float16.
    with pytest.warns(RuntimeWarning, match=r"^1 image holds NaN .* seed 2$"):
        shard(DDIM(1), MODEL, (1, 1), range(3), 4, postprocess=overflows)


def overflows(x: Tensor) -> Tensor:
    return torch.where(torch.arange(len(x)).view(-1, 1, 1) == 2, torch.inf, x)


def test_the_command_says_which_images_are_not_finite(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("odd.py").write_text(
        "import torch\n"
        "def model(x, t):\n"
        "    odd = (x.amax((1, 2, 3), True) > 1.5) & (t == 500).view(-1, 1, 1, 1)\n"
        "    return torch.where(odd, torch.nan, x / 2)\n"
        "def finite(x, t): return x / 2\n"
        "def factory(): return model\n"
        "def other(): return finite\n"
    )
    shape = (1, 2, 2)
    x = initial_noise(torch.arange(10), (10, *shape))
    odd = [i for i in range(10) if x[i].max() > 1.5]
    assert 1 < len(odd) < 9
    asked = ("--seeds", "0-9", *FEW, "--shape", "1,2,2", "--model")
    said = f"{len(odd)} images hold NaN or infinity, drawn as black or white pixels: seeds "
    said += str(Seeds.of(odd))
    generate = ("generate", *asked, "odd:factory", "--out", "out")
    for command in (generate, generate, ("generate", "--verify", "out")):
        assert main(command) == 3
        out, err = capfd.readouterr()
        assert out.startswith("out: 10 images")
        assert err.splitlines()[-1] == f"fastddim: {said}"
    assert main([*generate, "--quiet"]) == 3  # which is no reason to say nothing of what is wrong
    assert capfd.readouterr() == ("", f"fastddim: {said}\n")
    sample = [word for word in asked if word not in ("--shard-size", "8")]
    assert main(["sample", *sample, "odd:factory", "--out", "a.png"]) == 3
    assert capfd.readouterr().err.splitlines()[-1] == f"fastddim: {said}"
    assert Path("a.png").exists()
    assert main(["sample", *sample, "odd:other", "--out", "b.png"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("b.png: 10 images in")
    assert "NaN" not in err
    assert main(["sample", *sample, "odd:other", "--out", "b.png"]) == 0
    assert capfd.readouterr().out.startswith("b.png (replaced): 10 images in")
    rows = ["--steps", "2", "--batch-size", "4", "--device", "cpu", "--shape", "1,2,2"]
    rows += ["--model", "odd:factory", "--columns", "2", "--out", "c.png"]
    assert main(["sequence", *rows, "--seeds", f"{odd[0]},{odd[1]}"]) == 3
    out, err = capfd.readouterr()
    assert out.startswith("c.png: x0 predicted")
    assert err.splitlines()[-1].endswith(f" {Seeds.of(odd[:2])}")
    good = next(i for i in range(10) if i not in odd)
    assert main(["interpolate", *rows, "--seeds", f"{good},{odd[1]}"]) == 3
    out, err = capfd.readouterr()
    assert out.startswith("c.png (replaced): 1 row of 2 images")
    assert "1 image holds NaN" in err
    assert err.splitlines()[-1].endswith(f" seed {odd[1]}")


def test_evaluate_says_which_images_are_not_finite(capfd: pytest.CaptureFixture[str]) -> None:
    Path("half.py").write_text(
        "import torch\n"
        "def model(x, t):\n"
        "    odd = (x.flatten(1)[:, 0] > 1).view(-1, 1, 1, 1) & (t == 500).view(-1, 1, 1, 1)\n"
        "    return torch.where(odd, torch.inf, x / 2)\n"
        "def factory(): return model\n"
    )
    x = initial_noise(torch.arange(10), (10, *embedded.SHAPE))
    odd = [i for i in range(10) if x[i, 0, 0, 0] > 1]
    assert odd
    asked = ("--seeds", "0-9", *FEW, "--shape", "1,28,28", "--model", "half:factory")
    assert main(["generate", *asked, "--out", "out"]) == 3
    capfd.readouterr()
    assert main(["evaluate", "out"]) == 3
    said, err = capfd.readouterr()
    assert said.startswith("FD-clf ")
    assert "NaN or infinity" in err
    assert err.endswith(f" {Seeds.of(odd)}\n")


def test_a_full_disk_is_said_and_what_is_there_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "whole")
    real, calls = os.fsync, iter(range(100))

    def full(file: int) -> None:
        if next(calls) == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"has room, got .*out: No space left on device\. The shards"):
        make(tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert Folder.read(tmp_path / "out").count() == 20
    refused(Folder.read(tmp_path / "out").verify, ValueError, "", "has 20 of 53 images")
    assert make(tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    real = Path.mkdir

    def denied(self: Path, *rest: Any, **options: Any) -> None:
        if self.exists():  # as a read-only file system has it
            return real(self, *rest, **options)
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", denied)
    for name in ("new", "empty"):
        with pytest.raises(
            OSError, match=r"can be written to and has room, got .*: Read-only file"
        ):
            make(tmp_path / name)
    assert make(tmp_path / "out")  # nothing is left to write


@pytest.mark.slow
def test_a_real_disk_that_is_full_and_one_that_is_read_only(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(*options: str) -> None:
        done = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", disk], check=False)
        if done.returncode:
            pytest.skip("this user mounts nothing")

    many: dict[str, Any] = {"n": 2000, "shape": (3, 8, 8), "shard_size": 100}
    make(tmp_path / "whole", **many)
    try:
        mount("-o", "size=200k")
        for _ in range(2):
            with pytest.raises(OSError, match=r"has room, got .*out: No space left on device\."):
                make(disk / "out", **many)
            folder = Folder.read(disk / "out")
            assert 0 < folder.count() < 2000
            for k in range(folder.count() // 100):
                assert (
                    folder.files(k)[0].read_bytes() == content(tmp_path / "whole")[f"{k:05d}.npy"]
                )
        mount("-o", "remount,size=20m,ro")
        calls: list[int] = []

        def counted(x: Tensor, t: Tensor) -> Tensor:
            calls.append(1)
            return x

        for name, model in (("out", MODEL), ("new", counted)):
            with pytest.raises(OSError, match=r"has room, got .*: Read-only file system"):
                make(disk / name, model=model, **many)
        assert not calls
        mount("-o", "remount,rw")
        assert make(disk / "out", **many)
        assert content(disk / "out") == content(tmp_path / "whole")
        mount("-o", "remount,ro")
        assert make(disk / "out", **many)  # nothing is left to write
    finally:
        subprocess.run(["umount", disk], check=False)


def test_a_folder_begun_cannot_be_written_to_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ZeroDivisionError):
        make(tmp_path / "out", progress=lambda n: 1 // n)
    real = Path.open

    def denied(self: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if mode == "wb":
            raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))
        return real(self, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", denied)
    calls: list[int] = []
    with pytest.raises(OSError, match="Read-only file system"):
        make(tmp_path / "out", progress=calls.append)
    assert calls == []  # before the first image is made


def test_checksums_of_another_recipe_do_not_count(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        make(tmp_path / "out", progress=lambda n: 1 // (n < 50))
    for file in (tmp_path / "out").glob("[!.]*"):  # rm out/*
        file.unlink()
    assert Folder.begin(tmp_path / "out", Folder.read(whole_of(tmp_path)).recipe).count() == 0
    assert make(tmp_path / "out", ddim=DDIM(3))
    assert content(tmp_path / "out").items() >= content(tmp_path / "whole").items()


def whole_of(tmp_path: Path) -> Path:
    make(tmp_path / "whole", ddim=DDIM(3))
    return tmp_path / "whole"


def test_a_lost_shard_is_made_again_as_it_was_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "out")
    before = content(tmp_path / "out")
    (tmp_path / "out/00002.npy").unlink()
    refused(Folder.read(tmp_path / "out").verify, ValueError, "", "makes again what is missing")
    assert not Folder.read(tmp_path / "out").finish()
    # A machine that says it is the same and rounds otherwise.
    real = images.to_uint8
    with monkeypatch.context() as patch:
        patch.setattr(images, "to_uint8", lambda x: real(x) ^ 1)
        refused(partial(make, tmp_path / "out"), ValueError, "", "00002.npy", "got other bytes")
    assert not (tmp_path / "out/00002.npy").exists()
    assert make(tmp_path / "out")
    assert content(tmp_path / "out") == before


def test_files_cleared_away_meanwhile_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleared: list[Path] = []
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if target.name == "00002.npy" and len(cleared) < 2:  # the same command, launched twice
            source.unlink()
            cleared.append(source)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    assert make(tmp_path / "out")
    assert len(cleared) == 2
    Folder.read(tmp_path / "out").verify()


def test_grey_npz_files_have_three_channels(tmp_path: Path) -> None:
    make(tmp_path / "out", n=5, shape=(1, 4, 6), format="npz")
    array = np.load(tmp_path / "out/00000.npz")["arr_0"]
    assert (array.shape, array.dtype) == ((5, 4, 6, 3), np.uint8)
    make(tmp_path / "npy", n=5, shape=(1, 4, 6))
    assert np.array_equal(array, np.repeat(np.load(tmp_path / "npy/00000.npy"), 3, axis=3))
    assert torch.equal(pixels(tmp_path / "out"), pixels(tmp_path / "npy"))


def test_the_recipe_knows_packages_and_what_functions_hold(tmp_path: Path) -> None:
    class Decoder(torch.nn.Linear):
        def decode(self, x: Tensor) -> Tensor:
            return pictures(x)

    decoders = [Decoder(2, 2), Decoder(2, 2)]
    given: list[dict[str, Any]] = [
        {"postprocess": decoders[0].decode},
        {"postprocess": decoders[1].decode},
        {"postprocess": partial(torch.mul, other=2)},
        {"postprocess": partial(torch.mul, other=3)},
        {"guidance": np.float32(2), "uncond": dict},
        {"guidance": np.float32(7), "uncond": dict},
        {"guidance": np.array([2.0]), "uncond": dict},
        {"guidance": np.array([7.0]), "uncond": dict},
    ]
    recipe = partial(
        MODULE._recipe,
        DDIM(3),
        MODEL,
        SHAPE,
        range(5),
        4,
        "png",
        10,
        None,
    )
    recipes = [json.dumps(recipe(options)) for options in given]
    assert len(set(recipes)) == len(given)
    assert recipe({})["versions"].keys() >= {"fastddim", "torch", "numpy", "pillow"}
    unet = pytest.importorskip("diffusers").UNet2DModel(
        block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    diffusers = MODULE._recipe(DDIM(3), unet, SHAPE, range(5), 4, "npy", 10, None, {})
    assert "diffusers" in diffusers["versions"]
    ours = MODULE._recipe(
        DDIM(3), embedded.load(), embedded.SHAPE, range(5), 4, "npy", 10, None, {}
    )
    assert "diffusers" not in ours["versions"]


def test_seeds_are_ranges() -> None:
    huge = Seeds([range(5, 6), range(10**12, 2 * 10**12), range(2)])
    assert len(huge) == 10**12 + 3
    assert str(huge) == "5,1000000000000-1999999999999,0-1"
    assert huge[:3] == [5, 10**12, 10**12 + 1]
    assert huge[10**12 - 1 :] == [2 * 10**12 - 2, 2 * 10**12 - 1, 0, 1]
    assert huge[-1] == 1
    assert str(Seeds.parse(str(huge))) == str(huge)
    scattered = [7, 3, 4, 5, 9, 8, 0]
    assert str(Seeds.of(scattered)) == "7,3-5,9,8,0"
    assert list(Seeds.of(scattered)) == scattered
    assert str(Seeds.of(range(0, 6, 2))) == "0,2,4"
    assert str(Seeds.of(range(10**15))) == f"0-{10**15 - 1}"
    refused(lambda: Seeds([range(9), range(20, 30), range(8, 10)]), ValueError, "seeds", "8")


def test_seeds_without_end_begin_at_once(tmp_path: Path) -> None:
    told: list[int] = []

    def tell(n: int) -> None:
        told.append(n)
        if n > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out", seeds=range(10**15), progress=tell)
    assert [n for n, _ in itertools.groupby(told)] == [0, 4, 8, 10, 14, 18, 20, 24]


def test_progress_counts_the_images_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[There] = []
    for rank in (1, 0):
        for name, value in zip(LAUNCHERS, (rank, 2, rank), strict=True):
            monkeypatch.setenv(name, str(value))
        make(tmp_path / "out", progress=told.append)
        assert rank == 0 or told == []
    assert [n for n, _ in itertools.groupby(told)] == [
        23, *(20 + n for n in (7, 11, 13, 17, 21, 23, 27, 31, 33))
    ]  # fmt: skip
    assert {n.total for n in told} == {53}
    assert told[0].left is None
    assert told[-1].left == 0


def test_the_time_left_is_that_of_its_own_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four processes at the same pace, three of which cannot be seen until a shard is whole."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def a_second_each(x: Tensor, t: Tensor) -> Tensor:
        now[0] += 1
        return MODEL.forward(x, t)

    for name, value in zip(LAUNCHERS, (0, 4, 0), strict=True):
        monkeypatch.setenv(name, str(value))
    told: list[tuple[float, There]] = []
    make(
        tmp_path / "out", n=80, shard_size=20, model=a_second_each,
        progress=lambda n: told.append((now[0], n)),
    )  # fmt: skip
    whole = 5 * 3  # five batches of three steps
    timed = [(at, n) for at, n in told if n.left is not None]
    assert timed[0][0] == 1  # after one step, long before the first batch is there
    for at, n in timed:
        assert n.left == pytest.approx(whole - at)
        if n.left and n == 0:
            assert n.rate == pytest.approx(80 / (whole - at))  # of all four, none of them seen yet


@pytest.mark.parametrize("last", [0, 1])
def test_whoever_finishes_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    said: list[tuple[int, int]] = []
    ranks = (1 - last, last, 0, 1)  # the last two find all there
    for rank in ranks:
        for name, value in zip(LAUNCHERS, (rank, 2, rank), strict=True):
            monkeypatch.setenv(name, str(value))
        make(tmp_path / "out", summary=lambda f: said.append((rank, len(f.checksums))))  # noqa: B023
    assert said == [(last, 6), (0, 6)]
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith(".")]


def test_of_two_that_finish_at_once_one_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    clear = Folder._clear_away

    def late(self: Folder) -> None:
        monkeypatch.setattr(Folder, "_clear_away", clear)
        assert make(tmp_path / "out", summary=lambda folder: said.append("other"))
        clear(self)

    monkeypatch.setattr(Folder, "_clear_away", late)
    make(tmp_path / "out", summary=lambda folder: said.append("first"))
    assert len(said) == 1


def test_worker() -> None:
    here = Worker.here
    assert here({}) == (0, 1, 0, False, False)
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    slurm = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "2"}
    assert here(torchrun) == (5, 8, 1, True, False)
    assert here(slurm) == (3, 4, 2, True, False)
    assert here({**slurm, **torchrun}) == (5, 8, 1, True, False)
    assert here({**torchrun, "TORCHELASTIC_RUN_ID": "a"}) == (5, 8, 1, True, True)
    pod = {"RANK": "5", "WORLD_SIZE": "8"}  # one process a machine
    assert here(pod) == (5, 8, 0, True, False)
    # A batch script, in which nothing but the script runs.
    assert here({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"})[:2] == (0, 1)
    refused(lambda: here({**torchrun, "RANK": "8"}), ValueError, "RANK", "[0, 7]", "8")
    refused(lambda: here({**torchrun, "RANK": "-1"}), ValueError, "RANK", "'-1'")


@pytest.mark.slow
def test_torchrun_does_not_start_again_what_is_refused(tmp_path: Path) -> None:
    command = (
        "-m torch.distributed.run --nproc-per-node 2 --max-restarts 3 -m fastddim generate "
        "--seeds 0-9 --out o --format gif"
    )
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels/torch-ext")])
    run = subprocess.run(
        [sys.executable, *command.split()],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode not in (0, 2)
    assert run.stderr.count("fastddim: format must be one of npy, png, npz, got 'gif'") == 1
    assert "exitcode  :" not in run.stderr  # torchrun has seen no process fail
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_ends_the_launcher(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    monkeypatch.setattr("time.sleep", done.append)
    monkeypatch.setattr(os, "kill", lambda *process: done.append(process))
    asked = ("generate", "--seeds", "0-9", "--out", "o")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main([*asked, "--shape", "x"]) == 2
    assert done == [2, (os.getppid(), signal.SIGTERM), 30]
    done.clear()
    for name, value in zip(LAUNCHERS, (0, 2, 0), strict=True):
        monkeypatch.setenv(name, str(value))
    assert main([*asked, "--format", "gif"]) == 2
    assert done == [0, (os.getppid(), signal.SIGTERM), 30]
    assert capfd.readouterr().err.count("got 'gif'") == 1
    # What may pass, such as a full disk, is worth another start.
    done.clear()
    error = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Folder, "begin", lambda *_: (_ for _ in ()).throw(error))
    assert main(["generate", "--seeds", "0-9", *FEW, "--out", "o"]) == 2
    assert done == []


def test_workers_share_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, local, expected in [(0, 3, "cpu"), (8, 3, "cuda:3"), (1, 3, "cuda:0")]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert str(Worker(local, 8, local, True).device()) == expected


def test_conditions_follow_seeds_and_postprocess_sees_batches(tmp_path: Path) -> None:
    sizes: list[int] = []

    def model(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return 0.1 * x + c.view(-1, 1)

    def cond(seeds: list[int]) -> dict[str, Tensor]:
        return {"c": torch.tensor(seeds).float()}

    def uncond(seeds: list[int]) -> dict[str, Tensor]:
        return {"c": torch.zeros(len(seeds))}

    def decode(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x.double()

    ddim = DDIM(2)
    make(tmp_path / "out", ddim=ddim, model=model, n=13, shape=(5,), cond=cond, uncond=uncond,
         guidance=3.0, postprocess=decode)  # fmt: skip
    assert set(sizes) == {4}
    found = np.concatenate([np.load(tmp_path / f"out/0000{k}.npy") for k in range(2)])
    expected = ddim.sample(model, shape=(13, 5), seeds=range(13), cond=cond(list(range(13))),
                           uncond=uncond(list(range(13))), guidance=3.0)  # fmt: skip
    assert found.dtype == np.float64
    assert np.array_equal(found, expected.double().numpy())


def test_postprocess_gives_a_row_for_each(tmp_path: Path) -> None:
    call = partial(make, tmp_path / "out", postprocess=lambda x: x[:3])
    refused(call, ValueError, "postprocess must give a row", "(3, 3, 4, 6)")
    call = partial(make, tmp_path / "png", postprocess=lambda x: x, format="png")
    refused(call, ValueError, "postprocess must give uint8", "float32 (10, 3, 4, 6)")


def test_another_engine_takes_the_shard_function(tmp_path: Path) -> None:
    ddim = DDIM(3, eta=1.0)
    make(tmp_path / "out", ddim=ddim)
    parts = [range(first, min(first + 10, 53)) for first in range(0, 53, 10)]
    with ThreadPoolExecutor(2) as pool:
        arrays = list(pool.map(partial(shard, ddim, MODEL, SHAPE, batch_size=4), parts))
    for k, array in enumerate(arrays):
        assert np.array_equal(array, np.load(tmp_path / f"out/{k:05d}.npy"))


FEW = ("--steps", "2", "--batch-size", "4", "--shard-size", "8", "--device", "cpu")


def test_the_command(capfd: pytest.CaptureFixture[str]) -> None:
    asked = ("generate", "--seeds", "0-9,20", *FEW, "--eta", "1", "--spacing", "quad")
    assert main([*asked, "--out", "out"]) == 0
    assert capfd.readouterr() == ("out: 11 images\n", "0 of 11 images are there\n")
    made = Folder.read(Path("out"))
    ddim = DDIM(2, eta=1.0, spacing="quad")
    x = torch.cat(list(draw.by_seed(ddim, embedded.load(), [*range(10), 20], embedded.SHAPE, 4)))
    assert torch.equal(pixels(Path("out")), images.to_uint8(x))
    assert made.recipe["dtype"] == "torch.float32"
    assert main(["generate", "--verify", "out"]) == 0
    assert capfd.readouterr() == ("out: 11 images, each as it was made\n", "")
    assert main([*asked, "--out", "out", "--quiet"]) == 0
    assert main(["generate", "--verify", "out", "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")
    assert main([*asked, "--out", "out", "--eta", "0"]) == 2
    assert "eta (1.0 there, 0.0 here)" in capfd.readouterr().err
    Path("out/00001.npy").unlink()
    assert main(["generate", "--verify", "out"]) == 2
    assert capfd.readouterr().err == (
        "fastddim: out is not as it was made: 00001.npy is missing. Remove what has changed, and "
        "the command that made it makes again what is missing\n"
    )


def test_the_command_in_bfloat16() -> None:
    asked = ("generate", "--seeds", "0-3", *FEW)
    assert main([*asked, "--out", "half", "--dtype", "bfloat16"]) == 0
    x = DDIM(2).sample(embedded.load(), shape=(4, *embedded.SHAPE), seeds=range(4))
    difference = (pixels(Path("half")).int() - images.to_uint8(x).int()).abs()
    assert 0 < difference.max() <= 16


def test_who_speaks_of_several_processes(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("mine.py").write_text("def model(): return lambda x, t: x / 2\n")
    asked = ("generate", "--seeds", "0-9", *FEW, "--model", "mine:model", "--shape", "1,2,2")
    for rank, expected in ((0, ""), (1, "out: 10 images\n")):  # the last one to end
        for name, value in zip(LAUNCHERS, (rank, 2, rank), strict=True):
            monkeypatch.setenv(name, str(value))
        assert main([*asked, "--out", "out"]) == 0
        out, err = capfd.readouterr()
        assert out == expected
        assert err.startswith("model mine:model") if rank == 0 else err == ""
    assert main(["generate", "--verify", "out"]) == 0


def test_the_command_refuses(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for said, asked in {
        "seeds must be given": ("--out", "o"),
        "out must be given": ("--seeds", "1"),
        "verify must be given alone": ("--verify", "o", "--seeds", "1"),
        "a folder must be one that fastddim generate has made": ("--verify", "o"),
        "seeds must be there once each, got 5 twice": ("--seeds", "0-9,5", "--out", "o"),
        "dtype must be one of float32, bfloat16, float16": (
            "--seeds", "1", "--out", "o", "--dtype", "int8",
        ),
        "format must be one of npy, png, npz": ("--seeds", "1", "--out", "o", "--format", "gif"),
        "shard-size must be": ("--seeds", "1", "--out", "o", "--shard-size", "0"),
    }.items():  # fmt: skip
        assert main(["generate", *asked]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith(f"fastddim: {said}"), err
        assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert main(["generate", "--seeds", "0-9", *FEW, "--out", "out"]) == 0
    assert "generating" in terminal.getvalue()
    assert "10/10" in terminal.getvalue()
    assert "images/s" in terminal.getvalue()


def test_threads_are_those_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    try:
        assert main(["generate", "--seeds", "0-3", *FEW, "--out", "two", "--threads", "2"]) == 0
        assert Folder.read(Path("two")).recipe["threads"] == 2
    finally:
        torch.set_num_threads(before)
    assert main(["generate", "--seeds", "0-3", *FEW, "--out", "no", "--threads", "0"]) == 2
    assert "threads must be an integer in [1, 1024], got 0" in capfd.readouterr().err
    assert not Path("no").exists()


def test_evaluate_measures_garments(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--seeds", "0-9", *FEW, "--out", "out"]) == 0
    capfd.readouterr()
    assert main(["evaluate", "out"]) == 0
    real = distance.load()
    x = images.from_uint8(pixels(Path("out")))
    expected = frechet_distance(real.critic.features(x), real.moments)
    assert capfd.readouterr() == (
        f"FD-clf {expected:.4f} of 10 images; as many real garments {real.floor(10):.4f} "
        f"± {real.spread(10):.4f}\n", "",
    )  # fmt: skip
    Path("out/00001.npy").write_bytes(b"")
    assert main(["evaluate", "out"]) == 2
    assert "00001.npy has changed" in capfd.readouterr().err


def test_evaluate_compares_nothing_else_with_garments(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make(tmp_path / "out")
    assert main(["evaluate", "out"]) == 2
    assert "FD-clf compares garments of 1x28x28, got images of 3x4x6" in capfd.readouterr().err
    assert main(["evaluate", "nothing"]) == 2
    assert "nothing, which does not exist" in capfd.readouterr().err


def test_fid_is_torch_fidelitys_or_nothing(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "out")
    (tmp_path / "real").mkdir()
    asked = ("evaluate", "out", "--device", "cpu", "--fid", "real")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert main(asked) == 2
    assert "pip install 'fastddim[fid]'" in capfd.readouterr().err

    given: dict[str, Any] = {}

    def calculate_metrics(**options: Any) -> dict[str, float]:
        given.update(options)
        return {"frechet_inception_distance": 12.5}

    fake = SimpleNamespace(calculate_metrics=calculate_metrics)
    monkeypatch.setitem(sys.modules, "torch_fidelity", fake)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    assert main(asked) == 2
    err = capfd.readouterr().err
    assert f"got no file {tmp_path}/hub/checkpoints/{evaluate.INCEPTION}" in err
    Path("others.pth").write_bytes(b"no inception")
    assert main([*asked, "--inception", "others.pth"]) == 2
    assert "its features would not make a FID" in capfd.readouterr().err
    assert not given

    Path("weights.pth").write_bytes(b"inception")
    begins = hashlib.sha256(b"inception").hexdigest()[:8]
    monkeypatch.setattr(evaluate, "INCEPTION", f"weights-inception-{begins}.pth")
    assert main([*asked, "--inception", "weights.pth"]) == 0
    assert capfd.readouterr() == ("FID 12.5000 of 53 images to real\n", "")
    assert given["input2"] == "real"
    assert (given["fid"], given["cuda"], given["cache"]) == (True, False, False)
    assert given["feature_extractor_weights_path"] == "weights.pth"
    assert len(given["input1"]) == 53
    shown = torch.stack([given["input1"][i] for i in (52, *range(52))])
    assert torch.equal(shown, pixels(tmp_path / "out").roll(1, 0))
    assert main([*asked[:-1], "out", "--inception", "weights.pth"]) == 0
    assert len(given["input2"]) == 53


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["--tree"]])
def test_real_kills(how: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.kills", "--trials", "2", "--count", "501", *how],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith("2 of 2 trials complete and byte-identical\n")
