"""Pictures and tables, several processes, help, and imports."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastddim
from fastddim import DDIM, embedded
from fastddim.__main__ import main
from fastddim.cli import bars, values
from fastddim.step import backends
from fastddim.tools import draw, images, sheet
from fastddim.tools.reconstruction import errors
from tests.cli.commands import FEW, QUICK, _here, no_work, refused, told
from tests.processes import ran

__all__ = ["_here", "no_work", "refused"]


# Pictures.


def test_a_picture_knows_what_it_was_made_from() -> None:
    assert main(["sample", *FEW, "--seeds", "5, 8-9", "--eta", "1", "--spacing", "quad"]) == 0
    found = sheet.recipe_of(Path("garments.png"))
    asked = {
        "command": "sample",
        "seeds": "5,8-9",
        "steps": 2,
        "eta": 1.0,
        "spacing": "quad",
        "batch_size": 2,
    }
    assert found.items() >= asked.items()
    assert found["versions"]["fastddim"] == fastddim.__version__
    assert found["device"].endswith(f"threads: {torch.get_num_threads()}")
    Image.new("L", (3, 3)).save("other.png")
    assert sheet.recipe_of(Path("other.png")) == {}


@pytest.mark.parametrize(
    ("command", "rest", "rows", "columns"),
    [
        ("sample", ["--seeds", "0-3"], 2, 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("interpolate", ["--seeds", "0-3", "--columns", "3"], 2, 3),
                ("sequence", ["--seeds", "0-1"], 2, 2),
                ("reconstruct", ["--seeds", "0-1", "--out", "reconstruct.png"], 2, 2),
            )
        ),
    ],
)
def test_labels_stand_beside_the_images(
    command: str, rest: list[str], rows: int, columns: int
) -> None:
    if command == "reconstruct":
        rest = [*rest, "--steps", "1"]
    else:
        rest = [*rest, "--out", f"{command}.png"]
    steps = [] if command == "reconstruct" else ["--steps", "2"]
    assert main([command, *QUICK, *steps, *rest]) == 0
    with Image.open(f"{command}.png") as picture:
        bare = np.array(picture)
    assert main([command, *QUICK, *steps, *rest, "--labels"]) == 0
    with Image.open(f"{command}.png") as picture:
        labelled = np.array(picture)
    height, width = bare.shape
    if command == "sample":  # each image has its seed below it
        assert labelled.shape == (height + rows * sheet.HEIGHT, width)
        assert np.array_equal(labelled[2:30], bare[2:30])
        assert labelled[30 : 30 + sheet.HEIGHT].max() > 100
    else:
        assert np.array_equal(labelled[-height:, -width:], bare)
        assert labelled[:, :-width].max() > 100  # the rows'
    assert (columns, rows) > (0, 0)


# Tables.


def test_a_table_is_not_broken_where_it_is_piped(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS")
    names = [f"a long name {i}" for i in range(12)]
    bars.print_table("A heading " * 20, names, [["1" * 10] * 12])
    heading, head, row = capfd.readouterr().out.splitlines()
    assert heading == "A heading " * 20
    assert " ".join(head.split()) == " ".join(names)
    assert row.split() == ["1" * 10] * 12


# What is installed.


def test_info(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert out.startswith(f"fastddim {fastddim.__version__}, Python ")
    assert f"torch {torch.__version__}" in out
    assert "fastddim[cli] is installed: the command line" in out
    line = next(line for line in out.splitlines() if line.startswith("cpu: "))
    takes = backends.backend("cpu").name
    assert line.endswith("a step is one pass compiled by numba") == (takes == "numba")


def test_info_says_what_an_extra_would_add(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastddim.cli.info.util.find_spec", lambda name: None)
    with backends.using("torch"):
        assert main(["info"]) == 0
    out = capfd.readouterr().out
    assert "a step is PyTorch's own operations" in out
    assert "fastddim[cpu] would add a step on a CPU as one fused pass" in out
    assert "(numba missing): pip install 'fastddim[cpu]'" in out


# Under a launcher.


@pytest.mark.parametrize(
    "asked",
    [
        ["--spacing", "even"],
        ["--steps", "1001"],
        ["--nonsense"],
        ["--steps", "many"],
        ["--checkpoint", "none"],
        ["--dtype", "int8"],
    ],
)
def test_a_refusal_is_said_once(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    said = []
    for restart in ("0", "1"):
        for rank in ("0", "1", "2"):
            monkeypatch.setenv("RANK", rank)
            monkeypatch.setenv("LOCAL_RANK", rank)
            monkeypatch.setenv("WORLD_SIZE", "3")
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart)
            command = ["generate", "--seeds", "0", "--out", "out", "--device", "cpu", *asked]
            assert main(command) == 2
            said.append(capfd.readouterr().err.count("\n"))
    assert said == [1, 0, 0, 0, 0, 0]


def test_a_fault_of_one_process_is_said_by_that_process(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert main(["generate", "--seeds", "0", "--out", "nowhere/out", "--device", "cpu"]) == 2
    assert "nowhere/out" in capfd.readouterr().err


def test_generate_speaks_at_once_and_soon_after(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 2.0, 5.0, 64.0, 65.0, 66.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    for quiet in (True, False):
        with bars.bar_of_images(100, quiet) as there:
            for n in (0, 4, 8, 12):
                there(told(n))
            there(told(20, 162.4, 0.5))
            there(told(100, 0, 0.5))
    assert capfd.readouterr().err.splitlines() == [
        "0 of 100 images are finished",
        "8 of 100 images are finished",
        "20 of 100 images, 0.5 images/s, 0:02:42 left",
    ]


def test_who_ends_last_has_the_last_word(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("generate", "--seeds", "0-9", "--steps", "2", "--batch-size", "4", "--shard-size", "8")
    found = []
    for rank in ("0", "1", "1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main([*asked, "--device", "cpu", "--out", "out"]) == 0
        found.append(capfd.readouterr())
    assert [out for out, _ in found] == ["", "out: 10 images\n", "", "out: 10 images\n"]
    assert found[0].err.splitlines()[-1] == (
        "out: 8 of 10 images; other processes still make the rest, and fastddim generate "
        "--verify out tells when all are finished"
    )


# Help and start.


def test_help_and_version_import_no_torch() -> None:
    code = (
        "import sys\n"
        "from fastddim.__main__ import main\n"
        "for asked in (['--version'], ['--help'], ['sample', '--help'], ['profile', '--help'],\n"
        "              ['sample', '--seeds', 'x'], ['sample', '--spacing', 'even'],\n"
        "              ['generate', '--seeds', '1', '--out', 'o', '--eta', 'hut']):\n"
        "    main(asked)\n"
        "found = {'torch', 'numpy', 'triton', 'diffusers', 'PIL', 'jinja2'} & set(sys.modules)\n"
        "sys.exit(str(found) if found else 0)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(fastddim.__file__).parents[1],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


def test_a_sample_of_the_garment_model_imports_no_diffusers(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('diffusers', 'transformers', 'torchvision', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "from fastddim.__main__ import main\n"
        f"sys.exit(main(['sample', '--seeds', '0', '--steps', '1', '--batch-size', '1',\n"
        f"               '--device', 'cpu', '--out', {str(tmp_path / 'a.png')!r}]))\n"
    )
    done = ran(code, strict=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_diffusers_is_imported_without_what_a_unet_does_not_use() -> None:
    code = (
        "import sys\n"
        "from fastddim.cli.network import HIDDEN, lean_imports\n"
        "with lean_imports():\n"
        "    from diffusers.models.unets.unet_2d import UNet2DModel\n"
        "assert not set(HIDDEN) & set(sys.modules)\n"
        "import transformers\n"  # the process is as it was
    )
    done = ran(code, strict=False)
    assert done.returncode == 0, done.stderr


def test_a_spinner_shows_before_torch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    seen: list[str] = []

    def check_png(path: Path) -> Path:
        seen.append(terminal.getvalue())
        raise ValueError("enough")

    monkeypatch.setattr(images, "check_png", check_png)
    assert main(["sample"]) == 2
    assert "loading" in seen[0]


@pytest.mark.slow
def test_diffusers_prints_nothing_while_a_checkpoint_is_loaded() -> None:
    code = (
        "from fastddim.cli.network import lean_imports\n"
        "with lean_imports():\n"
        "    import diffusers, warnings\n"
        "    warnings.warn('of no use here')\n"
        "    diffusers.utils.logging.get_logger('diffusers.models').warning('nor this')\n"
    )
    done = ran(code, strict=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["generated npy", "generated png", "PNGs", "one PNG"])
def test_reconstruct_reads_folders_and_pngs(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    given: list[torch.Tensor] = []
    plain = errors

    def kept(ddims: Any, model: Any, x0: torch.Tensor, **rest: Any) -> Any:
        given.append(x0)
        return plain(ddims, model, x0, **rest)

    monkeypatch.setattr("fastddim.tools.reconstruction.errors", kept)
    asked = ["generate", "--seeds", "0-4", *FEW, "--shard-size", "2", "--quiet", "--out", "out"]
    assert main([*asked, "--format", "npy" if kind == "generated npy" else "png"]) == 0
    x = torch.cat(list(draw.by_seed(DDIM(2), embedded.load(), range(5), embedded.SHAPE, 2)))
    path, n = "out", 3
    if kind == "PNGs":
        Path("out/manifest.json").unlink()
    elif kind == "one PNG":
        path, n = "out/000/000000.png", 1
    assert main(["reconstruct", *QUICK, "--images", path, "--count", str(n), "--steps", "1"]) == 0
    assert torch.equal(given[-1], images.from_uint8(images.to_uint8(x))[:n])
    assert f"The first {values.counted(n, 'image')} of {path}" in capfd.readouterr().out


@pytest.mark.usefixtures("no_work")
def test_folders_and_pngs_that_do_not_fit_are_refused(refused: Callable[..., str]) -> None:
    os.mkdir("empty")
    os.mkdir("few")
    Image.new("L", (28, 28)).save("few/a.png")
    Image.new("RGB", (28, 28)).save("colour.png")
    Image.new("L", (5, 4)).save("small.png")
    Path("cut.png").write_bytes(Path("colour.png").read_bytes()[:40])
    for path, said in {
        "empty": "got empty, which holds none",
        "colour.png": "28x28 with 1 channel, got 28x28 with 3 channels in colour.png",
        "small.png": "28x28 with 1 channel, got 4x5 with 1 channel in small.png",
        "cut.png": "got cut.png: ",
    }.items():
        assert said in refused("reconstruct", "--images", path, "--device", "cpu")
    said = refused("reconstruct", "--images", "few", "--count", "2", "--device", "cpu")
    assert "count must be an integer in [1, 1] for few, got 2" in said


def test_a_folder_that_cannot_be_made_has_no_shards(refused: Callable[..., str]) -> None:
    said = refused("generate", "--seeds", "0", "--device", "cpu", "--out", "/proc/q")
    assert "can be written to and has room, got /proc/q" in said
    assert "shards" not in said
