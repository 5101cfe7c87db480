"""diffusers' DDIM scheduler of CogVideoX beside the drop-in."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastddim.dropins.diffusers import FastCogVideoXDDIMScheduler
from tests.dropins.scheduler_cases import (
    Config,
    assert_identical,
    assert_same_loops,
    assert_same_outcome,
    diffusers,
    gen,
    loop,
    made,
    randn,
    unstepped,
)

FAST: Any = FastCogVideoXDDIMScheduler
VIDEO = (1, 3, 4, 5, 6)
COGVIDEOX: Config = {
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 1.0,
    "clip_sample": False,
}
"""The configuration of CogVideoX-5b."""

BETAS: list[Config] = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": torch.linspace(0.001, 0.03, 400).tolist(), "num_train_timesteps": 400},
]
GRID: list[Config] = [
    {
        "prediction_type": prediction,
        "timestep_spacing": spacing,
        "steps_offset": offset,
        "set_alpha_to_one": one,
        "rescale_betas_zero_snr": zero,
        "snr_shift_scale": shift,
        **betas,
    }
    for prediction, spacing, offset, one, zero, shift, betas in itertools.product(
        ("epsilon", "v_prediction", "sample"),
        ("leading", "trailing", "linspace"),
        (0, 1),
        (True, False),
        (False, True),
        (1.0, 3.0),
        BETAS,
    )
]


def both(config: Config, steps: int) -> tuple[Any, Any]:
    return made((diffusers.CogVideoXDDIMScheduler, FAST), config, num_inference_steps=steps)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "config",
    [pytest.param(c, marks=() if c in GRID[::47] else pytest.mark.slow) for c in GRID],
    ids=str,
)
def test_loops_are_bit_identical(config: Config) -> None:
    for steps in (7, 50):
        original, fast = unstepped(*both(config, steps))
        assert torch.equal(original.alphas_cumprod, fast.alphas_cumprod)
        assert_same_loops(original, fast, randn(*VIDEO))
        wide = randn(2, 4, 5, 6).to(memory_format=torch.channels_last)
        assert_same_loops(original, fast, wide)


def test_the_step_itself_is_the_fused_one() -> None:
    _, fast = unstepped(*both(COGVIDEOX, 50))
    found = loop(fast, randn(*VIDEO))
    assert all(x.isfinite().all() for x in found)
    assert fast._taken(randn(*VIDEO), 999, randn(*VIDEO)) is not None


def test_arguments_without_effect_have_none() -> None:
    original, fast = both(COGVIDEOX, 20)
    assert_same_loops(original, fast, randn(*VIDEO), eta=1.0, use_clipped_model_output=True, seed=3)


@pytest.mark.parametrize("t", [999, 0, -1, -900, 500, torch.tensor(300), torch.tensor([300])])
def test_timesteps_of_any_kind_in_any_order(t: Any) -> None:
    original, fast = both({"set_alpha_to_one": False}, 20)
    x, output = randn(*VIDEO), randn(*VIDEO, seed=1)
    a, b = (s.step(output, t, x) for s in (original, fast))
    assert_identical(a.prev_sample, b.prev_sample)
    assert_identical(a.pred_original_sample, b.pred_original_sample)


def test_other_tensors_and_errors_are_the_originals() -> None:
    original, fast = both(COGVIDEOX, 20)
    x, output = randn(*VIDEO), randn(*VIDEO, seed=1)
    calls: list[Callable[[Any], Any]] = [
        lambda s: s.step(output.double(), 500, x.double(), return_dict=False),
        lambda s: s.step(output.bfloat16(), 500, x.bfloat16(), return_dict=False),
        lambda s: s.step(output, 500, x.bfloat16(), return_dict=False),
        lambda s: s.step(output, 500, x[:, :1], return_dict=False),
        lambda s: s.step(output, 1000, x, return_dict=False),
        lambda s: s.step(output, torch.tensor([1, 2]), x, return_dict=False),
        lambda s: type(s)(**COGVIDEOX).step(output, 500, x, return_dict=False),
    ]
    for call in calls:
        assert_same_outcome(call, original, fast)
    for scheduler in (original, fast):
        scheduler.final_alpha_cumprod = torch.tensor(0.75)  # The original mixes two dtypes.
    assert_same_loops(original, fast, x)


def test_levels_that_users_set_are_followed() -> None:
    original, fast = both(COGVIDEOX, 20)
    x = randn(*VIDEO)
    before = loop(fast, x)[-1]
    for scheduler in (original, fast):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod**1.5
    assert_same_loops(original, fast, x)
    assert not torch.equal(loop(fast, x)[-1], before)
    assert_identical(*(s.add_noise(x, 2 * x, torch.tensor([500])) for s in (original, fast)))


def test_gradients_are_the_originals() -> None:
    original, fast = both(COGVIDEOX, 20)
    found = []
    for scheduler in (original, fast):
        x = randn(*VIDEO).requires_grad_()
        scheduler.step(0.1 * x, 500, x).prev_sample.sum().backward()
        found.append(x.grad)
    assert_identical(*found)


def test_schedulers_are_saved_loaded_copied_and_pickled(tmp_path: Path) -> None:
    original, fast = both(COGVIDEOX, 20)
    x = randn(*VIDEO)
    expected = loop(original, x)[-1]
    loop(fast, x)
    fast.save_pretrained(tmp_path)
    loaded = FAST.from_pretrained(tmp_path)
    loaded.set_timesteps(20)
    made = FAST.from_config(original.config)
    made.set_timesteps(20)
    for again in (loaded, made, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert type(again) is FAST
        assert torch.equal(loop(again, x)[-1], expected)
    back = type(original).from_config(fast.config)
    assert {name: back.config[name] for name in original.config} == dict(original.config)


@pytest.mark.gpu
def test_on_a_gpu_a_loop_is_that_of_a_cpu() -> None:
    _, fast = both(COGVIDEOX, 50)
    x = randn(*VIDEO)
    expected = loop(fast, x)[-1]
    fast.set_timesteps(50, device="cuda")
    found = loop(fast, x.cuda())[-1]
    assert (found.cpu() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_no_noise_is_drawn() -> None:
    _, fast = both(COGVIDEOX, 20)
    generator = gen()
    state = generator.get_state()
    fast.step(randn(*VIDEO), 500, randn(*VIDEO), eta=1.0, generator=generator)
    assert torch.equal(generator.get_state(), state)
