"""diffusers' flow matching scheduler beside the drop-in: whole loops, draws, and refusals."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.dropins.euler_cases import (
    FLOW,
    FLOW_ORIGINAL,
    FLOWS,
    SHAPE,
    Config,
    assert_same,
    assert_same_loops,
    drawn,
    gen,
    loop,
    net,
    never_the_originals,
    stepped,
)

NOISY: Config = {"stochastic_sampling": True}


def both(config: Config | None = None, **given: Any) -> tuple[Any, Any]:
    made = FLOW(**config or {}), FLOW_ORIGINAL(**config or {})
    for scheduler in made:
        scheduler.set_timesteps(**(given or {"num_inference_steps": 12}))
    return made


def test_whole_loops_have_the_originals_bits() -> None:
    cases = FLOWS[::37]
    assert {*NOISY} & {name for config, _ in cases for name, value in config.items() if value}
    for config, times in cases:
        assert_same_loops("flow", config, times)


@pytest.mark.slow
def test_more_loops_have_the_originals_bits() -> None:
    for config, times in FLOWS[1::7]:
        assert_same_loops("flow", config, times)


@pytest.mark.parametrize("shape", [(1, 16, 7), (3, 5), (2, 16, 64, 64), (2, 4, 2, 8, 8)])
@pytest.mark.parametrize("config", [{}, NOISY])
def test_states_of_every_shape_have_the_originals_bits(
    config: Config, shape: tuple[int, ...]
) -> None:
    found = []
    for scheduler in both(config):
        kept = loop(scheduler, drawn(shape=shape), gen(2))
        found.append(kept)
    assert_same(*found)


def test_zeros_and_infinities_are_the_originals() -> None:
    inf = float("inf")
    values = torch.tensor([0.0, -0.0, 1.5, -1.5, inf, -inf, float("nan"), 1e-45])
    x, u = (grid.contiguous() for grid in torch.meshgrid(values, values, indexing="ij"))
    ours, theirs = both()
    a, b = (s.step(u, s.timesteps[3], x).prev_sample for s in (ours, theirs))
    assert_same([a], [b])
    assert torch.equal(a.signbit(), b.signbit())


def test_infinities_of_stochastic_sampling_give_nan() -> None:
    """The sum holds the term 0·x_t."""
    x = drawn()
    x[0, 0, 0, 0] = float("inf")
    ours, theirs = (
        s.step(drawn(2), s.timesteps[3], x, generator=gen(0)).prev_sample for s in both(NOISY)
    )
    assert ours[0, 0, 0, 0].isnan()
    assert theirs[0, 0, 0, 0].isinf()
    assert_same([ours.flatten()[1:]], [theirs.flatten()[1:]])


@pytest.mark.parametrize("source", ["global", "generator", "generators"])
def test_draws_and_their_generators_are_the_originals(source: str) -> None:
    found = []
    for scheduler in both(NOISY):
        torch.manual_seed(11)
        listed = [torch.Generator().manual_seed(k) for k in (3, 4)]
        sources = {"global": None, "generator": listed[0], "generators": listed}
        x, kept = drawn(), []
        for t in scheduler.timesteps:
            (x,) = scheduler.step(0.3 * x, t, x, generator=sources[source], return_dict=False)
            kept += [x, torch.get_rng_state(), *(g.get_state() for g in listed)]
        found.append(kept)
    assert_same(*found)


@pytest.mark.parametrize("config", [{}, NOISY])
def test_without_noise_nothing_is_drawn(config: Config) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    scheduler, _ = both(config)
    stepped(scheduler, drawn(), scheduler.timesteps[0])
    assert torch.equal(before, torch.get_rng_state()) == (not config)


# --- Where the original's step runs -----------------------------------------------------------


@pytest.mark.parametrize("of_output", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("of_sample", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("config", [{}, NOISY])
def test_other_dtypes_have_the_originals_bits(
    config: Config, of_sample: torch.dtype, of_output: torch.dtype
) -> None:
    found = []
    for scheduler in both(config):
        x, kept, g = drawn().to(of_sample), [], gen(1)
        for t in scheduler.timesteps:
            result = scheduler.step(net(x, t).to(of_output), t, x, generator=g).prev_sample
            assert result.dtype == of_output
            kept.append(result)
            x = result.to(of_sample)
        found.append(kept)
    assert_same(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_per_token_timesteps_are_the_originals(dtype: torch.dtype) -> None:
    x, u = drawn(shape=(2, 6, 4)).to(dtype), drawn(2, (2, 6, 4)).to(dtype)
    tokens = torch.tensor([[900.0, 700, 500, 300, 100, 0], [1000, 1000, 250, 250, 10, 1]])
    found = []
    for scheduler in both({"shift": 2.0}):
        result = scheduler.step(u, scheduler.timesteps[2], x, per_token_timesteps=tokens)
        assert scheduler.step_index == 3
        found.append(list(result.values()))
    assert_same(*found)


def test_gradients_are_the_originals() -> None:
    for config in ({}, NOISY):
        grads = []
        for scheduler in both(config, num_inference_steps=4):
            x = drawn().requires_grad_()
            end = loop(scheduler, x, gen(1))[-1]
            end.square().sum().backward()
            grads.append([end.detach(), x.grad])
        assert_same(*grads)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "churn", [{"s_churn": 40.0, "s_tmin": 0.1, "s_tmax": 900.0}, {"s_noise": 3}]
)
def test_churn_has_no_effect_as_in_the_original(churn: dict[str, float]) -> None:
    for config in ({}, NOISY):
        found = []
        for given in (churn, {}):
            for scheduler in both(config):
                g, t = gen(1), scheduler.timesteps[4]
                found.append([scheduler.step(drawn(2), t, drawn(), generator=g, **given)[0]])
        for one in found[1:]:
            assert_same(found[0], one)


def test_arguments_by_position_are_the_originals() -> None:
    found = [
        scheduler.step(
            drawn(2), scheduler.timesteps[0], drawn(), 0.0, 0.0, 9.0, 1.0, gen(1), None, False
        )
        for scheduler in both(NOISY)
    ]
    assert isinstance(found[0], tuple)
    assert_same(*map(list, found))


def test_sigmas_of_another_dtype_are_the_originals() -> None:
    found = []
    for scheduler in both():
        scheduler.sigmas = scheduler.sigmas.double()
        found.append(loop(scheduler, drawn()))
    assert_same(*found)


# --- Refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [3, torch.tensor(3), torch.tensor(3, dtype=torch.int32), True])
def test_indices_are_refused_in_the_originals_words(t: Any) -> None:
    words = []
    for scheduler in both():
        with pytest.raises(ValueError, match="Passing integer indices") as caught:
            scheduler.step(drawn(), t, drawn())
        words.append(str(caught.value))
    assert words[0] == words[1]


@pytest.mark.parametrize("t", [123.456, torch.tensor(123.456)])
def test_an_unknown_timestep_fails_as_in_the_original(t: Any) -> None:
    for scheduler in both():
        with pytest.raises(IndexError):
            scheduler.step(drawn(), t, drawn())


def test_a_step_after_the_last_fails_as_in_the_original() -> None:
    for scheduler in both():
        x = loop(scheduler, drawn())[-1]
        with pytest.raises(IndexError):
            scheduler.step(x, scheduler.timesteps[-1], x)


def test_bad_options_have_the_originals_words() -> None:
    bad: list[tuple[Callable[[Any], Any], str]] = [
        (lambda cls: cls(use_karras_sigmas=True, use_beta_sigmas=True), "Only one of"),
        (lambda cls: cls(time_shift_type="square"), "must either be"),
        (lambda cls: cls(use_dynamic_shifting=True).set_timesteps(4), "`mu` must be passed"),
        (lambda cls: cls().set_timesteps(4, sigmas=[1.0, 0.5]), "same length"),
        (lambda cls: cls().set_timesteps(sigmas=[1.0], timesteps=[9.0, 1.0]), "same length"),
    ]
    for call, words in bad:
        for cls in (FLOW, FLOW_ORIGINAL):
            with pytest.raises(ValueError, match=words):
                call(cls)


def test_beta_sigmas_need_scipy_as_in_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(FLOW_ORIGINAL.__module__)
    monkeypatch.setattr(module, "is_scipy_available", lambda: False)
    for cls in (FLOW, FLOW_ORIGINAL):
        with pytest.raises(ImportError, match="scipy"):
            cls(use_beta_sigmas=True)


def test_all_else_is_the_originals() -> None:
    before = FLOW.__mro__[: FLOW.__mro__.index(FLOW_ORIGINAL)]
    replaced = {name for cls in before for name in vars(cls) if hasattr(FLOW_ORIGINAL, name)}
    assert {name for name in replaced if not name.startswith("__")} == {
        *("set_timesteps", "step", "_init_step_index", "_get_compatibles"),
    }
    ours, theirs = both({"shift": 3.0})
    noise, x = drawn(2), drawn()
    t = theirs.timesteps[[2, 7]]
    assert torch.equal(ours.scale_noise(x, t, noise), theirs.scale_noise(x, t, noise))
    for scheduler in (ours, theirs):
        scheduler.set_shift(5.0)
        scheduler.set_timesteps(9)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert ours.shift == theirs.shift == 5.0
    assert (
        ours.index_for_timestep(float(t := theirs.timesteps[3]))
        == 3
        == theirs.index_for_timestep(t)
    )


def test_a_pi0_style_loop_of_ten_steps_is_the_original() -> None:
    """A small random network in place of a function: a chunk of 16 actions of 7 numbers."""
    torch.manual_seed(0)
    policy = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.SiLU(), torch.nn.Linear(32, 7))
    found = []
    for scheduler in both(num_inference_steps=10):
        x = drawn(shape=(1, 16, 7))
        with torch.no_grad():
            for t in scheduler.timesteps:
                told = torch.full((*x.shape[:-1], 1), float(t) / 1000)
                x = scheduler.step(policy(torch.cat([x, told], -1)), t, x, return_dict=False)[0]
        found.append([x])
    assert_same(*found)
    assert np.isfinite(found[0][0].numpy()).all()


def test_the_class_is_where_the_others_are() -> None:
    module = importlib.import_module("fastddim.dropins.diffusers")
    assert FLOW.__name__ in module.__all__
    assert FLOW.__module__ == module.__name__
    assert issubclass(FLOW, FLOW_ORIGINAL)
    assert len(SHAPE) == 4


def test_steps_before_set_timesteps_are_the_originals() -> None:
    """The constructor's 1000 σ have no 0 at their end."""
    found = []
    for cls in (FLOW, FLOW_ORIGINAL):
        scheduler = cls(shift=3.0)
        if cls is FLOW:
            never_the_originals(scheduler)
        scheduler.timesteps = scheduler.timesteps[:-1]
        found.append(loop(scheduler, drawn(), start=990))
    assert_same(*found)
