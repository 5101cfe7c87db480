"""The table of GPU sections, and the process that measures one of them for ``benchmarks.gpu``.

    python -m benchmarks.gpu_sections variants --seconds 60    # one section as JSON lines, not kept

``benchmarks/sections`` has one module a section. Device times come from CUDA graphs, whose launches
do not wait for Python. Contenders take turns, and each launch reads memory that no earlier launch
left in the cache. The results of the very graph that is timed are checked first; a wrong result
gives a row with ``wrong`` in place of times.

A section is a list of parts. A part that raises loses only its own rows. If it leaves the GPU
unusable (after an illegal address every later launch of the process fails), the process exits with
``DEAD``, and a new process can go on with the next part (``--begin``).
"""

from __future__ import annotations

import argparse
import gc
import importlib
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch

from benchmarks.children import Deadline, Pipe
from benchmarks.sections import (
    graph,
    host,
    ladder,
    loops,
    machine,
    peers,
    sanitizer,
    scale,
    serving,
    tuning,
    variants,
)
from benchmarks.timing import LEFT_OUT, Record, WrongResultError, first_line
from benchmarks.variants import VARIANTS

LARGE = 1 << 20
"""Elements above which a loop gets three times the share of the time."""
DEAD = 3
"""Exit status of a process whose GPU no longer answers."""


@dataclass(frozen=True)
class Part:
    """Rows of a section that are measured together.

    Attributes:
        key: name of the record's list that gets the rows.
        label: content of a row that has no figures.
        rows: measures until the deadline and yields the rows.
        weight: the part's share of the time that is left, relative to the later parts' weights.
        least: seconds that the part needs: it gets no fewer, and is not begun with fewer left.
    """

    key: str
    label: Record
    rows: Callable[[Deadline], Iterable[Record]] = field(repr=False)
    weight: float = 1.0
    least: float = 0.0


def every_machine(_: scale.Sizes) -> list[Part]:
    return [Part("machine", {}, machine.machine)]


def every_variant(sizes: scale.Sizes) -> list[Part]:
    first = Part("yardsticks", {}, partial(variants.yardsticks, sizes))
    names = sizes.variants
    return [
        first,
        *(Part("variants", {"variant": n}, partial(variants.variant, n, sizes)) for n in names),
    ]


def every_host(_: scale.Sizes) -> list[Part]:
    return [Part("host", {}, host.host)]


def every_graph(_: scale.Sizes) -> list[Part]:
    found = []
    for shape in graph.SHAPES:
        for eta in (0.0, 1.0):
            label = {"shape": list(shape), "eta": eta}
            found.append(Part("marginal", label, partial(graph.marginal, shape, eta, scale.DEVICE)))
    return [*found, Part("graph", {}, graph.replays)]


def every_service(sizes: scale.Sizes) -> list[Part]:
    found = [
        Part("serving", {"figure": serving.TICK}, partial(serving.ticks, sizes.rounds), 1.0, 3.0),
        Part("serving", {"figure": serving.HOST_TICK}, serving.on_the_host, 1.0, 2.0),
    ]
    for parts, seconds in ((1, 5.0), (4, 6.0)):
        label = {"figure": serving.ENGINE, "batches": parts}
        found.append(Part("serving", label, partial(serving.alike, parts), seconds, seconds))
    return found


def every_peer(sizes: scale.Sizes) -> list[Part]:
    return [Part("peers", {}, partial(peers.peers, sizes))]


def every_loop(_: scale.Sizes) -> list[Part]:
    found = []
    for shape, steps in scale.LOOPS:
        for eta in (0.0, 1.0):
            label = {"shape": list(shape), "eta": eta}
            # The original loop takes a second to copy large images to the CPU.
            weight = 3.0 if math.prod(shape) > LARGE else 1.0
            found.append(Part("loops", label, partial(loops.loops, shape, steps, eta), weight))
    return found


def every_rung(_: scale.Sizes) -> list[Part]:
    return [
        Part("ladder", {"case": name}, partial(ladder.ladder, case, rungs, scale.DEVICE), *shares)
        for name, case, rungs, *shares in ladder.plan()
    ]


def every_check(_: scale.Sizes) -> list[Part]:
    return [
        Part(
            "sanitizer",
            {"tool": check.tool, "of": check.of},
            partial(sanitizer.run, check),
            check.seconds,
        )
        for check in sanitizer.CHECKS
    ]


def every_choice(sizes: scale.Sizes) -> list[Part]:
    names = tuple(name for name in tuning.TUNED if name in sizes.variants)
    return [Part("tuning", {}, partial(tuning.tuning, names, sizes))]


SECTIONS: dict[str, Callable[[scale.Sizes], list[Part]]] = {
    "machine": every_machine,
    "variants": every_variant,
    "host": every_host,
    "graph": every_graph,
    "serving": every_service,
    "peers": every_peer,
    "loops": every_loop,
    "ladder": every_rung,
    "sanitizer": every_check,
    "tuning": every_choice,
}


DIFFUSERS = (
    *("diffusers.schedulers.scheduling_ddim", "diffusers.models.unets.unet_2d"),
    "fastddim.dropins.diffusers",
)
IMPORTS: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("host", "serving", "loops", "ladder"), DIFFUSERS
)
"""What a section's rows import, which takes many seconds on a cold machine."""


def imported(section: str) -> None:
    """Imports what the section's rows need, so that no row's time or limit includes an import."""
    for name in IMPORTS.get(section, ()):
        with suppress(ImportError):  # The rows that need it say that it is missing.
            importlib.import_module(name)


def alive() -> bool:
    """True if the GPU still answers this process."""
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


def run(parts: list[Part], deadline: Deadline, pipe: Pipe, begin: int = 0) -> int:
    """Measures the parts from ``begin`` on, and writes each row as soon as it is measured.

    Returns:
        0, or ``DEAD`` if a part has left the GPU unusable.
    """
    for k, part in enumerate(parts[begin:], begin):
        pipe.write({"part": k, "key": part.key, "label": part.label})
        if deadline.over():
            pipe.write({"key": part.key, "row": part.label | LEFT_OUT})
            continue
        if deadline.left() < part.least:
            left_out = {"left_out": f"no time: it needs {part.least:g} s"}
            pipe.write({"key": part.key, "row": part.label | left_out})
            continue
        share = part.weight / sum(later.weight for later in parts[k:])
        try:
            for row in part.rows(Deadline(max(share * deadline.left(), part.least))):
                pipe.write({"key": part.key, "row": row})
        except WrongResultError as error:
            pipe.write({"key": part.key, "row": part.label | {"wrong": str(error)}})
        except Exception as error:
            traceback.print_exc()
            row = part.label | {"failed": first_line(error)}
            pipe.write({"key": part.key, "row": row, "raised": True})
            if not alive():
                return DEAD
        gc.collect()
        torch.cuda.empty_cache()
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("section", choices=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit (default: 60)")
    parser.add_argument("--until", type=float, help="deadline by time.monotonic()")
    parser.add_argument("--rows", help="file to write the rows to (default: stdout)")
    parser.add_argument("--begin", type=int, default=0, help="number of the first part")
    parser.add_argument(
        "--elements", type=int, default=scale.ELEMENTS, help="least size of a state"
    )
    parser.add_argument("--rounds", type=int, default=scale.ROUNDS, help="rounds")
    parser.add_argument("--variants", nargs="+", metavar="NAME", choices=list(VARIANTS),
        default=list(VARIANTS), help="variants to measure (default: all)")  # fmt: skip
    args = parser.parse_args(arguments)
    # The imports above take seconds, so the starting process sets the deadline before them.
    left = args.seconds if args.until is None else args.until - time.monotonic()
    deadline = Deadline(left)
    sizes = scale.Sizes(args.elements, args.rounds, tuple(args.variants))
    imported(args.section)
    return run(SECTIONS[args.section](sizes), deadline, Pipe(args.rows), args.begin)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # All rows are written. Leaving CUDA in order takes a second, after which a section that had
    # ended in time would count as cut off.
    os._exit(status)
