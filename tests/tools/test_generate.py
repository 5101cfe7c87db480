"""``fastddim generate`` and ``fastddim evaluate`` on folders of images."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastddim import DDIM, embedded
from fastddim.__main__ import main
from fastddim.tools import distance, draw, evaluate, images
from fastddim.tools.folder import Folder
from fastddim.tools.quality import frechet_distance
from tests.tools.sharding import FEW, LAUNCHERS, _alone, make, pixels

__all__ = ["_alone"]


def test_the_command(capfd: pytest.CaptureFixture[str]) -> None:
    asked = ("generate", "--seeds", "0-9,20", *FEW, "--eta", "1", "--spacing", "quad")
    assert main([*asked, "--out", "out"]) == 0
    assert capfd.readouterr() == ("out: 11 images\n", "0 of 11 images are finished\n")
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
        "fastddim: out is not as it was made: 00001.npy is missing. Remove the changed files, and "
        "the command that made it makes missing files again\n"
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
        "seeds must occur once each, got 5 twice": ("--seeds", "0-9,5", "--out", "o"),
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
