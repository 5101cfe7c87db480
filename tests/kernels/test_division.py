"""Three operations divide as IEEE 754 does: checked on every significand, not argued."""

from __future__ import annotations

import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from fastddim import DDIM

Floats = npt.NDArray[np.float32]
FLT_MAX = np.finfo(np.float32).max
# What a table divides by: √ᾱ_t and √(1−ᾱ_t).
ROOTS, PAPER_ROOTS = (np.unique(DDIM(steps=n, eta=1.0).table[:, [0, 2]]) for n in (50, 1000))


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


def divide(x: Floats, c: np.float32, rcp: np.float32 | None = None, finite: bool = False) -> Floats:
    """The kernel's ``divide``, operation for operation, on a machine that fuses."""
    rcp = np.float32(1) / c if rcp is None else rcp
    q = x * rcp
    y = fma(fma(-c, q, x), rcp, q)
    with np.errstate(invalid="ignore"):
        return y if finite else np.where(np.abs(q) < np.inf, y, q)


def bounded(x0: Floats, s: np.float32) -> Floats:
    """The kernel's ``bound_x0`` with a threshold."""
    rcp = np.float32(1) / s
    return divide(np.clip(x0, -s, s), np.minimum(s, FLT_MAX), rcp, finite=True)


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


@pytest.mark.slow
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


def near_ties(c: np.float32, most: int = 63) -> Floats:
    """The significands whose quotients by c come closest to halfway between two float32.

    With integers X and C for the significands, a quotient of 24 bits is halfway off by
    δ/(2C) of its last bit where 2ᵏ·X = C·(2Q + 1) + δ; k is 24 where X ≥ C, or 25.
    """
    C = int(np.frexp(c)[0] * 2**24)
    odd = C // (C & -C)
    delta = np.arange(-most, most + 1, dtype=np.int64)
    found = np.concatenate([delta * pow(2, -k, odd) % odd for k in (24, 25)])
    found += -((found - 2**23) // odd) * odd  # into [2²³, 2²³ + odd)
    return found[found < 2**24].astype(np.float32)


def test_the_division_is_exact_nearest_to_a_tie() -> None:
    assert len(PAPER_ROOTS) == 2000
    assert np.isin(ROOTS, PAPER_ROOTS).all()
    for c in PAPER_ROOTS:
        assert wrong(c, near_ties(c)) == 0, f"c = {c!r}"


def test_the_nearest_to_a_tie_are_the_hard_ones() -> None:
    # With 1/c one unit off no random significand in 160,000 goes wrong; of these 8,569, 38 do.
    missed = 0
    for c in PAPER_ROOTS[::50]:
        x = near_ties(c)
        rcp = np.nextafter(np.float32(1) / c, np.float32(0))
        missed += int((divide(x, c, rcp) != x / c).sum())
    assert missed > 10


def test_a_threshold_divides_exactly() -> None:
    rng = np.random.default_rng(0)
    thresholds = np.append(rng.uniform(1, 5, 200), [1, 5, 1e4, 1e30]).astype(np.float32)
    for s in thresholds:
        edges = np.array([1, -1, 0, np.inf, -np.inf, np.nan]) * s
        normals = rng.standard_normal(2000) * s
        x0 = np.concatenate([edges, normals, near_ties(s) * 2.0**-24]).astype(np.float32)
        np.testing.assert_array_equal(bounded(x0, s), np.clip(x0, -s, s) / s)


def test_an_infinite_threshold_gives_zero_and_nan_of_infinity() -> None:
    x0 = np.array([0, 1, -3e38, 1e-45, np.inf, -np.inf, np.nan], dtype=np.float32)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(bounded(x0, np.float32(np.inf)), x0 / np.float32(np.inf))


@pytest.mark.slow
def test_the_division_is_exact_for_every_divisor_of_the_paper(
    tmp_path: Path,
) -> None:
    # In C, whose fmaf is the machine's: 2000 divisors, and 500 thresholds, of 2²³ significands.
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    source, program = Path(__file__).parents[1] / "division.c", tmp_path / "division"
    options = ["-O3", "-march=native", "-ffp-contract=off"]
    subprocess.run([compiler, *options, str(source), "-o", str(program), "-lm"], check=True)
    thresholds = np.random.default_rng(1).uniform(1, 5, 500).astype(np.float32)
    divisors = np.concatenate([PAPER_ROOTS, thresholds])
    run = subprocess.run([program], input=divisors.tobytes(), check=True, capture_output=True)
    assert run.stdout.decode() == f"{len(divisors)} divisors, 0 wrong quotients\n"
