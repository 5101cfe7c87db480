"""Parses and checks the values of options.

Nothing here imports torch: the names that the library accepts are therefore written out, and a test
compares them with the library's.
"""

import difflib
import re
from collections.abc import Iterable
from typing import Any

from fastddim.check import finite, whole
from fastddim.tools.seeds import parse_ranges

MOST_IMAGES = 10_000
"""The most images in one picture: more are too small to see, and at 256x256 exceed memory."""

SPACINGS = (
    "uniform",
    "quad",
    "leading",
    "trailing",
    "linspace",
    "mixed",
    "logsnr",
    "karras",
    "uniform-ermongroup",
    "quad-ermongroup",
)
ORDERS = (1, 2)
CONFIGS = ("cifar10", "celeba64", "lsun256")
FORMATS = ("npy", "png", "npz")
DTYPES = ("float32", "bfloat16", "float16")
PREDICTIONS = ("epsilon", "v", "sample")
SCHEDULES = ("linear", "scaled_linear", "cosine")
PATHS = ("ddpm", "flow", "flow-shift3", "edm", "cosine")
LARGEST_BATCH = 65_536


def one_of(name: str, value: str, allowed: Iterable[str], other: str = "") -> str:
    """Returns ``value`` if it is in ``allowed``; else raises ``ValueError`` with the nearest.

    ``other`` is the kind of value that the caller takes besides.
    """
    allowed = list(allowed)
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        names = ", ".join(allowed) + (f", or {other}" if other else "")
        raise ValueError(f"{name} must be one of {names}, got {value!r}{meant}")
    return value


def parse_eta(text: str) -> Any:
    """Returns a number or "hat"; ``DDIM`` checks the number, whose limit depends on the steps."""
    text = text.strip()
    if text == "hat":
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f'eta must be a number ≥ 0 or "hat", got {text!r}') from None


def parse_etas(text: str) -> list[Any]:
    """Returns the etas of a text such as ``0,0.5,hat``."""
    parts = text.split(",")
    if not all(part.strip() for part in parts):
        raise ValueError(f"eta must be such as 0 or 0,0.5,1,hat, got {text!r}")
    return distinct("eta", [parse_eta(part) for part in parts], text)


def parse_number(name: str, text: str) -> float:
    """Returns ``text`` as a finite float."""
    try:
        return finite(name, float(text))
    except ValueError:
        raise ValueError(f"{name} must be a finite number, got {text!r}") from None


def parse_steps(text: str) -> list[int]:
    """Returns the numbers of a text such as ``10,20,50``; ``DDIM`` checks their range."""
    parts = text.split(",")
    if not all(re.fullmatch(r"\s*[0-9]{1,19}\s*", part) for part in parts):
        raise ValueError(f"steps must be such as 50 or 10,20,50, got {text!r}")
    return distinct("steps", [int(part) for part in parts], text)


def distinct(name: str, values: list[Any], text: str) -> list[Any]:
    """Returns ``values``, or raises ``ValueError`` if one occurs twice."""
    if twice := [v for i, v in enumerate(values) if v in values[:i]]:
        raise ValueError(f"{name} must differ from each other, got {twice[0]} twice in {text!r}")
    return values


def parse_shape(text: str) -> tuple[int, ...]:
    """Returns the three numbers of a text such as ``3,32,32``."""
    if re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9}){2}", text) is None:
        raise ValueError(f"shape must be C,H,W, such as 3,32,32, got {text!r}")
    return tuple(map(int, text.split(",")))


def parse_seeds(text: str) -> list[int]:
    """Returns the seeds of a text such as ``0-9,20,30-39``, at most as many as fit in a picture."""
    ranges = parse_ranges(text)
    # Not len(), which raises from 2^63 on.
    if (count := sum(r.stop - r.start for r in ranges)) > MOST_IMAGES:
        raise ValueError(f"seeds must be at most {MOST_IMAGES}, got {count}")
    return [seed for r in ranges for seed in r]


def check_cells(name: str, rows: int, columns: int) -> None:
    """Raises ``ValueError`` if rows·columns images do not fit in a picture."""
    if rows * columns > MOST_IMAGES:
        raise ValueError(
            f"{name} must be at most {MOST_IMAGES} images for one picture, got {rows} x {columns}"
        )


def check_spacing(spacing: str) -> None:
    """Checks a spacing's name, or reads its file once."""
    if not spacing.endswith(".json"):
        one_of("spacing", spacing, SPACINGS, "a file of fastddim tune (.json)")
        return
    from fastddim.tuned import Tuned

    Tuned.read(spacing)


def check_common(batch_size: int, spacing: str, order: int = 1) -> None:
    """Checks the values as far as possible before the model is loaded."""
    whole("batch-size", batch_size, low=1, high=LARGEST_BATCH)
    check_spacing(spacing)
    if order not in ORDERS:
        raise ValueError(f"order must be 1 (DDIM) or 2, got {order}")


def counted(n: int, noun: str) -> str:
    """Returns ``1 image``, ``2 images``, ..."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
