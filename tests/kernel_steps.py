"""The Triton kernel called by hand, its reference, and their comparison."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastddim_kernels
from fastddim.coefficients import PREDICTIONS
from fastddim.step import reference
from fastddim.step.philox import STEP_STREAM, normals
from tests.steps import TABLE, same

PAD, GUARD = 67, 12345.0


def on_row(row: int, batch: int) -> Tensor:
    return torch.full((), row, dtype=torch.int32).expand(batch)


def counter_noise(x: Tensor, seeds: Tensor, rows: Tensor) -> Tensor:
    z = normals(seeds.numpy(), rows.numpy(), x[0].numel(), STEP_STREAM)
    return torch.from_numpy(z).view(x.shape)


def by_kernel(
    x: Tensor,
    output: Tensor,
    rows: Tensor,
    prediction: str = "epsilon",
    want_x0: bool = True,
    offset: int = 0,
    table: Tensor = TABLE,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The step into memory poisoned with NaN, between guards that must stay as they were."""
    memory = torch.full((2, 2 * PAD + offset + x.numel()), GUARD)
    inside = slice(PAD + offset, PAD + offset + x.numel())
    memory[:, inside] = float("nan")
    out, x0 = (m[inside].as_strided(x.shape, x.stride()) for m in memory)
    given = [t.clone() for t in (x, output)]
    fastddim_kernels.ddim_step(
        x,
        output,
        table,
        rows,
        out,
        x0 if want_x0 else None,
        prediction=PREDICTIONS.index(prediction),
        **options,
    )
    assert same(x, given[0])
    assert same(output, given[1])
    out, x0 = out.clone(), x0.clone()
    memory[:, inside] = GUARD
    assert (memory == GUARD).all(), "the kernel wrote outside its tensors"
    return out, x0 if want_x0 else None


def by_reference(
    x: Tensor,
    output: Tensor,
    rows: Tensor,
    prediction: str = "epsilon",
    table: Tensor = TABLE,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    clip: float | None = None,
    noise_first: bool = True,
) -> tuple[Tensor, Tensor]:
    row = table[rows.long()].view(-1, *[1] * (x.dim() - 1), 7)
    z = noise if seeds is None else counter_noise(x, seeds, rows)
    return reference.ddim_step(x, output.float(), row, z, prediction, clip, noise_first)


def assert_same_step(
    x: Tensor, output: Tensor, rows: Tensor, want_x0: bool = True, offset: int = 0, **options: Any
) -> None:
    x_s, x0 = by_kernel(x, output, rows, want_x0=want_x0, offset=offset, **options)
    expected = by_reference(x, output, rows, **options)
    assert same(x_s, expected[0])
    assert (x0 is not None) == want_x0
    if x0 is not None:
        assert same(x0, expected[1])
