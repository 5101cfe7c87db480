"""One step of guided-diffusion: its tables, its callables, and the fused step between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastddim.check import finite, kind, shown
from fastddim.dropins._shared import Buffers, checked_factors, pack_rows, passed_over, stream_of
from fastddim.dropins._transfer import sent
from fastddim.levels import Float64
from fastddim.loop.devices import check_not_capturing
from fastddim.schedule import NoiseSchedule
from fastddim.step.arguments import OUTPUTS
from fastddim.step.buffers import fitting

Denoised: TypeAlias = Callable[[Tensor], Tensor] | None
Condition: TypeAlias = Callable[..., Tensor] | None
Keywords: TypeAlias = Mapping[str, Any] | None
Out: TypeAlias = dict[str, Tensor]


class Step:
    """Checks the arguments of one call, makes its tables, and then takes any number of steps.

    The original's order of operations differs from the fused step's. Both agree bit for bit if the
    step gets x̃ = √(1/ᾱ_t)·x_t for x_t, 1 for √ᾱ_t and √(1/ᾱ_t − 1) for √(1−ᾱ_t):
    x0 = (x̃ − √(1/ᾱ_t − 1)·ε)/1 and ε = (x̃ − 1·x0)/√(1/ᾱ_t − 1).
    """

    def __init__(
        self,
        diffusion: Any,
        model: Callable[..., Tensor],
        clip_denoised: bool,
        denoised_fn: Denoised,
        cond_fn: Condition,
        model_kwargs: Keywords,
        device: torch.device,
        eta: float | None,
    ) -> None:
        """``eta`` None stands for steps towards noise."""
        for name in ("alphas_cumprod", "model_mean_type", "model_var_type"):
            if not hasattr(diffusion, name):
                raise TypeError(
                    f"diffusion must be a GaussianDiffusion, a SpacedDiffusion or a "
                    f"guided.Diffusion, got {kind(diffusion)}, which has no {name}"
                )
        if not callable(model):
            raise TypeError(f"model must be callable, got {kind(model)}")
        for name, function in (("denoised_fn", denoised_fn), ("cond_fn", cond_fn)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be callable or None, got {shown(function)}")
        self.eta = None if eta is None else finite("eta", eta)
        if self.eta is not None and self.eta < 0:
            raise ValueError(f"eta must be ≥ 0, got {eta:g}")
        self.prediction = _one_of(diffusion, "model_mean_type", EPSILON="epsilon", START_X="sample")
        self.times_channels = _one_of(
            diffusion, "model_var_type", FIXED_SMALL=1, FIXED_LARGE=1, LEARNED=2, LEARNED_RANGE=2
        )
        self.model, self.denoised_fn, self.cond_fn = model, denoised_fn, cond_fn
        self.model_kwargs = dict(model_kwargs or {})
        self.clip = 1.0 if clip_denoised else None
        check_not_capturing(device)

        schedule = NoiseSchedule.from_alphas_cumprod(diffusion.alphas_cumprod)
        self.count = len(schedule)
        self.rows = torch.arange(self.count, dtype=torch.int32, device=device)
        abar = schedule.alphas_cumprod.tobytes()
        self.scale, self.shift, *rest = tables(abar, self.eta, device, stream_of(device))
        self.table, self.only_x0, self.only_eps = rest
        timestep_map = getattr(diffusion, "timestep_map", range(self.count))
        self.model_t = sent(torch.from_numpy(np.array(timestep_map, dtype=np.int64)), device)
        if getattr(diffusion, "rescale_timesteps", False):
            T = getattr(diffusion, "original_num_steps", self.count)
            self.model_t = self.model_t.float() * (1000.0 / T)
        self.buffers, self.between = Buffers(), Buffers()
        self.scaled: Tensor | None = None

    @torch.no_grad()
    def __call__(
        self, x: Tensor, t: Tensor, rows: Tensor | None = None, want_x0: bool = True
    ) -> Out:
        """Returns the result of ``ddim_sample``.

        ``rows`` is t as int32. It may have shape () if all samples have the same timestep.
        """
        rows = t.int() if rows is None else rows
        each = (-1, *[1] * (x.dim() - 1))
        model_t = self.model_t[t]
        shape = [x.shape[0], self.times_channels * x.shape[1], *x.shape[2:]]
        output = _checked("model", self.model(x, model_t, **self.model_kwargs), shape)
        output = output[:, : x.shape[1]]
        prediction, clip = self.prediction, self.clip
        scaled = fitting(self.scaled, x)
        if scaled is None:
            scaled = self.scaled = torch.empty_like(x, dtype=torch.float32)
        torch.mul(x, self.scale[t].view(each), out=scaled)
        between = self.between.stepped
        if self.denoised_fn is not None:
            x0 = output
            if prediction == "epsilon":
                x0, _ = between(self.only_x0, scaled, output, rows, want_x0=False)
            output = _checked("denoised_fn", self.denoised_fn(x0), x.shape)
            prediction = "sample"
        if self.cond_fn is not None:
            output, _ = between(
                self.only_eps,
                scaled,
                output,
                rows,
                prediction=prediction,
                clip=clip,
                rederive=True,
                want_x0=False,
            )
            score = _checked("cond_fn", self.cond_fn(x, model_t, **self.model_kwargs), x.shape)
            output -= self.shift[t].view(each) * score
            prediction, clip = "epsilon", None
        x_s, x0_or_none = self.buffers.stepped(
            self.table,
            scaled,
            output,
            rows,
            prediction=prediction,
            clip=clip,
            rederive=True,
            want_x0=want_x0,
            noise=self._noise(x),
        )
        out = {"sample": x_s}
        if x0_or_none is not None:
            out["pred_xstart"] = x0_or_none
        return out

    def _noise(self, x: Tensor) -> Tensor | None:
        """Returns z as ``torch.randn_like(x)`` draws it, or None where z has no effect."""
        if self.eta is None:
            return None
        if self.eta == 0:
            passed_over(x)()
            return None
        return self.buffers.drawn(x).float()


@lru_cache(maxsize=16)
def tables(
    levels: bytes, eta: float | None, device: torch.device, stream: int
) -> tuple[Tensor, ...]:
    """Returns √(1/ᾱ_t), √(1−ᾱ_t) and three tables, by the original's own float32 operations.

    The step returns x_s with the first table, x0 in x_s's place with the second, and ε with the
    third. ``levels`` holds ᾱ as float64 bytes. The results are cached, because a loop of single
    steps needs the same tables at each step, and making them waits for the device. Each ``stream``
    has its own: it would have to wait for another stream's.
    """
    abar = np.frombuffer(levels)
    if abar[-1] == 0:
        raise ValueError("diffusion.alphas_cumprod must be > 0, got 0 at the last timestep")

    def on_device(values: Float64) -> Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(device)

    at, b = on_device(abar), on_device(np.sqrt(1.0 / abar - 1))
    upwards = eta is None
    at_s = on_device(np.append(abar[1:], 0.0) if upwards else np.append(1.0, abar[:-1]))

    def factors(eta: float) -> tuple[Tensor, Tensor]:
        c1 = eta * ((1 - at_s) / (1 - at)).sqrt() * (1 - at / at_s).sqrt()
        return c1, (1 - at_s - c1**2).sqrt()

    one, none = torch.ones_like(at), torch.zeros_like(at)
    c1, c2 = none, (1 - at_s).sqrt()
    if eta:
        c1, c2 = checked_factors(factors, eta, "these timesteps")
    returned = (at_s.sqrt(), c1, c2), (one, none, none), (none, none, one)
    tables = [pack_rows(one, b, *last) for last in returned]
    return on_device(np.sqrt(1.0 / abar)), (1 - at).sqrt(), *tables


def _one_of(diffusion: Any, name: str, **allowed: Any) -> Any:
    """Returns the value in ``allowed`` for the name of ``diffusion``'s enum member ``name``."""
    value = getattr(diffusion, name)
    found = getattr(value, "name", value)
    if found not in allowed:
        raise ValueError(f"diffusion.{name} must be one of {', '.join(allowed)}, got {found}")
    return allowed[found]


def _checked(name: str, output: Any, shape: Sequence[int]) -> Tensor:
    """Returns the output of the caller's function ``name``, or refuses it."""
    if not isinstance(output, Tensor):
        raise TypeError(f"{name} must return a tensor, got {kind(output)}")
    if list(output.shape) != list(shape):
        raise ValueError(f"{name} must return shape {tuple(shape)}, got {tuple(output.shape)}")
    if output.dtype not in OUTPUTS:
        dtype = str(output.dtype)[6:]
        raise TypeError(f"{name} must return float32, bfloat16 or float16, got {dtype}")
    return output
