"""The step for DiffSynth-Studio's DDIM scheduler, beside a description of it."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim.dropins import diffsynth
from fastddim.step.buffers import FRESH
from tests.dropins.diffsynth_original import Described, Earlier
from tests.refusals import refused

LARGE, SMALL = (1, 4, 96, 96), (2, 4, 8, 8)
CONFIGS: list[dict[str, Any]] = [
    {},
    {"beta_schedule": "linear"},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "v_prediction", "rescale_zero_terminal_snr": True},
]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loop(scheduler: Any, x: Tensor) -> list[Tensor]:
    states = []
    for t in scheduler.timesteps:
        x = scheduler.step(0.8 * x.clamp(-1.5, 1.5) + 1e-3 * (int(t) % 97), t, x)
        states.append(x)
    return states


def without_own_step(cls: Any, **config: Any) -> Any:
    """A scheduler with the fused step, whose class has no step to fall back to."""
    scheduler = type("Unstepped", (cls,), {"step": None})(**config)
    scheduler.step = partial(diffsynth.step, scheduler)
    return scheduler


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cls", [Described, Earlier])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_loops_are_bit_identical(config: Any, cls: Any, dtype: torch.dtype) -> None:
    assert LARGE[1] * LARGE[2] * LARGE[3] >= FRESH
    theirs, ours = cls(**config), without_own_step(cls, **config)
    for steps, strength in ((1, 1.0), (7, 1.0), (20, 0.6)):
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(steps, strength)
        for x in (randn(*LARGE), randn(*LARGE).contiguous(memory_format=torch.channels_last)):
            pairs = zip(loop(theirs, x.to(dtype)), loop(ours, x.to(dtype)), strict=True)
            for a, b in pairs:
                assert a.dtype == b.dtype == dtype
                assert torch.equal(a, b)
                assert a.isfinite().all()


@pytest.mark.parametrize("t", [999, 333, torch.tensor(999), torch.tensor([444])], ids=str)
def test_timesteps_of_any_kind_are_the_originals(t: Any) -> None:
    x, output = randn(*LARGE), randn(*LARGE, seed=1)
    for cls, to_final in ((Described, False), (Described, True), (Earlier, False)):
        theirs, ours = cls(), without_own_step(cls)
        given: Any = torch.as_tensor(t) if cls is Described else int(t)
        assert torch.equal(
            theirs.step(output, given, x, to_final), ours.step(output, given, x, to_final)
        )


def test_the_nearest_timestep_is_the_originals() -> None:
    x, output, t = randn(*LARGE), randn(*LARGE, seed=1), torch.tensor([500.0])
    theirs = Described()
    assert torch.equal(theirs.step(output, t, x), diffsynth.step(theirs, output, t, x))


def test_other_tensors_are_the_originals() -> None:
    theirs, t = Described(), torch.tensor(999.0)
    for x, output in (
        (randn(*SMALL), randn(*SMALL, seed=1)),
        (randn(*LARGE).double(), randn(*LARGE, seed=1).double()),
        (randn(*LARGE).bfloat16(), randn(*LARGE, seed=1)),
        (randn(*LARGE), randn(*LARGE, seed=1)[:, :1]),
    ):
        a, b = theirs.step(output, t, x), diffsynth.step(theirs, output, t, x)
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    x = randn(*LARGE).requires_grad_()
    diffsynth.step(theirs, x.detach(), t, x).sum().backward()
    assert x.grad is not None
    theirs.alphas_cumprod = torch.tensor(theirs.alphas_cumprod)
    given = randn(*LARGE), t, randn(*LARGE)
    assert torch.equal(theirs.step(*given), diffsynth.step(theirs, *given))
    zero = Described(rescale_zero_terminal_snr=True)
    with pytest.raises(ZeroDivisionError):
        diffsynth.step(zero, randn(*LARGE), t, randn(*LARGE))


def test_levels_and_timesteps_that_users_set_are_followed() -> None:
    theirs, ours = Described(), without_own_step(Described)
    x = randn(*LARGE)
    before = loop(ours, x)[-1]
    for scheduler in (theirs, ours):
        scheduler.alphas_cumprod = [level**1.5 for level in scheduler.alphas_cumprod]
        scheduler.timesteps = torch.tensor([900.0, 500.0, 20.0])
    a, b = loop(theirs, x)[-1], loop(ours, x)[-1]
    assert torch.equal(a, b)
    assert not torch.equal(a, before)


def test_an_infinite_output_gives_nan() -> None:
    theirs, output, t = Described(), randn(*LARGE), torch.tensor(999.0)
    output[0, 0, 0, 0] = torch.inf
    given = output, t, randn(*LARGE)
    a, b = theirs.step(*given), diffsynth.step(theirs, *given)
    assert a[0, 0, 0, 0].isinf()
    assert b[0, 0, 0, 0].isnan()
    assert torch.equal(a.flatten()[1:], b.flatten()[1:])


def test_a_copy_steps_by_its_own_levels() -> None:
    ours = without_own_step(Described)
    twin = copy.deepcopy(ours)
    assert twin.step.args == (twin,)


def test_what_a_caller_keeps_never_changes() -> None:
    ours = without_own_step(Described)
    states = loop(ours, randn(*LARGE))
    held = [x.clone() for x in states]
    loop(ours, randn(*LARGE, seed=3))
    assert all(torch.equal(a, b) for a, b in zip(states, held, strict=True))


def test_other_objects_are_refused() -> None:
    x = randn(*SMALL)
    for other in (None, SimpleNamespace(timesteps=[1], alphas_cumprod=[1.0])):
        refused(partial(diffsynth.step, other, x, 1, x), TypeError, "scheduler must be")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_loops_are_bit_identical(dtype: torch.dtype) -> None:
    theirs, ours = Described(), without_own_step(Described)
    x = randn(*SMALL).to("cuda", dtype)
    assert torch.equal(loop(theirs, x)[-1], loop(ours, x)[-1])
