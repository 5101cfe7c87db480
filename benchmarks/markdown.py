"""Formatting for pages: tables, intervals, durations and verdicts."""

from __future__ import annotations

from typing import TypeAlias

Measured: TypeAlias = "float | list[float]"
"""[median, low, high], or a number without an interval."""


def grid(*lines: list[str]) -> str:
    """A Markdown table: the first line is the head, all columns but the first are right-aligned."""
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def span(found: Measured, unit: str = "×", digits: int = 3) -> str:
    """A ratio and its interval: 12.7× (11.1–14)."""
    if not isinstance(found, list):
        return f"{found:.{digits}g}{unit}"
    median, low, high = (f"{v:.{digits}g}" for v in found)
    return f"{median}{unit} ({low}–{high})"


def percent(found: list[float]) -> str:
    """A share and its interval: 12.70% (11.10%–14.00%)."""
    median, low, high = (f"{v:.2%}" for v in found)
    return f"{median} ({low}–{high})"


def duration(us: float) -> str:
    """Microseconds as µs, or from 1000 on as ms."""
    value, unit = (us / 1e3, "ms") if us >= 1e3 else (us, "µs")
    return f"{value:.3g} {unit}"


def median(found: Measured) -> float:
    return found[0] if isinstance(found, list) else found


def met(found: Measured, least: float) -> str:
    """Verdict whether a figure is at least ``least``, as far as its interval decides."""
    middle, low, high = found if isinstance(found, list) else [found] * 3
    if low >= least:
        return "yes"
    if middle >= least:
        return "yes, by the median"
    return "**no**" if high < least else "open: the interval contains the limit"


def met_at_most(found: Measured, most: float) -> str:
    """Verdict whether a figure is at most ``most``, as far as its interval decides."""
    if not isinstance(found, list):
        return met(-found, -most)
    middle, low, high = found
    return met([-middle, -high, -low], -most)
