"""Accelerated policies: changes between ticks, copies, ways back, graphs, and refusals."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastddim.dropins import policies
from fastddim.dropins.diffusers import FastDDIMScheduler, FastDDPMScheduler
from fastddim.dropins.policies import loops
from fastddim.dropins.policies.steps import Options, Steps, steps_of
from tests.apart import apart
from tests.cases import some
from tests.dropins.policies_original import (
    ACTIONS,
    HORIZON,
    OBSERVED,
    DiffusionModel,
    LeRobotPolicy,
    Unet,
    UnetPolicy,
    scheduler_of,
)
from tests.dropins.scheduler_cases import diffusers
from tests.loops import drawn
from tests.pretend import CUDA, Device
from tests.refusals import refused
from tests.tape import tapes_for_graphs

DATA = drawn(2, HORIZON, ACTIONS)
MASK = torch.zeros(2, HORIZON, ACTIONS, dtype=torch.bool)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=["loop", "graph"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The loop of a CPU, or the graph of a GPU, for which a tape stands."""
    return tapes_for_graphs(monkeypatch) if request.param == "graph" else None


def pair(name: str = "ddpm", steps: int = 10, **config: Any) -> tuple[Any, Any]:
    """An untouched model and an accelerated copy."""
    model = DiffusionModel(scheduler_of(name, **config), steps).eval()
    return model, policies.accelerate(copy.deepcopy(model))


def sampled(model: Any, number: int = 0, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    observation = drawn(batch, OBSERVED, seed=number)
    found: Tensor = model.conditional_sample(batch, observation, generator=generator)
    return found


def check_same(original: Any, fast: Any, **given: Any) -> None:
    assert torch.equal(sampled(original, **given), sampled(fast, **given))


def both(models: tuple[Any, Any], change: Callable[[Any], object]) -> None:
    for model in models:
        change(model)


def _scaled(model: Any) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.1)


CHANGES: dict[str, Callable[[Any], object]] = {
    "weights in place": _scaled,
    "weights loaded": lambda m: m.load_state_dict({k: v * 1.1 for k, v in m.state_dict().items()}),
    "weights assigned": lambda m: m.load_state_dict(
        {k: v * 1.1 for k, v in m.state_dict().items()}, assign=True
    ),
    "weights moved": lambda m: m.double().float(),
    "network": lambda m: setattr(m, "unet", Unet(seed=5)),
    "layer": lambda m: setattr(m.unet, "last", Unet(seed=5).last),
    "steps": lambda m: setattr(m, "num_inference_steps", 7),
    "levels": lambda m: m.noise_scheduler.alphas_cumprod.mul_(0.9),
    "timesteps": lambda m: m.noise_scheduler.timesteps.fill_(3),
    "chosen": lambda m: m.noise_scheduler.set_timesteps(3),
    "configuration": lambda m: m.noise_scheduler.register_to_config(clip_sample_range=0.1),
    "mode": lambda m: m.train().eval(),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", some(["ddpm", "ddim"], 2))
@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_changes_between_ticks_are_followed(way: Any, name: str, change: Any) -> None:
    models = pair(name)
    check_same(*models)
    both(models, change)
    both(models, lambda model: model.eval())  # New layers are in training mode.
    check_same(*models, number=1)
    check_same(*models, number=2)


def test_other_batches_get_graphs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tapes = tapes_for_graphs(monkeypatch)
    models = pair()
    for number, batch in enumerate([1, 3, 1, 3, 2]):
        check_same(*models, number=number, batch=batch)
    assert len(tapes) == 3


def test_a_graph_keeps_the_memory_that_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    tapes = tapes_for_graphs(monkeypatch)
    original, fast = pair()
    results = [sampled(fast, 1), sampled(fast, 2)]
    assert torch.equal(results[0], sampled(original, 1))  # A later tick does not displace it.
    fast.unet = Unet(seed=5)
    assert len(tapes) == 1
    assert not tapes[0].freed
    policies.restore(fast)
    assert tapes[0].freed


def test_results_of_later_ticks_are_other_memory(way: Any) -> None:
    original, fast = pair()
    kept = [sampled(fast, number) for number in range(4)]
    for number, found in enumerate(kept):
        assert torch.equal(found, sampled(original, number))


def test_a_network_that_cannot_be_captured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tapes_for_graphs(monkeypatch)

    class Reading(Unet):
        def forward(self, x: Tensor, *given: Any, **named: Any) -> Tensor:
            return super().forward(x, *given, **named) * (1 if x.sum().item() > 0 else 2)

    model: Any = DiffusionModel(scheduler_of("ddim"), 10, network=Reading()).eval()
    policies.accelerate(model)
    refused(lambda: sampled(model), RuntimeError, "the model cannot be captured: a graph cannot")


def test_gradients_are_the_own_methods() -> None:
    original, fast = pair("ddim", 3)
    gradients = []
    for model in (original, fast):
        with torch.enable_grad():
            sampled(model).square().sum().backward()
        gradients.append(model.unet.first.weight.grad)
    assert torch.equal(*gradients)
    assert gradients[0].abs().sum() > 0


def test_inference_mode_and_no_grad_may_take_turns(way: Any) -> None:
    original, fast = pair()
    for number in range(4):
        with torch.inference_mode(number % 2 == 0):
            check_same(original, fast, number=number)
    assert not sampled(fast).is_inference()


def test_autocast_is_the_own_methods(way: Any) -> None:
    original, fast = pair()
    with torch.autocast("cpu", torch.bfloat16):
        check_same(original, fast)
    assert not way


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_are_accelerated_and_apart(way: Any, copied: Any) -> None:
    original, fast = pair()
    check_same(original, fast)
    other = copied(fast)
    other.unet = Unet(seed=5)
    assert other.conditional_sample.policy is other
    assert other.noise_scheduler is not fast.noise_scheduler
    check_same(original, fast, number=1)
    plain = policies.restore(copied(other))
    assert type(plain.noise_scheduler) is diffusers.DDPMScheduler
    check_same(plain, other, number=2)


def test_the_state_dict_is_that_of_the_policy() -> None:
    original, fast = pair()
    assert list(fast.state_dict()) == list(original.state_dict())
    assert [name for name, _ in fast.named_modules()] == [n for n, _ in original.named_modules()]


@pytest.mark.parametrize("outer", [False, True])
def test_restore_gives_the_policy_back(outer: bool) -> None:
    model = DiffusionModel(scheduler_of("ddpm"), 10).eval()
    policy: Any = LeRobotPolicy(model) if outer else model
    scheduler, names = model.noise_scheduler, sorted(vars(model))
    assert policies.accelerate(policy) is policy
    loop = model.conditional_sample
    assert policies.accelerate(policy) is policy
    assert model.conditional_sample is loop
    assert isinstance(model.noise_scheduler, FastDDPMScheduler)
    assert policies.restore(policy) is policy
    assert model.noise_scheduler is scheduler
    assert sorted(vars(model)) == names
    said = "policy must be accelerated before, got"
    refused(lambda: policies.restore(policy), ValueError, said)


def test_steps_wait_for_tables_of_another_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Stream(str):
        cuda_stream = 0

        def wait_event(self, event: object) -> None:
            said.append(f"{self} waits")

    class Event:
        def record(self, stream: Stream) -> None:
            said.append(f"{stream} records")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("a"))
    scheduler: Any = pair("ddim")[1].noise_scheduler
    scheduler.set_timesteps(10)
    with Device():
        steps = steps_of(scheduler, scheduler._chosen(), Options(), CUDA, 2)
    assert steps is not None
    assert said == ["a records"]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("b"))
    steps.await_tables()
    assert said == ["a records", "b waits"]


def test_each_call_without_a_graph_awaits_its_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(Steps, "await_tables", lambda self: calls.append("waits"))
    monkeypatch.setattr(Steps, "run", lambda *_: calls.append("runs"))
    model = pair()[1]
    for _ in range(2):
        sampled(model)
    assert calls == ["waits", "runs"] * 2


@pytest.mark.gpu
@apart
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
@pytest.mark.parametrize("kind", [DiffusionModel, UnetPolicy])
def test_on_a_gpu_the_graph_is_the_loop(name: str, kind: Any) -> None:
    def tick(policy: Any, number: int) -> Tensor:
        generator = torch.Generator("cuda").manual_seed(number)
        told = drawn(2, OBSERVED, seed=number).cuda()
        given = (2, told) if kind is DiffusionModel else (DATA.cuda(), MASK.cuda(), None, told)
        found: Tensor = policy.conditional_sample(*given, generator=generator)
        return found

    with torch.no_grad():
        policy = kind(scheduler_of(name), 10).eval().cuda()
        graph, loop = (policies.accelerate(copy.deepcopy(policy)) for _ in "ab")
        for number in range(3):
            results = [tick(graph, number)]
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(loops, "has_graphs", lambda device: False)
                results.append(tick(loop, number))
            assert torch.equal(*results)
            # PyTorch multiplies by the reciprocal of √ᾱ_t, and the kernel divides.
            error = (results[0] - tick(policy, number)).abs().max()
            assert error <= 1e-5 * results[0].abs().max()
        (kept,) = graph.conditional_sample._kept.values()
        assert kept.graph is not None


def test_another_scheduler_later_runs_the_own_method() -> None:
    original, fast = pair()
    both((original, fast), lambda m: setattr(m, "noise_scheduler", scheduler_of("ddim")))
    check_same(original, fast)
    kept = fast.noise_scheduler
    assert policies.restore(fast).noise_scheduler is kept


def test_a_scheduler_that_is_fast_already_is_kept() -> None:
    scheduler = FastDDIMScheduler.from_config(scheduler_of("ddim").config)
    model = policies.accelerate(DiffusionModel(scheduler, 10).eval())
    assert model.noise_scheduler is scheduler
    check_same(pair("ddim")[0], model)


class Guided(DiffusionModel):
    def conditional_sample(self, batch_size: int, global_cond: Any = None, generator: Any = None):  # type: ignore[no-untyped-def,override]
        sample = super().conditional_sample(batch_size, global_cond, generator)
        return sample * self.noise_scheduler.init_noise_sigma


class Short(DiffusionModel):
    def conditional_sample(self, batch_size: int, global_cond: Any = None, generator: Any = None):  # type: ignore[no-untyped-def,override]
        return torch.randn(batch_size)


class Transformer(UnetPolicy):
    conditional_sample: Any = lambda self, condition_data, condition_mask, cond, generator: None


def changed(name: str, value: Any, policy: Any = None) -> Any:
    found = DiffusionModel(scheduler_of("ddim"), 10) if policy is None else policy
    setattr(found, name, value)
    return found


def of(scheduler: Any) -> DiffusionModel:
    return DiffusionModel(scheduler, 10)


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "no policy": (
        lambda: nn.Linear(2, 2),
        TypeError,
        ("policy must have the method conditional_sample", "LeRobot", "got Linear"),
    ),
    "scheduler": (
        lambda: of(diffusers.DPMSolverMultistepScheduler()),
        TypeError,
        ("policy.noise_scheduler must be diffusers' DDIMScheduler or", "DPMSolverMultistep"),
    ),
    "subclass": (
        lambda: of(type("Mine", (diffusers.DDPMScheduler,), {})()),
        TypeError,
        ("policy.noise_scheduler must be diffusers' DDIMScheduler or", "got Mine"),
    ),
    "learned": (
        lambda: of(scheduler_of("ddpm", variance_type="learned_range")),
        ValueError,
        ("policy.noise_scheduler must have a fixed variance_type", "'learned_range'"),
    ),
    "prediction": (
        lambda: of(scheduler_of("ddim", prediction_type="flow")),
        ValueError,
        ("policy.noise_scheduler must have a prediction_type in epsilon,", "'flow'"),
    ),
    "range": (
        lambda: of(scheduler_of("ddim", clip_sample_range=-1.0)),
        ValueError,
        ("policy.noise_scheduler must have a clip_sample_range > 0", "-1.0"),
    ),
    "strict": (
        lambda: of(FastDDIMScheduler(strict=True)),
        ValueError,
        ("policy.noise_scheduler must have strict=False",),
    ),
    "unet": (
        lambda: changed("unet", None),
        TypeError,
        ("policy.unet must be a torch.nn.Module, got NoneType",),
    ),
    "steps": (
        lambda: changed("num_inference_steps", 0),
        ValueError,
        ("policy.num_inference_steps must be an integer ≥ 1, got 0",),
    ),
    "kind of steps": (
        lambda: changed("num_inference_steps", 2.0),
        ValueError,
        ("policy.num_inference_steps must be an integer ≥ 1, got 2.0",),
    ),
    "method of another kind": (
        lambda: type("Odd", (DiffusionModel,), {"conditional_sample": nn.Identity()})(
            scheduler_of("ddim"), 10
        ),
        TypeError,
        ("conditional_sample of Odd must be a Python function, got Identity",),
    ),
    "configuration": (
        lambda: changed("config", SimpleNamespace(horizon=HORIZON)),
        ValueError,
        ("policy.config must have horizon and action_feature.shape, or", "SimpleNamespace"),
    ),
    "own on the object": (
        lambda: changed("conditional_sample", lambda *_: None),
        ValueError,
        ("conditional_sample of DiffusionModel must be a method of its class",),
    ),
    "other names": (
        lambda: Guided(scheduler_of("ddim"), 10),
        ValueError,
        ("conditional_sample of Guided must be LeRobot's loop", "init_noise_sigma"),
    ),
    "fewer names": (
        lambda: Short(scheduler_of("ddim"), 10),
        ValueError,
        ("conditional_sample of Short must be LeRobot's loop, which uses", "set_timesteps"),
    ),
    "arguments": (
        lambda: Transformer(scheduler_of("ddim"), 10),
        ValueError,
        (
            "conditional_sample of Transformer must take (batch_size, global_cond, generator) or",
            "got (condition_data, condition_mask, cond, generator)",
        ),
    ),
}


@pytest.mark.parametrize(("made", "error", "words"), REFUSED.values(), ids=list(REFUSED))
def test_unknown_policies_are_refused_unchanged(made: Any, error: Any, words: Any) -> None:
    policy = made()
    before = {**vars(policy)}
    refused(lambda: policies.accelerate(policy), error, *words)
    assert vars(policy) == before


BAD: dict[str, Callable[[Any], Any]] = {
    "mask of integers": lambda p: p(DATA, torch.zeros(2, dtype=torch.int64)),
    "mask of another shape": lambda p: p(DATA, torch.zeros(3, dtype=torch.bool)),
    "unknown keyword": lambda p: p(DATA, MASK, eat=0.5),
    "no tensor": lambda p: p([1.0], MASK),
    "condition no tensor": lambda p: p(DATA, MASK, global_cond=[1.0]),
    "condition elsewhere": lambda p: p(DATA, MASK, global_cond=drawn(2, OBSERVED).to("meta")),
    "generator": lambda p: p(DATA, MASK, generator=3),
}


@pytest.mark.parametrize("call", BAD.values(), ids=list(BAD))
def test_bad_arguments_are_the_own_methods(call: Any) -> None:
    policy = UnetPolicy(scheduler_of("ddim"), 10).eval()
    fast = policies.accelerate(copy.deepcopy(policy))
    results: list[Any] = []
    for each in (policy, fast):
        torch.manual_seed(0)
        try:
            results.append(call(each.conditional_sample))
        except Exception as error:
            results.append(error)
    if isinstance(results[0], Tensor):
        assert torch.equal(*results)
    else:
        assert [type(r) for r in results] == [type(results[0])] * 2
        said = [str(result).split("() ")[-1] for result in results]
        assert said[0] == said[1]


def test_a_policy_without_parameters_runs_the_own_method() -> None:
    model: Any = DiffusionModel(scheduler_of("ddim"), 10, network=nn.Identity()).eval()
    with pytest.raises(StopIteration):  # LeRobot's method looks for the first parameter.
        sampled(policies.accelerate(model))


@pytest.mark.parametrize("shape", [(2,), (2, HORIZON)])
def test_masks_of_fewer_dimensions_are_broadcast(way: Any, shape: tuple[int, ...]) -> None:
    policy = UnetPolicy(scheduler_of("ddpm"), 10).eval()
    fast = policies.accelerate(copy.deepcopy(policy))
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[1:] = True
    results = [
        each.conditional_sample(DATA, mask, generator=torch.Generator().manual_seed(0))
        for each in (policy, fast)
    ]
    assert torch.equal(*results)
    assert torch.equal(results[1][1:], DATA[1:])
