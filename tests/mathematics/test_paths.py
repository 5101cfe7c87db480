"""Every Gaussian path against exact solutions and against published schedules."""

from __future__ import annotations

import copy
import importlib
import itertools
import math
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from fastddim import DDIM, NoiseSchedule, make_pairs
from fastddim.levels import GaussianPath
from fastddim.tools.quality import Gaussian, GaussianMixture
from tests.refusals import refused

diffusers: Any = importlib.import_module("diffusers")  # without its types
COSINE_TABLE = NoiseSchedule.from_levels(
    np.cos(np.arange(1, 1000) / 1000 * np.pi / 2),
    np.sin(np.arange(1, 1000) / 1000 * np.pi / 2),
    np.arange(1, 1000) / 1000,
)
PATHS: dict[str, tuple[GaussianPath, float, float]] = {
    "flow": (NoiseSchedule.flow(), 0.97, 0.03),
    "shifted flow": (NoiseSchedule.flow(3.0, scale=1.0), 0.97, 0.03),
    "EDM": (NoiseSchedule.edm(), 30.0, 0.03),
    "EDM, c_noise": (NoiseSchedule.edm(time="c_noise"), 30.0, 0.03),
    "cosine": (NoiseSchedule.continuous_cosine(), 0.97, 0.03),
}
"""Each path, and the σ between which its order of convergence is measured."""
KINDS = [
    pytest.param(name, marks=pytest.mark.slow) if name in ("shifted flow", "EDM, c_noise") else name
    for name in PATHS
]
"""The paths, of which those whose levels another has too are slow."""
X = torch.tensor([[1.3, -0.4], [0.2, 2.1], [-1.0, 0.6]])
MEANS, STDS = torch.tensor([[-0.8, 0.1], [0.6, -0.4]]), [0.2, 0.3]


def smooth(path: GaussianPath, high: float, low: float, S: int) -> list[float]:
    """S + 1 levels, even in λ, between two σ."""
    ends = [float(path.at([sigma]).alpha[0]) / sigma for sigma in (high, low)]
    ratio = np.geomspace(ends[0], ends[1], S + 1)
    if path.at([low]).preserving:
        sigma = 1 / np.sqrt(1 + ratio**2)
    elif path.at([low]).alpha[0] == 1:
        sigma = 1 / ratio
    else:
        sigma = 1 / (1 + ratio)
    sigma[0], sigma[-1] = high, low
    return [float(value) for value in sigma]


def steps_of(path: GaussianPath, high: float, low: float, S: int) -> list[tuple[float, float]]:
    levels = smooth(path, high, low, S)
    return list(itertools.pairwise(levels))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("prediction_at", [0, 1])
@pytest.mark.parametrize("name", KINDS)
def test_a_gaussians_flow_is_met_with_order_1_and_2(name: str, prediction_at: int) -> None:
    path, high, low = PATHS[name]
    prediction: Any = path.predictions[prediction_at]
    data = Gaussian(0.3, 0.5, path, prediction)
    alpha, sigma = (float(v[0]) for v in (path.at([high]).alpha, path.at([high]).sigma))
    x = 0.3 * alpha + math.hypot(0.5 * alpha, sigma) * X

    def error(S: int, order: int) -> float:
        pairs = steps_of(path, high, low, S)
        ddim = DDIM(schedule=path, spacing=pairs, prediction=prediction, order=order)
        found = ddim.sample(data, x).double()
        return float((found - data.flow(x.double(), high, low)).abs().max())

    (coarse, fine), (coarse_2, fine_2) = ([error(S, order) for S in (20, 160)] for order in (1, 2))
    assert math.log(coarse / fine) / math.log(8) >= 0.95
    assert math.log(coarse_2 / fine_2) / math.log(8) >= 1.9


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", KINDS)
def test_a_mixtures_flow_is_met_with_order_1_and_2(name: str) -> None:
    path, high, low = PATHS[name]
    prediction: Any = path.predictions[0]
    data = GaussianMixture(MEANS, STDS, [0.3, 0.7], path, prediction)
    x = float(path.at([high]).sigma[0]) * torch.randn(
        64, 2, generator=torch.Generator().manual_seed(0)
    )

    def end(S: int, order: int) -> torch.Tensor:
        pairs = steps_of(path, high, low, S)
        ddim = DDIM(schedule=path, spacing=pairs, prediction=prediction, order=order)
        return ddim.sample(data, x).double()

    exact = (4 * end(1280, 2) - end(640, 2)) / 3  # Richardson's extrapolation of order 2
    for order, least in ((1, 0.95), (2, 1.9)):
        coarse, fine = (float((end(S, order) - exact).abs().mean()) for S in (40, 160))
        assert math.log(coarse / fine) / math.log(4) >= least, (order, coarse, fine)


@pytest.mark.parametrize("name", KINDS)
def test_mean_and_covariance_are_kept_at_eta_1(name: str) -> None:
    # A Gaussian stays one: x_s = A·x_t + B + c1·z, whose moments follow without sampling.
    path, high, low = PATHS[name]
    mean, std = 0.3, 0.5
    ddim = DDIM(
        schedule=path, eta=1.0, spacing=steps_of(path, high, low, 2000), prediction="sample"
    )
    start = path.at([high])
    alpha, sigma = float(start.alpha[0]), float(start.sigma[0])
    m, v = alpha * mean, (alpha * std) ** 2 + sigma**2
    for row in ddim.table.astype(np.float64):
        a_t, _, b_t, _, a_s, c1, c2 = row
        gain = a_t * std**2 / ((a_t * std) ** 2 + b_t**2)  # x0 = mean + gain·(x − a·mean)
        A = a_s * gain + c2 * (1 - a_t * gain) / b_t
        B = (a_s - c2 * a_t / b_t) * mean * (1 - gain * a_t)
        m, v = A * m + B, A * A * v + c1 * c1
    end = path.at([low])
    total = (float(end.alpha[0]) * std) ** 2 + float(end.sigma2[0])
    assert m == pytest.approx(float(end.alpha[0]) * mean, abs=1e-4)
    assert v == pytest.approx(total, rel=5e-3)
    assert np.allclose(ddim.table[:, 5] ** 2 + ddim.table[:, 6] ** 2, path.at(
        [s for _, s in ddim.pairs]
    ).sigma2, rtol=1e-5)  # fmt: skip


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", [*KINDS, "table"])
def test_inversion_comes_back_to_the_data(name: str) -> None:
    path = COSINE_TABLE if name == "table" else PATHS[name][0]
    prediction: Any = path.predictions[0]
    data = Gaussian(0.3, 0.5, path, prediction)
    spacing = "trailing" if name in ("cosine", "table") else "uniform"
    if name == "table":
        prediction = "v"
        data = Gaussian(0.3, 0.5, path, prediction)
    x0 = data.mean.float() + 0.5 * X
    ddim = DDIM(20, schedule=path, spacing=spacing, prediction=prediction)
    until = 1 if float(path.at([ddim.pairs[0][0]]).alpha[0]) < 1e-6 else 0
    x = ddim.invert(data, x0, refine=200, until=until)
    back = ddim.sample(data, x, start=until)
    assert float((back - x0).abs().max()) < 1e-6 * max(1.0, float(x.abs().max()) / 4)


def test_shifted_sigmas_are_those_of_flow_match_euler() -> None:
    for shift in (1.0, 3.0):
        original = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        original.set_timesteps(sigmas=np.linspace(1, 1 / 28, 28))
        pairs = make_pairs("uniform", 28, NoiseSchedule.flow(shift))
        found = [sigma for sigma, _ in pairs] + [0.0]
        np.testing.assert_allclose(found, original.sigmas.numpy(), rtol=1e-6)
        times = NoiseSchedule.flow(shift).times([sigma for sigma, _ in pairs])
        np.testing.assert_allclose(times, original.timesteps.numpy(), rtol=1e-6)


def test_the_shift_of_a_resolution_is_that_of_flux() -> None:
    flux = importlib.import_module("diffusers.pipelines.flux.pipeline_flux")
    for tokens in (256, 1024, 4096):
        path = NoiseSchedule.flow(tokens=tokens)
        assert path.levels_of(500.0)[1] == 0.5
        mu = flux.calculate_shift(tokens, max_shift=1.15)
        original = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        original.set_timesteps(sigmas=np.linspace(1, 0.1, 10), mu=mu)
        found = [sigma for sigma, _ in make_pairs("uniform", 10, path)]
        np.testing.assert_allclose(found, original.sigmas[:-1].numpy(), rtol=1e-6)


def test_edms_levels_are_those_of_edm_euler() -> None:
    original = diffusers.EDMEulerScheduler()
    original.set_timesteps(18)
    path = NoiseSchedule.edm(time="c_noise")
    sigmas = [sigma for sigma, _ in make_pairs("uniform", 18, path)]
    np.testing.assert_allclose(sigmas, original.sigmas[:-1].numpy(), rtol=1e-5)
    np.testing.assert_allclose(path.times(sigmas), original.timesteps.numpy(), rtol=1e-5, atol=1e-6)


def test_a_flow_euler_loop_of_diffusers_is_met() -> None:
    original = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    original.set_timesteps(sigmas=np.linspace(1, 0.1, 10))
    path = NoiseSchedule.flow(3.0)
    data = GaussianMixture(MEANS, STDS, [0.3, 0.7], path, "flow")
    x = expected = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    for t in original.timesteps:
        output = data(expected, t)
        expected = original.step(output, t, expected).prev_sample
    ddim = DDIM(10, schedule=path, prediction="flow")
    torch.testing.assert_close(ddim.sample(data, x), expected, rtol=1e-5, atol=2e-6)


def test_an_edm_euler_loop_of_diffusers_is_met() -> None:
    original = diffusers.EDMEulerScheduler()
    original.set_timesteps(18)
    path = NoiseSchedule.edm(time="c_noise")
    data = GaussianMixture(MEANS, STDS, [0.3, 0.7], path, "sample")
    z = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    x = expected = 80 * z
    for t in original.timesteps:
        original.scale_model_input(expected, t)
        sigma = original.sigmas[original.step_index]
        x0 = data(expected, torch.log(sigma) / 4)
        # The original preconditions: its step gets F, of which x0 = c_skip·x + c_out·F.
        raw = original.precondition_outputs(expected, torch.zeros_like(expected), sigma)
        unit = original.precondition_outputs(torch.zeros_like(x0), torch.ones_like(x0), sigma)
        expected = original.step((x0 - raw) / unit, t, expected).prev_sample
    found = DDIM(18, schedule=path, prediction="sample").sample(data, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PATHS)
def test_noise_begins_with_the_sigma_of_the_first_level(name: str) -> None:
    path, _, _ = PATHS[name]
    seen = []

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append((x.clone(), t.clone()))
        return torch.zeros_like(x)

    ddim = DDIM(4, schedule=path, prediction="sample")
    ddim.sample(model, shape=(2, 4096), seeds=[1, 2])
    x, t = seen[0]
    scale = 80.0 if name.startswith("EDM") else 1.0
    assert float(x.std()) == pytest.approx(scale, rel=0.03)
    assert t.dtype == torch.float32
    assert t.shape == (2,)
    found = [float(t[0]) for _, t in seen]
    assert found == path.times([t for t, _ in ddim.pairs]).tolist()
    alpha, sigma = path.levels_of(torch.tensor(found))
    exact = path.at([t for t, _ in ddim.pairs])
    np.testing.assert_allclose(alpha, exact.alpha, atol=1e-6)
    np.testing.assert_allclose(sigma, exact.sigma, rtol=1e-6)


@pytest.mark.parametrize(
    "spacing", ["uniform", "trailing", "linspace", "mixed", "logsnr", "karras"]
)
@pytest.mark.parametrize("name", PATHS)
def test_named_spacings_take_s_falling_levels(name: str, spacing: Any) -> None:
    path, _, _ = PATHS[name]
    for S in (1, 2, 7, 50):
        pairs = make_pairs(spacing, S, path)
        sigmas = [t for t, _ in pairs]
        assert len(sigmas) == S
        assert sigmas[0] == pytest.approx(path.at(sigmas[:1]).sigma[0])
        assert sigmas[0] == (80.0 if name.startswith("EDM") else 1.0) or spacing != "uniform"
        assert all(a > b for a, b in itertools.pairwise(sigmas))
        assert [s for _, s in pairs] == [*sigmas[1:], -1]
        assert np.isfinite(
            DDIM(S, schedule=path, spacing=spacing, prediction="sample").table[:, 4:]
        ).all()


@pytest.mark.parametrize(
    "path",
    [
        *(NoiseSchedule.flow(shift) for shift in (0.058, 0.1, 7.3)),
        *(NoiseSchedule.edm(0.0123, high, rho) for high, rho in ((1.7, 7), (157.3, 3), (80, 1e4))),
        NoiseSchedule.continuous_cosine(0.3),
    ],
    ids=str,
)
def test_named_spacings_begin_at_the_exact_end(path: Any) -> None:
    for spacing in ("uniform", "trailing", "linspace", "mixed", "logsnr", "karras"):
        for S in (1, 2, 1000):
            pairs = make_pairs(spacing, S, path)
            assert pairs[0][0] == path.noisiest
            assert make_pairs(pairs, None, path) == pairs
            if S > 1 and spacing == "uniform" and hasattr(path, "sigma_min"):
                assert pairs[-1][0] == path.sigma_min
    if path.noisiest == 1:  # A σ a rounding below 1 would have let ε be divided by 1e-15.
        call = partial(DDIM, 5, schedule=path, prediction="epsilon")
        refused(call, ValueError, "prediction must be", "α is 0")


def test_digests_tell_numbers_that_names_round_alike() -> None:
    assert NoiseSchedule.flow(1.00000001).name == NoiseSchedule.flow(1.0).name
    digests = {
        path.digest
        for shift in (1.0, 1.00000001)
        for path in (NoiseSchedule.flow(shift), NoiseSchedule.edm(rho=7 * shift))
    }
    assert len(digests) == 4


def test_a_model_is_called_with_no_other_t() -> None:
    half = NoiseSchedule.from_levels(1.0, [0.5, 1.0, 2.0])
    data = Gaussian(0.3, 0.5, half, "sample")
    assert data(X[:1], torch.tensor([1.0])).isfinite().all()
    assert data(X[:1], torch.tensor([0.5])).isnan().all()
    cosine = Gaussian(0.3, 0.5, NoiseSchedule.continuous_cosine(), "v")
    assert cosine(X, torch.tensor([1.0, 0.5, 0.0])).isfinite().all()
    assert cosine(X, torch.tensor([1.5, 2.0, -1.0])).isnan().all()


def test_levels_of_takes_tensors_of_any_dtype() -> None:
    path = NoiseSchedule.flow()
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int64):
        _, sigma = path.levels_of(torch.tensor([256, 1000], dtype=dtype))
        np.testing.assert_array_equal(sigma, [0.256, 1.0])
    for end in (NoiseSchedule.edm(0.01, 157.3), NoiseSchedule.edm(time="c_noise"), path):
        t = end.times([float(end.noisiest)])
        assert end.levels_of(t)[1] == pytest.approx(float(end.noisiest), rel=1e-6)


def test_levels_may_have_more_signal_than_the_data() -> None:
    path = NoiseSchedule.from_levels(2.0, [0.1, 1.0, 20.0])
    data = Gaussian(0.3, 0.5, path, "sample")
    x = data.flow(0.3 + 0.5 * X.double(), -1, 2).float()
    assert DDIM(3, schedule=path, prediction="sample").sample(data, x).isfinite().all()


def test_even_levels_of_log_snr_are_even() -> None:
    path = NoiseSchedule.edm()
    sigmas = np.array([t for t, _ in make_pairs("logsnr", 9, path)])
    steps = np.diff(np.log(sigmas))
    np.testing.assert_allclose(steps, steps.mean(), rtol=1e-3)


def test_a_table_of_levels_equals_the_schedule_it_is_made_of() -> None:
    linear = NoiseSchedule.linear()
    abar = linear.alphas_cumprod
    table = NoiseSchedule.from_levels(np.sqrt(abar), np.sqrt(1 - abar))
    assert table.predictions == ("epsilon", "v", "sample")
    for eta in (0.0, 0.7, 1.0):
        for order in (1, 2):
            ours = DDIM(10, eta, linear, "trailing", order=order).table
            theirs = DDIM(10, eta, table, "trailing", order=order).table
            np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("path", [*(p for p, _, _ in PATHS.values()), COSINE_TABLE])
def test_paths_are_values(path: GaussianPath) -> None:
    for same in (pickle.loads(pickle.dumps(path)), copy.deepcopy(path)):
        assert same == path
        assert hash(same) == hash(path)
        assert same.digest == path.digest
    others = [NoiseSchedule.linear(), NoiseSchedule.flow(2.0), NoiseSchedule.edm(rho=5.0)]
    assert all(path != other and path.digest != other.digest for other in others)
    ddim = DDIM(5, schedule=path, spacing="trailing", prediction="sample")
    assert pickle.loads(pickle.dumps(ddim)) == ddim
    assert not hasattr(path, "alphas_cumprod")


BAD: dict[str, tuple[Any, tuple[str, ...]]] = {
    "rising": (lambda: NoiseSchedule.from_levels(1.0, [1.0, 0.5]), ("alpha/sigma", "level 1")),
    "clean level": (lambda: NoiseSchedule.from_levels([1, 0.5], [0, 0.5]), ("sigma", "level 0")),
    "both 0": (
        lambda: NoiseSchedule.from_levels([1, 0], [0.5, 0]),
        ("sigma", "alpha 0", "level 1"),
    ),
    "negative": (lambda: NoiseSchedule.from_levels([1, -1], [0.5, 1]), ("alpha", "level 1")),
    "lengths": (lambda: NoiseSchedule.from_levels([1, 0.5], [1.0]), ("alpha", "2")),
    "t twice": (lambda: NoiseSchedule.from_levels(1.0, [1, 2], [0, 0]), ("t must differ",)),
    "shift": (lambda: NoiseSchedule.flow(0.0), ("shift", "> 0", "0")),
    "shift and tokens": (lambda: NoiseSchedule.flow(3.0, tokens=4096), ("shift", "tokens")),
    "scale": (lambda: NoiseSchedule.flow(scale=-1), ("scale", "-1")),
    "ends": (lambda: NoiseSchedule.edm(2.0, 1.0), ("sigma_min", "2", "1")),
    "time": (lambda: NoiseSchedule.edm(time="t"), ("time", "c_noise", "'t'")),
    "cosine shift": (lambda: NoiseSchedule.continuous_cosine(-2), ("shift", "-2")),
    "off the path": (lambda: NoiseSchedule.flow().levels_of(1200.0), ("t must lie on", "1200")),
    "no such t": (lambda: COSINE_TABLE.levels_of(0.5004), ("t must be one", "0.5004")),
    "sigma": (lambda: DDIM(schedule=NoiseSchedule.flow(), spacing=[1.5, 0.5]), ("spacing", "1.5")),
    "quad": (lambda: DDIM(5, schedule=NoiseSchedule.edm(), spacing="quad"), ("spacing", "quad")),
    "final": (
        lambda: DDIM(5, schedule=NoiseSchedule.edm(), final_alpha_cumprod=0.9),
        ("final_alpha_cumprod", "0.9"),
    ),
    "epsilon at 0": (
        lambda: DDIM(5, schedule=NoiseSchedule.flow()),
        ("prediction must be flow or sample", "σ = 1"),
    ),
    "v of a flow": (
        lambda: DDIM(5, schedule=NoiseSchedule.flow(), prediction="v"),
        ("prediction must be one of flow, epsilon, sample", "α² + σ² = 1"),
    ),
    "flow of EDM": (
        lambda: DDIM(5, schedule=NoiseSchedule.edm(), prediction="flow"),
        ("prediction must be one of epsilon, sample", "(1 − σ, σ)"),
    ),
    "t of clean data": (lambda: NoiseSchedule.flow().levels_of(-1000), ("t must lie on", "-1000")),
    "EDM's t": (lambda: NoiseSchedule.edm().levels_of(-1.0), ("t must lie on", "-1")),
    "cosine's t": (lambda: NoiseSchedule.continuous_cosine().levels_of(1.5), ("t must", "1.5")),
    "cosine's -t": (lambda: NoiseSchedule.continuous_cosine().levels_of(-1), ("t must", "-1")),
    "c_noise": (
        lambda: NoiseSchedule.edm(time="c_noise").levels_of(1e300),
        ("t must lie on", "1e+300"),
    ),
    "t between": (
        lambda: NoiseSchedule.from_levels(1.0, [1, 2]).levels_of(0.5),
        ("t must be one", "0.5"),
    ),
    "large t": (
        lambda: NoiseSchedule.from_levels(1.0, [1, 2], [0, 1e25]),
        ("t must lie in", "1e+25", "level 1"),
    ),
    "large real t": (
        lambda: NoiseSchedule.from_levels(1.0, [1, 2], [0.5, 1e39]),
        ("t must lie in", "1e+39", "level 1"),
    ),
    "t alike in float32": (
        lambda: NoiseSchedule.from_levels(1.0, [1, 2], [0.1, 0.1 + 1e-10]),
        ("t must differ", "float32"),
    ),
    "sigma too small": (
        lambda: NoiseSchedule.from_levels(1.0, [1e-300, 1]),
        ("sigma must be 0 or lie in", "1e-300", "level 0"),
    ),
    "alpha too large": (
        lambda: NoiseSchedule.from_levels([1e200, 1], [1, 2]),
        ("alpha must be 0 or lie in", "1e+200", "level 0"),
    ),
    "integer too large": (
        lambda: NoiseSchedule.from_levels(1.0, [1, 10**400]),
        ("sigma must be finite",),
    ),
    "large shift": (lambda: NoiseSchedule.flow(1e300), ("shift must give 1000", "1e+300")),
    "small shift": (lambda: NoiseSchedule.flow(1e-300), ("shift must give 1000", "1e-300")),
    "large cosine shift": (
        lambda: NoiseSchedule.continuous_cosine(1e300),
        ("shift must give 1000", "1e+300"),
    ),
    "small cosine shift": (
        lambda: NoiseSchedule.continuous_cosine(1e-10),
        ("shift must give 1000", "1e-10"),
    ),
    "large rho": (lambda: NoiseSchedule.edm(rho=1e300), ("sigma_min and", "rho", "1e+300")),
    "small rho": (lambda: NoiseSchedule.edm(rho=1e-3), ("sigma_min and", "rho", "0.001")),
    "large sigma_max": (
        lambda: NoiseSchedule.edm(sigma_max=1e300),
        ("sigma_max must lie in", "1e+300"),
    ),
    "resolution": (
        lambda: NoiseSchedule.flow(tokens=9, base_shift=1e300),
        ("base_shift and max_shift must give 9 tokens", "1e+300"),
    ),
    "resolution without tokens": (
        lambda: NoiseSchedule.flow(base_shift=0.6),
        ("base_shift and max_shift must be left out without tokens", "0.6"),
    ),
    "steps": (
        lambda: DDIM(10**400, schedule=NoiseSchedule.edm(), prediction="sample"),
        ("steps must be an integer in [1, 1000000]",),
    ),
    "more steps than levels": (
        lambda: make_pairs("uniform", 100_000, NoiseSchedule.flow(1e12)),
        ("steps must be fewer", "100000"),
    ),
    "tiny sigma": (
        lambda: DDIM(schedule=NoiseSchedule.edm(), prediction="sample", spacing=[1e-300, 1]),
        ("spacing[0] must be σ", "1e-300"),
    ),
    "s of a pair": (
        lambda: DDIM(schedule=NoiseSchedule.edm(), prediction="sample", spacing=[(1, -0.5)]),
        ("spacing[0][1] must be σ", "or −1 for clean data", "-0.5"),
    ),
    "array of times": (
        lambda: NoiseSchedule.edm(time=np.zeros(2)),  # type: ignore[arg-type]
        ("time must be",),
    ),
    "array of orders": (
        lambda: DDIM(5, schedule=NoiseSchedule.edm(), prediction="sample", order=torch.ones(2)),  # type: ignore[arg-type]
        ("order must be",),
    ),
    "tuned": (lambda: make_pairs([], 5, NoiseSchedule.edm()), ("spacing", "empty")),
}


@pytest.mark.parametrize("name", BAD)
def test_nonsense_names_the_level(name: str) -> None:
    call, words = BAD[name]
    refused(partial(call), ValueError, *words)


@pytest.mark.parametrize("t", ["x", None, True, 1j, {}, [[1], [1, 2]], 10**400, torch.ones(2) * 1j])
@pytest.mark.parametrize("path", [NoiseSchedule.linear(), *(p for p, _, _ in PATHS.values())])
def test_a_t_that_is_no_number_is_named(path: GaussianPath, t: Any) -> None:
    refused(partial(path.levels_of, t), TypeError, "t must hold real numbers only, got ")
