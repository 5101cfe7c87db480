"""The Triton kernel, run by Triton's interpreter, against eager PyTorch: equal, not close."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

import fastddim_kernels
from fastddim.coefficients import PREDICTIONS
from fastddim.step import reference
from fastddim_kernels import geometry, launch
from fastddim_kernels.layout import quotient
from tests.kernel_steps import assert_same_step, by_kernel, by_reference, on_row
from tests.steps import DRAWN, TABLE, model, randn
from tests.tolerances import EAGER_FACTOR, HALF_ATOL


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
@pytest.mark.one_in(3)
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
@pytest.mark.parametrize(
    ("prediction", "noise_first"), [(p, i % 2 == 0) for i, p in enumerate(PREDICTIONS)]
)
def test_fifty_steps_with_counter_noise_equal_the_reference(
    prediction: str, noise_first: bool
) -> None:
    options = {"prediction": prediction, "noise_first": noise_first, "clip": 0.8}
    assert_same_trajectory((1, 3, 5, 7), "philox", **options)


@pytest.mark.one_in(3)
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


@pytest.mark.one_in(2)
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


@pytest.mark.one_in(2)
@pytest.mark.parametrize("largest_block", [16, 64, 16384])
def test_sizes_around_the_block_equal_the_reference(
    monkeypatch: pytest.MonkeyPatch, largest_block: int
) -> None:
    monkeypatch.setattr(geometry, "INTERPRETED_FOURS", largest_block // 4)
    for n in [n for n in SIZES if n <= 10 * largest_block]:
        assert_same_step(randn(1, n), randn(1, n, seed=1), on_row(7, 1), clip=0.9)


def test_samples_of_many_blocks_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "INTERPRETED_FOURS", 4)
    rows = torch.tensor([1, 49, 30], dtype=torch.int32)
    for n in (36, 37, 38, 39):
        assert_same_step(randn(3, n), randn(3, n, seed=1), rows, noise=randn(3, n, seed=2))


def test_counter_noise_does_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, seeds = torch.tensor([10, 10], dtype=torch.int32), torch.tensor([3, 4])
    for n in (36, 37):
        x, output = randn(2, n), randn(2, n, seed=1)
        whole = by_kernel(x, output, rows, seeds=seeds)[0]
        with monkeypatch.context() as patch:
            patch.setattr(geometry, "INTERPRETED_FOURS", 4)
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
    monkeypatch.setattr(geometry, "INTERPRETED_FOURS", 4)
    monkeypatch.setattr(geometry, "LARGE", 1 << 30)
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
    kernel[(1,)](n, out, *geometry.divisor(d))
    assert out.tolist() == (n // d).tolist()


def test_a_divisors_magic_is_always_a_word_of_32_bits() -> None:
    # An int beyond would be of another type to Triton, and the kernel compiled once more.
    for d in (*range(1, 3000), 2**31 - 1, 2**30 + 1, 2**30):
        magic, shift = geometry.divisor(d)
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
