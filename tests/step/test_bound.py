"""A bound step: whatever changes between its calls, each gives eager's bits; and who sees it."""

from __future__ import annotations

import gc
import itertools
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastddim
from fastddim import DDIM
from fastddim.coefficients import PREDICTIONS
from fastddim.step import backends, bound, op
from fastddim.step.backends import Fixed
from fastddim.step.bound import Bound
from tests.paths import instead, randn
from tests.refusals import refused
from tests.step.bound_steps import TABLE, assert_step, backend, by_reference

__all__ = ["backend"]


OTHER = torch.tensor(DDIM(50, eta=0.5).table)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


EVERY: list[dict[str, Any]] = [
    {"prediction": prediction, "clip": clip, "noise_first": noise_first, **sum_of}
    for prediction, clip, sum_of, noise_first in itertools.product(
        PREDICTIONS,
        (None, 0.8),
        ({"rederive": False}, {"rederive": True}, {"posterior": True}),
        (True, False),
    )
]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "batch inside": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "slice": lambda t: torch.cat([t, t + 1], dim=-1)[..., : t.shape[-1]],
}


def named(options: dict[str, Any]) -> str:
    return " ".join(map(str, options.values()))


# What changes between calls of one step.


@pytest.mark.one_in(12)
@pytest.mark.parametrize("options", EVERY, ids=named)
def test_one_step_for_every_kind_of_call(options: dict[str, Any]) -> None:
    """Shapes, layouts, dtypes and what there is change from call to call, and back again."""
    step = fastddim.bind(TABLE, **options)
    each, seeds = torch.tensor([3, 49], dtype=torch.int32), torch.tensor([7, 2**40])
    calls: list[tuple[Any, ...]] = []
    turn, forms = EVERY.index(options), (3, each, torch.tensor(20, dtype=torch.int32))
    for number, (i, j) in enumerate(itertools.product(range(len(LAYOUTS)), range(3))):
        # Any two of layout, rows, dtype and w meet in each step, and any three in three steps.
        layout, rows, dtype = list(LAYOUTS)[i], forms[j], DTYPES[(i + j + turn) % 3]
        x, z, pair = (
            LAYOUTS[layout](randn(n, 3, 4, 5, seed=number + n * k)) for k, n in enumerate((2, 2, 4))
        )
        pair, output = pair.to(dtype), pair[:2].to(dtype)
        w = (7.5, torch.tensor(7.5), torch.tensor([1.5, 7.5]))[(i + 2 * j) % 3]
        calls += [
            (x, output, rows, None, {}),
            (x, output, rows, seeds, {"next_input": torch.empty_like(x, dtype=dtype)}),
            (x, output, rows, None, {"noise": z, "want_x0": False}),
            (x, pair, rows, seeds, {"guidance": w, "out": torch.empty_like(x)}),
            (x, pair, rows, None, {"guidance": w, "next_input": torch.empty_like(pair)}),
        ]
        if options["clip"] is None:
            s = {"threshold": torch.tensor([1.0, 1.7]), "x0_out": torch.empty_like(z)}
            calls.append((x, output, rows, seeds, s))
    for x, output, rows, seed, rest in [*calls, *calls[::-1]]:
        assert_step(step, options, x, output, rows, seed, **rest)


@pytest.mark.one_in(10)
@pytest.mark.parametrize("options", EVERY[::5], ids=named)
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_calls_of_one_step_equal_the_reference(
    options: dict[str, Any], data: st.DataObject
) -> None:
    step = fastddim.bind(TABLE, **options)

    def draw(name: str, *choices: Any) -> Any:
        return data.draw(st.sampled_from(choices), label=name)

    for number in range(data.draw(st.integers(2, 6), label="calls")):
        shape = (draw("batch", 1, 2, 3), *draw("sample", (1, 2, 2), (3, 4, 5), (2, 9, 8)))
        batch = shape[0]
        guided = draw("guidance", None, 2.5, "scalar", "each")
        made = {
            name: LAYOUTS[draw(name, *LAYOUTS)](randn(n * batch, *shape[1:], seed=number + k))
            for k, (name, n) in enumerate({"x": 1, "output": 1 if guided is None else 2}.items())
        }
        rows = draw("rows", 7, "scalar", "each")
        each = torch.tensor([40, 3, 49], dtype=torch.int32)
        on: dict[Any, Tensor | int] = {7: 7, "scalar": each[1], "each": each[:batch]}
        rest: dict[str, Any] = {"want_x0": draw("want_x0", True, False)}
        if guided is not None:
            w = torch.tensor([1.5, 0.0, -2.0])
            rest["guidance"] = {"scalar": w[0], "each": w[:batch]}.get(guided, guided)
        if options["clip"] is None and draw("threshold", False, True):
            rest["threshold"] = torch.tensor([1.0, 0.3, 2.5])[:batch]
        kind = draw("noise", "none", "tensor", "counter")
        if kind == "tensor":
            rest["noise"] = LAYOUTS[draw("of noise", *LAYOUTS)](randn(*shape, seed=number + 9))
        if draw("out", False, True):
            rest["out"] = LAYOUTS[draw("of out", *LAYOUTS)](torch.zeros(shape))
        copies = draw("next inputs", 0, 1, 2)
        if copies:
            like = torch.zeros(copies * batch, *shape[1:], dtype=draw("next dtype", *DTYPES))
            rest["next_input"] = LAYOUTS[draw("of next", *LAYOUTS)](like)
        assert_step(
            step,
            options,
            made["x"],
            made["output"].to(draw("dtype", *DTYPES)),
            on[rows],
            torch.tensor([2**63 - 1, 0, 5])[:batch] if kind == "counter" else None,
            **rest,
        )


@pytest.mark.parametrize("name", ["seeds", "noise", "guidance", "threshold"])
def test_an_unchecked_step_sees_how_an_argument_lies(name: str) -> None:
    step = Bound(backends.backend("cpu"), Fixed())
    x, both = randn(4, 3, 5), randn(8, 3, 5, seed=1)
    values = {"seeds": torch.arange(8), "noise": both.sin()}.get(name, torch.arange(1.0, 9.0))
    for argument in (values[::2].clone(), values[::2], None, values[::2]):
        output = both if name == "guidance" and argument is not None else both[:4]
        own: dict[str, Any] = dict.fromkeys(("seeds", "noise", "guidance", "threshold"))
        own[name] = argument
        out = torch.empty_like(x)
        step(x, output, TABLE, 3, **own, out=out, x0=None, next_input=None)
        assert torch.equal(out, by_reference(x, output, 3, **own)[0])


def test_an_unchecked_step_sees_how_a_result_lies() -> None:
    step = Bound(backends.backend("cpu"), Fixed())
    x, output = randn(4, 3, 5), randn(4, 3, 5, seed=1)
    nothing: dict[str, Any] = dict.fromkeys(("seeds", "noise", "guidance", "threshold"))
    x_s, predicted = by_reference(x, output, 3)
    for odd in ("", "out", "x0", "next_input", ""):
        results = {name: torch.empty(4, 3, 5) for name in ("out", "x0", "next_input")}
        if odd:
            results[odd] = torch.empty(5, 3, 4).transpose(0, 2)
        step(x, output, TABLE, 3, **nothing, **results)
        assert torch.equal(results["out"], x_s)
        assert torch.equal(results["x0"], predicted)
        assert torch.equal(results["next_input"], x_s)


def test_the_table_may_change_between_calls() -> None:
    """Its values, the memory it lies in, and in a call of ``ddim_step`` the tensor itself."""
    x, output, seeds = randn(2, 3, 5), randn(2, 3, 5, seed=1), torch.arange(2)
    table = TABLE.clone()
    step = fastddim.bind(table)
    each = torch.tensor([4, 30], dtype=torch.int32)
    forms: list[Tensor | int] = [4, each]
    for rows, of in itertools.product(forms, (None, seeds)):
        table.copy_(TABLE)
        assert_step(step, {}, x, output, rows, of)
        table.copy_(OTHER)
        assert_step(step, {}, x, output, rows, of, table=OTHER)
        table.data = TABLE.clone()
        assert_step(step, {}, x, output, rows, of)
        table.data = torch.cat([OTHER, TABLE], dim=1)[:, :7]  # of other strides
        assert_step(step, {}, x, output, rows, of, table=OTHER)
        table.data = OTHER.clone()[:40]  # of fewer rows
        assert_step(step, {}, x, output, rows, of, table=OTHER)
        with pytest.raises(ValueError, match=r"rows must be an integer in \[0, 39\], got 40"):
            step(x, output, 40, of)
        table.data = TABLE.clone()
    for other in (TABLE, OTHER, TABLE.clone(), OTHER.clone(), TABLE):
        found = fastddim.ddim_step(x, output, other, 4)[0]
        assert torch.equal(found, by_reference(x, output, 4, table=other)[0])
        del other
        gc.collect()


def test_a_table_that_takes_anothers_place_in_memory_is_seen() -> None:
    x, output = randn(2, 3, 5), randn(2, 3, 5, seed=1)
    for k in range(40):
        table = torch.tensor(DDIM(50, eta=k / 40).table)  # where the last one was, most likely
        found = fastddim.ddim_step(x, output, table, 4)[0]
        assert torch.equal(found, by_reference(x, output, 4, table=table)[0]), k


def test_refusals_come_in_a_later_call_too() -> None:
    x = randn(2, 3)
    step = fastddim.bind(TABLE)
    later: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"rows": 50}, ValueError, "rows must be an integer in [0, 49], got 50"),
        ({"rows": -1}, ValueError, "rows must be an integer in [0, 49], got -1"),
        ({"rows": True}, TypeError, "rows must be an integer in [0, 49], got True"),
        ({"rows": torch.tensor(50, dtype=torch.int32)}, ValueError, "rows must lie in [0, 50)"),
        ({"x": x.double()}, TypeError, "x must be float32, got float64"),
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"output": x[:1]}, ValueError, "output must have shape (2, 3), got (1, 3)"),
        ({"output": None}, TypeError, "output must be a tensor, got NoneType"),
        ({"seeds": torch.arange(3)}, ValueError, "seeds must have shape (2,), got (3,)"),
        ({"noise": x.half()}, TypeError, "noise must be float32, got float16"),
        ({"out": x.half()}, TypeError, "out must be float32, got float16"),
        ({"guidance": 2.0}, ValueError, "output must have shape (4, 3), got (2, 3)"),
        (
            {"guidance": float("nan"), "output": randn(4, 3)},
            ValueError,
            "guidance must be finite, got nan",
        ),
        ({"x": x.clone().requires_grad_()}, ValueError, "x requires grad"),
        ({"output": x.to("meta")}, ValueError, "output must be on cpu with x, got meta"),
    ]
    good: dict[str, Any] = {"x": x, "output": x, "rows": 0}
    step(torch.randn(2, 3), randn(4, 3), 0, guidance=2.0)
    for _ in range(2):
        for change, error, said in later:
            assert_step(step, {}, x, x, 0)
            refused(partial(step, **(good | change)), error, said)
    refused(lambda: fastddim.bind(TABLE.numpy()), TypeError, "table must be a tensor")  # type: ignore[arg-type]
    refused(lambda: fastddim.bind(TABLE[:, :6]), ValueError, "table must have shape (steps, 7)")
    refused(lambda: fastddim.bind(TABLE.double()), TypeError, "table must be float32")
    refused(lambda: fastddim.bind(TABLE, prediction="x"), ValueError, "prediction must be one of")
    refused(lambda: fastddim.bind(TABLE, clip=0), ValueError, "clip must be > 0, got 0")
    for name in ("rederive", "posterior", "noise_first"):
        for value in ("x", None, 2, x):
            bad: dict[str, Any] = {name: value}
            refused(partial(fastddim.bind, TABLE, **bad), TypeError, f"{name} must be True")
            refused(partial(fastddim.ddim_step, x, x, TABLE, 0, **bad), TypeError, name)


# The launch is used again.


@pytest.mark.parametrize("whose", ["ddim_step", "bind", "Bound", "op"])
def test_calls_that_are_alike_are_bound_once(whose: str) -> None:
    binds: list[tuple[int, ...]] = []
    own = backends.backend("cpu")

    def bind(fixed: Fixed, first: backends.StepArgs) -> Any:
        binds.append(tuple(first.x.shape))
        return own.bind(fixed, first)

    counting = replace(own, name="counting", bind=bind)
    with instead(counting):
        step, checked = Bound(counting, Fixed()), fastddim.bind(TABLE)

        def call(x: Tensor, row: int, table: Tensor) -> Tensor:
            if whose == "ddim_step":
                return fastddim.ddim_step(x, x, table, row)[0]
            if whose == "bind":
                return checked(x, x, row)[0]
            out, x0 = torch.empty_like(x), torch.empty_like(x)
            if whose == "Bound":
                step(x, x, table, row, None, None, None, None, out, x0, None)
            else:
                rows = torch.full((), row, dtype=torch.int32).expand(len(x))
                given = x, x, table, rows, None, None, None, None
                op.OP(*given, 0, True, None, False, out, x0, None)
            return out

        for k in range(12):
            x = randn(1 + k % 2, 3, 5, seed=k)
            table = TABLE.clone()
            expected = by_reference(x, x, k, table=table)[0]
            assert torch.equal(call(x, k, table), expected)
        assert binds == [(1, 3, 5), (2, 3, 5)]
        before = randn(1, 3, 5)
        for _ in range(3):
            call(before, 2, TABLE)
            call(randn(1, 3, 6), 2, TABLE)
        assert binds == [(1, 3, 5), (2, 3, 5), (1, 3, 6)]


def test_ever_new_shapes_do_not_fill_the_memory() -> None:
    step = fastddim.bind(TABLE)
    unchecked = Bound(backends.backend("cpu"), Fixed())

    def take(sizes: range) -> None:
        for n in sizes:
            x = torch.ones(1, n)
            step(x, x, 0)
            fastddim.ddim_step(x, x, TABLE, 0)
            unchecked(x, x, TABLE, 0, None, None, None, None, torch.empty_like(x), None, None)
            clipped: dict[str, Any] = {"clip": 1.0 + n}
            of_v: dict[str, Any] = clipped | {"prediction": "v"}
            for options in (clipped, of_v):
                fastddim.ddim_step(x, x, TABLE, 0, **options)

    take(range(1, 150))
    gc.collect()
    tracemalloc.start()
    try:
        take(range(150, 300))
        gc.collect()
        held = tracemalloc.get_traced_memory()[0]
        take(range(300, 600))
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - held
    finally:
        tracemalloc.stop()
    assert grown < 100_000
    assert len(step._step._launches) <= 64
    assert len(unchecked._launches) <= bound._MOST


def test_nothing_of_a_call_is_kept_alive() -> None:
    import weakref

    step = fastddim.bind(TABLE)
    x, output = randn(2, 3), randn(2, 3, seed=1)
    x_s, x0 = step(x, output, 0, noise=randn(2, 3))
    assert x0 is not None
    gone = [weakref.ref(t) for t in (x, output, x_s, x0)]
    del x, output, x_s, x0
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4
