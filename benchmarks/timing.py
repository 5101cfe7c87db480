"""Timing of the device and of the host, and statistics of the times."""

from __future__ import annotations

import gc
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeAlias

import torch

Call: TypeAlias = Callable[[int], object]
"""Launches on the set of tensors with this number."""
Record: TypeAlias = dict[str, Any]
"""A row of figures, or a file of rows: JSON."""
LEFT_OUT: Record = {"left_out": "no time"}
"""Content of a row that was not measured because the time was over."""

IMPORTING = "<frozen importlib._bootstrap>"
"""The file of Python's frames that import a module."""
AGAIN = 0.05
"""Seconds after which a limit that falls into an import looks again."""


class WrongResultError(Exception):
    """A result differs from the expected one, so it must not be timed."""


def captured(call: Call, launches: int) -> tuple[torch.cuda.CUDAGraph, list[object]]:
    """(``launches`` calls as one graph, their results, which own the graph's memory)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(0)  # compile before the capture, which must not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = [call(i) for i in range(launches)]
    return graph, returned


def device_seconds(
    runs: Mapping[str, Callable[[], object]], launches: int, rounds: int, head_start: int = 0
) -> dict[str, list[float]]:
    """Seconds per launch of each run, one value a round; each round begins with another run.

    A run enqueues ``launches`` launches and does not wait for them. Where the host needs longer to
    enqueue them than the device to run them, the device sleeps for ``head_start`` cycles meanwhile.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for k in range(rounds + 3):
        order = turn(names, k)
        events = {}
        runs[order[-1]]()  # the device is busy when the first timed run is enqueued
        for name in order:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if head_start:
                torch.cuda._sleep(head_start)
            begin.record()
            runs[name]()
            end.record()
            events[name] = begin, end
        torch.cuda.synchronize()
        for name, (begin, end) in events.items():
            if k >= 3:  # by then the clocks have risen
                seconds[name].append(begin.elapsed_time(end) / 1e3 / launches)
    return seconds


def host_seconds(
    calls: Mapping[str, Callable[[], object]],
    repeats: int = 300,
    together: int = 10,
    seconds: float = math.inf,
) -> dict[str, float]:
    """Median seconds until each call returns; the queue is emptied before it can fill up.

    After ``seconds``, and at least a fifth of the ``repeats``, no further ones begin.
    """
    end = time.monotonic() + seconds
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(min(100, repeats)):
            call()
    gc.disable()
    for k in range(repeats):
        if 5 * k >= repeats and time.monotonic() > end:
            break
        for name, call in calls.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(together):
                call()
            taken[name].append((time.perf_counter() - begin) / together)
    gc.enable()
    return {name: statistics.median(of) for name, of in taken.items()}


def wall_seconds(
    runs: Mapping[str, Callable[[], object]],
    wait: Callable[[], object],
    seconds: float,
    least: int = 3,
    most: int = 30,
) -> dict[str, list[float]]:
    """Seconds of each run until the device has finished, one value a round, for about ``seconds``.

    ``wait`` returns once the device has finished. Each round begins with another run, or a run
    would always find the cache in the state that the same other run leaves.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    end = time.monotonic() + seconds
    gc.disable()
    try:
        for k in range(most):
            if k >= least and time.monotonic() > end:
                break
            for name in turn(list(runs), k):
                wait()
                begin = time.perf_counter()
                runs[name]()
                wait()
                taken[name].append(time.perf_counter() - begin)
    finally:
        gc.enable()
    return taken


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raises ``TimeoutError`` in the block after ``seconds``, even while it waits.

    An import is not interrupted: later imports would find its module half executed.
    """

    def over(_: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_filename == IMPORTING:
                signal.setitimer(signal.ITIMER_REAL, AGAIN)
                return
            frame = frame.f_back
        raise TimeoutError(f"took more than {seconds:.3g} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))  # 0 would switch the timer off
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def turn(names: list[str], k: int) -> list[str]:
    """The names in the order of round ``k``: rotated by ``k``."""
    first = k % len(names)
    return names[first:] + names[:first]


def interval(values: Sequence[float]) -> list[float]:
    """[median, low, high]: with 95% probability the true median lies from low to high.

    Each of n values is below the median with probability ½, whatever the distribution. So the k
    least and the k greatest values can be left out as long as a binomial count of n falls below k
    or above n − k with a probability of at most 5%. Of fewer than six values, low and high are the
    least and the greatest, with less than 95% probability.
    """
    ordered, n, k = sorted(values), len(values), 0
    while 2 * sum(math.comb(n, i) for i in range(k + 2)) <= 0.05 * 2**n:
        k += 1
    return [rounded(v) for v in (statistics.median(ordered), ordered[k], ordered[n - 1 - k])]


def times(base: Sequence[float], taken: Sequence[float]) -> list[float]:
    """``interval`` of base / taken, computed round by round: above 1 ``taken`` is faster."""
    return interval([b / a for a, b in zip(taken, base, strict=True)])


def rounded(value: float) -> float:
    """The value to four significant digits; the measurements are less precise."""
    return float(f"{value:.4g}")


def by(shape: Sequence[int]) -> str:
    """A shape as text: 64x3x32x32."""
    return "x".join(map(str, shape))


def first_line(error: BaseException) -> str:
    """The error's type and the first line of its message, cut to 200 characters."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
