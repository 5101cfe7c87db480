"""diffusers' DDIM schedulers as drop-ins: bit for bit the originals, in every configuration."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastddim import using
from fastddim.dropins.diffusers import (
    FastDDIMParallelScheduler,
)
from tests.dropins.scheduler_cases import (
    DRAWS,
    FAST,
    GRID,
    LAYOUTS,
    PAIRS,
    SHAPE,
    Config,
    assert_identical,
    assert_same_configuration,
    assert_same_loops,
    assert_same_outcome,
    both,
    gen,
    loop,
    model,
    randn,
)
from tests.waiting import no_waiting


@pytest.mark.parametrize("config", GRID[::47], ids=str)
def test_configurations_are_bit_identical(config: Config) -> None:
    assert_same_configuration(*both(config, 7))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(12))
def test_every_configuration_is_bit_identical(part: int) -> None:
    for config in GRID[part::12]:
        assert_same_configuration(*both(config, 7))


def test_the_thin_grid_has_every_value_of_every_option() -> None:
    for option in {name for config in GRID for name in config}:
        every = {str(config.get(option)) for config in GRID}
        assert {str(config.get(option)) for config in GRID[::47]} == every


@pytest.mark.one_in(2)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("which", ["plain", "parallel"])
@pytest.mark.parametrize("draw", DRAWS)
def test_fifty_steps_are_bit_identical(which: str, spacing: str, draw: str) -> None:
    original, fast = both({"timestep_spacing": spacing}, 50, which)
    assert_same_loops(original, fast, randn(*SHAPE), **DRAWS[draw])


@pytest.mark.parametrize("steps", [1, 2, 3, 61, 103, 334, 999, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_any_number_of_steps_is_bit_identical(spacing: str, steps: int) -> None:
    original, fast = both({"timestep_spacing": spacing}, steps)
    assert_same_loops(original, fast, randn(*SHAPE), every=max(1, steps // 9), eta=1.0, seed=2)


def configs(inverse: bool = False) -> st.SearchStrategy[Config]:
    options: dict[str, Any] = {
        "num_train_timesteps": st.sampled_from([2, 10, 333, 1000]),
        "beta_start": st.sampled_from([1e-5, 1e-4, 0.00085]),
        "beta_end": st.sampled_from([0.012, 0.02, 0.3]),
        "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
        "clip_sample": st.booleans(),
        "clip_sample_range": st.sampled_from([1.0, 0.25, 3.7, 0.0, -1.0]),
        "set_alpha_to_one": st.booleans(),
        "steps_offset": st.integers(0, 1),
        "prediction_type": st.sampled_from(["epsilon", "v_prediction", "sample"]),
        "timestep_spacing": st.sampled_from(["leading", "trailing"]),
        "rescale_betas_zero_snr": st.booleans(),
    }
    if not inverse:
        options["timestep_spacing"] = st.sampled_from(["leading", "trailing", "linspace"])
        options["thresholding"] = st.booleans()
        options["dynamic_thresholding_ratio"] = st.floats(0.0, 1.0)
        options["sample_max_value"] = st.sampled_from([0.5, 1.0, 2.0])
    return st.fixed_dictionaries({}, optional=options)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    config=configs(),
    steps=st.integers(1, 1000),
    eta=st.sampled_from([0.0, 0.1, 0.5, 1.0, 1.3, -0.2]),
    rederive=st.booleans(),
    shape=st.lists(st.integers(1, 7), min_size=3, max_size=5),
    special=st.sampled_from([0.0, torch.nan, torch.inf, -torch.inf, 1e30, 1e-40]),
    seed=st.integers(0, 2**31),
)
def test_steps_of_any_kind_are_bit_identical(
    config: Config,
    steps: int,
    eta: float,
    rederive: bool,
    shape: list[int],
    special: float,
    seed: int,
) -> None:
    T = config.get("num_train_timesteps", 1000)
    original, fast = both(config, 1 + steps % T)
    x, output = randn(*shape, seed=seed), randn(*shape, seed=seed + 1)
    x.view(-1)[0] = special
    for t in (original.timesteps[0], original.timesteps[-1]):
        assert_same_outcome(
            lambda s, t: s.step(output, t, x, eta, rederive, gen(seed), return_dict=False),
            original,
            fast,
            t,
        )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(config=configs(inverse=True), steps=st.integers(1, 1000), seed=st.integers(0, 2**31))
def test_inverse_steps_of_any_kind_are_bit_identical(config: Config, steps: int, seed: int) -> None:
    T = config.get("num_train_timesteps", 1000)
    original, fast = both(config, 1 + steps % T, "inverse")
    x, output = randn(*SHAPE, seed=seed), randn(*SHAPE, seed=seed + 1)
    for t in (original.timesteps[0], original.timesteps[-1]):
        assert_same_outcome(lambda s, t: s.step(output, t, x, return_dict=False), original, fast, t)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("one", [True, False])
def test_inversion_is_bit_identical(spacing: str, prediction: str, one: bool) -> None:
    config = {"timestep_spacing": spacing, "prediction_type": prediction, "set_alpha_to_one": one}
    original, fast = both(config, 50, "inverse")
    assert_same_loops(original, fast, randn(*SHAPE))
    original, fast = both({**config, "clip_sample": False, "steps_offset": 1}, 21, "inverse")
    assert_same_loops(original, fast, randn(*SHAPE))


BOUNDED = {"prediction_type": "v_prediction", "thresholding": True}
# The original's quantile takes neither an empty batch nor samples of rank two.
BOTH = [
    *((k, {}) for k in LAYOUTS),
    *((k, BOUNDED) for k in LAYOUTS.keys() - {"empty", "rank two"}),
]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("layout", "config"), sorted(BOTH, key=str))
def test_odd_sizes_and_layouts_are_bit_identical(layout: str, config: Config) -> None:
    x = LAYOUTS[layout](0)
    original, fast = both(config, 10)
    assert_same_loops(original, fast, x, eta=0.5, seed=1)
    assert_same_loops(original, fast, x)


MIXED: dict[str, Callable[[int], Tensor]] = {
    "contiguous": lambda k: randn(3, 4, 6, 5, seed=k),
    "channels_last": LAYOUTS["channels_last"],
    "slice": lambda k: randn(6, 8, 12, 10, seed=k)[::2, ::2, ::2, ::2],
    "expanded": lambda k: randn(1, 4, 6, 5, seed=k).expand(3, -1, -1, -1),
}


@pytest.mark.parametrize(("of_sample", "of_output"), list(itertools.permutations(MIXED, 2)))
def test_mixed_layouts_are_bit_identical(of_sample: str, of_output: str) -> None:
    x, output, z = MIXED[of_sample](1), MIXED[of_output](2), MIXED[of_sample](3)
    for which, (original, fast) in {k: both({}, 10, k) for k in PAIRS}.items():
        given = {} if which == "inverse" else {"eta": 1.0, "variance_noise": z}
        a, b = (s.step(output, 500, x, **given) for s in (original, fast))
        assert_identical(a.prev_sample, b.prev_sample)
        assert_identical(a.pred_original_sample, b.pred_original_sample)


@pytest.mark.parametrize("changed", range(3), ids=["sample", "output", "noise"])
def test_layouts_may_take_turns_on_one_scheduler(changed: int) -> None:
    """The launch of a step serves no next step of which one tensor lies otherwise."""
    original, fast = both({}, 10)
    for others, *two in itertools.product(MIXED, repeat=3):
        for one in two:
            x, output, z = (MIXED[one if k == changed else others](k) for k in range(3))
            a, b = (s.step(output, 500, x, eta=1.0, variance_noise=z) for s in (original, fast))
            assert_identical(a.prev_sample, b.prev_sample)
            assert_identical(a.pred_original_sample, b.pred_original_sample)


def test_without_numba_the_steps_are_the_same() -> None:
    with using("torch"):
        for config in GRID[::211]:
            assert_same_configuration(*both(config, 7))


@pytest.mark.parametrize("which", PAIRS)
def test_the_originals_step_is_not_called(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original, fast = both({}, 10, which)
    given: list[Config] = [
        {} if which == "inverse" else {"eta": 0.5, "generator": gen(1)} for _ in range(2)
    ]
    expected = loop(original, randn(*SHAPE), **given[0])
    monkeypatch.setattr(PAIRS[which][0], "step", None)
    got = loop(fast, randn(*SHAPE), **given[1])
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("of_sample", "of_output"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float64, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("which", PAIRS)
def test_other_dtypes_round_as_the_original_does(
    which: str, of_sample: torch.dtype, of_output: torch.dtype
) -> None:
    original, fast = both({}, 10, which)
    given: Config = {} if which == "inverse" else {"eta": 1.0, "seed": 4}
    x = randn(*SHAPE).to(of_sample)
    assert_same_loops(original, fast, x, net=lambda x, t: model(x, t).to(of_output), **given)


# --- On a GPU ---------------------------------------------------------------------------------

ULPS = 2
"""Eager PyTorch multiplies by the reciprocal of a scalar on a GPU, and the kernel divides."""


def ulps_apart(a: Tensor, b: Tensor) -> float:
    """In units of the last place of the largest value: terms of a sum may cancel."""
    unit = 2.0**-23 * max(1.0, float(b.abs().max()))
    return float((a - b).abs().max()) / unit


@pytest.mark.gpu
@pytest.mark.parametrize("config", GRID[::97], ids=str)
@pytest.mark.parametrize("moved", [False, True])
def test_steps_on_a_gpu(config: Config, moved: bool) -> None:
    original, fast = both(config, 50)
    x, output = randn(*SHAPE).cuda(), randn(*SHAPE, seed=1).cuda()
    if moved:
        for scheduler in (original, fast):
            scheduler.add_noise(x, output, torch.tensor([3, 900]))
        assert fast.alphas_cumprod.is_cuda
    for t in original.timesteps.cuda():
        a, b = (
            s.step(output, t, x, eta=0.5, generator=torch.Generator("cuda").manual_seed(1))
            for s in (original, fast)
        )
        if not a.prev_sample.isfinite().all():
            continue
        assert ulps_apart(b.prev_sample, a.prev_sample) <= ULPS
        assert ulps_apart(b.pred_original_sample, a.pred_original_sample) <= ULPS
        x = a.prev_sample


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("strict", "dtype"),
    [(strict, dtype) for strict in (False, True) for dtype in (torch.float32, torch.bfloat16)],
)
@pytest.mark.parametrize("where", ["timesteps", "elsewhere", "cpu", "int"])
def test_no_step_waits_for_the_gpu(strict: bool, where: str, dtype: torch.dtype) -> None:
    scheduler = FAST(strict=strict)
    scheduler.set_timesteps(20, device="cuda")
    x = randn(*SHAPE).cuda().to(dtype)
    own: dict[str, Any] = {
        "timesteps": list(scheduler.timesteps),
        "elsewhere": list(scheduler.timesteps.clone()),
        "cpu": list(scheduler.timesteps.cpu()),
        "int": scheduler.timesteps.tolist(),
    }
    if strict:
        scheduler.use_seeds([1, 2])
    chosen = own[where]
    generator = torch.Generator("cuda").manual_seed(1)
    given: Config = {"eta": 1.0, "generator": generator}
    x = scheduler.step(x * 0.1, chosen[0], x, **given).prev_sample  # its tables are made
    with no_waiting():
        for t in chosen[1:]:
            x = scheduler.step(x * 0.1, t, x, **given).prev_sample
    assert x.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("strict", [False, True])
def test_noise_of_the_cpus_generator_does_not_wait_for_the_gpu(strict: bool) -> None:
    scheduler = FAST(strict=strict)
    scheduler.set_timesteps(20, device="cuda")
    x, generator, states = randn(*SHAPE).cuda(), torch.Generator().manual_seed(1), []
    first, *rest = scheduler.timesteps
    x = scheduler.step(x * 0.1, first, x, eta=1.0, generator=generator).prev_sample
    with no_waiting():
        for t in rest:
            x = scheduler.step(x * 0.1, t, x, eta=1.0, generator=generator).prev_sample
            states.append(x)
    again, y = FAST(strict=strict), randn(*SHAPE).cuda()
    again.set_timesteps(20)
    noises = torch.Generator().manual_seed(1)
    for t, state in zip(again.timesteps, [None, *states], strict=True):
        z = torch.randn(SHAPE, generator=noises).cuda()
        y = again.step(y * 0.1, t, y, eta=1.0, variance_noise=z).prev_sample
        assert state is None or torch.equal(state, y)


@pytest.mark.gpu
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_batch_step_at_different_timesteps_waits_for_the_gpu(strict: bool, device: str) -> None:
    scheduler: Any = FastDDIMParallelScheduler(strict=strict)
    scheduler.set_timesteps(20, device="cuda")
    x, t = randn(*SHAPE).cuda(), torch.tensor([900, 50], device=device)
    first = scheduler.batch_step_no_noise(x * 0.1, t, x)
    with no_waiting():
        second = scheduler.batch_step_no_noise(x * 0.1, t, x)
    assert torch.equal(first, second)


@pytest.mark.gpu
def test_a_batch_at_different_timesteps_on_a_gpu() -> None:
    original, fast = both({}, 20, "parallel")
    x, output, t = randn(*SHAPE).cuda(), randn(*SHAPE, seed=1).cuda(), torch.tensor([900, 20])
    a, b = (s.batch_step_no_noise(output, t.cuda(), x) for s in (original, fast))
    assert ulps_apart(b, a) <= ULPS
