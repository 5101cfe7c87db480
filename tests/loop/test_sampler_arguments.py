"""DDIM: its fields, equality and names, and the arguments that it refuses."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastddim import DDIM, NoiseSchedule, using
from fastddim.coefficients import Prediction
from fastddim.loop.options import checked_noise, checked_seeds
from tests.loop.sampler_cases import LINEAR, model
from tests.refusals import refused


def test_describe_prints_pairs_and_model_calls(capsys: pytest.CaptureFixture[str]) -> None:
    with using("torch"):
        DDIM(steps=3).describe()
    assert capsys.readouterr().out == (
        "DDIM: NoiseSchedule(linear(0.0001, 0.02), T=1000), epsilon model, eta = 0, "
        "uniform spacing, 3 model calls, steps on cpu by torch\n"
        "  row     t     s       √ᾱ_t       √ᾱ_s         c1         c2\n"
        "    0   666   333   0.104806   0.564469   0.000000   0.825455\n"
        "    1   333     0   0.564469   0.999950   0.000000   0.010000\n"
        "    2     0    -1   0.999950   1.000000   0.000000   0.000000\n"
    )
    DDIM(steps=300, spacing="uniform-ermongroup", eta="hat").describe()
    assert "eta = hat, uniform-ermongroup spacing, 334 model calls" in capsys.readouterr().out
    DDIM(spacing=[0, 5], prediction="v").describe()
    assert "v model, eta = 0, given spacing, 2 model calls" in capsys.readouterr().out


def test_the_defaults_are_the_papers() -> None:
    ddim = DDIM()
    assert (ddim.steps, ddim.eta, ddim.spacing, ddim.prediction) == (50, 0.0, "uniform", "epsilon")
    assert ddim.clip is None
    assert ddim.final_alpha_cumprod == 1.0
    assert ddim.schedule.alphas_cumprod.tolist() == LINEAR.alphas_cumprod.tolist()
    assert ddim.pairs[:2] == ((980, 960), (960, 940))


def test_a_sampler_is_frozen_and_its_table_read_only() -> None:
    ddim = DDIM(5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ddim.steps = 6  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        ddim.table[0, 0] = 0


def test_replace_makes_a_sampler_equal_by_its_arguments() -> None:
    one = DDIM(5, schedule=LINEAR)
    other = dataclasses.replace(one, steps=10, eta=1)
    assert (other.steps, other.eta, len(other.pairs), other.table[0, 5] > 0) == (10, 1.0, 10, True)
    assert other == DDIM(10, eta=1.0, schedule=LINEAR)
    assert hash(other) == hash(DDIM(10, eta=1.0, schedule=LINEAR))
    assert one != other
    assert DDIM(7) == DDIM(7)
    assert dataclasses.replace(other, steps=5, eta=0.0) == one
    listed = DDIM(spacing=[0, 5], schedule=LINEAR)
    assert dataclasses.replace(listed, eta=1.0).pairs == listed.pairs
    with pytest.raises(ValueError, match="pairs"):
        dataclasses.replace(one, pairs=((5, -1),))


@pytest.mark.parametrize("copied", [lambda d: pickle.loads(pickle.dumps(d)), copy.deepcopy])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"steps": np.int64(7), "eta": "hat", "clip": np.float32(1.5), "spacing": "quad"},
        {"steps": torch.tensor(7), "clip": torch.tensor(0.5), "temperature": np.float64(0.5)},
        {"spacing": [0, 10, 700], "schedule": NoiseSchedule.cosine(), "prediction": "x0"},
    ],
)
def test_samplers_are_equal_by_value_after_pickle_and_deepcopy(
    copied: Callable[[DDIM], DDIM], arguments: dict[str, Any]
) -> None:
    ddim = DDIM(**arguments)
    other, again = copied(ddim), DDIM(**arguments)
    assert ddim == other == again
    assert hash(ddim) == hash(other) == hash(again)
    assert repr(ddim) == repr(other)
    assert len({ddim, other, again}) == 1
    assert other.table.tobytes() == ddim.table.tobytes()
    with pytest.raises(ValueError, match="read-only"):
        other.table[0, 0] = 0


def test_a_steps_repr_prints_shapes() -> None:
    *_, step = DDIM(3).iterate(model, torch.zeros(2, 3, 4, dtype=torch.bfloat16))
    assert repr(step) == "Step(index=2, t=0, s=-1, x=bfloat16 (2, 3, 4), x0=bfloat16 (2, 3, 4))"
    assert step == step  # the fields' tensors would raise
    assert step in [step]


SYNONYMS: dict[Any, Prediction] = {
    **dict.fromkeys(("epsilon", "eps", "noise", "pred_noise"), "epsilon"),
    **dict.fromkeys(("v", "v_prediction", "pred_v"), "v"),
    **dict.fromkeys(("sample", "x0", "x_0", "x_start", "pred_x0"), "sample"),
}


@pytest.mark.parametrize("name", SYNONYMS)
def test_predictions_go_by_the_names_of_other_systems_too(name: Any) -> None:
    ddim = DDIM(prediction=name)
    assert ddim.prediction == SYNONYMS[name]
    assert ddim == DDIM(prediction=SYNONYMS[name])


@pytest.mark.parametrize("name", ["flow", "flow_prediction", "rectified_flow", "velocity"])
def test_a_flows_velocity_is_refused_with_the_reason(name: Any) -> None:
    refused(lambda: DDIM(prediction=name), ValueError, "prediction", name, "epsilon, v, sample")


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "steps", {"steps": 1.5}),
        (TypeError, "steps", {"steps": True}),
        (ValueError, "steps", {"steps": 0}),
        (ValueError, "steps", {"steps": 1001}),
        (TypeError, "schedule", {"schedule": [0.9, 0.5]}),
        (TypeError, "schedule", {"schedule": "linear"}),
        (ValueError, "prediction", {"prediction": "score"}),
        (ValueError, "prediction", {"prediction": None}),
        (TypeError, "clip", {"clip": "1"}),
        (TypeError, "clip", {"clip": True}),
        (ValueError, "clip", {"clip": 0}),
        (ValueError, "clip", {"clip": -1.0}),
        (ValueError, "clip", {"clip": math.nan}),
        (ValueError, "clip", {"clip": math.inf}),
        (TypeError, "final_alpha_cumprod", {"final_alpha_cumprod": None}),
        (ValueError, "final_alpha_cumprod", {"final_alpha_cumprod": 1.1}),
        (ValueError, "final_alpha_cumprod", {"final_alpha_cumprod": 0.5}),
        (ValueError, "final_alpha_cumprod", {"final_alpha_cumprod": math.nan}),
        (ValueError, "spacing", {"spacing": "sgm"}),
        (TypeError, "spacing", {"spacing": None}),
        (ValueError, "eta", {"eta": -1}),
    ],
)
def test_bad_fields_are_refused_at_construction(
    error: type[Exception], name: str, arguments: dict[str, Any]
) -> None:
    refused(lambda: DDIM(**arguments), error, name)


X = torch.zeros(2, 3)
NOISE = [X] * 50


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "model", {"model": None, "x_T": X}),
        (ValueError, "give x_T or shape", {}),
        (ValueError, "give x_T or shape", {"x_T": X, "shape": (2, 3)}),
        (TypeError, "x_T", {"x_T": [[0.0]]}),
        (TypeError, "x_T", {"x_T": X.double()}),
        (TypeError, "x_T", {"x_T": X.long()}),
        (ValueError, "x_T", {"x_T": X[0]}),
        (ValueError, "x_T", {"x_T": X.clone().requires_grad_()}),
        (TypeError, "shape", {"shape": 3}),
        (TypeError, "shape", {"shape": "23"}),
        (TypeError, "shape[1]", {"shape": (2, 3.0)}),
        (TypeError, "shape[0]", {"shape": (True, 3)}),
        (ValueError, "shape[0]", {"shape": (-1, 3)}),
        (ValueError, "shape[1]", {"shape": (2, 0)}),
        (ValueError, "shape", {"shape": (2,)}),
        (ValueError, "device", {"shape": (2, 3), "device": "nonsense"}),
        (ValueError, "device", {"x_T": X, "device": "nonsense"}),
        (ValueError, "device", {"x_T": X, "device": "meta"}),
        (ValueError, "device", {"shape": (2, 3), "device": 1.5}),
        (TypeError, "dtype", {"x_T": X, "dtype": torch.int64}),
        (TypeError, "dtype", {"x_T": X, "dtype": "bfloat16"}),
        (TypeError, "cond", {"x_T": X, "cond": [1]}),
        (TypeError, "cond", {"x_T": X, "cond": X}),
        (ValueError, "noise has one source", {"x_T": X, "seeds": [1, 2], "noise": NOISE}),
        (
            ValueError,
            "noise has one source",
            {"x_T": X, "seeds": [1, 2], "generator": torch.Generator()},
        ),
        (TypeError, "seeds", {"x_T": X, "seeds": 1}),
        (TypeError, "seeds", {"x_T": X, "seeds": "12"}),
        (TypeError, "seeds", {"x_T": X, "seeds": {1, 2}}),
        (TypeError, "seeds", {"x_T": X, "seeds": torch.tensor(1)}),
        (ValueError, "seeds", {"x_T": X, "seeds": [1]}),
        (ValueError, "seeds", {"x_T": X, "seeds": range(3)}),
        (TypeError, "seeds[0]", {"x_T": X, "seeds": [1.0, 2.0]}),
        (TypeError, "seeds[1]", {"x_T": X, "seeds": [1, True]}),
        (TypeError, "seeds[0]", {"x_T": X, "seeds": torch.ones(2)}),
        (TypeError, "seeds[0]", {"x_T": X, "seeds": torch.ones(2, 9, 9)}),
        (ValueError, "seeds[0]", {"x_T": X, "seeds": [-1, 2]}),
        (ValueError, "seeds[1]", {"x_T": X, "seeds": [1, 2**63]}),
        (TypeError, "generator", {"x_T": X, "generator": 1}),
        (TypeError, "generator", {"x_T": X, "generator": [torch.Generator()] * 2}),
        (ValueError, "x_T", {"shape": (2, 3), "noise": NOISE}),
        (ValueError, "noise", {"x_T": X, "noise": NOISE[:-1]}),
        (ValueError, "noise", {"x_T": X, "noise": 1}),
        (ValueError, "noise[3]", {"x_T": X, "noise": [X, X, X, X[:1], *NOISE[4:]]}),
        (ValueError, "noise[0]", {"x_T": X, "noise": [X.double()] * 50}),
        (ValueError, "noise[0]", {"x_T": X, "noise": [None] * 50}),
        (ValueError, "noise", {"x_T": X, "noise": torch.tensor(5)}),
        (TypeError, "dtype", {"x_T": X, "dtype": torch.zeros(2, 3)}),
        (TypeError, "autocast", {"x_T": X, "autocast": torch.zeros(2, 3)}),
        (TypeError, "progress", {"x_T": X, "progress": "yes"}),
        (TypeError, "progress", {"x_T": X, "progress": torch.zeros(2, 3)}),
    ],
)
@pytest.mark.parametrize("run", ["sample", "iterate"])
def test_bad_arguments_are_refused_before_any_work(
    run: str, error: type[Exception], name: str, arguments: dict[str, Any]
) -> None:
    calls: list[int] = []

    def counting(x: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        return x

    # iterate refuses when called, not when the first step is asked for.
    refused(lambda: getattr(DDIM(50), run)(**{"model": counting} | arguments), error, name)
    assert not calls


@pytest.mark.parametrize("value", ["no", None, 2, [], torch.zeros(0), torch.zeros(2)])
def test_a_flag_is_true_or_false(value: Any) -> None:
    ddim = DDIM(2)
    keeps: dict[str, Any] = {"trajectory": "x", "offload": value}
    for call in (
        lambda: ddim.sample(torch.mul, X, **keeps),
        lambda: ddim.iterate(torch.mul, X, reverse=value),
    ):
        with pytest.raises(TypeError, match=r"^(offload|reverse) must be True or False, got .+$"):
            call()


@pytest.mark.parametrize(
    ("error", "said", "output"),
    [
        (TypeError, ("model", "NoneType"), lambda x: None),
        (TypeError, ("model", "ndarray"), lambda x: x.numpy()),
        (TypeError, ("model", "tuple"), lambda x: ()),
        (TypeError, ("model", "str"), lambda x: ("eps",)),
        (TypeError, ("model", "list"), lambda x: [x]),
        (TypeError, ("model", "NoneType"), lambda x: SimpleNamespace(sample=None)),
        (ValueError, ("model", "(2, 3)", "(2, 6)"), lambda x: torch.cat([x, x], 1)),
        (ValueError, ("model", "(2, 3)", "(1, 3)"), lambda x: x[:1]),
        (ValueError, ("model", "(2, 3)", "()"), lambda x: x.sum()),
        (TypeError, ("model", "int64"), lambda x: x.long()),
        (TypeError, ("model", "float64"), lambda x: x.double()),
    ],
)
def test_bad_outputs_of_a_model_are_refused(
    error: type[Exception], said: tuple[str, ...], output: Callable[[Tensor], Any]
) -> None:
    refused(lambda: DDIM(5).sample(lambda x, t: output(x), X), error, *said)


@pytest.mark.parametrize(
    "seeds",
    [
        list(range(5, 8)),
        (5, 6, 7),
        range(5, 8),
        np.arange(5, 8),
        np.arange(5, 8, dtype=np.int32),
        torch.arange(5, 8),
        [np.int64(5), 6, torch.tensor(7)],
    ],
)
def test_seeds_of_any_kind_are_these_numbers_and_a_copy(seeds: Any) -> None:
    found = checked_seeds(seeds, 3)
    assert (found.dtype, found.tolist()) == (torch.int64, [5, 6, 7])
    found.zero_()
    assert int(seeds[0]) == 5


def test_many_seeds_are_not_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastddim.loop.options.whole", unused)
    for seeds in (range(3), [0, 1, 2], torch.arange(3), None):
        assert len(_noise_of(seeds)) == 3


def _noise_of(seeds: Any) -> Tensor:
    found = checked_noise((3, 2), torch.device("cpu"), 1, seeds, None, None).seeds
    assert found is not None
    return found


def unused(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing may be called")
