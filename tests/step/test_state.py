"""State between steps belongs to one thread and one trajectory: each is what it is alone."""

from __future__ import annotations

import contextvars
import importlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim import DDIM
from fastddim.dropins import compvis, ermongroup, guided
from fastddim.dropins.diffusers import FastDDIMInverseScheduler, FastDDIMScheduler
from fastddim.step.buffers import Shadows, Spare
from tests.cases import some
from tests.paths import CPU, use
from tests.refusals import refused

DDIMScheduler: Any = importlib.import_module("diffusers").DDIMScheduler
FAST: Any = FastDDIMScheduler
SHAPE, STEPS, THREADS = (1, 4, 16, 16), 20, 4


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=gen(seed))


def net(x: Tensor, t: Any) -> Tensor:
    return (0.8 * x.float().clamp(-1.5, 1.5) + 1e-3 * (int(t) % 97)).to(x.dtype)


@contextmanager
def short_turns() -> Iterator[None]:
    """Threads take turns a thousand times as often as Python has them."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def at_once(run: Callable[[int], Tensor], rounds: int = 5) -> list[Tensor]:
    """``run`` of each number, in as many threads as begin together, by the backend in use here."""
    barrier = threading.Barrier(THREADS)
    contexts = [contextvars.copy_context() for _ in range(THREADS)]

    def began(i: int) -> Tensor:
        barrier.wait()
        return contexts[i].run(run, i)

    with short_turns(), ThreadPoolExecutor(THREADS) as pool:
        return [x for _ in range(rounds) for x in pool.map(began, range(THREADS))]


def scheduled(scheduler: Any, dtype: torch.dtype, eta: float) -> Callable[[int], Tensor]:
    def run(i: int) -> Tensor:
        x, generator = randn(*SHAPE, seed=i).to(dtype), gen(i + 50)
        for t in scheduler.timesteps:
            given = {} if eta is None else {"eta": eta, "generator": generator}
            x = scheduler.step(net(x, t), t, x, **given).prev_sample
        return x

    return run


def scheduler_run(
    strict: bool, dtype: torch.dtype = torch.float32, eta: float = 1.0
) -> Callable[[int], Tensor]:
    scheduler = FAST(strict=strict)
    scheduler.set_timesteps(STEPS)
    return scheduled(scheduler, dtype, eta)


def inverse_run() -> Callable[[int], Tensor]:
    scheduler: Any = FastDDIMInverseScheduler(strict=True)
    scheduler.set_timesteps(STEPS)

    def run(i: int) -> Tensor:
        x = randn(*SHAPE, seed=i).bfloat16()
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t), t, x).prev_sample
        return x

    return run


def compvis_run() -> Callable[[int], Tensor]:
    abar = torch.tensor(DDIM(10).schedule.alphas_cumprod, dtype=torch.float32)
    model = SimpleNamespace(
        num_timesteps=1000, alphas_cumprod=abar, apply_model=lambda x, t, c: net(x, t[0])
    )
    sampler = compvis.DDIMSampler(model)

    def run(i: int) -> Tensor:  # at η = 0, as the noise would come from the global generator
        steps = (10, 20, 25, 50)[i]  # a schedule of another sampling is none of this one's
        return sampler.sample(steps, 1, SHAPE[1:], x_T=randn(*SHAPE, seed=i))[0]

    return run


def guided_run() -> Callable[[int], Tensor]:
    diffusion = guided.Diffusion(1000, "ddim20")

    def run(i: int) -> Tensor:
        x = randn(*SHAPE, seed=i)
        return guided.ddim_sample_loop(diffusion, lambda x, t: net(x, t[0]), SHAPE, noise=x)

    return run


def ermongroup_run() -> Callable[[int], Tensor]:
    betas = torch.linspace(1e-4, 0.02, 1000)

    def run(i: int) -> Tensor:
        x, seq = randn(*SHAPE, seed=i), range(0, 1000, 50)
        return ermongroup.generalized_steps(x, seq, lambda x, t: net(x, t[0]), betas)[0][-1]

    return run


def native_run() -> Callable[[int], Tensor]:
    ddim = DDIM(STEPS, eta=1.0)
    return lambda i: ddim.sample(lambda x, t: net(x, t[0]), shape=SHAPE, seeds=[i])


def captured_run() -> Callable[[int], Tensor]:
    act = DDIM(STEPS, eta=1.0).capture(lambda x, t: net(x, t[0]), SHAPE, device="cpu")
    return lambda i: act(seeds=[i])


RUNS: dict[str, Callable[[], Callable[[int], Tensor]]] = {
    "plain": lambda: scheduler_run(False),
    "plain, no noise": lambda: scheduler_run(False, eta=0.0),
    "strict": lambda: scheduler_run(True),
    "strict, bfloat16": lambda: scheduler_run(True, torch.bfloat16),
    "inverse, bfloat16": inverse_run,
    "compvis": compvis_run,
    "guided": guided_run,
    "ermongroup": ermongroup_run,
    "native": native_run,
    "captured": captured_run,
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("which", some(RUNS, 2))
def test_threads_give_what_each_gives_alone(which: str, backend: str) -> None:
    with use(backend):
        alone = [RUNS[which]()(i) for i in range(THREADS)]
        assert all(x.isfinite().all() for x in alone)
        for i, found in enumerate(at_once(RUNS[which]())):
            assert torch.equal(found, alone[i % THREADS]), f"run {i}"


def test_the_original_in_threads_is_what_it_is_alone() -> None:
    """So is the bound that ours is held to, bit for bit."""
    own = DDIMScheduler()
    own.set_timesteps(STEPS)
    alone = [scheduled(own, torch.float32, 1.0)(i) for i in range(THREADS)]
    assert all(map(torch.equal, alone, (scheduler_run(False)(i) for i in range(THREADS))))


def test_a_captured_loop_that_calls_itself_is_refused() -> None:
    acts: list[Any] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        return acts[0](seeds=[1]) if acts else 0.5 * x

    act = DDIM(3).capture(model, (1, 4), device="cpu")
    acts.append(act)
    refused(lambda: act(seeds=[1]), RuntimeError, "a captured loop must not be called")
    acts.clear()
    assert act(seeds=[1]).isfinite().all()


# --- Trajectories in turn ---------------------------------------------------------------------


def far(found: Tensor, truth: Tensor) -> float:
    off = found.double() - truth
    return float(off.square().mean().sqrt() / truth.square().mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strict", [False, True])
def test_trajectories_in_turn_are_what_each_is_alone(strict: bool, dtype: torch.dtype) -> None:
    scheduler = FAST(strict=strict)
    scheduler.set_timesteps(50)
    given: dict[str, Any] = {"eta": 0.5}

    def walk(indices: list[int]) -> list[Tensor]:
        states = {i: randn(*SHAPE, seed=i).to(dtype) for i in indices}
        generators = {i: gen(i + 9) for i in indices}
        for t in scheduler.timesteps:
            for i, x in states.items():
                found = scheduler.step(net(x, t), t, x, generator=generators[i], **given)
                states[i] = found.prev_sample
        return list(states.values())

    together = walk([0, 1, 2])
    for i, found in enumerate(together):
        assert torch.equal(found, walk([i])[0])


def test_two_half_precision_trajectories_are_float32_both() -> None:
    """200 steps of an exact ε of N(0.3, 0.5²) in bfloat16, against the same loop in float64."""
    scheduler, own = FAST(strict=True, clip_sample=False), DDIMScheduler(clip_sample=False)
    abar: Tensor = own.alphas_cumprod.double()

    def model(x: Tensor, t: Any) -> Tensor:
        a = abar[int(t)]
        return (1 - a).sqrt() * (x.double() - a.sqrt() * 0.3) / (a * 0.25 + 1 - a)

    xs = [randn(4, 512, seed=i).bfloat16() for i in range(2)]
    truths = [x.double() for x in xs]
    for s in (scheduler, own):
        s.set_timesteps(200)
    for t in scheduler.timesteps:
        truths = [own.step(model(x, t), t, x).prev_sample for x in truths]
        xs = [scheduler.step(model(x, t).bfloat16(), t, x).prev_sample for x in xs]
    assert max(map(far, xs, truths)) < 0.003


def test_a_state_survives_a_move_to_shared_memory() -> None:
    scheduler = FAST(strict=True)
    scheduler.set_timesteps(10)
    x = scheduler.step(randn(2, 4096), 900, randn(2, 4096, seed=1).bfloat16()).prev_sample
    first = scheduler.step(randn(2, 4096, seed=2), 800, x).prev_sample
    x.share_memory_()
    assert torch.equal(scheduler.step(randn(2, 4096, seed=2), 800, x).prev_sample, first)
    rounded = scheduler.step(randn(2, 4096, seed=2), 800, x.clone()).prev_sample
    assert not torch.equal(rounded, first)


def test_a_step_from_one_tensor_is_the_same_each_time() -> None:
    scheduler = FAST(strict=True)
    scheduler.set_timesteps(10)
    x = scheduler.step(randn(2, 8), 900, randn(2, 8, seed=1).bfloat16()).prev_sample
    first, second = (scheduler.step(randn(2, 8, seed=2), 800, x).prev_sample for _ in range(2))
    assert torch.equal(first, second)


EDITS: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda x: x[:, 0].fill_(0.25),
    "data": lambda x: x.data[:, 0].fill_(0.25),
    "numpy": lambda x: x.view(torch.int16).numpy()[:, 0].fill(0x3E80),
    "other memory": lambda x: x[:, 0].fill_(0.25).share_memory_(),
    "other data": lambda x: setattr(x, "data", x.clone().index_fill_(1, torch.tensor(0), 0.25)),
}


@pytest.mark.parametrize("how", EDITS)
def test_a_half_sample_written_by_any_means_counts_as_written(how: str) -> None:
    scheduler, fresh = FAST(strict=True), FAST(strict=True)
    for s in (scheduler, fresh):
        s.set_timesteps(10)
    x, output = randn(2, 4, 4, 4).bfloat16(), randn(2, 4, 4, 4, seed=1).bfloat16()
    first = scheduler.step(output, 900, x).prev_sample
    EDITS[how](first)
    assert torch.equal(first[:, 0], torch.full((2, 4, 4), 0.25, dtype=torch.bfloat16))
    found = scheduler.step(output, 800, first).prev_sample
    expected = fresh.step(output, 800, first.clone()).prev_sample
    assert torch.equal(found[:, 0], expected[:, 0])
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("inverse", [False, True])
def test_levels_written_where_no_version_is_counted_are_seen(inverse: bool) -> None:
    name = "DDIMInverseScheduler" if inverse else "DDIMScheduler"
    original: Any = getattr(importlib.import_module("diffusers"), name)()
    fast: Any = FastDDIMInverseScheduler() if inverse else FAST()
    x, output = randn(*SHAPE), randn(*SHAPE, seed=1)
    for s in (original, fast):
        s.set_timesteps(10)

    def assert_alike() -> None:
        for t in (900, 0):
            a, b = (s.step(output, t, x).prev_sample for s in (original, fast))
            assert torch.equal(a, b)

    end = "initial_alpha_cumprod" if inverse else "final_alpha_cumprod"
    changes: list[Callable[[Any], Any]] = [
        lambda s: s.alphas_cumprod.data.mul_(0.9),
        lambda s: s.alphas_cumprod.numpy().__setitem__(slice(0, 950), 0.4),
        lambda s: getattr(s, end).data.mul_(0.5),
        lambda s: setattr(s.alphas_cumprod, "data", s.alphas_cumprod * 0.7),
        lambda s: setattr(s, end, torch.tensor(0.8)),
    ]
    assert_alike()
    for change in changes:
        for s in (original, fast):
            change(s)
        assert_alike()


def test_timesteps_written_where_no_version_is_counted_are_seen() -> None:
    scheduler = FAST(strict=True)
    scheduler.set_timesteps(10)
    x = randn(2, 8)
    scheduler.step(x, 900, x)
    scheduler.timesteps.data[1] = 700
    fresh = FAST(strict=True)
    fresh.set_timesteps(10)
    fresh.timesteps = scheduler.timesteps.clone()
    a, b = (s.step(x, 900, x).prev_sample for s in (scheduler, fresh))
    assert torch.equal(a, b)


# --- Memory that is used again ----------------------------------------------------------------


def test_a_callers_changes_to_a_tensor_end_with_the_tensor() -> None:
    """What clings to the object does not come back with its memory."""
    scheduler = FAST()
    scheduler.set_timesteps(20)
    x, refs = randn(4, 3, 64, 64), []
    for t in scheduler.timesteps[:-1]:
        with torch.no_grad():
            found = scheduler.step(net(x, t), t, x.detach()).prev_sample
        assert not found.requires_grad
        assert found.grad is None
        assert not hasattr(found, "mine")
        refs.append(weakref.ref(found))
        found.mine = int(t)
        found.requires_grad_().sum().backward()
        x = found.detach().clone()
        del found
    scheduler.set_timesteps(20)  # which frees what the steps kept
    assert all(ref() is None for ref in refs)


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "grad": lambda x: x.requires_grad_(),
    "attribute": lambda x: setattr(x, "mine", 3),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_tensor_that_was_marked_is_not_used_again(how: str) -> None:
    spare, first = Spare(), torch.zeros(1, 8)
    spare.keep(first)
    address = first.data_ptr()
    del first
    second = spare.take()
    assert second is not None
    assert second.data_ptr() == address  # as nobody has changed it
    spare.keep(second)
    CHANGES[how](second)
    del second
    assert spare.take() is None


def test_a_shadow_lives_as_long_as_its_tensor() -> None:
    shadows = Shadows()
    half, state = torch.zeros(4, dtype=torch.bfloat16), torch.full((4,), 1e-9)
    half.copy_(state)
    shadows.put(half, state)
    assert shadows.state_of(half) is state
    assert shadows.state_of(half.clone()) is not state
    square = torch.zeros(2, 2, dtype=torch.bfloat16)
    shadows.put(square, torch.zeros(2, 2))
    square.t_()
    assert torch.equal(shadows.state_of(square), torch.zeros(2, 2))
    ref = weakref.ref(state)
    del half, state, square
    assert ref() is None
    assert not shadows._kept
