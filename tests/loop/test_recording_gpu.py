"""On a GPU: graphs beside other graphs, failed captures and other threads' allocations."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastddim import DDIM, Engine, Request
from fastddim.loop import recording
from tests.apart import apart

pytestmark = pytest.mark.gpu
WIDE = 512
"""A product of matrices of this width takes cuBLAS' workspace."""


def product(scale: float) -> tuple[Tensor, nn.Linear, Any]:
    """An input, a layer, and the function that applies the layer to the input."""
    torch.manual_seed(0)
    x = scale * torch.randn(8, WIDE, device="cuda")
    net = nn.Linear(WIDE, WIDE, device="cuda").requires_grad_(False)
    return x, net, lambda: net(net(x)).relu()


def overwrite() -> None:
    """Frees what can be freed, and writes over it."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    others = [
        torch.full((size,), float("nan"), device="cuda")
        for size in (1 << 12, 1 << 20, 1 << 26)
        for _ in range(8)
    ]
    del others


@apart
def test_graphs_outlive_others_of_their_stream() -> None:
    device = torch.device("cuda", 0)
    made = [product(1.0 + i) for i in range(40)]  # more than PyTorch has streams
    graphs: list[Any] = [recording.capture(body, device) for _, _, body in made]
    for first in range(2):
        del graphs[first::2], made[first::2]
        overwrite()
        for graph, (_, _, body) in zip(graphs, made, strict=True):
            torch.testing.assert_close(graph(), body())


@apart
def test_memory_takes_captures_after_its_graphs_are_freed() -> None:
    device, (_, _, body) = torch.device("cuda", 0), product(1.0)
    memory = recording.Memory.on(device)
    for _ in range(3):
        graph = recording.capture(body, device, memory)
        torch.testing.assert_close(graph(), body())
        del graph
        overwrite()


@apart
@pytest.mark.parametrize("reads", ["item", "cpu"])
def test_memory_takes_captures_after_one_failed(reads: str) -> None:
    device, (_, _, body) = torch.device("cuda", 0), product(1.0)
    memory = recording.Memory.on(device)
    failures = []  # Their tracebacks hold tensors of the pool.
    kept = []
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot be captured") as caught:
            recording.capture(lambda: getattr(body().sum(), reads)(), device, memory)
        failures.append(caught)
        kept.append(recording.capture(body, device, memory))
        torch.randn(3, device="cuda")
        for graph in kept:
            torch.testing.assert_close(graph(), body())


@apart
def test_other_threads_allocate_during_a_capture() -> None:
    device, (_, _, body) = torch.device("cuda", 0), product(1.0)
    errors: list[BaseException] = []

    def other() -> None:
        try:
            for size in range(1, 5):
                torch.cuda.caching_allocator_delete(
                    torch.cuda.caching_allocator_alloc(size << 26, device)
                )
                torch.ones(3, device=device).cpu()
                torch.ones(3).pin_memory()
        except BaseException as error:
            errors.append(error)

    def during() -> Any:
        if torch.cuda.is_current_stream_capturing():
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        return body()

    graph = recording.capture(during, device)
    assert not errors
    torch.testing.assert_close(graph(), body())


@apart
def test_an_interrupt_in_a_capture_leaves_the_device_usable() -> None:
    device, (_, _, body) = torch.device("cuda", 0), product(1.0)

    def interrupted() -> Any:
        if torch.cuda.is_current_stream_capturing():
            raise KeyboardInterrupt
        return body()

    memory = recording.Memory.on(device)
    with pytest.raises(KeyboardInterrupt):
        recording.capture(interrupted, device, memory)
    torch.randn(1 << 26, device="cuda").sum().item()
    torch.testing.assert_close(recording.capture(body, device, memory)(), body())


def long_model(x: Tensor, t: Tensor) -> Tensor:
    """A model that the device is busy with for longer than the host."""
    mix = torch.eye(WIDE, device=x.device)
    for _ in range(30):
        x = x @ mix
    return 0.5 * x


@apart
def test_calls_of_a_captured_loop_may_come_on_two_streams() -> None:
    act = DDIM(10, eta=1.0).capture(long_model, (512, WIDE), device="cuda")
    seeds = [range(i, i + 512) for i in range(6)]
    want = [act(seeds=list(each)) for each in seeds]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in range(2)], []
    for i, each in enumerate(seeds):
        with torch.cuda.stream(streams[i % 2]):
            found.append(act(seeds=list(each)))
    torch.cuda.synchronize()
    assert all(map(torch.equal, found, want))


@apart
def test_ticks_of_an_engine_may_come_on_two_streams() -> None:
    def results(streams: list[torch.cuda.Stream]) -> list[Tensor]:
        engine = Engine(long_model, (64, WIDE), 4, device="cuda")
        futures = [engine.submit(Request(i, ddim=DDIM(3 + i % 4, eta=1.0))) for i in range(12)]
        for i in range(60):
            with torch.cuda.stream(streams[i % len(streams)]):
                engine.step()
        torch.cuda.synchronize()
        return [future.result() for future in futures]

    want = results([torch.cuda.current_stream()])
    found = results([torch.cuda.Stream() for _ in range(3)])
    assert all(map(torch.equal, found, want))
