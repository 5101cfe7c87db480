"""Measures S, order, spacing and η: the cost of a step and the quality of the samples."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from fastddim import __version__, timesteps
from fastddim.check import whole
from fastddim.files import replacing
from fastddim.levels import GaussianPath
from fastddim.loop import devices
from fastddim.loop.model import Model
from fastddim.loop.options import Progress, checked_progress
from fastddim.loop.sampler import DDIM
from fastddim.schedule import NoiseSchedule
from fastddim.step.backends import backend
from fastddim.timesteps import Spacing
from fastddim.tools import draw, provenance, timing
from fastddim.tools.draw import model_calls
from fastddim.tools.page import write_page
from fastddim.tools.plot import plot
from fastddim.tools.quality import GaussianMixture, frechet_distance
from fastddim.tools.table import (
    CSV,
    HTML,
    JSON,
    PNG,
    TRACE,
    Cell,
    Settings,
    check_folder,
    label,
    make_folder,
    read,
    remaining,
    save,
    spacing_name,
)
from fastddim.tools.thumbnails import keep_images
from fastddim.tuned import Tuned
from fastddim.variances import Eta

__all__ = (
    "CSV",
    "HTML",
    "JSON",
    "PNG",
    "TRACE",
    "Cell",
    "Judge",
    "Settings",
    "cells",
    "check_folder",
    "garments",
    "grid",
    "keep_images",
    "label",
    "left_out",
    "make_folder",
    "mixture",
    "model_calls",
    "oracle",
    "plot",
    "read",
    "remaining",
    "save",
    "settings",
    "spacing_name",
    "trace",
    "write_page",
)


@dataclass(frozen=True)
class Judge:
    """A distance between samples and data.

    Attributes:
        name: the distance's name.
        distance: returns the distance of samples (N, ...), on the CPU, to the data.
        floor: returns the mean distance of N samples that a perfect model draws.
        spread: returns the standard deviation of that distance over draws; None if unknown.
    """

    name: str
    distance: Callable[[Tensor], float]
    floor: Callable[[int], float]
    spread: Callable[[int], float] | None = None


def garments() -> Judge:
    """Returns FD-clf, for images (N, 1, 28, 28): see ``fastddim.tools.distance``."""
    from fastddim.tools import distance

    real = distance.load()
    return Judge("FD-clf", real.distance, real.floor, real.spread)


def oracle(path: str | None = None) -> GaussianMixture:
    """Returns data whose ε is known exactly: eight narrow modes in 64 dimensions, each on an axis.

    ``path`` names one of ``PATHS``, and is that of linear β by default.

    The modes are narrow because few steps get the width of a mode wrong. The dimensions are many
    so that the width weighs more than the number of samples that reach each mode.
    """
    schedule, prediction = PATHS[path or "ddpm"]()
    return GaussianMixture(
        torch.eye(8, 64, device="cpu"), 0.1, schedule=schedule, prediction=prediction
    )


PATHS: dict[str, Callable[[], tuple[GaussianPath, str]]] = {
    "ddpm": lambda: (NoiseSchedule.linear(), "epsilon"),
    "flow": lambda: (NoiseSchedule.flow(), "flow"),
    "flow-shift3": lambda: (NoiseSchedule.flow(3.0), "flow"),
    "edm": lambda: (NoiseSchedule.edm(), "sample"),
    "cosine": lambda: (NoiseSchedule.continuous_cosine(), "v"),
}
"""The paths on which the oracle can be measured, and the output of a model there."""


def mixture(data: GaussianMixture) -> Judge:
    """Returns the Fréchet distance of the samples' own values to the Gaussian of ``data``.

    The mean and the covariance of ``data`` are exact; floor and spread come from 20 draws.
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
    spacing: Spacing | str | Sequence[Tuned | str] = "uniform",
    make: Callable[..., DDIM] = DDIM,
    *,
    orders: Sequence[int] = (1,),
) -> list[DDIM]:
    """Returns the samplers of a grid: for each number of steps each order, spacing and η.

    A combination that does not exist is left out, unless the grid has no other: see ``left_out``.

    Args:
        steps, etas, orders: one or more different values.
        spacing: a spacing, or one or more different names, ``Tuned`` timesteps or their files.
        make: makes a sampler, for example a loaded checkpoint's ``ddim``.

    Raises:
        TypeError, ValueError: an axis is empty or repeats a value, or ``DDIM`` refuses a value.
    """
    found = _combinations(steps, etas, spacing, orders)
    possible = [each for each in found if _missing(*each) is None]
    return [_sampler(make, *each) for each in possible or found]


def left_out(
    steps: Sequence[int],
    etas: Sequence[Eta],
    spacing: Spacing | str | Sequence[Tuned | str] = "uniform",
    *,
    orders: Sequence[int] = (1,),
) -> list[str]:
    """Returns the combinations that ``grid`` leaves out, as text: order 2 with σ̂, and numbers of
    steps for which timesteps were not tuned."""
    missing = [_missing(*each) for each in _combinations(steps, etas, spacing, orders)]
    return list(dict.fromkeys(reason for reason in missing if reason is not None))


Combination: TypeAlias = tuple[int, int, Spacing | str, Eta]
"""S, the order, the spacing and η of a sampler."""


def _combinations(
    steps: Sequence[int],
    etas: Sequence[Eta],
    spacing: Spacing | str | Sequence[Tuned | str],
    orders: Sequence[int],
) -> list[Combination]:
    """Returns all combinations, checked to differ; the files of tuned timesteps are read."""
    of_one = isinstance(spacing, (str, Tuned, PathLike)) or any(
        not isinstance(each, (str, Tuned)) for each in spacing
    )
    given: Sequence[Any] = [spacing] if of_one else spacing  # type: ignore[assignment]
    spacings = [timesteps.read(each) for each in given]
    names = [spacing_name(each) for each in spacings]
    axes = (("steps", steps), ("order", orders), ("spacing", names), ("eta", etas))
    for name, values in axes:
        if not values:
            raise ValueError(f"{name} must be one or more, got none")
        if twice := [v for i, v in enumerate(values) if v in values[:i]]:
            raise ValueError(f"{name} must differ from each other, got {twice[0]} twice")
    return list(itertools.product(steps, orders, spacings, etas))


def _missing(steps: int, order: int, spacing: Spacing | str, eta: Eta) -> str | None:
    """Returns the reason why no sampler has these values, or None."""
    if order == 2 and not isinstance(eta, (int, float)):
        return f"order 2 with eta {eta}"
    if isinstance(spacing, Tuned) and steps not in spacing.steps:
        tuned = " or ".join(map(str, spacing.steps))
        return f"{steps} steps of {spacing_name(spacing)}, which has {tuned}"
    return None


def _sampler(
    make: Callable[..., DDIM], steps: int, order: int, spacing: Spacing | str, eta: Eta
) -> DDIM:
    try:
        return make(steps, eta=eta, spacing=spacing, order=order)
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
    keep: Callable[[Cell, Tensor], object] | None = None,
    device: torch.device | str | None = None,
    progress: Progress = False,
    **options: Any,
) -> Iterator[Cell]:
    """Draws the samples of ``seeds`` with each sampler, and measures the sampler.

    Args:
        ddims: the samplers, such as those of ``grid``.
        model, seeds, shape, batch_size: as in ``draw.by_seed``.
        judge: the distance to measure, for example ``garments()``; none by default.
        keep: called with each cell and its samples (N, ...), on the CPU, before the cell is
            yielded; for example ``keep_images`` of a folder.
        device: the device to sample on, which the model is on; by default CUDA if present, else
            the CPU.
        progress: True for a bar, or a wrapper such as ``tqdm.tqdm``; it counts model calls.
        options: as in ``draw.by_seed``.

    Returns:
        An iterator that yields one ``Cell`` for each sampler, in order.

    Raises:
        TypeError, ValueError: before any work, if an argument is not allowed.
    """
    size = whole("batch_size", batch_size, low=1, high=draw.LARGEST_BATCH)
    least = 1 if judge is None else 2
    if len(seeds) < least:
        raise ValueError(f"seeds must be {least} or more, got {len(seeds)}")
    draw.by_seed(DDIM(1), model, seeds, shape, size)  # raises for a bad seed, now
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
            total, model_s = timed.seconds()
            inside.append(model_s / S)
            outside.append((total - model_s) / S)
            samples.append(x.cpu())
            # Once a batch: a bar that moved at each step would count as the update's time.
            list(itertools.islice(ticks, S))
            timed.start()
        if where.type == "cuda":
            memory = torch.cuda.max_memory_allocated(where)
        update, in_model = statistics.median(outside), statistics.median(inside)
        drawn = torch.cat(samples)
        cell = Cell(
            steps=S,
            eta=ddim.eta,
            update_ms=1000 * update,
            model_ms=1000 * in_model,
            images_per_second=size / (S * (update + in_model)),
            memory_mb=None if memory is None else memory / 1e6,
            distance=None if judge is None else judge.distance(drawn),
            floor=floor,
            spread=spread,
            order=ddim.order,
            spacing=spacing_name(ddim.spacing),
        )
        if keep is not None:
            keep(cell, drawn)
        return cell

    def results() -> Iterator[Cell]:
        yield from map(measured, ddims)
        next(ticks, None)  # past the last call, so that the bar closes

    return results()


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

    Each sampler has a range such as "10 steps, eta 0.2", or "10 steps, eta 0.2, order 2". For each
    step this range holds a range "model" and a range "update", which lasts until the next call of
    the model. They hold torch's own events.
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
            of_order = "" if ddim.order == 1 else f", order {ddim.order}"
            with record_function(f"{ddim.steps} steps, eta {label(ddim.eta)}{of_order}"):
                _first_steps(ddim, phases, shape, batch_size, where, options)
                phases.end()
    with replacing(path) as file:
        file.write(_exported(profiled))


def _usable(device: torch.device | str | None) -> torch.device:
    """Returns the device: the preferred one where ``device`` is None."""
    name = devices.preferred_device() if device is None else device
    return devices.usable_device(name, computes=True)


class _Phases:
    """A model whose calls are ranges "model" of a profile, with ranges "update" between them."""

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
        """Ends the range "update", if it has begun."""
        self.update.close()


def _first_steps(
    ddim: DDIM,
    model: Model,
    shape: Sequence[int],
    batch_size: int,
    device: torch.device,
    options: Mapping[str, Any],
) -> None:
    """Takes three steps: the third uses as much memory as any later step."""
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
    """Returns the peak bytes of the tensors of a few steps, plus those of the model's weights."""
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
    """Profiles with stderr discarded, because Kineto reports its start and stop on stderr."""
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
    """Returns all that a profile depends on beside the axes of its grid, as plain values.

    The values describe the model, the data and the machine: its device, the backend that takes
    the steps, and versions. ``rest`` adds others, such as a class; None values are left out. A
    model that is not an ``nn.Module`` has no weights to hash and is identified by its name.
    """
    name = getattr(model, "__qualname__", type(model).__qualname__)
    identity = provenance.digest(model) if isinstance(model, nn.Module) else name
    schedule = ddim.schedule
    levels = (
        schedule.alphas_cumprod.tobytes()
        if isinstance(schedule, NoiseSchedule)
        else schedule.digest.encode()
    )
    digest = hashlib.sha256(identity.encode() + levels)
    return {
        "model": digest.hexdigest()[:16],
        "prediction": ddim.prediction,
        "seeds": seeds,
        "batch_size": batch_size,
        "distance": None if judge is None else judge.name,
        "device": provenance.machine(device),
        "backend": backend(device).name,
        **{name: value for name, value in rest.items() if value is not None},
        "fastddim": __version__,
        **provenance.versions("torch", "triton", "numba"),
    }
