"""States kept along the way: on their device, or streamed to the host while the loop goes on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastddim.check import kind, whole
from fastddim.timesteps import Pair

NAMES = ("x", "x0")
_log = logging.getLogger("fastddim")


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What a sampler passed through. Its ``repr`` prints the tensors' dtypes and shapes.

    Attributes:
        index: the rows after which states were kept.
        pairs: the (t, s) of each of them; the states are those at s.
        x: x_s of each, (kept, batch, ...), or None where it was not asked for.
        x0: the x0 predicted at each, likewise.
    """

    index: tuple[int, ...]
    pairs: tuple[Pair, ...]
    x: Tensor | None
    x0: Tensor | None

    def __repr__(self) -> str:
        return (
            f"Trajectory(index={self.index}, pairs={self.pairs}, x={shape_of(self.x)}, "
            f"x0={shape_of(self.x0)})"
        )


def shape_of(x: Tensor | None) -> str:
    """``float32 (4, 3, 32, 32)`` for a tensor; a device that is not the CPU follows."""
    if x is None:
        return "None"
    where = "" if x.device.type == "cpu" else f" on {x.device}"
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}{where}"


class Recorder:
    """Fills a trajectory. Its memory is found, or refused, before the first step.

    Args:
        names: of what is kept: ``"x"``, ``"x0"`` or both.
        every: k, to keep every k-th state, and always the last.
        offload: whether to keep them on the host, in pinned memory, each copied on a stream of
            its own while the next steps run.
        order: the rows that will be taken.
        pairs: the (t, s) of every row.
        size, dtype, device: of a state.

    Raises:
        TypeError, ValueError: naming the argument, or the memory that it would take.
    """

    def __init__(
        self,
        names: Any,
        every: int,
        offload: bool,
        order: Sequence[int],
        pairs: Sequence[Pair],
        size: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        names = (names,) if isinstance(names, str) else names
        if not isinstance(names, (tuple, list)):
            raise TypeError(f'trajectory must be ("x", "x0") or one of them, got {kind(names)}')
        if not names or set(names) - set(NAMES) or len(set(names)) < len(names):
            raise ValueError(f'trajectory must be ("x", "x0") or one of them, got {names!r}')
        k = whole("every", every, low=1)
        rows = tuple(i for n, i in enumerate(order, 1) if n % k == 0 or n == len(order))
        self.place = {i: n for n, i in enumerate(rows)}
        self.pairs = pairs
        where = torch.device("cpu") if offload else device
        self.bytes = len(names) * len(rows) * torch.Size(size).numel() * dtype.itemsize
        what = (
            f"the trajectory, {len(rows)} states of {size} as {' and '.join(names)}, takes "
            f"{shown_bytes(self.bytes)} on {where}"
        )
        free = free_bytes(where)
        if free is not None and self.bytes > free:
            raise ValueError(
                f"{what}, where {shown_bytes(free)} are free: keep fewer with every="
                + ("" if offload or device.type == "cpu" else ", or offload=True")
            )
        _log.info(what)
        pinned = offload and device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if pinned else None
        self.kept: dict[str, Tensor] = {
            name: torch.empty((len(rows), *size), dtype=dtype, device=where, pin_memory=pinned)
            for name in names
        }
        self.reached: set[int] = set()

    def wants(self, name: str) -> bool:
        return name in self.kept

    def keep(
        self, index: int, samples: slice, x: Tensor, x0: Tensor | None, stopped: bool = False
    ) -> None:
        """Keeps what row ``index`` left for these samples, if it is one of those to keep.

        So is the row where the loop has ``stopped``, which is the last.
        """
        if stopped:
            self.place.setdefault(index, len(self.reached))
        if index not in self.place:
            return
        self.reached.add(index)
        for name, state in (("x", x), ("x0", x0)):
            if name not in self.kept or state is None:
                continue
            slot = self.kept[name][self.place[index], samples]
            state = state[: len(slot)]
            if self.stream is None:
                slot.copy_(state)
                continue
            self.stream.wait_stream(torch.cuda.current_stream(state.device))
            with torch.cuda.stream(self.stream):
                slot.copy_(state, non_blocking=True)
            state.record_stream(self.stream)  # or its memory could be another's before it is read

    def finished(self) -> Trajectory:
        """The trajectory, as far as the loop has come; what was streamed has arrived."""
        if self.stream is not None:
            self.stream.synchronize()
        index = tuple(i for i in self.place if i in self.reached)
        states = {name: tensor[: len(index)] for name, tensor in self.kept.items()}
        return Trajectory(
            index, tuple(self.pairs[i] for i in index), states.get("x"), states.get("x0")
        )


def free_bytes(device: torch.device) -> int | None:
    """What can still be had there; None where nobody says."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + cached)
    if device.type != "cpu":
        return None
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(next(int(n.split()[1]) * 1024 for n in lines if n.startswith("MemAvailable")))
    except (OSError, StopIteration):
        return None
    try:  # a container's own limit, where it has one
        group = Path("/sys/fs/cgroup")
        most = int((group / "memory.max").read_text())
        found.append(most - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return min(found)


def shown_bytes(n: int) -> str:
    """1.2 GB for 1,234,567,890."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} bytes"
