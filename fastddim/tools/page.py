"""The page of a profile: ``profile.html``, one file that needs no network."""

from __future__ import annotations

import base64
import itertools
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastddim.files import replacing
from fastddim.tools import chart
from fastddim.tools.curves import Panel, eta_name, panels
from fastddim.tools.table import HTML, Cell, Settings
from fastddim.tools.thumbnails import FIRST, image_path

TEMPLATE = Path(__file__).with_name("profile.html.jinja")

FACTS = {
    "model": "Model (SHA-256 of weights and noise levels, 16 digits)",
    "prediction": "Prediction of the model",
    "seeds": "Seeds of each cell",
    "batch_size": "Images per model call",
    "distance": "Distance",
    "device": "Machine",
    "backend": "Backend of the steps",
    "no_class": "Null class",
    "dtype": "Dtype of the model",
}
"""Setting → its name on the page; other settings stand there by their own names."""


@dataclass(frozen=True)
class Picture:
    """A PNG as a data URL, and the width and height to show it with."""

    url: str
    width: int
    height: int


def write_page(settings: Settings, done: Sequence[Cell], folder: Path, command: str = "") -> None:
    """Writes ``done`` and the images of ``thumbnails`` to profile.html in ``folder``.

    Args:
        settings, done: as in ``save``; one or more cells.
        folder: the profile's folder.
        command: the command line to show.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    compared = panels(done)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(
        distance=settings["distance"],
        floor=done[0].floor,
        spread=done[0].spread,
        charts=chart.charts(compared) if settings["distance"] is not None else [],
        chart=chart,
        panels=compared,
        steps=sorted({cell.steps for cell in done}),
        legend=_legend(compared),
        groups=_groups(compared),
        pictures={cell.key: _picture(image_path(folder, cell)) for cell in done},
        first=FIRST,
        facts=_facts(settings),
        batch_size=settings["batch_size"],
        eta_name=eta_name,
        command=command,
    )
    with replacing(folder / HTML) as file:
        file.write(text.encode())


def _legend(compared: Sequence[Panel]) -> list[tuple[str, chart.Look]]:
    """Returns the name and the look of each curve once: curves of one name look alike."""
    looks = {curve.look: curve.name for panel in compared for curve in panel.curves}
    return [(looks[n], chart.look(n)) for n in sorted(looks)]


def _groups(compared: Sequence[Panel]) -> list[tuple[int, list[Cell]]]:
    """Returns the cells by their number of steps, each group in the order of the curves."""
    cells = [cell for panel in compared for curve in panel.curves for cell in curve.cells]
    cells.sort(key=lambda cell: cell.steps)
    return [(S, list(group)) for S, group in itertools.groupby(cells, lambda cell: cell.steps)]


def _picture(path: Path) -> Picture | None:
    """Returns a kept PNG, at twice its size if it is small; None if there is none."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    width, height = struct.unpack(">II", content[16:24])  # PNG's header, the chunk IHDR
    scale = 2 if height <= 40 else 1
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return Picture(url, scale * width, scale * height)


def _facts(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the settings that have a value as (name, value)."""
    return [
        (FACTS.get(name, name), str(value)) for name, value in settings.items() if value is not None
    ]
