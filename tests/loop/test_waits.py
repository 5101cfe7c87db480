"""No operation between two model calls waits for the device, on a pretended device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim import DDIM, NoiseSchedule
from fastddim.dropins._transfer import sent, sent_pinned
from fastddim.loop import graph, recording
from tests.loop.waits_cases import SHAPE, Model, assert_equal
from tests.loops import conditioned, drawn
from tests.pretend import CUDA, Device, Generator, There

LINEAR = NoiseSchedule.linear()
SEEDS = [7, 2**35, 2**63 - 1]


# --- What the pretended device is worth --------------------------------------------------------

WAITING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0, 0].item(),
    "int": lambda x: int(x[0, 0]),
    "branch": lambda x: 1 if x[0, 0] > 0 else 2,
    "a truth": lambda x: bool((x > 0).all()),
    "list": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "onto the device": lambda x: x.copy_(torch.zeros(2, 3)),
    "a table": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "mask": lambda x: x[x > 2],
    "write by a mask": lambda x: x.__setitem__(x > 2, 0.0),
    "row by a value": lambda x: x[x[0, 1].long()],
    "index on the cpu": lambda x: x[torch.tensor([1])],
    "masked select": lambda x: x.masked_select(x > 2),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 2),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "close": lambda x: torch.allclose(x, x),
    "repeats": lambda x: x.repeat_interleave(x[0].long() + 1, dim=1),
}
GOING_ON: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda x: (2 * x).mul_(x).add_(1).float(),
    "half": lambda x: x.half(),
    "row by a number": lambda x: x[1],
    "row by a number on the cpu": lambda x: x[torch.tensor(1)],
    "rows by an index": lambda x: x[torch.zeros(2, dtype=torch.int64, device=x.device)],
    "filled": lambda x: torch.full((3,), 7, device=x.device),
    "written": lambda x: x.__setitem__(1, 5.0),
    "drawn": lambda x: x.normal_(),
    "masked fill": lambda x: x.masked_fill(x > 2, 0.0),
    "quantile": lambda x: torch.quantile(x.abs(), 0.9, dim=1),
    "non-blocking": lambda x: x.copy_(torch.zeros(2, 3), non_blocking=True),
    "off, non-blocking": lambda x: x.to("cpu", non_blocking=True),
    "nowhere": lambda x: x.to(x.device),
}


MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "nowhere": lambda x: x.to(x.device),
    "copied": lambda x: x.to(x.device, copy=True),
    "copied, by position": lambda x: x.to(x.device, x.dtype, False, True),
    "copied, with a dtype": lambda x: x.to(x.dtype, copy=True),
    "copied, with a dtype by position": lambda x: x.to(x.dtype, False, True),
    "copied, like another": lambda x: x.to(x, copy=True),
    "copied, non-blocking": lambda x: x.to(x.device, non_blocking=True, copy=True),
    "copied, in a layout": lambda x: x.to(
        x.device, copy=True, memory_format=torch.contiguous_format
    ),
    "in a dtype": lambda x: x.to(x.device, torch.float16),
    "in a dtype, by name": lambda x: x.to(dtype=torch.float16, device=x.device, non_blocking=True),
    "in its own layout": lambda x: x.to(x.device, memory_format=torch.channels_last),
    "in another layout": lambda x: x.to(x.device, memory_format=torch.contiguous_format),
    "in another layout, with a dtype": lambda x: x.to(
        x.dtype, memory_format=torch.contiguous_format
    ),
}


@pytest.mark.parametrize("what", WAITING)
def test_operations_that_wait_are_noticed(device: Device, what: str) -> None:
    x = device.put(torch.arange(6.0).view(2, 3))
    assert x.device == CUDA
    with device.watch() as waits:
        WAITING[what](x)
    assert waits
    assert all("test_waits.py" in line for line in waits)


@pytest.mark.parametrize("what", GOING_ON)
def test_operations_that_do_not_wait_pass(device: Device, what: str) -> None:
    x = device.put(torch.arange(6.0).view(2, 3))
    with device.watch() as waits:
        found = GOING_ON[what](x)
    assert waits == []
    # The pretended device computes the CPU's values.
    if what != "drawn" and isinstance(found, There):
        want = GOING_ON[what](torch.arange(6.0).view(2, 3))
        assert isinstance(want, Tensor)
        assert found.here.equal(want)


def storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@pytest.mark.parametrize("what", MOVED)
def test_to_copies_where_it_copies_on_a_cpu(device: Device, what: str) -> None:
    own = torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    x = device.put(own)
    with device.watch() as waits:
        found, want = MOVED[what](x), MOVED[what](own)
    assert waits == []
    assert isinstance(found, There)
    assert found.here.equal(want)
    assert (found.dtype, found.stride()) == (want.dtype, want.stride())
    assert (found is x) == (want is own)
    assert (storage(found) == storage(x)) == (storage(want) == storage(own))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("non_blocking", [False, True])
def test_to_another_device_takes_every_keyword(
    device: Device, dtype: torch.dtype, non_blocking: bool
) -> None:
    own = torch.arange(24.0).view(1, 2, 3, 4)
    given: dict[str, Any] = {"dtype": dtype, "non_blocking": non_blocking, "copy": True}
    given["memory_format"] = torch.channels_last
    want = own.to("cpu", **given)
    with device.watch() as waits:
        there = own.to(CUDA, **given)
        back = device.put(own).to("cpu", **given)
    assert len(waits) == (0 if non_blocking else 2)
    assert isinstance(there, There)
    assert not isinstance(back, There)
    for found in (there.here, back):
        assert found.dtype == dtype
        assert found.stride() == want.stride()
        assert found.equal(want)


def test_copies_in_a_capture_that_outlives_them_are_refused(
    monkeypatch: pytest.MonkeyPatch, device: Device
) -> None:
    with device.watch() as waits:
        sent(torch.ones(3), CUDA)
        sent_pinned(torch.ones(3), CUDA)
    assert waits == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for copy in (sent, sent_pinned):
        with pytest.raises(RuntimeError, match="cannot capture a copy from the CPU to cuda:0"):
            copy(torch.ones(3), CUDA)
    with pytest.raises(RuntimeError, match="unless the CPU tensor is pinned"):
        torch.ones(3).to(CUDA, non_blocking=True)  # as PyTorch would


def test_two_devices_do_not_mix(device: Device) -> None:
    x = device.put(torch.ones(3))
    with pytest.raises(RuntimeError, match="one device"):
        x.add(torch.ones(3))


# --- The sampler -------------------------------------------------------------------------------


def model(x: Tensor, t: Tensor, c: Tensor, before: Tensor | None = None) -> Tensor:
    output = conditioned(x, t, c)
    return output if before is None else output + 0.1 * before.clamp(-1, 1)


def gradient(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    return c * torch.sin(x) + 1e-4 * t.view(-1, 1, 1, 1)


def uncond(seed: int = 51) -> dict[str, Any]:
    return {"uncond": {"c": drawn(3, 2, 1, 1, seed=seed)}}


SOURCES: dict[str, Callable[[bool], dict[str, Any]]] = {
    "seeds": lambda there: {"seeds": SEEDS},
    "noise": lambda there: {"noise": drawn(10, *SHAPE, seed=4)},
    "generator": lambda there: {
        "generator": (Generator if there else torch.Generator)().manual_seed(3)
    },
}
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"dtype": torch.bfloat16},
    "guidance": {"guidance": 2.0, **uncond()},
    "guidance per sample, fp16": {
        "guidance": [1.0, 2.0, 3.0],
        "dtype": torch.float16,
        **uncond(),
    },
    "interval": {"guidance": lambda t: 3.0 if 300 < t < 700 else 1.0, **uncond()},
    "cond_fn": {"cond_fn": gradient},
    "cond_fn, guidance": {"cond_fn": gradient, "guidance": 2.0, **uncond()},
    "self": {"self_condition": "before"},
    "self, guidance": {"self_condition": "before", "guidance": 2.0, **uncond()},
    "inpainting": {"known": drawn(*SHAPE, seed=8), "mask": torch.ones(1, 1, 5, 1)},
    "trajectory": {"trajectory": ("x", "x0")},
    "callback": {"callback": lambda step: 0.9 * step.x},
    "batches": {"batch_size": 2},
}


def sampled(net: Any, x_T: Tensor, how: str, source: dict[str, Any], **more: Any) -> Any:
    found = DDIM(10, eta=1.0, schedule=LINEAR, clip=1.5).sample(net, x_T, **source, **more)
    return found[0] if how == "trajectory" else found


PAIRED = [
    (how, source)
    for how in CALLS
    for source in SOURCES
    # A generator's stream belongs to the whole batch; inpainting draws noise of its own.
    if (how, source) not in {("batches", "generator"), ("inpainting", "noise")}
]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("how", "source"), PAIRED)
def test_a_sampler_never_waits(device: Device, how: str, source: str) -> None:
    given: dict[str, Any] = {**CALLS[how], "cond": {"c": drawn(3, 2, 1, 1)}}
    net, x_T = Model(device, model), drawn(*SHAPE)
    noise = device.put(SOURCES[source](True))
    found = sampled(net, device.put(x_T), how, noise, **device.put(given))
    net.unhindered(20 if how == "batches" else 10)
    assert_equal(found, sampled(model, x_T, how, SOURCES[source](False), **given))


@pytest.mark.parametrize("source", SOURCES)
def test_iterate_never_waits(device: Device, source: str) -> None:
    ddim, x_T, cond = DDIM(10, eta=1.0, schedule=LINEAR), drawn(*SHAPE), {"c": drawn(3, 2, 1, 1)}
    net, noise = Model(device, model), device.put(SOURCES[source](True))
    steps = list(ddim.iterate(net, device.put(x_T), cond=device.put(cond), **noise))
    net.unhindered(10)
    want = list(ddim.iterate(model, x_T, cond=cond, **SOURCES[source](False)))
    for ours, theirs in zip(steps, want, strict=True):
        assert_equal(ours.x, theirs.x)
        assert_equal(ours.x0, theirs.x0)


@pytest.mark.parametrize("how", ["plain", "bf16", "guidance", "cond_fn"])
def test_a_loop_that_runs_backwards_never_waits(device: Device, how: str) -> None:
    ddim, x0 = DDIM(10, schedule=LINEAR), drawn(*SHAPE)
    given: dict[str, Any] = {**CALLS[how], "cond": {"c": drawn(3, 2, 1, 1)}}
    net = Model(device, model)
    found = ddim.invert(net, device.put(x0), refine=1, **device.put(given))
    net.unhindered(20)
    assert_equal(found, ddim.invert(model, x0, refine=1, **given))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("how", ["plain", "bf16", "guidance", "interval", "cond_fn", "self"])
@pytest.mark.parametrize("whole", [100, 2])
def test_a_captured_loop_never_waits(
    monkeypatch: pytest.MonkeyPatch, device: Device, how: str, whole: int
) -> None:
    # Without graphs the loop runs itself, by the operations that a graph would hold.
    monkeypatch.setattr(recording.Memory, "on", lambda device: None)
    monkeypatch.setattr(graph, "WHOLE", whole)
    ddim, given = (
        DDIM(10, eta=1.0, schedule=LINEAR),
        {**CALLS[how], "cond": {"c": drawn(3, 2, 1, 1)}},
    )
    act = ddim.capture(model, SHAPE, device=CUDA, **device.put(given))
    other = {"c": drawn(3, 2, 1, 1, seed=9)}
    with device.watch() as waits:
        found = act(seeds=SEEDS, cond=device.put(other))
    assert waits == []
    given["cond"] = other
    want = ddim.sample(model, shape=SHAPE, seeds=SEEDS, **given)
    assert_equal(found, want)
