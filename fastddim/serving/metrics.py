"""Counts and times of an engine, as a plain object."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

KEPT = 1024
"""The latest ticks and the latest finished requests from which rates and percentiles come."""


@dataclass(frozen=True)
class Metrics:
    """The state of an engine at one moment. ``Engine.metrics`` returns it.

    Counters (they only grow): ``submitted``, ``finished``, ``failed``, ``cancelled``, ``refused``
    (by ``QueueFull``), ``late`` (after their deadline), ``ticks``, ``calls`` (of the model).

    Gauges: ``slots``; ``queued`` and ``active``, the requests that wait and that have a slot;
    ``occupancy``, the share of the samples in the model's calls of the latest 1,024 ticks that
    belong to a request, in [0, 1];
    ``ticks_per_second`` over the same ticks; ``latency_p50``, ``latency_p90`` and ``latency_p99``,
    the seconds from ``submit`` to the result of the latest 1,024 finished requests. What has no
    value yet is 0.

    Each submitted request is finished, failed, cancelled, queued or active. During a tick a request
    may be none of them, and a cancelled request is active as well until the next tick frees its
    slot.
    """

    slots: int
    queued: int
    active: int
    submitted: int
    finished: int
    failed: int
    cancelled: int
    refused: int
    late: int
    ticks: int
    calls: int
    occupancy: float
    ticks_per_second: float
    latency_p50: float
    latency_p90: float
    latency_p99: float


class Recorder:
    """Records what ``Metrics`` shows, in memory of a fixed size."""

    def __init__(self, slots: int, batch_size: int) -> None:
        self._slots, self._batch_size = slots, batch_size
        self.submitted = self.finished = self.failed = self.cancelled = 0
        self.refused = self.late = self.ticks = self.calls = 0
        # Lists, because writing one element of an array costs three times as much.
        self._times, self._latencies = [0.0] * KEPT, [0.0] * KEPT
        self._active, self._calls = [0] * KEPT, [0] * KEPT

    def tick(self, active: int, calls: int) -> None:
        """Records one tick with this many active slots and calls of the model."""
        place = self.ticks % KEPT
        self._times[place] = time.perf_counter()
        self._active[place], self._calls[place] = active, calls
        self.ticks += 1
        self.calls += calls

    def finish(self, began: float, due: float | None) -> bool:
        """Records a finished request, submitted at ``began``; returns whether it is late."""
        now = time.perf_counter()
        self._latencies[self.finished % KEPT] = now - began
        self.finished += 1
        late = due is not None and now > due
        self.late += late
        return late

    def take_back(self, late: bool) -> None:
        """Takes back the latest finished request."""
        self.finished -= 1
        self.late -= late

    def now(self, queued: int, active: int) -> Metrics:
        """Returns the metrics."""
        ticks = min(self.ticks, KEPT)
        finished = min(self.finished, KEPT)
        times = self._times[:ticks]
        samples = self._batch_size * sum(self._calls[:ticks])
        span = max(times) - min(times) if ticks else 0.0
        latencies = self._latencies[:finished] or [0.0]
        p50, p90, p99 = np.percentile(latencies, (50, 90, 99)).tolist()
        return Metrics(
            slots=self._slots,
            queued=queued,
            active=active,
            submitted=self.submitted,
            finished=self.finished,
            failed=self.failed,
            cancelled=self.cancelled,
            refused=self.refused,
            late=self.late,
            ticks=self.ticks,
            calls=self.calls,
            occupancy=sum(self._active[:ticks]) / samples if samples else 0.0,
            ticks_per_second=(ticks - 1) / span if span else 0.0,
            latency_p50=p50,
            latency_p90=p90,
            latency_p99=p99,
        )
