"""The Euler drop-ins between steps: their place in ``sigmas``, their memory, and their copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim.step.backends import using
from tests.dropins.euler_cases import (
    PAIRS,
    Config,
    assert_same,
    drawn,
    gen,
    loop,
    net,
    never_the_originals,
    scaled,
    start,
    stepped,
)

CASES: list[tuple[str, Config]] = [
    ("flow", {}),
    ("flow", {"stochastic_sampling": True}),
    ("euler", {}),
    ("euler", {"prediction_type": "v_prediction"}),
]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda y: y.to(memory_format=torch.channels_last),
    "sliced": lambda y: torch.cat([y, y], dim=2)[:, :, : y.shape[2]],
    "transposed": lambda y: y.transpose(2, 3).contiguous().transpose(2, 3),
    "repeated": lambda y: y[:, :1].expand_as(y),
}
cases = pytest.mark.parametrize(("kind", "config"), CASES)
kinds = pytest.mark.parametrize("kind", PAIRS)


def both(kind: str, config: Config | None = None, steps: int = 12) -> tuple[Any, Any]:
    made = tuple(cls(**config or {}) for cls in PAIRS[kind])
    for scheduler in made:
        scheduler.set_timesteps(steps)
    return never_the_originals(made[0]), made[1]


# --- Where a loop starts ----------------------------------------------------------------------


@cases
@pytest.mark.parametrize("told", ["begin index", "timestep", "number"])
@pytest.mark.parametrize("first", [0, 1, 7, 11])
def test_loops_that_start_anywhere_are_the_originals(
    kind: str, config: Config, told: str, first: int
) -> None:
    found = []
    for scheduler in both(kind, config):
        if told == "begin index":
            scheduler.set_begin_index(first)
        if told == "number":
            x, g = start(scheduler), gen(1)
            kept = []
            for t in scheduler.timesteps.tolist()[first:]:
                x = stepped(scheduler, x, t, generator=g).prev_sample
                kept.append(x)
        else:
            kept = loop(scheduler, start(scheduler), gen(1), first)
        assert scheduler.step_index == 12
        assert scheduler.begin_index == (first if told == "begin index" else None)
        found.append(kept)
    assert_same(*found)


@kinds
@pytest.mark.parametrize("place", [-1, -13])
def test_negative_places_are_the_originals(kind: str, place: int) -> None:
    found = []
    for scheduler in (cls() for cls in PAIRS[kind]):
        scheduler.set_timesteps(12)
        scheduler.set_begin_index(place)
        result = stepped(scheduler, drawn(), scheduler.timesteps[0], generator=gen(0))
        found.append(list(result.values()))
    assert_same(*found)


@kinds
def test_a_timestep_that_repeats_is_the_second(kind: str) -> None:
    found = []
    for scheduler in both(kind):
        scheduler.timesteps[5] = scheduler.timesteps[4]
        g = gen(1)
        found.append(
            list(stepped(scheduler, drawn(), scheduler.timesteps[4], generator=g).values())
        )
        assert scheduler.step_index == 6
    assert_same(*found)


@cases
@pytest.mark.parametrize("how", ["sigmas", "in place", "data", "cut", "index", "set again"])
def test_what_the_caller_changes_is_used(kind: str, config: Config, how: str) -> None:
    found = []
    for scheduler in both(kind, config):
        x, g = start(scheduler), gen(1)
        for t in scheduler.timesteps[:5]:
            x = stepped(scheduler, x, t, generator=g).prev_sample
        if how == "sigmas":
            scheduler.sigmas = scheduler.sigmas * 0.9
        if how == "in place":
            scheduler.sigmas[6:9] *= 1.01
        if how == "data":
            scheduler.sigmas.data[6:9] *= 1.01
        if how == "cut":
            scheduler.timesteps, scheduler.sigmas = scheduler.timesteps[:9], scheduler.sigmas[:10]
        if how == "index":
            scheduler._step_index = 3
        if how == "set again":
            scheduler.set_timesteps(9)
        found.append(loop(scheduler, x, g, 6)[:6])
    assert_same(*found)


# --- On a GPU ---------------------------------------------------------------------------------


@pytest.mark.gpu
@cases
def test_on_a_gpu_a_loop_is_that_of_a_cpu(kind: str, config: Config) -> None:
    ends = []
    for device in ("cpu", "cuda"):
        scheduler = never_the_originals(PAIRS[kind][0](**config))
        scheduler.set_timesteps(12, device=device)
        x, g = start(scheduler).to(device), gen(5)
        for t in scheduler.timesteps:
            x = stepped(scheduler, x, t, generator=g).prev_sample
        ends.append(x.cpu())
    assert (ends[0] - ends[1]).abs().max() <= 1e-5 * ends[0].abs().max()


# --- Where the original's step runs -----------------------------------------------------------


@cases
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_derivatives_of_other_kinds_are_the_originals(kind: str, config: Config) -> None:
    found = []
    for cls in PAIRS[kind]:
        scheduler = cls(**config)
        scheduler.set_timesteps(12)
        t, g = scheduler.timesteps[3], gen(1)
        scaled(scheduler, drawn(), t)

        def first(x: Tensor, s: Any = scheduler, t: Any = t, g: Any = g) -> Tensor:
            return s.step(net(x, 3), t, x, generator=g).prev_sample  # type: ignore[no-any-return]

        found.append([*torch.func.jvp(first, (drawn(),), (drawn(2),))])
    assert_same(*found)


@kinds
def test_outputs_of_another_shape_are_the_originals(kind: str) -> None:
    found = []
    for cls in PAIRS[kind]:
        scheduler = cls()
        scheduler.set_timesteps(12)
        t = scheduler.timesteps[0]
        scaled(scheduler, drawn(), t)
        g = gen(1)
        output = torch.ones(1, 1, 1, 1)
        found.append(list(scheduler.step(output, t, drawn(), generator=g).values()))
    assert_same(*found)


@kinds
def test_a_replaced_step_index_method_is_obeyed(kind: str) -> None:
    class Third(PAIRS[kind][0]):  # type: ignore[misc]
        def index_for_timestep(self, *_: Any) -> int:
            return 3

    scheduler = Third()
    scheduler.set_timesteps(12)
    stepped(scheduler, drawn(), scheduler.timesteps[0])
    assert scheduler.step_index == 4


# --- Memory -----------------------------------------------------------------------------------


@cases
def test_nothing_that_is_held_is_written(kind: str, config: Config) -> None:
    scheduler, _ = both(kind, config)
    x, kept = drawn(shape=(4, 3, 64, 64)), []
    for t in scheduler.timesteps:
        output = net(scaled(scheduler, x, t), t)
        found = list(scheduler.step(output, t, x).values())
        kept += [(held, held.clone()) for held in (x, output, *found)]
        x = found[0]
    assert all(torch.equal(held, then) for held, then in kept)


@cases
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda s: pickle.loads(pickle.dumps(s))]
)
def test_a_copy_in_the_middle_of_a_loop_goes_on_alone(
    kind: str, config: Config, copied: Callable[[Any], Any]
) -> None:
    scheduler = PAIRS[kind][0](**config)
    scheduler.set_timesteps(12)
    g = gen(1)
    x = start(scheduler)
    for t in scheduler.timesteps[:3]:
        x = stepped(scheduler, x, t, generator=g).prev_sample
    another = copied(scheduler)
    loops = [loop(s, x, gen(2), 3) for s in (scheduler, another)]
    assert_same(*loops)


@kinds
def test_saved_and_loaded_both_ways(kind: str, tmp_path: Path) -> None:
    fast, original = PAIRS[kind]
    config = {"shift": 3.0} if kind == "flow" else {"prediction_type": "v_prediction"}
    fast(**config).save_pretrained(tmp_path)
    again, plain = (cls.from_pretrained(str(tmp_path)) for cls in (fast, original))
    assert type(again) is fast
    assert type(plain) is original
    for name, value in config.items():
        assert again.config[name] == plain.config[name] == value
    plain.save_pretrained(tmp_path)
    assert type(fast.from_pretrained(str(tmp_path))) is fast
    assert original in fast._get_compatibles()


@cases
@pytest.mark.parametrize("first", [True, False])
def test_inference_mode_and_out_of_it(kind: str, config: Config, first: bool) -> None:
    want = loop(both(kind, config)[0], drawn(), gen(1))
    scheduler, _ = both(kind, config)
    x, g = drawn(), gen(1)
    for i, t in enumerate(scheduler.timesteps):
        with torch.inference_mode(first == (i < 6)):
            found = stepped(scheduler, x, t, generator=g)
            x = found.prev_sample
    assert torch.equal(x, want[-1 if kind == "flow" else -2])


@cases
def test_gradients_after_inference_mode_are_the_originals(kind: str, config: Config) -> None:
    found = []
    for cls in PAIRS[kind]:
        scheduler, g = cls(**config), gen(1)
        scheduler.set_timesteps(6)
        x = start(scheduler)
        with torch.inference_mode():
            for t in scheduler.timesteps[:3]:
                x = stepped(scheduler, x, t, generator=g).prev_sample
        leaf = x.clone().requires_grad_()
        end = leaf
        for t in scheduler.timesteps[3:]:
            end = stepped(scheduler, end, t, generator=g).prev_sample
        end.sum().backward()
        found.append([end.detach(), leaf.grad])
    assert_same(*found)  # type: ignore[arg-type]


@pytest.mark.one_in(2)
@cases
@pytest.mark.parametrize("output", ["contiguous", *LAYOUTS])
@pytest.mark.parametrize("sample", ["contiguous", "channels_last", "sliced", "transposed"])
def test_each_layout_has_the_originals_bits_and_layout(
    kind: str, config: Config, sample: str, output: str
) -> None:
    """A network rounds differently in another layout, so the result's must be the original's."""
    found = []
    for scheduler in both(kind, config):
        x, kept, g = start(scheduler), [], gen(1)
        for t in scheduler.timesteps[:3]:
            u = net(scaled(scheduler, x, t), t)
            u, x = LAYOUTS.get(output, Tensor.contiguous)(u), LAYOUTS.get(sample, Tensor.clone)(x)
            result = scheduler.step(u, t, x, generator=g)
            values = list(result.values())
            # The x0 of a v model is laid out as the state, and the original's as the output.
            kept += [values[0], *(x0.contiguous() for x0 in values[1:])]
            x = result.prev_sample.contiguous()
        found.append(kept)
    assert_same(*found)


@cases
def test_without_numba_the_steps_are_the_same(kind: str, config: Config) -> None:
    ours, theirs = both(kind, config)
    with using("torch"):
        found = loop(ours, start(ours), gen(1))
    assert_same(found, loop(theirs, start(theirs), gen(1)))
