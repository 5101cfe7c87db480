"""The peers of the CPU's benchmarks, their rows, and the command that runs them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_step, records, report
from benchmarks.bench_step import Level, Table
from benchmarks.peers import PEERS, Loops, MissingError, Peer
from benchmarks.timing import WrongResultError
from fastddim.step import reference
from tests.benchmarks.reports import asked
from tests.paths import here

TINY = (1, 16, 7)


BRIEF = Level(0.0, 2, 5)


# The peers


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_every_peer_gives_what_it_must(eta: float) -> None:
    for shape in ((1, 16, 7), (2, 3, 5, 7), (1, 2, 3, 5, 7)):
        loops = Loops(shape, 5, eta)
        names = ("original", "diffusers", "plain", "tensors", "scheduler", "pytorch")
        for name in (*names, *here("numba")):
            PEERS[name].ready(loops)


def test_a_result_that_is_wrong_raises() -> None:
    loops = Loops((2, 3, 16, 16), 5, 1.0)
    right = loops.original()
    loops.near(loops.original)
    nan = torch.full_like(right, math.nan)
    wrong = (lambda: 1.01 * loops.original(), lambda: nan, loops.sample)
    for run in wrong:
        with pytest.raises(WrongResultError, match="off the reference"):
            loops.near(run)
    with pytest.raises(WrongResultError, match="bit for bit"):
        loops.equal(lambda: loops.original().nextafter(right), loops.eager_seeds)


def test_noise_of_another_strength_is_wrong() -> None:
    loops = Loops((2, 3, 64, 64), 5, 1.0)

    def noisy(strength: float, shift: float = 0.0) -> Tensor:
        x = loops.x
        torch.manual_seed(0)
        for row in loops.table.clone():
            z = strength * torch.randn_like(x) + shift
            x, _ = reference.ddim_step(x, loops.eps, row, z)
        return x

    loops.near_but_for_noise(lambda: noisy(1.0))
    for strength, shift in ((0.9, 0.0), (1.1, 0.0), (1.0, 0.2), (0.0, 0.0), (math.nan, 0.0)):
        with pytest.raises(WrongResultError, match="its noise has mean"):
            loops.near_but_for_noise(lambda s=strength, m=shift: noisy(s, m))  # type: ignore[misc]


# The rows


def test_a_wrong_or_missing_peer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = dict(PEERS)

    def lacking(_: Loops) -> Any:
        raise RuntimeError("No working C++ compiler found\nand more")

    def doubled(loops: Loops) -> Any:
        return lambda: 2 * loops.sample()

    peers["compile"] = Peer("compiled", lacking, PEERS["compile"].check, "none")
    peers["pytorch"] = Peer("ours", doubled, PEERS["pytorch"].check, "none")
    monkeypatch.setattr(bench_step, "PEERS", peers)
    table = Table(TINY, 0, ["compile", "pytorch", "diffusers"], BRIEF)
    assert sorted(table.taken) == sorted(
        ["copy", "diffusers", *bench_step.BESIDE, *bench_step.BESIDE_SMALL]
    )
    assert table.missing == {"compile": "RuntimeError: No working C++ compiler found"}
    assert str(table.wrong["pytorch"]).startswith("ours at 1x16x7, η = 0: it is not")
    with pytest.raises(MissingError, match="No working"):
        peers["compile"].ready(Loops(TINY, 5, 0.0))
    with pytest.raises(RuntimeError, match="No working"):  # of ours, a failure and no absence
        replace(peers["compile"], ours=True).ready(Loops(TINY, 5, 0.0))
    assert [name for name, peer in PEERS.items() if peer.ours] == list(report.OURS)
    found = table.row("diffusers")
    assert found["bytes_per_element"] == 56
    assert found["rounds"] == 2
    assert {"times_original", "times_plain", "times_tensors"} <= set(found)
    seconds = found["us_per_step"][0] / 1e6
    assert found["gb_per_s"] == pytest.approx(56 * 112 / seconds / 1e9, rel=1e-3)
    assert "times_compile" not in found


def test_a_machine_has_one_file_and_a_command_its_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "cpu_name", lambda: "Some(R) CPU @ 2.0 GHz")
    path = records.keep("step", {"rows": [1]}, tmp_path / "new")
    assert path.name == "some-cpu-2-0-ghz.json"
    records.keep("loop", {"rows": [2]}, tmp_path / "new")
    records.keep("step", {"rows": [3]}, tmp_path / "new")
    found = json.loads(path.read_text())
    assert (found["machine"], found["step"], found["loop"]) == (
        "Some(R) CPU @ 2.0 GHz",
        {"rows": [3]},
        {"rows": [2]},
    )
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    # Beside benchmarks/gpu.py's own, and none of the CPU's.
    gpu = records.keep("step", {"rows": [4]}, tmp_path / "new", "NVIDIA H200")
    assert gpu.name == "nvidia-h200-loops.json"
    assert json.loads(gpu.read_text())["machine"] == "NVIDIA H200"
    section = records.provenance("pytest")
    assert section["versions"]["torch"] == torch.__version__
    assert section["threads"] == torch.get_num_threads()


@pytest.mark.slow
def test_the_benchmark_option_runs_the_benchmarks_alone() -> None:
    run = asked("--benchmark", "--co", "-q")
    rows = [line for line in run.stdout.splitlines() if "::" in line]
    assert run.returncode == 0, run.stdout
    assert 40 <= len(rows) <= 60
    assert all(row.startswith("benchmarks/bench_step.py::test_step[") for row in rows)
    assert asked("--co", "-q", "benchmarks").returncode == pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("benchmarks/bench_step.py",), "--benchmark alone runs benchmarks, got benchmarks/"),
        (
            ("--benchmark", "tests/mathematics/test_latents.py"),
            "--benchmark runs no tests, got tests/mathematics/test_lat",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(arguments: list[str], said: str) -> None:
    run = asked(*arguments)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: {said}" in run.stderr


def test_without_pytest_benchmark_one_line_says_so() -> None:
    run = asked("--benchmark", "-p", "no:benchmark")
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    (line,) = (line for line in run.stderr.splitlines() if line)
    assert line.startswith("ERROR: --benchmark needs pytest-benchmark")


@pytest.mark.slow
def test_pytest_benchmark_reports_the_seconds_that_were_taken(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    run = asked(
        *("--benchmark", "-k", "1x16x7-eta1 and not scheduler", "--benchmark-json", str(out)),
        f"--results={tmp_path}",  # or pytest takes the folder for one of tests, and its root
    )
    assert run.returncode == 0, run.stdout
    assert "nothing is kept" in run.stdout
    rows = json.loads(out.read_text())["benchmarks"]
    assert {"test_step[1x16x7-eta1-original]", "test_step[1x16x7-eta1-compile]"} <= {
        row["name"] for row in rows
    }
    for row in rows:
        median, taken = row["extra_info"]["us_per_step"][0], row["stats"]["median"] * 1e6
        assert median == pytest.approx(taken, rel=1e-3)
        assert len(row["stats"]["data"]) == row["extra_info"]["rounds"] >= 6
        assert row["group"] == "a step of 1x16x7, η = 1"
        assert row["extra_info"]["noise"]
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]
