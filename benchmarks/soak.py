"""Serves many requests with random cancellations and exceptions of the model, and counts them.

    python -m benchmarks.soak                  # 100,000 requests, minutes
    python -m benchmarks.soak --requests 2000

The model is the exact ε of Gaussian data, and each finished sample is compared, bit for bit, with
``DDIM.sample``'s. The command fails if a request is lost or finished twice, if a sample differs, or
if the memory in use grows after the first fifth.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import time
from collections import Counter
from concurrent.futures import Future
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.timing import Record, WrongResultError, rounded
from fastddim import DDIM, Engine, Request
from fastddim.serving.order import ORDERS
from fastddim.tools.quality import Gaussian

SHAPE, SLOTS, BATCH_SIZE, SEEDS, WAITING = (1, 4, 4), 8, 4, 32, 64
MIX = (
    DDIM(2, spacing="trailing"),
    DDIM(5, eta=1.0),
    DDIM(3, spacing="trailing", eta=0.5),
    DDIM(4, order=2, spacing="mixed"),
    DDIM(1),
)
GROWTH = 8 * 2**20
"""The growth of the memory in use, in bytes, that is taken for noise."""


class Unlucky(Gaussian):
    """The exact ε of data from N(0.2, ¼); one call in 100 raises."""

    def __init__(self, luck: random.Random) -> None:
        super().__init__(0.2, 0.5)
        self.luck: random.Random | None = luck

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.luck is not None and self.luck.random() < 1 / 100:
            raise ArithmeticError("out of luck")
        return super().forward(x, t)


def soak(requests: int, seed: int = 0) -> Record:
    """Serves the requests and returns the counts.

    Raises:
        WrongResultError: a request is lost, is finished twice or differs, or the memory grows.
    """
    luck = random.Random(seed)
    model = Unlucky(luck)
    engine = Engine(model, SHAPE, SLOTS, batch_size=BATCH_SIZE, order=luck.choice(sorted(ORDERS)))
    pending: dict[int, Future[Tensor]] = {}
    counts: Counter[str] = Counter()

    @cache
    def expected(number: int, key: int) -> Tensor:
        model.luck = None
        try:
            one = (1, *SHAPE)
            return MIX[number].sample(model, shape=one, seeds=[key], batch_size=BATCH_SIZE)[0]
        finally:
            model.luck = luck

    def done(n: int, number: int, key: int, future: Future[Tensor]) -> None:
        if pending.pop(n, None) is None:
            counts["twice"] += 1
        elif future.cancelled():
            counts["cancelled"] += 1
        elif future.exception(0) is not None:
            counts["failed"] += 1
        else:
            counts["finished"] += 1
            counts["different"] += not torch.equal(future.result(0), expected(number, key))

    for number in range(len(MIX)):
        for key in range(SEEDS):
            expected(number, key)
    begin, early = time.perf_counter(), 0
    for n in range(requests):
        number, key = luck.randrange(len(MIX)), luck.randrange(SEEDS)
        deadline = luck.choice([None, 0.01, 1.0])
        future = engine.submit(Request(key, ddim=MIX[number], deadline=deadline))
        pending[n] = future
        future.add_done_callback(partial(done, n, number, key))
        if luck.random() < 0.05:
            pending[luck.choice(list(pending))].cancel()
        while len(pending) > luck.randrange(WAITING):
            engine.step()
        if n == requests // 5:
            early = in_use()
    engine.drain()
    seconds, grown = time.perf_counter() - begin, in_use() - early
    found = engine.metrics()
    record = {
        "requests": requests,
        "slots": SLOTS,
        **{name: counts[name] for name in ("finished", "failed", "cancelled")},
        "lost": len(pending),
        "twice": counts["twice"],
        "different": counts["different"],
        "ticks": found.ticks,
        "seconds": rounded(seconds),
        "grown_mib": rounded(grown / 2**20),
    }
    counted = found.finished, found.failed, found.cancelled
    if (
        pending
        or counts["twice"]
        or counts["different"]
        or counted != (counts["finished"], counts["failed"], counts["cancelled"])
        or grown > GROWTH
    ):
        raise WrongResultError(f"the soak found a fault: {record}")
    return record


def in_use() -> int:
    """The memory of this process, in bytes, without garbage."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for name, value in soak(given.requests, given.seed).items():
        print(f"{name:>10} {value}")


if __name__ == "__main__":
    main()
