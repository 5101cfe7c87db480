"""The command ``serve-bench``, which compares continuous batching with static batches."""

import json as text_of
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from fastddim.check import whole
from fastddim.cli import bars, values
from fastddim.cli.draw import written
from fastddim.cli.options import Machine, Network, Out, flag, number, option


def serve_bench(
    machine: Machine,
    network: Network,
    steps: Annotated[
        str,
        option(
            "--steps",
            "S-S|S,S,...",
            "The numbers of steps of the mix, each with equal probability: 8-50 or 8,20,50. A "
            "single number makes all requests alike.",
        ),
    ] = "8-50",
    requests: Annotated[int, number("--requests", "N", "The number of requests, 1 to 10000.")] = 24,
    slots: Annotated[
        int, number("--slots", "N", "The number of samples in a full batch, 1 to 1024.")
    ] = 8,
    batch_size: Annotated[
        int | None,
        number(
            "--batch-size",
            "N",
            "The number of samples in a model call of the engine, which divides --slots. Batches "
            "without requests are not called.",
            show_default="--slots",
        ),
    ] = None,
    load: Annotated[
        str,
        option(
            "--load",
            "NUMBER",
            "The rate of the arrivals, as a multiple of the requests that the engine finishes in a "
            "second with full slots. That rate is measured first. Above 1 the queue grows, and the "
            "throughput is the most that a peer can do; below 1 the latency is that of a server "
            "that keeps up.",
        ),
    ] = "2",
    timeout: Annotated[
        str | None,
        option(
            "--timeout",
            "SECONDS",
            "The time after which a static batch begins with the requests that wait.",
            show_default="that of 5 model calls with a full batch",
        ),
    ] = None,
    peers: Annotated[
        str | None,
        option(
            "--peers",
            "NAME,NAME,...",
            "The peers: single, mixed, mixed-timeout, equal, equal-timeout.",
            show_default="all",
        ),
    ] = None,
    rounds: Annotated[
        int,
        number(
            "--rounds",
            "N",
            "The number of times that each peer serves the load, in turns. The figures are medians "
            "of the rounds.",
        ),
    ] = 1,
    seed: Annotated[
        int, number("--seed", "N", "The seed of the mix and of the arrivals, from 0 to 2^63-1.")
    ] = 0,
    json: Annotated[bool, flag("--json", "Print JSON instead of the table.")] = False,
    out: Out = Path("serving.png"),
) -> None:
    """Measure continuous batching beside static batches, under a load of mixed requests.

    Requests for 8 to 50 steps arrive at random moments (a Poisson process). fastddim.Engine
    serves them, and so do five peers, each the same requests at the same moments:

    one at a time: each request by itself, in the order of arrival.

    static, mixed S: a batch of the first requests that wait. The batch runs as long as its longest
    request, and a shorter request is delivered as soon as its own steps are done.

    static, equal S: a batch of requests with the same number of steps, by DDIM.sample.

    A static batch begins when it is full, or when no request is to come. With timeout it also
    begins when its first request has waited for so long.

    The command first compares every sample of each peer with the engine's: the bits where the
    batch sizes are equal, else the values. Occupancy is the share of a full batch that the model
    calls use. The latency is the time from a request's arrival to its sample.

    The default takes about a minute on two CPU cores.

    For example: fastddim serve-bench --load 0.8 --requests 100 --rounds 3
    """
    numbers = parse_mix(steps)
    names = None if peers is None else parse_peers(peers)
    whole("requests", requests, low=1, high=values.MOST_IMAGES)
    whole("slots", slots, low=1, high=1024)
    size = slots if batch_size is None else whole("batch-size", batch_size, low=1)
    if slots % size:
        raise ValueError(f"batch-size must divide slots = {slots}, got {size}")
    whole("rounds", rounds, low=1, high=1000)
    whole("seed", seed, low=0, high=2**63 - 1)
    times = positive("load", load)
    patience = None if timeout is None else positive("timeout", timeout)
    with bars.spinner("loading", machine.quiet):
        from fastddim.cli.network import prepare
        from fastddim.tools import images, provenance, serving_bench, serving_plot

        png = images.check_png(out)
        prepared = prepare(machine, network)
        bench = serving_bench.Bench(
            prepared.model,
            prepared.shape,
            slots,
            numbers,
            batch_size=size,
            make=prepared.ddim,
            device=prepared.device,
            options=prepared.options,
        )
        tick = bench.measure()
    rate = times * bench.capacity(tick)
    patience = 5 * tick if patience is None else patience
    jobs = serving_bench.load(numbers, requests, rate, seed)
    others = serving_bench.peers(slots, patience, names or serving_bench.PEERS)
    with bars.bar("serving", rounds * (1 + len(others)), machine.quiet) as progress:
        outcomes = bench.compare(jobs, others, rounds, progress)
    on = provenance.machine(prepared.device)
    settings = {
        "steps": steps,
        "requests": requests,
        "slots": slots,
        "batch_size": size,
        "load": times,
        "requests_per_second": rate,
        "tick_seconds": tick,
        "timeout": patience,
        "rounds": rounds,
        "seed": seed,
        "device": on,
    }
    calls = "" if size == slots else f" in batches of {size}"
    arrivals = (
        f"{values.counted(requests, 'request')} of {steps} steps, {rate:.2f} a second "
        f"(load {times:g}), {slots} slots{calls}, timeout {patience:.2f} s"
    )
    replaced = png.exists()
    serving_plot.plot(outcomes, png, f"{arrivals}, on {on}")
    if json:
        rows = [asdict(outcome) for outcome in outcomes]
        print(text_of.dumps({"settings": settings, "peers": rows}, indent=1))
        return
    bars.print_table(
        f"{arrivals}, on {on}:",
        ("peer", "samples/s", "p50 s", "p99 s", "occupancy", "engine is"),
        [
            (
                each.name,
                f"{each.samples_per_second:.2f}",
                f"{each.p50:.2f}",
                f"{each.p99:.2f}",
                f"{each.occupancy:.2f}",
                f"{each.against:.2f} x",
            )
            for each in outcomes
        ],
    )
    if not machine.quiet:
        print(written(png, replaced))


def parse_mix(text: str) -> list[int]:
    """Returns the numbers of steps of a text such as ``8-50`` or ``8,20,50``."""
    from fastddim.tools.seeds import parse_ranges

    try:
        ranges = parse_ranges(text)
    except ValueError:
        raise ValueError(f"steps must be such as 8-50 or 8,20,50, got {text!r}") from None
    for each in ranges:
        whole("steps", each.start, low=1, high=1_000_000)
        whole("steps", each.stop - 1, low=1, high=1_000_000)
    return values.distinct("steps", [S for each in ranges for S in each], text)


def parse_peers(text: str) -> list[str]:
    """Returns the short names of a text such as ``mixed,equal``."""
    from fastddim.tools.serving_bench import PEERS

    names = [values.one_of("peers", name.strip(), PEERS) for name in text.split(",")]
    return values.distinct("peers", names, text)


def positive(name: str, text: str) -> float:
    """Returns ``text`` as a finite float > 0."""
    number = values.parse_number(name, text)
    if number <= 0:
        raise ValueError(f"{name} must be a number > 0, got {text!r}")
    return number
