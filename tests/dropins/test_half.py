"""Half precision in one pass: every bit of the originals' eager loops, in bfloat16 and float16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.counts import NAMES, Tally
from fastddim.dropins import monai
from tests import numpy_backend
from tests.cases import some
from tests.dropins import ddpm_cases, monai_original
from tests.dropins.euler_cases import FLOWS
from tests.dropins.euler_cases import PAIRS as FLOWS_OF
from tests.dropins.euler_cases import assert_same_loops as assert_same_flows
from tests.dropins.scheduler_cases import (
    BOUNDS,
    DRAWS,
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
    unstepped,
)
from tests.paths import CPU, here, instead, use

HALVES = [torch.bfloat16, torch.float16]


def fused(config: Config, steps: int, which: str = "plain") -> tuple[Any, Any]:
    return unstepped(*both(config, steps, which))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("config", some(GRID[::47], 2), ids=str)
def test_configurations_are_bit_identical(config: Config, dtype: torch.dtype) -> None:
    assert_same_configuration(*fused(config, 7), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("part", range(12))
def test_every_configuration_is_bit_identical(part: int, dtype: torch.dtype) -> None:
    for config in GRID[part::12]:
        assert_same_configuration(*fused(config, 7), dtype)


@pytest.mark.one_in(2)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "every"),
    [
        *((name, 211) for name in here(*CPU)),
        ("triton", 509),
        pytest.param("triton", 61, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("dtype", HALVES)
def test_each_backend_is_bit_identical(name: str, every: int, dtype: torch.dtype) -> None:
    with use(name):
        for config in GRID[::every]:
            original, fast = fused(config, 7)
            given = {"eta": 0.7, "use_clipped_model_output": True, "seed": 11}
            assert_same_loops(original, fast, randn(*SHAPE).to(dtype), every=3, **given)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("which", ["plain", "parallel"])
@pytest.mark.parametrize("draw", DRAWS)
def test_fifty_steps_are_bit_identical(which: str, dtype: torch.dtype, draw: str) -> None:
    original, fast = fused({}, 50, which)
    given = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in DRAWS[draw].items()}
    assert_same_loops(original, fast, randn(*SHAPE).to(dtype), **given)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_inversion_is_bit_identical(spacing: str, prediction: str, dtype: torch.dtype) -> None:
    config = {"timestep_spacing": spacing, "prediction_type": prediction}
    original, fast = fused(config, 50, "inverse")
    assert_same_loops(original, fast, randn(*SHAPE).to(dtype))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", here(*CPU))
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("bound", BOUNDS, ids=str)
def test_extremes_are_bit_identical(
    name: str, dtype: torch.dtype, prediction: str, bound: Config
) -> None:
    """Subnormals, and in float16 sums and quotients that overflow."""
    original, fast = fused({"prediction_type": prediction, **bound}, 50)
    x, output = (randn(2, 3, 8, 8, seed=k) for k in range(2))
    x[0] *= 1e-6 if dtype == torch.float16 else 1e-39
    output[0] *= 2e-7 if dtype == torch.float16 else 1e-40
    x[1], output[1] = x[1] * 4e4, output[1] * 3e4
    x.view(-1)[-3:] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    x, output = x.to(dtype), output.to(dtype)
    if "thresholding" in bound:  # the quantile of NaN is NaN
        x = x.nan_to_num(1.0, 1.0, 1.0)
    with use(name):
        for t in (981, 501, 1):
            assert_same_outcome(
                lambda s, t: s.step(output, t, x, 0.4, True, gen(), return_dict=False),
                original, fast, t,
            )  # fmt: skip


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_odd_sizes_and_layouts_are_bit_identical(layout: str, dtype: torch.dtype) -> None:
    original, fast = fused({}, 10)
    x = LAYOUTS[layout](0).to(dtype)
    assert_same_loops(original, fast, x, eta=0.5, seed=1)


def test_dtypes_may_take_turns_on_one_scheduler() -> None:
    original, fast = both({}, 10)
    for t in original.timesteps:
        for dtype in (torch.float32, *HALVES, torch.float32):
            x = randn(*SHAPE).to(dtype)
            a, b = (s.step(model(x, t), t, x).prev_sample for s in (original, fast))
            assert_identical(a, b, dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_bound_that_float16_does_not_hold_is_the_originals(dtype: torch.dtype) -> None:
    original, fast = both({"clip_sample_range": 1e6}, 10)
    x = randn(*SHAPE).to(dtype)
    assert_same_outcome(lambda s: s.step(x, 500, x, return_dict=False), original, fast)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_batch_at_its_own_timesteps_is_the_originals(dtype: torch.dtype) -> None:
    original, fast = both({}, 20, "parallel")
    x, t = randn(*SHAPE).to(dtype), torch.tensor([900, 20])
    a, b = (s.batch_step_no_noise(x, t, x) for s in (original, fast))
    assert_identical(a, b)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_backend_that_does_not_round_leaves_the_originals(dtype: torch.dtype) -> None:
    original, fast = both({}, 10)
    with instead(numpy_backend.BACKEND):
        assert_same_loops(original, fast, randn(*SHAPE).to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("which", "generator"),
    [*((which, False) for which in PAIRS), ("plain", True), ("parallel", True), ("ddpm", True)],
)
def test_a_step_is_one_operation_and_two_with_noise(
    which: str, generator: bool, dtype: torch.dtype
) -> None:
    scheduler: Any = ddpm_cases.FAST() if which == "ddpm" else PAIRS[which][1]()
    scheduler.set_timesteps(5)
    x = randn(2, 3, 16, 16).to(dtype)
    given: Config = {"eta": 1.0} if generator and which != "ddpm" else {}
    given |= {"generator": gen()} if generator else {}
    tally = Tally(0)
    for t in scheduler.timesteps.tolist()[:3]:  # the first step makes the tables
        with (tally := Tally(x.numel())):
            x = scheduler.step(x, t, x, **given).prev_sample
    assert tally.found["operations"] == 1 + generator, NAMES


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("start", range(2))
def test_ddpm_loops_are_bit_identical(start: int, dtype: torch.dtype) -> None:
    for config, chosen in ddpm_cases.GRID[start::463]:
        original, fast = ddpm_cases.fused(config, **chosen)
        assert_same_loops(original, fast, randn(*SHAPE).to(dtype), seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
def test_more_ddpm_loops_are_bit_identical(dtype: torch.dtype) -> None:
    for config, chosen in ddpm_cases.GRID[5::41]:
        original, fast = ddpm_cases.fused(config, **chosen)
        assert_same_loops(original, fast, randn(*SHAPE).to(dtype), seed=3)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_monais_loops_are_bit_identical(
    prediction: str, clip: bool, eta: float, dtype: torch.dtype
) -> None:
    class Unstepped(monai_original.Described):
        step: Any = None
        reversed_step: Any = None

    config: Config = {"prediction_type": prediction, "clip_sample": clip}
    theirs, ours = monai_original.Described(**config), monai.fused(Unstepped)(**config)
    found: list[list[Tensor]] = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(50)
        x = randn(*SHAPE).to(dtype)
        found.append(monai_original.loop(scheduler, x, eta, seed=2))
        found[-1] += monai_original.reversed_loop(scheduler, x)
    for a, b in zip(*found, strict=True):
        assert_identical(a, b)


QUIET = [case for case in FLOWS if not case[0]["stochastic_sampling"]]


@pytest.mark.parametrize("dtype", HALVES)
def test_flow_matching_loops_are_bit_identical(dtype: torch.dtype) -> None:
    for config, times in QUIET[::37]:
        assert_same_flows("flow", config, times, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
def test_more_flow_matching_loops_are_bit_identical(dtype: torch.dtype) -> None:
    for config, times in QUIET[1::7]:
        assert_same_flows("flow", config, times, dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_sum_of_a_gpu_is_flow_matchings_too(dtype: torch.dtype) -> None:
    """On a GPU the fused step takes the place of a CPU's two operations."""
    _, theirs = (cls() for cls in FLOWS_OF["flow"])
    ours = FLOWS_OF["flow"][0]()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    x, u = randn(*SHAPE).to(dtype), randn(*SHAPE, seed=1).to(dtype)
    table = ours._table_on(x.device, dtype)
    for i, t in enumerate(theirs.timesteps):
        expected = theirs.step(u, t, x).prev_sample
        x_s, _ = ours._own.stepped(
            table, x, u, i, prediction="sample", posterior=True, want_x0=False, checked=True
        )
        assert_identical(x_s, expected)


# --- On a GPU ---------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("config", GRID[::97], ids=str)
def test_half_steps_on_a_gpu(config: Config, moved: bool, dtype: torch.dtype) -> None:
    """Eager PyTorch multiplies by the reciprocal of a factor that is on the CPU.

    The quotient is then one unit in its last float32 place off, which moves its rounded value by a
    unit of the dtype where it lies next to a middle between two.
    """
    original, fast = fused(config, 50)
    x, output = randn(*SHAPE).cuda().to(dtype), randn(*SHAPE, seed=1).cuda().to(dtype)
    if moved:  # as a pipeline's float32 image moves it
        for scheduler in (original, fast):
            scheduler.add_noise(x.float(), output.float(), torch.tensor([3, 900]))
    for t in original.timesteps.cuda():
        a, b = (
            s.step(output, t, x, eta=0.5, generator=torch.Generator("cuda").manual_seed(1))
            for s in (original, fast)
        )
        if not a.prev_sample.isfinite().all():
            continue
        for of_a, of_b in zip(a.values(), b.values(), strict=True):
            unit = torch.finfo(dtype).eps * max(1.0, float(of_a.abs().max()))
            assert float((of_a.float() - of_b.float()).abs().max()) <= unit
            assert (of_a != of_b).float().mean() <= 0.05
        x = a.prev_sample


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_half_loops_on_a_gpu_are_close(dtype: torch.dtype) -> None:
    x = randn(2, 3, 32, 32).cuda().to(dtype)
    a, b = (loop(scheduler, x)[-2].float() for scheduler in fused({}, 50))
    assert float((a - b).abs().max()) <= 8 * torch.finfo(dtype).eps
