"""What is remembered between calls never shows: in modes, devices, graphs, kinds of tensor."""

from __future__ import annotations

import gc
import textwrap
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastddim
from fastddim import DDIM, ddim_step
from fastddim.dropins._shared import Buffers
from tests.paths import CPU, has_numba, use
from tests.processes import ran
from tests.tape import Tape

X, OUTPUT = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
BOTH = torch.cat([OUTPUT, -OUTPUT])


def table(steps: int = 4) -> Tensor:
    return torch.tensor(DDIM(steps, eta=1.0).table)


def halved(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
    return x * 0.5


def last_of(code: str, numba: bool = True) -> str:
    """What a process of its own prints; its exit status if it fails."""
    start = "import os, torch, fastddim\n"
    done = ran(start + textwrap.dedent(code), strict=False, numba=numba and has_numba())
    return done.stdout.strip() if done.returncode == 0 else f"exit {done.returncode}"


WRAPPER = """
    from torch.utils._pytree import tree_map
    class W(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            made = torch.Tensor._make_wrapper_subclass(
                cls, inner.size(), strides=inner.stride(), dtype=inner.dtype, device=inner.device)
            made.inner = inner
            return made
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            bare = lambda t: t.inner if isinstance(t, W) else t
            return func(*tree_map(bare, args), **tree_map(bare, kwargs or {}))
    x, o, table = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.rand(4, 7) + 0.5
"""


def test_a_number_for_guidance_stays_where_a_graph_reads_it() -> None:
    """A graph that reads the number w from memory keeps that memory."""

    def body() -> Tensor:
        return ddim_step(X, BOTH, coefficients, 1, guidance=7.5)[0]

    coefficients = table()
    body()  # the warm-up
    tape = Tape()
    with tape:
        body()
    ddim_step(X, BOTH, coefficients, 1, guidance=3.0)
    gc.collect()
    assert tape.freed == []


def test_the_torch_backend_samples_on_one_device_after_another() -> None:
    """A launch that was bound on one device is not another's."""
    with fastddim.using("torch"):
        for device in ("cpu", "meta"):
            assert DDIM(4).sample(halved, X.to(device)).device.type == device


@pytest.mark.slow
def test_a_fake_step_leaves_no_guidance_behind() -> None:
    """A fake tensor has the address 0, which stands for no guidance."""
    printed = last_of(
        """
        from torch._subclasses import FakeTensorMode
        x, o, table = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.rand(4, 7) + 0.5
        wanted = fastddim.ddim_step(x, o, table, 1, guidance=torch.tensor(3.0))[0]
        fastddim.ddim_step(x, o, table, 1, guidance=2.0)
        with FakeTensorMode() as mode:
            f = mode.from_tensor
            fastddim.ddim_step(f(x), f(o), f(table), 1, guidance=3.0)
        print(torch.equal(fastddim.ddim_step(x, o, table, 1, guidance=3.0)[0], wanted))
        """
    )
    assert printed == "True"


@pytest.mark.slow
def test_fake_and_real_samples_leave_nothing_to_each_other() -> None:
    """A table that a mode has made is not kept for steps outside of it."""
    printed = last_of(
        """
        from torch._subclasses import FakeTensorMode
        with FakeTensorMode():
            torch.empty(2) + 1  # what the mode imports is imported once
        ddim, halved = fastddim.DDIM(4), lambda x, t: x * 0.5
        def fake():
            with FakeTensorMode():
                ddim.sample(halved, torch.empty(2, 3, 4, 4))
        def real():
            ddim.sample(halved, torch.ones(2, 3, 4, 4))
        for first in (fake, real):
            if (child := os.fork()) == 0:
                for run in (first, fake, real):
                    run()
                os._exit(0)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    )
    assert printed.split() == ["0", "0"]


def test_noise_and_outputs_may_be_subclasses() -> None:
    """A wrapper has the address 0, which would stand for no noise, and be read as an output."""
    printed = last_of(
        WRAPPER
        + """
    noise = [torch.randn(2, 3, 4, 4) for _ in range(4)]
    ddim, halved = fastddim.DDIM(4, eta=1.0), lambda x, t: x * 0.5
    wanted = ddim.sample(halved, x, noise=noise)
    print(torch.equal(ddim.sample(halved, x, noise=[W(z) for z in noise]), wanted))
    wanted = ddim.sample(halved, x, seeds=[1, 2])
    for plain in (0, 2):  # A launch is kept from the second step on.
        kinds = iter([torch.Tensor.contiguous] * plain + [W] * 4)
        found = ddim.sample(lambda x, t: next(kinds)(x * 0.5), x, seeds=[1, 2])
        print(torch.equal(found, wanted))
        """
    )
    assert printed.split() == ["True"] * 3


def test_a_table_that_is_a_subclass() -> None:
    """A wrapper has the address 0, which would be read."""
    printed = last_of(
        WRAPPER
        + """
    wanted = fastddim.ddim_step(x, o, table, 1)[0]
    print(torch.equal(fastddim.ddim_step(x, o, W(table), 1)[0], wanted))
        """
    )
    assert printed == "True"


def test_an_output_that_is_a_negated_view() -> None:
    """The memory of a tensor that a bit negates holds the opposite values."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.complex(x * 0.1, x * 0.5).conj().imag

    x = torch.randn(5, 1, generator=torch.Generator().manual_seed(0))
    wanted = DDIM(4).sample(lambda x, t: model(x, t).resolve_neg(), x)
    assert torch.equal(DDIM(4).sample(model, x), wanted)


def test_an_output_may_lie_otherwise_at_each_step() -> None:
    layouts = iter([torch.channels_last, torch.contiguous_format] * 4)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return (x * 0.5).contiguous(memory_format=next(layouts))

    assert torch.equal(DDIM(8).sample(model, X), DDIM(8).sample(halved, X))


def test_an_output_of_efficient_zeros() -> None:
    """A tensor of zeros alone has no memory, and reading it would end the process."""
    printed = last_of(
        """
        model = lambda x, t: torch._efficientzerotensor(x.shape)
        print(fastddim.DDIM(4).sample(model, torch.ones(2, 3, 4, 4)).shape[0])
        """
    )
    assert printed == "2"


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_sees_the_step() -> None:
    """A trace that does not see the step would hold its result as a constant."""
    coefficients = table()

    def step(x: Tensor, output: Tensor) -> Tensor:
        return ddim_step(x, output, coefficients, 1)[0]

    traced: Any = torch.jit.trace(step, (X, OUTPUT), check_trace=False)
    assert torch.equal(traced(2 * X, OUTPUT), step(2 * X, OUTPUT))


@pytest.mark.slow
@pytest.mark.parametrize("numba", [True, False])
@pytest.mark.parametrize("warm", [True, False])
def test_a_sampler_inside_of_torch_compile(numba: bool, warm: bool) -> None:
    """torch.compile makes a symbol of the row's number, and traces numba's import where it can."""
    printed = last_of(
        f"""
        ddim, net = fastddim.DDIM(4, eta=1.0), torch.nn.Conv2d(3, 3, 1)
        sample = lambda x: ddim.sample(lambda x, t: net(x), x, seeds=[1, 2])
        x = torch.ones(2, 3, 4, 4)
        if {warm}:
            sample(x)
        print(torch.equal(torch.compile(sample, backend="eager")(x), sample(x)))
        """,
        numba=numba,
    )
    assert printed == "True"


@pytest.mark.filterwarnings("ignore")
def test_symbolic_shapes() -> None:
    """Sizes that are symbols have no hash."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def step(x: Tensor, output: Tensor, coefficients: Tensor) -> Tensor:
        return ddim_step(x, output, coefficients, 1)[0]

    made = make_fx(step, tracing_mode="symbolic")(X, OUTPUT, table())
    assert torch.equal(made(2 * X, OUTPUT, table()), step(2 * X, OUTPUT, table()))


def test_a_clip_that_is_a_tensor_is_read_each_time() -> None:
    """A tensor equals itself, whatever has been written into it since."""
    clip: Any = torch.tensor(1.0)
    ddim_step(10 * X, OUTPUT, table(), 1, clip=clip)
    clip.fill_(0.25)
    _, x0 = ddim_step(10 * X, OUTPUT, table(), 1, clip=clip)
    assert x0 is not None
    assert x0.abs().max() == 0.25


@pytest.mark.parametrize("lies", ["contiguous", "transposed"])
def test_a_table_is_freed_by_the_torch_backend(lies: str) -> None:
    """Factors that were views would hold their table, so that it would never be freed."""
    from fastddim.step import rows

    with fastddim.using("torch"):
        coefficients = table()
        if lies == "transposed":  # of which each call has a copy, and keeps it
            coefficients = coefficients.t().contiguous().t()
        before = len(rows._kept)
        for _ in range(10):
            ddim_step(X, OUTPUT, coefficients, 1)
        gone = weakref.ref(coefficients)
        del coefficients
        gc.collect()
    assert gone() is None
    assert len(rows._kept) == before


def test_a_loop_stays_with_its_backend_while_it_is_watched() -> None:
    """A loop that goes on under a profiler keeps its backend, and its noise its bits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))

    def begun() -> Any:
        with fastddim.using("torch"):
            steps = DDIM(4, eta=1.0).iterate(halved, x, seeds=[1, 2])
            next(steps)
        return steps

    *_, wanted = begun()
    steps = begun()
    with Watching():  # type: ignore[no-untyped-call]
        *_, found = steps
    assert torch.equal(found.x, wanted.x)


def test_two_threads_that_bind_at_once_count_far_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The array that another thread adds last may be shorter."""

    class Counted(list[Any]):
        def append(self, longer: Any) -> None:
            super().append(longer)
            # What a thread appends that had looked before; beyond it lies anything.
            super().append(np.concatenate([longer[:1024], np.full(9000, -7, np.int32)])[:1024])

    from fastddim.step import on_numba

    monkeypatch.setattr(on_numba, "_counted", Counted())
    x, coefficients = torch.randn(1, 70), torch.rand(5000, 7) + 0.5
    found, _ = fastddim.bind(coefficients)(x, x, 4000)
    wanted, _ = ddim_step(x, x, coefficients, torch.tensor(4000, dtype=torch.int32))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_a_drop_ins_samples_on_one_row_and_then_on_their_own(backend: str) -> None:
    """A launch for one row reads the first sample's row for all."""
    coefficients, buffers, x = table(), Buffers(), torch.randn(2, 3, 8, 8)
    with use(backend):
        for rows in (torch.tensor([1], dtype=torch.int32).expand(2), torch.tensor([1, 3]).int()):
            found, _ = buffers.stepped(coefficients, x, 0.1 * x, rows, checked=True)
            wanted, _ = ddim_step(x, 0.1 * x, coefficients, rows, noise_first=False)
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_a_drop_ins_output_with_a_variance_after_one_without(backend: str) -> None:
    """Both outputs of one sample may have the same strides."""
    coefficients, buffers, x = table(), Buffers(), torch.randn(1, 3, 8, 8)
    both = torch.randn(1, 6, 8, 8)
    with use(backend):
        for output in (both[:, :3], both):
            found, _ = buffers.stepped(coefficients, x, output, 1, checked=True)
            wanted, _ = ddim_step(x, both[:, :3].clone(), coefficients, 1)
            assert torch.equal(found, wanted)


def test_a_drop_ins_state_of_zeros_alone() -> None:
    """A tensor of zeros alone has no memory, and reading it would end the process."""
    printed = last_of(
        """
        from fastddim.dropins._shared import Buffers
        buffers, rows, output = Buffers(), torch.rand(4, 7) + 0.5, torch.randn(2, 3, 4, 4)
        for x in (torch.zeros(2, 3, 4, 4), torch._efficientzerotensor(2, 3, 4, 4)):
            found = buffers.stepped(rows, x, output, 1, checked=True)[0]
        wanted = fastddim.ddim_step(torch.zeros(2, 3, 4, 4), output, rows, 1)[0]
        print(torch.equal(found, wanted))
        """
    )
    assert printed == "True"


@pytest.mark.parametrize("name", ["noise", "guidance", "threshold"])
@pytest.mark.parametrize("backend", CPU)
def test_zeros_without_memory_are_read_as_zeros(backend: str, name: str) -> None:
    """Such a tensor lies as the one before, and its address is 0, which stands for None."""
    shape = X.shape if name == "noise" else X.shape[:1]
    output = OUTPUT.repeat(2, 1, 1, 1) if name == "guidance" else OUTPUT
    with use(backend):
        step: Any = fastddim.bind(table())
        without_memory = torch._efficientzerotensor  # pyright: ignore[reportPrivateImportUsage]
        kinds: list[Any] = [torch.ones, without_memory, torch.zeros]
        _, found, expected = (step(X, output, 1, **{name: made(shape)})[0] for made in kinds)
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
