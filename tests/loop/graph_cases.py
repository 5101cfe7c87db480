"""Calls of a captured loop, with their models and conditions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.loops import conditioned, drawn


def model(x: Tensor, t: Tensor, c: Tensor, before: Tensor | None = None) -> Tensor:
    output = conditioned(x, t, c)
    return output if before is None else output + 0.1 * before.clamp(-1, 1)


def halves(seed: int) -> dict[str, Any]:
    return {
        "cond": {"c": drawn(3, 2, 1, 1, seed=seed)},
        "uncond": {"c": drawn(3, 2, 1, 1, seed=seed + 50)},
    }


def gradient(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    return c * torch.sin(x) + 1e-4 * t.view(-1, 1, 1, 1)


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"dtype": torch.bfloat16},
    "guidance": {"guidance": 2.0},
    "guidance, bf16": {"guidance": 2.0, "dtype": torch.bfloat16},
    "guidance, fp16": {"guidance": 2.0, "dtype": torch.float16},
    "interval": {"guidance": lambda t: 3.0 if 300 < t < 700 else 1.0},
    "interval, bf16": {
        "guidance": lambda t: 3.0 if 300 < t < 700 else 1.0,
        "dtype": torch.bfloat16,
    },
    "first rows": {"guidance": lambda t: 3.0 if t > 650 else 1.0},
    "first row": {"guidance": lambda t: 3.0 if t > 985 else 1.0},
    "last rows": {"guidance": lambda t: 1.0 if t > 400 else 3.0},
    "self": {"self_condition": "before"},
    "self, guidance, bf16": {
        "self_condition": "before",
        "guidance": 2.0,
        "dtype": torch.bfloat16,
    },
    "cond_fn": {"cond_fn": gradient},
    "cond_fn, guidance": {"cond_fn": gradient, "guidance": [1.0, 2.0, 3.0]},
    "autocast": {"autocast": True},
}


def given(how: str, seed: int) -> dict[str, Any]:
    """Conditions of this seed; uncond only where there is guidance."""
    both = halves(seed)
    return both if "guidance" in CALLS[how] else {"cond": both["cond"]}
