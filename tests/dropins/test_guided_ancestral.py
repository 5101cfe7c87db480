"""guided-diffusion's ``p_sample`` loops: bit for bit the formulas, and exact for a Gaussian."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastddim
from fastddim import NoiseSchedule
from fastddim.dropins import guided
from fastddim.dropins.guided.ancestral import tables
from fastddim.tools.quality import Gaussian
from tests.cases import some
from tests.dropins.guided_original import (
    FIFTY,
    Original,
    assert_equal,
    assert_identical,
    cosine,
    darker,
    kept,
    linear,
    model,
    score,
    start,
    toy,
)
from tests.refusals import refused
from tests.waiting import no_waiting

SHAPE = (3, 3, 8, 8)
VARIANCES = ["FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE"]
same = partial(assert_identical, loop="p_sample_loop")


def respaced(respacing: str, T: int = 1000) -> set[int]:
    return set(guided.Diffusion(T, respacing).timestep_map)


def both(x: Tensor, t: Tensor, y: Tensor | None = None, variance: bool = False) -> Tensor:
    """The model with log variances from −7 to 4 as LEARNED, and within a wider range than [−1, 1]
    as LEARNED_RANGE."""
    output = model(x, t, y)
    return torch.cat([output, 1.7 * torch.sin(3 * x) - 1], 1) if variance else output


GRID = list(
    product(
        VARIANCES,
        ["EPSILON", "START_X"],
        [linear, cosine],
        ["", "25", "10,15"],
        [True, False],
        [None, darker],
        [None, score],
        [False, True],
    )
)
SAMPLE = GRID[::29]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("var", "mean", "schedule", "respacing", "clip", "denoised_fn", "cond_fn", "rescale"),
    [
        *SAMPLE,
        *(pytest.param(*c, marks=pytest.mark.slow) for c in GRID[1::5] if c not in SAMPLE),
    ],
)
def test_ancestral_loops_are_bit_identical_and_draw_alike(
    var: str,
    mean: str,
    schedule: Callable[..., Any],
    respacing: str,
    clip: bool,
    denoised_fn: Any,
    cond_fn: Any,
    rescale: bool,
) -> None:
    # All of 1000 timesteps would take a minute, and 60 have the same formulas.
    T = 1000 if respacing else 60
    diffusion = Original(schedule(T), respaced(respacing, T), mean, var, rescale)
    same(
        diffusion,
        partial(both, variance=var.startswith("LEARNED")),
        start(*SHAPE),
        clip_denoised=clip,
        denoised_fn=denoised_fn,
        cond_fn=cond_fn,
        model_kwargs={"y": torch.arange(3)},
    )


@pytest.mark.one_in(4)
@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("cond_fn", [None, score])
@pytest.mark.parametrize("var", VARIANCES)
@pytest.mark.parametrize(
    "x",
    [
        start(1, 1, 1, 1),
        start(2, 3, 17, 3),
        start(2, 3, 105, 104),
        start(3, 4, 6, 5).contiguous(memory_format=torch.channels_last),
        start(4, 5, 6, 9)[1:3, 1:4, ::2, 2:],
        start(2, 6, 5, 3).transpose(1, 3),
        start(1, 3, 4, 4).expand(3, -1, -1, -1),
    ],
    ids=lambda x: f"{tuple(x.shape)}{tuple(x.stride())}",
)
def test_odd_sizes_and_layouts_are_bit_identical(
    x: Tensor, var: str, cond_fn: Any, backend: str
) -> None:
    diffusion = Original(linear(), {0, 1, 400, 999}, var=var)
    with fastddim.using(backend):
        same(diffusion, partial(both, variance=var.startswith("LEARNED")), x, cond_fn=cond_fn)


@pytest.mark.parametrize("schedule", some([linear, cosine], 2))
def test_all_of_1000_ancestral_steps_are_bit_identical(schedule: Callable[..., Any]) -> None:
    diffusion = Original(schedule(), set(range(1000)), var="LEARNED_RANGE")
    same(diffusion, partial(both, variance=True), start(2, 1, 3, 3))


@pytest.mark.parametrize("cond_fn", [None, score])
def test_a_batch_of_none_stays_one(cond_fn: Any) -> None:
    of, net = guided.Diffusion(1000, "10", learn_sigma=True), partial(both, variance=True)
    for out in guided.p_sample_loop_progressive(
        of, net, (0, 3, 4, 4), device="cpu", cond_fn=cond_fn
    ):
        assert out["sample"].shape == out["pred_xstart"].shape == (0, 3, 4, 4)


def test_a_model_of_the_mean_is_refused_with_a_reason() -> None:
    of = Original(linear(), FIFTY, mean="PREVIOUS_X")
    with pytest.raises(ValueError, match=r"got PREVIOUS_X, which .* leaves no x0"):
        guided.p_sample_loop(of, toy, SHAPE, start(*SHAPE))


@pytest.mark.parametrize("denoised_fn", [None, darker])
@pytest.mark.parametrize("var", VARIANCES)
@pytest.mark.parametrize("x", [start(2, 6), start(2, 3, 2, 4, 5)], ids=["flat", "video"])
def test_states_of_two_and_five_dimensions_are_identical(
    x: Tensor, var: str, denoised_fn: Any
) -> None:
    net = partial(both, variance=var.startswith("LEARNED"))
    gradient = lambda x, t: -0.1 * x  # noqa: E731
    diffusion = Original(cosine(), {0, 1, 400, 999}, var=var)
    same(diffusion, net, x, denoised_fn=denoised_fn)
    same(diffusion, net, x, denoised_fn=denoised_fn, cond_fn=gradient)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("var", VARIANCES)
def test_half_precision_gives_identical_float32(var: str, dtype: torch.dtype) -> None:
    def half(x: Tensor, t: Tensor) -> Tensor:
        return both(x, t, variance=var.startswith("LEARNED")).to(dtype)

    cond_fn = lambda x, t: (-0.25 * x).to(dtype)  # noqa: E731
    diffusion = Original(linear(), FIFTY, var=var)
    same(diffusion, half, start(*SHAPE).to(dtype))
    same(diffusion, half, start(*SHAPE), cond_fn=cond_fn)


@pytest.mark.parametrize("cond_fn", [None, score])
@pytest.mark.parametrize("denoised_fn", [None, darker])
@pytest.mark.parametrize("var", VARIANCES)
def test_one_step_takes_each_sample_at_its_own_timestep(
    var: str, denoised_fn: Any, cond_fn: Any
) -> None:
    diffusion = Original(linear(), FIFTY, var=var)
    net = partial(both, variance=var.startswith("LEARNED"))
    x, t = start(5, 3, 6, 7), torch.tensor([49, 0, 7, 0, 20])
    given = {"x": x, "t": t, "denoised_fn": denoised_fn, "cond_fn": cond_fn}
    torch.manual_seed(0)
    ours = guided.p_sample(diffusion, net, **given)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    assert_equal(kept([ours]), kept([diffusion.p_sample(net, **given)]))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("sigma_small", [False, True])
def test_a_diffusion_of_our_own_is_the_originals(learn_sigma: bool, sigma_small: bool) -> None:
    ours = guided.Diffusion(1000, "25", learn_sigma=learn_sigma, sigma_small=sigma_small)
    var = "LEARNED_RANGE" if learn_sigma else "FIXED_SMALL" if sigma_small else "FIXED_LARGE"
    theirs = Original(linear(), respaced("25"), var=var)
    results = []
    for loop in (
        partial(guided.p_sample_loop_progressive, ours),
        partial(theirs.p_sample_loop_progressive),
    ):
        torch.manual_seed(0)
        results.append(kept(loop(partial(both, variance=learn_sigma), SHAPE, device="cpu")))
    assert_equal(*results)


def test_kept_results_never_change_and_no_argument_is_written() -> None:
    held: list[tuple[Tensor, Tensor]] = []

    def hold(*tensors: Tensor) -> None:
        held.extend((tensor, tensor.clone()) for tensor in tensors)

    def keeping(x: Tensor, t: Tensor) -> Tensor:
        output = both(x, t, variance=True)
        hold(x, t, output)
        return output

    def denoised(x0: Tensor) -> Tensor:
        hold(x0)
        return x0

    def gradient(x: Tensor, t: Tensor) -> Tensor:
        hold(of := -0.1 * x)
        return of

    shape = (1, 3, 80, 80)  # Smaller states always get fresh memory.
    for var, mean in product(["LEARNED", "LEARNED_RANGE"], ["EPSILON", "START_X"]):
        held.clear()
        diffusion = Original(linear(), set(range(0, 1000, 100)), mean, var)
        for out in guided.p_sample_loop_progressive(
            diffusion, keeping, shape, start(*shape), denoised_fn=denoised, cond_fn=gradient
        ):
            hold(*kept([out]))
        assert len(held) == 10 * 7
        assert all(torch.equal(tensor, copy) for tensor, copy in held)


@pytest.mark.parametrize("cond_fn", [None, score])
def test_the_callers_sample_is_where_the_next_step_starts(cond_fn: Any) -> None:
    def steered(loop: Any) -> list[Tensor]:
        torch.manual_seed(0)
        states = []
        for i, out in enumerate(loop):
            if i == 3:
                out["sample"] = out["sample"][:, :, 1:, ::2].half()
            elif i == 6:
                out["sample"].mul_(0.5)
            states += [tensor.clone() for tensor in kept([out])]
        return states

    x, net = start(*SHAPE), partial(both, variance=True)
    of = Original(linear(), set(range(0, 1000, 100)), var="LEARNED_RANGE")
    ours = steered(guided.p_sample_loop_progressive(of, net, SHAPE, x, cond_fn=cond_fn))
    theirs = steered(of.p_sample_loop_progressive(net, SHAPE, x, cond_fn=cond_fn))
    assert len(ours) == 20
    assert all(torch.equal(mine, own) for mine, own in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("var", "v"),
    [("FIXED_SMALL", None), ("FIXED_LARGE", None), ("LEARNED_RANGE", 0.3), ("LEARNED", -5.0)],
)
def test_ancestral_samples_of_a_gaussian_have_exact_moments(var: str, v: float | None) -> None:
    # In float64: x_t ~ N(m_t, s_t²) is carried through x_s = p·x0(x_t) + q·x_t + √Σ·z, where the
    # Gaussian's exact x0 is linear in x_t.
    mean, std, T = 0.4, 0.3, 1000
    diffusion = Original(linear(), respaced("100"), var=var)
    abar, beta = diffusion.alphas_cumprod, diffusion.betas
    abar_s = np.append(1.0, abar[:-1])
    small = beta * (1 - abar_s) / (1 - abar)
    log_small = np.log(np.append(small[1], small[1:]))
    sigma2 = {
        "FIXED_SMALL": small,
        "FIXED_LARGE": beta,
        "LEARNED_RANGE": np.exp(0.65 * np.log(beta) + 0.35 * log_small),
        "LEARNED": np.full_like(beta, np.exp(-5.0)),
    }[var].copy()
    sigma2[0] = 0
    m, s2 = 0.0, 1.0
    for i in range(len(beta))[::-1]:
        gain = np.sqrt(abar[i]) * std**2 / (abar[i] * std**2 + 1 - abar[i])
        p = np.sqrt(abar_s[i]) * beta[i] / (1 - abar[i])
        q = np.sqrt(1 - beta[i]) * (1 - abar_s[i]) / (1 - abar[i])
        m = p * (mean + gain * (m - np.sqrt(abar[i]) * mean)) + q * m
        s2 = (p * gain + q) ** 2 * s2 + sigma2[i]
    if var != "LEARNED":  # The sampler with 100 steps is close to the data as well.
        assert abs(m - mean) < 0.01
        assert abs(np.sqrt(s2) - std) < 0.03
    exact = Gaussian(mean, std, NoiseSchedule.linear(T))

    def net(x: Tensor, t: Tensor) -> Tensor:
        eps = exact(x, t)
        return eps if v is None else torch.cat([eps, torch.full_like(x, v)], 1)

    torch.manual_seed(0)
    samples = guided.p_sample_loop(
        diffusion, net, (64, 1, 32, 32), clip_denoised=False, device="cpu"
    ).double()
    n = samples.numel()
    assert abs(samples.mean() - m) < 4 * np.sqrt(s2 / n)
    assert abs(samples.std() - np.sqrt(s2)) < 4 * np.sqrt(s2 / (2 * n))


def test_tables_are_made_once_for_a_loop_and_for_single_steps() -> None:
    diffusion, x = guided.Diffusion(1000, "25", learn_sigma=True), start(*SHAPE)
    net = partial(both, variance=True)
    tables.cache_clear()
    guided.p_sample_loop(diffusion, net, SHAPE, x)
    for i in (3, 2):
        guided.p_sample(diffusion, net, x, torch.full((3,), i))
    assert tables.cache_info().misses == 1
    assert tables.cache_info().hits == 2


@pytest.mark.parametrize(
    ("error", "name", "changed"),
    [
        (TypeError, "diffusion", {"diffusion": toy}),
        (
            ValueError,
            "diffusion.model_mean_type",
            {"diffusion": Original(linear(), mean="PREVIOUS_X")},
        ),
        (ValueError, "betas", {"diffusion": Original(linear(20))}),
        (ValueError, "diffusion.betas", {"diffusion": guided.Diffusion(1000, "1")}),
        (TypeError, "model", {"model": None}),
        (ValueError, "model", {"model": lambda x, t: torch.cat([x, x], 1)}),
        (ValueError, "model", {"model": lambda x, t: x.to("meta")}),
        (ValueError, "model", {"diffusion": guided.Diffusion(1000, "25", learn_sigma=True)}),
        (ValueError, "denoised_fn", {"denoised_fn": lambda x0: x0[:1]}),
        (TypeError, "cond_fn", {"cond_fn": "classifier"}),
        (ValueError, "cond_fn", {"cond_fn": lambda x, t: x.mean()}),
    ],
)
def test_bad_arguments_are_refused_by_steps_and_loops(
    error: type[Exception], name: str, changed: dict[str, Any]
) -> None:
    x, t = start(2, 3, 4, 4), torch.tensor([3, 0])
    given: dict[str, Any] = {"diffusion": Original(linear(), FIFTY), "model": toy} | changed
    refused(
        lambda: guided.p_sample(**given, x=x, t=t % 1 if name == "diffusion.betas" else t),
        error,
        name,
    )
    refused(lambda: guided.p_sample_loop(**given, shape=x.shape, noise=x), error, name)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("cond_fn", [None, score])
@pytest.mark.parametrize("var", VARIANCES)
def test_on_a_gpu_ancestral_steps_are_bit_identical(var: str, cond_fn: Any, layout: Any) -> None:
    x = start(3, 3, 17, 9).cuda().contiguous(memory_format=layout)
    of, net = Original(linear(), FIFTY, var=var), partial(both, variance=var.startswith("LEARNED"))
    results = []
    for loop in (
        partial(guided.p_sample_loop_progressive, of),
        partial(of.p_sample_loop_progressive, device="cuda"),
    ):
        torch.manual_seed(0)
        states = kept(loop(net, x.shape, x, cond_fn=cond_fn))
        results.append((states, torch.cuda.get_rng_state()))
    (ours, our_state), (theirs, their_state) = results
    assert_equal(ours, theirs)
    assert torch.equal(our_state, their_state)


@pytest.mark.gpu
def test_on_a_gpu_no_ancestral_step_waits() -> None:
    of = guided.Diffusion(1000, "25", learn_sigma=True)
    x, net = start(3, 3, 17, 9).cuda(), partial(both, variance=True)
    loop = guided.p_sample_loop_progressive(of, net, x.shape, x)
    last = next(loop)["sample"]
    with no_waiting():
        for out in loop:
            last = out["sample"]
    assert last.isfinite().all()
