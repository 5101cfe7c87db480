"""Steps against η: what each step costs, and how good the samples are (the paper's Table 1)."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from fastddim import __version__
from fastddim.check import whole
from fastddim.coefficients import Eta
from fastddim.loop import devices
from fastddim.loop.model import Model
from fastddim.loop.options import Progress, checked_progress
from fastddim.loop.sampler import DDIM
from fastddim.step.backends import backend
from fastddim.timesteps import Spacing
from fastddim.tools import draw, images, provenance, timing
from fastddim.tools.quality import GaussianMixture, frechet_distance

Settings: TypeAlias = Mapping[str, Any]
"""What the cells of one table share: see ``settings``."""

JSON, CSV, PNG, TRACE = "profile.json", "profile.csv", "profile.png", "trace.json"
"""What a folder holds."""


@dataclass(frozen=True)
class Cell:
    """What was measured of one sampler.

    Attributes:
        steps, eta: the sampler's.
        update_ms: milliseconds of a step spent outside the model: the update, drawing noise, the
            loop, and a step's share of drawing x_T. On an accelerator an upper bound, as
            ``timing.Timed`` says.
        model_ms: milliseconds of a step spent in the model. Both are of one full batch, the
            median over the batches.
        images_per_second: of full batches, at these times.
        memory_mb: the most that tensors held at once, the weights among them, in 10⁶ bytes:
            what torch's allocator gave out, on a CPU measured in a run of its own. None where
            torch does not tell.
        distance: from the samples to the data. None where there is nobody to judge.
        floor: what as many samples of a perfect model would score on average. It is no bound:
            some draws of a perfect model score less.
        spread: the standard deviation of that over draws.
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


@dataclass(frozen=True)
class Judge:
    """How samples are compared with data.

    Attributes:
        name: of the distance.
        distance: from samples (N, ...), on the CPU, to the data.
        floor: the mean distance of N samples that a perfect model would draw.
        spread: the standard deviation of that distance over draws; None where it is not known.
    """

    name: str
    distance: Callable[[Tensor], float]
    floor: Callable[[int], float]
    spread: Callable[[int], float] | None = None


def garments() -> Judge:
    """FD-clf of images (N, 1, 28, 28): see ``fastddim.tools.distance``."""
    from fastddim.tools import distance

    real = distance.load()
    return Judge("FD-clf", real.distance, real.floor, real.spread)


def oracle() -> GaussianMixture:
    """Data whose ε is known exactly: eight narrow modes in 64 dimensions, one along each axis.

    Narrow, since what few steps get wrong is the width of a mode, and in many dimensions, so that
    the width weighs more than how many samples come to each mode.
    """
    return GaussianMixture(torch.eye(8, 64, device="cpu"), 0.1)


def mixture(data: GaussianMixture) -> Judge:
    """Fréchet distance of the samples themselves to the mean and covariance of ``data``.

    These two are exact; the floor and its spread are those of 20 draws.
    """
    exact = data.moments()

    def distance(x: Tensor) -> float:
        return frechet_distance(x.flatten(1), exact)

    @functools.cache
    def draws(n: int) -> list[float]:
        generator = torch.Generator().manual_seed(0)
        return [distance(data.sample(n, generator)) for _ in range(20)]

    return Judge(
        "FD",
        distance,
        lambda n: statistics.fmean(draws(n)),
        lambda n: statistics.stdev(draws(n)),
    )


def grid(
    steps: Sequence[int],
    etas: Sequence[Eta],
    spacing: Spacing | str = "uniform",
    make: Callable[..., DDIM] = DDIM,
) -> list[DDIM]:
    """The samplers of a grid, row by row: each number of steps with each η.

    ``make`` is what makes them, such as a loaded checkpoint's ``ddim``.

    Raises:
        TypeError, ValueError: there are none, one comes twice, or ``DDIM`` refuses one.
    """
    for name, values in (("steps", steps), ("eta", etas)):
        if not values:
            raise ValueError(f"{name} must be one or more, got none")
        if twice := [v for i, v in enumerate(values) if v in values[:i]]:
            raise ValueError(f"{name} must differ from each other, got {twice[0]} twice")
    return [_sampler(make, S, eta, spacing) for S, eta in itertools.product(steps, etas)]


def _sampler(make: Callable[..., DDIM], steps: int, eta: Eta, spacing: Spacing | str) -> DDIM:
    try:
        return make(steps, eta=eta, spacing=spacing)
    except ValueError as error:
        raise ValueError(f"{error} (steps {steps}, eta {eta})") from None


def cells(
    ddims: Sequence[DDIM],
    model: Model,
    seeds: Sequence[int],
    shape: Sequence[int],
    batch_size: int = 16,
    *,
    judge: Judge | None = None,
    device: torch.device | str | None = None,
    progress: Progress = False,
    **options: Any,
) -> Iterator[Cell]:
    """Draws the samples of ``seeds`` with each sampler, and measures it.

    Args:
        ddims: the samplers, such as those of ``grid``.
        model, seeds, shape, batch_size: as in ``draw.by_seed``.
        judge: how the samples are compared with data, such as ``garments()``; nobody by default.
        device: where to sample, and where the model is; CUDA if there is one, else the CPU.
        progress: True for a bar, or a wrapper such as ``tqdm.tqdm``; it counts model calls.
        options: as in ``draw.by_seed``.

    Returns:
        An iterator over one ``Cell`` for each sampler, in order.

    Raises:
        TypeError, ValueError: before any work, naming the argument, the value and what is allowed.
    """
    size = whole("batch_size", batch_size, low=1, high=draw.LARGEST_BATCH)
    least = 1 if judge is None else 2
    if len(seeds) < least:
        raise ValueError(f"seeds must be {least} or more, got {len(seeds)}")
    draw.by_seed(DDIM(1), model, seeds, shape, size)  # refuses what is no seed
    where = _usable(device)
    floor = None if judge is None else judge.floor(len(seeds))
    spread = None if judge is None or judge.spread is None else judge.spread(len(seeds))
    timed = timing.Timed(model, where)
    ticks = iter(checked_progress(progress)(range(model_calls(ddims, len(seeds), size))))

    def measured(ddim: DDIM) -> Cell:
        timing.warm_up(ddim, timed, shape, size, where, **options)
        cpu = where.type == "cpu"
        memory = _peak_on_cpu(ddim, model, shape, size, options) if cpu else None
        if where.type == "cuda":
            torch.cuda.reset_peak_memory_stats(where)
        S, samples, inside, outside = len(ddim.pairs), [], [], []
        batches = draw.by_seed(ddim, timed, seeds, shape, size, device=where, **options)
        timed.start()
        for x in batches:
            total, in_model = timed.seconds()
            inside.append(in_model / S)
            outside.append((total - in_model) / S)
            samples.append(x.cpu())
            # Not step by step: a bar's time would be the update's.
            list(itertools.islice(ticks, S))
            timed.start()
        if where.type == "cuda":
            memory = torch.cuda.max_memory_allocated(where)
        update, asked = statistics.median(outside), statistics.median(inside)
        return Cell(
            steps=S,
            eta=ddim.eta,
            update_ms=1000 * update,
            model_ms=1000 * asked,
            images_per_second=size / (S * (update + asked)),
            memory_mb=None if memory is None else memory / 1e6,
            distance=None if judge is None else judge.distance(torch.cat(samples)),
            floor=floor,
            spread=spread,
        )

    def results() -> Iterator[Cell]:
        yield from map(measured, ddims)
        next(ticks, None)  # beyond the last, where a bar is full

    return results()


def model_calls(ddims: Sequence[DDIM], samples: int, batch_size: int) -> int:
    """How often ``cells`` asks the model for so many samples, but for the first steps it warms."""
    return -(-samples // batch_size) * sum(len(ddim.pairs) for ddim in ddims)


def trace(
    ddims: Sequence[DDIM],
    model: Model,
    shape: Sequence[int],
    batch_size: int,
    path: Path,
    *,
    device: torch.device | str | None = None,
    **options: Any,
) -> None:
    """Writes a trace of the first three steps of each sampler, for ui.perfetto.dev.

    There is a range for each sampler, "10 steps, eta 0.2", and in it, for each step, one named
    "model" and one named "update", which lasts until the model is asked again. The rest is what
    torch does in them.
    """
    where = _usable(device)
    activities = [ProfilerActivity.CPU]
    if where.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    for ddim in ddims:
        timing.warm_up(ddim, model, shape, batch_size, where, **options)
    phases = _Phases(model)
    with _quiet_profile(activities=activities) as profiled:
        for ddim in ddims:
            with record_function(f"{ddim.steps} steps, eta {label(ddim.eta)}"):
                _first_steps(ddim, phases, shape, batch_size, where, options)
                phases.end()
    with images.replacing(path) as file:
        file.write(_exported(profiled))


def _usable(device: torch.device | str | None) -> torch.device:
    """Returns the device: the preferred one where ``device`` is None."""
    name = devices.preferred_device() if device is None else device
    return devices.usable_device(name, computes=True)


class _Phases:
    """A model whose calls, and the time between two of them, are named ranges of a profile."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.update = ExitStack()

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Any:
        self.end()
        with record_function("model"):
            output = self.model(x, t, **cond)
        self.update.enter_context(record_function("update"))
        return output

    def end(self) -> None:
        """The update has ended, if one had begun."""
        self.update.close()


def _first_steps(
    ddim: DDIM,
    model: Model,
    shape: Sequence[int],
    batch_size: int,
    device: torch.device,
    options: Mapping[str, Any],
) -> None:
    """Three steps: in the third, all memory that later ones use is in use."""
    ddim.sample(
        model,
        shape=(batch_size, *shape),
        seeds=range(batch_size),
        device=device,
        progress=lambda steps: itertools.islice(steps, 3),
        **options,
    )


def _peak_on_cpu(
    ddim: DDIM,
    model: Model,
    shape: Sequence[int],
    batch_size: int,
    options: Mapping[str, Any],
) -> int:
    """The most bytes that the tensors of a few steps and the model's weights hold at once."""
    with _quiet_profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        _first_steps(ddim, model, shape, batch_size, torch.device("cpu"), options)
    events = [e for e in json.loads(_exported(profiled))["traceEvents"] if e["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    peak = max(itertools.accumulate((e["args"]["Bytes"] for e in events), initial=0))
    module = model if isinstance(model, nn.Module) else nn.Module()
    weights = sum(p.nbytes for p in itertools.chain(module.parameters(), module.buffers()))
    return int(peak) + weights


@contextmanager
def _quiet_profile(**options: Any) -> Iterator[profile]:
    """``torch.profiler.profile`` with stderr turned away: Kineto tells there of start and stop."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        with profile(**options) as profiled:
            yield profiled
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _exported(profiled: profile) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(path))
        return path.read_bytes()


def settings(
    model: Model,
    ddim: DDIM,
    seeds: str,
    batch_size: int,
    device: torch.device,
    judge: Judge | None,
    **rest: Any,
) -> dict[str, Any]:
    """What a profile depends on beside steps and η, as plain values: model, data and machine.

    The machine is its device, the backend that takes the steps there, and versions. ``rest`` is
    what else a profile depends on, such as a class; what is None is left out. A model that is no
    ``nn.Module`` has no weights to be known by, and goes by its name.
    """
    name = getattr(model, "__qualname__", type(model).__qualname__)
    known_by = provenance.digest(model) if isinstance(model, nn.Module) else name
    digest = hashlib.sha256(known_by.encode() + ddim.schedule.alphas_cumprod.tobytes())
    return {
        "model": digest.hexdigest()[:16],
        "prediction": ddim.prediction,
        "seeds": seeds,
        "batch_size": batch_size,
        "spacing": str(ddim.spacing),
        "distance": None if judge is None else judge.name,
        "device": provenance.machine(device),
        "backend": backend(device).name,
        **{name: value for name, value in rest.items() if value is not None},
        "fastddim": __version__,
        **provenance.versions("torch", "triton", "numba"),
    }


def check_folder(folder: Path) -> None:
    """Raises an ``OSError`` unless ``folder`` is one or may be made, while there is no work yet.

    Or ``ModuleNotFoundError`` where what draws the picture is missing.
    """
    import matplotlib.figure  # noqa: F401

    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"out must be a folder, got the file {folder}")
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"out must be in a folder that exists, got {folder}")


def make_folder(folder: Path) -> None:
    """Makes ``folder`` if it does not exist.

    Raises:
        OSError: it cannot be made, or cannot be written to.
    """
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise type(error)(
            f"out must be a folder that can be made, got {folder}: {error.strerror}"
        ) from None
    images.check_png(folder / PNG)


def read(folder: Path, settings: Settings) -> list[Cell]:
    """The cells that ``save`` has left in ``folder``: none in a new one.

    Raises:
        ValueError: they were measured with other settings, or are no such cells.
    """
    path = folder / JSON
    if not path.exists():
        return []
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        there, done = dict(kept["settings"]), [Cell(**cell) for cell in kept["cells"]]
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


def save(folder: Path, settings: Settings, done: Sequence[Cell]) -> None:
    """Writes ``done`` to profile.json and profile.csv, each whole or not at all."""
    rows = [asdict(cell) for cell in done]
    text = json.dumps({"settings": dict(settings), "cells": rows}, indent=1, allow_nan=False)
    with images.replacing(folder / JSON) as file:
        file.write(text.encode() + b"\n")
    table = io.StringIO()
    writer = csv.DictWriter(table, [field.name for field in fields(Cell)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with images.replacing(folder / CSV) as file:
        file.write(table.getvalue().encode())


def label(eta: Eta) -> str:
    """0.2 or hat."""
    return eta if isinstance(eta, str) else f"{eta:g}"


def plot(settings: Settings, done: Sequence[Cell], path: Path) -> None:
    """Draws ``done`` as a PNG: the distance over S for each η, and where the time of a step goes.

    Without a distance there is the second panel alone.
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
        assert floor is not None  # as there is a distance
        axes.axhline(floor, color=GREY, linestyle=(0, (4, 3)), linewidth=1.2, zorder=1)
        what = f"as many real samples: {floor:.2g}"
        if spread is not None:
            axes.axhspan(max(floor - spread, floor / 10), floor + spread, color="#e6e6e6", zorder=0)
            what += f" ± {spread:.1g}"
        _dress(axes, f"{settings['distance']} to the data (lower is better)", done, names)
        axes.set_ylabel(settings["distance"])
        _write(axes, min(cell.steps for cell in done), floor, what, GREY, (0, -12))
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
    # No line comes close to them there, as it may to a word beside one.
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
    with images.replacing(path) as file:
        figure.savefig(file, format="png")


# Okabe and Ito's, which the colour-blind tell apart; the markers differ too.
COLOURS = ("#000000", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00")
HAT = "#D55E00"
MARKERS = "osDvPX"
GREY = "#767676"


def _line(axes: Any, i: int, eta: Eta, row: Sequence[Cell], what: str) -> tuple[float, str, str]:
    """Draws one η's line, and returns where it begins, its name and its colour."""
    colour = HAT if eta == "hat" else COLOURS[i % len(COLOURS)]
    marker = "^" if eta == "hat" else MARKERS[i % len(MARKERS)]
    values = [getattr(cell, what) for cell in row]
    axes.plot([cell.steps for cell in row], values, color=colour, marker=marker, markersize=5)
    return values[0], r"$\hat{\sigma}$" if eta == "hat" else f"η = {label(eta)}", colour


def _dress(
    axes: Any, title: str, done: Sequence[Cell], names: Sequence[tuple[float, str, str]]
) -> None:
    """Scales, ticks and title; and beside where each line begins, its name, none on another."""
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
    # Each name at its line's height, but apart: midway between pushing all up and all down.
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
    """Writes beside a point, so many printer's points off it."""
    axes.annotate(
        text, (x, y), offset, textcoords="offset points", color=colour, fontsize=9, **where
    )
