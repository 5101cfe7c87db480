"""Every table holds the reciprocals of its own float32 factors.

Only the compiled kernel reads them, so no result on a CPU shows a wrong one.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastddim import DDIM, NoiseSchedule, make_pairs, make_table
from fastddim.coefficients import COLUMNS, pack
from fastddim.dropins import _shared, compvis, ermongroup, guided
from fastddim.dropins._shared import pack_rows
from fastddim.levels import Levels

T = 1000
LINEAR = NoiseSchedule.linear()
BETAS = torch.linspace(1e-4, 0.02, T)
X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
DIFFUSERS = (
    "FastDDIMScheduler",
    "FastDDIMParallelScheduler",
    "FastDDIMInverseScheduler",
)


def assert_reciprocal(table: Any, *, nan_rows: int = 0) -> None:
    """Column 1 is fl(1/column 0), column 3 fl(1/column 2), bit for bit; inf where those are 0."""
    table = np.asarray(table)
    assert table.dtype == np.float32
    assert table.ndim == 2
    assert table.shape[1] == len(COLUMNS)
    assert np.isnan(table[len(table) - nan_rows :]).all()
    table = table[: len(table) - nan_rows]
    assert len(table)
    for factor, reciprocal in ((0, 1), (2, 3)):
        with np.errstate(divide="ignore", over="ignore"):
            exact = np.float32(1) / table[:, factor]
        assert exact.dtype == np.float32
        assert exact.tobytes() == np.ascontiguousarray(table[:, reciprocal]).tobytes()


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Collects the tables of all steps that drop-ins take, each of which holds reciprocals."""
    tables: list[Tensor] = []
    own = _shared.Buffers.stepped

    def noted(self: Any, table: Tensor, *given: Any, **named: Any) -> Any:
        unchosen = bool(table[-1].isnan().all())  # the row of timesteps that strict does not know
        assert_reciprocal(table, nan_rows=int(unchosen))
        tables.append(table)
        return own(self, table, *given, **named)

    monkeypatch.setattr(_shared.Buffers, "stepped", noted)
    return tables


def model(x: Tensor, t: Tensor, *_: Any, **__: Any) -> Tensor:
    return 0.5 * x


def test_a_product_in_the_reciprocals_place_is_seen() -> None:
    table = make_table(LINEAR, make_pairs("leading", 10, T))
    assert_reciprocal(table)
    for factor, reciprocal in ((0, 1), (2, 3)):
        wrong = table.copy()
        wrong[:, reciprocal] = 1 * wrong[:, factor]
        with pytest.raises(AssertionError):
            assert_reciprocal(wrong)
        wrong = table.copy()
        wrong[3, reciprocal] = np.nextafter(wrong[3, reciprocal], np.float32(0))
        with pytest.raises(AssertionError):
            assert_reciprocal(wrong)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("eta", [0.0, 0.7, "hat"])
def test_native_tables(spacing: Any, eta: Any) -> None:
    zero_snr = NoiseSchedule.from_alphas_cumprod([*LINEAR.alphas_cumprod[:-1], 0.0])
    for schedule in (LINEAR, NoiseSchedule.cosine(), zero_snr):
        assert_reciprocal(make_table(schedule, make_pairs(spacing, 50, T), eta))
    assert_reciprocal(DDIM(50, eta=eta, spacing=spacing).table)
    upwards = [(s, t) for t, s in make_pairs(spacing, 50, T)][::-1]
    assert_reciprocal(make_table(zero_snr, upwards))
    abar = np.linspace(0, 1, 1001)
    assert_reciprocal(
        pack(Levels.of_abar(abar), np.sqrt(abar[::-1]), np.zeros(1001), np.ones(1001))
    )


@given(
    st.lists(st.floats(0, 2, width=32), min_size=1, max_size=20),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_rows_are_packed_with_reciprocals_of_what_float32_holds(
    values: list[float], dtype: torch.dtype
) -> None:
    column = torch.tensor(values, dtype=dtype) * (1 if dtype == torch.float32 else 1.1)
    zero = torch.zeros_like(column)
    assert_reciprocal(pack_rows(column, column.flip(0), zero, zero, zero))


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_tables_of_ermongroup(stepped: list[Tensor], eta: float) -> None:
    seq = range(0, T, 20)
    ermongroup.generalized_steps(X[..., None], seq, model, BETAS, eta=eta)
    ermongroup.ddpm_steps(X[..., None], seq, model, BETAS)
    assert len({id(table) for table in stepped}) == 3


@pytest.mark.parametrize("eta", [0.0, 0.7, None])
@pytest.mark.parametrize("clipped", [False, True])
def test_tables_of_guided(stepped: list[Tensor], eta: float | None, clipped: bool) -> None:
    diffusion = guided.Diffusion(timestep_respacing="ddim25")
    t = torch.tensor([3, 20])
    given: dict[str, Any] = {"clip_denoised": clipped, "denoised_fn": lambda x0: x0}
    if eta is None:
        guided.ddim_reverse_sample(diffusion, model, X, t, **given)
        assert len(stepped) == 2
    else:
        guided.ddim_sample(diffusion, model, X, t, cond_fn=model, eta=eta, **given)
        assert len(stepped) == 3


@pytest.mark.parametrize("parameterization", ["eps", "v"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_tables_of_compvis(stepped: list[Tensor], parameterization: str, eta: float) -> None:
    abar = (1 - BETAS).cumprod(0)
    sampler = compvis.DDIMSampler(
        SimpleNamespace(
            num_timesteps=T,
            alphas_cumprod=abar,
            sqrt_alphas_cumprod=abar.sqrt(),
            sqrt_one_minus_alphas_cumprod=(1 - abar).sqrt(),
            parameterization=parameterization,
            apply_model=model,
            first_stage_model=SimpleNamespace(quantize=lambda x0: (x0, None)),
        )
    )
    for quantized in (False, True):
        sampler.sample(20, 2, X.shape[1:], eta=eta, verbose=False, quantize_x0=quantized, x_T=X)
    for original in (False, True):
        sampler.stochastic_encode(X, torch.tensor([3, 7]), use_original_steps=original)
    assert len({id(table) for table in stepped}) == 5


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("which", DIFFUSERS)
def test_tables_of_diffusers(
    stepped: list[Tensor], which: str, prediction: str, strict: bool
) -> None:
    module: Any = pytest.importorskip("fastddim.dropins.diffusers", exc_type=ImportError)
    for config in ({}, {"rescale_betas_zero_snr": True}, {"beta_schedule": "squaredcos_cap_v2"}):
        make: Any = getattr(module, which)
        scheduler = make(prediction_type=prediction, strict=strict, **config)
        scheduler.set_timesteps(20)
        t = scheduler.timesteps[3]
        scheduler.step(X, t, X)
        if which != "FastDDIMInverseScheduler":
            scheduler.step(X, t, X, eta=0.7)
        if which == "FastDDIMParallelScheduler":
            scheduler.batch_step_no_noise(X, scheduler.timesteps[3:5], X)
    turned = which == "FastDDIMInverseScheduler" and strict and prediction != "epsilon"
    assert len({id(table) for table in stepped}) >= (6 if turned else 3)
