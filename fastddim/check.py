"""Arguments turned into plain numbers, or one clear line about an argument that is wrong."""

from __future__ import annotations

import math
import operator
from typing import Any


class SamplingWarning(UserWarning):
    """Warns of options that a sampler can run and that the caller most likely did not mean."""


def whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Returns ``value`` as an int in [low, high]; refuses bools and floats."""
    allowed = f"an integer ≥ {low}" if high is None else f"an integer in [{low}, {high}]"
    if isinstance(value, bool):
        raise TypeError(f"{name} must be {allowed}, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be {allowed}, got {shown(value)}") from None
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name} must be {allowed}, got {number}")
    return number


def finite(name: str, value: Any) -> float:
    """Returns ``value`` as a finite float; refuses bools and strings."""
    if isinstance(value, (bool, str)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {shown(value)}") from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def truth(name: str, value: Any) -> bool:
    """Returns ``value`` as a bool; raises ``TypeError`` if it equals neither True nor False."""
    try:
        found = value in (True, False)
    except (RuntimeError, ValueError):  # A tensor or an array has many values, or none.
        found = False
    if not found:
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def shown(value: Any) -> str:
    """Returns ``value``'s repr for a message, or its type where the repr is long."""
    text = repr(value)
    return type(value).__name__ if "\n" in text or len(text) > 80 else text


def kind(value: object) -> str:
    """Returns the name of ``value``'s type."""
    return type(value).__name__
