"""diffusers' Euler ancestral scheduler beside the drop-in: whole loops, draws, and refusals."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import pytest
import torch

from tests.dropins.euler_cases import (
    EULER,
    EULER_ORIGINAL,
    EULERS,
    Config,
    assert_same,
    assert_same_loops,
    drawn,
    loop,
    net,
    scaled,
    start,
    stepped,
)

V: Config = {"prediction_type": "v_prediction"}
ZERO: Config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", **V}


def both(config: Config | None = None, steps: int = 12) -> tuple[Any, Any]:
    made = EULER(**config or {}), EULER_ORIGINAL(**config or {})
    for scheduler in made:
        scheduler.set_timesteps(steps)
    return made


def test_whole_loops_have_the_originals_bits() -> None:
    cases = EULERS[::11]
    assert {config["prediction_type"] for config, _ in cases} == {"epsilon", "v_prediction"}
    for config, times in cases:
        assert_same_loops("euler", config, times)


@pytest.mark.slow
def test_more_loops_have_the_originals_bits() -> None:
    for config, times in EULERS[1::5]:
        assert_same_loops("euler", config, times)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("shape", [(1, 16, 7), (3, 5), (2, 16, 64, 64), (2, 4, 2, 8, 8)])
@pytest.mark.parametrize("config", [{}, V, ZERO])
def test_states_of_every_shape_have_the_originals_bits(
    config: Config, shape: tuple[int, ...]
) -> None:
    ours, theirs = (
        loop(scheduler, start(scheduler, shape), torch.Generator().manual_seed(2))
        for scheduler in both(config)
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize("config", [{}, V])
def test_infinities_stay_in_their_elements(config: Config) -> None:
    """The sum holds the term 0·x0, which makes such an element NaN."""
    found = []
    for scheduler in both(config):
        x = start(scheduler)
        x[0, 0, 0, 0] = float("inf")
        result = stepped(scheduler, x, scheduler.timesteps[0], generator=torch.Generator())
        assert not result.prev_sample[0, 0, 0, 0].isfinite()
        found.append([result.prev_sample.flatten()[1:], result.pred_original_sample])
    assert_same(*found)


@pytest.mark.parametrize("source", ["global", "generator", "generators"])
@pytest.mark.parametrize("config", [{}, V])
def test_draws_and_their_generators_are_the_originals(config: Config, source: str) -> None:
    found = []
    for scheduler in both(config):
        torch.manual_seed(11)
        listed = [torch.Generator().manual_seed(k) for k in (3, 4)]
        sources = {"global": None, "generator": listed[0], "generators": listed}
        x, kept = start(scheduler), []
        for t in scheduler.timesteps:
            output = net(scaled(scheduler, x, t), t)
            x, x0 = scheduler.step(output, t, x, sources[source], False)
            kept += [x, x0, torch.get_rng_state(), *(g.get_state() for g in listed)]
        found.append(kept)
    assert_same(*found)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("of_output", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("of_sample", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("config", [{}, V])
def test_other_dtypes_have_the_originals_bits(
    config: Config, of_sample: torch.dtype, of_output: torch.dtype
) -> None:
    found = []
    for scheduler in both(config):
        x, kept, g = drawn().to(of_sample), [], torch.Generator().manual_seed(1)
        for t in scheduler.timesteps:
            output = net(scaled(scheduler, x, t), t).to(of_output)
            result = scheduler.step(output, t, x, generator=g)
            assert result.prev_sample.dtype == of_output
            kept += [output, *result.values()]
            x = result.prev_sample.to(of_sample)
        found.append(kept)
    assert_same(*found)


def test_gradients_are_the_originals() -> None:
    for config in ({}, V):
        grads = []
        for scheduler in both(config, 4):
            x = drawn().requires_grad_()
            end = loop(scheduler, x, torch.Generator().manual_seed(1))[-2]
            end.square().sum().backward()
            grads.append([end.detach(), x.grad])
        assert_same(*grads)  # type: ignore[arg-type]


def test_a_loop_that_forgets_to_scale_is_warned(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    found, warned = [], []
    try:
        for scheduler in both():
            caplog.clear()
            x, kept, g = start(scheduler), [], torch.Generator().manual_seed(1)
            for t in scheduler.timesteps:
                x, x0 = scheduler.step(net(x, t), t, x, g, return_dict=False)
                kept += [x, x0]
            warned.append([record.message for record in caplog.records])
            found.append(kept)
    finally:
        logger.removeHandler(caplog.handler)
    assert warned[0] == warned[1]
    assert len(warned[0]) == 12
    assert "scale_model_input" in warned[0][0]
    assert_same(*found)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("zero", [False, True])
def test_the_start_and_the_models_input_are_the_originals(spacing: str, zero: bool) -> None:
    ours, theirs = both({"timestep_spacing": spacing, "rescale_betas_zero_snr": zero})
    assert torch.equal(ours.init_noise_sigma, theirs.init_noise_sigma)
    x = drawn()
    for i, t in enumerate(theirs.timesteps):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            found = []
            for scheduler in (ours, theirs):
                scheduler._step_index = None if i == 0 else i
                found.append(scheduler.scale_model_input(x.to(dtype), t))
                assert scheduler.is_scale_input_called
            assert found[0].dtype == found[1].dtype
            assert torch.equal(*found)


# --- Refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [3, torch.tensor(3), torch.tensor(3, dtype=torch.int32), True])
def test_indices_are_refused_in_the_originals_words(t: Any) -> None:
    words = []
    for scheduler in both():
        scheduler.is_scale_input_called = True
        with pytest.raises(ValueError, match="Passing integer indices") as caught:
            scheduler.step(drawn(), t, drawn())
        words.append(str(caught.value))
    assert words[0] == words[1]


@pytest.mark.parametrize(
    ("prediction", "error"),
    [("sample", NotImplementedError), ("flow", ValueError)],
)
def test_other_predictions_are_refused_as_by_the_original(
    prediction: str, error: type[Exception]
) -> None:
    for scheduler in both({"prediction_type": prediction}):
        with pytest.raises(error, match="prediction_type"):
            stepped(scheduler, drawn(), scheduler.timesteps[0])


def test_a_step_after_the_last_fails_as_in_the_original() -> None:
    for scheduler in both():
        x = loop(scheduler, drawn())[-2]
        with pytest.raises(IndexError):
            scheduler.step(x, scheduler.timesteps[-1], x)


def test_bad_options_have_the_originals_words() -> None:
    for cls in (EULER, EULER_ORIGINAL):
        with pytest.raises(NotImplementedError, match="is not implemented"):
            cls(beta_schedule="square")
        with pytest.raises(ValueError, match="is not supported"):
            cls(timestep_spacing="even").set_timesteps(4)


def test_other_schedulers_are_converted_as_by_the_original() -> None:
    module = importlib.import_module("diffusers")
    for name in ("DDIM", "DDPM", "PNDM", "EulerDiscrete", "DPMSolverMultistep"):
        config = getattr(module, f"{name}Scheduler")(beta_end=0.012).config
        ours, theirs = (cls.from_config(config) for cls in (EULER, EULER_ORIGINAL))
        assert {**ours.config, "_class_name": 0} == {**theirs.config, "_class_name": 0}
        assert torch.equal(ours.sigmas, theirs.sigmas)


def test_the_class_is_where_the_others_are() -> None:
    module = importlib.import_module("fastddim.dropins.diffusers")
    assert EULER.__name__ in module.__all__
    assert EULER.__module__ == module.__name__
    assert issubclass(EULER, EULER_ORIGINAL)
