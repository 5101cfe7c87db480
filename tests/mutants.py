"""A mutation run: each named fault is put into the code, and the fast tests must catch it.

    python -m tests.mutants [--area kernel] [--jobs 2]

A fault is one replacement in one file, made in a copy of the repository. It is caught if the fast
tests of its area fail. The command prints a line for each fault and ends with status 1 if one is
not caught.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tests import mutations, mutations_serving
from tests.mutations import Mutant

ROOT = Path(__file__).parents[1]
MUTANTS = [*mutations.MUTANTS, *mutations_serving.MUTANTS]
TESTS = {
    "kernel": ["tests/kernels"],
    "fused": ["tests/step"],
    "loop": ["tests/loop", "tests/step"],
    "serving": ["tests/serving", "tests/step/test_many.py"],
    "dropins": ["tests/dropins"],
}
"""The tests that run for the faults of an area."""


def place_of(mutant: Mutant, root: Path) -> Path:
    """Returns the one file that holds the code once."""
    places = [
        path
        for path in sorted((root / mutant.folder).rglob("*.py"))
        if mutant.code in path.read_text()
    ]
    if len(places) != 1 or places[0].read_text().count(mutant.code) != 1:
        raise ValueError(f"{mutant.name}: {len(places)} files hold {mutant.code!r}")
    return places[0]


def caught(mutant: Mutant, root: Path) -> tuple[bool, str]:
    """Runs the area's tests with the fault in ``root``; returns (caught, the first failure)."""
    path = place_of(mutant, root)
    text = path.read_text()
    path.write_text(text.replace(mutant.code, mutant.fault))
    try:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0"]
        run = subprocess.run(
            [*command, "--benchmark-disable", "--tb=no", *TESTS[mutant.area]],
            cwd=root,
            env={**os.environ, "PYTHONPATH": f"{root}:{root}/kernels/torch-ext"},
            capture_output=True,
            text=True,
        )
    finally:
        path.write_text(text)
    failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    # A fault that writes outside of its memory may kill the process, which has a negative status.
    if run.returncode > 2 or (run.returncode > 0 and not failed):
        raise RuntimeError(f"{mutant.name}: {run.stdout[-2000:]}{run.stderr[-2000:]}")
    by = failed[0].partition(" - ")[0] if failed else f"signal {-run.returncode}"
    return run.returncode != 0, by


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--area", choices=TESTS, help="only the faults of this area")
    parser.add_argument("--jobs", type=int, default=2, help="the number of faults at a time")
    arguments = parser.parse_args()
    mutants = [m for m in MUTANTS if arguments.area in (None, m.area)]
    for mutant in mutants:
        place_of(mutant, ROOT)
    with tempfile.TemporaryDirectory() as folder:
        roots: SimpleQueue[Path] = SimpleQueue()
        ignored = shutil.ignore_patterns(".git", ".*_cache", "out", "__pycache__", ".hypothesis")
        for i in range(arguments.jobs):
            roots.put(Path(shutil.copytree(ROOT, Path(folder, str(i)), ignore=ignored)))

        def one(mutant: Mutant) -> bool:
            root, began = roots.get(), time.monotonic()
            try:
                found, by = caught(mutant, root)
            finally:
                roots.put(root)
            took = f"{time.monotonic() - began:.0f} s"
            verdict = f"caught by {by.removeprefix('FAILED ')}" if found else "NOT CAUGHT"
            print(f"{mutant.area}: {mutant.name}: {verdict} ({took})", flush=True)
            return found

        with ThreadPoolExecutor(arguments.jobs) as pool:
            results = list(pool.map(one, mutants))
    print(f"{sum(results)} of {len(results)} caught")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
