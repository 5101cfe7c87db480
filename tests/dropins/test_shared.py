"""What the drop-ins share: the generator after noise that a system draws and does not use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

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
