"""How a capture is made and abandoned, as far as a test without a GPU can see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim import DDIM
from fastddim.loop import graph
from tests.apart import apart

CUDA = torch.device("cuda", 0)


class Driver:
    """A CUDA that notes the calls of ``capture`` in order, and whose capture fails on demand."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.streams = ["default"]
        self.made = 0
        self.invalid = False
        self.ended_by_torch = False

    def stream(self, device: object = None) -> Any:
        self.made += 1
        name, said = f"stream {self.made}", self.said

        class Stream(str):
            def wait_stream(self, other: str) -> None:
                said.append(f"{self} waits for {other}")

        return Stream(name)

    @contextmanager
    def on(self, stream: str) -> Iterator[None]:
        before = list(self.streams)
        self.streams.append(stream)
        try:
            yield
        finally:
            self.streams[:] = before

    @contextmanager
    def graph(self, graph: Any, pool: object, stream: str) -> Iterator[None]:
        """As torch's: where ending the capture fails, its stream is not given back."""
        self.streams.append(stream)
        self.said.append(f"capture on {stream} into {pool}")
        try:
            yield
        finally:
            if self.invalid:
                raise RuntimeError("cudaErrorStreamCaptureInvalidated")
            self.streams.pop()

    def end(self, device: int, pool: object) -> None:
        if self.ended_by_torch:
            raise RuntimeError("not currently recording")
        self.said.append(f"end {pool}")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    current = found.stream()

    class Generator:
        def clone_state(self) -> str:
            return "clone"

        def graphsafe_set_state(self, state: str) -> None:
            found.said.append(f"generator is a {state}")

    class Graph:
        def replay(self) -> None:
            found.said.append("replay")

    def device(_: object) -> AbstractContextManager[None]:
        return nullcontext()

    cuda = {
        "device": device,
        "Stream": found.stream,
        "current_stream": lambda: current,
        "stream": found.on,
        "graph": found.graph,
        "CUDAGraph": Graph,
        "graph_pool_handle": lambda: "a pool",
        "default_generators": [Generator()],
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", found.end)
    monkeypatch.setattr(
        torch._C, "_cuda_releasePool", lambda _, pool: found.said.append(f"release {pool}")
    )
    monkeypatch.setattr(graph, "_abandoned", [])
    return found


def test_a_body_warms_up_and_is_captured_on_another_stream(driver: Driver) -> None:
    where: list[str] = []

    def body() -> str:
        where.append(driver.streams[-1])
        return "result"

    replay = graph.capture(body, CUDA)
    assert replay() == "result"
    assert len(where) == len(set(where)) == 2
    assert driver.streams == ["default"]
    assert driver.said[-2:] == [f"capture on {where[1]} into a pool", "replay"]
    assert graph._abandoned == []


def test_graphs_that_share_memory_are_captured_on_one_stream(driver: Driver) -> None:
    memory = graph.Memory.on(CUDA)
    for _ in range(2):
        graph.capture(lambda: None, CUDA, memory)
    first, second = (line for line in driver.said if line.startswith("capture"))
    assert first == second


@pytest.mark.parametrize("ended_by_torch", [False, True])
def test_a_capture_that_fails_says_why_and_leaves_nothing_behind(
    driver: Driver, ended_by_torch: bool
) -> None:
    driver.invalid, driver.ended_by_torch = True, ended_by_torch

    def body() -> None:
        if driver.streams[-1] != "stream 3":  # the one of the warm-up
            raise RuntimeError("operation not permitted")

    with pytest.raises(RuntimeError, match=r"cannot be captured: operation not permitted \(.*py:"):
        graph.capture(body, CUDA)
    assert driver.streams == ["default"]
    assert len(graph._abandoned) == 1
    ended = [] if ended_by_torch else ["end a pool", "release a pool"]
    assert driver.said[-len(ended) - 1 :] == [*ended, "generator is a clone"]


def test_an_earlier_error_is_not_named_by_the_capture(driver: Driver) -> None:
    def body() -> None:
        if driver.streams[-1] != "stream 3":
            raise RuntimeError("of the capture")

    driver.invalid = True
    try:
        raise KeyError("of before")
    except KeyError:
        with pytest.raises(RuntimeError, match="of the capture"):
            graph.capture(body, CUDA)


@pytest.mark.parametrize("whole", [100, 2])
def test_captures_of_inference_mode_may_be_called_outside(
    monkeypatch: pytest.MonkeyPatch, whole: int
) -> None:
    monkeypatch.setattr(graph, "WHOLE", whole)
    ddim = DDIM(4, eta=1.0)
    cond = {"c": torch.ones(2, 1)}
    more: Any = {"uncond": {"c": torch.zeros(2, 1)}, "guidance": 3.0}

    def model(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return torch.tanh(x) * c

    with torch.inference_mode():
        act = ddim.capture(model, (2, 5), device="cpu", cond=cond, **more)
        inside = act(seeds=[1, 2])
    outside = act(seeds=[1, 2], guidance=3.0, cond=cond)
    assert torch.equal(inside, outside)
    want = ddim.sample(model, shape=(2, 5), seeds=[1, 2], device="cpu", cond=cond, **more)
    assert torch.equal(outside, want)


@pytest.mark.gpu
@apart
def test_on_a_gpu_all_goes_on_after_a_capture_that_failed() -> None:
    ddim, stream = DDIM(4), torch.cuda.current_stream()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"x\.sum\(\)\.item\(\)"):
            ddim.capture(lambda x, t: x * x.sum().item(), (1, 8), device="cuda")
        assert torch.cuda.current_stream() == stream
        torch.manual_seed(0)
        assert torch.randn(8, device="cuda").isfinite().all()
        torch.cuda.empty_cache()
        act = ddim.capture(lambda x, t: torch.tanh(x), (1, 8), device="cuda")
        want = ddim.sample(lambda x, t: torch.tanh(x), shape=(1, 8), seeds=[3], device="cuda")
        assert torch.equal(act(seeds=[3]), want)
