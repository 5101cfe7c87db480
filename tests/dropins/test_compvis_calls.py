"""CompVis' DDIMSampler: the arguments, results and callbacks of its methods."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor

from fastddim.dropins.compvis import DDIMSampler
from fastddim.step import reference
from tests.diffusion import BETAS, Model, X
from tests.dropins.compvis_cases import BETWEEN, UC, C, Corrector, eager, made
from tests.refusals import refused


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
        (ValueError, "ucg_schedule", lambda s: s.sample(10, 2, (4, 8, 8), ucg_schedule=[1.0])),
        (TypeError, "ucg_schedule", lambda s: s.sample(10, 2, (4, 8, 8), ucg_schedule=3.0)),
        (
            TypeError,
            "ucg_schedule[9]",
            lambda s: s.sample(10, 2, (4,), ucg_schedule=[*[1] * 9, UC]),
        ),
        (TypeError, "fs", lambda s: s.sample(10, 2, (4, 8, 8), fs=3)),
        (ValueError, "dynamic_threshold", lambda s: s.sample(10, 2, (4,), dynamic_threshold=0)),
        (ValueError, "guidance_rescale", lambda s: s.sample(10, 2, (4,), guidance_rescale=-1)),
        (ValueError, "t_start", lambda s: s.sample(10, 2, (4, 8, 8), t_start=-11)),
        (TypeError, "stacked", lambda s: type(s)(s.model, stacked=2)),
        (ValueError, "S ", lambda s: s.make_schedule(61, "uniform_trailing")),
        (ValueError, "t_enc", lambda s: s.encode(X, C, 11)),
        (ValueError, "t_enc", lambda s: s.encode(X, C, 0)),
        (ValueError, "return_intermediates", lambda s: s.encode(X, C, 3, False, 4)),
        (
            ValueError,
            "unconditional_conditioning",
            lambda s: s.encode(X, C, 3, unconditional_guidance_scale=2.0),
        ),
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
    refused(lambda: DDIMSampler(torch.nn.Identity()), TypeError, "model", "Identity")
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
