"""The picture of a profile: distance over steps, and where the time of a step goes."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastddim.files import replacing
from fastddim.tools import curves
from fastddim.tools.table import Cell, Settings

COLOURS = ("#000000", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00")
"""Okabe and Ito's palette, which colour-blind readers can tell apart; the markers differ too."""
HAT = "#D55E00"
MARKERS = "osDvPX"
GREY = "#767676"
BELOW = {
    "loc": "upper center",
    "bbox_to_anchor": (0.5, -0.14),
    "ncols": 2,
    "fontsize": 9,
    "frameon": False,
}
"""The place of a legend below its panel, where no line can cross it."""


def plot(settings: Settings, done: Sequence[Cell], path: Path) -> None:
    """Draws ``done`` as a PNG: the distance over S, and the two times of a step over S.

    The distance has a panel for each of ``curves.panels``. A profile without a distance has the
    panel of the times alone.
    """
    from matplotlib.figure import Figure

    distance = settings["distance"]
    compared = [] if distance is None else curves.panels(done)
    count = len(compared) + 1
    columns = 2 if count == 4 else min(count, 3)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(5.25 * columns + 0.35, 4.4 * rows), layout="constrained", dpi=200)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for each, panel in zip(axes, compared, strict=False):
        _distances(each, panel, str(distance), done)
    _times(axes[len(compared)], settings["batch_size"], done)
    for unused in axes[len(compared) + 1 :]:
        unused.remove()
    ran = f"{settings['device']}, steps by {settings['backend']}"
    figure.supxlabel(f"seeds {settings['seeds']}, {ran}", fontsize=8, color=GREY)
    with replacing(path) as file:
        figure.savefig(file, format="png")


def _distances(axes: Any, panel: curves.Panel, distance: str, done: Sequence[Cell]) -> None:
    """Draws the distance over S: one line for each curve, and the floor."""
    lines = [
        _line(axes, curve.look, curve.name, [(c.steps, c.distance) for c in curve.cells])
        for curve in panel.curves
    ]
    floor, spread = done[0].floor, done[0].spread
    assert floor is not None  # a cell with a distance has a floor
    axes.axhline(floor, color=GREY, linestyle=(0, (4, 3)), linewidth=1.2, zorder=1)
    text = f"as many real samples: {floor:.2g}"
    if spread is not None:
        axes.axhspan(max(floor - spread, floor / 10), floor + spread, color="#e6e6e6", zorder=0)
        text += f" ± {spread:.1g}"
    of = f", {_typeset(panel.name)}" if panel.name else ""
    _dress(axes, f"{distance} to the data{of} (lower is better)", done)
    axes.set_ylabel(distance)
    _write(axes, min(cell.steps for cell in done), floor, text, GREY, (0, -12))
    if panel.name:  # Names of an order and a spacing are too long to stand beside the lines.
        axes.legend(**BELOW)
    else:
        _name(axes, min(cell.steps for cell in done), lines)


def _times(axes: Any, size: int, done: Sequence[Cell]) -> None:
    """Draws the time of the update and of the model over S.

    The update has a line for each order if the orders vary, else for each η. Each point is the
    median over the other axes.
    """
    from matplotlib.lines import Line2D

    orders, _ = curves.varying(done)
    rows: dict[str, list[Cell]] = {}
    for cell in sorted(done, key=lambda cell: (cell.order, cell.eta == "hat", cell.eta)):
        name = f"order {cell.order}" if orders else curves.eta_name(cell.eta)
        rows.setdefault(name, []).append(cell)
    lines = [
        _line(axes, i, name, _medians(row, "update_ms"))
        for i, (name, row) in enumerate(rows.items())
    ]
    for row in rows.values():
        points = zip(*_medians(row, "model_ms"), strict=True)
        axes.plot(*points, color=GREY, marker="x", markersize=5, linewidth=1.2)
    shares = [100 * cell.update_ms / (cell.update_ms + cell.model_ms) for cell in done]
    share = " to ".join(dict.fromkeys(f"{s:.2g}%" for s in (min(shares), max(shares))))
    _dress(axes, f"ms per step of {size} samples: the update is {share} of it", done)
    axes.set_ylabel("milliseconds per step")
    _name(axes, min(cell.steps for cell in done), lines)
    # The legend stands below the panel: a name beside a line could collide with another line.
    marks = [
        Line2D([], [], color=colour, marker=marker, markersize=5, linewidth=1.2, label=name)
        for name, colour, marker in (("model", GREY, "x"), ("update", COLOURS[0], MARKERS[0]))
    ]
    axes.legend(handles=marks, **BELOW)


def _medians(row: Sequence[Cell], field: str) -> list[tuple[int, float]]:
    """Returns (S, the median of a field over the cells with S), the fewest steps first."""
    values: dict[int, list[float]] = {}
    for cell in sorted(row, key=lambda cell: cell.steps):
        values.setdefault(cell.steps, []).append(getattr(cell, field))
    return [(steps, statistics.median(found)) for steps, found in values.items()]


def _line(
    axes: Any, look: int, name: str, points: Sequence[tuple[int, float | None]]
) -> tuple[float, str, str]:
    """Draws one line, and returns its first value, its name and its colour."""
    hat = name == curves.eta_name("hat")
    colour, marker = (HAT, "^") if hat else (COLOURS[look % len(COLOURS)], MARKERS[look % 6])
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, color=colour, marker=marker, markersize=5, label=_typeset(name))
    return values[0], _typeset(name), colour


def _typeset(name: str) -> str:
    """Returns ``name`` as matplotlib shows it: its fonts place the hat of σ̂ badly."""
    return name.replace(curves.eta_name("hat"), r"$\hat{\sigma}$")


def _dress(axes: Any, title: str, done: Sequence[Cell]) -> None:
    """Sets scales, ticks and title."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    steps = sorted({cell.steps for cell in done})
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.set_title(title, loc="left", fontsize=10)
    axes.set(xscale="log", yscale="log", xlabel="steps S")
    axes.set_xlim(steps[0] / 1.5, steps[-1] * 1.1)
    for axis, ticks in (
        (axes.xaxis, FixedLocator(steps)),
        (axes.yaxis, LogLocator(subs=(1, 2, 5))),
    ):
        axis.set_major_locator(ticks)
        axis.set_major_formatter(plain)
        axis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _name(axes: Any, first: int, lines: Sequence[tuple[float, str, str]]) -> None:
    """Writes the lines' names beside their starts at S = ``first``, apart."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    # Each name stands at its line's height, but names keep a distance: the height is midway
    # between pushing overlapping names up and pushing them down.
    named = sorted(lines)
    heights, apart = [math.log(value) for value, _, _ in named], 0.05 * (high - low)
    up = list(itertools.accumulate(heights, lambda below, own: max(own, below + apart)))
    down = list(itertools.accumulate(heights[::-1], lambda above, own: min(own, above - apart)))
    for most, least, (_, name, colour) in zip(up, down[::-1], named, strict=True):
        y = math.exp((most + least) / 2)
        _write(axes, first, y, name, colour, (-8, 0), ha="right", va="center")


def _write(
    axes: Any,
    x: float,
    y: float,
    text: str,
    colour: str,
    offset: tuple[int, int] = (0, 6),
    **where: str,
) -> None:
    """Writes ``text`` beside the point (x, y), ``offset`` printer's points away."""
    axes.annotate(
        text, (x, y), offset, textcoords="offset points", color=colour, fontsize=9, **where
    )
