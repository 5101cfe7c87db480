"""A sample of the engine has the bits of ``DDIM``'s own loop, whatever its neighbours are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim import DDIM, Engine, NoiseSchedule, Request, embedded
from fastddim.serving import tables
from tests.loops import column, drawn
from tests.paths import use
from tests.serving.serving_cases import MIX, SHAPE, alone, exact, expected, named


@pytest.mark.parametrize("slots", [1, 3, 8, 16])
def test_a_mix_of_samplers_has_the_bits_of_sample(slots: int) -> None:
    engine = Engine(exact, SHAPE, slots)
    requests = [Request(seed, ddim=MIX[seed % len(MIX)]) for seed in range(25)]
    found = dict(engine.run(requests))
    assert sorted(found) == list(range(25))
    for i in range(25):
        assert torch.equal(found[i], expected(i % len(MIX), i, slots))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_tick_makes_the_fewest_calls_that_hold_its_requests(size: int, guided: bool) -> None:
    calls: list[int] = []

    def model(x: Tensor, t: Tensor, c: Tensor, y: Tensor) -> Tensor:
        calls.append(len(x))
        return named(x, t, c, y)

    spec = {"c": torch.zeros(SHAPE), "y": torch.tensor(0)}
    both: dict[str, Any] = {"guided": guided, "dtype": torch.bfloat16 if guided else None}
    engine = Engine(model, SHAPE, 8, batch_size=size, cond=spec, **both)
    extra: dict[str, Any] = {"uncond": spec, "guidance": 3.0} if guided else {}
    conds = [{"c": drawn(*SHAPE, seed=i), "y": torch.tensor(i)} for i in range(20)]
    requests = [Request(i, ddim=MIX[i % 7], cond=conds[i], **extra) for i in range(20)]
    for i, x in engine.run(requests):
        assert torch.equal(x, alone(named, requests[i], size, dtype=both["dtype"]))
    waiting, wanted, steps = [len(MIX[i % 7].pairs) for i in range(20)], 0, 0
    active: list[int] = []
    while waiting or active:
        active, waiting = active + waiting[: 8 - len(active)], waiting[8 - len(active) :]
        wanted, steps = wanted - (-len(active) // size), steps + len(active)
        active = [left - 1 for left in active if left > 1]
    assert calls == [size * (1 + guided)] * wanted
    found = engine.metrics()
    assert (found.calls, found.occupancy) == (wanted, steps / (size * wanted))


def test_samples_of_a_mix_differ_from_one_another() -> None:
    found = dict(Engine(exact, SHAPE, 4).run(Request(5, ddim=ddim) for ddim in MIX))
    assert len({tuple(found[i].flatten().tolist()) for i in found}) == len(MIX)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("shape", [(5,), (3, 5, 5), (1, 40, 41)])
def test_each_backend_serves_its_own_bits(backend: str, shape: tuple[int, ...]) -> None:
    with use(backend):
        engine = Engine(exact, shape, 3)
        requests = [Request(seed, ddim=MIX[seed % 5]) for seed in range(9)]
        for i, x in engine.run(requests):
            ddim = requests[i].ddim
            assert ddim is not None
            assert torch.equal(x, ddim.sample(exact, shape=(1, *shape), seeds=[i], batch_size=3)[0])


def test_image_to_image_begins_with_its_own_state() -> None:
    requests = []
    for i, ddim in enumerate(MIX):
        for start in range(len(ddim.pairs)):
            noise = drawn(*SHAPE, seed=10 * i + start)
            requests.append(Request(i, ddim=ddim, x_T=noise, start=start))
    for i, x in Engine(exact, SHAPE, 3).run(requests):
        assert torch.equal(x, alone(exact, requests[i], 3))


def test_states_of_any_dtype_and_layout_are_taken() -> None:
    x = drawn(3, 4, 4, seed=1)
    states = [x.half(), x.bfloat16(), x.permute(1, 2, 0).contiguous().permute(2, 0, 1)]
    requests = [Request(x_T=state, ddim=MIX[0]) for state in states]
    for i, found in Engine(exact, (3, 4, 4), 2).run(requests):
        assert found.dtype == states[i].dtype
        assert torch.equal(found, alone(exact, requests[i], 2, dtype=torch.float32))


def test_a_request_owns_copies_of_its_tensors() -> None:
    engine = Engine(named, SHAPE, 2, cond={"c": SHAPE, "y": torch.tensor(0)})
    c, y, x_T = drawn(*SHAPE), torch.tensor(3), drawn(*SHAPE, seed=2)
    request = Request(1, ddim=MIX[0], cond={"c": c, "y": y}, x_T=x_T)
    want = alone(named, request, 2)
    future = engine.submit(request)
    for tensor in (c, y, x_T):
        tensor.zero_()
    assert torch.equal(future.result(), want)


@pytest.mark.parametrize("until", [None, 0, 3])
def test_a_loop_backwards_shares_the_batch(until: int | None) -> None:
    requests = [
        *(Request(seed, ddim=MIX[seed]) for seed in range(4)),
        Request(ddim=DDIM(6), x_T=drawn(*SHAPE, seed=3), reverse=True, until=until),
        Request(ddim=DDIM(9), x_T=drawn(*SHAPE, seed=4), reverse=True, until=until),
    ]
    for i, x in Engine(exact, SHAPE, 3).run(requests):
        assert torch.equal(x, alone(exact, requests[i], 3))


def conditions(seed: int) -> dict[str, Tensor]:
    return {"c": drawn(*SHAPE, seed=seed), "y": torch.tensor(seed)}


W = (3.0, 0.0, lambda t: 1.0 if t > 400 else 2.5, lambda t: 4.0 if t > 400 else 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_guided_requests_have_the_bits_of_sample(dtype: torch.dtype) -> None:
    requests = []
    for i in range(20):
        own: dict[str, Any] = {"cond": conditions(i), "ddim": MIX[i % len(MIX)]}
        if i % 3:
            own |= {"uncond": {"c": torch.zeros(SHAPE)}, "guidance": W[i % len(W)]}
        requests.append(Request(i, **own))
    spec = {"c": torch.zeros(SHAPE), "y": torch.tensor(0)}
    engine = Engine(named, SHAPE, 3, cond=spec, guided=True, dtype=dtype)
    for i, x in engine.run(requests):
        assert torch.equal(x, alone(named, requests[i], 3, dtype=dtype))


def test_guidance_for_each_row_follows_its_steps() -> None:
    ddim = DDIM(6, eta=0.5)
    w = torch.tensor([1.0, 1.0, 2.0, 3.0, 1.0, 2.0])[:, None]
    both: dict[str, Any] = {"cond": conditions(1), "uncond": {"c": torch.zeros(SHAPE)}}
    x_T = drawn(*SHAPE)
    requests = [Request(3, ddim=ddim, guidance=w, **both, x_T=x_T, start=k) for k in range(5)]
    engine = Engine(named, SHAPE, 2, cond={"c": SHAPE, "y": torch.tensor(0)}, guided=True)
    for i, x in engine.run(requests):
        assert torch.equal(x, alone(named, requests[i], 2))


def test_a_loop_backwards_takes_guidance() -> None:
    request = Request(
        ddim=DDIM(6),
        x_T=drawn(*SHAPE),
        reverse=True,
        cond=conditions(1),
        uncond={"c": torch.zeros(SHAPE)},
        guidance=2.0,
    )
    engine = Engine(named, SHAPE, 2, cond={"c": SHAPE, "y": torch.tensor(0)}, guided=True)
    assert torch.equal(engine.submit(request).result(), alone(named, request, 2))


def test_a_learned_variance_is_ignored() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([exact(x, t), 9 * x], 1)

    for i, x in Engine(model, SHAPE, 3).run(Request(i, ddim=MIX[i]) for i in range(5)):
        assert torch.equal(x, expected(i, i, 3))


def test_autocast_is_that_of_sample() -> None:
    torch.manual_seed(1)
    layer = torch.nn.Linear(4, 4)

    def model(x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = layer(x)
        return output

    requests = [Request(i, ddim=MIX[i]) for i in range(4)]
    for i, x in Engine(model, SHAPE, 3, autocast=True).run(requests):
        assert torch.equal(x, alone(model, requests[i], 3, autocast=True))


PATHS = {
    "flow": DDIM(4, schedule=NoiseSchedule.flow(), prediction="flow"),
    "edm": DDIM(4, schedule=NoiseSchedule.edm(), eta=0.5),
    "continuous cosine": DDIM(4, schedule=NoiseSchedule.continuous_cosine(), prediction="v"),
    "v": DDIM(4, prediction="v", clip=1.0),
    "x0": DDIM(4, prediction="sample", clip=1.0, eta=1.0),
}


@pytest.mark.parametrize("path", PATHS)
def test_every_path_and_prediction_is_served(path: str) -> None:
    ddim = PATHS[path]
    kept = {name: getattr(ddim, name) for name in ("schedule", "prediction", "clip", "eta")}
    seen = set()

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.add(t.dtype)
        return 0.5 * x.clamp(-2, 2) + 1e-4 * column(t, x)

    engine = Engine(model, SHAPE, 3, ddim=ddim)
    requests = [Request(seed, ddim=DDIM(2 + seed, **kept)) for seed in range(6)]
    for i, x in engine.run(requests):
        assert torch.equal(x, alone(model, requests[i], 3))
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_no_bit(dtype: torch.dtype) -> None:
    want = [alone(exact, Request(seed, ddim=MIX[seed]), 2) for seed in range(5)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        engine = Engine(exact, SHAPE, 4, batch_size=2)
        futures = [engine.submit(Request(seed, ddim=MIX[seed])) for seed in range(5)]
        found = [future.result() for future in futures]
    finally:
        torch.set_default_dtype(before)
    for x, future in zip(want, found, strict=True):
        assert torch.equal(x, future)


def test_a_sample_is_plain_beside_inference_mode() -> None:
    engine = Engine(exact, SHAPE, 2)
    plain = engine.submit(Request(1, ddim=MIX[1]))
    with torch.inference_mode():
        assert torch.equal(engine.submit(Request(2, ddim=MIX[4])).result(), expected(4, 2, 2))
    x = plain.result().requires_grad_()
    x.square().sum().backward()
    assert x.grad is not None
    assert torch.equal(x.detach(), expected(1, 1, 2))


def test_tables_that_cannot_grow_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_ROOM", 8)
    engine = Engine(exact, SHAPE, 1)
    grown, calls = tables._grown, 0

    def second_fails(old: Tensor, room: int) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError("no room")
        return grown(old, room)

    monkeypatch.setattr(tables, "_grown", second_fails)
    large = Request(1, ddim=DDIM(20))
    assert isinstance(engine.submit(large).exception(), MemoryError)
    assert torch.equal(engine.submit(large).result(), alone(exact, large, 1))


def test_an_output_may_lie_otherwise_at_each_tick() -> None:
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda output: output,
        lambda output: output.transpose(0, -1).contiguous().transpose(0, -1),
    ]
    calls = 0

    def model(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return layouts[calls // 2 % 2](exact(x, t))

    engine = Engine(model, (2, 6, 8), 2)
    for i, x in engine.run(Request(seed, ddim=MIX[0]) for seed in range(4)):
        assert torch.equal(x, MIX[0].sample(exact, shape=(2, 2, 6, 8), seeds=[i, i])[0])


def test_tables_grow_while_slots_stand_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_ROOM", 8)
    engine = Engine(exact, SHAPE, 4)
    requests = [Request(s, ddim=DDIM(3 + s % 40, eta=s % 3 / 2)) for s in range(60)]
    for i, x in engine.run(requests):
        assert torch.equal(x, alone(exact, requests[i], 4))
    held = engine._batches._tables
    assert held.version > 2
    assert len(held.table) <= 512  # 60 samplers have 1,300 rows: unused ones make room.


def test_a_sampler_is_added_to_the_tables_once() -> None:
    engine = Engine(exact, SHAPE, 2)
    list(engine.run(Request(i, ddim=DDIM(5 + i % 2, eta=1.0)) for i in range(9)))
    assert len(engine._batches._tables._places) == 2
    x_T = drawn(*SHAPE)
    list(engine.run(Request(i, ddim=DDIM(5, eta=1.0), x_T=x_T, start=i) for i in range(5)))
    assert len(engine._batches._tables._places) == 2


def test_idle_slots_stay_finite_beside_a_nan() -> None:
    poison = torch.full(SHAPE, float("nan"))
    seen: list[bool] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(bool(x.isfinite().all()))
        return exact(x, t)

    engine = Engine(model, SHAPE, 3)
    bad = engine.submit(Request(x_T=poison, ddim=DDIM(2)))
    late = engine.submit(Request(1, ddim=MIX[1]))
    assert torch.equal(late.result(), expected(1, 1, 3))
    assert bad.result().isnan().all()
    assert seen == [False, False, *[True] * 5]


@pytest.mark.slow
@pytest.mark.parametrize(("slots", "size"), [(1, 1), (3, 3), (8, 8), (8, 2)])
def test_the_garment_models_samples_are_their_requests(slots: int, size: int) -> None:
    model, shape = embedded.load(), (1, 28, 28)
    mix = [MIX[n] for n in (1, 3, 4, 5)]
    requests = [Request(seed, ddim=mix[seed % 4], deadline=1.0 + seed % 5) for seed in range(11)]
    engine = Engine(model, shape, slots, batch_size=size, order="deadline")
    futures = []
    for i, request in enumerate(requests):
        futures.append(engine.submit(request))
        if i % 4 == 2:
            engine.step()
            futures[i - 1].cancel()
    engine.drain()
    for i, future in enumerate(futures):
        if not future.cancelled():
            want = mix[i % 4].sample(model, shape=(1, *shape), seeds=[i], batch_size=size)
            assert torch.equal(future.result(), want[0])


def test_torch_grads_and_inference_mode_change_no_bit() -> None:
    weight = torch.ones(1, requires_grad=True)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return exact(x, t) * weight

    engine = Engine(model, SHAPE, 3)
    assert torch.equal(engine.submit(Request(1, ddim=MIX[1])).result(), expected(1, 1, 3))
    with torch.inference_mode():
        inside = Engine(model, SHAPE, 3)
        assert torch.equal(inside.submit(Request(1, ddim=MIX[1])).result(), expected(1, 1, 3))
    assert torch.equal(inside.submit(Request(1, ddim=MIX[1])).result(), expected(1, 1, 3))
