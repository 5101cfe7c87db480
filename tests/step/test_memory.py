"""Results in memory that other arguments use: x_s over x_t, x0 over x0′, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastddim
from benchmarks.variants import ROUNDED, VARIANTS, step_arguments
from fastddim.coefficients import PREDICTIONS
from fastddim.step import backends
from fastddim.step.backends import Fixed
from fastddim.step.bound import Bound
from tests.paths import ALL, CPU, here, use
from tests.refusals import refused
from tests.step.test_rounding import table_of
from tests.steps import TABLE, randn, same

PREDICTED = {
    **VARIANTS,
    **{
        f"{name} {prediction}": replace(VARIANTS[name], prediction=prediction)
        for name in ("epsilon tensor", "epsilon x0 clip", "epsilon order 2", "epsilon bf16")
        for prediction in ("v", "sample", "flow")
    },
}
BATCH = {"one block": (2, (4, 6, 5)), "many blocks": (2, (3, 150, 251))}
"""The larger one is more than a block, a chunk and a task, and no multiple of any."""


def arguments(name: str, size: str = "one block") -> dict[str, Any]:
    batch, shape = BATCH[size]
    return step_arguments(PREDICTED[name], batch, shape=shape)


@pytest.mark.one_in(7)
@pytest.mark.parametrize("name", PREDICTED)
@pytest.mark.parametrize(
    ("backend", "size"),
    [
        *((name, "one block") for name in here(*ALL)),
        *((name, "many blocks") for name in here(*CPU)),
    ],
)
def test_the_state_may_be_written_over_itself(backend: str, size: str, name: str) -> None:
    given = arguments(name, size)
    with use(backend):
        x_s, x0 = fastddim.ddim_step(**given)
        x = given["x"].clone()
        got, got_x0 = fastddim.ddim_step(**given | {"x": x, "out": x})
    assert got is x
    assert torch.equal(x, x_s)
    assert (got_x0 is None) == (x0 is None)
    assert x0 is None or got_x0 is None or torch.equal(got_x0, x0)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("size", BATCH)
@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("backend", here(*CPU))
def test_a_half_state_may_be_written_over_itself(backend: str, name: str, size: str) -> None:
    v = ROUNDED[name]
    batch, shape = BATCH[size]
    given = step_arguments(v, batch, shape=shape)
    x, noise = given["x"].to(v.dtype), given.get("noise")
    fixed = Fixed(
        PREDICTIONS.index(v.prediction), v.noise_first, v.clip, v.rederive, v.posterior, v.dtype
    )
    step = Bound(backends.backend("cpu", backend), fixed)

    def stepped(x: Tensor, out: Tensor) -> Tensor:
        x0 = torch.empty_like(x) if v.want_x0 else None
        z = None if noise is None else noise.to(v.dtype)
        step(
            x, given["output"], table_of(v.dtype), 2, None, z, None, given.get("threshold"), out,
            x0, None,
        )  # fmt: skip
        return out

    expected = stepped(x, torch.empty_like(x))
    assert same(stepped(x, x), expected)


def test_a_loop_needs_one_state() -> None:
    step, x = fastddim.bind(TABLE), randn(2, 3, 8, 8)
    state = x.clone()
    for row in range(3):
        x, _ = step(x, x.tanh(), row)
        step(state, state.tanh(), row, out=state)
    assert torch.equal(state, x)


@pytest.mark.parametrize("backend", here(*ALL))
def test_states_of_a_trajectory_lie_between_each_other(backend: str) -> None:
    x, output = randn(2, 3, 4), randn(2, 3, 4, seed=1)
    trajectory = torch.full((2, 4, 3, 4), torch.nan)
    trajectory[:, 0] = x
    with use(backend):
        fastddim.ddim_step(trajectory[:, 0], output, TABLE, 3, out=trajectory[:, 1])
        expected, _ = fastddim.ddim_step(x, output, TABLE, 3)
    assert torch.equal(trajectory[:, 1], expected)
    assert torch.equal(trajectory[:, 0], x)
    assert trajectory[:, 2:].isnan().all()


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("out", "output"),
        ("out", "noise"),
        ("x0_out", "x"),
        ("x0_out", "output"),
        ("x0_out", "out"),
        ("next_input", "x"),
        ("next_input", "output"),
        ("next_input", "out"),
    ],
)
def test_memory_that_another_argument_uses_is_refused(written: str, read: str) -> None:
    given = arguments("epsilon tensor")
    given["out"] = torch.full((2, 4, 6, 5), torch.nan)
    given[written] = torch.empty_like(given[read])
    fastddim.ddim_step(**given)  # A later call with tensors that lie alike is checked less.
    given[written] = given[read]
    x = given["x"].clone()
    refused(lambda: fastddim.ddim_step(**given), ValueError, written, f"share memory with {read}")
    assert torch.equal(given["x"], x)


def test_results_need_memory_of_their_own() -> None:
    given, row = arguments("epsilon"), torch.empty(1, 4, 6, 5)
    given["out"] = row.expand(2, -1, -1, -1)
    refused(
        lambda: fastddim.ddim_step(**given),
        ValueError,
        "out must have memory for each of its elements, got a tensor of shape (2, 4, 6, 5) with "
        "strides (0,",
    )


def test_a_state_is_not_written_over_itself_transposed() -> None:
    x, output = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    refused(
        lambda: fastddim.ddim_step(x, output, TABLE, 1, out=x.transpose(2, 3)),
        ValueError,
        "out must not share memory with x",
    )
