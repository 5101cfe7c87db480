"""Nothing between two model calls waits for the device, as far as that can be seen without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim import DDIM, NoiseSchedule
from fastddim.dropins import compvis, ermongroup, guided
from fastddim.dropins._transfer import sent, sent_pinned
from fastddim.dropins.diffusers import (
    FastDDIMInverseScheduler,
    FastDDIMParallelScheduler,
    FastDDIMScheduler,
)
from fastddim.loop import graph, trajectory
from tests import diffusion
from tests.loops import conditioned, drawn
from tests.pretend import CUDA, Device, Generator, There

LINEAR = NoiseSchedule.linear()
SHAPE = (3, 2, 5, 4)
SEEDS = [7, 2**35, 2**63 - 1]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    monkeypatch.setattr(trajectory, "free_bytes", lambda device: None)
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    with Device() as device:
        yield device


class Model:
    """A model that notes what was waited for between its calls; what follows the last is free."""

    def __init__(self, device: Device, net: Callable[..., Any]) -> None:
        self.device, self.net = device, net
        self.calls = 0
        self.between: list[str] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.calls:
            self.between += self.device.waits
        self.calls += 1
        said = self.net(*args, **kwargs)
        self.device.waits.clear()
        return said

    def unhindered(self, calls: int) -> None:
        assert self.calls == calls
        assert self.between == []


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
    # And what is computed is what the CPU computes.
    if what != "drawn" and isinstance(found, There):
        want = GOING_ON[what](torch.arange(6.0).view(2, 3))
        assert isinstance(want, Tensor)
        assert found.here.equal(want)


def test_copies_wait_in_a_capture_whose_graph_outlives_them(
    monkeypatch: pytest.MonkeyPatch, device: Device
) -> None:
    with device.watch() as waits:
        sent(torch.ones(3), CUDA)
        sent_pinned(torch.ones(3), CUDA)
    assert waits == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with device.watch() as waits:
        sent(torch.ones(3), CUDA)
        sent_pinned(torch.ones(3), CUDA)
    assert len(waits) == 2


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


@pytest.mark.parametrize("how", ["plain", "bf16", "guidance", "interval", "cond_fn", "self"])
@pytest.mark.parametrize("whole", [100, 2])
def test_a_captured_loop_never_waits(
    monkeypatch: pytest.MonkeyPatch, device: Device, how: str, whole: int
) -> None:
    # Without graphs the loop runs itself, by the operations that a graph would hold.
    monkeypatch.setattr(graph.Memory, "on", lambda device: None)
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


# --- What takes the place of other loops and steps ---------------------------------------------

KINDS: dict[str, Any] = {
    "plain": FastDDIMScheduler,
    "parallel": FastDDIMParallelScheduler,
    "inverse": FastDDIMInverseScheduler,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "clip": {},
    "threshold": {"thresholding": True, "sample_max_value": 1.5},
    "v": {"prediction_type": "v_prediction", "clip_sample": False},
}
STEPS = [
    (kind, config, strict, dtype)
    for kind in KINDS
    for config in CONFIGS
    for strict in (False, True)
    for dtype in (torch.float32, torch.bfloat16)
    # Without strict, half precision is the original's own step, which waits.
    if (strict or dtype == torch.float32) and (kind, config) != ("inverse", "threshold")
]
TOLD: dict[str, Callable[[Tensor], Any]] = {
    "its own": list,
    "a copy": lambda t: list(t.clone()),
    "int32": lambda t: list(t.to(torch.int32)),
    "cpu": lambda t: list(t.cpu()),
    "numbers": lambda t: t.tolist(),
}


@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize(("kind", "config", "strict", "dtype"), STEPS)
def test_no_schedulers_step_waits(
    device: Device, kind: str, config: str, strict: bool, dtype: torch.dtype, told: str
) -> None:
    ours, theirs = (KINDS[kind](**CONFIGS[config], strict=strict) for _ in range(2))
    ours.set_timesteps(4, device=CUDA)
    theirs.set_timesteps(4)
    if strict and kind != "inverse":
        ours.use_seeds([1, 2])
        theirs.use_seeds([1, 2])
    timesteps, noise = TOLD[told](ours.timesteps), Generator().manual_seed(1)
    more: list[dict[str, Any]] = [{}, {}]
    if kind != "inverse":
        more = [{"eta": 1.0, "generator": g} for g in (noise, torch.Generator().manual_seed(1))]
    y = drawn(2, *SHAPE[1:]).to(dtype)
    x = device.put(y)
    for t, number in zip(timesteps, theirs.timesteps.tolist(), strict=True):
        with device.watch() as waits:
            x = ours.step(0.3 * x, t, x, **more[0]).prev_sample
        assert waits == []
        y = theirs.step(0.3 * y, number, y, **more[1]).prev_sample
        assert_equal(x, y)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_noise_of_the_cpus_generator_is_brought_without_waiting(
    device: Device, strict: bool, listed: bool
) -> None:
    def generator() -> Any:
        drawn = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return drawn if listed else drawn[0]

    ours, theirs = (FastDDIMScheduler(strict=strict) for _ in range(2))
    ours.set_timesteps(10, device=CUDA)
    theirs.set_timesteps(10)
    y = drawn(2, *SHAPE[1:])
    x, g, h = device.put(y), generator(), generator()
    for t, number in zip(ours.timesteps, theirs.timesteps.tolist(), strict=True):
        with device.watch() as waits:
            x = ours.step(0.3 * x, t, x, eta=1.0, generator=g).prev_sample
        assert waits == []
        y = theirs.step(0.3 * y, number, y, eta=1.0, generator=h).prev_sample
        assert_equal(x, y)


@pytest.mark.parametrize("told", ["device", "cpu"])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_no_step_of_a_batch_at_different_timesteps_waits(
    device: Device, config: str, strict: bool, told: str
) -> None:
    ours, theirs = (FastDDIMParallelScheduler(**CONFIGS[config], strict=strict) for _ in range(2))
    ours.set_timesteps(10, device=CUDA)
    theirs.set_timesteps(10)
    y, t = drawn(2, *SHAPE[1:]), torch.tensor([900, 200])
    x = device.put(y)
    for _ in range(2):
        with device.watch() as waits:
            given = device.put(t) if told == "device" else t
            x = ours.batch_step_no_noise(0.3 * x, given, x)
        assert waits == []
        y = theirs.batch_step_no_noise(0.3 * y, t, y)
        assert_equal(x, y)


@pytest.mark.parametrize("t", [-1, -1000, 3, 1000, 5000])
def test_a_timestep_outside_the_list_gives_nan_on_a_device(device: Device, t: int) -> None:
    scheduler: Any = FastDDIMParallelScheduler(timestep_spacing="trailing", strict=True)
    scheduler.set_timesteps(10, device=CUDA)
    assert {0, 999} & set(scheduler.timesteps.tolist())
    x = device.put(drawn(2, *SHAPE[1:]))
    given = device.put(torch.tensor(t))
    with device.watch() as waits:
        alone = scheduler.step(0.3 * x, given, x).prev_sample
        both = scheduler.batch_step_no_noise(0.3 * x, torch.tensor([t, 999]), x)
    assert waits == []
    assert alone.here.isnan().all()
    assert both.here[0].isnan().all()
    assert both.here[1].isfinite().all()


LATENT: dict[str, dict[str, Any]] = {
    "plain": {},
    "noise": {"eta": 1.0},
    "scaled noise": {"eta": 1.0, "temperature": 0.7, "noise_dropout": 0.1},
    "guidance": {
        "unconditional_guidance_scale": 3.0,
        "unconditional_conditioning": -torch.ones(2),
    },
    "quantized": {"eta": 0.5, "quantize_x0": True},
    "inpainting": {
        "mask": torch.ones(1, 1, 8, 1),
        "x0": drawn(2, 4, 8, 8, seed=4),
    },
}


@pytest.mark.parametrize("parameterization", ["eps", "v"])
@pytest.mark.parametrize("how", LATENT)
def test_compvis_sampler_never_waits(device: Device, how: str, parameterization: str) -> None:
    results = []
    for put in (device.put, lambda value: value):
        parts = diffusion.Model(parameterization)
        for name in ("alphas_cumprod", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"):
            setattr(parts, name, put(getattr(parts, name)))
        net = Model(device, parts.apply_model)
        parts.apply_model = net  # type: ignore[method-assign]
        torch.manual_seed(0)
        sample, kept = compvis.DDIMSampler(parts).sample(
            10, 2, (4, 8, 8), put(torch.arange(2.0)), x_T=put(diffusion.X), **put(LATENT[how])
        )
        results.append([sample, *kept["x_inter"], *kept["pred_x0"]])
        net.unhindered(10)
    for ours, theirs in zip(*results, strict=True):
        assert_equal(ours, theirs)


def each(t: Tensor) -> Tensor:
    return t.float().view(-1, 1, 1, 1)


def net(x: Tensor, t: Tensor) -> Tensor:
    return 0.8 * x.float().clamp(-1.5, 1.5) + 1e-3 * each(t % 97)


GUIDED: dict[str, dict[str, Any]] = {
    "plain": {},
    "noise": {"eta": 1.0},
    "denoised": {"denoised_fn": lambda x0: 0.9 * x0},
    "cond_fn": {"cond_fn": lambda x, t: -0.1 * x.float() + 1e-5 * each(t), "eta": 0.5},
}


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("how", GUIDED)
def test_guided_diffusions_loop_never_waits(device: Device, how: str, rescale: bool) -> None:
    diffusion = guided.Diffusion(timestep_respacing="10", rescale_timesteps=rescale)
    x_T, results = drawn(*SHAPE), []
    for put in (device.put, lambda value: value):
        asked = Model(device, net)
        torch.manual_seed(0)
        loop = guided.ddim_sample_loop_progressive(diffusion, asked, SHAPE, put(x_T), **GUIDED[how])
        results.append([out["sample"] for out in loop])
        asked.unhindered(10)
    for ours, theirs in zip(*results, strict=True):
        assert_equal(ours, theirs)


@pytest.mark.parametrize("how", [*GUIDED, "reverse"])
def test_guided_diffusions_single_steps_never_wait(device: Device, how: str) -> None:
    diffusion = guided.Diffusion(timestep_respacing="10")
    step: Any = partial(guided.ddim_sample, **GUIDED.get(how, {}))
    order = range(10)[::-1]
    if how == "reverse":
        step, order = guided.ddim_reverse_sample, range(9)
    x_T, results = drawn(*SHAPE), []
    for put in (device.put, lambda value: value):
        asked, x = Model(device, net), put(x_T)
        torch.manual_seed(0)
        for i in order:
            t = torch.full((len(x),), i, device=x.device)
            x = step(diffusion, asked, x, t)["sample"]
        results.append(x)
        asked.unhindered(len(order))
    assert_equal(*results)


def test_streams_share_no_tables_that_may_be_unfinished(
    monkeypatch: pytest.MonkeyPatch, device: Device
) -> None:
    diffusion, tables = guided.Diffusion(timestep_respacing="10"), []
    for stream in (1, 2, 1):
        now = SimpleNamespace(cuda_stream=stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, now=now: now)
        tables.append(guided._Step(diffusion, net, True, None, None, None, CUDA, 0.0).table)
    assert tables[0] is tables[2]
    assert tables[0] is not tables[1]


@pytest.mark.parametrize("keep", ["all", "last"])
@pytest.mark.parametrize("eta", [0.0, 0.5, None], ids=["ddim", "noise", "ddpm"])
def test_the_papers_loops_never_wait(
    monkeypatch: pytest.MonkeyPatch, device: Device, eta: float | None, keep: Any
) -> None:
    # What is kept arrives on the CPU by the time the loop returns.
    arrived: list[object] = []

    class Stream:
        def synchronize(self) -> None:
            device.wait("Stream.synchronize")
            arrived.append(self)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    loop: Any = ermongroup.ddpm_steps if eta is None else ermongroup.generalized_steps
    betas, x_T, results = torch.linspace(1e-4, 0.02, 1000), drawn(*SHAPE), []
    for put in (device.put, lambda value: value):
        asked = Model(device, net)
        torch.manual_seed(0)
        results.append(
            loop(put(x_T), range(0, 1000, 100), asked, put(betas), eta=eta or 0.0, keep=keep)
        )
        asked.unhindered(10)
    assert len(arrived) == 1
    for ours, theirs in zip(*results, strict=True):
        assert len(ours) == len(theirs)
        for mine, own in zip(ours, theirs, strict=True):
            assert mine.device.type == "cpu" or mine is ours[0]
            assert_equal(mine, own)


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    """What the device holds is what the CPU computed."""
    values = ours.here if isinstance(ours, There) else ours
    with torch._C._DisableTorchDispatch():
        assert values.dtype == theirs.dtype
        assert torch.equal(values, theirs)
