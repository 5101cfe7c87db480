"""Threads, modes, processes and tracers of a bound step."""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fastddim
from fastddim.step import backends, op
from fastddim.step.checked import BoundStep
from tests.cases import some
from tests.paths import ALL, forget, has_numba, here, randn, use
from tests.processes import ran
from tests.refusals import refused
from tests.step.bound_steps import TABLE, assert_step, backend, by_reference

__all__ = ["backend"]


# Threads, modes, processes.


@pytest.mark.one_in(2)
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


@pytest.mark.one_in(2)
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


@pytest.mark.one_in(4)
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
    for names in [("out", "x0_out", "next_input"), ("out",), ("x0_out",), ("next_input",)] * 2:
        made = {"out": torch.zeros(2, 3), "x0_out": torch.zeros(2, 3)}
        made["next_input"] = torch.zeros(4, 3).half()
        given: dict[str, Any] = {name: made[name] for name in names}
        step(x, output, 0, **given)
        assert all(t._version > 0 for t in given.values()), names
        assert x._version == output._version == TABLE._version == 0


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", some([name for name in ALL if name != "numba"], 2))
def test_opcheck_of_a_step_that_was_bound(name: str) -> None:
    x, output, rows = randn(2, 3, 4), randn(2, 3, 4, seed=1), torch.tensor([3, 40]).int()
    with use(name):
        for seeds in (None, torch.arange(2)):
            given = x, output, TABLE, rows, seeds, None, None, None, 1, True, 0.7, True
            op.OP(*given, torch.zeros_like(x), torch.zeros_like(x), None)
            torch.library.opcheck(op.OP, (*given, torch.zeros_like(x), torch.zeros_like(x), None))
