"""A section's parts, the arguments of its launches, and the outcomes of tests."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from benchmarks import children, gpu_sections, outcomes, testing
from benchmarks.checks import differing
from benchmarks.children import ROOT, Deadline, Pipe
from benchmarks.gpu_sections import DEAD, Part
from benchmarks.sections import launches, peers, scale, variants
from benchmarks.timing import Record, WrongResultError
from benchmarks.variants import VARIANTS, launch_arguments, step_arguments
from fastddim import using
from tests.rehearsal import faked

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


def test_a_part_that_needs_more_time_than_is_left_is_not_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(children, "time", SimpleNamespace(monotonic=lambda: 100.0))
    given: list[float] = []

    def measure(deadline: Deadline) -> Iterator[Record]:
        given.append(deadline.left())
        yield {"us": 1}

    parts = [Part("a", {"of": k}, measure, weight, 40.0) for k, weight in enumerate((1.0, 9.0))]
    rows_of(parts, seconds=50)
    assert given == [40, 50]  # the first part's share is 5 s
    _, found = rows_of(parts[:1], seconds=39)
    assert found[-1]["row"] == {"of": 0, "left_out": "no time: it needs 40 s"}
    assert len(given) == 2


LATE = r"""
import sys, time
from pathlib import Path
from benchmarks.timing import limit
folder = Path(sys.argv[1])
(folder / "slowly.py").write_text("import time\nbegun = 1\ntime.sleep(0.5)\nended = 1\n")
sys.path.insert(0, str(folder))
try:
    with limit(0.1):
        import slowly
        time.sleep(60)
except TimeoutError as error:
    print(error, slowly.ended)
"""


@pytest.mark.slow
def test_a_limit_interrupts_no_import(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LATE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "took more than 0.1 s 1\n", done.stderr


HEAVY = """
import os, sys
from contextlib import contextmanager
os.environ["TRITON_INTERPRET"] = "1"
from tests.rehearsal import faked, small_sizes
with faked():
    small_sizes()
    from benchmarks import gpu_sections
    from benchmarks.children import Deadline, Pipe
    from benchmarks.sections import scale
    late = set()
    @contextmanager
    def limit(seconds):
        before = set(sys.modules)
        yield
        late.update(set(sys.modules) - before)
    for section in (gpu_sections.loops, gpu_sections.peers, gpu_sections.ladder):
        section.limit = limit
    gpu_sections.imported(sys.argv[1])
    parts = gpu_sections.SECTIONS[sys.argv[1]](scale.Sizes(64, 6, ("epsilon",)))
    status = gpu_sections.run(parts, Deadline(120), Pipe(os.devnull))
heavy = ("diffusers", "transformers", "torch._dynamo", "torch._inductor")
if sys.argv[1] == "loops":
    heavy = heavy[:2]  # On a CPU the loops are compiled too.
late = {name for name in late if name.startswith(heavy)}
assert len(late) < 10, sorted(late)
"""


@pytest.mark.slow
@pytest.mark.parametrize("section", ["loops", "peers", "ladder"])
def test_no_limit_includes_a_heavy_import(section: str) -> None:
    pytest.importorskip("diffusers")
    command = [sys.executable, "-c", HEAVY, section]
    path = f"{ROOT}:{ROOT / 'kernels' / 'torch-ext'}"
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_eager_peers_have_rows_before_a_compiler_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "DEVICE", "cpu")
    monkeypatch.setattr(scale, "LAUNCHES", 2)
    for name in ("epsilon", "epsilon philox"):
        monkeypatch.setitem(VARIANTS, name, replace(VARIANTS[name], shape=(4, 4, 4)))
    loaded = RuntimeError("the compiler is loaded")
    monkeypatch.setattr(peers, "compiler_loaded", Mock(side_effect=loaded))
    with faked(), using("triton"):
        rows = peers.peers(scale.Sizes(64, 6), Deadline(60))
        found = [row["step"] for row in itertools.islice(rows, 5)]
        with pytest.raises(RuntimeError, match="is loaded"):
            next(rows)
    assert found[0] == "fastddim"
    assert peers.BY_NUMBERS in found


def test_no_argument_of_a_variant_is_read_before_it_is_written() -> None:
    # Then memory that nothing has written holds NaN.
    torch.use_deterministic_algorithms(True)
    try:
        for name, v in VARIANTS.items():
            given = step_arguments(replace(v, shape=(v.shape[0], 4, 4)), 2)
            for argument, value in given.items():
                if isinstance(value, torch.Tensor):
                    assert value.isfinite().all(), (name, argument)
    finally:
        torch.use_deterministic_algorithms(False)


# What is asked


ASKED = {
    0.99: (
        "epsilon",
        "epsilon tensor",
        "epsilon odd",
        "epsilon clip rederive",
        "v",
        "flow",
        "epsilon tensor posterior clip",
    ),
    0.975: ("flow philox", "epsilon philox", "epsilon odd philox", "learned philox clip rederive"),
    0.955: (
        *("epsilon bf16", "epsilon x0 clip", "epsilon philox bf16", "epsilon philox rows x0"),
        *("epsilon threshold", "epsilon fp16 next", "v philox bf16 next"),
        *("sample philox x0 clip", "guidance bf16 next", "guidance philox bf16 clip next"),
        "guidance philox threshold",
    ),
    0.95: ("epsilon order 2", "epsilon philox order 2", "v bf16 order 2 next"),
    0.93: (
        *("epsilon last philox", "epsilon last philox rgb", "epsilon last philox odd"),
        *("epsilon mixed bf16", "epsilon mixed rgb", "epsilon philox last mixed rgb"),
        *("guidance philox bf16 last next", "epsilon philox last order 2"),
    ),
    0.90: ("learned last", "learned last rgb"),
}


def test_each_variant_is_asked_the_least_of_its_kinds() -> None:
    found = {name: variants.required(v) for name, v in VARIANTS.items()}
    assert found == {name: least for least, names in ASKED.items() for name in names}


def test_a_learned_variance_between_the_pixels_is_read_along() -> None:
    moved = {name: launches.moved_bytes(v) for name, v in VARIANTS.items()}
    assert moved["learned last"] == moved["learned last rgb"] == 16
    assert moved["learned philox clip rederive"] == moved["epsilon"] == 12
    assert moved["epsilon bf16"] == 10
    assert moved["epsilon order 2"] == moved["v bf16 order 2 next"] == 20


def test_a_copy_moves_as_many_bytes_in_whole_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "DEVICE", "cpu")
    for total in (12 * 65 * 3 * 255 * 255, 12 * 1024, 10):
        calls, moved = launches.copies(total, 2)
        copied, added = calls["copy"](0), calls["add"](1)
        assert isinstance(copied, torch.Tensor)
        assert isinstance(added, torch.Tensor)
        for name, result, streams in (("copy", copied, 2), ("add", added, 3)):
            assert result.nbytes % 2**20 == 0
            assert moved[name] == streams * result.nbytes
            assert 0 <= moved[name] - total < streams * 2**20


def test_results_of_a_launch_are_compared_with_the_reference() -> None:
    for name in ("epsilon x0 clip", "guidance bf16 next", "learned last", "epsilon order 2"):
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


def test_a_childs_reason_is_its_error() -> None:
    text = "Failed: Traceback (most recent call last):\n  File a\n    f()\nKeyError: 3\nprinted"
    crash = SimpleNamespace(reprcrash=SimpleNamespace(message=text))
    assert outcomes.reason(crash) == "KeyError: 3"
    crash.reprcrash.message = "AssertionError: one\n  two"
    assert outcomes.reason(crash) == "AssertionError: one"


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
