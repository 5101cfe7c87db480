"""The schedulers' arguments, results, errors and attributes: those of diffusers' own."""

from __future__ import annotations

import inspect
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastddim.dropins.diffusers import (
    FastDDIMInverseScheduler,
)
from tests.dropins.scheduler_cases import (
    FAST,
    GRID,
    PAIRS,
    SHAPE,
    Config,
    DDIMInverseScheduler,
    DDIMScheduler,
    assert_identical,
    assert_same_loops,
    assert_same_outcome,
    both,
    diffusers,
    gen,
    randn,
)

DDPMScheduler = diffusers.DDPMScheduler
EulerDiscreteScheduler = diffusers.EulerDiscreteScheduler
PNDMScheduler = diffusers.PNDMScheduler

ORIGINAL: Any = DDIMScheduler


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
        if name == "set_timesteps":  # which takes the timesteps in place of their number too
            names = [p[0] for p in parameters(fast.set_timesteps)]
            assert names == [*(p[0] for p in parameters(method)), "timesteps"]
        elif name != "__init__":
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
    """A subclass that replaces such a method gets the original's step, which calls the method."""

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
