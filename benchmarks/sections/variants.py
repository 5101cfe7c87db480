"""Section "variants": the bytes per second of every variant of the step, beside those of a copy."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch

from benchmarks.checks import checked_graph
from benchmarks.children import Deadline
from benchmarks.sections import scale
from benchmarks.sections.launches import copies, launches_of, moved_bytes, sets_of
from benchmarks.sections.machine import clocks
from benchmarks.timing import Record, captured, device_seconds, interval, rounded, times
from benchmarks.variants import VARIANTS, Variant


def required(v: Variant) -> float:
    """The share of a copy's bytes per second that this variant must reach.

    A step without noise can be as fast as a copy. Each further stream and each narrower access
    costs some speed on every GPU. A variant that has several of these properties gets the lowest
    limit.
    """
    found = [0.99]
    if v.noise == "philox":
        found.append(0.975)
    if v.dtype != torch.float32 or v.next_inputs:
        found.append(0.955)
    if v.want_x0 or v.guidance or v.threshold:
        found.append(0.955)
    if v.order == 2:
        found.append(0.95)
    if v.channels_last and v.noise != "none" and v.shape[0] in (3, 4):
        found.append(0.93)
    if v.mixed:
        found.append(0.93)
    if v.channels_last and v.learned:
        found.append(0.90)
    return min(found)


def variant(name: str, sizes: scale.Sizes, deadline: Deadline) -> Iterator[Record]:
    """Times a variant beside a copy and an addition of as many bytes."""
    v = VARIANTS[name]
    sets, total = launches_of(v, sizes.elements)
    graphs = {"step": checked_graph(name, sets, scale.LAUNCHES)}
    calls, moved = copies(total, len(sets))
    moved["step"] = total
    graphs |= {k: captured(c, scale.LAUNCHES) for k, c in calls.items()}
    taken = device_seconds(
        {k: g.replay for k, (g, _) in graphs.items()}, scale.LAUNCHES, sizes.rounds
    )
    per_byte = {k: [second / moved[k] for second in s] for k, s in taken.items()}
    gb_per_s = {k: rounded(1e-9 / statistics.median(s)) for k, s in per_byte.items()}
    of_copy = times(per_byte["copy"], per_byte["step"])
    yield {
        "variant": name,
        "shape": list(sets[0]["x"].shape),
        "bytes_per_element": v.bytes_per_element,
        "bytes_moved": moved_bytes(v),
        "us": [rounded(s * 1e6) for s in interval(taken["step"])],
        "gb_per_s": gb_per_s["step"],
        "copy_gb_per_s": gb_per_s["copy"],
        "add_gb_per_s": gb_per_s["add"],
        "of_copy": of_copy,
        "of_add": times(per_byte["add"], per_byte["step"]),
        "required": required(v),
        "met": of_copy[0] >= required(v),
    }


def yardsticks(sizes: scale.Sizes, deadline: Deadline) -> Iterator[Record]:
    """Times the yardstick, a copy, in a graph and as a plain call, and reads the clocks."""
    total = 12 * sizes.elements
    count = sets_of(total)
    calls, moved = copies(total, count)
    graph, _ = captured(calls["copy"], scale.LAUNCHES)

    def on_a_stream() -> None:
        for i in range(scale.LAUNCHES):
            calls["copy"](i)

    taken = device_seconds(
        {"graph": graph.replay, "stream": on_a_stream}, scale.LAUNCHES, sizes.rounds
    )
    rates = {name: moved["copy"] / statistics.median(s) / 1e9 for name, s in taken.items()}
    # Keep the device busy for about 1.5 s: idle clocks would say nothing about the measurements.
    for _ in range(int(1.5 / (scale.LAUNCHES * statistics.median(taken["graph"])))):
        graph.replay()
    found: Record = {f"copy_{name}_gb_per_s": rounded(rate) for name, rate in rates.items()}
    found["clocks_under_load"] = clocks()
    torch.cuda.synchronize()
    yield found
