"""Every way of running a step, by the kernel and on the CPU, equals eager PyTorch: not close."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastddim
import fastddim_kernels
from benchmarks.counts import Tally
from benchmarks.variants import VARIANTS, launch_arguments, step_arguments
from fastddim.coefficients import PREDICTIONS
from fastddim.step import on_triton, op, reference
from fastddim.step.philox import STEP, normals
from fastddim_kernels import launch
from tests.paths import ALL, forget, here, instead, normal_, use
from tests.steps import DRAWN, TABLE, model, randn, same
from tests.tolerances import EAGER_FACTOR, HALF_ATOL

BACKENDS = here(*ALL)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAD, GUARD = 67, 4096.0  # which every dtype can hold

# Fours that are full and not, channels in one vector, in one program and in several.
CHANNELS = [1, 2, 3, 4, 5, 8, 16]
PIXELS = [(1, 1), (1, 2), (3, 1), (2, 2), (1, 5), (7, 7), (8, 8)]
BATCHES = [2, 1, 5, 0]


class Memory:
    """Where results go: poisoned with NaN, and around them guards that must stay as they were."""

    def __init__(self) -> None:
        self.lent: list[tuple[Tensor, Tensor]] = []

    def like(self, tensor: Tensor, offset: int = 0) -> Tensor:
        """As large as ``tensor``, with its strides, gaps and dtype."""
        reach = [(n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
        span = 1 + sum(reach) if tensor.numel() else 0
        whole = torch.full((2 * PAD + offset + span,), GUARD, dtype=tensor.dtype)
        lent = whole.as_strided(tensor.shape, tensor.stride(), PAD + offset)
        self.lent.append((whole, lent.fill_(float("nan"))))
        return lent

    def check(self) -> None:
        """Nothing was written beside what was lent, which is lost with this."""
        for whole, lent in self.lent:
            lent.fill_(GUARD)
            assert (whole == GUARD).all(), "written outside of a tensor"


def by_reference(
    x: Tensor,
    output: Tensor,
    table: Tensor,
    rows: Tensor | int,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    guidance: Tensor | float | None = None,
    prediction: str = "epsilon",
    clip: float | None = None,
    threshold: Tensor | None = None,
    rederive: bool = False,
    noise_first: bool = True,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """The step in eager float32, from what ``fastddim.ddim_step`` is called with."""
    batch, each = len(x), (-1, *[1] * (x.dim() - 1))

    def of_samples(value: Tensor | float | None) -> Tensor | None:
        if value is None:
            return None
        return torch.as_tensor(value, dtype=torch.float32).expand(batch).reshape(each)

    rows = torch.as_tensor(rows, dtype=torch.int32).expand(batch)
    if seeds is not None:
        noise = torch.empty(x.shape)
        normal_(noise, seeds, rows, STEP)
    row = table[rows.long()].view(*each, 7)
    w, s = of_samples(guidance), of_samples(threshold)
    return reference.ddim_step(
        x, output.float(), row, noise, prediction, clip, noise_first, w, s, rederive
    )


def assert_rounded(next_input: Tensor, x_s: Tensor) -> None:
    """Bit for bit what PyTorch makes of x_s in this dtype, once or twice; NaN is NaN."""
    integers = torch.int32 if next_input.dtype == torch.float32 else torch.int16
    expected = x_s.to(next_input.dtype)
    for half in next_input.split(max(len(x_s), 1)):
        assert same(half, expected)
        number = ~expected.isnan()
        assert torch.equal(half[number].view(integers), expected[number].view(integers))


def assert_equals_eager(arguments: dict[str, Any], offset: int = 0) -> None:
    """Every backend: every result, and nothing written but these."""
    for backend in BACKENDS:
        memory, called = Memory(), dict(arguments)
        for name in ("out", "next_input"):
            if called.get(name) is not None:
                called[name] = memory.like(called[name], offset)
        given = [t for n, t in arguments.items() if isinstance(t, Tensor) and t is called[n]]
        before = [t.clone() for t in given]
        with use(backend):
            expected, expected_x0 = by_reference(**arguments)
            x_s, x0 = fastddim.ddim_step(**called)
        assert same(x_s, expected), backend
        if called.get("out") is not None:
            assert x_s is called["out"]
        assert (x0 is not None) == arguments.get("want_x0", True)
        if x0 is not None:
            assert same(x0, expected_x0), backend
        if called.get("next_input") is not None:
            assert_rounded(called["next_input"], x_s)
        for tensor, value in zip(given, before, strict=True):
            assert same(tensor, value), f"the {backend} wrote to what it was given"
        memory.check()


def of_variant(
    name: str, dtype: torch.dtype, last: bool, batch: int, shape: tuple[int, ...]
) -> dict[str, Any]:
    """A call of this variant, of another dtype, layout and shape."""
    variant = replace(VARIANTS[name], dtype=dtype, channels_last=last)
    arguments = step_arguments(variant, batch, shape=shape)
    if not variant.rows_differ:
        arguments["rows"] = torch.full((), 20, dtype=torch.int32).expand(batch)
    return arguments | {"out": torch.empty_like(arguments["x"])}


def size_of(case: int) -> tuple[int, tuple[int, ...]]:
    """Batch and sample; 49 cases hold every pair of channels and pixels."""
    return 2 - case % 2, (CHANNELS[case % 7], *PIXELS[(case + case // 7) % 7])


GIVEN = [
    "x",
    "output",
    "table",
    "rows",
    "seeds",
    "noise",
    "guidance",
    "threshold",
    "out",
    "x0",
    "next_input",
]
"""What a launch is called with."""
LAYOUTS = {"contiguous": False, "last": True}
NUMBERED = list(enumerate(VARIANTS))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("number", "name"), NUMBERED, ids=VARIANTS)
def test_every_variant_in_both_layouts_equals_eager(number: int, name: str, layout: str) -> None:
    last = LAYOUTS[layout]
    batch, shape = size_of(number + 5 * last)
    assert_equals_eager(of_variant(name, DTYPES[number % 3], last, batch, shape))


@pytest.mark.parametrize("name", ["guidance bf16 next", "learned last", "epsilon threshold"])
def test_five_samples_and_none_equal_eager(name: str) -> None:
    for batch, last in ((5, True), (0, True), (0, False)):
        assert_equals_eager(of_variant(name, torch.bfloat16, last, batch, (2, 1, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_dtype_and_layout_of_many_sizes_is_eagers(
    name: str, dtype: torch.dtype, layout: str
) -> None:
    last, sizes = LAYOUTS[layout], list(itertools.product(BATCHES, CHANNELS, [*PIXELS, (3, 5)]))
    for batch, channels, pixels in random.Random(f"{name} {dtype} {layout}").sample(sizes, 3):
        arguments = of_variant(name, dtype, last, batch, (channels, *pixels))
        assert_equals_eager(arguments, offset=batch % 4)


@pytest.mark.parametrize(
    ("channels", "pixels"),
    [
        # Fifteen pixels fill a program; the second channel's begin three early, and need another.
        *[(2, (3, 5)), (3, (7, 7)), (4, (2, 2)), (5, (1, 2)), (8, (1, 1))],
        *[pytest.param(*c, marks=pytest.mark.slow) for c in itertools.product(CHANNELS, PIXELS)],
    ],
)
def test_noise_belongs_to_the_element_in_either_layout(
    channels: int, pixels: tuple[int, int]
) -> None:
    x, seeds, row = torch.zeros(1, channels, *pixels), torch.tensor([2**40 + channels]), 20
    z = torch.from_numpy(normals(seeds.numpy(), torch.tensor([row]).numpy(), x.numel(), STEP))
    expected = (z * TABLE[row, 5]).view(x.shape)
    for t in (x, x.contiguous(memory_format=torch.channels_last)):
        memory = Memory()
        with use("triton"):
            x_s, _ = fastddim.ddim_step(t, t, TABLE, row, seeds, out=memory.like(t), want_x0=False)
        assert torch.equal(x_s, expected)
        memory.check()


def assert_launch_equals_eager(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    layout: str,
    batch: int,
    shape: tuple[int, ...],
    fours: int,
    offset: int = 0,
) -> set[str]:
    """One launch of programs of so many fours. Returns what there was several of."""
    several: set[str] = set()

    def recorded(g: Any, **kind: bool) -> tuple[int, int]:
        quads, parts = block(g, **kind)
        if parts > 1:
            several.add("parts")
        if g.fours > quads * parts:
            several.add("blocks")
        return quads, parts

    block = launch._block
    monkeypatch.setattr(launch, "_LARGE", 0)
    monkeypatch.setattr(launch, "_INTERPRETED_FOURS", fours)
    monkeypatch.setattr(launch, "_block", recorded)
    variant = replace(VARIANTS[name], channels_last=LAYOUTS[layout])
    with use("triton"):
        expected, expected_x0 = by_reference(**step_arguments(variant, batch, shape=shape))
    arguments, memory = launch_arguments(variant, batch, shape=shape), Memory()
    for result in ("out", "x0", "next_input"):
        if arguments.get(result) is not None:
            arguments[result] = memory.like(arguments[result], offset)
    fastddim_kernels.ddim_step(**arguments)
    assert same(arguments["out"], expected)
    if arguments["x0"] is not None:
        assert same(arguments["x0"], expected_x0)
    if "next_input" in arguments:
        assert_rounded(arguments["next_input"], arguments["out"])
    memory.check()
    return several


# Programs of several parts, samples of several programs, channels that begin inside a four.
SEVERAL = [
    ("epsilon philox rows x0", "contiguous", 1, (4, 5, 4)),
    ("epsilon odd", "contiguous", 2, (3, 5, 5)),
    ("epsilon odd philox", "contiguous", 1, (3, 5, 5)),
    ("guidance philox threshold", "contiguous", 1, (4, 4, 5)),
    ("guidance philox bf16 clip next", "contiguous", 2, (4, 3, 7)),
    ("epsilon last philox", "last", 1, (4, 9, 8)),
    ("learned last rgb", "last", 1, (2, 5, 13)),
    ("learned last", "last", 1, (5, 5, 13)),
    ("epsilon last philox odd", "last", 1, (2, 5, 7)),
    ("epsilon philox last mixed rgb", "last", 1, (5, 6, 6)),
]


@pytest.mark.parametrize(("name", "layout", "batch", "shape"), SEVERAL)
def test_several_parts_and_blocks_equal_eager(
    monkeypatch: pytest.MonkeyPatch, name: str, layout: str, batch: int, shape: tuple[int, ...]
) -> None:
    found = assert_launch_equals_eager(monkeypatch, name, layout, batch, shape, fours=4, offset=1)
    assert found == {"parts", "blocks"}


def test_one_part_in_several_blocks_equals_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("epsilon x0 clip", (4, 5, 7)),
        ("learned last", (8, 6, 6)),
        ("learned last rgb", (3, 6, 6)),
        ("epsilon last philox rgb", (3, 4, 6)),
        ("epsilon mixed bf16", (16, 5, 4)),
        ("epsilon mixed rgb", (2, 5, 4)),
    ]
    for name, shape in shapes:
        layout = "last" if VARIANTS[name].channels_last else "contiguous"
        found = assert_launch_equals_eager(monkeypatch, name, layout, 1, shape, 4, offset=1)
        assert found == {"blocks"}, name


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("number", "name"), NUMBERED, ids=VARIANTS)
def test_every_variant_in_several_parts_and_blocks_equals_eager(
    monkeypatch: pytest.MonkeyPatch, number: int, name: str, layout: str
) -> None:
    shape = (CHANNELS[number % 7], 9 - number % 2, 8)
    for fours in (4, 8):
        found = assert_launch_equals_eager(monkeypatch, name, layout, 2, shape, fours, number % 4)
        assert found or shape[0] < 3


@pytest.mark.parametrize(
    "name",
    [
        "guidance bf16 next",
        "learned last rgb",
        "epsilon last philox",
        "epsilon mixed bf16",
        "epsilon philox last mixed rgb",
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_copied_on_the_way_to_the_kernel(name: str, layout: str) -> None:
    handed: dict[str, Any] = {}

    def launch(*tensors: Any) -> None:
        handed.update(zip(GIVEN, tensors, strict=True))

    arguments = of_variant(name, torch.bfloat16, LAYOUTS[layout], 2, (4, 3, 5))
    with instead(replace(on_triton.BACKEND, name="recorder", bind=lambda *_: launch)):
        fastddim.ddim_step(**arguments)
    for argument, tensor in arguments.items():
        if isinstance(tensor, Tensor):
            assert handed[argument].data_ptr() == tensor.data_ptr(), argument


@pytest.mark.parametrize("state", LAYOUTS)
@pytest.mark.parametrize("output", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_between_model_calls_in_any_pair_of_layouts(
    state: str, output: str, dtype: torch.dtype
) -> None:
    shape, steps = (2, 3, 6, 4), 5

    def laid_out(tensor: Tensor, layout: str) -> Tensor:
        return tensor.contiguous(
            memory_format=torch.channels_last if LAYOUTS[layout] else torch.contiguous_format
        )

    returned = laid_out(randn(*shape), output).to(dtype)
    launches: list[int] = []

    def launch(x: Tensor, output: Tensor, *_: Any) -> None:
        launches.append(output.data_ptr())

    class Inside(Tally):
        """Counts what the op itself dispatches, a copy of the model's output, say."""

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is not op.OP:
                return super().__torch_dispatch__(func, types, args, kwargs)
            with self:
                return op._ddim_step(*args)

    tally = Inside(returned.numel())
    calls: list[int] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        calls.append(tally.found["passes"])
        return returned

    ddim = fastddim.DDIM(steps, schedule=fastddim.NoiseSchedule.linear())
    with instead(replace(on_triton.BACKEND, name="recorder", bind=lambda *_: launch)), tally:
        ddim.sample(
            model, laid_out(randn(*shape), state), noise=torch.zeros(steps, *shape), dtype=dtype
        )
    assert launches == [returned.data_ptr()] * steps
    # The launch itself is no operation of PyTorch's: all that is counted would be passes beside it.
    assert [after - before for before, after in itertools.pairwise(calls)] == [0] * (steps - 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_output_beside_something_else_equals_eager(layout: str) -> None:
    # Samples of a multiple of four elements, but not apart by one; and of the next input too.
    arguments = of_variant("guidance bf16 next", torch.bfloat16, LAYOUTS[layout], 2, (4, 1, 3))
    order = [0, 2, 3, 1] if LAYOUTS[layout] else [0, 1, 2, 3]
    for extra in (1, None):
        for gap in (0, order.index(1)):
            output = laid(arguments["output"], order, gap, 1, extra)
            assert_equals_eager(arguments | {"output": output})


def laid(
    tensor: Tensor,
    order: list[int],
    gap: int | None = None,
    offset: int = 0,
    extra: int | None = None,
) -> Tensor:
    """The same values with the dimensions in this order in memory, which begins at ``offset``.

    Of the dimension at place ``gap`` in that order there is ``extra`` more, or twice as much, as
    in what ``[:, :C]`` and ``chunk(2)`` leave.
    """
    stride, strides = 1, [0] * len(order)
    for place in reversed(range(len(order))):
        size = tensor.shape[order[place]]
        strides[order[place]] = stride
        stride *= size if place != gap else size + (extra or size)
    whole = torch.full((offset + stride,), GUARD, dtype=tensor.dtype)
    return whole.as_strided(tensor.shape, strides, offset).copy_(tensor)


def check_drawn_step(data: st.DataObject) -> None:
    """Any shape, memory, dtypes and options, of the kernel and on the CPU."""

    def draw(name: str, *choices: Any) -> Any:
        return data.draw(st.sampled_from(choices), label=name)

    inner = st.lists(st.integers(1, 5), max_size=3)
    shape = (draw("batch", 1, 2, 3, 0), *data.draw(inner, label="inner"))
    batch, rank = shape[0], len(shape)
    kind = draw("noise", "none", "tensor", "counter")
    learned = rank > 2 and draw("learned", False, True)
    guidance = draw("guidance", None, None, 7.5, "scalar", "each", "apart")
    bound = draw("bound", None, 1.0, "scalar", "each", "apart")
    orders = [list(range(rank)), [0, *range(2, rank), 1][:rank], None]

    def memory(name: str) -> tuple[list[int], int | None, int, int | None]:
        order = draw(f"order of {name}", *orders)
        if order is None:
            order = data.draw(st.permutations(range(rank)), label="in full")
        gap = draw(f"gap of {name}", None, None, *range(rank))
        return order, gap, draw(f"offset of {name}", 0, 0, 1, 2, 3), draw("extra", None, 1)

    of_x = memory("x")

    def tensor(name: str, *size: int, seed: int) -> Tensor:
        as_x = name != "x" and draw(f"{name} as x", True, False)
        return laid(randn(*size, seed=seed), *(of_x if as_x or name == "x" else memory(name)))

    def of_samples(form: Any, values: Tensor) -> Any:
        if form == "scalar":
            return values[0].expand(batch) if batch and draw("expanded", False, True) else values[0]
        if form == "each":
            return values[:batch]
        return values.repeat_interleave(2)[: 2 * batch : 2] if form == "apart" else form

    dtype = draw("dtype", *DTYPES)
    said = (batch * (1 if guidance is None else 2), *shape[1:])
    if learned:
        said = (said[0], 2 * said[1], *said[2:])
    arguments: dict[str, Any] = {
        "x": tensor("x", *shape, seed=0),
        "output": tensor("output", *said, seed=1),
        "table": TABLE,
        "rows": draw("rows", 7, "tensor", "each"),
        "guidance": of_samples(guidance, torch.tensor([1.5, 0.0, -2.0])),
        "prediction": draw("prediction", *PREDICTIONS),
        "noise_first": draw("noise_first", True, False),
        "rederive": draw("rederive", False, True),
        "want_x0": draw("want_x0", True, False),
    }
    output = arguments["output"]
    # Halves are written where the float32 values lay, and so lie as those did.
    arguments["output"] = torch.empty_strided(output.shape, output.stride(), dtype=dtype).copy_(
        output
    )
    if learned and draw("cut", False, True):
        arguments["output"] = arguments["output"][:, : shape[1]]
    if arguments["rows"] == "tensor":
        arguments["rows"] = torch.tensor(49, dtype=torch.int32)
    elif arguments["rows"] == "each":
        arguments["rows"] = torch.tensor([40, 3, 49], dtype=torch.int32)[:batch]
    if bound is not None:
        name = "clip" if bound == 1.0 else "threshold"
        arguments[name] = of_samples(bound, torch.tensor([1.0, 0.3, 2.5]))
    if kind == "tensor":
        arguments["noise"] = tensor("noise", *shape, seed=2)
    if kind == "counter":
        seeds = torch.tensor([2**63 - 1, 0, 5, 2**32, 2**40, 1])
        arguments["seeds"] = seeds[:batch] if draw("seeds", 1, 2) == 1 else seeds[: 2 * batch : 2]
    if draw("out", False, True):
        arguments["out"] = tensor("out", *shape, seed=3)
    copies = draw("next inputs", 0, 1, 2)
    if copies:
        like = tensor("next_input", copies * batch, *shape[1:], seed=4)
        arguments["next_input"] = torch.empty_strided(
            like.shape, like.stride(), dtype=draw("next dtype", *DTYPES)
        )
    with pytest.MonkeyPatch.context() as patch:
        if draw("small blocks", False, False, True):
            patch.setattr(launch, "_LARGE", 0)
            patch.setattr(launch, "_INTERPRETED_FOURS", 4)
        forget()  # launches of larger blocks
        assert_equals_eager(arguments, draw("offset of results", 0, 1, 2, 3))


CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels": lambda t: t[:, 1:5],
    "every other channel": lambda t: t[:, ::2],
    "rows": lambda t: t[:, :4, 1:3],
    "every other row": lambda t: t[:, :4, ::2],
    "columns": lambda t: t[:, :4, :, :3],
    "every other column": lambda t: t[:, :4, :, 1::2],
    "one pixel for all": lambda t: t[:, :4, :1, :1].expand(-1, -1, 3, 5),
}


@pytest.mark.parametrize("cut", CUTS)
def test_cuts_of_a_channels_last_output_equal_eager(cut: str) -> None:
    last = torch.channels_last
    output = CUTS[cut](randn(2, 8, 4, 6, seed=1).contiguous(memory_format=last))
    x = randn(*output.shape).contiguous(memory_format=last)
    assert_equals_eager({"x": x, "output": output, "table": TABLE, "rows": 20})


@settings(max_examples=25, **DRAWN)
@given(data=st.data())
def test_any_call_equals_eager(data: st.DataObject) -> None:
    check_drawn_step(data)


@pytest.mark.slow
@settings(max_examples=500, **DRAWN)
@given(data=st.data())
def test_any_call_equals_eager_at_length(data: st.DataObject) -> None:
    check_drawn_step(data)


NAN, INF = float("nan"), float("inf")
SPECIAL = torch.tensor([NAN, INF, -INF, 3e38, 1e-44, 0.0, 1.0, -2.0])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter, on ±inf
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("of", ["noise", "guidance", "threshold", "seeds"])
def test_nan_and_infinity_come_out_as_eagers(of: str, prediction: str) -> None:
    x, output, third = (t.flatten() for t in torch.meshgrid([SPECIAL] * 3, indexing="ij"))
    weights = torch.tensor([NAN, INF, 0.0, -7.5])
    bounds = torch.tensor([NAN, INF, 3e38, 1e-44])
    batch = 1 if of == "seeds" else 4
    for n, rederive, row, dtype in ((512, False, 20, DTYPES[2]), (511, True, 49, DTYPES[1])):
        x_n, output_n, third_n = (t[:n].expand(batch, n).contiguous() for t in (x, output, third))
        arguments: dict[str, Any] = {"x": x_n, "output": output_n, "table": TABLE, "rows": row}
        if of == "noise":
            arguments |= {"noise": third_n, "noise_first": rederive}
        elif of == "guidance":
            arguments |= {"output": torch.cat([output_n, third_n]), "guidance": weights}
        elif of == "threshold":
            arguments |= {"threshold": bounds}
        else:
            arguments |= {"seeds": torch.arange(batch), "clip": 1.0}
        arguments["next_input"] = torch.empty(2 * batch, n, dtype=dtype)
        assert_equals_eager(arguments | {"prediction": prediction, "rederive": rederive})


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter, on overflow
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_next_input_is_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    # Halfway between two values of the dtype, beside it, subnormal, and where the largest end.
    high = torch.arange(0, 0x7F80, 7, dtype=torch.int32)[:, None] << 16
    low = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    bits = (high | torch.tensor(low, dtype=torch.int32)).flatten()
    fine = torch.arange(4096) * 2.0**-26
    ends = torch.tensor([65504.0, 65519.99, 65520.0, 65536.0, 3.3895e38, 3.3961e38, 3.4e38])
    nans = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF], dtype=torch.int32)
    values = torch.cat([bits.view(torch.float32), fine, ends, nans.view(torch.float32)])
    x_s = torch.cat([values, -values])[None]
    # x_s = 1·x0 + 0·ε, with ε = (0 − 0·x0)/1.
    table = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]])
    arguments = {"x": torch.zeros_like(x_s), "output": x_s, "prediction": "sample"}
    for copies in (1, 2):
        next_input = torch.empty(copies, x_s.numel(), dtype=dtype)
        assert_equals_eager(arguments | {"table": table, "rows": 0, "next_input": next_input})


FIFTY: dict[str, dict[str, Any]] = {
    "clip": {"guidance": 7.5, "clip": 0.8, "rederive": True},
    "threshold": {
        "guidance": torch.tensor([1.5, 7.5]),
        "threshold": torch.tensor([1.0, 1.3]),
        "prediction": "v",
    },
}


@pytest.mark.parametrize("bound", ["clip", pytest.param("threshold", marks=pytest.mark.slow)])
def test_fifty_guided_steps_with_a_learned_variance_equal_eager(bound: str) -> None:
    shape = (2, 3, 3, 4)

    def learned(x: Tensor, row: int) -> Tensor:
        both = torch.cat([model(x, row), model(x, row + 7)])
        return torch.cat([both, both.flip(0)], dim=1)

    for backend in BACKENDS:
        x = expected = randn(*shape)
        with use(backend):
            for row in range(len(TABLE)):
                z = randn(*shape, seed=row)
                options = {"noise": z, "noise_first": row % 2 == 0, **FIFTY[bound]}
                x, x0 = fastddim.ddim_step(x, learned(x, row), TABLE, row, **options)
                of_eager = by_reference(expected, learned(expected, row), TABLE, row, **options)
                expected = of_eager[0]
                assert x0 is not None
                assert torch.equal(x0, of_eager[1]), f"x0 at row {row}, {backend}"
                assert torch.equal(x, expected), f"x_s at row {row}, {backend}"
        assert x.isfinite().all()


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("torch", torch.bfloat16),
        ("numba", torch.float16),
        pytest.param("triton", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("triton", torch.float16, marks=pytest.mark.slow),
    ],
)
def test_guided_half_outputs_lose_nothing_to_eager(backend: str, dtype: torch.dtype) -> None:
    with use(backend):
        assert_half_outputs_lose_nothing_to_eager(dtype)


def assert_half_outputs_lose_nothing_to_eager(dtype: torch.dtype) -> None:
    x = eager = randn(2, 2, 4, 4).to(dtype).float()
    truth, w = x.double(), torch.tensor(7.5)
    next_input = torch.empty(4, 2, 4, 4, dtype=dtype)
    for row in range(len(TABLE)):
        said = torch.cat([model(truth, row), model(truth, row + 7)])
        output = torch.cat([said, -said], dim=1).to(dtype)
        x, _ = fastddim.ddim_step(x, output, TABLE, row, guidance=w, next_input=next_input)
        half, double = TABLE[row].to(dtype), TABLE[row].double()
        eager = reference.ddim_step(eager.to(dtype), output, half, guidance=w.to(dtype))[0]
        truth = reference.ddim_step(truth, output.double(), double, guidance=w.double())[0]
    error, eagers_own = (x - truth).abs().max(), (eager.double() - truth).abs().max()
    assert error <= EAGER_FACTOR * eagers_own + HALF_ATOL[dtype]
    assert error < 1e-3 * eagers_own, "float32 state: no error but its own rounding"
    # What the model is handed has been rounded once, from that state.
    for half in next_input.chunk(2):
        assert torch.equal(half, x.to(dtype))
