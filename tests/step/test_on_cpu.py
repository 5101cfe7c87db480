"""The step on a CPU, through the op, against eager PyTorch and against the kernel.

Each test runs on both of its paths: PyTorch in blocks, and the fused pass where numba is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastddim
import fastddim_kernels
from fastddim import DDIM, using
from fastddim.coefficients import PREDICTIONS
from fastddim.step import on_torch, reference
from fastddim.step.on_torch import BLOCK, PART, _blocks, _scratch
from fastddim.step.philox import STEP_STREAM
from tests.cases import some
from tests.paths import CPU, normal_, use
from tests.tolerances import NORMAL_ATOL

TABLE = torch.tensor(DDIM(steps=50, eta=1.0).table)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, params=CPU)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU's path that the test takes."""
    with use(request.param):
        yield str(request.param)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_reference(
    x: Tensor,
    output: Tensor,
    rows: Tensor | int,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    rows = torch.as_tensor(rows, dtype=torch.int32).expand(len(x))
    row = TABLE[rows.long()].view(-1, *[1] * (x.dim() - 1), 7)
    if seeds is not None:
        noise = torch.full(x.shape, float("nan"))
        normal_(noise, seeds, rows, STEP_STREAM)
    return reference.ddim_step(x, output.float(), row, noise, **options)


def assert_same_step(
    x: Tensor,
    output: Tensor,
    rows: Tensor | int,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    **options: Any,
) -> None:
    """The op equals the reference, with x0 and without, and writes to nothing it was given."""
    arguments = [t for t in (x, output, noise, seeds, TABLE) if t is not None]
    before = [(t.clone(), t._version) for t in arguments]
    expected = by_reference(x, output, rows, seeds, noise, **options)
    out = torch.full_like(x, float("nan"))
    x_s, x0 = fastddim.ddim_step(x, output, TABLE, rows, seeds, noise=noise, **options)
    into, none = fastddim.ddim_step(
        x, output, TABLE, rows, seeds, noise=noise, want_x0=False, out=out, **options
    )
    assert x0 is not None
    assert torch.equal(x_s, expected[0])
    assert torch.equal(x0, expected[1])
    assert into is out
    assert none is None
    assert torch.equal(out, x_s)
    for tensor, (value, version) in zip(arguments, before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == version


FLAGS = list(itertools.product(["none", "tensor", "counter"], [True, False], [None, 0.5]))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("kind", "noise_first", "clip"), FLAGS)
def test_fifty_steps_equal_the_reference(
    prediction: str, kind: str, noise_first: bool, clip: float | None
) -> None:
    options: dict[str, Any] = {"prediction": prediction, "noise_first": noise_first, "clip": clip}
    x = expected = randn(3, 3, 5, 7)
    for row in range(len(TABLE)):
        seeds = torch.tensor([1, 2**32 + 1, 2**63 - 1]) if kind == "counter" else None
        z = randn(3, 3, 5, 7, seed=row) if kind == "tensor" else None
        output = torch.tanh(x * 0.7 + torch.sin(x.flip(-1) * 3 + row))
        x, _ = fastddim.ddim_step(x, output, TABLE, row, seeds, noise=z, **options)
        expected, _ = by_reference(expected, output, row, seeds, z, **options)
        assert torch.equal(x, expected), f"row {row}"
    assert x.isfinite().all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_dtypes_and_differing_rows_equal_the_reference(
    prediction: str, dtype: torch.dtype
) -> None:
    x, output, z = randn(5, 3, 7), randn(5, 3, 7, seed=1).to(dtype), randn(5, 3, 7, seed=2)
    rows, seeds = torch.tensor([0, 49, 3, 3, 20], dtype=torch.int32), torch.arange(5)
    for noise_first, clip in itertools.product([True, False], [None, 1.0]):
        options: dict[str, Any] = {"noise_first": noise_first, "clip": clip}
        options["prediction"] = prediction
        assert_same_step(x, output, rows, **options)
        assert_same_step(x, output, rows, noise=z, **options)
        assert_same_step(x, output, rows, seeds, **options)
    for name in ("rederive", "posterior"):
        options = {"prediction": prediction, name: True}
        assert_same_step(x, output, rows, **options)


@pytest.mark.parametrize("shape", [(1, PART), (1, PART + 1), (3, PART + BLOCK), (7, BLOCK + 4)])
def test_blocks_of_more_than_one_size_equal_the_reference(shape: tuple[int, ...]) -> None:
    x, output, z = (randn(*shape, seed=i) for i in range(3))
    assert_same_step(x, output, 20, clip=1.0)
    assert_same_step(x, output, 20, noise=z)
    assert_same_step(x, output, 20, torch.arange(shape[0]))


@pytest.mark.parametrize("busy", [False, True])
def test_operations_are_shared_out_while_that_pays(
    busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("fastddim.step.on_torch.time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    n, sizes = 10 * PART, list[int]()
    for _, _, first, count in _blocks(1, n, False):
        assert first == sum(sizes)
        sizes.append(count)
        now += count * (1.0 if count == BLOCK else 1.1 if busy else 0.9)
    assert sum(sizes) == n
    assert sizes[:2] == [BLOCK, 3 * PART]
    assert set(sizes[2:-1]) == {BLOCK if busy else 3 * PART}


def test_scratch_is_each_thread_s_own_and_kept() -> None:
    def addresses() -> tuple[int, int]:
        with torch.inference_mode():
            first = _scratch(100)
        return first.data_ptr(), _scratch(50).zero_().data_ptr()

    with ThreadPoolExecutor(1) as other:
        there = other.submit(addresses).result()
        assert there[0] == there[1]
        here = addresses()
        assert here[0] == here[1] != there[0]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "shape",
    [
        (1, BLOCK - 1),
        (1, BLOCK),
        (1, BLOCK + 1),
        (2, BLOCK + 2),
        (3, 2 * BLOCK + 3),
        (2, BLOCK // 2),
        (5, BLOCK // 4 + 4),
        (4, BLOCK // 4),
        (3000, 17),
        (40_000, 1),
        (9, 8188),
    ],
)
@pytest.mark.parametrize("rows_differ", [False, True])
def test_blocks_cross_samples_and_samples_cross_blocks(
    shape: tuple[int, ...], rows_differ: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastddim.step.on_torch.PART", BLOCK)
    if rows_differ and shape[0] > 1000:
        shape = (300, shape[1])  # a block for each sample, which takes its time
    x, output, z = (randn(*shape, seed=i) for i in range(3))
    rows: Tensor | int = 20
    if rows_differ:
        rows = (torch.arange(shape[0]) * 7 % 50).to(torch.int32)
    assert_same_step(x, output, rows, clip=1.0)
    assert_same_step(x, output, rows, noise=z)
    assert_same_step(x, output, rows, torch.arange(shape[0]) + 2**32 - 2, prediction="v")
    assert_same_step(x, output, rows, noise=z, prediction="flow")
    assert_same_step(x, output, rows, noise=z, posterior=True, noise_first=False)


OWN_FACTORS = [(3000, 2), (4096, 8), (70, 63), (70, 64), (5, BLOCK + 3), (3, 2 * PART + 1)]
BOUNDS: list[dict[str, Any]] = [{}, {"threshold": ()}, {"threshold": (), "rederive": True}]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("shape", some([(shape,) for shape in OWN_FACTORS], 2))
@pytest.mark.parametrize("together", [True, False], ids=["one block", "blocks"])
@pytest.mark.parametrize("equal", some([False, True], 2))
def test_samples_with_factors_of_their_own_equal_the_reference(
    shape: tuple[int, int], together: bool, equal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not together:
        monkeypatch.setattr("fastddim.step.on_torch._most", lambda: BLOCK)
        monkeypatch.setattr("fastddim.step.on_torch._together", lambda: BLOCK)
    batch, each = shape[0], (shape[0], 1)
    x, output, z = (randn(*shape, seed=i) for i in range(3))
    both = randn(2 * batch, shape[1], seed=3)
    w = torch.full((batch,), 7.5) if equal else 4 * randn(batch, seed=4)
    s = 1 + randn(batch, seed=5).abs()
    rows = (torch.arange(batch) * 7 % 49).to(torch.int32)
    seeds = torch.arange(batch) + 2**32 - 2
    counted = torch.empty(shape)
    normal_(counted, seeds, rows, STEP_STREAM)
    noises: list[tuple[Any, Any, Any, Any]] = [
        (20, None, z, z),
        (rows, None, None, None),
        (rows, seeds, None, counted),
    ]
    outputs, of_three = (output, both, both.half()), range(3)
    for i, j, k in itertools.product(of_three, repeat=3):
        (on, of, noise, drawn), said, bounds = noises[i], outputs[j], BOUNDS[k]
        # Any three of the four choices meet in each shape, and all four in three shapes.
        prediction = PREDICTIONS[(i + j + k + OWN_FACTORS.index(shape)) % 3]
        ours: dict[str, Any] = {"prediction": prediction, **bounds}
        if "threshold" in bounds:
            ours["threshold"] = s
        if said is not output:
            ours["guidance"] = w
        theirs = {n: v.view(each) if isinstance(v, Tensor) else v for n, v in ours.items()}
        expected = by_reference(x, said, on, noise=drawn, **theirs)
        found = fastddim.ddim_step(x, said, TABLE, on, of, noise=noise, **ours)
        assert found[1] is not None
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("given", ["nothing", "guidance", "threshold", "rows", "seeds"])
def test_small_samples_go_together_however_many_there_are(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks: list[int] = []
    block = on_torch._step

    def counting(*arguments: Any) -> None:
        blocks.append(len(arguments[0]))
        block(*arguments)

    monkeypatch.setattr(on_torch, "_step", counting)
    batch = 2 * PART  # more elements than are taken as one block
    x, output = randn(batch, 2), randn(2 * batch if given == "guidance" else batch, 2)
    rows: Tensor | int = 3
    if given == "rows":
        rows = (torch.arange(batch) % 5).to(torch.int32)
    own: dict[str, Any] = {}
    if given in ("guidance", "threshold"):
        own = {given: 1 + randn(batch).abs()}
    seeds = torch.arange(batch) if given == "seeds" else None
    found, _ = fastddim.ddim_step(x, output, TABLE, rows, seeds, **own)
    assert len(blocks) < 20  # of the fused pass, none; blocks of one sample each would be 262,016
    theirs = {name: value[:, None] for name, value in own.items()}
    assert torch.equal(found, by_reference(x, output, rows, seeds, **theirs)[0])


@pytest.mark.parametrize("shape", [(0, 3), (0,), (3, 0), (1,), (4,), (2, 1, 1, 1, 1, 5)])
def test_any_rank_and_nothing_at_all(shape: tuple[int, ...]) -> None:
    x, output, z = (randn(*shape, seed=i) for i in range(3))
    assert_same_step(x, output, 3)
    assert_same_step(x, output, 3, noise=z)
    assert_same_step(x, output, torch.zeros(shape[0], dtype=torch.int32), torch.arange(shape[0]))


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": channels_last,
    "reversed": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "batch inside": lambda t: t.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
    "slice": lambda t: torch.cat([t, t + 1], dim=-1)[..., : t.shape[-1]],
    "every other": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "offset": lambda t: torch.cat([torch.zeros(3, dtype=t.dtype), t.flatten()])[3:].view(t.shape),
    "expanded": lambda t: t[:, :1].expand(t.shape),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("output_layout", LAYOUTS)
def test_layouts_may_be_mixed(x_layout: str, output_layout: str) -> None:
    x = LAYOUTS[x_layout](randn(2, 3, 4, 5))
    output = LAYOUTS[output_layout](randn(2, 3, 4, 5, seed=1))
    z = LAYOUTS[output_layout](randn(2, 3, 4, 5, seed=2))
    rows = torch.tensor([5, 40], dtype=torch.int32)
    for row in (7, rows):
        assert_same_step(x, output, row, noise=z)
        assert_same_step(x, output.bfloat16(), row, torch.tensor([1, 2]), prediction="sample")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
def test_out_may_have_any_layout(layout: str) -> None:
    x, output = randn(2, 3, 4, 5), randn(2, 3, 4, 5, seed=1)
    memory = LAYOUTS[layout](torch.full_like(x, float("nan")))
    x_s, _ = fastddim.ddim_step(x, output, TABLE, 3, out=memory)
    assert x_s is memory
    assert torch.equal(memory, by_reference(x, output, 3)[0])


def test_out_in_the_middle_of_a_tensor_leaves_what_is_beside_it() -> None:
    x, output = randn(2, 37), randn(2, 37, seed=1)
    memory = torch.full((4, 39), 12345.0)
    fastddim.ddim_step(x, output, TABLE, 3, torch.arange(2), out=memory[1:3, 1:38])
    expected = torch.full((4, 39), 12345.0)
    expected[1:3, 1:38] = by_reference(x, output, 3, torch.arange(2))[0]
    assert torch.equal(memory, expected)


def test_the_layout_of_what_comes_back_is_that_of_x() -> None:
    x = channels_last(randn(2, 3, 4, 5))
    x_s, x0 = fastddim.ddim_step(x, randn(2, 3, 4, 5), TABLE, 3)
    assert x0 is not None
    assert x_s.stride() == x0.stride() == x.stride()


def test_row_forms_agree() -> None:
    x, output = randn(3, 9), randn(3, 9, seed=1)
    expected = by_reference(x, output, 4)[0]
    tensors = [torch.tensor(4, dtype=torch.int32), torch.full((3,), 4, dtype=torch.int32)]
    forms: list[Tensor | int] = [4, *tensors, tensors[0].expand(3)]
    for rows in forms:
        assert torch.equal(fastddim.ddim_step(x, output, TABLE, rows)[0], expected)


def test_nan_and_infinity_come_out_as_eagers() -> None:
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, 1e-44, 0.0, -2.0])
    x, output = torch.meshgrid(special, special, indexing="ij")
    for prediction, row, clip in itertools.product(PREDICTIONS, (0, 49), (None, 1.0)):
        options: dict[str, Any] = {"prediction": prediction, "clip": clip}
        found = fastddim.ddim_step(x, output, TABLE, row, **options)
        for a, b in zip(found, by_reference(x, output, row, **options), strict=True):
            assert a is not None
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_agree(found: Tensor, expected: Tensor, path: str, counter_noise: bool) -> None:
    """Equal, but for normals where the two paths' logarithms round differently."""
    atol = NORMAL_ATOL if counter_noise and path == "numba" else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("n", some([37, 36], 2))
def test_the_kernel_and_the_cpu_agree_on_everything(prediction: str, n: int, path: str) -> None:
    x, output, z = (randn(2, n, seed=i) for i in range(3))
    rows, seeds = torch.tensor([2, 30], dtype=torch.int32), torch.tensor([7, 2**32 + 7])
    for sources in ({}, {"noise": z}, {"seeds": seeds}):
        options: dict[str, Any] = {"clip": 1.0, "noise_first": False, **sources}
        found, found_x0 = fastddim.ddim_step(
            x, output, TABLE, rows, prediction=prediction, **options
        )
        out, x0 = torch.empty_like(x), torch.empty_like(x)
        number = PREDICTIONS.index(prediction)
        fastddim_kernels.ddim_step(x, output, TABLE, rows, out, x0, prediction=number, **options)
        assert found_x0 is not None
        assert_agree(out, found, path, "seeds" in sources)
        assert torch.equal(x0, found_x0)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("layout", some(LAYOUTS, 2))
def test_the_op_hands_any_layout_to_the_kernel_as_to_the_cpu(layout: str, path: str) -> None:
    x = LAYOUTS[layout](randn(2, 3, 4, 5))
    output, z = randn(2, 3, 4, 5, seed=1), channels_last(randn(2, 3, 4, 5, seed=2))
    out = LAYOUTS["slice"](torch.full((2, 3, 4, 5), float("nan")))
    each, seeds = torch.tensor([2, 30], dtype=torch.int32), torch.tensor([7, 2**32 + 7])
    for rows, sources in ((3, {"noise": z}), (each, {"noise": z}), (each, {"seeds": seeds})):
        options: dict[str, Any] = {"clip": 1.0, **sources}
        expected = fastddim.ddim_step(x, output, TABLE, rows, **options)
        with using("triton"):
            found = fastddim.ddim_step(x, output, TABLE, rows, out=out, **options)
        for a, b in zip(found, expected, strict=True):
            assert a is not None
            assert b is not None
            assert_agree(a, b, path, "seeds" in sources)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_shape_stride_dtype_and_flags_equal_the_reference(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=5), label="shape"))

    def tensor(seed: int) -> Tensor:
        order = data.draw(st.permutations(range(len(shape))), label="order")
        step = data.draw(st.sampled_from([1, 1, 2]), label="step")
        memory = randn(*[shape[i] * step for i in order], seed=seed)
        memory = memory[tuple(slice(None, None, step) for _ in shape)]
        return memory.permute([order.index(i) for i in range(len(shape))])

    each = st.lists(st.integers(0, 49), min_size=shape[0], max_size=shape[0])
    rows = data.draw(st.integers(0, 49) | each, label="rows")
    kind = data.draw(st.sampled_from(["none", "tensor", "counter"]), label="noise")
    seed = st.integers(0, 2**63 - 1)
    seeds = data.draw(st.lists(seed, min_size=shape[0], max_size=shape[0]), label="seeds")
    assert_same_step(
        tensor(0),
        tensor(1).to(data.draw(st.sampled_from(DTYPES), label="dtype")),
        rows if isinstance(rows, int) else torch.tensor(rows, dtype=torch.int32),
        torch.tensor(seeds, dtype=torch.int64) if kind == "counter" else None,
        tensor(2) if kind == "tensor" else None,
        prediction=data.draw(st.sampled_from(PREDICTIONS), label="prediction"),
        noise_first=data.draw(st.booleans(), label="noise_first"),
        clip=data.draw(st.none() | st.floats(0.125, 4.0, width=32), label="clip"),
    )
