"""Offsets over 2³¹, layouts, and memory that the kernel reads and writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastddim_kernels
from fastddim.coefficients import PREDICTIONS
from fastddim_kernels import geometry
from fastddim_kernels.step import ddim_step_kernel
from tests.kernel_steps import assert_same_step, by_kernel, by_reference, on_row
from tests.steps import DRAWN, TABLE, randn


def choices(**made: Any) -> dict[str, Any]:
    """What the launcher decides at compile time, for a launch by hand of one part a program."""
    fixed = {
        "COLUMNS": 7,
        "NOISE_FIRST": True,
        "REDERIVE": False,
        "POSTERIOR": False,
        "EVEN": False,
    }
    return fixed | {"PORTABLE": True, "PARTS": 1} | made


@pytest.mark.parametrize("size", [2**31 - 4, 2**31 - 1])
def test_channels_of_almost_2_to_the_31_pixels_are_written(size: int) -> None:
    # The second channel begins inside a four; of its pixels one block alone is launched.
    x = torch.zeros(64)
    out = torch.full((64,), float("nan"))
    kernel: Any = ddim_step_kernel
    kernel[(1,)](
        *(x, x, None, out, None, None, None, TABLE, on_row(5, 1), None, None, None, None),
        *(None, size, 1, None, 1, 0, None, None, None, None),
        **choices(
            PREDICTION=2,
            NEXT_TWICE=False,
            CHANNELS=2,
            X_PIXEL=2,
            OUTPUT_PIXEL=2,
            FOURS=False,
            QUADS=4,
        ),
    )
    written = ~out.isnan()
    assert written[0:32:2].all()
    assert written[1 : 2 * (16 - (size & 3)) : 2].all()


def test_a_sample_whose_fours_pass_32_bits_is_refused() -> None:
    x = torch.empty(1, 4, 2**16, 2**16, device="meta").contiguous(memory_format=torch.channels_last)
    table, rows = TABLE.to("meta"), on_row(0, 1).to("meta")
    with pytest.raises(ValueError, match=r"^x must hold fewer than 2³⁴ elements a sample"):
        fastddim_kernels.ddim_step(
            x, x, table, rows, x, seeds=torch.empty(1, dtype=torch.int64, device="meta")
        )


@pytest.mark.parametrize("vector", [True, False])
def test_offsets_pass_two_to_the_thirty_first(tmp_path: Path, vector: bool) -> None:
    # Three samples of 2³⁰ elements, the last of which begins at 2³¹; holes of a sparse file
    # stand for all but the first block of each, the only one that this grid visits.
    n, block, unit = 2**30, 16, 4 if vector else 1
    big = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * n, dtype=torch.float32)
    samples = big.view(3, n)
    x = randn(3, block)
    samples[:, :block] = x
    kernel: Any = ddim_step_kernel
    kernel[(3,)](
        *(big, big, None, big, None, None, None, TABLE, on_row(5, 3), None, None, None, None),
        *(None, n // unit, 3, -1, *geometry.divisor(1), n // unit, None, None, None),
        **choices(
            PREDICTION=2,
            NEXT_TWICE=False,
            CHANNELS=0,
            X_PIXEL=1,
            OUTPUT_PIXEL=1,
            FOURS=vector,
            QUADS=block // 4,
        ),
    )
    expected = by_reference(x, x, on_row(5, 3), "sample")[0]
    assert torch.equal(samples[:, :block], expected)
    del big, samples
    (tmp_path / "sparse").unlink()


def test_second_halves_pass_two_to_the_thirty_first(tmp_path: Path) -> None:
    # Two samples of 2³⁰ elements: the condition's half and the next input's begin at 2³¹.
    n, block = 2**30, 16

    def sparse(name: str, samples: int, dtype: torch.dtype) -> Tensor:
        file = str(tmp_path / name)
        memory = torch.from_file(file, shared=True, size=samples * n, dtype=dtype)
        return memory.view(samples, n)

    x, output = sparse("x", 2, torch.float32), sparse("output", 4, torch.float16)
    next_input = sparse("next_input", 4, torch.float16)
    x[:, :block], output[:, :block] = randn(2, block), randn(4, block, seed=1)
    uncond, cond = output[:, :block].float().chunk(2)
    expected = by_reference(x[:, :block], uncond + 7.5 * (cond - uncond), on_row(5, 2))[0]
    kernel: Any = ddim_step_kernel
    kernel[(2,)](
        *(x, output, None, x, None, next_input, None, TABLE, on_row(5, 2), None),
        *(torch.tensor(7.5), None, None, None, n // 4, 2, -1, *geometry.divisor(1), n // 4),
        *(None, None, None),
        **choices(
            PREDICTION=0,
            NEXT_TWICE=True,
            CHANNELS=0,
            X_PIXEL=1,
            OUTPUT_PIXEL=1,
            FOURS=True,
            QUADS=block // 4,
        ),
    )
    assert torch.equal(x[:, :block], expected)
    assert torch.equal(next_input[:, :block], torch.cat([expected, expected]).half())
    del x, output, next_input
    for file in tmp_path.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    "order", [(0, 2, 3, 1), (1, 0, 2, 3), (3, 2, 1, 0)], ids=["channels_last", "batch second", "T"]
)
def test_any_dense_order_of_the_dimensions_equals_the_reference(order: tuple[int, ...]) -> None:
    x, output, noise = (randn(2, 5, 3, 4, seed=i).permute(order) for i in range(3))
    assert_same_step(x, output, on_row(30, len(x)), noise=noise, clip=1.0)


def test_channels_last_equals_the_reference() -> None:
    def last(t: Tensor) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last)

    x, output, noise = (last(randn(2, 3, 5, 7, seed=i)) for i in range(3))
    rows = torch.tensor([4, 30], dtype=torch.int32)
    assert_same_step(x, output, rows, noise=noise, prediction="v")


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_memory_that_begins_between_vectors_equals_the_reference(offset: int) -> None:
    x, output = (randn(2 * 36 + 3, seed=i)[offset : offset + 72].view(2, 36) for i in range(2))
    assert x.storage_offset() == offset
    assert_same_step(x, output, on_row(12, 2), offset=offset)


@pytest.mark.parametrize("n", [*range(1, 8), 10, 17, 31])
def test_a_sample_may_begin_and_end_inside_16_bytes(
    monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    monkeypatch.setattr(geometry, "INTERPRETED_FOURS", 4)
    rows = torch.tensor([1, 49, 30, 7, 12], dtype=torch.int32)
    x, output, noise = (randn(5, n, seed=i) for i in range(3))
    assert_same_step(x, output, rows, noise=noise)
    expected = by_reference(x, output, rows)[0]
    fastddim_kernels.ddim_step(x, output, TABLE, rows, x)
    assert torch.equal(x, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter, on ±inf
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_nan_and_infinity_come_out_as_eagers(prediction: str, clip: float | None) -> None:
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, 1e-44, 0.0, 1.0, -2.0])
    x, output = (t.reshape(1, 64) for t in torch.meshgrid(special, special, indexing="ij"))
    x, output = x.contiguous(), output.contiguous()
    for row in (0, 49):
        for n in (64, 63):
            assert_same_step(
                x[:, :n].contiguous(),
                output[:, :n].contiguous(),
                on_row(row, 1),
                prediction=prediction,
                clip=clip,
            )


def test_the_step_may_write_over_its_own_input() -> None:
    x, output = randn(2, 33), randn(2, 33, seed=1)
    expected = by_reference(x, output, on_row(3, 2))[0]
    fastddim_kernels.ddim_step(x, output, TABLE, on_row(3, 2), x)
    assert torch.equal(x, expected)


def test_a_row_without_noise_adds_none() -> None:
    x, output = randn(2, 8), randn(2, 8, seed=1)
    x_s, _ = by_kernel(x, output, on_row(49, 2), seeds=torch.arange(2))
    assert torch.equal(x_s, by_reference(x, output, on_row(49, 2))[0])


def test_the_table_may_change_between_calls() -> None:
    x, output, table = randn(2, 8), randn(2, 8, seed=1), TABLE.clone()
    for _ in range(2):
        x_s, _ = by_kernel(x, output, on_row(20, 2), table=table)
        assert torch.equal(x_s, by_reference(x, output, on_row(20, 2), table=table)[0])
        table[20] = TABLE[25]


@settings(max_examples=25, **DRAWN)
@given(data=st.data())
def test_any_shape_dtype_and_flags_equal_the_reference(data: st.DataObject) -> None:
    check_drawn_step(data, with_counter_noise=False)


@pytest.mark.slow
@settings(max_examples=150, **DRAWN)
@given(data=st.data())
def test_any_shape_dtype_and_flags_equal_the_reference_at_length(data: st.DataObject) -> None:
    check_drawn_step(data, with_counter_noise=True)


def check_drawn_step(data: st.DataObject, with_counter_noise: bool) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5), label="shape"))
    order = data.draw(st.permutations(range(len(shape))), label="order")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    kinds = ["none", "tensor", "philox"] if with_counter_noise else ["none", "tensor"]
    kind = data.draw(st.sampled_from(kinds), label="noise")
    if kind == "philox":
        order = list(range(len(shape)))  # counter noise asks for contiguous memory
        shape = (min(shape[0], 2), *shape[1:])

    def tensor(seed: int) -> Tensor:
        dense = randn(*[shape[i] for i in order], seed=seed)
        return dense.permute([order.index(i) for i in range(len(shape))])

    row = st.integers(0, 49)
    batch = shape[0]
    # A sample on a row of its own must be one stretch of memory.
    if order[0] == 0 and data.draw(st.booleans(), label="rows differ"):
        each = data.draw(st.lists(row, min_size=batch, max_size=batch), label="rows")
        rows = torch.tensor(each, dtype=torch.int32)
    else:
        rows = on_row(data.draw(row, label="row"), batch)
    seed = st.integers(0, 2**63 - 1)
    seeds = data.draw(st.lists(seed, min_size=batch, max_size=batch)) if kind == "philox" else None
    assert_same_step(
        tensor(0),
        tensor(1).to(dtype),
        rows,
        want_x0=data.draw(st.booleans(), label="want_x0"),
        prediction=data.draw(st.sampled_from(PREDICTIONS), label="prediction"),
        noise_first=data.draw(st.booleans(), label="noise_first"),
        clip=data.draw(st.none() | st.floats(0.125, 4.0, width=32), label="clip"),
        seeds=None if seeds is None else torch.tensor(seeds),
        noise=tensor(2) if kind == "tensor" else None,
    )
