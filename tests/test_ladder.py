"""The benchmark's rungs, on a CPU: what they compute, and what becomes of one that is wrong."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import gpu, ladder
from benchmarks.ladder import BESIDE_COMPILE, CAPTURE, MODELS, PLAIN, RUNGS, SEED, TORCH_COMPILE
from benchmarks.timing import Record, WrongResultError, wall_seconds
from fastddim import cpu

POLICY = ladder.Case(
    "policy", lambda: ladder.Policy(widths=(8, 16)), (2, 16, 7), 5, cond={"global_cond": (64,)}
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


IMAGE = ladder.Case("image", ByClass, (3, 3, 8, 8), 4)
GUIDED = replace(
    IMAGE, name="guided", cond={"class_labels": 1}, uncond={"class_labels": 3}, guidance=2.0
)
CASES = [POLICY, IMAGE, GUIDED]
CASES += [replace(case, dtype=torch.bfloat16) for case in CASES]
EXACT = tuple(name for name in PLAIN if "diffusers" not in name and "numbers" not in name)
ALONE = [name for name in MODELS if "compiled" not in name]


@pytest.fixture(autouse=True)
def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes long to compile, and is tested elsewhere."""
    monkeypatch.setattr(cpu, "_fused", lambda: None)


def rows_of(case: ladder.Case, names: tuple[str, ...] = PLAIN, **more: Any) -> dict[str, Record]:
    rows = list(ladder.ladder(case, names, device="cpu", seconds=0.0, **more))
    assert len({row["rung"] for row in rows}) == len(rows)
    return {row["rung"]: row for row in rows}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} {case.dtype}")
def test_every_rung_gives_what_the_seeds_loop_gives(case: ladder.Case) -> None:
    rows = rows_of(case, EXACT)
    assert list(rows) == [*EXACT, *ALONE]
    for name in EXACT:
        assert rows[name]["bit_equal"], name
        assert rows[name]["ms_per_step_beside_model"] is not None
        assert rows[name]["rounds"] == 3
    assert rows[SEED]["times_faster"] == 1
    assert len(gpu.table(list(rows.values())).splitlines()) == len(rows) + 1
    json.dumps(list(rows.values()))


@pytest.mark.slow  # to import diffusers takes long
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} {case.dtype}")
def test_so_do_those_of_diffusers(case: ladder.Case) -> None:
    rows = rows_of(case)
    assert list(rows) == [*PLAIN, *ALONE]
    assert not [row for row in rows.values() if "failed" in row]
    diffusers = [name for name in PLAIN if name not in EXACT]
    assert len(diffusers) == 3
    limit = 1e-4 if case.dtype == torch.float32 else 2e-2
    assert all(rows[name]["relative_difference"] < limit for name in diffusers)


@pytest.mark.parametrize("case", [POLICY, GUIDED], ids=lambda case: case.name)
def test_the_compiled_model_is_a_rung_of_its_own(
    monkeypatch: pytest.MonkeyPatch, case: ladder.Case
) -> None:
    asked: list[Record] = []

    def compile(model: Any, **options: Any) -> Any:
        asked.append(options)
        return model

    begun: list[None] = []
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(None))
    rows = rows_of(case, BESIDE_COMPILE)
    assert len(begun) == 2 * 5 * case.steps  # two runs, then three rounds
    assert asked == [{"mode": "reduce-overhead", "dynamic": False}]  # once for both that need it
    assert not [row for row in rows.values() if "failed" in row]
    assert list(rows) == [*BESIDE_COMPILE, *MODELS]
    assert rows[TORCH_COMPILE]["bit_equal"]
    assert "torch.compile" in rows[SEED]["case"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what torch imports for its compiler
@pytest.mark.parametrize("case", [POLICY, GUIDED], ids=lambda case: case.name)
def test_what_torch_compile_makes_of_it_is_right(
    monkeypatch: pytest.MonkeyPatch, case: ladder.Case
) -> None:
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, mode, dynamic: compile(model, backend="aot_eager")
    )
    rows = rows_of(case, BESIDE_COMPILE)
    assert not [row for row in rows.values() if "failed" in row]
    assert rows[TORCH_COMPILE]["relative_difference"] < 1e-5


def test_what_cannot_be_compiled_says_so_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(model: Any, **_: Any) -> Any:
        raise RuntimeError("Failed to find C compiler.\nPlease specify")

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    rows = rows_of(POLICY, BESIDE_COMPILE)
    assert rows[TORCH_COMPILE]["failed"] == "RuntimeError: Failed to find C compiler."
    assert rows[CAPTURE]["times_faster"] > 0


def wrongly(monkeypatch: pytest.MonkeyPatch, name: str, error: float) -> None:
    make, model = RUNGS[name]

    def off(ready: ladder.Ready) -> ladder.Run:
        run = make(ready)
        return lambda: run() * (1 + error)

    monkeypatch.setitem(RUNGS, name, (off, model))


@pytest.mark.parametrize("name", EXACT[1:])
def test_a_rung_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    wrongly(monkeypatch, name, 0.03)
    monkeypatch.setattr(ladder, "wall_seconds", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(WrongResultError, match=r"0\.03 off the seed's loop"):
        rows_of(POLICY, EXACT)


def test_nor_is_one_that_is_wrong_from_the_second_time_on(monkeypatch: pytest.MonkeyPatch) -> None:
    make, model = RUNGS[CAPTURE]

    def stale(ready: ladder.Ready) -> ladder.Run:
        run, times = make(ready), iter([1.0])
        return lambda: run() * next(times, float("nan"))

    monkeypatch.setitem(RUNGS, CAPTURE, (stale, model))
    with pytest.raises(WrongResultError, match="nan off"):
        rows_of(POLICY, EXACT)


def test_a_rung_that_fails_or_hangs_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: ladder.Ready) -> ladder.Run:
        raise RuntimeError("no such luck")

    def hangs(_: ladder.Ready) -> ladder.Run:
        time.sleep(60)
        raise AssertionError

    monkeypatch.setattr(ladder, "LIMIT", 1.0)
    monkeypatch.setitem(RUNGS, CAPTURE, (fails, RUNGS[CAPTURE][1]))
    monkeypatch.setitem(RUNGS, "DDIM.sample", (hangs, RUNGS["DDIM.sample"][1]))
    rows = rows_of(IMAGE, (SEED, "DDIM.sample", CAPTURE, "without its copies to the CPU"))
    assert rows[CAPTURE]["failed"] == "RuntimeError: no such luck"
    assert rows["DDIM.sample"]["failed"] == "TimeoutError: took more than 1 s"
    assert rows["without its copies to the CPU"]["times_faster"] > 0


def test_without_diffusers_its_rungs_and_models_are_rows_that_say_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    rows = rows_of(POLICY)
    failed = {name for name, row in rows.items() if "failed" in row}
    assert failed == set(PLAIN) - set(EXACT)
    (row,) = ladder.ladder(ladder.cases()[1], device="cpu")
    assert "diffusers" in row["failed"]


def test_after_a_while_no_model_is_compiled_any_more() -> None:
    watch = ladder.Stopwatch(0.0)
    (row,) = rows_of(POLICY, BESIDE_COMPILE, watch=watch).values()
    assert row["rung"] == TORCH_COMPILE
    assert "left out" in row["failed"]


def test_the_cases_are_what_they_are_called() -> None:
    cases = ladder.cases()
    assert [case.shape for case in cases] == [
        (1, 16, 7),
        *[(batch, 3, 32, 32) for batch in (4, 4, 64, 64)],
        (1, 4, 64, 64),
    ]
    assert [case.steps for case in cases] == [10, *[20] * 5]
    assert cases[1].make is cases[4].make
    x, cond = torch.randn(1, 16, 7), torch.randn(1, 64)
    assert ladder.Policy()(x, torch.tensor([3]), global_cond=cond).shape == x.shape


@pytest.mark.slow
def test_the_unets_are_what_they_are_called() -> None:
    with torch.device("meta"):
        unet, latents = ladder.UNet(**ladder.CIFAR10), ladder.UNet(**ladder.LATENTS)
    assert sum(p.numel() for p in unet.parameters()) == 35_746_307
    assert 5e7 < sum(p.numel() for p in latents.parameters()) < 2e8
    small = {**ladder.LATENTS, "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
    guided = ladder.cases()[-1]
    case = replace(guided, make=lambda: ladder.UNet(**small), shape=(1, 4, 8, 8), steps=2)
    rows = rows_of(case)
    assert not [row for row in rows.values() if "failed" in row]
    assert all(rows[name]["bit_equal"] for name in EXACT)


def timed(runs: dict[str, Callable[[], object]], *_: object) -> dict[str, list[float]]:
    """A microsecond a step and half of one a small kernel, and ten for any replay."""
    for run in runs.values():
        run()
    each = {"step": 1.0, "small": 0.5}
    us = {name: 10 + each[name.split()[0]] * int(name.split()[1]) for name in runs}
    return {name: [value * 1e-6] for name, value in us.items()}


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_marginal_step_is_the_difference_of_two_graphs(
    monkeypatch: pytest.MonkeyPatch, eta: float
) -> None:
    monkeypatch.setattr(ladder, "device_seconds", timed)
    monkeypatch.setattr(ladder, "SHORT", 2)
    monkeypatch.setattr(ladder, "LONG", 4)
    (row,) = ladder.marginal((2, 4, 4), eta, device="cpu")
    assert (row["us_per_step"], row["us_per_small_kernel"], row["us_beyond_it"]) == (1, 0.5, 0.5)
    assert row["us_2_steps"] == 12
    assert [part.gi_code.co_name for part in ladder.marginals()] == ["marginal"] * 4  # type: ignore[attr-defined]


def test_rounds_end_with_their_time() -> None:
    calls: list[str] = []

    def of(name: str) -> Callable[[], None]:
        return lambda: calls.append(name)

    taken = wall_seconds({"a": of("a"), "b": of("b")}, lambda: None, 0.0, least=2, most=9)
    assert calls == ["a", "b", "b", "a"]  # each round begins with another
    taken = wall_seconds({"a": of("a")}, lambda: None, 60.0, least=2, most=9)
    assert len(taken["a"]) == 9


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """``benchmarks.gpu`` on a machine that seems to have a GPU, whose sections are made up."""
    for name, answer in (
        ("unusable", None),
        ("describe", {"gpu": "A GPU"}),
        ("clocks", None),
        ("commit", ""),
    ):
        monkeypatch.setattr(gpu, name, lambda answer=answer: answer)
    monkeypatch.setattr(gc, "collect", lambda: 0)
    report = tmp_path / "report.xml"
    report.write_text('<testsuites><testsuite tests="2" skipped="1"/></testsuites>')

    def main(*arguments: str, tests: bool = True) -> int:
        given = ["--results", str(tmp_path), *arguments]
        return gpu.main([*given, *(["--tests", str(report)] if tests else [])])

    return main


def section(*rows: Record, then: Exception | None = None) -> Iterator[Record]:
    yield from rows
    if then is not None:
        raise then


def test_a_record_is_written_as_it_grows(
    monkeypatch: pytest.MonkeyPatch, machine: Callable[..., int], tmp_path: Path
) -> None:
    path = tmp_path / "a-gpu-marginal-ladder.json"

    def second() -> Iterator[Record]:
        kept = json.loads(path.read_text())
        assert kept["marginal"] == [{"us": 1}]
        assert kept["ladder"] == [{"ms": 2}]
        assert not kept["complete"]
        yield {"ms": 3}

    monkeypatch.setattr(ladder, "marginals", lambda: [section({"us": 1})])
    monkeypatch.setattr(ladder, "ladders", lambda *_: [section({"ms": 2}), second()])
    assert machine("--sections", "ladder", "marginal") == 0
    kept = json.loads(path.read_text())
    assert kept["complete"]
    assert kept["ladder"] == [{"ms": 2}, {"ms": 3}]
    assert kept["tests"] == {"passed": 1, "skipped": 1, "failed": 0}
    assert "loop" not in kept


def test_of_a_run_with_wrong_results_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch, machine: Callable[..., int], tmp_path: Path
) -> None:
    monkeypatch.setattr(ladder, "marginals", lambda: [section({"us": 1})])
    wrong = section({"ms": 2}, then=WrongResultError("one is off"))
    monkeypatch.setattr(ladder, "ladders", lambda *_: [wrong, section({"ms": 3})])
    assert machine("--sections", "marginal", "ladder") == 1
    assert not list(tmp_path.glob("*.json"))


def test_nor_of_one_without_its_tests(
    monkeypatch: pytest.MonkeyPatch, machine: Callable[..., int], tmp_path: Path
) -> None:
    monkeypatch.setattr(ladder, "ladders", lambda *_: [section({"ms": 2})])
    assert machine("--sections", "ladder", tests=False) == 0
    assert not list(tmp_path.glob("*.json"))


def test_a_part_that_fails_keeps_no_other_from_being_seen(
    monkeypatch: pytest.MonkeyPatch, machine: Callable[..., int], tmp_path: Path
) -> None:
    failing = section({"ms": 2}, then=RuntimeError("out of luck"))
    monkeypatch.setattr(ladder, "ladders", lambda *_: [failing, section({"ms": 3})])
    assert machine("--sections", "ladder") == 1
    kept = json.loads((tmp_path / "a-gpu-ladder.json").read_text())
    assert kept["ladder"] == [{"ms": 2}, {"failed": "RuntimeError: out of luck"}, {"ms": 3}]
