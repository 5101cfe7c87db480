"""No operation in a drop-in's steps waits for the device, on a pretended device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim.dropins import compvis, ermongroup, guided, monai
from fastddim.dropins.diffusers import (
    FastDDIMInverseScheduler,
    FastDDIMParallelScheduler,
    FastDDIMScheduler,
    FastDDPMScheduler,
    FastDPMSolverMultistepScheduler,
    FastEulerAncestralDiscreteScheduler,
    FastFlowMatchEulerDiscreteScheduler,
)
from fastddim.dropins.guided.step import Step
from tests import diffusion
from tests.cases import some
from tests.dropins.monai_original import Described
from tests.loop.waits_cases import SHAPE, Model, assert_equal, each, net
from tests.loops import drawn
from tests.pretend import CUDA, Device, Generator, There

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
    # PyTorch's operations round on a CPU alone: here the original's own step runs, which waits.
    if (strict or dtype == torch.float32) and (kind, config) != ("inverse", "threshold")
]
TOLD: dict[str, Callable[[Tensor], Any]] = {
    "its own": list,
    "a copy": lambda t: list(t.clone()),
    "int32": lambda t: list(t.to(torch.int32)),
    "cpu": lambda t: list(t.cpu()),
    "numbers": lambda t: t.tolist(),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize(("kind", "config", "strict", "dtype"), some(STEPS, 3))
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


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"algorithm_type": "sde-dpmsolver++"},
        {"thresholding": True, "sample_max_value": 1.5},
        {"solver_order": 1},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("told", ["its own", "cpu", "numbers", "begin index"])
def test_no_multistep_solver_waits(
    device: Device, config: dict[str, Any], dtype: torch.dtype, told: str
) -> None:
    ours, theirs = (FastDPMSolverMultistepScheduler(**config) for _ in range(2))
    ours.set_timesteps(5, device=CUDA)
    theirs.set_timesteps(5)
    if told == "begin index":
        ours.set_begin_index(0)
    timesteps = TOLD.get(told, list)(ours.timesteps)
    y = drawn(2, *SHAPE[1:]).to(dtype)
    x, g, h = device.put(y), *(torch.Generator().manual_seed(1) for _ in range(2))
    for t, number in zip(timesteps, theirs.timesteps.tolist(), strict=True):
        with device.watch() as waits:
            x = ours.step(0.3 * x, t, x, generator=g).prev_sample
        assert waits == []
        y = theirs.step(0.3 * y, number, y, generator=h).prev_sample
        assert_equal(x, y)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("config", [*CONFIGS.values(), {"variance_type": "fixed_large"}])
@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize(
    ("made", "moved"), [(Generator, False), (Generator, True), (torch.Generator, False)]
)
def test_no_ddpm_step_waits_for_its_own_timesteps(
    device: Device, config: dict[str, Any], told: str, made: Any, moved: bool
) -> None:
    """Of any other tensor on the device, the host must read whether t > 0."""
    ours, theirs = (FastDDPMScheduler(**config) for _ in range(2))
    ours.set_timesteps(4, device=CUDA)
    theirs.set_timesteps(4)
    g, h = made().manual_seed(1), torch.Generator().manual_seed(1)
    y = drawn(2, *SHAPE[1:])
    x = device.put(y)
    if moved:  # as ``add_noise`` moves it
        ours.alphas_cumprod = device.put(ours.alphas_cumprod)
    for t, number in zip(TOLD[told](ours.timesteps), theirs.timesteps.tolist(), strict=True):
        with device.watch() as waits:
            x = ours.step(0.3 * x, t, x, generator=g).prev_sample
        assert len(waits) == (told in ("a copy", "int32"))
        y = theirs.step(0.3 * y, number, y, generator=h).prev_sample
        assert_equal(x, y)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("config", [{}, {"prediction_type": "sample", "clip_sample": False}])
@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize("moved", [False, True])
def test_no_monai_step_waits_for_its_own_timesteps(
    device: Device, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], told: str, moved: bool
) -> None:
    """Of any other tensor on the device, the host must read whether s ≥ 0, as the original."""
    monkeypatch.setattr(monai, "_PLAIN", (Tensor, There))
    ours, theirs = (monai.fused(Described)(**config) for _ in range(2))
    ours.set_timesteps(4, device=CUDA)
    theirs.set_timesteps(4)
    g, h = Generator().manual_seed(1), torch.Generator().manual_seed(1)
    y = drawn(2, *SHAPE[1:])
    x = device.put(y)
    if moved:  # as ``add_noise`` moves it
        ours.alphas_cumprod = device.put(ours.alphas_cumprod)
    told_timesteps = TOLD[told](ours.timesteps)
    for t, number in zip(told_timesteps, theirs.timesteps.tolist(), strict=True):
        with device.watch() as waits:
            x, x0 = ours.step(0.3 * x, t, x, 1.0, g)
        assert len(waits) == (told in ("a copy", "int32"))
        y, y0 = theirs.step(0.3 * y, number, y, 1.0, h)
        assert_equal(x, y)
        assert_equal(x0, y0)
    for t, number in zip(told_timesteps[:0:-1], theirs.timesteps.tolist()[:0:-1], strict=True):
        with device.watch() as waits:
            x, _ = ours.reversed_step(0.3 * x, t, x)
        assert len(waits) == (told in ("a copy", "int32"))
        y, _ = theirs.reversed_step(0.3 * y, number, y)
        assert_equal(x, y)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (FastFlowMatchEulerDiscreteScheduler, {}),
        (FastFlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}),
        (FastEulerAncestralDiscreteScheduler, {}),
        (FastEulerAncestralDiscreteScheduler, {"prediction_type": "v_prediction"}),
    ],
)
@pytest.mark.parametrize("noise", ["float32, cpu", "float32, cuda", "bfloat16, cuda"])
@pytest.mark.parametrize("told", ["its own", "cpu", "numbers", "begin index"])
def test_no_euler_step_waits(
    device: Device, kind: Any, config: dict[str, Any], noise: str, told: str
) -> None:
    ours, theirs = (kind(**config) for _ in range(2))
    ours.set_timesteps(5, device=CUDA)
    theirs.set_timesteps(5)
    if told == "begin index":
        ours.set_begin_index(0)
    dtype = torch.float32 if noise.startswith("float32") else torch.bfloat16
    y = 14.0 * drawn(2, *SHAPE[1:]).to(dtype)
    g: Any = (torch.Generator if noise.endswith("cpu") else Generator)().manual_seed(1)
    x, h = device.put(y), torch.Generator().manual_seed(1)
    euler = kind is FastEulerAncestralDiscreteScheduler
    timesteps = TOLD.get(told, list)(ours.timesteps)
    for t, number in zip(timesteps, theirs.timesteps.tolist(), strict=True):
        torch.manual_seed(1)  # diffusers 0.37 draws flow's noise from the global generator
        with device.watch() as waits:
            u = ours.scale_model_input(x, t) if euler else 0.3 * x
            x = ours.step(u, t, x, generator=g).prev_sample
        assert waits == []
        torch.manual_seed(1)
        u = theirs.scale_model_input(y, number) if euler else 0.3 * y
        y = theirs.step(u, number, y, generator=h).prev_sample
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


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["eps", "v", "plms"])
@pytest.mark.parametrize("how", LATENT)
def test_compvis_sampler_never_waits(device: Device, how: str, kind: str) -> None:
    results, plms = [], kind == "plms"
    options = {name: value for name, value in LATENT[how].items() if not (plms and name == "eta")}
    made: Any = compvis.PLMSSampler if plms else compvis.DDIMSampler
    for put in (device.put, lambda value: value):
        parts = diffusion.Model("v" if kind == "v" else "eps")
        for name in ("alphas_cumprod", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"):
            setattr(parts, name, put(getattr(parts, name)))
        net = Model(device, parts.apply_model)
        parts.apply_model = net  # type: ignore[method-assign]
        torch.manual_seed(0)
        sample, kept = made(parts).sample(
            10, 2, (4, 8, 8), put(torch.arange(2.0)), x_T=put(diffusion.X), **put(options)
        )
        results.append([sample, *kept["x_inter"], *kept["pred_x0"]])
        net.unhindered(11 if plms else 10)
    for ours, theirs in zip(*results, strict=True):
        assert_equal(ours, theirs)


GUIDED: dict[str, dict[str, Any]] = {
    "plain": {},
    "noise": {"eta": 1.0},
    "denoised": {"denoised_fn": lambda x0: 0.9 * x0},
    "cond_fn": {"cond_fn": lambda x, t: -0.1 * x.float() + 1e-5 * each(t), "eta": 0.5},
}


@pytest.mark.one_in(2)
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


ANCESTRAL: dict[str, dict[str, Any]] = {
    "plain": {},
    "denoised": {"denoised_fn": lambda x0: 0.9 * x0},
    "cond_fn": {"cond_fn": lambda x, t: -0.1 * x.float() + 1e-5 * each(t)},
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("how", ANCESTRAL)
def test_guided_diffusions_p_sample_never_waits(
    device: Device, how: str, learn_sigma: bool
) -> None:
    diffusion = guided.Diffusion(timestep_respacing="10", learn_sigma=learn_sigma)
    given, x_T, results = ANCESTRAL[how], drawn(*SHAPE), []

    def of_two(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([net(x, t), 0.3 * x], 1) if learn_sigma else net(x, t)

    for put in (device.put, lambda value: value):
        asked, x = Model(device, of_two), put(x_T)
        torch.manual_seed(0)
        loop = guided.p_sample_loop_progressive(diffusion, asked, SHAPE, x, **given)
        states = [out["sample"] for out in loop]
        for i in range(10)[::-1]:
            t = torch.full((len(x),), i, device=x.device)
            x = guided.p_sample(diffusion, asked, x, t, **given)["sample"]
        results.append([*states, x])
        asked.unhindered(20)
    for ours, theirs in zip(*results, strict=True):
        assert_equal(ours, theirs)


def test_streams_share_no_tables_that_may_be_unfinished(
    monkeypatch: pytest.MonkeyPatch, device: Device
) -> None:
    diffusion, tables = guided.Diffusion(timestep_respacing="10"), []
    for stream in (1, 2, 1):
        now = SimpleNamespace(cuda_stream=stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, now=now: now)
        tables.append(Step(diffusion, net, True, None, None, None, CUDA, 0.0).table)
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
