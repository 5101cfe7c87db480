"""CompVis' ``PLMSSampler``: Adams–Bashforth on ε, with the fused step for each update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastddim.check import whole
from fastddim.coefficients import Prediction
from fastddim.dropins.compvis.base import Kept, Sampler, checked_size, drawn
from fastddim.dropins.compvis.checks import check_output, check_state
from fastddim.untraced import untraced

WEIGHTS: tuple[tuple[tuple[int, ...], int], ...] = (
    ((3, -1), 2),
    ((23, -16, 5), 12),
    ((55, -59, 37, -9), 24),
)
"""Weights of ε, of the ε before it, and so on, and their divisor, for 1, 2 and 3 earlier ε."""


class PLMSSampler(Sampler):
    """Samples as CompVis' ``PLMSSampler`` does: bit-identical in float32 on the same device.

    The pseudo linear multistep method (Liu et al. 2022, "PNDM") is DDIM at η = 0 with a combination
    of the last ε in the place of ε: e′ = (55·ε − 59·ε₁ + 37·ε₂ − 9·ε₃)/24, and fewer of them in the
    first steps. The first step calls the model a second time, at its own end, and takes the mean.

    ``DDIMSampler`` says what is printed, reused and shared between threads.

    Args:
        model: as in ``DDIMSampler``, but its output must be ε.
        schedule: kept as an attribute and never read, as in the original.
        ignored: ``device``; any other keyword is refused.
    """

    _predictions: dict[str, Prediction] = {"eps": "epsilon"}  # noqa: RUF012 never written

    def __init__(self, model: Any, schedule: str = "linear", **ignored: Any) -> None:
        unknown = sorted(ignored.keys() - {"device"})
        if unknown:
            raise TypeError(f"{unknown[0]} must be left out: PLMSSampler knows no such argument")
        super().__init__(model, schedule)

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: str = "uniform",
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        """Chooses the timesteps as ``DDIMSampler.make_schedule`` does; ``ddim_eta`` must be 0."""
        if ddim_eta != 0:
            raise ValueError(f"ddim_eta must be 0 for PLMS, got {ddim_eta!r}")
        super().make_schedule(ddim_num_steps, ddim_discretize, 0.0, verbose)

    @untraced
    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Any = None,
        callback: Callable[[int], object] | None = None,
        normals_sequence: None = None,
        img_callback: Callable[[Tensor, int], object] | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        **ignored: Any,
    ) -> tuple[Tensor, Kept]:
        """Samples from x_T to data, by ``make_schedule`` and ``plms_sampling``, in S + 1 calls.

        The arguments, the result and what is raised are those of ``DDIMSampler.sample``; ``eta``
        must be 0. ``temperature`` and ``noise_dropout`` change the generator's state at most.
        """
        size = checked_size(batch_size, shape, normals_sequence, ignored)
        self.make_schedule(S, ddim_eta=eta, verbose=verbose)
        with self._running(self._own.made):
            return self.plms_sampling(
                conditioning,
                size,
                x_T=x_T,
                callback=callback,
                quantize_denoised=quantize_x0,
                mask=mask,
                x0=x0,
                img_callback=img_callback,
                log_every_t=log_every_t,
                temperature=temperature,
                noise_dropout=noise_dropout,
                score_corrector=score_corrector,
                corrector_kwargs=corrector_kwargs,
                unconditional_guidance_scale=unconditional_guidance_scale,
                unconditional_conditioning=unconditional_conditioning,
            )

    @torch.no_grad()
    def plms_sampling(
        self,
        cond: Any,
        shape: Sequence[int],
        x_T: Tensor | None = None,
        ddim_use_original_steps: bool = False,
        callback: Callable[[int], object] | None = None,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        img_callback: Callable[[Tensor, int], object] | None = None,
        log_every_t: int = 100,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
    ) -> tuple[Tensor, Kept]:
        """Samples as ``sample`` does, on the schedule that ``make_schedule`` chose.

        The arguments, the result and what is raised are those of ``DDIMSampler.ddim_sampling``.
        """
        schedule = self._made()
        options = {
            "quantize_denoised": quantize_denoised,
            "temperature": temperature,
            "noise_dropout": noise_dropout,
            "score_corrector": score_corrector,
            "corrector_kwargs": corrector_kwargs,
            "unconditional_guidance_scale": unconditional_guidance_scale,
            "unconditional_conditioning": unconditional_conditioning,
        }
        self._checked_step(temperature, noise_dropout, score_corrector, ddim_use_original_steps)
        old_eps: list[Tensor] = []

        def step(x: Tensor, t: Tensor, index: int) -> tuple[Tensor, Tensor]:
            t_next = None
            if not old_eps:
                t_next = torch.full_like(t, int(schedule.steps[max(index - 1, 0)]))
            x_s, pred_x0, eps = self.p_sample_plms(
                x, cond, t, index, old_eps=old_eps, t_next=t_next, **options
            )
            old_eps.append(eps)
            del old_eps[:-3]
            return x_s, pred_x0

        return self._loop(
            shape, x_T, timesteps, mask, x0, callback, img_callback, log_every_t, step
        )

    @torch.no_grad()
    def p_sample_plms(
        self,
        x: Tensor,
        c: Any,
        t: Tensor,
        index: int,
        repeat_noise: bool = False,
        use_original_steps: bool = False,
        quantize_denoised: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        old_eps: Sequence[Tensor] | None = None,
        t_next: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (x_s, x0, ε) of the step ``index`` of the schedule; index 0 is the last step.

        Args:
            old_eps: the ε of the steps before, the latest last. With none the model is called again
                at x_s and ``t_next``.
            t_next: the timestep where the step ends, int64 (batch,); used without ``old_eps``.

        All other arguments are those of ``DDIMSampler.p_sample_ddim``.
        """
        schedule, own = self._made(), self._own
        self._checked_step(temperature, noise_dropout, score_corrector, use_original_steps)
        row = schedule.rows[whole("index", index, low=0, high=len(schedule.table) - 1)]
        if not old_eps and t_next is None:
            raise ValueError("t_next must be given where there are no old_eps, got None")
        state = check_state("x", x).float()

        def predicted(x: Tensor, t: Tensor) -> Tensor:
            output, w = self._called(
                x, t, c, unconditional_guidance_scale, unconditional_conditioning
            )
            if w is None and score_corrector is None:
                check_output(output, state, False)
                return output.float()
            eps = self._corrected(score_corrector, corrector_kwargs, x, output, w, t, c)
            check_output(eps, state, False)
            return eps.float()

        def moved(eps: Tensor, first: bool) -> tuple[Tensor, Tensor | None]:
            """Returns (x_s, x0). ``first`` is the move to where the model is called again."""
            if quantize_denoised:
                halves = own.between.stepped(schedule.to_halves, state, eps, row)
                x0, *_ = self.model.first_stage_model.quantize(halves[1])
                check_output(eps, x0, False)
                x_s, _ = own.stepped(schedule.from_halves, x0, eps, row, want_x0=False)
            else:
                x_s, x0 = own.stepped(schedule.table, state, eps, row, want_x0=not first)
            _pass_over(state, repeat_noise, noise_dropout)
            return x_s, x0

        eps = predicted(x, t)
        if old_eps:
            combined = _combined(eps, old_eps)
        else:
            assert t_next is not None
            x_next, _ = moved(eps, first=True)
            combined = (eps + predicted(x_next, t_next)).div_(2)
            del x_next
        x_s, x0 = moved(combined, first=False)
        assert x0 is not None
        return x_s, x0, eps


def _combined(eps: Tensor, old: Sequence[Tensor]) -> Tensor:
    """Returns e′ by the operations of the original, in its order."""
    weights, divisor = WEIGHTS[min(len(old), 3) - 1]
    total = weights[0] * eps
    scaled = torch.empty_like(total)
    for weight, earlier in zip(weights[1:], reversed(old), strict=False):
        total.add_(torch.mul(earlier, weight, out=scaled))
    return total.div_(divisor)


def _pass_over(x: Tensor, repeat: bool, dropout: float) -> None:
    """Moves the generator as the noise of a step would, which has the factor 0."""
    drawn(x, repeat, False)
    if dropout > 0:
        torch.nn.functional.dropout(torch.zeros(x.shape, device=x.device), dropout)
