"""CompVis' ``DDIMSampler``: its loops and its step, which call the model and the fused step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastddim.check import whole
from fastddim.dropins._shared import C1
from fastddim.dropins.compvis.base import Kept, checked_size, drawn, taken
from fastddim.dropins.compvis.checks import check_output, check_state
from fastddim.dropins.compvis.encoding import Encoder
from fastddim.dropins.compvis.forks import (
    check_changes,
    checked_scales,
    handed,
    rescaled,
    thresholded,
)
from fastddim.untraced import untraced


class DDIMSampler(Encoder):
    """Samples as CompVis' ``DDIMSampler`` does: bit-identical in float32 on the same device.

    The generator ends in the same state. The sampler runs on the model's device. It prints
    nothing and shows no progress bar; ``callback`` is called after each step. A later step may
    reuse the memory of a returned tensor once nobody references the tensor. Threads may share a
    sampler: ``sample`` uses the schedule that its own call made, and every other method uses the
    schedule that any thread made last.

    Args:
        model: a LatentDiffusion, or an object with its ``num_timesteps``, ``alphas_cumprod`` and
            ``apply_model(x, t, c)``. A mask needs its ``q_sample(x0, t)``, ``quantize_x0`` its
            ``first_stage_model.quantize``, and ``parameterization == "v"`` its
            ``sqrt_alphas_cumprod`` and ``sqrt_one_minus_alphas_cumprod``.
        schedule: kept as an attribute and never read, as in the original.
        device: ignored; Stability AI's version has this argument.
        stacked: whether guidance calls the model once, on both conditions stacked, as in CompVis',
            Stability AI's and Zero123's samplers. False calls it twice, with the condition first,
            as in ControlNet's and DynamiCrafter's.

    Attributes:
        ddim_timesteps, ddim_alphas, ddim_alphas_prev, ddim_sigmas, ddim_sqrt_one_minus_alphas:
            the values that the original's ``make_schedule`` leaves. Assigning to them changes no
            step. Its copies of the model's tables (``sqrt_alphas_cumprod``, ...) can be read too.
        ddim_scale_arr, ddim_scale_arr_prev: the scale of x0 where a step begins and ends, if
            ``model.use_dynamic_rescale`` is true: each x0 is then multiplied by their quotient.
    """

    def __init__(
        self, model: Any, schedule: str = "linear", device: Any = None, stacked: bool = True
    ) -> None:
        super().__init__(model, schedule, device)
        if not isinstance(stacked, bool):
            raise TypeError(f"stacked must be True or False, got {stacked!r}")
        self._stacked = stacked
        self._known: set[str] = set()

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
        dynamic_threshold: float | None = None,
        ucg_schedule: Sequence[float] | None = None,
        timestep_spacing: str = "uniform",
        guidance_rescale: float = 0.0,
        t_start: int | None = None,
        precision: int | None = None,
        clean_cond: bool = False,
        **more: Any,
    ) -> tuple[Tensor, Kept]:
        """Samples from x_T to data, by ``make_schedule`` and ``ddim_sampling``.

        Args:
            S: the number of DDIM steps.
            batch_size, shape: the samples have the shape ``(batch_size, *shape)``.
            conditioning: the c of ``apply_model``: a tensor, or lists and mappings of tensors.
            callback: ``callback(i)`` is called after step i.
            normals_sequence: refused, because the original ignores it.
            img_callback: ``img_callback(x0, i)`` is called after step i with the predicted x0.
            quantize_x0: whether ``first_stage_model.quantize`` replaces each x0.
            eta: η ≥ 0.
            mask, x0: before each step, where ``mask`` is 1 the state is replaced by ``x0`` at that
                step's noise level.
            temperature: the factor of the noise.
            noise_dropout: the share of the noise that becomes 0; the rest is scaled up
                (``torch.nn.functional.dropout``).
            score_corrector: its ``modify_score(model, ε, x, t, c, **corrector_kwargs)`` replaces ε.
            verbose: ignored, because nothing is printed.
            x_T: float32, bfloat16 or float16; drawn if not given. Never written.
            log_every_t: the returned lists hold the results of the first step, and of each step
                whose index, counted from the end, is a multiple of this number.
            unconditional_guidance_scale: w in u + w·(c − u), if there is an
                ``unconditional_conditioning``, which has the same form as ``conditioning``. The
                model is then called once on both conditions, the unconditional one first.
            dynamic_threshold: v; each x0 becomes x0·v/max(v, rms(x0)), as in Zero123.
            ucg_schedule: w of each step, from noise to data, in the place of
                ``unconditional_guidance_scale``, as in Stability AI's version and ControlNet.
            timestep_spacing: the ``ddim_discretize`` of ``make_schedule``, as in DynamiCrafter.
            guidance_rescale: φ; the guided output g becomes φ·g·std(c)/std(g) + (1 − φ)·g, as in
                DynamiCrafter (Lin et al. 2024, section 3.4).
            t_start: the loop takes the timesteps ``[:t_start]`` of the rising list. Zero123's
                ``sample`` always leaves out the noisiest, which is −1 here.
            precision: 16 rounds x_T to float16, as in DynamiCrafter.
            clean_cond: whether ``x0`` itself, without noise, replaces the state under the mask.
            more: handed to ``apply_model`` if it takes them, as in DynamiCrafter (``fs``), with a
                ``SamplingWarning``, once for each name. ``quantize_denoised``, ``uc_type``,
                ``schedule_verbose`` and ``conditional_guidance_scale_temporal`` have no effect, as
                in the originals.

        Returns:
            (samples, {"x_inter": states, "pred_x0": predicted x0}); both lists begin with x_T.

        Raises:
            TypeError, ValueError: naming the argument, the value and what is allowed.
        """
        size = checked_size(batch_size, shape, normals_sequence, {})
        more = handed(self.model, more, self._known)
        self.make_schedule(S, timestep_spacing, eta, verbose)
        with self._running(self._own.made):
            return self.ddim_sampling(
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
                dynamic_threshold=dynamic_threshold,
                ucg_schedule=ucg_schedule,
                guidance_rescale=guidance_rescale,
                t_start=t_start,
                precision=precision,
                clean_cond=clean_cond,
                **more,
            )

    @torch.no_grad()
    def ddim_sampling(
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
        dynamic_threshold: float | None = None,
        ucg_schedule: Sequence[float] | None = None,
        guidance_rescale: float = 0.0,
        t_start: int | None = None,
        precision: int | None = None,
        clean_cond: bool = False,
        verbose: bool = True,
        **more: Any,
    ) -> tuple[Tensor, Kept]:
        """Samples as ``sample`` does, on the schedule that ``make_schedule`` chose.

        Args:
            cond: the ``conditioning`` of ``sample``.
            shape: the shape of the samples, (batch, ...).
            ddim_use_original_steps: must be False, because the original fails with it.
            timesteps: how many of the lowest timesteps to take, from ``x_T`` on. The original
                takes one fewer than this number, and so does this method.
            quantize_denoised: the ``quantize_x0`` of ``sample``.

        All other arguments, the result and what is raised are those of ``sample``.
        """
        options = {
            "quantize_denoised": quantize_denoised,
            "temperature": temperature,
            "noise_dropout": noise_dropout,
            "score_corrector": score_corrector,
            "corrector_kwargs": corrector_kwargs,
            "unconditional_guidance_scale": unconditional_guidance_scale,
            "unconditional_conditioning": unconditional_conditioning,
            "dynamic_threshold": dynamic_threshold,
            "guidance_rescale": guidance_rescale,
            **handed(self.model, more, self._known),
        }
        self._checked_step(temperature, noise_dropout, score_corrector, ddim_use_original_steps)
        check_changes(dynamic_threshold, guidance_rescale)
        scales = None
        if ucg_schedule is not None:
            scales = checked_scales(ucg_schedule, len(taken(self._made(), timesteps, t_start)))

        def step(x: Tensor, t: Tensor, index: int) -> tuple[Tensor, Tensor]:
            if scales is not None:
                options["unconditional_guidance_scale"] = scales[-1 - index]
            return self.p_sample_ddim(x, cond, t, index, **options)

        return self._loop(
            shape,
            x_T,
            timesteps,
            mask,
            x0,
            callback,
            img_callback,
            log_every_t,
            step,
            t_start=t_start,
            precision=precision,
            clean_cond=clean_cond,
        )

    @torch.no_grad()
    def p_sample_ddim(
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
        dynamic_threshold: float | None = None,
        guidance_rescale: float = 0.0,
        **more: Any,
    ) -> tuple[Tensor, Tensor]:
        """Returns (x_s, x0) of the step ``index`` of the schedule; index 0 is the last step.

            x0  = (x_t − √(1−ᾱ_t)·ε) / √ᾱ_t
            x_s = √ᾱ_s·x0 + √(1−ᾱ_s−σ²)·ε + σ·z·temperature

        Args:
            x: x_t, (batch, ...), float32, bfloat16 or float16; never written.
            c: the ``conditioning`` of ``sample``.
            t: the timestep that the model is called with, int64 (batch,).
            repeat_noise: whether all samples get the same z.
            use_original_steps: must be False, because the original fails with it.
            quantize_denoised: the ``quantize_x0`` of ``sample``.

        All other arguments are those of ``sample``.
        """
        schedule = self._made()
        table = schedule.table
        self._checked_step(temperature, noise_dropout, score_corrector, use_original_steps)
        if dynamic_threshold is not None or guidance_rescale:
            check_changes(dynamic_threshold, guidance_rescale)
        row = schedule.rows[whole("index", index, low=0, high=len(table) - 1)]
        scale, without = unconditional_guidance_scale, unconditional_conditioning
        if more:
            more = handed(self.model, more, self._known)
        output, w = self._called(x, t, c, scale, without, more)
        if guidance_rescale and w is not None:
            check_output(output, x, True)
            output, w = rescaled(output, w, guidance_rescale), None
        if score_corrector is not None:
            output = self._corrected(score_corrector, corrector_kwargs, x, output, w, t, c)
            w = None
        x = x.float()
        check_output(output, x, w is not None)
        own = self._own
        eta, between = schedule.eta, own.between.stepped
        prediction = self._prediction
        scaled = noise_dropout > 0 or (eta > 0 and temperature != 1)
        factor = schedule.x0_factor
        changed = quantize_denoised or factor is not None or dynamic_threshold is not None
        if not scaled and not changed:
            z = drawn(x, repeat_noise, eta > 0)
            x_s, x0 = own.stepped(table, x, output, row, prediction=prediction, noise=z, guidance=w)
            assert x0 is not None
        else:
            eps, x0 = between(schedule.to_halves, x, output, row, prediction=prediction, guidance=w)
            assert x0 is not None
            if factor is not None:
                x0 = x0.mul_(factor[index])
            if quantize_denoised:
                x0, *_ = self.model.first_stage_model.quantize(x0)
            if dynamic_threshold is not None:
                x0 = thresholded(x0, dynamic_threshold)
            z = drawn(x, repeat_noise, eta > 0 or scaled)
            if z is not None:
                z.mul_(table[index, C1]).mul_(temperature)
                if noise_dropout > 0:
                    z = torch.nn.functional.dropout(z, noise_dropout)
            check_output(eps, x0, False)
            x_s, _ = own.stepped(schedule.from_halves, x0, eps, row, noise=z, want_x0=False)
        return x_s, x0

    @untraced
    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond: Any,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        use_original_steps: bool = False,
        callback: Callable[[int], object] | None = None,
    ) -> Tensor:
        """Takes the last ``t_start`` steps of the schedule, from ``x_latent`` to data.

        All other arguments and what is raised are those of ``ddim_sampling``.
        """
        schedule = self._made()
        self._checked_step(1.0, 0.0, None, use_original_steps)
        x = check_state("x_latent", x_latent)
        steps = schedule.steps[: whole("t_start", t_start, low=0)]
        with self._running(schedule):
            for i, index in enumerate(reversed(range(len(steps)))):
                t = torch.full((len(x),), int(steps[index]), device=x.device)
                x, _ = self.p_sample_ddim(
                    x,
                    cond,
                    t,
                    index,
                    unconditional_guidance_scale=unconditional_guidance_scale,
                    unconditional_conditioning=unconditional_conditioning,
                )
                if callback is not None:
                    callback(i)
        return x
