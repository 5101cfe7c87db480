"""The number of finished images, the rate at which they are made, and the time for the rest."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta


class Count(int):
    """A number of finished images, with the pace at which they are made.

    Attributes:
        total: the number of images when all are finished.
        left: the seconds until this process has made its share; None while unknown.
        rate: the images per second of all processes together; None while unknown.
    """

    total: int
    left: float | None
    rate: float | None

    def pace(self) -> str:
        """Returns ``"12.3 images/s, 0:01:40 left"``, or "" while the pace is unknown."""
        if self.rate is None or self.left is None:
            return ""
        return f"{self.rate:.1f} images/s, {timedelta(seconds=round(self.left))} left"


There = Count
"""The former name of ``Count``."""


class Pace:
    """The pace of one process among several, each of which makes its share.

    A process sees the images of the others only when a whole shard of them is finished, so the
    images of all, divided by the time, give too low a rate: at first by a factor of up to W with W
    processes. The time left is therefore that of the process's own share at its own pace. The
    shares of all processes are equal up to one shard.
    """

    def __init__(
        self,
        total: int,
        share: int,
        count: Callable[[], int],
        tell: Callable[[Count], None] | None,
    ) -> None:
        """Starts the clock, and reports the first count.

        Args:
            total: the number of images of all processes.
            share: the number of images that this process has to make.
            count: returns the number of images in whole shards, of all processes.
            tell: receives the count after each step of the sampler; None to report nothing.
        """
        self._total = total
        self._share = share
        self._count = count
        self._tell = tell
        self._made = 0
        self._start = time.perf_counter()
        self.shard()

    def shard(self) -> None:
        """Reports that a shard begins, or that the last has ended."""
        self._finished = self._count() if self._tell else 0
        self._report(0)

    def step(self, part: float) -> None:
        """Reports that the finished steps of a batch amount to ``part`` images."""
        self._report(part)

    def batch(self, images: int) -> None:
        """Reports that a batch of the shard is finished."""
        self._made += images
        self._finished += images
        self._report(0)

    def _report(self, part: float) -> None:
        if not self._tell:
            return
        count = Count(self._finished)
        count.total, count.left, count.rate = self._total, None, None
        if (made := self._made + part) > 0:
            seconds = time.perf_counter() - self._start
            count.left = seconds * max(0, self._share - made) / made
            if count.left > 0:
                count.rate = (self._total - self._finished) / count.left
        self._tell(count)
