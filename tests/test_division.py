"""Three operations divide as IEEE 754 does: checked on every significand, not argued."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest

from fastddim import DDIM

Floats = npt.NDArray[np.float32]
TABLE = DDIM(steps=50, eta=1.0).table
ROOTS = np.unique(TABLE[:, [0, 2]])


def fma(a: Floats | np.float32, b: Floats | np.float32, c: Floats) -> Floats:
    """a·b + c rounded once, exactly.

    The product of two float32 is exact in float64. Their sum with c is rounded there to odd
    (Boldo and Melquiond 2008): with 53 ≥ 24 + 2 bits, rounding that again to float32 is right.
    """
    product = np.multiply(a, b, dtype=np.float64)
    addend = c.astype(np.float64)
    total = product + addend
    # Knuth's two-sum: what the rounded total lacks.
    shifted = total - product
    lost = (product - (total - shifted)) + (addend - shifted)
    even = (total.view(np.int64) & 1) == 0
    away = np.where((lost > 0) == (total > 0), 1, -1)
    odd = (total.view(np.int64) + np.where((lost != 0) & even, away, 0)).view(np.float64)
    return odd.astype(np.float32)


def divide(x: Floats, c: np.float32) -> Floats:
    """The kernel's ``divide``, operation for operation, on a machine that fuses."""
    rcp = np.float32(1) / c
    q = x * rcp
    y = fma(fma(-c, q, x), rcp, q)
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(q) < np.inf, y, q)


def significands(exponent: int = 0) -> Floats:
    """All 2²³ float32 in [2ᵉ, 2ᵉ⁺¹): the rest differ from them by a power of two."""
    bits = np.arange(2**23, dtype=np.int32) + np.int32((127 + exponent) << 23)
    return bits.view(np.float32)


def wrong(c: np.float32, x: Floats) -> int:
    # float64's quotient, rounded again, is float32's: 53 ≥ 2·24 + 2 (Figueroa 1995).
    truth = (x.astype(np.float64) / np.float64(c)).astype(np.float32)
    return int((divide(x, c) != truth).sum())


def test_the_emulated_fma_rounds_once() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(2000).astype(np.float32) for _ in range(2))
    # Near cancellation, near a tie, and neither.
    scales = np.array([1, 1 + 2**-23, 0.5, 1e-4, 2**26, -(2**25)], dtype=np.float32)
    near = -(a * b) * rng.choice(scales, 2000)
    for x, y, z, found in zip(a, b, near, fma(a, b, near), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        other = [np.nextafter(found, np.float32(s)) for s in (float("-inf"), float("inf"))]
        error = abs(Fraction(float(found)) - exact)
        for neighbour in other:
            assert error <= abs(Fraction(float(neighbour)) - exact)


@pytest.mark.parametrize("which", [0, 33, 66, -1])
def test_the_division_is_exact_for_every_significand(which: int) -> None:
    assert wrong(ROOTS[which], significands()) == 0


def test_one_operation_less_is_not_exact() -> None:
    x = significands()[::16]
    c = ROOTS[33]
    assert ((x * (np.float32(1) / c)) != (x / c)).any()


@pytest.mark.parametrize("exponent", [-99, -24, 24, 60, 126])
def test_the_division_is_exact_far_from_one(exponent: int) -> None:
    for c in ROOTS[::25]:
        x = significands(exponent)[:: 2**10]
        with np.errstate(over="ignore", invalid="ignore"):
            assert wrong(c, x) == 0
            assert wrong(c, -x) == 0


def test_zero_infinity_and_nan_divide_as_they_should() -> None:
    x = np.array([0.0, np.inf, -np.inf, np.nan, 3e38], dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for c in ROOTS[::10]:
            np.testing.assert_array_equal(divide(x, c), x / c)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_the_division_is_exact_for_every_divisor_of_the_default_table(part: int) -> None:
    x = significands()
    for c in ROOTS[part::10]:
        assert wrong(c, x) == 0, f"c = {c!r}"
