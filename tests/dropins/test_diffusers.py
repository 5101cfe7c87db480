"""diffusers' DDIM schedulers as drop-ins: bit for bit the originals, in every configuration."""

from __future__ import annotations

import copy
import importlib
import inspect
import itertools
import json
import mmap
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastddim import using
from fastddim.dropins.diffusers import (
    FastDDIMInverseScheduler,
    FastDDIMParallelScheduler,
    FastDDIMScheduler,
)
from fastddim.step.on_torch import BLOCK
from tests.waiting import no_waiting

diffusers: Any = importlib.import_module("diffusers")  # without its types
DDIMInverseScheduler = diffusers.DDIMInverseScheduler
DDIMParallelScheduler = diffusers.DDIMParallelScheduler
DDIMScheduler = diffusers.DDIMScheduler
DDPMScheduler = diffusers.DDPMScheduler
EulerDiscreteScheduler = diffusers.EulerDiscreteScheduler
PNDMScheduler = diffusers.PNDMScheduler

ORIGINAL: Any = DDIMScheduler
FAST: Any = FastDDIMScheduler
PAIRS: dict[str, tuple[Any, Any]] = {
    "plain": (DDIMScheduler, FastDDIMScheduler),
    "parallel": (DDIMParallelScheduler, FastDDIMParallelScheduler),
    "inverse": (DDIMInverseScheduler, FastDDIMInverseScheduler),
}
SHAPE = (2, 3, 4, 5)
Config = dict[str, Any]

BOUNDS: list[Config] = [
    {"clip_sample": False},
    {"clip_sample": True},
    {"clip_sample": True, "clip_sample_range": 0.4},
    {"thresholding": True, "sample_max_value": 1.5},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 3.0},
]
GRID: list[Config] = [
    {
        "prediction_type": prediction,
        "timestep_spacing": spacing,
        "steps_offset": offset,
        "set_alpha_to_one": one,
        "rescale_betas_zero_snr": zero,
        "beta_schedule": betas,
        **bound,
    }
    for prediction, spacing, offset, one, zero, betas, bound in itertools.product(
        ("epsilon", "v_prediction", "sample"),
        ("leading", "trailing", "linspace"),
        (0, 1),
        (True, False),
        (False, True),
        ("linear", "scaled_linear", "squaredcos_cap_v2"),
        BOUNDS,
    )
]
"""Every option. Each 47th has every value of each of them: 47 shares no factor with their numbers.
"""


def model(x: Tensor, t: Any) -> Tensor:
    """Nonlinear, bounded, and rounding alike wherever it runs."""
    return 0.8 * x.clamp(-1.5, 1.5) + 1e-3 * (int(t) % 97)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gen(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_identical(a: Any, b: Any, where: object = "") -> None:
    """Equal values, dtype and shape; NaN in the same places."""
    assert (a.dtype, a.shape) == (b.dtype, b.shape), where
    assert torch.equal(a.isnan(), b.isnan()), where
    finite = {"nan": 0.0, "posinf": torch.inf, "neginf": -torch.inf}
    assert torch.equal(a.nan_to_num(**finite), b.nan_to_num(**finite)), where


def both(config: Config, steps: int, which: str = "plain") -> tuple[Any, Any]:
    original, fast = (cls(**config) for cls in PAIRS[which])
    for scheduler in (original, fast):
        scheduler.set_timesteps(steps)
    assert torch.equal(original.timesteps, fast.timesteps)
    return original, fast


def loop(
    scheduler: Any,
    x: Tensor,
    every: int = 1,
    net: Callable[[Tensor, Any], Tensor] = model,
    **arguments: Any,
) -> list[Tensor]:
    """All states and predictions of a loop, over each ``every``-th timestep and the last."""
    chosen = list(scheduler.timesteps)
    results = []
    for t in [*chosen[:-1:every], chosen[-1]]:
        found = scheduler.step(net(x, t), t, x, **arguments)
        results += [found.prev_sample, found.pred_original_sample]
        x = found.prev_sample
    return results


def assert_same_loops(original: Any, fast: Any, x: Tensor, **arguments: Any) -> None:
    """With generators, or seeds of the global one, and what state they are left in."""
    seed = arguments.pop("seed", None)
    results, states = [], []
    for scheduler in (original, fast):
        torch.manual_seed(7)
        if seed is not None:
            drawn: Any = [gen(k) for k in seed] if isinstance(seed, list) else gen(seed)
            arguments["generator"] = drawn
        results.append(loop(scheduler, x, **arguments))
        generators = arguments.get("generator") or []
        listed = generators if isinstance(generators, list) else [generators]
        states.append([torch.get_rng_state(), *(g.get_state() for g in listed)])
    assert len(results[0]) == len(results[1])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert_identical(a, b, f"{('x_s', 'x0')[i % 2]} of step {i // 2}")
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def assert_same_configuration(config: Config) -> None:
    x = randn(*SHAPE)
    every = 3
    original, fast = both(config, 7)
    assert_same_loops(original, fast, x, every=every)
    for scheduler in (original, fast):
        scheduler.set_timesteps(61)
    assert_same_loops(original, fast, x, every=13, eta=0.7, use_clipped_model_output=True, seed=11)


@pytest.mark.parametrize("config", GRID[::47], ids=str)
def test_configurations_are_bit_identical(config: Config) -> None:
    assert_same_configuration(config)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(12))
def test_every_configuration_is_bit_identical(part: int) -> None:
    for config in GRID[part::12]:
        assert_same_configuration(config)


def test_the_thin_grid_has_every_value_of_every_option() -> None:
    for option in {name for config in GRID for name in config}:
        every = {str(config.get(option)) for config in GRID}
        assert {str(config.get(option)) for config in GRID[::47]} == every


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("which", ["plain", "parallel"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"eta": 0.3, "seed": 5},
        {"eta": 1.0, "seed": [4, 9]},
        {"eta": 1.0},
        {"eta": 1.0, "variance_noise": randn(*SHAPE, seed=8), "use_clipped_model_output": True},
    ],
    ids=["ddim", "generator", "generators", "global stream", "variance_noise"],
)
def test_fifty_steps_are_bit_identical(which: str, spacing: str, arguments: Config) -> None:
    original, fast = both({"timestep_spacing": spacing}, 50, which)
    assert_same_loops(original, fast, randn(*SHAPE), **arguments)


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


def outcome(call: Callable[..., Any], *arguments: Any) -> Any:
    """What a call returns, or the kind and the words of its error."""
    try:
        return call(*arguments)
    except Exception as error:
        return type(error), re.sub("<class '.*?'>|FastD", "D", str(error))


def assert_same_outcome(call: Callable[..., Any], original: Any, fast: Any, *more: Any) -> None:
    """The same tensors, or the same error in the same words."""
    a, b = (outcome(call, scheduler, *more) for scheduler in (original, fast))
    if isinstance(a[0], type) or isinstance(b[0], type):
        assert str(a) == str(b)
        return
    for mine, own in zip(a, b, strict=True):
        assert_identical(mine, own)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("one", [True, False])
def test_inversion_is_bit_identical(spacing: str, prediction: str, one: bool) -> None:
    config = {"timestep_spacing": spacing, "prediction_type": prediction, "set_alpha_to_one": one}
    original, fast = both(config, 50, "inverse")
    assert_same_loops(original, fast, randn(*SHAPE))
    original, fast = both({**config, "clip_sample": False, "steps_offset": 1}, 21, "inverse")
    assert_same_loops(original, fast, randn(*SHAPE))


LAYOUTS: dict[str, Callable[[int], Tensor]] = {
    "one": lambda k: randn(1, 1, 1, 1, seed=k),
    "odd": lambda k: randn(1, 3, 5, 7, seed=k),
    "rank two": lambda k: randn(5, 7, seed=k),
    "rank five": lambda k: randn(2, 3, 2, 4, 5, seed=k),
    "empty": lambda k: randn(0, 3, 4, 4, seed=k),
    "channels_last": lambda k: randn(3, 4, 6, 5, seed=k).contiguous(
        memory_format=torch.channels_last
    ),
    "slice": lambda k: randn(4, 5, 6, 9, seed=k)[1:3, 1:4, ::2, 2:],
    "transposed": lambda k: randn(2, 6, 5, 3, seed=k).transpose(1, 3),
    "expanded": lambda k: randn(1, 3, 4, 4, seed=k).expand(3, -1, -1, -1),
    "chunk": lambda k: randn(4, 3, 4, 4, seed=k).chunk(2)[1],
    "large": lambda k: randn(2, 1, 1, BLOCK + 17, seed=k),
}


BOUNDED = {"prediction_type": "v_prediction", "thresholding": True}
# The original's quantile takes neither an empty batch nor samples of rank two.
BOTH = [
    *((k, {}) for k in LAYOUTS),
    *((k, BOUNDED) for k in LAYOUTS.keys() - {"empty", "rank two"}),
]


@pytest.mark.parametrize(("layout", "config"), sorted(BOTH, key=str))
def test_odd_sizes_and_layouts_are_bit_identical(layout: str, config: Config) -> None:
    x = LAYOUTS[layout](0)
    original, fast = both(config, 10)
    assert_same_loops(original, fast, x, eta=0.5, seed=1)
    assert_same_loops(original, fast, x)


@pytest.mark.parametrize(
    ("of_sample", "of_output"),
    list(itertools.permutations(["contiguous", "channels_last", "slice", "expanded"], 2)),
)
def test_mixed_layouts_are_bit_identical(of_sample: str, of_output: str) -> None:
    make: dict[str, Callable[[int], Tensor]] = {
        "contiguous": lambda k: randn(3, 4, 6, 5, seed=k),
        "channels_last": LAYOUTS["channels_last"],
        "slice": lambda k: randn(6, 8, 12, 10, seed=k)[::2, ::2, ::2, ::2],
        "expanded": lambda k: randn(1, 4, 6, 5, seed=k).expand(3, -1, -1, -1),
    }
    x, output, z = make[of_sample](1), make[of_output](2), make[of_sample](3)
    for which, (original, fast) in {k: both({}, 10, k) for k in PAIRS}.items():
        given = {} if which == "inverse" else {"eta": 1.0, "variance_noise": z}
        a, b = (s.step(output, 500, x, **given) for s in (original, fast))
        assert_identical(a.prev_sample, b.prev_sample)
        assert_identical(a.pred_original_sample, b.pred_original_sample)


def test_without_numba_the_steps_are_the_same() -> None:
    with using("torch"):
        for config in GRID[::211]:
            assert_same_configuration(config)


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


def test_unequal_shapes_and_other_kinds_take_the_originals_step() -> None:
    original, fast = both({}, 10)
    x, output = randn(*SHAPE), randn(*SHAPE, seed=1)
    calls: list[Callable[[Any], Any]] = [
        lambda s: s.step(output[:1], 500, x, return_dict=False),
        lambda s: s.step(output, 500, x[:1], return_dict=False),
        lambda s: s.step(output[0, 0, 0], 500, x[0, 0, 0], return_dict=False),
        lambda s: s.step(
            output, 500, x, 0.5, variance_noise=randn(1, 3, 1, 1, seed=2), return_dict=False
        ),
        lambda s: s.step(output, 500, x, 0.5, variance_noise=x.double(), return_dict=False),
        lambda s: s.step(output, torch.tensor([500]), x, return_dict=False),
        lambda s: s.step(output, True, x, return_dict=False),
        lambda s: s.step(1.0, 500, x, return_dict=False),
    ]
    for call in calls:
        assert_same_outcome(call, original, fast)
    eta = torch.tensor(0.5, requires_grad=True)
    for scheduler in (original, fast):
        assert scheduler.step(output, 500, x, eta, generator=gen()).prev_sample.requires_grad
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    assert_same_loops(original, fast, x, eta=0.4, seed=1)


@pytest.mark.parametrize("which", PAIRS)
def test_gradients_are_the_originals(which: str) -> None:
    def gradients(scheduler: Any) -> list[Tensor]:
        x, output, z = (randn(*SHAPE, seed=k).requires_grad_() for k in range(3))
        noisy = {} if which == "inverse" else {"eta": 0.5, "variance_noise": z}
        total = scheduler.step(output, 500, x, **noisy).prev_sample.square().sum()
        total = total + scheduler.step(output.detach(), 500, x).prev_sample.sum()
        total = total + scheduler.step(output, 500, x.detach()).prev_sample.sum()
        if noisy:
            still = (output.detach(), 400, x.detach())
            total = total + scheduler.step(*still, **noisy).prev_sample.sum()
        total.backward()
        return [g for g in (x.grad, output.grad, z.grad) if g is not None]

    original, fast = (gradients(s) for s in both({"clip_sample_range": 0.9}, 10, which))
    assert len(original) == len(fast) == (2 if which == "inverse" else 3)
    assert all(torch.equal(a, b) for a, b in zip(original, fast, strict=True))


def test_a_sample_that_requires_grad_is_fused_under_no_grad(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, fast = both({}, 10)
    x = randn(*SHAPE).requires_grad_()
    expected = original.step(x.detach(), 500, x.detach()).prev_sample
    monkeypatch.setattr(DDIMScheduler, "step", None)
    with torch.no_grad():
        found = fast.step(x, 500, x).prev_sample
    assert torch.equal(found, expected)
    assert not found.requires_grad


@pytest.mark.parametrize("which", PAIRS)
def test_a_timestep_may_be_any_kind_of_integer(which: str) -> None:
    original, fast = both({}, 10, which)
    x, output = randn(*SHAPE), randn(*SHAPE, seed=1)
    expected = original.step(output, 500, x).prev_sample
    index = original.timesteps.tolist().index(500)
    for t in (
        500,
        np.int64(500),
        np.int32(500),
        torch.tensor(500),
        torch.tensor(500, dtype=torch.int32),
        fast.timesteps[index],
        fast.timesteps[index : index + 1][0],
        torch.tensor([500]),
    ):
        assert_identical(fast.step(output, t, x).prev_sample, expected, repr(t))


@pytest.mark.parametrize("which", PAIRS)
def test_timesteps_outside_the_chosen_ones_are_the_originals(which: str) -> None:
    original, fast = both({}, 10, which)
    x, output = randn(*SHAPE), randn(*SHAPE, seed=1)
    for t in (0, 1, 3, 57, 950, 999, -1, -7, -1000, 1000, -1001):
        assert_same_outcome(lambda s, t: s.step(output, t, x, return_dict=False), original, fast, t)


def test_errors_are_the_originals() -> None:
    x = randn(*SHAPE)
    calls: list[Callable[[Any], Any]] = [
        lambda cls: cls().step(x, 500, x),
        lambda cls: cls().set_timesteps(1001),
        lambda cls: cls().set_timesteps(0),
        lambda cls: cls(timestep_spacing="karras").set_timesteps(10),
        lambda cls: cls(beta_schedule="sigmoid"),
        lambda cls: stepped(cls(prediction_type="flow"), x),
        lambda cls: stepped(cls(), x, eta=1.0, generator=gen(), variance_noise=x),
        lambda cls: stepped(cls(), x, eta="hat"),
        lambda cls: stepped(cls(), x, eta=None),
        lambda cls: stepped(cls(), x, eta=None, variance_noise=x),
        lambda cls: stepped(cls(), x, t=1000),
        lambda cls: stepped(cls(), x, t="500"),
        lambda cls: stepped(cls(), x, output=x[:, :2]),
        lambda cls: stepped(cls(), x, eta=1.0, generator=[gen()] * 1 + ["no"]),
    ]
    for call in calls:
        for which in ("plain", "parallel"):
            with pytest.raises(Exception):  # noqa: B017 the same is asked for below
                call(PAIRS[which][0])
            assert_same_outcome(call, *PAIRS[which])


def stepped(scheduler: Any, x: Tensor, t: Any = 500, output: Any = None, **given: Any) -> Any:
    scheduler.set_timesteps(10)
    return scheduler.step(x if output is None else output, t, x, return_dict=False, **given)


@pytest.mark.parametrize("which", PAIRS)
def test_signatures_are_the_originals(which: str) -> None:
    original, fast = PAIRS[which]

    def parameters(function: Any) -> list[tuple[str, Any, Any]]:
        found = inspect.signature(function).parameters.values()
        return [(p.name, p.default, p.kind) for p in found]

    own, mine = parameters(original.__init__), parameters(fast.__init__)
    strict = ("strict", False, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    assert [p for p in mine if p != strict] == own
    assert mine[len(own) - (which == "inverse")] == strict
    for name, method in inspect.getmembers(original, inspect.isfunction):
        if name != "__init__":
            assert parameters(getattr(fast, name)) == parameters(method), name


def test_results_come_as_the_original_gives_them() -> None:
    x = randn(*SHAPE)
    for which in PAIRS:
        original, fast = both({}, 10, which)
        found = fast.step(x, 500, x)
        assert type(found) is type(original.step(x, 500, x))
        assert type(fast.step(x, 500, x, return_dict=False)) is tuple
        assert torch.equal(found[0], found.prev_sample)
        assert torch.equal(found[1], found.pred_original_sample)


@pytest.mark.parametrize("which", list(PAIRS))
def test_result_objects_are_what_the_originals_constructor_makes(which: str) -> None:
    original, fast = both({}, 20, which)
    x, output = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    found, want = fast.step(output, 500, x), original.step(output, 500, x)
    assert type(found) is type(want)
    assert list(found) == list(want) == ["prev_sample", "pred_original_sample"]
    assert found.to_tuple()[0] is found.prev_sample is found["prev_sample"] is found[0]
    assert found.to_tuple()[1] is found.pred_original_sample is found[1]
    assert vars(found).keys() == vars(want).keys()
    found["prev_sample"] = output
    assert found.prev_sample is output
    again = pickle.loads(pickle.dumps(found))
    assert type(again) is type(want)
    assert torch.equal(again.prev_sample, output)


@pytest.mark.parametrize("first", [True, False])
def test_add_noise_changes_no_step(first: bool) -> None:
    original, fast = both({"set_alpha_to_one": False}, 20)
    x, z, t = randn(*SHAPE), randn(*SHAPE, seed=1), torch.tensor([3, 900])
    if not first:
        assert_same_loops(original, fast, x)
    for dtype in (torch.float32, torch.float16):
        a, b = (s.add_noise(x.to(dtype), z.to(dtype), t) for s in (original, fast))
        assert_identical(a, b)
        a, b = (s.get_velocity(x.to(dtype), z.to(dtype), t) for s in (original, fast))
        assert_identical(a, b)
    assert_same_loops(original, fast, x, eta=1.0, seed=2)


@pytest.mark.parametrize("which", PAIRS)
def test_everything_else_is_the_originals(which: str) -> None:
    original, fast = both({"beta_schedule": "squaredcos_cap_v2"}, 20, which)
    x = randn(*SHAPE)
    assert fast.scale_model_input(x, 3) is x
    assert len(fast) == len(original) == 1000
    assert (fast.init_noise_sigma, fast.order) == (original.init_noise_sigma, original.order)
    for name in ("betas", "alphas", "alphas_cumprod", "timesteps"):
        assert torch.equal(getattr(fast, name), getattr(original, name)), name
    assert {k: v for k, v in fast.config.items() if k not in ("strict", "_use_default_values")} == {
        k: v for k, v in original.config.items() if k != "_use_default_values"
    }
    if which != "inverse":
        for t, s in ((500, 450), (0, -1), (999, 3)):
            assert torch.equal(fast._get_variance(t, s), original._get_variance(t, s))
        assert torch.equal(fast._threshold_sample(x), original._threshold_sample(x))
        assert torch.equal(fast.final_alpha_cumprod, original.final_alpha_cumprod)
    assert isinstance(fast, type(original))


@pytest.mark.parametrize("kind", [list, np.array, tuple])
def test_trained_betas(kind: Any) -> None:
    betas = kind(np.linspace(1e-3, 0.05, 100).tolist())
    config = {"trained_betas": betas, "num_train_timesteps": 100, "timestep_spacing": "trailing"}
    original, fast = both(config, 10)
    assert_same_loops(original, fast, randn(*SHAPE), eta=1.0, seed=1)


def test_betas_of_another_number_than_the_timesteps() -> None:
    original, fast = both({"trained_betas": np.linspace(1e-4, 0.05, 1500)}, 20)
    assert_same_loops(original, fast, randn(*SHAPE))


@pytest.mark.parametrize("which", PAIRS)
@pytest.mark.parametrize("strict", [False, True])
def test_saved_and_loaded_both_ways(which: str, strict: bool, tmp_path: Path) -> None:
    original, fast = PAIRS[which]
    config: Config = {
        "num_train_timesteps": 100,
        "trained_betas": [0.001 * (i + 1) for i in range(100)],
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "set_alpha_to_one": False,
        "clip_sample_range": 2.0,
        "rescale_betas_zero_snr": True,
    }
    ours = fast(**config, strict=strict)
    ours.save_pretrained(tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "scheduler_config.json").read_text())
    assert saved["strict"] is strict
    assert saved["_class_name"] == fast.__name__
    again = fast.from_pretrained(tmp_path / "ours")
    assert type(again) is fast
    assert again.config.strict is strict
    theirs = original.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    back = fast.from_pretrained(tmp_path / "theirs")
    # Even by way of the original, which keeps what it does not know.
    assert back.config.strict is strict
    assert fast.from_config(theirs.config).config.strict is strict
    for name, value in config.items():
        assert again.config[name] == theirs.config[name] == back.config[name] == value
    fresh = original(**config)
    for scheduler in (again, theirs, back, fast.from_config(fresh.config)):
        assert torch.equal(scheduler.alphas_cumprod, fresh.alphas_cumprod)
    assert fast.from_config(fresh.config).config.strict is False
    assert fast.from_config(fresh.config, strict=True).config.strict is True


@pytest.mark.parametrize("other", [PNDMScheduler, EulerDiscreteScheduler, DDPMScheduler])
def test_the_configuration_of_another_scheduler(other: Any) -> None:
    stable = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
    }
    if other is DDPMScheduler:
        stable["clip_sample"] = False
    config = other(**stable).config
    original, fast = ORIGINAL.from_config(config), FAST.from_config(config)
    for name in inspect.signature(DDIMScheduler.__init__).parameters:
        if name != "self":
            assert original.config[name] == fast.config[name], name
    for scheduler in (original, fast):
        scheduler.set_timesteps(20)
    assert_same_loops(original, fast, randn(*SHAPE), eta=0.3, seed=1)
    assert type(other.from_config(fast.config)) is other


@pytest.mark.parametrize("which", PAIRS)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda s: pickle.loads(pickle.dumps(s))]
)
def test_a_copy_in_the_middle_of_a_loop_goes_on_alone(
    which: str, strict: bool, copied: Callable[[Any], Any]
) -> None:
    scheduler = PAIRS[which][1](strict=strict)
    scheduler.set_timesteps(10)
    x = randn(*SHAPE)
    first, *rest = scheduler.timesteps
    x = scheduler.step(model(x, first), first, x).prev_sample
    another = copied(scheduler)
    states = {id(s): [x] for s in (scheduler, another)}
    for t in rest:
        for s in (scheduler, another):
            last = states[id(s)][-1]
            states[id(s)].append(s.step(model(last, t), t, last).prev_sample)
    for a, b in zip(*states.values(), strict=True):
        assert torch.equal(a, b)
    another.set_timesteps(5)
    assert len(scheduler.timesteps) == 10
    assert len(pickle.dumps(another)) < 200_000


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("which", PAIRS)
def test_arguments_are_never_written(which: str, strict: bool) -> None:
    scheduler = PAIRS[which][1](strict=strict, **({} if which == "inverse" else BOUNDS[3]))
    scheduler.set_timesteps(10)
    x = randn(*SHAPE)
    for k, t in enumerate(scheduler.timesteps):
        output, z = randn(*SHAPE, seed=k), randn(*SHAPE, seed=k + 50)
        given = [x, output, z]
        before, versions = [a.clone() for a in given], [a._version for a in given]
        noise = {} if which == "inverse" else {"eta": 1.0, "variance_noise": z}
        found = scheduler.step(output, t, x, **noise).prev_sample
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
        assert [a._version for a in given] == versions
        x = found


def held_by(x: Tensor, how: str) -> tuple[Any, Callable[[], Tensor]]:
    """Something that holds x's memory, and a way to read it."""
    if how == "name":
        return x, lambda: x
    if how == "view":
        view = x[1:, :1]
        return view, lambda: view
    if how == "numpy":
        array = x.numpy()
        return array, lambda: torch.from_numpy(array)
    if how == "dlpack":
        other = from_dlpack(x)
        return other, lambda: other
    if how == "detached":
        other = x.detach()
        return other, lambda: other
    storage = x.untyped_storage()
    return storage, lambda: torch.empty(0).set_(storage)


@pytest.mark.parametrize("how", ["name", "view", "numpy", "dlpack", "detached", "storage"])
@pytest.mark.parametrize("which", PAIRS)
@pytest.mark.parametrize("strict", [False, True])
def test_what_a_caller_keeps_never_changes(which: str, strict: bool, how: str) -> None:
    scheduler = PAIRS[which][1](strict=strict)
    kept: list[tuple[Any, Callable[[], Tensor], Tensor]] = []
    for _ in range(2):
        scheduler.set_timesteps(8)
        x = randn(*SHAPE)
        for t in scheduler.timesteps:
            found = scheduler.step(model(x, t), t, x)
            for tensor in (found.prev_sample, found.pred_original_sample):
                holder, read = held_by(tensor, how)
                kept.append((holder, read, read().clone()))
            x = found.prev_sample.clone()
            del found, tensor, holder, read
    for _, read, then in kept:
        assert torch.equal(read(), then)


def test_what_a_backward_pass_keeps_never_changes() -> None:
    scheduler = FAST()
    scheduler.set_timesteps(10)
    x, weight = randn(*SHAPE), torch.ones((), requires_grad=True)
    expected, total = torch.zeros(()), torch.zeros(())
    for t in scheduler.timesteps:
        with torch.no_grad():
            found = scheduler.step(model(x, t), t, x).prev_sample
        expected = expected + found.sum()
        total = total + (weight * found).sum()
        x = randn(*SHAPE, seed=int(t))
        del found
    total.backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected)


def test_what_another_process_reads_never_changes() -> None:
    """It maps the memory by itself: no reference here says so."""
    scheduler = FAST()
    scheduler.set_timesteps(10)
    x = randn(*SHAPE)
    maps = []
    for t in scheduler.timesteps[:-1]:
        found = scheduler.step(model(x, t), t, x).prev_sample
        handle, size = found.share_memory_().untyped_storage()._share_fd_cpu_()
        shared = mmap.mmap(os.dup(handle), size)
        maps.append((shared, shared[:]))
        x = found.clone()
        del found
    for shared, then in maps:
        assert shared[:] == then
        shared.close()


def test_memory_nobody_holds_is_written_again() -> None:
    scheduler = FAST()
    scheduler.set_timesteps(20)
    x = randn(4, 3, 64, 64)
    addresses = []
    for t in scheduler.timesteps[:-1]:
        x = scheduler.step(model(x, t), t, x).prev_sample
        addresses.append(x.data_ptr())
    assert len(set(addresses[2:])) <= 3
    x = scheduler.step(x, scheduler.timesteps[-1], x).prev_sample.clone()
    assert scheduler._own.states.take() is scheduler._own.x0s.take() is None


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("which", PAIRS)
def test_inference_mode_and_out_of_it(which: str, strict: bool) -> None:
    def results(first: bool, then: bool) -> list[Tensor]:
        x = randn(*SHAPE)
        with torch.inference_mode(first):
            scheduler = PAIRS[which][1](strict=strict)
            scheduler.set_timesteps(10)
            found = loop(scheduler, x, every=3)[:-4]
        with torch.inference_mode(then):
            more = loop(scheduler, x, every=3)
        assert all(a.is_inference() == then for a in more)
        return [*found, *more]

    expected = results(False, False)
    for first, then in ((True, True), (True, False), (False, True)):
        for a, b in zip(expected, results(first, then), strict=True):
            assert torch.equal(a, b)


def test_a_step_follows_what_the_scheduler_is_changed_to() -> None:
    original, fast = both({}, 10)
    x, output = randn(*SHAPE), randn(*SHAPE, seed=1)

    def halve_in_place(s: Any) -> None:
        s.alphas_cumprod[:500] *= 0.5

    changes: list[Callable[[Any], Any]] = [
        lambda s: s.set_timesteps(25),
        lambda s: setattr(s, "num_inference_steps", 4),
        lambda s: setattr(s, "final_alpha_cumprod", torch.tensor(0.9)),
        halve_in_place,
        lambda s: setattr(s, "alphas_cumprod", s.alphas_cumprod**2),
        lambda s: s.final_alpha_cumprod.mul_(0.5),
        lambda s: s.register_to_config(prediction_type="v_prediction"),
        lambda s: s.register_to_config(clip_sample=False),
        lambda s: s.register_to_config(thresholding=True),
        lambda s: s.register_to_config(num_train_timesteps=500),
    ]
    before = fast.step(output, 0, x).prev_sample
    for change in changes:
        for t in (0, 77, 480):
            for scheduler in (original, fast):
                if t == 0:
                    change(scheduler)
            assert_same_outcome(
                lambda s, t: s.step(output, t, x, eta=0.5, generator=gen(), return_dict=False),
                original,
                fast,
                t,
            )
    assert not torch.equal(fast.step(output, 0, x).prev_sample, before)


@pytest.mark.parametrize("config", GRID[::97], ids=str)
def test_a_batch_at_different_timesteps_is_bit_identical(config: Config) -> None:
    original, fast = both(config, 20, "parallel")
    x, output = randn(6, 3, 4, 5), randn(6, 3, 4, 5, seed=1)
    for levels in ([999, 500, 0, 17, 500, 49], [0] * 6, [-1, 3, -900, 20, 950, 1]):
        for rederive in (False, True):
            a, b = (
                s.batch_step_no_noise(
                    output, torch.tensor(levels), x, use_clipped_model_output=rederive
                )
                for s in (original, fast)
            )
            assert_identical(a, b, levels)


def test_a_batch_of_another_kind_is_the_originals() -> None:
    original, fast = both({}, 20, "parallel")
    x, t = randn(*SHAPE), torch.tensor([900, 20])
    calls: list[Callable[[Any], Any]] = [
        lambda s: [s.batch_step_no_noise(x.double(), t, x.double())],
        lambda s: [s.batch_step_no_noise(x, t[:1], x)],
        lambda s: [s.batch_step_no_noise(x, t.int(), x)],
        lambda s: s.batch_step_no_noise(x, t, x, eta=0.5),
        lambda s: s.batch_step_no_noise(x, [900, 20], x),
        lambda s: type(s)().batch_step_no_noise(x, t, x),
    ]
    for call in calls:
        assert_same_outcome(call, original, fast)


def test_the_deprecated_argument_of_the_inverse() -> None:
    with pytest.warns(FutureWarning, match="set_alpha_to_zero"):
        original = DDIMInverseScheduler(set_alpha_to_zero=False)
    with pytest.warns(FutureWarning, match="set_alpha_to_zero"):
        fast: Any = FastDDIMInverseScheduler(set_alpha_to_zero=False)
    assert torch.equal(fast.initial_alpha_cumprod, original.initial_alpha_cumprod)
    assert fast.initial_alpha_cumprod < 1


def test_strict_is_a_bool() -> None:
    for which in PAIRS:
        with pytest.raises(TypeError, match="strict must be True or False"):
            PAIRS[which][1](strict="yes")


@pytest.mark.parametrize("final", [0.9, np.float32(0.9), torch.tensor(0.9).double(), 1])
@pytest.mark.parametrize("which", PAIRS)
def test_an_end_that_is_no_float32_tensor_is_the_originals(which: str, final: Any) -> None:
    original, fast = both({}, 10, which)
    end = "initial_alpha_cumprod" if which == "inverse" else "final_alpha_cumprod"
    for scheduler in (original, fast):
        setattr(scheduler, end, final)
    assert_same_loops(original, fast, randn(*SHAPE))


@pytest.mark.parametrize("which", ["plain", "parallel"])
def test_subclasses_may_replace_methods_of_the_originals_step(which: str) -> None:
    """By a subclass: its step is then the original's own, which calls them."""

    class Larger:
        def _get_variance(self: Any, timestep: int, prev_timestep: int) -> Tensor:
            variance: Tensor = PAIRS[which][0]._get_variance(self, timestep, prev_timestep)
            return 0.5 * variance

    class Bounded:
        def _threshold_sample(self: Any, sample: Tensor) -> Tensor:
            return sample.clamp(-0.3, 0.3)

    for mixed, config in ((Larger, {}), (Bounded, {"thresholding": True})):
        original, fast = (type("Mixed", (mixed, cls), {})(**config) for cls in PAIRS[which])
        for scheduler in (original, fast):
            scheduler.set_timesteps(10)
        assert_same_loops(original, fast, randn(*SHAPE), eta=0.7, seed=3)


# --- On a GPU ---------------------------------------------------------------------------------

ULPS = 2
"""eager PyTorch multiplies by the reciprocal of a scalar there, the kernel divides."""


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
# Without strict, half precision is the original's own step, which waits.
@pytest.mark.parametrize(
    ("strict", "dtype"),
    [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)],
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
