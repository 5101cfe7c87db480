"""CompVis' samplers, and their loop in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddim.dropins.compvis import DDIMSampler, PLMSSampler
from fastddim.step import reference
from tests.diffusion import Model

C, UC = torch.arange(2.0), -torch.ones(2)


def made(S: int, **given: Any) -> DDIMSampler:
    sampler = DDIMSampler(given.pop("model", None) or Model(given.pop("parameterization", "eps")))
    sampler.make_schedule(S, **given)
    return sampler


def eager(
    sampler: DDIMSampler,
    x: Tensor,
    c: Any,
    scale: float = 1.0,
    uc: Any = None,
    temperature: float = 1.0,
    dropout: float = 0.0,
    quantize: bool = False,
    corrector: Any = None,
    repeat: bool = False,
    scales: list[float] | None = None,
    threshold: float | None = None,
    rescale: float = 0.0,
    separate: bool = False,
    skipped: int = 0,
    **more: Any,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(xs, x0s, the generator's state) of the original's operations on the sampler's own table.

    The arguments from ``scales`` on are those of the descendants: w of each step; the root mean
    square above which x0 is scaled down; φ of the rescaled guidance; whether guidance calls the
    model twice; the number of the noisiest steps to leave out; further arguments of the model.
    """
    model = sampler.model
    states: list[Tensor] = []
    x0s: list[Tensor] = []
    prediction = {"eps": "epsilon", "v": "v"}[model.parameterization]
    count = len(sampler.ddim_timesteps) - skipped
    for index in reversed(range(count)):
        t = torch.full((len(x),), int(sampler.ddim_timesteps[index]))
        row = sampler._made().table[index]
        if scales is not None:
            scale = scales[count - 1 - index]
        if uc is None or scale == 1:
            out = model.apply_model(x, t, c, **more)
        else:
            if separate:
                out = model.apply_model(x, t, c, **more)
                u = model.apply_model(x, t, uc, **more)
            else:
                u, out = model.apply_model(
                    torch.cat([x, x]), torch.cat([t, t]), torch.cat([uc, c]), **more
                ).chunk(2)
            given = out
            out = u + scale * (out - u)
            if rescale > 0:
                dims = tuple(range(1, x.dim()))
                spread, own = given.std(dims, keepdim=True), out.std(dims, keepdim=True)
                out = rescale * (out * (spread / own)) + (1 - rescale) * out
        if corrector is not None:
            out = corrector.modify_score(model, out, x, t, c, strength=0.5)
        x = (
            x.float()
        )  # the original's factors are float32 tensors of x's rank, so its products are float32
        _, x0 = reference.ddim_step(x, out, row, None, prediction)
        eps = row[0] * out + row[2] * x if prediction == "v" else out
        if getattr(model, "use_dynamic_rescale", False):
            levels = [int(sampler.ddim_timesteps[max(i, 0)]) for i in (index - 1, index)]
            after, before = (torch.full((1,), float(model.scale_arr[t])) for t in levels)
            x0 = x0 * (after / before)
        if quantize:
            x0 = model.first_stage_model.quantize(x0)[0]
        if threshold is not None:
            root = torch.stack([torch.sqrt(torch.mean(one * one)) for one in x0.flatten(1)])
            root = root.clamp(min=threshold)
            x0 = x0 * (threshold / root).reshape(-1, *[1] * (x.dim() - 1))
        z = torch.randn((1, *x.shape[1:])).repeat(len(x), 1, 1, 1) if repeat else None
        noise = row[5] * (torch.randn(x.shape) if z is None else z) * temperature
        if dropout > 0:
            noise = torch.nn.functional.dropout(noise, dropout)
        x = row[4] * x0 + row[6] * eps + noise
        states.append(x)
        x0s.append(x0)
    return states, x0s, torch.get_rng_state()


def eager_plms(
    sampler: PLMSSampler,
    x: Tensor,
    c: Any,
    scale: float = 1.0,
    uc: Any = None,
    dropout: float = 0.0,
    quantize: bool = False,
    corrector: Any = None,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(xs, x0s, the generator's state) of PLMS' operations on the sampler's own table."""
    model, steps = sampler.model, sampler.ddim_timesteps
    states: list[Tensor] = []
    x0s: list[Tensor] = []
    old: list[Tensor] = []

    def predicted(x: Tensor, level: int) -> Tensor:
        t = torch.full((len(x),), level)
        if uc is None or scale == 1:
            out = model.apply_model(x, t, c)
        else:
            u, out = model.apply_model(
                torch.cat([x, x]), torch.cat([t, t]), torch.cat([uc, c])
            ).chunk(2)
            out = u + scale * (out - u)
        if corrector is not None:
            out = corrector.modify_score(model, out, x, t, c, strength=0.5)
        found: Tensor = out
        return found

    def moved(x: Tensor, eps: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        _, x0 = reference.ddim_step(x.float(), eps, row)
        if quantize:
            x0 = model.first_stage_model.quantize(x0)[0]
        noise = 0 * torch.randn(x.shape)
        if dropout > 0:
            noise = torch.nn.functional.dropout(noise, dropout)
        return row[4] * x0 + row[6] * eps + noise, x0

    for index in reversed(range(len(steps))):
        row = sampler._made().table[index]
        e = predicted(x, int(steps[index]))
        if not old:
            ahead = predicted(moved(x, e, row)[0], int(steps[max(index - 1, 0)]))
            combined = (e + ahead) / 2
        elif len(old) == 1:
            combined = (3 * e - old[-1]) / 2
        elif len(old) == 2:
            combined = (23 * e - 16 * old[-1] + 5 * old[-2]) / 12
        else:
            combined = (55 * e - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
        x, x0 = moved(x, combined, row)
        old = [*old[-2:], e]
        states.append(x)
        x0s.append(x0)
    return states, x0s, torch.get_rng_state()


class Corrector:
    def modify_score(
        self, model: Any, e_t: Tensor, x: Tensor, t: Tensor, c: Tensor, strength: float
    ) -> Tensor:
        assert isinstance(model, Model)
        shift = (t + c).view(-1, 1, 1, 1) / 1000
        return e_t - strength * 1e-2 * x * shift


BETWEEN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": 0.8}, {"temperature": 0.8}),
    ({"noise_dropout": 0.3}, {"dropout": 0.3}),
    ({"quantize_denoised": True}, {"quantize": True}),
    (
        {"score_corrector": Corrector(), "corrector_kwargs": {"strength": 0.5}},
        {"corrector": Corrector()},
    ),
    (
        {"temperature": 1.3, "noise_dropout": 0.1, "quantize_denoised": True},
        {"temperature": 1.3, "dropout": 0.1, "quantize": True},
    ),
]
