"""The loop on other paths than that of ᾱ: every feature, against the reference step."""

from __future__ import annotations

import importlib
import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastddim import DDIM, NoiseSchedule, generate
from fastddim.levels import GaussianPath
from fastddim.loop import graph
from fastddim.preconditioning import Preconditioned
from fastddim.step import reference
from fastddim.step.op import initial_noise
from fastddim.tools.quality import Gaussian
from fastddim.variances import CPS
from tests.paths import randn
from tests.refusals import refused
from tests.tape import tapes_for_graphs

diffusers: Any = importlib.import_module("diffusers")  # without its types
SHAPE, SEEDS = (3, 2, 5, 4), [7, 2**35, 2**63 - 1]
PATHS: dict[str, tuple[GaussianPath, Any]] = {
    "flow": (NoiseSchedule.flow(3.0), "flow"),
    "pi0": (NoiseSchedule.flow(scale=1.0), "flow"),
    "EDM": (NoiseSchedule.edm(), "sample"),
    "cosine": (NoiseSchedule.continuous_cosine(), "v"),
    "table": (NoiseSchedule.from_levels(1.0, np.geomspace(0.01, 20, 30)), "epsilon"),
}


def model(x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
    each = (-1, *[1] * (x.dim() - 1))
    output = 0.8 * x.float().clamp(-1.5, 1.5) + (t.float() % 0.37).view(each)
    return (output + (0 if c is None else 0.1 * c.view(each))).to(x.dtype)


def made(name: str, steps: int = 6, **options: Any) -> DDIM:
    path, prediction = PATHS[name]
    return DDIM(steps, schedule=path, spacing="trailing", prediction=prediction, **options)


def reference_states(ddim: DDIM, z: list[Tensor] | None = None, order: int = 1) -> list[Tensor]:
    """The states of the loop by ``reference.ddim_step``."""
    x = initial_noise(torch.tensor(SEEDS), SHAPE)
    x = x * ddim.schedule.noise_scale(ddim.pairs[0][0])
    states, x0 = [x], torch.zeros_like(x)
    for i, (t, row) in enumerate(
        zip(ddim.schedule.times([t for t, _ in ddim.pairs]), torch.tensor(ddim.table), strict=True)
    ):
        output = model(x, torch.full((len(x),), t.item()))
        x, x0 = reference.ddim_step(
            x,
            output,
            row,
            None if z is None or row[5] == 0 else z[i],
            ddim.prediction,
            ddim.clip,
            history=x0 if order == 2 else None,
        )
        states.append(x)
    return states


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("name", PATHS)
def test_a_sample_is_the_reference_loops(name: str, clip: float | None, order: int) -> None:
    ddim = made(name, clip=clip, order=order)
    expected = reference_states(ddim, order=order)
    assert torch.equal(ddim.sample(model, shape=SHAPE, seeds=SEEDS), expected[-1])
    states = [step.x for step in ddim.iterate(model, shape=SHAPE, seeds=SEEDS)]
    assert all(torch.equal(a, b) for a, b in zip(states, expected[1:], strict=True))
    in_batches = ddim.sample(model, shape=SHAPE, seeds=SEEDS, batch_size=2)
    assert torch.equal(in_batches, expected[-1])


@pytest.mark.parametrize("eta", [1.0, 0.4, CPS(0.6)], ids=str)
@pytest.mark.parametrize("name", PATHS)
def test_noise_is_the_callers_on_every_path(name: str, eta: Any) -> None:
    ddim = made(name, eta=eta)
    z = [randn(*SHAPE, seed=k) for k in range(6)]
    expected = reference_states(ddim, z)
    found = ddim.sample(model, expected[0], noise=z)
    assert torch.equal(found, expected[-1])


@pytest.mark.parametrize("tape", [False, True])
@pytest.mark.parametrize("steps", [6, 13])
@pytest.mark.parametrize("name", PATHS)
def test_a_captured_loop_is_a_fresh_run(
    name: str, steps: int, tape: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "WHOLE", 10)
    if tape:
        tapes_for_graphs(monkeypatch)
    ddim = made(name, steps, eta=0.5)
    run = ddim.capture(model, SHAPE, cond={"c": torch.zeros(3)})
    for k in (1.0, 2.0):
        cond = {"c": torch.full((3,), k)}
        expected = ddim.sample(model, shape=SHAPE, seeds=SEEDS, cond=cond)
        assert torch.equal(run(seeds=SEEDS, cond=cond), expected)


@pytest.mark.parametrize("name", PATHS)
def test_guidance_moves_the_output_on_every_path(name: str) -> None:
    ddim = made(name)
    c, u = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)

    def both(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t, u) + 2.5 * (model(x, t, c) - model(x, t, u))

    found = ddim.sample(
        model, shape=SHAPE, seeds=SEEDS, cond={"c": c}, uncond={"c": u}, guidance=2.5
    )
    assert torch.equal(found, ddim.sample(both, shape=SHAPE, seeds=SEEDS))


@pytest.mark.parametrize("name", PATHS)
def test_guidance_may_be_a_function_of_the_models_t(name: str) -> None:
    ddim = made(name)
    seen: list[float] = []

    def weight(t: float) -> float:
        seen.append(t)
        return 1.0

    cond, uncond = {"c": torch.ones(3)}, {"c": torch.zeros(3)}
    ddim.sample(model, shape=SHAPE, seeds=SEEDS, cond=cond, uncond=uncond, guidance=weight)
    assert seen == ddim.schedule.times([t for t, _ in ddim.pairs]).tolist()


@pytest.mark.parametrize("name", ["flow", "EDM", "cosine"])
def test_a_classifiers_gradient_gives_posterior_samples(name: str) -> None:
    # x0 ~ N(m, s²), y = x0 + N(0, r²): p(y | x_t) and p(x0 | y) are both Gaussian.
    path, prediction = PATHS[name]
    m, s, r, y = 0.3, 0.8, 0.5, -0.6
    precision = 1 / s**2 + 1 / r**2
    prior = Gaussian(m, s, path, prediction)
    posterior = Gaussian((m / s**2 + y / r**2) / precision, precision**-0.5, path, prediction)

    def classifier(x: Tensor, t: Tensor) -> Tensor:
        a, b = (torch.from_numpy(v).view(-1, 1, 1, 1) for v in path.levels_of(t))
        v = (a * s) ** 2 + b**2
        mean = m + a * s**2 / v * (x.double() - a * m)
        return ((y - mean) / ((s * b) ** 2 / v + r**2) * a * s**2 / v).float()

    levels = [sigma for sigma, _ in DDIM(40, schedule=path, prediction="sample").pairs][1:]
    ddim = DDIM(eta=0.5, schedule=path, prediction=prediction, spacing=levels)
    x = float(path.at(levels[:1]).sigma[0]) * randn(*SHAPE)
    z = [randn(*SHAPE, seed=k) for k in range(39)]
    found = ddim.sample(prior, x, noise=z, cond_fn=classifier)
    exact = ddim.sample(posterior, x, noise=z)
    assert (found - exact).abs().max() < 1e-4
    assert (ddim.sample(prior, x, noise=z) - exact).abs().max() > 0.2


def test_a_gradient_is_refused_in_rows_that_run_alone() -> None:
    ddim = made("flow")

    def classifier(x: Tensor, t: Tensor) -> Tensor:
        return -x

    from_noise = partial(ddim.sample, model, shape=SHAPE, seeds=SEEDS, cond_fn=classifier)
    refused(from_noise, ValueError, "cond_fn cannot be used where α is 0", "level 1 ")
    assert ddim.sample(model, randn(*SHAPE), start=1, cond_fn=classifier).isfinite().all()


@pytest.mark.parametrize("name", PATHS)
def test_noised_data_is_alpha_x0_plus_sigma_eps(name: str) -> None:
    ddim = made(name)
    x0, eps = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    for start, (t, _) in enumerate(ddim.pairs):
        at = ddim.schedule.at([t])
        expected = at.alpha[0] * x0.double() + at.sigma[0] * eps.double()
        found = ddim.add_noise(x0, start, noise=eps)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
        out = ddim.sample(model, found, start=start)
        assert out.isfinite().all()


@pytest.mark.parametrize("name", PATHS)
def test_a_known_part_stays_at_its_level(name: str) -> None:
    # A π0-style policy keeps a prefix of the actions: it is the known part.
    ddim = made(name)
    known = randn(*SHAPE, seed=1)
    mask = torch.zeros(1, 1, 5, 1)
    mask[:, :, :2] = 1
    seen: list[Tensor] = []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.clone())
        return model(x, t)

    out = ddim.sample(watched, shape=SHAPE, seeds=SEEDS, known=known, mask=mask)
    assert torch.equal(out[:, :, :2], known[:, :, :2])
    for x, (t, _) in zip(seen, ddim.pairs, strict=True):
        at = ddim.schedule.at([t])
        eps = (x - at.alpha[0] * known)[:, :, :2] / at.sigma[0]
        assert abs(float(eps.mean())) < 0.5
        assert 0.7 < float(eps.std()) < 1.3


@pytest.mark.parametrize("name", PATHS)
def test_steps_name_their_levels(name: str) -> None:
    ddim = made(name)
    path = ddim.schedule
    steps = list(ddim.iterate(model, shape=SHAPE, seeds=SEEDS))
    assert [(step.t, step.s) for step in steps] == list(ddim.pairs)
    assert all(a.s == b.t for a, b in itertools.pairwise(steps))
    assert steps[-1].s == -1
    assert str(steps[0].t) in repr(steps[0])
    ddim.describe("cpu")
    assert path.times([steps[0].t]).dtype == (np.int64 if name == "table" else np.float32)


def test_describe_prints_alpha_and_sigma(capsys: pytest.CaptureFixture[str]) -> None:
    made("EDM").describe("cpu")
    lines = capsys.readouterr().out.splitlines()
    assert "NoiseSchedule.edm(0.002, 80, rho=7" in lines[0]
    assert lines[1].split() == ["row", "t", "s", "α_t", "σ_t", "α_s", "c1", "c2"]
    assert [float(cell) for cell in lines[2].split()[1:]] == pytest.approx(
        [80, 24.41, 1, 80, 1, 0, 24.408], rel=1e-3
    )


def test_images_on_a_path_are_those_of_sample(tmp_path: Any) -> None:
    path, prediction = PATHS["flow"]
    ddim = DDIM(4, eta=CPS(0.5), schedule=path, prediction=prediction)
    net = nn.Conv2d(1, 1, 3, padding=1).requires_grad_(False)

    def called(x: Tensor, t: Tensor) -> Any:
        return net(x)

    def as_it_is(x: Tensor) -> Tensor:
        return x

    folder = tmp_path / "out"
    for _ in range(2):  # the second call finds the folder finished
        generate(
            ddim,
            called,
            (1, 8, 8),
            range(6),
            out=folder,
            batch_size=3,
            format="npy",
            postprocess=as_it_is,
        )
    found = np.concatenate([np.load(file) for file in sorted(folder.glob("*.npy"))])
    expected = ddim.sample(called, shape=(6, 1, 8, 8), seeds=range(6), batch_size=3)
    assert np.allclose(found, expected.numpy(), atol=1e-6)
    other = DDIM(4, eta=CPS(0.6), schedule=path, prediction=prediction)
    again = partial(generate, other, called, (1, 8, 8), range(6), out=folder, batch_size=3)
    refused(
        partial(again, format="npy", postprocess=as_it_is),
        ValueError,
        "out must be",
        "CPS(eta=0.6)",
    )


@pytest.mark.parametrize("time", ["sigma", "c_noise"])
def test_edms_preconditioning_is_diffusers(time: str) -> None:
    original = diffusers.EDMEulerScheduler()
    original.set_timesteps(18)
    x = expected = 80 * randn(2, 3, 4, 4)
    for t in original.timesteps:
        scaled = original.scale_model_input(expected, t)
        expected = original.step(model(scaled, t.expand(2)), t, expected).prev_sample
    path = NoiseSchedule.edm(time=time)
    ddim = DDIM(18, schedule=path, prediction="sample")
    found = ddim.sample(Preconditioned(model, time=time), x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)


def test_nonsense_of_preconditioning_is_named() -> None:
    refused(partial(Preconditioned, 3), TypeError, "network must be callable", "3")
    refused(partial(Preconditioned, model, 0.0), ValueError, "sigma_data must be > 0", "0")
    refused(partial(Preconditioned, model, time="t"), ValueError, "time must be", "'t'")
