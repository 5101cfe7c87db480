"""Half precision states: each backend rounds after each operation, as eager PyTorch does."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastddim_kernels
from fastddim.coefficients import COLUMNS_ROUNDED, PREDICTIONS
from fastddim.step import backends, op, reference
from fastddim.step.backends import Fixed
from fastddim.step.bound import Bound
from tests.cases import some
from tests.paths import ALL, CPU, here
from tests.refusals import refused
from tests.steps import same

HALVES = [torch.bfloat16, torch.float16]
SHAPE = (3, 4, 6, 5)
LARGE = (2, 1, 1, 150_001)
"""More elements than a block, a chunk and a task, and no multiple of any."""


def table_of(dtype: torch.dtype, left: bool = True, seed: int = 0) -> Tensor:
    """Rows of factors below 1, rounded to ``dtype`` where they multiply if ``left``."""
    g = torch.Generator().manual_seed(seed)
    a = torch.rand(5, generator=g) * 0.9 + 0.05
    b, rest = (1 - a * a).sqrt(), torch.rand(3, 5, generator=g)
    times = [f.to(dtype).float() if left else f for f in (*rest, a, b)]
    return torch.stack([a, 1 / a, b, 1 / b, *times], dim=1)


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Normals of all sizes: subnormals, results that overflow, infinities and NaN among them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * torch.exp(3 * torch.randn(shape, generator=g))
    flat = x.view(-1)
    flat[::7] *= 2.0**-18
    # In float16 the sums of these overflow, and 65504 is its largest number.
    flat[3 + seed :: 11] = torch.tensor([6e4, -6e4, 65504.0])[seed % 3]
    flat[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan]).roll(seed)
    return x.to(dtype)


def stepped(
    name: str, fixed: Fixed, x: Tensor, output: Tensor, table: Tensor, row: int | Tensor,
    noise: Tensor | None = None, threshold: Tensor | None = None, want_x0: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    out, x0 = (torch.full_like(x, torch.nan) for _ in range(2))
    step = Bound(backends.backend("cpu", name), fixed)
    given = x, output, table, row, None, noise, None, threshold
    step(*given, out, x0 if want_x0 else None, None)
    return out, x0 if want_x0 else None


def assert_same_step(
    name: str, x: Tensor, output: Tensor, noise: Tensor | None = None, left: bool = True,
    threshold: Tensor | None = None, **options: Any,
) -> None:  # fmt: skip
    fixed, table = Fixed(**options, rounding=x.dtype), table_of(x.dtype, left)
    each = (-1, *[1] * (x.dim() - 1))
    expected = reference.ddim_step(
        x, output, table[2], noise, PREDICTIONS[fixed.prediction], fixed.clip, fixed.noise_first,
        None, None if threshold is None else threshold.view(each), fixed.rederive, None,
        fixed.posterior, fixed.rounding,
    )  # fmt: skip
    assert expected[0].dtype == expected[1].dtype == x.dtype
    got = stepped(name, fixed, x, output, table, 2, noise, threshold)
    alone = stepped(name, fixed, x, output, table, 2, noise, threshold, want_x0=False)
    assert got[1] is not None
    assert same(got[1], expected[1])
    assert same(got[0], expected[0])
    assert same(alone[0], expected[0])


OPTIONS = [
    (
        dtype,
        dict(zip(("prediction", "noise_first"), chosen[:2], strict=True)) | chosen[2],
        *chosen[3:],
    )
    for dtype in HALVES
    for chosen in itertools.product(
        range(4),
        (True, False),
        ({}, {"rederive": True}, {"posterior": True}),
        (None, "clip", "threshold"),
        (False, True),
        (True, False),
    )
]


@pytest.mark.one_in(2)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("name", here(*ALL))
@pytest.mark.parametrize(("dtype", "options", "bound", "noisy", "left"), some(OPTIONS, 31))
def test_a_step_rounds_as_eager_pytorch(
    name: str, dtype: torch.dtype, options: dict[str, Any], bound: Any, noisy: bool, left: bool
) -> None:
    x, output, z = (values(SHAPE, dtype, seed) for seed in range(3))
    if bound == "clip":  # 0.7 is no number of either dtype
        options = options | {"clip": 0.7}
    threshold = torch.tensor([1.0, 1.3, 2.1]) if bound == "threshold" else None
    assert_same_step(name, x, output, z if noisy else None, left, threshold, **options)


@pytest.mark.parametrize("name", here(*CPU))
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bound", [None, "threshold"])
def test_a_large_step_rounds_as_eager_pytorch(name: str, dtype: torch.dtype, bound: Any) -> None:
    x, output, z = (values(LARGE, dtype, seed) for seed in range(3))
    threshold = None if bound is None else torch.tensor([1.1, 1.9])
    assert_same_step(name, x, output, z, threshold=threshold, noise_first=False)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "odd": lambda x: x[:1, :1, :1, :1],
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "slice": lambda x: x[:, 1:, ::2],
    "transposed": lambda x: x.transpose(1, 3),
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "rank two": lambda x: x.flatten(1),
    "empty": lambda x: x[:0],
}


@pytest.mark.one_in(2)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("name", here(*ALL))
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("of_x", "of_output"),
    some([*((k, k) for k in LAYOUTS), ("channels last", None), (None, "channels last")], 2),
)
def test_each_layout_rounds_alike(
    name: str, dtype: torch.dtype, of_x: str | None, of_output: str | None
) -> None:
    tensors = [values(SHAPE, dtype, seed) for seed in range(3)]
    x, output, z = (
        LAYOUTS[k](t) if k else t for t, k in zip(tensors, (of_x, of_output, of_x), strict=True)
    )
    assert_same_step(name, x, output, z)


@pytest.mark.parametrize("name", here(*ALL))
@pytest.mark.parametrize("dtype", HALVES)
def test_samples_on_rows_of_their_own_round_alike(name: str, dtype: torch.dtype) -> None:
    x, output = (torch.randn(SHAPE).to(dtype) for _ in range(2))
    table, rows = table_of(dtype), torch.tensor([4, 0, 2], dtype=torch.int32)
    got, _ = stepped(name, Fixed(rounding=dtype), x, output, table, rows)
    for i, row in enumerate(rows.tolist()):
        alone = stepped(name, Fixed(rounding=dtype), x[i : i + 1], output[i : i + 1], table, row)
        assert torch.equal(got[i], alone[0][0])


@pytest.mark.parametrize("name", here(*CPU))
@pytest.mark.parametrize("row", [-1, 5])
def test_a_row_that_is_not_in_the_table_is_refused(name: str, row: int) -> None:
    x = torch.zeros(SHAPE, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 5\)"):
        stepped(name, Fixed(rounding=x.dtype), x, x, table_of(x.dtype), row)


@pytest.mark.parametrize(
    ("columns", "rounding", "history", "words"),
    [
        (7, torch.bfloat16, None, "9 columns in a step with rounding, got 7"),
        (8, torch.bfloat16, None, "9 columns in a step with rounding, got 8"),
        (10, torch.bfloat16, None, "9 columns in a step with rounding, got 10"),
        (6, None, None, "7 or 8 or 9 columns in a step of order 1, got 6"),
        (10, None, None, "7 or 8 or 9 columns in a step of order 1, got 10"),
        (7, None, torch.zeros(SHAPE), "8 or 9 columns in a step of order 2, got 7"),
    ],
)
def test_a_table_of_another_width_is_refused(
    columns: int, rounding: torch.dtype | None, history: Tensor | None, words: str
) -> None:
    x, table = torch.zeros(SHAPE, dtype=rounding), torch.ones(5, columns)

    def eager() -> Any:
        return reference.ddim_step(x, x, table[2], history=history, rounding=rounding)

    refused(eager, ValueError, f"row must have {words}")
    for name in here(*ALL):
        step = Bound(backends.backend("cpu", name), Fixed(rounding=rounding))
        given = x, x, table, 2, None, None, None, None, torch.empty_like(x), None, None, history
        refused(partial(step, *given), ValueError, f"table must have {words}")


def test_the_reference_refuses_another_rounding_than_xs() -> None:
    x, row = torch.zeros(SHAPE), table_of(torch.bfloat16)[2]
    words = "rounding must be the dtype of x, torch.float32, or None, got torch.bfloat16"
    refused(lambda: reference.ddim_step(x, x, row, rounding=torch.bfloat16), ValueError, words)


@pytest.mark.parametrize("name", here(*ALL))
@pytest.mark.parametrize("given", ["seeds", "guidance", "next_input", "history"])
def test_rounding_refuses_an_argument_that_it_does_not_take(name: str, given: str) -> None:
    x = torch.zeros(SHAPE, dtype=torch.bfloat16)
    taken = {"seeds": torch.arange(3), "guidance": torch.ones(3)}.get(given, torch.zeros(SHAPE))
    output = torch.cat([x, x]) if given == "guidance" else x
    more: dict[str, Any] = {"seeds": None, "noise": None, "guidance": None, "threshold": None}
    more |= {"out": torch.empty_like(x), "x0": None, "next_input": None, "history": None}
    step = Bound(backends.backend("cpu", name), Fixed(rounding=x.dtype))
    call = partial(step, x, output, table_of(x.dtype), 2, **more | {given: taken})
    refused(call, ValueError, f"{given} must be None with rounding, got a tensor")


@pytest.mark.parametrize("dtype", HALVES)
def test_the_op_rounds_and_passes_opcheck(dtype: torch.dtype) -> None:
    x, output = (torch.randn(SHAPE).to(dtype) for _ in range(2))
    out, table = torch.empty_like(x), table_of(dtype)
    fixed = Fixed(rounding=dtype)
    given = x, output, table, None, None, None, None, None, 0, True, None, False, out, None, None
    more = {"row": 1, "rounding": dtype}
    op.OP(*given, **more)
    assert torch.equal(out, stepped("torch", fixed, x, output, table, 1)[0])
    torch.library.opcheck(op.OP, given, more)


def test_the_table_of_a_step_that_rounds_has_nine_columns() -> None:
    assert table_of(torch.bfloat16).shape[1] == len(COLUMNS_ROUNDED) == 9


def halves() -> Iterator[Tensor]:
    """Float32 numbers around each number of both dtypes, and around the middles between two."""
    every = torch.from_numpy(np.arange(2**16, dtype=np.uint16).view(np.int16))
    for dtype in HALVES:
        numbers = every.view(dtype).float()
        finite = numbers[numbers.isfinite()].sort().values
        middles = (finite[1:].double() + finite[:-1].double()).div(2).float()
        for of in (numbers, middles):
            up, down = (of.nextafter(torch.tensor(to)) for to in (torch.inf, -torch.inf))
            yield from (of, up, down)


@pytest.mark.skipif("numba" not in here(*CPU), reason="numba is missing")
def test_numbas_roundings_are_those_of_pytorch() -> None:
    import numba

    from fastddim.step import numba_pass as fused

    @numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
    def rounded(v: Any, bits: Any, back: Any, bfloat16: Any, float16: Any) -> None:
        for i in range(v.size):
            bits[i] = fused._float16_bits(v[i])
            back[i] = fused._float16_value(bits[i])
            bfloat16[i], float16[i] = fused._to_bfloat16(v[i]), fused._to_float16(v[i])

    edges = torch.tensor([65519.996, 65520.0, -65520.0, 65536.0, -1e5, 1e30, torch.inf, -torch.inf])
    v = torch.cat([*halves(), edges])
    v = v[~v.isnan()].contiguous()
    bits = np.empty(v.numel(), np.uint16)
    back, bfloat16, float16 = (np.empty(v.numel(), np.float32) for _ in range(3))
    rounded(v.numpy(), bits, back, bfloat16, float16)
    assert torch.equal(torch.from_numpy(bits.view(np.int16)), v.half().view(torch.int16))
    assert torch.equal(torch.from_numpy(back), v.half().float())
    assert torch.equal(torch.from_numpy(float16), v.half().float())
    assert torch.equal(torch.from_numpy(bfloat16), v.bfloat16().float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounding": torch.float64}, "x must be dense float64"),
        ({"rounding": torch.float16}, "x must be dense float16"),
        ({"output": torch.float32}, "rounding must be bfloat16 or float16, the dtype of output"),
        ({"table": 7}, r"table must be contiguous \(steps, 9\)"),
        ({"seeds": torch.arange(3)}, "seeds must be None with rounding"),
        ({"guidance": torch.ones(3)}, "guidance must be None with rounding"),
        ({"history": torch.ones(SHAPE)}, "history must be None with rounding"),
    ],
    ids=str,
)
def test_the_kernels_package_refuses_in_one_line(change: dict[str, Any], message: str) -> None:
    x = torch.zeros(SHAPE, dtype=torch.bfloat16)
    table = table_of(x.dtype)[:, : change.pop("table", 9)].contiguous()
    output = x.to(change.pop("output", x.dtype))
    with pytest.raises(ValueError, match=message) as raised:
        fastddim_kernels.ddim_step(
            x, output, table, 0, torch.empty_like(x), **{"rounding": x.dtype, **change}
        )
    assert "\n" not in str(raised.value)
