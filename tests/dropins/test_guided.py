"""The functions for guided-diffusion: bit for bit its formulas, live and as they were recorded."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastddim.dropins import guided
from tests.dropins.guided_original import (
    FIFTY,
    LINEAR,
    TWELVE,
    Original,
    assert_equal,
    assert_identical,
    cosine,
    darker,
    kept,
    linear,
    model,
    score,
    start,
    toy,
)
from tests.refusals import refused
from tests.waiting import no_waiting

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {
    case["name"]: case
    for case in json.loads((GOLDEN / "index.json").read_text())
    if case["system"].startswith("openai")
}
SHAPE = (3, 3, 8, 8)


def recorded_run(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """(states, x0s, the timesteps the model gets) of the drop-in, and the recorded tensors."""
    golden = load_file(GOLDEN / f"{case['name']}.safetensors")
    names = ("timestep_respacing", "learn_sigma", "predict_xstart", "rescale_timesteps")
    diffusion = guided.Diffusion(
        noise_schedule=case["schedule"], **{name: case[name] for name in names}
    )
    seen: list[Tensor] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return torch.cat([toy(x, t), 0.3 * x], 1) if case["learn_sigma"] else toy(x, t)

    torch.manual_seed(case["generator_seed"])
    x, clip = golden["x_T"], case["clip_denoised"]
    if case["function"] == "ddim_reverse_sample":
        outs = []
        for i in range(diffusion.num_timesteps):
            t = torch.full((len(x),), i)
            outs.append(guided.ddim_reverse_sample(diffusion, net, x, t, clip_denoised=clip))
            x = outs[-1]["sample"]
    else:
        cond_fn = None if case["cond_fn"] is None else lambda x, t: -0.25 * x
        outs = list(
            guided.ddim_sample_loop_progressive(
                diffusion,
                net,
                x.shape,
                noise=x,
                clip_denoised=clip,
                cond_fn=cond_fn,
                eta=case["eta"],
            )
        )
    states, x0s = ([out[name] for out in outs] for name in ("sample", "pred_xstart"))
    return torch.stack(states), torch.stack(x0s), torch.stack(seen), golden


@pytest.mark.parametrize("name", CASES)
def test_the_recorded_trajectories_are_met_bit_for_bit(name: str, recorders_root: None) -> None:
    states, x0s, seen, golden = recorded_run(CASES[name])
    state = torch.get_rng_state()
    assert torch.equal(states, golden["xs"])
    assert torch.equal(x0s, golden["x0_preds"])
    assert torch.equal(seen.double(), golden["t"].double())
    assert seen.dtype == (torch.float32 if CASES[name]["rescale_timesteps"] else torch.int64)
    torch.manual_seed(CASES[name]["generator_seed"])
    assert all(torch.equal(torch.randn_like(z), z) for z in golden["noise"])
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", CASES)
def test_with_own_roots_recordings_are_met_to_1e_5(
    name: str,
) -> None:
    states, x0s, _, golden = recorded_run(CASES[name])
    for ours, theirs in ((states, golden["xs"]), (x0s, golden["x0_preds"])):
        largest = theirs.flatten(1).abs().amax(1).clamp(min=1)
        assert ((ours - theirs).flatten(1).abs().amax(1) <= 1e-5 * largest).all()


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("kept_steps", "clip_denoised", "eta"),
    [
        (TWELVE, True, 0.0),
        (TWELVE, False, 0.7),
        *(
            pytest.param(FIFTY, *c, marks=pytest.mark.slow)
            for c in [(True, 0.0), (False, 0.7), (True, 1.0), (False, 0.0)]
        ),
    ],
    ids=lambda value: f"{len(value)} steps" if isinstance(value, set) else None,
)
@pytest.mark.parametrize(
    ("denoised_fn", "cond_fn"),
    [(None, None), (None, score), (darker, None), (darker, score)],
    ids=["plain", "cond", "denoised", "both"],
)
@pytest.mark.parametrize(
    ("schedule", "spaced", "settings"),
    [
        (linear, True, {}),
        (linear, True, {"var": "LEARNED_RANGE", "rescale": True}),
        (cosine, True, {"mean": "START_X", "rescale": True}),
        (cosine, False, {"mean": "START_X", "var": "LEARNED"}),
        (linear, False, {"rescale": True, "var": "FIXED_SMALL"}),
    ],
    ids=["epsilon", "variance", "x0", "x0-variance", "unspaced"],
)
def test_loops_are_bit_identical_and_leave_the_same_stream(
    schedule: Callable[..., Any],
    spaced: bool,
    settings: dict[str, Any],
    denoised_fn: Any,
    cond_fn: Any,
    kept_steps: set[int],
    clip_denoised: bool,
    eta: float,
) -> None:
    # Fewer than 21 linear levels do not exist.
    betas = schedule() if spaced else schedule(len(kept_steps) + 12)
    diffusion = Original(betas, kept_steps if spaced else None, **settings)
    variance = diffusion.model_var_type.name.startswith("LEARNED")
    assert_identical(
        diffusion,
        partial(model, variance=variance),
        start(*SHAPE),
        clip_denoised=clip_denoised,
        denoised_fn=denoised_fn,
        cond_fn=cond_fn,
        model_kwargs={"y": torch.arange(3)},
        eta=eta,
    )


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "x",
    [
        start(1, 1, 1, 1),
        start(2, 3, 17, 3),
        start(2, 5),
        start(2, 3, 2, 4, 5),
        start(2, 3, 105, 104),
        start(3, 4, 6, 5).contiguous(memory_format=torch.channels_last),
        start(4, 5, 6, 9)[1:3, 1:4, ::2, 2:],
        start(2, 6, 5, 3).transpose(1, 3),
        start(1, 3, 4, 4).expand(3, -1, -1, -1),
    ],
    ids=lambda x: f"{tuple(x.shape)}{tuple(x.stride())}",
)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("variance", [False, True])
def test_odd_sizes_and_layouts_are_bit_identical(x: Tensor, eta: float, variance: bool) -> None:
    diffusion = Original(
        linear(), set(range(0, 1000, 100)), var="LEARNED_RANGE" if variance else "FIXED_LARGE"
    )
    assert_identical(diffusion, partial(model, variance=variance), x, eta=eta)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_half_precision_noise_and_models_give_identical_float32(
    dtype: torch.dtype, eta: float
) -> None:
    def half(x: Tensor, t: Tensor) -> Tensor:
        return toy(x.to(dtype), t)

    cond_fn = lambda x, t: (-0.25 * x).to(dtype)  # noqa: E731
    assert_identical(LINEAR, half, start(*SHAPE).to(dtype), eta=eta)
    assert_identical(LINEAR, half, start(*SHAPE), eta=eta, cond_fn=cond_fn)


@pytest.mark.parametrize("guide", [None, score])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_step_takes_each_sample_at_its_own_timestep(layout: Any, guide: Any) -> None:
    x = start(5, 3, 6, 7).contiguous(memory_format=layout)
    t = torch.tensor([49, 0, 7, 0, 20])
    torch.manual_seed(0)
    ours = guided.ddim_sample(LINEAR, model, x, t, eta=1.0, cond_fn=guide)
    torch.manual_seed(0)
    theirs = LINEAR.ddim_sample(model, x, t, eta=1.0, cond_fn=guide)
    assert_equal(kept([ours]), kept([theirs]))


@pytest.mark.parametrize("denoised_fn", [None, torch.tanh])
@pytest.mark.parametrize("clip_denoised", [True, False])
@pytest.mark.parametrize("mean", ["EPSILON", "START_X"])
def test_reverse_steps_are_bit_identical_and_draw_nothing(
    mean: str, clip_denoised: bool, denoised_fn: Any
) -> None:
    diffusion = Original(linear(), FIFTY, mean=mean, rescale=True)
    ours, theirs = (
        partial(step, model=toy, clip_denoised=clip_denoised, denoised_fn=denoised_fn)
        for step in (partial(guided.ddim_reverse_sample, diffusion), diffusion.ddim_reverse_sample)
    )
    state = torch.get_rng_state()
    x = start(*SHAPE).clamp(-1, 1)
    mixed = {"x": x, "t": torch.tensor([7, 49, 0])}
    assert_equal(kept([ours(**mixed)]), kept([theirs(**mixed)]))
    for i in range(50):
        t = torch.full((3,), i)
        out = ours(x=x, t=t)
        assert_equal(kept([out]), kept([theirs(x=x, t=t)]))
        x = out["sample"]
    assert torch.equal(state, torch.get_rng_state())


def test_a_batch_of_none_stays_one() -> None:
    for out in guided.ddim_sample_loop_progressive(LINEAR, toy, (0, 3, 4, 4), device="cpu"):
        assert out["sample"].shape == out["pred_xstart"].shape == (0, 3, 4, 4)


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_full_trajectory_is_bit_identical(eta: float) -> None:
    assert_identical(Original(linear(), set(range(1000))), toy, start(2, 1, 3, 3), eta=eta)


@pytest.mark.parametrize(
    ("T", "respacing", "steps"),
    [
        (1000, "", range(1000)),
        (1000, None, range(1000)),
        (1000, "ddim50", range(0, 1000, 20)),
        (1000, "ddim1000", range(1000)),
        (4000, "ddim25", range(0, 4000, 160)),
        (30, "ddim2", (0, 15)),
        (10, "1,0,2", (0, 7, 9)),
        (30, "10,5,1", (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 19, 20)),
        (30, [2, 3], (0, 14, 15, 22, 29)),
        (50, "6", (0, 10, 20, 29, 39, 49)),
        (39, "13", (0, 3, 6, 10, 13, 16, 19, 22, 25, 29, 32, 35, 38)),
        (7, "2,2,2", (0, 2, 3, 4, 5, 6)),
    ],
)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_respacing_and_its_tables_are_the_originals(
    T: int, respacing: Any, steps: Any, schedule: str
) -> None:
    if schedule == "linear" and T < 21:
        return
    ours = guided.Diffusion(T, respacing, schedule)
    theirs = Original(linear(T) if schedule == "linear" else cosine(T), set(steps))
    assert ours.timestep_map == theirs.timestep_map
    assert ours.num_timesteps == theirs.num_timesteps
    for name in ("betas", "alphas_cumprod"):
        mine, own = getattr(ours, name), getattr(theirs, name)
        assert mine.dtype == own.dtype == np.float64
        if schedule == "linear":
            assert (mine == own).all()
        else:  # NumPy's cosines and those of the C library differ in the last place
            np.testing.assert_allclose(mine, own, rtol=1e-11)
            assert (mine.astype(np.float32) == own.astype(np.float32)).all()


def test_62_of_1000_strides_work_and_refusals_name_two_of_them() -> None:
    feasible = {len(range(0, 1000, stride)) for stride in range(1, 1000)}
    assert len(feasible) == 62
    for n in range(1001):
        if n in feasible:
            assert guided.Diffusion(timestep_respacing=f"ddim{n}").num_timesteps == n
        else:
            with pytest.raises(ValueError, match="timestep_respacing") as caught:
                guided.Diffusion(timestep_respacing=f"ddim{n}")
            message = str(caught.value)
            near = {max((m for m in feasible if m < n), default=None)}
            near |= {min((m for m in feasible if m > n), default=None)}
            named = {int(word) for word in re.findall(r" ddim(\d+)", message)}
            assert named == near - {None}, message


def test_the_callers_sample_is_where_the_next_step_starts() -> None:
    def steered(loop: Any) -> list[Tensor]:
        torch.manual_seed(0)
        states = []
        for i, out in enumerate(loop):
            if i == 3:
                out["sample"] = out["sample"][:, :, 1:, ::2].half()
            elif i == 6:
                out["sample"].mul_(0.5)
            states += [tensor.clone() for tensor in kept([out])]
        return states

    x = start(*SHAPE)
    ours = steered(guided.ddim_sample_loop_progressive(LINEAR, model, x.shape, x, eta=1.0))
    theirs = steered(LINEAR.ddim_sample_loop_progressive(model, x.shape, x, eta=1.0))
    assert len(ours) == 100
    assert all(torch.equal(mine, own) for mine, own in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("cond_fn", [None, score])
@pytest.mark.parametrize("mean", ["EPSILON", "START_X"])
def test_kept_results_never_change_and_no_argument_is_written(mean: str, cond_fn: Any) -> None:
    held: list[tuple[Tensor, Tensor]] = []

    def hold(*tensors: Tensor) -> None:
        held.extend((tensor, tensor.clone()) for tensor in tensors)

    def keeping(x: Tensor, t: Tensor) -> Tensor:
        output = toy(x, t)
        hold(x, t, output)
        return output

    def denoised(x0: Tensor) -> Tensor:
        hold(x0)
        return x0

    array = np.ones(SHAPE, dtype=np.float32)
    x = torch.from_numpy(array)
    diffusion = Original(linear(), FIFTY, mean=mean)
    for out in guided.ddim_sample_loop_progressive(
        diffusion, keeping, SHAPE, x, denoised_fn=denoised, cond_fn=cond_fn, eta=1.0
    ):
        hold(*kept([out]))
    assert len(held) == 50 * 6
    assert all(torch.equal(tensor, copy) for tensor, copy in held)
    assert (array == 1).all()


def test_released_memory_is_written_again() -> None:
    states, x0s = set(), set()
    shape = (2, 3, 80, 80)  # fresh memory serves what is smaller
    x = start(*shape)
    for out in guided.ddim_sample_loop_progressive(LINEAR, toy, shape, x):
        states.add(out["sample"].data_ptr())
        x0s.add(out["pred_xstart"].data_ptr())
    assert len(states) == len(x0s) == 2
    assert x.data_ptr() not in states


def test_gradients_are_off_in_the_loop_and_as_they_were_outside() -> None:
    def net(x: Tensor, t: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return weight * x

    weight = torch.nn.Parameter(torch.tensor(0.5))
    for out in guided.ddim_sample_loop_progressive(LINEAR, net, SHAPE, start(*SHAPE)):
        assert torch.is_grad_enabled()
        assert not out["sample"].requires_grad
    assert not guided.ddim_sample(LINEAR, net, start(1, 1), torch.tensor([3]))["sample"].grad_fn


def test_inference_mode_may_begin_and_end_between_two_steps() -> None:
    x = start(*SHAPE)
    loop = guided.ddim_sample_loop_progressive(LINEAR, toy, SHAPE, x, eta=1.0)
    torch.manual_seed(0)
    states = []
    for i in range(50):
        with torch.inference_mode(i % 5 < 3):
            states.append(next(loop)["sample"].clone())
    torch.manual_seed(0)
    theirs = LINEAR.ddim_sample_loop_progressive(toy, SHAPE, x, eta=1.0)
    assert all(torch.equal(a, out["sample"]) for a, out in zip(states, theirs, strict=True))


def test_the_global_generator_draws_on_the_models_device() -> None:
    net = torch.nn.Conv2d(3, 3, 1)
    apply = lambda x, t: toy(net(x), t)  # noqa: E731
    apply.parameters = net.parameters  # type: ignore[attr-defined]
    torch.manual_seed(0)
    mine = guided.ddim_sample_loop(LINEAR, apply, SHAPE)
    torch.manual_seed(0)
    assert torch.equal(mine, kept(LINEAR.ddim_sample_loop_progressive(apply, SHAPE))[-2])
    refused(lambda: guided.ddim_sample_loop(LINEAR, toy, SHAPE), ValueError, "device")


def test_progress_shows_a_bar_or_names_the_missing_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tqdm")
    x = start(*SHAPE)
    loop: Callable[..., Tensor] = partial(guided.ddim_sample_loop, LINEAR, toy, SHAPE, x)
    assert torch.equal(loop(progress=True), loop())
    assert "50/50" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    refused(lambda: loop(progress=True), ImportError, "progress", "tqdm")


@pytest.mark.parametrize("steps", [range(0, 1000, 20), (0, 1), (0, 500, 999)])
def test_the_largest_eta_named_works_and_no_larger_one(steps: Any) -> None:
    diffusion, x = Original(linear(), set(steps)), start(1, 1, 2, 2)
    loop = partial(guided.ddim_sample_loop_progressive, diffusion, toy, x.shape, x)
    with pytest.raises(ValueError, match="eta must be at most") as caught:
        loop(eta=1e4)
    most = float(str(caught.value).split()[5])
    assert_identical(diffusion, toy, x, eta=most)
    more = (round(most * 1e6) + 1) / 1e6
    refused(lambda: loop(eta=more), ValueError, "eta", str(most))
    theirs = kept(diffusion.ddim_sample_loop_progressive(toy, x.shape, x, eta=more))
    assert theirs[-2].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("cond_fn", [None, score])
def test_on_a_gpu_fifty_steps_are_bit_identical(cond_fn: Any, layout: Any, eta: float) -> None:
    x = start(3, 3, 17, 9).cuda().contiguous(memory_format=layout)
    results = []
    for loop in (
        partial(guided.ddim_sample_loop_progressive, LINEAR),
        partial(LINEAR.ddim_sample_loop_progressive, device="cuda"),
    ):
        torch.manual_seed(0)
        states = kept(loop(model, x.shape, x, cond_fn=cond_fn, eta=eta))
        results.append((states, torch.cuda.get_rng_state()))
    (ours, our_state), (theirs, their_state) = results
    assert_equal(ours, theirs)
    assert torch.equal(our_state, their_state)


@pytest.mark.gpu
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_on_a_gpu_no_single_step_waits_for_its_tables(eta: float) -> None:
    x, t = start(3, 3, 17, 9).cuda(), torch.full((3,), 7, device="cuda")
    first = guided.ddim_sample(LINEAR, model, x, t, eta=eta)["sample"]
    with no_waiting():
        second = guided.ddim_sample(LINEAR, model, first, t - 1, eta=eta)["sample"]
    assert second.isfinite().all()
