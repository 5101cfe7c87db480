"""Several processes, seeds, conditions, and progress of one folder of images."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastddim import DDIM, embedded
from fastddim.__main__ import main
from fastddim.tools.folder import Folder
from fastddim.tools.pace import Count
from fastddim.tools.seeds import Seeds
from fastddim.tools.shards import Worker, pictures, shard
from tests.refusals import refused
from tests.tools.sharding import FEW, LAUNCHERS, MODEL, MODULE, SHAPE, _alone, make, pixels

__all__ = ["_alone"]


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
    told: list[Count] = []
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
    told: list[tuple[float, Count]] = []
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
    real, own = time.sleep, threading.get_ident()

    def sleep(seconds: float) -> None:  # threads that other tests have left may sleep too
        done.append(seconds) if threading.get_ident() == own else real(seconds)

    monkeypatch.setattr("time.sleep", sleep)
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
