"""A bound step: whatever changes between its calls, each gives eager's bits; and who sees it."""

from __future__ import annotations

import functools
import gc
import importlib
import itertools
import os
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fastddim
from fastddim import DDIM
from fastddim.coefficients import PREDICTIONS
from fastddim.step import backends, bound, op, reference
from fastddim.step.backends import Fixed
from fastddim.step.bound import Bound
from fastddim.step.checked import BoundStep
from fastddim.step.philox import STEP
from tests.paths import ALL, CPU, forget, has_numba, here, instead, normal_, randn, use
from tests.processes import ran
from tests.refusals import refused

TABLE = torch.tensor(DDIM(50, eta=1.0).table)
OTHER = torch.tensor(DDIM(50, eta=0.5).table)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERY: list[dict[str, Any]] = [
    {"prediction": prediction, "clip": clip, "rederive": rederive, "noise_first": noise_first}
    for prediction, clip, rederive, noise_first in itertools.product(
        PREDICTIONS, (None, 0.8), (False, True), (True, False)
    )
]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "batch inside": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "slice": lambda t: torch.cat([t, t + 1], dim=-1)[..., : t.shape[-1]],
}


@pytest.fixture(autouse=True, params=CPU)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU's path that the test takes."""
    with use(request.param):
        yield str(request.param)


def by_reference(
    x: Tensor,
    output: Tensor,
    rows: Tensor | int,
    seeds: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    guidance: Tensor | float | None = None,
    threshold: Tensor | None = None,
    table: Tensor = TABLE,
    prediction: str = "epsilon",
    clip: float | None = None,
    rederive: bool = False,
    noise_first: bool = True,
) -> tuple[Tensor, Tensor]:
    """The step in eager float32, from what a bound step is called with."""
    batch, each = len(x), (-1, *[1] * (x.dim() - 1))

    def of_samples(value: Tensor | float | None) -> Tensor | None:
        if value is None:
            return None
        return torch.as_tensor(value, dtype=torch.float32).expand(batch).reshape(each)

    rows = torch.as_tensor(rows, dtype=torch.int32).expand(batch)
    if seeds is not None:
        noise = torch.full(x.shape, float("nan"))
        normal_(noise, seeds, rows, STEP)
    return reference.ddim_step(
        x,
        output.float(),
        table[rows.long()].view(*each, 7),
        noise,
        prediction,
        clip,
        noise_first,
        of_samples(guidance),
        of_samples(threshold),
        rederive,
    )


def assert_step(
    step: BoundStep,
    options: dict[str, Any],
    x: Tensor,
    output: Tensor,
    rows: Tensor | int,
    seeds: Tensor | None = None,
    *,
    table: Tensor = TABLE,
    **rest: Any,
) -> None:
    """One call gives eager's bits in all that it writes, and writes to nothing else."""
    written = {"want_x0", "out", "x0_out", "next_input"}
    of_eager = {name: value for name, value in rest.items() if name not in written}
    given = [t for t in (x, output, rows, seeds, table, *of_eager.values()) if torch.is_tensor(t)]
    before = [t.clone() for t in given]
    x_s, x0 = step(x, output, rows, seeds, **rest)
    expected, expected_x0 = by_reference(x, output, rows, seeds, table=table, **of_eager, **options)
    assert torch.equal(x_s, expected)
    assert (x0 is None) == (not rest.get("want_x0", True) and rest.get("x0_out") is None)
    assert x0 is None or torch.equal(x0, expected_x0)
    assert rest.get("out") is None or x_s is rest["out"]
    assert rest.get("x0_out") is None or x0 is rest["x0_out"]
    if rest.get("next_input") is not None:
        for half in rest["next_input"].split(max(len(x), 1)):
            assert torch.equal(half, expected.to(half.dtype))
    for tensor, value in zip(given, before, strict=True):
        assert torch.equal(tensor, value)


# What changes between calls of one step.


@pytest.mark.parametrize("options", EVERY, ids=lambda o: " ".join(map(str, o.values())))
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


@pytest.mark.parametrize("options", EVERY[::5], ids=lambda o: " ".join(map(str, o.values())))
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
    refused(lambda: fastddim.bind(TABLE[:, :6]), ValueError, "table must have shape (-1, 7)")
    refused(lambda: fastddim.bind(TABLE.double()), TypeError, "table must be float32")
    refused(lambda: fastddim.bind(TABLE, prediction="x"), ValueError, "prediction must be one of")
    refused(lambda: fastddim.bind(TABLE, clip=0), ValueError, "clip must be > 0, got 0")


# The launch is used again.


@pytest.mark.parametrize("whose", ["ddim_step", "bind", "Bound", "op"])
def test_calls_that_are_alike_are_bound_once(whose: str) -> None:
    binds: list[tuple[int, ...]] = []
    own = backends.backend("cpu")

    def bind(fixed: Fixed, x: Tensor, *rest: Any) -> Any:
        binds.append(tuple(x.shape))
        return own.bind(fixed, x, *rest)

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


# Threads, modes, processes.


@pytest.mark.parametrize("shape", [(1, 16, 7), (64, 3, 64, 64)], ids=["small", "large"])
@pytest.mark.parametrize("noisy", [False, True])
def test_many_threads_share_one_step(shape: tuple[int, ...], noisy: bool) -> None:
    threads, rounds = (8, 60) if len(shape) == 3 else (4, 3)
    step = fastddim.bind(TABLE, clip=1.0)
    seeds = torch.arange(shape[0]) if noisy else None
    states = [(randn(*shape, seed=i), randn(*shape, seed=i + 50)) for i in range(threads)]
    expected = [
        by_reference(x, output, row, seeds, clip=1.0) for row, (x, output) in enumerate(states)
    ]
    barrier, interval = threading.Barrier(threads), sys.getswitchinterval()

    def run(row: int) -> list[bool]:
        x, output = states[row]
        barrier.wait()
        found = []
        for k in range(rounds):
            if k % 3 == 2:  # of another layout, so that threads change what was last called
                some = slice(0, 1 + row % max(shape[0], 1))
                x_s, x0 = step(x[some], output[some], row, None if seeds is None else seeds[some])
            else:
                some = slice(None)
                x_s, x0 = step(x, output, row, seeds)
            assert x0 is not None
            found.append(torch.equal(x_s, expected[row][0][some]))
            found.append(torch.equal(x0, expected[row][1][some]))
        return found

    sys.setswitchinterval(5e-6)
    try:
        with ThreadPoolExecutor(threads) as pool:
            results = list(pool.map(run, range(threads)))
    finally:
        sys.setswitchinterval(interval)
    assert all(map(all, results))


MODES: list[type[AbstractContextManager[Any]]] = [
    nullcontext,
    torch.no_grad,
    torch.inference_mode,
]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 40_000)])
def test_calls_in_different_modes_share_a_step(
    order: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    step = fastddim.bind(TABLE)
    seeds, kept = torch.arange(2), torch.zeros(shape)
    for k in (*order, *order):
        with MODES[k]():
            x, output = randn(*shape, seed=k), randn(*shape, seed=k + 9)
            assert_step(step, {}, x, output, 3)
            assert_step(step, {}, x, output, 3, seeds)
            assert_step(step, {}, x, output, 3, noise=randn(*shape, seed=5), out=kept)
            x_s, x0 = step(x, output, 3)
            assert x0 is not None
            assert x_s.is_inference() == x0.is_inference() == (MODES[k] is torch.inference_mode)


def test_gradients_are_refused_and_where_there_are_none_taken() -> None:
    x = randn(2, 3)
    step = fastddim.bind(TABLE)
    step(x, x, 0)
    wants = x.clone().requires_grad_()
    for name in ("x", "output", "noise", "out", "next_input"):
        called: dict[str, Any] = {"x": x, "output": x, "rows": 0, name: wants}
        refused(partial(step, **called), ValueError, f"{name} requires grad")
    with torch.no_grad():
        found = step(wants, wants, 0)[0]
        assert not found.requires_grad
    assert torch.equal(found, by_reference(x, x, 0)[0])
    refused(lambda: step(wants, x, 0), ValueError, "x requires grad")
    weight = torch.nn.Parameter(x.clone())
    with torch.no_grad():
        assert torch.equal(step(weight, x, 0)[0], found)
    refused(lambda: step(weight, x, 0), ValueError, "x requires grad")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, of its own
def test_transforms_are_refused_and_leave_nothing_behind() -> None:
    x = randn(2, 3)
    step = fastddim.bind(TABLE)
    expected = step(x, x, 0)[0]

    def first(s: Tensor) -> Tensor:
        return step(s * x, x, 0)[0]

    said = "x is transformed by torch.func or carries a forward derivative"
    one = torch.tensor(1.0)
    refused(lambda: torch.func.jvp(first, (one,), (one,)), ValueError, said)
    refused(lambda: torch.func.vmap(first)(torch.ones(2)), ValueError, said)
    refused(lambda: torch.func.grad(lambda s: first(s).sum())(one), ValueError, said)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.clone(), torch.ones_like(x))
        refused(lambda: step(dual, x, 0), ValueError, said)
        # What carries none is a constant here as anywhere.
        assert torch.equal(step(x, x, 0)[0], expected)
    assert torch.equal(step(x, x, 0)[0], expected)


FORKED = """
import os, sys, warnings, torch, fastddim, numpy as np
warnings.simplefilter("ignore")  # Python warns of a fork beside threads, and rightly
torch.set_num_threads(2)
table = torch.tensor(fastddim.DDIM(5, eta=1.0).table)
with fastddim.using({name!r}):
    step = fastddim.bind(table)
for n in (7, {n}):
    x, seeds, out = torch.full((1, n), 0.5), torch.arange(1), torch.empty(1, n)
    pairs = [(step(x, x, 2, s)[0].numpy().copy(), s) for s in (None, seeds)]
    pid = os.fork()
    if pid == 0:
        same = all(np.array_equal(step(x, x, 2, s, out=out)[0].numpy(), e) for e, s in pairs)
        os._exit(0 if same else 1)
    print(os.waitpid(pid, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_uses_its_parents_step(backend: str) -> None:
    code = FORKED.format(name=backend, n=1 << 19)
    done = ran(code, numba=has_numba())
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "0"]


def test_a_bound_step_keeps_the_backend_it_was_bound_with(backend: str) -> None:
    x, seeds = randn(2, 300), torch.arange(2)
    step, other = fastddim.bind(TABLE), "triton" if backend == "torch" else "torch"
    with backends.again(None):
        unchosen = fastddim.bind(TABLE)
        own = backends.backend("cpu").name
    taken: list[str] = []

    def counting(name: str) -> backends.Backend:
        def bind(*given: Any) -> Any:
            launch = there.bind(*given)

            def counted(*given: Any) -> None:
                taken.append(name)
                launch(*given)

            return counted

        there = backends.backend("cpu", name)
        return replace(there, bind=bind)

    with pytest.MonkeyPatch.context() as patch:
        for name in here(*ALL):
            module = importlib.import_module(backends.TABLE[name].module)
            patch.setattr(module, "BACKEND", counting(name))
        forget()
        with use(other):
            for _ in range(2):  # bound, and again
                step(x, x, 0, seeds)
                unchosen(x, x, 0, seeds)
            for seen in (Listing(), torch.profiler.profile()):
                with seen:
                    step(x, x, 0, seeds)
                    unchosen(x, x, 0, seeds)
            step(x.as_subclass(Wrapped), x, 0, seeds)
            fastddim.ddim_step(x, x, TABLE, 0, seeds)
        forget()
    assert taken == [backend, own] * 4 + [backend, other]


# Who sees a step.


@functools.cache
def bound_by(chosen: str | None) -> BoundStep:
    """One step for all tests of a backend."""
    assert chosen == backends.chosen()
    return fastddim.bind(TABLE, clip=1.0)


def by_function(x: Tensor, output: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor | None]:
    return fastddim.ddim_step(x, output, TABLE, 3, seeds, clip=1.0)


def by_bound_step(x: Tensor, output: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor | None]:
    return bound_by(backends.chosen())(x, output, 3, seeds)


WAYS = [by_function, by_bound_step]


@pytest.fixture
def _fresh_compiler() -> None:
    """Nothing compiled by another test is left to be found."""
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("way", WAYS)
def test_torch_compile_traces_the_op(way: Any) -> None:
    seeds = torch.tensor([1, 2**40])
    seen: list[Any] = []
    if way is by_bound_step:
        step = fastddim.bind(TABLE, clip=1.0)
        way = lambda x, output, seeds: step(x, output, 3, seeds)  # noqa: E731

    def listing(module: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(node.target for node in module.graph.nodes)
        return module

    def called(x: Tensor, output: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor | None]:
        x_s, x0 = way(2 * x, output, seeds)
        return x_s + 1, x0

    listed = torch.compile(called, fullgraph=True, backend=listing)
    compiled = torch.compile(called, fullgraph=True, backend="aot_eager")
    for k in range(3):
        # Shapes change, and a call that is not traced comes between.
        x, output = randn(2, 3 + k, 4, seed=k), randn(2, 3 + k, 4, seed=k + 9)
        expected = called(x, output, seeds)
        for found in (compiled(x, output, seeds), listed(x, output, seeds)):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert op.OP in seen or torch.ops.fastddim.ddim_step in seen


@pytest.mark.parametrize("way", WAYS)
def test_make_fx_traces_the_op(way: Any) -> None:
    x, output, seeds = randn(2, 3, 4), randn(2, 3, 4, seed=1), torch.arange(2)
    way(x, output, seeds)
    traced = make_fx(way)(x, output, seeds)
    assert [node.target for node in traced.graph.nodes].count(op.OP) == 1
    other = randn(2, 3, 4, seed=2)
    found, expected = traced(other, output, seeds), way(other, output, seeds)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_fake_tensors_have_the_shapes_of_real_ones(way: Any) -> None:
    x, seeds = randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last), torch.arange(2)
    way(x, x, seeds)  # the real step is remembered, and must not be taken
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        x_s, x0 = way(fake, fake.bfloat16(), mode.from_tensor(seeds))
    assert type(x_s) is type(x0) is type(fake)
    assert x_s.shape == x.shape
    assert x_s.stride() == x.stride()
    assert torch.equal(way(x, x, seeds)[0], by_reference(x, x, 3, seeds, clip=1.0)[0])


class Listing(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", WAYS)
def test_a_dispatch_mode_sees_the_op_and_not_what_it_does(way: Any) -> None:
    x, seeds = randn(2, 3, 4), torch.arange(2)
    expected = way(x, x, seeds)
    with Listing() as listing:
        found = way(x, x, seeds)
    assert listing.seen.count(op.OP) == 1
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    listing.seen.clear()
    way(x, x, seeds)
    assert not listing.seen


class Wrapped(torch.Tensor):
    """A tensor subclass, which may be anything: the op is dispatched to it."""

    seen: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("way", WAYS)
def test_a_subclass_of_tensor_sees_the_op(way: Any) -> None:
    x, seeds = randn(2, 3, 4), torch.arange(2)
    expected = way(x, x, seeds)[0]
    Wrapped.seen.clear()
    for _ in range(2):
        found = way(x.as_subclass(Wrapped), x, seeds)[0]
        assert torch.equal(found.as_subclass(torch.Tensor), expected)
    assert Wrapped.seen.count(op.OP) == 2


@pytest.mark.parametrize("way", WAYS)
def test_the_profiler_sees_the_op(way: Any) -> None:
    x, seeds = randn(2, 3, 4), torch.arange(2)
    expected = way(x, x, seeds)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        found = way(x, x, seeds)
    names = [event.name for event in profiler.events() or ()]
    assert names.count("fastddim::ddim_step") == 1
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_versions_are_bumped_for_outputs_that_a_caller_gave() -> None:
    step = fastddim.bind(TABLE)
    x, output = randn(2, 3), randn(2, 3, seed=1)
    for _ in range(2):
        out, x0, after = torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(4, 3).half()
        step(x, output, 0, out=out, x0_out=x0, next_input=after)
        assert all(t._version > 0 for t in (out, x0, after))
        assert x._version == output._version == TABLE._version == 0


@pytest.mark.parametrize("name", [name for name in ALL if name != "numba"])
def test_opcheck_of_a_step_that_was_bound(name: str) -> None:
    x, output, rows = randn(2, 3, 4), randn(2, 3, 4, seed=1), torch.tensor([3, 40]).int()
    with use(name):
        for seeds in (None, torch.arange(2)):
            given = x, output, TABLE, rows, seeds, None, None, None, 1, True, 0.7, True
            op.OP(*given, torch.zeros_like(x), torch.zeros_like(x), None)
            torch.library.opcheck(op.OP, (*given, torch.zeros_like(x), torch.zeros_like(x), None))
