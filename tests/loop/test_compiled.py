"""Loops inside torch.compile, and captured loops around compiled models."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastddim import DDIM
from fastddim.dropins import ermongroup, guided
from fastddim.loop import own_graphs
from tests.apart import apart
from tests.cases import some
from tests.loops import drawn
from tests.tape import Tape, tapes_for_graphs

SHAPE = (2, 3, 4, 4)
DDIM_4, INVERSE = DDIM(4, eta=1.0), DDIM(4)
BETAS = torch.linspace(1e-4, 0.02, 1000)


# torch imports its compiler, of which a part is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """Nothing compiled by another test is left to be found."""
    torch.compiler.reset()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(3, 3, 1).requires_grad_(False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        found: Tensor = self.net(x) * (1 + t.view(-1, 1, 1, 1) / 1000)
        return found


MODEL = Model()
DIFFUSION = guided.Diffusion(1000, "ddim5")
CAPTURED = DDIM_4.capture(MODEL, SHAPE)


def iterated(x: Tensor) -> Tensor:
    for step in DDIM_4.iterate(MODEL, x, seeds=[1, 2]):
        x = step.x
    return x


LOOPS: dict[str, Callable[[Tensor], Tensor]] = {
    "sample": lambda x: DDIM_4.sample(MODEL, x, seeds=[1, 2]),
    "iterate": iterated,
    "invert": lambda x: INVERSE.invert(MODEL, x),
    "captured": lambda x: CAPTURED(x_T=x, seeds=[1, 2]),
    "guided": lambda x: guided.ddim_sample_loop(
        DIFFUSION, MODEL, SHAPE, noise=x, model_kwargs={}, device="cpu"
    ),
    "ermongroup": lambda x: ermongroup.generalized_steps(x, [0, 300, 600], MODEL, BETAS)[0][-1],
}


@pytest.mark.parametrize("name", some(LOOPS, 2))
def test_a_loop_breaks_the_graph_once(name: str) -> None:
    x, loop = drawn(*SHAPE), LOOPS[name]
    graphs: list[torch.fx.GraphModule] = []

    def listing(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module)
        return module

    def called(x: Tensor) -> Tensor:
        return loop(x + 1) * 2

    torch.manual_seed(3)
    expected = called(x)
    torch.manual_seed(3)
    compiled = torch.compile(called, backend=listing)
    assert torch.equal(compiled(x), expected)
    if name != "iterate":  # torch.compile runs the rest of a loop that it cannot trace as it is.
        assert len(graphs) == 2
    torch.manual_seed(4)
    expected = called(x + 1)
    torch.manual_seed(4)
    assert torch.equal(compiled(x + 1), expected)
    assert len(graphs) <= 2


def test_a_compiled_model_stays_compiled_in_a_compiled_loop() -> None:
    calls: list[int] = []

    def counting(module: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            calls.append(1)
            return module(*args)

        return run

    model: Any = torch.compile(Model(), backend=counting)
    x = drawn(*SHAPE)

    def sampled(x: Tensor) -> Tensor:
        return DDIM_4.sample(model, x, seeds=[1, 2])

    sample: Any = torch.compile(sampled, backend="eager")
    assert torch.equal(sample(x), DDIM_4.sample(MODEL, x, seeds=[1, 2]))
    assert len(calls) == 4


@pytest.fixture
def compiled_again(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Collects the options of models that are compiled again, which run eagerly here."""
    options: list[dict[str, Any]] = []
    compiler = torch.compile

    def compile(model: Any, **given: Any) -> Any:
        if "options" not in given:
            return compiler(model, **given)
        options.append(given["options"])
        return compiler(model, backend="eager")

    monkeypatch.setattr(torch, "compile", compile)
    return options


def as_module() -> Any:
    return torch.compile(Model(), mode="reduce-overhead", dynamic=False)


def in_a_function() -> Any:
    inner = as_module()
    return lambda x, t: inner(x, t)


def as_a_function() -> Any:
    model = Model()
    return torch.compile(lambda x, t: model(x, t), mode="max-autotune")


def in_place() -> Any:
    model = Model()
    model.compile(mode="reduce-overhead")
    return model


@pytest.mark.parametrize("make", some([as_module, in_a_function, as_a_function, in_place], 2))
def test_a_capture_switches_own_graphs_off(
    make: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    options: list[dict[str, Any]] = request.getfixturevalue("compiled_again")
    tapes: list[Tape] = tapes_for_graphs(monkeypatch)
    with pytest.warns(UserWarning, match="graphs of its own, which are off") as told:
        act = DDIM_4.capture(model, SHAPE)
    assert told[0].filename == __file__
    x = drawn(*SHAPE)
    assert torch.equal(act(x_T=x, seeds=[5, 6]), DDIM_4.sample(MODEL, x, seeds=[5, 6]))
    assert len(tapes) == 1
    assert [each["triton.cudagraphs"] for each in options] == [False]
    assert options[0].get("max_autotune", False) is (make is as_a_function)
    # The caller's model is as it was.
    own: Any = model
    if make in (in_place, in_a_function):
        own = model._compiled_call_impl if make is in_place else model.__closure__[0].cell_contents
    assert own.get_compiler_config()["triton.cudagraphs"]
    inner: Any = own.forward if isinstance(own, nn.Module) else own
    assert inner.get_compiler_config()["triton.cudagraphs"]


def test_a_model_without_own_graphs_is_not_compiled_again(
    compiled_again: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tapes_for_graphs(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for backend in ("eager", "inductor"):
            holder: Any = type("Holder", (), {"model": torch.nn.Identity()})()
            holder.model.compile(backend=backend)
            with own_graphs.own_graphs_off(holder, "model"):
                pass
    assert not compiled_again


def test_a_failed_capture_gives_the_model_its_graphs_back(
    compiled_again: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reads(Model):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x * x.sum().item()

    model = Reads()
    model.compile(mode="reduce-overhead")
    before: Any = model._compiled_call_impl
    tapes_for_graphs(monkeypatch)
    with (
        pytest.warns(UserWarning, match="of its own"),
        pytest.raises(RuntimeError, match="cannot be captured"),
    ):
        DDIM_4.capture(model, SHAPE)
    assert model._compiled_call_impl is before
    assert len(compiled_again) == 1


@pytest.mark.gpu
@apart
@pytest.mark.parametrize("steps", [4, 101])
def test_on_a_gpu_a_compiled_model_is_captured(steps: int) -> None:
    ddim, x = DDIM(steps), drawn(*SHAPE).cuda()
    plain = Model().cuda()
    model: Any = torch.compile(plain, mode="reduce-overhead", dynamic=False)
    t = torch.zeros(2, dtype=torch.int64, device="cuda")
    alone = [model(x, t).clone() for _ in range(3)]  # Its own graphs are recorded.
    with pytest.warns(UserWarning, match="graphs of its own, which are off"):
        act = ddim.capture(model, SHAPE, device="cuda")
    for seed in (1, 2):
        x = drawn(*SHAPE, seed=seed).cuda()
        torch.testing.assert_close(act(x_T=x), ddim.sample(plain, x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model(x, t), plain(x, t), rtol=1e-3, atol=1e-3)
    assert all(torch.equal(alone[0], other) for other in alone)
