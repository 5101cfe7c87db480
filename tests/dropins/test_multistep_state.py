"""The multistep drop-in's state between steps, where it starts, its memory, and its copies."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim.dropins import _shared
from fastddim.step.backends import using
from tests.dropins.multistep_cases import FAST, ORIGINAL, SDE, Config, drawn, loop, net


def both(config: Config | None = None, steps: int = 12, **given: Any) -> tuple[Any, Any]:
    made = FAST(**config or {}), ORIGINAL(**config or {})
    for scheduler in made:
        scheduler.set_timesteps(**(given or {"num_inference_steps": steps}))
    return made


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def stepped(scheduler: Any, x: Tensor, t: Any, **given: Any) -> Tensor:
    found: Tensor = scheduler.step(net(x, t), t, x, **given).prev_sample
    return found


@pytest.mark.parametrize(
    "config", [{}, SDE, {"solver_order": 1}, {"final_sigmas_type": "sigma_min"}]
)
@pytest.mark.parametrize("S", [1, 2, 3, 16])
def test_the_state_after_each_step_is_the_originals(config: Config, S: int) -> None:
    schedulers = both(config, S)
    states = [drawn(), drawn()]
    for t in schedulers[0].timesteps:
        torch.manual_seed(int(t))
        states[0] = stepped(schedulers[0], states[0], t)
        torch.manual_seed(int(t))
        states[1] = stepped(schedulers[1], states[1], t)
        assert_near(*states)
        for name in ("step_index", "begin_index", "lower_order_nums"):
            assert getattr(schedulers[0], name) == getattr(schedulers[1], name)
        for ours, theirs in zip(*(s.model_outputs for s in schedulers), strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert_near(ours, theirs)


def test_all_else_is_the_originals() -> None:
    ours, theirs = both()
    assert ours.order == theirs.order == 1
    assert len(ours) == len(theirs)
    for name in ("timesteps", "sigmas", "betas", "alphas_cumprod", "lambda_t"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    x, z, t = drawn(), drawn(2), torch.tensor([500, 20])
    assert torch.equal(ours.add_noise(x, z, t), theirs.add_noise(x, z, t))
    assert ours.scale_model_input(x, 3) is x
    for s in (ours, theirs):
        s.set_begin_index(4)
        s._init_step_index(0)
    found, want = (s.convert_model_output(z, sample=x) for s in (ours, theirs))
    assert torch.equal(found, want)
    assert torch.equal(ours.add_noise(x, z, t), theirs.add_noise(x, z, t))
    for name in ("step", "set_timesteps"):
        theirs_, ours_ = (inspect.signature(getattr(c, name)) for c in (ORIGINAL, FAST))
        assert list(theirs_.parameters) == list(ours_.parameters)
    assert list(inspect.signature(ORIGINAL).parameters) == list(inspect.signature(FAST).parameters)


@pytest.mark.parametrize("how", ["begin index", "its own", "a copy", "number", "none of them"])
def test_a_loop_starts_where_the_originals_does(how: str) -> None:
    """Image to image: the first step has no history, wherever it is."""
    ends = []
    for scheduler in both():
        x = drawn()
        if how == "begin index":
            scheduler.set_begin_index(5)
        for t in scheduler.timesteps[5:]:
            told = {"a copy": t.clone(), "number": int(t), "none of them": 3}.get(how, t)
            x = scheduler.step(net(x, t), told, x).prev_sample
            if how == "none of them":
                break
        ends.append((x, scheduler.step_index, scheduler.lower_order_nums))
    assert_near(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


def test_set_timesteps_starts_anew() -> None:
    ours, _ = both()
    x = drawn()
    alone = loop(ours, x)
    ours.set_timesteps(12)
    for t in ours.timesteps[:5]:
        stepped(ours, drawn(3), t)
    ours.set_timesteps(12)
    assert ours.model_outputs == [None, None]
    assert torch.equal(loop(ours, x), alone)


def test_a_first_timestep_that_repeats_is_the_first() -> None:
    """The original begins at the second of them, and runs out of levels at the end."""
    ours, theirs = both(timesteps=[999, 999, 500, 100])
    x = drawn()
    found = loop(ours, x)
    with pytest.raises(IndexError):
        loop(theirs, x)
    ours.set_timesteps(timesteps=[999, 500, 100])
    assert_near(found, loop(ours, x))  # A step of no length changes nothing.


def test_a_step_follows_what_the_scheduler_is_changed_to() -> None:
    def change(scheduler: Any, how: str) -> None:
        if how == "sigmas":
            scheduler.sigmas = scheduler.sigmas * 0.9
        if how == "in place":
            scheduler.sigmas.data[6:9] *= 1.01
        if how == "cut":
            scheduler.timesteps, scheduler.sigmas = scheduler.timesteps[:9], scheduler.sigmas[:10]
        if how == "history":
            scheduler.model_outputs[-1] = drawn(8)
        if how == "half history":
            scheduler.model_outputs[-1] = drawn(8).bfloat16()
        if how == "forgotten":
            scheduler.model_outputs, scheduler.lower_order_nums = [None, None], 0
        if how == "index":
            scheduler._step_index = 7

    for how in ("sigmas", "in place", "cut", "history", "half history", "forgotten", "index"):
        ends = []
        for scheduler in both():
            x = drawn()
            for t in scheduler.timesteps[:5]:
                x = stepped(scheduler, x, t)
            change(scheduler, how)
            for t in scheduler.timesteps[5:8]:
                x = stepped(scheduler, x, t)
            ends.append(x)
        tolerance = 3e-2 if how == "half history" else 1e-5
        assert (ends[0] - ends[1]).abs().max() <= tolerance * ends[1].abs().max(), how


# --- Where the original's step runs -----------------------------------------------------------


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the fused steps."""
    count = [0]
    own = _shared.Buffers.stepped

    def counted(*arguments: Any, **given: Any) -> Any:
        count[0] += 1
        return own(*arguments, **given)

    monkeypatch.setattr(_shared.Buffers, "stepped", counted)
    return count


def test_one_fused_step_each_and_the_original_otherwise(fused: list[int]) -> None:
    scheduler, _ = both()
    x = drawn()
    with torch.no_grad():
        for t in scheduler.timesteps[:4]:
            x = stepped(scheduler, x.requires_grad_(False), t)
    assert fused == [4]
    x = stepped(scheduler, x.double(), scheduler.timesteps[4])
    x = stepped(scheduler, x.float().requires_grad_(), scheduler.timesteps[5])
    x.square().sum().backward()
    x = scheduler.step(torch.ones(1, 1, 1, 1), 0, x.detach()).prev_sample
    assert fused == [4]
    assert scheduler.step_index == 7


@pytest.mark.parametrize("config", [{}, SDE])
def test_gradients_are_the_originals(config: Config) -> None:
    grads = []
    for scheduler in both(config, 4):
        x = drawn().requires_grad_()
        torch.manual_seed(2)
        end = x
        for t in scheduler.timesteps:
            end = stepped(scheduler, end, t)
        end.square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)  # type: ignore[arg-type]


@pytest.mark.parametrize("mixed", [1, 2, 3])
def test_both_steps_share_their_history(mixed: int) -> None:
    scheduler, theirs = both()
    x = y = drawn()
    for i, t in enumerate(theirs.timesteps):
        y = stepped(theirs, y, t)
        x = stepped(scheduler, x.detach().requires_grad_(i % 4 == mixed), t)
    assert_near(x.detach(), y)


def test_subclasses_may_replace_methods_of_the_originals_step(fused: list[int]) -> None:
    class Bounded(FAST):  # type: ignore[misc]
        def convert_model_output(self, *arguments: Any, **given: Any) -> Tensor:
            found: Tensor = super().convert_model_output(*arguments, **given)
            return found.clamp(-0.5, 0.5)

    class Named(FAST):  # type: ignore[misc]
        pass

    for cls, steps in ((Bounded, 0), (Named, 12)):
        fused[0] = 0
        scheduler = cls()
        scheduler.set_timesteps(12)
        end = loop(scheduler, drawn())
        assert fused == [steps]
        assert (end.abs().max() <= 0.5) == (steps == 0)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_derivatives_of_other_kinds_are_the_originals() -> None:
    found = []
    for scheduler in both():
        first = partial(stepped, scheduler, t=scheduler.timesteps[0])
        found.append(torch.func.jvp(lambda x, f=first: f(x), (drawn(),), (drawn(2),)))
    assert all(map(torch.equal, *found))


# --- Memory -----------------------------------------------------------------------------------


def test_nothing_that_is_held_is_written() -> None:
    scheduler, _ = both()
    x, kept = drawn(shape=(4, 3, 64, 64)), []
    for t in scheduler.timesteps:
        output = net(x, t)
        x = scheduler.step(output, t, x).prev_sample
        latest = scheduler.model_outputs[-1]
        kept += [(held, held.clone()) for held in (x, output, latest)]
    assert all(torch.equal(held, then) for held, then in kept)


def test_the_history_is_the_last_x0_itself_and_memory_is_reused() -> None:
    scheduler, _ = both(None, 20)
    x, before = drawn(shape=(4, 3, 64, 64)), None
    addresses: list[set[int]] = [set(), set()]
    for t in scheduler.timesteps[:-1]:
        x = stepped(scheduler, x, t)
        earlier, latest = scheduler.model_outputs
        assert earlier is before
        before = latest
        for seen, tensor in zip(addresses, (x, latest), strict=True):
            seen.add(tensor.data_ptr())
        del earlier, latest
    assert max(map(len, addresses)) <= 4


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda s: pickle.loads(pickle.dumps(s))]
)
def test_a_copy_in_the_middle_of_a_loop_goes_on_alone(copied: Callable[[Any], Any]) -> None:
    scheduler, _ = both(None, 10)
    x = drawn()
    for t in scheduler.timesteps[:3]:
        x = stepped(scheduler, x, t)
    another = copied(scheduler)
    if copied is copy.copy:  # which shares the list, as the original's does
        another.model_outputs = list(another.model_outputs)
    states = [x, x]
    for t in scheduler.timesteps[3:]:
        states = [stepped(s, y, t) for s, y in zip((scheduler, another), states, strict=True)]
        assert torch.equal(*states)


def test_saved_and_loaded_both_ways(tmp_path: Path) -> None:
    scheduler = FAST(**SDE, use_karras_sigmas=True)
    scheduler.save_pretrained(tmp_path)
    again, plain = (cls.from_pretrained(str(tmp_path)) for cls in (FAST, ORIGINAL))
    assert type(again) is FAST
    assert type(plain) is ORIGINAL
    assert again.config.use_karras_sigmas is plain.config.use_karras_sigmas is True
    plain.save_pretrained(tmp_path)
    assert FAST.from_pretrained(str(tmp_path)).config.algorithm_type == SDE["algorithm_type"]
    assert ORIGINAL in FAST._get_compatibles()


@pytest.mark.parametrize("first", [True, False])
def test_inference_mode_and_out_of_it(first: bool) -> None:
    want = loop(both()[0], drawn())
    scheduler, _ = both()
    x = drawn()
    for i, t in enumerate(scheduler.timesteps):
        with torch.inference_mode(first == (i < 6)):
            x = stepped(scheduler, x, t)
    assert torch.equal(x, want)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed"])
@pytest.mark.parametrize("config", [{}, SDE, {"thresholding": True, "sample_max_value": 1.5}])
def test_other_layouts_give_the_same(config: Config, layout: str) -> None:
    x = drawn()
    lying: Callable[[Tensor], Tensor] = {
        "channels_last": lambda y: y.to(memory_format=torch.channels_last),
        "sliced": lambda y: torch.cat([y, y], dim=2)[:, :, : y.shape[2]],
        "transposed": lambda y: y.transpose(2, 3).contiguous().transpose(2, 3),
    }[layout]
    want = loop(both(config)[0], x, torch.Generator().manual_seed(1))
    assert torch.equal(loop(both(config)[0], lying(x), torch.Generator().manual_seed(1)), want)


def test_without_numba_the_steps_are_the_same() -> None:
    for config in ({}, SDE):
        want = loop(both(config)[0], drawn(), torch.Generator().manual_seed(1))
        with using("torch"):
            found = loop(both(config)[0], drawn(), torch.Generator().manual_seed(1))
        assert torch.equal(found, want)
