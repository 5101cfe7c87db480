"""The places of a chart's lines, marks and ticks: distance over S, both axes logarithmic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fastddim.tools.curves import Panel
from fastddim.tools.table import Cell

WIDTH, HEIGHT = 340, 260
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 44
"""The margins around the plot, which hold the numbers of the axes."""

MARKS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",  # disc
    "M-3.6-3.6h7.2v7.2h-7.2z",  # square
    "M0-5 4.6 3.4h-9.2z",  # triangle
    "M0-5.2 5.2 0 0 5.2-5.2 0z",  # diamond
    "M0 5 4.6-3.4h-9.2z",  # triangle, downwards
    "M-1.4-5h2.8v3.6h3.6v2.8h-3.6v3.6h-2.8v-3.6h-3.6v-2.8h3.6z",  # cross
    "M-2.6-4.6h5.2l2.6 4.6-2.6 4.6h-5.2l-2.6-4.6z",  # hexagon
)
"""The outlines of marks around (0, 0), as SVG paths."""

DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4")
"""The patterns of lines, as SVG's stroke-dasharray; the first is a solid line."""

COLOURS = 8
"""The number of colours of the page's style sheet. The three numbers have no common divisor, so
that as many curves differ in mark, pattern or colour as their product."""


@dataclass(frozen=True)
class Look:
    """The colour (a number), the mark and the pattern of a curve."""

    colour: int
    mark: str
    dash: str


def look(n: int) -> Look:
    """Returns the look with number ``n``."""
    return Look(n % COLOURS, MARKS[n % len(MARKS)], DASHES[n % len(DASHES)])


@dataclass(frozen=True)
class Line:
    """A curve's name and look, and the points of its cells in order."""

    name: str
    look: Look
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Chart:
    """The chart of one panel; x and y are in units of a viewBox of ``WIDTH`` by ``HEIGHT``.

    Attributes:
        name: the panel's name.
        lines: one for each curve.
        x_ticks, y_ticks: (place, text) of the numbers of the axes.
        floor: y of the floor, or None.
        band: (y, height) of floor ± spread, or None.
    """

    name: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    floor: float | None
    band: tuple[float, float] | None


def charts(panels: Sequence[Panel]) -> list[Chart]:
    """Returns a chart for each panel with a distance above 0; a distance of 0 has no place.

    All charts have the same numbers of steps. Each has its own distances, because σ̂ with few steps
    would press the curves of other η together.
    """
    cells = [cell for panel in panels for curve in panel.curves for cell in curve.cells]
    steps = sorted({cell.steps for cell in cells})
    return [made for panel in panels if (made := _chart(panel, steps))]


def _chart(panel: Panel, steps: Sequence[int]) -> Chart | None:
    cells = [cell for curve in panel.curves for cell in curve.cells]
    floor, spread = cells[0].floor, cells[0].spread
    values = [v for cell in cells if (v := cell.distance)] + ([floor] if floor else [])
    if not values:
        return None
    x, _ = _axis(steps[0], steps[-1], LEFT, WIDTH - RIGHT)
    y, (low, high) = _axis(min(values), max(values), HEIGHT - BOTTOM, TOP)
    band = None
    if floor and spread:
        top, bottom = y(min(floor + spread, high)), y(max(floor - spread, low))
        band = round(top, 1), round(bottom - top, 1)
    return Chart(
        panel.name,
        tuple(
            Line(curve.name, look(curve.look), tuple(_points(curve.cells, x, y)))
            for curve in panel.curves
        ),
        tuple(_apart([(x(S), str(S)) for S in steps], 24)),
        tuple(_apart([(y(v), f"{v:.3g}") for v in _round_numbers(low, high)], 15)),
        round(y(floor), 1) if floor else None,
        band,
    )


def _points(
    cells: Sequence[Cell], x: Callable[[float], float], y: Callable[[float], float]
) -> Iterator[tuple[float, float]]:
    for cell in cells:
        if cell.distance:
            yield round(x(cell.steps), 1), round(y(cell.distance), 1)


def _axis(
    low: float, high: float, start: float, end: float
) -> tuple[Callable[[float], float], tuple[float, float]]:
    """Returns the place of a value on a logarithmic axis, and the values at its ends.

    The values from ``low`` to ``high`` take the axis but for a twentieth at each end.
    """
    wide = max(math.log(high / low), 0.2)
    middle = math.log(low * high) / 2
    first, span = middle - 0.55 * wide, 1.1 * wide

    def place(value: float) -> float:
        return start + (math.log(value) - first) / span * (end - start)

    return place, (math.exp(first), math.exp(first + span))


def _round_numbers(low: float, high: float) -> list[float]:
    """Returns round numbers from ``low`` to ``high``, three or more."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for leading in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        numbers = [n * 10.0**power for power, n in itertools.product(powers, leading)]
        if len(found := [n for n in numbers if low <= n <= high]) >= 3:
            return found
    return [low + (high - low) * share for share in (0.1, 0.5, 0.9)]


def _apart(ticks: Sequence[tuple[float, str]], least: float) -> list[tuple[float, str]]:
    """Returns the ticks without those that are nearer than ``least`` to the one before."""
    kept: list[tuple[float, str]] = []
    for place, text in ticks:
        if not kept or abs(place - kept[-1][0]) >= least:
            kept.append((round(place, 1), text))
    return kept
