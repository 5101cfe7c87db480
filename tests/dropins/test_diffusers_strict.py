"""strict=True: each defect of the originals beside the step done right, against exact truth.

The numbers stand in ``docs/dropins/strict.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim import DDIM
from fastddim.dropins.diffusers import (
    FastDDIMInverseScheduler,
    FastDDIMParallelScheduler,
    FastDDIMScheduler,
)
from fastddim.tools.quality import Gaussian
from tests.dropins.strict_cases import (
    MEAN,
    STD,
    Config,
    DDIMInverseScheduler,
    DDIMParallelScheduler,
    DDIMScheduler,
    T,
    exact_model,
    level_reached,
    loop,
    original,
    randn,
    schedule_of,
    strict,
)
from tests.refusals import refused


def start(scheduler: Any, mean: float = MEAN, std: float = STD) -> tuple[Tensor, Tensor]:
    """x_T as such data has it at the first timestep, and where the exact flow carries it."""
    a = float(scheduler.alphas_cumprod[scheduler.timesteps[0]])
    z = randn(4, 1024).double()
    spread = math.sqrt(a * std**2 + 1 - a)
    return (math.sqrt(a) * mean + spread * z).float(), mean + std * z


def error(scheduler: Any, mean: float = MEAN, **given: Any) -> tuple[float, Tensor]:
    """The distance from the exact flow, root mean square, and the samples."""
    x, exact = start(scheduler, mean)
    found = loop(scheduler, x, exact_model(scheduler, mean), **given)
    return float((found - exact).square().mean().sqrt()), found


def taken(scheduler: Any) -> list[tuple[int, int]]:
    """The (t, s) of the original's own formula, s = −1 for all that is final_alpha_cumprod."""
    stride = T // scheduler.num_inference_steps
    return [(t, max(t - stride, -1)) for t in scheduler.timesteps.tolist()]


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


def test_given_timesteps_are_the_native_samplers() -> None:
    chosen = [999, 700, 420, 300, 20]
    for kind in (FastDDIMScheduler, FastDDIMParallelScheduler):
        scheduler: Any = kind(clip_sample=False, strict=True)
        for given in (chosen, torch.tensor(chosen)):
            scheduler.set_timesteps(timesteps=given, device="cpu")
            assert scheduler.timesteps.tolist() == chosen
            assert scheduler.num_inference_steps == 5
            x, _ = start(scheduler)
            model = exact_model(scheduler, MEAN)
            schedule = schedule_of(scheduler)
            ddim = DDIM(schedule=schedule, spacing=chosen)
            expected = ddim.sample(lambda x, t, model=model: model(x, t[0]), x)
            torch.testing.assert_close(loop(scheduler, x, model), expected, rtol=1e-6, atol=1e-6)


def test_bad_timesteps_are_refused_and_change_nothing() -> None:
    scheduler = strict(5)
    before = scheduler.timesteps.clone()
    bad: list[tuple[Any, tuple[str, ...]]] = [
        ([999, 999], ("timesteps must strictly fall", "999 before 999")),
        ([20, 300], ("timesteps must strictly fall", "20 before 300")),
        ([1000], ("timesteps[0]", "999", "1000")),
        ([], ("timesteps must be one or more integers", "[]")),
        ("999", ("timesteps must be one or more integers", "'999'")),
    ]
    for given, words in bad:
        refused(partial(scheduler.set_timesteps, timesteps=given), ValueError, *words)
    both = partial(scheduler.set_timesteps, 5, timesteps=[999])
    refused(both, ValueError, "num_inference_steps must be left out", "5")
    assert torch.equal(scheduler.timesteps, before)
    loose: Any = FastDDIMParallelScheduler()
    refused(lambda: loose.set_timesteps(timesteps=[999]), ValueError, "timesteps", "strict=True")
    upwards: Any = FastDDIMInverseScheduler(strict=True)
    upwards.set_timesteps(timesteps=[20, 300, 999])
    refused(
        lambda: upwards.set_timesteps(timesteps=[300, 20]),
        ValueError,
        "timesteps must strictly rise",
    )
