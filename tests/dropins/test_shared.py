"""What the drop-ins share: noise that a system does not use, and timesteps as rows of a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim.dropins._compiled import places_of, rows_of
from fastddim.dropins._shared import passed_over
from fastddim.step.on_torch import BLOCK

LIKE = {
    "a few": torch.empty(7),
    "a block": torch.empty(2, BLOCK),
    "blocks": torch.empty(3, BLOCK + 3),
    "strided": torch.empty(5, 9).t(),
    "bfloat16": torch.empty(3, BLOCK + 3, dtype=torch.bfloat16),
    "float16": torch.empty(3, BLOCK + 3, dtype=torch.float16),
    "float64": torch.empty(3, BLOCK + 3, dtype=torch.float64),
}


@pytest.mark.parametrize("x", LIKE.values(), ids=LIKE)
def test_noise_is_passed_over_as_randn_like_draws_it(x: Tensor) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for _ in range(2):
            torch.randn_like(x)
        state = torch.get_rng_state()
        torch.manual_seed(7)
        skip = passed_over(x)
        for _ in range(2):
            skip()
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("timestep", [3, torch.tensor(3), torch.tensor(3, dtype=torch.int32)])
def test_a_timestep_of_integers_is_a_row(timestep: Any) -> None:
    found = rows_of(timestep, torch.device("cpu"))
    assert found is not None
    assert found.dtype == torch.int64
    assert found.tolist() == [3]


@pytest.mark.parametrize(
    "timestep", [True, 3.0, "3", torch.tensor([3]), torch.tensor(3.0), torch.tensor(True)]
)
def test_other_timesteps_are_no_row(timestep: Any) -> None:
    assert rows_of(timestep, torch.device("cpu")) is None


@pytest.mark.parametrize(("timestep", "place"), [(9, 0), (5, 2), (7, 1), (8, 3)])
def test_a_timestep_has_its_place_or_the_row_of_nan(timestep: int, place: int) -> None:
    timesteps = torch.tensor([9, 7, 5])
    for given in (timestep, torch.tensor(timestep)):
        found, steps = places_of(given, timesteps, torch.zeros(4, 7))
        assert (found.tolist(), steps) == ([place], 3)
    assert places_of(8, timesteps, torch.zeros(7, 7), kinds=2)[0].tolist() == [6]
