"""The normals of the fused pass against float64 and the Philox reference."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fastddim.step import numba_pass
from fastddim.step.philox import FORWARD_STREAM, INITIAL_STREAM, STEP_STREAM, normals, philox4x32
from tests.tolerances import NORMAL_ATOL, NORMAL_MAX, NORMAL_RARE

numba = pytest.importorskip("numba", reason="the fused pass needs the cpu extra: numba")
from fastddim.step import on_numba  # noqa: E402
from fastddim.step.numba_pass import CHUNK  # noqa: E402
from tests.step.fused import rows_of  # noqa: E402

Floats = npt.NDArray[np.float32]


# --- Noise ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jitted() -> dict[str, Any]:
    """What is compiled into the pass, by itself."""

    @numba.njit  # type: ignore[untyped-decorator, unused-ignore]
    def words(seed, row, stream, quad, quads, out):  # type: ignore[no-untyped-def]
        numba_pass.philox_words(seed, row, stream, quad, quads, out)

    @numba.njit  # type: ignore[untyped-decorator, unused-ignore]
    def ln(u, out):  # type: ignore[no-untyped-def]
        for i in range(len(u)):
            out[i] = numba_pass.ln(u[i])

    @numba.njit  # type: ignore[untyped-decorator, unused-ignore]
    def box_muller(count, words, out):  # type: ignore[no-untyped-def]
        numba_pass.box_muller(count, words, out)

    @numba.njit  # type: ignore[untyped-decorator, unused-ignore]
    def some(seed, row, stream, first, count, words, pairs, out):  # type: ignore[no-untyped-def]
        return numba_pass.normals(seed, row, stream, first, count, words, pairs, out)

    return {"words": words, "ln": ln, "box_muller": box_muller, "normals": some}


MASK = np.uint64(2**32 - 1)


CORNERS = [0, 1, 2**32 - 1, 2**32, 0x1234_5678_9ABC_DEF0, 2**63 - 1]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("seed", CORNERS)
@pytest.mark.parametrize("quad", [0, 2**32 - 9, 2**38])
def test_words_are_philoxs(jitted: dict[str, Any], seed: int, quad: int) -> None:
    quads = 21
    index = np.arange(quad, quad + quads, dtype=np.uint64)
    low, high = (np.full(quads, word, np.uint64) for word in (seed % 2**32, seed >> 32))
    for row, stream in itertools.product(
        (0, 49, 2**31 - 1), (STEP_STREAM, INITIAL_STREAM, FORWARD_STREAM)
    ):
        rest = [np.full(quads, word, np.uint64) for word in (row, stream)]
        counter = (index & MASK, index >> np.uint64(32), rest[0], rest[1])
        expected = philox4x32(counter, (low, high))
        found = np.zeros(4 * quads, np.uint32)
        jitted["words"](seed, row, stream, quad, quads, found)
        for part, word in zip(found.reshape(4, quads), (0, 2, 1, 3), strict=True):
            assert np.array_equal(part, expected[word])


def assert_same_normals(z: npt.NDArray[Any], truth: npt.NDArray[Any]) -> None:
    error = np.abs(z.astype(np.float64) - truth)
    assert error.max() <= NORMAL_MAX
    assert (error > NORMAL_ATOL).sum() <= NORMAL_RARE * error.size


@pytest.mark.parametrize("stream", [STEP_STREAM, INITIAL_STREAM, FORWARD_STREAM])
def test_normals_are_noises(stream: int) -> None:
    seeds, rows = (a.ravel() for a in np.meshgrid(CORNERS, [0, 49, 2**31 - 1]))
    z = torch.full((len(seeds), 3001), float("nan"))
    on_numba.normal_(z, torch.tensor(seeds), torch.tensor(rows, dtype=torch.int32), stream)
    assert_same_normals(z.numpy(), normals(seeds, rows, 3001, stream))


@pytest.mark.parametrize("first", [4 * 2**32 - 16, 2**32 - 13, 2**40 + 3])
def test_normals_far_into_a_sample_are_noises(jitted: dict[str, Any], first: int) -> None:
    scratch = np.zeros(64, np.uint32), np.zeros(64, np.float32), np.zeros(64, np.float32)
    lane = jitted["normals"](2**40 + 7, 3, STEP_STREAM, first, 37, *scratch)
    expected = normals(np.array([2**40 + 7]), np.array([3]), 41, STEP_STREAM, first=first // 4 * 4)[
        0
    ]
    assert lane == first % 4
    assert_same_normals(scratch[2][lane : lane + 37], expected[lane : lane + 37])


def logarithm(jitted: dict[str, Any], u: Floats) -> tuple[Floats, npt.NDArray[np.float64]]:
    """ln u as the pass has it and in float64."""
    found = np.full(len(u), np.nan, np.float32)
    jitted["ln"](u, found)
    return found, np.log(u.astype(np.float64))


def test_the_logarithm_of_every_float32_from_a_half_to_one(jitted: dict[str, Any]) -> None:
    for part in np.array_split(np.arange(0x3F000000, 0x3F800001, dtype=np.uint32), 8):
        found, truth = logarithm(jitted, part.view(np.float32))
        assert (found <= 0).all()
        error = np.abs(found - truth)
        assert (error <= 1.05e-7 * np.abs(truth)).all()  # ln 1 = 0 exactly
        assert np.abs(np.sqrt(-2 * found) - np.sqrt(-2 * truth)).max() <= 1.1e-7


def test_the_logarithm_of_the_least_words_and_of_any_others(
    jitted: dict[str, Any],
) -> None:
    words = np.concatenate(
        [np.arange(2**20), np.random.default_rng(0).integers(0, 2**32, 2**20), 2**32 - CORNER]
    )
    found, truth = logarithm(
        jitted, (words.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    )
    assert np.isfinite(found).all()
    assert (np.abs(found - truth) <= 1.05e-7 * np.abs(truth)).all()


CORNER = np.arange(1, 600)


def test_sine_and_cosine_of_every_part_of_the_turn(jitted: dict[str, Any]) -> None:
    # The words near each eighth of a turn, and over 2²⁰ others.
    near = [k * 2**29 + np.arange(-700, 700) for k in range(9)]
    spread = np.arange(0, 2**32, 4093)
    b = np.concatenate([*near, spread]).astype(np.int64) % 2**32
    a = np.full(len(b), 581_234_567)  # r = 2 in round numbers, within float32's reach
    z = np.full(2 * len(b), np.nan, np.float32)
    jitted["box_muller"](len(b), np.concatenate([a, b]).astype(np.uint32), z)
    u = (np.float32(a[0]) + np.float32(0.5)) * np.float32(2.0**-32)
    r, theta = np.sqrt(-2 * np.log(float(u))), 2 * np.pi * (b + 0.5) / 2.0**32
    assert np.abs(z[: len(b)] / r - np.cos(theta)).max() <= 1.3e-7
    assert np.abs(z[len(b) :] / r - np.sin(theta)).max() <= 1.3e-7


def test_extreme_words_give_finite_normals_of_the_contracts_size(
    jitted: dict[str, Any],
) -> None:
    corner = np.concatenate([np.arange(20), 2**31 + np.arange(-20, 20), 2**32 - CORNER])
    a, b = (w.ravel() for w in np.meshgrid(corner, corner))
    z = np.full(2 * len(a), np.nan, np.float32)
    jitted["box_muller"](len(a), np.concatenate([a, b]).astype(np.uint32), z)
    r, theta = np.sqrt(-2 * np.log((a + 0.5) / 2.0**32)), 2 * np.pi * (b + 0.5) / 2.0**32
    assert np.abs(z[: len(a)] - r * np.cos(theta)).max() <= NORMAL_MAX
    assert np.abs(z[len(a) :] - r * np.sin(theta)).max() <= NORMAL_MAX


def test_an_elements_noise_is_the_same_in_partial_vectors(
    jitted: dict[str, Any],
) -> None:
    seed, row = 2**35 + 1, 4
    whole = torch.empty(1, 3 * CHUNK)
    on_numba.normal_(whole, torch.tensor([seed]), rows_of(1, row), STEP_STREAM)
    for n in [*range(1, 100), CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5]:
        z = torch.full((1, n), float("nan"))
        on_numba.normal_(z, torch.tensor([seed]), rows_of(1, row), STEP_STREAM)
        assert torch.equal(z, whole[:, :n])
    scratch = np.zeros(2048, np.uint32), np.zeros(2048, np.float32), np.zeros(2048, np.float32)
    for first, count in itertools.product(range(40), [*range(1, 36), 64, 65, 66, 67]):
        lane = jitted["normals"](seed, row, STEP_STREAM, first, count, *scratch)
        assert np.array_equal(scratch[2][lane : lane + count], whole[0, first : first + count])


@pytest.mark.parametrize("n", [1, 2, 3, 5, CHUNK + 3, 4 * CHUNK])
def test_a_samples_noise_does_not_depend_on_its_batch(n: int) -> None:
    seeds, rows = torch.tensor([9, 2**35, 0, 9, 1]), rows_of(5, [4, 0, 1, 4, 2])
    batch = torch.empty(5, n)
    on_numba.normal_(batch, seeds, rows, INITIAL_STREAM)
    for i in range(5):
        alone = torch.empty(1, n)
        on_numba.normal_(alone, seeds[i : i + 1], rows[i : i + 1], INITIAL_STREAM)
        assert torch.equal(batch[i : i + 1], alone)
    assert n == 1 or not torch.equal(batch[0], batch[1])


def test_noise_fills_a_tensor_and_nothing_beside_it() -> None:
    memory = torch.full((2 * 37 + 16,), 12345.0)
    out = memory[8:-8].view(2, 37).fill_(float("nan"))
    on_numba.normal_(out, torch.tensor([3, 2**33]), rows_of(2, [0, 7]), FORWARD_STREAM)
    assert out.isfinite().all()
    memory[8:-8] = 12345.0
    assert (memory == 12345.0).all()
    on_numba.normal_(
        torch.empty(0, 4), torch.empty(0, dtype=torch.int64), rows_of(0, 1), STEP_STREAM
    )
