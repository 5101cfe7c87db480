"""The sanitizer's verdicts, and a rehearsal of the whole run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_report, records, testing
from benchmarks.children import ROOT, Deadline
from benchmarks.gpu import SHARES
from benchmarks.gpu_report import TABLES
from benchmarks.sections import sanitizer, serving
from benchmarks.timing import Record


@pytest.mark.slow
def test_gpu_tests_need_no_more_than_a_gpus_machine_has() -> None:
    """The tests of drop-ins for diffusers alone need diffusers, which needs a package left out."""
    names = ("typer", "rich", "PIL", "matplotlib", "scipy", "transformers", "kernels")
    code = f"""
import importlib, sys
import pytest
sys.path[:0] = {[str(ROOT), str(ROOT / "kernels" / "torch-ext")]!r}
sys.modules |= dict.fromkeys({names!r})
for name in {[f[:-3].replace("/", ".") for f in sorted(testing.files())]!r}:
    try:
        importlib.import_module(name)
    except pytest.skip.Exception:
        pass
    except ModuleNotFoundError as error:
        of_diffusers = "PIL.Image is missing; it comes with" in str(error)
        if not (of_diffusers and name.startswith("tests.dropins.")):
            raise
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_pytest_benchmark_is_switched_off_beside_xdist(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: set[str] = set()
    monkeypatch.setattr(testing, "find_spec", lambda name: name in installed or None)
    monkeypatch.setattr(testing, "workers", lambda: 10)
    assert testing.beside_one_another() == []
    installed.add("pytest_benchmark")
    assert testing.beside_one_another() == []
    installed.add("xdist")
    assert testing.beside_one_another() == ["-n", "10", "-p", "no:benchmark"]
    installed.remove("pytest_benchmark")
    assert testing.beside_one_another() == ["-n", "10"]


# compute-sanitizer


FAKE = """#!{python}
import json, os, sys, time
arguments = sys.argv[1:]
at, out = arguments.index("--log-file"), arguments.index("--outcomes")
seen = dict(options=arguments[:at], caching=os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"))
open({seen!r}, "a").write(json.dumps(seen) + chr(10))
with open(arguments[at + 1], "w") as log:
    log.write({log!r})
with open(arguments[out + 1], "w") as outcomes:
    for k in range({tests}):
        outcomes.write(json.dumps(dict(test=str(k), outcome={outcome!r})) + chr(10))
time.sleep({sleep})
"""


CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"


FOUND = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at ddim_step_kernel+0x510
=========     by thread (32,0,0) in block (3,0,0)
=========     Address 0x7f21 is out of bounds
=========
========= ERROR SUMMARY: 2 errors
"""


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A program in compute-sanitizer's place, which notes how it was called."""

    def make(log: str, tests: int = 2, outcome: str = "passed", sleep: float = 0.0) -> Path:
        seen = tmp_path / "seen"
        path = tmp_path / "compute-sanitizer"
        text = FAKE.format(
            python=sys.executable,
            seen=str(seen),
            log=log,
            tests=tests,
            outcome=outcome,
            sleep=sleep,
        )
        path.write_text(text)
        path.chmod(0o755)
        monkeypatch.setenv(sanitizer.VARIABLE, str(path))
        return seen

    return make


def verdict(check: sanitizer.Check, seconds: float = 60.0) -> Record:
    (row,) = sanitizer.run(check, Deadline(seconds))
    return row


@pytest.mark.parametrize(
    ("log", "tests", "outcome", "expected"),
    [
        (CLEAN, 2, "passed", "clean"),
        (CLEAN, 2, "skipped", "no test ran"),
        (CLEAN, 0, "passed", "no test ran"),
        (CLEAN, 2, "failed", "tests failed"),
        (FOUND, 2, "passed", "2 errors"),
        (FOUND + CLEAN, 2, "passed", "2 errors"),  # of two processes
        ("========= Error: no device", 0, "passed", "no summary: it exited with 0"),
    ],
)
def test_the_sanitizers_verdict(
    tool: Callable[..., Path], log: str, tests: int, outcome: str, expected: str
) -> None:
    tool(log, tests, outcome)
    row = verdict(sanitizer.CHECKS[0])
    assert row["verdict"] == expected
    assert row["tests_passed"] == (tests if outcome == "passed" else 0)
    if log.startswith(FOUND):
        assert row["errors"] == 2
        assert row["first"] == [
            "Invalid __global__ read of size 16 bytes at ddim_step_kernel+0x510 "
            "by thread (32,0,0) in block (3,0,0)"
        ]


@pytest.mark.slow
def test_one_that_is_late_says_what_it_has_found_so_far(tool: Callable[..., Path]) -> None:
    tool("========= COMPUTE-SANITIZER\n", tests=1, sleep=60)
    row = verdict(sanitizer.CHECKS[0], seconds=2.0)
    assert (row["verdict"], row["tests_passed"], row["errors"]) == ("out of time", 1, None)
    tool(FOUND.rsplit("=========", 1)[0], tests=1, sleep=60)  # it has written no summary
    row = verdict(sanitizer.CHECKS[0], seconds=2.0)
    assert (row["verdict"], row["errors"]) == ("1 errors", 1)


def test_steps_have_memory_of_their_own_and_graphs_cannot(tool: Callable[..., Path]) -> None:
    seen = tool(CLEAN)
    for check in sanitizer.CHECKS:
        verdict(check)
    calls = [json.loads(line) for line in seen.read_text().splitlines()]
    tools = [call["options"][call["options"].index("--tool") + 1] for call in calls]
    assert tools == ["memcheck", "initcheck"] * 2
    assert [check.of for check in sanitizer.CHECKS] == ["steps"] * 2 + ["graphs"] * 2
    assert [call["caching"] for call in calls] == ["1", "1", None, None]
    # initcheck must see what PyTorch's own kernels write.
    assert ["--kernel-name" in call["options"] for call in calls] == [True, False] * 2


def test_the_sanitizer_is_found_where_it_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(folder: str) -> Path:
        path = tmp_path / folder / sanitizer.NAME
        path.parent.mkdir(parents=True)
        path.touch(0o755)
        return path

    for name in (sanitizer.VARIABLE, "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sanitizer, "TOOLKITS", tmp_path / "local")
    monkeypatch.setattr(sanitizer, "find_spec", lambda _: None)
    assert sanitizer.program() is None
    assert verdict(sanitizer.CHECKS[0])["verdict"] == "not installed"
    package = make("site-packages/nvidia/cu13/bin")
    found: Any = type("Spec", (), {"submodule_search_locations": [str(package.parents[2])]})
    monkeypatch.setattr(sanitizer, "find_spec", lambda _: found)
    assert sanitizer.program() == str(package)
    toolkit = make("local/cuda-13.0/bin")
    assert sanitizer.program() == str(toolkit)
    home = make("home/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert sanitizer.program() == str(home)
    on_path = make("path")
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert sanitizer.program() == str(on_path)
    monkeypatch.setenv(sanitizer.VARIABLE, str(package))
    assert sanitizer.program() == str(package)
    monkeypatch.setenv(sanitizer.VARIABLE, "/no/such/program")
    assert sanitizer.program() is None


@pytest.mark.slow
def test_the_tests_that_the_sanitizer_runs_exist() -> None:
    for check in sanitizer.CHECKS[::2]:
        done = subprocess.run(
            [*testing.pytest("/dev/null", *check.tests), "--collect-only"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{len(check.tests)} tests collected" in done.stdout


# All of it


@pytest.mark.slow
def test_the_whole_run_is_rehearsed(tmp_path: Path) -> None:
    python, tool = tmp_path / "python", tmp_path / "compute-sanitizer"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.rehearsal "$@"\n')
    tool.write_text(
        f"#!{sys.executable}\nimport os, sys\nat = sys.argv.index('--log-file')\n"
        f"open(sys.argv[at + 1], 'w').write({CLEAN!r})\n"
        "os.execv(sys.argv[at + 2], sys.argv[at + 2:])\n"
    )
    for path in (python, tool):
        path.chmod(0o755)
    some = ["epsilon", "epsilon philox", "learned last", "guidance bf16 next"]
    sizes = ["--seconds", "420", "--rounds", "6", "--elements", "64"]
    begin = time.monotonic()
    script, results = str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out")
    done = subprocess.run(
        [script, "--results", results, *sizes, "--variants", *some],
        env=os.environ | {"PYTHON": str(python), sanitizer.VARIABLE: str(tool)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert time.monotonic() - begin < 300
    said = done.stdout + done.stderr
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == "rehearsal-no-gpu.json"
    found = json.loads(path.read_text())
    assert found["gpu"] == "rehearsal (no GPU)"
    assert {name: state["ended"] for name, state in found["sections"].items()} == dict.fromkeys(
        SHARES, "done"
    ), said
    assert found["complete"]
    assert found["missing"] == []
    rows = {key: value for key, value in found.items() if isinstance(value, list) and value}
    assert list(rows) == [
        *("yardsticks", "variants", "host", "marginal", "graph", "serving", "peers", "loops"),
        *("ladder", "sanitizer", "tuning"),
    ]
    for key, of_key in rows.items():
        for row in of_key:
            assert not {"wrong", "failed", "left_out"} & set(row), (key, row)
    assert [row["variant"] for row in rows["variants"]] == some
    engine = [row for row in rows["serving"] if row["figure"] == serving.ENGINE]
    assert [row["shape"][0] for row in engine] == [4, 1]
    assert all(row["bit_equal"] for row in engine)
    assert {row["verdict"] for row in rows["sanitizer"]} == {"no test ran"}
    # The pages can show it.
    assert gpu_report.tables(found).count("| --- |") == len(TABLES)
    # Without a GPU every test is skipped, which is no success: that alone is bad.
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("BAD")] == [
        "BAD: tests: done, 0 passed"
    ]
    assert found["tests"]["skipped"] > 500


@pytest.mark.slow
def test_a_rehearsal_keeps_no_record_among_the_results() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.rehearsal", "-m", "benchmarks.gpu"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels' / 'torch-ext'}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "a rehearsal's record belongs to no GPU" in done.stderr
    for path in records.RESULTS.glob("*.json"):
        assert "rehearsal" not in path.read_text()
