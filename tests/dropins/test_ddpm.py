"""Whole loops of diffusers' DDPM scheduler beside the drop-in's: every state and every draw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dropins.ddpm_cases import (
    ACTIONS,
    BETAS,
    FAST,
    FIXED,
    GRID,
    LEARNED,
    ORIGINAL,
    POLICY,
    both,
    exact,
    fused,
)
from tests.dropins.scheduler_cases import (
    BOUNDS,
    SHAPE,
    Config,
    assert_identical,
    assert_same_loops,
    gen,
    loop,
    model,
    randn,
)
from tests.paths import CPU, use


def assert_same(config: Config, x: Tensor, seed: Any = 3, every: int = 1, **chosen: Any) -> None:
    """Compares whole loops whose drop-in never takes the original's own step."""
    original, fast = fused(config, **chosen)
    assert_same_loops(original, fast, x, seed=seed, every=every)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("start", range(4))
def test_loops_are_bit_identical(start: int) -> None:
    for config, chosen in GRID[start::463]:
        assert_same(config, randn(*SHAPE), **chosen)


@pytest.mark.slow
def test_more_loops_are_bit_identical() -> None:
    for config, chosen in GRID[5::41]:
        assert_same(config, randn(*SHAPE), **chosen)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("bound", BOUNDS)
def test_each_backend_is_bit_identical(backend: str, prediction: str, bound: Config) -> None:
    with use(backend):
        config = {"prediction_type": prediction, **bound}
        assert_same(config, randn(*SHAPE), num_inference_steps=10)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("variance", FIXED)
@pytest.mark.parametrize("S", [50, 1000])
def test_long_loops_are_bit_identical(variance: str, S: int) -> None:
    assert_same({"variance_type": variance}, randn(1, 3, 8, 8), num_inference_steps=S)


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("seed", [None, 5, [1]])
def test_a_policys_loops_are_bit_identical(prediction: str, seed: Any) -> None:
    for S in (10, 100):
        config = {**POLICY, "prediction_type": prediction}
        assert_same(config, randn(*ACTIONS), seed, num_inference_steps=S)


def test_a_list_of_generators_draws_as_the_original() -> None:
    assert_same({}, randn(*SHAPE), [4, 5], num_inference_steps=10)


def test_states_of_any_layout_are_bit_identical() -> None:
    x = randn(3, 8, 6, 4)
    assert_same({}, x.to(memory_format=torch.channels_last), num_inference_steps=10)
    assert_same({}, x.transpose(1, 2), num_inference_steps=10)
    assert_same({}, x[:, ::2], num_inference_steps=10)
    assert_same({}, x[:, 0, 0], num_inference_steps=10)


def test_a_large_state_is_bit_identical() -> None:
    assert_same(BOUNDS[3], randn(2, 3, 96, 96), num_inference_steps=6)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("variance", FIXED)
@pytest.mark.parametrize(
    "chosen", [{"num_inference_steps": 93}, pytest.param({}, marks=pytest.mark.slow)]
)
def test_factors_are_those_of_each_step(
    betas: Config, zero: bool, variance: str, chosen: Config
) -> None:
    """Vector instructions round all timesteps at once as the original rounds each alone."""
    config = {**betas, "rescale_betas_zero_snr": zero, "variance_type": variance}
    original, fast = both(config, **chosen)
    of = fast._chosen() if chosen else None
    made = fast._made(of)
    assert made is not None
    for t in original.timesteps.tolist():
        row, s = made.table[fast._place(of, t)], int(original.previous_timestep(t))
        at = original.alphas_cumprod[t]
        at_prev = original.alphas_cumprod[s] if s >= 0 else original.one
        beta = 1 - at / at_prev
        assert_identical(row[4], (at_prev**0.5 * beta) / (1 - at))
        assert_identical(row[6], (at / at_prev) ** 0.5 * (1 - at_prev) / (1 - at))
        if t > 0:
            sigma = original._get_variance(t)
            assert_identical(row[5], sigma if variance == FIXED[1] else sigma**0.5)
        else:
            assert row[5] == 0


def test_without_chosen_timesteps_a_step_is_one_level() -> None:
    for config in ({}, {"num_train_timesteps": 60, "beta_schedule": "squaredcos_cap_v2"}):
        original, fast = fused(config)
        assert_same_loops(original, fast, randn(*SHAPE), seed=1)


def test_timesteps_may_be_taken_in_any_order() -> None:
    original, fast = fused({}, num_inference_steps=25)
    x = randn(*SHAPE)
    for t in (40, 960, 0, 40, 520, 480, 960):
        states = []
        for scheduler in (original, fast):
            g = gen(t)
            found = scheduler.step(model(x, t), t, x, g, return_dict=False)
            states.append((*found, g.get_state()))
        for a, b in zip(*states, strict=True):
            assert torch.equal(a, b)


def test_a_new_choice_of_timesteps_is_followed() -> None:
    original, fast = fused({}, num_inference_steps=10)
    for S in (10, 20, 10):
        for scheduler in (original, fast):
            scheduler.set_timesteps(S)
        assert_same_loops(original, fast, randn(*SHAPE), seed=S)
    for scheduler in (original, fast):
        scheduler.set_timesteps(timesteps=[900, 10, 3])
    assert_same_loops(original, fast, randn(*SHAPE), seed=1)
    for scheduler in (original, fast):
        scheduler.timesteps = torch.tensor([800, 400, 400, 2])
    assert_same_loops(original, fast, randn(*SHAPE), seed=1)


def test_levels_that_users_set_are_followed() -> None:
    original, fast = fused({}, num_inference_steps=10)
    loop(fast, randn(*SHAPE))
    for scheduler in (original, fast):
        scheduler.alphas_cumprod[500:] *= 0.9
    assert_same_loops(original, fast, randn(*SHAPE), seed=1)
    for scheduler in (original, fast):
        scheduler.variance_type = "fixed_small_log"
    assert_same_loops(original, fast, randn(*SHAPE), seed=1)
    for scheduler in (original, fast):
        scheduler.register_to_config(variance_type="fixed_large")
    assert_same_loops(original, fast, randn(*SHAPE), seed=1)


def test_the_last_step_draws_no_noise() -> None:
    _, fast = fused({}, num_inference_steps=10)
    g, x = gen(), randn(*SHAPE)
    state = g.get_state()
    fast.step(model(x, 0), 0, x, generator=g)
    assert torch.equal(g.get_state(), state)
    fast.step(model(x, 100), 100, x, generator=g)
    assert not torch.equal(g.get_state(), state)


@pytest.mark.parametrize("variance", LEARNED)
def test_a_learned_variance_is_the_originals(variance: str) -> None:
    def net(x: Tensor, t: Any) -> Tensor:
        return torch.cat([model(x, t), model(x.flip(-1), t).abs() * 0.3], dim=1)

    original, fast = both({"variance_type": variance}, num_inference_steps=10)
    assert_same_loops(original, fast, randn(*SHAPE), seed=3, net=net)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_the_originals(dtype: torch.dtype) -> None:
    original, fast = both({}, num_inference_steps=10)
    assert_same_loops(original, fast, randn(*SHAPE).to(dtype), seed=3)


@pytest.mark.parametrize("config", [{}, POLICY, {"prediction_type": "v_prediction"}])
def test_a_loop_is_close_to_that_of_float64(config: Config) -> None:
    scheduler, x = FAST(**config), randn(*SHAPE)
    scheduler.set_timesteps(50)
    last = loop(scheduler, x, generator=gen(3))[-2]
    truth = exact(config, 50, x, 3)
    assert (last - truth).abs().max() < 1e-5 * max(1.0, float(truth.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("config", [{}, POLICY, BOUNDS[3], {"prediction_type": "v_prediction"}])
def test_on_a_gpu_a_loop_is_that_of_a_cpu(config: Config) -> None:
    ends = []
    for device in ("cpu", "cuda"):
        scheduler = FAST(**config)
        scheduler.set_timesteps(12, device=device)
        ends.append(loop(scheduler, randn(*SHAPE).to(device), generator=gen(5))[-2].cpu())
    assert (ends[0] - ends[1]).abs().max() <= 1e-5 * ends[0].abs().max()


def test_the_class_named_is_the_one_of_diffusers() -> None:
    assert issubclass(FAST, ORIGINAL)
    assert FAST.__module__ == "fastddim.dropins.diffusers"
