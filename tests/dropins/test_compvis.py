"""CompVis' DDIMSampler: as it was recorded, and against its step in plain PyTorch."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastddim.dropins.compvis import DDIMSampler
from fastddim.step import reference
from tests.diffusion import Model, X
from tests.dropins.compvis_cases import BETWEEN, UC, C, eager, made
from tests.refusals import refused

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [
    case
    for case in json.loads((GOLDEN / "index.json").read_text())
    if case["system"].startswith("CompVis") and not case["function"].startswith("PLMS")
]
OUT_OF_RANGE = [3, 9, 27, 36, 37, *range(101, 112), *range(251, 334), *range(501, 1001)]


def met(case: dict[str, Any], golden: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(ours, recorded) of each recorded tensor; the generator must end in the recorded state."""
    model, x, scale = Model(), golden["x_T"], case["unconditional_guidance_scale"]
    sampler = DDIMSampler(model)
    c, uc = torch.arange(float(len(x))), -torch.ones(len(x))
    torch.manual_seed(case["generator_seed"])
    if case["t_start"] is None:
        sample, kept = sampler.sample(
            S=case["S"],
            batch_size=len(x),
            shape=x.shape[1:],
            conditioning=c,
            eta=case["eta"],
            temperature=case["temperature"],
            mask=golden.get("mask"),
            x0=golden.get("x0_known"),
            x_T=x,
            log_every_t=1,
            unconditional_guidance_scale=scale,
            unconditional_conditioning=uc,
            verbose=False,
        )
        assert kept["x_inter"][0] is kept["pred_x0"][0] is x
        found = {
            "xs": torch.stack(kept["x_inter"][1:]),
            "x0_preds": torch.stack(kept["pred_x0"][1:]),
        }
    else:
        sampler.make_schedule(case["S"], ddim_eta=case["eta"], verbose=False)
        encoded = sampler.stochastic_encode(x, torch.full((len(x),), case["t_start"]))
        sample = sampler.decode(encoded, c, case["t_start"], scale, uc)
        found = {"encoded": encoded}
    found |= {"sample": sample, "t": torch.stack([t[:1] for _, t, _ in model.seen])}
    state = torch.get_rng_state()
    torch.manual_seed(case["generator_seed"])
    found["noise"] = torch.stack([torch.randn(x.shape) for _ in golden["noise"]])
    assert torch.equal(state, torch.get_rng_state())
    return [(found[name], golden[name]) for name in found]


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_the_recorded_trajectories_are_met_bit_for_bit(
    case: dict[str, Any], recorders_root: None
) -> None:
    for ours, recorded in met(case, load_file(GOLDEN / f"{case['name']}.safetensors")):
        assert torch.equal(ours, recorded)


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_with_own_roots_recordings_are_met_to_a_millionth(case: dict[str, Any]) -> None:
    for ours, recorded in met(case, load_file(GOLDEN / f"{case['name']}.safetensors")):
        assert (ours - recorded).abs().max() <= 1e-6 * recorded.abs().max()


# --- The schedule -----------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("S", [1, 2, 7, 20, 50, 400, 500])
def test_the_factors_are_those_of_numpy_and_pytorch_together(
    S: int, dtype: torch.dtype, eta: float
) -> None:
    model = Model()
    abar = model.alphas_cumprod = model.alphas_cumprod.to(dtype)
    sampler = made(S, model=model, ddim_eta=eta)
    steps = np.arange(0, 1000, 1000 // S) + 1
    alphas = abar[steps]
    prev = np.asarray([abar[0], *abar[steps[:-1]].tolist()])
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # NumPy's, where the original mixes it with torch
        sigmas: Any = eta * np.sqrt((1 - prev) / (1 - alphas) * (1 - alphas / prev))
        b: Any = np.sqrt(1.0 - alphas)
    columns: list[Any] = [alphas, prev, sigmas, b]
    full = [torch.stack([torch.full((), v) for v in each]) for each in columns]
    at, at_prev, sigma, b_t = full
    c2 = (1.0 - at_prev - sigma**2).sqrt()
    table = sampler._made().table
    expected = torch.stack([at.sqrt(), b_t, at_prev.sqrt(), sigma, c2], dim=1)
    assert torch.equal(table[:, [0, 2, 4, 5, 6]], expected)
    assert np.array_equal(sampler.ddim_timesteps, steps)
    assert torch.equal(sampler.ddim_alphas, alphas)
    assert np.array_equal(sampler.ddim_alphas_prev, prev)
    assert torch.equal(sampler.ddim_sigmas, sigmas)
    assert torch.equal(sampler.ddim_sqrt_one_minus_alphas, b)


def test_each_s_is_reproduced_or_its_timesteps_are_no_levels() -> None:
    refused_ones = []
    for S in range(1, 1001):
        steps = [t + 1 for t in range(0, 1000, 1000 // S)]
        if steps[-1] == 1000:
            refused_ones.append(S)
        elif S % 25 == 0 or S < 40:
            assert made(S).ddim_timesteps.tolist() == steps
    assert refused_ones == OUT_OF_RANGE


@pytest.mark.parametrize("S", [*OUT_OF_RANGE[:16], 251, 333, 501, 777, 1000])
def test_the_s_named_near_one_that_fails_work(S: int) -> None:
    with pytest.raises(ValueError, match="near it") as caught:
        made(S)
    message = str(caught.value)
    assert message.startswith("S (ddim_num_steps) must have timesteps up to 999, got ")
    near = [int(n) for n in message.split("near it ")[1].removesuffix(" will do").split(" and ")]
    below = max(n for n in range(1, S) if n not in OUT_OF_RANGE)
    assert near[0] == below
    assert near[1:] == [n for n in range(S, 501) if n not in OUT_OF_RANGE][:1]
    for n in near:
        made(n)


@pytest.mark.parametrize("S", [1, 10, 50, 200])
def test_quad_timesteps_are_theirs(S: int) -> None:
    steps = [int(s) + 1 for s in np.linspace(0, np.sqrt(800), S) ** 2]
    assert made(S, ddim_discretize="quad").ddim_timesteps.tolist() == steps


def test_a_schedule_too_short_for_any_s_says_so() -> None:
    model = Model()
    model.num_timesteps, model.alphas_cumprod = 1, model.alphas_cumprod[:1]
    refused(lambda: made(1, model=model), ValueError, "S ", "nothing will do")


def test_the_largest_eta_named_works_and_no_larger_one() -> None:
    with pytest.raises(ValueError, match="eta must be at most") as caught:
        made(50, ddim_eta=1e3)
    most = float(str(caught.value).split("at most ")[1].split(" ")[0])
    table = made(50, ddim_eta=most)._made().table
    assert table.isfinite().all()
    refused(lambda: made(50, ddim_eta=(round(most * 1e6) + 1) / 1e6), ValueError, "eta")


# --- The steps --------------------------------------------------------------------------------


def ours(sampler: DDIMSampler, x: Tensor, c: Any, **given: Any) -> tuple[Any, Any, Tensor]:
    _, kept = sampler.ddim_sampling(c, x.shape, x_T=x, log_every_t=1, **given)
    return kept["x_inter"][1:], kept["pred_x0"][1:], torch.get_rng_state()


def assert_identical(sampler: DDIMSampler, x: Tensor, given: Any, theirs: Any) -> None:
    torch.manual_seed(0)
    a = ours(sampler, x, C, **given)
    torch.manual_seed(0)
    b = eager(sampler, x, C, **theirs)
    for mine, own in zip(a[:2], b[:2], strict=True):
        for i, e in zip(mine, own, strict=True):
            assert torch.equal(i, e)
            assert i.isfinite().all()
    assert torch.equal(a[2], b[2])


GUIDED: tuple[dict[str, Any], dict[str, Any]] = (
    {"unconditional_guidance_scale": 7.5, "unconditional_conditioning": UC},
    {"scale": 7.5, "uc": UC},
)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("guided", [({}, {}), GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("parameterization", ["eps", "v"])
@pytest.mark.parametrize(
    "x",
    [
        X,
        X.contiguous(memory_format=torch.channels_last),
        torch.cat([X, X], 3)[:, :3, ::2, 3:10],
        X.bfloat16(),
    ],
    ids=["contiguous", "channels_last", "slice", "bfloat16"],
)
def test_fifty_steps_are_bit_identical_and_leave_the_same_stream(
    x: Tensor, parameterization: str, eta: float, guided: Any
) -> None:
    sampler = made(50, parameterization=parameterization, ddim_eta=eta)
    assert_identical(sampler, x, *guided)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("guided", [({}, {}), GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("between", BETWEEN, ids=lambda b: "+".join(b[1]))
def test_changes_between_x0_and_the_next_state_are_bit_identical(
    between: Any, eta: float, guided: Any
) -> None:
    given, theirs = ({**a, **b} for a, b in zip(between, guided, strict=True))
    assert_identical(made(20, ddim_eta=eta), X, given, theirs)
    if "corrector" not in theirs:
        sampler = made(20, parameterization="v", ddim_eta=eta)
        assert_identical(sampler, X, given, theirs)


def test_a_corrector_gets_the_state_the_model_got() -> None:
    seen: list[Tensor] = []

    def modify_score(model: Any, e_t: Tensor, x: Tensor, *rest: Any) -> Tensor:
        seen.append(x)
        return e_t

    sampler, x = made(10), X.bfloat16()
    sampler.ddim_sampling(
        C, X.shape, x_T=x, timesteps=2, score_corrector=SimpleNamespace(modify_score=modify_score)
    )
    assert seen[0] is sampler.model.seen[-1][0] is x


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_one_noise_for_all_samples(eta: float) -> None:
    sampler = made(10, ddim_eta=eta)
    torch.manual_seed(0)
    states, x0s, state = eager(sampler, X, C, repeat=True)
    torch.manual_seed(0)
    x = X
    for i, index in enumerate(reversed(range(10))):
        t = torch.full((2,), int(sampler.ddim_timesteps[index]))
        x, x0 = sampler.p_sample_ddim(x, C, t, index, repeat_noise=True)
        assert torch.equal(x, states[i])
        assert torch.equal(x0, x0s[i])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_guidance_of_a_half_precision_model_is_float32(dtype: torch.dtype) -> None:
    """One model call for both steps, which differ alone: the original's rounds u + w·(c − u)."""
    sampler = made(20, model=Model(dtype=dtype))
    t = torch.full((2,), 501)
    given, theirs = GUIDED
    mine, _ = sampler.p_sample_ddim(X, C, t, 10, **given)
    u, c = sampler.model.apply_model(
        torch.cat([X, X]), torch.cat([t, t]), torch.cat([UC, C])
    ).chunk(2)
    row = sampler._made().table[10]
    guided = u + theirs["scale"] * (c - u)
    own, _ = reference.ddim_step(X, guided.float(), row)  # the products are float32
    oracle, _ = reference.ddim_step(
        X.double(), torch.cat([u, c]).double(), row.double(), guidance=torch.tensor(7.5)
    )
    error, their_error = ((a.double() - oracle).abs().max() for a in (mine, own))
    assert error < 1e-6
    assert their_error > {torch.bfloat16: 1e-4, torch.float16: 1e-5}[dtype]
    assert their_error < {torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
