"""The step against diffusers' DDIMScheduler, the real package, operation for operation."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim import ddim_step
from tests.paths import ALL, CPU, use

diffusers = pytest.importorskip("diffusers")

SHAPE = (2, 3, 6, 5)
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}
BOUNDS: dict[str, dict[str, Any]] = {
    "free": {"clip_sample": False},
    "clip": {"clip_sample": True, "clip_sample_range": 0.8},
    "threshold": {"thresholding": True, "sample_max_value": 1.5, "clip_sample": False},
}


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model(x: Tensor, t: int) -> Tensor:
    return torch.tanh(x * 0.9 + torch.sin(x.flip(-1) * 3 + t / 70))


def table_row(scheduler: Any, t: int, eta: float) -> Tensor:
    """The step's factors by the scheduler's own float32 operations."""
    s = t - 1000 // scheduler.num_inference_steps
    abar_t = scheduler.alphas_cumprod[t]
    abar_s = scheduler.alphas_cumprod[s] if s >= 0 else scheduler.final_alpha_cumprod
    sigma = eta * scheduler._get_variance(t, s) ** 0.5
    a_t, b_t = abar_t**0.5, (1 - abar_t) ** 0.5
    c2 = (1 - abar_s - sigma**2) ** 0.5
    return torch.stack([a_t, 1 / a_t, b_t, 1 / b_t, abar_s**0.5, torch.as_tensor(sigma), c2])


def quantile_threshold(scheduler: Any, x: Tensor, output: Tensor, row: Tensor, name: str) -> Tensor:
    """s of Saharia et al. (2022), from the x0 of a step that is not bounded."""
    _, x0 = ddim_step(x, output, row[None], 0, prediction=name)
    assert x0 is not None
    ratio = scheduler.config.dynamic_thresholding_ratio
    s = torch.quantile(x0.flatten(1).abs(), ratio, dim=1)
    return s.clamp(1, scheduler.config.sample_max_value)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("backend", "steps"),
    [
        *((name, 10) for name in CPU),
        *(pytest.param(name, 50, marks=pytest.mark.slow) for name in ALL),
    ],
)
@pytest.mark.parametrize(("eta", "rederive"), list(itertools.product([0.0, 1.0], [False, True])))
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_steps_equal_diffusers(
    prediction: str,
    bound: str,
    eta: float,
    rederive: bool,
    backend: str,
    steps: int,
) -> None:
    with use(backend):
        assert_equal_to_diffusers(prediction, bound, eta, rederive, steps)


def assert_equal_to_diffusers(
    prediction: str, bound: str, eta: float, rederive: bool, steps: int
) -> None:
    scheduler = diffusers.DDIMScheduler(prediction_type=PREDICTIONS[prediction], **BOUNDS[bound])
    scheduler.set_timesteps(steps)
    x = randn(*SHAPE, seed=0)
    for t in scheduler.timesteps.tolist():
        output, z = model(x, t), randn(*SHAPE, seed=t)
        expected = scheduler.step(
            output,
            t,
            x,
            eta=eta,
            use_clipped_model_output=rederive,
            variance_noise=z if eta else None,
        )
        row = table_row(scheduler, t, eta)
        got, x0 = ddim_step(
            x,
            output,
            row[None],
            0,
            noise=z if eta else None,
            prediction=prediction,
            clip=0.8 if bound == "clip" else None,
            threshold=quantile_threshold(scheduler, x, output, row, prediction)
            if bound == "threshold"
            else None,
            rederive=rederive,
            noise_first=False,
        )
        assert torch.equal(got, expected.prev_sample), f"x_s at t = {t}"
        assert x0 is not None
        assert torch.equal(x0, expected.pred_original_sample), f"x0 at t = {t}"
        x = got
    assert x.isfinite().all()
