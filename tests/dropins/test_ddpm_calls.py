"""The DDPM scheduler's arguments, results, errors and memory beside the original's."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.counts import Tally
from tests.dropins.ddpm_cases import FAST, LEARNED, ORIGINAL, POLICY, both, fused
from tests.dropins.scheduler_cases import (
    BOUNDS,
    SHAPE,
    Config,
    assert_identical,
    assert_same_loops,
    assert_same_outcome,
    diffusers,
    gen,
    loop,
    model,
    randn,
)

TEN: dict[str, Any] = {"num_inference_steps": 10}


def stepped(scheduler: Any, x: Tensor, t: Any = 500, output: Any = None, **given: Any) -> Any:
    scheduler.set_timesteps(10)
    given = {"generator": gen(), **given}
    return scheduler.step(x if output is None else output, t, x, return_dict=False, **given)


def test_a_timestep_may_be_any_kind_of_integer() -> None:
    original, fast = both({}, **TEN)
    x, output = randn(*SHAPE), randn(*SHAPE, seed=1)
    expected = original.step(output, 500, x, gen()).prev_sample
    for t in (
        500,
        np.int64(500),
        np.int32(500),
        torch.tensor(500),
        torch.tensor(500, dtype=torch.int32),
        fast.timesteps[4],
        fast.timesteps[4:5][0],
        torch.tensor([500]),
    ):
        assert_identical(fast.step(output, t, x, gen()).prev_sample, expected, repr(t))


@pytest.mark.parametrize("chosen", [{}, TEN, {"timesteps": [900, 500, 3]}])
def test_other_timesteps_are_the_originals(chosen: dict[str, Any]) -> None:
    original, fast = both({}, **chosen)
    x, output = randn(*SHAPE), randn(*SHAPE, seed=1)

    def call(scheduler: Any, t: Any) -> Any:
        return scheduler.step(output, t, x, gen(), return_dict=False)

    for t in (0, 3, 57, 500, 999, -1, -7, -1000, 1000, -1001):
        for timestep in (t, torch.tensor(t)):
            assert_same_outcome(call, original, fast, timestep)


def test_unequal_shapes_and_other_kinds_take_the_originals_step() -> None:
    original, fast = both({}, **TEN)
    x, output = randn(*SHAPE), randn(*SHAPE, seed=1)
    calls: list[Callable[[Any], Any]] = [
        lambda s: s.step(output[:1], 500, x, gen(), return_dict=False),
        lambda s: s.step(output, 500, x[:1], gen(), return_dict=False),
        lambda s: s.step(output[0, 0, 0], 500, x[0, 0, 0], gen(), return_dict=False),
        lambda s: s.step(output.double(), 500, x, gen(), return_dict=False),
        lambda s: s.step(output.half(), 500, x, gen(), return_dict=False),
        lambda s: s.step(output, True, x, gen(), return_dict=False),
        lambda s: s.step(output, 500.0, x, gen(), return_dict=False),
        lambda s: s.step(1.0, 500, x, gen(), return_dict=False),
    ]
    for call in calls:
        assert_same_outcome(call, original, fast)
    for scheduler in (original, fast):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    assert_same_loops(original, fast, x, seed=1)


def test_timesteps_that_are_no_integers_are_the_originals() -> None:
    original, fast = both({}, **TEN)
    x = randn(*SHAPE)
    for scheduler in (original, fast):
        scheduler.timesteps = scheduler.timesteps.double()
        with pytest.raises(IndexError):
            scheduler.step(x, 500, x)


def test_errors_are_the_originals() -> None:
    x = randn(*SHAPE)
    calls: list[Callable[[Any], Any]] = [
        lambda cls: cls().set_timesteps(1001),
        lambda cls: cls().set_timesteps(10, timesteps=[3]),
        lambda cls: cls().set_timesteps(timesteps=[3, 4]),
        lambda cls: cls().set_timesteps(timesteps=[1000]),
        lambda cls: cls(timestep_spacing="karras").set_timesteps(10),
        lambda cls: cls(beta_schedule="square"),
        lambda cls: stepped(cls(prediction_type="flow"), x),
        lambda cls: stepped(cls(thresholding=True), x[:, :, 0, 0]),
        lambda cls: stepped(cls(variance_type="learned"), x),
        lambda cls: stepped(cls(), x, t=1000),
        lambda cls: stepped(cls(), x, t=501),
        lambda cls: stepped(cls(), x, t="500"),
        lambda cls: stepped(cls(), x, output=x[:, :2]),
        lambda cls: stepped(cls(), x, output=torch.cat([x, x], 1)),
        lambda cls: stepped(cls(), x, generator=[gen()]),
        lambda cls: stepped(cls(), x, generator=[gen(), "no"]),
    ]
    for k, call in enumerate(calls):
        if k != 14:  # randn_tensor takes the only generator of a list for all samples
            with pytest.raises(Exception):  # noqa: B017 the same error is compared below
                call(ORIGINAL)
        assert_same_outcome(call, ORIGINAL, FAST)


def test_signatures_are_the_originals() -> None:
    def parameters(function: Any) -> list[tuple[str, Any, Any]]:
        found = inspect.signature(function).parameters.values()
        return [(p.name, p.default, p.kind) for p in found]

    for name, method in inspect.getmembers(ORIGINAL, inspect.isfunction):
        assert parameters(getattr(FAST, name)) == parameters(method), name


def test_results_come_as_the_original_gives_them() -> None:
    original, fast = both({}, **TEN)
    x, output = randn(*SHAPE), randn(*SHAPE, seed=1)
    found, want = (s.step(output, 500, x, gen()) for s in (fast, original))
    assert type(found) is type(want)
    assert list(found) == list(want) == ["prev_sample", "pred_original_sample"]
    assert found.to_tuple()[0] is found.prev_sample is found["prev_sample"] is found[0]
    assert found.to_tuple()[1] is found.pred_original_sample is found[1]
    assert vars(found).keys() == vars(want).keys()
    assert type(fast.step(output, 500, x, return_dict=False)) is tuple
    again = pickle.loads(pickle.dumps(found))
    assert torch.equal(again.prev_sample, want.prev_sample)


def test_gradients_are_the_originals() -> None:
    def gradients(scheduler: Any) -> list[Any]:
        x, output = (randn(*SHAPE, seed=k).requires_grad_() for k in range(2))
        total = scheduler.step(output, 500, x, gen()).prev_sample.square().sum()
        total = total + scheduler.step(output.detach(), 500, x, gen()).prev_sample.sum()
        total = total + scheduler.step(output, 500, x.detach(), gen()).prev_sample.sum()
        total.backward()
        return [x.grad, output.grad]

    original, fast = (gradients(s) for s in both({"clip_sample_range": 0.9}, **TEN))
    assert all(torch.equal(a, b) for a, b in zip(original, fast, strict=True))


def test_a_sample_that_requires_grad_is_fused_under_no_grad() -> None:
    original, fast = fused({}, **TEN)
    x = randn(*SHAPE).requires_grad_()
    expected = original.step(x.detach(), 500, x.detach(), gen()).prev_sample
    with torch.no_grad():
        found = fast.step(x, 500, x, gen()).prev_sample
    assert torch.equal(found, expected)


def test_add_noise_and_get_velocity_change_no_step() -> None:
    original, fast = fused(POLICY)
    x, z, t = randn(*SHAPE), randn(*SHAPE, seed=1), torch.tensor([3, 90])
    for dtype in (torch.float32, torch.float16):
        for name in ("add_noise", "get_velocity"):
            a, b = (getattr(s, name)(x.to(dtype), z.to(dtype), t) for s in (original, fast))
            assert_identical(a, b)
    assert_same_loops(original, fast, x, seed=2)


def test_everything_else_is_the_originals() -> None:
    original, fast = both({"beta_schedule": "squaredcos_cap_v2"}, num_inference_steps=20)
    x = randn(*SHAPE)
    assert fast.scale_model_input(x, 3) is x
    assert len(fast) == len(original) == 1000
    for name in ("init_noise_sigma", "order", "variance_type", "custom_timesteps"):
        assert getattr(fast, name) == getattr(original, name), name
    for name in ("betas", "alphas", "alphas_cumprod", "one", "timesteps"):
        assert torch.equal(getattr(fast, name), getattr(original, name)), name
    assert fast.config == original.config
    for t in (950, 500, 0):
        assert fast.previous_timestep(t) == original.previous_timestep(t)
        assert torch.equal(fast._get_variance(t), original._get_variance(t))


def test_saved_and_loaded_both_ways(tmp_path: Path) -> None:
    config: Config = {
        "num_train_timesteps": 100,
        "trained_betas": [0.001 * (i + 1) for i in range(100)],
        "prediction_type": "v_prediction",
        "variance_type": "fixed_large",
        "timestep_spacing": "trailing",
        "clip_sample_range": 2.0,
    }
    FAST(**config).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == "FastDDPMScheduler"
    again, theirs = (cls.from_pretrained(str(tmp_path)) for cls in (FAST, ORIGINAL))
    back = FAST.from_config(theirs.config)
    assert [type(s) for s in (again, theirs, back)] == [FAST, ORIGINAL, FAST]
    for name, value in config.items():
        assert again.config[name] == theirs.config[name] == back.config[name] == value
    assert torch.equal(back.alphas_cumprod, ORIGINAL(**config).alphas_cumprod)


@pytest.mark.parametrize("other", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_the_configuration_of_another_scheduler(other: str) -> None:
    made: Any = getattr(diffusers, other)
    config = made(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").config
    original, fast = ORIGINAL.from_config(config), FAST.from_config(config)
    for scheduler in (original, fast):
        scheduler.set_timesteps(20)
    assert_same_loops(original, fast, randn(*SHAPE), seed=1)
    assert type(made.from_config(fast.config)) is made


def test_subclasses_may_replace_methods_of_the_originals_step() -> None:
    """A subclass that replaces such a method gets the original's step, which calls the method."""

    class Larger:
        def _get_variance(self: Any, *arguments: Any, **given: Any) -> Tensor:
            variance: Tensor = ORIGINAL._get_variance(self, *arguments, **given)
            return 0.5 * variance

    class Bounded:
        def _threshold_sample(self: Any, sample: Tensor) -> Tensor:
            return sample.clamp(-0.3, 0.3)

    class Shorter:
        def previous_timestep(self: Any, timestep: Any) -> Any:
            return timestep - 30

    configs: list[Config] = [{}, {"thresholding": True}, {}]
    for mixed, config in zip((Larger, Bounded, Shorter), configs, strict=True):
        original, fast = (type("Mixed", (mixed, cls), {})(**config) for cls in (ORIGINAL, FAST))
        for scheduler in (original, fast):
            scheduler.set_timesteps(10)
        assert_same_loops(original, fast, randn(*SHAPE), seed=3)


def test_a_subclass_that_replaces_nothing_is_fused() -> None:
    class Named(FAST):  # type: ignore[misc]
        def step(self, *arguments: Any, **given: Any) -> Any:
            return super().step(*arguments, **given)

    original, fast = fused({}, **TEN)
    named = Named()
    named._parent = fast._parent
    named.timesteps, named.num_inference_steps = fast.timesteps, 10
    assert_same_loops(original, named, randn(*SHAPE), seed=3)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda s: pickle.loads(pickle.dumps(s))]
)
def test_a_copy_in_the_middle_of_a_loop_goes_on_alone(copied: Callable[[Any], Any]) -> None:
    _, scheduler = both({}, **TEN)
    x = randn(*SHAPE)
    first, *rest = scheduler.timesteps
    x = scheduler.step(model(x, first), first, x, gen()).prev_sample
    another = copied(scheduler)
    states, generators = [x, x], [gen(), gen()]
    for t in rest:
        for k, s in enumerate((scheduler, another)):
            states[k] = s.step(model(states[k], t), t, states[k], generators[k]).prev_sample
        assert torch.equal(*states)
    another.set_timesteps(5)
    assert len(scheduler.timesteps) == 10
    assert len(pickle.dumps(another)) < 100_000


@pytest.mark.parametrize("shape", [SHAPE, (4, 3, 64, 64)])
def test_arguments_and_kept_results_never_change(shape: tuple[int, ...]) -> None:
    _, scheduler = fused(BOUNDS[3], **TEN)
    x, kept = randn(*shape), []
    for t in scheduler.timesteps:
        output = model(x, t)
        kept += [(held, held.clone()) for held in (x, output)]
        found = scheduler.step(output, t, x)
        kept += [(held, held.clone()) for held in found.to_tuple()]
        x = found.prev_sample
    assert all(torch.equal(held, then) for held, then in kept)


def test_memory_nobody_holds_is_written_again() -> None:
    _, scheduler = both({}, num_inference_steps=20)
    x, addresses = randn(4, 3, 64, 64), []
    for t in scheduler.timesteps[:-1]:
        x = scheduler.step(model(x, t), t, x).prev_sample
        addresses.append(x.data_ptr())
    assert len(set(addresses[2:])) <= 3
    scheduler.step(x, scheduler.timesteps[-1], x)
    assert scheduler._own.states.take() is scheduler._own.noise is None


@pytest.mark.parametrize(("first", "then"), [*itertools.product([False, True], repeat=2)])
def test_inference_mode_and_out_of_it(first: bool, then: bool) -> None:
    want = loop(both({}, **TEN)[0], randn(*SHAPE), generator=gen())
    with torch.inference_mode(first):
        _, scheduler = fused({}, **TEN)
        loop(scheduler, randn(*SHAPE), every=3)
    with torch.inference_mode(then):
        found = loop(scheduler, randn(*SHAPE), generator=gen())
    assert all(a.is_inference() == then for a in found)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize(("t", "passes", "read_and_written"), [(500, 2, 24), (0, 1, 16)])
def test_a_step_is_one_pass_beside_its_draw(t: int, passes: int, read_and_written: int) -> None:
    """Each element of x_t, ε, x_s and x0 moves once; noise is written and read."""
    original, fast = both({}, **TEN)
    x, found = randn(*SHAPE), {}
    fast.step(x, t, x)  # makes the rows
    for scheduler in (original, fast):
        with Tally(x.numel()) as tally:
            scheduler.step(x, t, x)
        found[scheduler] = tally.found
    assert found[fast]["operations"] == found[fast]["passes"] == passes
    assert found[fast]["bytes_per_element"] == read_and_written
    assert found[original]["passes"] >= 8
    assert found[original]["bytes_per_element"] >= 72


def test_a_compiled_step_is_the_eager_one() -> None:
    torch.compiler.reset()
    compiled_scheduler, eager = FAST(), FAST()
    for scheduler in (compiled_scheduler, eager):
        scheduler.set_timesteps(10)
    compiled = torch.compile(compiled_scheduler.step, backend="aot_eager")
    x, output = randn(2, 8), randn(2, 8, seed=1)
    for t in (900, 0):
        ends = []
        for step in (compiled, eager.step):
            torch.manual_seed(1)
            ends.append(step(output, t, x).prev_sample)
        assert torch.equal(*ends)


def test_threads_that_share_a_scheduler_step_alone() -> None:
    _, scheduler = fused({}, num_inference_steps=30)

    def run(seed: int) -> list[Tensor]:
        return loop(scheduler, randn(2, 3, 48, 48, seed=seed), generator=gen(seed))

    want = [run(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, range(4)))
    for a, b in zip(found, want, strict=True):
        assert all(map(torch.equal, a, b))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_derivatives_of_other_kinds_are_the_originals() -> None:
    found = []
    for scheduler in both({}, **TEN):
        x, v = randn(*SHAPE), randn(*SHAPE, seed=1)

        def step(x: Tensor, s: Any = scheduler) -> Any:
            return s.step(0.3 * x, 500, x, gen()).prev_sample

        found.append(torch.func.jvp(step, (x,), (v,)))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("variance", LEARNED)
def test_only_learned_variances_take_the_originals_step(variance: str) -> None:
    _, fast = fused({"variance_type": variance}, **TEN)
    x = randn(*SHAPE)
    with pytest.raises(TypeError, match="not callable"):
        fast.step(torch.cat([x, x], 1), 500, x)
    fast.register_to_config(variance_type="fixed_small")
    fast.variance_type = "fixed_small"
    fast.step(x, 500, x)
