"""Order and spacing as axes of a profile: cells, impossible combinations, and old folders."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastddim import DDIM, NoiseSchedule, Tuned, profile
from fastddim.__main__ import main
from fastddim.tools import curves, draw
from fastddim.tools.table import Cell
from fastddim.tuned import schedule_id
from tests.cases import some
from tests.refusals import refused

TINY = ("--device", "cpu", "--seeds", "0-2", "--batch-size", "2")
ORACLE = ("profile", "--oracle", *TINY)
SCHEDULE = NoiseSchedule.linear()
TUNED = Tuned(((999, 400), (999, 600, 100)), 2, 1000, schedule_id(SCHEDULE))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def kept() -> dict[str, Any]:
    return dict(json.loads(Path("profile", "profile.json").read_text()))


def axes_of(found: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(c["steps"], c["order"], c["spacing"], c["eta"]) for c in found]


# From Python


@pytest.mark.filterwarnings("ignore:the timesteps were tuned for order 2")
def test_a_grid_has_every_combination() -> None:
    spacings: list[Tuned | str] = ["uniform", TUNED, "mixed"]
    ddims = profile.grid([4, 2], [0.0, 1.0], spacings, orders=[1, 2])
    name = profile.spacing_name(TUNED)
    assert [(d.steps, d.order, profile.spacing_name(d.spacing), d.eta) for d in ddims] == [
        (S, order, spacing, eta)
        for S in (4, 2)
        for order in (1, 2)
        for spacing in ("uniform", name, "mixed")
        for eta in (0, 1)
        if S == 2 or spacing != name
    ]
    assert [t for t, _ in next(d for d in ddims if d.spacing == TUNED).pairs] == [999, 400]


def test_a_list_of_timesteps_is_one_spacing() -> None:
    [ddim] = profile.grid([3], [0.0], [0, 500, 999])
    assert [t for t, _ in ddim.pairs] == [999, 500, 0]
    [pairs] = profile.grid([2], [0.0], [(999, 500), (500, -1)])
    names = {profile.spacing_name(d.spacing) for d in (ddim, pairs)}
    assert len(names) == 2
    assert all(re.fullmatch("list-[0-9a-f]{6}", name) for name in names)
    [cell] = profile.cells([ddim], profile.oracle(), [0, 1], (64,), 2, device="cpu")
    assert (cell.steps, cell.spacing) == (3, profile.spacing_name(ddim.spacing))


@pytest.mark.filterwarnings("ignore:the timesteps were tuned for order 2")
def test_combinations_that_do_not_exist_are_left_out_and_named() -> None:
    name = profile.spacing_name(TUNED)
    grid: Any = ([2, 5], [0.0, "hat"], ["uniform", TUNED])
    assert profile.left_out(*grid, orders=[1, 2]) == [
        "order 2 with eta hat",
        f"5 steps of {name}, which has 2 or 3",
    ]
    found = [(d.steps, d.order, d.eta) for d in profile.grid(*grid, orders=[1, 2])]
    assert len(found) == 4 + 2 + 2 + 1
    assert (2, 1, "hat") in found
    assert (2, 2, "hat") not in found
    assert profile.left_out([2], [0.0], TUNED) == []


def test_a_grid_without_any_sampler_is_refused() -> None:
    def asked(*values: Any, **rest: Any) -> Any:
        return lambda: profile.grid(*values, **rest)

    refused(asked([5], ["hat"], orders=[2]), ValueError, 'eta must be a number with order 2, got "')
    said = ("steps must be 2 or 3, for which", "got 5 (steps 5, eta 0.0)")
    refused(asked([5], [0.0], TUNED, orders=[2]), ValueError, *said)
    refused(asked([5], [0.0], orders=[]), ValueError, "order must be one or more")
    refused(asked([5], [0.0], []), ValueError, "spacing must be one or more")
    refused(asked([5], [0.0], orders=[1, 1]), ValueError, "order must differ", "got 1 twice")
    refused(asked([5], [0.0], orders=[3]), ValueError, "order must be 1 (DDIM) or 2, got 3")
    same = [TUNED, Tuned(TUNED.timesteps, 1, 1000)]
    refused(asked([2], [0.0], same), ValueError, "spacing must differ", "tuned-")


def test_a_cell_is_of_its_order_and_spacing() -> None:
    model, given = profile.oracle(), []
    ddims = profile.grid([3], [0.0], ["uniform", "mixed"], orders=[1, 2])
    found = list(
        profile.cells(
            ddims,
            model,
            [5, 6, 7],
            (64,),
            2,
            keep=lambda cell, x: given.append((cell, x)),
            device="cpu",
        )
    )
    assert [(c.order, c.spacing) for c in found] == [
        (order, spacing) for order in (1, 2) for spacing in ("uniform", "mixed")
    ]
    for ddim, cell, (same, x) in zip(ddims, found, given, strict=True):
        assert same is cell
        assert torch.equal(x, torch.cat(list(draw.by_seed(ddim, model, [5, 6, 7], (64,), 2))))
    assert len({x.sum().item() for _, x in given}) == 4


def cell(steps: int, order: int, spacing: str, eta: Any) -> Cell:
    return Cell(steps, eta, 1.0, 2.0, 3.0, 4.0, 1 / steps, 0.1, 0.01, order, spacing)


def test_a_panel_has_what_a_reader_compares() -> None:
    etas = [cell(S, 1, "uniform", eta) for eta in (1.0, "hat", 0.0) for S in (9, 3)]
    [panel] = curves.panels(etas)
    assert (panel.name, [c.name for c in panel.curves]) == ("", ["η = 0", "η = 1", "σ̂"])
    assert [[c.steps for c in curve.cells] for curve in panel.curves] == [[3, 9]] * 3
    more = [*etas, cell(3, 2, "uniform", 0.0), cell(3, 2, "mixed", 1.0)]
    panels = curves.panels(more)
    assert [p.name for p in panels] == ["η = 0", "η = 1", "σ̂"]
    looks = [{c.name: c.look for c in p.curves} for p in panels]
    assert looks == [
        {"order 1, uniform": 0, "order 2, uniform": 1},
        {"order 1, uniform": 0, "order 2, mixed": 2},
        {"order 1, uniform": 0},
    ]
    assert [c.name for p in curves.panels([*etas, cell(3, 2, "uniform", 0.0)]) for c in p.curves][
        :2
    ] == ["order 1", "order 2"]


# The command


def test_the_command_has_both_axes(capfd: pytest.CaptureFixture[str]) -> None:
    TUNED.write("tau.json")
    rest = ("--steps", "2,4", "--eta", "0,hat", "--order", "2,1", "--spacing", "uniform, tau.json")
    with pytest.warns(UserWarning, match="tuned for order 2, and are used with order 1"):
        assert main([*ORACLE, *rest]) == 0
    out, err = capfd.readouterr()
    name = profile.spacing_name(TUNED)
    assert err == f"left out: order 2 with eta hat; 4 steps of {name}, which has 2 or 3\n"
    expected: list[Any] = [
        (2, 2, "uniform", 0),
        (2, 2, name, 0),
        (2, 1, "uniform", 0),
        (2, 1, "uniform", "hat"),
        (2, 1, name, 0),
        (2, 1, name, "hat"),
        (4, 2, "uniform", 0),
        (4, 1, "uniform", 0),
        (4, 1, "uniform", "hat"),
    ]
    assert axes_of(kept()["cells"]) == expected
    lines = [line.split() for line in out.splitlines()]
    head = next(i for i, line in enumerate(lines) if line[:1] == ["S"])
    assert lines[head][:4] == ["S", "order", "spacing", "eta"]
    assert [line[:4] for line in lines[head + 1 : -1]] == [
        [str(S), str(order), spacing, profile.label(eta)] for S, order, spacing, eta in expected
    ]
    assert "spacing" not in out.splitlines()[0]
    with Path("profile", "profile.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["order"], row["spacing"]) for row in rows] == [
        (str(order), spacing) for _, order, spacing, _ in expected
    ]


def test_a_column_that_does_not_vary_is_in_the_heading(capfd: pytest.CaptureFixture[str]) -> None:
    rest = ("--steps", "2", "--eta", "0", "--order", "2", "--spacing", "mixed,quad")
    assert main([*ORACLE, *rest]) == 0
    out = capfd.readouterr().out
    assert out.startswith("Seeds 0-2, order 2, on ")
    assert next(line.split()[:3] for line in out.splitlines() if line.startswith("S ")) == [
        *("S", "spacing", "eta"),
    ]


@pytest.mark.parametrize("spacing", some(["quad", "uniform"], 2))
def test_a_folder_of_an_earlier_version_continues(spacing: str) -> None:
    rest = ("--steps", "1,2", "--eta", "0")
    assert main([*ORACLE, *rest, "--spacing", spacing]) == 0
    whole = kept()
    old = {
        "settings": whole["settings"] | {"spacing": spacing},
        "cells": [
            {k: v for k, v in c.items() if k not in ("order", "spacing")}
            for c in whole["cells"][:1]
        ],
    }
    Path("profile", "profile.json").write_text(json.dumps(old))
    Path("profile", "profile.html").unlink()
    assert main([*ORACLE, *rest, "--spacing", spacing]) == 0
    assert kept()["settings"] == whole["settings"]
    assert kept()["cells"][0] == whole["cells"][0]
    assert axes_of(kept()["cells"]) == [(1, 1, spacing, 0), (2, 1, spacing, 0)]
    assert Path("profile", "profile.html").exists()
    # And the new axes continue it.
    assert main([*ORACLE, *rest, "--spacing", "mixed", "--order", "2"]) == 0
    assert axes_of(kept()["cells"])[2:] == [(1, 2, "mixed", 0), (2, 2, "mixed", 0)]


def test_other_timesteps_in_the_same_file_are_other_cells() -> None:
    rest = ("--steps", "2", "--eta", "0", "--order", "2", "--spacing", "tau.json")
    TUNED.write("tau.json")
    assert main([*ORACLE, *rest]) == 0
    assert main([*ORACLE, *rest]) == 0
    assert len(kept()["cells"]) == 1
    other = Tuned(((999, 300),), 2, 1000, schedule_id(SCHEDULE))
    other.write("tau.json")
    assert main([*ORACLE, *rest]) == 0
    assert [c["spacing"] for c in kept()["cells"]] == [
        profile.spacing_name(each) for each in (TUNED, other)
    ]


def test_a_trace_has_the_longest_sampler_of_each_order() -> None:
    rest = ("--steps", "1,4", "--eta", "0", "--order", "1,2", "--spacing", "uniform,mixed")
    assert main([*ORACLE, *rest, "--trace"]) == 0
    events = json.loads(Path("profile", "trace.json").read_text())["traceEvents"]
    found = {e["name"] for e in events if e.get("cat") == "user_annotation"}
    assert {n for n in found if "steps" in n} == {"4 steps, eta 0", "4 steps, eta 0, order 2"}


def test_the_steps_of_order_2_are_warm_before_they_are_timed() -> None:
    from fastddim.tools import timing

    taken: list[int] = []
    plain = DDIM.sample

    def sample(self: DDIM, *arguments: Any, progress: Any, **rest: Any) -> Any:
        def counted(steps: Any) -> Any:
            steps = list(progress(steps))
            taken.append(len(steps))
            return steps

        return plain(self, *arguments, progress=counted, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DDIM, "sample", sample)
        cpu = torch.device("cpu")
        for order in (1, 2):
            timing.warm_up(DDIM(4, order=order), profile.oracle(), (64,), 2, cpu)
    assert taken == [1, 1, 2, 1]
