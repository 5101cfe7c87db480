"""Steps of drop-ins in a CUDA graph that a user captures."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim.dropins import guided, monai
from tests.apart import apart
from tests.dropins.monai_original import Described
from tests.loops import drawn
from tests.pretend import CUDA, Device, There
from tests.refusals import refused
from tests.rehearsal import faked

X = drawn(3, 2, 5, 4)


def drop_in(name: str) -> Any:
    """A scheduler by name; the test is skipped where diffusers cannot be imported."""
    module = "fastddim.dropins.diffusers"
    return getattr(pytest.importorskip(module, exc_type=ImportError), name)


def on_another_stream(step: Callable[[], object]) -> None:
    """Runs the step on a new stream, as a program warms up before a capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)


@pytest.mark.gpu
@apart
@pytest.mark.parametrize("strict", [False, True])
def test_a_schedulers_step_in_a_capture_is_the_step(strict: bool) -> None:
    scheduler: Any = drop_in("FastDDIMScheduler")(strict=strict)
    scheduler.set_timesteps(10, device=CUDA)
    x, t = X.cuda(), scheduler.timesteps[3]
    on_another_stream(lambda: scheduler.step(0.3 * x, t, x))
    taken = torch.cuda.CUDAGraph()
    with torch.cuda.graph(taken):
        found = scheduler.step(0.3 * x, t, x).prev_sample
    want = scheduler.step(0.3 * x, t, x).prev_sample
    # The graph reads the tables of the captured step, which other tables must not displace.
    for steps in range(11, 31):
        scheduler.set_timesteps(steps, device=CUDA)
        scheduler.step(0.3 * x, scheduler.timesteps[3], x)
    found.fill_(float("nan"))
    taken.replay()
    assert torch.equal(found, want)


@pytest.mark.gpu
@apart
def test_a_ddpm_step_in_a_capture_is_the_step() -> None:
    scheduler: Any = drop_in("FastDDPMScheduler")()
    scheduler.set_timesteps(10, device=CUDA)
    x, t = X.cuda(), scheduler.timesteps[-1]
    on_another_stream(lambda: scheduler.step(0.3 * x, t, x))
    taken = torch.cuda.CUDAGraph()
    with torch.cuda.graph(taken):
        found = scheduler.step(0.3 * x, t, x).prev_sample
        said = ("a CUDA graph cannot capture a copy from the CPU to cuda:0",)
        first, g = scheduler.timesteps[0], torch.Generator().manual_seed(1)
        refused(lambda: scheduler.step(0.3 * x, first, x, generator=g), RuntimeError, *said)
    want = scheduler.step(0.3 * x, t, x).prev_sample
    for steps in range(11, 31):
        scheduler.set_timesteps(steps, device=CUDA)
        scheduler.step(0.3 * x, scheduler.timesteps[3], x)
    found.fill_(float("nan"))
    taken.replay()
    assert torch.equal(found, want)


@pytest.mark.gpu
@apart
def test_a_monai_step_in_a_capture_is_the_step() -> None:
    scheduler: Any = monai.fused(Described)()
    scheduler.set_timesteps(10, device=CUDA)
    x, t = X.cuda(), scheduler.timesteps[3]
    on_another_stream(lambda: scheduler.step(0.3 * x, t, x))
    taken = torch.cuda.CUDAGraph()
    with torch.cuda.graph(taken):
        found = scheduler.step(0.3 * x, t, x)[0]
        said = ("a CUDA graph cannot capture a copy from the CPU to cuda:0",)
        refused(lambda: scheduler.reversed_step(0.3 * x, t, x), RuntimeError, *said)
    want = scheduler.step(0.3 * x, t, x)[0]
    for steps in range(11, 31):
        scheduler.set_timesteps(steps, device=CUDA)
        scheduler.step(0.3 * x, scheduler.timesteps[3], x)
    found.fill_(float("nan"))
    taken.replay()
    assert torch.equal(found, want)


@pytest.mark.gpu
@apart
@pytest.mark.parametrize("strict", [False, True])
def test_a_schedulers_first_step_in_a_capture_is_refused(strict: bool) -> None:
    scheduler: Any = drop_in("FastDDIMScheduler")(strict=strict)
    scheduler.set_timesteps(10, device=CUDA)
    x, t = X.cuda(), scheduler.timesteps[3]
    was = scheduler.step(0.3 * x, t, x).prev_sample
    taken = torch.cuda.CUDAGraph()
    with torch.cuda.graph(taken):
        found = x + 1
        said = (
            "a CUDA graph cannot capture a copy from the CPU to cuda:0",
            "once before the capture",
        )
        refused(lambda: scheduler.step(0.3 * x, t, x, eta=0.5), RuntimeError, *said)
    taken.replay()
    assert torch.equal(found, x + 1)
    assert torch.equal(scheduler.step(0.3 * x, t, x).prev_sample, was)


@pytest.mark.gpu
@apart
def test_a_flow_step_in_a_capture_is_the_step() -> None:
    scheduler: Any = drop_in("FastFlowMatchEulerDiscreteScheduler")()
    scheduler.set_timesteps(10, device=CUDA)
    x, t = X.cuda(), scheduler.timesteps[3]

    def step() -> Tensor:
        scheduler._step_index = None
        found: Tensor = scheduler.step(0.3 * x, t, x).prev_sample
        return found

    on_another_stream(step)
    taken = torch.cuda.CUDAGraph()
    with torch.cuda.graph(taken):
        found = step()
    want = step()
    for steps in range(11, 31):  # the graph reads the table, which other tables must not displace
        scheduler.set_timesteps(steps, device=CUDA)
        scheduler.step(0.3 * x, scheduler.timesteps[3], x)
    found.fill_(float("nan"))
    taken.replay()
    assert torch.equal(found, want)


@pytest.mark.gpu
@apart
def test_the_first_euler_step_in_a_capture_is_refused() -> None:
    """The σ of Euler ancestral are on the CPU."""
    scheduler: Any = drop_in("FastEulerAncestralDiscreteScheduler")()
    scheduler.set_timesteps(10, device=CUDA)
    x, t = X.cuda(), scheduler.timesteps[3]
    u = scheduler.scale_model_input(x, t)
    taken = torch.cuda.CUDAGraph()
    with torch.cuda.graph(taken):
        found = x + 1
        refused(
            lambda: scheduler.step(u, t, x),
            RuntimeError,
            "a CUDA graph cannot capture a copy from the CPU to cuda:0",
            "once before the capture",
        )
    taken.replay()
    assert torch.equal(found, x + 1)
    scheduler.step(u, t, x)
    assert scheduler.step_index == 4


@pytest.mark.gpu
@apart
def test_tables_made_in_a_capture_are_its_own() -> None:
    scheduler: Any = drop_in("FastDDIMScheduler")()
    scheduler.set_timesteps(10, device=CUDA)
    x = X.cuda()
    scheduler.step(0.3 * x, scheduler.timesteps[3], x)  # compiles the kernel
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.cuda()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.cuda()
    t, side = scheduler.timesteps[3], torch.cuda.Stream()
    taken = torch.cuda.CUDAGraph()
    with torch.cuda.graph(taken, stream=side):
        found = scheduler.step(0.3 * x, t, x).prev_sample
    want = scheduler.step(0.3 * x, t, x).prev_sample
    with torch.cuda.stream(side):  # before the first replay, which computes the graph's tables
        assert torch.equal(scheduler.step(0.3 * x, t, x).prev_sample, want)
    found.fill_(float("nan"))
    taken.replay()
    assert torch.equal(found, want)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("test", "strict"),
    [
        (test_a_schedulers_step_in_a_capture_is_the_step, {"strict": False}),
        (test_a_schedulers_step_in_a_capture_is_the_step, {"strict": True}),
        (test_a_ddpm_step_in_a_capture_is_the_step, {}),
        (test_a_monai_step_in_a_capture_is_the_step, {}),
        (test_a_schedulers_first_step_in_a_capture_is_refused, {"strict": False}),
        (test_a_schedulers_first_step_in_a_capture_is_refused, {"strict": True}),
        (test_tables_made_in_a_capture_are_its_own, {}),
        (test_a_flow_step_in_a_capture_is_the_step, {}),
        (test_the_first_euler_step_in_a_capture_is_refused, {}),
    ],
)
def test_captures_of_steps_on_a_fake_gpu(
    monkeypatch: pytest.MonkeyPatch, test: Callable[..., None], strict: dict[str, bool]
) -> None:
    monkeypatch.setattr(Tensor, "cuda", lambda tensor: tensor.to(CUDA))
    monkeypatch.setattr(monai, "_PLAIN", (Tensor, There))
    with faked(), Device():
        inspect.unwrap(test)(**strict)


def test_a_loop_of_guided_diffusion_cannot_begin_in_a_capture() -> None:
    with faked(), Device() as device:
        x, t = device.put(X), device.put(torch.full((len(X),), 3))
        of = guided.Diffusion(timestep_respacing="10")
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            for step in (guided.ddim_sample, guided.p_sample):
                refused(
                    partial(step, of, lambda x, t: x, x, t),
                    RuntimeError,
                    "sampling cannot begin while a CUDA graph is being captured",
                )
