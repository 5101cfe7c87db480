"""Distances, the exact oracles, and the classifier that judges garments."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.linalg import sqrtm
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily, Normal

from fastddim import DDIM, NoiseSchedule
from fastddim.embedded import classifier
from fastddim.tools.quality import Gaussian, GaussianMixture, frechet_distance, garment_share
from fastddim.training import classifier as train_classifier
from fastddim.training import evaluate

SCHEDULES = [NoiseSchedule.linear(), NoiseSchedule.cosine(100)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def exactly_standard(n: int, d: int) -> Tensor:
    """Features whose mean is 0 and whose covariance (divisor n − 1) is the identity."""
    x = normal(n, d)
    q: Tensor = torch.linalg.qr(x - x.mean(0)).Q
    return q * math.sqrt(n - 1)


# Fréchet distance


@pytest.mark.parametrize(("n", "m", "d"), [(400, 300, 16), (200, 500, 3), (50, 60, 1)])
def test_frechet_is_the_textbook_formula(n: int, m: int, d: int) -> None:
    a = normal(n, d) @ normal(d, d, seed=1) + 0.3
    b = normal(m, d, seed=2) @ normal(d, d, seed=3) * 2
    cov_a, cov_b = (np.atleast_2d(np.cov(x.numpy(), rowvar=False)) for x in (a, b))
    root = np.real(np.asarray(sqrtm(cov_a @ cov_b)))
    expected = (a.mean(0) - b.mean(0)).square().sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(float(expected), rel=1e-9)
    read_only = a.numpy().copy()
    read_only.setflags(write=False)
    assert frechet_distance(read_only, b.tolist()) == frechet_distance(a, b)


def test_frechet_of_known_gaussians() -> None:
    x = exactly_standard(300, 5)
    s, r = numbers(1, 2, 3, 4, 5), numbers(2, 2, 1, 0, 7)
    shift = numbers(1, -2, 0, 0, 3)
    expected = float(((s - r) ** 2).sum() + shift.square().sum())
    assert frechet_distance(x * s, x * r + shift) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [200, 20, 2])
def test_frechet_of_a_set_with_itself_is_zero_whatever_its_rank(n: int) -> None:
    for seed in range(8):
        x = normal(n, 64, seed=seed)
        assert 0 <= frechet_distance(x, x.flip(0)) < 1e-11


def test_frechet_depends_on_neither_origin_nor_axes() -> None:
    a, b = normal(100, 8), normal(90, 8, seed=1) * 1.5
    turn = torch.linalg.qr(normal(8, 8, seed=2)).Q
    moved = frechet_distance(a @ turn + 1e4, b @ turn + 1e4)
    assert moved == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_frechet_computes_float32_features_in_float64() -> None:
    a, b = normal(100, 8, dtype=torch.float32) + 1e3, normal(90, 8, seed=1).float() + 1e3
    assert frechet_distance(a, b) == frechet_distance(a.double(), b.double())
    assert frechet_distance(a.requires_grad_(), b) > 0


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        (normal(5), normal(5, 3), r"a must be \(N, D\) with N ≥ 2, got \(5,\)"),
        (normal(5, 3), normal(1, 3), r"b must be \(N, D\) with N ≥ 2, got \(1, 3\)"),
        (normal(5, 0), normal(5, 0), r"a must be \(N, D\)"),
        (normal(5, 3, 2), normal(5, 3), r"a must be \(N, D\)"),
        (normal(5, 3), normal(5, 4), "same number of features, got 3 and 4"),
        (normal(5, 3).log(), normal(5, 3), "a must be finite"),
        (normal(5, 3), normal(5, 3) / 0, "b must be finite"),
    ],
)
def test_frechet_refuses(a: Tensor, b: Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        frechet_distance(a, b)


# Exact oracles


def eps_by_autograd(
    density: Callable[[float, float], Distribution], x: Tensor, abar: float
) -> Tensor:
    """−√(1−ᾱ)·∇ ln p(x), from torch's own densities: ``density(√ᾱ, 1−ᾱ)`` is that of x_t."""
    x = x.detach().requires_grad_()
    log_p = density(math.sqrt(abar), 1 - abar).log_prob(x).sum()
    score: Tensor = torch.autograd.grad(log_p, x)[0]
    return -math.sqrt(1 - abar) * score


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("per_element", [False, True])
def test_gaussian_eps_is_the_score(
    schedule: NoiseSchedule, dtype: torch.dtype, rtol: float, per_element: bool
) -> None:
    m = normal(2, 3, seed=1) if per_element else numbers(0.3)
    s = normal(2, 3, seed=2).abs() if per_element else numbers(0.7)
    model = Gaussian(m, s, schedule) if per_element else Gaussian(0.3, 0.7, schedule)
    last = len(schedule) - 1
    t = torch.tensor([0, 1, last // 2, last])
    x = normal(4, 2, 3).to(dtype)
    eps = model(x, t)
    assert eps.dtype == dtype
    assert eps.shape == x.shape
    for i in range(4):
        expected = eps_by_autograd(
            lambda a, v: Normal(a * m.expand(2, 3), (a**2 * s.expand(2, 3) ** 2 + v).sqrt()),
            x[i].double(),
            float(schedule.alphas_cumprod[t[i]]),
        )
        torch.testing.assert_close(eps[i].double(), expected, rtol=rtol, atol=rtol)
        torch.testing.assert_close(model(x, t[i])[i], eps[i], rtol=0, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
@pytest.mark.parametrize("shape", [(6,), (1, 2, 3)])
def test_mixture_eps_is_the_score(
    schedule: NoiseSchedule, dtype: torch.dtype, rtol: float, shape: tuple[int, ...]
) -> None:
    mu, s = normal(3, *shape, seed=1), numbers(0.1, 0.5, 1.0)
    w = numbers(0.5, 0.2, 0.3)
    model = GaussianMixture(mu, s, w * 7, schedule)
    last = len(schedule) - 1
    t = torch.tensor([0, 1, last // 2, last])
    x = normal(4, *shape).to(dtype)
    eps = model(x, t)
    assert eps.dtype == dtype
    assert eps.shape == x.shape

    def density(a: float, v: float) -> Distribution:
        deviation = (a**2 * s**2 + v).sqrt().view(3, 1).expand(3, 6)
        components = Independent(Normal(a * mu.flatten(1), deviation), 1)
        return MixtureSameFamily(Categorical(w), components)

    for i in range(4):
        expected = eps_by_autograd(
            density, x[i].double().flatten(), float(schedule.alphas_cumprod[t[i]])
        )
        torch.testing.assert_close(eps[i].double().flatten(), expected, rtol=rtol, atol=rtol)
        torch.testing.assert_close(model(x, t[i])[i], eps[i], rtol=0, atol=0)


def test_mixture_of_one_is_the_gaussian() -> None:
    x, t = normal(5, 4), torch.tensor([0, 10, 400, 800, 999])
    mixture = GaussianMixture(normal(1, 4, seed=1), 0.4)
    torch.testing.assert_close(mixture(x, t), Gaussian(normal(4, seed=1), 0.4)(x, t))


def test_mixture_ignores_a_component_of_weight_zero() -> None:
    x, t, mu = normal(5, 4), torch.arange(0, 1000, 200), normal(2, 4, seed=1)
    with_zero = GaussianMixture(torch.cat([mu, x[:1]]), 0.4, [1, 1, 0])
    torch.testing.assert_close(with_zero(x, t), GaussianMixture(mu, 0.4)(x, t))


def test_mixture_far_from_its_data_points_home() -> None:
    mu = normal(3, 4, seed=1)
    x = mu[1:2].float() + 1e4 * torch.tensor([1.0, -1, 1, -1])
    eps = GaussianMixture(mu, 0.01)(x, torch.tensor([0]))
    assert eps.isfinite().all()
    assert (eps.sign() == torch.tensor([1, -1, 1, -1])).all()


@pytest.mark.parametrize("oracle", [Gaussian(0.1, 0.2), GaussianMixture(normal(2, 3), 0.1)])
@pytest.mark.parametrize("level", [-1, 1000, 0.5, float("nan")])
def test_oracles_answer_nan_where_t_is_no_timestep(oracle: Any, level: float) -> None:
    eps = oracle(normal(2, 3), torch.tensor([level, 7]))
    assert eps[0].isnan().all()
    assert eps[1].isfinite().all()


def test_oracles_take_t_of_any_dtype_and_empty_batches() -> None:
    for oracle in (Gaussian(0.1, 0.2), GaussianMixture(normal(2, 3), 0.1)):
        x, t = normal(3, 3), torch.tensor([0, 500, 999])
        assert torch.equal(oracle(x, t.float()), oracle(x, t))
        assert torch.equal(oracle(x, t.int()), oracle(x, t))
        assert oracle(x[:0], t[:0]).shape == (0, 3)
    x = normal(4)
    mixture = GaussianMixture(normal(1, 1), 0.4)
    torch.testing.assert_close(mixture(x, t[0]), Gaussian(mixture.means[0], 0.4)(x, t[0]))


def test_flow_is_the_formula_and_goes_both_ways() -> None:
    schedule = NoiseSchedule.linear()
    abar = float(schedule.alphas_cumprod[-1])
    oracle, x_T = Gaussian(0.3, 0.5, schedule), normal(7, 2, 3)
    expected = 0.3 + 0.5 * (x_T - abar**0.5 * 0.3) / (abar * 0.25 + 1 - abar) ** 0.5
    x0 = oracle.flow(x_T, 999)
    torch.testing.assert_close(x0, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(oracle.flow(x0, -1, 999), x_T, rtol=1e-12, atol=1e-12)
    halfway = oracle.flow(oracle.flow(x_T, 999, 400), 400)
    torch.testing.assert_close(halfway, x0, rtol=1e-12, atol=1e-12)
    assert oracle.flow(x_T.float(), 999).dtype == torch.float32


@pytest.mark.parametrize("t", [1, 100, 500, 998])
def test_flow_solves_the_ode_of_its_own_eps(t: int) -> None:
    """dx̄/dσ = ε with x̄ = x/√ᾱ and σ = √((1−ᾱ)/ᾱ), by a central difference."""
    oracle, x = Gaussian(0.3, normal(5, seed=1).abs()), normal(4, 5)
    abar = NoiseSchedule.linear().alphas_cumprod[[t - 1, t + 1]]
    before, after = (
        oracle.flow(x, t, s) / a**0.5 for s, a in zip((t - 1, t + 1), abar, strict=True)
    )
    sigma = np.sqrt((1 - abar) / abar)
    slope = (after - before) / (sigma[1] - sigma[0])
    # The levels are not evenly spaced in σ; what is left is of second order in their distance.
    torch.testing.assert_close(slope, oracle(x, torch.tensor(t)), rtol=0.03, atol=0.03)


def test_ddim_converges_to_the_flow_with_order_one() -> None:
    oracle = Gaussian(0.3, 0.5)
    x_T = normal(64, 4, dtype=torch.float32)
    errors = []
    for steps in (50, 100, 200):
        ddim = DDIM(steps=steps)
        exact = oracle.flow(x_T, ddim.pairs[0][0])
        errors.append(float((ddim.sample(oracle, x_T) - exact).abs().max()))
    assert errors[0] < 0.15
    assert 1.8 < errors[0] / errors[1] < 2.2
    assert 1.8 < errors[1] / errors[2] < 2.2


def test_mixture_sample_has_the_mixture_moments() -> None:
    mu, s, w = torch.tensor([[-2.0, 0], [3, 1]]), torch.tensor([0.5, 0.2]), [0.25, 0.75]
    oracle = GaussianMixture(mu, s, w)
    x = oracle.sample(20_000, torch.Generator().manual_seed(0))
    assert x.dtype == torch.float32
    assert x.shape == (20_000, 2)
    low = x[:, 0] < 0.5
    assert float(low.double().mean()) == pytest.approx(0.25, abs=0.015)
    for part, m, deviation in ((x[low], mu[0], 0.5), (x[~low], mu[1], 0.2)):
        torch.testing.assert_close(part.mean(0), m, rtol=0, atol=0.03)
        torch.testing.assert_close(part.std(0), torch.full((2,), deviation), rtol=0.05, atol=0)


def test_mixture_sample_repeats_and_keeps_the_shape_of_a_mean() -> None:
    oracle = GaussianMixture(normal(3, 1, 4, 4), 0.0)
    first, again = (
        oracle.sample(8, torch.Generator().manual_seed(3), torch.float64) for _ in range(2)
    )
    assert first.shape == (8, 1, 4, 4)
    assert torch.equal(first, again)
    assert all((x == oracle.means).flatten(1).all(1).any() for x in first)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Gaussian(float("nan"), 1.0), "mean must be finite"),
        (lambda: Gaussian(0.0, -1.0), "std must be ≥ 0, got -1"),
        (lambda: GaussianMixture(normal(3), 1.0), r"means must have shape \(K, ...\)"),
        (lambda: GaussianMixture(normal(0, 3), 1.0), r"means must have shape \(K, ...\)"),
        (lambda: GaussianMixture(normal(3, 2), [1.0, 2.0]), r"stds must be a number or \(3,\)"),
        (lambda: GaussianMixture(normal(3, 2), -1.0), "stds must be ≥ 0"),
        (lambda: GaussianMixture(normal(3, 2), 1.0, [1.0]), r"weights must be \(3,\)"),
        (lambda: GaussianMixture(normal(3, 2), 1.0, [0.0, 0, 0]), "not all 0"),
        (lambda: GaussianMixture(normal(3, 2), 1.0, [1.0, -1, 1]), "weights must be ≥ 0"),
        (lambda: GaussianMixture(normal(3, 2), 1.0).sample(0), "n must be an integer ≥ 1"),
        (lambda: Gaussian(0.0, 1.0).flow(normal(2, 3), 1000), "t must be an integer in"),
        (lambda: Gaussian(0.0, 1.0).flow(normal(2, 3), 9, -2), "s must be an integer in"),
        (lambda: Gaussian(0.0, 1.0)(torch.ones(2, 3).int(), torch.tensor(3)), "x must be floating"),
        (lambda: GaussianMixture([[0.0]], 1.0)(normal(), torch.tensor(3)), "x must be floating"),
        (lambda: Gaussian(0.0, 1.0)(normal(4, 3), torch.zeros(3)), r"t must have shape \(\) or"),
        (
            lambda: GaussianMixture(normal(3, 2), 1.0)(normal(4, 3), torch.zeros(4)),
            "x must have 2 elements a sample",
        ),
    ],
)
def test_oracles_refuse(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


# The classifier


def test_garment_share_counts_what_exceeds_the_confidence() -> None:
    p = numbers(0.95, 0.05, 0.5, 0.5, 0.08, 0.92, 0.89, 0.11).view(4, 2)
    assert garment_share(p.log()) == 0.5
    assert garment_share(p.log() + 3, confidence=0.8) == 0.75
    assert garment_share(p.log(), confidence=0.93) == 0.25
    assert garment_share(torch.full((2, 3), torch.nan)) == 0


@pytest.mark.parametrize(
    ("logits", "confidence", "says"),
    [
        (normal(3), 0.9, r"logits must have shape \(N, classes\), got \(3,\)"),
        (normal(0, 3), 0.9, r"got \(0, 3\)"),
        (normal(3, 3), 1.0, r"confidence must lie in \[0, 1\), got 1"),
        (normal(3, 3), float("nan"), "confidence must be finite"),
    ],
)
def test_garment_share_refuses(logits: Tensor, confidence: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        garment_share(logits, confidence)


def drawing(*boxes: tuple[int, int, int, int]) -> Tensor:
    """Bright rectangles (top, bottom, left, right) on black."""
    x = torch.full((1, 1, 28, 28), -1.0)
    for top, bottom, left, right in boxes:
        x[..., top:bottom, left:right] = 0.6
    return x


DRAWINGS = {
    "trouser": drawing((0, 28, 8, 13), (0, 28, 15, 20), (0, 8, 8, 20)),
    "T-shirt/top": drawing((1, 27, 8, 20), (1, 9, 2, 26)),
    "bag": drawing((10, 26, 2, 26), (3, 10, 9, 11), (3, 10, 17, 19), (3, 5, 9, 19)),
    "ankle boot": drawing((18, 26, 1, 27), (2, 18, 16, 27)),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_classifier_knows_a_garment_drawn_with_rectangles(name: str) -> None:
    p = classifier.load()(DRAWINGS[name]).softmax(1)[0]
    assert p.sum() == pytest.approx(1, abs=1e-6)
    assert classifier.CLASSES[int(p.argmax())] == name
    assert p.max() > 0.8


def test_classifier_is_small_frozen_float32_and_well_trained() -> None:
    model = classifier.load()
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == 76_330
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())
    assert classifier.WEIGHTS.stat().st_size < 300_000
    with safe_open(classifier.WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    assert float(metadata["accuracy"]) >= 0.905
    assert abs(float(metadata["mean_confidence"]) - float(metadata["accuracy"])) < 0.02


def test_classifier_repeats_and_judges_each_picture_alone() -> None:
    x = normal(6, 1, 28, 28, dtype=torch.float32)
    model = classifier.load()
    features = model.features(x)
    assert features.shape == (6, 64)
    assert (features >= 0).all()
    assert torch.equal(features, classifier.load().features(x))
    torch.testing.assert_close(model.features(x[2:3]), features[2:3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x), model.head(features), rtol=0, atol=0)
    assert model(x).shape == (6, len(classifier.CLASSES))


def test_classifier_loads_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was asked for")

    monkeypatch.setattr(socket, "socket", refuse)
    assert classifier.load(str(classifier.WEIGHTS))(DRAWINGS["bag"]).isfinite().all()


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 3, 28, 28), (1, 28, 28), (28, 28)])
def test_classifier_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x must have shape \(N, 1, 28, 28\)"):
        classifier.load()(torch.zeros(shape))


def test_classifier_refuses_files_that_are_not_its_own(tmp_path: Path) -> None:
    path, state = tmp_path / "weights.safetensors", load_file(classifier.WEIGHTS)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        classifier.load(path)
    name = "head.bias"
    for bad in (
        {k: v for k, v in state.items() if k != name},
        state | {"more": torch.zeros(1)},
        state | {name: torch.zeros(3)},
        state | {name: torch.zeros(10, dtype=torch.int32)},
    ):
        save_file(bad, path)
        with pytest.raises(ValueError, match="is no file of classifier weights"):
            classifier.load(path)
    path.write_bytes(classifier.WEIGHTS.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is no file of classifier weights"):
        classifier.load(path)
    save_file({k: v.float() for k, v in state.items()}, path)
    assert torch.equal(classifier.load(path).head.bias, classifier.load().head.bias)


def test_classifier_training_learns_folds_and_saves(tmp_path: Path) -> None:
    """A bright bar in one of ten rows is its class: learned only if the folded network works."""
    y = torch.arange(320) % 10
    x = 0.3 * normal(320, 1, 28, 28, dtype=torch.float32) - 0.5
    x[torch.arange(320), 0, 4 + 2 * y] += 1.5
    model = train_classifier.train(x, y, epochs=3, seed=0, batch=32).eval()
    assert (model(x).argmax(1) == y).double().mean() > 0.9
    path = tmp_path / "weights.safetensors"
    train_classifier.save(model, path, {"seed": "0"})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert torch.equal(classifier.load(path)(x), model.half().float()(x))


def test_evaluation_draws_full_batches_of_eight_bit_pictures() -> None:
    shapes = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return 0.5 * x

    ddim = DDIM(steps=2)
    drawn = evaluate.draw(ddim, model, count=5, batch=2)
    assert set(shapes) == {(2, 1, 28, 28)}
    whole = ddim.sample(model, shape=(5, 1, 28, 28), seeds=range(5))
    assert drawn.shape == whole.shape
    levels = (drawn.double() + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert (drawn - whole.clamp(-1, 1)).abs().max() <= 0.5 / 127.5 + 1e-6
    assert len(drawn.unique()) > 100
