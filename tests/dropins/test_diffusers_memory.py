"""Copies of the schedulers, and the memory that their steps read, write and hand out."""

from __future__ import annotations

import copy
import mmap
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from tests.dropins.scheduler_cases import BOUNDS, FAST, PAIRS, SHAPE, loop, model, randn


@pytest.mark.parametrize("which", PAIRS)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda s: pickle.loads(pickle.dumps(s))]
)
def test_a_copy_in_the_middle_of_a_loop_goes_on_alone(
    which: str, strict: bool, copied: Callable[[Any], Any]
) -> None:
    scheduler = PAIRS[which][1](strict=strict)
    scheduler.set_timesteps(10)
    x = randn(*SHAPE)
    first, *rest = scheduler.timesteps
    x = scheduler.step(model(x, first), first, x).prev_sample
    another = copied(scheduler)
    states = {id(s): [x] for s in (scheduler, another)}
    for t in rest:
        for s in (scheduler, another):
            last = states[id(s)][-1]
            states[id(s)].append(s.step(model(last, t), t, last).prev_sample)
    for a, b in zip(*states.values(), strict=True):
        assert torch.equal(a, b)
    another.set_timesteps(5)
    assert len(scheduler.timesteps) == 10
    assert len(pickle.dumps(another)) < 200_000


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("which", PAIRS)
def test_arguments_are_never_written(which: str, strict: bool) -> None:
    scheduler = PAIRS[which][1](strict=strict, **({} if which == "inverse" else BOUNDS[3]))
    scheduler.set_timesteps(10)
    x = randn(*SHAPE)
    for k, t in enumerate(scheduler.timesteps):
        output, z = randn(*SHAPE, seed=k), randn(*SHAPE, seed=k + 50)
        given = [x, output, z]
        before, versions = [a.clone() for a in given], [a._version for a in given]
        noise = {} if which == "inverse" else {"eta": 1.0, "variance_noise": z}
        found = scheduler.step(output, t, x, **noise).prev_sample
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
        assert [a._version for a in given] == versions
        x = found


def held_by(x: Tensor, how: str) -> tuple[Any, Callable[[], Tensor]]:
    """Something that holds x's memory, and a way to read it."""
    if how == "name":
        return x, lambda: x
    if how == "view":
        view = x[1:, :1]
        return view, lambda: view
    if how == "numpy":
        array = x.numpy()
        return array, lambda: torch.from_numpy(array)
    if how == "dlpack":
        other = from_dlpack(x)
        return other, lambda: other
    if how == "detached":
        other = x.detach()
        return other, lambda: other
    storage = x.untyped_storage()
    return storage, lambda: torch.empty(0).set_(storage)


@pytest.mark.parametrize("how", ["name", "view", "numpy", "dlpack", "detached", "storage"])
@pytest.mark.parametrize("which", PAIRS)
@pytest.mark.parametrize("strict", [False, True])
def test_what_a_caller_keeps_never_changes(which: str, strict: bool, how: str) -> None:
    scheduler = PAIRS[which][1](strict=strict)
    kept: list[tuple[Any, Callable[[], Tensor], Tensor]] = []
    for _ in range(2):
        scheduler.set_timesteps(8)
        x = randn(*SHAPE)
        for t in scheduler.timesteps:
            found = scheduler.step(model(x, t), t, x)
            for tensor in (found.prev_sample, found.pred_original_sample):
                holder, read = held_by(tensor, how)
                kept.append((holder, read, read().clone()))
            x = found.prev_sample.clone()
            del found, tensor, holder, read
    for _, read, then in kept:
        assert torch.equal(read(), then)


def test_what_a_backward_pass_keeps_never_changes() -> None:
    scheduler = FAST()
    scheduler.set_timesteps(10)
    x, weight = randn(*SHAPE), torch.ones((), requires_grad=True)
    expected, total = torch.zeros(()), torch.zeros(())
    for t in scheduler.timesteps:
        with torch.no_grad():
            found = scheduler.step(model(x, t), t, x).prev_sample
        expected = expected + found.sum()
        total = total + (weight * found).sum()
        x = randn(*SHAPE, seed=int(t))
        del found
    total.backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected)


def test_what_another_process_reads_never_changes() -> None:
    """The other process maps the memory itself, and no reference in this one counts for it."""
    scheduler = FAST()
    scheduler.set_timesteps(10)
    x = randn(*SHAPE)
    maps = []
    for t in scheduler.timesteps[:-1]:
        found = scheduler.step(model(x, t), t, x).prev_sample
        handle, size = found.share_memory_().untyped_storage()._share_fd_cpu_()
        shared = mmap.mmap(os.dup(handle), size)
        maps.append((shared, shared[:]))
        x = found.clone()
        del found
    for shared, then in maps:
        assert shared[:] == then
        shared.close()


def test_memory_nobody_holds_is_written_again() -> None:
    scheduler = FAST()
    scheduler.set_timesteps(20)
    x = randn(4, 3, 64, 64)
    addresses = []
    for t in scheduler.timesteps[:-1]:
        x = scheduler.step(model(x, t), t, x).prev_sample
        addresses.append(x.data_ptr())
    assert len(set(addresses[2:])) <= 3
    x = scheduler.step(x, scheduler.timesteps[-1], x).prev_sample.clone()
    assert scheduler._own.states.take() is scheduler._own.x0s.take() is None


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("which", PAIRS)
def test_inference_mode_and_out_of_it(which: str, strict: bool) -> None:
    def results(first: bool, then: bool) -> list[Tensor]:
        x = randn(*SHAPE)
        with torch.inference_mode(first):
            scheduler = PAIRS[which][1](strict=strict)
            scheduler.set_timesteps(10)
            found = loop(scheduler, x, every=3)[:-4]
        with torch.inference_mode(then):
            more = loop(scheduler, x, every=3)
        assert all(a.is_inference() == then for a in more)
        return [*found, *more]

    expected = results(False, False)
    for first, then in ((True, True), (True, False), (False, True)):
        for a, b in zip(expected, results(first, then), strict=True):
            assert torch.equal(a, b)
