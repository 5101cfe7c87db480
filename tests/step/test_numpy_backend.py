"""A backend is one file and one line of the table, and then takes every step there is."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import fastddim
from fastddim import DDIM, using
from fastddim.coefficients import PREDICTIONS
from fastddim.dropins import ermongroup
from fastddim.step import backends, reference
from fastddim.step.backends import Entry
from tests import numpy_backend
from tests.paths import ALL, here, randn
from tests.tolerances import NORMAL_ATOL

TABLE = torch.tensor(DDIM(50, eta=1.0).table)
SEEDS = [3, 2**40, 7]
SHAPE = (3, 2, 4, 5)


@pytest.fixture(autouse=True)
def _added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.TABLE, "numpy", Entry(("cpu",), "tests.numpy_backend"))


def assert_agree(found: Tensor, expected: Tensor, name: str, counter_noise: bool) -> None:
    """Equal, but for normals, which numba rounds otherwise than NumPy does."""
    atol = NORMAL_ATOL if name == "numba" and counter_noise else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def model(x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
    at = t.view(-1, 1, 1, 1) / 999
    return torch.tanh(0.5 * x + at + (0.0 if c is None else c))


def test_one_line_adds_it_behind_the_others() -> None:
    assert list(backends.TABLE)[-1] == "numpy"
    assert backends.available("cpu") == [*here("numba", "torch"), "numpy"]
    assert backends.backend("cpu").name != "numpy"
    with using("numpy"):
        assert backends.backend("cpu") is numpy_backend.BACKEND
        with pytest.raises(ValueError, match=r"runs on cuda \(triton, torch\), got 'numpy'"):
            backends.backend("cuda")


@pytest.mark.one_in(2)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_numpy_steps_equal_the_reference(prediction: str, layout: torch.memory_format) -> None:
    x, output, z = (randn(*SHAPE, seed=k).contiguous(memory_format=layout) for k in range(3))
    pair, w = torch.cat([output, z]).contiguous(memory_format=layout), torch.tensor([1.5, 7, 0])
    each, s = torch.tensor([3, 49, 0], dtype=torch.int32), torch.tensor([1.0, 1.5, 2])
    columns = (-1, 1, 1, 1)
    either: list[Tensor | int] = [7, each]
    with using("numpy"):
        for rows, noise, bounds, sum_of, noise_first, dtype in itertools.product(
            either,
            (None, z),
            ("none", "clip", "threshold"),
            ({"rederive": False}, {"rederive": True}, {"posterior": True}),
            (False, True),
            (torch.float32, torch.bfloat16),
        ):
            options: dict[str, Any] = sum_of | {"noise_first": noise_first}
            options |= {"noise": noise, "prediction": prediction}
            eager: dict[str, Any] = sum_of | {"noise_first": noise_first}
            if bounds == "clip":
                options["clip"] = eager["clip"] = 0.7
            elif bounds == "threshold":
                options["threshold"], eager["threshold"] = s, s.view(columns)
            row = TABLE[torch.as_tensor(rows).expand(3).long()].view(*columns, 7)
            for said, weight in ((output, None), (pair, w)):
                next_input = torch.zeros(said.shape, dtype=dtype)
                found = fastddim.ddim_step(
                    x,
                    said.to(dtype),
                    TABLE,
                    rows,
                    guidance=weight,
                    next_input=next_input,
                    **options,
                )
                expected = reference.ddim_step(
                    x,
                    said.to(dtype).float(),
                    row,
                    noise,
                    prediction,
                    guidance=None if weight is None else weight.view(columns),
                    **eager,
                )
                assert found[1] is not None
                assert torch.equal(found[0], expected[0])
                assert torch.equal(found[1], expected[1])
                for half in next_input.split(3):
                    assert torch.equal(half, expected[0].to(dtype))


@pytest.mark.parametrize("name", here(*ALL))
@pytest.mark.parametrize("noisy", [False, True])
def test_numpy_steps_equal_those_of_every_other_backend(name: str, noisy: bool) -> None:
    x, output = randn(*SHAPE), randn(*SHAPE, seed=1)
    rows = torch.tensor([3, 49, 0], dtype=torch.int32)
    seeds = torch.tensor(SEEDS) if noisy else None
    found = []
    for each in ("numpy", name):
        with using(each):
            found.append(fastddim.ddim_step(x, output, TABLE, rows, seeds, clip=1.0)[0])
            step = fastddim.bind(TABLE, clip=1.0)
        found.append(step(x, output, rows, seeds)[0])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])
    assert_agree(found[0], found[2], name, noisy)


@pytest.mark.parametrize("rows", [[3, 50, 0], [-1, 2, 3]])
def test_rows_out_of_range_are_refused(rows: list[int]) -> None:
    x, of_samples = randn(*SHAPE), torch.tensor(rows, dtype=torch.int32)
    with using("numpy"), pytest.raises(ValueError, match=r"rows must lie in \[0, 50\), got "):
        fastddim.ddim_step(x, x, TABLE, of_samples)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", here(*ALL))
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["plain", "guided", "v", "seeds"])
def test_sampling_equals_that_of_every_other(name: str, eta: float, kind: str) -> None:
    ddim = DDIM(4, eta=eta, prediction="v" if kind == "v" else "epsilon")
    given: dict[str, Any] = {"noise": randn(4, *SHAPE, seed=5)} if eta else {}
    x: Tensor | None = randn(*SHAPE)
    if kind == "guided":
        c = randn(3, 1, 1, 1, seed=8)
        given |= {"cond": {"c": c}, "uncond": {"c": 0 * c}, "guidance": 2.5}
    elif kind == "seeds":
        given, x = {"shape": SHAPE, "seeds": SEEDS}, None
    found = []
    for each in ("numpy", name):
        with using(each):
            found.append(ddim.sample(model, x, **given))
    assert found[0].isfinite().all()
    assert_agree(found[0], found[1], name, kind == "seeds")


@pytest.mark.parametrize("name", here(*ALL))
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_drop_in_gives_what_it_gives_by_every_other(name: str, eta: float) -> None:
    betas, found = torch.linspace(1e-4, 0.02, 1000), []
    for each in ("numpy", name):
        torch.manual_seed(3)
        with using(each):
            xs, x0s = ermongroup.generalized_steps(
                randn(*SHAPE), range(0, 1000, 250), model, betas, eta=eta
            )
        found.append(torch.stack([*xs, *x0s]))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", here(*ALL))
def test_the_scheduler_gives_what_it_gives_by_every_other(name: str) -> None:
    diffusers = pytest.importorskip("fastddim.dropins.diffusers", exc_type=ImportError)
    found = []
    for each in ("numpy", name):
        scheduler = diffusers.FastDDIMScheduler(strict=True)
        scheduler.set_timesteps(5)
        x, generator = randn(*SHAPE), torch.Generator().manual_seed(4)
        with using(each):
            for t in scheduler.timesteps:
                said = model(x, t.expand(3))
                x = scheduler.step(said, t, x, eta=1.0, generator=generator).prev_sample
        found.append(x)
    assert torch.equal(*found)
