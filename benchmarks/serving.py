"""Times the engine beside full static batches, and a tick beside a bound step.

    python -m benchmarks.serving

The requests are all alike, so a static batch wastes nothing: the engine must keep up with it. The
embedded model's samples are compared first. Both run in one thread and are timed by the processor's
clock, because other processes would otherwise be timed too. Then the host's time of a tick is
measured with a model that does nothing, in turns with ``fastddim.bind``'s step of the same small
state.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import fastddim
from benchmarks.timing import Record, WrongResultError, rounded
from fastddim import DDIM, Engine, Request, embedded

SMALL = (4, 8, 8)


def alike(slots: int = 4, batches: int = 2, steps: int = 5, rounds: int = 11) -> Record:
    """Images a second of the engine and of static batches, in turns, and the median ratio."""
    torch.set_num_threads(1)
    model, shape, count = embedded.load(), (1, 28, 28), slots * batches
    ddim = DDIM(steps)
    engine = Engine(model, shape, slots, ddim=ddim)

    def static() -> list[torch.Tensor]:
        size = (count, *shape)
        return list(ddim.sample(model, shape=size, seeds=range(count), batch_size=slots))

    def served() -> list[torch.Tensor]:
        found = dict(engine.run(Request(seed) for seed in range(count)))
        return [found[i] for i in range(count)]

    if not all(torch.equal(a, b) for a, b in zip(static(), served(), strict=True)):
        raise WrongResultError("the engine's samples differ from those of DDIM.sample")
    seconds: dict[str, list[float]] = {"static": [], "engine": []}
    for k in range(rounds):
        runs: list[tuple[str, Callable[[], object]]] = [("static", static), ("engine", served)]
        for name, run in runs[:: 1 - 2 * (k % 2)]:
            begin = time.process_time()
            run()
            seconds[name].append(time.process_time() - begin)
    both = zip(seconds["static"], seconds["engine"], strict=True)
    return {
        "slots": slots,
        "images": count,
        "steps": steps,
        **{
            f"{name}_images_a_second": rounded(count / statistics.median(seconds[name]))
            for name in seconds
        },
        "share": rounded(statistics.median([static / engine for static, engine in both])),
    }


def host(slots: int = 4, rounds: int = 30, calls: int = 100) -> Record:
    """Microseconds of a tick and of a bound step, and the median of their ratios."""
    output = torch.zeros(slots, *SMALL)
    ddim = DDIM(1000)
    engine = Engine(lambda x, t: output, SMALL, slots, ddim=ddim)
    x, out = torch.zeros(slots, *SMALL), torch.empty(slots, *SMALL)
    step = fastddim.bind(torch.tensor(ddim.table))

    def bound() -> None:
        step(x, output, 3, want_x0=False, out=out)

    def each(call: Callable[[], object]) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - begin) / calls * 1e6

    times: list[tuple[float, float]] = []
    for _ in range(rounds):
        if engine.metrics().active == 0 or engine.metrics().ticks % 1000 > 1000 - calls:
            engine.drain()
            for seed in range(slots):
                engine.submit(Request(seed))
            engine.step()
        times.append((each(bound), each(engine.step)))
    return {
        "slots": slots,
        "shape": SMALL,
        "bound_us": rounded(statistics.median([b for b, _ in times])),
        "tick_us": rounded(statistics.median([t for _, t in times])),
        "ratio": rounded(statistics.median([t / b for b, t in times])),
    }


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    for title, record in (("requests that are alike", alike()), ("a tick on the host", host())):
        print(title)
        for name, value in record.items():
            print(f"{name:>26} {value}")


if __name__ == "__main__":
    main()
