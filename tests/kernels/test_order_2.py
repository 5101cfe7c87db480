"""The kernel's step of order 2, interpreted, against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import fastddim_kernels
from fastddim import DDIM
from fastddim.coefficients import PREDICTIONS
from fastddim.step import reference
from tests.cases import some
from tests.kernel_steps import counter_noise, on_row
from tests.steps import randn

TABLES = {eta: torch.tensor(DDIM(10, eta=eta, order=2).table) for eta in (0.0, 1.0)}
SHAPES = ((3, 4, 6, 6), (2, 3, 5, 7), (2, 8))


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("number", "prediction"), some(enumerate(PREDICTIONS), 3))
def test_the_kernel_writes_x0_over_its_history(number: int, prediction: str) -> None:
    cases = itertools.product((False, True), SHAPES, (False, True))
    for k, (rederive, shape, last) in enumerate(cases, start=number):
        clip, mixed, eta, batch = (None, 0.9)[k // 2 % 2], k % 3 == 0, float(k // 3 % 2), shape[0]
        table = TABLES[eta]
        given = [randn(*shape, seed=i) for i in range(3)]
        if last and len(shape) == 4:
            given = [t.contiguous(memory_format=torch.channels_last) for t in given]
        x, output, history = given
        rows = torch.tensor([0, 4, 9])[:batch].int() if mixed else on_row(4, batch)
        history[table[rows.long(), 7] == 0] = float("nan")
        seeds = torch.arange(batch) + 2**40 if eta else None
        out, x0 = torch.full_like(x, float("nan")), history.clone()
        after = torch.empty_like(x, dtype=torch.bfloat16)
        fastddim_kernels.ddim_step(
            x, output, table, rows if mixed else 4, out, x0, after, seeds=seeds, history=x0,
            prediction=PREDICTIONS.index(prediction), clip=clip, rederive=rederive,
        )  # fmt: skip
        row = table[rows.long()].view(-1, *[1] * (x.dim() - 1), 8)
        z = None if seeds is None else counter_noise(x, seeds, rows)
        expected, expected_x0 = reference.ddim_step(
            x, output, row, z, prediction, clip, rederive=rederive, history=history
        )
        assert torch.equal(out, expected), k
        assert torch.equal(x0, expected_x0), k
        assert torch.equal(after, expected.bfloat16()), k


@pytest.mark.parametrize(
    ("columns", "history", "message"),
    [
        (8, None, r"table must be contiguous \(steps, 7\) or \(steps, 9\), got "),
        (7, torch.zeros(2, 3), r"table must be contiguous \(steps, 8\) or \(steps, 9\), got "),
        (8, torch.zeros(3, 2), "history must have the shape and strides of x, got "),
        (8, torch.zeros(3, 2).T, "history must have the shape and strides of x, got "),
        (8, torch.zeros(2, 3).half(), "history must be torch.float32 on cpu, got float16"),
    ],
)
def test_the_launcher_refuses_a_bad_history_in_one_line(
    columns: int, history: Tensor | None, message: str
) -> None:
    x, table = torch.zeros(2, 3), TABLES[0.0][:, :columns].contiguous()
    for launcher in (fastddim_kernels.ddim_step, fastddim_kernels.bind):
        with pytest.raises(ValueError, match=message) as caught:
            launcher(x, x, table, 4, torch.empty_like(x), history=history)
        assert "\n" not in str(caught.value)
