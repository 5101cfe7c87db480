"""Replaces the Python interpreter to rehearse ``benchmarks/gpu.sh`` on a machine without a GPU.

    printf '#!/bin/sh\\nexec python -m tests.rehearsal "$@"\\n' >/tmp/python && chmod +x /tmp/python
    PYTHON=/tmp/python benchmarks/gpu.sh --results /tmp/record

runs every section end to end on the CPU, with small sizes. Kernels run in Triton's interpreter, and
this module fakes ``torch.cuda``: a graph is a tape of its operations. Every result is compared with
the reference as on a GPU; the times mean nothing. The record's GPU is named "rehearsal (no GPU)",
and the record must not go to ``benchmarks/results``. The benchmarks have no code for rehearsals.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

GPU = "rehearsal (no GPU)"
ELEMENTS = 64


class Graph:
    """Replaces ``torch.cuda.CUDAGraph``: replays the operations that were captured."""

    recording: list[Graph] = []  # noqa: RUF012  # the captures in progress

    def __init__(self) -> None:
        self.again: list[Callable[[], object]] = []
        self.made: list[Any] = []

    def replay(self) -> None:
        for repeat in self.again:
            repeat()


def address(tensor: Any) -> int:
    """The address of a tensor's values, which a tensor of the fake GPU has on the CPU."""
    return int(getattr(tensor, "here", tensor).data_ptr())


def storage(tensor: Any) -> int:
    """The address of the memory that a tensor may share with others."""
    return int(getattr(tensor, "here", tensor).untyped_storage().data_ptr())


def graphs() -> Callable[..., Any]:
    """Replaces ``torch.cuda.graph``: records PyTorch's operations."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

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
                    if isinstance(old, torch.Tensor) and address(old) != address(new):
                        old.copy_(new)

            self.graph.again.append(repeat)
            given = {storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            self.graph.made += [
                made
                for made in tree_leaves(results)
                if isinstance(made, torch.Tensor)
                and made.is_floating_point()
                and storage(made) not in given  # Not a view, and not written in place.
            ]
            return results

    @contextmanager
    def graph(into: Graph, *, stream: Stream | None = None, **_: object) -> Iterator[None]:
        Graph.recording.append(into)
        try:
            with current(stream or CAPTURING), Tape(into):
                yield
        finally:
            Graph.recording.pop()
        # On a GPU a captured operation has not run yet.
        for tensor in into.made:
            tensor.fill_(float("nan"))
        into.made.clear()

    return graph


def recorded() -> Callable[..., None]:
    """Replaces Triton's interpreted launch by one that captures in progress record."""
    from torch.utils._python_dispatch import _disable_current_modes
    from triton.runtime import interpreter

    launch: Any = interpreter.GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():
            launch(self, *args, **kwargs)
        for graph in Graph.recording:
            graph.again.append(lambda: launch(self, *args, **kwargs))

    return call


class Event:
    """Replaces ``torch.cuda.Event`` by the host's clock."""

    def __init__(self, **_: object) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        return max(1e-6, (other.at - self.at) * 1e3)


class Stream:
    """Replaces ``torch.cuda.Stream``; each has its own ``cuda_stream``, as on a GPU."""

    chosen: list[Stream] = []  # noqa: RUF012

    @property
    def cuda_stream(self) -> int:
        return id(self)

    def wait_stream(self, other: Stream) -> None:
        pass


DEFAULT, CAPTURING = Stream(), Stream()
"""The stream of a program that has chosen none, and the stream of ``torch.cuda.graph``."""


@contextmanager
def current(chosen: Stream) -> Iterator[None]:
    """Replaces ``torch.cuda.stream``."""
    Stream.chosen.append(chosen)
    try:
        yield
    finally:
        Stream.chosen.pop()


def fakes() -> dict[str, Any]:
    """What replaces the functions of ``torch.cuda`` that benchmarks and GPU tests use, by name."""
    properties = SimpleNamespace(L2_cache_size=1)
    return {
        "CUDAGraph": Graph,
        "Event": Event,
        "Stream": Stream,
        "graph": graphs(),
        "current_stream": lambda *_: (Stream.chosen or [DEFAULT])[-1],
        "stream": current,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "current_device": lambda: 0,
        "get_device_properties": lambda _: properties,
        "is_current_stream_capturing": lambda: bool(Graph.recording),
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda _: None,
        "_sleep": lambda _: None,
    }


@contextmanager
def faked() -> Iterator[None]:
    """Fakes ``torch.cuda`` within the block, for a GPU test that runs on a CPU."""
    import torch
    from triton.runtime import interpreter

    executor: Any = interpreter.GridExecutor
    found = [(torch.cuda, name, value) for name, value in fakes().items()]
    found.append((executor, "__call__", recorded()))
    before = [(of, name, getattr(of, name)) for of, name, _ in found]
    try:
        for of, name, value in found:
            setattr(of, name, value)
        yield
    finally:
        for of, name, value in before:
            setattr(of, name, value)


def small_sizes() -> None:
    """Moves the measurements to the CPU, at sizes that the interpreter can manage."""
    import torch
    import triton

    from benchmarks import networks, timing, variants
    from benchmarks.sections import graph, host, ladder, machine, scale, serving
    from benchmarks.sections.rungs import Case
    from fastddim.step import backends

    torch.set_num_threads(1)
    for name, v in variants.VARIANTS.items():
        side = 5 if v.shape == variants.ODD else 4
        variants.VARIANTS[name] = replace(v, shape=(v.shape[0], side, side))

    sizes: Any = scale
    sizes.DEVICE = "cpu"
    sizes.LAUNCHES = 2
    sizes.SMALL = (4, 4, 4)
    sizes.CHOICES = (
        ("epsilon philox", 16, 1, 4, None),
        ("epsilon philox rows x0", 16, 2, 4, 40),
    )
    sizes.NODES, sizes.STEPS = ((2, 3, 4, 4),), 3
    sizes.LOOPS = (((1, 16, 7), 4), ((2, 3, 8, 8), 4))
    sizes.SLOTS, sizes.SERVED = 4, (4, 4, 4)
    sizes.SERVED_IMAGE, sizes.SERVED_STEPS = (3, 16, 16), 2
    graphs: Any = graph
    graphs.SHAPES = ((1, 16, 7), (2, 3, 4, 4))
    graph.SHORT, graph.LONG = 2, 4
    ladder.SECONDS = serving.SECONDS = 0.2
    machine.unusable = lambda: None
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    machine.describe = lambda: {"gpu": GPU, **versions}
    host_seconds = timing.host_seconds
    for section in (host, graph, serving):
        setattr(section, "host_seconds", lambda calls, *_: host_seconds(calls, 2, 1))  # noqa: B010
    # numba takes long to compile, and does not run on a GPU.
    del backends.TABLE["numba"]

    networks.CIFAR10 |= {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
    networks.LATENTS |= {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
    cases = ladder.cases

    def small_cases() -> list[Case]:
        found = []
        for case in cases()[:4]:  # the other cases are these at other sizes
            size = (2, case.shape[1], 16, 16) if len(case.shape) == 4 else case.shape
            found.append(replace(case, shape=size, steps=2))
        return found

    ladder.cases = small_cases
    # Only the compiler's front end runs: C++ would take a minute for each model.
    compile: Any = torch.compile

    def front_end(function: Any, dynamic: bool, mode: str | None = None) -> Any:
        return compile(function, backend="aot_eager", dynamic=dynamic)

    setattr(torch, "compile", front_end)  # noqa: B010


def main(arguments: list[str]) -> int:
    """Runs ``-m MODULE ARGUMENTS...`` like Python, with ``torch.cuda`` faked where it is needed."""
    minus_m, name, *rest = arguments
    assert minus_m == "-m", arguments
    if name == "benchmarks.gpu":
        from benchmarks import gpu

        if "--results" not in rest:
            raise SystemExit("--results must be given: a rehearsal's record belongs to no GPU")
        # Child processes use the same replacement.
        sys.executable = os.environ["PYTHON"]
        setattr(gpu, "ELEMENTS", ELEMENTS)  # noqa: B010
        return gpu.main(rest)
    if name == "benchmarks.gpu_sections":
        os.environ["TRITON_INTERPRET"] = "1"
        with faked():
            small_sizes()
            from benchmarks import gpu_sections

            # The section "sanitizer" starts pytest, which the lines below run unchanged.
            return gpu_sections.main(rest)
    # Other modules, such as pytest, run unchanged.
    module: Any = importlib.import_module(name)
    return int(module.main(rest))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
