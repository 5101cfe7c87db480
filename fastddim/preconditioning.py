"""EDM's preconditioning: a network F becomes the model D that predicts x0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastddim.check import finite, shown


class Preconditioned(nn.Module):
    """D(x, σ), the denoiser that EDM makes of a network F (Karras et al. 2022, eq. 7, table 1).

        D = c_skip·x + c_out·F(c_in·x, c_noise)
        c_skip = σ_d²/(σ²+σ_d²),   c_out = σ·σ_d/√(σ²+σ_d²)
        c_in = 1/√(σ²+σ_d²),       c_noise = ln(σ)/4

    It is a ``"sample"`` model for the path of ``NoiseSchedule.edm()``:

        >>> from fastddim import DDIM, NoiseSchedule
        >>> def network(x, t):
        ...     return 0.1 * x
        >>> ddim = DDIM(steps=18, schedule=NoiseSchedule.edm(), prediction="sample")
        >>> ddim.sample(Preconditioned(network), shape=(2, 3, 8, 8), seeds=[0, 1]).shape
        torch.Size([2, 3, 8, 8])

    A network that already is D, as the ones in EDM's own files are, needs no wrapper.

    Args:
        network: F, called as ``network(c_in·x, c_noise, **cond)``, with c_noise float32 (batch,).
            It returns a tensor, a tuple, or an object with ``.sample``.
        sigma_data: σ_d > 0, the standard deviation of the data.
        time: the path's ``time``: ``"sigma"``, or ``"c_noise"``.

    Raises:
        TypeError, ValueError: naming the argument, the value and what is allowed.
    """

    def __init__(self, network: Any, sigma_data: float = 0.5, time: str = "sigma") -> None:
        super().__init__()
        if not callable(network):
            raise TypeError(f"network must be callable, got {shown(network)}")
        self.sigma_data = finite("sigma_data", sigma_data)
        if self.sigma_data <= 0:
            raise ValueError(f"sigma_data must be > 0, got {self.sigma_data:g}")
        if not (isinstance(time, str) and time in ("sigma", "c_noise")):
            raise ValueError(f'time must be "sigma" or "c_noise", got {shown(time)}')
        self.network, self.time = network, time

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        t = t.to(torch.float32)
        sigma, c_noise = (t, t.log() / 4) if self.time == "sigma" else ((4 * t).exp(), t)
        each = sigma.view(-1, *[1] * (x.dim() - 1))
        total = (each**2 + self.sigma_data**2).sqrt()
        output: Any = self.network((x / total).to(x.dtype), c_noise, **cond)
        if not isinstance(output, Tensor):
            output = output[0] if isinstance(output, tuple) else output.sample
        c_skip, c_out = (self.sigma_data / total) ** 2, each * self.sigma_data / total
        denoised: Tensor = c_skip * x + c_out * output
        return denoised
