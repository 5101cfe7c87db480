"""CompVis' PLMSSampler: as it was recorded, and against its steps in plain PyTorch."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastddim import NoiseSchedule
from fastddim.dropins.compvis import DDIMSampler, PLMSSampler
from fastddim.dropins.compvis.plms import WEIGHTS
from fastddim.tools.quality import Gaussian
from tests.diffusion import BETAS, Model, X
from tests.dropins.compvis_cases import UC, C, Corrector, eager_plms
from tests.refusals import refused

ORACLE = Gaussian(0.3, 0.5, NoiseSchedule.from_betas(BETAS))
GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [
    case
    for case in json.loads((GOLDEN / "index.json").read_text())
    if case["function"] == "PLMSSampler.sample"
]


def met(case: dict[str, Any], golden: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(ours, recorded) of each recorded tensor; the generator must end in the recorded state."""
    model, x, scale = Model(), golden["x_T"], case["unconditional_guidance_scale"]
    torch.manual_seed(case["generator_seed"])
    sample, kept = PLMSSampler(model).sample(
        S=case["S"],
        batch_size=len(x),
        shape=x.shape[1:],
        conditioning=torch.arange(float(len(x))),
        mask=golden.get("mask"),
        x0=golden.get("x0_known"),
        x_T=x,
        log_every_t=1,
        unconditional_guidance_scale=scale,
        unconditional_conditioning=-torch.ones(len(x)),
        verbose=False,
    )
    assert torch.equal(torch.get_rng_state(), golden["state"])
    found = {
        "xs": torch.stack(kept["x_inter"][1:]),
        "x0_preds": torch.stack(kept["pred_x0"][1:]),
        "sample": sample,
        "t": torch.stack([t[:1] for _, t, _ in model.seen]),
    }
    return [(found[name], golden[name]) for name in found]


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_the_recorded_trajectories_are_met_bit_for_bit(
    case: dict[str, Any], recorders_root: None
) -> None:
    for ours, recorded in met(case, load_file(GOLDEN / f"{case['name']}.safetensors")):
        assert torch.equal(ours, recorded)


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_with_own_roots_recordings_are_met_to_a_millionth(case: dict[str, Any]) -> None:
    for ours, recorded in met(case, load_file(GOLDEN / f"{case['name']}.safetensors")):
        assert (ours - recorded).abs().max() <= 1e-6 * recorded.abs().max()


def made(S: int, model: Any = None, **given: Any) -> PLMSSampler:
    sampler = PLMSSampler(model or Model())
    sampler.make_schedule(S, **given)
    return sampler


OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    (
        {"unconditional_guidance_scale": 7.5, "unconditional_conditioning": UC},
        {"scale": 7.5, "uc": UC},
    ),
    ({"noise_dropout": 0.3, "temperature": 0.7}, {"dropout": 0.3}),
    ({"quantize_denoised": True}, {"quantize": True}),
    (
        {"score_corrector": Corrector(), "corrector_kwargs": {"strength": 0.5}},
        {"corrector": Corrector()},
    ),
]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o[1]) or "plain")
@pytest.mark.parametrize("S", [1, 2, 4, 50])
@pytest.mark.parametrize(
    "x",
    [X, X.contiguous(memory_format=torch.channels_last), torch.cat([X, X], 3)[:, :3, ::2, 3:10]],
    ids=["contiguous", "channels_last", "slice"],
)
def test_steps_are_bit_identical_and_leave_the_same_stream(x: Tensor, S: int, options: Any) -> None:
    given, theirs = options
    sampler = made(S)
    torch.manual_seed(0)
    _, kept = sampler.plms_sampling(C, x.shape, x_T=x, log_every_t=1, **given)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    xs, x0s, wanted = eager_plms(sampler, x, C, **theirs)
    assert len(xs) == S
    for mine, own in ((kept["x_inter"][1:], xs), (kept["pred_x0"][1:], x0s)):
        for i, e in zip(mine, own, strict=True):
            assert torch.equal(i, e)
            assert i.isfinite().all()
    assert torch.equal(state, wanted)


def test_a_half_precision_models_combination_is_float32() -> None:
    """The original rounds each product and sum of the weights up to 59."""
    oracle = torch.stack(eager_plms(made(20), X, C)[0])
    errors = []
    for run in ("ours", "eager"):
        sampler = made(20, Model(dtype=torch.bfloat16))
        if run == "ours":
            states = sampler.plms_sampling(C, X.shape, x_T=X, log_every_t=1)[1]["x_inter"][1:]
        else:
            states = eager_plms(sampler, X, C)[0]
        errors.append((torch.stack(states) - oracle).abs().max())
        assert states[-1].dtype == torch.float32
    assert errors[0] < 0.5 * errors[1]


def test_a_half_precision_state_is_met() -> None:
    x = X.bfloat16()
    sampler = made(10)
    found, _ = sampler.plms_sampling(C, x.shape, x_T=x)
    assert torch.equal(found, eager_plms(sampler, x, C)[0][-1])


def test_each_set_of_weights_sums_to_its_divisor() -> None:
    assert [sum(weights) for weights, _ in WEIGHTS] == [divisor for _, divisor in WEIGHTS]


def test_the_method_is_of_a_higher_order_than_ddim() -> None:
    """The exact ε of Gaussian data, from the first timestep to ᾱ_0, where both samplers end."""

    class Exact(Model):
        def apply_model(self, x: Tensor, t: Tensor, c: Any) -> Tensor:
            eps: Tensor = ORACLE(x, t)
            return eps

    errors = {}
    for kind in (DDIMSampler, PLMSSampler):
        sampler: Any = kind(Exact())
        end = sampler.sample(20, 2, X.shape[1:], C, x_T=X)[0]
        truth = ORACLE.flow(X, int(sampler.ddim_timesteps[-1]), 0)
        errors[kind] = float((end - truth).square().mean().sqrt())
    assert errors[PLMSSampler] < 0.2 * errors[DDIMSampler]


def test_the_model_is_called_once_more_than_there_are_steps() -> None:
    sampler = made(5)
    seen: list[tuple[int, bool]] = []
    sampler.plms_sampling(C, X.shape, x_T=X, callback=lambda i: seen.append((i, True)))
    times = [int(t[0]) for _, t, _ in sampler.model.seen]
    assert times == [801, 601, 601, 401, 201, 1]
    assert [i for i, _ in seen] == list(range(5))
    sampler.model.seen.clear()
    sampler.plms_sampling(C, X.shape, x_T=X, timesteps=3)  # which counts one too many, as in DDIM
    assert [int(t[0]) for _, t, _ in sampler.model.seen] == [201, 1, 1]


def test_a_step_alone_is_the_loops() -> None:
    sampler, x, old = made(5), X, list[Tensor]()
    states = eager_plms(sampler, X, C)[0]
    for i, index in enumerate(reversed(range(5))):
        t, t_next = (
            torch.full((2,), int(sampler.ddim_timesteps[at])) for at in (index, max(index - 1, 0))
        )
        x, _, eps = sampler.p_sample_plms(x, C, t, index, old_eps=old, t_next=t_next)
        old.append(eps)
        assert torch.equal(x, states[i])


def test_nothing_that_is_held_is_written() -> None:
    x = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    kept: list[tuple[Tensor, Tensor]] = []

    class Keeping(Model):
        def apply_model(self, x: Tensor, t: Tensor, c: Any) -> Tensor:
            found = super().apply_model(x, t, c)
            kept.extend((held, held.clone()) for held in (x, found))
            return found

    _, lists = made(8, Keeping()).plms_sampling(C, x.shape, x_T=x, log_every_t=1)
    assert all(torch.equal(held, then) for held, then in kept)
    assert len({held.data_ptr() for held in lists["x_inter"]}) == 9


def test_signatures_are_the_originals() -> None:
    step = list(inspect.signature(PLMSSampler.p_sample_plms).parameters)
    assert step[-2:] == ["old_eps", "t_next"]
    ddim = list(inspect.signature(DDIMSampler.p_sample_ddim).parameters)
    assert ddim[len(step) - 2 :] == ["dynamic_threshold", "guidance_rescale", "more"]
    assert step[:-2] == ddim[: len(step) - 2]
    for ours, theirs in (("plms_sampling", "ddim_sampling"), ("sample", "sample")):
        names = [
            list(inspect.signature(getattr(cls, name)).parameters)
            for cls, name in ((PLMSSampler, ours), (DDIMSampler, theirs))
        ]
        assert names[0][-1] == "ignored" or ours == "plms_sampling"
        own = [name for name in names[0] if name != "ignored"]
        assert own == names[1][: len(own)]


BAD: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (ValueError, "ddim_eta must be 0 for PLMS, got 0.5", lambda: made(5, ddim_eta=0.5)),
    (
        ValueError,
        "ddim_eta must be 0 for PLMS, got 1.0",
        lambda: PLMSSampler(Model()).sample(5, 2, X.shape[1:], C, eta=1.0),
    ),
    (ValueError, 'model.parameterization must be "eps", got', lambda: PLMSSampler(Model("v"))),
    (TypeError, "verbosity must be left out", lambda: PLMSSampler(Model(), verbosity=1)),
    (ValueError, "call make_schedule first", lambda: PLMSSampler(Model()).plms_sampling(C, (2, 3))),
    (
        ValueError,
        "t_next must be given",
        lambda: made(5).p_sample_plms(X, C, torch.full((2,), 801), 4),
    ),
    (
        ValueError,
        "use_original_steps must be False",
        lambda: made(5).plms_sampling(C, X.shape, ddim_use_original_steps=True),
    ),
    (ValueError, "S (ddim_num_steps) must have timesteps", lambda: made(3)),
    (
        ValueError,
        "normals_sequence must be None",
        lambda: PLMSSampler(Model()).sample(5, 2, X.shape[1:], C, normals_sequence=C),  # type: ignore[arg-type]
    ),
]


@pytest.mark.parametrize(("error", "words", "call"), BAD, ids=[words[:20] for _, words, _ in BAD])
def test_bad_arguments_are_refused(
    error: type[Exception], words: str, call: Callable[[], Any]
) -> None:
    refused(call, error, words)


def test_the_device_of_stability_ais_version_is_ignored() -> None:
    sampler = PLMSSampler(Model(), device="cuda")
    assert sampler.sample(5, 2, X.shape[1:], C, x_T=X)[0].device.type == "cpu"
