"""NVIDIA's compute-sanitizer over a few of the GPU tests: no kernel reads or writes astray.

``benchmarks.gpu`` runs this as its section "sanitizer". A test compares results; it notices neither
a read beyond a tensor whose value is masked away nor a write into memory that nobody looks at.
``memcheck`` notices both, and ``initcheck`` a read of memory that nobody has written.
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
"""The environment variable that names the program, where it is somewhere else."""
TOOLKITS = Path("/usr/local")
STEP = "tests/kernels/test_gpu.py::test_every_variant_equals_the_reference"
VARIANTS = (
    *("epsilon philox bf16", "epsilon last philox", "epsilon last philox rgb", "learned last rgb"),
    *("guidance philox bf16 clip next", "epsilon threshold"),
)
STEPS = tuple(f"{STEP}[{name}-{size}]" for size in ("odd", "its own shape") for name in VARIANTS)
"""Every way of addressing memory: in fours and one by one, channels last with three and with four
channels, beside a learned variance, both halves of guidance, a sample's own threshold."""
CAPTURED = "tests/kernels/test_gpu_graphs.py::test_a_captured_step_follows_what_its_arguments_hold"
GRAPHS = (
    f"{CAPTURED}[epsilon philox rows x0]",
    "tests/kernels/test_gpu_graphs.py::test_a_captured_loop_is_the_loop[3]",
)
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error")
SHOWN = 3
"""How many of the errors stand in the record, each with the two lines that say where it is."""


@dataclass(frozen=True)
class Check:
    """One tool over some tests.

    Attributes:
        tool: of compute-sanitizer's.
        of: what the tests are of.
        tests: their names.
        caching: whether PyTorch may keep memory that is free. It takes memory in blocks of 2 MiB
            and more, and of what lies beside a tensor in its block the tools believe that it may be
            read and written, and that it holds values. So every tensor gets memory of its own from
            the driver; but not in a capture, which must not ask the driver for memory.
    """

    tool: str
    of: str
    tests: tuple[str, ...]
    caching: bool

    def options(self) -> list[str]:
        found = [
            *("--tool", self.tool, "--print-limit", "20"),
            # pytest exits with 1 where a test fails, and PyTorch asks the driver for functions that
            # older ones lack: neither is an error of a kernel's.
            *("--check-exit-code", "no"),
        ]
        if self.tool == "memcheck":
            # PyTorch's own kernels are not in question, and to check them takes long. initcheck
            # must see them: it is they who write what ours read.
            kernels = ("kns=ddim_step_kernel", "kns=normal_kernel")
            found += ["--report-api-errors", "no"]
            found += [word for kernel in kernels for word in ("--kernel-name", kernel)]
        return found


CHECKS = (
    Check("memcheck", "steps", STEPS, caching=False),
    Check("initcheck", "steps", STEPS, caching=False),
    Check("memcheck", "graphs", GRAPHS, caching=True),
    Check("initcheck", "graphs", GRAPHS, caching=True),
)


def program() -> str | None:
    """Where compute-sanitizer is: named, on PATH, in a CUDA toolkit, or in a package of pip's."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return shutil.which(named)
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders = [Path(home) / "bin" for home in homes]
    folders += sorted(TOOLKITS.glob("cuda*/bin"), reverse=True)
    # nvidia-cuda-sanitizer-api has nvidia/cu13/bin; that of CUDA 12 has nvidia/cuda_sanitizer_api.
    packages = find_spec("nvidia")
    for place in packages.submodule_search_locations or () if packages else ():
        folders += sorted(Path(place).glob("*/bin"), reverse=True)
    places = [os.environ.get("PATH", os.defpath), *map(str, folders)]
    return shutil.which(NAME, path=os.pathsep.join(places))


def errors(log: str) -> tuple[int | None, list[str]]:
    """How many errors there are, None where that is not known; and the first of them.

    A tool that is ended early writes no summary, but may have told of errors before.
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
    """The verdict of one check: how many errors in how many tests, or why there is none."""
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
        # The outcomes go to a file: the tool need not hand an open pipe on to what it starts.
        tests = testing.pytest(str(outcomes), *check.tests)
        child = Child(
            lambda _: [found, *check.options(), "--log-file", str(log), *tests], deadline, env
        )
        for _ in child:
            pass
        said = log.read_text(errors="replace") if log.exists() else ""
        known = testing.Tests()
        for line in outcomes.read_text().splitlines() if outcomes.exists() else ():
            with suppress(json.JSONDecodeError):  # half a line, where it was killed
                known.add(json.loads(line))
    count, first = errors(said)
    summary = known.summary()
    row |= {f"tests_{outcome}": summary[outcome] for outcome in testing.WORST}
    row |= {"errors": count, "verdict": verdict(child, count, summary), "first": first}
    yield row | {"seconds": rounded(time.monotonic() - begin)}


def verdict(child: Child, count: int | None, summary: Record) -> str:
    """ "clean" only where every test has run and passed, and the tool has found nothing."""
    if count:
        return f"{count} errors"
    if child.late:
        return "out of time"
    if count is None:
        return f"no summary: it exited with {child.status}"
    if summary["failed"]:
        return "tests failed"
    return "clean" if summary["passed"] else "no test ran"
