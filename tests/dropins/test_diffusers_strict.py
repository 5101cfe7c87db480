"""strict=True: each defect of the originals beside the step done right, against exact truth.

The numbers stand in ``fastddim/dropins/README.md``.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastddim import DDIM, NoiseSchedule, make_pairs
from fastddim.coefficients import Prediction, PredictionSynonym
from fastddim.dropins.diffusers import (
    FastDDIMInverseScheduler,
    FastDDIMParallelScheduler,
    FastDDIMScheduler,
)
from fastddim.dropins.diffusers.strict import tables_of
from fastddim.step.op import initial_noise
from fastddim.timesteps import SpacingName
from fastddim.tools.quality import Gaussian
from tests.refusals import refused

diffusers: Any = importlib.import_module("diffusers")  # without its types
DDIMInverseScheduler = diffusers.DDIMInverseScheduler
DDIMParallelScheduler = diffusers.DDIMParallelScheduler
DDIMScheduler = diffusers.DDIMScheduler

T = 1000
MEAN, STD = 0.3, 0.5
SPACINGS = ("leading", "trailing", "linspace")
Config = dict[str, Any]


def original(steps: int, **config: Any) -> Any:
    scheduler = DDIMScheduler(**{"clip_sample": False, **config})
    scheduler.set_timesteps(steps)
    return scheduler


def strict(steps: int, **config: Any) -> Any:
    scheduler: Any = FastDDIMScheduler(**{"clip_sample": False, **config}, strict=True)
    scheduler.set_timesteps(steps)
    return scheduler


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def schedule_of(scheduler: Any) -> NoiseSchedule:
    return NoiseSchedule.from_betas(scheduler.betas)


def exact_model(scheduler: Any, mean: float = MEAN, std: float = STD) -> Callable[..., Tensor]:
    """The exact ε of data from N(mean, std²), at −1 as the original's tables have it: at T − 1."""
    abar = scheduler.alphas_cumprod.double()

    def model(x: Tensor, t: Any) -> Any:
        a = abar[int(t)]
        return ((1 - a).sqrt() * (x.double() - a.sqrt() * mean) / (a * std**2 + 1 - a)).to(x.dtype)

    return model


def start(scheduler: Any, mean: float = MEAN, std: float = STD) -> tuple[Tensor, Tensor]:
    """x_T as such data has it at the first timestep, and where the exact flow carries it."""
    a = float(scheduler.alphas_cumprod[scheduler.timesteps[0]])
    z = randn(4, 1024).double()
    spread = math.sqrt(a * std**2 + 1 - a)
    return (math.sqrt(a) * mean + spread * z).float(), mean + std * z


def loop(scheduler: Any, x: Tensor, model: Callable[..., Tensor], **given: Any) -> Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x, **given).prev_sample
    return x


def error(scheduler: Any, mean: float = MEAN, **given: Any) -> tuple[float, Tensor]:
    """The distance from the exact flow, root mean square, and the samples."""
    x, exact = start(scheduler, mean)
    found = loop(scheduler, x, exact_model(scheduler, mean), **given)
    return float((found - exact).square().mean().sqrt()), found


def taken(scheduler: Any) -> list[tuple[int, int]]:
    """The (t, s) of the original's own formula, s = −1 for all that is final_alpha_cumprod."""
    stride = T // scheduler.num_inference_steps
    return [(t, max(t - stride, -1)) for t in scheduler.timesteps.tolist()]


def level_reached(scheduler: Any, t: int) -> float:
    """ᾱ_s of a step from t: with ε = 0 it goes from x to √(ᾱ_s/ᾱ_t)·x."""
    x = torch.ones(1, 1)
    found = scheduler.step(torch.zeros(1, 1), t, x).prev_sample
    return float(found) ** 2 * float(scheduler.alphas_cumprod[t])


def wrong(spacing: str) -> list[int]:
    """S for which some step of the original's does not go to its next timestep."""
    scheduler: Any = DDIMScheduler(timestep_spacing=spacing)
    found = []
    for steps in range(1, T + 1):
        scheduler.set_timesteps(steps)
        levels = scheduler.timesteps.tolist()
        if taken(scheduler) != list(zip(levels, [*levels[1:], -1], strict=True)):
            found.append(steps)
    return found


# --- Each defect, and strict ------------------------------------------------------------------


def test_linspace_misses_its_own_timesteps_for_every_s() -> None:
    assert wrong("linspace") == list(range(2, 1000))
    own, mine = (make(150, timestep_spacing="linspace") for make in (original, strict))
    t, s = own.timesteps[:2].tolist()
    assert (t, s) == (999, 992)
    assert level_reached(own, t) == pytest.approx(float(own.alphas_cumprod[993]), rel=1e-4)
    assert level_reached(mine, t) == pytest.approx(float(own.alphas_cumprod[992]), rel=1e-4)
    (far, blurred), (near, right) = error(own), error(mine)
    assert far == pytest.approx(0.0356, abs=5e-4)
    assert near == pytest.approx(0.0095, abs=5e-4)
    assert float(blurred.std()) > STD > float(right.std())


def test_trailing_misses_its_own_timesteps_for_984_s() -> None:
    assert len(wrong("trailing")) == 984
    own, mine = (make(300, timestep_spacing="trailing") for make in (original, strict))
    far, near = error(own)[0], error(mine)[0]
    assert far == pytest.approx(0.0367, abs=5e-4)
    assert near == pytest.approx(0.0050, abs=5e-4)


def test_more_steps_are_better_only_where_they_are_right() -> None:
    steps = (200, 400)
    own, mine = (
        [error(make(S, timestep_spacing="linspace"))[0] for S in steps]
        for make in (original, strict)
    )
    assert own == pytest.approx([0.0055, 0.0821], abs=1e-4)
    assert mine == pytest.approx([0.0071, 0.0038], abs=1e-4)


def test_trailing_leaves_noise_at_the_end_for_372_s() -> None:
    scheduler: Any = DDIMScheduler(timestep_spacing="trailing")
    ends = []
    for steps in range(1, T + 1):
        scheduler.set_timesteps(steps)
        ends.append(taken(scheduler)[-1][1])
    assert sum(s == 0 for s in ends) == sum(s >= 0 for s in ends) == 372
    # Data that is a single point shows what is left: DDIM finds it exactly with any steps.
    left = [s for s, end in enumerate(ends, 1) if end == 0][-1]
    own, mine = (make(left, timestep_spacing="trailing") for make in (original, strict))
    x, _ = start(own, std=0.0)
    off = [
        float((loop(s, x, exact_model(own, std=0.0)) - MEAN).square().mean().sqrt())
        for s in (own, mine)
    ]
    assert level_reached(own, int(own.timesteps[-1])) == pytest.approx(0.9999, abs=1e-6)
    assert level_reached(mine, int(mine.timesteps[-1])) == pytest.approx(1, abs=1e-6)
    assert off[0] == pytest.approx(0.04, abs=2e-3)
    assert off[1] < 1e-5


def test_trailing_takes_a_step_more_for_62_s() -> None:
    scheduler: Any = DDIMScheduler(timestep_spacing="trailing")
    more = []
    for steps in range(1, T + 1):
        scheduler.set_timesteps(steps)
        if len(scheduler.timesteps) != steps:
            assert len(scheduler.timesteps) == steps + 1
            assert scheduler.timesteps[-1] == -1
            more.append(steps)
    assert len(more) == 62
    assert more[:4] == [61, 103, 121, 122]
    own, mine = (make(61, timestep_spacing="trailing") for make in (original, strict))
    far, grey = error(own)
    near, right = error(mine)
    assert float(grey.std()) == pytest.approx(0.0008, abs=1e-4)
    assert float(right.std()) == pytest.approx(0.473, abs=1e-3)
    assert far == pytest.approx(0.496, abs=1e-3)
    assert near == pytest.approx(0.0234, abs=5e-4)
    assert (len(mine.timesteps), int(mine.timesteps[-1])) == (61, 15)


def test_leading_with_an_offset_leaves_the_table() -> None:
    own = original(1000, steps_offset=1)
    assert own.timesteps[0] == 1000
    with pytest.raises(IndexError, match="index 1000 is out of bounds"):
        own.step(randn(1, 4), own.timesteps[0], randn(1, 4))
    mine = strict(1000, steps_offset=1)
    assert mine.timesteps.tolist() == list(reversed(range(1000)))
    assert error(mine)[0] < 0.002


def test_linspace_of_one_step_starts_at_data() -> None:
    own, mine = (make(1, timestep_spacing="linspace") for make in (original, strict))
    assert own.timesteps.tolist() == [0]
    assert mine.timesteps.tolist() == [999]
    x = randn(4, 1024)
    assert float(loop(own, x, exact_model(own)).std()) > 0.9  # noise stays noise
    assert float(loop(mine, x, exact_model(mine)).std()) < 0.1  # the mean of all data


def test_an_eta_slightly_above_one() -> None:
    own, mine = original(50), strict(50)
    given: Config = {"generator": torch.Generator().manual_seed(1)}
    assert error(own, eta=1.0, **given)[1].isfinite().all()
    assert error(own, eta=1.0085, **given)[1].isnan().all()
    x = randn(4, 1024)
    refused(lambda: loop(mine, x, exact_model(mine), eta=1.0085), ValueError, "eta", "1.0085")
    refused(lambda: loop(mine, x, exact_model(mine), eta=-0.5), ValueError, "eta", "-0.5")
    refused(lambda: loop(mine, x, exact_model(mine), eta=math.nan), ValueError, "eta", "nan")
    largest = float(str(_message(lambda: mine.step(x, 980, x, eta=1.0085))).split()[5])
    assert largest == 1.008027
    assert loop(mine, x, exact_model(mine), eta=largest, **given).isfinite().all()


def _message(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_a_terminal_snr_of_zero(spacing: str) -> None:
    config: Config = {"rescale_betas_zero_snr": True, "timestep_spacing": spacing}
    own, mine = (make(50, **config) for make in (original, strict))
    assert own.alphas_cumprod[-1] == 0
    assert not error(own)[1].isfinite().any()
    away, found = error(mine)
    assert found.isfinite().all()
    assert away == pytest.approx(0.028, abs=1e-3)
    assert error(strict(500, **config))[0] < away / 5
    for prediction in ("v_prediction", "sample"):
        x = randn(2, 8)
        scheduler = strict(10, prediction_type=prediction, **config)
        assert loop(scheduler, x, lambda x, t: 0.5 * x).isfinite().all()


def test_a_batch_ends_at_one_whatever_set_alpha_to_one_says() -> None:
    config: Config = {
        "set_alpha_to_one": False,
        "clip_sample": False,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    }
    own: Any = DDIMParallelScheduler(**config)
    mine: Any = FastDDIMParallelScheduler(**config, strict=True)
    for scheduler in (own, mine):
        scheduler.set_timesteps(20)
    x, t = torch.ones(2, 4), torch.zeros(2, dtype=torch.int64)
    ends = []
    for scheduler in (own, mine):
        alone = scheduler.step(x * 0, 0, x).prev_sample
        together = scheduler.batch_step_no_noise(x * 0, t, x)
        ends.append([float(a[0, 0]) ** 2 * float(own.alphas_cumprod[0]) for a in (alone, together)])
    assert ends[0] == pytest.approx([0.99915, 1.0], rel=1e-6)
    assert ends[1] == pytest.approx([0.99915, 0.99915], rel=1e-6)


def test_inverse_trailing_does_not_mirror_its_forward_timesteps() -> None:
    own: Any = DDIMInverseScheduler(timestep_spacing="trailing", clip_sample=False)
    count = extra = 0
    for steps in range(1, T + 1):
        own.set_timesteps(steps)
        to = own.timesteps.tolist()
        count += [max(t - T // steps, -1) for t in to] != [-1, *to[:-1]]
        extra += to[0] == -1
    assert (count, extra) == (984, 62)
    mine: Any = FastDDIMInverseScheduler(
        timestep_spacing="trailing", clip_sample=False, strict=True
    )
    away = []
    for scheduler in (own, mine):
        scheduler.set_timesteps(300)
        last = int(scheduler.timesteps[-1])
        gaussian = Gaussian(MEAN, STD, schedule_of(scheduler))
        x0 = MEAN + STD * randn(4, 1024)
        found = loop(scheduler, x0, exact_model(scheduler))
        away.append(float((found - gaussian.flow(x0, -1, last)).square().mean().sqrt()))
    assert away == pytest.approx([0.0772, 0.0058], abs=1e-4)
    with pytest.raises(ValueError, match="linspace is not supported"):
        DDIMInverseScheduler(timestep_spacing="linspace").set_timesteps(10)


def test_half_precision_keeps_a_float32_state() -> None:
    """The model in bf16 over 200 steps, against the same loop in float64."""
    own, mine = original(200), strict(200)
    x, _ = start(own)
    model = exact_model(own)

    def rounded(x: Tensor, t: Any) -> Tensor:
        return model(x.bfloat16().float(), t).bfloat16()

    x = x.bfloat16()
    truth = loop(original(200), x.double(), model)
    away = []
    for scheduler in (own, mine):
        found = loop(scheduler, x, rounded)
        assert found.dtype == torch.bfloat16
        away.append(float((found - truth).square().mean().sqrt() / truth.square().mean().sqrt()))
    assert away == pytest.approx([0.068, 0.0023], rel=0.05)


# --- What strict is ---------------------------------------------------------------------------


def assert_chained(scheduler: Any, steps: int) -> None:
    """S distinct timesteps, and a step from each to the next, the last to data."""
    levels = scheduler.timesteps.tolist()
    assert len(levels) == steps
    assert sorted(set(levels), reverse=True) == levels
    assert 0 <= levels[-1] <= levels[0] < T
    table = tables_of(scheduler, 0.0, torch.device("cpu")).table[:-1]
    assert len(table) == steps
    assert torch.equal(table[:-1, 4], table[1:, 0])
    assert table[-1, 4] == 1
    assert torch.equal(table[:, 0], torch.from_numpy(sqrt_abar(scheduler))[levels])


def sqrt_abar(scheduler: Any) -> Any:
    return np.sqrt(schedule_of(scheduler).alphas_cumprod).astype(np.float32)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1, 7])
def test_strict_goes_from_each_timestep_to_the_next(spacing: str, offset: int) -> None:
    scheduler = strict(1, timestep_spacing=spacing, steps_offset=offset)
    for steps in [1, 2, 3, 61, 103, 334, 999, 1000, *range(5 + offset, 1000, 53)]:
        scheduler.set_timesteps(steps)
        assert_chained(scheduler, steps)


@pytest.mark.slow
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
def test_strict_chains_its_timesteps_for_every_number_of_steps(spacing: str, offset: int) -> None:
    scheduler = strict(1, timestep_spacing=spacing, steps_offset=offset)
    for steps in range(1, T + 1):
        scheduler.set_timesteps(steps)
        assert_chained(scheduler, steps)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 10, 50, 61])
def test_strict_is_the_native_sampler(
    spacing: SpacingName, prediction: Prediction | PredictionSynonym, steps: int
) -> None:
    config: Config = {
        "prediction_type": prediction,
        "timestep_spacing": spacing,
        "clip_sample": steps == 50,
        "clip_sample_range": 0.8,
        "set_alpha_to_one": steps != 10,
    }
    scheduler = strict(steps, **config)
    schedule = schedule_of(scheduler)
    native = DDIM(
        steps,
        schedule=schedule,
        spacing=spacing,
        prediction=prediction,
        clip=0.8 if steps == 50 else None,
        final_alpha_cumprod=1.0 if steps != 10 else float(schedule.alphas_cumprod[0]),
    )
    assert native.pairs == make_pairs(spacing, steps, T)

    def model(x: Tensor, t: Tensor) -> Tensor:
        level = t if t.dim() == 0 else t[0]
        return 0.8 * x.clamp(-1.5, 1.5) + 1e-3 * (int(level) % 97)

    x = randn(2, 3, 5, 7)
    expected = native.sample(model, x)
    assert torch.equal(loop(scheduler, x, model), expected)
    parallel: Any = FastDDIMParallelScheduler(**{"clip_sample": False, **config}, strict=True)
    parallel.set_timesteps(steps)
    assert torch.equal(loop(parallel, x, model), expected)
    for t in parallel.timesteps:
        x = parallel.batch_step_no_noise(model(x, t), t.expand(2), x)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_strict_inversion_is_the_native_one_and_mirrors_sampling(spacing: SpacingName) -> None:
    config: Config = {"timestep_spacing": spacing, "clip_sample": False, "strict": True}
    inverse: Any = FastDDIMInverseScheduler(**config)
    inverse.set_timesteps(61)
    forward = strict(61, timestep_spacing=spacing)
    assert inverse.timesteps.tolist() == forward.timesteps.tolist()[::-1]
    model = exact_model(inverse)
    native = DDIM(61, schedule=schedule_of(inverse), spacing=spacing)
    x0 = MEAN + STD * randn(4, 64)
    x_T = loop(inverse, x0, model)
    assert torch.equal(x_T, native.invert(lambda x, t: model(x, t[0]), x0))
    assert float((loop(forward, x_T, model) - x0).abs().max()) < 0.2


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    spacing=st.sampled_from(SPACINGS),
    steps=st.integers(1, 1000),
    eta=st.floats(0.0, 1.0),
    rederive=st.booleans(),
    one=st.booleans(),
    prediction=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    where=st.floats(0.0, 1.0),
)
@example("leading", 1, 1.0, False, False, "epsilon", 0.0)
def test_a_strict_step_is_the_equation_in_float64(
    spacing: str,
    steps: int,
    eta: float,
    rederive: bool,
    one: bool,
    prediction: str,
    where: float,
) -> None:
    scheduler = strict(
        steps,
        timestep_spacing=spacing,
        set_alpha_to_one=one,
        prediction_type=prediction,
        clip_sample=rederive,
    )
    index = round(where * (steps - 1))
    t, s = [*scheduler.timesteps.tolist(), -1][index : index + 2]
    abar = np.append(schedule_of(scheduler).alphas_cumprod, 0.0)
    abar[-1] = 1.0 if one else abar[0]
    a, a_s = torch.from_numpy(abar)[[t, s]]
    x, output, z = (randn(2, 8, seed=k) for k in range(3))
    found = scheduler.step(
        output, t, x, eta=eta, use_clipped_model_output=rederive, variance_noise=z
    )
    X, m = x.double(), output.double()
    if prediction == "epsilon":
        x0, eps = (X - (1 - a).sqrt() * m) / a.sqrt(), m
    elif prediction == "sample":
        x0, eps = m, (X - a.sqrt() * m) / (1 - a).sqrt()
    else:
        x0, eps = a.sqrt() * X - (1 - a).sqrt() * m, a.sqrt() * m + (1 - a).sqrt() * X
    if rederive:
        x0 = x0.clamp(-1, 1)
        eps = (X - a.sqrt() * x0) / (1 - a).sqrt()
    # The last step adds no noise, whatever ᾱ it ends at.
    sigma = (s >= 0) * eta * torch.sqrt((1 - a / a_s) * (1 - a_s) / (1 - a))
    x_s = a_s.sqrt() * x0 + (1 - a_s - sigma**2).clamp(min=0).sqrt() * eps + sigma * z
    # ε of an x0 near x is a difference that float32 rounds at x's size.
    size = float(X.abs().max() / (1 - a).sqrt() + X.abs().max() / a.sqrt())
    torch.testing.assert_close(found.prev_sample.double(), x_s, rtol=0, atol=1e-6 * (5 + size))
    torch.testing.assert_close(
        found.pred_original_sample.double(), x0, rtol=0, atol=1e-6 * (5 + size)
    )


def test_timesteps_somebody_chose_himself() -> None:
    """What lies between the chosen ones is skipped, and not only where the list ends."""
    scheduler, native = strict(10), DDIM(spacing=[900, 500, 130, 20])
    scheduler.timesteps = torch.tensor([900, 500, 130, 20])
    model = exact_model(scheduler)
    x = randn(2, 8)
    expected = DDIM(spacing=[900, 500, 130, 20], schedule=schedule_of(scheduler)).sample(
        lambda x, t: model(x, t[0]), x
    )
    assert native.pairs[-1] == (20, -1)
    assert torch.equal(loop(scheduler, x, model), expected)
    scheduler.timesteps[1] = 400
    assert level_reached(scheduler, 900) == pytest.approx(
        float(scheduler.alphas_cumprod[400]), rel=1e-4
    )
    refused(lambda: scheduler.step(x, 500, x), ValueError, "timestep", "500")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inference", [False, True])
def test_a_half_sample_written_in_place_counts_as_written(
    dtype: torch.dtype, inference: bool
) -> None:
    with torch.inference_mode(inference):
        scheduler, fresh = strict(10), strict(10)
        x, output = randn(2, 3, 4, 4).to(dtype), randn(2, 3, 4, 4, seed=1).to(dtype)
        first = scheduler.step(output, 900, x).prev_sample
        first[:, 0] = 0.25
        found = scheduler.step(output, 800, first).prev_sample
        expected = fresh.step(output, 800, first.clone()).prev_sample
    assert torch.equal(found[:, 0], expected[:, 0])
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6)


def test_half_samples_that_a_pipeline_makes_are_read_as_they_are() -> None:
    scheduler, fresh = strict(10), strict(10)
    x, output = randn(2, 4).bfloat16(), randn(2, 4, seed=1).bfloat16()
    first = scheduler.step(output, 900, x).prev_sample
    found = scheduler.step(output, 800, first * 2).prev_sample
    assert torch.equal(found, fresh.step(output, 800, (first * 2).clone()).prev_sample)


# --- Seeds ------------------------------------------------------------------------------------


def test_a_seed_is_an_image_in_any_batch() -> None:
    def images(seeds: Any, **given: Any) -> Tensor:
        scheduler = strict(20, timestep_spacing="trailing")
        scheduler.use_seeds(seeds)
        x = scheduler.initial_latents((len(seeds), 3, 4, 4))
        return loop(scheduler, x, exact_model(scheduler), eta=1.0, **given)

    torch.manual_seed(0)
    state = torch.get_rng_state()
    together = images([5, 2**63 - 1, 0])
    for i, seed in enumerate([5, 2**63 - 1, 0]):
        assert torch.equal(images(torch.tensor([seed]))[0], together[i])
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    before = [g.get_state() for g in generators]
    assert torch.equal(images([5, 2**63 - 1, 0], generator=generators), together)
    assert all(torch.equal(g.get_state(), s) for g, s in zip(generators, before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(together[0], together[2])


def test_seeds_are_the_native_samplers() -> None:
    scheduler = strict(20)
    seeds = [1, 2]
    scheduler.use_seeds(seeds)
    x = scheduler.initial_latents((2, 3, 4, 4))
    assert torch.equal(x, initial_noise(torch.tensor(seeds), (2, 3, 4, 4)))
    assert scheduler.initial_latents((2, 8), dtype=torch.float16).dtype == torch.float16
    model = exact_model(scheduler)
    native = DDIM(20, eta=0.5, schedule=schedule_of(scheduler), spacing="leading")
    expected = native.sample(lambda x, t: model(x, t[0]), shape=(2, 3, 4, 4), seeds=seeds)
    torch.testing.assert_close(loop(scheduler, x, model, eta=0.5), expected, rtol=0, atol=1e-5)
    scheduler.use_seeds(None)
    a, b = (
        loop(scheduler, x, model, eta=0.5, generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    )
    assert torch.equal(a, b)
    assert not torch.allclose(a, expected)


def test_seeds_refused() -> None:
    loose: Any = FastDDIMScheduler()
    scheduler = strict(10)
    refused(lambda: loose.use_seeds([1]), ValueError, "seeds", "strict=True")
    loose.use_seeds(None)
    refused(lambda: scheduler.use_seeds([-1]), ValueError, "seeds[0]", "-1")
    refused(lambda: scheduler.use_seeds(["a"]), TypeError, "seeds[0]", "'a'")
    refused(lambda: scheduler.initial_latents((1, 3)), ValueError, "seeds", "use_seeds")
    scheduler.use_seeds([1, 2])
    refused(lambda: scheduler.initial_latents((3, 3)), ValueError, "shape", "2", "(3, 3)")
    x = randn(3, 4)
    refused(lambda: scheduler.step(x, 900, x, eta=1.0), ValueError, "sample", "2 seeds", "3")


# --- Refusals ---------------------------------------------------------------------------------


def test_strict_refuses_in_one_line() -> None:
    x = randn(2, 4)
    scheduler = strict(10)
    make: Any = FastDDIMScheduler
    refused(lambda: make(strict=True).step(x, 900, x), ValueError, "call set_timesteps")
    refused(lambda: scheduler.step(x, 901, x), ValueError, "timestep", "10", "901")
    refused(lambda: scheduler.step(x, 900.0, x), ValueError, "timestep", "900.0")
    refused(lambda: scheduler.step(x.double(), 900, x), TypeError, "model_output", "float64")
    refused(lambda: scheduler.step(x[:1], 900, x), ValueError, "model_output", "(2, 4)", "(1, 4)")
    refused(lambda: scheduler.step(x[0], 900, x[0]), ValueError, "sample", "(4,)")
    for z, got in ((x[:1], "(1, 4)"), (0.5, "float")):
        step = partial(scheduler.step, x, 900, x, 1.0, variance_noise=z)
        refused(step, ValueError, "variance_noise", "(2, 4)", got)
    refused(lambda: scheduler.step(x, 900, x.long()), TypeError, "sample", "int64")
    refused(lambda: scheduler.step(1.0, 900, x), TypeError, "model_output", "float")
    grad = x.clone().requires_grad_()
    refused(lambda: scheduler.step(grad, 900, x), ValueError, "model_output", "grad")
    refused(lambda: scheduler.step(x, 900, grad), ValueError, "sample", "grad")
    named = "num_inference_steps"
    refused(lambda: scheduler.set_timesteps(0), ValueError, named, "got 0")
    refused(lambda: scheduler.set_timesteps(1001), ValueError, named, "1000", "got 1001")
    refused(lambda: scheduler.set_timesteps(2.5), TypeError, "num_inference_steps", "2.5")
    refused(lambda: make(strict=1), TypeError, "strict", "1")
    refused(lambda: make(strict=True, prediction_type="flow"), ValueError, "prediction_type")
    refused(lambda: make(strict=True, timestep_spacing="x"), ValueError, "timestep_spacing", "x")
    both: Config = {"eta": 1.0, "variance_noise": x, "generator": torch.Generator()}
    refused(lambda: scheduler.step(x, 900, x, **both), ValueError, "noise", "generator")
    parallel: Any = FastDDIMParallelScheduler(strict=True)
    parallel.set_timesteps(10)
    t = torch.tensor([900, 0])
    refused(
        lambda: parallel.batch_step_no_noise(x, t, x, eta=1.0), ValueError, "batch_step_no_noise"
    )
    found = parallel.batch_step_no_noise(x, torch.tensor([900, 17]), x)
    assert found[0].isfinite().all()
    assert found[1].isnan().all()  # 17 is not chosen, and looking would wait for a GPU


# --- Lists of timesteps that repeat or go back up ---------------------------------------------


def walked(scheduler: Any, levels: list[int], x: Tensor, model: Callable[..., Tensor]) -> Tensor:
    """The list taken step by step in float64, the last step to data."""
    abar = torch.from_numpy(np.append(schedule_of(scheduler).alphas_cumprod, 1.0))
    x = x.double()
    for t, s in zip(levels, [*levels[1:], -1], strict=True):
        eps = model(x, t)
        x0 = (x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
        x = abar[s].sqrt() * x0 + (1 - abar[s]).sqrt() * eps
    return x


LISTS = [[980, 500, 500, 0], [980, 300, 600, 0], [980, 500, 980, 500, 0], [7, 7, 7]]


@pytest.mark.parametrize("levels", LISTS, ids=str)
@pytest.mark.parametrize("kind", ["given", "sliced", "int32"])
def test_timesteps_that_repeat_or_rise_are_walked_as_listed(levels: list[int], kind: str) -> None:
    scheduler = strict(10)
    chosen = torch.tensor(levels)
    if kind == "sliced":
        chosen = torch.stack([chosen, chosen + 1], 1)[:, 0]
    scheduler.timesteps = chosen.int() if kind == "int32" else chosen
    x, model = randn(4, 256), exact_model(scheduler)
    found = loop(scheduler, x, model)
    torch.testing.assert_close(
        found.double(), walked(scheduler, levels, x, model), rtol=0, atol=5e-5
    )
    if levels == LISTS[0]:
        assert float(found.std()) == pytest.approx(0.0811, abs=4e-3)


def test_a_repeated_timestep_outside_of_the_list_is_refused() -> None:
    scheduler, x = strict(10), randn(2, 4)
    scheduler.timesteps = torch.tensor([980, 500, 500, 0])
    for t in (500, torch.tensor(500), scheduler.timesteps.clone()[1]):
        refused(partial(scheduler.step, x, t, x), ValueError, "timestep must be an element", "2")
    assert scheduler.step(x, 980, x).prev_sample.isfinite().all()
    scheduler.timesteps = torch.tensor([980, 300, 600, 0])
    call = partial(scheduler.step, x, 300, x, eta=0.5)
    refused(call, ValueError, "eta must be 0 for a step towards noise")
    for wrong_kind in ([980, 0], torch.tensor([[980, 0]])):
        scheduler.timesteps = wrong_kind
        refused(lambda: scheduler.step(x, 980, x), TypeError, "timesteps must be a tensor of one")
    for t in (-1, 1000):
        scheduler.timesteps = torch.tensor([980, t])
        refused(lambda: scheduler.step(x, 980, x), ValueError, "timesteps must lie in [0, 999]")
    parallel: Any = FastDDIMParallelScheduler(strict=True)
    parallel.set_timesteps(10)
    parallel.timesteps = torch.tensor([980, 500, 500, 0])
    found = parallel.batch_step_no_noise(x, torch.tensor([980, 500]), x)
    assert found[0].isfinite().all()
    assert found[1].isnan().all()  # which of the two is meant is not known


# --- What the original reads, ours reads ------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_strict_inversion_is_the_native_one_for_every_prediction(prediction: str) -> None:
    make: Any = FastDDIMInverseScheduler
    inverse = make(clip_sample=False, strict=True, prediction_type=prediction)
    inverse.set_timesteps(50)
    schedule = schedule_of(inverse)
    exact = Gaussian(MEAN, STD, schedule)
    name: Any = {"v_prediction": "v"}.get(prediction, prediction)
    native = DDIM(50, schedule=schedule, spacing="leading", prediction=name)
    abar = torch.tensor(schedule.alphas_cumprod)

    def model(x: Tensor, t: Any) -> Tensor:
        a = abar[int(t.flatten()[0])]
        y = x.double()
        eps = (1 - a).sqrt() * (y - a.sqrt() * MEAN) / (a * STD**2 + 1 - a)
        x0 = (y - (1 - a).sqrt() * eps) / a.sqrt()
        v = a.sqrt() * eps - (1 - a).sqrt() * x0
        return {"epsilon": eps, "v": v, "sample": x0}[name].float()

    own: Any = DDIMInverseScheduler(clip_sample=False, prediction_type=prediction)
    own.set_timesteps(50)
    x0 = MEAN + STD * randn(4, 1024)
    found, theirs = loop(inverse, x0, model), loop(own, x0, model)
    assert torch.equal(found, native.invert(model, x0))
    truth = exact.flow(x0, -1, int(inverse.timesteps[-1]))
    mine_off, own_off = (float((x - truth).square().mean().sqrt()) for x in (found, theirs))
    assert mine_off == pytest.approx(0.0320, abs=1e-4)
    assert own_off == pytest.approx({"v": 0.0413}.get(name, mine_off), abs=1e-4) or name == "sample"
    assert theirs.isfinite().all() or name == "sample"
    assert inverse.step(model(x0, inverse.timesteps[0]), 0, x0.half()).prev_sample.isfinite().all()


def test_levels_that_users_set_are_read() -> None:
    """Each change in the strict step is that in the equation."""
    x, output = randn(2, 8), randn(2, 8, seed=1)

    def expected(a_t: float, a_s: float) -> Tensor:
        x0 = (x.double() - (1 - a_t) ** 0.5 * output.double()) / a_t**0.5
        x_s: Tensor = a_s**0.5 * x0 + (1 - a_s) ** 0.5 * output.double()
        return x_s

    def assert_steps(scheduler: Any, t: int, a_t: float, a_s: float) -> None:
        found = scheduler.step(output, t, x).prev_sample.double()
        torch.testing.assert_close(found, expected(a_t, a_s), rtol=2e-6, atol=2e-6)

    scheduler = strict(10)
    own = scheduler.alphas_cumprod.clone()
    a0 = float(own[0])
    assert_steps(scheduler, 0, a0, 1.0)
    for final in (torch.tensor(0.9), 0.9, np.float64(0.9), torch.tensor([0.9])):
        scheduler.final_alpha_cumprod = final
        assert_steps(scheduler, 0, a0, 0.9)
    scheduler.alphas_cumprod = own**2
    assert_steps(scheduler, 900, float(own[900]) ** 2, float(own[800]) ** 2)
    squared = scheduler.alphas_cumprod.tolist()
    between = [squared[799] * w + squared[801] * (1 - w) for w in (0.1, 0.9)]
    scheduler.alphas_cumprod[800] = between[0]
    assert_steps(scheduler, 900, squared[900], between[0])
    scheduler.alphas_cumprod.data[800] = between[1]
    assert_steps(scheduler, 900, squared[900], between[1])
    scheduler.alphas_cumprod = own.double()
    assert_steps(scheduler, 900, float(own[900]), float(own[800]))
    inverse: Any = FastDDIMInverseScheduler(strict=True, clip_sample=False)
    inverse.set_timesteps(10)
    for first in (torch.tensor(0.95), 0.95):
        inverse.initial_alpha_cumprod = first
        assert_steps(inverse, 0, 0.95, a0)
    for name, bad in (("final", 0.0), ("final", 1.5), ("final", math.nan), ("initial", -1.0)):
        s = inverse if name == "initial" else scheduler
        setattr(s, f"{name}_alpha_cumprod", bad)
        refused(partial(s.step, output, 0, x), ValueError, f"{name}_alpha_cumprod", "(0, 1]")
    scheduler.final_alpha_cumprod = 1.0
    scheduler.alphas_cumprod[3] = math.nan
    refused(lambda: scheduler.step(output, 900, x), ValueError, "alphas_cumprod", "nan")


def test_float64_levels_survive_a_move_by_add_noise() -> None:
    scheduler, fresh = strict(10), strict(10)
    x = randn(2, 8)
    scheduler.add_noise(x, x, torch.tensor([3, 4]))
    scheduler.get_velocity(x, x, torch.tensor([3, 4]))
    moved = scheduler.alphas_cumprod
    scheduler.alphas_cumprod = moved.clone()
    scheduler._note_moved(moved)
    assert scheduler._abar() is moved
    a, b = (s.step(x, 900, x).prev_sample for s in (scheduler, fresh))
    assert torch.equal(a, b)
    scheduler.alphas_cumprod.mul_(0.5)
    assert scheduler._abar() is scheduler.alphas_cumprod
    assert not torch.equal(scheduler.step(x, 900, x).prev_sample, a)


@pytest.mark.parametrize("which", ["forwards", "inverse"])
def test_a_default_device_changes_no_strict_step(which: str) -> None:
    make: Any = FastDDIMInverseScheduler if which == "inverse" else FastDDIMScheduler
    x, output = randn(2, 8), randn(2, 8, seed=1)
    plain = make(strict=True)
    plain.set_timesteps(10)
    torch.set_default_device("meta")
    try:
        scheduler = make(strict=True)
        scheduler.set_timesteps(10)
        found = [s.step(output, 900, x).prev_sample for s in (scheduler, plain)]
    finally:
        torch.set_default_device(None)
    expected = plain.step(output, 900, x).prev_sample
    assert all(torch.equal(x_s, expected) for x_s in found)


@pytest.mark.parametrize(
    ("which", "is_strict"),
    [
        ("forwards", False),
        ("inverse", True),
        pytest.param("forwards", True, marks=pytest.mark.slow),
        pytest.param("inverse", False, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_step_equals_the_eager_one(which: str, is_strict: bool) -> None:
    torch.compiler.reset()
    make: Any = FastDDIMInverseScheduler if which == "inverse" else FastDDIMScheduler
    x, output = randn(2, 8), randn(2, 8, seed=1)
    schedulers = [make(strict=is_strict) for _ in range(2)]
    for s in schedulers:
        s.set_timesteps(10)
    compiled = torch.compile(schedulers[0].step, backend="aot_eager", fullgraph=not is_strict)
    for t in (900, 800):
        found, expected = (step(output, t, x) for step in (compiled, schedulers[1].step))
        assert torch.equal(found.prev_sample, expected.prev_sample)
    eager = schedulers[0].step(output, 900, x).prev_sample
    assert torch.equal(eager, schedulers[1].step(output, 900, x).prev_sample)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_the_variance_gives_the_log_probabilities_of_the_steps(spacing: str, eta: float) -> None:
    """ln N(x_s; μ, σ²) from the scheduler's attributes, against the noise that was added."""
    config: Config = {"timestep_spacing": spacing, "set_alpha_to_one": False}
    for make in (FastDDIMScheduler, FastDDIMParallelScheduler):
        scheduler: Any = make(**config, clip_sample=False, strict=True)
        scheduler.set_timesteps(50)
        abar, model = scheduler.alphas_cumprod, exact_model(scheduler)
        x = randn(2, 64)
        for t in scheduler.timesteps:
            s = scheduler.previous_timestep(t)
            z, eps = randn(2, 64, seed=int(t)), model(x, t)
            x_s = scheduler.step(eps, t, x, eta=eta, variance_noise=z).prev_sample
            a_t, a_s = abar[t], abar[s] if s >= 0 else scheduler.final_alpha_cumprod
            sigma = eta * scheduler._get_variance(t, s).sqrt()
            x0 = (x - (1 - a_t).sqrt() * eps) / a_t.sqrt()
            mean = a_s.sqrt() * x0 + (1 - a_s - sigma**2).clamp(min=0).sqrt() * eps
            if s < 0:
                assert sigma == 0  # the last step adds no noise
            else:
                log = (-((x_s - mean) ** 2) / (2 * sigma**2) - sigma.log()).mean()
                exact = (-(z**2) / 2 - sigma.log()).mean()
                assert float(log - exact) == pytest.approx(0, abs=2e-3)
            x = x_s


def test_a_variance_of_another_step_than_strict_takes_is_refused() -> None:
    scheduler = strict(150, timestep_spacing="linspace")
    t, s = scheduler.timesteps[:2].tolist()
    wrong_one = t - T // 150
    assert scheduler.previous_timestep(t) == s != wrong_one
    call = partial(scheduler._get_variance, t, wrong_one)
    refused(call, ValueError, "prev_timestep", str(s), str(wrong_one))
    refused(lambda: scheduler._get_variance(1, 0), ValueError, "timestep", "150", "got 1")
    assert scheduler._get_variance(torch.tensor(t), torch.tensor(s)).shape == ()
    plain = original(150, timestep_spacing="linspace")
    fast: Any = FastDDIMScheduler(timestep_spacing="linspace")
    fast.set_timesteps(150)
    assert torch.equal(fast._get_variance(t, wrong_one), plain._get_variance(t, wrong_one))
    assert fast.previous_timestep(t) == wrong_one
    parallel: Any = FastDDIMParallelScheduler(strict=True, timestep_spacing="linspace")
    parallel.set_timesteps(150)
    both = parallel._batch_get_variance(torch.tensor([t, s]), parallel.timesteps[1:3])
    assert torch.equal(both[0], parallel._get_variance(t))
    make: Any = FastDDIMScheduler
    refused(lambda: make().previous_timestep(3), ValueError, "call set_timesteps first")


def test_the_steps_use_the_last_level_of_a_zero_snr_schedule() -> None:
    scheduler = strict(10, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    table = tables_of(scheduler, 0.0, torch.device("cpu")).table
    assert 0 < scheduler.alphas_cumprod[-1] <= 2.0**-24
    assert float(table[0, 0]) ** 2 == pytest.approx(float(scheduler.alphas_cumprod[-1]), rel=1e-4)
    v = strict(10, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert v.alphas_cumprod[-1] == 0


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' own
def test_subclasses_are_compatible_with_what_they_replace() -> None:
    for own, mine in (
        (DDIMScheduler, FastDDIMScheduler),
        (DDIMParallelScheduler, FastDDIMParallelScheduler),
        (DDIMInverseScheduler, FastDDIMInverseScheduler),
    ):
        made: Any = mine(strict=True)
        assert {own, mine, *own().compatibles} == set(made.compatibles)
        # As diffusers' own test of compatibles has it.
        for other in made.compatibles:
            if "dummy" in other.__module__:  # what it needs is not installed
                continue
            config: Any = other.from_config(made.config).config
            again: Any = cast(Any, mine).from_config(config)
            assert again.config.strict is True
            assert again.config.num_train_timesteps == made.config.num_train_timesteps
            assert type(again) is mine
