"""Section "tuning": how the time of a step depends on the launch constants."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from benchmarks.checks import Given, checked_graph
from benchmarks.children import Deadline
from benchmarks.sections import scale
from benchmarks.sections.launches import launches_of
from benchmarks.timing import Record, device_seconds, interval, rounded
from benchmarks.variants import VARIANTS

TUNED = tuple(dict.fromkeys(name for name, *_ in scale.CHOICES))
"""Names of the variants that are tuned."""


class WithWarps:
    """Stands in for the kernel, and launches or compiles it with ``warps`` warps."""

    def __init__(self, kernel: Any, warps: int) -> None:
        self.kernel, self.warps = kernel, warps

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        launched = self.kernel[grid]
        return lambda *args, **options: launched(*args, **(options | {"num_warps": self.warps}))

    def warmup(self, *args: Any, **options: Any) -> Any:
        return self.kernel.warmup(*args, **(options | {"num_warps": self.warps}))


@contextmanager
def block(fours: int, parts: int, warps: int, registers: int | None = None) -> Iterator[None]:
    """Within it, every launch uses these constants in place of ``geometry``'s.

    Without ``registers`` the launcher chooses the most registers of a lane.
    """
    import fastddim_kernels.geometry
    import fastddim_kernels.launch

    geometry: Any = fastddim_kernels.geometry
    launch: Any = fastddim_kernels.launch

    limit = geometry.registers if registers is None else mock.Mock(return_value=registers)
    with (
        mock.patch.object(geometry, "block_of", return_value=(fours, parts)),
        mock.patch.object(geometry, "registers", limit),
        mock.patch.object(launch, "ddim_step_kernel", WithWarps(launch.ddim_step_kernel, warps)),
    ):
        yield


def tuning(names: tuple[str, ...], sizes: scale.Sizes, deadline: Deadline) -> Iterator[Record]:
    """Times the variants at each of ``scale.CHOICES`` until the deadline.

    The figures are exploratory: no limit applies to them, and the launcher does not read them.
    """
    tensors: dict[str, tuple[list[Given], int]] = {}
    launches = min(32, scale.LAUNCHES)
    for name, fours, parts, warps, registers in scale.CHOICES:
        if deadline.over():
            return
        if name not in names:
            continue
        if name not in tensors:
            tensors[name] = launches_of(VARIANTS[name], sizes.elements)
        sets, total = tensors[name]
        choice = {"variant": name, "fours": fours, "parts": parts, "warps": warps}
        if registers is not None:
            choice["registers"] = registers
        with block(fours, parts, warps, registers):
            what = f"{name} {fours, parts, warps, registers}"
            graph, _ = checked_graph(what, sets, launches, every=False)
        taken = device_seconds({"step": graph.replay}, launches, 9)["step"]
        yield choice | {
            "us": [rounded(s * 1e6) for s in interval(taken)],
            "gb_per_s": rounded(total / statistics.median(taken) / 1e9),
        }
