"""The run of ``benchmarks/gpu.sh``, without a GPU: its time, its record, and what may go wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import children, gpu, gpu_report, gpu_sections, records, sanitizer, testing
from benchmarks.checks import differing
from benchmarks.children import ROOT, Child, Deadline, Pipe
from benchmarks.gpu import SHARES, Book, budget, measured
from benchmarks.gpu_report import TABLES
from benchmarks.gpu_sections import DEAD, Part
from benchmarks.timing import Record, WrongResultError
from benchmarks.variants import VARIANTS, launch_arguments

# What a program that measures a section does first: it writes to the file that it is told of.
HEAD = """
import json, os, signal, subprocess, sys, time
begin, file = int(sys.argv[1]), open(sys.argv[2], "w", buffering=1)
def part(k): print(json.dumps({"part": k, "key": "variants", "label": {"variant": k}}), file=file)
def row(k): print(json.dumps({"key": "variants", "row": {"variant": k, "us": k}}), file=file)
"""


def program(code: str) -> Callable[[str, Deadline, list[str]], Child]:
    """In place of ``gpu.section``: a process that runs this."""

    def section(_: str, deadline: Deadline, options: list[str]) -> Child:
        begin = options[options.index("--begin") + 1] if "--begin" in options else "0"
        return Child(lambda path: [sys.executable, "-c", HEAD + code, begin, path], deadline)

    return section


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book({"gpu": "A GPU"}, tmp_path / "a-gpu.json", ["variants"])


def kept(book: Book) -> Record:
    found: Record = json.loads(book.path.read_text())
    return found


# The time


def test_the_shares_are_those_of_seven_minutes() -> None:
    assert list(SHARES) == [
        *("tests", "variants", "host", "graph", "peers", "loops", "ladder", "sanitizer"),
        "tuning",
    ]
    assert sum(share.seconds for share in SHARES.values()) == pytest.approx(gpu.SECONDS, abs=5)
    assert set(SHARES) - {"tests"} == set(gpu_sections.SECTIONS) - {"machine"}
    # What was measured on an H200 fits, its process's start included.
    for name, seconds in (("tests", 80), ("variants", 39), ("peers", 10), ("graph", 6)):
        assert SHARES[name].seconds >= 1.2 * seconds + 8 * (name != "tests"), name


def test_the_page_says_what_each_section_may_take() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (\d+) \|", page, flags=re.MULTILINE))
    assert {name: float(seconds) for name, seconds in rows.items()} == {
        name: share.seconds for name, share in SHARES.items()
    }
    assert f"seconds of {gpu.SECONDS:.0f}" in page
    assert sum(len(check.tests) for check in sanitizer.CHECKS) == 2 * 14
    assert "over fourteen of the GPU tests" in page


def test_time_that_a_section_leaves_goes_to_the_later_ones() -> None:
    names = list(SHARES)
    assert budget("tests", names[1:], 417) == pytest.approx(120, abs=3)
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


# The parts of a section


def rows_of(parts: list[Part], seconds: float = 60.0, begin: int = 0) -> tuple[int, list[Record]]:
    lines: list[Record] = []

    class Kept(Pipe):
        def __init__(self) -> None:
            pass

        def write(self, found: Record) -> None:
            lines.append(found)

    status = gpu_sections.run(parts, Deadline(seconds), Kept(), begin)
    return status, lines


def giving(*rows: Record, then: Exception | None = None) -> Callable[[Deadline], Iterator[Record]]:
    def measure(_: Deadline) -> Iterator[Record]:
        yield from rows
        if then is not None:
            raise then

    return measure


@pytest.mark.parametrize("alive", [True, False])
def test_a_part_that_raises_spares_the_others_if_the_gpu_lives(
    monkeypatch: pytest.MonkeyPatch, alive: bool
) -> None:
    monkeypatch.setattr(gpu_sections, "alive", lambda: alive)
    parts = [
        Part("a", {"of": 0}, giving({"us": 1}, then=WrongResultError("one is off"))),
        Part("b", {"of": 1}, giving({"us": 2}, then=RuntimeError("illegal address"))),
        Part("b", {"of": 2}, giving({"us": 3})),
    ]
    status, found = rows_of(parts)
    rows = [(line["key"], line["row"]) for line in found if "row" in line]
    assert rows[:4] == [
        ("a", {"us": 1}),
        ("a", {"of": 0, "wrong": "one is off"}),
        ("b", {"us": 2}),
        ("b", {"of": 1, "failed": "RuntimeError: illegal address"}),
    ]
    assert [line.get("raised") for line in found if "failed" in line.get("row", {})] == [True]
    assert (status, rows[4:]) == ((0, [("b", {"us": 3})]) if alive else (DEAD, []))
    # Another process goes on where this one has ended.
    status, found = rows_of(parts, begin=2)
    assert [line.get("part") for line in found] == [2, None]


def test_parts_share_the_time_by_their_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock that stands still: what is beside the parts takes no time of theirs.
    monkeypatch.setattr(children, "time", SimpleNamespace(monotonic=lambda: 100.0))
    given: list[float] = []

    def measure(deadline: Deadline) -> Iterator[Record]:
        given.append(deadline.left())
        yield {}

    rows_of([Part("a", {}, measure, weight) for weight in (1.0, 3.0, 6.0)], seconds=100)
    assert given == pytest.approx([10, 100 / 3, 100])
    _, found = rows_of([Part("a", {"of": 0}, measure)], seconds=0)
    assert found[-1]["row"] == {"of": 0, "left_out": "no time"}
    assert len(given) == 3


# What is asked


ASKED = {
    0.99: ("epsilon", "epsilon tensor", "epsilon odd", "epsilon clip rederive", "v"),
    0.975: ("epsilon philox", "epsilon odd philox", "learned philox clip rederive"),
    0.955: (
        *("epsilon bf16", "epsilon x0 clip", "epsilon philox bf16", "epsilon philox rows x0"),
        *("epsilon threshold", "epsilon fp16 next", "v philox bf16 next"),
        *("sample philox x0 clip", "guidance bf16 next", "guidance philox bf16 clip next"),
        "guidance philox threshold",
    ),
    0.93: (
        *("epsilon last philox", "epsilon last philox rgb", "epsilon last philox odd"),
        *("epsilon mixed bf16", "epsilon mixed rgb", "epsilon philox last mixed rgb"),
        "guidance philox bf16 last next",
    ),
    0.90: ("learned last", "learned last rgb"),
}


def test_each_variant_is_asked_the_least_of_its_kinds() -> None:
    found = {name: gpu_sections.asked(v) for name, v in VARIANTS.items()}
    assert found == {name: least for least, names in ASKED.items() for name in names}


def test_a_learned_variance_between_the_pixels_is_read_along() -> None:
    moved = {name: gpu_sections.moved_bytes(v) for name, v in VARIANTS.items()}
    assert moved["learned last"] == moved["learned last rgb"] == 16
    assert moved["learned philox clip rederive"] == moved["epsilon"] == 12
    assert moved["epsilon bf16"] == 10


def test_a_copy_moves_as_many_bytes_in_whole_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sections, "DEVICE", "cpu")
    for total in (12 * 65 * 3 * 255 * 255, 12 * 1024, 10):
        calls, moved = gpu_sections.copies(total, 2)
        copied, added = calls["copy"](0), calls["add"](1)
        assert isinstance(copied, torch.Tensor)
        assert isinstance(added, torch.Tensor)
        for name, result, streams in (("copy", copied, 2), ("add", added, 3)):
            assert result.nbytes % 2**20 == 0
            assert moved[name] == streams * result.nbytes
            assert 0 <= moved[name] - total < streams * 2**20


def test_results_of_a_launch_are_compared_with_the_reference() -> None:
    for name in ("epsilon x0 clip", "guidance bf16 next", "learned last"):
        launch = launch_arguments(replace(VARIANTS[name], shape=(3, 4, 4)), 2)
        import fastddim_kernels

        fastddim_kernels.ddim_step(**launch)
        assert differing(launch) == []
        for written in ("out", "x0", "next_input"):
            if launch.get(written) is not None:
                before = launch[written].clone()
                launch[written].flatten()[-1] += 1
                launch[written].copy_(torch.where(before == 0, before + 1, -before))
                assert written in differing(launch)
                launch[written].copy_(before)


# The tests' outcomes


SUITE = {
    "test_a.py": """
import os, pytest
pytestmark = pytest.mark.gpu
def test_passes(): pass
def test_fails(): assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="there is one GPU")
def test_skipped(): pass
@pytest.fixture
def broken(): raise RuntimeError("no such luck")
def test_is_not_set_up(broken): pass
@pytest.fixture
def untidy():
    yield
    raise RuntimeError("not torn down")
def test_is_not_torn_down(untidy): pass
""",
    "test_b.py": "import pytest, no_such_module\npytestmark = pytest.mark.gpu\n",
    "test_c.py": """
import pytest
pytestmark = pytest.mark.gpu
def test_too(): pass
""",
}


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Test files in a folder of their own, with this project's settings."""
    for name, text in SUITE.items():
        (tmp_path / name).write_text(text)
    command = testing.pytest
    settings = ("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path))
    monkeypatch.setattr(testing, "pytest", lambda path, *a: command(path, *settings, *a))
    monkeypatch.setattr(
        testing, "files", lambda: sorted(str(path) for path in tmp_path.glob("test_*.py"))
    )
    monkeypatch.setattr(testing, "workers", lambda: 2)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("beside", [True, False])
def test_outcomes_are_those_of_the_tests(
    suite: Path, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    if not beside:
        monkeypatch.setattr(testing, "beside_one_another", list)
    tests = testing.Tests()
    list(tests.run(Deadline(120)))
    found = {
        name.split("/")[-1].replace("test_a.py::", ""): o for name, o in tests.outcomes.items()
    }
    assert found == {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_skipped": "skipped",
        "test_is_not_set_up": "failed",
        "test_is_not_torn_down": "failed",
        "test_b.py": "failed",
        "test_c.py::test_too": "passed",
    }
    assert not tests.good
    reasons = {
        f["test"].split("::")[-1].split("/")[-1]: f["why"] for f in tests.summary()["failures"]
    }
    assert "one is not two" in reasons["test_fails"]
    assert "no such luck" in reasons["test_is_not_set_up"]
    assert "no_such_module" in reasons["test_b.py"]
    assert tests.summary()["ended"] == "done"


@pytest.mark.slow
def test_a_test_that_ends_its_process_is_one_that_failed(suite: Path) -> None:
    pytest.importorskip("xdist")  # whose worker it ends, and not pytest itself
    (suite / "test_b.py").write_text(
        "import os, pytest\n@pytest.mark.gpu\ndef test_ends(): os._exit(1)\n"
    )
    tests = testing.Tests()
    list(tests.run(Deadline(120)))
    found = {name.split("::")[-1]: outcome for name, outcome in tests.outcomes.items()}
    assert found["test_ends"] == "failed"
    assert found["test_too"] == found["test_passes"] == "passed"


@pytest.mark.slow
def test_of_tests_that_are_cut_off_those_that_ended_are_known(suite: Path) -> None:
    pytest.importorskip("xdist")  # so that others end while one hangs
    (suite / "test_b.py").write_text(
        "import time, pytest\n@pytest.mark.gpu\ndef test_hangs(): time.sleep(600)\n"
    )
    (suite / "test_a.py").unlink()
    tests = testing.Tests()
    begin = time.monotonic()
    list(tests.run(Deadline(10)))
    assert time.monotonic() - begin < 20
    assert tests.summary() == {
        "passed": 1,
        "skipped": 0,
        "failed": 0,
        "ended": "cut off",
        "failures": [],
    }
    assert not tests.good


def test_every_file_with_gpu_tests_is_run() -> None:
    files = testing.files()
    assert {
        "tests/kernels/test_gpu.py",
        "tests/loop/test_graph.py",
        "tests/loop/test_record.py",
    } <= set(files)
    assert "tests/mathematics/test_latents.py" not in files


@pytest.mark.slow
def test_gpu_tests_need_no_more_than_a_gpus_machine_has() -> None:
    files = [f for f in testing.files() if f != "tests/dropins/test_diffusers.py"]
    names = ("typer", "rich", "PIL", "matplotlib", "scipy", "transformers", "kernels")
    code = f"""
import importlib, sys
sys.path[:0] = {[str(ROOT), str(ROOT / "kernels" / "torch-ext")]!r}
sys.modules |= dict.fromkeys({names!r})
for name in {[f[:-3].replace("/", ".") for f in files]!r}:
    importlib.import_module(name)
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
        *("yardsticks", "variants", "host", "marginal", "graph", "peers", "loops", "ladder"),
        *("sanitizer", "tuning"),
    ]
    for key, of_key in rows.items():
        for row in of_key:
            assert not {"wrong", "failed", "left_out"} & set(row), (key, row)
    assert [row["variant"] for row in rows["variants"]] == some
    assert {row["verdict"] for row in rows["sanitizer"]} == {"no test ran"}
    # The pages can show it.
    assert gpu_report.tables(found).count("| --- |") == len(TABLES)
    # Without a GPU every test is skipped, which is no success: that alone is bad.
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("BAD")] == [
        "BAD: tests: done, 0 passed"
    ]
    assert found["tests"]["skipped"] > 500


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
    assert "a rehearsal's record is of no GPU" in done.stderr
    for path in records.RESULTS.glob("*.json"):
        assert "rehearsal" not in path.read_text()
