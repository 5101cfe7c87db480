"""Trajectories: which states are kept, that they are those of the loop, and what they may cost."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim import DDIM, NoiseSchedule, Step
from fastddim.loop import trajectory as module
from tests.loops import conditioned, drawn
from tests.refusals import refused

LINEAR = NoiseSchedule.linear()
SHAPE, SEEDS = (3, 2, 4), [1, 2, 3]
DDPM = DDIM(10, eta=1.0, schedule=LINEAR)
COMMON: dict[str, Any] = {"shape": SHAPE, "seeds": SEEDS, "cond": {"c": drawn(3, 2, 1)}}


@pytest.fixture(scope="module")
def steps() -> list[Step]:
    return list(DDPM.iterate(conditioned, **COMMON))


@pytest.mark.parametrize("names", ["x", "x0", ("x",), ["x0"], ("x", "x0"), ["x0", "x"]])
@pytest.mark.parametrize("offload", [False, True])
def test_a_trajectory_keeps_the_states_of_the_given_names(
    names: Any, offload: bool, steps: list[Step]
) -> None:
    out, path = DDPM.sample(conditioned, trajectory=names, offload=offload, **COMMON)
    assert torch.equal(out, steps[-1].x)
    assert path.index == tuple(range(10))
    assert path.pairs == DDPM.pairs
    for name, kept in (("x", path.x), ("x0", path.x0)):
        if name not in ((names,) if isinstance(names, str) else names):
            assert kept is None
            continue
        assert kept is not None
        assert kept.dtype == torch.float32
        assert torch.equal(kept, torch.stack([getattr(step, name) for step in steps]))


def test_a_trajectorys_repr_prints_shapes() -> None:
    _, path = DDPM.sample(conditioned, trajectory="x0", every=5, **COMMON)
    pairs = "((500, 400), (0, -1))"
    assert repr(path) == f"Trajectory(index=(4, 9), pairs={pairs}, x=None, x0=float32 (2, 3, 2, 4))"
    assert path == path  # the fields' tensors would raise


@pytest.mark.parametrize(
    ("every", "start", "index"),
    [
        (1, 0, range(10)),
        (3, 0, [2, 5, 8, 9]),
        (5, 0, [4, 9]),
        (10, 0, [9]),
        (99, 0, [9]),
        (3, 4, [6, 9]),
        (4, 4, [7, 9]),
        (1, 9, [9]),
    ],
)
def test_every_kth_state_is_kept_and_always_the_last(
    every: int, start: int, index: Any, steps: list[Step]
) -> None:
    given = {**COMMON, "shape": None, "x_T": steps[start - 1].x} if start else COMMON
    out, path = DDPM.sample(conditioned, start=start, trajectory=("x", "x0"), every=every, **given)
    assert path.index == tuple(index)
    assert path.pairs == tuple(DDPM.pairs[i] for i in index)
    assert path.x is not None
    assert path.x0 is not None
    assert torch.equal(path.x, torch.stack([steps[i].x for i in index]))
    assert torch.equal(path.x0, torch.stack([steps[i].x0 for i in index]))
    assert torch.equal(path.x[-1], out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_are_kept_in_the_results_dtype(dtype: torch.dtype) -> None:
    x_T = drawn(*SHAPE).to(dtype)
    common: dict[str, Any] = {"seeds": SEEDS, "cond": COMMON["cond"]}
    out, path = DDPM.sample(conditioned, x_T, trajectory=("x", "x0"), **common)
    steps = list(DDPM.iterate(conditioned, x_T, **common))
    assert path.x is not None
    assert path.x0 is not None
    assert path.x.dtype == path.x0.dtype == out.dtype == dtype
    assert torch.equal(path.x, torch.stack([step.x for step in steps]))
    assert torch.equal(path.x0, torch.stack([step.x0 for step in steps]))


@pytest.mark.parametrize(("every", "index"), [(1, (0, 1, 2, 3, 4)), (2, (1, 3, 4)), (9, (4,))])
def test_a_loop_that_ends_early_keeps_the_states_it_reached(
    every: int, index: tuple[int, ...], steps: list[Step]
) -> None:
    out, path = DDPM.sample(
        conditioned,
        trajectory=("x", "x0"),
        every=every,
        callback=lambda step: step.index == 4,
        **COMMON,
    )
    assert torch.equal(out, steps[4].x)
    assert path.index == index
    assert path.pairs == tuple(DDPM.pairs[i] for i in index)
    assert path.x is not None
    assert path.x0 is not None
    assert torch.equal(path.x, torch.stack([steps[i].x for i in index]))
    assert torch.equal(path.x0, torch.stack([steps[i].x0 for i in index]))


def test_a_trajectory_is_memory_of_its_own() -> None:
    seen: list[Tensor] = []

    def watching(step: Step) -> None:
        seen.append(step.x)

    out, path = DDPM.sample(conditioned, trajectory="x", callback=watching, **COMMON)
    assert path.x is not None
    before = path.x.clone()
    DDPM.sample(conditioned, trajectory="x", **COMMON)
    for tensor in (out, *seen):
        tensor.zero_()
    assert torch.equal(path.x, before)


def test_states_are_copied_and_not_merely_held(steps: list[Step]) -> None:
    # A model that writes to its input, as it should not, cannot reach what has been kept.
    def writing(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        output = conditioned(x, t, c)
        seen.append(x)
        return output

    seen: list[Tensor] = []
    _, path = DDPM.sample(writing, trajectory="x", **COMMON)
    for x in seen:
        x.zero_()
    assert path.x is not None
    assert torch.equal(path.x, torch.stack([step.x for step in steps]))


@pytest.mark.parametrize("offload", [False, True])
def test_one_that_does_not_fit_is_refused_before_any_work(
    offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 2 * 4 * 24 * 4  # names, kept states, elements, bytes

    def call(free: int | None) -> Any:
        monkeypatch.setattr(module, "free_bytes", lambda device: free)
        return DDPM.sample(
            unused if free == needed - 1 else conditioned,
            trajectory=("x", "x0"),
            every=3,
            offload=offload,
            **COMMON,
        )

    refused(
        lambda: call(needed - 1),
        ValueError,
        "the trajectory, 4 states of (3, 2, 4)",
        "768 bytes on cpu",
        "767 bytes are free",
        "every=",
    )
    for free in (needed, None):
        _, path = call(free)
        assert len(path.index) == 4


def test_its_size_is_logged_before_the_first_model_call(caplog: pytest.LogCaptureFixture) -> None:
    said: list[str] = []

    def listening(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        said.append(caplog.text)
        return conditioned(x, t, c)

    with caplog.at_level(logging.INFO, logger="fastddim"):
        DDPM.sample(listening, trajectory="x", **COMMON)
        assert "10 states of (3, 2, 4) as x, takes 960 bytes on cpu" in said[0]
        caplog.clear()
        DDPM.sample(listening, **COMMON)
    assert caplog.text == ""


def test_free_memory_is_read_from_the_system() -> None:
    free = module.free_bytes(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
    assert module.free_bytes(torch.device("meta")) is None


@pytest.mark.parametrize(
    ("n", "shown"),
    [(999, "999 bytes"), (1000, "1.0 kB"), (1_500_000, "1.5 MB"), (1_234_567_890, "1.2 GB")],
)
def test_sizes_are_shown_in_units(n: int, shown: str) -> None:
    assert module.shown_bytes(n) == shown


def unused(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing may be called")


@pytest.mark.parametrize(
    ("error", "said", "arguments"),
    [
        (TypeError, ("trajectory", "bool"), {"trajectory": True}),
        (TypeError, ("trajectory", "set"), {"trajectory": {"x"}}),
        (ValueError, ("trajectory", "'y'"), {"trajectory": "y"}),
        (ValueError, ("trajectory", "()"), {"trajectory": ()}),
        (ValueError, ("trajectory", "'eps'"), {"trajectory": ("x", "eps")}),
        (ValueError, ("trajectory", "'x', 'x'"), {"trajectory": ("x", "x")}),
        (ValueError, ("every", "0"), {"trajectory": "x", "every": 0}),
        (TypeError, ("every", "1.5"), {"trajectory": "x", "every": 1.5}),
        (TypeError, ("callback", "int"), {"callback": 1}),
    ],
)
def test_bad_arguments_are_refused(
    error: type[Exception], said: tuple[str, ...], arguments: dict[str, Any]
) -> None:
    refused(lambda: DDPM.sample(unused, **COMMON, **arguments), error, *said)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_offloaded_states_are_the_states(dtype: torch.dtype) -> None:
    x_T = drawn(8, 3, 64, 64).cuda().to(dtype)
    cond = {"c": drawn(8, 3, 1, 1).cuda()}
    paths = []
    for offload in (False, True):
        _, path = DDIM(50, eta=1.0).sample(
            conditioned,
            x_T,
            seeds=range(8),
            cond=cond,
            trajectory=("x", "x0"),
            every=2,
            offload=offload,
        )
        assert path.x is not None
        assert path.x0 is not None
        assert path.x.device.type == ("cpu" if offload else "cuda")
        assert path.x.is_pinned() == offload
        paths.append((path.x.cpu(), path.x0.cpu()))
    for there, here in zip(*paths, strict=True):
        assert torch.equal(there, here)


def test_a_trajectory_keeps_the_state_that_a_callback_returns(steps: list[Step]) -> None:
    out, path = DDPM.sample(
        conditioned, trajectory="x", callback=lambda step: 0.5 * step.x, **COMMON
    )
    assert path.x is not None
    assert torch.equal(path.x[0], 0.5 * steps[0].x)
    assert torch.equal(path.x[-1], out)


def test_a_result_shares_no_memory_with_a_callbacks_tensor() -> None:
    held: list[Tensor] = []

    def keep(step: Step) -> Tensor:
        held.append(step.x.clone())
        return held[-1]

    out = DDPM.sample(conditioned, callback=keep, **COMMON)
    before = out.clone()
    held[-1].fill_(7)
    assert torch.equal(out, before)
