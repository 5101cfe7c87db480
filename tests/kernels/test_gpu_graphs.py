"""On a GPU: no step waits for the device, and graphs follow their arguments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastddim
from benchmarks.gpu import Given, by_reference, kernel_noise
from benchmarks.timing import captured
from benchmarks.variants import VARIANTS
from fastddim import DDIM
from fastddim.step import reference
from fastddim.step.op import initial_noise
from fastddim.step.philox import STEP_STREAM
from tests.apart import apart
from tests.gpu_steps import DEVICE, arguments, factors, moved, on_row, plain
from tests.waiting import no_waiting

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_does_not_wait_for_the_device(name: str) -> None:
    given = arguments(name)
    numbers: Given = {"rows": 3} | ({"guidance": 7.5} if "guidance" in given else {})
    for asked in (given, given | numbers):
        fastddim.ddim_step(**asked)
        with no_waiting():
            fastddim.ddim_step(**asked)


def test_the_loop_does_not_wait_for_the_device_once_begun() -> None:
    sources: list[Given] = [
        {"seeds": [1, 2]},
        {"generator": torch.Generator(DEVICE).manual_seed(0)},
        {"noise": torch.zeros(50, 2, 3, 8, 8, device=DEVICE)},
    ]
    for source in sources:
        x_T = plain((2, 3, 8, 8))["x"]
        steps = DDIM(50, eta=1.0).iterate(lambda x, t: torch.tanh(x), x_T, **source)
        next(steps)
        with no_waiting():
            assert len(list(steps)) == 49


def test_a_wait_for_the_device_is_noticed() -> None:
    value = torch.ones((), device=DEVICE)
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        value.item()


@apart
@pytest.mark.parametrize(
    "name",
    [
        "epsilon",
        "epsilon philox rows x0",
        "epsilon last philox rgb",
        "guidance philox bf16 clip next",
        "guidance philox threshold",
        "epsilon philox order 2",
    ],
)
def test_a_captured_step_follows_what_its_arguments_hold(name: str) -> None:
    given = renewed(name, 0)
    graph, (results,) = captured(lambda _: fastddim.ddim_step(**given), 1)
    assert isinstance(results, tuple)
    for k in (1, 2):
        for argument, value in renewed(name, k).items():
            if isinstance(value, Tensor) and argument != "next_input":
                # What is one value for all samples is written once.
                single = value.stride(0) == 0 and len(value) > 1
                into = given[argument][:1] if single else given[argument]
                into.copy_(value[:1] if single else value)
        for tensor in (*results, given.get("next_input")):
            if tensor is not None:
                tensor.fill_(float("nan"))
        graph.replay()
        expected = by_reference(given, kernel_noise(given))
        assert torch.equal(results[0], expected[0])
        assert results[1] is None or torch.equal(results[1], expected[1])
        if given.get("next_input") is not None:
            for half in given["next_input"].chunk(2):
                assert torch.equal(half, expected[0].to(half.dtype))


def renewed(name: str, k: int) -> Given:
    """Other contents of everything: tensors, table, rows, seeds, weights."""
    given = arguments(name, seed=k)
    given["table"] = factors(1 - 0.3 * k, VARIANTS[name].order)
    given["rows"] = given["rows"] + 7 * k if VARIANTS[name].rows_differ else on_row(7 * k, 3)
    for argument in ("seeds", "guidance", "threshold"):
        if argument in given:
            given[argument] = given[argument] + k
    return given


@apart
@pytest.mark.parametrize("batch", [1, 3])
def test_a_captured_loop_is_the_loop(batch: int) -> None:
    ddim = DDIM(50, eta=1.0)
    table = torch.tensor(ddim.table, device=DEVICE)
    rows = torch.arange(50, dtype=torch.int32, device=DEVICE).unbind()
    x_T = torch.zeros(batch, 3, 8, 8, device=DEVICE)
    seeds = torch.zeros(batch, dtype=torch.int64, device=DEVICE)

    def loop(_: int) -> Tensor:
        x = x_T
        for row in rows:
            x = fastddim.ddim_step(x, torch.tanh(x), table, row, seeds, want_x0=False)[0]
        return x

    graph, (x_0,) = captured(loop, 1)
    assert isinstance(x_0, Tensor)
    for first in (0, 10):
        given = list(range(first, first + batch))
        seeds.copy_(torch.tensor(given))
        x_T.copy_(initial_noise(seeds, x_T.shape))
        graph.replay()
        want = ddim.sample(
            lambda x, t: torch.tanh(x), shape=tuple(x_T.shape), seeds=given, device=DEVICE
        )
        assert torch.equal(x_0, want)


def counter_loop(ddim: DDIM, model: Callable[[Tensor], Tensor], seeds: Tensor, x: Tensor) -> Tensor:
    """``DDIM.sample`` by the reference step, its noise from ``normal_``."""
    table, z = torch.tensor(ddim.table, device=DEVICE), torch.empty_like(x)
    for row in range(len(table)):
        torch.ops.fastddim.normal_(z, seeds, on_row(row, len(x)), STEP_STREAM)
        x, _ = reference.ddim_step(x, model(x), table[row], z, clip=ddim.clip)
    return x


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(3, 3, 17, 9), (65, 4, 64, 64)])
def test_fifty_steps_are_those_of_the_reference(shape: tuple[int, ...], eta: float) -> None:
    ddim = DDIM(50, eta=eta, clip=1.0)
    seeds = torch.arange(shape[0], device=DEVICE) + 2**40
    x_T = initial_noise(seeds, shape)
    found = ddim.sample(lambda x, t: torch.sin(3 * x), shape=shape, seeds=seeds, device=DEVICE)
    assert found.isfinite().all()
    assert torch.equal(found, counter_loop(ddim, lambda x: torch.sin(3 * x), seeds, x_T))


def test_a_sample_does_not_depend_on_its_batch() -> None:
    ddim, shape = DDIM(50, eta=1.0), (3, 64, 64)

    def sample(seeds: list[int]) -> Tensor:
        size = (len(seeds), *shape)
        return ddim.sample(lambda x, t: torch.tanh(x), shape=size, seeds=seeds, device=DEVICE)

    together = sample(list(range(100)))  # enough of them for several parts a program
    for i in (0, 57, 99):
        assert torch.equal(together[i : i + 1], sample([i]))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU or none")
def test_any_gpu_serves_whichever_is_current() -> None:
    for name in ("epsilon", "epsilon philox", "guidance philox threshold"):
        given = arguments(name)
        tensors = tuple(name for name, value in given.items() if isinstance(value, Tensor))
        there = moved(given, lambda tensor: tensor.to("cuda:1"), tensors)
        if isinstance(given["rows"], Tensor):
            there["rows"] = there["rows"][:1].expand(3)
        x_s, _ = fastddim.ddim_step(**there)
        assert x_s.device.index == 1
        assert torch.cuda.current_device() == 0
        assert torch.equal(x_s.to(DEVICE), fastddim.ddim_step(**given)[0])
