"""One ancestral step of guided-diffusion (``p_sample``): its tables, its variance, its passes."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastddim.coefficients import Prediction
from fastddim.dropins._shared import Buffers, pack_rows, passed_over, stream_of
from fastddim.dropins.guided.call import Call, Condition, Denoised, Keywords, Out, checked
from fastddim.levels import Float64, vector


class AncestralStep(Call):
    """Checks the arguments of one call, makes its tables, and then takes any number of steps.

    The fused step computes x0 = a·x − b·v for a "v" model. With a = √(1/ᾱ_t), b = √(1/ᾱ_t − 1) and
    v = ε this is the original's x0, in the original's order of operations. A learned variance
    differs from element to element, so PyTorch multiplies z by its root, and the table's c1 is 1.
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
    ) -> None:
        super().__init__(
            diffusion,
            model,
            clip_denoised,
            denoised_fn,
            cond_fn,
            model_kwargs,
            device,
            levels="betas",
        )
        if self.count < 2:
            raise ValueError(f"diffusion.betas must hold 2 or more, got {self.count}")
        self.prediction: Prediction = "v" if self.mean_type == "EPSILON" else "sample"
        betas = vector("diffusion.betas", diffusion.betas).tobytes()
        self.tables = tables(betas, self.var_type, device, stream_of(device))
        self.means = Buffers()

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, row: int | None = None, want_x0: bool = True) -> Out:
        """Returns the result of ``p_sample``."""
        rows = t.int() if row is None else row
        model_t = self.model_t[t]
        output = self.output_of(x, model_t)
        state, prediction, tables = x.float(), self.prediction, self.tables
        v: Tensor | None = None
        if self.times_channels == 2:
            output, v = output[:, : x.shape[1]], output[:, x.shape[1] :]
        if self.denoised_fn is not None:
            x0 = output
            if prediction == "v":
                x0, _ = self._stepped(
                    self.between, tables.only_x0, state, output, rows, prediction, False
                )
            output = checked("denoised_fn", self.denoised_fn(x0), x)
            prediction = "sample"
        z: Tensor | None = None
        if row == 0:
            passed_over(x)()
        else:
            z = self.buffers.drawn(x).float()
        log_variance = None
        if v is not None and (z is not None or self.cond_fn is not None):
            log_variance = self._log_variance(v, t, row)
            if z is not None:
                z = (0.5 * log_variance).exp_().float().mul_(z)
        if self.cond_fn is None:
            x_s, x0_or_none = self._stepped(
                self.buffers, tables.step, state, output, rows, prediction, want_x0, self.clip, z
            )
        else:
            mean, x0_or_none = self._stepped(
                self.means, tables.step, state, output, rows, prediction, want_x0, self.clip
            )
            score = self.score_of(x, model_t)
            if log_variance is not None:
                score = log_variance.exp() * score.float()
            x_s, _ = self._stepped(
                self.buffers, tables.shift, mean, score, rows, "sample", False, noise=z
            )
        out = {"sample": x_s}
        if x0_or_none is not None:
            out["pred_xstart"] = x0_or_none
        return out

    def _log_variance(self, v: Tensor, t: Tensor, row: int | None) -> Tensor:
        """Returns log Σ of the output's second half, in half precision where the original's is."""
        if self.var_type == "LEARNED":
            return v
        log_small, log_large = self.tables.log_small, self.tables.log_large
        if row is None:
            each = (-1, *[1] * (v.dim() - 1))
            small, large = log_small[t].view(each), log_large[t].view(each)
        else:
            small, large = log_small[row], log_large[row]
        share = (v + 1).div_(2)
        rest = 1 - share
        return share.float().mul_(large).add_(rest.float().mul_(small))

    @staticmethod
    def _stepped(
        buffers: Buffers,
        table: Tensor,
        x: Tensor,
        output: Tensor,
        rows: Tensor | int,
        prediction: Prediction,
        want_x0: bool,
        clip: float | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        return buffers.stepped(
            table,
            x,
            output,
            rows,
            prediction=prediction,
            clip=clip,
            posterior=True,
            want_x0=want_x0,
            noise=noise,
            checked=True,
        )


class Tables(NamedTuple):
    """The factors of every timestep, float32 on the loop's device."""

    step: Tensor
    """x_s, or its mean where no noise is passed."""
    only_x0: Tensor
    """x0 in x_s's place."""
    shift: Tensor
    """x_s = Σ·g + x + √Σ·z of the mean x and the gradient g; Σ is 1 where it is learned."""
    log_small: Tensor
    """log β̃_t, that of t = 1 at t = 0, where β̃_t is 0."""
    log_large: Tensor
    """log β_t."""


@lru_cache(maxsize=16)
def tables(betas: bytes, var_type: str, device: torch.device, stream: int) -> Tables:
    """Returns the tables by the original's own operations, in float64 except for √Σ.

    ``betas`` holds β as float64 bytes. As in ``step.tables``, the results are cached and each
    ``stream`` has its own.
    """
    beta = np.frombuffer(betas)
    abar = np.cumprod(1.0 - beta)
    abar_s = np.append(1.0, abar[:-1])
    small = beta * (1.0 - abar_s) / (1.0 - abar)
    log_small = np.log(np.append(small[1], small[1:]))
    from_x0 = beta * np.sqrt(abar_s) / (1.0 - abar)
    from_x = (1.0 - abar_s) * np.sqrt(1.0 - beta) / (1.0 - abar)
    log_large = np.log(beta)
    variance, log_variance = {
        "FIXED_SMALL": (small, log_small),
        "FIXED_LARGE": (np.append(small[1], beta[1:]), np.log(np.append(small[1], beta[1:]))),
    }.get(var_type, (np.ones_like(beta), np.zeros_like(beta)))

    def on_device(values: Float64) -> Tensor:
        return torch.from_numpy(values.astype(np.float32)).to(device)

    sigma = torch.exp(0.5 * on_device(log_variance))
    sigma[0] = 0  # The original multiplies the noise by a mask, which is 0 at t = 0.
    a, b = on_device(np.sqrt(1.0 / abar)), on_device(np.sqrt(1.0 / abar - 1))
    one, none = torch.ones_like(a), torch.zeros_like(a)
    return Tables(
        pack_rows(a, b, on_device(from_x0), sigma, on_device(from_x)),
        pack_rows(a, b, one, none, none),
        pack_rows(a, b, on_device(variance), sigma, one),
        on_device(log_small),
        on_device(log_large),
    )
