"""Accelerated loops of LeRobot's and diffusion_policy's are the untouched loops, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor

from fastddim.dropins import policies
from fastddim.dropins.diffusers import FastDDIMScheduler, FastDDPMScheduler
from fastddim.loop.streams import Streams
from fastddim.step.buffers import FRESH
from tests.cases import some
from tests.dropins.policies_original import (
    ACTIONS,
    HORIZON,
    OBSERVED,
    SCHEDULERS,
    DiffusionModel,
    EarlierDiffusionModel,
    LeRobotPolicy,
    Unet,
    UnetPolicy,
    scheduler_of,
)
from tests.loops import drawn
from tests.tape import tapes_for_graphs

Tick: TypeAlias = Callable[[Any, int, Any], Tensor]
"""Calls a policy with the observation of this tick and with a generator."""
CONFIGS: list[dict[str, Any]] = [
    {},
    {"prediction_type": "sample"},
    {"clip_sample": False},
    {"clip_sample_range": 0.3, "prediction_type": "v_prediction"},
    {"beta_schedule": "linear", "num_train_timesteps": 1000},
    {"clip_sample": False, "thresholding": True, "dynamic_thresholding_ratio": 0.8},
]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=["loop", "graph"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The loop of a CPU, or the graph of a GPU, for which a tape stands."""
    return tapes_for_graphs(monkeypatch) if request.param == "graph" else None


def lerobot(batch: int) -> Tick:
    def tick(model: Any, number: int, generator: Any) -> Tensor:
        observation = drawn(batch, OBSERVED, seed=number)
        found: Tensor = model.conditional_sample(batch, observation, generator=generator)
        return found

    return tick


def masked(batch: int, fixed: bool = True, **kwargs: Any) -> Tick:
    """A tick that knows part of the trajectory: always the first two actions, or any elements."""

    def tick(policy: Any, number: int, generator: Any) -> Tensor:
        data = drawn(batch, HORIZON, ACTIONS, seed=number)
        mask = torch.zeros(batch, HORIZON, ACTIONS, dtype=torch.bool)
        mask[:, :2] = True
        mask = mask if fixed else drawn(batch, HORIZON, ACTIONS, seed=number + 9) > 0
        before = data.clone(), mask.clone()
        found: Tensor = policy.conditional_sample(
            data,
            mask,
            local_cond=drawn(batch, HORIZON, OBSERVED, seed=number),
            global_cond=drawn(batch, OBSERVED, seed=number + 5),
            generator=generator,
            **kwargs,
        )
        assert torch.equal(data, before[0])
        assert torch.equal(mask, before[1])
        return found

    return tick


def check_ticks(policy: Any, tick: Tick, ticks: int = 3, given: bool = True) -> Any:
    """Compares the ticks of the policy and of its accelerated copy, and their generators."""
    fast = policies.accelerate(copy.deepcopy(policy))
    for number in range(ticks):
        results: list[Tensor] = []
        states: list[list[Tensor]] = []
        for each in (policy, fast):
            torch.manual_seed(number)
            generator = torch.Generator().manual_seed(number) if given else None
            results.append(tick(each, number, generator))
            states.append([torch.get_rng_state(), *([generator.get_state()] if generator else [])])
        assert torch.equal(*results)
        assert torch.isfinite(results[0]).all()
        assert all(torch.equal(*state) for state in zip(*states, strict=True))
    return fast


@pytest.mark.one_in(2)
@pytest.mark.parametrize("given", [True, False], ids=["generator", "global"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("config", some(CONFIGS, 3), ids=str)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_lerobots_loop_is_bit_identical(
    way: Any, name: str, config: dict[str, Any], batch: int, given: bool
) -> None:
    model = DiffusionModel(scheduler_of(name, **config), 10).eval()
    check_ticks(model, lerobot(batch), given=given)
    assert way is None or len(way) == 1


@pytest.mark.one_in(2)
@pytest.mark.parametrize("given", [True, False], ids=["generator", "global"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("config", some(CONFIGS, 3), ids=str)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_diffusion_policys_loop_is_bit_identical(
    way: Any, name: str, config: dict[str, Any], batch: int, given: bool
) -> None:
    policy = UnetPolicy(scheduler_of(name, **config), 10).eval()
    check_ticks(policy, masked(batch, fixed=batch > 1), given=given)
    assert way is None or len(way) == 1


def test_each_call_of_a_graph_waits_for_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[Streams] = []
    monkeypatch.setattr(Streams, "join", lambda self: joined.append(self))
    tapes_for_graphs(monkeypatch)
    check_ticks(DiffusionModel(scheduler_of("ddim"), 10).eval(), lerobot(2), ticks=3)
    assert len(joined) == 1 + 3  # the memory is made, and written three times
    assert len(set(joined)) == 1


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", some([DiffusionModel, UnetPolicy], 2))
@pytest.mark.parametrize("name", SCHEDULERS)
def test_loops_of_100_steps_are_bit_identical(way: Any, name: str, kind: Any) -> None:
    tick = lerobot(2) if kind is DiffusionModel else masked(2)
    check_ticks(kind(scheduler_of(name)).eval(), tick, ticks=2)
    assert way is None or len(way) == 1


@pytest.mark.parametrize("name", SCHEDULERS)
def test_loops_of_large_states_are_bit_identical(name: str) -> None:
    model = DiffusionModel(scheduler_of(name), 4).eval()
    assert 300 * HORIZON * ACTIONS > FRESH
    check_ticks(model, lerobot(300), ticks=2)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "kwargs", [{"eta": 0.5}, {"eta": 1.0, "use_clipped_model_output": True}, {"eta": 0}], ids=str
)
def test_arguments_of_the_step_are_obeyed(way: Any, kwargs: dict[str, Any]) -> None:
    policy = UnetPolicy(scheduler_of("ddim", clip_sample_range=0.5), 10).eval()
    fast = check_ticks(policy, masked(2, **kwargs))
    plain = UnetPolicy(policy.noise_scheduler, 10, network=policy.model)
    found = [
        masked(2, True, **k)(p, 0, torch.Generator().manual_seed(0))
        for p, k in ((fast, kwargs), (plain, {"eta": 0.25}))
    ]
    assert not torch.equal(*found)  # The argument makes a difference.


def test_an_argument_that_varies_runs_the_own_method() -> None:
    noise = drawn(2, HORIZON, ACTIONS, seed=7)
    policy = UnetPolicy(scheduler_of("ddim"), 10).eval()

    def tick(policy: Any, number: int, _: Any) -> Tensor:
        return masked(2, eta=0.5, variance_noise=noise)(policy, number, None)

    check_ticks(policy, tick, given=False)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_of_the_caller_begins_the_loop(way: Any, name: str) -> None:
    noise = drawn(2, ACTIONS, HORIZON).transpose(1, 2)
    was = noise.clone()

    def tick(model: Any, number: int, generator: Any) -> Tensor:
        observation = drawn(2, OBSERVED, seed=number)
        given = None if number == 1 else noise  # The tick between has another layout.
        found: Tensor = model.conditional_sample(2, observation, generator, noise=given)
        return found

    check_ticks(DiffusionModel(scheduler_of(name), 10).eval(), tick)
    assert torch.equal(noise, was)


def test_earlier_versions_of_lerobot_are_known() -> None:
    model = EarlierDiffusionModel(scheduler_of("ddpm"), 10).eval()
    fast: Any = check_ticks(model, lerobot(2))
    with pytest.raises(TypeError, match="noise"):
        fast.conditional_sample(2, noise=drawn(2, HORIZON, ACTIONS))


def test_outer_policies_take_the_accelerated_loop() -> None:
    outer = LeRobotPolicy(DiffusionModel(scheduler_of("ddpm"), 10)).eval()
    fast = check_ticks(outer, lambda p, n, _: p.select_action(drawn(1, OBSERVED, seed=n)), 3, False)
    assert isinstance(fast.diffusion.noise_scheduler, FastDDPMScheduler)
    policy = UnetPolicy(scheduler_of("ddim"), 10, eta=0.5).eval()
    fast = check_ticks(policy, lambda p, n, _: p.predict(drawn(1, OBSERVED, seed=n)), 3, False)
    assert isinstance(fast.noise_scheduler, FastDDIMScheduler)


class Dropping(Unet):
    """A network that draws from the global generator in training mode."""

    def forward(self, *given: Any, **named: Any) -> Tensor:
        return torch.nn.functional.dropout(super().forward(*given, **named), 0.2, self.training)


class Drawing(Unet):
    """A network that always draws."""

    def forward(self, *given: Any, **named: Any) -> Tensor:
        return torch.nn.functional.dropout(super().forward(*given, **named), 0.2)


@pytest.mark.parametrize(("network", "training"), [(Dropping, True), (Drawing, False)])
def test_networks_that_draw_are_not_captured(way: Any, network: Any, training: bool) -> None:
    model = DiffusionModel(scheduler_of("ddpm"), 10, network=network()).train(training)
    check_ticks(model, lerobot(2), given=False)
    assert not way


class Rounding(Unet):
    """A network with bfloat16 outputs, with which the fused step would differ."""

    def forward(self, *given: Any, **named: Any) -> Tensor:
        return super().forward(*given, **named).bfloat16()


class Writing(Unet):
    """A network that writes to its timesteps."""

    def forward(self, x: Tensor, t: Tensor, *given: Any, **named: Any) -> Tensor:
        out = super().forward(x, t, *given, **named)
        t.zero_()
        return out


@pytest.mark.one_in(2)
@pytest.mark.parametrize("network", [Rounding, Writing])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_unusual_networks_give_the_same(way: Any, name: str, network: Any) -> None:
    check_ticks(DiffusionModel(scheduler_of(name), 10, network=network()).eval(), lerobot(2))
    assert not way


def test_other_dtypes_are_the_own_methods() -> None:
    check_ticks(DiffusionModel(scheduler_of("ddpm"), 10).eval().double(), doubled)


def doubled(model: Any, number: int, generator: Any) -> Tensor:
    observation = drawn(2, OBSERVED, seed=number).double()
    found: Tensor = model.conditional_sample(2, observation, generator=generator)
    return found


def test_levels_of_the_schedulers_own_are_kept() -> None:
    scheduler = scheduler_of("ddim")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod * 0.9
    fast = check_ticks(DiffusionModel(scheduler, 10).eval(), lerobot(1))
    plain = DiffusionModel(scheduler_of("ddim"), 10).eval()
    results = [lerobot(1)(each, 0, torch.Generator().manual_seed(0)) for each in (plain, fast)]
    assert not torch.equal(*results)


@pytest.mark.parametrize("name", ["DDIM", "DDPM"])
def test_the_model_of_lerobot_itself_is_bit_identical(way: Any, name: str) -> None:
    module = "lerobot.policies.diffusion.modeling_diffusion"
    lerobots: Any = pytest.importorskip(module, exc_type=ImportError)
    config = SimpleNamespace(
        robot_state_feature=SimpleNamespace(shape=(OBSERVED,)),
        action_feature=SimpleNamespace(shape=(ACTIONS,)),
        image_features=None,
        env_state_feature=None,
        n_obs_steps=1,
        horizon=HORIZON,
        down_dims=(16, 32),
        kernel_size=5,
        n_groups=8,
        diffusion_step_embed_dim=32,
        use_film_scale_modulation=True,
        compile_model=False,
        noise_scheduler_type=name,
        num_train_timesteps=100,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="squaredcos_cap_v2",
        clip_sample=True,
        clip_sample_range=1.0,
        prediction_type="epsilon",
        num_inference_steps=10,
    )
    check_ticks(lerobots.DiffusionModel(config).eval(), lerobot(2))
    assert way is None or len(way) == 1
