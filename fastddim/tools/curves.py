"""The curves of a profile: which cells form a curve, its name and look, and its panel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastddim.tools.table import Cell, label
from fastddim.variances import Eta


@dataclass(frozen=True)
class Curve:
    """Cells that differ in the number of steps alone, the fewest first.

    Attributes:
        name: the values in which the curve differs from the others of its panel, as text.
        look: the number of its colour, marker and dash: curves of one name look alike.
        cells: the cells.
    """

    name: str
    look: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Panel:
    """The curves of one plot.

    Attributes:
        name: the η of all curves of the panel, as text; "" if the curves differ in η.
        curves: the curves.
    """

    name: str
    curves: tuple[Curve, ...]


def panels(done: Sequence[Cell]) -> list[Panel]:
    """Returns the panels of a profile.

    With one order and one spacing there is one panel, with a curve for each η. Otherwise each η
    has a panel, with a curve for each order and spacing: the reader compares these curves.
    """
    spacings = list(dict.fromkeys(cell.spacing for cell in done))
    methods = sorted(
        {(cell.order, cell.spacing) for cell in done},
        key=lambda method: (method[0], spacings.index(method[1])),
    )
    etas: list[Eta] = sorted({cell.eta for cell in done}, key=lambda eta: (eta == "hat", eta))
    if len(methods) == 1:
        curves = [
            Curve(eta_name(eta), i, _cells(done, *methods[0], eta)) for i, eta in enumerate(etas)
        ]
        return [Panel("", tuple(curves))]
    return [
        Panel(
            eta_name(eta),
            tuple(
                Curve(_method_name(order, spacing, done), i, cells)
                for i, (order, spacing) in enumerate(methods)
                if (cells := _cells(done, order, spacing, eta))
            ),
        )
        for eta in etas
    ]


def eta_name(eta: Eta) -> str:
    """Returns ``η = 0.2``, or ``σ̂``."""
    return "σ̂" if eta == "hat" else f"η = {label(eta)}"


def varying(done: Sequence[Cell]) -> tuple[bool, bool]:
    """Returns whether the order and whether the spacing of the cells vary."""
    return len({cell.order for cell in done}) > 1, len({cell.spacing for cell in done}) > 1


def _method_name(order: int, spacing: str, done: Sequence[Cell]) -> str:
    """Returns the order and the spacing, each if it varies in ``done``."""
    orders, spacings = varying(done)
    return ", ".join([f"order {order}"] * orders + [spacing] * spacings)


def _cells(done: Sequence[Cell], order: int, spacing: str, eta: Eta) -> tuple[Cell, ...]:
    found = [cell for cell in done if (cell.order, cell.spacing, cell.eta) == (order, spacing, eta)]
    return tuple(sorted(found, key=lambda cell: cell.steps))
