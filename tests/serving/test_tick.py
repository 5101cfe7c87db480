"""A tick: one graph for each side of the memory, no allocation, one bound step of host time."""

from __future__ import annotations

import gc
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastddim import DDIM, Engine, Request
from fastddim.serving import metrics, tables
from tests.apart import apart
from tests.loops import drawn
from tests.serving.serving_cases import MIX, SHAPE, alone, exact, expected, named
from tests.tape import ALLOCATIONS, Tape, tapes_for_graphs


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    return tapes_for_graphs(monkeypatch)


def test_ticks_replay_two_graphs(taped: list[Tape]) -> None:
    calls = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        return exact(x, t)

    engine = Engine(model, SHAPE, 3)
    requests = [Request(seed, ddim=MIX[1]) for seed in range(12)]
    for i, x in engine.run(requests):
        assert torch.equal(x, expected(1, i, 3))
    assert engine.metrics().ticks == 28
    assert len(taped) == 2
    assert len(calls) == 4  # a warm-up and a capture for each side
    assert not any(tape.freed for tape in taped)


def test_graphs_follow_a_mix_that_grows(taped: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise, order 2 and larger tables each need new graphs while slots are in use."""
    monkeypatch.setattr(tables, "_ROOM", 16)
    engine = Engine(exact, SHAPE, 3)
    order = [0, 4, 0, 5, 2, 1, 3, 4, 6, 0, 1, 3]
    for i, x in engine.run(Request(i, ddim=MIX[n]) for i, n in enumerate(order)):
        assert torch.equal(x, expected(order[i], i, 3))
    assert len(taped) > 4


def test_each_batch_replays_two_graphs(taped: list[Tape]) -> None:
    engine = Engine(exact, SHAPE, 6, batch_size=2)
    for i, x in engine.run(Request(seed, ddim=MIX[1]) for seed in range(11)):
        assert torch.equal(x, expected(1, i, 2))
    assert len(taped) == 6
    assert engine.metrics().calls == 7 * 3 + 7 * 3


def test_a_warm_engine_captures_no_more(taped: list[Tape]) -> None:
    engine = Engine(exact, SHAPE, 6, batch_size=2)
    engine.warm_up(MIX[1], MIX[3])
    assert len(taped) == 6
    for i, x in engine.run(Request(seed, ddim=MIX[seed % 7]) for seed in range(15)):
        assert torch.equal(x, expected(i % 7, i, 2))
    engine.warm_up()
    assert len(taped) == 6
    assert engine.metrics().submitted == 15


def test_a_cold_engine_captures_for_noise_and_order(taped: list[Tape]) -> None:
    engine = Engine(exact, SHAPE, 2)
    engine.warm_up(MIX[0])
    assert len(taped) == 2
    list(engine.run([Request(1, ddim=MIX[1]), Request(2, ddim=MIX[4])]))
    assert len(taped) > 2


@pytest.mark.parametrize("slots", [3, 9])
def test_graphs_take_conditions_and_guidance(taped: list[Tape], slots: int) -> None:
    cond = {"c": torch.zeros(SHAPE), "y": torch.tensor(0)}
    own: dict[str, Any] = {"cond": cond, "guided": True, "dtype": torch.bfloat16}
    engine = Engine(named, SHAPE, slots, batch_size=3, **own)
    requests = []
    for i in range(9):
        own = {"c": drawn(*SHAPE, seed=i), "y": torch.tensor(i)}
        extra: dict[str, Any] = {} if i % 2 else {"uncond": cond, "guidance": 1.0 + i}
        if i == 0:
            extra = {}
        requests.append(Request(i, ddim=MIX[i % 5], cond=own, **extra))
    for i, x in engine.run(requests):
        assert torch.equal(x, alone(named, requests[i], 3, dtype=torch.bfloat16))


class Scaled(torch.nn.Module):
    """A network whose weight ``load_state_dict(assign=True)`` replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5), requires_grad=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.scale * x


def test_each_graph_holds_the_weights_that_it_reads(taped: list[Tape]) -> None:
    model = Scaled()
    engine = Engine(model, SHAPE, 2)
    futures = [engine.submit(Request(seed, ddim=MIX[0])) for seed in range(6)]
    engine.step()  # captures one side of the memory
    model.load_state_dict({"scale": torch.tensor(0.5)}, assign=True)
    engine.drain()
    assert len(taped) == 2
    assert not any(tape.freed for tape in taped)
    assert all(future.result().isfinite().all() for future in futures)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's imports
def test_a_models_own_graphs_are_off_in_a_tick(
    taped: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, options = Scaled(), []
    model: Any = torch.compile(plain, mode="reduce-overhead", dynamic=False)
    own = model.forward

    def compile(inner: Any, **given: Any) -> Any:
        options.append(given["options"])
        return inner

    monkeypatch.setattr(torch, "compile", compile)
    engine = Engine(model, SHAPE, 2)
    requests = [Request(seed, ddim=MIX[0]) for seed in range(3)]
    with pytest.warns(UserWarning, match="graphs of its own, which are off"):
        found = dict(engine.run(requests))
    assert len(taped) == 2
    assert [each["triton.cudagraphs"] for each in options] == [False, False]
    assert model.forward is own  # the caller's model is as it was
    for i, request in enumerate(requests):
        assert torch.equal(found[i], alone(plain, request, 2))


def test_a_request_does_not_wait_for_a_capture(taped: list[Tape]) -> None:
    """A server's event loop submits while the engine's thread compiles and captures."""
    begun, goes_on = threading.Event(), threading.Event()

    def model(x: Tensor, t: Tensor) -> Tensor:
        begun.set()
        assert goes_on.wait(10)
        return exact(x, t)

    engine = Engine(model, SHAPE, 2)
    futures = [engine.submit(Request(0, ddim=MIX[0]))]
    with ThreadPoolExecutor(2) as pool:
        ticks = pool.submit(engine.drain)
        try:
            assert begun.wait(10)
            futures.append(pool.submit(engine.submit, Request(1, ddim=MIX[0])).result(5))
        finally:
            goes_on.set()
        ticks.result()
    for seed, future in enumerate(futures):
        assert torch.equal(future.result(), expected(0, seed, 2))


class Ops(TorchDispatchMode):
    """Notes the operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_warm_engine_has_drawn_noise_before() -> None:
    """Else the first request would compile the noise's kernel."""
    engine = Engine(exact, SHAPE, 2)
    with Ops() as warm:
        engine.warm_up()
    assert "fastddim.normal_.default" in warm.found
    assert not any(x.any() for x in engine._batches._batches[0].memory.x)  # parked again
    for i, x in engine.run(Request(seed, ddim=MIX[1]) for seed in range(3)):
        assert torch.equal(x, expected(1, i, 2))


class Allocations(TorchDispatchMode):
    """Counts the tensors that operations allocate."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        views = func.is_view or any(out is value for value in (kwargs or {}).values())
        new = isinstance(out, Tensor) and not views and not any(out is value for value in args)
        if func in ALLOCATIONS or new:
            self.found.append(str(func))
        return out


@pytest.mark.parametrize("slots", [3, 6])
@pytest.mark.parametrize("guided", [False, True])
def test_a_tick_allocates_no_tensor(guided: bool, slots: int) -> None:
    output = drawn(3 * (1 + guided), 4, 8, 8)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return output

    engine = Engine(model, (4, 8, 8), slots, batch_size=3, guided=guided)
    for seed in range(slots):
        engine.submit(Request(seed, ddim=DDIM(50, eta=1.0)))
    engine.step()
    with Allocations() as counted:
        for _ in range(10):
            engine.step()
    assert not counted.found
    with Allocations() as counted:  # the mode counts
        assert torch.zeros(3).add(1).sum() == 3
    assert len(counted.found) >= 2


def test_ticks_keep_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "KEPT", 64)
    output = torch.zeros(3, *SHAPE)
    engine = Engine(lambda x, t: output, SHAPE, 3)

    def ticks(count: int) -> None:
        for seed in range(count):
            engine.submit(Request(seed, ddim=MIX[seed % 3]))
            engine.step()
            engine.step()  # so that the queue stays short
        engine.drain()

    tracemalloc.start()
    try:
        ticks(400)  # fills the rings of the metrics, and pools of other modules
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        ticks(400)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 40_000  # bytes; 400 futures hold 900,000


@pytest.mark.gpu
@pytest.mark.parametrize(("slots", "size"), [(1, 1), (8, 8), (8, 2)])
def test_on_a_gpu_a_mix_has_the_bits_of_sample(slots: int, size: int) -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return 0.7 * x.clamp(-1.5, 1.5) + 1e-3 * (t % 97).to(x.dtype).view(-1, 1, 1, 1)

    engine = Engine(model, (4, 16, 16), slots, batch_size=size, device="cuda")
    requests = [Request(seed, ddim=MIX[seed % len(MIX)]) for seed in range(40)]
    for i, x in engine.run(requests):
        ddim = requests[i].ddim
        assert ddim is not None
        want = ddim.sample(model, shape=(1, 4, 16, 16), seeds=[i], batch_size=size, device="cuda")
        assert torch.equal(x, want[0])


@pytest.mark.gpu
def test_on_a_gpu_a_thread_serves_cancels_and_guides() -> None:
    cond = {"c": torch.zeros(4, 16, 16), "y": torch.tensor(0)}

    def model(x: Tensor, t: Tensor, c: Tensor, y: Tensor) -> Tensor:
        shift = 0.05 * y.to(x.dtype).view(-1, 1, 1, 1) + 0.2 * c
        return 0.7 * x.clamp(-1.5, 1.5) + shift

    with Engine(model, (4, 16, 16), 4, device="cuda", cond=cond, guided=True) as engine:
        engine.start()
        futures = []
        for i in range(30):
            own = {"c": drawn(4, 16, 16, seed=i), "y": torch.tensor(i)}
            request = Request(i, ddim=MIX[i % 5], cond=own, uncond=cond, guidance=1.0 + i % 3)
            futures.append((engine.submit(request), own, 1.0 + i % 3))
            if i % 7 == 3:
                futures[-1][0].cancel()
        for i, (future, own, w) in enumerate(futures):
            if future.cancelled():
                continue
            both = ({k: v.cuda().expand(4, *v.shape) for k, v in d.items()} for d in (own, cond))
            c, u = both
            size = 8 if w == 1 else 4
            extra: dict[str, Any] = {
                "cond": {k: v[:1].expand(size, *v.shape[1:]) for k, v in c.items()}
            }
            if w != 1:
                extra |= {"uncond": u, "guidance": w}
            want = MIX[i % 5].sample(
                model, shape=(size, 4, 16, 16), seeds=[i] * size, device="cuda", **extra
            )
            assert torch.equal(future.result(), want[0])


class Mixed(torch.nn.Module):
    """A network whose products of matrices take cuBLAS' workspace."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = torch.nn.Linear(1024, 1024).requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.3 * torch.tanh(self.mix(x.flatten(1))).view_as(x)


@pytest.mark.gpu
@apart
@pytest.mark.parametrize("size", [4, 2])
def test_on_a_gpu_ticks_are_captured_again(size: int) -> None:
    """Noise, order 2 and larger tables need new graphs when the older ones are freed."""
    model = Mixed().cuda()
    engine = Engine(model, (4, 16, 16), 4, batch_size=size, device="cuda")
    mix = [MIX[0], MIX[1], MIX[3], DDIM(1000), DDIM(999, eta=1.0), *MIX]
    for i, x in engine.run(Request(i, ddim=ddim) for i, ddim in enumerate(mix)):
        shape = (1, 4, 16, 16)
        want = mix[i].sample(model, shape=shape, seeds=[i], batch_size=size, device="cuda")
        assert torch.equal(x, want[0])


@pytest.mark.gpu
@apart
def test_on_a_gpu_an_engine_goes_on_after_a_failed_capture() -> None:
    fails = True

    def model(x: Tensor, t: Tensor) -> Tensor:
        if fails and torch.cuda.is_current_stream_capturing():
            return x * x.sum().item()
        return 0.5 * x

    engine = Engine(model, (4, 16, 16), 2, device="cuda")
    failed = [engine.submit(Request(seed, ddim=MIX[1])) for seed in range(4)]
    for future in failed:  # Their exceptions' frames hold tensors of the graphs' pool.
        with pytest.raises(RuntimeError, match="cannot be captured"):
            future.result()
    fails = False
    for seed, ddim in enumerate(MIX):
        want = ddim.sample(model, shape=(2, 4, 16, 16), seeds=[seed] * 2, device="cuda")
        assert torch.equal(engine.submit(Request(seed, ddim=ddim)).result(), want[0])


@pytest.mark.gpu
@apart
def test_on_a_gpu_a_compiled_model_is_served() -> None:
    plain = Mixed().cuda()
    model: Any = torch.compile(plain, mode="reduce-overhead", dynamic=False)
    engine = Engine(model, (4, 16, 16), 2, device="cuda")
    with pytest.warns(UserWarning, match="graphs of its own, which are off"):
        engine.warm_up(MIX[1])
    for i, x in engine.run(Request(seed, ddim=MIX[1]) for seed in range(5)):
        want = MIX[1].sample(plain, shape=(2, 4, 16, 16), seeds=[i] * 2, device="cuda")
        torch.testing.assert_close(x, want[0], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@apart
def test_on_a_gpu_requests_come_during_a_capture() -> None:
    futures: list[Any] = []

    def request() -> None:
        x = drawn(4, 16, 16, seed=len(futures))
        futures.extend(engine.submit(Request(1, x_T=x_T, ddim=MIX[1])) for x_T in (x.cuda(), x))

    def model(x: Tensor, t: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            thread = threading.Thread(target=request)
            thread.start()
            thread.join()
        return 0.5 * x

    engine = Engine(model, (4, 16, 16), 2, device="cuda")
    engine.submit(Request(0, ddim=MIX[1])).result()
    assert len(futures) == 4
    for i, future in enumerate(futures):
        x_T = drawn(4, 16, 16, seed=i - i % 2).cuda().expand(2, -1, -1, -1).contiguous()
        want = MIX[1].sample(lambda x, t: 0.5 * x, x_T, seeds=[1, 1])
        assert torch.equal(future.result(), want[0])
