"""The Triton kernel, run by Triton's interpreter, against eager PyTorch: equal, not close."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastddim_kernels
from fastddim.coefficients import PREDICTIONS
from fastddim.step import reference
from fastddim.step.philox import STEP, normals
from fastddim_kernels import launch
from fastddim_kernels.layout import quotient
from fastddim_kernels.step import ddim_step_kernel
from tests.steps import DRAWN, TABLE, model, randn, same
from tests.tolerances import EAGER_FACTOR, HALF_ATOL

PAD, GUARD = 67, 12345.0


def choices(**made: Any) -> dict[str, Any]:
    """What the launcher decides at compile time, for a launch by hand of one part a program."""
    fixed = {"COLUMNS": 7, "NOISE_FIRST": True, "REDERIVE": False, "EVEN": False}
    return fixed | {"PORTABLE": True, "PARTS": 1} | made


def on_row(row: int, batch: int) -> Tensor:
    return torch.full((), row, dtype=torch.int32).expand(batch)


def counter_noise(x: Tensor, seeds: Tensor, rows: Tensor) -> Tensor:
    z = normals(seeds.numpy(), rows.numpy(), x[0].numel(), STEP)
    return torch.from_numpy(z).view(x.shape)


def by_kernel(
    x: Tensor,
    output: Tensor,
    rows: Tensor,
    prediction: str = "epsilon",
    want_x0: bool = True,
    offset: int = 0,
    table: Tensor = TABLE,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The step into memory poisoned with NaN, between guards that must stay as they were."""
    memory = torch.full((2, 2 * PAD + offset + x.numel()), GUARD)
    inside = slice(PAD + offset, PAD + offset + x.numel())
    memory[:, inside] = float("nan")
    out, x0 = (m[inside].as_strided(x.shape, x.stride()) for m in memory)
    given = [t.clone() for t in (x, output)]
    fastddim_kernels.ddim_step(
        x,
        output,
        table,
        rows,
        out,
        x0 if want_x0 else None,
        prediction=PREDICTIONS.index(prediction),
        **options,
    )
    assert same(x, given[0])
    assert same(output, given[1])
    out, x0 = out.clone(), x0.clone()
    memory[:, inside] = GUARD
    assert (memory == GUARD).all(), "the kernel wrote outside its tensors"
    return out, x0 if want_x0 else None


def by_reference(
    x: Tensor,
    output: Tensor,
    rows: Tensor,
    prediction: str = "epsilon",
    table: Tensor = TABLE,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    clip: float | None = None,
    noise_first: bool = True,
) -> tuple[Tensor, Tensor]:
    row = table[rows.long()].view(-1, *[1] * (x.dim() - 1), 7)
    z = noise if seeds is None else counter_noise(x, seeds, rows)
    return reference.ddim_step(x, output.float(), row, z, prediction, clip, noise_first)


def assert_same_step(
    x: Tensor, output: Tensor, rows: Tensor, want_x0: bool = True, offset: int = 0, **options: Any
) -> None:
    x_s, x0 = by_kernel(x, output, rows, want_x0=want_x0, offset=offset, **options)
    expected = by_reference(x, output, rows, **options)
    assert same(x_s, expected[0])
    assert (x0 is not None) == want_x0
    if x0 is not None:
        assert same(x0, expected[1])


def assert_same_trajectory(shape: tuple[int, ...], kind: str, **options: Any) -> None:
    x = expected = randn(*shape)
    seeds = torch.arange(2**32 - 1, 2**32 - 1 + shape[0]) if kind == "philox" else None
    noise_first = options.get("noise_first", True)
    for row in range(len(TABLE)):
        z = randn(*shape, seed=row) if kind == "tensor" else None
        rows = on_row(row, shape[0])
        sources = {"seeds": seeds, "noise": z, "noise_first": noise_first}
        given = options | sources
        x, x0 = by_kernel(x, model(x, row), rows, **given)
        expected, expected_x0 = by_reference(expected, model(expected, row), rows, **given)
        assert x0 is not None
        assert torch.equal(x0, expected_x0), f"x0 at row {row}"
        assert torch.equal(x, expected), f"x_s at row {row}"
    assert x.isfinite().all()


NOISES = [("none", True, 0.8), ("tensor", True, None), ("tensor", False, 0.8)]


# One trajectory for each way of noise: single steps take all combinations of the flags below.
@pytest.mark.parametrize(
    ("prediction", "kind", "noise_first", "clip"),
    [
        pytest.param(p, *n, marks=[] if i == j else pytest.mark.slow)
        for i, p in enumerate(PREDICTIONS)
        for j, n in enumerate(NOISES)
    ],
)
def test_fifty_steps_equal_the_reference(
    prediction: str, kind: str, noise_first: bool, clip: float | None
) -> None:
    options = {"prediction": prediction, "noise_first": noise_first, "clip": clip}
    assert_same_trajectory((2, 3, 5, 4), kind, **options)


@pytest.mark.slow
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("noise_first", [True, False])
def test_fifty_steps_with_counter_noise_equal_the_reference(
    prediction: str, noise_first: bool
) -> None:
    options = {"prediction": prediction, "noise_first": noise_first, "clip": 0.8}
    assert_same_trajectory((1, 3, 5, 7), "philox", **options)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", ["none", "tensor", "philox"])
@pytest.mark.parametrize("n", [pytest.param(12, marks=pytest.mark.slow), 15])
def test_every_combination_of_flags_equals_the_reference(
    prediction: str, kind: str, n: int
) -> None:
    x, output, rows = randn(2, n), randn(2, n, seed=1), torch.tensor([3, 41], dtype=torch.int32)
    seeds = torch.tensor([5, 2**40]) if kind == "philox" else None
    noise = randn(2, n, seed=2) if kind == "tensor" else None
    flags = list(itertools.product([True, False], [None, 0.5], [True, False]))
    # Interpreted Philox takes its time: three of the eight then, each flag both ways.
    options: dict[str, Any]
    for noise_first, clip, want_x0 in flags[:: 3 if kind == "philox" else 1]:
        options = {"noise_first": noise_first, "clip": clip, "want_x0": want_x0}
        sources: dict[str, Any] = {"seeds": seeds, "noise": noise, "prediction": prediction}
        assert_same_step(x, output, rows, **sources, **options)


@pytest.mark.parametrize(
    "prediction", ["v", *(pytest.param(p, marks=pytest.mark.slow) for p in PREDICTIONS if p != "v")]
)
def test_every_row_of_the_table_serves_its_own_sample(prediction: str) -> None:
    rows = torch.randperm(50, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    x, output, noise = randn(50, 3, 3), randn(50, 3, 3, seed=1), randn(50, 3, 3, seed=2)
    assert_same_step(x, output, rows, noise=noise, prediction=prediction)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_half_outputs_are_widened_and_nothing_else(dtype: torch.dtype, prediction: str) -> None:
    for n in (64, 63):
        x, output = randn(3, n), randn(3, n, seed=1).to(dtype)
        assert_same_step(x, output, on_row(20, 3), prediction=prediction, clip=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_state_beats_half_state(dtype: torch.dtype) -> None:
    x = eager = randn(2, 64).to(dtype).float()
    truth, table = x.double(), TABLE.double()
    for row in range(len(TABLE)):
        rows = on_row(row, 2)
        output = model(truth, row).to(dtype)
        x, _ = by_kernel(x, output, rows)
        x = x.contiguous()
        eager = by_reference(eager.to(dtype), output.to(dtype), rows, table=TABLE.to(dtype))[0]
        eager = eager.to(dtype)
        truth = reference.ddim_step(truth, output.double(), table[row])[0]
    error, eagers_own = (x - truth).abs().max(), (eager.double() - truth).abs().max()
    assert error <= EAGER_FACTOR * eagers_own + HALF_ATOL[dtype]
    assert error < 1e-3 * eagers_own, "float32 state: no error but its own rounding"


SIZES = [1, 2, 3, 4, 5, 8, 15, 16, 17, 20, 63, 64, 65, 100, 127, 128, 132, 1023, 1028]


@pytest.mark.parametrize("largest_block", [16, 64, 16384])
def test_sizes_around_the_block_equal_the_reference(
    monkeypatch: pytest.MonkeyPatch, largest_block: int
) -> None:
    monkeypatch.setattr(launch, "_INTERPRETED_FOURS", largest_block // 4)
    for n in [n for n in SIZES if n <= 10 * largest_block]:
        assert_same_step(randn(1, n), randn(1, n, seed=1), on_row(7, 1), clip=0.9)


def test_samples_of_many_blocks_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_INTERPRETED_FOURS", 4)
    rows = torch.tensor([1, 49, 30], dtype=torch.int32)
    for n in (36, 37, 38, 39):
        assert_same_step(randn(3, n), randn(3, n, seed=1), rows, noise=randn(3, n, seed=2))


def test_counter_noise_does_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, seeds = torch.tensor([10, 10], dtype=torch.int32), torch.tensor([3, 4])
    for n in (36, 37):
        x, output = randn(2, n), randn(2, n, seed=1)
        whole = by_kernel(x, output, rows, seeds=seeds)[0]
        with monkeypatch.context() as patch:
            patch.setattr(launch, "_INTERPRETED_FOURS", 4)
            assert torch.equal(by_kernel(x, output, rows, seeds=seeds)[0], whole)


def test_the_interpreters_own_largest_block_is_crossed() -> None:
    for n in (16384, 16385, 16388, 40000):
        assert_same_step(randn(1, n), randn(1, n, seed=1), on_row(7, 1))


@pytest.mark.parametrize("shape", [(0, 3), (0,), (3, 0), (0, 3, 8, 8)])
def test_nothing_to_do_is_done(shape: tuple[int, ...]) -> None:
    x, seeds = torch.empty(shape), torch.arange(shape[0])
    source: list[dict[str, Any]] = [{}, {"seeds": seeds}, {"noise": x}]
    for sources in source:
        x_s, _ = by_kernel(x, x, on_row(0, shape[0]), **sources)
        assert x_s.shape == shape


def test_more_samples_than_a_grids_other_axes_hold() -> None:
    x, output = randn(65_537, 2), randn(65_537, 2, seed=1)
    assert_same_step(x, output, on_row(9, 65_537))


def test_the_grid_has_one_axis_however_many_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    grids: list[tuple[int, ...]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *_, **options: launched(grid, options)

    def launched(grid: tuple[int, ...], options: dict[str, Any]) -> None:
        grids.append(grid)
        # What the interpreter ignores, and a GPU's equality with eager PyTorch needs.
        assert options["enable_fp_fusion"] is False

    monkeypatch.setattr(launch, "ddim_step_kernel", Recorder())
    monkeypatch.setattr(launch, "_INTERPRETED_FOURS", 4)
    monkeypatch.setattr(launch, "_LARGE", 1 << 30)
    x = torch.empty(70_000, 40)
    rows = torch.zeros(70_000, dtype=torch.int32)
    fastddim_kernels.ddim_step(x, x, TABLE, rows, x)
    fastddim_kernels.ddim_step(x, x, TABLE, on_row(0, 70_000), x, seeds=torch.arange(70_000))
    fastddim_kernels.ddim_step(x, x, TABLE, on_row(0, 70_000), x)
    # Samples are kept apart where a row or a seed is theirs, and are one stretch otherwise.
    assert grids == [(210_000,), (210_000,), (175_000,)]


def _quotient_kernel(n_ptr: Any, out_ptr: Any, magic: Any, shift: Any) -> None:
    lane = tl.arange(0, 32)
    found = quotient(tl.load(n_ptr + lane), magic, shift)  # pyright: ignore[reportGeneralTypeIssues]
    tl.store(out_ptr + lane, found)


@settings(max_examples=60, **DRAWN)
@given(data=st.data())
def test_a_block_finds_its_sample_without_a_division(data: st.DataObject) -> None:
    largest = 2**31 - 1
    d = data.draw(st.integers(1, largest) | st.integers(1, 5000) | st.sampled_from([1, largest]))
    times = data.draw(st.lists(st.integers(0, largest // d), min_size=10, max_size=10))
    around = [k * d + i for k in [*times, largest // d] for i in (-1, 0, d - 1)]
    n = torch.tensor([min(max(k, 0), largest) for k in around][:32], dtype=torch.int32)
    out = torch.zeros(32, dtype=torch.int32)
    kernel: Any = triton.jit(do_not_specialize=["magic", "shift"])(_quotient_kernel)
    kernel[(1,)](n, out, *launch.divisor(d))
    assert out.tolist() == (n // d).tolist()


def test_a_divisors_magic_is_always_a_word_of_32_bits() -> None:
    # An int beyond would be of another type to Triton, and the kernel compiled once more.
    for d in (*range(1, 3000), 2**31 - 1, 2**30 + 1, 2**30):
        magic, shift = launch.divisor(d)
        assert -(2**31) <= magic < 2**31
        assert 0 <= shift <= 31


def test_mixed_layouts_need_samples_of_one_stretch() -> None:
    # The batch is innermost in memory, and the output lies otherwise.
    x = torch.randn(3, 2).t().unsqueeze(1)
    output = torch.randn(3, 4)[:, :2].t().unsqueeze(1)
    with pytest.raises(ValueError, match=r"^x must hold each sample in one stretch where output"):
        fastddim_kernels.ddim_step(x, output, TABLE, on_row(7, 2), torch.empty_like(x))


def test_outputs_read_in_place_have_one_layout_or_a_variance() -> None:
    # Any other distance of two pixels would be a kernel of its own, and might leave 32 bits.
    last = torch.randn(2, 4, 6, 12)
    assert [
        fastddim_kernels.pixel_spacing(t)
        for t in (
            torch.empty(2, 3, 4, 6),
            last[..., :3].movedim(-1, 1).contiguous(memory_format=torch.channels_last),
            last[..., :6].movedim(-1, 1)[:, :3],
            last.movedim(-1, 1)[:, :6],
            torch.empty(6, 3, 4).permute(1, 2, 0),
            torch.empty(2, 3, 1, 1).expand(2, 3, 4, 6),
        )
    ] == [1, 3, None, 12, None, None]


@pytest.mark.parametrize("size", [2**31 - 4, 2**31 - 1])
def test_channels_of_almost_2_to_the_31_pixels_are_written(size: int) -> None:
    # The second channel begins inside a four; of its pixels one block alone is launched.
    x = torch.zeros(64)
    out = torch.full((64,), float("nan"))
    kernel: Any = ddim_step_kernel
    kernel[(1,)](
        *(x, x, None, out, None, None, TABLE, on_row(5, 1), None, None, None, None),
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
        *(big, big, None, big, None, None, TABLE, on_row(5, 3), None, None, None, None),
        *(None, n // unit, 3, -1, *launch.divisor(1), n // unit, None, None, None),
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
        *(x, output, None, x, None, next_input, TABLE, on_row(5, 2), None, torch.tensor(7.5)),
        *(None, None, None, n // 4, 2, -1, *launch.divisor(1), n // 4, None, None, None),
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


def good() -> SimpleNamespace:
    return SimpleNamespace(
        x=randn(2, 4, 4),
        output=randn(2, 4, 4, seed=1),
        table=TABLE,
        rows=on_row(0, 2),
        out=torch.empty(2, 4, 4),
        x0=torch.empty(2, 4, 4),
        seeds=None,
        noise=None,
        guidance=None,
        threshold=None,
        next_input=None,
        clip=None,
    )


def guided(a: SimpleNamespace) -> SimpleNamespace:
    a.guidance = torch.ones(2)
    return a


def bounded(a: SimpleNamespace) -> SimpleNamespace:
    a.threshold, a.clip = torch.ones(2), 1.0
    return a


BAD: dict[str, tuple[str, Callable[[SimpleNamespace], Any]]] = {
    "x double": ("x", lambda a: a.x.double()),
    "x has gaps": ("x", lambda a: randn(2, 4, 8)[..., ::2]),
    "x has no batch": ("x", lambda a: torch.tensor(1.0)),
    "output shape": ("output", lambda a: a.output[..., :2]),
    "output strides": ("output", lambda a: randn(2, 4, 8)[..., ::2]),
    "output dtype": ("output", lambda a: a.output.double()),
    "output device": ("output", lambda a: a.output.to("meta")),
    "table columns": ("table", lambda a: a.table[:, :6].contiguous()),
    "table strides": ("table", lambda a: a.table.mT.contiguous().mT),
    "table dtype": ("table", lambda a: a.table.double()),
    "table dimensions": ("table", lambda a: a.table[0]),
    "rows dtype": ("rows", lambda a: a.rows.long()),
    "rows shape": ("rows", lambda a: on_row(0, 3)),
    "out dtype": ("out", lambda a: a.out.half()),
    "out strides": ("out", lambda a: a.out.mT),
    "x0 shape": ("x0", lambda a: a.x0[:1]),
    "noise dtype": ("noise", lambda a: a.x.half()),
    "noise strides": ("noise", lambda a: a.x.mT),
    "seeds dtype": ("seeds", lambda a: torch.arange(2, dtype=torch.int32)),
    "seeds shape": ("seeds", lambda a: torch.arange(3)),
    "seeds strides": ("seeds", lambda a: torch.arange(4)[::2]),
    "seeds device": ("seeds", lambda a: torch.arange(2, device="meta")),
    "rows device": ("rows", lambda a: a.rows.to("meta")),
    "table device": ("table", lambda a: a.table.to("meta")),
    "out device": ("out", lambda a: a.out.to("meta")),
    "x0 device": ("x0", lambda a: a.x0.to("meta")),
    "noise device": ("noise", lambda a: a.x.to("meta")),
    "guidance dtype": ("guidance", lambda a: torch.ones(2).double()),
    "guidance shape": ("guidance", lambda a: torch.ones(3)),
    "guidance dimensions": ("guidance", lambda a: torch.tensor(7.5)),
    "guidance device": ("guidance", lambda a: torch.ones(2, device="meta")),
    "output without halves": ("output", lambda a: guided(a).output),
    "output of halves": ("output", lambda a: torch.cat([a.output, a.output])),
    "threshold dtype": ("threshold", lambda a: torch.ones(2).half()),
    "threshold shape": ("threshold", lambda a: torch.ones(2, 1)),
    "threshold device": ("threshold", lambda a: torch.ones(2, device="meta")),
    "clip with a threshold": ("clip", lambda a: bounded(a).clip),
    "next_input dtype": ("next_input", lambda a: a.x.double()),
    "next_input shape": ("next_input", lambda a: torch.empty(3, 4, 4)),
    "next_input strides": ("next_input", lambda a: a.x.mT.bfloat16()),
    "next_input device": ("next_input", lambda a: a.x.to("meta")),
    "next_input apart": ("next_input", lambda a: torch.empty(2, 8, 4)[:, :4]),
    "two next_inputs' strides": ("next_input", lambda a: torch.empty(4, 4, 4).mT),
    "next_input of one value": ("next_input", lambda a: torch.tensor(1.0)),
    "two next_inputs apart": ("next_input", lambda a: torch.empty(4, 8, 4)[:, :4]),
}


@pytest.mark.parametrize("case", BAD)
def test_the_launcher_names_the_argument_at_fault(case: str) -> None:
    name, bad = BAD[case]
    arguments = good()
    setattr(arguments, name, bad(arguments))
    with pytest.raises(ValueError, match=rf"^{name} must ") as caught:
        fastddim_kernels.ddim_step(**vars(arguments))
    assert "\n" not in str(caught.value)


def test_the_launcher_refuses_two_sources_of_noise() -> None:
    arguments = good()
    arguments.seeds, arguments.noise = torch.arange(2), randn(2, 4, 4)
    with pytest.raises(ValueError, match=r"^noise comes from seeds or from a tensor, got both$"):
        fastddim_kernels.ddim_step(**vars(arguments))


def test_the_launcher_asks_for_contiguous_memory_with_seeds() -> None:
    arguments = good()
    for name in ("x", "output", "out", "x0"):
        setattr(arguments, name, torch.zeros(2, 3, 5, 4).permute(0, 2, 1, 3))
    arguments.seeds = torch.arange(2)
    with pytest.raises(ValueError, match=r"^x must be contiguous or channels last, got .*strides"):
        fastddim_kernels.ddim_step(**vars(arguments))


def test_the_launcher_needs_stacked_next_inputs_in_one_stretch() -> None:
    # Of one sample the halves' own strides do not say how far apart they are.
    x, out = randn(1, 4, 4), torch.empty(1, 4, 4)
    next_input = torch.empty(2, 8, 4)[:, :4]
    with pytest.raises(ValueError, match=r"^next_input must be dense, got .*strides"):
        fastddim_kernels.ddim_step(x, x, TABLE, on_row(0, 1), out, next_input=next_input)


# What belongs to a sample, or lies sample by sample.
ONE_STRETCH: dict[str, dict[str, Tensor]] = {
    "rows differ": {"rows": torch.zeros(4, dtype=torch.int32)},
    "there are seeds": {"seeds": torch.arange(4)},
    "guidance differs": {"guidance": torch.ones(4), "output": randn(8, 2, 4)},
    "guidance stacks output": {
        "guidance": torch.ones(()).expand(4),
        "output": randn(2, 8, 4).permute(1, 0, 2),
    },
    "there is a threshold": {"threshold": torch.ones(4)},
    "the samples of output are apart": {"output": randn(4, 2, 4)},
}


@pytest.mark.parametrize("reason", ONE_STRETCH)
def test_the_launcher_asks_for_samples_that_are_one_stretch(reason: str) -> None:
    arguments = good()
    for name in ("x", "output", "out", "x0"):
        setattr(arguments, name, getattr(arguments, name).permute(1, 0, 2))
    arguments.rows = on_row(0, 4)
    fastddim_kernels.ddim_step(**vars(arguments))
    for name, value in ONE_STRETCH[reason].items():
        setattr(arguments, name, value)
    message = rf"^x must hold each sample in one stretch where {reason}, got .*strides"
    with pytest.raises(ValueError, match=message) as caught:
        fastddim_kernels.ddim_step(**vars(arguments))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("out", torch.empty(2, 8)[:, ::2]),
        ("out", torch.empty(2, 4, dtype=torch.half)),
        ("seeds", torch.arange(3)),
        ("seeds", torch.arange(4)[::2]),
        ("rows", torch.zeros(2, dtype=torch.int64)),
    ],
)
def test_the_noise_launcher_names_the_argument_at_fault(name: str, value: Tensor) -> None:
    arguments = {"out": torch.empty(2, 4), "seeds": torch.arange(2), "rows": on_row(0, 2)}
    with pytest.raises(ValueError, match=rf"^{name} must be "):
        fastddim_kernels.normal_(**(arguments | {name: value}), stream=0)
