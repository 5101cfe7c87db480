"""A profile's times, memory and distances, against samplers and models whose own are known."""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastddim import DDIM, checkpoints, embedded, profile
from fastddim.__main__ import main
from fastddim.embedded import classifier
from fastddim.loop import options
from fastddim.tools import distance, draw, images
from fastddim.tools.quality import GaussianMixture, Moments, frechet_distance, moments
from fastddim.training.distance import measured
from tests.paths import ALL, here, use
from tests.refusals import refused

CPU = ("--device", "cpu")
TINY = (*CPU, "--steps", "1,2", "--eta", "0,hat", "--seeds", "0-2", "--batch-size", "2")
ORACLE = ("profile", *TINY, "--oracle")
HEAD = "S eta update ms model ms images/s MB FD-clf real"
FILES = ["profile.csv", "profile.html", "profile.json", "profile.png"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def kept(folder: str = "profile") -> dict[str, Any]:
    return dict(json.loads(Path(folder, "profile.json").read_text()))


class Slow(nn.Module):
    """Takes 20 ms and 8 MB beside its input, and 1 MB of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(250_000))
        self.calls: list[int] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.append(len(x))
        time.sleep(0.02)
        return x * torch.ones(2_000_000)[0]


# Cells


def test_times_and_memory_are_the_models_and_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = options.prepare

    def slow(*arguments: Any, **rest: Any) -> Any:
        time.sleep(0.012)  # once a batch, outside the model
        return plain(*arguments, **rest)

    monkeypatch.setattr("fastddim.loop.sampler.prepare", slow)
    [cell] = profile.cells([DDIM(6)], Slow(), range(5), (1, 4, 4), 2, device="cpu")
    # Other work on the machine can only add.
    assert cell.model_ms >= 20
    assert 2 <= cell.update_ms < cell.model_ms
    assert cell.images_per_second == pytest.approx(2e3 / (6 * (cell.model_ms + cell.update_ms)))
    assert cell.memory_mb == pytest.approx(9, abs=0.2)
    assert (cell.steps, cell.eta, cell.distance, cell.floor) == (6, 0.0, None, None)


def test_times_are_medians_of_the_batches() -> None:
    class Sometimes(Slow):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            if len(self.calls) == 12:  # in one batch of five
                time.sleep(1)
            return super().forward(x, t)

    [cell] = profile.cells([DDIM(2)], Sometimes(), range(5), (4,), 1, device="cpu")
    assert cell.model_ms < 80  # and not 120, the mean


def test_cells_draw_what_by_seed_draws_and_ask_the_judge() -> None:
    model, given = profile.oracle(), []

    def compare(x: Tensor) -> float:
        given.append(x)
        return 0.25

    judge = profile.Judge("mine", compare, lambda n: n / 10)
    ddims = profile.grid([3, 2], [1.0, 0.0], "quad")
    assert [(d.steps, d.eta, d.spacing) for d in ddims] == [
        (S, eta, "quad") for S in (3, 2) for eta in (1, 0)
    ]
    ticks: list[int] = []

    def progress(steps: Any) -> Iterator[Any]:
        for step in steps:
            ticks.append(step)
            yield step

    found = list(
        profile.cells(
            ddims, model, [7, 3, 9], (64,), 2, judge=judge, device="cpu", progress=progress
        )
    )
    for ddim, cell, x in zip(ddims, found, given, strict=True):
        assert (cell.steps, cell.eta, cell.distance, cell.floor) == (
            ddim.steps,
            ddim.eta,
            0.25,
            0.3,
        )
        assert torch.equal(x, torch.cat(list(draw.by_seed(ddim, model, [7, 3, 9], (64,), 2))))
    assert len(ticks) == profile.model_calls(ddims, 3, 2) == 2 * (3 + 3 + 2 + 2)


def test_nonsense_is_refused_before_any_work() -> None:
    model = Slow()
    judge = profile.mixture(profile.oracle())

    def asked(seeds: Any = (1, 2), size: Any = 2, **rest: Any) -> Callable[[], Any]:
        return lambda: profile.cells([DDIM(1)], model, seeds, (64,), size, device="cpu", **rest)

    refused(asked(size=0), ValueError, "batch_size must be")
    refused(asked([]), ValueError, "seeds must be 1 or more")
    refused(asked([1], judge=judge), ValueError, "seeds must be 2 or more, got 1")
    refused(asked([1, -2]), ValueError, "seeds[1] must be")
    refused(lambda: profile.grid([], [0.0]), ValueError, "steps must be one or more")
    refused(lambda: profile.grid([5], []), ValueError, "eta must be one or more")
    refused(lambda: profile.grid([5, 6, 5], [0.0]), ValueError, "steps must differ", "got 5 twice")
    refused(lambda: profile.grid([5], [1, 1.0]), ValueError, "eta must differ", "got 1.0 twice")
    said = ("eta must be at most", "got 9 (steps 100, eta 9)")
    refused(lambda: profile.grid([1, 100], [0, 9]), ValueError, *said)
    assert not model.calls


# Judges


def test_the_papers_order_appears_on_the_oracle() -> None:
    # Table 1, its columns S = 10 and S = 50. Seeds are fixed, and η = 0.2 is nearly η = 0.
    data = profile.oracle()
    ddims = profile.grid([10, 50], [0.0, 0.5, 1.0, "hat"])
    judge = profile.mixture(data)
    cells = profile.cells(ddims, data, range(256), (64,), 256, judge=judge, device="cpu")
    at_10, at_50 = np.array([cell.distance for cell in cells], float).reshape(2, 4)
    zero, half, one, hat = at_10
    assert zero < half < one < hat
    assert one > 1.2 * zero
    assert hat > 5 * one
    assert at_50[0] == min(at_50)
    assert (at_50 < at_10).all()
    assert at_50[3] < 2 * at_50[0]  # σ̂ is no longer far off


def test_the_mixtures_moments_are_exact() -> None:
    data = GaussianMixture(torch.tensor([[1.0, 0, 2], [-3, 1, 0]]), [0.5, 2.0], [3.0, 1.0])
    x = data.sample(400_000, torch.Generator().manual_seed(0), torch.float64)
    exact, fitted = data.moments(), moments(x)
    assert torch.allclose(exact.mean, fitted.mean, atol=0.02)
    assert torch.allclose(exact.root.T @ exact.root, fitted.root.T @ fitted.root, atol=0.05)
    assert frechet_distance(x, exact) < 1e-3
    shifted = Moments(exact.mean + torch.tensor([0.0, 3, 4]), exact.root)
    assert frechet_distance(shifted, exact) == pytest.approx(25)


def test_the_mixtures_floor_is_what_its_own_draws_score() -> None:
    data = profile.oracle()
    judge = profile.mixture(data)
    draws = [
        judge.distance(data.sample(100, torch.Generator().manual_seed(k))) for k in range(9, 19)
    ]
    assert judge.floor(100) == pytest.approx(float(np.mean(draws)), rel=0.1)
    assert judge.floor(100) > 2 * judge.floor(400)
    assert judge.spread is not None
    assert judge.spread(100) == pytest.approx(float(np.std(draws, ddof=1)), rel=0.7)
    assert min(draws) < judge.floor(100)  # it is no bound


def test_fd_clf_is_the_distance_of_the_classifiers_features() -> None:
    judge = profile.garments()
    x = torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 3 - 1.5
    real = distance.load()
    pictures = images.to_uint8(x).float() / 127.5 - 1
    features = classifier.load().features(pictures)
    assert judge.name == "FD-clf"
    assert judge.distance(x) == pytest.approx(frechet_distance(features, real.moments), rel=1e-6)
    assert judge.distance(x) > 3 * judge.floor(20)  # noise is no garment
    floors = [judge.floor(n) for n in distance.SIZES]
    assert floors == pytest.approx(real.floors.tolist())
    # At the last the rest is no larger than what is compared with it.
    assert floors[:-1] == sorted(floors[:-1], reverse=True)
    assert floors[6] > judge.floor(200) > floors[7]
    assert judge.floor(9000) == floors[-1]


def test_the_floors_images_are_not_the_references() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(5))
    expected = frechet_distance(real[order[:20]], real[order[20:]])
    again = torch.Generator().manual_seed(5)
    assert measured(real, 20, 1, again)[0] == pytest.approx(expected)
    draws = []
    again = torch.Generator().manual_seed(5)
    for _ in range(50):
        order = torch.randperm(60, generator=again)
        draws.append(frechet_distance(real[order[:20]], real[order[20:]]))
    again = torch.Generator().manual_seed(5)
    found = measured(real, 20, 50, again)
    assert found == pytest.approx((np.mean(draws), np.std(draws)))


def test_a_file_of_something_else_is_no_reference(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no features of garments"):
        distance.load(classifier.WEIGHTS)
    with pytest.raises(FileNotFoundError, match="no file"):
        distance.load(tmp_path / "none")


# The command


def test_a_profile(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *TINY, "--spacing", "quad"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    found = kept()
    assert [(c["steps"], c["eta"]) for c in found["cells"]] == [
        (1, 0),
        (1, "hat"),
        (2, 0),
        (2, "hat"),
    ]
    asked = {"seeds": "0-2", "batch_size": 2, "distance": "FD-clf"}
    assert found["settings"].items() >= asked.items()
    assert {(c["order"], c["spacing"]) for c in found["cells"]} == {(1, "quad")}
    drawn = list(draw.by_seed(DDIM(2, spacing="quad"), embedded.load(), range(3), (1, 28, 28), 2))
    judge = profile.garments()
    assert found["cells"][2]["distance"] == pytest.approx(judge.distance(torch.cat(drawn)))
    assert {c["floor"] for c in found["cells"]} == {judge.floor(3)}
    # Weights in float32, and a batch's activations.
    assert all(7.4 < c["memory_mb"] < 20 for c in found["cells"])

    with Path("profile", "profile.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{k: str(v) for k, v in c.items()} for c in found["cells"]]

    lines = out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split()[:2] == ["S", "eta"])
    assert lines[head].split() == HEAD.split()
    for line, c in zip(lines[head + 1 :], found["cells"], strict=False):
        shown = line.split()
        assert shown[:2] == [str(c["steps"]), profile.label(c["eta"])]
        assert float(shown[2]) == pytest.approx(c["update_ms"], abs=1e-3)
        assert shown[-4:] == [
            *(f"{c['distance']:.3f}", f"{c['floor']:.3f}"),
            *("±", f"{c['spread']:.3f}"),
        ]
    assert lines[-1] == f"profile: {', '.join(FILES)}"
    with Image.open("profile/profile.png") as picture:
        assert picture.width > 1500


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, asked, most = draw.by_seed, [], 3

    def by_seed(ddim: DDIM, *arguments: Any, **rest: Any) -> Any:
        if "device" in rest:
            asked.append((ddim.steps, ddim.eta))
        if len(asked) == most:
            raise KeyboardInterrupt
        return plain(ddim, *arguments, **rest)

    monkeypatch.setattr(draw, "by_seed", by_seed)
    assert main(ORACLE) == 130
    out, err = capfd.readouterr()
    assert err == "fastddim: interrupted\n"
    assert "hat" in out
    first = kept()
    assert [(c["steps"], c["eta"]) for c in first["cells"]] == [(1, 0), (1, "hat")]
    assert sorted(os.listdir("profile")) == FILES

    asked.clear()
    most = 99
    assert main(ORACLE) == 0
    assert asked == [(2, 0), (2, "hat")]
    whole = kept()
    assert whole["cells"][:2] == first["cells"]
    assert len(whole["cells"]) == 4
    # A larger grid goes on too, and what was measured stays.
    assert main([*ORACLE, "--steps", "3,2", "--eta", "1"]) == 0
    assert [(c["steps"], c["eta"]) for c in kept()["cells"][4:]] == [(3, 1), (2, 1)]
    assert kept()["cells"][:4] == whole["cells"]
    capfd.readouterr()
    asked.clear()
    assert main(ORACLE) == 0
    assert asked == []
    assert capfd.readouterr().out.count("\n") == 3 + 6 + 1


def test_a_cell_half_written_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(ORACLE) == 0
    before = Path("profile", "profile.json").read_bytes()

    def fsync(_: int) -> None:
        raise OSError(28, "disk full")

    monkeypatch.setattr(os, "fsync", fsync)
    assert main([*ORACLE, "--steps", "3"]) == 2
    assert Path("profile", "profile.json").read_bytes() == before
    assert sorted(os.listdir("profile")) == FILES


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", here(*ALL))
def test_a_profile_names_the_backend_that_takes_its_steps(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with use(name):
        assert main([*ORACLE, "--steps", "1", "--eta", "0"]) == 0
    assert kept()["settings"]["backend"] == name
    assert f", steps by {name}. " in " ".join(capfd.readouterr().out.split())


def test_a_profile_does_not_go_on_with_another_backend(capfd: pytest.CaptureFixture[str]) -> None:
    with use("torch"):
        assert main(ORACLE) == 0
    with use("triton"):
        assert main(ORACLE) == 2
    assert capfd.readouterr().err.endswith(" with backend torch there and triton here\n")


def test_other_settings_are_refused_and_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(ORACLE) == 0
    before = {path: path.read_bytes() for path in Path("profile").iterdir()}
    capfd.readouterr()
    for arguments, said in (
        (["--seeds", "0-3"], "got profile with seeds 0-2 there and 0-3 here\n"),
        (["--batch-size", "3"], "batch_size 2 there and 3 here\n"),
    ):
        assert main([*ORACLE, *arguments]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert re.fullmatch(r"fastddim: out must be [^\n]+\n", err)
        assert err.endswith(said)
    assert main(["profile", *TINY]) == 2  # another model, and another distance
    err = capfd.readouterr().err
    assert "model " in err
    assert "distance FD there and FD-clf here" in err
    assert {path: path.read_bytes() for path in Path("profile").iterdir()} == before
    for text in ("", "[]", "{}", '{"settings": {}, "cells": [{}]}', '{"settings": {}, "cells": 3}'):
        Path("profile", "profile.json").write_text(text)
        assert main(ORACLE) == 2
        assert "profile.json, which is damaged" in capfd.readouterr().err


def test_models_that_draw_no_garments_are_not_judged(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = checkpoints.Loaded(Slow(), (3, 4, 4))
    monkeypatch.setattr("fastddim.checkpoints.load", lambda *_, **__: other)
    assert main(["profile", *TINY, "--steps", "1"]) == 0
    out = capfd.readouterr().out
    assert "FD-clf  " not in out
    assert "No FD-clf: it compares garments, and these images are not 1x28x28." in out
    assert kept()["cells"][0]["distance"] is None
    assert "0.0" not in Path("profile", "profile.csv").read_text().split(",")[-1]
    with Image.open("profile/profile.png") as picture:
        assert picture.width < 1500


def test_a_trace_names_the_phases_of_a_step() -> None:
    assert main([*ORACLE, "--steps", "1,4", "--trace", "--out", "traced"]) == 0
    events = json.loads(Path("traced", "trace.json").read_text())["traceEvents"]
    ranges = [e for e in events if e.get("cat") == "user_annotation"]
    samplers = {e["name"]: e for e in ranges if "steps" in e["name"]}
    assert set(samplers) == {"4 steps, eta 0", "4 steps, eta hat"}
    for outer in samplers.values():
        end = outer["ts"] + outer["dur"]
        inner = [e for e in ranges if e is not outer and outer["ts"] <= e["ts"] < end]
        inner.sort(key=lambda e: e["ts"])
        assert [e["name"] for e in inner] == ["model", "update"] * 3
        for before, after in pairwise(inner):
            assert before["ts"] + before["dur"] <= after["ts"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", ""], "steps must be such as"),
        (["--steps", "10,x"], "steps must be such as"),
        (["--steps", "10,10"], "steps must differ from each other, got 10 twice"),
        (["--steps", "0"], "steps must be an integer in [1, 1000], got 0"),
        (["--eta", ""], "eta must be such as 0 or 0,0.5,1,hat, got ''"),
        (["--eta", "0,,"], "eta must be such as 0 or 0,0.5,1,hat, got '0,,'"),
        (["--eta", "0,,1"], "got '0,,1'"),
        (["--eta", "0,nan"], "eta must be finite"),
        (["--eta", "0,-1"], "got -1"),
        (["--eta", "0,Hat"], "got 'Hat'"),
        (["--eta", "0,1,0.0"], "eta must differ from each other, got 0.0 twice"),
        (["--eta", "9", "--steps", "10,100"], "(steps 10, eta 9.0)"),
        (["--seeds", "5"], "seeds must be two or more"),
        (["--seeds", "9-3"], "ranges that go up"),
        (["--batch-size", "0"], "batch-size must be"),
        (["--spacing", "even"], "spacing must be one of"),
        (["--spacing", "uniform,even"], "spacing must be one of"),
        (["--spacing", "uniform,"], "spacing must be one of"),
        (["--spacing", "mixed,mixed"], "spacing must differ from each other, got mixed twice"),
        (["--spacing", "none.json"], "spacing must be a name or an existing file, got none.json"),
        (["--order", "3"], "order must be 1 (DDIM), 2 or 1,2, got '3'"),
        (["--order", "1,"], "order must be 1 (DDIM), 2 or 1,2, got '1,'"),
        (["--order", "2,1,2"], "order must differ from each other, got 2 twice"),
        (["--order", "2", "--eta", "hat"], 'eta must be a number with order 2, got "hat"'),
        (["--device", "quantum"], "device must be one that torch can use here"),
        (["--checkpoint", "none"], "no checkpoint none"),
        (["--checkpoint", "none", "--oracle"], "checkpoint must be left out with oracle"),
        (["--out", "a/b"], "out must be in a folder that exists, got a/b"),
        (["--out", "file"], "out must be a folder, got the file file"),
        (["--out", "/proc/new"], "out must be a folder that can be made, got /proc/new"),
        (["extra"], "extra"),
    ],
)
def test_nonsense_is_refused_in_one_line(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(DDIM, "sample", lambda *_, **__: pytest.fail("sampling began"))
    Path("file").touch()
    assert main(["profile", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(r"fastddim: [^\n]+\n", err), err
    assert said in err
    assert os.listdir() == ["file"]


def test_help_is_the_manual(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--help"]) == 0
    out = re.sub(r"[\s│]+", " ", capfd.readouterr().out).partition(" Options ")[2]
    for option, default in {
        "steps": "10,20,50,100]",
        "eta": "0,0.2,0.5,1,hat]",
        "order": "1]",
        "spacing": "uniform]",
        "seeds": "0-255]",
        "batch-size": "16]",
        "out": "profile]",
    }.items():
        described = out.partition(f"--{option} ")[2]
        assert described.partition("[default: ")[2].startswith(default), option
    assert "--oracle" in out
    assert "--trace" in out


def test_pythons_own_profile_is_still_there() -> None:
    own = importlib.import_module("profile")
    assert own is not profile
    assert own.Profile.__module__ == "profile"
