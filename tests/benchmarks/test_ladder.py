"""The benchmark's rungs, on a CPU: what they compute, and what becomes of one that is wrong."""

from __future__ import annotations

import gc
import json
import re
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastddim
from benchmarks import gpu, networks
from benchmarks.children import Deadline
from benchmarks.sections import graph, ladder, rungs
from benchmarks.sections.rungs import (
    BESIDE_COMPILE,
    CAPTURE,
    COMPILED_CAPTURE,
    MODELS,
    ORIGINAL,
    PLAIN,
    RUNGS,
    TORCH_COMPILE,
)
from benchmarks.timing import Record, wall_seconds
from fastddim import using
from tests.cases import some

POLICY = rungs.Case(
    "policy", lambda: networks.Policy(widths=(8, 16)), (2, 16, 7), 5, cond={"global_cond": (64,)}
)


class ByClass(nn.Module):
    """As small as an image model with classes can be."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(4, 3)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        out: Tensor = self.conv(x + (t / 1000).to(x.dtype)[:, None, None, None])
        if class_labels is not None:
            out = out + self.classes(class_labels)[:, :, None, None]
        return out.tanh()


IMAGE = rungs.Case("image", ByClass, (3, 3, 8, 8), 4)
GUIDED = replace(
    IMAGE, name="guided", cond={"class_labels": 1}, uncond={"class_labels": 3}, guidance=2.0
)
CASES = [POLICY, IMAGE, GUIDED]
CASES += [replace(case, dtype=torch.bfloat16) for case in CASES]
EXACT = tuple(name for name in PLAIN if "diffusers" not in name)
ALONE = [name for name in MODELS if "compiled" not in name]


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three rounds, and no numba, which takes long to compile and is tested elsewhere."""
    monkeypatch.setattr(ladder, "SECONDS", 0.0)
    with using("torch"):
        yield


def rows_of(
    case: rungs.Case, names: tuple[str, ...] = PLAIN, seconds: float = 60.0
) -> dict[str, Record]:
    rows = list(ladder.ladder(case, names, "cpu", Deadline(seconds)))
    assert len({row["rung"] for row in rows}) == len(rows)
    return {row["rung"]: row for row in rows}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} {case.dtype}")
def test_every_rung_gives_what_the_seeds_loop_gives(case: rungs.Case) -> None:
    rows = rows_of(case, EXACT)
    assert list(rows) == [*EXACT, *ALONE]
    for name in EXACT:
        assert rows[name]["bit_equal"], name
        assert len(rows[name]["us_per_step_beside_model"]) == 3
        assert rows[name]["rounds"] == 3
    assert rows[ORIGINAL]["times_faster"] == [1, 1, 1]
    for row in rows.values():
        assert "\n" not in gpu.shown("ladder", json.loads(json.dumps(row)))


@pytest.mark.slow  # to import diffusers takes long
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} {case.dtype}")
def test_so_do_those_of_diffusers(case: rungs.Case) -> None:
    rows = rows_of(case)
    assert list(rows) == [*PLAIN, *ALONE]
    assert not [row for row in rows.values() if "failed" in row]
    diffusers = [name for name in PLAIN if name not in EXACT]
    assert len(diffusers) == 3
    limit = 1e-4 if case.dtype == torch.float32 else 2e-2
    assert all(rows[name]["relative_difference"] < limit for name in diffusers)


@pytest.mark.parametrize("case", [POLICY, GUIDED], ids=lambda case: case.name)
def test_the_compiled_model_is_a_rung_of_its_own(
    monkeypatch: pytest.MonkeyPatch, case: rungs.Case
) -> None:
    asked: list[Record] = []

    def compile(model: Any, **options: Any) -> Any:
        asked.append(options)
        return model

    begun: list[None] = []
    monkeypatch.setattr(ladder, "compiler_loaded", lambda device: None)
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(None))
    rows = rows_of(case, BESIDE_COMPILE)
    # Two runs and three rounds of four loops; on a CPU, captured loops call the model too.
    assert len(begun) == 4 * 5 * case.steps
    assert asked == [{"mode": "reduce-overhead", "dynamic": False}]  # once for both that need it
    assert not [row for row in rows.values() if "failed" in row]
    assert list(rows) == [*BESIDE_COMPILE, *MODELS]
    assert rows[TORCH_COMPILE]["bit_equal"]
    assert rows[COMPILED_CAPTURE]["bit_equal"]
    assert "torch.compile" in rows[ORIGINAL]["case"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what torch imports for its compiler
@pytest.mark.parametrize("case", [POLICY, GUIDED], ids=lambda case: case.name)
def test_the_compiled_rung_is_right(monkeypatch: pytest.MonkeyPatch, case: rungs.Case) -> None:
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, mode, dynamic: compile(model, backend="aot_eager")
    )
    rows = rows_of(case, BESIDE_COMPILE)
    assert not [row for row in rows.values() if "failed" in row]
    assert rows[TORCH_COMPILE]["relative_difference"] < 1e-5


def test_a_rung_that_cannot_be_compiled_says_so_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compile(model: Any, **_: Any) -> Any:
        raise RuntimeError("Failed to find C compiler.\nPlease specify")

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    rows = rows_of(POLICY, BESIDE_COMPILE)
    assert rows[TORCH_COMPILE]["failed"] == "RuntimeError: Failed to find C compiler."
    assert rows[CAPTURE]["times_faster"][0] > 0


def wrongly(monkeypatch: pytest.MonkeyPatch, name: str, error: float) -> None:
    make, model = RUNGS[name]

    def off(ready: rungs.Ready) -> rungs.Run:
        run = make(ready)
        return lambda: run() * (1 + error)

    monkeypatch.setitem(RUNGS, name, (off, model))


@pytest.mark.parametrize("name", some(EXACT[1:], 3))
def test_a_wrong_rung_is_a_row_that_says_so_and_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    wrongly(monkeypatch, name, 0.03)
    rows = rows_of(POLICY, EXACT)
    assert "0.03 off the original loop" in rows[name]["wrong"]
    assert "ms" not in rows[name]
    assert all("ms" in rows[other] for other in EXACT if other != name)


def test_a_rung_wrong_from_its_second_run_on_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make, model = RUNGS[CAPTURE]

    def stale(ready: rungs.Ready) -> rungs.Run:
        run, times = make(ready), iter([1.0])
        return lambda: run() * next(times, float("nan"))

    monkeypatch.setitem(RUNGS, CAPTURE, (stale, model))
    assert "nan off" in rows_of(POLICY, EXACT)[CAPTURE]["wrong"]


@pytest.mark.slow
def test_a_rung_that_fails_or_hangs_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: rungs.Ready) -> rungs.Run:
        raise RuntimeError("no such luck")

    def hangs(_: rungs.Ready) -> rungs.Run:
        time.sleep(60)
        raise AssertionError

    last = "diffusers' DDIMScheduler"
    monkeypatch.setitem(RUNGS, CAPTURE, (fails, RUNGS[CAPTURE][1]))
    monkeypatch.setitem(RUNGS, "DDIM.sample", (hangs, RUNGS["DDIM.sample"][1]))
    begin = time.monotonic()
    rows = rows_of(IMAGE, (ORIGINAL, CAPTURE, "DDIM.sample", last), seconds=3.0)
    assert time.monotonic() - begin < 10
    assert rows[CAPTURE]["failed"] == "RuntimeError: no such luck"
    found = re.fullmatch(r"no time: it took more than ([\d.]+) s", rows["DDIM.sample"]["left_out"])
    assert found  # the seconds that the rungs before it left of three
    assert 1 < float(found[1]) < 3
    assert rows[last]["left_out"] == "no time"
    assert rows[ORIGINAL]["times_faster"] == [1, 1, 1]


def test_without_the_original_loop_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: rungs.Ready) -> rungs.Run:
        raise RuntimeError("no such luck")

    monkeypatch.setitem(RUNGS, ORIGINAL, (fails, RUNGS[ORIGINAL][1]))
    (row,) = rows_of(POLICY, EXACT).values()
    assert row["failed"] == "RuntimeError: no such luck"


def test_a_replay_keeps_what_its_graph_reads_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU: what a graph reads is known to the driver alone, and no reference tells of it.
    class Owner:
        def __call__(self) -> Tensor:
            return torch.zeros(1)

    monkeypatch.setattr(rungs, "capture", lambda body, device: lambda: torch.zeros(1))
    ready = rungs.prepared(POLICY, "cpu")
    owner = Owner()
    held = weakref.ref(owner)
    replay = rungs.in_a_graph(owner, ready)
    del owner
    gc.collect()
    assert held() is not None
    del replay
    gc.collect()
    assert held() is None

    captures: list[weakref.ref[object]] = []
    capture = fastddim.DDIM.capture

    def noted(*args: Any, **more: Any) -> Any:
        act = capture(*args, **more)
        captures.append(weakref.ref(act))
        return act

    monkeypatch.setattr(fastddim.DDIM, "capture", noted)
    step, small = graph.chain((2, 4, 4), 0.0, 2, "cpu")
    gc.collect()
    assert captures[0]() is not None
    del step, small
    gc.collect()
    assert captures[0]() is None


def test_without_diffusers_its_rows_say_that_it_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    rows = rows_of(POLICY)
    failed = {name for name, row in rows.items() if "failed" in row}
    assert failed == set(PLAIN) - set(EXACT)
    (row,) = ladder.ladder(ladder.cases()[1], PLAIN, "cpu", Deadline(60))
    assert "diffusers" in row["failed"]


def test_rungs_without_time_to_prepare_are_left_out() -> None:
    (row,) = ladder.ladder(POLICY, PLAIN, "cpu", Deadline(0))
    assert row["left_out"] == "no time"


def test_the_cases_match_their_names_and_are_ordered_by_worth() -> None:
    cases = ladder.cases()
    assert [(case.shape, case.dtype) for case in cases] == [
        ((1, 16, 7), torch.float32),
        ((64, 3, 32, 32), torch.bfloat16),
        ((1, 4, 64, 64), torch.float32),
        ((64, 3, 32, 32), torch.float32),
        ((4, 3, 32, 32), torch.bfloat16),
        ((4, 3, 32, 32), torch.float32),
    ]
    assert [case.steps for case in cases] == [10, *[20] * 5]
    assert cases[1].make is cases[4].make
    x, cond = torch.randn(1, 16, 7), torch.randn(1, 64)
    assert networks.Policy()(x, torch.tensor([3]), global_cond=cond).shape == x.shape
    plan = ladder.plan()
    assert [(name, rungs) for name, _, rungs, *_ in plan[:4]] == [
        ("robot policy, float32", PLAIN),
        ("CIFAR-10 U-Net, 64, bfloat16", PLAIN),
        ("guided latents, float32", PLAIN),
        ("CIFAR-10 U-Net, 64, float32", PLAIN),
    ]
    # The compiler takes no other row's time: its cases are the last, and have time or do not begin.
    assert [(rungs, least) for _, _, rungs, _, least in plan] == [
        *[(PLAIN, 0)] * 6,
        *[(BESIDE_COMPILE, ladder.COMPILING)] * 3,
    ]
    assert plan[6][0] == "CIFAR-10 U-Net, 64, beside torch.compile, bfloat16"
    shares = [share for *_, share, _ in plan]
    assert 100 * sum(shares[6:7]) / sum(shares) >= ladder.COMPILING
    assert len({name for name, *_ in plan}) == len(plan) == 9
    assert list(RUNGS)[:6] == [
        ORIGINAL,
        CAPTURE,
        "eager step, factors precomputed, in a graph",
        "DDIM.sample",
        "eager step, factors precomputed",
        TORCH_COMPILE,
    ]


@pytest.mark.slow
def test_the_unets_are_what_they_are_called() -> None:
    with torch.device("meta"):
        unet, latents = networks.UNet(**networks.CIFAR10), networks.UNet(**networks.LATENTS)
    assert sum(p.numel() for p in unet.parameters()) == 35_746_307
    assert 5e7 < sum(p.numel() for p in latents.parameters()) < 2e8
    small = {**networks.LATENTS, "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
    guided = ladder.cases()[2]
    case = replace(guided, make=lambda: networks.UNet(**small), shape=(1, 4, 8, 8), steps=2)
    rows = rows_of(case)
    assert not [row for row in rows.values() if "failed" in row]
    assert all(rows[name]["bit_equal"] for name in EXACT)


def timed(runs: dict[str, Callable[[], object]], *_: object) -> dict[str, list[float]]:
    """A microsecond a step, half of one a small kernel, ten for any replay; in two rounds."""
    for run in runs.values():
        run()
    each = {"step": 1.0, "small": 0.5}
    us = {name: 10 + each[name.split()[0]] * int(name.split()[1]) for name in runs}
    # In the second round the machine is half as fast.
    return {name: [value * 1e-6, 2 * value * 1e-6] for name, value in us.items()}


@pytest.mark.parametrize(
    ("shape", "asked"), [((1, 16, 7), 1.3), ((4, 3, 32, 32), 1.3), ((64, 3, 32, 32), None)]
)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_marginal_step_is_the_difference_of_two_graphs(
    monkeypatch: pytest.MonkeyPatch, eta: float, shape: tuple[int, ...], asked: float | None
) -> None:
    assert shape in graph.SHAPES
    monkeypatch.setattr(graph, "device_seconds", timed)
    monkeypatch.setattr(graph, "SHORT", 2)
    monkeypatch.setattr(graph, "LONG", 4)
    (row,) = graph.marginal(shape, eta, "cpu", Deadline(60))
    assert row["us_per_step"] == [1.5, 1, 2]
    assert row["us_per_small_kernel"] == [0.75, 0.5, 1]
    assert row["of_small_kernel"] == [2, 2, 2]  # round by round
    assert row["us_2_steps"] == 18
    assert row.get("required") == asked
    assert row.get("met") == (None if asked is None else False)


def test_rounds_end_with_their_time() -> None:
    calls: list[str] = []

    def of(name: str) -> Callable[[], None]:
        return lambda: calls.append(name)

    taken = wall_seconds({"a": of("a"), "b": of("b")}, lambda: None, 0.0, least=2, most=9)
    assert calls == ["a", "b", "b", "a"]  # each round begins with another
    taken = wall_seconds({"a": of("a")}, lambda: None, 60.0, least=2, most=9)
    assert len(taken["a"]) == 9
