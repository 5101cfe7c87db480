"""A stand-in for Python on a machine that seems to have a GPU: it rehearses ``benchmarks/gpu.sh``.

    printf '#!/bin/sh\\nexec python -m tests.rehearsal "$@"\\n' >/tmp/python && chmod +x /tmp/python
    PYTHON=/tmp/python benchmarks/gpu.sh --results /tmp/record

runs every section end to end on the CPU, with small sizes. Kernels run in Triton's interpreter, and
what PyTorch offers of CUDA is faked here: a graph is a tape of the operations it was made of. Every
result is compared with the reference as on a GPU; the times mean nothing. The record's GPU is named
"rehearsal (no GPU)", and the record must not go to ``benchmarks/results``. The benchmarks
themselves know nothing of all this.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

GPU = "rehearsal (no GPU)"
ELEMENTS = 64


class Graph:
    """``torch.cuda.CUDAGraph``: what was done while it was captured can be done again."""

    recording: list[Graph] = []  # noqa: RUF012  # the captures that are under way

    def __init__(self) -> None:
        self.again: list[Callable[[], object]] = []

    def replay(self) -> None:
        for repeat in self.again:
            repeat()


def graphs() -> Callable[..., Any]:
    """``torch.cuda.graph``: records PyTorch's operations and launches of interpreted kernels."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
    from torch.utils._pytree import tree_leaves
    from triton.runtime import interpreter

    class Tape(TorchDispatchMode):
        def __init__(self, graph: Graph) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.graph = graph

        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            results = op(*args, **kwargs)

            def repeat() -> None:
                for old, new in zip(
                    tree_leaves(results), tree_leaves(op(*args, **kwargs)), strict=True
                ):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

            self.graph.again.append(repeat)
            return results

    launch: Any = interpreter.GridExecutor.__call__

    def recorded(self: Any, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():
            launch(self, *args, **kwargs)
        for graph in Graph.recording:
            graph.again.append(lambda: launch(self, *args, **kwargs))

    interpreter.GridExecutor.__call__ = recorded

    @contextmanager
    def graph(into: Graph, **_: object) -> Iterator[None]:
        Graph.recording.append(into)
        try:
            with Tape(into):
                yield
        finally:
            Graph.recording.pop()

    return graph


class Event:
    """``torch.cuda.Event``, on the host's clock."""

    def __init__(self, **_: object) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        return max(1e-6, (other.at - self.at) * 1e3)


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


def fake_cuda() -> None:
    """What the benchmarks ask of ``torch.cuda``, answered without it."""
    import torch

    properties = SimpleNamespace(L2_cache_size=1)
    found: dict[str, Any] = {
        "CUDAGraph": Graph,
        "Event": Event,
        "Stream": Stream,
        "graph": graphs(),
        "current_stream": Stream,
        "stream": lambda _: nullcontext(),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "current_device": lambda: 0,
        "get_device_properties": lambda _: properties,
        "_sleep": lambda _: None,
    }
    for name, value in found.items():
        setattr(torch.cuda, name, value)


def small_sizes() -> None:
    """Everything as on a GPU, but of sizes that an interpreter can bear, on the CPU."""
    import torch
    import triton

    from benchmarks import gpu_sections, ladder, timing, variants
    from fastddim.step import backends

    torch.set_num_threads(1)
    for name, v in variants.VARIANTS.items():
        side = 5 if v.shape == variants.ODD else 4
        variants.VARIANTS[name] = replace(v, shape=(v.shape[0], side, side))

    sections: Any = gpu_sections
    sections.DEVICE = ladder.DEVICE = "cpu"
    sections.LAUNCHES = 2
    sections.SMALL = (4, 4, 4)
    sections.CHOICES = ((16, 1, 4), (16, 2, 4))
    sections.NODES, sections.STEPS = ((2, 3, 4, 4),), 3
    sizes: Any = ladder
    sizes.SHAPES = ((1, 16, 7), (2, 3, 4, 4))
    ladder.SHORT, ladder.LONG = 2, 4
    ladder.SECONDS = 0.2
    sections.LOOPS = (((1, 16, 7), 4), ((2, 3, 8, 8), 4))
    sections.unusable = lambda: None
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    sections.describe = lambda: {"gpu": GPU, **versions}
    host_seconds = timing.host_seconds
    sections.host_seconds = lambda calls, *_: host_seconds(calls, 2, 1)
    # numba takes long to compile, and would run on no GPU.
    del backends.TABLE["numba"]

    ladder.CIFAR10 |= {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
    ladder.LATENTS |= {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
    cases = ladder.cases

    def small_cases() -> list[ladder.Case]:
        found = []
        for case in cases()[:4]:  # the others are these, at other sizes
            size = (2, case.shape[1], 16, 16) if len(case.shape) == 4 else case.shape
            found.append(replace(case, shape=size, steps=2))
        return found

    ladder.cases = small_cases
    # The compiler's front end runs; C++ would take it a minute for each model.
    compile: Any = torch.compile

    def front_end(function: Any, dynamic: bool, mode: str | None = None) -> Any:
        return compile(function, backend="aot_eager", dynamic=dynamic)

    setattr(torch, "compile", front_end)  # noqa: B010


def main(arguments: list[str]) -> int:
    """Runs ``-m MODULE ARGUMENTS...`` as Python would, on a machine that seems to have a GPU."""
    minus_m, name, *rest = arguments
    assert minus_m == "-m", arguments
    if name == "benchmarks.gpu":
        from benchmarks import gpu

        if "--results" not in rest:
            raise SystemExit("a rehearsal's record is of no GPU: name another folder (--results)")
        # The interpreter of the processes that it starts.
        sys.executable = os.environ["PYTHON"]
        setattr(gpu, "ELEMENTS", ELEMENTS)  # noqa: B010
        return gpu.main(rest)
    if name == "benchmarks.gpu_sections":
        os.environ["TRITON_INTERPRET"] = "1"
        fake_cuda()
        small_sizes()
        from benchmarks import gpu_sections

        # A check of the sanitizer's starts pytest, without any of this.
        return gpu_sections.main(rest)
    # pytest, say, and what that starts.
    module: Any = importlib.import_module(name)
    return int(module.main(rest))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
