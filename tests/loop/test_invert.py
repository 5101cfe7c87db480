"""The loop run backwards: towards the exact flow, and there and back again."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastddim import DDIM, NoiseSchedule
from fastddim.coefficients import VP_PREDICTIONS, Prediction
from fastddim.tools.quality import Gaussian
from tests.loops import column, drawn
from tests.refusals import refused

LINEAR = NoiseSchedule.linear()
ABAR = torch.from_numpy(LINEAR.alphas_cumprod.copy())
GAUSSIAN = Gaussian(0.3, 0.5, LINEAR)
OTHER = Gaussian(-0.4, 0.5, LINEAR)
X0 = 0.3 + 0.5 * drawn(4, 2, 3)


def model(x: Tensor, t: Tensor) -> Tensor:
    return 0.8 * torch.tanh(x) + 1e-4 * column(t, x)


def oracle(prediction: str, gaussian: Gaussian = GAUSSIAN) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact model in these terms, computed in float64."""

    def net(x: Tensor, t: Tensor) -> Tensor:
        a, b = (column(root, x.double()) for root in (ABAR[t].sqrt(), (1 - ABAR[t]).sqrt()))
        eps: Tensor = gaussian(x.double(), t)
        x0 = (x.double() - b * eps) / a
        return {"epsilon": eps, "v": a * eps - b * x0, "sample": x0}[prediction].float()

    return net


def mse(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().mean())


def up(ddim: DDIM, net: Callable[..., Tensor], x: Tensor, refine: int, until: int = 0) -> Tensor:
    """x_t = √ᾱ_t·(x_s − √(1−ᾱ_s)·ε)/√ᾱ_s + √(1−ᾱ_t)·ε in float64, ε asked at (y, t)."""
    x = x.double()
    for t, s in reversed(ddim.pairs[until:]):
        abar_t = float(ABAR[t])
        abar_s = float(ABAR[s]) if s >= 0 else ddim.final_alpha_cumprod
        y = x
        for _ in range(1 + refine):
            eps = net(y, torch.full((len(x),), t))
            x0 = (x - math.sqrt(1 - abar_s) * eps) / math.sqrt(abar_s)
            y = math.sqrt(abar_t) * x0 + math.sqrt(1 - abar_t) * eps
        x = y
    return x


@pytest.mark.parametrize("refine", [0, 1, 3])
@pytest.mark.parametrize("until", [0, 17])
@pytest.mark.parametrize("final", [1.0, float(ABAR[0])])
def test_invert_is_its_equation(refine: int, until: int, final: float) -> None:
    ddim = DDIM(50, schedule=LINEAR, final_alpha_cumprod=final)
    out = ddim.invert(model, X0, refine=refine, until=until)
    assert out.dtype == torch.float32
    assert (out - up(ddim, model, X0, refine, until)).abs().max() < 2e-5


@pytest.mark.parametrize("prediction", VP_PREDICTIONS)
@pytest.mark.parametrize("refine", [0, 2])
def test_v_and_x0_models_are_inverted_as_the_same_eps_model(
    prediction: Prediction, refine: int
) -> None:
    tau = list(range(0, 700, 35))
    ddim = DDIM(spacing=tau, schedule=LINEAR, prediction=prediction)
    out = ddim.invert(oracle(prediction), X0, refine=refine)
    assert (out - up(ddim, GAUSSIAN, X0, refine)).abs().max() < 1e-4


STEPS = (50, 100, 200, 400)


def orders(errors: list[float]) -> list[float]:
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("gaussian", [GAUSSIAN, Gaussian(-0.2, 1.5, LINEAR)])
@pytest.mark.parametrize("refine", [0, 4])
def test_both_ways_tend_to_the_exact_flow_with_order_one(gaussian: Gaussian, refine: int) -> None:
    exact = gaussian.flow(X0.double(), -1, 999)
    samplers = [DDIM(S, schedule=LINEAR, spacing="trailing") for S in STEPS]
    there = [float((d.invert(gaussian, X0, refine=refine) - exact).abs().max()) for d in samplers]
    assert all(0.85 <= p <= 1.15 for p in orders(there)), orders(there)
    back = [float((d.sample(gaussian, exact.float()) - X0).abs().max()) for d in samplers]
    assert all(0.85 <= p <= 1.15 for p in orders(back)), orders(back)
    assert max(there[-1], back[-1]) < 0.05
    # And backwards is the flow's own direction: the way to x0 is a different one by far.
    assert (exact - gaussian.flow(X0.double(), 999, -1)).abs().max() > 0.5


@pytest.mark.parametrize("refine", [0, 3])
def test_there_and_back_in_a_thousand_steps(refine: int) -> None:
    ddim = DDIM(1000, schedule=LINEAR)
    out = ddim.sample(GAUSSIAN, ddim.invert(GAUSSIAN, X0, refine=refine))
    assert mse(out, X0) < (1e-5 if refine == 0 else 1e-9)


@pytest.mark.parametrize("prediction", ["v", "sample"])
@pytest.mark.parametrize("refine", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_there_and_back_with_other_predictions(prediction: Prediction, refine: int) -> None:
    ddim, net = DDIM(1000, schedule=LINEAR, prediction=prediction), oracle(prediction)
    out = ddim.sample(net, ddim.invert(net, X0, refine=refine))
    assert mse(out, X0) < (1e-5 if refine == 0 else 1e-9)


def means(x: Tensor, t: Tensor, m: Tensor) -> Tensor:
    """The exact ε of N(m, ½²) for each sample's own m."""
    a, b = (column(root, x.double()) for root in (ABAR[t].sqrt(), (1 - ABAR[t]).sqrt()))
    eps = b * (x.double() - a * m.double()) / ((0.5 * a) ** 2 + b**2)
    return eps.float()


GUIDED: dict[str, Any] = {
    "cond": {"m": torch.full((4, 1, 1), 0.3)},
    "uncond": {"m": torch.full((4, 1, 1), -0.4)},
}


@pytest.mark.parametrize(
    "w",
    [
        3.0,
        pytest.param([0.0, 0.5, 1.0, 2.0], marks=pytest.mark.slow),
        pytest.param(lambda t: 2.0 if t % 2 else 1.0, marks=pytest.mark.slow),
    ],
    ids=["number", "per sample", "function"],
)
@pytest.mark.parametrize("refine", [0, 3])
def test_there_and_back_with_guidance(w: Any, refine: int) -> None:
    ddim = DDIM(1000, schedule=LINEAR)
    z = ddim.invert(means, X0, refine=refine, guidance=w, **GUIDED)
    out = ddim.sample(means, z, guidance=w, **GUIDED)
    # u + 3·(c − u) leads far from these data, and so the steps' own error is larger.
    assert mse(out, X0) < (1e-4 if refine == 0 else 1e-9)


def test_guidance_is_found_backwards_as_the_mixed_eps() -> None:
    ddim = DDIM(50, schedule=LINEAR)
    w = torch.linspace(0.5, 3, 50)
    level = {t: float(w[row]) for row, (t, _) in enumerate(ddim.pairs)}

    def mixed(x: Tensor, t: Tensor) -> Tensor:
        u: Tensor = OTHER(x, t)
        c: Tensor = GAUSSIAN(x, t)
        return u + level[int(t[0])] * (c - u)

    for given in (w[:, None], lambda t: level[t]):
        z = ddim.invert(means, X0, refine=1, guidance=given, **GUIDED)
        assert (z - up(ddim, mixed, X0, 1)).abs().max() < 1e-4


def test_cond_fn_moves_eps_backwards_too() -> None:
    def gradient(x: Tensor, t: Tensor) -> Tensor:
        return 0.3 * torch.sin(x)

    def moved(x: Tensor, t: Tensor) -> Tensor:
        eps: Tensor = GAUSSIAN(x, t)
        return eps - column((1 - ABAR[t]).sqrt(), x) * gradient(x, t)

    for prediction in VP_PREDICTIONS:
        ddim = DDIM(spacing=list(range(0, 700, 35)), schedule=LINEAR, prediction=prediction)
        z = ddim.invert(oracle(prediction), X0, refine=1, cond_fn=gradient)
        assert (z - up(ddim, moved, X0, 1)).abs().max() < 1e-4


@pytest.mark.parametrize("refine", [0, 2])
def test_the_model_gets_the_timestep_of_the_next_state(refine: int) -> None:
    told: list[int] = []

    def listening(x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.int64
        assert t.shape == (4,)
        told.extend(set(t.tolist()))
        return model(x, t)

    ddim = DDIM(10, schedule=LINEAR)
    ddim.invert(listening, X0, refine=refine)
    assert told == [t for t, _ in reversed(ddim.pairs) for _ in range(1 + refine)]
    told.clear()
    ddim.invert(listening, X0, until=6)
    assert told == [0, 100, 200, 300]


def test_until_is_the_row_that_sample_starts_with() -> None:
    ddim = DDIM(1000, schedule=LINEAR)
    for until in (999, 650):
        z = ddim.invert(GAUSSIAN, X0, until=until, refine=3)
        t, _ = ddim.pairs[until]
        assert (z - GAUSSIAN.flow(X0, -1, t)).abs().max() < 0.03
        assert mse(ddim.sample(GAUSSIAN, z, start=until), X0) < 1e-9


@pytest.mark.parametrize("refine", [0, 1])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_iterate_in_reverse_is_invert_one_step_at_a_time(
    refine: int, dtype: torch.dtype | None
) -> None:
    ddim = DDIM(12, schedule=LINEAR)
    common: dict[str, Any] = {"refine": refine, "dtype": dtype}
    steps = list(ddim.iterate(model, X0, reverse=True, **common))
    assert [step.index for step in steps] == list(range(11, -1, -1))
    assert [(step.s, step.t) for step in steps] == list(reversed(ddim.pairs))
    assert steps[0].t == -1
    x = X0
    for step in steps:
        assert torch.equal(step.x, ddim.invert(model, X0, until=step.index, **common))
        # x0 follows from x before the step and from the step's ε.
        abar_t = ABAR[step.s]
        abar_s = ABAR[step.t] if step.t >= 0 else torch.tensor(1.0)
        eps = (step.x - abar_t.sqrt() * step.x0) / (1 - abar_t).sqrt()
        assert (abar_s.sqrt() * step.x0 + (1 - abar_s).sqrt() * eps - x).abs().max() < 1e-4
        x = step.x
    assert torch.equal(steps[0].x0, X0)
    some = list(ddim.iterate(model, X0, reverse=True, until=5, **common))
    assert [step.index for step in some] == list(range(11, 4, -1))
    assert torch.equal(some[-1].x, steps[6].x)
    resumed = [ddim.sample(model, step.x, start=step.index) for step in steps]
    assert resumed[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_around_a_float32_state(
    dtype: torch.dtype,
) -> None:
    seen: set[torch.dtype] = set()

    def half(x: Tensor, t: Tensor) -> Tensor:
        seen.add(x.dtype)
        return model(x, t)

    ddim = DDIM(20, schedule=LINEAR)
    rounded = X0.to(dtype)
    out = ddim.invert(half, rounded)
    assert seen == {dtype}
    assert out.dtype == dtype
    through = ddim.invert(half, rounded.float(), dtype=dtype)
    assert through.dtype == torch.float32
    assert torch.equal(out, through.to(dtype))
    exact = up(ddim, lambda x, t: model(x.to(dtype), t).double(), rounded, 0)
    assert (through - exact).abs().max() < 0.05
    # One step is rounded in the model's argument and nowhere else.
    one = DDIM(spacing=[500], schedule=LINEAR)
    exact = up(one, lambda x, t: model(x.to(dtype), t).double(), rounded, 0)
    assert (one.invert(half, rounded.float(), dtype=dtype) - exact).abs().max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("refine", [0, 2])
def test_the_garment_model_inverts_within_the_papers_error(refine: int) -> None:
    from fastddim import embedded

    net = embedded.load()
    with torch.no_grad():
        images = DDIM(50, schedule=LINEAR, clip=1.0).sample(net, shape=(1, 1, 28, 28), seeds=[1])
    images = images.clamp(-1, 1)
    ddim = DDIM(1000 if refine == 0 else 250, schedule=LINEAR)
    out = ddim.sample(net, ddim.invert(net, images, refine=refine))
    # Song et al. 2021, table 2: per-dimension error on [0, 1], .0001 at S = 1000.
    assert mse(out / 2, images / 2) <= 1e-4


def unused(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing may be called")


@pytest.mark.parametrize(
    ("error", "said", "x0", "arguments"),
    [
        (TypeError, ("x0", "NoneType"), None, {}),
        (TypeError, ("x0", "float64"), X0.double(), {}),
        (ValueError, ("x0", "(4,)"), X0[:, 0, 0], {}),
        (ValueError, ("x0", "detach"), X0.clone().requires_grad_(), {}),
        (TypeError, ("until", "1.5"), X0, {"until": 1.5}),
        (ValueError, ("until", "[0, 9]", "10"), X0, {"until": 10}),
        (ValueError, ("until", "-1"), X0, {"until": -1}),
        (TypeError, ("refine", "True"), X0, {"refine": True}),
        (ValueError, ("refine", "-1"), X0, {"refine": -1}),
        (TypeError, ("dtype", "int64"), X0, {"dtype": torch.int64}),
    ],
)
@pytest.mark.parametrize("run", ["invert", "iterate"])
def test_bad_arguments_are_refused(
    run: str, error: type[Exception], said: tuple[str, ...], x0: Any, arguments: dict[str, Any]
) -> None:
    way: dict[str, Any] = {} if run == "invert" else {"reverse": True}
    refused(lambda: getattr(DDIM(10), run)(unused, x0, **way, **arguments), error, *said)


@pytest.mark.parametrize(
    "given",
    [
        {"seeds": [1, 2, 3, 4]},
        {"generator": torch.Generator()},
        {"noise": [X0] * 10},
        {"shape": (4, 2, 3)},
        {"known": X0},
        {"mask": X0},
        {"self_condition": "before"},
        {"start": 3},
    ],
)
def test_options_without_a_meaning_backwards_are_refused(given: dict[str, Any]) -> None:
    (name,) = given
    refused(lambda: DDIM(10).iterate(unused, X0, reverse=True, **given), ValueError, name)


@pytest.mark.parametrize("given", [{"until": 3}, {"refine": 1}, {"until": 0}])
def test_options_of_invert_alone_are_refused_forwards(given: dict[str, Any]) -> None:
    refused(lambda: DDIM(10).iterate(unused, X0, **given), ValueError, "until", "reverse=True")


@pytest.mark.parametrize(
    "run", [lambda d: d.invert(unused, X0), lambda d: d.iterate(unused, X0, reverse=True)]
)
def test_noise_and_clamps_cannot_be_run_backwards(run: Callable[[DDIM], Any]) -> None:
    refused(lambda: run(DDIM(10, eta=0.5)), ValueError, "eta", "0.5")
    refused(lambda: run(DDIM(10, eta="hat")), ValueError, "eta", "hat")
    refused(lambda: run(DDIM(10, eta=0.5, temperature=0.0)), ValueError, "eta", "0.5")
    refused(lambda: run(DDIM(10, clip=1.0)), ValueError, "clip", "None", "1")


# --- Levels where next to nothing is left of the data -------------------------------------------


def zero_terminal() -> NoiseSchedule:
    """Linear β, its √ᾱ shifted so that the last is 0 (Lin et al. 2024, algorithm 1)."""
    root = np.sqrt(LINEAR.alphas_cumprod)
    return NoiseSchedule.from_alphas_cumprod(
        ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    )


def exact(ddim: DDIM, mean: float = 0.3, std: float = 0.5) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact output for N(mean, std²) in float64, where ᾱ is 0 as well."""

    def net(x: Tensor, t: Tensor) -> Tensor:
        abar = column(torch.from_numpy(ddim.schedule.alphas_cumprod.copy())[t], x.double())
        a, b = abar.sqrt(), (1 - abar).sqrt()
        x0 = mean + a * std**2 / (abar * std**2 + b**2) * (x.double() - a * mean)
        eps = (x.double() - a * x0) / b
        return {"epsilon": eps, "v": a * eps - b * x0, "sample": x0}[ddim.prediction].float()

    return net


def exact_noise(ddim: DDIM, x0: Tensor, mean: float = 0.3, std: float = 0.5) -> Tensor:
    """x_T of x0: each of the sampler's steps is linear in x there, x_s = A·x_t + B, in float64."""
    x = x0.double()
    for t, s in reversed(ddim.pairs):
        abar = float(ddim.schedule.alphas_cumprod[t])
        abar_s = float(ddim.schedule.alphas_cumprod[s]) if s >= 0 else ddim.final_alpha_cumprod
        a, b = math.sqrt(abar), math.sqrt(1 - abar)
        slope = a * std**2 / (abar * std**2 + b**2)  # of x0, whose value at a·mean is the mean
        A = math.sqrt(abar_s) * slope + math.sqrt(1 - abar_s) * (1 - a * slope) / b
        x = a * mean + (x - math.sqrt(abar_s) * mean) / A
    return x


NOISY: dict[str, tuple[NoiseSchedule, int, int]] = {
    "zero": (zero_terminal(), 10, 40),
    "zero of 4": (zero_terminal(), 4, 200),  # nearer to the data so few steps converge slowly
    "cosine": (NoiseSchedule.cosine(), 10, 40),  # √ᾱ_T = 5e-5
    "cosine of 100": (NoiseSchedule.cosine(100), 10, 40),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("how", NOISY)
@pytest.mark.parametrize("prediction", ["v", "sample"])
def test_refining_converges_where_nothing_is_left_of_the_data(
    how: str, prediction: Prediction
) -> None:
    schedule, S, refine = NOISY[how]
    ddim = DDIM(S, schedule=schedule, prediction=prediction, spacing="trailing")
    x0 = 0.3 + 0.5 * drawn(64, 8)
    z = ddim.invert(exact(ddim), x0, refine=refine)
    assert float((z - exact_noise(ddim, x0)).abs().max()) < 2e-5
    assert float((ddim.sample(exact(ddim), z) - x0).abs().max()) < 2e-5
    *_, last = ddim.iterate(exact(ddim), x0, reverse=True, refine=refine)
    assert torch.equal(last.x, z)
    assert float((last.x0 - exact_x0(ddim, z)).abs().max()) < 1e-5


def exact_x0(ddim: DDIM, x: Tensor) -> Tensor:
    t = torch.full((len(x),), ddim.pairs[0][0])
    as_sample = DDIM(1, schedule=ddim.schedule, prediction="sample")
    return exact(as_sample)(x, t)


def test_epsilon_models_converge_there_too() -> None:
    ddim = DDIM(10, schedule=NoiseSchedule.cosine(100), spacing="trailing")
    x0 = 0.3 + 0.5 * drawn(64, 8)
    z = ddim.invert(exact(ddim), x0, refine=40)
    # x0 = (x − √(1−ᾱ)·ε)/√ᾱ divides a rounding of 1e-7 by √ᾱ_T = 5e-4, there and back.
    assert float((z - exact_noise(ddim, x0)).abs().max()) < 1e-3
    assert float((ddim.sample(exact(ddim), z) - x0).abs().max()) < 1e-3


def test_guidance_is_mixed_in_invert_as_in_sample() -> None:
    ddim = DDIM(10, schedule=zero_terminal(), prediction="v", spacing="trailing")

    def net(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return exact(ddim)(x, t) * (1 + 0.1 * c) + 0.2 * torch.tanh(x + c)

    given: dict[str, Any] = {"cond": {"c": drawn(16, 1)}, "uncond": {"c": drawn(16, 1, seed=2)}}
    given["guidance"] = 1.5
    x0 = 0.3 + 0.5 * drawn(16, 8)
    back = ddim.sample(net, ddim.invert(net, x0, refine=60, **given), **given)
    assert float((back - x0).abs().max()) < 1e-4


def test_one_step_from_data_to_nothing_is_refused() -> None:
    ddim = DDIM(1, schedule=zero_terminal(), prediction="v")
    refused(
        lambda: ddim.invert(exact(ddim), X0),
        ValueError,
        "a loop that runs backwards",
        "α = 0",
        "more steps",
    )
