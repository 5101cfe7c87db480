"""Any drawn call, special values, rounding and trajectories of the variants equal eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastddim
from fastddim.coefficients import PREDICTIONS
from fastddim.step import reference
from fastddim_kernels import geometry
from tests.eager import (
    BACKENDS,
    DTYPES,
    GUARD,
    LAYOUTS,
    assert_equals_eager,
    by_reference,
    of_variant,
)
from tests.paths import forget, use
from tests.steps import DRAWN, TABLE, model, randn
from tests.tolerances import EAGER_FACTOR, HALF_ATOL


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
        "want_x0": draw("want_x0", True, False),
    }
    arguments[draw("ε by", "rederive", "posterior")] = draw("ε anew", False, True)
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
            patch.setattr(geometry, "LARGE", 0)
            patch.setattr(geometry, "INTERPRETED_FOURS", 4)
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
@settings(max_examples=250, **DRAWN)
@given(data=st.data())
def test_any_call_equals_eager_at_length(data: st.DataObject) -> None:
    check_drawn_step(data)


NAN, INF = float("nan"), float("inf")


SPECIAL = torch.tensor([NAN, INF, -INF, 3e38, 1e-44, 0.0, 1.0, -2.0])


@pytest.mark.one_in(4)
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


@pytest.mark.slow
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
