"""The picture of a profile: distance over steps for each η, and where the time of a step goes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastddim.coefficients import Eta
from fastddim.files import replacing
from fastddim.tools.table import Cell, Settings, label

COLOURS = ("#000000", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00")
"""Okabe and Ito's palette, which colour-blind readers can tell apart; the markers differ too."""
HAT = "#D55E00"
MARKERS = "osDvPX"
GREY = "#767676"


def plot(settings: Settings, done: Sequence[Cell], path: Path) -> None:
    """Draws ``done`` as a PNG: the distance over S for each η, and the two times of a step over S.

    A profile without a distance has the panel of the times alone.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    judged = settings["distance"] is not None
    figure = Figure(figsize=(10.5 if judged else 5.6, 4.4), layout="constrained", dpi=200)
    panels = list(figure.subplots(1, 1 + judged, squeeze=False)[0])
    rows: dict[Eta, list[Cell]] = {}
    for cell in sorted(done, key=lambda cell: (cell.eta == "hat", cell.eta, cell.steps)):
        rows.setdefault(cell.eta, []).append(cell)
    if judged:
        axes = panels[0]
        names = [_line(axes, i, eta, row, "distance") for i, (eta, row) in enumerate(rows.items())]
        floor, spread = done[0].floor, done[0].spread
        assert floor is not None  # a cell with a distance has a floor
        axes.axhline(floor, color=GREY, linestyle=(0, (4, 3)), linewidth=1.2, zorder=1)
        text = f"as many real samples: {floor:.2g}"
        if spread is not None:
            axes.axhspan(max(floor - spread, floor / 10), floor + spread, color="#e6e6e6", zorder=0)
            text += f" ± {spread:.1g}"
        _dress(axes, f"{settings['distance']} to the data (lower is better)", done, names)
        axes.set_ylabel(settings["distance"])
        _write(axes, min(cell.steps for cell in done), floor, text, GREY, (0, -12))
    axes = panels[-1]
    names = [_line(axes, i, eta, row, "update_ms") for i, (eta, row) in enumerate(rows.items())]
    for row in rows.values():
        points = [cell.steps for cell in row], [cell.model_ms for cell in row]
        axes.plot(*points, color=GREY, marker="x", markersize=5, linewidth=1.2)
    shares = [100 * cell.update_ms / (cell.update_ms + cell.model_ms) for cell in done]
    share = " to ".join(dict.fromkeys(f"{s:.2g}%" for s in (min(shares), max(shares))))
    size = settings["batch_size"]
    _dress(axes, f"ms per step of {size} samples: the update is {share} of it", done, names)
    axes.set_ylabel("milliseconds per step")
    # The legend stands below the panel: a name beside a line could collide with another line.
    marks = [
        Line2D([], [], color=colour, marker=marker, markersize=5, linewidth=1.2, label=name)
        for name, colour, marker in (("model", GREY, "x"), ("update", COLOURS[0], MARKERS[0]))
    ]
    axes.legend(
        handles=marks,
        loc="lower center",
        bbox_to_anchor=(0.5, -0.3),
        ncols=2,
        fontsize=9,
        frameon=False,
    )
    ran = f"{settings['device']}, steps by {settings['backend']}"
    figure.supxlabel(f"seeds {settings['seeds']}, {ran}", fontsize=8, color=GREY)
    with replacing(path) as file:
        figure.savefig(file, format="png")


def _line(axes: Any, i: int, eta: Eta, row: Sequence[Cell], field: str) -> tuple[float, str, str]:
    """Draws the line of one η, and returns its first value, its name and its colour."""
    colour = HAT if eta == "hat" else COLOURS[i % len(COLOURS)]
    marker = "^" if eta == "hat" else MARKERS[i % len(MARKERS)]
    values = [getattr(cell, field) for cell in row]
    axes.plot([cell.steps for cell in row], values, color=colour, marker=marker, markersize=5)
    return values[0], r"$\hat{\sigma}$" if eta == "hat" else f"η = {label(eta)}", colour


def _dress(
    axes: Any, title: str, done: Sequence[Cell], names: Sequence[tuple[float, str, str]]
) -> None:
    """Sets scales, ticks and title, and writes the lines' names beside their starts, apart."""
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
    low, high = (math.log(limit) for limit in axes.get_ylim())
    # Each name stands at its line's height, but names keep a distance: the height is midway
    # between pushing overlapping names up and pushing them down.
    named = sorted(names)
    heights, apart = [math.log(value) for value, _, _ in named], 0.05 * (high - low)
    up = list(itertools.accumulate(heights, lambda below, own: max(own, below + apart)))
    down = list(itertools.accumulate(heights[::-1], lambda above, own: min(own, above - apart)))
    for most, least, (_, name, colour) in zip(up, down[::-1], named, strict=True):
        y = math.exp((most + least) / 2)
        _write(axes, steps[0], y, name, colour, (-8, 0), ha="right", va="center")


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
