"""Steps from a timestep for each sample: the same as steps of each sample by itself."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dropins.scheduler_cases import (
    GRID,
    Config,
    assert_identical,
    both,
    gen,
    randn,
)
from tests.dropins.strict_cases import strict
from tests.refusals import refused

LEVELS = [950, 500, 0, 17, 500, 49]
SHAPE = (6, 3, 4, 5)


def alone(scheduler: Any, output: Tensor, t: list[int], x: Tensor, **given: Any) -> list[Tensor]:
    """[x_s, x0], from steps that the scheduler takes from one sample after the other."""
    generators, noise = given.pop("generator", None), given.pop("variance_noise", None)
    found = []
    for i, level in enumerate(t):
        own = {"generator": generators[i]} if generators is not None else {}
        if noise is not None:
            own["variance_noise"] = noise[i : i + 1]
        one = slice(i, i + 1)
        found.append(scheduler.step(output[one], level, x[one], **given, **own))
    return [
        torch.cat([one.prev_sample for one in found]),
        torch.cat([one.pred_original_sample for one in found]),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "config",
    [pytest.param(c, marks=pytest.mark.slow if i % 5 else ()) for i, c in enumerate(GRID[::97])],
    ids=str,
)
@pytest.mark.parametrize("which", ["plain", "parallel"])
def test_each_sample_takes_its_own_step(config: Config, which: str, dtype: torch.dtype) -> None:
    original, fast = both(config, 20, which)
    x, output = randn(*SHAPE).to(dtype), randn(*SHAPE, seed=1).to(dtype)
    for levels in (LEVELS, [-1, 3, -900, 20, 950, 1]):
        t = torch.tensor(levels)
        for given in (
            {},
            {"use_clipped_model_output": True},
            {"eta": 0.7, "variance_noise": randn(*SHAPE, seed=2).to(dtype)},
        ):
            theirs = alone(original, output, levels, x, **given)
            ours = fast.step(output, t.int(), x, **given, return_dict=False)
            for a, b in zip(theirs, ours, strict=True):
                assert_identical(a, b, levels)
            wide = x.to(memory_format=torch.channels_last)
            assert_identical(theirs[0], fast.step(output, t, wide, **given).prev_sample)


def test_each_sample_draws_from_its_own_generator() -> None:
    original, fast = both({"clip_sample": False}, 20)
    x, output = randn(*SHAPE), randn(*SHAPE, seed=1)
    drawn = [[gen(i) for i in range(6)] for _ in range(2)]
    theirs = alone(original, output, LEVELS, x, eta=0.5, generator=drawn[0])
    ours = fast.step(output, torch.tensor(LEVELS), x, eta=0.5, generator=drawn[1])
    assert_identical(theirs[0], ours.prev_sample)
    for a, b in zip(*drawn, strict=True):
        assert torch.equal(a.get_state(), b.get_state())


def test_each_sample_of_an_inverse_takes_its_own_step() -> None:
    original, fast = both({"clip_sample": False, "prediction_type": "v_prediction"}, 20, "inverse")
    x, output = randn(*SHAPE), randn(*SHAPE, seed=1)
    theirs = alone(original, output, LEVELS, x)
    ours = fast.step(output, torch.tensor(LEVELS), x, return_dict=False)
    for a, b in zip(theirs, ours, strict=True):
        assert_identical(a, b)


def test_the_original_fails_with_more_timesteps_than_one() -> None:
    """It takes a tensor of one timestep, and broadcasts the timestep over the batch."""
    original, fast = both({}, 20)
    x, output = randn(*SHAPE), randn(*SHAPE, seed=1)
    with pytest.raises(RuntimeError, match="ambiguous"):
        original.step(output, torch.tensor(LEVELS), x)
    one = torch.tensor([500])
    for batch, dtype in ((1, torch.float32), (6, torch.float32), (1, torch.float16)):
        given = output[:batch].to(dtype), one, x[:batch].to(dtype)
        theirs, ours = (s.step(*given).prev_sample for s in (original, fast))
        assert_identical(theirs, ours)
    for t in (1000, -1001):
        wrong = torch.tensor([t, 0, 0, 0, 0, 0])
        call = partial(fast.step, output, wrong, x)
        refused(call, ValueError, "timesteps must lie in [-1000, 999]", str(t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_strict_sample_takes_its_own_step(dtype: torch.dtype) -> None:
    scheduler = strict(20, timestep_spacing="trailing", prediction_type="v_prediction")
    x, output = randn(*SHAPE).to(dtype), randn(*SHAPE, seed=1).to(dtype)
    levels = scheduler.timesteps[[0, 5, 19, 7, 7, 1]]
    for given in ({}, {"eta": 1.0, "variance_noise": randn(*SHAPE, seed=2).to(dtype)}):
        expected = alone(scheduler, output, levels.tolist(), x, **given)
        found = scheduler.step(output, levels, x, **given, return_dict=False)
        for a, b in zip(expected, found, strict=True):
            assert_identical(a, b)


def test_each_strict_sample_has_the_noise_of_its_seed_and_row() -> None:
    scheduler = strict(20)
    x, output = randn(2, 3, 4), randn(2, 3, 4, seed=1)
    seeds, levels = [5, 8], scheduler.timesteps[[3, 11]]
    scheduler.use_seeds(seeds)
    together = scheduler.step(output, levels, x, eta=1.0).prev_sample
    for i, seed in enumerate(seeds):
        scheduler.use_seeds([seed])
        one = slice(i, i + 1)
        assert_identical(
            scheduler.step(output[one], levels[i], x[one], eta=1.0).prev_sample, together[one]
        )


def test_strict_refuses_a_timestep_of_no_step() -> None:
    scheduler = strict(20)
    x = randn(2, 3, 4)
    named = "timestep must hold values that set_timesteps has chosen"
    refused(lambda: scheduler.step(x, torch.tensor([950, 17]), x), ValueError, named, "got 17")
    scheduler.timesteps = torch.tensor([980, 500, 500, 0])
    refused(lambda: scheduler.step(x, torch.tensor([980, 500]), x), ValueError, named, "2 times")


@pytest.mark.gpu
@pytest.mark.parametrize("strictly", [False, True])
def test_each_sample_on_a_gpu(strictly: bool) -> None:
    scheduler = strict(20) if strictly else both({}, 20)[1]
    x, output = randn(*SHAPE).cuda(), randn(*SHAPE, seed=1).cuda()
    levels = torch.tensor([950, 500, 0, 5000, 500, -5000])
    found = scheduler.step(output, levels.cuda(), x).prev_sample
    assert found[[3, 5]].isnan().all()
    for i in (0, 1, 2, 4):
        one = slice(i, i + 1)
        expected = scheduler.step(output[one], int(levels[i]), x[one]).prev_sample
        assert torch.equal(expected, found[one])
