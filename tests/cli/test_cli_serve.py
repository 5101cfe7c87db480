"""The command ``serve-bench``: its table, its JSON, its picture, and what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastddim.__main__ import main
from fastddim.cli.serve import parse_mix
from tests.cli.commands import _here, refused

__all__ = ["_here", "refused"]

NAMES = [
    "engine",
    "one at a time",
    "static, mixed S",
    "static, mixed S, timeout",
    "static, equal S",
    "static, equal S, timeout",
]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """The arguments of a benchmark of a model that costs nothing."""
    Path("tiny.py").write_text("def make(): return (lambda x, t: x / 2), (1, 4, 4)\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # ``refused`` looks at the folder.
    monkeypatch.delitem(sys.modules, "tiny", raising=False)
    mix = ("--steps", "8,12", "--requests", "6", "--slots", "2", "--device", "cpu")
    return ("serve-bench", "--model", "tiny:make", *mix)


def test_serve_bench_prints_a_row_for_each_peer(
    tiny: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*tiny, "--timeout", "0.01"]) == 0
    out = capfd.readouterr().out
    assert out.startswith("6 requests of 8,12 steps, ")
    names = "peer  samples/s  p50 s  p99 s  occupancy  engine is\n"
    *rows, png = out.partition(names)[2].splitlines()
    assert [row.rsplit(maxsplit=6)[0].strip() for row in rows] == NAMES
    assert rows[0].endswith("1.00 x")
    assert png == "serving.png"
    with Image.open("serving.png") as picture:
        assert len(np.unique(np.array(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 100


def test_serve_bench_prints_json(tiny: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*tiny, "--json", "--rounds", "2", "--load", "50", "--out", "a.png"]) == 0
    out = json.loads(capfd.readouterr().out)
    assert [each["name"] for each in out["peers"]] == NAMES
    assert all(len(each["latencies"]) == 12 for each in out["peers"])
    settings = out["settings"]
    assert settings["timeout"] == pytest.approx(5 * settings["tick_seconds"])
    rate = 50 * 2 / (10 * settings["tick_seconds"])
    assert settings["requests_per_second"] == pytest.approx(rate)
    assert Path("a.png").exists()


def test_serve_bench_takes_the_peers_that_are_named(
    tiny: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*tiny, "--json", "--peers", "mixed-timeout, single"]) == 0
    out = json.loads(capfd.readouterr().out)
    assert [each["name"] for each in out["peers"]] == [NAMES[0], NAMES[3], NAMES[1]]


def test_serve_bench_calls_the_model_on_smaller_batches(
    tiny: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*tiny, "--batch-size", "1", "--peers", "single"]) == 0
    out = capfd.readouterr().out
    assert "2 slots in batches of 1, timeout" in out
    assert " 1.00     1.00 x\n" in out  # No slot of the engine's calls is empty.


def test_a_mix_is_a_range_or_a_list() -> None:
    assert parse_mix("8-11") == [8, 9, 10, 11]
    assert parse_mix("50, 8") == [50, 8]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--steps", "50-8"), "steps must be such as 8-50 or 8,20,50, got '50-8'"),
        (("--steps", "some"), "steps must be such as 8-50 or 8,20,50, got 'some'"),
        (("--steps", "0-5"), "steps must be an integer in [1, 1000000], got 0"),
        (("--steps", "8,1001"), "steps must be an integer in [1, 1000], got 1001"),
        (("--steps", "1-99999999"), "steps must be an integer in [1, 1000000], got 99999999"),
        (("--steps", "8,8"), "steps must differ from each other, got 8 twice"),
        (("--requests", "0"), "requests must be an integer in [1, 10000], got 0"),
        (("--slots", "0"), "slots must be an integer in [1, 1024], got 0"),
        (("--slots", "6", "--batch-size", "4"), "batch-size must divide slots = 6, got 4"),
        (("--batch-size", "0"), "batch-size must be an integer ≥ 1, got 0"),
        (("--peers", "static"), "peers must be one of single, mixed, mixed-timeout, equal, equal-"),
        (("--peers", "single,single"), "peers must differ from each other, got single twice"),
        (("--slots", "x"), "must be an integer, got 'x'"),
        (("--rounds", "0"), "rounds must be an integer in [1, 1000], got 0"),
        (("--seed", "-1"), "seed must be an integer in [0, 9223372036854775807], got -1"),
        (("--load", "0"), "load must be a number > 0, got '0'"),
        (("--load", "inf"), "load must be a finite number, got 'inf'"),
        (("--timeout", "-1"), "timeout must be a number > 0, got '-1'"),
        (("--out", "a.jpg"), "ends in .png, got 'a.jpg'"),
        (("--device", "quantum"), "device must be one that torch can use here"),
        (("--class", "3"), "class must be left out with the garment model, got 3"),
    ],
)
def test_serve_bench_refuses_nonsense_in_one_line(
    refused: Callable[..., str], arguments: tuple[str, ...], line: str
) -> None:
    assert line in refused("serve-bench", *arguments)


def test_serve_bench_refuses_a_model_that_mixes_samples(
    tiny: tuple[str, ...], refused: Callable[..., str]
) -> None:
    Path("tiny.py").write_text("def make(): return (lambda x, t: x - x.mean()), (1, 4, 4)\n")
    assert "model must treat samples independently" in refused(*tiny, "--quiet")
