"""Schedulers inside torch.compile: one graph, eager bits, and no compilation for each step."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor

pytest.importorskip("diffusers")

from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from torch._dynamo.testing import CompileCounterWithBackend

from fastddim.dropins.diffusers import (
    FastDDIMInverseScheduler,
    FastDDIMParallelScheduler,
    FastDDIMScheduler,
    FastDDPMScheduler,
    FastDPMSolverMultistepScheduler,
    FastEulerAncestralDiscreteScheduler,
    FastFlowMatchEulerDiscreteScheduler,
)
from tests.dropins.scheduler_cases import randn

# torch imports its compiler, of which a part is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """Nothing compiled by another test is left to be found."""
    torch.compiler.reset()


def step(scheduler: Any, output: Tensor, t: Any, x: Tensor, z: Tensor) -> Tensor:
    found: Tensor = scheduler.step(output, t, x).prev_sample
    return found


def noisy(scheduler: Any, output: Tensor, t: Any, x: Tensor, z: Tensor) -> Tensor:
    found: Tensor = scheduler.step(output, t, x, eta=0.7, variance_noise=z).prev_sample
    return found


def scaled(scheduler: Any, output: Tensor, t: Any, x: Tensor, z: Tensor) -> Tensor:
    return step(scheduler, scheduler.scale_model_input(output, t), t, x, z)


def ddim(**config: Any) -> Callable[[], Any]:
    return lambda: FastDDIMScheduler(**config)


CASES: dict[str, tuple[Any, Any, Any]] = {
    "default": (ddim(), noisy, DDIMScheduler),
    "strict": (ddim(strict=True), noisy, None),
    "thresholding": (
        ddim(thresholding=True),
        step,
        lambda: DDIMScheduler(thresholding=True),
    ),
    "inverse": (
        lambda: FastDDIMInverseScheduler(strict=True, prediction_type="v_prediction"),
        step,
        None,
    ),
    "parallel": (FastDDIMParallelScheduler, step, None),
    "ddpm": (FastDDPMScheduler, step, DDPMScheduler),
    "flow": (FastFlowMatchEulerDiscreteScheduler, step, FlowMatchEulerDiscreteScheduler),
    "flow, stochastic": (
        lambda: FastFlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        step,
        None,
    ),
    "ancestral": (FastEulerAncestralDiscreteScheduler, scaled, None),
    "ancestral, v": (
        lambda: FastEulerAncestralDiscreteScheduler(prediction_type="v_prediction"),
        scaled,
        None,
    ),
    "multistep": (FastDPMSolverMultistepScheduler, step, None),
    "multistep, sde": (
        lambda: FastDPMSolverMultistepScheduler(
            algorithm_type="sde-dpmsolver++", thresholding=True
        ),
        step,
        None,
    ),
}


def run(take: Any, scheduler: Any, steps: int, as_tensors: bool) -> Tensor:
    """Returns the last state of a loop, whose noise depends on the timestep alone."""
    scheduler.set_timesteps(steps)
    x = randn(2, 3, 5)
    for i, t in enumerate(scheduler.timesteps if as_tensors else scheduler.timesteps.tolist()):
        torch.manual_seed(i)
        x = take(scheduler, 0.3 * x + 0.1, t, x, randn(2, 3, 5, seed=i))
    return x


FAST = {"default": True, "strict": False, "ddpm": True, "flow": False, "multistep": True}
"""The unmarked cases, and whether their timesteps are tensors."""


def cases(names: Any, fast: Any) -> list[Any]:
    """Returns the names or pairs as parameters, those that are not in ``fast`` marked slow."""
    return [pytest.param(*each, marks=[] if each in fast else pytest.mark.slow) for each in names]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("name", "as_tensors"),
    cases([(name, tensors) for name in CASES for tensors in (True, False)], [*FAST.items()]),
)
def test_a_loop_is_the_eager_one_and_compiles_once(name: str, as_tensors: bool) -> None:
    make, take, original = CASES[name]
    counter = CompileCounterWithBackend("aot_eager" if name == "default" else "eager")
    compiled = torch.compile(take, backend=counter, fullgraph=True)
    found, expected = make(), run(take, (original or make)(), 6, as_tensors)
    assert torch.equal(run(compiled, found, 6, as_tensors), expected)
    # A number is compiled as a constant, then as a variable; multistep has 0, 1 or 2 states before.
    counted = counter.frame_count
    assert counted <= (4 if name.startswith("multistep") else 1 if as_tensors else 3)
    assert torch.equal(run(compiled, found, 6, as_tensors), expected)
    assert counter.frame_count == counted


@pytest.mark.parametrize("name", cases([(name,) for name in FAST], [("default",), ("flow",)]))
def test_other_timesteps_reach_a_compiled_step(name: str) -> None:
    make, take, _ = CASES[name]
    counter = CompileCounterWithBackend("eager")
    compiled, found = torch.compile(take, backend=counter, fullgraph=True), make()
    run(compiled, found, 4, True)
    before = counter.frame_count
    config = {"timestep_spacing": "trailing"} if name in ("default", "strict") else {}
    found.register_to_config(**config)
    other = make()
    other.register_to_config(**config)
    assert torch.equal(run(compiled, found, 4, True), run(take, other, 4, True))
    assert counter.frame_count - before <= bool(config)
    for copied in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert torch.equal(run(take, copied, 4, True), run(take, other, 4, True))


def test_a_replaced_schedule_reaches_a_compiled_step() -> None:
    scheduler, x = FastDDIMScheduler(strict=True), randn(2, 3, 5)
    scheduler.set_timesteps(10)
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    changes = {
        "num_inference_steps": 10,
        "alphas_cumprod": scheduler.alphas_cumprod * 0.9,
        "timesteps": torch.tensor([700, 300, 100]),
    }
    for name, value in changes.items():
        setattr(scheduler, name, value)
        for t in scheduler.timesteps[:2]:
            found = compiled(scheduler, 0.3 * x, t, x, x)
            assert torch.equal(found, step(scheduler, 0.3 * x, t, x, x))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("is_strict", [True, False])
def test_eta_may_change_from_step_to_step(is_strict: bool) -> None:
    scheduler, x = FastDDIMScheduler(strict=is_strict), randn(2, 3, 5)
    scheduler.set_timesteps(10)

    def take(t: Tensor, eta: float) -> Tensor:
        found: Tensor = scheduler.step(x, t, x, eta=eta, variance_noise=-x).prev_sample
        return found

    compiled = torch.compile(take, backend="eager", fullgraph=True)
    for t, eta in zip(scheduler.timesteps, (0.5, 0.7, 1.0, 0.0, 0.7), strict=False):
        assert torch.equal(compiled(t, eta), take(t, eta))


def test_a_replaced_schedule_reaches_the_steps_of_every_eta() -> None:
    """The steps of two η have tables of their own, behind the same tensors."""
    scheduler, x = FastDDIMScheduler(), randn(2, 3, 5)
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[3]
    takes = [(torch.compile(take, backend="eager", fullgraph=True), take) for take in (step, noisy)]
    for _ in range(2):
        for compiled, take in (*takes, takes[0]):
            found = compiled(scheduler, 0.3 * x, t, x, x)
            assert torch.equal(found, take(scheduler, 0.3 * x, t, x, x))
        scheduler.alphas_cumprod = scheduler.alphas_cumprod * 0.95


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_equal_the_original(dtype: torch.dtype) -> None:
    found, original = FastDDIMScheduler(clip_sample=False), DDIMScheduler(clip_sample=False)
    for scheduler in (found, original):
        scheduler.set_timesteps(10)
    compiled = torch.compile(noisy, backend="eager", fullgraph=True)
    x, z = randn(2, 3, 5).to(dtype), randn(2, 3, 5, seed=1).to(dtype)
    for t in (500, 0):
        x_s = compiled(found, 0.3 * x, torch.tensor(t), x, z)
        assert x_s.dtype == dtype
        assert torch.equal(x_s, noisy(original, 0.3 * x, t, x, z))


@pytest.mark.parametrize("is_strict", [True, False])
def test_samples_at_their_own_timesteps(is_strict: bool) -> None:
    scheduler = FastDDIMParallelScheduler(strict=is_strict)
    scheduler.set_timesteps(10)
    compiled: Any = torch.compile(scheduler.batch_step_no_noise, backend="eager", fullgraph=True)
    x = randn(3, 2, 5)
    for t in (scheduler.timesteps[[1, 3, 9]], scheduler.timesteps[[2, 2, 0]]):
        assert torch.equal(compiled(0.3 * x, t, x), scheduler.batch_step_no_noise(0.3 * x, t, x))


@pytest.mark.parametrize("given", [{}, {"eta": 0.5, "variance_noise": randn(3, 2, 5)}], ids=[0, 1])
@pytest.mark.parametrize("is_strict", [True, False])
def test_a_step_from_a_timestep_for_each_sample(is_strict: bool, given: dict[str, Any]) -> None:
    scheduler: Any = FastDDIMScheduler(strict=is_strict)
    scheduler.set_timesteps(10)
    compiled: Any = torch.compile(scheduler.step, backend="eager", fullgraph=True)
    x = randn(3, 2, 5)
    for t in (scheduler.timesteps[[1, 3, 9]], scheduler.timesteps[[2, 2, 0]]):
        found = compiled(0.3 * x, t, x, return_dict=False, **given)
        expected = scheduler.step(0.3 * x, t, x, return_dict=False, **given)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_seeds_keep_the_op() -> None:
    scheduler, x = FastDDIMScheduler(strict=True), randn(2, 3, 5)
    scheduler.set_timesteps(10)
    scheduler.use_seeds([3, 2**40])
    seen: list[Any] = []

    def listing(module: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(node.target for node in module.graph.nodes)
        return module

    compiled = torch.compile(seeded, backend=listing, fullgraph=True)
    t = scheduler.timesteps[3]
    assert torch.equal(compiled(scheduler, 0.3 * x, t, x), seeded(scheduler, 0.3 * x, t, x))
    assert torch.ops.fastddim.ddim_step.default in seen


def seeded(scheduler: Any, output: Tensor, t: Any, x: Tensor) -> Tensor:
    found: Tensor = scheduler.step(output, t, x, eta=1.0).prev_sample
    return found


def test_a_timestep_that_is_not_chosen_gives_nan() -> None:
    x = randn(2, 3, 5)
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    for make in (ddim(strict=True), FastDDPMScheduler):
        scheduler = make()
        scheduler.set_timesteps(10)
        assert compiled(scheduler, x, torch.tensor(17), x, x).isnan().all()


def test_a_step_that_cannot_be_traced_runs_behind_a_break() -> None:
    """Generators, and half precision samples of strict steps, whose float32 state is remembered."""
    scheduler = FastDDIMScheduler(strict=True)
    scheduler.set_timesteps(5)

    def drawn(output: Tensor, t: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
        found: Tensor = scheduler.step(output, t, x, eta=1.0, generator=generator).prev_sample
        return found

    t, generator = scheduler.timesteps[1], torch.Generator()
    for dtype in (torch.float32, torch.float16):
        x = randn(2, 3, 5).to(dtype)
        takes: list[Any] = [torch.compile(drawn, backend="eager"), drawn]
        found = [take(0.3 * x, t, x, generator.manual_seed(7)) for take in takes]
        assert torch.equal(*found)


def test_a_compiled_step_refuses_as_the_eager_step_does() -> None:
    scheduler, x = FastDDIMScheduler(strict=True), randn(2, 3, 5)
    scheduler.set_timesteps(10)

    def wild(x: Tensor, t: Tensor) -> Tensor:
        found: Tensor = scheduler.step(x, t, x, eta=50.0, variance_noise=x).prev_sample
        return found

    compiled: Any = torch.compile(wild, backend="eager")
    with pytest.raises(ValueError, match=r"eta must be at most 1\.000427 for these steps"):
        compiled(x, scheduler.timesteps[3])


@pytest.mark.parametrize(
    "name", cases([(n,) for n in ("flow", "ancestral", "multistep")], [("flow",)])
)
def test_eager_steps_may_follow_compiled_ones(name: str) -> None:
    """A compiled step leaves ``step_index`` behind, and the eager one after it finds its own."""
    make, take, _ = CASES[name]
    compiled, found = torch.compile(take, backend="eager", fullgraph=True), make()
    found.set_begin_index(0)
    turns = iter([compiled, compiled, take, take, compiled, take])

    def either(*given: Any) -> Any:
        return next(turns)(*given)

    assert torch.equal(run(either, found, 6, True), run(take, make(), 6, True))
    found.set_begin_index(0)
    assert torch.equal(run(take, found, 6, True), run(take, make(), 6, True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "strict", "ddpm", "inverse", "ancestral, v"])
def test_inductor_equals_eager(name: str) -> None:
    """The step is additions, products and divisions, which Inductor does not contract on a CPU."""
    make, take, original = CASES[name]
    compiled = torch.compile(take, fullgraph=True)
    if name in ("ddpm", "ancestral, v"):  # Inductor draws other normals than eager PyTorch.
        inductor.fallback_random = True
    try:
        expected = run(take, (original or make)(), 6, True)
        assert torch.equal(run(compiled, make(), 6, True), expected)
    finally:
        inductor.fallback_random = False


@pytest.mark.slow
@pytest.mark.parametrize("as_tensors", [True, False])
@pytest.mark.parametrize("is_strict", [True, False])
def test_inductor_unrolls_a_loop_into_eager_bits(as_tensors: bool, is_strict: bool) -> None:
    scheduler = FastDDIMScheduler(strict=is_strict)
    scheduler.set_timesteps(10)
    numbers = scheduler.timesteps.tolist()

    def loop(x: Tensor) -> Tensor:
        for t in scheduler.timesteps if as_tensors else numbers:
            x = scheduler.step(0.3 * x, t, x).prev_sample
        return x

    compiled = torch.compile(loop, fullgraph=True)
    for shape in ((1, 16, 7), (4, 3, 32, 32)):
        assert torch.equal(compiled(randn(*shape)), loop(randn(*shape)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["default", "strict", "flow", "ancestral, v", "multistep"])
def test_on_a_gpu_a_compiled_loop_is_near_the_eager_one(name: str) -> None:
    make, take, _ = CASES[name]

    def last(take: Any) -> Tensor:
        scheduler = make()
        scheduler.set_timesteps(6, device="cuda")
        x = randn(2, 3, 5).cuda()
        for t in scheduler.timesteps:
            x = take(scheduler, 0.3 * x + 0.1, t, x, randn(2, 3, 5, seed=1).cuda())
        return x

    torch.manual_seed(0)
    expected = last(take)
    torch.manual_seed(0)
    inductor.fallback_random = True
    try:
        found = last(torch.compile(take, fullgraph=True))
    finally:
        inductor.fallback_random = False
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
