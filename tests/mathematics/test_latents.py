"""slerp: the paper's equation 67 on the sphere."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim import slerp
from tests.loops import drawn
from tests.refusals import refused

A, B = drawn(5, 3, 8, 8), drawn(5, 3, 8, 8, seed=2)
ALPHAS = [0.0, 0.125, 0.5, 0.9, 1.0]


def by_hand(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    out = []
    for p, q in zip(a.double(), b.double(), strict=True):
        theta = math.acos(float((p * q).sum() / (p.norm() * q.norm())))
        out.append(
            (math.sin((1 - alpha) * theta) * p + math.sin(alpha * theta) * q) / math.sin(theta)
        )
    return torch.stack(out)


@pytest.mark.parametrize("alpha", [*ALPHAS, -0.25, 1.5])
def test_slerp_is_equation_67_sample_by_sample(alpha: float) -> None:
    out = slerp(A, B, alpha)
    assert out.dtype == torch.float32
    assert (out - by_hand(A, B, alpha)).abs().max() < 1e-6
    exact = slerp(A.double(), B.double(), alpha)
    assert exact.dtype == torch.float64
    assert (exact - by_hand(A, B, alpha)).abs().max() < 1e-13


@pytest.mark.parametrize(
    "fractions", [ALPHAS, tuple(ALPHAS), torch.tensor(ALPHAS, dtype=torch.float64)]
)
def test_several_fractions_are_stacked(fractions: Any) -> None:
    out = slerp(A, B, fractions)
    assert out.shape == (5, *A.shape)
    assert all(torch.equal(out[i], slerp(A, B, alpha)) for i, alpha in enumerate(ALPHAS))
    assert slerp(A, B, []).shape == (0, *A.shape)
    assert torch.equal(slerp(A, B, torch.tensor(0.5)), slerp(A, B, 0.5))


def test_the_ends_are_a_and_b() -> None:
    assert torch.equal(slerp(A, B, 0.0), A)
    assert torch.equal(slerp(A, B, 1), B)


def test_slerp_keeps_the_norm_that_a_straight_line_would_lose() -> None:
    p, q = (x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * 13.9 for x in (A, B))
    for alpha in ALPHAS:
        norms = slerp(p, q, alpha).flatten(1).double().norm(dim=1)
        assert (norms - 13.9).abs().max() < 1e-5
    assert (0.5 * (p + q)).flatten(1).norm(dim=1).max() < 11


def test_a_quarter_turn() -> None:
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    out = slerp(x, y, 1 / 3)
    assert torch.allclose(out, torch.tensor([[math.cos(math.pi / 6), math.sin(math.pi / 6)]]))
    nearly = torch.tensor([[math.cos(3.0), math.sin(3.0)]], dtype=torch.float64)
    out = slerp(x.double(), nearly, 0.25)
    assert (out - torch.tensor([[math.cos(0.75), math.sin(0.75)]])).abs().max() < 1e-7


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-7, 1e-5, 1e-3])
def test_between_almost_parallel_ones_no_digit_is_lost(angle: float) -> None:
    x = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([[3 * math.cos(angle), 3 * math.sin(angle)]], dtype=torch.float64)
    out = slerp(x, y, 0.25)
    s = math.sin(angle) or 1.0
    u, v = (0.75, 0.25) if angle == 0 else (math.sin(0.75 * angle) / s, math.sin(0.25 * angle) / s)
    assert (out - (u * x + v * y)).abs().max() < 1e-12


def test_slerp_is_linear_for_parallel_or_zero_latents() -> None:
    assert torch.allclose(slerp(A, 3 * A, 0.5), 2 * A)
    zero = torch.zeros_like(A)
    assert torch.allclose(slerp(A, zero, 0.25), 0.75 * A)
    assert torch.equal(slerp(zero, zero, 0.3), zero)
    mixed = torch.cat([A[:1], B[1:2]])
    out = slerp(A[:2], mixed, 0.5)
    assert torch.allclose(out[0], A[0])
    assert (out[1] - by_hand(A[1:2], B[1:2], 0.5)[0]).abs().max() < 1e-6


@pytest.mark.parametrize("b", [-A, -2 * A, torch.cat([A[:4], -A[4:]])])
def test_opposite_ones_are_refused(b: Tensor) -> None:
    refused(lambda: slerp(A, b, 0.5), ValueError, "b", "opposite")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    a, b = A.to(dtype), B.to(dtype)
    out = slerp(a, b, 0.3)
    assert out.dtype == dtype
    assert torch.equal(out, by_hand(a, b, 0.3).to(dtype))


def test_the_arguments_are_left_alone_and_no_gradient_is_carried() -> None:
    a, b = A.clone().requires_grad_(), B.clone()
    out = slerp(a, b, 0.0)
    out.zero_()
    assert torch.equal(a, A)
    assert torch.equal(b, B)
    assert not out.requires_grad


def test_any_layout_and_an_empty_batch() -> None:
    a, b = (x.contiguous(memory_format=torch.channels_last) for x in (A, B))
    assert torch.equal(slerp(a, b, 0.3), slerp(A, B, 0.3))
    assert slerp(A[:0], B[:0], 0.3).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("error", "said", "arguments"),
    [
        (TypeError, ("a", "list"), ([1.0], B, 0.5)),
        (TypeError, ("b", "int64"), (A, B.long(), 0.5)),
        (ValueError, ("a and b", "(5, 3, 8, 8)", "(1, 3, 8, 8)"), (A, B[:1], 0.5)),
        (ValueError, ("a and b", "(8,)"), (A[0, 0, 0], B[0, 0, 0], 0.5)),
        (ValueError, ("fractions", "nan"), (A, B, math.nan)),
        (ValueError, ("fractions[1]", "inf"), (A, B, [0.0, math.inf])),
        (TypeError, ("fractions", "'x'"), (A, B, ["x"])),
        (TypeError, ("fractions", "NoneType"), (A, B, None)),
        (TypeError, ("fractions", "str"), (A, B, "0.5")),
        (TypeError, ("fractions", "True"), (A, B, True)),
    ],
)
def test_bad_arguments_are_refused(
    error: type[Exception], said: tuple[str, ...], arguments: tuple[Any, ...]
) -> None:
    refused(lambda: slerp(*arguments), error, *said)
