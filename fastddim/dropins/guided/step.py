"""One DDIM step of guided-diffusion: its tables, and the fused step between the callables."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddim.check import finite
from fastddim.coefficients import Prediction
from fastddim.dropins._shared import checked_factors, pack_rows, passed_over, stream_of
from fastddim.dropins.guided.call import Call, Condition, Denoised, Keywords, Out, checked
from fastddim.levels import Float64
from fastddim.step.buffers import fitting


class Step(Call):
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
        self.eta = None if eta is None else finite("eta", eta)
        if self.eta is not None and self.eta < 0:
            raise ValueError(f"eta must be ≥ 0, got {eta:g}")
        super().__init__(
            diffusion,
            model,
            clip_denoised,
            denoised_fn,
            cond_fn,
            model_kwargs,
            device,
            levels="alphas_cumprod",
        )
        self.prediction: Prediction = "epsilon" if self.mean_type == "EPSILON" else "sample"
        self.rows = torch.arange(self.count, dtype=torch.int32, device=device)
        abar = self.schedule.alphas_cumprod.tobytes()
        self.scale, self.shift, *rest = tables(abar, self.eta, device, stream_of(device))
        self.table, self.only_x0, self.only_eps = rest
        self.scaled: Tensor | None = None
        self.returns_first_x0 = hasattr(diffusion, "condition_score_with_grad")
        """Whether ``"pred_xstart"`` is the x0 before ``cond_fn``, as in crowsonkb's fork."""

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, row: int | None = None, want_x0: bool = True) -> Out:
        """Returns the result of ``ddim_sample``."""
        rows = t.int() if row is None else self.rows[row]
        each = (-1, *[1] * (x.dim() - 1))
        model_t = self.model_t[t]
        output = self.output_of(x, model_t)[:, : x.shape[1]]
        prediction, clip = self.prediction, self.clip
        scaled = fitting(self.scaled, x)
        if scaled is None:
            scaled = self.scaled = torch.empty_like(x, dtype=torch.float32)
        torch.mul(x, self.scale[t].view(each), out=scaled)
        between = self.between.stepped
        first_x0: Tensor | None = None
        if self.denoised_fn is not None:
            x0 = output
            if prediction == "epsilon":
                x0, _ = between(self.only_x0, scaled, output, rows, want_x0=False)
            output = checked("denoised_fn", self.denoised_fn(x0), x)
            prediction = "sample"
        if self.cond_fn is not None:
            output, first_x0 = between(
                self.only_eps,
                scaled,
                output,
                rows,
                prediction=prediction,
                clip=clip,
                rederive=True,
                want_x0=want_x0 and self.returns_first_x0,
            )
            output -= self.shift[t].view(each) * self.score_of(x, model_t)
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
        x0_or_none = x0_or_none if first_x0 is None else first_x0
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
