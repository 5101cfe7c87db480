"""Tables of several samplers, one after the other: each row's noise is that of its own number."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastddim
from fastddim import DDIM
from fastddim.coefficients import COLUMNS_OF_MANY, PREDICTIONS
from fastddim.step import on_torch, reference
from fastddim.step.backends import Backend, Fixed, Launch, StepArgs
from tests.kernel_steps import by_kernel
from tests.numpy_backend import BACKEND as NUMPY
from tests.paths import CPU, instead, use
from tests.refusals import refused
from tests.steps import randn, same


def on_any_device(fixed: Fixed, first: StepArgs) -> Launch:
    return partial(on_torch._by_reference, fixed)


OTHERS = {b.name: b for b in (NUMPY, Backend("any device", on_any_device, on_torch.normal_))}
"""The example of a backend, and the launch of the backend torch on devices other than a CPU."""


@pytest.fixture(params=[*CPU, *OTHERS])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend that takes the test's steps."""
    other = OTHERS.get(request.param)
    with use(request.param) if other is None else instead(other):
        yield str(request.param)


SAMPLERS = (DDIM(4, eta=1.0), DDIM(6, eta=0.5), DDIM(3))
FIRST = (1, 5, 11)
"""The rows at which the samplers' tables begin, after one of zeros."""


def many(of_order_2: DDIM | None = None) -> Tensor:
    tables = [np.zeros((1, len(COLUMNS_OF_MANY)), np.float32)]
    for ddim in (*SAMPLERS, *([] if of_order_2 is None else [of_order_2])):
        rows = np.zeros((len(ddim.table), len(COLUMNS_OF_MANY)), np.float32)
        rows[:, : ddim.table.shape[1]] = ddim.table
        rows[:, -1] = range(len(rows))
        tables.append(rows)
    return torch.from_numpy(np.concatenate(tables))


SEEDS = torch.tensor([3, 2**40, 2**63 - 1])
ROWS = (2, 4, 1)
"""The samplers' own rows."""


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("size", [(3, 2, 3, 5), (3, 3, 40, 41)])
def test_each_sample_has_the_step_of_its_own_table(
    backend: str, size: tuple[int, ...], layout: str
) -> None:
    fmt = torch.channels_last if layout == "channels last" else torch.contiguous_format
    x, output = (randn(*size, seed=k).contiguous(memory_format=fmt) for k in (1, 2))
    rows = torch.tensor([a + b for a, b in zip(FIRST, ROWS, strict=True)], dtype=torch.int32)
    x_s, x0 = fastddim.ddim_step(x, output, many(), rows, SEEDS)
    for i, (ddim, row) in enumerate(zip(SAMPLERS, ROWS, strict=True)):
        own = torch.full((3,), row, dtype=torch.int32)
        want, want_x0 = fastddim.ddim_step(x, output, torch.tensor(ddim.table), own, SEEDS)
        assert same(x_s[i], want[i])
        assert x0 is not None
        assert want_x0 is not None
        assert same(x0[i], want_x0[i])
    by_place = fastddim.ddim_step(x, output, many()[:, :7].contiguous(), rows, SEEDS)[0]
    assert not torch.equal(by_place[0], x_s[0])
    assert torch.equal(by_place[2], x_s[2])  # The third adds no noise.


def test_one_row_for_all_samples_has_its_number(backend: str) -> None:
    x, output = randn(3, 40, 40, seed=1), randn(3, 40, 40, seed=2)
    got = fastddim.ddim_step(x, output, many(), FIRST[1] + 2, SEEDS)[0]
    want = fastddim.ddim_step(x, output, torch.tensor(SAMPLERS[1].table), 2, SEEDS)[0]
    assert same(got, want)


def test_history_is_read_where_kappa_is_not_0(backend: str) -> None:
    ddim = DDIM(5, order=2, spacing="mixed")
    x, output, history = (randn(2, 3, 9, 9, seed=k) for k in (1, 2, 3))
    table = many(ddim)
    rows = torch.tensor([14 + 2, FIRST[2]], dtype=torch.int32)
    got = fastddim.ddim_step(x, output, table, rows, history=history)[0]
    second = fastddim.ddim_step(x, output, torch.tensor(ddim.table), 2, history=history)[0]
    first = fastddim.ddim_step(x, output, torch.tensor(SAMPLERS[2].table), 0)[0]
    assert same(got[0], second[0])
    assert same(got[1], first[1])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_reference_does_not_read_the_number(prediction: str) -> None:
    x, output = randn(3, 5, seed=1), randn(3, 5, seed=2)
    row = many()[FIRST[1] + 2]
    got = reference.ddim_step(x, output, row, prediction=prediction)
    want = reference.ddim_step(x, output, row[:7], prediction=prediction)
    assert same(got[0], want[0])
    assert same(got[1], want[1])


@pytest.mark.one_in(2)
@pytest.mark.parametrize("size", [(3, 2, 3, 5), (3, 4, 8, 8)])
def test_the_kernel_draws_for_the_rows_number(size: tuple[int, ...]) -> None:
    x, output = randn(*size, seed=1), randn(*size, seed=2)
    rows = torch.tensor([a + b for a, b in zip(FIRST, ROWS, strict=True)], dtype=torch.int32)
    got, _ = by_kernel(x, output, rows, table=many(), seeds=SEEDS)
    history = randn(*size, seed=3)
    also, _ = by_kernel(x, output, rows, table=many(), seeds=SEEDS, history=history)
    assert same(also, got)  # κ is 0
    for i, (ddim, row) in enumerate(zip(SAMPLERS, ROWS, strict=True)):
        own = torch.full((3,), row, dtype=torch.int32)
        want, _ = by_kernel(x, output, own, table=torch.tensor(ddim.table), seeds=SEEDS)
        assert same(got[i], want[i])


def test_a_table_of_ten_columns_is_refused() -> None:
    def call() -> Any:
        return fastddim.ddim_step(randn(1, 4), randn(1, 4), torch.zeros(3, 10), 0)

    refused(call, ValueError, "table must have shape (steps, 7), got (3, 10)")
    refused(
        lambda: fastddim.bind(torch.zeros(3, 10)), ValueError, "table must have shape (steps, 7)"
    )


def test_a_table_of_one_dimension_is_refused() -> None:
    x, row = torch.zeros(2, 3), torch.zeros(7)
    refused(
        lambda: fastddim.ddim_step(x, x, row, 0), ValueError, "table must have shape (steps, 7)"
    )
    refused(lambda: fastddim.bind(row), ValueError, "table must have shape (steps, 7), got (7,)")
