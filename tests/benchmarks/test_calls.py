"""The measurement of quality against model calls, in small, and its tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import calls, report
from fastddim import DDIM
from fastddim.tools import distance


def test_a_set_beside_itself_has_the_ratio_1() -> None:
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    real = distance.load()
    assert calls.interval(x, x, real) == [1, 1, 1]
    ratio, low, high = calls.interval(x, x + 0.5, real)
    assert low < ratio < high


def test_the_record_has_every_sampler_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = DDIM(8, order=2, spacing="mixed")
    chosen = {"2 order 1": DDIM(2), "8 order 2 mixed": mixed}
    monkeypatch.setattr(calls, "samplers", lambda: chosen)
    arguments = ["--seeds", "8", "--features", str(tmp_path / "kept"), "--results", str(tmp_path)]
    calls.main(arguments)
    first = capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    section = json.loads(path.read_text())["calls"]
    assert section["seeds"] == "10000-10007"
    named = [row["sampler"] for row in section["rows"]]
    assert named == [*chosen, "8 diffusers mixed"]
    (compared,) = section["ratios"]
    ratio, low, high = compared["ratio"]
    assert low <= ratio <= high
    assert 0.999 < ratio < 1.001  # diffusers draws the same images
    calls.main(arguments)
    again = capsys.readouterr().out
    assert "2 order 1: FD-clf" in first
    assert "2 order 1: FD-clf" not in again
    assert json.loads(path.read_text())["calls"]["rows"] == section["rows"]


def test_the_table_leaves_out_what_was_not_measured() -> None:
    rows = [
        {"sampler": "6 order 1", "fd_clf": 2.512},
        {"sampler": "8 order 2 mixed", "fd_clf": 0.3},
    ]
    assert report.calls({"rows": rows}) == (
        "| model calls an image | 6 | 8 | 10 | 16 | 20 | 50 |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| DDIM | 2.51 |  |  |  |  |  |\n"
        "| order 2, `mixed` |  | 0.30 |  |  |  |  |\n"
        "| order 2, tuned |  |  |  |  |  |  |"
    )


def test_seeds_are_not_those_of_the_search() -> None:
    found = json.loads(calls.TAU.read_text())["about"]["seeds"]
    assert max(found) < calls.FIRST
