"""Conditions, guidance, cond_fn and precision: arguments that are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastddim import DDIM, NoiseSchedule
from tests.loops import conditioned
from tests.refusals import refused

X = torch.zeros(3, 2)
G: dict[str, Any] = {"cond": {"c": X}, "uncond": {"c": X.clone()}}


def unused(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing may be called")


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("error", "said", "arguments"),
    [
        (ValueError, ("guidance", "uncond", "None"), {"uncond": {}}),
        (ValueError, ("uncond", "guidance"), {"guidance": 2.0}),
        (
            ValueError,
            ("uncond", "empty mapping"),
            {"cond": {"c": X}, "uncond": {}, "guidance": 2.0},
        ),
        (ValueError, ("uncond", "empty mapping"), {"uncond": {}, "guidance": 7.5}),
        (ValueError, ("uncond", "['c']"), {"cond": {"c": X}, "uncond": {"c": X}, "guidance": 2.0}),
        (
            ValueError,
            ("uncond", "['c']"),
            {"cond": {"c": {"e": [X]}}, "uncond": {"c": {"e": [X]}}, "guidance": lambda t: 2.0},
        ),
        (ValueError, ("uncond", "['s']"), {"cond": {"s": 1}, "uncond": {"s": 1}, "guidance": 2.0}),
        (TypeError, ("guidance", "'7'"), G | {"guidance": "7"}),
        (TypeError, ("guidance", "True"), G | {"guidance": True}),
        (TypeError, ("guidance", "dict"), G | {"guidance": {}}),
        (ValueError, ("guidance", "nan"), G | {"guidance": math.nan}),
        (ValueError, ("guidance", "inf"), G | {"guidance": [1.0, math.inf, 1.0]}),
        (ValueError, ("guidance", "(3,)", "(5, 1)", "(2,)"), G | {"guidance": [1.0, 2.0]}),
        (ValueError, ("guidance", "(4, 3)"), G | {"guidance": torch.ones(4, 3)}),
        (ValueError, ("guidance", "(5,)"), G | {"guidance": torch.ones(5)}),
        (ValueError, ("guidance", "(1, 3)"), G | {"guidance": torch.ones(1, 3)}),
        (ValueError, ("guidance(800)", "(2,)"), G | {"guidance": lambda t: [1.0, 2.0]}),
        (TypeError, ("guidance(800)", "None"), G | {"guidance": lambda t: None}),
        (ValueError, ("guidance(0)", "inf"), G | {"guidance": lambda t: 1.0 if t else math.inf}),
        (TypeError, ("uncond", "list"), {"cond": {"c": X}, "uncond": [X], "guidance": 2.0}),
        (ValueError, ("uncond", "'d'"), {"cond": {"c": X}, "uncond": {"d": X}, "guidance": 2.0}),
        (
            ValueError,
            ("uncond['c']", "(3, 2)", "(3, 4)"),
            {"cond": {"c": X}, "uncond": {"c": torch.zeros(3, 4)}, "guidance": 2.0},
        ),
        (
            ValueError,
            ("uncond['c']", "1 or 3", "(2, 2)"),
            {"cond": {"c": X}, "uncond": {"c": torch.zeros(2, 2)}, "guidance": 2.0},
        ),
        (
            ValueError,
            ("uncond['c']", "1 or 3", "()"),
            {"cond": {"c": X[0, 0]}, "uncond": {"c": X[0, 1]}, "guidance": 2.0},
        ),
        (
            ValueError,
            ("uncond['c']", "NoneType"),
            {"cond": {"c": X}, "uncond": {"c": None}, "guidance": 2.0},
        ),
        (
            ValueError,
            ("uncond['c']", "float"),
            {"cond": {"c": 0.5}, "uncond": {"c": 0.6}, "guidance": 2.0},
        ),
        (
            ValueError,
            ("uncond['c']", "ndarray"),
            {"cond": {"c": np.zeros(3)}, "uncond": {"c": np.ones(3)}, "guidance": 2.0},
        ),
        (
            ValueError,
            ("uncond['c'][1]", "(3, 2)", "(3, 4)"),
            {"cond": {"c": [X, X]}, "uncond": {"c": [X, torch.zeros(3, 4)]}, "guidance": 2.0},
        ),
        (
            ValueError,
            ("uncond['c']", "list"),
            {"cond": {"c": [X, X]}, "uncond": {"c": [X]}, "guidance": 2.0},
        ),
        (
            ValueError,
            ("uncond['c']['e']", "(3, 2)"),
            {"cond": {"c": {"e": X}}, "uncond": {"c": {"e": X[:, 0]}}, "guidance": 2.0},
        ),
        (
            ValueError,
            ("uncond['c']", "'f'"),
            {"cond": {"c": {"e": X}}, "uncond": {"c": {"e": X, "f": X}}, "guidance": 2.0},
        ),
        (TypeError, ("cond_fn", "int"), {"cond_fn": 1}),
        (TypeError, ("self_condition", "bool"), {"self_condition": True}),
        (ValueError, ("cond", "'c'"), {"cond": {"c": X}, "self_condition": "c"}),
        (TypeError, ("autocast", "torch.float32"), {"autocast": torch.float32}),
        (TypeError, ("autocast", "'bfloat16'"), {"autocast": "bfloat16"}),
    ],
)
@pytest.mark.parametrize("run", ["sample", "iterate", "invert", "capture"])
def test_bad_arguments_are_refused_before_the_model_is_called(
    run: str, error: type[Exception], said: tuple[str, ...], arguments: dict[str, Any]
) -> None:
    if run == "invert" and "self_condition" in arguments:
        return
    if run == "capture" and said == ("uncond", "['c']"):
        return  # a graph has copies of the tensors, and each call may bring others
    given = (3, 2) if run == "capture" else X
    refused(lambda: getattr(DDIM(5), run)(unused, given, **arguments), error, *said)


def test_cond_fn_is_refused_where_alphas_cumprod_is_0() -> None:
    schedule = NoiseSchedule.from_alphas_cumprod([0.9, 0.5, 0.0])
    ddim = DDIM(3, schedule=schedule, prediction="v")
    refused(lambda: ddim.sample(unused, X, cond_fn=unused), ValueError, "cond_fn", "α is 0")


@pytest.mark.parametrize("answer", [lambda x: x[:3], lambda x: torch.cat([x, x])])
def test_a_guided_model_must_answer_for_both_halves(answer: Callable[[Tensor], Tensor]) -> None:
    refused(
        lambda: DDIM(5).sample(lambda x, t, c: answer(x), X, guidance=2.0, **G),
        ValueError,
        "model",
        "(6, 2)",
    )


def test_an_empty_batch_is_guided_to_nothing() -> None:
    empty: dict[str, Any] = {"cond": {"c": X[:0]}, "uncond": {"c": X[:0]}, "guidance": 2.0}
    out = DDIM(5, eta=1.0).sample(conditioned_flat, shape=(0, 2), **empty)
    assert out.shape == (0, 2)


def conditioned_flat(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    return conditioned(x, t, c)
