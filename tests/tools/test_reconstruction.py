"""Reconstruction errors, against a model for which each step is known by hand."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim import DDIM, NoiseSchedule
from fastddim.timesteps import SpacingName
from fastddim.tools.quality import Gaussian
from fastddim.tools.reconstruction import Reconstruction, errors, model_calls
from tests.refusals import refused

MEAN, STD = 0.3, 0.4
ORACLE = Gaussian(MEAN, STD)
X0 = MEAN + STD * torch.randn((5, 1, 3, 4), generator=torch.Generator().manual_seed(0))


def by_hand(ddim: DDIM) -> float:
    """The error in float64: for a Gaussian ε is linear in x, ε(x, t) = k_t·(x − √ᾱ_t·m)."""
    abar = [*NoiseSchedule.linear().alphas_cumprod.tolist(), 1.0]  # level −1 is the last
    x = X0.double()
    for encoding in (True, False):
        for t, s in reversed(ddim.pairs) if encoding else ddim.pairs:
            a_t, b_t, a_s, b_s = (math.sqrt(f(abar[i])) for i in (t, s) for f in (same, rest))
            eps = b_t / (a_t**2 * STD**2 + b_t**2) * (x - a_t * MEAN)
            if encoding:
                x = a_t * (x - b_s * eps) / a_s + b_t * eps
            else:
                x = a_s * (x - b_t * eps) / a_t + b_s * eps
    return float(((x + 1) / 2 - (X0.double() + 1) / 2).square().mean())


def same(abar: float) -> float:
    return abar


def rest(abar: float) -> float:
    return 1 - abar


@pytest.mark.parametrize("spacing", ["uniform", "quad", "trailing"])
def test_the_error_is_the_one_that_follows_by_hand(spacing: SpacingName) -> None:
    ddims = [DDIM(S, spacing=spacing) for S in (5, 20, 40)]
    rows = list(errors(ddims, ORACLE, X0, batch_size=2))
    assert [row.ddim for row in rows] == ddims
    for row in rows:
        assert row.error == pytest.approx(by_hand(row.ddim), rel=1e-3)
        assert row.images.shape == X0.shape
        recomputed = float((row.images - X0).double().square().mean() / 4)
        assert row.error == pytest.approx(recomputed, rel=1e-4)


def test_the_error_falls_as_1_over_S_squared_and_refined_to_0() -> None:
    ddims = [DDIM(S) for S in (20, 40, 80)]
    plain = [row.error for row in errors(ddims, ORACLE, X0)]
    for coarse, fine in pairwise(plain):
        assert 3 < coarse / fine < 5
    before = plain
    for refine in (1, 2):
        refined = [row.error for row in errors(ddims, ORACLE, X0, refine=refine)]
        assert all(a < b for a, b in zip(refined, before, strict=True)), refine
        before = refined
    # What is left is float32.
    assert next(errors(ddims, ORACLE, X0, refine=40)).error < 1e-11


@pytest.mark.parametrize("refine", [0, 3])
def test_the_model_sees_full_batches_and_the_stated_calls(refine: int) -> None:
    sizes: list[int] = []
    ticks: list[Any] = []
    totals: list[int] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        assert len(ticks) == len(sizes)  # a bar counts what is past
        sizes.append(len(x))
        answer: Tensor = ORACLE(x, t)
        return answer

    def progress(calls: Any) -> Any:
        totals.append(len(calls))
        for call in calls:
            yield call
            ticks.append(call)

    ddims = [DDIM(4), DDIM(7)]
    rows = list(errors(ddims, model, X0, refine=refine, batch_size=2, progress=progress))
    assert set(sizes) == {2}
    per_image = [S * (2 + refine) for S in (4, 7)]
    assert [row.calls for row in rows] == per_image
    assert len(sizes) == 3 * sum(per_image)  # five images are three batches
    assert totals == [len(sizes)] == [model_calls(ddims, 5, 2, refine)]
    assert len(ticks) == len(sizes)
    assert all(row.seconds > 0 for row in rows)


def test_an_image_is_decoded_alike_whatever_the_others_are() -> None:
    torch.manual_seed(0)
    net = torch.nn.Conv2d(1, 1, 3, padding=1).requires_grad_(False)

    def decoded(x0: Tensor) -> Tensor:
        row: Reconstruction = next(errors([DDIM(5)], lambda x, t: net(x), x0, batch_size=3))
        return row.images

    together = decoded(X0)
    for k in range(5):
        assert torch.equal(decoded(X0[k : k + 1])[0], together[k])


def test_half_precision_keeps_its_type_and_nothing_is_written() -> None:
    x0 = X0.bfloat16()
    before = x0.clone()
    row = next(errors([DDIM(10)], ORACLE, x0, refine=1))
    assert row.images.dtype == torch.bfloat16
    assert torch.equal(x0, before)


def test_impossible_reconstructions_are_refused_before_any_work() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        pytest.fail("work began")

    def ask(x0: Any = X0, **options: Any) -> Any:
        given = {name: options.pop(name) for name in ("eta", "clip") if name in options}
        return lambda: errors([DDIM(2), DDIM(2, **given)], model, x0, **options)

    refused(ask(eta=0.5), ValueError, "eta must be 0", "got 0.5")
    refused(ask(clip=1.0), ValueError, "clip must be None", "got 1")
    refused(ask(refine=-1), ValueError, "refine must be an integer ≥ 0", "got -1")
    refused(ask(refine=1.5), TypeError, "refine must be an integer ≥ 0", "got 1.5")
    refused(ask(batch_size=0), ValueError, "batch_size must be an integer in [1, 65536]", "got 0")
    refused(ask(X0[:0]), ValueError, "x0 must hold at least one image", "(0, 1, 3, 4)")
    refused(ask(X0.int()), TypeError, "x0 must be float32", "int32")
    refused(ask([1.0]), TypeError, "x0 must be a tensor", "list")
    assert list(errors([], model, X0)) == []
