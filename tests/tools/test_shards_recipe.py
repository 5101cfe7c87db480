"""The manifest: the recipe of a folder, and what another recipe, or more seeds, make of it."""

from __future__ import annotations

import contextlib
import copy
import errno
import importlib
import inspect
import json
import os
import pickle
import pkgutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastddim
from fastddim import DDIM, NoiseSchedule, embedded
from fastddim.step import backends
from fastddim.tools import provenance
from fastddim.tools.folder import FORMATS, MANIFEST, Folder
from fastddim.tools.quality import Gaussian
from fastddim.tools.seeds import Seeds
from fastddim.tools.shards import Worker, shard
from tests.paths import CPU, use
from tests.refusals import refused
from tests.tools.sharding import LAUNCHERS, Killed, _alone, content, make, spoilt

__all__ = ["_alone"]


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
            noted(importlib.import_module("fastddim.step.on_numba").Calls, "__call__", "numba")
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
    "cond (None there, 'tests.tools.test_shards_recipe.": {"cond": lambda seeds: {}},
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
        said = "threads (1 there, 2 here). Use the same number of threads: --threads 1"
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


@pytest.mark.one_in(2)
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
        "seeds must occur once each, got 3 twice": {"seeds": [1, 2, 3, 3]},
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
