"""The bound launch of the kernel: on a stand-in for Triton's driver, and interpreted."""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

import fastddim
import fastddim_kernels
from benchmarks.sections import tuning
from fastddim import DDIM, using
from fastddim.coefficients import PREDICTIONS
from fastddim.step import reference
from fastddim.step.philox import STEP_STREAM, normals
from fastddim_kernels import geometry, launch
from fastddim_kernels.step import ddim_step_kernel
from tests.paths import randn

TABLE = torch.tensor(DDIM(50, eta=1.0).table)
SECOND = torch.tensor(DDIM(50, eta=1.0, order=2).table)
DEVICE, STREAM = 1, 4321
FUNCTION, PACKED = object(), object()


class OnGPU(torch.Tensor):
    """A CPU's tensor that says it is a GPU's."""

    is_cuda = True

    @property
    def device(self) -> Any:  # type: ignore[override]
        return torch.device("cuda", DEVICE)


class Kernel:
    """A stand-in for the compiled kernel and for Triton's dispatch to it."""

    def __init__(self) -> None:
        of_triton: Any = ddim_step_kernel
        self.signature = inspect.signature(of_triton.fn)
        self.params = JITFunction(of_triton.fn).params
        self.names = [p.name for p in self.params]
        self.run_with: list[tuple[Any, ...]] = []
        self.dispatched: list[tuple[tuple[int], dict[str, Any], dict[str, Any]]] = []
        self.warmed: list[tuple[tuple[int], dict[str, Any], dict[str, Any]]] = []
        self.function, self.packed_metadata = FUNCTION, PACKED

    def run(self, *arguments: Any) -> None:
        self.run_with.append(arguments)

    def __getitem__(self, grid: tuple[int]) -> Any:
        def dispatch(*arguments: Any, **named: Any) -> Kernel:
            self.dispatched.append((grid, *self._split(*arguments, **named)))
            return self

        return dispatch

    def warmup(self, *arguments: Any, grid: tuple[int], **named: Any) -> Kernel:
        self.warmed.append((grid, *self._split(*arguments, **named)))
        return self

    def _split(self, *arguments: Any, **named: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The kernel's parameters by name, in its order, and Triton's own options."""
        options = {name: value for name, value in named.items() if name not in self.names}
        own = {name: value for name, value in named.items() if name in self.names}
        return dict(self.signature.bind(*arguments, **own).arguments), options


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Everything is as with a GPU, a known Triton and nobody watching."""
    found = Kernel()
    monkeypatch.setattr(launch, "ddim_step_kernel", found)
    monkeypatch.setattr(geometry, "INTERPRETED", False)
    monkeypatch.setattr(triton, "__version__", "3.7.1")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(launch, "_device", lambda x: nullcontext())
    monkeypatch.setattr(launch, "_current_device", lambda: DEVICE)
    monkeypatch.setattr(launch, "_stream", lambda device: STREAM + device)
    monkeypatch.setattr(
        launch, "_hooks", SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None)
    )
    return found


def aligned(*shape: int, dtype: torch.dtype = torch.float32, off: int = 0) -> Tensor:
    """Memory that begins ``off`` elements after a multiple of 64 bytes."""
    count = max(1, torch.Size(shape).numel())
    room = torch.zeros(count + 64, dtype=dtype)
    start = -room.data_ptr() % 64 // room.element_size() + off
    return room[start : start + count].view(shape)


SHAPE = (2, 3, 4, 4)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "number": {"row": 20},
    "x0, clip": {"x0": aligned(*SHAPE), "clip": 1.0, "noise_first": False},
    "noise, v": {"noise": aligned(*SHAPE), "prediction": 1},
    "seeds, rows": {"seeds": torch.arange(2), "row": torch.tensor([3, 40], dtype=torch.int32)},
    "guidance, next": {
        "output": aligned(4, *SHAPE[1:], dtype=torch.bfloat16),
        "guidance": torch.tensor([1.5, 7.5]),
        "next_input": aligned(4, *SHAPE[1:], dtype=torch.bfloat16),
    },
    "one guidance": {
        "output": aligned(4, *SHAPE[1:]),
        "guidance": torch.tensor(7.5).expand(2),
        "row": 7,
    },
    "threshold, rederive": {
        "threshold": torch.tensor([1.0, 1.7]),
        "rederive": True,
        "prediction": 2,
    },
    "noise, flow": {"noise": aligned(*SHAPE), "prediction": 3},
    "posterior": {"noise": aligned(*SHAPE), "posterior": True, "noise_first": False, "clip": 1.0},
    "order 2, seeds": {
        "table": SECOND,
        "history": aligned(*SHAPE),
        "x0": aligned(*SHAPE),
        "seeds": torch.arange(2),
    },
    "everything": {
        "row": torch.tensor([3, 40], dtype=torch.int32),
        "output": aligned(4, *SHAPE[1:], dtype=torch.float16),
        "seeds": torch.arange(2),
        "guidance": torch.tensor([1.5, 7.5]),
        "threshold": torch.tensor([1.0, 1.7]),
        "x0": aligned(*SHAPE),
        "next_input": aligned(4, *SHAPE[1:], dtype=torch.float16),
    },
}
FIXED = ("prediction", "noise_first", "clip", "rederive", "posterior")
ORDER = (
    *("x", "output", "table", "row", "seeds", "noise", "guidance", "threshold"),
    *("out", "x0", "next_input", "history"),
)


def arguments(case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors by name, options) of a call."""
    plain = {
        "x": aligned(*SHAPE),
        "output": aligned(*SHAPE),
        "table": TABLE,
        "row": torch.full((), 20, dtype=torch.int32).expand(2),
        "out": aligned(*SHAPE),
    }
    given = dict.fromkeys(ORDER) | plain | {k: v for k, v in case.items() if k not in FIXED}
    return given, {k: v for k, v in case.items() if k in FIXED}


def bind(given: dict[str, Any], options: dict[str, Any]) -> launch.BoundStep:
    first = dict(given)
    rows = first.pop("row")
    for name, value in first.items():
        if value is not None:
            first[name] = value.as_subclass(OnGPU)
    return launch.bind(rows=_on_gpu(rows), **first, **options)


def _on_gpu(rows: Any) -> Any:
    return rows.as_subclass(OnGPU) if isinstance(rows, Tensor) else rows


def call(step: launch.BoundStep, given: dict[str, Any]) -> None:
    step(*(given[name] for name in ORDER))


@pytest.mark.parametrize("case", CASES)
def test_a_launch_is_given_what_the_dispatch_would_be(case: str, kernel: Kernel) -> None:
    given, options = arguments(CASES[case])
    step = bind(given, options)
    assert len(kernel.warmed) == 1
    call(step, given)
    assert not kernel.dispatched
    (ran,) = kernel.run_with
    assert ran[1:9] == (1, 1, STREAM + DEVICE, FUNCTION, PACKED, None, None, None)
    call(step, given | {"out": aligned(*SHAPE, off=1)})  # which goes through the dispatch
    ((grid, dispatched, of_triton),) = kernel.dispatched
    assert ran[0] == grid[0]
    assert ran[0] > 0
    assert list(dispatched) == kernel.names
    assert len(ran) - 9 == len(kernel.names)
    for name, value, other in zip(kernel.names, ran[9:], dispatched.values(), strict=True):
        if name == "out_ptr":
            assert value == given["out"].data_ptr()
        elif "threshold" in name and other is not None:
            assert torch.equal(value, other)
        elif isinstance(other, Tensor):
            assert value == other.data_ptr(), name
        else:
            assert value == other, name
            assert type(value) is type(other), name
    # What was compiled is what runs: the same grid, arguments and options, in the first call's.
    of_warmup = kernel.warmed[0]
    assert of_warmup[0] == grid
    assert of_warmup[2] == of_triton
    for name in kernel.names:
        warm, cold = of_warmup[1][name], dispatched[name]
        assert (warm is None) == (cold is None), name
        assert isinstance(warm, Tensor) or warm == cold, name
        if isinstance(warm, Tensor):
            assert warm.dtype == cold.dtype, name


@pytest.mark.parametrize("name", ["x", "output", "noise", "out", "x0", "next_input", "history"])
def test_misaligned_addresses_go_through_the_dispatch(name: str, kernel: Kernel) -> None:
    case: dict[str, Any] = {"noise": aligned(*SHAPE), "x0": aligned(*SHAPE)}
    case |= {"next_input": aligned(*SHAPE), "history": aligned(*SHAPE), "table": SECOND}
    given, options = arguments(case)
    step = bind(given, options)
    moved = given | {name: aligned(*SHAPE, off=1)}
    call(step, moved)
    assert not kernel.run_with
    assert len(kernel.dispatched) == 1
    ours = {"x": "x_ptr", "out": "out_ptr", "x0": "x0_ptr", "next_input": "next_ptr"}
    there = kernel.dispatched[0][1][ours.get(name, f"{name}_ptr")]
    assert there.data_ptr() == moved[name].data_ptr()
    call(step, given)
    assert len(kernel.run_with) == 1


def test_the_tunings_constants_reach_a_bound_launch(kernel: Kernel) -> None:
    given, options = arguments({})
    with tuning.block(16, 2, 8):
        step = bind(given, options)
        call(step, given)
    ((_, named, of_triton),) = kernel.warmed
    assert (named["QUADS"], named["PARTS"], of_triton["num_warps"]) == (16, 2, 8)
    assert len(kernel.run_with) == 1


def test_tables_rows_and_seeds_may_lie_at_any_address(kernel: Kernel) -> None:
    rows = torch.tensor([0, 3, 40], dtype=torch.int32)[1:]
    given, options = arguments({"row": rows, "seeds": torch.arange(3)[1:]})
    given["table"] = torch.cat([torch.zeros(1), TABLE.flatten()])[1:].view(TABLE.shape)
    step = bind(given, options)
    call(step, given)
    assert len(kernel.run_with) == 1
    assert not kernel.dispatched


def test_another_current_device_goes_through_the_dispatch(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, options = arguments({})
    step = bind(given, options)
    monkeypatch.setattr(launch, "_current_device", lambda: DEVICE + 1)
    call(step, given)
    assert not kernel.run_with
    assert len(kernel.dispatched) == 1


@pytest.mark.parametrize("which", ["launch_enter_hook", "launch_exit_hook"])
def test_whoever_asked_to_be_told_of_launches_is_told(
    which: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs: Any = importlib.import_module("triton.knobs").runtime
    monkeypatch.setattr(launch, "_hooks", knobs)
    given, options = arguments({})
    step = bind(given, options)
    call(step, given)
    assert len(kernel.run_with) == 1

    def hook(metadata: object) -> None: ...

    getattr(knobs, which).add(hook)
    try:
        call(step, given)
    finally:
        getattr(knobs, which).remove(hook)
    assert len(kernel.run_with) == 1
    assert len(kernel.dispatched) == 1
    call(step, given)
    assert len(kernel.run_with) == 2


@pytest.mark.parametrize(
    ("version", "hip", "interpreted", "direct"),
    [
        ("3.6.0", None, False, True),
        ("3.7.1", None, False, True),
        ("3.7.0+gitabc", None, False, True),
        ("3.5.1", None, False, False),
        ("3.8.0", None, False, False),
        ("4.6.0", None, False, False),
        ("3.70.0", None, False, False),
        ("3.7.1", "6.4", False, False),
        ("3.7.1", None, True, False),
    ],
)
def test_the_dispatch_is_passed_by_only_in_known_versions(
    version: str,
    hip: str | None,
    interpreted: bool,
    direct: bool,
    kernel: Kernel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(geometry, "INTERPRETED", interpreted)
    given, options = arguments({"row": 20})
    step = bind(given, options)
    assert len(kernel.warmed) == direct
    call(step, given)
    assert (len(kernel.run_with), len(kernel.dispatched)) == (direct, not direct)


@pytest.mark.parametrize("direct", [True, False])
def test_a_number_is_passed_as_it_is(
    direct: bool, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It is in the launch itself: a graph that holds the launch reads no memory for it.
    if not direct:
        monkeypatch.setattr(launch, "_current_device", lambda: 0)
    given, options = arguments({"row": 0})
    step = bind(given, options)
    for row in (0, 1, 20, 49):
        call(step, given | {"row": row})
    names = "rows_ptr", "one_row"
    if direct:
        places = [9 + kernel.names.index(name) for name in names]
        found = [tuple(ran[place] for place in places) for ran in kernel.run_with]
    else:
        found = [tuple(named[name] for name in names) for _, named, _ in kernel.dispatched]
    assert found == [(None, row) for row in (0, 1, 20, 49)]
    for row in (-1, 50, 2**40):
        with pytest.raises(ValueError, match=rf"rows must lie in \[0, 50\), got {row}"):
            call(step, given | {"row": row})
    assert len(kernel.run_with) + len(kernel.dispatched) == 4


def test_a_step_bound_to_misaligned_memory_compiles_for_aligned(kernel: Kernel) -> None:
    given, options = arguments({})
    step = bind(given | {"x": aligned(*SHAPE, off=1)}, options)
    assert not kernel.warmed
    call(step, given)
    assert (len(kernel.dispatched), len(kernel.run_with)) == (1, 0)
    call(step, given)
    assert (len(kernel.dispatched), len(kernel.run_with)) == (1, 1)


def test_no_elements_are_no_launch(kernel: Kernel) -> None:
    given, options = arguments({})
    for name in ("x", "output", "out"):
        given[name] = torch.zeros(0, 3, 4, 4)
    given["row"] = torch.zeros(0, dtype=torch.int32)
    call(bind(given, options), given)
    assert not kernel.warmed
    assert not kernel.run_with
    assert not kernel.dispatched


@pytest.mark.parametrize("bad", ["x", "output", "table", "both noises", "clip and threshold"])
def test_a_step_that_cannot_be_launched_is_refused_when_bound(bad: str, kernel: Kernel) -> None:
    given, options = arguments({})
    if bad == "x":
        given["x"] = given["x"].double()
    elif bad == "output":
        given["output"] = aligned(2, 3, 4, 5)
    elif bad == "table":
        given["table"] = TABLE[:, :6]
    elif bad == "both noises":
        given |= {"noise": aligned(*SHAPE), "seeds": torch.arange(2)}
    else:
        given["threshold"], options["clip"] = torch.ones(2), 1.0
    with pytest.raises(ValueError):
        bind(given, options)
    assert not kernel.warmed


# Through the interpreter, which needs no driver.


@pytest.mark.one_in(2)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_interpreted_steps_equal_the_reference(prediction: str) -> None:
    x, output, z = (randn(2, 3, 5, 4, seed=k) for k in range(3))
    each, seeds = torch.tensor([3, 40], dtype=torch.int32), torch.tensor([7, 2**40])
    counted = torch.from_numpy(normals(seeds.numpy(), each.numpy(), 60, STEP_STREAM)).view(x.shape)
    with using("triton"):
        step = fastddim.bind(TABLE, prediction=prediction, clip=0.9)
        kinds: list[Tensor | int] = [7, each]
        for rows, of, noise in itertools.product(kinds, (None, seeds), (None, z)):
            if of is not None and (noise is not None or rows is not each):
                continue
            row = TABLE[rows] if isinstance(rows, int) else TABLE[rows.long()].view(2, 1, 1, 1, 7)
            drawn = noise if of is None else counted
            expected = reference.ddim_step(x, output, row, drawn, prediction, 0.9)
            for _ in range(2):
                found = step(x, output, rows, of, noise=noise)
                assert found[1] is not None
                assert torch.equal(found[0], expected[0])
                assert torch.equal(found[1], expected[1])


def test_the_example_on_the_kernels_card_samples() -> None:
    card = (Path(__file__).parents[2] / "kernels" / "CARD.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)

    def model(x: Tensor, row: int) -> Tensor:
        return torch.tanh(x) + row / 50

    ddim, x = DDIM(5), randn(2, 3, 5, 4)
    expected = x
    for row, factors in enumerate(torch.tensor(ddim.table)):
        expected, _ = reference.ddim_step(expected, model(expected, row), factors)
    names: dict[str, Any] = {"fastddim_kernels": fastddim_kernels, "model": model, "x": x}
    names |= {"table": torch.tensor(ddim.table), "out": torch.empty_like(x)}
    exec(example, names)
    assert torch.equal(names["x"], expected)


def test_the_kernels_card_names_all_that_the_package_gives() -> None:
    card = (Path(__file__).parents[2] / "kernels" / "CARD.md").read_text()
    for name in fastddim_kernels.__all__:
        assert re.search(rf"`{name}\b", card), name


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_interpreted_sampling_equals_pytorchs(eta: float) -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x * 0.9 + t.view(-1, 1, 1, 1) / 999)

    given: dict[str, Any] = {"shape": (2, 1, 4, 6), "seeds": [3, 2**40]}
    found = {}
    for name in ("triton", "torch"):
        with using(name):
            found[name] = DDIM(5, eta=eta).sample(model, **given)
    assert torch.equal(found["triton"], found["torch"])


def test_interpreted_rows_out_of_range_are_refused_as_numbers() -> None:
    x = randn(2, 3)
    with using("triton"):
        step = fastddim.bind(TABLE)
        step(x, x, 0)
        with pytest.raises(ValueError, match=r"rows must be an integer in \[0, 49\], got 50"):
            step(x, x, 50)
