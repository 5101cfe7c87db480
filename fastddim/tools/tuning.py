"""``tune`` searches the timesteps with which few steps come closest to many."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastddim import __version__
from fastddim.check import shown, whole
from fastddim.files import replacing
from fastddim.loop.model import Model
from fastddim.loop.options import Progress, checked_progress
from fastddim.loop.sampler import DDIM
from fastddim.schedule import NoiseSchedule
from fastddim.timesteps import make_pairs
from fastddim.tools import draw, provenance
from fastddim.tools.quality import frechet_distance, moments
from fastddim.tuned import Tuned, schedule_id

Features = Callable[[Tensor], Tensor]

COMPONENTS = 32
"""The number of principal components of the fine samples that are compared by default."""

STARTS = ("mixed", "linspace", "uniform", "trailing", "logsnr", "karras")
"""The spacings among which the search chooses where to begin."""

MOVES = (0.3, -0.3, 0.15, -0.15)
"""A level moves by these shares of the gap to its neighbour, the larger moves first."""

GAIN = 0.01
"""A move must lower the distance by this share, which is more than the noise of few samples."""

SAMPLER = ("order", "prediction", "clip", "final_alpha_cumprod", "temperature")
"""The attributes of ``DDIM`` on which distances depend, beside its schedule."""

SWEEPS = 2
"""The number of times that every level tries every move."""


@dataclass(frozen=True)
class Found:
    """The search for one number of steps.

    Attributes:
        tau: the timesteps, from the noisiest level to the cleanest.
        distance: the distance of their samples to the fine samples.
        start: the name of the spacing that the search began from, the best of ``STARTS``.
        before: that spacing's distance.
    """

    tau: tuple[int, ...]
    distance: float
    start: str
    before: float


def tune(
    ddim: DDIM,
    model: Model,
    shape: Sequence[int],
    steps: Sequence[int] = (6, 8, 10),
    *,
    seeds: Sequence[int] = range(64),
    batch_size: int = 64,
    fine: int = 100,
    features: Features | None = None,
    memory: Path | str | None = None,
    device: torch.device | str | None = None,
    progress: Progress = False,
    **options: Any,
) -> Tuned:
    """Searches timesteps for few steps of ``ddim``, without training: ``DDIM(spacing=tuned)``.

    For each S the search begins at the best of the named spacings, and then moves one level at a
    time while the distance falls: the Fréchet distance between features of the samples and of
    those that ``fine`` steps make of the same x_T. Bias and lost variance weigh in this distance
    as they do in FID; the mean squared distance, which is 0 at the same τ too, prefers samples
    that are smooth. The noisiest level stays at T−1, where x_T is noise. The search is
    deterministic, and costs at most ``model_calls``.

    Args:
        ddim: the sampler whose τ is searched: its η must be 0. Its steps and spacing do not matter.
        model, shape, batch_size, device: as in ``draw.by_seed``.
        steps: the numbers of steps S, each 2 or more.
        seeds: the samples that are compared, 8 or more. Judge the result on other seeds.
        fine: the number of steps of the samples to come close to, of the same sampler.
        features: a function of samples (N, ...) on the CPU to features (N, D); by default the
            first 32 principal components of the fine samples.
        memory: a file that keeps each distance as it is measured, so that an interrupted search
            continues. It refuses a file of another search, and is removed at the end.
        progress: True for a bar, or a wrapper such as ``tqdm.tqdm``; it counts model calls.
        options: as in ``draw.by_seed``.

    Raises:
        TypeError, ValueError: before any work, naming the argument, the value and what is allowed.

    Example:
        >>> from fastddim import DDIM, embedded, tune
        >>> tuned = tune(DDIM(order=2), embedded.load(), embedded.SHAPE, [4], seeds=range(8),
        ...              batch_size=8, fine=20)
        >>> DDIM(steps=4, order=2, spacing=tuned).pairs[0][0]
        999
    """
    if not isinstance(ddim, DDIM):
        raise TypeError(f"ddim must be a DDIM, got {shown(ddim)}")
    if ddim.eta != 0:
        raise ValueError(
            f"eta must be 0 to tune timesteps, got {ddim.eta}: x_T must determine the sample"
        )
    schedule = ddim.schedule
    fine = whole("fine", fine, low=3, high=len(schedule))
    wanted = [whole("steps", S, low=2, high=fine - 1) for S in steps]
    if not wanted or len(set(wanted)) < len(wanted):
        raise ValueError(f"steps must be one or more different numbers, got {shown(steps)}")
    if len(seeds) < 8:
        raise ValueError(f"seeds must be 8 or more, got {len(seeds)}")
    draw.by_seed(ddim, model, seeds, shape, batch_size)  # raises for a bad seed, now
    weights = provenance.digest(model) if isinstance(model, nn.Module) else ""
    settings = {
        "schedule": schedule_id(schedule),
        "model": weights,
        **{name: getattr(ddim, name) for name in SAMPLER},
        "shape": list(shape),
        "seeds": list(seeds),
        "batch_size": batch_size,
        "fine": fine,
        "features": "principal components" if features is None else features.__qualname__,
    }
    kept = Memory(None if memory is None else Path(memory), settings)

    def samples(tau: Sequence[int]) -> Tensor:
        sampler = replace(ddim, steps=None, spacing=tau)
        drawn = draw.by_seed(sampler, model, seeds, shape, batch_size, device=device, **options)
        return torch.cat([x.cpu() for x in drawn])

    batches = -(-len(seeds) // batch_size)
    ticks = iter(
        checked_progress(progress)(range(model_calls(wanted, len(seeds), batch_size, fine)))
    )
    exact = samples([t for t, _ in make_pairs("linspace", fine, schedule)])
    _advance(ticks, fine * batches)
    of = principal(exact) if features is None else features
    target = moments(of(exact))

    def distance(tau: tuple[int, ...]) -> float:
        found = kept.get(tau)
        if found is None:
            x = samples(tau)
            found = frechet_distance(of(x), target) if x.isfinite().all() else math.inf
            kept.put(tau, found)
        return found

    found = {}
    for S in wanted:
        calls = S * batches
        found[S] = _descent(S, schedule, distance, partial(_advance, ticks, calls))
    next(ticks, None)  # past the last call, so that the bar closes
    about = {
        "seeds": len(seeds),
        "fine": fine,
        "distances": {S: [f.start, f.before, f.distance] for S, f in found.items()},
        "fastddim": __version__,
    }
    tuned = Tuned(
        timesteps=tuple(f.tau for f in found.values()),
        order=ddim.order,
        T=len(schedule),
        schedule=schedule_id(schedule),
        model=weights,
        about=json.dumps(about),
    )
    kept.remove()
    return tuned


def model_calls(steps: Sequence[int], samples: int, batch_size: int, fine: int) -> int:
    """Returns the number of model calls of a search, of which some are known before it ends."""
    tries = {S: len(STARTS) + SWEEPS * len(MOVES) * (S - 1) for S in steps}
    return -(-samples // batch_size) * (fine + sum(S * n for S, n in tries.items()))


def principal(x: Tensor) -> Features:
    """Returns the function of samples to their first principal components, those of ``x``."""
    flat = x.flatten(1).double()
    mean = flat.mean(0)
    _, _, directions = torch.linalg.svd(flat - mean, full_matrices=False)
    chosen = directions[: min(COMPONENTS, len(flat) // 2)]
    return lambda samples: (samples.flatten(1).double() - mean) @ chosen.T


def _advance(ticks: Iterator[int], calls: int) -> None:
    list(islice(ticks, calls))


def _descent(
    S: int,
    schedule: NoiseSchedule,
    distance: Callable[[tuple[int, ...]], float],
    tick: Callable[[], object],
) -> Found:
    """Begins at the best of ``STARTS``, and moves one level at a time while the distance falls."""
    starts = {}
    for name in STARTS:
        tau = tuple(t for t, _ in make_pairs(name, S, schedule))
        tau = (len(schedule) - 1, *tau[1:])  # "uniform" begins lower
        starts[name] = distance(tau), tau
        tick()
    start = min(starts, key=lambda name: starts[name][0])
    best, tau = before, _ = starts[start]
    for _ in range(SWEEPS):
        for share in MOVES:
            for i in range(1, S):
                tried = _moved(tau, i, share)
                tick()
                if tried is None:
                    continue
                found = distance(tried)
                if found < (1 - GAIN) * best:
                    best, tau = found, tried
    return Found(tau, best, start, before)


def _moved(tau: tuple[int, ...], i: int, share: float) -> tuple[int, ...] | None:
    """Returns τ with level i moved by this share of the gap; None if it stays where it is."""
    neighbour = tau[i - 1] if share > 0 else (*tau, -1)[i + 1]
    t = tau[i] + round(abs(share) * (neighbour - tau[i]))
    if t in (tau[i], neighbour):
        return None
    return (*tau[:i], t, *tau[i + 1 :])


class Memory:
    """The distances that a search has measured, in a file which a later search continues.

    Its first line holds the search's settings, and each further line one τ and its distance. A
    line that an interruption has cut off is measured again.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path = path
        self.known: dict[tuple[int, ...], float] = {}
        head = json.dumps(settings, sort_keys=True)
        if path is None:
            return
        if not path.exists():
            with replacing(path) as file:
                file.write(f"{head}\n".encode())
            return
        first, *rest = path.read_text(encoding="utf-8").split("\n")
        if first != head:
            raise ValueError(
                f"{path} holds the distances of another search{_difference(first, settings)}: "
                f"delete it, or search with those settings"
            )
        for line in rest[:-1]:
            tau, found = json.loads(line)
            self.known[tuple(tau)] = found
        with path.open("r+", encoding="utf-8") as file:  # drops a line without its end
            file.truncate(len("\n".join([first, *rest[:-1], ""]).encode()))

    def get(self, tau: tuple[int, ...]) -> float | None:
        return self.known.get(tau)

    def put(self, tau: tuple[int, ...], distance: float) -> None:
        self.known[tau] = distance
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([tau, distance]) + "\n")

    def remove(self) -> None:
        """Deletes the file: the search has ended."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _difference(head: str, settings: dict[str, Any]) -> str:
    """Returns the first setting in which a file's search differs, as text."""
    try:
        there = json.loads(head)
        name = next(
            name for name in settings if there[name] != json.loads(json.dumps(settings))[name]
        )
    except (ValueError, KeyError, TypeError, StopIteration):
        return ""
    return f" ({name} {shown(there[name])}, not {shown(settings[name])})"
