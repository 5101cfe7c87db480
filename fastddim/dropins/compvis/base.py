"""CompVis' samplers share the model, the schedule, each thread's memory, and the loop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastddim.check import finite, kind, whole
from fastddim.coefficients import Prediction
from fastddim.dropins._shared import Own, passed_over
from fastddim.dropins.compvis.checks import check_mask, check_output, check_state
from fastddim.dropins.compvis.forks import BUFFERS, original_sigmas
from fastddim.dropins.compvis.schedule import Schedule, make_schedule
from fastddim.loop.model import stack
from fastddim.step.arguments import OUTPUTS, check_untransformed

PREDICTIONS: dict[str, Prediction] = {"eps": "epsilon", "v": "v"}

Kept: TypeAlias = dict[str, list[Tensor]]

_NONE: Mapping[str, Any] = {}


class OwnMemory(Own):
    """Holds one thread's buffers and schedules."""

    made: Schedule | None = None
    """The schedule that this thread made last."""
    running: Schedule | None = None
    """The schedule of the loop that this thread runs. The loop keeps it to the end."""


class Sampler:
    """Holds the model, the schedule and the buffers, and runs the loop of a sampler's steps."""

    _predictions = PREDICTIONS
    """The parameterizations of models that the sampler takes."""

    _stacked = True
    """Whether guidance calls the model once, on both conditions stacked."""

    ddim_timesteps: npt.NDArray[np.int64]

    def __init__(self, model: Any, schedule: str = "linear", device: Any = None) -> None:
        if not hasattr(model, "num_timesteps"):
            raise TypeError(
                f"model must be a LatentDiffusion, got {kind(model)}, which has no num_timesteps"
            )
        self.model = model
        self.schedule = schedule
        self.ddpm_num_timesteps = whole("model.num_timesteps", model.num_timesteps, low=1)
        parameterization = getattr(model, "parameterization", "eps")
        if parameterization not in self._predictions:
            allowed = " or ".join(f'"{name}"' for name in self._predictions)
            raise ValueError(
                f"model.parameterization must be {allowed}, got {parameterization!r}, whose "
                f"output the original reads as ε"
            )
        self._prediction: Prediction = self._predictions[parameterization]
        self._schedule: Schedule | None = None
        self._own_memory: OwnMemory | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the buffers, so that a copy of the sampler makes its own."""
        return self.__dict__ | {"_own_memory": None}

    def __getattr__(self, name: str) -> Any:
        """Returns a table of the model that the original's sampler copies, made when it is read."""
        schedule = self.__dict__.get("_schedule")
        if schedule is not None:
            if name in BUFFERS:
                return BUFFERS[name](self.model)
            if name == "ddim_sigmas_for_original_num_steps":
                return original_sigmas(self.model, schedule.eta)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def _own(self) -> OwnMemory:
        if self._own_memory is None:
            with _making:
                self._own_memory = self._own_memory or OwnMemory()
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
            uniform_trailing: round(T − i·T/S) − 1

        These are the originals' timesteps: each of the first two is one too high, and some S give
        more than S of them (S = 400 of T = 1000 gives 500). ``uniform_trailing``, of DynamiCrafter,
        starts at T − 1. The last step goes to ᾱ_0, and adds noise if η > 0.

        Args:
            ddim_num_steps: S, in [1, T].
            ddim_discretize: ``"uniform"``, ``"uniform_trailing"`` or ``"quad"``.
            ddim_eta: η ≥ 0.
            verbose: ignored, because nothing is printed.

        Raises:
            TypeError, ValueError: naming the argument, the value and what is allowed. If a
                timestep lies outside [0, T − 1], the message names the nearest S that work; if the
                original would give NaN for this η, it names the largest η that works.
        """
        check_untransformed("make_schedule")
        T, eta = self.ddpm_num_timesteps, finite("ddim_eta", ddim_eta)
        if eta < 0:
            raise ValueError(f"ddim_eta must be ≥ 0, got {eta:g}")
        made = make_schedule(self.model, T, ddim_num_steps, ddim_discretize, eta, self._prediction)
        self._own.made = self._schedule = made
        self.ddim_timesteps = made.steps
        self.ddim_alphas, self.ddim_alphas_prev = made.alphas, made.alphas_prev
        self.ddim_sigmas = made.sigmas
        self.ddim_sqrt_one_minus_alphas = made.sqrt_one_minus
        if made.scale is not None:
            self.ddim_scale_arr = made.scale
            self.ddim_scale_arr_prev = torch.cat([made.scale[:1], made.scale[:-1]])

    def _loop(
        self,
        shape: Sequence[int],
        x_T: Tensor | None,
        timesteps: int | None,
        mask: Tensor | None,
        x0: Tensor | None,
        callback: Callable[[int], object] | None,
        img_callback: Callable[[Tensor, int], object] | None,
        log_every_t: int,
        step: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
        t_start: int | None = None,
        precision: int | None = None,
        clean_cond: bool = False,
    ) -> tuple[Tensor, Kept]:
        """Takes ``step(x, t, index)`` from x_T on, as the original's loops do."""
        schedule = self._made()
        for name, function in (("callback", callback), ("img_callback", img_callback)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be callable, got {kind(function)}")
        every = whole("log_every_t", log_every_t, low=1)
        device = schedule.table.device
        x = _randn(tuple(shape), device) if x_T is None else check_state("x_T", x_T)
        if x.shape != tuple(shape):
            raise ValueError(f"x_T must have shape {tuple(shape)}, got {tuple(x.shape)}")
        if mask is not None:
            check_mask(mask, x0, x)
        steps = taken(schedule, timesteps, t_start)
        if precision == 16:
            x = x.half()
        kept = {"x_inter": [x], "pred_x0": [x]}
        with self._running(schedule):
            for i, index in enumerate(reversed(range(len(steps)))):
                t = torch.full((len(x),), int(steps[index]), device=x.device)
                if mask is not None:
                    known: Any = x0 if clean_cond else self.model.q_sample(x0, t)
                    x = known * mask + (1.0 - mask) * x
                x, pred_x0 = step(x, t, index)
                if callback is not None:
                    callback(i)
                if img_callback is not None:
                    img_callback(pred_x0, i)
                if index % every == 0 or i == 0:
                    kept["x_inter"].append(x)
                    kept["pred_x0"].append(pred_x0)
        return x, kept

    def _called(
        self,
        x: Tensor,
        t: Tensor,
        c: Any,
        scale: float,
        unconditional: Any,
        more: Mapping[str, Any] = _NONE,
    ) -> tuple[Tensor, float | None]:
        """Returns the model's output, and w where it holds the outputs of both conditions.

        ``more`` holds further keywords of ``apply_model``.
        """
        w: float | None = finite("unconditional_guidance_scale", scale)
        check_state("x", x)
        if unconditional is None or w == 1:
            return self.model.apply_model(x, t, c, **more), None
        if not self._stacked:
            output = self.model.apply_model(x, t, c, **more)
            without = self.model.apply_model(x, t, unconditional, **more)
            for each in (output, without):
                check_output(each, x, False)
            return torch.cat([without, output]), w
        both = stack("unconditional_conditioning", unconditional, c, len(x))
        return self.model.apply_model(torch.cat([x, x]), torch.cat([t, t]), both, **more), w

    def _corrected(
        self,
        corrector: Any,
        keywords: Mapping[str, Any] | None,
        x: Tensor,
        output: Tensor,
        w: float | None,
        t: Tensor,
        c: Any,
    ) -> Tensor:
        """Returns ε: u + w·(c − u) of a guided output, as ``corrector`` changes it."""
        schedule, state = self._made(), x.float()
        check_output(output, state, w is not None)
        eps, _ = self._own.between.stepped(
            schedule.to_halves, state, output, schedule.rows[0], guidance=w, want_x0=False
        )
        if corrector is None:
            return eps
        found: Tensor = corrector.modify_score(self.model, eps, x, t, c, **(keywords or {}))
        return found

    def _made(self) -> Schedule:
        schedule = self._own.running or self._schedule
        if schedule is None:
            raise ValueError("call make_schedule first: no timesteps are chosen")
        return schedule

    @contextmanager
    def _running(self, schedule: Schedule | None) -> Iterator[None]:
        """Makes this thread's steps use ``schedule``, and frees its buffers at the end."""
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


def checked_size(
    batch_size: int, shape: Sequence[int], normals_sequence: Any, ignored: Mapping[str, Any]
) -> tuple[int, ...]:
    """Returns (batch, ...) of ``sample``'s arguments, and refuses those that it cannot honour."""
    unknown = sorted(ignored.keys() - {"quantize_denoised"})
    if unknown:
        raise TypeError(f"{unknown[0]} must be left out: sample knows no such argument")
    if normals_sequence is not None:
        raise ValueError(
            f"normals_sequence must be None, got {kind(normals_sequence)}: the original takes "
            f"one and draws its own normals"
        )
    batch = whole("batch_size", batch_size, low=1)
    return batch, *(whole(f"shape[{i}]", n, low=1) for i, n in enumerate(shape))


_making = threading.Lock()
"""Held while a sampler makes its buffers, so that two threads do not make them twice."""


def taken(schedule: Schedule, timesteps: int | None, t_start: int | None) -> npt.NDArray[np.int64]:
    """Returns the timesteps of a loop: the lowest of the schedule, without those that it skips."""
    steps = schedule.steps
    if timesteps is not None:
        share = min(whole("timesteps", timesteps, low=1) / len(steps), 1)
        steps = steps[: int(share * len(steps)) - 1]
    return steps if t_start is None else steps[: whole("t_start", t_start, low=-len(steps))]


def _randn(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Draws in torch's default dtype, as the original does, and rounds float64 to float32."""
    x = torch.randn(shape, device=device)
    return x if x.dtype in OUTPUTS else x.float()


def drawn(x: Tensor, repeat: bool, noisy: bool) -> Tensor | None:
    """Returns float32 z, drawn in torch's default dtype as the original draws it.

    Where z would have no effect, moves the generator as the draw would and returns None.
    """
    z = torch.empty((1 if repeat else len(x), *x.shape[1:]), device=x.device)
    if not noisy:
        passed_over(z)()
        return None
    z = z.normal_().float()
    return z.repeat(len(x), *[1] * (x.dim() - 1)) if repeat else z
