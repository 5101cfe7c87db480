"""Samples and steps are the same whatever a program has set around them.

A default device, inference mode, a stream of its own, another GPU, a capture.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastddim
from fastddim import DDIM, NoiseSchedule, checkpoints, embedded, profile
from fastddim.dropins import compvis, ermongroup, guided
from fastddim.embedded import classifier
from fastddim.loop import graph, recording
from fastddim.step import reference
from fastddim.step.op import initial_noise
from fastddim.tools import draw
from tests import diffusion
from tests.apart import apart
from tests.loops import conditioned, drawn
from tests.paths import CPU, use
from tests.pretend import CUDA, Device
from tests.refusals import refused

LINEAR = NoiseSchedule.linear()


def drop_in(name: str) -> Any:
    """A scheduler by name; the test is skipped where diffusers cannot be imported."""
    module = "fastddim.dropins.diffusers"
    return getattr(pytest.importorskip(module, exc_type=ImportError), name)


SHAPE = (3, 2, 5, 4)
SEEDS = [7, 2**35, 2**63 - 1]
X, C, U = drawn(*SHAPE), drawn(3, 2, 1, 1, seed=2), drawn(3, 2, 1, 1, seed=3)
TABLE = torch.tensor(DDIM(10, eta=1.0).table)
BETAS = torch.linspace(1e-4, 0.02, 1000)
Case = Callable[[str], Any]
"""A case runs on the named device and returns tensors in any containers."""


def model(x: Tensor, t: Tensor, c: Tensor, before: Tensor | None = None) -> Tensor:
    output = conditioned(x, t, c)
    return output if before is None else output + 0.1 * before.clamp(-1, 1)


def free(x: Tensor, t: Tensor) -> Tensor:
    return 0.8 * x.clamp(-1.5, 1.5) + 1e-3 * (t % 97).to(x.dtype).view(-1, 1, 1, 1)


def gradient(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    return c * torch.sin(x)


def moved(value: Any, device: str) -> Any:
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def stepped(device: str, layout: torch.memory_format, **given: Any) -> Any:
    x = X.to(device).contiguous(memory_format=layout)
    output = torch.cat([x, 2 * x]) if "guidance" in given else 2 * x
    return fastddim.ddim_step(x, output, TABLE.to(device), 3, **moved(given, device))


def sampled(device: str, steps: int = 10, **given: Any) -> Any:
    given = {"x_T": X, "cond": {"c": C}, "seeds": SEEDS} | given
    given = {name: value for name, value in given.items() if value is not None}
    if "generator" in given:
        given["generator"] = torch.Generator(device).manual_seed(3)
    torch.manual_seed(0)
    ddim = DDIM(steps, eta=1.0, schedule=LINEAR, clip=1.5)
    return ddim.sample(model, **moved(given, device)), torch.get_rng_state()


def shaped(device: str) -> Any:
    return DDIM(10, eta=1.0, schedule=LINEAR).sample(free, shape=SHAPE, seeds=SEEDS, device=device)


def iterated(device: str) -> Any:
    steps = DDIM(10, eta=1.0, schedule=LINEAR).iterate(free, X.to(device), seeds=SEEDS)
    return [(step.x, step.x0) for step in steps]


def inverted(device: str) -> Any:
    ddim = DDIM(10, schedule=LINEAR)
    noisy = ddim.add_noise(X.to(device), 4, seeds=SEEDS)
    return ddim.invert(free, X.to(device), refine=1), noisy


def captured(device: str, steps: int, **given: Any) -> Any:
    cond = moved({"c": C}, device)
    ddim = DDIM(steps, eta=1.0, schedule=LINEAR, clip=1.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "WHOLE", 10)
        act = ddim.capture(model, SHAPE, device=device, cond=cond, **moved(given, device))
    torch.manual_seed(0)
    return act(), act(seeds=SEEDS), act(x_T=X.to(device), cond=moved({"c": U}, device))


def scheduled(device: str, kind: str, **config: Any) -> Any:
    with torch.device("cpu"):  # diffusers makes a scheduler's own tensors on the default device
        scheduler = drop_in(kind)(**config)
    scheduler.set_timesteps(10, device=device)
    more: dict[str, Any] = {}
    if kind != "FastDDIMInverseScheduler":
        more = {"generator": torch.Generator(device).manual_seed(3)}
    if kind == "FastDDIMScheduler":
        more["eta"] = 1.0
    x, states = X.to(device), []
    for t in scheduler.timesteps:
        x = scheduler.step(0.3 * x, t, x, **more).prev_sample
        states.append(x)
    return states


def multistep(device: str, **config: Any) -> Any:
    with torch.device("cpu"):
        scheduler = drop_in("FastDPMSolverMultistepScheduler")(**config)
        scheduler.set_timesteps(10)
    generator, x, states = torch.Generator(device).manual_seed(3), X.to(device), []
    for t in scheduler.timesteps:
        x = scheduler.step(0.3 * x, t, x, generator=generator).prev_sample
        states.append(x)
    return states


def euler(device: str, kind: str, **config: Any) -> Any:
    torch.manual_seed(0)  # diffusers 0.37 draws flow's noise from the global generator
    with torch.device("cpu"):
        scheduler = drop_in(kind)(**config)
        scheduler.set_timesteps(10)
    generator, x, states = torch.Generator(device).manual_seed(3), X.to(device), []
    for t in scheduler.timesteps:
        u = scheduler.scale_model_input(x, t) if "Ancestral" in kind else 0.3 * x
        x = scheduler.step(u, t, x, generator=generator).prev_sample
        states.append(x)
    return states


def parallel(device: str, strict: bool) -> Any:
    with torch.device("cpu"):
        scheduler: Any = drop_in("FastDDIMParallelScheduler")(strict=strict)
    scheduler.set_timesteps(10)
    t = torch.tensor([900, 500, 200], device=device)
    return scheduler.batch_step_no_noise(0.3 * X.to(device), t, X.to(device))


def seeded(device: str) -> Any:
    with torch.device("cpu"):
        scheduler: Any = drop_in("FastDDIMScheduler")(strict=True)
    scheduler.set_timesteps(10)
    scheduler.use_seeds(SEEDS)
    x = scheduler.initial_latents(SHAPE, device)
    return [scheduler.step(0.3 * x, t, x, eta=1.0).prev_sample for t in scheduler.timesteps]


def latent(device: str, parameterization: str = "eps", **given: Any) -> Any:
    net = diffusion.Model(parameterization)
    for name in ("alphas_cumprod", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"):
        setattr(net, name, getattr(net, name).to(device))
    torch.manual_seed(0)
    sampler, cond = compvis.DDIMSampler(net), torch.zeros(2, device=device)
    out = sampler.sample(10, 2, (4, 8, 8), cond, eta=0.5, **moved(given, device))
    places = torch.full((2,), 4, device=device)
    encoded = sampler.stochastic_encode(diffusion.X.to(device), places)
    return out, encoded, sampler.decode(encoded, cond, 4)


def guided_loop(device: str, **given: Any) -> Any:
    diffusion = guided.Diffusion(timestep_respacing="10", rescale_timesteps="cond_fn" in given)
    torch.manual_seed(0)
    kept = guided.ddim_sample_loop(diffusion, free, SHAPE, device=device, **given)
    t = torch.full((3,), 4, device=device)
    single = guided.ddim_sample(diffusion, free, X.to(device), t, **given)
    return kept, single, guided.ddim_reverse_sample(diffusion, free, X.to(device), t)


def papers(device: str, where: Any, **given: Any) -> Any:
    torch.manual_seed(0)
    seq, betas = range(0, 1000, 100), BETAS.to(device)
    ddpm = where.ddpm_steps(X.to(device), seq, free, betas)
    return ddpm, where.generalized_steps(X.to(device), seq, free, betas, **given)


HALVES: dict[str, Any] = {"uncond": {"c": U}, "guidance": 2.0}
STEPS: dict[str, Case] = {
    "step": partial(stepped, layout=torch.contiguous_format),
    "step, seeds": partial(
        stepped, layout=torch.contiguous_format, seeds=torch.tensor(SEEDS), clip=1.0
    ),
    "step, seeds, channels last": partial(
        stepped, layout=torch.channels_last, seeds=torch.tensor(SEEDS)
    ),
    "step, guidance": partial(stepped, layout=torch.contiguous_format, guidance=2.0),
    "initial noise": lambda device: initial_noise(torch.tensor(SEEDS, device=device), SHAPE),
}
SAMPLES: dict[str, Case] = {
    "sample": sampled,
    "sample, shape": shaped,
    "sample, seeds drawn": partial(sampled, seeds=None),
    "sample, generator": partial(sampled, seeds=None, generator=True),
    "sample, noise": partial(sampled, seeds=None, noise=drawn(10, *SHAPE)),
    "sample, bf16": partial(sampled, dtype=torch.bfloat16),
    "sample, guidance": partial(sampled, **HALVES),
    "sample, guidance by row": partial(sampled, uncond={"c": U}, guidance=lambda t: t / 300),
    "sample, cond_fn": partial(sampled, cond_fn=gradient),
    "sample, self": partial(sampled, self_condition="before"),
    "sample, inpainting": partial(sampled, known=X, mask=torch.ones(1, 1, 5, 1)),
    "sample, trajectory": partial(sampled, trajectory=("x", "x0")),
    "sample, batches": partial(sampled, batch_size=2),
    "iterate": iterated,
    "invert": inverted,
}
CAPTURES: dict[str, Case] = {
    "whole": partial(captured, steps=7),
    "stepwise": partial(captured, steps=12),
    "stepwise, guidance, bf16": partial(captured, steps=12, dtype=torch.bfloat16, **HALVES),
}
DROPINS: dict[str, Case] = {
    "diffusers": partial(scheduled, kind="FastDDIMScheduler"),
    "diffusers, threshold": partial(scheduled, kind="FastDDIMScheduler", thresholding=True),
    "diffusers, strict": partial(scheduled, kind="FastDDIMScheduler", strict=True),
    "diffusers, inverse": partial(scheduled, kind="FastDDIMInverseScheduler"),
    "diffusers, inverse, strict": partial(scheduled, kind="FastDDIMInverseScheduler", strict=True),
    "diffusers, parallel": partial(parallel, strict=False),
    "diffusers, parallel, strict": partial(parallel, strict=True),
    "diffusers, seeds": seeded,
    "diffusers, ddpm": partial(scheduled, kind="FastDDPMScheduler"),
    "diffusers, ddpm, threshold": partial(scheduled, kind="FastDDPMScheduler", thresholding=True),
    "diffusers, multistep": multistep,
    "diffusers, multistep, sde": partial(multistep, algorithm_type="sde-dpmsolver++"),
    "diffusers, flow": partial(euler, kind="FastFlowMatchEulerDiscreteScheduler"),
    "diffusers, flow, noise": partial(
        euler, kind="FastFlowMatchEulerDiscreteScheduler", stochastic_sampling=True
    ),
    "diffusers, euler": partial(euler, kind="FastEulerAncestralDiscreteScheduler"),
    "diffusers, euler, v": partial(
        euler, kind="FastEulerAncestralDiscreteScheduler", prediction_type="v_prediction"
    ),
    "compvis": latent,
    "compvis, v": partial(latent, parameterization="v"),
    "guided": partial(guided_loop, eta=0.5),
    "guided, cond_fn": partial(guided_loop, cond_fn=lambda x, t: -0.1 * x),
    "ermongroup": partial(papers, where=ermongroup, eta=0.5),
}
ORACLE: dict[str, Case] = {"the paper's own": partial(papers, where=reference, eta=0.5)}
GROUPS = {"steps": STEPS, "samples": SAMPLES, "captures": CAPTURES, "drop-ins": DROPINS | ORACLE}
EVERY = {name: case for group in GROUPS.values() for name, case in group.items()}


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if hasattr(value, "__dict__"):
        value = vars(value)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in leaves(item)]
    return []


def assert_alike(ours: Any, theirs: Any) -> None:
    found, wanted = leaves(ours), leaves(theirs)
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted, strict=True):
        assert a.device == b.device
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.fixture(params=CPU)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A CPU's two paths: with numba and without."""
    with use(request.param):
        yield str(request.param)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None if before == torch.device("cpu") else before)


# On "meta", tensors have no values: whatever is made there by accident cannot be used.
AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default device": partial(default_device, "meta"),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
}


@cache
def usual(name: str, backend: str) -> list[Tensor]:
    """The results of a case by the backend in use, with nothing set around the call."""
    return leaves(EVERY[name]("cpu"))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", EVERY)
def test_on_a_cpu_the_surroundings_change_no_result(name: str, around: str, backend: str) -> None:
    with AROUND[around]():
        found = EVERY[name]("cpu")
    assert_alike(found, usual(name, backend))


def test_a_given_device_outweighs_the_default_device() -> None:
    with default_device("meta"):
        assert DDIM(5).sample(free, shape=SHAPE, seeds=SEEDS, device="cpu").device.type == "cpu"
        x = torch.zeros(3, 2, device="cpu")
        assert DDIM(5).sample(lambda x, t: x, x, seeds=SEEDS).device.type == "cpu"


FILES: dict[str, Callable[[], Any]] = {
    "garments": embedded.load,
    "classifier": classifier.load,
    "checkpoint": lambda: checkpoints.load().model,
    "oracle": lambda: profile.oracle().moments(),
}


@pytest.mark.parametrize("name", FILES)
def test_models_from_files_are_on_the_cpu_on_any_default_device(name: str) -> None:
    def tensors(value: Any) -> list[Tensor]:
        modules = isinstance(value, torch.nn.Module)
        return [*value.state_dict().values()] if modules else leaves(tuple(value))

    importlib.import_module("diffusers")  # which makes constants while it is imported
    want = FILES[name]()
    with default_device("meta"):
        found = FILES[name]()
    assert_alike(tensors(found), tensors(want))


def test_interpolations_are_made_on_the_given_device() -> None:
    def between() -> Tensor:
        return draw.interpolations(
            DDIM(5), free, [1, 2], SHAPE[1:], batch_size=3, columns=3, device="cpu"
        )

    want = between()
    with default_device("meta"):
        found = between()
    assert torch.equal(found, want)
    assert np.isfinite(found.numpy()).all()


# --- On a GPU ----------------------------------------------------------------------------------

TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU or none")


@contextmanager
def own_stream() -> Iterator[None]:
    """A stream beside the default one, which stays busy: its results would come too late."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    busy = torch.zeros(1 << 24, device="cuda")
    for _ in range(50):
        busy.add_(1)
    with torch.cuda.stream(stream):
        yield
        stream.synchronize()
    torch.cuda.synchronize()


AROUND_A_GPU: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default device": partial(default_device, "cuda"),
    "another default device": partial(default_device, "meta"),
    "inference mode": torch.inference_mode,
    "a stream of its own": own_stream,
}


@pytest.mark.gpu
@apart
@pytest.mark.parametrize("around", AROUND_A_GPU)
@pytest.mark.parametrize("group", GROUPS)
def test_on_a_gpu_the_surroundings_change_no_result(group: str, around: str) -> None:
    for name, case in GROUPS[group].items():
        want = case("cuda")
        with AROUND_A_GPU[around]():
            found = case("cuda")
        try:
            assert_alike(found, want)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.gpu
@TWO
@apart
@pytest.mark.parametrize("current", [0, 1])
def test_on_another_gpu_samples_and_steps_are_the_same(current: int) -> None:
    for name, case in (STEPS | SAMPLES | CAPTURES).items():
        want = leaves(case("cuda:0"))
        with torch.cuda.device(current):
            found = leaves(case("cuda:1"))
        assert torch.cuda.current_device() == 0
        assert len(found) == len(want) > 0, name
        for a, b in zip(found, want, strict=True):
            assert torch.equal(a.cpu(), b.cpu()), name


def test_inside_a_capture_no_sampling_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    with Device() as device:
        x = device.put(X)
        t: dict[str, Any] = {"seeds": SEEDS}
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert DDIM(3).sample(free, x, **t).device == x.device
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        said = "sampling cannot begin", "DDIM.capture"
        refused(lambda: DDIM(3).sample(free, x, **t), RuntimeError, *said)
        refused(lambda: DDIM(3).iterate(free, x, **t), RuntimeError, *said)
        refused(lambda: DDIM(3).invert(free, x), RuntimeError, *said)
    assert DDIM(3).sample(free, X).device.type == "cpu"  # which no capture concerns


def test_inside_a_capture_no_graph_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording.Memory, "on", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "a stream")
    with Device():
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        act = DDIM(3).capture(free, SHAPE, device=CUDA)
        was = act(seeds=SEEDS)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        refused(lambda: act(seeds=[1, 2, 3]), RuntimeError, "sampling cannot begin")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert act(seeds=SEEDS).tolist() == was.tolist()


@pytest.mark.gpu
@apart
def test_on_a_gpu_a_capture_goes_on_after_a_refused_sampler() -> None:
    x = X.cuda()
    act = DDIM(7).capture(free, SHAPE, device="cuda")
    was, taken = act(seeds=SEEDS), torch.cuda.CUDAGraph()
    with torch.cuda.graph(taken):
        refused(lambda: act(seeds=SEEDS), RuntimeError, "sampling cannot begin")
        refused(lambda: DDIM(7).sample(free, x), RuntimeError, "sampling cannot begin")
        found = x + 1
    taken.replay()
    assert torch.equal(found, x + 1)
    assert torch.equal(act(seeds=SEEDS), was)
