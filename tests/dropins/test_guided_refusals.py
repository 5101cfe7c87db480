"""The functions for guided-diffusion: arguments that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastddim.dropins import guided
from tests.dropins.guided_original import LINEAR, Original, linear, start, toy
from tests.refusals import refused

X, T = start(2, 3, 4, 4), torch.tensor([3, 0])


@pytest.mark.parametrize(
    ("error", "name", "changed"),
    [
        (TypeError, "diffusion", {"diffusion": toy}),
        (
            ValueError,
            "diffusion.model_mean_type",
            {"diffusion": Original(linear(), mean="PREVIOUS_X")},
        ),
        (ValueError, "diffusion.alphas_cumprod", {"diffusion": Original(linear(20))}),
        (TypeError, "model", {"model": None}),
        (TypeError, "model", {"model": lambda x, t: (x, t)}),
        (ValueError, "model", {"model": lambda x, t: torch.cat([x, x], 1)}),
        (TypeError, "model", {"model": lambda x, t: x.double()}),
        (TypeError, "denoised_fn", {"denoised_fn": 1.0}),
        (TypeError, "denoised_fn", {"denoised_fn": lambda x0: None}),
        (ValueError, "denoised_fn", {"denoised_fn": lambda x0: x0[:1]}),
        (TypeError, "cond_fn", {"cond_fn": "classifier"}),
        (TypeError, "cond_fn", {"cond_fn": lambda x, t: None}),
        (ValueError, "cond_fn", {"cond_fn": lambda x, t: x.mean()}),
        (ValueError, "eta", {"eta": -0.1}),
        (ValueError, "eta", {"eta": float("nan")}),
        (TypeError, "eta", {"eta": "hat"}),
    ],
)
def test_bad_arguments_are_refused_by_steps_and_loops(
    error: type[Exception], name: str, changed: dict[str, Any]
) -> None:
    given: dict[str, Any] = {"diffusion": LINEAR, "model": toy} | changed
    refused(lambda: guided.ddim_sample(**given, x=X, t=T), error, name)
    refused(lambda: guided.ddim_sample_loop(**given, shape=X.shape, noise=X), error, name)
    if "cond_fn" not in given:
        refused(lambda: guided.ddim_reverse_sample(**given, x=X, t=T), error, name)


@pytest.mark.parametrize(
    ("error", "name", "changed"),
    [
        (TypeError, "x", {"x": [1.0]}),
        (ValueError, "x", {"x": X[0, 0, 0]}),
        (TypeError, "x", {"x": X.double()}),
        (ValueError, "x", {"x": X.clone().requires_grad_()}),
        (TypeError, "t", {"t": 3}),
        (TypeError, "t", {"t": T.float()}),
        (TypeError, "t", {"t": T[:1]}),
        (ValueError, "t", {"t": T.to("meta")}),
        (ValueError, "t", {"t": T - 1}),
        (ValueError, "t", {"t": T + 47}),
    ],
)
def test_bad_states_are_refused(error: type[Exception], name: str, changed: dict[str, Any]) -> None:
    given: dict[str, Any] = {"x": X, "t": T} | changed
    refused(lambda: guided.ddim_sample(LINEAR, toy, **given), error, name)
    refused(lambda: guided.ddim_reverse_sample(LINEAR, toy, **given), error, name)


@pytest.mark.parametrize(
    ("error", "name", "changed"),
    [
        (TypeError, "shape", {"shape": 3}),
        (TypeError, "shape", {"shape": torch.ones(4)}),
        (TypeError, "shape", {"shape": (2,)}),
        (ValueError, "shape[2]", {"shape": (2, 3, -4, 4)}),
        (TypeError, "shape[0]", {"shape": (2.0, 3, 4, 4)}),
        (ValueError, "noise", {"shape": (3, 3, 4, 4)}),
        (TypeError, "noise", {"noise": 0}),
        (TypeError, "noise", {"noise": X.long()}),
        (ValueError, "noise", {"noise": X.clone().requires_grad_()}),
        (ValueError, "noise", {"device": "meta"}),
        (ValueError, "device", {"device": "nonsense"}),
        (ValueError, "device", {"device": "nonsense", "noise": None}),
        (TypeError, "model_kwargs", {"model_kwargs": [1]}),
        (TypeError, "clip_denoised", {"clip_denoised": "yes"}),
    ],
)
def test_bad_arguments_are_refused_by_loops_at_the_call(
    error: type[Exception], name: str, changed: dict[str, Any]
) -> None:
    given: dict[str, Any] = {"shape": X.shape, "noise": X} | changed
    refused(lambda: guided.ddim_sample_loop_progressive(LINEAR, toy, **given), error, name)


def test_a_sample_put_in_is_checked() -> None:
    loop = guided.ddim_sample_loop_progressive(LINEAR, toy, X.shape, X)
    next(loop)["sample"] = X.double()
    refused(lambda: next(loop), TypeError, "sample")


@pytest.mark.parametrize(
    ("error", "name", "changed"),
    [
        (ValueError, "diffusion_steps", {"diffusion_steps": 20}),
        (ValueError, "diffusion_steps", {"diffusion_steps": 0, "noise_schedule": "cosine"}),
        (TypeError, "diffusion_steps", {"diffusion_steps": 1e3}),
        (ValueError, "noise_schedule", {"noise_schedule": "quad"}),
        (ValueError, "noise_schedule", {"noise_schedule": None}),
        (ValueError, "timestep_respacing", {"timestep_respacing": "ddim"}),
        (ValueError, "timestep_respacing", {"timestep_respacing": "ddim-5"}),
        (ValueError, "timestep_respacing", {"timestep_respacing": "ddim1001"}),
        (ValueError, "timestep_respacing", {"timestep_respacing": "ddim1"}),
        (ValueError, "timestep_respacing", {"timestep_respacing": "10,,20"}),
        (ValueError, "timestep_respacing", {"timestep_respacing": "fast27"}),
        (ValueError, "timestep_respacing", {"timestep_respacing": "-1,20"}),
        (ValueError, "timestep_respacing", {"timestep_respacing": "0,0"}),
        (ValueError, "timestep_respacing", {"timestep_respacing": [2.5]}),
        (ValueError, "timestep_respacing", {"timestep_respacing": "334,334,334"}),
        (TypeError, "timestep_respacing", {"timestep_respacing": 50}),
        (TypeError, "learn_sigma", {"learn_sigma": "yes"}),
        (TypeError, "predict_xstart", {"predict_xstart": None}),
        (TypeError, "sigma_small", {"sigma_small": 2}),
        (TypeError, "rescale_timesteps", {"rescale_timesteps": X}),
    ],
)
def test_a_diffusion_that_cannot_be_is_refused(
    error: type[Exception], name: str, changed: dict[str, Any]
) -> None:
    refused(lambda: guided.Diffusion(**changed), error, name)


def test_eta_is_refused_towards_noise() -> None:
    refused(
        lambda: guided.ddim_reverse_sample(LINEAR, toy, X, T, eta=0.5), ValueError, "eta", "0.5"
    )
