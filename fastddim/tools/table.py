"""The table of a profile: its cells and settings, kept in a folder that a later run continues."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

from fastddim.files import replacing
from fastddim.loop.sampler import DDIM
from fastddim.timesteps import Spacing
from fastddim.tools import images
from fastddim.tuned import Tuned
from fastddim.variances import Eta

Settings: TypeAlias = Mapping[str, Any]
"""The plain values that all cells of one table share: see ``profile.settings``."""

JSON, CSV, PNG, TRACE = "profile.json", "profile.csv", "profile.png", "trace.json"
HTML = "profile.html"
"""The names of the files in the folder of a profile."""


@dataclass(frozen=True)
class Cell:
    """The measurements of one sampler.

    Attributes:
        steps, eta: S and η of the sampler.
        update_ms: the milliseconds that a step spends outside the model: the update, drawing
            noise, the loop, and a step's share of drawing x_T. An upper bound on an accelerator,
            see ``timing.Timed``.
        model_ms: the milliseconds that a step spends in the model. Both times are for one full
            batch, and the median over the batches.
        images_per_second: the rate of full batches at these times.
        memory_mb: the peak of the tensors' memory, weights included, in 10⁶ bytes: the memory
            that torch's allocator handed out, on a CPU measured in a separate run. None where
            torch does not report it.
        distance: the distance from the samples to the data. None without a judge.
        floor: the mean distance of as many samples of a perfect model. It is no lower bound: some
            draws of a perfect model score less.
        spread: the standard deviation of the distance of a perfect model over draws.
        order: the order of the sampler's steps.
        spacing: the name of the sampler's spacing: see ``spacing_name``.
    """

    steps: int
    eta: Eta
    update_ms: float
    model_ms: float
    images_per_second: float
    memory_mb: float | None
    distance: float | None
    floor: float | None
    spread: float | None = None
    order: int = 1
    spacing: str = "uniform"

    @property
    def key(self) -> Key:
        """The values that tell this cell from the others of a table."""
        return self.steps, self.order, self.spacing, self.eta


Key: TypeAlias = tuple[int, int, str, Eta]
"""S, the order, the name of the spacing, and η."""


def key(ddim: DDIM) -> Key:
    """Returns the ``key`` of the cell of ``ddim``."""
    return len(ddim.pairs), ddim.order, spacing_name(ddim.spacing), ddim.eta


def check_folder(folder: Path) -> None:
    """Checks before any work that a profile can be written to ``folder``.

    Raises:
        OSError: ``folder`` is a file, or lies in a folder that does not exist.
        ModuleNotFoundError: matplotlib, which draws the picture, or Jinja2, which writes the
            page, is missing.
    """
    import jinja2  # noqa: F401
    import matplotlib.figure  # noqa: F401

    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"out must be a folder, got the file {folder}")
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"out must be in a folder that exists, got {folder}")


def make_folder(folder: Path) -> None:
    """Makes ``folder`` if it does not exist.

    Raises:
        OSError: ``folder`` cannot be made, or cannot be written to.
    """
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise type(error)(
            f"out must be a folder that can be made, got {folder}: {error.strerror}"
        ) from None
    images.check_png(folder / PNG)


def read(folder: Path, settings: Settings) -> list[Cell]:
    """Returns the cells that ``save`` has written to ``folder``; none for a new folder.

    In the files of earlier versions the spacing is a setting, and all cells have order 1.

    Raises:
        ValueError: the cells were measured with other settings, or the file is damaged.
    """
    path = folder / JSON
    if not path.exists():
        return []
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        there = dict(kept["settings"])
        spacing = there.pop("spacing", "uniform")
        done = [Cell(**{"spacing": spacing, **cell}) for cell in kept["cells"]]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"out must hold a profile or none, got {path}, which is damaged") from None
    names = [k for k in {**there, **settings} if there.get(k) != settings.get(k)]
    if names:
        differences = (f"{k} {there.get(k)} there and {settings.get(k)} here" for k in names)
        raise ValueError(
            f"out must be a new folder or one with the same settings, got {folder} with "
            f"{', '.join(differences)}"
        )
    return done


def remaining(ddims: Sequence[DDIM], done: Sequence[Cell]) -> list[DDIM]:
    """Returns the samplers of ``ddims`` that have no cell in ``done``."""
    finished = {cell.key for cell in done}
    return [ddim for ddim in ddims if key(ddim) not in finished]


def save(folder: Path, settings: Settings, done: Sequence[Cell]) -> None:
    """Writes ``done`` to profile.json and profile.csv, each whole or not at all."""
    rows = [asdict(cell) for cell in done]
    text = json.dumps({"settings": dict(settings), "cells": rows}, indent=1, allow_nan=False)
    with replacing(folder / JSON) as file:
        file.write(text.encode() + b"\n")
    table = io.StringIO()
    writer = csv.DictWriter(table, [field.name for field in fields(Cell)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with replacing(folder / CSV) as file:
        file.write(table.getvalue().encode())


def label(eta: Eta) -> str:
    """Returns η as text: ``0.2`` or ``hat``."""
    return f"{eta:g}" if isinstance(eta, (int, float)) else str(eta)


def spacing_name(spacing: Spacing | str) -> str:
    """Returns a spacing's name; for timesteps without a name their kind and a digest of them."""
    if isinstance(spacing, str):
        return spacing
    kind, levels = ("tuned", spacing.timesteps) if isinstance(spacing, Tuned) else ("list", spacing)
    return f"{kind}-{hashlib.sha256(repr(levels).encode()).hexdigest()[:6]}"
