"""Where the original differentiates, ours gives the same derivative or refuses in one line."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastddim import DDIM, ddim_step
from fastddim.dropins import compvis, ermongroup, guided
from fastddim.dropins.diffusers import (
    FastDDIMInverseScheduler,
    FastDDIMParallelScheduler,
    FastDDIMScheduler,
)
from tests.refusals import refused

diffusers: Any = importlib.import_module("diffusers")
PAIRS: dict[str, tuple[Any, Any]] = {
    "plain": (diffusers.DDIMScheduler, FastDDIMScheduler),
    "parallel": (diffusers.DDIMParallelScheduler, FastDDIMParallelScheduler),
    "inverse": (diffusers.DDIMInverseScheduler, FastDDIMInverseScheduler),
}
# Forward-mode differentiation makes torch itself compile some of its rules with torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
SHAPE = (2, 3, 4, 5)
unpack_dual: Any = forward_ad.unpack_dual
dual_level: Any = forward_ad.dual_level  # without their types
make_dual: Any = forward_ad.make_dual
TABLE = torch.tensor(DDIM(50, eta=1.0).table)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, OUTPUT, TANGENT = (randn(*SHAPE, seed=k) for k in range(3))
BOTH = torch.cat([OUTPUT, X])


def stepped(scheduler: Any, x: Tensor) -> Tensor:
    found: Tensor = scheduler.step(0.5 * x.sin(), 500, x).prev_sample
    return found


def forwards(f: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
    """(f(x), its derivative along TANGENT), by a dual level alone."""
    with dual_level():
        dual = make_dual(x, TANGENT)
        return list(unpack_dual(f(dual)))


HOW: dict[str, Callable[[Callable[[Tensor], Any], Tensor], Any]] = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (TANGENT,)),
    "dual level": forwards,
    "vmap": lambda f, x: [torch.func.vmap(f)(torch.stack([x, 2 * x]))],
    "grad": lambda f, x: [torch.func.grad(lambda x: f(x).square().sum())(x)],
    "jacfwd": lambda f, x: [torch.func.jacfwd(lambda a: f(a * x))(torch.ones(()))],
    "hessian": lambda f, x: [torch.func.hessian(lambda a: f(a * x).sum())(torch.ones(()))],
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("which", PAIRS)
def test_derivatives_of_every_kind_are_the_originals(which: str, how: str) -> None:
    original, fast = (cls(clip_sample_range=0.9) for cls in PAIRS[which])
    for s in (original, fast):
        s.set_timesteps(10)
    before = stepped(fast, X).clone()
    for _ in range(2):
        found, expected = (HOW[how](partial(stepped, s), X) for s in (fast, original))
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
            assert b.abs().sum() > 0 or how == "hessian"
    # And the scheduler goes on as before.
    for _ in range(3):
        assert torch.equal(stepped(fast, X), before)
        assert str(stepped(fast, X)).startswith("tensor(")  # and not GradTrackingTensor(


def test_a_batch_at_different_timesteps_has_the_originals_grads() -> None:
    original, fast = (cls() for cls in PAIRS["parallel"])
    t = torch.tensor([900, 20])
    for s in (original, fast):
        s.set_timesteps(10)
    found, expected = (
        torch.func.jvp(lambda x, s=s: s.batch_step_no_noise(0.5 * x.sin(), t, x), (X,), (TANGENT,))
        for s in (fast, original)
    )
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", ["alphas_cumprod", "final_alpha_cumprod"])
@pytest.mark.parametrize("which", ["plain", "inverse"])
def test_a_schedule_that_requires_grad_gets_it(which: str, name: str) -> None:
    if which == "inverse":
        name = name.replace("final", "initial")
    gradients = []
    for s in (cls() for cls in PAIRS[which]):
        s.set_timesteps(10)
        level = (0.99995 * getattr(s, name)).requires_grad_()
        setattr(s, name, level)
        states = [s.step(OUTPUT, t, X).prev_sample for t in (500, 0)]
        torch.stack(states).square().sum().backward()
        gradients.append(level.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0, equal_nan=True)
    assert gradients[0].isfinite().any()


def test_strict_refuses_derivatives_in_one_line() -> None:
    scheduler: Any = FastDDIMScheduler(strict=True)
    inverse: Any = FastDDIMInverseScheduler(strict=True)
    for s in (scheduler, inverse):
        s.set_timesteps(10)
        before = stepped(s, X).clone()
        for how in HOW.values():
            refused(partial(how, partial(stepped, s), X), ValueError, "step with strict=True")
        assert torch.equal(stepped(s, X), before)
        for name in ("alphas_cumprod", s._ends):
            kept = getattr(s, name)
            setattr(s, name, kept.clone().requires_grad_())
            refused(partial(stepped, s, X), ValueError, f"{name} requires grad")
            with torch.no_grad():
                assert torch.equal(stepped(s, X), before)
            setattr(s, name, kept)
    noise = OUTPUT.clone().requires_grad_()
    for named, given in (
        ("variance_noise", {"eta": 1.0, "variance_noise": noise}),
        ("eta", {"eta": torch.tensor(0.5, requires_grad=True)}),
    ):
        call = partial(scheduler.step, OUTPUT, 500, X, **given)
        refused(call, ValueError, f"{named} requires grad")
    parallel: Any = FastDDIMParallelScheduler(strict=True)
    parallel.set_timesteps(10)
    t = torch.tensor([900, 200])
    f = partial(parallel.batch_step_no_noise, OUTPUT, t)
    refused(lambda: torch.func.jvp(f, (X,), (TANGENT,)), ValueError, "batch_step_no_noise")


ARGUMENTS: dict[str, Callable[[Tensor], Any]] = {
    "x": lambda a: ddim_step(a * X, OUTPUT, TABLE, 3),
    "output": lambda a: ddim_step(X, a * OUTPUT, TABLE, 3),
    "table": lambda a: ddim_step(X, OUTPUT, a * TABLE, 3),
    "noise": lambda a: ddim_step(X, OUTPUT, TABLE, 3, noise=a * X),
    "guidance": lambda a: ddim_step(X, BOTH, TABLE, 3, guidance=2 * a),
    "threshold": lambda a: ddim_step(X, OUTPUT, TABLE, 3, threshold=a),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_step_refuses_what_it_would_lose(name: str) -> None:
    f, one = ARGUMENTS[name], torch.ones(())

    def first(a: Tensor) -> Tensor:
        x_s: Tensor = f(a)[0]
        return x_s

    refused(lambda: torch.func.jvp(first, (one,), (one,)), ValueError, f"{name} is transformed")
    refused(lambda: torch.func.vmap(first)(torch.ones(2)), ValueError, f"{name} is transformed")
    with dual_level():
        dual = make_dual(one, one)
        refused(lambda: first(dual), ValueError, f"{name} is transformed")
        assert torch.equal(first(one), f(one)[0])  # which carries nothing
    refused(lambda: first(one.clone().requires_grad_()), ValueError, f"{name} requires grad")


def test_the_loops_of_other_systems_refuse_too() -> None:
    betas = torch.linspace(1e-4, 0.02, 1000)
    net = lambda x, t, *_: 0.5 * x  # noqa: E731
    model = SimpleNamespace(
        num_timesteps=1000, alphas_cumprod=(1 - betas).cumprod(0), apply_model=net
    )
    sampler = compvis.DDIMSampler(model)
    sampler.make_schedule(10)
    diffusion = guided.Diffusion(1000, "ddim20")
    loops: list[Callable[[Tensor], Any]] = [
        lambda x: ermongroup.generalized_steps(x, range(0, 1000, 100), net, betas)[0][-1],
        lambda x: ermongroup.ddpm_steps(x, range(0, 1000, 100), net, betas)[0][-1],
        lambda x: sampler.decode(x, None, 5),
        lambda x: sampler.sample(10, 2, SHAPE[1:], x_T=x)[0],
        lambda x: guided.ddim_sample_loop(diffusion, net, SHAPE, noise=x),
        lambda x: guided.ddim_sample(diffusion, net, x, torch.tensor([3, 4]))["sample"],
        lambda x: guided.p_sample_loop(diffusion, net, SHAPE, noise=x),
        lambda x: guided.p_sample(diffusion, net, x, torch.tensor([3, 4]))["sample"],
    ]
    for loop in loops:
        with pytest.raises(ValueError, match=r"torch.func|requires grad"):
            torch.func.jvp(loop, (X,), (TANGENT,))
        assert loop(X).isfinite().all()


@pytest.mark.parametrize("way", ["jvp", "vmap", "dual level"])
def test_sampling_refuses_transforms_before_the_model_is_asked(way: str) -> None:
    asked: list[int] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        asked.append(1)
        return x.tanh()

    def sampled(x: Tensor) -> Tensor:
        return DDIM(4).sample(model, x)

    ways: dict[str, Callable[[], object]] = {
        "jvp": lambda: torch.func.jvp(sampled, (X,), (TANGENT,)),
        "vmap": lambda: torch.func.vmap(sampled)(torch.stack([X, X])),
        "dual level": lambda: forwards(sampled, X),
    }
    refused(ways[way], ValueError, "sampling", "torch.func")
    assert not asked
