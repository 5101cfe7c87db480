"""The fused pass against eager PyTorch, bit for bit, and its normals against float64."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastddim
from fastddim import DDIM
from fastddim.coefficients import PREDICTIONS
from fastddim.step import backends, reference
from fastddim.step.philox import FORWARD, INITIAL, STEP, normals, philox4x32
from tests import paths
from tests.processes import ran, ran_anew
from tests.tolerances import NORMAL_ATOL, NORMAL_MAX, NORMAL_RARE

numba = pytest.importorskip("numba", reason="the fused pass needs the cpu extra: numba")

from fastddim.step import on_numba  # noqa: E402
from fastddim.step.on_numba import CHUNK  # noqa: E402

step = partial(paths.step, on_numba.BACKEND)

Floats = npt.NDArray[np.float32]

TABLE = torch.tensor(DDIM(steps=50, eta=1.0).table)
LAST = len(TABLE) - 1
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOUNDS = ["none", "clip", "threshold"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows_of(batch: int, rows: int | list[int]) -> Tensor:
    """int32 (batch,), with a stride of 0 for a row that all samples share."""
    return torch.tensor(rows, dtype=torch.int32).expand(batch)


def drawn(x: Tensor, seeds: Tensor, rows: Tensor) -> Tensor:
    """The counter noise of x's elements, which has tests of its own below."""
    z = torch.full(x.shape, float("nan"))
    on_numba.normal_(z, seeds, rows, STEP)
    return z


def assert_same_step(
    x: Tensor,
    output: Tensor,
    rows: Tensor,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    guidance: Tensor | None = None,
    threshold: Tensor | None = None,
    prediction: int = 0,
    noise_first: bool = True,
    clip: float | None = None,
    rederive: bool = False,
) -> None:
    """The pass equals the reference, with x0 and without, and writes to nothing it was given."""
    given = [
        t for t in (x, output, TABLE, rows, seeds, noise, guidance, threshold) if t is not None
    ]
    before = [t.clone() for t in given]
    each = (-1, *[1] * (x.dim() - 1))
    expected = reference.ddim_step(
        x,
        output.float(),
        TABLE[rows.long()].view(*each, 7),
        noise if seeds is None else drawn(x, seeds, rows),
        PREDICTIONS[prediction],
        clip,
        noise_first,
        None if guidance is None else guidance.reshape(each),
        None if threshold is None else threshold.reshape(each),
        rederive,
    )
    flags = (prediction, noise_first, clip, rederive)
    for want_x0 in (True, False):
        out, x0 = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
        into = x0 if want_x0 else None
        step(x, output, TABLE, rows, seeds, noise, guidance, threshold, *flags, out, into)
        torch.testing.assert_close(out, expected[0], rtol=0, atol=0, equal_nan=True)
        if want_x0:
            torch.testing.assert_close(x0, expected[1], rtol=0, atol=0, equal_nan=True)
        else:
            assert x0.isnan().all()
    for tensor, value in zip(given, before, strict=True):
        torch.testing.assert_close(tensor, value, rtol=0, atol=0, equal_nan=True)


def bound(kind: str, batch: int, shared: bool) -> dict[str, Any]:
    """A clip, or a threshold of each sample or one of all."""
    if kind == "clip":
        return {"clip": 0.7}
    s = torch.tensor(1.3).expand(batch) if shared else torch.linspace(1.0, 2.5, batch)
    return {"threshold": s} if kind == "threshold" else {}


def weights(batch: int, shared: bool) -> Tensor:
    return torch.tensor(7.5).expand(batch) if shared else torch.linspace(-0.5, 7.5, batch)


# --- The step ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", range(3))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_variant_equals_the_reference(prediction: int, dtype: torch.dtype) -> None:
    x, z, outputs = randn(3, 5, 41), randn(3, 5, 41, seed=1), randn(6, 5, 41, seed=2).to(dtype)
    seeds = torch.tensor([0, 2**32 + 5, 2**63 - 1])
    flags = itertools.product((False, True), repeat=5)
    variants = itertools.product(("none", "tensor", "counter"), BOUNDS, flags)
    for kind, bounded, (guided, rederive, noise_first, one_row, together) in variants:
        row: int | list[int] = 7 if together else [3, LAST, 20]
        assert_same_step(
            x,
            outputs if guided else outputs[:3],
            rows_of(3, row),
            seeds if kind == "counter" else None,
            z if kind == "tensor" else None,
            weights(3, one_row) if guided else None,
            prediction=prediction,
            noise_first=noise_first,
            rederive=rederive,
            **bound(bounded, 3, one_row),
        )


@pytest.mark.parametrize("prediction", range(3))
def test_a_hundred_thousand_elements_are_not_contracted(prediction: int) -> None:
    x, output, z = (3 * randn(1, 100_003, seed=i) for i in range(3))
    for bounded, noise_first, rederive in itertools.product(BOUNDS, (False, True), (False, True)):
        assert_same_step(
            x,
            torch.cat([output, z]),
            rows_of(1, 33),
            None,
            z,
            torch.tensor([1.7]),
            prediction=prediction,
            noise_first=noise_first,
            rederive=rederive,
            **bound(bounded, 1, True),
        )


NASTY = torch.tensor(
    [
        *[float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 65504.0],
        *[1e-38, -1e-40, 1.4e-45, 0.0, -0.0, 1.0, -2.0, 0.7, -0.7],
    ]
)


@pytest.mark.parametrize("prediction", range(3))
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_infinity_denormals_and_zeros_come_out_as_eagers(
    prediction: int, dtype: torch.dtype
) -> None:
    # Twice over, and a little: in the vectors and in what is left of them.
    x, output = (
        t.flatten()[None].repeat(1, 2) for t in torch.meshgrid(NASTY, NASTY, indexing="ij")
    )
    output = output.to(dtype)
    for row, bounded, rederive in itertools.product((0, 20, LAST), BOUNDS, (False, True)):
        options: dict[str, Any] = {"prediction": prediction, "rederive": rederive}
        options |= bound(bounded, 1, False)
        assert_same_step(x, output, rows_of(1, row), **options)
        assert_same_step(x, output, rows_of(1, row), None, x.flip(-1), **options)
        pair = torch.cat([output, output.flip(-1)])
        assert_same_step(x, pair, rows_of(1, row), guidance=torch.tensor([3.0]), **options)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_a_nasty_weight_or_threshold_is_taken_as_eager_takes_it(bad: float) -> None:
    x, output, w = randn(2, 37), randn(4, 37, seed=1), torch.tensor([bad, 2.0])
    assert_same_step(x, output, rows_of(2, 5), guidance=w)
    assert_same_step(x, output[:2], rows_of(2, 5), threshold=w, rederive=True)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_half_precision_number_is_widened_exactly(dtype: torch.dtype) -> None:
    output = torch.arange(2**16).to(torch.uint16).view(dtype)[None]
    x, x0 = torch.zeros(1, 2**16), torch.full((1, 2**16), float("nan"))
    for flush in (False, True):  # denormal float32 as zero: half precision's are none
        if torch.set_flush_denormal(flush):
            try:
                args = (x, output, TABLE, rows_of(1, 3), None, None, None, None)
                step(*args, 2, True, None, False, torch.empty_like(x), x0)
            finally:
                torch.set_flush_denormal(False)
            torch.testing.assert_close(x0, output.float(), rtol=0, atol=0, equal_nan=True)


SHAPES = [
    *[(1, n) for n in (1, 2, 3, 4, 5, 7, 8, 9, 31, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 3)],
    *[(2, CHUNK + 2), (3, 2 * CHUNK + 3), (5, CHUNK // 4 + 1), (300, 17), (4000, 1), (7, 1025)],
]


@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_cross_samples_and_samples_cross_chunks(shape: tuple[int, ...]) -> None:
    batch = shape[0]
    x, z, outputs = randn(*shape), randn(*shape, seed=1), randn(2 * batch, shape[1], seed=2)
    differ = (torch.arange(batch) * 7 % 50).to(torch.int32)
    seeds = torch.arange(batch) + 2**32 - 2
    for rows in (rows_of(batch, 20), differ):
        assert_same_step(x, outputs[:batch], rows, clip=0.7)
        assert_same_step(x, outputs[:batch], rows, noise=z)
        assert_same_step(x, outputs[:batch], rows, seeds)
        assert_same_step(x, outputs, rows, guidance=weights(batch, True))
        assert_same_step(x, outputs, rows, seeds, guidance=weights(batch, False), prediction=1)
        assert_same_step(x, outputs[:batch], rows, **bound("threshold", batch, False))


@pytest.mark.parametrize("shape", [(0, 3), (0,), (3, 0), (1,), (4,), (2, 1, 1, 1, 1, 5)])
def test_any_rank_and_nothing_at_all(shape: tuple[int, ...]) -> None:
    x, output, z = (randn(*shape, seed=i) for i in range(3))
    rows = rows_of(shape[0], 3)
    assert_same_step(x, output, rows)
    assert_same_step(x, output, rows, noise=z)
    assert_same_step(x, output, rows, torch.arange(shape[0]))


def test_the_table_and_per_sample_values_may_have_any_stride() -> None:
    x, output = randn(3, 21), randn(6, 21, seed=1)
    rows = torch.tensor([4, 0, 9, 0, 49, 0], dtype=torch.int32)[::2]
    w, seeds = torch.linspace(1, 3, 9)[::3], torch.arange(12)[::4]
    assert_same_step(x, output, rows, seeds, guidance=w)
    assert_same_step(x, output[:3], rows, threshold=w)
    wide = torch.full((50, 14), float("nan"))
    wide[:, ::2] = TABLE
    out, expected = torch.empty(2, 3, 21).unbind()
    flags = (0, True, None, False)
    for table, into in ((wide[:, ::2], out), (TABLE, expected)):
        step(x, output, table, rows, seeds, None, w, None, *flags, into, None)
    assert torch.equal(out, expected)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "reversed": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "batch inside": lambda t: t.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
    "rows last": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(2, 3, 5, 7), (1, 4, 33, 40), (3, 70, 5, 5), (2, 1, 6, 6)])
def test_any_dense_layout_and_noise_of_the_logical_element(
    layout: str, size: tuple[int, ...]
) -> None:
    x, output, z = (LAYOUTS[layout](randn(*size, seed=i)) for i in range(3))
    seeds = torch.arange(size[0]) + 2**40
    assert_same_step(x, output, rows_of(size[0], 7), noise=z)
    assert_same_step(x, output.bfloat16(), rows_of(size[0], 7), seeds, prediction=1)
    if x.stride(0) * len(x) == x.numel():
        rows = rows_of(size[0], [5, LAST, 40][: size[0]])
        assert_same_step(x, output, rows, noise=z)
        assert_same_step(x, output, rows, seeds)


def test_interleaved_samples_are_refused_per_sample_values() -> None:
    x = LAYOUTS["batch inside"](randn(2, 3, 4, 5))
    each: list[tuple[Any, ...]] = [
        (x, rows_of(2, [1, 2]), None, None),
        (x, rows_of(2, 1), None, torch.ones(2)),
        (torch.cat([x, x]), rows_of(2, 1), torch.ones(2), None),
    ]
    for output, rows, w, s in each:
        arguments = (x, output, TABLE, rows, None, None, w, s)
        with pytest.raises(ValueError, match="one after another"):
            on_numba.bind(backends.Fixed(), *arguments, torch.empty_like(x), None, None)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_of_the_output_may_lie_anywhere(layout: str, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout](randn(2, 3, 4, 5))
    memory = torch.full((4 * 2 * 60,), float("nan"), dtype=dtype)  # a learned variance follows
    output = memory.as_strided((4, 3, 4, 5), (2 * 60, *x.stride()[1:]))
    output.copy_(randn(4, 3, 4, 5, seed=1))
    assert output.stride(0) == 2 * x.stride(0)
    for rows in (rows_of(2, 7), rows_of(2, [7, 30])):
        assert_same_step(x, output[:2], rows)
        assert_same_step(x, output, rows, torch.tensor([1, 2]), guidance=torch.tensor([2.0, 3.0]))
        assert_same_step(x, output, rows, guidance=torch.tensor(2.0).expand(2))
        assert_same_step(x, output[:1].expand(2, -1, -1, -1), rows)
        assert_same_step(x[:1], output[:2], rows[:1], guidance=torch.tensor([2.0]))


def test_nothing_is_written_beside_the_results() -> None:
    x, output = randn(3, 37), randn(3, 37, seed=1)
    memory = torch.full((2, 3 * 37 + 16), 12345.0)
    out, x0 = (m[8:-8].view(3, 37).fill_(float("nan")) for m in memory)
    args = (x, output, TABLE, rows_of(3, 2), torch.arange(3), None, None, None)
    step(*args, 0, True, 1.0, False, out, x0)
    assert out.isfinite().all()
    assert x0.isfinite().all()
    memory[:, 8:-8] = 12345.0
    assert (memory == 12345.0).all()


@pytest.mark.parametrize("rows", [[3, -1], [50, 3], [3, 2**31 - 1]])
def test_a_row_outside_the_table_is_refused_before_any_write(rows: list[int]) -> None:
    x, out = randn(2, 5), torch.full((2, 5), 12345.0)
    args = (x, x, TABLE, rows_of(2, rows), None, None, None, None)
    with pytest.raises(ValueError, match=rf"\[0, 50\), got {min(rows)} to {max(rows)}"):
        step(*args, 0, True, None, False, out, None)
    assert (out == 12345.0).all()


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_shape_layout_dtype_and_flags_equal_the_reference(data: st.DataObject) -> None:
    inner = data.draw(st.lists(st.integers(1, 9), max_size=3), label="inner")
    batch = data.draw(st.integers(0, 5), label="batch")
    order = data.draw(st.permutations(range(len(inner))), label="order")

    def tensor(seed: int, batch: int) -> Tensor:
        memory = randn(batch, *[inner[i] for i in order], seed=seed)
        return memory.permute(0, *[order.index(i) + 1 for i in range(len(inner))])

    each = st.lists(st.integers(0, 49), min_size=batch, max_size=batch)
    rows = data.draw(st.integers(0, 49) | each, label="rows")
    kind = data.draw(st.sampled_from(["none", "tensor", "counter"]), label="noise")
    seed = st.integers(0, 2**63 - 1)
    seeds = data.draw(st.lists(seed, min_size=batch, max_size=batch), label="seeds")
    guided, shared = data.draw(st.booleans(), label="guided"), data.draw(st.booleans(), label="one")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    assert_same_step(
        tensor(0, batch),
        tensor(1, 2 * batch if guided else batch).to(dtype),
        rows_of(batch, rows),
        torch.tensor(seeds, dtype=torch.int64) if kind == "counter" else None,
        tensor(2, batch) if kind == "tensor" else None,
        weights(batch, shared) if guided else None,
        prediction=data.draw(st.integers(0, 2), label="prediction"),
        noise_first=data.draw(st.booleans(), label="noise_first"),
        rederive=data.draw(st.booleans(), label="rederive"),
        **bound(data.draw(st.sampled_from(BOUNDS), label="bound"), batch, shared),
    )


# --- Noise ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jitted() -> dict[str, Any]:
    """What is compiled into the pass, by itself."""

    @numba.njit  # type: ignore[untyped-decorator, unused-ignore]
    def words(seed, row, stream, quad, quads, out):  # type: ignore[no-untyped-def]
        on_numba._words(seed, row, stream, quad, quads, out)

    @numba.njit  # type: ignore[untyped-decorator, unused-ignore]
    def ln(u, out):  # type: ignore[no-untyped-def]
        for i in range(len(u)):
            out[i] = on_numba._ln(u[i])

    @numba.njit  # type: ignore[untyped-decorator, unused-ignore]
    def box_muller(count, words, out):  # type: ignore[no-untyped-def]
        on_numba._box_muller(count, words, out)

    @numba.njit  # type: ignore[untyped-decorator, unused-ignore]
    def some(seed, row, stream, first, count, words, pairs, out):  # type: ignore[no-untyped-def]
        return on_numba._normals(seed, row, stream, first, count, words, pairs, out)

    return {"words": words, "ln": ln, "box_muller": box_muller, "normals": some}


MASK = np.uint64(2**32 - 1)
CORNERS = [0, 1, 2**32 - 1, 2**32, 0x1234_5678_9ABC_DEF0, 2**63 - 1]


@pytest.mark.parametrize("seed", CORNERS)
@pytest.mark.parametrize("quad", [0, 2**32 - 9, 2**38])
def test_words_are_philoxs(jitted: dict[str, Any], seed: int, quad: int) -> None:
    quads = 21
    index = np.arange(quad, quad + quads, dtype=np.uint64)
    low, high = (np.full(quads, word, np.uint64) for word in (seed % 2**32, seed >> 32))
    for row, stream in itertools.product((0, 49, 2**31 - 1), (STEP, INITIAL, FORWARD)):
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


@pytest.mark.parametrize("stream", [STEP, INITIAL, FORWARD])
def test_normals_are_noises(stream: int) -> None:
    seeds, rows = (a.ravel() for a in np.meshgrid(CORNERS, [0, 49, 2**31 - 1]))
    z = torch.full((len(seeds), 3001), float("nan"))
    on_numba.normal_(z, torch.tensor(seeds), torch.tensor(rows, dtype=torch.int32), stream)
    assert_same_normals(z.numpy(), normals(seeds, rows, 3001, stream))


@pytest.mark.parametrize("first", [4 * 2**32 - 16, 2**32 - 13, 2**40 + 3])
def test_normals_far_into_a_sample_are_noises(jitted: dict[str, Any], first: int) -> None:
    scratch = np.zeros(64, np.uint32), np.zeros(64, np.float32), np.zeros(64, np.float32)
    lane = jitted["normals"](2**40 + 7, 3, STEP, first, 37, *scratch)
    expected = normals(np.array([2**40 + 7]), np.array([3]), 41, STEP, first=first // 4 * 4)[0]
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
    on_numba.normal_(whole, torch.tensor([seed]), rows_of(1, row), STEP)
    for n in [*range(1, 100), CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5]:
        z = torch.full((1, n), float("nan"))
        on_numba.normal_(z, torch.tensor([seed]), rows_of(1, row), STEP)
        assert torch.equal(z, whole[:, :n])
    scratch = np.zeros(2048, np.uint32), np.zeros(2048, np.float32), np.zeros(2048, np.float32)
    for first, count in itertools.product(range(40), [*range(1, 36), 64, 65, 66, 67]):
        lane = jitted["normals"](seed, row, STEP, first, count, *scratch)
        assert np.array_equal(scratch[2][lane : lane + count], whole[0, first : first + count])


@pytest.mark.parametrize("n", [1, 2, 3, 5, CHUNK + 3, 4 * CHUNK])
def test_a_samples_noise_does_not_depend_on_its_batch(n: int) -> None:
    seeds, rows = torch.tensor([9, 2**35, 0, 9, 1]), rows_of(5, [4, 0, 1, 4, 2])
    batch = torch.empty(5, n)
    on_numba.normal_(batch, seeds, rows, INITIAL)
    for i in range(5):
        alone = torch.empty(1, n)
        on_numba.normal_(alone, seeds[i : i + 1], rows[i : i + 1], INITIAL)
        assert torch.equal(batch[i : i + 1], alone)
    assert n == 1 or not torch.equal(batch[0], batch[1])


def test_noise_fills_a_tensor_and_nothing_beside_it() -> None:
    memory = torch.full((2 * 37 + 16,), 12345.0)
    out = memory[8:-8].view(2, 37).fill_(float("nan"))
    on_numba.normal_(out, torch.tensor([3, 2**33]), rows_of(2, [0, 7]), FORWARD)
    assert out.isfinite().all()
    memory[8:-8] = 12345.0
    assert (memory == 12345.0).all()
    on_numba.normal_(torch.empty(0, 4), torch.empty(0, dtype=torch.int64), rows_of(0, 1), STEP)


# --- Threads ----------------------------------------------------------------------------------

BIG = (3, 7 * 9981)  # tasks begin in the middle of samples, of chunks and of quads


def big_step(layout: str = "flat") -> tuple[Tensor, Tensor, Tensor]:
    x, output = randn(*BIG).view(3, 7, -1), randn(*BIG, seed=1).view(3, 7, -1)
    if layout == "channels_last":
        x, output = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, output))
    out, x0 = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
    args = (x, output, TABLE, rows_of(3, [0, 20, 49]), torch.tensor([5, 2**40, 6]))
    step(*args, None, None, None, 0, True, 1.0, False, out, x0)
    noise = torch.full(BIG, float("nan"))
    on_numba.normal_(noise, torch.tensor([5, 2**40, 6]), rows_of(3, 0), INITIAL)
    return out, x0, noise


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets threads share small calls, and lists how many were asked for each."""
    asked: list[int] = []
    team = on_numba._team
    if team is None:
        pytest.skip("this PyTorch is built without OpenMP")
    run = team.run

    def counted(function: Any, call: Any, threads: int) -> None:
        asked.append(threads)
        run(function, call, threads)

    monkeypatch.setattr(team, "run", counted)
    monkeypatch.setattr(on_numba, "SHARED", 1)
    monkeypatch.setattr(on_numba, "NOISY_SHARED", 1)
    return asked


@pytest.mark.parametrize("layout", ["flat", "channels_last"])
def test_any_number_of_threads_gives_the_same(
    layout: str, shared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    expected = big_step(layout)
    assert not shared
    assert all(t.isfinite().all() for t in expected)
    for threads in (2, 3, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        shared.clear()
        for found, want in zip(big_step(layout), expected, strict=True):
            assert torch.equal(found, want)
        assert shared == [threads, threads]
    monkeypatch.setattr(on_numba, "_team", None)
    for found, want in zip(big_step(layout), expected, strict=True):
        assert torch.equal(found, want)


def test_small_calls_are_not_shared(shared: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(on_numba, "SHARED", 3 * BIG[1] + 1)
    monkeypatch.setattr(on_numba, "NOISY_SHARED", 3 * BIG[1])
    x = randn(*BIG)
    args = (x, x, TABLE, rows_of(3, 4), None, None, None, None, 0, True, None, False)
    step(*args, torch.empty_like(x), None)
    assert not shared
    monkeypatch.setattr(on_numba, "SHARED", 3 * BIG[1])
    step(*args, torch.empty_like(x), None)
    big_step()
    assert shared == [2, 2, 2]


def test_rows_outside_the_table_are_refused_by_threads_too(
    shared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x, out = randn(*BIG), torch.full(BIG, 7.0)
    for rows in ([0, 50, 1], [0, -1, 1]):
        args = (x, x, TABLE, rows_of(3, rows), None, None, None, None, 0, True, None, False)
        with pytest.raises(ValueError, match=r"rows must lie in \[0, 50\), got "):
            step(*args, out, None)
    assert shared == [2, 2]
    assert (out == 7).all()


SHARING = """
import os, sys, numpy as np, torch, fastddim
from fastddim.step import backends, on_numba
from fastddim.step.bound import Bound
torch.set_num_threads(2)
n = 1 << 18
x, out = torch.randn(2, n), torch.empty(2, n)
alone, table = torch.empty(2, n), torch.tensor(fastddim.DDIM(steps=5).table)
rows = torch.ones(1, dtype=torch.int32).expand(2)
assert 2 * n >= on_numba.SHARED

def step(out):
    Bound(on_numba.BACKEND, backends.Fixed())(
        x, x, table, rows, None, None, None, None, out, None, None
    )

team, on_numba._team = on_numba._team, None
step(alone)
on_numba._team = team
"""


def shared_by(code: str, **env: str) -> str:
    """What a process prints in which PyTorch's threads share a step: not one of this process."""
    if on_numba._team is None:
        pytest.skip("this PyTorch is built without OpenMP")
    return run_anew(SHARING + code, **env) if env else run(SHARING + code)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_the_threads_are_pytorchs_own() -> None:
    counted = """
torch.add(x, x, out=out)
threads = len(os.listdir('/proc/self/task'))
step(out)
print(len(os.listdir('/proc/self/task')) - threads, threads > 1, torch.equal(out, alone))
"""
    assert shared_by(counted) == "0 True True"


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_fewer_threads_than_were_asked_for_do_it_all() -> None:
    few = """
threads = len(os.listdir('/proc/self/task'))
torch.get_num_threads = lambda: 5
out.fill_(float('nan'))
step(out)
print(torch.equal(out, alone), len(os.listdir('/proc/self/task')) - threads <= 1)
"""
    assert shared_by(few, OMP_THREAD_LIMIT="2") == "True True"


def test_several_python_threads_at_once() -> None:
    at_once = """
import threading
outs = [torch.full_like(out, float('nan')) for _ in range(4)]
callers = [threading.Thread(target=step, args=(o,)) for o in outs]
[caller.start() for caller in callers]
[caller.join() for caller in callers]
print([torch.equal(o, alone) for o in outs])
"""
    assert shared_by(at_once) == str([True] * 4)


FORKED = """
import warnings
warnings.simplefilter('ignore')  # Python warns of a fork beside threads, and rightly
torch.add(x, x, out=out)  # PyTorch's threads are there, and will not be in the child
{before}
pid = os.fork()
if pid == 0:
    out.numpy()[:] = 0  # PyTorch itself would wait
    step(out)
    os._exit(0 if np.array_equal(out, alone) else 1)
print(os.waitpid(pid, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("before", ["", "step(out)"])
def test_a_forked_child_does_it_alone(before: str) -> None:
    assert shared_by(FORKED.format(before=before)) == "0"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_that_compiles_first_works_alone() -> None:
    first = """
import os, torch, fastddim, numpy as np
from fastddim.step import backends
from fastddim.step.bound import Bound
n = 1 << 18
x, table = torch.randn(2, n), torch.tensor(fastddim.DDIM(steps=5).table)
out, rows = torch.add(x, x), torch.ones((), dtype=torch.int32)
args = x, x, table, rows.expand(2), None, None, None, None, out, None, None
import warnings
warnings.simplefilter('ignore')
pid = os.fork()
if pid == 0:
    Bound(backends.backend("cpu", {name!r}), backends.Fixed())(*args)
    os._exit(0 if np.isfinite(out.numpy()).all() else 1)
print(os.waitpid(pid, 0)[1])
"""
    assert run(first.format(name="numba"), numba=False) == "0"
    assert run(first.format(name="torch"), numba=False) == "0"


def test_threads_flush_denormals_as_their_caller_does() -> None:
    denormal = """
if not torch.set_flush_denormal(True):
    print('[]')  # no such mode on this processor
    sys.exit()
torch.set_flush_denormal(False)
x.fill_(1e-39)
step(alone)
torch.add(x, x, out=out)  # PyTorch's threads are there from now on
found = []
for flush in (True, False, True):
    torch.set_flush_denormal(flush)
    torch.mul(x, 1.0, out=out)
    before = out.view(torch.int32).clone()
    bits = set()
    for _ in range(20):  # on a busy machine one thread may do it all
        step(out)
        bits |= set(out.view(torch.int32).unique().tolist())
    found += [len(bits), int(any(bits))]
    torch.mul(x, 1.0, out=out)
    assert torch.equal(out.view(torch.int32), before)  # PyTorch's threads are as they were
print(found)
"""
    assert shared_by(denormal) in ("[1, 0, 1, 1, 1, 0]", "[]")


def test_a_step_without_memory_for_its_chunks_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Undone:
        def __call__(self, address: int) -> None: ...

    monkeypatch.setattr(on_numba, "_take_it_all", Undone())
    x = randn(2, 3)
    with pytest.raises(MemoryError, match="no memory"):
        step(x, x, TABLE, rows_of(2, 4), None, None, None, None, 0, True, None, False, x, None)


# --- Where it is used -------------------------------------------------------------------------


def test_the_op_takes_the_fused_pass_where_numba_is() -> None:
    assert backends.backend("cpu") is on_numba.BACKEND
    x, output, seeds = randn(2, 3, 8, 8), randn(2, 3, 8, 8, seed=1), torch.tensor([1, 2])
    found, x0 = fastddim.ddim_step(x, output, TABLE, 3, seeds)
    out, x0_out = torch.empty_like(x), torch.empty_like(x)
    args = (x, output, TABLE, rows_of(2, 3), seeds, None, None, None)
    step(*args, 0, True, None, False, out, x0_out)
    assert torch.equal(found, out)
    assert x0 is not None
    assert torch.equal(x0, x0_out)
    assert not torch.equal(found, fastddim.ddim_step(x, output, TABLE, 3)[0])


def run(code: str, numba: bool = True) -> str:
    done = ran(code, numba=numba)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def run_anew(code: str, **env: str) -> str:
    done = ran_anew(code, env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


STEP_ONCE = """
import sys, torch, fastddim
from fastddim import DDIM
from fastddim.step import backends
assert 'numba' not in sys.modules, 'numba came with the package'
{first}
x = torch.ones(2, 3)
fastddim.ddim_step(x, x, torch.tensor(DDIM(steps=5, eta=1.0).table), 1, torch.tensor([1, 2]))
print('numba' in backends.available('cpu'), 'numba' in sys.modules)
"""


@pytest.mark.slow
def test_numba_is_imported_at_the_first_step_and_may_be_missing() -> None:
    assert run_anew(STEP_ONCE.format(first="")) == "True True"
    missing = "sys.modules['numba'] = None"
    assert run_anew(STEP_ONCE.format(first=missing)) == "False True"
    assert run_anew(STEP_ONCE.format(first=""), NUMBA_DISABLE_JIT="1") == "False True"


@pytest.mark.slow
def test_without_a_cache_folder_code_is_compiled_anew() -> None:
    nowhere = """
from numba.core import caching
caching.CacheImpl._locator_classes = []
"""
    assert run_anew(STEP_ONCE.format(first=nowhere)) == "True True"
    assert run_anew(STEP_ONCE.format(first=""), NUMBA_CACHE_DIR="/proc/nowhere") == "True True"
