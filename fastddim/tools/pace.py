"""How many images there are, how fast they are made, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable


class There(int):
    """A number of images, with the pace at which they are made.

    Attributes:
        total: how many there will be.
        left: seconds until this process has made its share; None until that can be told.
        rate: images a second of all processes together; None likewise.
    """

    total: int
    left: float | None
    rate: float | None


class Pace:
    """The pace of one process among several, each of which makes its share.

    A process sees others' images only when a whole shard of them is there, so that the images of
    all, divided by the time, are too few: with W processes by up to W times at first. The time
    left is therefore that of its own share at its own pace; all processes have the same share but
    for a shard.
    """

    def __init__(
        self, total: int, share: int, count: Callable[[], int], tell: Callable[[There], None] | None
    ) -> None:
        """Starts the clock, and tells how many images there are.

        Args:
            total: images of all processes.
            share: those that this one has to make.
            count: gives the images that are there in whole shards, of all processes.
            tell: what is told, after each step of the sampler; None to tell nothing.
        """
        self._total = total
        self._share = share
        self._count = count
        self._tell = tell
        self._made = 0
        self._start = time.perf_counter()
        self.shard()

    def shard(self) -> None:
        """A shard begins, or the last has ended."""
        self._there = self._count() if self._tell else 0
        self._say(0)

    def step(self, part: float) -> None:
        """The steps that are done of a batch amount to ``part`` images."""
        self._say(part)

    def batch(self, images: int) -> None:
        """A batch is done, the shard not yet."""
        self._made += images
        self._there += images
        self._say(0)

    def _say(self, part: float) -> None:
        if not self._tell:
            return
        count = There(self._there)
        count.total, count.left, count.rate = self._total, None, None
        if (made := self._made + part) > 0:
            seconds = time.perf_counter() - self._start
            count.left = seconds * max(0, self._share - made) / made
            if count.left > 0:
                count.rate = (self._total - self._there) / count.left
        self._tell(count)
