"""Serves the same Poisson arrivals by the engine and by its peers, and compares their outputs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastddim.check import whole
from fastddim.loop.model import Model
from fastddim.loop.sampler import DDIM
from fastddim.serving.engine import Engine
from fastddim.serving.request import Request
from fastddim.tools.timing import warm_up

TOLERANCE, HALF_TOLERANCE = 1e-2, 0.5
"""The largest difference of two samples that were made at different batch sizes, where networks
round differently, by a network in float32 and in half precision."""

ENGINE = "engine"


class Job(NamedTuple):
    """A request of the load.

    Attributes:
        seed: of its noise, and its place in the load.
        steps: S.
        at: its arrival in seconds after the first moment.
    """

    seed: int
    steps: int
    at: float


class Served(NamedTuple):
    """The sample of a request, the batch size of its model calls, and when it was there."""

    sample: Tensor
    size: int
    done: float


class Peer(NamedTuple):
    """A way to serve requests in batches.

    Attributes:
        name: as the table shows it.
        slots: the most requests in a batch.
        alike: whether a batch holds requests of equal S alone. Otherwise it holds the first ones
            that wait, and runs as long as its longest request; the others are there before.
        timeout: the seconds after which a batch begins with the requests that wait; None if a
            batch waits until it is full, or until the last request has come.
    """

    name: str
    slots: int
    alike: bool
    timeout: float | None


@dataclass
class Outcome:
    """The figures of a peer, each the median over the rounds.

    Attributes:
        name: the peer.
        samples_per_second: requests over the seconds until the last sample is there.
        p50, p99: percentiles of the seconds from a request's arrival to its sample.
        occupancy: the steps of the requests over the samples in the model's calls, in [0, 1]. Each
            call counts as full.
        against: the engine's samples per second over the peer's, the median of the rounds' ratios.
        latencies: of all requests and rounds.
    """

    name: str
    samples_per_second: float
    p50: float
    p99: float
    occupancy: float
    against: float
    latencies: list[float] = field(repr=False)


class _Round(NamedTuple):
    """One peer in one round."""

    rate: float
    latencies: list[float]
    occupancy: float


def load(steps: Sequence[int], count: int, rate: float, seed: int = 0) -> list[Job]:
    """Returns requests with Poisson arrivals: the gaps are exponential, of mean 1/rate seconds.

    Args:
        steps: the numbers of steps; each request has one of them, with equal probability.
        count: the number of requests.
        rate: requests per second; infinity for requests that all come at once.
        seed: of the mix and of the gaps.

    >>> [job.steps for job in load([8, 50], 4, rate=float("inf"))]
    [50, 50, 50, 8]
    """
    random = np.random.default_rng(seed)
    mix = random.choice(np.asarray(steps), count).tolist()
    gaps = random.exponential(1.0, count) / rate
    return [Job(i, S, at) for i, (S, at) in enumerate(zip(mix, np.cumsum(gaps), strict=True))]


PEERS = "single", "mixed", "mixed-timeout", "equal", "equal-timeout"
"""The short names of the engine's peers."""


def peers(slots: int, timeout: float, names: Iterable[str] = PEERS) -> list[Peer]:
    """Returns the engine's peers: single requests, and static batches of each kind."""
    known = {
        "single": Peer("one at a time", 1, True, 0.0),
        "mixed": Peer("static, mixed S", slots, False, None),
        "mixed-timeout": Peer("static, mixed S, timeout", slots, False, timeout),
        "equal": Peer("static, equal S", slots, True, None),
        "equal-timeout": Peer("static, equal S, timeout", slots, True, timeout),
    }
    return [known[name] for name in names]


def batch_of(waiting: Sequence[Job], peer: Peer, now: float, last: bool) -> list[Job]:
    """Returns the requests with which a peer begins a batch; none where it still waits.

    Args:
        waiting: the requests that have come, in that order.
        now: the seconds since the first moment.
        last: whether no request comes any more.
    """
    groups: dict[int, list[Job]] = {}
    for job in waiting:
        groups.setdefault(job.steps if peer.alike else 0, []).append(job)
    for group in groups.values():
        if len(group) >= peer.slots:
            return group[: peer.slots]
    for group in groups.values():  # The first group holds the request that came first.
        if last or (peer.timeout is not None and now - group[0].at >= peer.timeout):
            return group
        break
    return []


class Bench:
    """The engine and its peers on one network.

    Args:
        model, shape, device: as in ``Engine``; the model is on the device already.
        slots: the number of samples in a full batch.
        steps: the numbers of steps of the load.
        batch_size: the number of samples in a model call of the engine, as in ``Engine``.
        make: S → the sampler.
        options: n → the other options of ``DDIM.sample`` for n samples, such as ``cond``.
    """

    def __init__(
        self,
        model: Model,
        shape: Sequence[int],
        slots: int,
        steps: Sequence[int],
        *,
        batch_size: int | None = None,
        make: Callable[[int], DDIM] = DDIM,
        device: torch.device | str | None = None,
        options: Callable[[int], Mapping[str, Any]] = lambda n: {},
    ) -> None:
        self.slots = whole("slots", slots, low=1)
        self._model, self._shape, self._options = model, tuple(shape), options
        self._device = device
        self._ddims = {S: make(S) for S in sorted(set(steps))}
        self.batch_size = self.slots if batch_size is None else batch_size
        self._served = self._engine(self.slots, self.batch_size)
        self._static = {n: self._engine(n, n) for n in range(1, self.slots + 1)}

    def measure(self) -> float:
        """Warms up, checks the engine beside ``DDIM.sample``, and returns the seconds of a tick.

        Raises:
            ValueError: a sample of the engine differs from that of ``DDIM.sample``.
        """
        few, many = min(self._ddims), max(self._ddims)
        engines = (*self._static.items(), (self.batch_size, self._served))
        for n, engine in engines:
            x = torch.empty(n, *self._shape, device=self._device)
            warm_up(self._ddims[few], self._model, self._shape, n, x.device, **self._options(n))
            future = engine.submit(self._request(Job(0, few, 0.0)))
            engine.step()
            future.cancel()
            engine.step()
        engine = self._served
        first, *others = (
            engine.submit(self._request(Job(i, many if i else few, 0.0))) for i in range(self.slots)
        )
        ticks = []
        while not first.done():
            began = time.perf_counter()
            engine.step()
            ticks.append(time.perf_counter() - began)
        for future in others:
            future.cancel()
        engine.step()
        alone = self._by_sample([Job(i, few, 0.0) for i in range(self.batch_size)])
        if not torch.equal(first.result(), alone[0]):
            raise ValueError(
                "model must treat samples independently: a sample of the engine differs from "
                "that of DDIM.sample"
            )
        return statistics.median(ticks)

    def capacity(self, tick: float) -> float:
        """Returns the requests that the engine finishes in a second with full slots."""
        return self.slots / (tick * statistics.mean(self._ddims))

    def compare(
        self,
        jobs: Sequence[Job],
        others: Sequence[Peer],
        rounds: int = 1,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> list[Outcome]:
        """Serves the load by the engine and by each peer in turn, in real time.

        Each round begins with the next peer, so that no peer is always first. Every sample is
        compared with the engine's: by its bits where the batch sizes are equal, else within a
        tolerance.

        Args:
            jobs: the load, from ``load``.
            others: the peers, from ``peers``.
            rounds: the number of times that the load is served by each.
            progress: wraps the turns, of which there are rounds·(1 + peers).

        Returns:
            The figures, the engine's first.

        Raises:
            ValueError: a sample of a peer differs from the engine's.
        """
        by_name: dict[str, Peer | None] = {ENGINE: None, **{peer.name: peer for peer in others}}
        order = list(by_name)
        turns = [
            (i, name)
            for i in range(whole("rounds", rounds, low=1))
            for name in order[i % len(order) :] + order[: i % len(order)]
        ]
        found: dict[str, list[_Round]] = {name: [] for name in order}
        served: dict[tuple[int, str], list[Served]] = {}
        for turn in progress(turns):
            peer = by_name[turn[1]]
            served[turn], calls = self._by_turns(jobs) if peer is None else self._by(peer, jobs)
            found[turn[1]].append(self._figures(jobs, served[turn], calls))
        for (i, name), theirs in served.items():
            self._check(name, theirs, [each.sample for each in served[i, ENGINE]])
        return [self._outcome(name, found[name], found[ENGINE]) for name in order]

    def _by_turns(self, jobs: Sequence[Job]) -> tuple[list[Served], int]:
        """Returns the samples by the engine, and the number of samples in its model calls."""
        engine = self._served
        before = engine.metrics().calls
        coming = list(jobs)[::-1]
        futures: list[Future[Tensor]] = []
        done: dict[Future[Tensor], float] = {}
        began = time.perf_counter()
        while coming or len(done) < len(jobs):
            now = time.perf_counter() - began
            while coming and coming[-1].at <= now:
                future = engine.submit(self._request(coming.pop()))
                future.add_done_callback(
                    lambda future: done.setdefault(future, time.perf_counter() - began)
                )
                futures.append(future)
            if not engine.step() and coming:
                _sleep_until(began + coming[-1].at)
        size = self.batch_size
        served = [Served(future.result(), size, done[future]) for future in futures]
        return served, size * (engine.metrics().calls - before)

    def _by(self, peer: Peer, jobs: Sequence[Job]) -> tuple[list[Served], int]:
        """Returns the samples by a peer, and the samples in its calls if every call were full."""
        coming = list(jobs)[::-1]
        waiting: list[Job] = []
        served: dict[int, Served] = {}
        calls = 0
        began = time.perf_counter()
        while coming or waiting:
            now = time.perf_counter() - began
            while coming and coming[-1].at <= now:
                waiting.append(coming.pop())
            batch = batch_of(waiting, peer, now, last=not coming)
            if not batch:
                ends = [coming[-1].at]
                if waiting and peer.timeout is not None:
                    ends.append(waiting[0].at + peer.timeout)
                _sleep_until(began + min(ends))
                continue
            waiting = [job for job in waiting if job not in batch]
            calls += max(job.steps for job in batch)
            if peer.alike:
                samples = self._by_sample(batch)
                done = time.perf_counter() - began
                for job, sample in zip(batch, samples, strict=True):
                    served[job.seed] = Served(sample, len(batch), done)
            else:
                for i, sample in self._by_engine(batch):
                    done = time.perf_counter() - began
                    served[batch[i].seed] = Served(sample, len(batch), done)
        return [served[job.seed] for job in jobs], self.slots * calls

    def _by_sample(self, batch: Sequence[Job]) -> Tensor:
        """Returns the samples of requests of equal S."""
        x: Tensor = self._ddims[batch[0].steps].sample(
            self._model,
            shape=(len(batch), *self._shape),
            seeds=[job.seed for job in batch],
            device=self._device,
            **self._options(len(batch)),
        )
        if x.device.type != "cpu":
            torch.accelerator.synchronize(x.device)
        return x

    def _by_engine(self, batch: Sequence[Job]) -> Iterator[tuple[int, Tensor]]:
        """Yields (place in the batch, sample): a batch of any S, in as many slots as requests."""
        return self._static[len(batch)].run([self._request(job) for job in batch])

    def _engine(self, slots: int, batch_size: int) -> Engine:
        first = self._options(1)
        return Engine(
            self._model,
            self._shape,
            slots,
            batch_size=batch_size,
            ddim=next(iter(self._ddims.values())),
            device=self._device,
            dtype=first.get("dtype"),
            cond={name: value[0] for name, value in first.get("cond", {}).items()},
            guided="guidance" in first,
            limit=None,
        )

    def _request(self, job: Job) -> Request:
        first = self._options(1)
        cond, uncond = (
            {key: value[0] for key, value in first[name].items()} if name in first else None
            for name in ("cond", "uncond")
        )
        return Request(
            job.seed,
            ddim=self._ddims[job.steps],
            cond=cond,
            uncond=uncond,
            guidance=first.get("guidance"),
        )

    def _check(self, name: str, served: Sequence[Served], engines: Sequence[Tensor]) -> None:
        half = self._options(1).get("dtype", torch.float32) != torch.float32
        for i, (each, sample) in enumerate(zip(served, engines, strict=True)):
            apart = float((each.sample - sample).abs().max())
            allowed = HALF_TOLERANCE if half else TOLERANCE
            if each.size == self.batch_size:
                allowed = 0.0
            if not apart <= allowed:  # NaN too
                raise ValueError(
                    f"model must treat samples independently: by the peer {name!r} the sample of "
                    f"seed {i} differs from the engine's by {apart:.2g}, more than {allowed:g}"
                )

    def _figures(self, jobs: Sequence[Job], served: Sequence[Served], room: int) -> _Round:
        last = max(each.done for each in served)
        latencies = [each.done - job.at for job, each in zip(jobs, served, strict=True)]
        occupancy = sum(job.steps for job in jobs) / room
        return _Round(len(jobs) / last, latencies, occupancy)

    def _outcome(self, name: str, found: list[_Round], engines: list[_Round]) -> Outcome:
        percentiles = [np.percentile(each.latencies, (50, 99)).tolist() for each in found]
        p50, p99 = (statistics.median(column) for column in zip(*percentiles, strict=True))
        return Outcome(
            name,
            statistics.median(each.rate for each in found),
            p50,
            p99,
            statistics.median(each.occupancy for each in found),
            statistics.median(a.rate / b.rate for a, b in zip(engines, found, strict=True)),
            [latency for each in found for latency in each.latencies],
        )


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.perf_counter()))
