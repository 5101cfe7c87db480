"""The run of ``benchmarks/gpu.sh``, without a GPU: its time, its record, and what may go wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_sections, testing
from benchmarks.children import ROOT, Child, Deadline
from benchmarks.gpu import SHARES, Book, budget, measured
from benchmarks.gpu_sections import DEAD
from benchmarks.sections import sanitizer
from benchmarks.timing import Record
from tests.benchmarks.gpu_run import program


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book({"gpu": "A GPU"}, tmp_path / "a-gpu.json", ["variants"])


def kept(book: Book) -> Record:
    found: Record = json.loads(book.path.read_text())
    return found


# The time


def test_the_shares_are_those_of_seven_minutes() -> None:
    assert list(SHARES) == [
        *("tests", "variants", "host", "graph", "serving", "peers", "loops", "ladder"),
        *("sanitizer", "tuning"),
    ]
    assert sum(share.seconds for share in SHARES.values()) == pytest.approx(gpu.SECONDS, abs=5)
    assert set(SHARES) - {"tests"} == set(gpu_sections.SECTIONS) - {"machine"}
    # What was measured on an H200 fits, its process's start included.
    for name, seconds in (("tests", 105), ("variants", 39), ("peers", 10), ("graph", 6)):
        assert SHARES[name].seconds >= 1.2 * seconds + 8 * (name != "tests"), name


def test_the_page_says_what_each_section_may_take() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (\d+) \|", page, flags=re.MULTILINE))
    assert {name: float(seconds) for name, seconds in rows.items()} == {
        name: share.seconds for name, share in SHARES.items()
    }
    assert f"seconds of {gpu.SECONDS:.0f}" in page
    assert [len(check.tests) for check in sanitizer.CHECKS] == [16, 10, 3, 3]
    assert "memcheck over nineteen of the GPU tests and initcheck over thirteen of them" in page


def test_time_that_a_section_leaves_goes_to_the_later_ones() -> None:
    names = list(SHARES)
    assert budget("tests", names[1:], 417) == pytest.approx(135, abs=3)
    assert budget("variants", names[2:], 417 - 80) > SHARES["variants"].seconds
    assert budget("tuning", [], 33) == 33


@pytest.mark.parametrize("seconds", [30.0, 60.0, 120.0, 240.0, 417.0])
def test_budgets_never_exceed_the_time_that_is_left(seconds: float) -> None:
    left, names, begun = seconds, list(SHARES), []
    for k, name in enumerate(names):
        given = budget(name, names[k + 1 :], left)
        assert given <= left + 1e-9
        if given >= SHARES[name].least:
            begun.append(name)
            left -= given
    # With little time the first sections have enough of it, rather than all of them too little.
    assert begun[0] == "tests"
    assert begun == names or seconds < gpu.SECONDS - gpu.CLOSING
    assert len(begun) >= 2 or seconds < 60


def test_a_deadline_is_never_in_the_past() -> None:
    assert Deadline(-5).left() == 0
    assert Deadline(0).over()
    assert 4 < Deadline(10).part(0.5).left() <= 5


# A section's process


@pytest.mark.slow
def test_rows_are_kept_when_they_are_measured(monkeypatch: pytest.MonkeyPatch, book: Book) -> None:
    code = "part(0); row(0); time.sleep(60)"
    monkeypatch.setattr(gpu, "section", program(code))
    begin = time.monotonic()
    assert measured("variants", Deadline(3), [], book) == "cut off"
    assert time.monotonic() - begin < 6
    assert kept(book)["variants"] == [{"variant": 0, "us": 0}]
    assert not kept(book)["complete"]
    assert "variants" in kept(book)["missing"]


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV),
        ("os._exit(5)", 5),
    ],
)
def test_a_part_that_ends_its_process_costs_itself(
    monkeypatch: pytest.MonkeyPatch, book: Book, end: str, status: int
) -> None:
    code = f"""
for k in range(begin, 3):
    part(k)
    if k == 1:
        {end}
    row(k)
"""
    monkeypatch.setattr(gpu, "section", program(code))
    assert measured("variants", Deadline(30), [], book) == "failed in part"
    assert kept(book)["variants"] == [
        {"variant": 0, "us": 0},
        {"variant": 1, "failed": f"its process ended with {status}"},
        {"variant": 2, "us": 2},
    ]


def test_one_that_leaves_the_gpu_unusable_has_said_why(
    monkeypatch: pytest.MonkeyPatch, book: Book
) -> None:
    code = f"""
why = dict(key="variants", row=dict(variant=0, failed="illegal address"), raised=True)
part(begin)
if begin == 0:
    print(json.dumps(why), file=file)
    os._exit({DEAD})
row(begin)
"""
    monkeypatch.setattr(gpu, "section", program(code))
    assert measured("variants", Deadline(30), [], book) == "failed in part"
    assert kept(book)["variants"] == [
        {"variant": 0, "failed": "illegal address"},
        {"variant": 1, "us": 1},
    ]


def test_a_section_that_does_not_even_begin_has_failed(
    monkeypatch: pytest.MonkeyPatch, book: Book
) -> None:
    monkeypatch.setattr(gpu, "section", program("raise SystemExit(7)"))
    assert measured("variants", Deadline(30), [], book) == "failed: its process ended with 7"


def test_a_section_left_out_is_not_done(monkeypatch: pytest.MonkeyPatch, book: Book) -> None:
    code = """
part(0); row(0); part(1)
print(json.dumps(dict(key="variants", row=dict(variant=1, left_out="no time"))), file=file)
"""
    monkeypatch.setattr(gpu, "section", program(code))
    assert measured("variants", Deadline(30), [], book) == "out of time"


def test_nothing_that_a_section_has_started_outlives_it() -> None:
    code = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
print(json.dumps({"pid": child.pid}), file=file)
"""
    begin = time.monotonic()
    child = program(code)("", Deadline(30), [])
    # Its own child holds the pipe's other end, too: that must not be waited for.
    (found,) = list(child)
    assert time.monotonic() - begin < 10
    assert (child.status, child.late) == (0, False)
    for _ in range(50):
        state = Path(f"/proc/{found['pid']}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("it is still there")


def test_half_a_line_is_none() -> None:
    child = program("row(1); file.write('{\"key\": '); file.flush(); os._exit(0)")
    assert list(child("", Deadline(30), [])) == [
        {"key": "variants", "row": {"variant": 1, "us": 1}}
    ]


# The whole run


MACHINE = """
print(json.dumps({"row": {"gpu": "A GPU"}}), file=file)
"""


ROWS = "part(0); row(0); part(1); row(1)"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """``benchmarks.gpu`` on a machine that seems to have a GPU, whose sections are made up."""

    def main(*arguments: str, **sections: str) -> int:
        def section(name: str, deadline: Deadline, options: list[str]) -> Child:
            return program(sections.get(name, ROWS))(name, deadline, options)

        monkeypatch.setattr(gpu, "section", section)
        before = signal.getsignal(signal.SIGTERM)
        try:
            return gpu.main(["--results", str(tmp_path), *arguments])
        finally:
            signal.signal(signal.SIGTERM, before)

    return main


def test_a_part_of_the_run_has_a_record_of_its_own(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--sections", "ladder", "variants", machine=MACHINE) == 0
    found = json.loads((tmp_path / "a-gpu-variants-ladder.json").read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["a-gpu-variants-ladder.json"]
    assert found["variants"] == [{"variant": 0, "us": 0}, {"variant": 1, "us": 1}] * 2
    assert [found["sections"][name]["ended"] for name in ("variants", "ladder")] == ["done"] * 2
    assert not found["complete"]
    assert found["missing"] == [name for name in SHARES if name not in ("variants", "ladder")]
    assert found["tests"]["ended"] == "not run"
    out = capsys.readouterr().out
    assert out.index("variants (") < out.index("variants: variant 0, us 0") < out.index("ladder (")


def test_a_wrong_result_is_kept_said_and_fails_the_run(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = 'print(json.dumps(dict(key="host", row=dict(call="a", wrong="off"))), file=file)'
    asked = ("--sections", "host", "variants")
    assert run(*asked, machine=MACHINE, host=f"part(0); {wrong}") == 1
    found = json.loads((tmp_path / "a-gpu-variants-host.json").read_text())
    assert found["host"] == [{"call": "a", "wrong": "off"}]
    assert len(found["variants"]) == 2
    assert "BAD: host: call a, wrong off" in capsys.readouterr().err


def test_failing_tests_stop_no_measurement_and_are_named(
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    outcomes = [
        {"test": "a", "outcome": "passed"},
        {"test": "b", "outcome": "failed", "why": "assert 1 == 2"},
    ]

    def pytest_(path: str, *_: str) -> list[str]:
        code = f"open({path!r}, 'w').write({''.join(json.dumps(o) + chr(10) for o in outcomes)!r})"
        return [sys.executable, "-c", f"{code}; raise SystemExit(1)"]

    monkeypatch.setattr(testing, "pytest", pytest_)
    assert run("--sections", "tests", "variants", machine=MACHINE) == 1
    found = json.loads((tmp_path / "a-gpu-tests-variants.json").read_text())
    assert found["tests"] == {
        "passed": 1,
        "skipped": 0,
        "failed": 1,
        "ended": "done",
        "failures": [{"test": "b", "why": "assert 1 == 2"}],
    }
    assert len(found["variants"]) == 2
    assert "BAD: tests: b failed: assert 1 == 2" in capsys.readouterr().err
    # Tests that all were skipped prove nothing.
    outcomes[:] = [{"test": "a", "outcome": "skipped"}]
    assert run("--sections", "tests", machine=MACHINE) == 1


def test_without_a_gpu_one_line_says_so(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(machine=MACHINE.replace('"gpu": "A GPU"', '"unusable": "no CUDA"')) == 2
    assert capsys.readouterr().err == "no CUDA\n"
    assert run(machine="raise SystemExit(1)") == 2
    assert "the GPU did not answer (status 1)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_rehearsed_script_keeps_no_record_among_the_results(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", "--results", str(tmp_path)],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr == "there is no CUDA device here: nothing was measured\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--elements", "5"), "--elements must be at least 12582912, got 5"),
        (("--rounds", "5"), "--rounds must be at least 6, got 5"),
        (("--seconds", "5"), "--seconds must be at least 30, got 5"),
    ],
)
def test_a_run_that_would_measure_nothing_is_refused(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit):
        run(*arguments)
    assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_cut_off_has_kept_what_was_measured(tmp_path: Path, how: int) -> None:
    code = f"""
import sys
sys.path[:0] = {[str(ROOT), str(ROOT / "kernels" / "torch-ext")]!r}
from tests.benchmarks import test_gpu_record as here
from benchmarks import gpu
def section(name, deadline, options):
    slow = "part(0); row(0); time.sleep(60)"
    made = {{"machine": here.MACHINE, "variants": here.ROWS, "host": slow}}
    return here.program(made[name])(name, deadline, options)
gpu.section = section
gpu.main(["--results", {str(tmp_path)!r}, "--sections", "variants", "host", "peers"])
"""
    path = tmp_path / "a-gpu-variants-host-peers.json"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        for _ in range(600):
            if path.exists() and len(json.loads(path.read_text()).get("variants", [])) == 3:
                break
            time.sleep(0.1)
    finally:
        process.send_signal(how)
    process.wait(30)
    found = json.loads(path.read_text())
    assert len(found["variants"]) == 3
    assert not found["complete"]
    assert "variants" not in found["missing"]
    assert {"host", "peers"} <= set(found["missing"])
    assert found["sections"]["host"]["ended"] == "cut off"
    assert found["sections"]["peers"]["ended"] == "not begun"
