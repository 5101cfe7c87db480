"""The capture of work on a GPU as a CUDA graph, the memory that graphs share, and the replay."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from fastddim.check import kind

Replay: TypeAlias = Callable[[], Tensor]


class Memory:
    """The pool and the stream of captures. Graphs that share a pool must replay one at a time.

    A capture goes into the pool of the graphs before it while one of them is alive. Otherwise it
    begins a new pool on a new stream: PyTorch refuses the old pool if any tensor there has outlived
    the graphs, such as cuBLAS' workspace or a local of an exception's frame, and up to torch 2.12
    also after a capture that failed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._place: tuple[Any, torch.cuda.Stream]
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    @classmethod
    def on(cls, device: torch.device) -> Memory | None:
        """Returns new memory, or None on a device without CUDA graphs."""
        return cls(device) if device.type == "cuda" else None

    def place(self) -> tuple[Any, torch.cuda.Stream]:
        """Returns the pool and the stream of the next capture."""
        if not self._graphs:
            self._place = torch.cuda.graph_pool_handle(), _unused_stream(self._device)
        return self._place

    def keep(self, graph: torch.cuda.CUDAGraph) -> list[torch.cuda.CUDAGraph]:
        """Notes a graph; returns those of other memory that must live as long as this graph."""
        _, stream = self._place
        older = [g for g, s in list(_stream_of.items()) if s == stream and g not in self._graphs]
        _stream_of[graph] = stream
        self._graphs.add(graph)
        return older

    def renew(self) -> None:
        """Lets the next capture begin a new pool, even while graphs of the present pool live."""
        self._graphs = WeakSet()


_one_at_a_time = threading.RLock()
"""Is held during a capture and its warm-up: both may wait for the whole device, which would
invalidate a capture in another thread."""
_stream_of: WeakKeyDictionary[torch.cuda.CUDAGraph, torch.cuda.Stream] = WeakKeyDictionary()
"""The stream on which each living graph was captured."""
_warm_ups: dict[torch.device, torch.cuda.Stream] = {}
"""The stream of all warm-ups on a device. No graph is captured there."""
_STREAMS = 32
"""PyTorch has this many streams on a device, and hands them out in turn."""


def _unused_stream(device: torch.device) -> torch.cuda.Stream:
    """Returns a stream for captures, which no living graph was captured on, if there is one.

    cuBLAS keeps a workspace for each stream. The pool must own the graph's workspace, so that other
    code cannot clear it; hence this is neither the warm-up's stream nor the caller's. In newer
    torch the end of a graph frees the workspace of its stream, which another graph of this stream
    still reads (pytorch#193402).
    """
    used = [*_stream_of.values(), _warm_up_on(device), torch.cuda.current_stream()]
    # torch.cuda.graph's default stream is on the device that first needed one, so make one here.
    stream = torch.cuda.Stream(device)
    for _ in range(_STREAMS - 1):
        if stream not in used:
            break
        stream = torch.cuda.Stream(device)
    return stream


def _warm_up_on(device: torch.device) -> torch.cuda.Stream:
    if device not in _warm_ups:
        _warm_ups[device] = torch.cuda.Stream(device)
    return _warm_ups[device]


def capture(body: Callable[[], Any], device: torch.device, memory: Memory | None = None) -> Replay:
    """Captures ``body`` as a graph; returns a function that replays it and returns its result.

    On a device without CUDA graphs, returns ``body`` itself. The function also holds ``body``,
    because a graph has only addresses: the memory that ``body`` reads and writes must live as long
    as the graph.

    Raises:
        RuntimeError: ``body`` cannot be captured. Other CUDA work can continue.
    """
    memory = Memory.on(device) if memory is None else memory
    if memory is None:
        return body
    with _one_at_a_time, torch.cuda.device(device), torch.no_grad():
        here, side = torch.cuda.current_stream(), _warm_up_on(device)
        side.wait_stream(here)
        try:
            with torch.cuda.stream(side):
                body()  # Warm up: compile the kernels, and let libraries choose theirs.
        finally:
            # After an exception, too, the steps before it still write to memory of this stream.
            here.wait_stream(side)
            # Clear autocast's cache: casts of the warm-up may be freed while the graph lives, and
            # casts made during capture hold no values.
            torch.clear_autocast_cache()
        graph = torch.cuda.CUDAGraph()
        pool, stream = memory.place()
        before = sys.exc_info()[1]
        try:
            # The outer context resets the stream, which torch.cuda.graph does not if it fails. In
            # the default mode CUDA would refuse other threads' allocations, those of a program
            # whose engine's thread captures, for example.
            with (
                torch.cuda.stream(stream),
                torch.cuda.graph(
                    graph, pool=pool, stream=stream, capture_error_mode="thread_local"
                ),
            ):
                result = body()
        except BaseException as error:
            memory.renew()
            _abandon(graph, device, pool, stream)
            if not isinstance(error, RuntimeError):
                raise
            reason = _reason(error, before)
            raise RuntimeError(f"the model cannot be captured: {reason}") from error
        finally:
            torch.clear_autocast_cache()

    return Graph(graph, result, body, device, memory.keep(graph))


@dataclass(frozen=True, eq=False)
class Graph:
    """A graph, the result of its replay, and ``body``, which holds the graph's memory."""

    graph: torch.cuda.CUDAGraph
    result: Any
    body: Callable[[], Any]
    device: torch.device
    older: list[torch.cuda.CUDAGraph]
    """Graphs whose end would free a workspace that this graph reads."""

    def __call__(self) -> Any:
        with torch.cuda.device(self.device):
            self.graph.replay()
        return self.result


_abandoned: list[torch.cuda.CUDAGraph] = []
"""Captures that failed: the allocator still calls them to ask whether memory is theirs."""
_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def _abandon(
    graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any, stream: torch.cuda.Stream
) -> None:
    """Resets the state that torch does not reset when a capture fails.

    Up to torch 2.12 the allocator still records into the pool (pytorch#180395). Up to 2.11 the
    generator still counts as captured, so any ``torch.randn`` on the GPU fails (pytorch#176753).
    """
    with torch.cuda.stream(stream), suppress(RuntimeError):
        if torch.cuda.is_current_stream_capturing():  # An interrupt came before torch's own end.
            graph.capture_end()
    try:
        graph.pool()
    except RuntimeError:  # The end of the capture has failed.
        _abandoned.append(graph)
        with suppress(RuntimeError, AttributeError):  # torch has already ended the capture
            torch._C._cuda_endAllocateToPool(device.index, pool)
            torch._C._cuda_releasePool(device.index, pool)
        if _TORCH < (2, 12):  # Later, this would part the generator from other graphs' draws.
            generator = torch.cuda.default_generators[device.index]
            generator.graphsafe_set_state(generator.clone_state())
    else:  # The model's own exception has ended the capture, whose graph would hold the pool.
        graph.reset()


@contextmanager
def lasting() -> Iterator[None]:
    """Makes tensors that later calls can write; only inference mode can write its own tensors."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _reason(error: BaseException, before: BaseException | None) -> str:
    """Returns the first error since ``before``, and the model's line that raised it."""
    while error.__context__ is not None and error.__context__ is not before:
        error = error.__context__  # Ending a broken capture raises one more error.
    first = (str(error).splitlines() or [kind(error)])[0]
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f"{os.sep}torch{os.sep}" not in f.filename]
    where = f" ({own[-1].filename}:{own[-1].lineno}: {own[-1].line})" if own else ""
    return (
        f"{first}{where}. A graph can hold no host sync (.item(), .cpu(), branches on a tensor), "
        f"no copy from the host and no shapes that depend on data"
    )
