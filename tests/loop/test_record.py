"""How a capture is made and abandoned, as far as a test without a GPU can see."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor

from fastddim import DDIM
from fastddim.loop import graph, recording
from tests.apart import apart

CUDA = torch.device("cuda", 0)


class Driver:
    """A CUDA that notes the calls of ``capture`` in order, and whose capture fails on demand."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.streams = ["default"]
        self.made = 0
        self.pools = 0
        self.invalid = False
        self.ended_by_torch = False
        self.open: Any = None
        """The graph in capture."""
        self.interrupted = False
        """Whether an interrupt comes when a capture has begun, before its body."""

    def stream(self, device: object = None) -> Any:
        """As torch's: 32 streams in turn."""
        self.made += 1
        name, said = f"stream {(self.made - 1) % 32 + 1}", self.said

        class Stream(str):
            def wait_stream(self, other: str) -> None:
                said.append(f"{self} waits for {other}")

        return Stream(name)

    def pool(self) -> str:
        self.pools += 1
        return f"pool {self.pools}"

    @contextmanager
    def on(self, stream: str) -> Iterator[None]:
        before = list(self.streams)
        self.streams.append(stream)
        try:
            yield
        finally:
            self.streams[:] = before

    @contextmanager
    def graph(
        self, graph: Any, pool: object, stream: str, capture_error_mode: str
    ) -> Iterator[None]:
        """As torch's: where ending the capture fails, its stream is not given back."""
        self.streams.append(stream)
        assert capture_error_mode == "thread_local"  # Other threads may allocate.
        self.said.append(f"capture on {stream} into {pool}")
        self.open = graph
        if self.interrupted:
            raise KeyboardInterrupt
        try:
            yield
        finally:
            if self.invalid:
                self.open = None
                raise RuntimeError("cudaErrorStreamCaptureInvalidated")
            graph.capture_end()
            self.streams.pop()

    def captures(self) -> list[str]:
        return [line for line in self.said if line.startswith("capture")]

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
        ended = False

        def replay(self) -> None:
            found.said.append("replay")

        def capture_end(self) -> None:
            found.open, self.ended = None, True

        def pool(self) -> None:
            if not self.ended:
                raise RuntimeError("pool() without a preceding successful capture")

        def reset(self) -> None:
            found.said.append("reset")

    def device(_: object) -> AbstractContextManager[None]:
        return nullcontext()

    cuda = {
        "device": device,
        "Stream": found.stream,
        "current_stream": lambda: current,
        "stream": found.on,
        "graph": found.graph,
        "CUDAGraph": Graph,
        "graph_pool_handle": found.pool,
        "is_current_stream_capturing": lambda: found.open is not None,
        "default_generators": [Generator()],
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", found.end)
    monkeypatch.setattr(
        torch._C, "_cuda_releasePool", lambda _, pool: found.said.append(f"release {pool}")
    )
    monkeypatch.setattr(recording, "_abandoned", [])
    monkeypatch.setattr(recording, "_warm_ups", {})
    monkeypatch.setattr(recording, "_stream_of", WeakKeyDictionary())
    return found


def test_a_body_warms_up_and_is_captured_on_another_stream(driver: Driver) -> None:
    where: list[str] = []

    def body() -> str:
        where.append(driver.streams[-1])
        return "result"

    replay = recording.capture(body, CUDA)
    assert replay() == "result"
    assert len(where) == len(set(where)) == 2
    assert driver.streams == ["default"]
    assert driver.said[-2:] == [f"capture on {where[1]} into pool 1", "replay"]
    assert recording._abandoned == []


def test_graphs_that_share_memory_are_captured_on_one_stream(driver: Driver) -> None:
    memory = recording.Memory.on(CUDA)
    kept = [recording.capture(lambda: None, CUDA, memory) for _ in range(2)]
    first, second = driver.captures()
    assert first == second
    assert len(kept) == 2


def test_a_pool_that_lost_its_graphs_is_not_used_again(driver: Driver) -> None:
    memory = recording.Memory.on(CUDA)
    for _ in range(2):
        recording.capture(lambda: None, CUDA, memory)
    first, second = driver.captures()
    assert first.endswith("pool 1")
    assert second.endswith("pool 2")


def test_a_pool_of_a_failed_capture_is_not_used_again(driver: Driver) -> None:
    memory = recording.Memory.on(CUDA)
    kept = [recording.capture(lambda: None, CUDA, memory)]
    driver.invalid = True
    with pytest.raises(RuntimeError, match="cannot be captured"):
        recording.capture(lambda: None, CUDA, memory)
    driver.invalid = False
    kept += [recording.capture(lambda: None, CUDA, memory) for _ in range(2)]
    pools = [line.split()[-1] for line in driver.captures()]
    assert pools == ["1", "1", "2", "2"]
    del kept[1:]  # The graph of the first pool lives on.
    recording.capture(lambda: None, CUDA, memory)
    assert driver.captures()[-1].endswith("pool 3")


def test_living_graphs_have_streams_of_their_own(driver: Driver) -> None:
    """The end of a graph frees the workspace of its stream, which PyTorch hands out again."""
    where: list[str] = []
    kept = [recording.capture(lambda: where.append(driver.streams[-1]), CUDA) for _ in range(30)]
    captured = where[1::2]
    assert len(set(captured)) == 30
    assert set(where[::2]).isdisjoint(captured)  # The warm-ups have one stream.
    assert not any(each.older for each in kept)  # type: ignore[attr-defined]
    # Without a free stream, a graph keeps an older one of its stream alive.
    last: Any = recording.capture(lambda: None, CUDA)
    assert last.older


def test_captures_of_several_threads_take_turns(driver: Driver) -> None:
    inside: list[int] = []
    most: list[int] = []

    def body() -> None:
        inside.append(1)
        time.sleep(0.005)
        most.append(len(inside))
        inside.pop()

    with ThreadPoolExecutor(4) as pool:
        for made in [pool.submit(recording.capture, body, CUDA) for _ in range(4)]:
            made.result()
    assert most == [1] * 8  # warm-ups and captures


def test_a_failed_warm_up_is_awaited(driver: Driver) -> None:
    def body() -> None:
        raise ValueError("of the warm-up")

    with pytest.raises(ValueError, match="of the warm-up"):
        recording.capture(body, CUDA)
    assert driver.said == ["stream 2 waits for stream 1", "stream 1 waits for stream 2"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, RuntimeError])
def test_an_exception_of_the_body_frees_the_pool(
    driver: Driver, error: type[BaseException]
) -> None:
    """torch ends such a capture, whose graph would hold the memory of its pool."""

    def body() -> None:
        if driver.streams[-1] != "stream 2":
            raise error("of the body")

    with pytest.raises(error, match="of the body"):
        recording.capture(body, CUDA)
    assert driver.said[-1] == "reset"
    assert recording._abandoned == []


def test_an_interrupt_leaves_no_stream_in_capture(driver: Driver) -> None:
    driver.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        recording.capture(lambda: None, CUDA)
    assert driver.open is None
    assert driver.streams == ["default"]
    assert driver.said[-1] == "reset"


@pytest.mark.parametrize("ended_by_torch", [False, True])
def test_a_capture_that_fails_says_why_and_leaves_nothing_behind(
    driver: Driver, ended_by_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.invalid, driver.ended_by_torch = True, ended_by_torch
    monkeypatch.setattr(recording, "_TORCH", (2, 13 if ended_by_torch else 11))

    def body() -> None:
        if driver.streams[-1] != "stream 2":  # the one of the warm-up
            raise RuntimeError("operation not permitted")

    with pytest.raises(RuntimeError, match=r"cannot be captured: operation not permitted \(.*py:"):
        recording.capture(body, CUDA)
    assert driver.streams == ["default"]
    assert len(recording._abandoned) == 1
    ended = [] if ended_by_torch else ["end pool 1", "release pool 1"]
    generator = [] if ended_by_torch else ["generator is a clone"]
    assert driver.said[driver.said.index(driver.captures()[0]) + 1 :] == [*ended, *generator]


def test_an_earlier_error_is_not_named_by_the_capture(driver: Driver) -> None:
    def body() -> None:
        if driver.streams[-1] != "stream 2":
            raise RuntimeError("of the capture")

    driver.invalid = True
    try:
        raise KeyError("of before")
    except KeyError:
        with pytest.raises(RuntimeError, match="of the capture"):
            recording.capture(body, CUDA)


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
