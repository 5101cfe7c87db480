"""``tune`` searches the timesteps with which few steps come closest to many."""

from __future__ import annotations

import json
import math
import time
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
from fastddim.levels import GaussianPath
from fastddim.loop.model import Model
from fastddim.loop.options import Progress, checked_progress
from fastddim.loop.sampler import DDIM
from fastddim.timesteps import make_pairs
from fastddim.tools import draw, provenance
from fastddim.tools.quality import Moments, frechet_distance, moments
from fastddim.tuned import Tuned, schedule_id

Features = Callable[[Tensor], Tensor]

COMPONENTS = 32
"""The number of principal components of the fine samples that are compared by default."""

STARTS = ("mixed", "linspace", "uniform", "trailing", "logsnr", "karras")
"""The spacings among which the search chooses where to begin."""

MOVES = (0.3, -0.3, 0.3, -0.3, 0.15, -0.15, 0.15, -0.15)
"""Each level in turn moves by these shares of the gap to its neighbour, if it improves τ."""

GAIN = 0.01
"""A move must lower the distance by this share, which is more than the noise of few samples."""

SAMPLER = ("order", "prediction", "clip", "final_alpha_cumprod", "temperature")
"""The attributes of ``DDIM`` on which distances depend, beside its schedule."""


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


class Search:
    """A search, whose arguments are checked before any work: see ``tune``.

    Attributes:
        found: the search's result for each number of steps, so far.
    """

    def __init__(
        self,
        ddim: DDIM,
        model: Model,
        shape: Sequence[int],
        steps: Sequence[int],
        *,
        seeds: Sequence[int],
        batch_size: int,
        fine: int,
        features: Features | None,
        real: Moments | None,
        memory: Path | str | None,
        device: torch.device | str | None,
        **options: Any,
    ) -> None:
        if not isinstance(ddim, DDIM):
            raise TypeError(f"ddim must be a DDIM, got {shown(ddim)}")
        if ddim.eta != 0:
            raise ValueError(
                f"eta must be 0 to tune timesteps, got {ddim.eta}: x_T must determine the sample"
            )
        if ddim.schedule.continuous:
            raise ValueError(
                f"schedule must be a table of levels to tune timesteps, got {ddim.schedule}"
            )
        T = len(ddim.schedule)
        self.fine = whole("fine", fine, low=3, high=T)
        self.steps = [whole("steps", S, low=2, high=self.fine - 1) for S in steps]
        if not self.steps or len(set(self.steps)) < len(self.steps):
            raise ValueError(f"steps must be one or more different numbers, got {shown(steps)}")
        if len(seeds) < 8:
            raise ValueError(f"seeds must be 8 or more, got {len(seeds)}")
        if real is not None and features is None:
            raise ValueError("features must be given with real, got none")
        draw.by_seed(ddim, model, seeds, shape, batch_size)  # raises for a bad seed, now
        self.ddim, self.model, self.shape, self.seeds = ddim, model, shape, list(seeds)
        self.batch_size, self.features, self.real = batch_size, features, real
        self.options = {"device": device, **options}
        self.weights = provenance.digest(model) if isinstance(model, nn.Module) else ""
        self.memory = Memory(None if memory is None else Path(memory), self._settings())
        self.found: dict[int, Found] = {}

    def _settings(self) -> dict[str, Any]:
        """Returns all on which the distances depend, as plain values."""
        kind = "principal components"
        if self.features is not None:
            kind = getattr(self.features, "__qualname__", type(self.features).__qualname__)
        return {
            "schedule": schedule_id(self.ddim.schedule),
            "model": self.weights,
            **{name: getattr(self.ddim, name) for name in SAMPLER},
            "shape": list(self.shape),
            "seeds": self.seeds,
            "batch_size": self.batch_size,
            "target": f"{kind} of {self.fine} steps" if self.real is None else f"real {kind}",
        }

    @property
    def _batches(self) -> int:
        return -(-len(self.seeds) // self.batch_size)

    def model_calls(self) -> int:
        """Returns the number of model calls of the search, less where a distance is known."""
        tries = {S: len(STARTS) + len(MOVES) * (S - 1) for S in self.steps}
        fine = 0 if self.real is not None else self.fine
        return self._batches * (fine + sum(S * n for S, n in tries.items()))

    def seconds(self) -> float:
        """Returns the search's seconds at the speed of a model call, which it measures."""
        first = replace(self.ddim, steps=1, spacing="trailing")
        taken = []
        for _ in range(3):
            begin = time.perf_counter()
            self._samples(first, self.seeds[:1])
            taken.append(time.perf_counter() - begin)
        return min(taken) * self.model_calls()

    def _samples(self, ddim: DDIM, seeds: list[int]) -> Tensor:
        drawn = draw.by_seed(ddim, self.model, seeds, self.shape, self.batch_size, **self.options)
        return torch.cat([x.cpu() for x in drawn])

    def run(self, progress: Progress = False) -> Tuned:
        """Searches τ for each number of steps, and returns all."""
        ticks = iter(checked_progress(progress)(range(self.model_calls())))
        schedule = self.ddim.schedule
        features, target = self.features, self.real
        if target is None:
            exact = self._samples(
                replace(self.ddim, steps=self.fine, spacing="linspace"), self.seeds
            )
            _advance(ticks, self._batches * self.fine)
            features = features or principal(exact)
            target = moments(features(exact))
        of: Features = features  # type: ignore[assignment] # real comes with features

        def distance(tau: tuple[int, ...]) -> float:
            found = self.memory.get(tau)
            if found is None:
                x = self._samples(replace(self.ddim, steps=None, spacing=tau), self.seeds)
                found = frechet_distance(of(x), target) if x.isfinite().all() else math.inf
                self.memory.put(tau, found)
            return found

        for S in self.steps:
            self.found[S] = _descent(
                S, schedule, distance, partial(_advance, ticks, S * self._batches)
            )
        next(ticks, None)  # past the last call, so that the bar closes
        distances = {S: [f.start, f.before, f.distance] for S, f in self.found.items()}
        about = {**self._settings(), "distances": distances, "fastddim": __version__}
        return Tuned(
            timesteps=tuple(found.tau for found in self.found.values()),
            order=self.ddim.order,
            T=len(schedule),
            schedule=schedule_id(schedule),
            model=self.weights,
            about=json.dumps(about),
        )


def tune(
    ddim: DDIM,
    model: Model,
    shape: Sequence[int],
    steps: Sequence[int] = (6, 8, 10),
    *,
    seeds: Sequence[int] = range(128),
    batch_size: int = 64,
    fine: int = 100,
    features: Features | None = None,
    real: Moments | None = None,
    memory: Path | str | None = None,
    device: torch.device | str | None = None,
    progress: Progress = False,
    **options: Any,
) -> Tuned:
    """Searches timesteps for few steps of ``ddim``, without training: ``DDIM(spacing=tuned)``.

    For each S the search begins at the best of the named spacings, and moves one level at a time
    while a distance falls: the Fréchet distance between the samples' features and those of real
    data or, without ``real``, those of the samples that ``fine`` steps make of the same x_T. Bias
    and lost variance weigh in it as they do in FID; the mean squared distance to the fine samples
    prefers samples that are too smooth. The noisiest level stays at T−1, where x_T is noise. The
    search is deterministic.

    Args:
        ddim: the sampler whose τ is searched; its η is 0, and its steps and spacing do not matter.
        model, shape, batch_size, device: as in ``draw.by_seed``.
        steps: the numbers of steps S, each from 2 to ``fine`` − 1.
        seeds: the samples that are compared, 8 or more. Judge the result on other seeds.
        fine: the number of steps of the fine samples.
        features: a function of samples (N, ...) on the CPU to features (N, D); by default the
            first 32 principal components of the fine samples.
        real: the ``moments`` of the features of real data.
        memory: a file that keeps each distance as it is measured, so that an interrupted search
            continues. A file of another search is refused. It is removed at the end.
        progress: True for a bar, or a wrapper such as ``tqdm.tqdm``; it counts model calls.
        options: as in ``draw.by_seed``.

    Raises:
        TypeError, ValueError: before any work, naming the argument, the value and what is allowed.

    Example:
        >>> from fastddim import DDIM, embedded, tune
        >>> tuned = tune(DDIM(order=2), embedded.load(), embedded.SHAPE, [2], seeds=range(8),
        ...              batch_size=8, fine=4)
        >>> DDIM(steps=2, order=2, spacing=tuned).pairs[0][0]
        999
    """
    search = Search(
        ddim,
        model,
        shape,
        steps,
        seeds=seeds,
        batch_size=batch_size,
        fine=fine,
        features=features,
        real=real,
        memory=memory,
        device=device,
        **options,
    )
    tuned = search.run(progress)
    search.memory.remove()
    return tuned


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
    schedule: GaussianPath,
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
    for share in MOVES:
        for i in range(1, S):
            tried = _moved(tau, i, share)
            tick()
            if tried is not None and (found := distance(tried)) < (1 - GAIN) * best:
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
