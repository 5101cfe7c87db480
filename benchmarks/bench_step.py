"""What a step costs beside the model: ``pytest --benchmark [--level full] [--results DIR]``.

One table a shape and η. A row is a whole loop without its model (``benchmarks.peers``), its time
divided by its steps. pytest-benchmark times one row after another, and a slow minute would fall on
one of them alone: so the loops of a table are timed in turns, round by round, before its first row,
and each row gives pytest-benchmark the seconds that were taken then. Ratios are those of single
rounds, their median with a 95% interval. Beside the loops, in the same rounds, memory is copied:
12 bytes an element, what a step must read and write.

Nothing is timed whose result is wrong; its row fails. ``extra_info`` has, of each row:

    noise               where it comes from
    bytes_per_element   read and written by its operations, as counted (``benchmarks.counts``)
    gb_per_s            of these bytes
    us_per_step         [median, low, high], as are
    times_seed          how often the step fits into that of the original loop
    times_diffusers, times_compile      or into that of these
    times_plain, times_tensors  or into that of a plain loop, its factors made before as numbers, or
                        as tensors of no dimensions, on a CPU the faster of the two
    of_copy             the share of a copy's speed at which it moves its bytes
"""

from __future__ import annotations

import gc
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
"""Bytes of an element that a step cannot but read and write."""
BASES = ("seed", "diffusers", "plain", "tensors", "compile")
BESIDE = ("seed", "plain", *(("tensors",) if DEVICE == "cpu" else ()))
"""What every table times, be it asked for as a row or not: what its rows are held against."""
GROUPS = [(shape, eta) for shape in SHAPES for eta in ETAS]


@dataclass(frozen=True)
class Level:
    """How long a table is timed, and of how many steps the loops are that move much memory."""

    seconds: float
    rounds: int
    steps_of_much: int


MUCH = 2**20
STEPS = 50
LEVELS = {"quick": Level(2.0, 6, 5), "full": Level(10.0, 9, STEPS)}


class Table:
    """The loops of one shape and η: those that are right, timed in turns; why others are not."""

    def __init__(self, shape: tuple[int, ...], eta: float, names: list[str], level: Level) -> None:
        n = torch.Size(shape).numel()
        self.shape, self.eta = shape, eta
        self.steps = STEPS if n < MUCH else level.steps_of_much
        self.missing: dict[str, str] = {}
        self.wrong: dict[str, Exception] = {}
        loops = Loops(shape, self.steps, eta, DEVICE)
        runs: dict[str, Callable[[], object]] = {}
        for name in dict.fromkeys([*BESIDE, *names]):
            try:
                runs[name] = PEERS[name].ready(loops)
            except MissingError as error:  # noqa: PERF203 (each on its own)
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
        }


@pytest.fixture(
    scope="module", params=GROUPS, ids=lambda g: f"{'x'.join(map(str, g[0]))}-eta{g[1]}"
)
def table(request: pytest.FixtureRequest) -> Table:
    """Timed at its first row, the rows that were asked for alone."""
    items: list[Any] = request.session.items
    params = [item.callspec.params for item in items if hasattr(item, "callspec")]
    names = [p["peer"] for p in params if p.get("table") == request.param]
    shape, eta = request.param
    return Table(shape, eta, names, LEVELS[str(request.config.getoption("level"))])


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest) -> Iterator[list[Record]]:
    """What has been measured, kept at the end if it is all there is and all of it is right."""
    found: list[Record] = []
    yield found
    where = request.config.getoption("results")
    if where is None:
        return
    config: Any = request.config
    if request.session.testsfailed or len(found) < len(GROUPS) * len(NAMES):
        what = "nothing is kept of a run with wrong results, or of a part of one"
    else:
        section = provenance("pytest") | {"level": config.getoption("level"), "rows": found}
        name = torch.cuda.get_device_name() if DEVICE == "cuda" else None
        what = str(keep("step", section, where, name))
    # What is said while a test's output is caught would be lost.
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        config.get_terminal_writer().line(f"\n{what}")


_now = 0.0


def _clock() -> float:
    """Stands still but for the seconds that were measured."""
    return _now


@pytest.mark.benchmark(timer=_clock)
@pytest.mark.filterwarnings("default")  # what the compiler's own parts warn of is not ours
@pytest.mark.parametrize("peer", NAMES)
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
