"""The host's time for a step: every way in gives what it must, and what another checkout lacks."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastddim
from benchmarks import host, ways
from benchmarks.plain import NUMBERS, TENSORS
from benchmarks.timing import WrongResultError
from benchmarks.ways import ADD, LAUNCH, NOISY, Ways
from tests.paths import here

ROOT = Path(__file__).parents[2]
HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "STEPS", 5)


@pytest.mark.parametrize("backend", here("torch", "numba"))
@pytest.mark.parametrize("shape", ways.SHAPES)
def test_every_way_is_there_and_right(shape: tuple[int, ...], backend: str) -> None:
    with fastddim.using(backend):
        found = Ways(shape).ready(ours=True)
    assert set(found) == set(Ways(shape).every())
    assert {ADD, NUMBERS, TENSORS, "fastddim.bind", "DDIM.sample" + NOISY} < set(found)


def test_a_wrong_result_is_not_timed_and_a_missing_one_is_blank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = ways.SHAPES[0]
    monkeypatch.delattr(fastddim, "bind")
    monkeypatch.setitem(fastddim._FROM, "bind", "coefficients")  # where it is not
    assert "fastddim.bind" not in Ways(shape).ready(ours=False)
    with pytest.raises(AttributeError, match="bind"):
        Ways(shape).ready(ours=True)
    iterate: Callable[[Ways], Tensor] = Ways.iterate
    monkeypatch.setattr(Ways, "iterate", lambda of: torch.nextafter(iterate(of), of.eps))
    with pytest.raises(WrongResultError, match=r"DDIM\.iterate at 1x16x7: it is"):
        Ways(shape).ready(ours=False)


def test_ratios_are_to_yardstick_peer_and_the_other_checkout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other, asked = Path("/before"), []

    def measured(root: Path, backend: str, rounds: int) -> host.Taken:
        asked.append(root)
        slow = len(asked) * (2 if root == other else 1)  # the machine is slower each time
        us = {ADD: 1.0, NUMBERS: 4.0, NUMBERS + NOISY: 8.0, "DDIM.sample": 2.0}
        us |= {"DDIM.sample" + NOISY: 2.0} | ({} if root == other else {"fastddim.bind": 3.0})
        found = {("1x16x7", name): [slow * of * 1e-6] * rounds for name, of in us.items()}
        return found | {("4x4x8x8", name): [slow * 1e-6] * rounds for name in (ADD, LAUNCH)}

    monkeypatch.setattr(host, "measured", measured)
    rows = host.rows_of("torch", [other], 2, 3)
    assert asked == [host.ROOT, other, other, host.ROOT]
    of = {row["row"]: row for row in rows}
    assert of["DDIM.sample"]["of_add"] == [2.0] * 3
    assert of["DDIM.sample"]["of_plain"] == [0.5] * 3
    assert of["DDIM.sample" + NOISY]["of_plain"] == [0.25] * 3
    # In the first turn 1 over 2·2, in the second 4 over 3·2.
    assert of["DDIM.sample"]["now_before"] == [pytest.approx([0.4583, 0.25, 0.6667])]
    assert of["fastddim.bind"]["now_before"] == [None]
    assert "of_plain" not in of[LAUNCH]
    shown = host.shown({"beside": ["abc"], "rows": rows})
    assert "| torch, 1x16x7 | µs | of torch.add(out=) | of the plain loop | now / abc |" in shown
    assert "1× (1–1); required: ≤ 1.2×, met: yes" in shown
    (line,) = (line for line in shown.splitlines() if line.startswith("| fastddim.bind"))
    assert line.endswith("| 3× (3–3) | 0.75× (0.75–0.75) |  |")


FEW = ("--backends", "torch", "--processes", "1", "--rounds", "1")


@pytest.mark.slow
def test_the_host_benchmark_runs_in_a_process_of_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    host.main([*FEW])
    out = capsys.readouterr().out
    assert out.count("| --- |") == 3
    for name in (*Ways((2, 3, 4, 4)).every(), LAUNCH if HAS_TRITON else ADD):
        assert f"\n| {name} | " in out
    assert "wrote" not in out  # of so few rounds
    with pytest.raises(SystemExit):
        host.main(["--beside", str(ROOT), *FEW])
    assert "--beside must name another checkout" in capsys.readouterr().err


@pytest.mark.slow
def test_the_host_benchmark_runs_beside_another_checkout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "fastddim", tmp_path / "fastddim")
    names = tmp_path / "fastddim" / "__init__.py"
    names.write_text(names.read_text().replace('"bind": "step.checked"', '"bind": "step.nowhere"'))
    host.main(["--beside", str(tmp_path), *FEW])
    lines = {line.split(" | ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["| fastddim.bind"].endswith(") |  |")
    assert lines["| DDIM.sample"].endswith(") |")
    assert not lines["| DDIM.sample"].endswith("|  |")


@pytest.mark.slow
def test_the_host_benchmark_refuses_a_folder_without_the_package(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.host", "--child", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"{tmp_path} must be a checkout of fastddim" in done.stderr
