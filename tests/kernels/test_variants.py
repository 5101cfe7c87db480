"""Every way of running a step, by the kernel and on the CPU, equals eager PyTorch: not close."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastddim
import fastddim_kernels
from benchmarks.counts import Tally
from benchmarks.variants import VARIANTS, launch_arguments, step_arguments
from fastddim.step import on_triton, op
from fastddim.step.philox import STEP_STREAM, normals
from fastddim_kernels import geometry
from tests.cases import some
from tests.eager import (
    DTYPES,
    LAYOUTS,
    Memory,
    assert_equals_eager,
    assert_rounded,
    by_reference,
    of_variant,
)
from tests.paths import instead, use
from tests.steps import TABLE, randn, same

# Fours that are full and not, channels in one vector, in one program and in several.
CHANNELS = [1, 2, 3, 4, 5, 8, 16]


PIXELS = [(1, 1), (1, 2), (3, 1), (2, 2), (1, 5), (7, 7), (8, 8)]


BATCHES = [2, 1, 5, 0]


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
    "history",
]
"""What a launch is called with."""


NUMBERED = list(enumerate(VARIANTS))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("number", "name"), some(NUMBERED, 3), ids=VARIANTS)
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
    for batch, channels, pixels in random.Random(f"{name} {dtype} {layout}").sample(sizes, 1):
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
    z = torch.from_numpy(
        normals(seeds.numpy(), torch.tensor([row]).numpy(), x.numel(), STEP_STREAM)
    )
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
    least: int = 1,
) -> set[str]:
    """One launch of programs of so many fours, and of ``least`` parts or more.

    Returns what there was several of.
    """
    several: set[str] = set()

    def recorded(g: Any, **kind: bool) -> tuple[int, int]:
        quads, parts = block(g, **kind)
        parts = max(parts, least)
        if parts > 1:
            several.add("parts")
        if g.fours > quads * parts:
            several.add("blocks")
        return quads, parts

    block = geometry.block_of
    monkeypatch.setattr(geometry, "LARGE", 0)
    monkeypatch.setattr(geometry, "INTERPRETED_FOURS", fours)
    monkeypatch.setattr(geometry, "block_of", recorded)
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
    ("epsilon odd philox", "contiguous", 1, (3, 5, 5)),
    ("guidance philox threshold", "contiguous", 1, (4, 4, 5)),
    ("guidance philox bf16 clip next", "contiguous", 2, (4, 3, 7)),
    ("epsilon last philox", "last", 1, (4, 9, 8)),
    ("learned last rgb", "last", 1, (2, 5, 13)),
    ("learned last", "last", 1, (5, 5, 13)),
    ("epsilon last philox odd", "last", 1, (2, 5, 7)),
    ("epsilon philox last mixed rgb", "last", 1, (5, 6, 6)),
    ("epsilon philox order 2", "contiguous", 1, (4, 5, 4)),
]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("name", "layout", "batch", "shape"), some(SEVERAL, 4))
def test_several_parts_and_blocks_equal_eager(
    monkeypatch: pytest.MonkeyPatch, name: str, layout: str, batch: int, shape: tuple[int, ...]
) -> None:
    found = assert_launch_equals_eager(monkeypatch, name, layout, batch, shape, 4, 1, least=2)
    assert found == {"parts", "blocks"}


def test_one_part_in_several_blocks_equals_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("epsilon x0 clip", (4, 5, 7)),
        ("epsilon odd", (3, 5, 5)),
        ("learned last", (8, 6, 6)),
        ("learned last rgb", (3, 6, 6)),
        ("epsilon last philox rgb", (3, 4, 6)),
        ("epsilon mixed bf16", (16, 5, 4)),
        ("epsilon mixed rgb", (2, 5, 4)),
        ("v bf16 order 2 next", (4, 5, 7)),
        ("epsilon philox rows x0", (4, 5, 4)),
        ("epsilon last philox", (4, 9, 8)),
        ("epsilon philox order 2", (4, 5, 4)),
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
    fours = 8 if (number + LAYOUTS[layout]) % 2 else 4
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
        "epsilon philox last order 2",
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
