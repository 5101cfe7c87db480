"""The rules of c1 and c2 against the schedulers that have them, and against their definitions."""

from __future__ import annotations

import copy
import importlib
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastddim import DDIM, NoiseSchedule, make_table
from fastddim.levels import Levels
from fastddim.tools.quality import Gaussian
from fastddim.variances import CPS, TCD, Fresh, Steps, noise_and_direction
from tests.refusals import refused

diffusers: Any = importlib.import_module("diffusers")  # without its types
LINEAR = NoiseSchedule.linear()
BETAS: dict[str, Any] = {"beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}
RULES = [0.0, 0.6, 1.0, Fresh(), CPS(0.3), TCD(0.4)]
SHAPE = (4, 32)


def model(x: Tensor, t: Tensor) -> Tensor:
    return 0.8 * x.clamp(-1.5, 1.5) + 1e-3 * (t % 97).float().view(-1, 1)


def noises(count: int) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(3))


def by_scheduler(scheduler: Any, x: Tensor, z: Tensor, **options: Any) -> Tensor:
    """The original's loop, whose draws are ``z`` in their order."""
    drawn = iter(z)
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "randn_tensor", lambda *_, **__: next(drawn))
        for t in scheduler.timesteps:
            output = model(x, t.expand(len(x)))
            x = scheduler.step(output, t, x, **options).prev_sample
    return x


@pytest.mark.parametrize(("variance", "eta"), [("fixed_small", 1.0), ("fixed_large", "hat")])
def test_ddpms_fixed_variances_are_eta_1_and_sigma_hat(variance: str, eta: Any) -> None:
    original = diffusers.DDPMScheduler(variance_type=variance, **BETAS)
    original.set_timesteps(50)
    x, z = noises(1)[0], noises(50)
    ddim = DDIM(50, eta, LINEAR, "leading")
    found = ddim.sample(model, x, noise=list(z))
    torch.testing.assert_close(found, by_scheduler(original, x, z), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_tcd_is_diffusers_tcd(gamma: float) -> None:
    original = diffusers.TCDScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False
    )
    original.set_timesteps(8)
    x, z = noises(1)[0], noises(8)
    # The original's last step leads to t = 0.
    ddim = DDIM(
        eta=TCD(gamma),
        schedule=LINEAR,
        spacing=original.timesteps.tolist(),
        final_alpha_cumprod=float(LINEAR.alphas_cumprod[0]),
    )
    found = ddim.sample(model, x, noise=list(z))
    torch.testing.assert_close(found, by_scheduler(original, x, z, eta=gamma), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.07, 0.3, 0.48])
def test_tcd_rounds_the_level_between_as_diffusers(gamma: float) -> None:
    # (1 − 0.07)·500 is 465 in float32, and a rounding below 465 in float64.
    original = diffusers.TCDScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False
    )
    original.set_timesteps(timesteps=[979, 519, 499, 239, 219, 99, 79])
    spacing = [(979, 500), (500, 225), (225, 90)]
    original.timesteps = torch.tensor([979, 500, 225, 90])
    original.num_inference_steps = 4
    x, z = noises(1)[0], noises(4)
    drawn, expected = iter(z), x
    module = __import__(type(original).__module__, fromlist=["randn_tensor"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "randn_tensor", lambda *_, **__: next(drawn))
        for t in original.timesteps[:3]:
            expected = original.step(
                model(expected, t.expand(4)), t, expected, eta=gamma
            ).prev_sample
    found = DDIM(eta=TCD(gamma), schedule=LINEAR, spacing=spacing).sample(
        model, x, noise=list(z[:3])
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_fresh_noise_is_lcm_but_for_its_boundary_factors() -> None:
    original = diffusers.LCMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False
    )
    original.set_timesteps(4, original_inference_steps=50)
    x, z = noises(1)[0], noises(4)
    ddim = DDIM(eta=Fresh(), schedule=LINEAR, spacing=original.timesteps.tolist())
    found = ddim.sample(model, x, noise=list(z))
    torch.testing.assert_close(found, by_scheduler(original, x, z), rtol=1e-3, atol=1e-4)


def test_euler_ancestral_is_eta_1_on_its_path() -> None:
    original = diffusers.EulerAncestralDiscreteScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear"
    )
    original.set_timesteps(12)
    sigmas = original.sigmas.double()
    path = NoiseSchedule.from_levels(1.0, sigmas[:-1].flip(0), original.timesteps.flip(0))
    z = noises(12)
    x = expected = original.init_noise_sigma * noises(1)[0]
    drawn = iter(z)
    module = diffusers.schedulers.scheduling_euler_ancestral_discrete
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "randn_tensor", lambda *_, **__: next(drawn))
        for t in original.timesteps:
            original.scale_model_input(expected, t)
            output = model(expected, t.expand(len(expected)))
            expected = original.step(output, t, expected).prev_sample
    ddim = DDIM(12, 1.0, path)
    found = ddim.sample(model, x, noise=list(z))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("path", [LINEAR, NoiseSchedule.flow(2.0), NoiseSchedule.edm()], ids=str)
def test_a_rule_keeps_the_level_of_s(path: Any, rule: Any) -> None:
    ddim = DDIM(12, rule, path, "trailing", prediction="sample")
    sigma2 = path.at([s for _, s in ddim.pairs]).sigma2
    found = (ddim.table[:, 5:].astype(np.float64) ** 2).sum(1)
    np.testing.assert_allclose(found, sigma2, rtol=1e-5, atol=1e-12)
    assert ddim.table[-1, 5] == 0


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_a_number_draws_the_data(eta: float) -> None:
    data = Gaussian(0.3, 0.5, LINEAR)
    out = DDIM(200, eta, LINEAR, "trailing").sample(data, shape=(64, 512), seeds=range(64))
    assert float(out.mean()) == pytest.approx(0.3, abs=0.02)
    assert float(out.std()) == pytest.approx(0.5, rel=0.05)


def test_rules_are_their_definitions() -> None:
    (none, direct), (cps, along) = (
        noise_and_direction(Steps(levels(0.2), levels(0.7), np.array([False])), rule)
        for rule in (Fresh(), CPS(0.5))
    )
    sigma = np.sqrt(0.3)
    assert (none[0], direct[0]) == pytest.approx((sigma, 0.0))
    assert (cps[0], along[0]) == pytest.approx((sigma * np.sqrt(0.5), sigma * np.sqrt(0.5)))


def levels(abar: float) -> Levels:
    return Levels.of_abar(np.array([abar]))


@pytest.mark.parametrize("rule", [Fresh(), CPS(0.3), TCD(0.4)], ids=str)
def test_rules_are_values(rule: Any) -> None:
    ddim = DDIM(5, rule)
    assert pickle.loads(pickle.dumps(rule)) == copy.deepcopy(rule) == rule
    assert pickle.loads(pickle.dumps(ddim)) == ddim
    assert hash(DDIM(5, copy.deepcopy(rule))) == hash(ddim)
    assert DDIM(5, CPS(0.31)) != ddim
    ddim.describe("cpu")


BAD: dict[str, tuple[Any, tuple[str, ...]]] = {
    "CPS above 1": (lambda: CPS(1.5), ("eta must lie in [0, 1]", "1.5")),
    "negative TCD": (lambda: TCD(-0.1), ("gamma must lie in [0, 1]", "-0.1")),
    "TCD without a path": (
        lambda: noise_and_direction(Steps(levels(0.2), levels(0.7), np.array([False])), TCD(0.5)),
        ("TCD needs the levels",),
    ),
    "order 2": (lambda: DDIM(5, Fresh(), order=2), ("eta must be a number with order 2", "Fresh")),
    "towards noise": (
        lambda: make_table(LINEAR, [(5, 10)], Fresh()),
        ("eta must be 0 for a step towards noise", "Fresh"),
    ),
    "backwards": (
        lambda: DDIM(5, CPS(0.5)).invert(model, torch.zeros(SHAPE)),
        ("eta must be 0 to run backwards",),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_nonsense_is_named(name: str) -> None:
    call, words = BAD[name]
    refused(partial(call), ValueError, *words)
