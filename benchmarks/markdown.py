"""How figures are put on a page: tables, intervals, durations and verdicts."""

from __future__ import annotations

from typing import TypeAlias

Measured: TypeAlias = "float | list[float]"
"""[median, low, high], or a number of which no interval is known."""


def grid(*lines: list[str]) -> str:
    """A Markdown table, the first line being its head; all but the first column to the right."""
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def span(found: Measured, unit: str = "×", digits: int = 3) -> str:
    """12.7× (11.1–14.0)"""
    if not isinstance(found, list):
        return f"{found:.{digits}g}{unit}"
    median, low, high = (f"{v:.{digits}g}" for v in found)
    return f"{median}{unit} ({low}–{high})"


def percent(found: list[float]) -> str:
    median, low, high = (f"{v:.2%}" for v in found)
    return f"{median} ({low}–{high})"


def duration(us: float) -> str:
    value, unit = (us / 1e3, "ms") if us >= 1e3 else (us, "µs")
    return f"{value:.3g} {unit}"


def median(found: Measured) -> float:
    return found[0] if isinstance(found, list) else found


def met(found: Measured, least: float) -> str:
    """Whether a figure is at least this, as far as its interval says so."""
    middle, low, high = found if isinstance(found, list) else [found] * 3
    if low >= least:
        return "yes"
    if middle >= least:
        return "yes, by the median"
    return "**no**" if high < least else "open: the interval holds it"


def met_at_most(found: Measured, most: float) -> str:
    """The same of a figure that must not exceed this."""
    if not isinstance(found, list):
        return met(-found, -most)
    middle, low, high = found
    return met([-middle, -high, -low], -most)
