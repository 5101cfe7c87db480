"""The step of order 2 on every CPU backend: the reference's bits, and the formula in float64."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastddim
from fastddim import NoiseSchedule, make_pairs, make_table
from fastddim.coefficients import PREDICTIONS, levels
from fastddim.step import backends, on_torch, op
from fastddim.step.backends import Backend, Fixed, Launch, StepArgs
from fastddim.step.bound import Bound
from tests.eager import by_reference
from tests.numpy_backend import BACKEND as NUMPY
from tests.paths import CPU, instead, use
from tests.refusals import refused
from tests.steps import randn, same

SCHEDULE, PAIRS = NoiseSchedule.linear(), make_pairs("uniform", 10, 1000)
TABLES = {eta: torch.tensor(make_table(SCHEDULE, PAIRS, eta, order=2)) for eta in (0.0, 1.0)}
FIRST, MIDDLE, LAST = 0, 4, 9  # κ is 0 in the first and the last row
TABLE = TABLES[1.0]


def on_any_device(fixed: Fixed, first: StepArgs) -> Launch:
    return partial(on_torch._by_reference, fixed)


OTHERS = {b.name: b for b in (NUMPY, Backend("any device", on_any_device, on_torch.normal_))}
"""The example of a backend, and the launch of the backend torch on devices other than a CPU."""


@pytest.fixture(autouse=True, params=[*CPU, *OTHERS])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend that takes the test's steps."""
    other = OTHERS.get(request.param)
    with use(request.param) if other is None else instead(other):
        yield str(request.param)


# Pairs of options.

FACTORS: dict[str, tuple[Any, ...]] = {
    "prediction": PREDICTIONS,
    "bound": (None, "clip", "threshold"),
    "rederive": (False, True, "posterior"),
    "guidance": (None, "number", "each"),
    "learned": (False, True),
    "noise": (None, "tensor", "seeds"),
    "noise_first": (False, True),
    "eta": (0.0, 1.0),
    "dtype": (torch.float32, torch.bfloat16),
    "next": (0, 1, 2),
    "layout": ("contiguous", "last", "strided"),
    "history_layout": ("contiguous", "last", "strided"),
    "rows": (FIRST, MIDDLE, "mixed"),
    "x0": ("new", "none", "history"),
    # Fewer elements than a pass of numba takes one by one, a chunk, and several blocks and tasks.
    "shape": ((3, 2, 3, 4), (3, 4, 6, 6), (2, 4, 64, 65)),
}


def drawn_cases(count: int) -> list[dict[str, Any]]:
    """Random cases: every pair of two options' values is in one of them."""
    draw = random.Random(1)
    return [{name: draw.choice(values) for name, values in FACTORS.items()} for _ in range(count)]


CASES = drawn_cases(100)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values, contiguous, channels last, or two elements apart."""
    if layout == "last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    return tensor


def call_of(case: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``ddim_step``. Samples on a row with κ = 0 have a history of NaN."""
    batch, channels, *size = shape = case["shape"]
    table = TABLES[case["eta"]]
    rows: int | Tensor = case["rows"] if case["rows"] != "mixed" else torch.tensor([0, 4, 9]).int()
    rows = rows[:batch] if isinstance(rows, Tensor) else rows
    history = randn(*shape, seed=2)
    history[table[rows, 7].expand(batch) == 0] = float("nan")
    halves, width = 1 + (case["guidance"] is not None), channels * (1 + case["learned"])
    output = laid_out(randn(halves * batch, width, *size, seed=1), case["layout"])
    weight = None if case["guidance"] is None else 2.5
    given = {
        "x": laid_out(randn(*shape), case["layout"]),
        "output": output.to(case["dtype"]),
        "table": table,
        "rows": rows,
        "history": laid_out(history, case["history_layout"]),
        "guidance": torch.linspace(1, 7, batch) if case["guidance"] == "each" else weight,
        "clip": 0.9 if case["bound"] == "clip" else None,
        "threshold": torch.linspace(1, 1.5, batch) if case["bound"] == "threshold" else None,
        "noise": laid_out(randn(*shape, seed=3), case["layout"]),
        "seeds": torch.arange(batch) + 2**40,
        "want_x0": case["x0"] != "none",
        "next_input": torch.empty(case["next"] * batch, *shape[1:], dtype=torch.bfloat16),
    }
    absent = {"noise", "seeds"} - {case["noise"] and case["noise"].replace("tensor", "noise")}
    given |= dict.fromkeys(absent)
    if not case["next"]:
        given["next_input"] = None
    given |= {"rederive": case["rederive"] is True, "posterior": case["rederive"] == "posterior"}
    return given | {name: case[name] for name in ("prediction", "noise_first")}


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_the_cases_hold_every_pair_of_options() -> None:
    for a, b in itertools.combinations(FACTORS, 2):
        found = {(case[a], case[b]) for case in CASES}
        assert found == set(itertools.product(FACTORS[a], FACTORS[b])), (a, b)


@pytest.mark.one_in(2)
def test_every_pair_of_options_equals_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_most", "_together"):  # as in a forked child: small batches fill several blocks
        monkeypatch.setattr(on_torch, name, lambda: on_torch.BLOCK)
    for case in CASES:
        given = call_of(case)
        expected, expected_x0 = by_reference(**given)
        assert expected.isfinite().all(), case
        kept = {name: t.clone() for name, t in given.items() if isinstance(t, Tensor)}
        own = given["history"] if case["x0"] == "history" else None
        x_s, x0 = fastddim.ddim_step(**given, x0_out=own)
        assert torch.equal(x_s, expected), case
        assert x_s.stride() == torch.empty_like(given["x"]).stride()
        assert (x0 is None) == (case["x0"] == "none")
        assert x0 is None or torch.equal(x0, expected_x0), case
        if own is not None:
            assert x0 is own
        if given["next_input"] is not None:
            for half in given["next_input"].split(len(expected)):
                assert torch.equal(half, expected.to(half.dtype)), case
        for name, value in kept.items():
            if name != "next_input" and given[name] is not own:
                assert same(given[name], value), (name, case)


# κ, and the formula.


@pytest.mark.parametrize("eta", TABLES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_where_kappa_is_0_the_step_is_that_of_order_1(prediction: str, eta: float) -> None:
    first = torch.tensor(make_table(SCHEDULE, PAIRS, eta))
    x, output, z = (randn(3, 2, 5, 7, seed=k) for k in range(3))
    unused = torch.full_like(x, float("nan"))
    for row, noise in itertools.product((FIRST, LAST), (None, z)):
        assert torch.equal(TABLES[eta][row, :7], first[row])
        assert TABLES[eta][row, 7] == 0
        given: dict[str, Any] = {"noise": noise, "prediction": prediction, "clip": 0.9}
        expected = fastddim.ddim_step(x, output, first, row, **given)
        for rows in (row, torch.tensor([row, MIDDLE, row]).int()):
            found = fastddim.ddim_step(x, output, TABLES[eta], rows, history=unused, **given)
            for a, b in zip(found, expected, strict=True):
                assert a is not None
                assert b is not None
                assert torch.equal(a[::2], b[::2])  # without the sample on the middle row


def float64_step(
    x: Tensor, eps: Tensor, history: Tensor, z: Tensor, row: int, eta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(x_s, x0, the sum of the terms' magnitudes) of ``make_table``'s equation in float64."""
    abar_t, abar_s = (torch.tensor(at.alpha2) for at in levels(SCHEDULE, PAIRS))
    of_t, of_s = ((a / (1 - a)).sqrt().log() for a in (abar_t, abar_s))
    h = of_s - of_t
    kappa = h[row] / (2 * h[row - 1]) if 0 < row < LAST else torch.tensor(0.0)
    a, s = abar_t[row], abar_s[row]
    c1 = eta * ((1 - a / s) * (1 - s) / (1 - a)).sqrt()
    c2 = (1 - s - c1**2).clamp(min=0).sqrt()
    x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
    d = x0 + kappa * (x0 - history)
    eps_d = (x - a.sqrt() * d) / (1 - a).sqrt()
    size = (x.abs() + eps.abs()) / a.sqrt()
    size = (1 + kappa) * size + kappa * history.abs()
    return s.sqrt() * d + c1 * z + c2 * eps_d, x0, s.sqrt() * size + z.abs() + x.abs()


@pytest.mark.parametrize("eta", TABLES)
def test_the_step_is_the_formula_of_float64(eta: float) -> None:
    x, output, history, z = (randn(2, 3, 5, 4, seed=k) for k in range(4))
    doubles = x.double(), output.double(), history.double(), z.double()
    for row in range(len(PAIRS)):
        x_s, x0 = fastddim.ddim_step(x, output, TABLES[eta], row, noise=z, history=history)
        expected, expected_x0, size = float64_step(*doubles, row, eta)
        assert x0 is not None
        assert ((x_s - expected).abs() <= 4 * 2**-23 * size).all(), row
        assert ((x0 - expected_x0).abs() <= 4 * 2**-23 * size / TABLES[eta][row, 0]).all(), row


# Bound steps, threads.


def test_a_bound_step_takes_each_history_that_is_given() -> None:
    step = fastddim.bind(TABLE, clip=0.9)
    x, output = randn(2, 3, 4, 5), randn(2, 3, 4, 5, seed=1)
    for k, layout in enumerate(("contiguous", "contiguous", "last", "strided", "contiguous")):
        history = laid_out(randn(2, 3, 4, 5, seed=k), layout)
        given: dict[str, Any] = {"rows": MIDDLE, "history": history}
        expected = by_reference(x, output, table=TABLE, clip=0.9, **given)[0]
        assert torch.equal(step(x, output, **given)[0], expected)
        # The memory of such a tensor holds the opposites of its values.
        given["history"] = torch._neg_view(-history)  # pyright: ignore[reportPrivateImportUsage]
        assert torch.equal(step(x, output, **given)[0], expected)
        out = torch.empty_like(x)
        arguments = x, output, TABLE, MIDDLE, None, None, None, None, out, None, None
        Bound(backends.backend("cpu"), Fixed(clip=0.9))(*arguments, given["history"])
        assert torch.equal(out, expected)
    # Such a tensor may have no memory.
    none = torch._efficientzerotensor(x.shape)  # pyright: ignore[reportPrivateImportUsage]
    expected = step(x, output, MIDDLE, history=torch.zeros_like(x))[0]
    assert torch.equal(step(x, output, MIDDLE, history=none)[0], expected)
    refused(lambda: step(x, output, MIDDLE), ValueError, "history must be given")


@pytest.mark.parametrize("backend", ["numba"], indirect=True)
@pytest.mark.parametrize("layout", ["contiguous", "last"])
def test_threads_of_numba_write_x0_over_the_history(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastddim.step import on_numba

    if on_numba.team is None:
        pytest.skip("this PyTorch is built without OpenMP")
    shared: list[int] = []
    team, run = on_numba.team, on_numba.team.run

    def counted(function: Any, call: Any, threads: int) -> None:
        shared.append(threads)
        run(function, call, threads)

    monkeypatch.setattr(team, "run", counted)
    monkeypatch.setattr(on_numba, "SHARED", 1)
    monkeypatch.setattr(on_numba, "NOISY_SHARED", 1)
    # Tasks begin in the middle of samples and of chunks.
    x, output, kept = (laid_out(randn(3, 7, 99, 101, seed=k), layout) for k in range(3))
    rows = torch.tensor([FIRST, MIDDLE, LAST]).int()
    for seeds in (None, torch.tensor([5, 2**40, 6])):
        expected = by_reference(x, output, TABLE, rows, seeds, history=kept)
        for threads in (1, 3, 64):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            history = kept.clone()
            found = fastddim.ddim_step(
                x, output, TABLE, rows, seeds, history=history, x0_out=history
            )
            for a, b in zip(found, expected, strict=True):
                assert a is not None
                assert torch.equal(a, b), threads
    assert set(shared) == {3, 64}


# The op.


def op_arguments(in_place: bool = False) -> tuple[Any, ...]:
    x, output, history = (randn(2, 3, 4, 4, seed=k) for k in range(3))
    rows = torch.tensor([FIRST, MIDDLE]).int()
    options = 1, True, 0.9, True
    x0 = history if in_place else torch.zeros_like(x)
    results = torch.zeros_like(x), x0, torch.zeros_like(x).half()
    seeds = torch.tensor([1, 2**40])
    return (x, output, TABLE, rows, seeds, None, None, None, *options, *results, None, history)


@pytest.mark.parametrize("backend", CPU, indirect=True)
def test_the_step_of_order_2_passes_opcheck() -> None:
    torch.library.opcheck(op.OP, op_arguments())
    given = op_arguments()
    before = [t._version for t in given if isinstance(t, Tensor)]
    op.OP(*given)
    bumped = [t._version - v for t, v in zip(filter(torch.is_tensor, given), before, strict=True)]
    assert [n > 0 for n in bumped] == [False] * 5 + [True] * 3 + [False]


def three_steps(x: Tensor, history: Tensor, seeds: Tensor, step: Any) -> Tensor:
    for row in range(3):
        x, history = step(x, torch.tanh(x), rows=row, seeds=seeds, history=history, x0_out=history)
    return x + history


@pytest.mark.one_in(2)
def test_compiled_steps_over_their_history_equal_eager_ones() -> None:
    torch.compiler.reset()
    x, kept, seeds = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1), torch.tensor([1, 2**40])
    step = partial(fastddim.ddim_step, table=TABLE)
    compiled = torch.compile(partial(three_steps, step=step), fullgraph=True, backend="aot_eager")
    found, of_eager = kept.clone(), kept.clone()
    assert torch.equal(compiled(x, found, seeds), three_steps(x, of_eager, seeds, step))
    assert torch.equal(found, of_eager)


class Listing(TorchDispatchMode):
    """Lists the arguments that each call of the op gets."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is op.OP:
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_and_fake_tensors_see_the_history() -> None:
    x, output, history = (randn(2, 3, 4, seed=k) for k in range(3))
    expected = by_reference(x, output, TABLE, MIDDLE, history=history)[0]
    with Listing() as seen:
        found = fastddim.ddim_step(x, output, TABLE, MIDDLE, history=history)[0]
    assert torch.equal(found, expected)
    assert [call[-1] is history for call in seen.calls] == [True]
    with FakeTensorMode():
        x, output, history, table = (torch.empty(*s) for s in [(2, 3, 4)] * 3 + [(10, 8)])
        x_s, x0 = fastddim.ddim_step(x, output, table, MIDDLE, history=history)
        assert x0 is not None
        assert x_s.shape == x0.shape == x.shape


# Refusals.


X = randn(2, 3)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "missing": (
        {"history": None},
        ValueError,
        "history must be given with a table of order 2, got None",
    ),
    "table": ({"table": TABLE[:, :7]}, ValueError, "table must have shape (steps, 8), got (10, 7)"),
    "kind": ({"history": 1.0}, TypeError, "history must be a tensor, got float"),
    "shape": ({"history": randn(3)}, ValueError, "history must have shape (2, 3), got (3,)"),
    "dtype": ({"history": X.half()}, TypeError, "history must be float32, got float16"),
    "device": ({"history": X.to("meta")}, ValueError, "history must be on cpu with x, got meta"),
    "grad": (
        {"history": X.clone().requires_grad_()},
        ValueError,
        "history requires grad, which the step does not carry: detach it or use torch.no_grad()",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_history_is_refused_in_one_line(case: str) -> None:
    change, error, message = BAD[case]
    good: dict[str, Any] = {"x": X, "output": X, "rows": MIDDLE, "history": X}
    step = fastddim.bind(TABLE)
    step(**good)
    bad: dict[str, Any] = {"table": TABLE, **good, **change}
    refused(lambda: fastddim.ddim_step(**bad), error, message)
    if case != "table":
        refused(lambda: step(**(good | change)), error, message)
    if case == "grad":
        with torch.no_grad():
            assert torch.equal(step(**(good | change))[0], step(**good)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, of its own
def test_transforms_of_the_history_are_refused() -> None:
    step, one = fastddim.bind(TABLE), torch.tensor(1.0)
    step(X, X, MIDDLE, history=X)

    def of_history(s: Tensor) -> Tensor:
        return step(X, X, MIDDLE, history=s * X)[0]

    refused(
        lambda: torch.func.jvp(of_history, (one,), (one,)),
        ValueError,
        "history is transformed by torch.func or carries a forward derivative",
    )


@pytest.mark.parametrize("backend", [*CPU, "numpy"], indirect=True)
def test_a_row_beyond_the_table_is_refused(backend: str) -> None:
    rows = torch.tensor([0, 10]).int()
    assert backends.backend("cpu").name == backend
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 10\)"):
        fastddim.ddim_step(X, X, TABLE, rows, history=X)
