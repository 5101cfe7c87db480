"""Times the host's work for a step by each call: Python, PyTorch and the checks.

    python -m benchmarks.host                       # "host" of benchmarks/results/<machine>.json
    python -m benchmarks.host --beside ../before    # in turns with the package of another checkout

On tensors this small the arithmetic takes next to no time. ``torch.add(out=)``, a single PyTorch
operation, is the yardstick, and the plain loop with precomputed factors is the peer. Each result is
checked first, against the plain loop's or against that of the class that a drop-in replaces. A
process runs one backend of one checkout, on one thread, and times its rows in turns; processes take
turns too. A cell is blank where the other checkout lacks the call, and a row is left out where its
package is not installed. The bound Triton launch needs no GPU: a function that does nothing
replaces the driver's launch.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TypeAlias

import torch

from benchmarks.markdown import grid, met_at_most, span
from benchmarks.plain import NUMBERS
from benchmarks.timing import Record, by, interval, times, turn, wall_seconds
from benchmarks.ways import ADD, DRIVERLESS, LAUNCH, NOISY, SHAPES, STEPS, Ways

ROOT = Path(__file__).parents[1]
LIMIT = 1.2
"""Greatest (time of a bound launch without the driver) / (time of ``torch.add(out=)``)."""
LEAST = 6
"""Fewest rounds, over all processes, whose record is kept."""
Taken: TypeAlias = dict[tuple[str, str], list[float]]
"""{(shape, row): seconds a step, round by round}."""


def child(root: Path, rounds: int) -> None:
    """Prints the times of this checkout's package, on one thread, as JSON."""
    sys.path[:0] = [str(root), str(root / "kernels" / "torch-ext")]
    torch.set_num_threads(1)
    where = Path(str(importlib.import_module("fastddim").__file__))
    if root not in where.parents:
        raise SystemExit(f"{root} must be a checkout of fastddim: the package is {where}")
    found = []
    for shape in (*SHAPES, DRIVERLESS):
        runs = Ways(shape).ready(ours=root == ROOT)
        taken = wall_seconds(runs, lambda: None, 0.0, rounds, rounds)
        found += [[by(shape), name, [s / STEPS for s in of]] for name, of in taken.items()]
    print(json.dumps(found))


def measured(root: Path, backend: str, rounds: int) -> Taken:
    """Runs a process of this checkout and returns its times."""
    # The second variable selects PyTorch's steps in a checkout that does not know the first.
    env = os.environ | {"FASTDDIM_BACKEND": backend}
    env |= {"NUMBA_DISABLE_JIT": "1"} if backend == "torch" else {}
    env.pop("TRITON_INTERPRET", None)
    command = [
        sys.executable,
        "-m",
        "benchmarks.host",
        "--child",
        str(root),
        "--rounds",
        str(rounds),
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{root}, {backend}: its process ended with {done.returncode}")
    lines = json.loads(done.stdout.splitlines()[-1])
    return {(shape, name): seconds for shape, name, seconds in lines}


def rows_of(backend: str, others: list[Path], processes: int, rounds: int) -> list[Record]:
    """One row for each shape and call; checkouts take turns."""
    taken: dict[Path, list[Taken]] = {root: [] for root in (ROOT, *others)}
    roots = {str(root): root for root in taken}
    for k in range(processes):
        for name in turn(list(roots), k):
            taken[roots[name]].append(measured(roots[name], backend, rounds))
    now = taken[ROOT]
    all_of = {key: [s for of in now for s in of[key]] for key in now[0]}
    rows = []
    for key, seconds in all_of.items():
        shape, name = key
        row: Record = {"backend": backend, "shape": shape, "row": name}
        row["us"] = interval([s * 1e6 for s in seconds])
        row["of_add"] = times(seconds, all_of[shape, ADD])
        base = all_of.get((shape, NUMBERS + NOISY * name.endswith(NOISY)))
        row |= {} if base is None else {"of_plain": times(seconds, base)}
        row |= {"required": LIMIT} if name == LAUNCH else {}
        medians = [
            [statistics.median(of[key]) for of in taken[root] if key in of] for root in taken
        ]
        row["now_before"] = [
            times(medians[0], before) if before else None for before in medians[1:]
        ]
        rows.append(row)
    return rows


def shown(section: Record) -> str:
    """One table for each backend and shape."""
    head = ["µs", f"of {ADD}", "of the plain loop", *(f"now / {c}" for c in section["beside"])]
    parts = []
    for backend, shape in dict.fromkeys((r["backend"], r["shape"]) for r in section["rows"]):
        lines = [[f"{backend}, {shape}", *head]]
        for row in section["rows"]:
            if (row["backend"], row["shape"]) == (backend, shape):
                of_add, most = span(row["of_add"]), row.get("required")
                if most is not None:
                    of_add += f"; required: ≤ {most:g}×, met: {met_at_most(row['of_add'], most)}"
                found = (row.get("of_plain"), *row["now_before"])
                cells = ["" if ratio is None else span(ratio) for ratio in found]
                lines.append([row["row"], span(row["us"], ""), of_add, *cells])
        parts.append(grid(*lines))
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--beside", type=Path, action="append", default=[], metavar="PATH",
        help="another checkout, timed in turns with this one; may be repeated")  # fmt: skip
    add("--backends", nargs="+", help="backends to time (default: all that run on this CPU)")
    add(
        "--processes",
        type=int,
        default=3,
        help="processes of each backend (default: 3)",
    )
    add("--rounds", type=int, default=15, help="rounds of each process (default: 15)")
    add("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        return child(args.child, args.rounds)
    # Imported late: a child must not import this checkout's package.
    from benchmarks.records import commit, keep, provenance
    from fastddim.step import backends

    others = [path.resolve() for path in args.beside]
    if ROOT in others:
        parser.error(f"--beside must name another checkout, got {ROOT}")
    there = backends.available("cpu")
    section: Record = provenance("python -m benchmarks.host") | {"threads": 1}
    section["beside"] = [commit(other) for other in others]
    for path in args.beside:  # the record keeps no path of this machine
        section["command"] = section["command"].replace(str(path), path.name)
    section["rows"] = rows = []
    for backend in args.backends or there:
        rows += rows_of(backend, others, args.processes, args.rounds)
    print(shown(section))
    if args.processes * args.rounds >= LEAST and {*there} <= {*(args.backends or there)}:
        print(f"wrote {keep('host', section)}")
    return None


if __name__ == "__main__":
    main()
