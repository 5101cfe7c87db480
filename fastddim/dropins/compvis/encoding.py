"""From data to a noisy state, by CompVis' tables: with noise, or by DDIM's inversion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddim.check import finite, kind, whole
from fastddim.dropins._shared import Buffers
from fastddim.dropins.compvis.base import Sampler
from fastddim.dropins.compvis.checks import check_output, check_state
from fastddim.dropins.compvis.forks import BUFFERS
from fastddim.dropins.compvis.schedule import encoding_table, forward_table
from fastddim.untraced import untraced


class Encoder(Sampler):
    """Adds ``stochastic_encode`` and ``encode`` to a sampler."""

    @torch.no_grad()
    def stochastic_encode(
        self,
        x0: Tensor,
        t: Tensor,
        use_original_steps: bool = False,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Returns x_t = √ᾱ_t·x0 + √(1−ᾱ_t)·ε, from which ``decode`` can start.

        Args:
            x0: clean data, (batch, ...), float32, bfloat16 or float16.
            t: an index into the chosen timesteps for each sample, integers of shape (batch,).
            use_original_steps: t holds the model's own timesteps instead of indices.
            noise: ε, of x0's shape; drawn if not given.

        Raises:
            TypeError, ValueError: naming the argument, the value and what is allowed.
        """
        schedule = self._made()
        check_state("x0", x0)
        if use_original_steps:
            table = forward_table(self.model.alphas_cumprod, x0.device)
        else:
            table = schedule.forward
        if not isinstance(t, Tensor) or t.shape != x0.shape[:1] or t.is_floating_point():
            got = f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else kind(t)
            raise ValueError(f"t must be integers of shape ({len(x0)},), an index each, got {got}")
        if not bool(((t >= 0) & (t < len(table))).all()):
            raise ValueError(
                f"t must lie in [0, {len(table) - 1}], got {int(t.min())} to {int(t.max())}"
            )
        eps = torch.randn_like(x0) if noise is None else check_state("noise", noise)
        if eps.shape != x0.shape:
            raise ValueError(
                f"noise must have x0's shape, {tuple(x0.shape)}, got {tuple(eps.shape)}"
            )
        # Adding noise to clean data is the step's own equation with ε = noise.
        rows = t.to(torch.int32)
        x_t, _ = Buffers().stepped(table, x0.float(), eps.float(), rows, want_x0=False)
        return x_t

    @untraced
    @torch.no_grad()
    def encode(
        self,
        x0: Tensor,
        c: Any,
        t_enc: int,
        use_original_steps: bool = False,
        return_intermediates: int | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        callback: Callable[[int], object] | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Takes the first ``t_enc`` steps of DDIM's inversion, from data towards noise.

            x_next = √(ᾱ_next/ᾱ)·x + √ᾱ_next·(√(1/ᾱ_next − 1) − √(1/ᾱ − 1))·ε(x, t_next)

        (Song et al. 2021, section 4.3; the method is that of ControlNet's ``ddim_hacked``).

        Args:
            x0: data, (batch, ...), float32, bfloat16 or float16; never written.
            c: the ``conditioning`` of ``sample``.
            t_enc: the number of steps, at least 1 and at most the number of timesteps.
            use_original_steps: whether the steps are those between all T timesteps.
            return_intermediates: how many states to return; the last two are always among them.
            unconditional_guidance_scale: w; any other than 1 needs ``unconditional_conditioning``.
            callback: ``callback(i)`` is called after step i.

        Returns:
            (x, {"x_encoded": x, "intermediate_steps": their steps, "intermediates": states}); the
            last item is there only if ``return_intermediates`` is given.

        Raises:
            TypeError, ValueError: naming the argument, the value and what is allowed. A model that
                predicts v is refused, because the original reads its output as ε.
        """
        schedule = self._made()
        if self._prediction != "epsilon":
            raise ValueError(
                'model.parameterization must be "eps" for encode, got "v", whose output the '
                "original reads as ε"
            )
        x = check_state("x0", x0)
        w = finite("unconditional_guidance_scale", unconditional_guidance_scale)
        if w != 1 and unconditional_conditioning is None:
            raise ValueError(
                f"unconditional_conditioning must be given where unconditional_guidance_scale is "
                f"not 1, got {w:g}"
            )
        device = schedule.table.device
        levels: Any
        if use_original_steps:
            levels = np.arange(self.ddpm_num_timesteps)
            after, before = BUFFERS["alphas_cumprod"], BUFFERS["alphas_cumprod_prev"]
            abar_next, abar = after(self.model).cpu(), before(self.model).cpu()
        else:
            levels = schedule.steps
            abar_next, abar = schedule.alphas.cpu(), torch.from_numpy(schedule.alphas_prev)
        n = whole("t_enc", t_enc, low=1, high=len(levels))
        each = return_intermediates
        if each is not None:
            each = n // whole("return_intermediates", each, low=1, high=n)
        table = encoding_table(abar_next[:n], abar[:n], device)
        rows = torch.arange(n, dtype=torch.int32, device=device)
        states, steps, own = [], [], self._own
        with self._running(schedule):
            for i in range(n):
                t = torch.full((len(x),), int(levels[i]), device=x.device)
                output, guided = self._called(x, t, c, w, unconditional_conditioning)
                x = x.float()
                check_output(output, x, guided is not None)
                x, _ = own.stepped(table, x, output, rows[i], guidance=guided, want_x0=False)
                if each is not None and (i % each == 0 or i >= n - 2):
                    states.append(x)
                    steps.append(i)
                if callback is not None:
                    callback(i)
        found = {"x_encoded": x, "intermediate_steps": steps}
        return x, found if each is None else found | {"intermediates": states}
