"""CompVis' DDIMSampler: as it was recorded, and against its step in plain PyTorch."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastddim.dropins.compvis import DDIMSampler
from fastddim.step import reference
from tests.diffusion import BETAS, Model, X
from tests.refusals import refused

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [
    case
    for case in json.loads((GOLDEN / "index.json").read_text())
    if case["system"].startswith("CompVis")
]
OUT_OF_RANGE = [3, 9, 27, 36, 37, *range(101, 112), *range(251, 334), *range(501, 1001)]
C, UC = torch.arange(2.0), -torch.ones(2)


def met(case: dict[str, Any], golden: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(ours, recorded) of all that was recorded; the generator ends where it did."""
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


def made(S: int, **given: Any) -> DDIMSampler:
    sampler = DDIMSampler(given.pop("model", None) or Model(given.pop("parameterization", "eps")))
    sampler.make_schedule(S, **given)
    return sampler


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
        warnings.simplefilter("ignore", DeprecationWarning)  # numpy's, of what they mix here
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


def eager(
    sampler: DDIMSampler,
    x: Tensor,
    c: Any,
    scale: float = 1.0,
    uc: Any = None,
    temperature: float = 1.0,
    dropout: float = 0.0,
    quantize: bool = False,
    corrector: Any = None,
    repeat: bool = False,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(xs, x0s, the generator's state) of the original's operations on the sampler's own table."""
    model = sampler.model
    states: list[Tensor] = []
    x0s: list[Tensor] = []
    prediction = {"eps": "epsilon", "v": "v"}[model.parameterization]
    for index in reversed(range(len(sampler.ddim_timesteps))):
        t = torch.full((len(x),), int(sampler.ddim_timesteps[index]))
        row = sampler._made().table[index]
        if uc is None or scale == 1:
            out = model.apply_model(x, t, c)
        else:
            u, out = model.apply_model(
                torch.cat([x, x]), torch.cat([t, t]), torch.cat([uc, c])
            ).chunk(2)
            out = u + scale * (out - u)
        if corrector is not None:
            out = corrector.modify_score(model, out, x, t, c, strength=0.5)
        x = x.float()  # their factors are float32 of x's dimensions, and so is what they touch
        _, x0 = reference.ddim_step(x, out, row, None, prediction)
        eps = row[0] * out + row[2] * x if prediction == "v" else out
        if quantize:
            x0 = model.first_stage_model.quantize(x0)[0]
        z = torch.randn((1, *x.shape[1:])).repeat(len(x), 1, 1, 1) if repeat else None
        noise = row[5] * (torch.randn(x.shape) if z is None else z) * temperature
        if dropout > 0:
            noise = torch.nn.functional.dropout(noise, dropout)
        x = row[4] * x0 + row[6] * eps + noise
        states.append(x)
        x0s.append(x0)
    return states, x0s, torch.get_rng_state()


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


class Corrector:
    def modify_score(
        self, model: Any, e_t: Tensor, x: Tensor, t: Tensor, c: Tensor, strength: float
    ) -> Tensor:
        assert isinstance(model, Model)
        shift = (t + c).view(-1, 1, 1, 1) / 1000
        return e_t - strength * 1e-2 * x * shift


BETWEEN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": 0.8}, {"temperature": 0.8}),
    ({"noise_dropout": 0.3}, {"dropout": 0.3}),
    ({"quantize_denoised": True}, {"quantize": True}),
    (
        {"score_corrector": Corrector(), "corrector_kwargs": {"strength": 0.5}},
        {"corrector": Corrector()},
    ),
    (
        {"temperature": 1.3, "noise_dropout": 0.1, "quantize_denoised": True},
        {"temperature": 1.3, "dropout": 0.1, "quantize": True},
    ),
]


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
    """One call of the model, so that what differs is the step: theirs rounds u + w·(c − u)."""
    sampler = made(20, model=Model(dtype=dtype))
    t = torch.full((2,), 501)
    given, theirs = GUIDED
    mine, _ = sampler.p_sample_ddim(X, C, t, 10, **given)
    u, c = sampler.model.apply_model(
        torch.cat([X, X]), torch.cat([t, t]), torch.cat([UC, C])
    ).chunk(2)
    row = sampler._made().table[10]
    own, _ = reference.ddim_step(X, u + theirs["scale"] * (c - u), row)
    oracle, _ = reference.ddim_step(
        X.double(), torch.cat([u, c]).double(), row.double(), guidance=torch.tensor(7.5)
    )
    error, their_error = ((a.double() - oracle).abs().max() for a in (mine, own))
    assert error < 1e-6
    assert their_error > {torch.bfloat16: 1e-4, torch.float16: 1e-5}[dtype]
    assert their_error < {torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]


# --- What the calls take and give -------------------------------------------------------------


def test_sample_is_make_schedule_and_ddim_sampling() -> None:
    torch.manual_seed(0)
    sample, kept = DDIMSampler(Model()).sample(
        10, 2, (4, 8, 8), C, eta=0.3, x_T=None, verbose=False, quantize_denoised=True
    )
    torch.manual_seed(0)
    x_T = torch.randn(2, 4, 8, 8)
    states, _, _ = eager(made(10, ddim_eta=0.3), x_T, C)
    assert torch.equal(sample, states[-1])
    assert torch.equal(kept["x_inter"][0], x_T)


@pytest.mark.parametrize("every", [1, 3, 7, 100])
def test_every_so_many_states_are_kept_and_callbacks_are_called(every: int) -> None:
    sampler = made(10, ddim_eta=0.3)
    steps: list[int] = []
    x0s: list[Tensor] = []

    def keep(x0: Tensor, i: int) -> None:
        assert steps[-1] == i
        x0s.append(x0)

    torch.manual_seed(0)
    states, all_x0s, _ = eager(sampler, X, C)
    torch.manual_seed(0)
    sample, kept = sampler.ddim_sampling(
        C, X.shape, x_T=X, callback=steps.append, img_callback=keep, log_every_t=every
    )
    logged = [i for i in range(10) if (9 - i) % every == 0 or i == 0]
    assert steps == list(range(10))
    for given, own in ((x0s, all_x0s), ([sample], states[-1:])):
        assert all(torch.equal(a, b) for a, b in zip(given, own, strict=True))
    for name, own in (("x_inter", states), ("pred_x0", all_x0s)):
        assert len(kept[name]) == 1 + len(logged)
        assert kept[name][0] is X
        assert all(torch.equal(a, own[i]) for a, i in zip(kept[name][1:], logged, strict=True))


def test_memory_that_nobody_holds_is_written_again() -> None:
    pointers: list[int] = []
    sampler = made(20)
    x = torch.randn(2, 4, 64, 64)  # fresh memory serves what is smaller

    def watch(x: Tensor, t: Tensor, c: Any) -> Tensor:
        pointers.append(x.data_ptr())
        return 0.5 * x

    sampler.model.apply_model = watch
    sampler.ddim_sampling(None, x.shape, x_T=x)
    assert pointers[0] == x.data_ptr()
    assert pointers[0] not in pointers[1:]
    assert len(set(pointers[1:])) == 3  # the first state is kept, two take turns


def test_nothing_of_the_callers_is_written() -> None:
    model = Model()
    mask = (torch.rand(X.shape, generator=torch.Generator().manual_seed(3)) > 0.5).float()
    array = np.ones((2, 4, 8, 8), dtype=np.float32)
    inputs = [X.clone(), mask, torch.from_numpy(array), C.clone(), UC.clone()]
    outputs: list[tuple[Tensor, Tensor]] = []
    apply_model = model.apply_model

    def keeping(x: Tensor, t: Tensor, c: Any) -> Tensor:
        output = apply_model(x, t, c)
        outputs.extend((tensor, tensor.clone()) for tensor in (x, t, c, output))
        return output

    model.apply_model = keeping  # type: ignore[method-assign]
    before = [tensor.clone() for tensor in inputs]
    names = {"quantize_denoised": "quantize_x0"}  # sample's own name for it
    for between, _ in [({}, {}), *BETWEEN]:
        between = {names.get(name, name): value for name, value in between.items()}
        DDIMSampler(model).sample(
            10,
            2,
            (4, 8, 8),
            inputs[3],
            x_T=inputs[0],
            mask=mask,
            x0=inputs[2],
            eta=0.5,
            unconditional_guidance_scale=3.0,
            unconditional_conditioning=inputs[4],
            **between,
        )
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    assert all(torch.equal(a, b) for a, b in outputs)
    assert (array == 1).all()


def test_conditions_in_lists_and_mappings_are_stacked_alike() -> None:
    model, image = Model(), torch.rand(2, 1, 8, 8)
    sampler = made(5, model=model)
    c = {"c_concat": [image], "c_crossattn": [C], "name": "both"}
    uc = {"c_concat": [image], "c_crossattn": [UC[:1]], "name": "both"}
    sampler.ddim_sampling(
        c, X.shape, unconditional_guidance_scale=2.0, unconditional_conditioning=uc
    )
    x, t, both = model.seen[0]
    assert x.shape == (4, 4, 8, 8)
    assert t.tolist() == [801] * 4
    assert torch.equal(both["c_concat"][0], torch.cat([image, image]))
    assert torch.equal(both["c_crossattn"][0], torch.cat([UC, C]))
    assert both["name"] == "both"
    sampler.ddim_sampling(
        [C], X.shape, unconditional_guidance_scale=2.0, unconditional_conditioning=[UC]
    )
    assert torch.equal(model.seen[-1][2][0], torch.cat([UC, C]))


@pytest.mark.parametrize(("scale", "uc"), [(1.0, UC), (7.5, None)])
def test_a_model_without_guidance_is_called_once_a_step(scale: float, uc: Any) -> None:
    model = Model()
    made(5, model=model).ddim_sampling(
        C, X.shape, unconditional_guidance_scale=scale, unconditional_conditioning=uc
    )
    assert len(model.seen) == 5
    assert all(len(x) == 2 and c is C for x, _, c in model.seen)


def test_samples_of_other_dimensions() -> None:
    sample, _ = DDIMSampler(Model()).sample(10, 2, (4, 3, 8, 8), C)
    assert sample.shape == (2, 4, 3, 8, 8)
    assert sample.isfinite().all()


@pytest.mark.parametrize("original", [False, True])
def test_stochastic_encode_is_each_samples_own_level(original: bool) -> None:
    sampler, t = made(10), torch.tensor([0, 9])
    torch.manual_seed(0)
    found = sampler.stochastic_encode(X, t, use_original_steps=original)
    torch.manual_seed(0)
    noise = torch.randn_like(X)
    assert torch.equal(found, sampler.stochastic_encode(X, t, original, noise=noise))
    abar = np.cumprod(1 - BETAS)[t if original else sampler.ddim_timesteps[t]].reshape(2, 1, 1, 1)
    truth = np.sqrt(abar) * X.double().numpy() + np.sqrt(1 - abar) * noise.double().numpy()
    assert np.abs(found.numpy() - truth).max() < 5e-6  # of 1 − ᾱ in float32
    if original:
        level = sampler.model.alphas_cumprod[t].numpy().reshape(2, 1, 1, 1)
        a, b = torch.from_numpy(np.sqrt(level)), torch.from_numpy(np.sqrt(1 - level))
        assert torch.equal(found, a * X + b * noise)


@pytest.mark.parametrize("t_start", [0, 1, 7, 10, 12])
def test_decode_takes_the_last_steps(t_start: int) -> None:
    sampler = made(10, ddim_eta=0.5)
    calls: list[int] = []
    torch.manual_seed(0)
    found = sampler.decode(X, C, t_start, callback=calls.append)
    assert calls == list(range(min(t_start, 10)))
    torch.manual_seed(0)
    x = X
    for index in reversed(calls):
        t = torch.full((2,), int(sampler.ddim_timesteps[index]))
        x, _ = sampler.p_sample_ddim(x, C, t, index)
    assert torch.equal(found, x)


@pytest.mark.parametrize(("timesteps", "taken"), [(1, 0), (2, 1), (10, 9), (99, 9)])
def test_timesteps_of_ddim_sampling_count_one_too_many(timesteps: int, taken: int) -> None:
    sampler = made(10)
    sampler.ddim_sampling(C, X.shape, x_T=X, timesteps=timesteps)
    levels = [int(t[0]) for _, t, _ in sampler.model.seen]
    assert levels == sampler.ddim_timesteps[:taken][::-1].tolist()


Call = Callable[[DDIMSampler], Any]


@pytest.mark.parametrize(
    ("error", "name", "call"),
    [
        (TypeError, "S ", lambda s: s.sample(2.5, 2, (4, 8, 8))),
        (ValueError, "S ", lambda s: s.sample(0, 2, (4, 8, 8))),
        (ValueError, "S ", lambda s: s.sample(1001, 2, (4, 8, 8))),
        (ValueError, "S ", lambda s: s.sample(3, 2, (4, 8, 8))),
        (ValueError, "batch_size", lambda s: s.sample(10, 0, (4, 8, 8))),
        (TypeError, "shape[0]", lambda s: s.sample(10, 2, (4.0, 8, 8))),
        (ValueError, "ddim_eta", lambda s: s.sample(10, 2, (4, 8, 8), eta=-1)),
        (TypeError, "ddim_eta", lambda s: s.sample(10, 2, (4, 8, 8), eta=None)),
        (ValueError, "ddim_discretize", lambda s: s.make_schedule(10, "linear")),
        (ValueError, "normals_sequence", lambda s: s.sample(10, 2, (4,), normals_sequence=[1])),
        (TypeError, "ucg_schedule", lambda s: s.sample(10, 2, (4, 8, 8), ucg_schedule=[1.0])),
        (ValueError, "temperature", lambda s: s.sample(10, 2, (4,), temperature=float("nan"))),
        (ValueError, "noise_dropout", lambda s: s.sample(10, 2, (4,), noise_dropout=1.1)),
        (ValueError, "log_every_t", lambda s: s.sample(10, 2, (4, 8, 8), log_every_t=0)),
        (TypeError, "callback", lambda s: s.sample(10, 2, (4, 8, 8), callback=3)),
        (TypeError, "img_callback", lambda s: s.sample(10, 2, (4, 8, 8), img_callback=3)),
        (ValueError, "x_T", lambda s: s.sample(10, 2, (4, 8, 9), x_T=X)),
        (TypeError, "x_T", lambda s: s.sample(10, 2, (4, 8, 8), x_T=X.double())),
        (TypeError, "x_T", lambda s: s.sample(10, 2, (4, 8, 8), x_T=[1.0])),
        (TypeError, "x0", lambda s: s.sample(10, 2, (4, 8, 8), mask=X)),
        (ValueError, "x0", lambda s: s.sample(10, 2, (4, 8, 8), mask=X, x0=X[:, :2])),
        (ValueError, "mask", lambda s: s.sample(10, 2, (4, 8, 8), mask=X[..., :3], x0=X)),
        (TypeError, "mask", lambda s: s.sample(10, 2, (4, 8, 8), mask=1, x0=X)),
        (ValueError, "use_original_steps", lambda s: s.decode(X, C, 3, use_original_steps=True)),
        (
            ValueError,
            "use_original_steps",
            lambda s: s.ddim_sampling(C, X.shape, ddim_use_original_steps=True),
        ),
        (ValueError, "timesteps", lambda s: s.ddim_sampling(C, X.shape, timesteps=0)),
        (ValueError, "t_start", lambda s: s.decode(X, C, -1)),
        (TypeError, "x_latent", lambda s: s.decode(X.double(), C, 3)),
        (ValueError, "index", lambda s: s.p_sample_ddim(X, C, torch.ones(2), 10)),
        (TypeError, "x ", lambda s: s.p_sample_ddim(X.long(), C, torch.ones(2), 1)),
        (
            TypeError,
            "unconditional_guidance_scale",
            lambda s: s.decode(X, C, 3, "high", UC),
        ),
        (ValueError, "unconditional_conditioning", lambda s: s.decode(X, C, 3, 2.0, X)),
        (ValueError, "unconditional_conditioning", lambda s: s.decode(X, C, 3, 2.0, {"c": UC})),
        (ValueError, "t ", lambda s: s.stochastic_encode(X, torch.tensor([0, 10]))),
        (ValueError, "t ", lambda s: s.stochastic_encode(X, torch.tensor([-1, 0]))),
        (ValueError, "t ", lambda s: s.stochastic_encode(X, torch.tensor([0.0, 1.0]))),
        (ValueError, "t ", lambda s: s.stochastic_encode(X, torch.tensor([0]))),
        (ValueError, "t ", lambda s: s.stochastic_encode(X, 3)),
        (TypeError, "x0", lambda s: s.stochastic_encode(X.double(), torch.tensor([0, 1]))),
        (ValueError, "noise", lambda s: s.stochastic_encode(X, torch.tensor([0, 1]), noise=X[:1])),
    ],
)
def test_bad_arguments_are_refused(error: type[Exception], name: str, call: Call) -> None:
    sampler = made(10)
    refused(lambda: call(sampler), error, name)
    assert not sampler.model.seen


def test_bad_models_and_calls_out_of_order_are_refused() -> None:
    new = DDIMSampler(Model())
    for call in (
        lambda: new.decode(X, C, 3),
        lambda: new.ddim_sampling(C, X.shape),
        lambda: new.stochastic_encode(X, torch.tensor([0, 1])),
        lambda: new.p_sample_ddim(X, C, torch.ones(2), 1),
    ):
        refused(call, ValueError, "call make_schedule first")
    refused(lambda: DDIMSampler(Model("x0")), ValueError, "model.parameterization")
    short = Model()
    short.alphas_cumprod = short.alphas_cumprod[:10]
    refused(lambda: made(10, model=short), ValueError, "model.alphas_cumprod")
    v = made(10, parameterization="v")
    refused(
        lambda: v.ddim_sampling(C, X.shape, score_corrector=Corrector()),
        ValueError,
        "score_corrector",
    )
    wrong = made(10, model=Model(dtype=torch.float64))
    refused(lambda: wrong.decode(X, C, 3), TypeError, "output")


@pytest.mark.gpu
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_on_a_gpu_the_sampler_is_where_its_model_is(eta: float) -> None:
    model = Model()
    for name in ("alphas_cumprod", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"):
        setattr(model, name, getattr(model, name).cuda())
    x, c = X.cuda(), C.cuda()
    sample, _ = DDIMSampler(model).sample(50, 2, (4, 8, 8), c, eta=eta, x_T=x)
    assert sample.device == x.device
    if eta == 0:
        on_cpu, _ = DDIMSampler(Model()).sample(50, 2, (4, 8, 8), C, x_T=X)
        assert (sample.cpu() - on_cpu).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("given", [True, False], ids=["x_T", "drawn"])
def test_another_default_dtype_is_that_of_the_draws_alone(
    dtype: torch.dtype, eta: float, given: bool
) -> None:
    """Noise is drawn as the original draws it; the factors and the state stay float32."""
    model = Model()
    sampler = DDIMSampler(model)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(5)
        x_T = X if given else None
        found, kept = sampler.sample(10, 2, X.shape[1:], C, eta=eta, x_T=x_T)
        end = torch.get_rng_state()
        torch.manual_seed(5)
        x = X if given else torch.randn(X.shape)
        noises = [torch.randn(X.shape).float() for _ in sampler.ddim_timesteps]
        assert torch.equal(end, torch.get_rng_state())
    finally:
        torch.set_default_dtype(before)
    x = x.float()
    assert torch.equal(kept["x_inter"][0].float(), x)
    for index, z in zip(reversed(range(10)), noises, strict=True):
        t = torch.full((2,), int(sampler.ddim_timesteps[index]))
        row = sampler._made().table[index]
        x, _ = reference.ddim_step(x, model.apply_model(x, t, C), row, z, noise_first=False)
    assert found.dtype == torch.float32
    assert torch.equal(found, x)


def test_refusals_of_a_models_output_name_the_model() -> None:
    sampler, x = DDIMSampler(Model()), X.flatten(1)
    cases: list[tuple[Tensor, Tensor, str]] = [
        (x, torch.cat([x, x], 1), "x's shape, (2, 256) (samples of one dimension have no channels"),
        (X, X[:, :3], "x's shape, (2, 4, 8, 8), or one with twice the channels"),
    ]
    for given, output, said in cases:
        sampler.model.apply_model = Mock(return_value=output)
        refused(
            partial(sampler.sample, 10, 2, given.shape[1:], x_T=given),
            ValueError,
            "model.apply_model must return a tensor of",
            said,
            str(tuple(output.shape)),
        )


def test_a_sampler_can_be_copied_in_use() -> None:
    sampler = made(20)
    again = copy.deepcopy(sampler)
    t = torch.full((2,), 501)
    for _ in range(2):
        a, b = (s.p_sample_ddim(X, C, t, 10)[0] for s in (sampler, again))
        assert torch.equal(a, b)
