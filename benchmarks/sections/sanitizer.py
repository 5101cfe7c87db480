"""Section "sanitizer": NVIDIA's compute-sanitizer over some GPU tests, for stray reads and writes.

A test compares results. It notices neither a read beyond a tensor whose value is masked away, nor a
write into memory that no test reads. ``memcheck`` notices both, and ``initcheck`` notices a read of
memory that was never written.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks import testing
from benchmarks.children import Child, Deadline
from benchmarks.timing import Record, rounded

NAME = "compute-sanitizer"
VARIABLE = "COMPUTE_SANITIZER"
"""Environment variable that names the program."""
TOOLKITS = Path("/usr/local")
STEP = "tests/kernels/test_gpu.py::test_every_variant_equals_the_reference"
VARIANTS = (
    *("epsilon philox bf16", "epsilon last philox", "epsilon last philox rgb", "learned last rgb"),
    *("guidance philox bf16 clip next", "epsilon threshold"),
    *("epsilon philox order 2", "epsilon philox last order 2"),
)
ODD = tuple(f"{STEP}[{name}-odd]" for name in VARIANTS)
STEPS = (*ODD, *(f"{STEP}[{name}-its own shape]" for name in VARIANTS))
"""Tests of every way of addressing memory: in fours and one by one, channels last with three and
four channels, beside a learned variance, both halves of guidance, a threshold for each sample, and
the history of order 2."""
CAPTURED = "tests/kernels/test_gpu_graphs.py::test_a_captured_step_follows_what_its_arguments_hold"
GRAPHS = (
    f"{CAPTURED}[epsilon philox rows x0]",
    f"{CAPTURED}[epsilon philox order 2]",
    "tests/kernels/test_gpu_graphs.py::test_a_captured_loop_is_the_loop[3]",
)
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error")
SHOWN = 3
"""Number of errors that the record quotes, each with the two lines that locate it."""


@dataclass(frozen=True)
class Check:
    """One tool over some tests.

    Attributes:
        tool: name of the tool.
        of: "steps" or "graphs".
        tests: names of the tests.
        caching: True if PyTorch may use its caching allocator, which takes blocks of 2 MiB or more.
            The tools treat the whole block as valid and initialised, so they miss a read or write
            beyond a tensor in it. Without caching each tensor gets its own memory from the driver.
            A capture needs caching, because it must not allocate from the driver.
        seconds: the check's share of the section's time, relative to the others'.
    """

    tool: str
    of: str
    tests: tuple[str, ...]
    caching: bool
    seconds: float

    def options(self) -> list[str]:
        found = [
            *("--tool", self.tool, "--print-limit", "20"),
            # pytest exits with 1 where a test fails, and PyTorch looks up functions that older
            # drivers lack: neither is a kernel's error.
            *("--check-exit-code", "no"),
        ]
        if self.tool == "memcheck":
            # Checking PyTorch's own kernels takes long and tells nothing about ours. initcheck must
            # see them, because they write the memory that ours read.
            kernels = ("kns=ddim_step_kernel", "kns=normal_kernel")
            found += ["--report-api-errors", "no"]
            found += [word for kernel in kernels for word in ("--kernel-name", kernel)]
        return found


CHECKS = (
    Check("memcheck", "steps", STEPS, caching=False, seconds=15),
    # In large tensors initcheck finds what it finds in small ones, and watches PyTorch's kernels.
    Check("initcheck", "steps", (*ODD, *STEPS[-2:]), caching=False, seconds=40),
    Check("memcheck", "graphs", GRAPHS, caching=True, seconds=20),
    Check("initcheck", "graphs", GRAPHS, caching=True, seconds=25),
)
"""On an H200 memcheck took 10 s for twelve steps and initcheck 46 s for ten, six of them small. For
two graphs, whose tests start a process each, 8 s were too few for either tool."""


def program() -> str | None:
    """Path of compute-sanitizer: named, on PATH, in a CUDA toolkit, or in a pip package."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return shutil.which(named)
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders = [Path(home) / "bin" for home in homes]
    folders += sorted(TOOLKITS.glob("cuda*/bin"), reverse=True)
    # For CUDA 13 nvidia-cuda-sanitizer-api has nvidia/cu13/bin, for CUDA 12
    # nvidia/cuda_sanitizer_api/bin.
    packages = find_spec("nvidia")
    for place in packages.submodule_search_locations or () if packages else ():
        folders += sorted(Path(place).glob("*/bin"), reverse=True)
    places = [os.environ.get("PATH", os.defpath), *map(str, folders)]
    return shutil.which(NAME, path=os.pathsep.join(places))


def errors(log: str) -> tuple[int | None, list[str]]:
    """(number of errors, or None where it is unknown; the first errors as text).

    A tool that is killed writes no summary, but may have reported errors before.
    """
    summaries = [int(count) for count in SUMMARY.findall(log)]
    lines = [line.lstrip("= ").rstrip() for line in log.splitlines()]
    first = [
        " ".join(line for line in lines[i : i + 3] if line)[:300]
        for i, line in enumerate(lines)
        if line.startswith(("Invalid", "Uninitialized", "Internal", "Misaligned", "Program hit"))
    ]
    return (sum(summaries) if summaries else len(first) or None), first[:SHOWN]


def run(check: Check, deadline: Deadline) -> Iterator[Record]:
    """The row of one check: its verdict, the numbers of errors and tests, and the first errors."""
    row: Record = {"tool": check.tool, "of": check.of}
    found = program()
    if found is None:
        yield row | {"verdict": "not installed"}
        return
    env = dict(os.environ)
    if not check.caching:
        env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log, outcomes = Path(folder) / "log", Path(folder) / "outcomes"
        # The outcomes go to a file, because the tool need not pass an open pipe on to pytest.
        tests = testing.pytest(str(outcomes), *check.tests)
        child = Child(
            lambda _: [found, *check.options(), "--log-file", str(log), *tests], deadline, env
        )
        for _ in child:
            pass
        text = log.read_text(errors="replace") if log.exists() else ""
        known = testing.Tests()
        for line in outcomes.read_text().splitlines() if outcomes.exists() else ():
            with suppress(json.JSONDecodeError):  # a killed pytest may leave half a line
                known.add(json.loads(line))
    count, first = errors(text)
    summary = known.summary()
    row |= {f"tests_{outcome}": summary[outcome] for outcome in testing.WORST}
    row |= {"errors": count, "verdict": verdict(child, count, summary), "first": first}
    yield row | {"seconds": rounded(time.monotonic() - begin)}


def verdict(child: Child, count: int | None, summary: Record) -> str:
    """ "clean" only if every test has run and passed, and the tool has found no error."""
    if count:
        return f"{count} errors"
    if child.late:
        return "out of time"
    if count is None:
        return f"no summary: it exited with {child.status}"
    if summary["failed"]:
        return "tests failed"
    return "clean" if summary["passed"] else "no test ran"
