"""The file of tuned timesteps: what it holds comes back, and the sampler warns of another use."""

from __future__ import annotations

import json
import pickle
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastddim import DDIM, NoiseSchedule, SamplingWarning, Tuned, make_pairs
from fastddim.tuned import schedule_id
from tests.refusals import refused

LINEAR = NoiseSchedule.linear()
TUNED = Tuned(
    timesteps=((999, 500, 20), (999, 700, 300, 0)),
    order=2,
    T=1000,
    schedule=schedule_id(LINEAR),
    model="ab" * 32,
    about='{"seeds": [0, 1]}',
)


def test_a_file_gives_the_timesteps_back(tmp_path: Path) -> None:
    path = tmp_path / "tau.json"
    TUNED.write(path)
    assert Tuned.read(path) == TUNED
    assert Tuned.read(str(path)) == TUNED
    found = json.loads(path.read_text())
    assert found["timesteps"] == {"3": [999, 500, 20], "4": [999, 700, 300, 0]}
    assert found["about"] == {"seeds": [0, 1]}
    assert [p.name for p in tmp_path.iterdir()] == ["tau.json"]


def test_samplers_take_the_timesteps_and_their_file(tmp_path: Path) -> None:
    path = tmp_path / "tau.json"
    TUNED.write(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ddim = DDIM(3, order=2, spacing=TUNED)
        same = DDIM(3, order=2, spacing=path)
    assert ddim.pairs == ((999, 500), (500, 20), (20, -1)) == make_pairs(TUNED, 3, 1000)
    assert make_pairs(str(path), 3, LINEAR) == ddim.pairs
    assert same == ddim
    assert DDIM(3, order=2, spacing=str(path)) == ddim
    assert hash(same) == hash(ddim)
    assert pickle.loads(pickle.dumps(ddim)) == ddim
    assert replace(ddim, steps=4).pairs == ((999, 700), (700, 300), (300, 0), (0, -1))
    path.unlink()
    assert replace(same, steps=4).pairs[1] == (700, 300)


def test_a_sampler_warns_of_another_order_and_schedule() -> None:
    changes: list[tuple[dict[str, Any], str, str]] = [
        ({"order": 1}, "order 2", "order 1"),
        ({"order": 2, "schedule": NoiseSchedule.cosine()}, "linear", "cosine"),
        ({"order": 2, "schedule": NoiseSchedule.linear(1001)}, "T 1000", "T 1001"),
    ]
    for options, mine, other in changes:
        with pytest.warns(SamplingWarning) as caught:
            DDIM(3, spacing=TUNED, **options)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        text = str(caught[0].message)
        assert mine in text, text
        assert other in text, text


def test_levels_beyond_the_schedule_are_refused() -> None:
    with pytest.warns(SamplingWarning):
        refused(
            lambda: DDIM(3, order=2, spacing=TUNED, schedule=NoiseSchedule.linear(500)),
            ValueError,
            "spacing",
            "499",
            "999",
        )


def test_steps_may_be_left_out_where_there_is_one_tau() -> None:
    assert DDIM(order=2, spacing=replace(TUNED, timesteps=((999, 5),))).steps == 2


@pytest.mark.parametrize("steps", [None, 50, 2, "3"])
def test_other_numbers_of_steps_are_refused(steps: Any) -> None:
    refused(lambda: DDIM(steps, order=2, spacing=TUNED), ValueError, "steps", "3 or 4", repr(steps))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"timesteps": ()}, "timesteps"),
        ({"timesteps": ((),)}, "timesteps"),
        ({"timesteps": ((1, 2),)}, "timesteps"),
        ({"timesteps": ((2, 2),)}, "timesteps"),
        ({"timesteps": ((1000, 2),)}, "timesteps"),
        ({"timesteps": ((5, -1),)}, "timesteps"),
        ({"timesteps": ((5, 0.5),)}, "timesteps"),
        ({"timesteps": ((5, 1), (6, 1))}, "timesteps"),
        ({"order": 3}, "order"),
        ({"T": 0}, "T"),
        ({"model": None}, "model"),
    ],
)
def test_timesteps_that_are_no_way_down_are_refused(change: Any, word: str) -> None:
    with pytest.raises((ValueError, TypeError), match=word):
        replace(TUNED, **change)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '{"format": "fastddim tau 1"}',
        '{"format": "fastddim tau 2", "timesteps": {"1": [0]}, "order": 1, "T": 1}',
        '{"format": "fastddim tau 1", "timesteps": {"1": [5]}, "order": 1, "T": 1}',
        '{"format": "fastddim tau 1", "timesteps": [[0]], "order": 1, "T": 1}',
        '{"format": "fastddim tau 1", "timesteps": {"1": [0]}, "order": 1, "T": 1, "x": 1}',
        "\0\1",
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tau.json"
    path.write_text(text)
    refused(lambda: Tuned.read(path), ValueError, "spacing", str(path), "fastddim tune")
    refused(lambda: DDIM(1, spacing=path), ValueError, "spacing", str(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    refused(lambda: DDIM(3, spacing=tmp_path / "no.json"), FileNotFoundError, "spacing", "no.json")


def test_a_folder_in_place_of_the_file_is_named(tmp_path: Path) -> None:
    refused(lambda: Tuned.read(tmp_path), FileNotFoundError, "spacing", str(tmp_path))
