"""The steps that a loop hands to its caller, and the states that it keeps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastddim.check import kind, truth, whole
from fastddim.loop.plan import Row
from fastddim.step.buffers import FRESH, Spare, fitting
from fastddim.timesteps import Pair

NAMES = ("x", "x0")
_log = logging.getLogger("fastddim")


Callback: TypeAlias = Callable[["Step"], "Tensor | bool | None"]


@dataclass(frozen=True, eq=False)
class Step:
    """The result of one step of the loop. Its ``repr`` prints the tensors' shapes.

    ``x`` and ``x0`` are copies, which the caller may keep and write to: later steps do not write to
    them, and the loop does not read them. A callback changes the loop's state by the tensor that
    it returns.

    Attributes:
        index: the step's row in the table, 0 for the noisiest. ``sample(model, step.x,
            start=step.index + 1)`` continues after the step; after a step of the loop run
            backwards, ``start=step.index`` does.
        t, s: the levels that the step went from and to: numbers of a table's levels, or σ of a
            continuous path; −1 is clean data.
        x: x_s.
        x0: the x0 predicted from x_t.
    """

    index: int
    t: Any
    s: Any
    x: Tensor
    x0: Tensor

    def __repr__(self) -> str:
        return (
            f"Step(index={self.index}, t={self.t}, s={self.s}, x={shape_of(self.x)}, "
            f"x0={shape_of(self.x0)})"
        )


class Copies:
    """Makes each ``Step`` from copies in the result's dtype.

    Args:
        dtype: of the result.
        reads_x0: whether the loop or a trajectory reads a step's x0 after the caller gets it.
    """

    def __init__(self, dtype: torch.dtype, reads_x0: bool) -> None:
        self._dtype, self._reads_x0 = dtype, reads_x0
        self._spare = Spare()

    def step(self, row: Row, x: Tensor, x0: Tensor | None) -> Step:
        assert x0 is not None
        copy_of_x0 = x0.to(self._dtype, copy=self._reads_x0)
        return Step(row.number, *row.pair, self._copy(x), copy_of_x0)

    def _copy(self, x: Tensor) -> Tensor:
        if x.dtype != self._dtype:
            return x.to(self._dtype)
        if not x.is_cpu or x.numel() < FRESH:
            return x.clone()
        own = fitting(self._spare.take(), x)
        own = torch.empty_like(x) if own is None else own
        own.copy_(x)
        self._spare.keep(own)
        # Return an alias, so that attributes which the caller sets (requires_grad) do not stay.
        return own.detach()


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The states that a sampler kept. Its ``repr`` prints the tensors' dtypes and shapes.

    Attributes:
        index: the rows of the kept steps.
        pairs: the (t, s) of each kept step; its state is at level s.
        x: x_s of each, (kept, batch, ...), or None if ``trajectory`` did not name it.
        x0: the x0 predicted by each, likewise.
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
    """Returns ``float32 (4, 3, 32, 32)`` for a tensor, with its device if not the CPU."""
    if x is None:
        return "None"
    where = "" if x.device.type == "cpu" else f" on {x.device}"
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}{where}"


class Recorder:
    """Fills a trajectory. It allocates, or refuses, the memory before the first step.

    Args:
        names: the states to keep: ``"x"``, ``"x0"`` or both.
        every: k, to keep every k-th state, and always the last.
        offload: whether to keep the states on the host, in pinned memory, copied on a separate
            stream while the next steps run.
        order: the rows in the loop's order.
        pairs: the (t, s) of every row.
        size, dtype, device: of a state.

    Raises:
        TypeError, ValueError: naming the argument, or the memory that the states would take.
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
        named = all(isinstance(name, str) for name in names)
        if not named or not names or set(names) - set(NAMES) or len(set(names)) < len(names):
            raise ValueError(f'trajectory must be ("x", "x0") or one of them, got {names!r}')
        k = whole("every", every, low=1)
        rows = tuple(i for n, i in enumerate(order, 1) if n % k == 0 or n == len(order))
        self.place = {i: n for n, i in enumerate(rows)}
        self.pairs = pairs
        where = torch.device("cpu") if truth("offload", offload) else device
        self.bytes = len(names) * len(rows) * torch.Size(size).numel() * dtype.itemsize
        need = (
            f"the trajectory, {len(rows)} states of {size} as {' and '.join(names)}, takes "
            f"{shown_bytes(self.bytes)} on {where}"
        )
        free = free_bytes(where)
        if free is not None and self.bytes > free:
            raise ValueError(
                f"{need}, where {shown_bytes(free)} are free: keep fewer with every="
                + ("" if offload or device.type == "cpu" else ", or offload=True")
            )
        _log.info(need)
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
        """Keeps the states of these samples after row ``index``, if the trajectory holds it.

        The trajectory also holds the row at which the loop ``stopped``, which is the last.
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
            state.record_stream(self.stream)  # Else its memory could be reused before the copy.

    def finished(self) -> Trajectory:
        """Waits for the copies, and returns the trajectory as far as the loop has come."""
        if self.stream is not None:
            self.stream.synchronize()
        index = tuple(i for i in self.place if i in self.reached)
        states = {name: tensor[: len(index)] for name, tensor in self.kept.items()}
        return Trajectory(
            index, tuple(self.pairs[i] for i in index), states.get("x"), states.get("x0")
        )


def free_bytes(device: torch.device) -> int | None:
    """Returns the memory that can still be allocated there, or None if unknown."""
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
    try:  # A container may have a limit of its own.
        group = Path("/sys/fs/cgroup")
        most = int((group / "memory.max").read_text())
        found.append(most - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return min(found)


def shown_bytes(n: int) -> str:
    """Returns ``1.2 GB`` for 1,234,567,890."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} bytes"
