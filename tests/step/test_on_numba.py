"""The fused pass against eager PyTorch, bit for bit, and its normals against float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastddim.coefficients import PREDICTIONS
from fastddim.step import backends, reference
from fastddim.step.philox import STEP_STREAM

numba = pytest.importorskip("numba", reason="the fused pass needs the cpu extra: numba")
from fastddim.step import on_numba  # noqa: E402
from fastddim.step.numba_pass import CHUNK  # noqa: E402
from tests.step.fused import TABLE, randn, rows_of, step  # noqa: E402

LAST = len(TABLE) - 1


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


BOUNDS = ["none", "clip", "threshold"]
SUMS: list[dict[str, Any]] = [{}, {"rederive": True}, {"posterior": True}]


def drawn(x: Tensor, seeds: Tensor, rows: Tensor) -> Tensor:
    """The counter noise of x's elements, which has tests of its own below."""
    z = torch.full(x.shape, float("nan"))
    on_numba.normal_(z, seeds, rows, STEP_STREAM)
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
    posterior: bool = False,
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
        posterior=posterior,
    )
    flags = (prediction, noise_first, clip, rederive)
    for want_x0 in (True, False):
        out, x0 = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
        into = x0 if want_x0 else None
        given_to = (x, output, TABLE, rows, seeds, noise, guidance, threshold, *flags, out, into)
        step(*given_to, posterior=posterior)
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


@pytest.mark.one_in(3)
@pytest.mark.parametrize("prediction", range(4))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_variant_equals_the_reference(prediction: int, dtype: torch.dtype) -> None:
    x, z, outputs = randn(3, 5, 41), randn(3, 5, 41, seed=1), randn(6, 5, 41, seed=2).to(dtype)
    seeds = torch.tensor([0, 2**32 + 5, 2**63 - 1])
    flags = itertools.product((False, True), repeat=4)
    variants = itertools.product(("none", "tensor", "counter"), BOUNDS, SUMS, flags)
    for kind, bounded, sum_of, (guided, noise_first, one_row, together) in variants:
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
            **sum_of,
            **bound(bounded, 3, one_row),
        )


@pytest.mark.parametrize("prediction", range(4))
def test_a_hundred_thousand_elements_are_not_contracted(prediction: int) -> None:
    x, output, z = (3 * randn(1, 100_003, seed=i) for i in range(3))
    for bounded, noise_first, sum_of in itertools.product(BOUNDS, (False, True), SUMS):
        assert_same_step(
            x,
            torch.cat([output, z]),
            rows_of(1, 33),
            None,
            z,
            torch.tensor([1.7]),
            prediction=prediction,
            noise_first=noise_first,
            **sum_of,
            **bound(bounded, 1, True),
        )


NASTY = torch.tensor(
    [
        *[float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 65504.0],
        *[1e-38, -1e-40, 1.4e-45, 0.0, -0.0, 1.0, -2.0, 0.7, -0.7],
    ]
)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("prediction", range(4))
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_infinity_denormals_and_zeros_come_out_as_eagers(
    prediction: int, dtype: torch.dtype
) -> None:
    # Twice over, and a little: in the vectors and in what is left of them.
    x, output = (
        t.flatten()[None].repeat(1, 2) for t in torch.meshgrid(NASTY, NASTY, indexing="ij")
    )
    output = output.to(dtype)
    for row, bounded, sum_of in itertools.product((0, 20, LAST), BOUNDS, SUMS):
        options: dict[str, Any] = {"prediction": prediction, **sum_of}
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
        first = backends.StepArgs(*arguments, torch.empty_like(x), None, None)
        with pytest.raises(ValueError, match="one stretch of memory"):
            on_numba.bind(backends.Fixed(), first)


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
        prediction=data.draw(st.integers(0, 3), label="prediction"),
        noise_first=data.draw(st.booleans(), label="noise_first"),
        **data.draw(st.sampled_from(SUMS), label="sum"),
        **bound(data.draw(st.sampled_from(BOUNDS), label="bound"), batch, shared),
    )
