"""diffusers' multistep solver beside the drop-in: whole loops against float64, and refusals."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastddim import NoiseSchedule, make_table
from fastddim.dropins.diffusers.multistep_table import make_rows
from tests.dropins.multistep_cases import (
    FAST,
    GRID,
    ORIGINAL,
    SDE,
    SHAPE,
    Config,
    diffusers,
    drawn,
    exact,
    loop,
    rms,
)
from tests.refusals import refused

NAMED = "FastDPMSolverMultistepScheduler"


def errors(config: Config, S: int) -> tuple[float, float]:
    """(the drop-in's, the original's) error of a whole loop; the generators end alike."""
    x, ends, states = drawn(), [], []
    for cls in (FAST, ORIGINAL):
        scheduler, g = cls(**config), torch.Generator().manual_seed(5)
        scheduler.set_timesteps(S)
        scheduler.set_begin_index(0)
        ends.append(loop(scheduler, x, g))
        states.append(g.get_state())
        assert scheduler.step_index == len(scheduler.timesteps)
    assert torch.equal(*states)
    truth = exact(config, S, x)
    ours, theirs = (rms(end - truth) for end in ends)
    assert ends[0].isfinite().all()
    return ours, theirs


def assert_no_worse(cases: list[tuple[Config, int]]) -> None:
    """Single loops differ by luck at the last place of float32; whole families do not."""
    ratios: dict[Any, list[float]] = {}
    undefined = 0
    for config, S in cases:
        ours, theirs = errors(config, S)
        if not np.isfinite(theirs):  # a step of h = 0: 0/0 in the original alone
            undefined += 1
            continue
        assert ours <= 3 * theirs, (config, S)
        for name in ("algorithm_type", "solver_order", "prediction_type", "solver_type"):
            ratios.setdefault(config[name], []).append(ours / theirs)
    assert len(ratios) == 9
    assert undefined < len(cases) / 10
    means = {name: float(np.exp(np.mean(np.log(each)))) for name, each in ratios.items()}
    assert all(mean <= 0.95 for mean in means.values()), means


def test_whole_loops_are_no_worse_than_the_originals() -> None:
    assert_no_worse(GRID[::1031])


@pytest.mark.slow
def test_more_loops_are_no_worse_than_the_originals() -> None:
    assert_no_worse(GRID[7::101])


@pytest.mark.gpu
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("config", [{}, {"solver_order": 1}, {"thresholding": True}, SDE])
def test_on_a_gpu_a_loop_is_that_of_a_cpu(config: Config, prediction: str) -> None:
    ends = []
    for device in ("cpu", "cuda"):
        scheduler = FAST(**config, prediction_type=prediction)
        scheduler.set_timesteps(12, device=device)
        x = loop(scheduler, drawn().to(device), torch.Generator().manual_seed(5))
        ends.append(x.cpu())
    assert (ends[0] - ends[1]).abs().max() <= 1e-5 * ends[0].abs().max()


@pytest.mark.parametrize("config", [{}, {"solver_order": 1}, {"solver_type": "heun"}])
def test_a_solver_that_starts_anywhere_is_no_worse(config: Config) -> None:
    x, ours, theirs = drawn(), [], []
    for start in range(1, 11):
        ends = []
        for cls in (FAST, ORIGINAL):
            scheduler = cls(**config)
            scheduler.set_timesteps(12)
            scheduler.set_begin_index(start)
            ends.append(loop(scheduler, x, start=start))
        truth = exact(config, 12, x, start=start)
        ours.append(rms(ends[0] - truth))
        theirs.append(rms(ends[1] - truth))
    assert np.mean(np.log(ours)) <= np.mean(np.log(theirs))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_rows_are_those_of_make_table(eta: float) -> None:
    schedule = NoiseSchedule.linear()
    abar = schedule.alphas_cumprod
    pairs = [(999, 700), (700, 420), (420, 100), (100, 3)]
    sigmas = np.sqrt((1 - abar) / abar)[[999, 700, 420, 100, 3]]
    rows, S = make_rows(sigmas, 2, eta, heun=False), len(pairs)
    want = make_table(schedule, pairs, eta, order=2)
    np.testing.assert_allclose(rows[S + 1 :], want[1:], rtol=3e-7)
    first = make_table(schedule, pairs, eta)
    x, eps, z = np.random.default_rng(1).standard_normal((3, 5))
    for mine, row in zip(rows[:S].astype(float), first.astype(float), strict=True):
        x0 = (x - row[2] * eps) / row[0]
        np.testing.assert_allclose(
            mine[4] * x0 + mine[6] * x + mine[5] * z,
            row[4] * x0 + row[6] * eps + row[5] * z,
            atol=1e-5,
        )
    assert 0 < rows[:S, 7].max() < 1e-37
    with np.errstate(divide="ignore"):
        for factor, reciprocal in ((0, 1), (2, 3)):
            assert np.array_equal(rows[:, reciprocal], np.float32(1) / rows[:, factor])


def test_a_step_of_no_length_keeps_the_state() -> None:
    for heun in (False, True):
        rows = make_rows([10.0, 3.0, 3.0, 3.0, 1.0, 0.0], 2, 1.0, heun)
        assert np.isfinite(rows).all()
        same = rows[[1, 2, 6, 7]]
        np.testing.assert_allclose(same[:, [4, 5, 6]], [[0, 0, 1]] * 4, atol=1e-7)


# --- Noise ------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["global", "generator", "generators", "given"])
@pytest.mark.parametrize("config", [SDE, {}])
def test_draws_and_their_generators_are_the_originals(config: Config, source: str) -> None:
    ends, states = [], []
    for cls in (FAST, ORIGINAL):
        scheduler, x = cls(**config), drawn()
        scheduler.set_timesteps(8)
        torch.manual_seed(11)
        listed = [torch.Generator().manual_seed(k) for k in (3, 4)]
        sources: dict[str, dict[str, Any]] = {
            "global": {},
            "generator": {"generator": listed[0]},
            "generators": {"generator": listed},
            "given": {"variance_noise": drawn(9)},
        }
        for t in scheduler.timesteps:
            (x,) = scheduler.step(0.3 * x, t, x, **sources[source], return_dict=False)
        ends.append(x)
        states.append([torch.get_rng_state(), *(g.get_state() for g in listed)])
    assert (ends[0] - ends[1]).abs().max() < 2e-6 * ends[1].abs().max()
    assert all(map(torch.equal, *states))


# --- Half precision ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "config", [{}, SDE, {"prediction_type": "v_prediction"}, {"thresholding": True}]
)
def test_half_precision_is_no_worse_and_keeps_its_dtype(config: Config, dtype: torch.dtype) -> None:
    x = drawn().to(dtype)
    truth, found = exact(config, 10, x), []
    for cls in (FAST, ORIGINAL):
        scheduler = cls(**config)
        scheduler.set_timesteps(10)
        end = loop(scheduler, x, torch.Generator().manual_seed(5))
        assert end.dtype == dtype
        found.append(rms(end.double() - truth))
    assert found[0] <= 1.2 * found[1]  # The last state is rounded by both.


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    ("of_sample", "of_output"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
    ],
)
def test_mixed_dtypes_give_the_originals_dtype(
    prediction: str, of_sample: torch.dtype, of_output: torch.dtype
) -> None:
    found = []
    for cls in (FAST, ORIGINAL):
        scheduler = cls(prediction_type=prediction)
        scheduler.set_timesteps(4)
        t = scheduler.timesteps[0]
        found.append(scheduler.step(drawn(2).to(of_output), t, drawn().to(of_sample)).prev_sample)
    assert found[0].dtype == found[1].dtype
    assert (found[0].float() - found[1].float()).abs().max() < 0.2


# --- Refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("solver_order", 3, "1 or 2"),
        ("solver_order", 0, "1 or 2"),
        ("algorithm_type", "dpmsolver", "'dpmsolver++' or 'sde-dpmsolver++'"),
        ("algorithm_type", "sde-dpmsolver", "'dpmsolver++' or 'sde-dpmsolver++'"),
        ("prediction_type", "flow_prediction", "'epsilon' or 'v_prediction' or 'sample'"),
        ("use_flow_sigmas", True, "False"),
        ("use_dynamic_shifting", True, "False"),
        ("variance_type", "learned", "None"),
        ("variance_type", "learned_range", "None"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(name: str, value: Any, allowed: str) -> None:
    line = (f"{name} must be {allowed} for {NAMED}, got {value!r}",)
    refused(lambda: FAST(**{name: value}), ValueError, *line)
    refused(lambda: FAST.from_config({name: value}), ValueError, *line)


def test_the_singlestep_solver_is_refused_by_name() -> None:
    singlestep = diffusers.DPMSolverSinglestepScheduler
    words = "config must be that of", "DPMSolverSinglestepScheduler's"
    named = {"_class_name": "DPMSolverSinglestepScheduler"}
    for config in (singlestep().config, singlestep.from_config(ORIGINAL().config).config, named):
        refused(lambda config=config: FAST.from_config(config), ValueError, *words)  # type: ignore[misc]
    # diffusers' own conversion is the way around.
    again = FAST.from_config(ORIGINAL.from_config(singlestep().config).config)
    assert type(again).__name__ == NAMED
    assert FAST.from_config({"solver_order": 1, "algorithm_type": "dpmsolver++"})


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "PNDM", "EulerDiscrete", "UniPCMultistep"])
def test_other_schedulers_are_converted_as_by_the_original(name: str) -> None:
    config = getattr(diffusers, f"{name}Scheduler")().config
    found, want = (cls.from_config(config).config for cls in (FAST, ORIGINAL))
    assert {**found} == {**want}


def test_a_rising_sigma_is_refused_for_the_sde_alone() -> None:
    for config in ({}, SDE):
        scheduler = FAST(**config)
        scheduler.set_timesteps(timesteps=[900, 500, 700, 100])

        def run(scheduler: Any = scheduler) -> Tensor:
            return loop(scheduler, drawn())

        if config:
            refused(run, ValueError, 'timesteps must fall with algorithm_type "sde-dpmsolver++"')
        else:
            assert run().isfinite().all()


def test_a_step_too_many_is_refused() -> None:
    scheduler = FAST()
    scheduler.set_timesteps(3)
    x = loop(scheduler, drawn())
    refused(lambda: scheduler.step(x, 0, x), IndexError, "step_index must lie in [0, 2], got 3")


def test_bad_options_have_the_originals_words() -> None:
    for given in ({"solver_type": "euler"}, {"beta_schedule": "square"}):
        with pytest.raises(NotImplementedError, match="is not implemented"):
            FAST(**given)
    with pytest.raises(ValueError, match="set_timesteps"):
        FAST().step(drawn(), 999, drawn())
    both = {"use_karras_sigmas": True, "use_beta_sigmas": True}
    with pytest.raises(ValueError, match="Only one of"):
        FAST(**both)


def test_the_class_is_where_the_others_are() -> None:
    module = importlib.import_module("fastddim.dropins.diffusers")
    assert NAMED in module.__all__
    assert FAST.__module__ == module.__name__
    assert issubclass(FAST, ORIGINAL)
    assert len(SHAPE) == 4
