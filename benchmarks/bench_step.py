"""The time of a step without the model: ``pytest --benchmark [--level full] [--results DIR]``.

There is one table for each shape and η. A row is a whole loop without a model
(``benchmarks.peers``); its time is divided by its steps. pytest-benchmark times one row after
another, so a slow minute would fall on one row alone. Therefore the loops of a table are timed in
turns, round by round, before the table's first row, and each row hands these seconds to
pytest-benchmark. A ratio is the median of the ratios of single rounds, with a 95% interval. In the
same rounds memory is copied: 12 bytes an element, as many as a step must read and write.

A loop whose result is wrong is not timed; its row fails. The ``extra_info`` of a row:

    noise               source of the noise
    bytes_per_element   bytes that its operations read and write (``benchmarks.counts``)
    gb_per_s            these bytes per second
    us_per_step         [median, low, high], like all values below
    times_original      (time of the original loop) / (time of this one)
    times_diffusers, times_compile      the same for these loops
    times_plain, times_tensors          the same for the plain loop with its factors as numbers, or
                        as zero-dimensional tensors, which are faster on a CPU
    of_copy             the share of a copy's bytes per second
    compile_seconds     for a loop that torch.compile compiles: the time until its first result was
                        there and checked, with caches of former runs
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import pytest
import torch

from benchmarks.counts import counted
from benchmarks.peers import PEERS, Loops, MissingError
from benchmarks.records import keep, provenance
from benchmarks.timing import Record, WrongResultError, by, interval, rounded, times, wall_seconds

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = ((4, 3, 32, 32), (64, 3, 256, 256), (1, 16, 7), (1, 16, 21, 60, 104))
ETAS = (0, 1)
NAMES = [name for name, peer in PEERS.items() if DEVICE in peer.devices]
MUST_MOVE = 12
"""Least bytes per element that a step reads and writes."""
BASES = ("original", "diffusers", "plain", "tensors", "compile")
BESIDE = ("original", "plain")
"""Loops that every table times, even without a row of their own, because ratios refer to them."""
BESIDE_SMALL = ("tensors",) if DEVICE == "cpu" else ()
"""The same for small states; at large ones both plain loops take about the same time."""
GROUPS = [(shape, eta) for shape in SHAPES for eta in ETAS]
SMALL = ((1, 16, 7), (4, 3, 32, 32))
ROWS = [
    (group, name)
    for group in GROUPS
    for name in NAMES
    if not PEERS[name].small or (group[0] in SMALL and not group[1])
]


@dataclass(frozen=True)
class Level:
    """Seconds and rounds of a table, and the steps of loops over large states."""

    seconds: float
    rounds: int
    steps_of_much: int


MUCH = 2**20
"""Elements from which a state is large."""
STEPS = 50
LEVELS = {"quick": Level(2.0, 6, 4), "full": Level(10.0, 9, STEPS)}


class Table:
    """The loops of one shape and η: times of the right ones, and why the others have none."""

    def __init__(self, shape: tuple[int, ...], eta: float, names: list[str], level: Level) -> None:
        n = torch.Size(shape).numel()
        self.shape, self.eta = shape, eta
        self.steps = STEPS if n < MUCH else level.steps_of_much
        self.missing: dict[str, str] = {}
        self.wrong: dict[str, Exception] = {}
        loops = Loops(shape, self.steps, eta, DEVICE)
        self.compiling: dict[str, float] = {}
        runs: dict[str, Callable[[], object]] = {}
        beside = (*BESIDE, *(BESIDE_SMALL if n < MUCH else ()))
        for name in dict.fromkeys([*beside, *names]):
            begun = time.perf_counter()
            try:
                runs[name] = PEERS[name].ready(loops)
                if PEERS[name].compiles:
                    self.compiling[name] = time.perf_counter() - begun
            except MissingError as error:
                self.missing[name] = str(error)
            except WrongResultError as error:
                self.wrong[name] = error
        a = torch.randn(n * MUST_MOVE // 8, device=loops.device)
        b = torch.empty_like(a)

        def copy() -> None:
            for _ in range(self.steps):
                b.copy_(a)

        copy()
        wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
        gc.collect()
        taken = wall_seconds(runs | {"copy": copy}, wait, level.seconds, level.rounds, 200)
        self.taken = {name: [s / self.steps for s in of] for name, of in taken.items()}

    def row(self, name: str) -> Record:
        peer, taken = PEERS[name], self.taken[name]
        moved = counted(self.eta, peer.make)["bytes_per_element"] if peer.counted else MUST_MOVE
        copied = [s * moved / MUST_MOVE for s in self.taken["copy"]]
        total = moved * torch.Size(self.shape).numel()
        us = interval([s * 1e6 for s in taken])
        return {
            "noise": peer.noise if self.eta else peer.quiet_noise,
            "bytes_per_element": moved,
            "gb_per_s": rounded(total / us[0] / 1e3),
            "us_per_step": us,
            **{f"times_{b}": times(self.taken[b], taken) for b in BASES if b in self.taken},
            "of_copy": times(copied, taken),
            "steps": self.steps,
            "rounds": len(taken),
            **({"compile_seconds": rounded(self.compiling[name])} if peer.compiles else {}),
        }


def named(group: Any) -> str:
    return group if isinstance(group, str) else f"{by(group[0])}-eta{group[1]}"


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Table:
    """Times the table of this shape and η before its first row, with the selected rows only."""
    if request.param not in _tables:
        items: list[Any] = request.session.items
        params = [item.callspec.params for item in items if hasattr(item, "callspec")]
        names = [p["peer"] for p in params if p.get("table") == request.param]
        shape, eta = request.param
        level = LEVELS[str(request.config.getoption("level"))]
        _tables[request.param] = Table(shape, eta, names, level)
    return _tables[request.param]


_tables: dict[Any, Table] = {}
"""The tables so far. pytest may run rows of several tables in turns."""


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest) -> Iterator[list[Record]]:
    """The rows so far. At the end they are kept if the run is complete and every result right."""
    found: list[Record] = []
    yield found
    where = request.config.getoption("results")
    if where is None:
        return
    config: Any = request.config
    if request.session.testsfailed or len(found) < len(ROWS):
        outcome = "nothing is kept of a run with wrong results, or of a part of a run"
    else:
        section = provenance("pytest") | {"level": config.getoption("level"), "rows": found}
        name = torch.cuda.get_device_name() if DEVICE == "cuda" else None
        outcome = str(keep("step", section, where, name))
    # Output is lost while pytest captures it.
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        config.get_terminal_writer().line(f"\n{outcome}")


_now = 0.0


def _clock() -> float:
    """A clock that advances only by the seconds that were measured before."""
    return _now


@pytest.mark.benchmark(timer=_clock)
@pytest.mark.filterwarnings("default")  # the compiler's own warnings are no errors of ours
@pytest.mark.parametrize(("table", "peer"), ROWS, indirect=["table"], ids=named)
def test_step(benchmark: Any, table: Table, peer: str, rows: list[Record]) -> None:
    about = {"shape": list(table.shape), "eta": table.eta, "peer": peer}
    benchmark.group = f"a step of {by(table.shape)}, η = {table.eta}"
    if peer in table.wrong:
        raise table.wrong[peer]
    if peer in table.missing:
        rows.append(about | {"missing": table.missing[peer]})
        pytest.skip(table.missing[peer])
    row = table.row(peer)
    benchmark.extra_info.update(row)
    rows.append(about | row)
    taken = cycle(table.taken[peer])

    def again() -> None:
        global _now
        _now += next(taken)

    benchmark.pedantic(again, rounds=len(table.taken[peer]))
