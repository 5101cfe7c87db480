"""The model call: conditions, both kinds of guidance, self-conditioning, precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim import DDIM, NoiseSchedule
from fastddim.coefficients import VP_PREDICTIONS, Prediction
from fastddim.step.op import initial_noise
from fastddim.tools.quality import Gaussian
from tests.loops import Dispatched, by_hand, column, conditioned, counter_noise, drawn, last
from tests.refusals import refused

LINEAR = NoiseSchedule.linear()
ABAR = torch.from_numpy(LINEAR.alphas_cumprod.copy())
SHAPE = (3, 2, 5, 7)
SEEDS = [5, 2**32 + 5, 2**63 - 1]
C, U = drawn(3, 2, 1, 1, seed=11), drawn(3, 2, 1, 1, seed=12)
SAMPLER = DDIM(20, eta=0.7, schedule=LINEAR)


def expected(ddim: DDIM, net: Any, **options: Any) -> Tensor:
    x_T, noise = initial_noise(torch.tensor(SEEDS), SHAPE), counter_noise(ddim, SEEDS, SHAPE)
    return last(by_hand(ddim, net, x_T, noise, **options))


def sampled(ddim: DDIM, net: Any, **options: Any) -> Tensor:
    out: Tensor = ddim.sample(net, shape=SHAPE, seeds=SEEDS, **options)
    return out


BY_ROW = torch.linspace(0.5, 6.0, 20)[:, None]
WEIGHTS: dict[str, tuple[Any, Tensor]] = {
    "number": (7.5, torch.full((20, 3), 7.5)),
    "zero": (0, torch.zeros(20, 3)),
    "negative": (-1.5, torch.full((20, 3), -1.5)),
    "scalar tensor": (torch.tensor(2.5, dtype=torch.float64), torch.full((20, 3), 2.5)),
    "per sample": ([1.0, 2.0, -3.0], torch.tensor([1.0, 2.0, -3.0]).expand(20, 3)),
    "per row": (BY_ROW, BY_ROW.expand(20, 3)),
    "per row, array": (BY_ROW.numpy(), BY_ROW.expand(20, 3)),
    "both": (BY_ROW * torch.tensor([1.0, 2.0, 3.0]), BY_ROW * torch.tensor([1.0, 2.0, 3.0])),
    "function": (
        lambda t: t / 100,
        torch.tensor([t / 100 for t, _ in SAMPLER.pairs])[:, None].expand(20, 3),
    ),
    "function, per sample": (
        lambda t: [1.0, t / 100, 2.0],
        torch.tensor([[1.0, t / 100, 2.0] for t, _ in SAMPLER.pairs]),
    ),
    "interval": (
        lambda t: 4.0 if 200 < t < 800 else 1.0,
        torch.tensor([4.0 if 200 < t < 800 else 1.0 for t, _ in SAMPLER.pairs])[:, None].expand(
            20, 3
        ),
    ),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("how", WEIGHTS)
@pytest.mark.parametrize("prediction", VP_PREDICTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_guidance_is_u_and_w_times_the_difference(
    how: str, prediction: Prediction, dtype: torch.dtype
) -> None:
    given, w = WEIGHTS[how]
    ddim = DDIM(20, eta=0.7, schedule=LINEAR, prediction=prediction, clip=2.0)
    out = sampled(ddim, conditioned, cond={"c": C}, uncond={"c": U}, guidance=given, dtype=dtype)
    # Rows in which no sample is guided use the conditional output c, not u + 1·(c − u).
    assert torch.equal(out, by_hand_where_guided(ddim, w, dtype))
    if how == "number":
        assert not torch.equal(out, sampled(ddim, conditioned, cond={"c": C}, dtype=dtype))


def by_hand_where_guided(ddim: DDIM, w: Tensor, dtype: torch.dtype) -> Tensor:
    x, noise = initial_noise(torch.tensor(SEEDS), SHAPE), counter_noise(ddim, SEEDS, SHAPE)
    for row in range(20):
        guided = bool((w[row] != 1).any())
        both: dict[str, Any] = {"uncond": {"c": U}, "w": w.float()} if guided else {}
        states = by_hand(ddim, conditioned, x, noise, cond={"c": C}, dtype=dtype, start=row, **both)
        x, _ = next(states)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_with_w_of_1_call_the_model_once(dtype: torch.dtype) -> None:
    sizes: list[int] = []

    def counting(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        assert len(x) == len(t) == len(c)
        assert x.dtype == dtype
        sizes.append(len(x))
        return conditioned(x, t, c)

    def weight(t: int) -> Any:
        return 4.0 if 200 < t < 800 else [1.0, 1.0, 2.0] if t == 0 else 1.0

    both: dict[str, Any] = {"cond": {"c": C}, "uncond": {"c": U}, "dtype": dtype}
    sampled(SAMPLER, counting, guidance=weight, **both)
    assert sizes == [6 if 200 < t < 800 or t == 0 else 3 for t, _ in SAMPLER.pairs]
    sizes.clear()
    out = sampled(SAMPLER, counting, guidance=1.0, **both)
    assert sizes == [3] * 20
    assert torch.equal(out, sampled(SAMPLER, conditioned, cond={"c": C}, dtype=dtype))


def test_the_model_is_given_uncond_first_in_one_stacked_call() -> None:
    def checking(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        assert torch.equal(x[:3], x[3:])
        assert torch.equal(c, torch.cat([U, C]))
        assert t.dtype == torch.int64
        assert t.shape == (6,)
        assert len(set(t.tolist())) == 1
        return conditioned(x, t, c)

    sampled(SAMPLER, checking, cond={"c": C}, uncond={"c": U}, guidance=2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda eps: SimpleNamespace(sample=eps),
        lambda eps: (eps, "more"),
        lambda eps: torch.cat([eps, torch.full_like(eps, torch.nan)], 1),
        lambda eps: SimpleNamespace(sample=torch.cat([eps, torch.full_like(eps, torch.nan)], 1)),
        lambda eps: torch.stack([eps, eps], -1)[..., 0],
        lambda eps: eps.contiguous(memory_format=torch.channels_last),
        lambda eps: eps.float(),
    ],
    ids=["object", "tuple", "variance", "variance in an object", "strided", "channels_last", "f32"],
)
def test_outputs_of_any_form(wrap: Callable[[Tensor], Any], guided: bool, dtype: Any) -> None:
    def net(x: Tensor, t: Tensor, c: Tensor) -> Any:
        return wrap(conditioned(x, t, c))

    more: dict[str, Any] = {"uncond": {"c": U}, "guidance": [1.0, 2.0, 3.0]} if guided else {}
    by_row = torch.tensor([1.0, 2.0, 3.0]).expand(20, 3)
    known: dict[str, Any] = {"uncond": {"c": U}, "w": by_row} if guided else {}
    out = sampled(SAMPLER, net, cond={"c": C}, dtype=dtype, **more)
    assert torch.equal(out, expected(SAMPLER, conditioned, cond={"c": C}, dtype=dtype, **known))


def several(
    x: Tensor, t: Tensor, c: Any, table: Tensor, scale: float, added: dict[str, Any], more: Any
) -> Tensor:
    assert table.shape == (5,)
    first, (second, third) = more
    total = c + added["ids"] + added["deep"]["text"] + first + second + third
    return conditioned(x, t, total.view(-1, 2, 1, 1) * scale + table.sum())


def test_nested_conditions_lists_shared_tensors_and_single_rows() -> None:
    table, n = drawn(5), [drawn(3, 2, seed=20 + i) for i in range(8)]
    row = drawn(1, 2, seed=30)
    cond = {
        "c": n[0],
        "table": table,
        "scale": 0.5,
        "added": {"ids": n[1], "deep": {"text": n[2]}},
        "more": [n[3], (n[4], row)],
    }
    uncond = {
        "c": row,
        "table": table,
        "added": {"deep": {"text": n[5]}},
        "more": [n[6], (n[7], n[0])],
    }
    halves = {
        "c": torch.cat([row.expand(3, 2), n[0]]),
        "ids": torch.cat([n[1], n[1]]),
        "text": torch.cat([n[5], n[2]]),
        "first": torch.cat([n[6], n[3]]),
        "second": torch.cat([n[7], n[4]]),
        "third": torch.cat([n[0], row.expand(3, 2)]),
    }
    seen: list[Any] = []

    def recorded(x: Tensor, t: Tensor, **keywords: Any) -> Tensor:
        seen.append(keywords)
        return several(x, t, **keywords)

    sampled(SAMPLER, recorded, cond=cond, uncond=uncond, guidance=3.0)
    got = seen[0]
    assert got["table"] is table
    assert got["scale"] == 0.5
    assert torch.equal(got["c"], halves["c"])
    assert torch.equal(got["added"]["ids"], halves["ids"])
    assert torch.equal(got["added"]["deep"]["text"], halves["text"])
    first, (second, third) = got["more"]
    assert torch.equal(first, halves["first"])
    assert torch.equal(second, halves["second"])
    assert torch.equal(third, halves["third"])
    assert type(got["more"]) is list
    assert type(got["more"][1]) is tuple
    assert all(later is not None and later["c"] is got["c"] for later in seen)  # stacked only once


def test_one_row_of_uncond_stands_for_the_batch() -> None:
    one = drawn(1, 2, 1, 1, seed=3)
    out = sampled(SAMPLER, conditioned, cond={"c": C}, uncond={"c": one}, guidance=3.0)
    full = one.expand(3, -1, -1, -1).contiguous()
    assert torch.equal(
        out, sampled(SAMPLER, conditioned, cond={"c": C}, uncond={"c": full}, guidance=3.0)
    )


def test_a_batch_of_one_is_guided_as_any() -> None:
    both: dict[str, Any] = {"cond": {"c": C[1:2]}, "uncond": {"c": U[1:2]}, "guidance": 3.0}
    out = SAMPLER.sample(conditioned, shape=(1, *SHAPE[1:]), seeds=SEEDS[1:2], **both)
    together = sampled(SAMPLER, conditioned, cond={"c": C}, uncond={"c": U}, guidance=3.0)
    assert torch.equal(out, together[1:2])


# Classifier guidance.


def gradient(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
    return 0.3 * torch.sin(2 * x) + column(t, x) / 3000


def as_prediction(eps: Callable[..., Tensor], prediction: str) -> Callable[..., Tensor]:
    """The same model in other terms, in x's dtype."""

    def net(x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        a, b = (column(root, x) for root in (ABAR[t].sqrt(), (1 - ABAR[t]).sqrt()))
        said = eps(x, t, **cond)
        x0 = (x - b * said) / a
        return {"epsilon": said, "v": a * said - b * x0, "sample": x0}[prediction]

    return net


def in_float64(net: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, t, **cond: net(x.double(), t, **cond).float()


def condition_score(
    ddim: DDIM, eps: Callable[..., Tensor], x: Tensor, noise: list[Tensor | None], **more: Any
) -> Tensor:
    """guided-diffusion's ``condition_score`` in the paper's loop, in float64.

    eps = eps - (1 - alpha_bar).sqrt() * cond_fn(x, t); x0 follows from it, and is clamped.
    """
    x = x.double()
    for (t, s), z, c1 in zip(ddim.pairs, noise, ddim.table[:, 5].tolist(), strict=True):
        abar = float(ABAR[t])
        abar_s = float(ABAR[s]) if s >= 0 else 1.0
        level = torch.full((len(x),), t)
        said = eps(x, level, **more)
        said = said - math.sqrt(1 - abar) * gradient(x, level)
        x0 = (x - math.sqrt(1 - abar) * said) / math.sqrt(abar)
        if ddim.clip is not None:
            x0 = x0.clamp(-ddim.clip, ddim.clip)
        x = math.sqrt(abar_s) * x0 + math.sqrt(max(1 - abar_s - c1**2, 0)) * said
        x = x if z is None else x + c1 * z.double()
    return x


def smooth(x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
    return 0.8 * torch.tanh(x) + (0 if c is None else 0.2 * c.to(x.dtype))


@pytest.mark.parametrize("prediction", VP_PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_cond_fn_is_guided_diffusions_condition_score(
    prediction: Prediction, eta: float, clip: float | None
) -> None:
    ddim = DDIM(
        spacing=list(range(0, 600, 30)), eta=eta, schedule=LINEAR, prediction=prediction, clip=clip
    )
    out = sampled(ddim, in_float64(as_prediction(smooth, prediction)), cond_fn=gradient)
    x_T, noise = initial_noise(torch.tensor(SEEDS), SHAPE), counter_noise(ddim, SEEDS, SHAPE)
    exact = condition_score(ddim, smooth, x_T, noise)
    assert (out - exact).abs().max() < 2e-5
    assert (out - sampled(ddim, in_float64(as_prediction(smooth, prediction)))).abs().max() > 1e-2


@pytest.mark.parametrize("prediction", VP_PREDICTIONS)
@pytest.mark.parametrize("learned", [False, True])
def test_cond_fn_moves_the_guided_output_of_both_halves(
    prediction: Prediction, learned: bool
) -> None:
    ddim = DDIM(spacing=list(range(0, 600, 30)), schedule=LINEAR, prediction=prediction)
    net = in_float64(as_prediction(smooth, prediction))

    def perhaps_learned(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        output = net(x, t, c=c)
        return torch.cat([output, torch.full_like(output, torch.nan)], 1) if learned else output

    def guided(x: Tensor, t: Tensor, c: Tensor, u: Tensor) -> Tensor:
        return smooth(x, t, u) + 2.5 * (smooth(x, t, c) - smooth(x, t, u))

    seen: list[Tensor] = []

    def watched(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        assert torch.equal(c, C)
        seen.append(t)
        return gradient(x, t)

    out = sampled(
        ddim, perhaps_learned, cond={"c": C}, uncond={"c": U}, guidance=2.5, cond_fn=watched
    )
    assert [t.tolist() for t in seen] == [[t] * 3 for t, _ in ddim.pairs]
    x_T = initial_noise(torch.tensor(SEEDS), SHAPE)
    exact = condition_score(ddim, guided, x_T, [None] * 20, c=C, u=U)
    assert (out - exact).abs().max() < 4e-5


@pytest.mark.parametrize("prediction", VP_PREDICTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gaussians_exact_classifier_gives_posterior_samples(
    prediction: Prediction, dtype: torch.dtype
) -> None:
    # x0 ~ N(m, s²), y = x0 + N(0, r²): p(y | x_t) and p(x0 | y) are both Gaussian.
    m, s, r, y = 0.3, 0.8, 0.5, -0.6
    prior = Gaussian(m, s, LINEAR)
    precision = 1 / s**2 + 1 / r**2
    posterior = Gaussian((m / s**2 + y / r**2) / precision, math.sqrt(1 / precision), LINEAR)

    def classifier(x: Tensor, t: Tensor) -> Tensor:
        a, b = (column(root, x.double()) for root in (ABAR[t].sqrt(), (1 - ABAR[t]).sqrt()))
        v = (a * s) ** 2 + b**2
        mean = m + a * s**2 / v * (x.double() - a * m)
        return ((y - mean) / ((s * b) ** 2 / v + r**2) * a * s**2 / v).float()

    def oracle(gaussian: Gaussian) -> Callable[..., Tensor]:
        return in_float64(as_prediction(gaussian, prediction))

    ddim = DDIM(50, eta=0.5, schedule=LINEAR, prediction=prediction, spacing="trailing")
    out = sampled(ddim, oracle(prior), cond_fn=classifier, dtype=dtype)
    exact = sampled(ddim, oracle(posterior))
    unguided = sampled(ddim, oracle(prior))
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    assert (out - exact).abs().max() < tolerance
    assert (unguided - exact).abs().max() > 0.2


def test_cond_fn_may_differentiate_a_network() -> None:
    weight = torch.nn.Linear(70, 4)

    def logits(x: Tensor) -> Tensor:
        return torch.log_softmax(weight(x.flatten(1)), 1)[:, 2]

    def by_autograd(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(logits(x).sum(), x)[0]

    def analytic(x: Tensor, t: Tensor) -> Tensor:
        p = torch.softmax(weight(x.flatten(1)), 1)
        return (weight.weight[2] - p @ weight.weight).view_as(x).detach()

    ddim = DDIM(20, schedule=LINEAR, clip=1.0)
    one, other = (sampled(ddim, smooth, cond_fn=f) for f in (by_autograd, analytic))
    assert not one.requires_grad
    assert (one - other).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (lambda x: None, "got NoneType"),
        (lambda x: x[:1], "got (1, 2)"),
        (lambda x: x.numpy(), "got ndarray"),
    ],
)
def test_bad_outputs_of_a_cond_fn_are_refused(answer: Callable[[Tensor], Any], got: str) -> None:
    refused(
        lambda: DDIM(5).sample(smooth, torch.zeros(3, 2), cond_fn=lambda x, t: answer(x)),
        ValueError,
        "cond_fn",
        "(3, 2)",
        got,
    )


# Self-conditioning.


def remembering(x: Tensor, t: Tensor, before: Tensor, c: Tensor | None = None) -> Tensor:
    assert before.dtype == x.dtype
    assert before.shape == x.shape
    output = 0.6 * x.clamp(-1.5, 1.5) + 0.3 * before.clamp(-1, 1) + 1e-3 * column(t % 97, x)
    return output if c is None else output + 0.2 * c.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("clip", [None, 0.9])
def test_self_conditioning_hands_on_the_last_x0(
    dtype: torch.dtype, guided: bool, eta: float, clip: float | None
) -> None:
    ddim = DDIM(20, eta=eta, schedule=LINEAR, clip=clip)
    more: dict[str, Any] = {"cond": {"c": C}, "uncond": {"c": U}} if guided else {}
    own: dict[str, Any] = {"self_condition": "before", "dtype": dtype, **more}
    w: dict[str, Any] = {"w": torch.full((20, 3), 2.0)} if guided else {}
    by = expected(ddim, remembering, **own, **w)
    if guided:
        own["guidance"] = 2.0
    assert torch.equal(sampled(ddim, remembering, **own), by)
    *_, step = ddim.iterate(remembering, shape=SHAPE, seeds=SEEDS, **own)
    assert torch.equal(step.x, by)


# Precision.


@pytest.mark.parametrize("autocast", [True, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("guided", [False, True])
def test_autocast_is_torchs_own_around_the_model(autocast: Any, guided: bool) -> None:
    layer = torch.nn.Linear(7, 7)
    dtype = torch.get_autocast_dtype("cpu") if autocast is True else autocast
    seen: set[tuple[Any, ...]] = set()

    def net(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        output: Tensor = layer(x) * 0.5 + 0.1 * c
        seen.add((x.dtype, layer(x).dtype, torch.is_autocast_enabled("cpu")))
        return output

    def by_torch(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        with torch.no_grad():
            weight, bias = layer.weight.to(dtype), layer.bias.to(dtype)
            said = torch.nn.functional.linear(x.to(dtype), weight, bias)
            return said * 0.5 + 0.1 * c

    more: dict[str, Any] = {"uncond": {"c": U}, "guidance": 2.0} if guided else {}
    out = sampled(SAMPLER, net, cond={"c": C}, autocast=autocast, **more)
    assert seen == {(torch.float32, dtype, True)}
    assert out.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")
    states = expected(
        SAMPLER,
        by_torch,
        cond={"c": C},
        **({"uncond": {"c": U}, "w": torch.full((20, 3), 2.0)} if guided else {}),
    )
    # oneDNN may sum another batch in another order, in half precision's last place.
    assert (out - states).abs().max() < (0.0 if not guided else 2e-2) + 1e-6
    assert not torch.equal(out, sampled(SAMPLER, net, cond={"c": C}, autocast=False, **more))


def test_autocast_casts_each_weight_once_a_call() -> None:
    layer = torch.nn.Linear(7, 7)
    casts: list[int] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        mode.names.clear()
        output: Tensor = layer(x)
        casts.append(mode.names.count("aten._to_copy.default"))
        return output

    with (mode := Dispatched()):
        out = sampled(SAMPLER, net, autocast=True)
    assert casts == [3] + [1] * 19  # x, weight and bias, then x alone
    with torch.no_grad():
        layer.weight.mul_(0.5)
    assert not torch.equal(out, sampled(SAMPLER, net, autocast=True))


def test_the_callers_own_autocast_is_left_alone() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sampled(SAMPLER, smooth, autocast=torch.float16)
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
