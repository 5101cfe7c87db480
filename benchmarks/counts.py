"""Counts the operations of a step of each loop: this needs neither a clock nor a GPU.

    python -m benchmarks.counts    # writes benchmarks/results/counts.json

Each loop runs for a few steps on a CPU, and the operations that PyTorch dispatches between two
calls of the model are counted. Operations compute or copy (on a GPU each is a launch); views and
allocations do not count. A pass is an operation that reads or writes a tensor of the state's size.
Its bytes are those of all such tensors, once for each read and once for each write. A transfer is a
copy of such a tensor to the CPU or back (on a CPU a request without effect), and a host sync is an
``.item()``. On a GPU the host waits for both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.peers import PEERS, Loops, Run
from benchmarks.records import RESULTS, versions, write
from benchmarks.timing import Record

SHAPE = (2, 3, 16, 16)
STEPS = 5
NAMES = ("operations", "passes", "bytes_per_element", "transfers", "host_syncs")
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "alias")
FILLS = ("normal_", "copy_", "fill_", "zero_")
"""In-place operations that do not read the tensor that they write."""


class Transfers(TorchFunctionMode):
    """Counts the states that are copied to the CPU, and those of them that are copied back."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.count = elements, 0
        self.on_host: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        if func is Tensor.to and args[0].numel() == self.elements:
            state, where = args[0], args[1]
            if where == "cpu":
                self.on_host[id(state)] = state
                self.count += 1
            elif isinstance(where, torch.device):
                self.count += self.on_host.pop(id(state), None) is not None
        return func(*args, **(kwargs or {}))


class Tally(TorchDispatchMode):
    """Counts the dispatched operations and the bytes of the state that they move."""

    def __init__(self, elements: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = elements
        self.found = dict.fromkeys(NAMES, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name == "_local_scalar_dense":
            self.found["host_syncs"] += 1
        elif not func.is_view and name not in ALLOCATIONS and not is_row(name, out):
            moved = self.moved(func, name, args, kwargs or {}, out)
            self.found["operations"] += 1
            self.found["passes"] += moved > 0
            self.found["bytes_per_element"] += moved // self.elements
        return out

    def moved(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> int:
        """Bytes of tensors of the state's size that the operation reads and writes."""
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        total, written = 0, []
        for argument in func._schema.arguments:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_leaves(given.get(argument.name)):
                if not isinstance(tensor, Tensor) or tensor.numel() != self.elements:
                    continue
                reads = argument.name == "self" and name not in FILLS if writes else True
                reads &= not name.endswith("_like")
                total += tensor.nbytes * (reads + writes)
                written += [tensor] * writes
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.numel() == self.elements:
                total += 0 if any(tensor is w for w in written) else tensor.nbytes
        return total


def is_row(name: str, out: Any) -> bool:
    """True if the operation makes the tensor of a step's row number, which only happens under a
    mode.

    Without a dispatch mode, the step reads the number from memory written before the first step.
    """
    return name == "full" and out.dim() == 0 and out.dtype == torch.int32


def counted(eta: float, choose: Callable[[Loops], Run]) -> Record:
    """The counts between the second and the third call of the model."""
    calls: list[Record] = []
    elements = torch.Size(SHAPE).numel()
    eps = torch.randn(SHAPE)

    def model(x: Tensor, t: Tensor) -> Tensor:
        calls.append(tally.found | {"transfers": transfers.count})
        return eps

    run = choose(Loops(SHAPE, STEPS, eta, model=model))
    with Transfers(elements) as transfers, Tally(elements) as tally:
        run()
    return {name: calls[2][name] - calls[1][name] for name in NAMES}


LOOPS: dict[str, Callable[[Loops], Run]] = {
    "original loop": lambda loops: loops.original,
    "diffusers' DDIMScheduler": lambda loops: loops.scheduled("DDIMScheduler"),
    PEERS["plain"].title: PEERS["plain"].make,
    "FastDDIMScheduler": lambda loops: loops.scheduled("FastDDIMScheduler"),
    "generalized_steps": lambda loops: loops.drop_in,
    'generalized_steps(keep="last")': lambda loops: loops.drop_in_last,
    "DDIM.sample(generator=)": lambda loops: loops.sample,
    "DDIM.sample(seeds=)": lambda loops: loops.sample_seeds,
}


def rows() -> list[Record]:
    return [
        {"loop": name, "eta": eta, **counted(eta, choose)}
        for name, choose in LOOPS.items()
        for eta in (0.0, 1.0)
    ]


def main() -> None:
    found = rows()
    for row in found:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    path = RESULTS / "counts.json"
    write(path, {"command": "python -m benchmarks.counts", "versions": versions(), "rows": found})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
