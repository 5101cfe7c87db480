"""The step as torch.compile traces it: by the plain maths without seeds, by the op with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastddim
from tests.paths import randn
from tests.step.bound_steps import TABLE

RESULTS = ("out", "x0_out", "next_input")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """Nothing compiled by another test is left to be found."""
    torch.compiler.reset()


@pytest.mark.parametrize("seeds", [None, torch.arange(2)], ids=["maths", "op"])
def test_compiled_steps_equal_the_eager_ones(seeds: Tensor | None) -> None:
    step = fastddim.bind(TABLE)
    compiled = torch.compile(step, fullgraph=True, backend="eager", dynamic=False)
    x, output, each = randn(2, 3, 5), randn(2, 3, 5, seed=1), torch.tensor([3, 40]).int()
    both = torch.cat([output, x.cos()]).bfloat16()
    twice, like = torch.zeros(4, 3, 5, dtype=torch.bfloat16), torch.zeros(2, 3, 5)
    cases: list[tuple[Tensor, Tensor | int, dict[str, Any]]] = [
        (output, 3, {"threshold": torch.tensor(1.2), "want_x0": False}),
        (both, each, {"guidance": torch.tensor(2.5), "next_input": twice}),
        (both, 3, {"guidance": torch.tensor([1.5, -2.0]), "x0_out": like, "want_x0": False}),
        (both, each[0], {"guidance": 2, "out": like, "want_x0": False}),
    ]
    if seeds is None:
        threshold = torch.tensor([0.5, 1.5])
        cases.append((output, each, {"noise": x.sin(), "threshold": threshold, "x0_out": like}))
    for given, rows, options in cases:
        written = [name for name in RESULTS if name in options]
        expected = step(x, given, rows, seeds, **options)
        results = [options[name].clone() for name in written]
        expected = expected[0].clone(), None if expected[1] is None else expected[1].clone()
        for name in written:
            options[name].zero_()
        found = compiled(x, given, rows, seeds, **options)
        assert torch.equal(found[0], expected[0])
        assert (found[1] is None) == (expected[1] is None)
        assert found[1] is None or expected[1] is None or torch.equal(found[1], expected[1])
        assert all(map(torch.equal, results, (options[name] for name in written)))


def test_a_compiled_step_refuses_as_an_eager_one_does() -> None:
    x = randn(2, 3)
    compiled: Any = torch.compile(fastddim.bind(TABLE), backend="eager")
    with pytest.raises(ValueError, match="noise comes from seeds or from a tensor, got both"):
        compiled(x, x, 3, torch.arange(2), noise=x)
