"""The options of CompVis' descendants, beside their loops in plain PyTorch."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastddim.check import SamplingWarning
from fastddim.dropins.compvis import DDIMSampler
from tests.diffusion import BETAS, Model, X
from tests.dropins.compvis_cases import UC, C, eager
from tests.refusals import refused

GUIDED: dict[str, Any] = {
    "unconditional_guidance_scale": 7.5,
    "unconditional_conditioning": UC,
}
SCALES = [1.0, *[1.5 + 0.5 * i for i in range(19)]]


class VideoModel(Model):
    """A model as DynamiCrafter's: further arguments, an x0 whose scale falls, any rank."""

    def __init__(self, parameterization: str = "eps", rescale: bool = True) -> None:
        super().__init__(parameterization)
        self.use_dynamic_rescale = rescale
        falling = np.linspace(1.0, 0.7, 400)
        self.scale_arr = torch.tensor(np.concatenate([falling, np.full(1000, 0.7)])).float()
        self.betas = torch.from_numpy(BETAS).float()
        self.alphas_cumprod_prev = torch.cat([torch.ones(1), self.alphas_cumprod[:-1]])
        self.given: list[dict[str, Any]] = []

    def apply_model(
        self, x: Tensor, t: Tensor, c: Any, fs: Tensor | None = None, **more: Any
    ) -> Tensor:
        self.given.append(more)
        eps = super().apply_model(x, t, c)
        return eps if fs is None else eps + 1e-3 * fs.view(-1, *[1] * (x.dim() - 1))


def assert_identical(
    model: Any, given: dict[str, Any], theirs: dict[str, Any], x: Tensor = X, **made: Any
) -> None:
    """Compares whole calls of ``sample`` with the description, and the generator's final state."""
    eta = made.pop("eta", 0.7)
    sampler = DDIMSampler(model, **made)
    torch.manual_seed(0)
    _, kept = sampler.sample(20, len(x), x.shape[1:], C, x_T=x, eta=eta, log_every_t=1, **given)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    xs, x0s, expected = eager(sampler, x, C, **theirs)
    for name, own in (("x_inter", xs), ("pred_x0", x0s)):
        assert len(kept[name]) == 1 + len(own)
        for a, b in zip(kept[name][1:], own, strict=True):
            assert torch.equal(a, b)
            assert a.isfinite().all()
    assert torch.equal(state, expected)


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ucg_schedule": ({**GUIDED, "ucg_schedule": SCALES}, {"uc": UC, "scales": SCALES}),
    "dynamic_threshold": ({"dynamic_threshold": 0.7}, {"threshold": 0.7}),
    "threshold and quantize": (
        {"dynamic_threshold": 0.4, "quantize_x0": True, "temperature": 0.8},
        {"threshold": 0.4, "quantize": True, "temperature": 0.8},
    ),
    "guidance_rescale": (
        {**GUIDED, "guidance_rescale": 0.7},
        {"uc": UC, "scale": 7.5, "rescale": 0.7},
    ),
    "no guidance to rescale": ({"guidance_rescale": 0.7}, {}),
    "all": (
        {**GUIDED, "ucg_schedule": SCALES, "guidance_rescale": 0.3, "dynamic_threshold": 0.7},
        {"uc": UC, "scales": SCALES, "rescale": 0.3, "threshold": 0.7},
    ),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "two-calls"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("parameterization", ["eps", "v"])
@pytest.mark.parametrize("change", CHANGES)
def test_options_of_the_forks_are_bit_identical(
    change: str, parameterization: str, eta: float, stacked: bool
) -> None:
    given, theirs = CHANGES[change]
    theirs = {**theirs, "separate": not stacked}
    assert_identical(Model(parameterization), given, theirs, eta=eta, stacked=stacked)


@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "plain"])
@pytest.mark.parametrize("spacing", ["uniform", "uniform_trailing"])
@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_a_video_models_loop_is_bit_identical(
    parameterization: str, spacing: str, rescale: bool
) -> None:
    """DynamiCrafter's call: five dimensions, fs, two calls of the model, rescaled guidance."""
    model = VideoModel(parameterization, rescale)
    x = torch.randn(2, 4, 3, 5, 6, generator=torch.Generator().manual_seed(2))
    fs = torch.tensor([3, 24])
    options = {"guidance_rescale": 0.7, "timestep_spacing": spacing, "fs": fs}
    theirs = {"uc": UC, "scale": 7.5, "rescale": 0.7, "separate": True, "fs": fs}
    assert_identical(model, {**GUIDED, **options}, theirs, x, stacked=False)
    seen = [int(t[0]) for _, t, _ in model.seen[:40:2]]
    assert seen[0] == (999 if spacing == "uniform_trailing" else 951)


def test_conditions_that_cannot_be_stacked_take_two_calls() -> None:
    """ControlNet's guess mode: the unconditional control is None."""
    model = Model()
    c, uc = {"c_crossattn": [C], "c_concat": [X]}, {"c_crossattn": [UC], "c_concat": None}
    sampler = DDIMSampler(model, stacked=False)
    sampler.sample(
        10,
        2,
        X.shape[1:],
        c,
        x_T=X,
        unconditional_guidance_scale=3.0,
        unconditional_conditioning=uc,
    )
    assert [given for _, _, given in model.seen] == [c, uc] * 10


def test_zero123s_loop_leaves_out_the_noisiest_timestep() -> None:
    assert_identical(
        Model(),
        {"t_start": -1, "dynamic_threshold": 0.7},
        {"threshold": 0.7, "skipped": 1},
    )


@pytest.mark.parametrize("S", [1, 7, 16, 50, 333, 1000])
def test_trailing_timesteps_begin_at_the_last(S: int) -> None:
    sampler = DDIMSampler(VideoModel())
    sampler.make_schedule(S, "uniform_trailing", ddim_eta=0.5)
    expected = [round(1000 - i * (1000 / S)) - 1 for i in range(S)]
    assert sampler.ddim_timesteps.tolist() == expected[::-1]
    refused(
        lambda: sampler.make_schedule(61, "uniform_trailing"),
        ValueError,
        "S (ddim_num_steps) must",
        "got 61, which has -1 among them: near it 60 and 62",
    )


def test_a_clean_known_part_and_half_precision_at_the_start() -> None:
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :4] = 1
    x0 = X.flip(0)
    model = Model()
    DDIMSampler(model).sample(
        10, 2, X.shape[1:], C, x_T=X, mask=mask, x0=x0, clean_cond=True, precision=16
    )
    states = [x for x, _, _ in model.seen]
    assert all(torch.equal(x[..., :4].float(), x0[..., :4]) for x in states[1:])
    plain = Model()
    DDIMSampler(plain).sample(10, 2, X.shape[1:], C, x_T=X, precision=16)
    assert [x.dtype for x, _, _ in plain.seen] == [torch.float16] + 9 * [torch.float32]
    assert torch.equal(plain.seen[0][0], X.half())


# --- Keywords of the model --------------------------------------------------------------------


def test_unknown_keywords_reach_the_model_with_one_warning() -> None:
    model = VideoModel()
    sampler = DDIMSampler(model)
    given: dict[str, Any] = {"cfg_img": 2.0, "fs": torch.ones(2), "uc_type": "x"}
    with pytest.warns(SamplingWarning, match="cfg_img is no argument of the sampler") as caught:
        sampler.sample(10, 2, X.shape[1:], C, **given)
    assert len(caught) == 1
    sampler.sample(10, 2, X.shape[1:], C, **given)  # A second warning would be an error.
    assert model.given == [{"cfg_img": 2.0}] * 20
    refused(lambda: DDIMSampler(Model()).sample(10, 2, (4,), cfg_img=1), TypeError, "cfg_img")


def test_the_keywords_of_the_forks_are_arguments() -> None:
    signature = inspect.signature(DDIMSampler.sample).parameters
    names = ("dynamic_threshold", "ucg_schedule", "timestep_spacing", "guidance_rescale")
    assert all(name in signature for name in names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DDIMSampler(Model()).sample(10, 2, X.shape[1:], C, schedule_verbose=True)


# --- The tables that forks read ---------------------------------------------------------------


def test_the_tables_of_the_original_can_be_read() -> None:
    model = VideoModel()
    sampler = DDIMSampler(model)
    refused(
        lambda: sampler.sqrt_alphas_cumprod, AttributeError, "DDIMSampler", "sqrt_alphas_cumprod"
    )
    sampler.make_schedule(20, ddim_eta=0.5)
    abar, before = model.alphas_cumprod, model.alphas_cumprod_prev
    expected: dict[str, Any] = {
        "betas": model.betas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": np.sqrt(abar.numpy()),
        "sqrt_one_minus_alphas_cumprod": np.sqrt((1 - abar).numpy()),
        "log_one_minus_alphas_cumprod": np.log((1 - abar).numpy()),
        "sqrt_recip_alphas_cumprod": np.sqrt((1 / abar).numpy()),
        "sqrt_recipm1_alphas_cumprod": np.sqrt((1 / abar - 1).numpy()),
        "ddim_sigmas_for_original_num_steps": 0.5
        * torch.sqrt((1 - before) / (1 - abar) * (1 - abar / before)),
        "ddim_scale_arr": model.scale_arr[sampler.ddim_timesteps],
        "ddim_scale_arr_prev": model.scale_arr[[1, *sampler.ddim_timesteps[:-1]]],
    }
    for name, table in expected.items():
        assert torch.equal(getattr(sampler, name), torch.as_tensor(table)), name
    refused(lambda: sampler.counter, AttributeError, "DDIMSampler", "counter")


# --- encode -----------------------------------------------------------------------------------


def eager_encode(
    model: Any, sampler: DDIMSampler, x: Tensor, n: int, w: float, original: bool
) -> list[Tensor]:
    """The states of the inversion, whose factors are made of tensors without dimensions."""
    before: Any
    if original:
        levels, after, before = list(range(n)), model.alphas_cumprod, model.alphas_cumprod_prev
    else:
        levels = sampler.ddim_timesteps.tolist()
        after, before = sampler.ddim_alphas, torch.tensor(sampler.ddim_alphas_prev)
    states = []
    for i in range(n):
        t = torch.full((len(x),), levels[i])
        e = model.apply_model(x, t, C)
        if w != 1:
            u = model.apply_model(x, t, UC)
            e = u + w * (e - u)
        a, b = after[i], before[i]
        slope = a.sqrt() * ((1 / a - 1).sqrt() - (1 / b - 1).sqrt())
        x = (a / b).sqrt() * x + slope * e
        states.append(x)
    return states


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "two-calls"])
@pytest.mark.parametrize("w", [1.0, 3.0])
@pytest.mark.parametrize("S", [1, 7, 50, "original"])
def test_encode_is_bit_identical(S: Any, w: float, stacked: bool) -> None:
    model = VideoModel()
    sampler = DDIMSampler(model, stacked=stacked)
    sampler.make_schedule(20 if S == "original" else S)
    n = 100 if S == "original" else len(sampler.ddim_timesteps)
    called: list[int] = []
    x, found = sampler.encode(X, C, n, S == "original", n, w, None if w == 1 else UC, called.append)
    expected = eager_encode(model, sampler, X, n, w, S == "original")
    assert found["x_encoded"] is x
    assert found["intermediate_steps"] == called == list(range(n))
    for a, b in zip(found["intermediates"], expected, strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()


def test_encode_returns_the_states_that_are_asked_for() -> None:
    sampler = DDIMSampler(Model())
    sampler.make_schedule(20)
    _, found = sampler.encode(X, C, 10)
    assert found["intermediate_steps"] == []
    assert "intermediates" not in found
    _, found = sampler.encode(X, C, 10, return_intermediates=3)
    assert found["intermediate_steps"] == [0, 3, 6, 8, 9]
    assert len(found["intermediates"]) == 5


def test_decode_undoes_encode_at_many_steps() -> None:
    """The inversion of 500 steps and the way back: the error falls with their number."""
    errors = []
    for S in (10, 100, 500):
        sampler = DDIMSampler(Model())
        sampler.make_schedule(S)
        back = sampler.decode(sampler.encode(X, C, S // 2)[0], C, S // 2)
        errors.append(float((back - X).abs().max()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.05


def test_encode_refuses_a_v_model() -> None:
    sampler = DDIMSampler(Model("v"))
    sampler.make_schedule(20)
    refused(lambda: sampler.encode(X, C, 5), ValueError, "model.parameterization", "encode")
