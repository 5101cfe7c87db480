"""strict=True: attributes, defaults and classes of the originals that a strict step honours."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from fastddim import DDIM
from fastddim.dropins.diffusers import (
    FastDDIMInverseScheduler,
    FastDDIMParallelScheduler,
    FastDDIMScheduler,
)
from fastddim.dropins.diffusers.strict import tables_of
from fastddim.tools.quality import Gaussian
from tests.dropins.strict_cases import (
    MEAN,
    SPACINGS,
    STD,
    Config,
    DDIMInverseScheduler,
    DDIMParallelScheduler,
    DDIMScheduler,
    T,
    exact_model,
    loop,
    original,
    randn,
    schedule_of,
    strict,
)
from tests.refusals import refused


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_strict_inversion_is_the_native_one_for_every_prediction(prediction: str) -> None:
    make: Any = FastDDIMInverseScheduler
    inverse = make(clip_sample=False, strict=True, prediction_type=prediction)
    inverse.set_timesteps(50)
    schedule = schedule_of(inverse)
    exact = Gaussian(MEAN, STD, schedule)
    name: Any = {"v_prediction": "v"}.get(prediction, prediction)
    native = DDIM(50, schedule=schedule, spacing="leading", prediction=name)
    abar = torch.tensor(schedule.alphas_cumprod)

    def model(x: Tensor, t: Any) -> Tensor:
        a = abar[int(t.flatten()[0])]
        y = x.double()
        eps = (1 - a).sqrt() * (y - a.sqrt() * MEAN) / (a * STD**2 + 1 - a)
        x0 = (y - (1 - a).sqrt() * eps) / a.sqrt()
        v = a.sqrt() * eps - (1 - a).sqrt() * x0
        return {"epsilon": eps, "v": v, "sample": x0}[name].float()

    own: Any = DDIMInverseScheduler(clip_sample=False, prediction_type=prediction)
    own.set_timesteps(50)
    x0 = MEAN + STD * randn(4, 1024)
    found, theirs = loop(inverse, x0, model), loop(own, x0, model)
    assert torch.equal(found, native.invert(model, x0))
    truth = exact.flow(x0, -1, int(inverse.timesteps[-1]))
    mine_off, own_off = (float((x - truth).square().mean().sqrt()) for x in (found, theirs))
    assert mine_off == pytest.approx(0.0320, abs=1e-4)
    assert own_off == pytest.approx({"v": 0.0413}.get(name, mine_off), abs=1e-4) or name == "sample"
    assert theirs.isfinite().all() or name == "sample"
    assert inverse.step(model(x0, inverse.timesteps[0]), 0, x0.half()).prev_sample.isfinite().all()


def test_levels_that_users_set_are_read() -> None:
    """Each changed level changes the strict step as it changes the equation."""
    x, output = randn(2, 8), randn(2, 8, seed=1)

    def expected(a_t: float, a_s: float) -> Tensor:
        x0 = (x.double() - (1 - a_t) ** 0.5 * output.double()) / a_t**0.5
        x_s: Tensor = a_s**0.5 * x0 + (1 - a_s) ** 0.5 * output.double()
        return x_s

    def assert_steps(scheduler: Any, t: int, a_t: float, a_s: float) -> None:
        found = scheduler.step(output, t, x).prev_sample.double()
        torch.testing.assert_close(found, expected(a_t, a_s), rtol=2e-6, atol=2e-6)

    scheduler = strict(10)
    own = scheduler.alphas_cumprod.clone()
    a0 = float(own[0])
    assert_steps(scheduler, 0, a0, 1.0)
    for final in (torch.tensor(0.9), 0.9, np.float64(0.9), torch.tensor([0.9])):
        scheduler.final_alpha_cumprod = final
        assert_steps(scheduler, 0, a0, 0.9)
    scheduler.alphas_cumprod = own**2
    assert_steps(scheduler, 900, float(own[900]) ** 2, float(own[800]) ** 2)
    squared = scheduler.alphas_cumprod.tolist()
    between = [squared[799] * w + squared[801] * (1 - w) for w in (0.1, 0.9)]
    scheduler.alphas_cumprod[800] = between[0]
    assert_steps(scheduler, 900, squared[900], between[0])
    scheduler.alphas_cumprod.data[800] = between[1]
    assert_steps(scheduler, 900, squared[900], between[1])
    scheduler.alphas_cumprod = own.double()
    assert_steps(scheduler, 900, float(own[900]), float(own[800]))
    inverse: Any = FastDDIMInverseScheduler(strict=True, clip_sample=False)
    inverse.set_timesteps(10)
    for first in (torch.tensor(0.95), 0.95):
        inverse.initial_alpha_cumprod = first
        assert_steps(inverse, 0, 0.95, a0)
    for name, bad in (("final", 0.0), ("final", 1.5), ("final", math.nan), ("initial", -1.0)):
        s = inverse if name == "initial" else scheduler
        setattr(s, f"{name}_alpha_cumprod", bad)
        refused(partial(s.step, output, 0, x), ValueError, f"{name}_alpha_cumprod", "(0, 1]")
    scheduler.final_alpha_cumprod = 1.0
    scheduler.alphas_cumprod[3] = math.nan
    refused(lambda: scheduler.step(output, 900, x), ValueError, "alphas_cumprod", "nan")


def test_float64_levels_survive_a_move_by_add_noise() -> None:
    scheduler, fresh = strict(10), strict(10)
    x = randn(2, 8)
    scheduler.add_noise(x, x, torch.tensor([3, 4]))
    scheduler.get_velocity(x, x, torch.tensor([3, 4]))
    moved = scheduler.alphas_cumprod
    scheduler.alphas_cumprod = moved.clone()
    scheduler._note_moved(moved)
    assert scheduler._abar() is moved
    a, b = (s.step(x, 900, x).prev_sample for s in (scheduler, fresh))
    assert torch.equal(a, b)
    scheduler.alphas_cumprod.mul_(0.5)
    assert scheduler._abar() is scheduler.alphas_cumprod
    assert not torch.equal(scheduler.step(x, 900, x).prev_sample, a)


@pytest.mark.parametrize("which", ["forwards", "inverse"])
def test_a_default_device_changes_no_strict_step(which: str) -> None:
    make: Any = FastDDIMInverseScheduler if which == "inverse" else FastDDIMScheduler
    x, output = randn(2, 8), randn(2, 8, seed=1)
    plain = make(strict=True)
    plain.set_timesteps(10)
    torch.set_default_device("meta")
    try:
        scheduler = make(strict=True)
        scheduler.set_timesteps(10)
        found = [s.step(output, 900, x).prev_sample for s in (scheduler, plain)]
    finally:
        torch.set_default_device(None)
    expected = plain.step(output, 900, x).prev_sample
    assert all(torch.equal(x_s, expected) for x_s in found)


@pytest.mark.parametrize(
    ("which", "is_strict"),
    [
        ("forwards", False),
        ("inverse", True),
        pytest.param("forwards", True, marks=pytest.mark.slow),
        pytest.param("inverse", False, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_step_equals_the_eager_one(which: str, is_strict: bool) -> None:
    torch.compiler.reset()
    make: Any = FastDDIMInverseScheduler if which == "inverse" else FastDDIMScheduler
    x, output = randn(2, 8), randn(2, 8, seed=1)
    schedulers = [make(strict=is_strict) for _ in range(2)]
    for s in schedulers:
        s.set_timesteps(10)
    compiled = torch.compile(schedulers[0].step, backend="aot_eager", fullgraph=not is_strict)
    for t in (900, 800):
        found, expected = (step(output, t, x) for step in (compiled, schedulers[1].step))
        assert torch.equal(found.prev_sample, expected.prev_sample)
    eager = schedulers[0].step(output, 900, x).prev_sample
    assert torch.equal(eager, schedulers[1].step(output, 900, x).prev_sample)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_the_variance_gives_the_log_probabilities_of_the_steps(spacing: str, eta: float) -> None:
    """ln N(x_s; μ, σ²) from the scheduler's attributes, against the noise that was added."""
    config: Config = {"timestep_spacing": spacing, "set_alpha_to_one": False}
    for make in (FastDDIMScheduler, FastDDIMParallelScheduler):
        scheduler: Any = make(**config, clip_sample=False, strict=True)
        scheduler.set_timesteps(50)
        abar, model = scheduler.alphas_cumprod, exact_model(scheduler)
        x = randn(2, 64)
        for t in scheduler.timesteps:
            s = scheduler.previous_timestep(t)
            z, eps = randn(2, 64, seed=int(t)), model(x, t)
            x_s = scheduler.step(eps, t, x, eta=eta, variance_noise=z).prev_sample
            a_t, a_s = abar[t], abar[s] if s >= 0 else scheduler.final_alpha_cumprod
            sigma = eta * scheduler._get_variance(t, s).sqrt()
            x0 = (x - (1 - a_t).sqrt() * eps) / a_t.sqrt()
            mean = a_s.sqrt() * x0 + (1 - a_s - sigma**2).clamp(min=0).sqrt() * eps
            if s < 0:
                assert sigma == 0  # the last step adds no noise
            else:
                log = (-((x_s - mean) ** 2) / (2 * sigma**2) - sigma.log()).mean()
                exact = (-(z**2) / 2 - sigma.log()).mean()
                assert float(log - exact) == pytest.approx(0, abs=2e-3)
            x = x_s


def test_a_variance_of_another_step_than_strict_takes_is_refused() -> None:
    scheduler = strict(150, timestep_spacing="linspace")
    t, s = scheduler.timesteps[:2].tolist()
    wrong_one = t - T // 150
    assert scheduler.previous_timestep(t) == s != wrong_one
    call = partial(scheduler._get_variance, t, wrong_one)
    refused(call, ValueError, "prev_timestep", str(s), str(wrong_one))
    refused(lambda: scheduler._get_variance(1, 0), ValueError, "timestep", "150", "got 1")
    assert scheduler._get_variance(torch.tensor(t), torch.tensor(s)).shape == ()
    plain = original(150, timestep_spacing="linspace")
    fast: Any = FastDDIMScheduler(timestep_spacing="linspace")
    fast.set_timesteps(150)
    assert torch.equal(fast._get_variance(t, wrong_one), plain._get_variance(t, wrong_one))
    assert fast.previous_timestep(t) == wrong_one
    parallel: Any = FastDDIMParallelScheduler(strict=True, timestep_spacing="linspace")
    parallel.set_timesteps(150)
    both = parallel._batch_get_variance(torch.tensor([t, s]), parallel.timesteps[1:3])
    assert torch.equal(both[0], parallel._get_variance(t))
    make: Any = FastDDIMScheduler
    refused(lambda: make().previous_timestep(3), ValueError, "call set_timesteps first")


def test_the_steps_use_the_last_level_of_a_zero_snr_schedule() -> None:
    scheduler = strict(10, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    table = tables_of(scheduler, 0.0, torch.device("cpu")).table
    assert 0 < scheduler.alphas_cumprod[-1] <= 2.0**-24
    assert float(table[0, 0]) ** 2 == pytest.approx(float(scheduler.alphas_cumprod[-1]), rel=1e-4)
    v = strict(10, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert v.alphas_cumprod[-1] == 0


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' own
def test_subclasses_are_compatible_with_what_they_replace() -> None:
    for own, mine in (
        (DDIMScheduler, FastDDIMScheduler),
        (DDIMParallelScheduler, FastDDIMParallelScheduler),
        (DDIMInverseScheduler, FastDDIMInverseScheduler),
    ):
        made: Any = mine(strict=True)
        assert {own, mine, *own().compatibles} == set(made.compatibles)
        # diffusers' own test of compatible classes checks the same.
        for other in made.compatibles:
            if "dummy" in other.__module__:  # what it needs is not installed
                continue
            config: Any = other.from_config(made.config).config
            again: Any = cast(Any, mine).from_config(config)
            assert again.config.strict is True
            assert again.config.num_train_timesteps == made.config.num_train_timesteps
            assert type(again) is mine
