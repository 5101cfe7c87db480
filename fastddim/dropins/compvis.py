"""DDIMSampler of CompVis' latent-diffusion and stable-diffusion: the same calls, fewer passes.

    from fastddim.dropins.compvis import DDIMSampler

It knows their model by what it has, and imports nothing of theirs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastddim.check import finite, kind, shown, whole
from fastddim.coefficients import Prediction
from fastddim.dropins._shared import C1, Buffers, Own, checked_factors, pack_rows, passed_over
from fastddim.loop.model import shapes, stack
from fastddim.step.arguments import OUTPUTS, check_untransformed

PREDICTIONS: dict[str, Prediction] = {"eps": "epsilon", "v": "v"}


class _Schedule(NamedTuple):
    """What ``make_schedule`` chose; a loop that has begun keeps to its own."""

    steps: npt.NDArray[np.int64]
    eta: float
    table: Tensor
    rows: Tensor
    to_halves: Tensor
    """The step in two halves, for what may come between them: to (ε, x0), and from (x0, ε) on,
    with noise that has its factor already."""
    from_halves: Tensor
    forward: Tensor


class _Own(Own):
    """What the sampler keeps for one thread."""

    made: _Schedule | None = None
    """The schedule that this thread made last."""
    running: _Schedule | None = None
    """That of the loop that runs in this thread."""


class DDIMSampler:
    """Their sampler, bit-identical in float32 on the same device, generator included.

    On whatever device the model is. Nothing is printed and there is no progress bar: ``callback``
    is called after each step. What a call returned is written again by a later step once nobody
    holds it. Threads may share a sampler: ``sample`` goes by the schedule that it made itself,
    everything else by the one that was made last, by whichever thread.

    Args:
        model: a LatentDiffusion, or what has its ``num_timesteps``, ``alphas_cumprod`` and
            ``apply_model(x, t, c)``. Masks want its ``q_sample(x0, t)``, ``quantize_x0`` its
            ``first_stage_model.quantize``, and ``parameterization == "v"`` its
            ``sqrt_alphas_cumprod`` and ``sqrt_one_minus_alphas_cumprod``.
        schedule, device: read no more than in the originals, or not needed.

    Attributes:
        ddim_timesteps, ddim_alphas, ddim_alphas_prev, ddim_sigmas, ddim_sqrt_one_minus_alphas:
            as ``make_schedule`` of the original leaves them; what is changed in them later
            changes no step.
    """

    ddim_timesteps: npt.NDArray[np.int64]

    def __init__(self, model: Any, schedule: str = "linear", device: Any = None) -> None:
        self.model = model
        self.schedule = schedule
        self.ddpm_num_timesteps = whole("model.num_timesteps", model.num_timesteps, low=1)
        parameterization = getattr(model, "parameterization", "eps")
        if parameterization not in PREDICTIONS:
            raise ValueError(
                f'model.parameterization must be "eps" or "v", got {parameterization!r}, whose '
                f"output the original reads as ε"
            )
        self._prediction: Prediction = PREDICTIONS[parameterization]
        self._schedule: _Schedule | None = None
        self._own_memory: _Own | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies of a sampler have memory of their own."""
        return self.__dict__ | {"_own_memory": None}

    @property
    def _own(self) -> _Own:
        if self._own_memory is None:
            with _making:
                self._own_memory = self._own_memory or _Own()
        return self._own_memory

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: str = "uniform",
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        """Chooses the timesteps of ``p_sample_ddim``, ``stochastic_encode`` and ``decode``.

            uniform: range(0, T, T // S) + 1        quad: int(linspace(0, √(0.8·T), S)²) + 1

        as the original has them: one too high, and for some S more than S of them (500 for 400
        of 1000). The last step goes to ᾱ_0, and adds noise where η > 0.

        Raises:
            TypeError, ValueError: naming the argument, the value and what is allowed. Where the
                timesteps run past T − 1, the nearest S that work; where the original would give
                NaN for a large η, the largest that works.
        """
        check_untransformed("make_schedule")
        T, eta = self.ddpm_num_timesteps, finite("ddim_eta", ddim_eta)
        if eta < 0:
            raise ValueError(f"ddim_eta must be ≥ 0, got {eta:g}")
        steps = _timesteps(ddim_num_steps, ddim_discretize, T)
        abar = self.model.alphas_cumprod.detach()
        if abar.shape != (T,):
            raise ValueError(
                f"model.alphas_cumprod must have shape ({T},), model.num_timesteps, "
                f"got {tuple(abar.shape)}"
            )
        device, abar = abar.device, abar.cpu()
        alphas = abar[torch.from_numpy(steps)]
        # As numpy and PyTorch share the work there: in float64, unless there is but one step, and
        # but for this reciprocal.
        alphas_prev = np.array([float(abar[0]), *alphas[:-1].tolist()])
        alphas_prev = alphas_prev if len(steps) > 1 else abar[:1].numpy()
        rest = (1 - alphas).reciprocal().numpy().astype(alphas_prev.dtype)
        ratio = alphas.numpy().astype(alphas_prev.dtype) / alphas_prev
        sigmas = torch.from_numpy(np.sqrt((1 - alphas_prev) * rest * (1 - ratio)))
        one_minus = torch.from_numpy(np.sqrt((1 - alphas).numpy()))

        def float32(tensor: Tensor) -> Tensor:
            return tensor.detach().float().to(device)

        at, at_prev = float32(alphas), float32(torch.from_numpy(alphas_prev))

        def factors(eta: float) -> tuple[Tensor, Tensor]:
            c1 = float32(eta * sigmas)
            return c1, (1 - at_prev - c1**2).sqrt()

        c1, c2 = checked_factors(factors, eta, f"these {len(steps)} steps")
        a_t, b_t, a_s = at.sqrt(), float32(one_minus), at_prev.sqrt()
        zero, one = torch.zeros_like(at), torch.ones_like(at)
        forward = pack_rows(one, zero, a_t, zero, b_t)
        if self._prediction == "v":
            levels = torch.from_numpy(steps).to(device)
            a_t = float32(self.model.sqrt_alphas_cumprod)[levels]
            b_t = float32(self.model.sqrt_one_minus_alphas_cumprod)[levels]
        self._own.made = self._schedule = _Schedule(
            steps,
            eta,
            pack_rows(a_t, b_t, a_s, c1, c2),
            torch.arange(len(steps), dtype=torch.int32, device=device),
            pack_rows(a_t, b_t, zero, zero, one),
            pack_rows(one, zero, a_s, one, c2),
            forward,
        )
        self.ddim_timesteps = steps
        self.ddim_alphas, self.ddim_alphas_prev = alphas.to(device), alphas_prev
        self.ddim_sigmas = eta * sigmas
        self.ddim_sqrt_one_minus_alphas = one_minus.to(device)

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
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """x_T → samples, through ``make_schedule`` and ``ddim_sampling``.

        Args:
            S: DDIM steps, always uniform.
            batch_size, shape: of the samples: (batch_size, *shape).
            conditioning: what ``apply_model`` gets: a tensor, or lists and mappings of them.
            callback: ``callback(i)`` after step i; ``img_callback(x0, i)`` with the predicted x0.
            normals_sequence: refused, as the original reads none.
            quantize_x0: each x0 goes through ``first_stage_model.quantize``.
            eta: η ≥ 0.
            mask, x0: before each step what ``mask`` covers (1) is ``x0`` at that step's level.
            temperature: scales the noise; ``noise_dropout`` is the share of it left out, the rest
                scaled up (``torch.nn.functional.dropout``).
            score_corrector: its ``modify_score(model, ε, x, t, c, **corrector_kwargs)`` stands in
                ε's place.
            x_T: float32, bfloat16 or float16; drawn if not given. Never written.
            log_every_t: the states whose index counted from the end is a multiple of it are kept,
                and the first.
            unconditional_guidance_scale: w in u + w·(c − u) where there is an
                ``unconditional_conditioning``, of the same form as ``conditioning``; then the
                model is asked once for both, without the condition first.
            ignored: ``quantize_denoised`` (their own callers pass it, and it is not read).

        Returns:
            (samples, {"x_inter": states, "pred_x0": predicted x0}), both lists beginning with x_T.

        Raises:
            TypeError, ValueError: naming the argument, the value and what is allowed.
        """
        unknown = sorted(ignored.keys() - {"quantize_denoised"})
        if unknown:
            raise TypeError(f"{unknown[0]} must be left out: sample knows no such argument")
        if normals_sequence is not None:
            raise ValueError(
                f"normals_sequence must be None, got {kind(normals_sequence)}: the original takes "
                f"one and draws its own normals"
            )
        batch = whole("batch_size", batch_size, low=1)
        size = (batch, *(whole(f"shape[{i}]", n, low=1) for i, n in enumerate(shape)))
        self.make_schedule(S, ddim_eta=eta, verbose=verbose)
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
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """``sample`` on the schedule there is, to the shape (batch, ...).

        ``timesteps``: about so many of the first ones, one fewer, as the original counts.
        """
        schedule = self._made()
        given = {
            "quantize_denoised": quantize_denoised,
            "temperature": temperature,
            "noise_dropout": noise_dropout,
            "score_corrector": score_corrector,
            "corrector_kwargs": corrector_kwargs,
            "unconditional_guidance_scale": unconditional_guidance_scale,
            "unconditional_conditioning": unconditional_conditioning,
        }
        self._checked_step(temperature, noise_dropout, score_corrector, ddim_use_original_steps)
        for name, function in (("callback", callback), ("img_callback", img_callback)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be callable, got {kind(function)}")
        every = whole("log_every_t", log_every_t, low=1)
        device = schedule.table.device
        x = _randn(tuple(shape), device) if x_T is None else _state("x_T", x_T)
        if x.shape != tuple(shape):
            raise ValueError(f"x_T must have shape {tuple(shape)}, got {tuple(x.shape)}")
        if mask is not None:
            _check_mask(mask, x0, x)
        steps = schedule.steps
        if timesteps is not None:
            share = min(whole("timesteps", timesteps, low=1) / len(steps), 1)
            steps = steps[: int(share * len(steps)) - 1]
        kept = {"x_inter": [x], "pred_x0": [x]}
        with self._running(schedule):
            for i, index in enumerate(reversed(range(len(steps)))):
                t = torch.full((len(x),), int(steps[index]), device=x.device)
                if mask is not None:
                    x = self.model.q_sample(x0, t) * mask + (1.0 - mask) * x
                x, pred_x0 = self.p_sample_ddim(x, cond, t, index, **given)
                if callback is not None:
                    callback(i)
                if img_callback is not None:
                    img_callback(pred_x0, i)
                if index % every == 0 or i == 0:
                    kept["x_inter"].append(x)
                    kept["pred_x0"].append(pred_x0)
        return x, kept

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
    ) -> tuple[Tensor, Tensor]:
        """(x_s, x0) of the step ``index`` of the schedule, 0 being the last.

            x0  = (x_t − √(1−ᾱ_t)·ε) / √ᾱ_t
            x_s = √ᾱ_s·x0 + √(1−ᾱ_s−σ²)·ε + σ·z·temperature

        Args:
            x: x_t, (batch, ...), float32, bfloat16 or float16; never written.
            t: the level the model is told, int64 (batch,).
            repeat_noise: z is one sample's for all.

        All other arguments are those of ``sample``.
        """
        schedule = self._made()
        table = schedule.table
        self._checked_step(temperature, noise_dropout, score_corrector, use_original_steps)
        row = schedule.rows[whole("index", index, low=0, high=len(table) - 1)]
        w: float | None = finite("unconditional_guidance_scale", unconditional_guidance_scale)
        _state("x", x)
        if unconditional_conditioning is None or w == 1:
            output, w = self.model.apply_model(x, t, c), None
        else:
            both = stack("unconditional_conditioning", unconditional_conditioning, c, len(x))
            output = self.model.apply_model(torch.cat([x, x]), torch.cat([t, t]), both)
        x_t, x = x, x.float()

        own = self._own
        eta, between = schedule.eta, own.between.stepped
        if score_corrector is not None:
            _check_output(output, x, w is not None)
            eps, _ = between(schedule.to_halves, x, output, row, guidance=w, want_x0=False)
            keywords = corrector_kwargs or {}
            output = score_corrector.modify_score(self.model, eps, x_t, t, c, **keywords)
            w = None
        _check_output(output, x, w is not None)
        prediction = self._prediction
        scaled = noise_dropout > 0 or (eta > 0 and temperature != 1)
        if not scaled and not quantize_denoised:
            z = _drawn(x, repeat_noise, eta > 0)
            x_s, x0 = own.stepped(table, x, output, row, prediction=prediction, noise=z, guidance=w)
            assert x0 is not None
        else:
            eps, x0 = between(schedule.to_halves, x, output, row, prediction=prediction, guidance=w)
            assert x0 is not None
            if quantize_denoised:
                x0, *_ = self.model.first_stage_model.quantize(x0)
            z = _drawn(x, repeat_noise, eta > 0 or scaled)
            if z is not None:
                z.mul_(table[index, C1]).mul_(temperature)
                if noise_dropout > 0:
                    z = torch.nn.functional.dropout(z, noise_dropout)
            _check_output(eps, x0, False)
            x_s, _ = own.stepped(schedule.from_halves, x0, eps, row, noise=z, want_x0=False)
        return x_s, x0

    @torch.no_grad()
    def stochastic_encode(
        self,
        x0: Tensor,
        t: Tensor,
        use_original_steps: bool = False,
        noise: Tensor | None = None,
    ) -> Tensor:
        """√ᾱ·x0 + √(1−ᾱ)·ε at the timesteps of index t, int64 (batch,), for ``decode``.

        ``use_original_steps``: t are the model's own timesteps. ``noise``: ε, of x0's shape.
        """
        schedule = self._made()
        _state("x0", x0)
        if use_original_steps:
            abar = self.model.alphas_cumprod.detach().cpu()
            a, b = (torch.from_numpy(np.sqrt(level.numpy())) for level in (abar, 1 - abar))
            zero, one = torch.zeros_like(a), torch.ones_like(a)
            table = pack_rows(one, zero, a, zero, b).to(x0.device, torch.float32)
        else:
            table = schedule.forward
        if not isinstance(t, Tensor) or t.shape != x0.shape[:1] or t.is_floating_point():
            got = f"{t.dtype} {tuple(t.shape)}" if isinstance(t, Tensor) else kind(t)
            raise ValueError(f"t must be integers of shape ({len(x0)},), an index each, got {got}")
        if not bool(((t >= 0) & (t < len(table))).all()):
            raise ValueError(
                f"t must lie in [0, {len(table) - 1}], got {int(t.min())} to {int(t.max())}"
            )
        eps = torch.randn_like(x0) if noise is None else _state("noise", noise)
        if eps.shape != x0.shape:
            raise ValueError(
                f"noise must have x0's shape, {tuple(x0.shape)}, got {tuple(eps.shape)}"
            )
        # Forward from clean data is a step from there, the noise standing for ε.
        rows = t.to(torch.int32)
        x_t, _ = Buffers().stepped(table, x0.float(), eps.float(), rows, want_x0=False)
        return x_t

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
        """The last ``t_start`` steps of the schedule, from ``x_latent`` to data."""
        schedule = self._made()
        self._checked_step(1.0, 0.0, None, use_original_steps)
        x = _state("x_latent", x_latent)
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

    def _made(self) -> _Schedule:
        schedule = self._own.running or self._schedule
        if schedule is None:
            raise ValueError("call make_schedule first: no timesteps are chosen")
        return schedule

    @contextmanager
    def _running(self, schedule: _Schedule | None) -> Iterator[None]:
        """Within, this thread's steps are those of ``schedule``. Its buffers go at the end."""
        own = self._own
        before, own.running = own.running, schedule
        try:
            yield
        finally:
            own.running = before
            own.clear()

    def _checked_step(
        self, temperature: float, noise_dropout: float, score_corrector: Any, original: bool
    ) -> None:
        if original:
            raise ValueError(
                "use_original_steps must be False, got True: the original has no factors for it, "
                "and fails"
            )
        finite("temperature", temperature)
        if not 0 <= finite("noise_dropout", noise_dropout) <= 1:
            raise ValueError(f"noise_dropout must lie in [0, 1], got {noise_dropout:g}")
        if score_corrector is not None and self._prediction != "epsilon":
            raise ValueError("score_corrector must be None for a v model, as in the original")


_making = threading.Lock()
"""Held while a sampler gets its memory, of which two threads must not make one each."""


def _randn(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Drawn in torch's default dtype, as the original does; float64 is rounded to float32."""
    x = torch.randn(shape, device=device)
    return x if x.dtype in OUTPUTS else x.float()


def _drawn(x: Tensor, repeat: bool, noisy: bool) -> Tensor | None:
    """z, drawn in torch's default dtype, as the original does, in float32.

    None, with the generator moved as if it were drawn, where it has no effect.
    """
    z = torch.empty((1 if repeat else len(x), *x.shape[1:]), device=x.device)
    if not noisy:
        passed_over(z)()
        return None
    z = z.normal_().float()
    return z.repeat(len(x), *[1] * (x.dim() - 1)) if repeat else z


def _timesteps(S: int, discretize: str, T: int) -> npt.NDArray[np.int64]:
    """The original's, found to be levels of the model."""

    def chosen(S: int) -> npt.NDArray[np.int64]:
        if discretize == "uniform":
            return np.arange(0, T, T // S) + 1
        return (np.linspace(0, np.sqrt(T * 0.8), S) ** 2).astype(np.int64) + 1

    S = whole("S (ddim_num_steps)", S, low=1, high=T)
    if discretize not in ("uniform", "quad"):
        raise ValueError(f'ddim_discretize must be "uniform" or "quad", got {shown(discretize)}')
    steps = chosen(S)
    if steps[-1] < T:
        return steps
    works = [n for n in range(1, T + 1) if chosen(n)[-1] < T]
    near = [*[n for n in works if n < S][-1:], *[n for n in works if n > S][:1]]
    raise ValueError(
        f"S (ddim_num_steps) must have timesteps up to {T - 1}, got {S}, which has {steps[-1]} "
        f"among them: near it {' and '.join(map(str, near)) or 'nothing'} will do"
    )


def _state(name: str, x: Any) -> Tensor:
    if not isinstance(x, Tensor) or x.dtype not in OUTPUTS or x.dim() == 0:
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else kind(x)
        raise TypeError(f"{name} must be float32, bfloat16 or float16 (batch, ...), got {got}")
    return x


def _check_output(output: Any, x: Tensor, guided: bool) -> None:
    """That what the model returned has x's shape, with guidance of twice the batch."""
    if not guided and isinstance(output, Tensor) and output.shape == x.shape:
        return  # as nearly always
    want = ((2 if guided else 1) * x.shape[0], *x.shape[1:])
    if isinstance(output, Tensor) and output.shape != want:
        allowed, described = shapes(want)
        if output.shape not in allowed:
            raise ValueError(
                f"model.apply_model must return a tensor of {described}, got {tuple(output.shape)}"
            )


def _check_mask(mask: Any, x0: Any, x: Tensor) -> None:
    """That both are there, and of x's shape or what stretches to it."""
    for name, tensor in (("mask", mask), ("x0", x0)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor where there is a mask, got {kind(tensor)}")
        try:
            fits = torch.broadcast_shapes(tensor.shape, x.shape) == x.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"{name} must have shape {tuple(x.shape)} or stretch to it, "
                f"got {tuple(tensor.shape)}"
            )
