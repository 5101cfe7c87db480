"""How the device and the host are timed, and what may be said of the times."""

from __future__ import annotations

import gc
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch

Call: TypeAlias = Callable[[int], object]
"""A launch on one of several sets of tensors, by its number."""
Record: TypeAlias = dict[str, Any]
LEFT_OUT: Record = {"left_out": "no time"}
"""What a row says of something that was not measured since its time was over."""


class WrongResultError(Exception):
    """Results that are not what they have to be: their time is of no interest."""


def captured(call: Call, launches: int) -> tuple[torch.cuda.CUDAGraph, list[object]]:
    """``launches`` calls as one graph, and what they returned, which keeps their memory apart."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(0)  # compiled before the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = [call(i) for i in range(launches)]
    return graph, returned


def device_seconds(
    runs: Mapping[str, Callable[[], object]], launches: int, rounds: int, head_start: int = 0
) -> dict[str, list[float]]:
    """Seconds of a launch of each run, round by round, in turns that begin with another each time.

    A run enqueues ``launches`` launches and does not wait for them. Where these take the device
    less time than the host, it sleeps for ``head_start`` cycles while they are enqueued.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for k in range(rounds + 3):
        order = turn(names, k)
        events = {}
        runs[order[-1]]()  # the device is busy by the time the first is enqueued
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
            if k >= 3:  # the clocks have risen
                seconds[name].append(begin.elapsed_time(end) / 1e3 / launches)
    return seconds


def host_seconds(
    calls: Mapping[str, Callable[[], object]], repeats: int = 300, together: int = 10
) -> dict[str, float]:
    """Median seconds until a call returns. The queue is emptied before it could fill up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(min(100, repeats)):
            call()
    gc.disable()
    for _ in range(repeats):
        for name, call in calls.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(together):
                call()
            seconds[name].append((time.perf_counter() - begin) / together)
    gc.enable()
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def wall_seconds(
    runs: Mapping[str, Callable[[], object]],
    wait: Callable[[], object],
    seconds: float,
    least: int = 3,
    most: int = 30,
) -> dict[str, list[float]]:
    """Seconds of each run until all it asked for is done, in turns, for about so many seconds.

    ``wait`` returns once the device has done what it was given. Each round begins with another,
    or each run would always find the cache as one other leaves it.
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
    """Raises ``TimeoutError`` in what takes longer, be it waiting for others."""

    def over(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:.3g} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))  # 0 would be no limit at all
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def turn(names: list[str], k: int) -> list[str]:
    """The names in the order of round ``k``."""
    first = k % len(names)
    return names[first:] + names[:first]


def interval(values: Sequence[float]) -> list[float]:
    """[median, low, high]: with 95% probability the true median lies from low to high.

    Of n values each is below the median with probability ½, whatever their distribution: the k
    least and the k greatest can be left out as long as a binomial of n is below k, or above
    n − k, in 5% at most. Fewer than six values cannot say it, and give their least and greatest.
    """
    ordered, n, k = sorted(values), len(values), 0
    while 2 * sum(math.comb(n, i) for i in range(k + 2)) <= 0.05 * 2**n:
        k += 1
    return [rounded(v) for v in (statistics.median(ordered), ordered[k], ordered[n - 1 - k])]


def times(base: Sequence[float], taken: Sequence[float]) -> list[float]:
    """How often ``taken`` fits into ``base``, round by round: the interval of the ratios."""
    return interval([b / a for a, b in zip(taken, base, strict=True)])


def rounded(value: float) -> float:
    """Four digits: more than any of it is worth."""
    return float(f"{value:.4g}")


def by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
