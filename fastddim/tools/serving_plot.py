"""The picture of a serving benchmark: throughput, and latencies of each peer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastddim.files import replacing
from fastddim.tools.plot import COLOURS, GREY, HAT
from fastddim.tools.serving_bench import Outcome

PALETTE = (COLOURS[0], HAT, *COLOURS[1:5])
"""The engine's colour, and those of its peers."""


def plot(outcomes: Sequence[Outcome], path: Path, ran: str) -> None:
    """Draws the outcomes as a PNG: bars of throughput, and the share of requests over latency.

    Args:
        outcomes: the engine's first.
        path: the file to write or replace.
        ran: the line below the panels, on the load and the machine.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained", dpi=200)
    bars, curves = figure.subplots(1, 2, width_ratios=(1, 1.2))
    names = [each.name for each in outcomes]
    rates = [each.samples_per_second for each in outcomes]
    drawn = bars.barh(names, rates, color=PALETTE[: len(outcomes)])
    bars.bar_label(
        drawn,
        [f"{each.samples_per_second:.2f}, {each.occupancy:.0%} occupied" for each in outcomes],
        padding=3,
        fontsize=8,
    )
    bars.invert_yaxis()
    bars.set_xlim(0, 1.6 * max(rates))
    bars.set_title("samples per second")
    for colour, each in zip(PALETTE, outcomes, strict=False):
        shares = np.arange(1, len(each.latencies) + 1) / len(each.latencies)
        curves.step(sorted(each.latencies), shares, where="post", color=colour)
        curves.plot([np.median(each.latencies)], [0.5], "o", color=colour, markersize=4)
    curves.axhline(0.5, color=GREY, linestyle=(0, (4, 3)), linewidth=0.8, zorder=0)
    curves.set_ylim(0, 1)
    curves.set_xlim(left=0)
    curves.set_xlabel("seconds from a request's arrival to its sample")
    curves.set_title("share of the requests served within a latency, in the bars' colours")
    for axes in (bars, curves):
        axes.title.set_size(10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(ran, fontsize=8, color=GREY)
    with replacing(path) as file:
        figure.savefig(file, format="png")
