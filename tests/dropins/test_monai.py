"""The drop-in for MONAI's DDIMScheduler: bit for bit its steps, as written out and live.

The package itself is compared with wherever it is importable: ``pip install --no-deps monai`` is
enough.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import math
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim.dropins import monai
from tests.cases import some
from tests.dropins.monai_original import Described, loop, model, reversed_loop
from tests.paths import CPU, use
from tests.refusals import refused

SHAPE = (2, 3, 4, 5)
Config = dict[str, Any]
SCHEDULES = ("linear_beta", "scaled_linear_beta", "sigmoid_beta", "cosine")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
BOUNDS: list[Config] = [
    {"clip_sample": False},
    {},
    {"clip_sample_min": -0.3, "clip_sample_max": 0.3},
    {"clip_sample_min": -2, "clip_sample_max": 2},
]
OTHER_BOUNDS: list[Config] = [
    {"clip_sample_min": 0.0, "clip_sample_max": 1.0},
    {"clip_sample_min": -1.0, "clip_sample_max": 0.5},
    {"clip_sample_min": 1.0, "clip_sample_max": -1.0},
]
GRID: list[tuple[Config, int, float]] = [
    (
        {
            "schedule": schedule,
            "prediction_type": prediction,
            "set_alpha_to_one": one,
            "steps_offset": offset,
            **bound,
        },
        S,
        eta,
    )
    for schedule, prediction, one, offset, bound, S, eta in itertools.product(
        SCHEDULES, PREDICTIONS, (True, False), (0, 1), BOUNDS, (7, 50), (0.0, 0.4, 1.0)
    )
]


def package() -> Any:
    pytest.importorskip("monai")
    return importlib.import_module("monai.networks.schedulers.ddim").DDIMScheduler


@pytest.fixture(params=["described", "package"])
def original(request: pytest.FixtureRequest) -> Any:
    return Described if request.param == "described" else package()


def fast_only(original: Any) -> Any:
    """The drop-in for ``original``, whose own steps it cannot take."""

    def step(*given: Any) -> Any:
        raise AssertionError("the original's own step was taken")

    return monai.fused(type("Unstepped", (original,), {"step": step, "reversed_step": step}))


def both(original: Any, config: Config, S: int, fast: bool = True) -> tuple[Any, Any]:
    made = original(**config), (fast_only if fast else monai.fused)(original)(**config)
    for scheduler in made:
        scheduler.set_timesteps(S)
    return made


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_equal(ours: list[Tensor], theirs: list[Tensor], nan: bool = False) -> None:
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert type(a) is type(b)
        assert a.dtype == b.dtype
        same = torch.equal(a, b) or (nan and torch.equal(a.nan_to_num(7), b.nan_to_num(7)))
        assert same, f"tensor {i}"


def assert_same(
    original: Any,
    config: Config,
    S: int,
    x: Tensor,
    eta: float = 0.0,
    fast: bool = True,
    nan: bool = False,
    **given: Any,
) -> None:
    theirs, ours = both(original, config, S, fast)
    states = loop(theirs, x, eta, **given)
    assert nan or states[-3].isfinite().all()
    assert_equal(loop(ours, x, eta, **given), states, nan)
    assert_equal(reversed_loop(ours, x), reversed_loop(theirs, x))


def assert_grid(original: Any, cases: list[tuple[Config, int, float]]) -> None:
    for config, S, eta in cases:
        # With few steps, η = 1 gives 1 − ᾱ_s − σ² < 0 by rounding, and NaN in the original too.
        assert_same(original, config, S, randn(*SHAPE), eta, nan=eta == 1)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("start", range(4))
def test_loops_are_bit_identical(original: Any, start: int) -> None:
    assert_grid(original, GRID[start::127])


@pytest.mark.slow
def test_more_loops_are_bit_identical(original: Any) -> None:
    assert_grid(original, GRID[1::5])


@pytest.mark.one_in(2)
@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_each_backend_is_bit_identical(original: Any, backend: str, prediction: str) -> None:
    with use(backend):
        for bound in BOUNDS:
            for eta in (0.0, 0.7):
                config = {"prediction_type": prediction, **bound}
                assert_same(original, config, 10, randn(*SHAPE), eta)


def test_the_generator_ends_in_the_same_state(original: Any) -> None:
    for seed in (None, 3):
        assert_same(original, {}, 10, randn(*SHAPE), 1.0, seed=seed)


@pytest.mark.parametrize("shape", [(5,), (0, 3, 4), (1, 1, 9, 8, 7), (2, 3, 105, 104)])
def test_shapes_of_any_kind_are_bit_identical(shape: Any) -> None:
    for prediction in PREDICTIONS:
        assert_same(Described, {"prediction_type": prediction}, 4, randn(*shape), 0.5)


def test_layouts_of_any_kind_are_bit_identical(original: Any) -> None:
    x = randn(3, 8, 6, 4)
    for laid in (x.to(memory_format=torch.channels_last), x.mT, x[:, ::2], x[:1].expand(x.shape)):
        assert_same(original, {}, 6, laid, 0.5)
        assert_same(original, {}, 6, laid, 0.5, net=lambda x, t: model(x, t).contiguous())


def test_other_numbers_of_levels_are_bit_identical(original: Any) -> None:
    for T, S in ((1, 1), (10, 10), (37, 5), (1000, 999)):
        assert_same(original, {"num_train_timesteps": T}, S, randn(1, 2, 2), 0.3, nan=T == 1)


@pytest.mark.parametrize("one", some([False, True], 2))
def test_factors_are_those_of_each_step(original: Any, one: bool) -> None:
    """Vector instructions round all timesteps at once as the original rounds each alone."""
    for schedule in SCHEDULES:
        theirs, ours = both(original, {"schedule": schedule, "set_alpha_to_one": one}, 93)
        table = ours._tables_of(0.3, torch.device("cpu"), 10, False).table
        upward = ours._tables_of(0.0, torch.device("cpu"), 10, True).table
        for t in range(-1000, 1000):
            s, at = t - 10, theirs.alphas_cumprod[t]
            at_s = theirs.alphas_cumprod[s] if s >= 0 else theirs.final_alpha_cumprod
            sigma = 0.3 * theirs._get_variance(t, s) ** 0.5
            direction = (1 - at_s - sigma**2) ** 0.5
            row = torch.stack([at**0.5, (1 - at) ** 0.5, at_s**0.5, sigma, direction])
            assert torch.equal(table[t + 1000, [0, 2, 4, 5, 6]].nan_to_num(7), row.nan_to_num(7))
            if t < 990:
                s = t + 10
                at_s = theirs.alphas_cumprod[s] if s >= 0 else theirs.final_alpha_cumprod
                row = torch.stack([at**0.5, (1 - at) ** 0.5, at_s**0.5, (1 - at_s) ** 0.5])
                assert torch.equal(upward[t + 1000, [0, 2, 4, 6]], row)


@pytest.mark.parametrize("kind", [int, torch.tensor, lambda t: torch.tensor(t).int()])
def test_timesteps_of_any_kind_in_any_order(original: Any, kind: Any) -> None:
    theirs, ours = both(original, {}, 10)
    x = randn(*SHAPE)
    for t in (3, 999, 500, 0, -1, -7, 123):
        want = theirs.step(model(x, t), kind(t), x)
        assert_equal(ours.step(model(x, t), kind(t), x), want)
        if t != 999:
            want = theirs.reversed_step(model(x, t), kind(t), x)
            assert_equal(ours.reversed_step(model(x, t), kind(t), x), want)


@pytest.mark.parametrize("bound", OTHER_BOUNDS)
def test_other_bounds_are_the_originals(original: Any, bound: Config) -> None:
    for prediction in PREDICTIONS:
        config = {"prediction_type": prediction, **bound}
        assert_same(original, config, 10, randn(*SHAPE), 0.5, fast=False)
        x, ours = randn(*SHAPE), both(original, config, 10)[1]
        with pytest.raises(AssertionError, match="the original's own step was taken"):
            ours.step(x, 500, x)


def outcome(call: Any, *given: Any) -> Any:
    try:
        return [tensor.detach() for tensor in call(*given)]
    except Exception as error:
        return type(error), str(error)


def test_other_tensors_and_errors_are_the_originals(original: Any) -> None:
    theirs, ours = both(original, {}, 10, fast=False)
    x = randn(*SHAPE)
    cases: list[Any] = [
        *((x.to(dtype), 500, x.to(dtype)) for dtype in (torch.float64, torch.bfloat16)),
        (x.half(), 500, x.half()),
        (x.half(), 500, x),
        (x[:1], 500, x),
        (x, 1000, x),
        (x, 2.0, x),
        (x, torch.tensor([500]), x),
        (x, torch.tensor(500, dtype=torch.int16), x),
        (x, torch.tensor(5, dtype=torch.uint8), x),
        (x, True, x),
        (x, 990, x),
        (x[:, :1], 500, x[0]),
    ]
    for given in cases:
        for name in ("step", "reversed_step"):
            torch.manual_seed(3)
            want = outcome(getattr(theirs, name), *given)
            torch.manual_seed(3)
            got = outcome(getattr(ours, name), *given)
            if isinstance(want, list):
                assert_equal(got, want)
            else:
                assert got == want
    for eta in (torch.tensor(0.5), -0.5, math.nan):
        torch.manual_seed(3)
        want = outcome(theirs.step, x, 500, x, eta)
        torch.manual_seed(3)
        assert_equal(outcome(ours.step, x, 500, x, eta), want, nan=True)


def test_gradients_are_the_originals(original: Any) -> None:
    theirs, ours = both(original, {"clip_sample": False}, 10, fast=False)
    grads: list[Any] = []
    for scheduler in (theirs, ours):
        x = randn(*SHAPE).requires_grad_()
        scheduler.step(model(x, 500), 500, x)[0].square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_levels_that_users_set_are_followed(original: Any) -> None:
    theirs, ours = both(original, {}, 10)
    x = randn(*SHAPE)
    before = ours.step(x, 500, x)[0]
    changes = (
        lambda s: s.alphas_cumprod.data.mul_(0.9),
        lambda s: setattr(s, "alphas_cumprod", s.alphas_cumprod * 0.9),
        lambda s: s.final_alpha_cumprod.data.mul_(0.99),
        lambda s: setattr(s, "num_inference_steps", 20),
        lambda s: setattr(s, "clip_sample_values", [-0.5, 0.5]),
        lambda s: setattr(s, "prediction_type", "v_prediction"),
        lambda s: setattr(s, "clip_sample", False),
    )
    for change in changes:
        for scheduler in (theirs, ours):
            change(scheduler)
        for t in (500, 20):
            assert_equal(ours.step(x, t, x), theirs.step(x, t, x))
    assert not torch.equal(before, ours.step(x, 500, x)[0])


def test_levels_of_another_dtype_are_the_originals(original: Any) -> None:
    """``add_noise`` converts ``alphas_cumprod`` to the dtype of the images."""
    theirs, ours = both(original, {}, 10, fast=False)
    x, t = randn(*SHAPE), torch.tensor([5, 6])
    for scheduler in (theirs, ours):
        scheduler.add_noise(x.bfloat16(), x.bfloat16(), t)
    assert ours.alphas_cumprod.dtype == torch.bfloat16
    assert_equal(ours.step(x, 500, x), theirs.step(x, 500, x))


def test_subclasses_may_replace_the_variance(original: Any) -> None:
    class Own(monai.fused(original)):  # type: ignore[misc]
        def _get_variance(self, t: Any, s: Any) -> Tensor:
            variance: Tensor = 0.25 * super()._get_variance(t, s)
            return variance

    x, theirs, ours = randn(*SHAPE), original(), Own()
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    assert_equal(loop(ours, x, 1.0)[:1], loop(theirs, x, 0.5)[:1])
    assert not torch.equal(loop(ours, x, 1.0)[0], loop(theirs, x, 1.0)[0])


def test_nothing_that_is_held_is_written() -> None:
    held: list[tuple[Tensor, Tensor]] = []

    def net(x: Tensor, t: Any) -> Tensor:
        output = model(x, t)
        held.extend((tensor, tensor.clone()) for tensor in (x, output))
        return output

    for config in ({}, {"prediction_type": "sample", "clip_sample": False}):
        _, ours = both(Described, config, 10)
        states = loop(ours, randn(2, 3, 96, 96), 0.5, net=net)
        held.extend((tensor, tensor.clone()) for tensor in states)
        loop(ours, randn(2, 3, 96, 96, seed=1), 0.5, net=net)
    assert all(torch.equal(tensor, copied) for tensor, copied in held)


def test_threads_give_what_each_gives_alone() -> None:
    theirs, ours = both(Described, {}, 20)
    states = [randn(2, 3, 64, 64, seed=i) for i in range(6)]
    alone = [loop(theirs, x, 0.5, seed=3) for x in states]
    with ThreadPoolExecutor(3) as pool:
        for got, want in zip(
            pool.map(lambda x: loop(ours, x, 0.5, seed=3), states), alone, strict=True
        ):
            assert_equal(got, want)


def test_copies_and_pickles_step_as_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = monai.fused(Described)
    monkeypatch.setitem(vars(monai), "FastDDIMScheduler", fast)
    ours, x = fast(), randn(*SHAPE)
    ours.set_timesteps(5)
    want = loop(ours, x)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is fast
        assert not {"_tables", "_own_memory", "_read"} & set(vars(twin))
        assert_equal(loop(twin, x), want)


def test_a_compiled_step_equals_the_eager_one() -> None:
    ours = monai.fused(Described)()
    ours.set_timesteps(10)
    x = randn(*SHAPE)
    compiled: Any = torch.compile(ours.step, backend="eager", fullgraph=True)
    assert_equal(compiled(x, 500, x), ours.step(x, 500, x))


def test_without_monai_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(vars(monai), "FastDDIMScheduler", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "monai"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "monai", None)
    message = "monai is missing or older than 1.4", "pip install 'monai>=1.4'"
    refused(lambda: monai.FastDDIMScheduler, ModuleNotFoundError, *message)
    with pytest.raises(AttributeError, match="has no attribute 'Other'"):
        _ = monai.Other


def test_the_description_has_the_packages_levels() -> None:
    theirs = package()
    for schedule, one, offset in itertools.product(SCHEDULES, (True, False), (0, 1)):
        config: Config = {"schedule": schedule, "set_alpha_to_one": one, "steps_offset": offset}
        a, b = Described(**config), theirs(**config)
        for name in ("betas", "alphas_cumprod", "final_alpha_cumprod", "timesteps"):
            assert torch.equal(getattr(a, name), getattr(b, name))


def test_the_class_is_a_subclass_of_the_packages() -> None:
    theirs = package()
    fast = monai.FastDDIMScheduler
    assert fast is monai.FastDDIMScheduler
    assert issubclass(fast, theirs)
    assert fast.__module__ == "fastddim.dropins.monai"
    twin = pickle.loads(pickle.dumps(fast()))
    assert type(twin) is fast
    with pytest.raises(ValueError, match="cannot be larger"):
        twin.set_timesteps(1001)


def test_meta_tensors_stay_meta_tensors() -> None:
    theirs, ours = both(package(), {}, 10, fast=False)
    meta_tensor = importlib.import_module("monai.data.meta_tensor").MetaTensor
    x = meta_tensor(randn(*SHAPE))
    assert_equal(list(ours.step(x, 500, x)), list(theirs.step(x, 500, x)))


def test_the_package_inferer_samples_the_same() -> None:
    theirs, ours = both(package(), {"schedule": "scaled_linear_beta"}, 10)
    inferer = importlib.import_module("monai.inferers.inferer").DiffusionInferer

    def net(x: Tensor, timesteps: Tensor, context: Any = None) -> Tensor:
        return model(x, timesteps[0])

    x = randn(1, 1, 8, 8, 8)
    want, got = (
        inferer(scheduler).sample(x, net, scheduler, verbose=False) for scheduler in (theirs, ours)
    )
    assert torch.equal(got, want)
