"""The reference of a bound step, and the layouts that its tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim import DDIM
from fastddim.step import reference
from fastddim.step.checked import BoundStep
from fastddim.step.philox import STEP_STREAM
from tests.paths import CPU, normal_, use

TABLE = torch.tensor(DDIM(50, eta=1.0).table)


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
    posterior: bool = False,
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
        normal_(noise, seeds, rows, STEP_STREAM)
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
        posterior=posterior,
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
