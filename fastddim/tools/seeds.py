"""The seeds of images: the text that names them, their checks, and ranges of any length.

Nothing here imports torch, because the command line reads seeds before it loads anything.
"""

from __future__ import annotations

import itertools
import re
import sys
from bisect import bisect
from collections.abc import Iterable, Sequence
from typing import Any, overload

from fastddim.check import whole

LARGEST = 2**63 - 1
"""The largest seed, since the noise keys are int64."""


def parse_ranges(text: str) -> list[range]:
    """Returns the ranges that ``text`` names, in its order.

        >>> parse_ranges("0-9,20,30-39")
        [range(0, 10), range(20, 21), range(30, 40)]

    Raises:
        ValueError: ``text`` has another form, a range goes down, or a seed exceeds 2⁶³ − 1.
    """
    allowed = f"such as 7, 0-63 or 0-9,20,30-39, each seed in [0, 2^63-1], got {text!r}"
    ranges: list[range] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,19})(?:-([0-9]{1,19}))?\s*", part)
        if match is None:
            raise ValueError(f"seeds must be {allowed}")
        first = int(match[1])
        last = int(match[2] or first)
        if last > LARGEST:
            raise ValueError(f"seeds must be {allowed}")
        if last < first:
            raise ValueError(f"seeds must be ranges that go up, {allowed}")
        ranges.append(range(first, last + 1))
    return ranges


def checked(name: str, value: Any) -> int:
    """Returns ``value`` as an int in [0, 2⁶³), or raises an error that names ``name``."""
    return whole(name, value, low=0, high=LARGEST)


def checked_all(seeds: Sequence[int]) -> list[int]:
    """Returns ``seeds`` as a list of ints in [0, 2⁶³)."""
    return [checked(f"seeds[{i}]", seed) for i, seed in enumerate(seeds)]


def check_pairs(seeds: Sequence[int]) -> None:
    """Raises ``ValueError`` unless the number of seeds is even and positive."""
    if not seeds or len(seeds) % 2:
        raise ValueError(f"seeds must be pairs, an even number of them, got {len(seeds)}")


class Seeds(Sequence[int]):
    """Ranges of seeds, one after the other, without a list of the seeds in memory.

    A range that starts where the one before it stops is merged with it, so that the same seeds
    in the same order always have the same ranges.

    Raises:
        ValueError: there are no seeds, or one seed occurs twice.
    """

    def __init__(self, ranges: Iterable[range]) -> None:
        self.ranges: list[range] = []
        for r in ranges:
            if self.ranges and self.ranges[-1].stop == r.start:
                r = range(self.ranges.pop().start, r.stop)
            self.ranges.append(r)
        # Not len(), which raises from 2^63 on.
        self._starts = [0, *itertools.accumulate(r.stop - r.start for r in self.ranges)]
        if not 0 < self._starts[-1] <= sys.maxsize:  # the most that len() can return
            raise ValueError(f"seeds must be at least 1, got {self._starts[-1]} of them")
        ordered = sorted(self.ranges, key=lambda r: r.start)
        for a, b in itertools.pairwise(ordered):
            if b.start < a.stop:
                raise ValueError(f"seeds must occur once each, got {b.start} twice")

    @classmethod
    def of(cls, seeds: Sequence[int]) -> Seeds:
        """Returns ``seeds``, each an int in [0, 2⁶³), as ranges."""
        if isinstance(seeds, Seeds):
            return seeds
        if isinstance(seeds, range) and seeds.step == 1 and seeds:
            whole("seeds[0]", seeds[0], low=0)
            checked("seeds[-1]", seeds[-1])
            return cls([seeds])
        runs = itertools.groupby(enumerate(checked_all(seeds)), lambda place: place[1] - place[0])
        bounds = ([key for _, key in run] for _, run in runs)
        return cls(range(run[0], run[-1] + 1) for run in bounds)

    @classmethod
    def parse(cls, text: str) -> Seeds:
        """Returns the seeds that ``text`` names: the inverse of ``str``, see ``parse_ranges``."""
        return cls(parse_ranges(text))

    def begin_with(self, others: Seeds) -> bool:
        """Whether ``others`` are the first of these seeds."""
        n = len(others.ranges)
        if n > len(self.ranges) or others.ranges[:-1] != self.ranges[: n - 1]:
            return False
        a, b = self.ranges[n - 1], others.ranges[-1]
        return a.start == b.start and b.stop <= a.stop

    def __str__(self) -> str:
        return ",".join(
            f"{r.start}" if r.stop == r.start + 1 else f"{r.start}-{r.stop - 1}"
            for r in self.ranges
        )

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        i = range(len(self))[index]
        at = bisect(self._starts, i) - 1
        return self.ranges[at][i - self._starts[at]]
