"""The replay of a graph holds all memory that the graph reads and writes, and alone does."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastddim import DDIM, NoiseSchedule
from fastddim.loop import graph, recording
from tests.loops import drawn
from tests.tape import FreedError, Tape, tapes_for_graphs

LINEAR = NoiseSchedule.linear()
SHAPE = (3, 2, 5, 4)
SEEDS = [7, 2**35, 2**63 - 1]


class Net(nn.Module):
    """A network with weights, for autocast to cast, and with a buffer."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2, 2, 3, padding=1).requires_grad_(False)
        self.register_buffer("scale", torch.tensor(0.5))
        with torch.no_grad():
            for i, weight in enumerate(self.parameters()):
                weight.copy_(0.1 * drawn(*weight.shape, seed=i))

    def forward(self, x: Tensor, t: Tensor, c: Tensor, before: Tensor | None = None) -> Tensor:
        weight = self.mix.weight.to(torch.float32 if x.dtype == torch.float32 else x.dtype)
        output = torch.conv2d(x, weight, padding=1) * self.scale + 1e-3 * (t % 97).view(-1, 1, 1, 1)
        output = output.to(x.dtype) + c.to(x.dtype)
        return output if before is None else output + 0.1 * before.clamp(-1, 1)


def gradient(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        return torch.autograd.grad((torch.sin(y) * c).sum(), y)[0]


def conditions(guided: bool, seed: int = 1) -> dict[str, Any]:
    cond = {"c": 0.1 * drawn(3, 2, 1, 1, seed=seed)}
    return {"cond": cond, "uncond": {"c": torch.zeros(1, 2, 1, 1)}} if guided else {"cond": cond}


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"dtype": torch.bfloat16},
    "guidance": {"guidance": 2.0},
    "guidance, bf16": {"guidance": [1.0, 2.0, 3.0], "dtype": torch.bfloat16},
    "interval": {"guidance": lambda t: 3.0 if 300 < t < 700 else 1.0},
    "cond_fn": {"cond_fn": gradient},
    "cond_fn, guidance": {"cond_fn": gradient, "guidance": 2.0},
    "self": {"self_condition": "before"},
    "self, guidance, bf16": {
        "self_condition": "before",
        "guidance": 2.0,
        "dtype": torch.bfloat16,
    },
    "autocast": {"autocast": torch.bfloat16},
    "autocast, self, guidance": {
        "autocast": torch.bfloat16,
        "self_condition": "before",
        "guidance": 2.0,
    },
}
STEPS = pytest.mark.parametrize("steps", [7, 12], ids=["whole", "stepwise"])


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    monkeypatch.setattr(graph, "WHOLE", 10)
    return tapes_for_graphs(monkeypatch)


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Without the garbage collector, memory is freed only because nobody holds it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def captured(steps: int, how: str, net: Any = None) -> graph.Captured:
    fixed = CALLS[how]
    given = conditions("guidance" in fixed)
    ddim = DDIM(steps, eta=1.0, schedule=LINEAR, clip=1.5)
    return ddim.capture(Net() if net is None else net, SHAPE, **given, **fixed)


def test_a_tape_holds_only_memory_that_was_allocated_on_the_tape() -> None:
    x, tape = torch.ones(3), Tape()
    with tape:
        y = (x + 1).mul_(2)
    tape.replay()
    assert torch.equal(y, torch.full((3,), 4.0))
    del y
    gc.collect()
    assert tape.freed == []
    del x
    assert len(tape.freed) == 1
    with pytest.raises(FreedError, match=r"freed memory: torch.float32"):
        tape.replay()


@pytest.mark.one_in(2)
@STEPS
@pytest.mark.parametrize("how", CALLS)
def test_memory_that_a_graph_reads_lives_as_long_as_its_replay(
    tapes: list[Tape], steps: int, how: str
) -> None:
    act = captured(steps, how)
    was = act(seeds=SEEDS)
    assert was.isfinite().all()
    replay = act._replay
    del act
    gc.collect()
    assert tapes
    for tape in tapes:
        # At least x, the table, the row's number and the seeds.
        assert len(tape.outside) >= 4
        assert tape.freed == []
    assert torch.equal(replay(), was)


class Caching(Net):
    """A network that keeps tensors which are neither parameters nor buffers."""

    def forward(self, x: Tensor, t: Tensor, c: Tensor, before: Tensor | None = None) -> Tensor:
        if "shift" not in vars(self):
            self.shift, self.by_length = torch.full((1,), 0.1), {4: torch.full((1,), 0.2)}
        return super().forward(x, t, c, before) + self.shift + self.by_length[4]


@STEPS
def test_a_models_cache_lives_as_long(tapes: list[Tape], steps: int) -> None:
    net = Caching()
    act = captured(steps, "plain", net)
    was = act(seeds=SEEDS)
    net.shift, net.by_length = torch.zeros(1), {}  # as for an input of another length
    assert [place for tape in tapes for place in tape.freed] == []
    assert torch.equal(act(seeds=SEEDS), was)


@STEPS
def test_memory_lives_as_long_under_the_callers_autocast(tapes: list[Tape], steps: int) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        act = captured(steps, "plain")
        replay = act._replay
        was = act(seeds=SEEDS)
    del act
    gc.collect()
    assert [place for tape in tapes for place in tape.freed] == []
    assert torch.equal(replay(), was)


def test_memory_of_a_function_recorded_alone_is_held_as_well(tapes: list[Tape]) -> None:
    def recorded() -> recording.Replay:
        x = torch.ones(3)
        return recording.capture(lambda: x + 1, torch.device("cpu"))

    replay = recorded()
    gc.collect()
    assert len(tapes[0].outside) == 1
    assert tapes[0].freed == []
    assert torch.equal(replay(), torch.full((3,), 2.0))


@pytest.mark.one_in(2)
@STEPS
@pytest.mark.parametrize("how", CALLS)
def test_memory_of_a_dropped_graph_is_freed_at_once(
    tapes: list[Tape], uncollected: None, steps: int, how: str
) -> None:
    # A graph that only a cycle of references holds would keep its memory until the next collection.
    act = captured(steps, how)
    act(seeds=SEEDS)
    graphs = [weakref.ref(tape) for tape in tapes]
    outside = [place for tape in tapes for place in tape.outside.values()]
    tapes.clear()
    del act
    assert [ref for ref in graphs if ref() is not None] == []
    assert [place for place in outside if not place.storage.expired()] == []


NAMED = Net()
REACHED: dict[str, Callable[[Net], Any]] = {
    "module": lambda net: net,
    "method": lambda net: net.forward,
    "partial": lambda net: partial(lambda model, *args, **kwargs: model(*args, **kwargs), net),
    "closure": lambda net: lambda *args, **kwargs: net(*args, **kwargs),
    "global": lambda net: lambda *args, **kwargs: NAMED(*args, **kwargs),
    "object": lambda net: Denoiser(net),
}


class Denoiser:
    def __init__(self, net: Net) -> None:
        self.net = net

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)


def other_parameters(net: Net) -> None:
    net.mix.weight = nn.Parameter(torch.zeros_like(net.mix.weight))
    net.scale = torch.tensor(0.1)


MOVED: dict[str, Callable[[Net], object]] = {
    "moved": lambda net: net.double(),  # as .cpu() does, it puts other memory into the parameters
    "assigned": lambda net: net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True),
    "replaced": other_parameters,
}


@pytest.mark.one_in(2)
@STEPS
@pytest.mark.parametrize("how", MOVED)
@pytest.mark.parametrize("reached", REACHED)
def test_a_graph_keeps_the_weights_of_its_capture(
    monkeypatch: pytest.MonkeyPatch, tapes: list[Tape], reached: str, how: str, steps: int
) -> None:
    net = Net()
    monkeypatch.setitem(globals(), "NAMED", net)
    act = captured(steps, "plain", REACHED[reached](net))
    was = act(seeds=SEEDS)
    MOVED[how](net)
    gc.collect()
    assert [place for tape in tapes for place in tape.freed] == []
    assert torch.equal(act(seeds=SEEDS), was)
