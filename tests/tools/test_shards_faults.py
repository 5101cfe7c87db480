"""Images that are not finite, disks that are full, and files that are lost."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim import DDIM, embedded
from fastddim.__main__ import main
from fastddim.step.op import initial_noise
from fastddim.tools import images
from fastddim.tools.folder import FORMATS, MANIFEST, Folder
from fastddim.tools.seeds import Seeds
from fastddim.tools.shards import shard
from tests.refusals import refused
from tests.tools.sharding import FEW, LAUNCHERS, MODEL, SHAPE, _alone, content, make, spoilt

__all__ = ["_alone"]


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
    refused(Folder.read(tmp_path / "out").verify, ValueError, "", "makes missing files again")
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


def test_a_kill_while_parts_are_removed_leaves_nothing(tmp_path: Path) -> None:
    """Killed between the renaming of .parts and its removal, a process leaves the new name."""
    make(tmp_path / "out")
    before = content(tmp_path / "out")
    left = Folder.read(tmp_path / "out")._parts.with_suffix(".gone")
    left.mkdir()
    (left / "0.done").write_text("")
    assert make(tmp_path / "out")
    assert not left.exists()
    assert content(tmp_path / "out") == before
