"""A request or an engine that cannot work is refused in one line, before anything is queued."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from fastddim import DDIM, Engine, NoiseSchedule, Request
from tests.serving.serving_cases import SHAPE, exact, named

X = torch.zeros(SHAPE)
COND = {"c": X, "y": torch.tensor(1)}


def request_of(**changes: Any) -> Request:
    return Request(**{"seed": 1, "cond": COND, **changes})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no seed": ({"seed": None}, r"seed must be an integer in \[0, 2⁶³\) without x_T, got None"),
    "no seed for noise": (
        {"seed": None, "x_T": X, "ddim": DDIM(3, eta=1.0)},
        r"seed must be an integer in \[0, 2⁶³\) where steps add noise, got None",
    ),
    "seed below": ({"seed": -1}, r"seed must be an integer in \[0, 9223372036854775807\], got -1"),
    "seed above": ({"seed": 2**63}, r"seed must be .* got 9223372036854775808"),
    "seed a float": ({"seed": 1.5}, r"seed must be an integer .* got 1.5"),
    "seed a bool": ({"seed": True}, "seed must be an integer .* got True"),
    "a condition's shape": (
        {"cond": {**COND, "c": torch.zeros(3)}},
        r"cond\['c'\] must be torch.float32 \(2, 3, 4\), as in the engine, got torch.float32",
    ),
    "a condition's dtype": (
        {"cond": {**COND, "y": torch.tensor(1.0)}},
        r"cond\['y'\] must be torch.int64 \(\), as in the engine, got torch.float32 \(\)",
    ),
    "a condition's kind": (
        {"cond": {**COND, "y": 3}},
        r"cond\['y'\] must be torch.int64 \(\), as in the engine, got int",
    ),
    "a missing condition": (
        {"cond": {"c": X}},
        r"cond\['y'\] must be torch.int64 \(\), as in the engine, got nothing",
    ),
    "an unknown condition": (
        {"cond": {**COND, "z": X}},
        "cond must hold the engine's names, 'c', 'y', got 'z'",
    ),
    "no mapping": ({"cond": [X]}, "cond must map names to tensors, got list"),
    "guidance": (
        {"uncond": {"c": X}, "guidance": 2.0},
        r"guidance needs an engine with guided=True, .* got 2.0",
    ),
    "uncond alone": ({"uncond": {"c": X}}, "guidance must be given with uncond"),
    "another T": (
        {"ddim": DDIM(5, schedule=NoiseSchedule.cosine(100))},
        "ddim must have the T of the engine's network, 1000, got 100",
    ),
    "a continuous path": (
        {"ddim": DDIM(5, schedule=NoiseSchedule.edm())},
        "ddim must have a table of levels as the engine's network, got ",
    ),
    "another prediction": (
        {"ddim": DDIM(5, prediction="v")},
        "ddim must have the engine's prediction, 'epsilon', which all slots share, got 'v'",
    ),
    "another clip": (
        {"ddim": DDIM(5, clip=1.0)},
        "ddim must have the engine's clip, None, which all slots share, got 1.0",
    ),
    "no sampler": ({"ddim": 50}, "ddim must be a fastddim.DDIM, got int"),
    "x_T's shape": (
        {"x_T": torch.zeros(1, *SHAPE)},
        r"x_T must have the engine's shape, \(2, 3, 4\), without a batch, got \(1, 2, 3, 4\)",
    ),
    "x_T's dtype": ({"x_T": X.double()}, "x_T must be float32, bfloat16 or float16, got .*64"),
    "a sparse x_T": ({"x_T": X.to_sparse()}, "x_T must be dense, got torch.sparse_coo"),
    "a sparse condition": (
        {"cond": {**COND, "c": X.to_sparse()}},
        r"cond\['c'\] must be dense, got torch.sparse_coo",
    ),
    "x_T's kind": ({"x_T": [1]}, "x_T must be a tensor, got list"),
    "x_T's gradient": (
        {"x_T": torch.zeros(SHAPE, requires_grad=True)},
        r"x_T requires grad, which sampling does not carry: pass x_T.detach\(\)",
    ),
    "start without x_T": ({"start": 1}, "x_T must be given with start = 1: noise is at row 0"),
    "start below": ({"start": -1, "x_T": X}, r"start must be an integer in \[0, 49\], got -1"),
    "start beyond": ({"start": 50, "x_T": X}, r"start must be an integer in \[0, 49\], got 50"),
    "start backwards": (
        {"start": 1, "x_T": X, "reverse": True},
        "start has no place in a loop that runs backwards, got 1",
    ),
    "until forwards": ({"until": 3}, "until belongs to reverse=True, got 3 without it"),
    "until beyond": (
        {"until": 50, "x_T": X, "reverse": True},
        r"until must be an integer in \[0, 49\], got 50",
    ),
    "backwards without data": ({"reverse": True}, "x_T must be the data with reverse=True, got No"),
    "backwards with noise": (
        {"reverse": True, "x_T": X, "ddim": DDIM(5, eta=1.0)},
        "eta must be 0 to run backwards, got 1.0",
    ),
    "reverse": ({"reverse": 1}, "reverse must be True or False, got 1"),
    "a check": ({"check_finite": "x"}, "check_finite must be True or False, got 'x'"),
    "deadline": ({"deadline": 0}, "deadline must be > 0 seconds, got 0"),
    "deadline's kind": ({"deadline": "soon"}, "deadline must be a number, got 'soon'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_request_is_refused_in_one_line(case: str) -> None:
    changes, line = REFUSED[case]
    engine = Engine(named, SHAPE, 2, cond=COND)
    with pytest.raises((TypeError, ValueError), match=line) as caught:
        engine.submit(request_of(**changes))
    assert "\n" not in str(caught.value)
    assert engine.metrics().submitted == 0
    assert not engine.step()


@pytest.mark.parametrize("prediction", ["v", "sample"])
def test_backwards_refuses_a_model_that_is_not_of_epsilon(prediction: Any) -> None:
    engine = Engine(exact, SHAPE, 2, ddim=DDIM(5, prediction=prediction))
    with pytest.raises(ValueError, match="reverse needs a model whose prediction is 'epsilon'"):
        engine.submit(Request(x_T=X, reverse=True))


def test_more_steps_than_levels_are_refused_by_the_sampler() -> None:
    with pytest.raises(ValueError, match=r"steps must be an integer in \[1, 1000\], got 1001"):
        Request(1, ddim=DDIM(1001))


def test_guidance_needs_an_uncond_that_replaces() -> None:
    engine = Engine(named, SHAPE, 2, cond=COND, guided=True)
    with pytest.raises(ValueError, match="uncond must replace a tensor of cond, got an empty"):
        engine.submit(request_of(uncond={}, guidance=2.0))
    with pytest.raises(TypeError, match="uncond must map names to tensors, got list"):
        engine.submit(request_of(uncond=[X], guidance=2.0))
    with pytest.raises(ValueError, match="uncond must hold the engine's names, 'c', 'y', got 'z'"):
        engine.submit(request_of(uncond={"z": X}, guidance=2.0))
    with pytest.raises(ValueError, match="guidance must be finite, got nan"):
        engine.submit(request_of(uncond={"c": X}, guidance=float("nan")))


def test_a_closed_engine_refuses() -> None:
    engine = Engine(exact, SHAPE, 2)
    engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed, and takes no requests"):
        engine.submit(Request(1))
    with pytest.raises(RuntimeError, match="the engine is closed, and takes no requests"):
        engine.start()


def test_submit_takes_a_request() -> None:
    with pytest.raises(TypeError, match=re.escape("submit takes a fastddim.Request, got int")):
        Engine(exact, SHAPE, 2).submit(7)  # type: ignore[arg-type]


ENGINES: dict[str, tuple[dict[str, Any], str]] = {
    "no slots": ({"slots": 0}, "slots must be an integer ≥ 1, got 0"),
    "half a slot": ({"slots": 1.5}, "slots must be an integer ≥ 1, got 1.5"),
    "an empty batch": ({"batch_size": 0}, "batch_size must be an integer ≥ 1, got 0"),
    "a batch that does not divide": (
        {"slots": 6, "batch_size": 4},
        "batch_size must divide slots = 6, got 4",
    ),
    "no shape": (
        {"shape": ()},
        "shape must have one dimension or more, without the batch",
    ),
    "guidance": ({"guided": "x"}, "guided must be True or False, got 'x'"),
    "a check": ({"check_finite": "x"}, "check_finite must be True or False, got 'x'"),
    "bytes": ({"shape": b"x"}, "shape must be a sequence of integers, got bytes"),
    "a number": ({"shape": 3}, "shape must be a sequence of integers, got int"),
    "an empty side": ({"shape": (3, 0)}, r"shape\[1\] must be an integer ≥ 1, got 0"),
    "no model": ({"model": 1}, "model must be callable, got int"),
    "no sampler": ({"ddim": 10}, "ddim must be a fastddim.DDIM, got int"),
    "a dtype": ({"dtype": torch.float64}, "dtype must be float32, bfloat16 or float16, got .*64"),
    "no dtype": ({"dtype": "half"}, "dtype must be a floating point torch.dtype, got 'half'"),
    "an order": ({"order": "last"}, "order must be one of first, shortest, deadline, got 'last'"),
    "a limit": ({"limit": 0}, "limit must be an integer ≥ 1, got 0"),
    "a condition": (
        {"cond": {"y": 3}},
        r"cond\['y'\] must be a shape without the batch or a tensor, got 3",
    ),
    "a condition's side": ({"cond": {"y": (2, 0.5)}}, r"cond\['y'\]\[1\] must be an integer ≥ 0"),
    "conditions": ({"cond": [3]}, "cond must map names to shapes or tensors, got list"),
    "a device": ({"device": "moon"}, "device must be one that torch can use here"),
}


@pytest.mark.parametrize("case", ENGINES)
def test_a_wrong_engine_is_refused_in_one_line(case: str) -> None:
    changes, line = ENGINES[case]
    arguments: dict[str, Any] = {"model": exact, "shape": SHAPE, "slots": 2, **changes}
    with pytest.raises((TypeError, ValueError), match=line) as caught:
        Engine(**arguments)
    assert "\n" not in str(caught.value)
