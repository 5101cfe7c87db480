"""The strict strategy: each step goes to the next chosen timestep, with factors of float64."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fastddim.check import kind, shown, whole
from fastddim.coefficients import make_table, pack
from fastddim.dropins._compiled import Kind
from fastddim.dropins._scheduler import NAMES, like
from fastddim.dropins._shared import C1, Buffers
from fastddim.dropins._tables import CPU, Chosen, Made, Tables, with_nan
from fastddim.dropins._transfer import sent
from fastddim.dropins.diffusers import compiled
from fastddim.dropins.diffusers.base import BATCH, Base, Generators, batch_fits, has_grad, of_each
from fastddim.levels import Levels
from fastddim.loop.options import checked_seeds
from fastddim.schedule import NoiseSchedule
from fastddim.step.arguments import OUTPUTS, check_untransformed, transformed
from fastddim.step.buffers import Shadows
from fastddim.timesteps import Pair, make_pairs

NEARLY_ZERO = 2.0**-24
"""The ᾱ_T of an ε model whose schedule ends at 0: there, x_t = ε does not determine x0. diffusers'
own Euler and DDPM schedulers use this value too."""

_SHADOWS = Shadows()
"""The float32 states of half precision samples that strict steps have returned."""


class Strict:
    """Steps along the chosen timesteps, and refuses arguments that it cannot honour."""

    def begin(self, scheduler: Base) -> None:
        config = scheduler.config
        if config.prediction_type not in NAMES:
            raise ValueError(
                f"prediction_type must be one of {', '.join(NAMES)}, got {config.prediction_type!r}"
            )
        if config.timestep_spacing not in ("leading", "trailing", "linspace"):
            raise ValueError(
                f"timestep_spacing must be leading, trailing or linspace, "
                f"got {config.timestep_spacing!r}"
            )
        if not scheduler.alphas_cumprod.is_meta:
            _make_finite(scheduler.alphas_cumprod, config)

    def checked_seeds(self, seeds: Sequence[int] | Tensor | None) -> Tensor | None:
        return None if seeds is None else checked_seeds(seeds, len(seeds))

    def set_timesteps(
        self,
        scheduler: Base,
        num_inference_steps: int | None,
        device: str | torch.device | None,
        timesteps: Sequence[int] | Tensor | None,
    ) -> None:
        T = len(scheduler.alphas_cumprod)
        if timesteps is None:
            steps = whole("num_inference_steps", num_inference_steps, 1, T)
            levels = _timesteps(scheduler.config, steps, T)
            ordered = levels if scheduler._upwards else levels[::-1]
        else:
            if num_inference_steps is not None:
                raise ValueError(
                    f"num_inference_steps must be left out with timesteps, got "
                    f"{shown(num_inference_steps)}"
                )
            ordered = _given(timesteps, T, scheduler._upwards)
        scheduler.num_inference_steps = len(ordered)
        scheduler.timesteps = torch.tensor(ordered, device=CPU if device is None else device)

    def step(
        self,
        scheduler: Base,
        output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float,
        rederive: bool,
        generator: Generators,
        noise: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Returns (x_s, x0) in sample's dtype; the state stays float32 from step to step."""
        if eta > 0 and noise is not None and generator is not None:
            raise ValueError("noise has one source, got generator and variance_noise")
        given = scheduler, output, timestep, sample, eta, rederive, generator, noise
        if not torch.compiler.is_compiling():
            return _stepped(*given)
        # The float32 state of a half precision sample is found by the identity of the tensor.
        found = None
        if sample.dtype == torch.float32 and generator is None:
            seeds = None if scheduler._upwards else scheduler._seeds
            _check_step(scheduler, output, sample, eta, noise, seeds)
            args = scheduler, output, timestep, sample, eta, rederive, noise
            found = compiled.strict_step(*args)
        return cast(tuple[Tensor, Tensor], _untraced(*given)) if found is None else found

    def tables(
        self, scheduler: Base, kind: Kind, device: torch.device, dtype: torch.dtype
    ) -> Tables:
        return tables_of(scheduler, 0.0 if kind == BATCH else float(kind), device)

    def batch_step(
        self,
        scheduler: Base,
        output: Tensor,
        timesteps: Tensor,
        sample: Tensor,
        eta: float,
        rederive: bool,
    ) -> Tensor:
        if not batch_fits(scheduler, output, timesteps, sample, eta):
            raise ValueError(
                "batch_step_no_noise needs float32 samples of model_output's shape, a timestep "
                "for each of them and eta = 0, outside of torch.func and forward-mode "
                "differentiation"
            )
        if torch.compiler.is_compiling():
            found = compiled.batch_step(scheduler, output, timesteps, sample, rederive)
            assert found is not None
            return found
        tables = tables_of(scheduler, 0.0, sample.device)
        rows = tables.rows_at(sent(timesteps, sample.device))
        x_s, _ = scheduler._stepped(
            Buffers(), tables, sample, output, rows, rederive=rederive, want_x0=False
        )
        return x_s

    def previous_timestep(self, scheduler: Base, timestep: int | Tensor) -> int:
        chosen = scheduler._chosen()
        place = _place(scheduler, timestep, chosen)
        if isinstance(place, Tensor):
            place = _place(scheduler, int(timestep), chosen)
        return cast(int, _pairs(scheduler, chosen)[cast(int, place)][1])

    def variance(self, scheduler: Base, timestep: int | Tensor, prev_timestep: Any) -> Tensor:
        if scheduler.num_inference_steps is None:
            found = scheduler._parent._get_variance(scheduler, timestep, prev_timestep)
            return cast(Tensor, found)
        if prev_timestep is None:
            prev_timestep = self.previous_timestep(scheduler, timestep)
        t, s = int(timestep), max(int(prev_timestep), -1)
        schedule, end = _levels(scheduler)
        pairs = _pairs(scheduler, scheduler._chosen())
        if (t, s) not in pairs:
            allowed = sorted({there for here, there in pairs if here == t})
            if not allowed:
                raise ValueError(
                    f"timestep must be one of the {len(pairs)} chosen by set_timesteps, got {t}"
                )
            raise ValueError(
                f"prev_timestep must be {' or '.join(map(str, allowed))}, where the strict step "
                f"from {t} goes (previous_timestep says so), got {s}"
            )
        table = make_table(schedule, [(t, s)], 1.0, end).astype(np.float64)
        device = scheduler._abar().device
        return torch.tensor(table[0, C1] ** 2, dtype=torch.float32, device=device)

    def variances(self, scheduler: Base, t: Tensor, prev_t: Tensor) -> Tensor:
        if scheduler.num_inference_steps is None:
            return cast(Tensor, scheduler._parent._batch_get_variance(scheduler, t, prev_t))
        pairs = zip(t.tolist(), prev_t.tolist(), strict=True)
        return torch.stack([self.variance(scheduler, *pair) for pair in pairs])


def tables_of(
    scheduler: Base, eta: float, device: torch.device, read: Chosen | None = None
) -> Tables:
    """Returns the tables of the steps from each chosen timestep to the next, by ``make_table``."""
    chosen = scheduler._chosen() if read is None else read
    prediction = scheduler.config.prediction_type

    given = ("strict", eta), device, scheduler._abar(), scheduler._end(), (chosen, prediction)
    found = scheduler._cache.found(*given)
    if found is not None:
        return found
    schedule, end = _levels(scheduler)
    pairs = _pairs(scheduler, chosen)
    table = with_nan(torch.from_numpy(make_table(schedule, pairs, eta, end)))
    row_of = torch.full((len(schedule) + 1,), len(pairs), dtype=torch.int32, device=CPU)
    for t, place in chosen.place.items():
        row_of[t] = place
    to_eps = None
    if scheduler._upwards and prediction != "epsilon":
        # The model is called with the timestep where the step ends, and its output belongs to it.
        abar_s = schedule.alphas_cumprod[chosen.levels]
        zeros, ones = np.zeros_like(abar_s), np.ones_like(abar_s)
        to_eps = with_nan(torch.from_numpy(pack(Levels.of_abar(abar_s), zeros, zeros, ones)))
    return scheduler._cache.keep(*given, Made(table, row_of, to_eps))


def _stepped(
    scheduler: Base,
    output: Tensor,
    timestep: Any,
    sample: Tensor,
    eta: float,
    rederive: bool,
    generator: Generators,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    # The inverse scheduler adds no noise, and therefore ignores seeds.
    seeds = None if scheduler._upwards else scheduler._seeds
    _check_step(scheduler, output, sample, eta, noise, seeds)
    chosen = scheduler._chosen()
    tables = tables_of(scheduler, float(eta), sample.device, chosen)
    place: int | Tensor
    if of_each(timestep, sample):
        place = _checked_each(timestep, chosen)
    else:
        place = _place(scheduler, timestep, chosen)
    # PyTorch turns an index of no dimensions into a number, a host sync: give it one dimension.
    rows = place
    if isinstance(place, Tensor):
        t = sent(place.view(-1), sample.device)
        rows = tables.rows_at(t).expand(len(sample))
    half = None if sample.dtype == torch.float32 else torch.empty_like(sample)
    x = sample if half is None else _SHADOWS.state_of(sample)
    if eta and noise is None and seeds is None:
        noise = scheduler._drawn(x, generator)
    if seeds is not None and seeds.device != sample.device:
        moved = sent(seeds, sample.device)
        if scheduler._seeds is seeds:  # Another thread may have set other seeds.
            scheduler._seeds = moved
        seeds = moved
    own = scheduler._own
    if tables.to_eps is not None:
        prediction = NAMES[scheduler.config.prediction_type]
        output, _ = own.between.stepped(
            tables.to_eps, x, output, rows, prediction=prediction, want_x0=False, checked=True
        )
    x_s, x0 = scheduler._stepped(
        own,
        tables,
        x,
        output,
        rows,
        rederive=rederive,
        seeds=None if noise is not None else seeds,
        noise=None if noise is None or not eta else noise.float(),
        next_input=half,
    )
    assert x0 is not None
    last = place == len(chosen.levels) - 1 if isinstance(place, int) else False
    if last:
        own.clear()
    if half is None:
        return x_s, x0
    if not last:
        _SHADOWS.put(half, x_s)
    return half, x0.to(half)


_untraced: Any = torch.compiler.disable(_stepped)
"""The step behind a graph break: torch.compile does not trace this call."""


def _check_step(
    scheduler: Base,
    output: Tensor,
    sample: Tensor,
    eta: float,
    noise: Tensor | None,
    seeds: Tensor | None,
) -> None:
    """Refuses arguments that a step cannot take."""
    if (
        scheduler.num_inference_steps is not None
        and seeds is None
        and noise is None
        and isinstance(sample, Tensor)
        and sample.dtype in OUTPUTS
        and isinstance(output, Tensor)
        and output.dtype in OUTPUTS
        and output.shape == sample.shape
        and output.device == sample.device
        and sample.dim() > 1
        and not torch.is_grad_enabled()
        and not transformed()
    ):
        return  # The common case: skip the checks below.
    if scheduler.num_inference_steps is None:
        raise ValueError("call set_timesteps before step: no timesteps are chosen")
    check_untransformed("step with strict=True")
    for name, tensor in (("model_output", output), ("sample", sample)):
        if not isinstance(tensor, Tensor) or tensor.dtype not in OUTPUTS:
            got = tensor.dtype if isinstance(tensor, Tensor) else kind(tensor)
            raise TypeError(f"{name} must be float32, bfloat16 or float16, got {got}")
        if has_grad(tensor):
            raise ValueError(f"{name} requires grad, which strict does not carry: detach it")
        if tensor.device != sample.device:
            raise ValueError(f"{name} must be on {sample.device} with sample, got {tensor.device}")
    if sample.dim() < 2:
        raise ValueError(f"sample must have shape (batch, ...), got {tuple(sample.shape)}")
    if output.shape != sample.shape:
        raise ValueError(
            f"model_output must have sample's shape, {tuple(sample.shape)}, "
            f"got {tuple(output.shape)}"
        )
    if seeds is not None and len(seeds) != len(sample):
        raise ValueError(
            f"sample must have one image for each of the {len(seeds)} seeds in use, "
            f"got {len(sample)}"
        )
    if noise is not None and not like(noise, sample, getattr(noise, "dtype", None)):
        is_one = isinstance(noise, Tensor)
        raise ValueError(
            f"variance_noise must have sample's shape and device, {tuple(sample.shape)} on "
            f"{sample.device}, got "
            + (f"{tuple(noise.shape)} on {noise.device}" if is_one else kind(noise))
        )
    if torch.is_grad_enabled():
        ends = scheduler._ends, scheduler._end()
        abar = "alphas_cumprod", scheduler.alphas_cumprod
        for name, value in (abar, ends, ("variance_noise", noise), ("eta", eta)):
            if isinstance(value, Tensor) and value.requires_grad:
                raise ValueError(f"{name} requires grad, which strict does not carry: detach it")


def _place(scheduler: Base, timestep: Any, chosen: Chosen) -> int | Tensor:
    """Returns the position of ``timestep``, or the timestep if only the device knows it."""
    t = scheduler._row(timestep)
    if isinstance(t, Tensor):
        position = chosen.position(t)
        return t if position is None else position
    place = None if t is None else chosen.place.get(t)
    if place is not None:
        return place
    times = 0 if t is None else chosen.levels.count(t)
    if not times:
        raise ValueError(
            f"timestep must be one of the {len(chosen.levels)} chosen by set_timesteps, "
            f"got {timestep}"
        )
    position = chosen.position(timestep)
    if position is None or chosen.levels[position] != t:
        raise ValueError(
            f"timestep must be an element of scheduler.timesteps itself if the list has it "
            f"more than once, got {t}, which is there {times} times"
        )
    return position


def _checked_each(timesteps: Tensor, chosen: Chosen) -> Tensor:
    """Returns a batch's timesteps; where the host knows them, refuses those that name no step."""
    if timesteps.is_cpu:
        for t in timesteps.tolist():
            if t not in chosen.place:
                raise ValueError(
                    f"timestep must hold values that set_timesteps has chosen, and once each, "
                    f"got {t}, which is there {chosen.levels.count(t)} times"
                )
    return timesteps


def _levels(scheduler: Base) -> tuple[NoiseSchedule, float]:
    """Returns ᾱ as a float64 schedule, and ᾱ at the end of the last step.

    ᾱ comes from ``alphas_cumprod``. If that is the float32 product of ``betas``, which is rounded
    at every factor, the product is computed again in float64.
    """
    abar, betas, end = scheduler._abar(), scheduler.betas, scheduler._end()
    if abar.is_meta:  # The scheduler was made under torch.device("meta").
        made_as: Any = type(scheduler)
        with CPU:
            again = made_as.from_config(scheduler.config)
        abar, betas, end = again.alphas_cumprod, again.betas, again._end()
    end = float(end)
    given = abar.detach().cpu()
    found = given.double().numpy().copy()
    if betas.shape == given.shape:
        made = torch.cumprod(1.0 - betas.detach(), dim=0).cpu()
        _make_finite(made, scheduler.config)
        if torch.equal(made.to(given.dtype), given):
            found = np.cumprod(1 - betas.detach().cpu().double().numpy())
    _make_finite(found, scheduler.config)
    if not 0 < end <= 1:
        raise ValueError(f"{scheduler._ends} must lie in (0, 1], got {end:g}")
    return NoiseSchedule.from_alphas_cumprod(found), (
        float(found[0]) if end == float(given[0]) else end
    )


def _pairs(scheduler: Base, chosen: Chosen) -> list[Pair]:
    """Returns the (t, s) of each step in order; −1 stands for data."""
    levels, T = chosen.levels, len(scheduler.alphas_cumprod)
    for t in levels:
        if not 0 <= t < T:
            raise ValueError(f"timesteps must lie in [0, {T - 1}], got {t}")
    if scheduler._upwards:
        return list(zip([-1, *levels[:-1]], levels, strict=True))
    return list(zip(levels, [*levels[1:], -1], strict=True))


def _given(timesteps: Any, T: int, upwards: bool) -> list[int]:
    """Returns the timesteps of a caller, which must fall, or rise where the loop runs upwards."""
    values = timesteps.tolist() if hasattr(timesteps, "tolist") else timesteps
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ValueError(f"timesteps must be one or more integers, got {shown(timesteps)}")
    found = [whole(f"timesteps[{i}]", t, 0, T - 1) for i, t in enumerate(values)]
    for before, after in pairwise(found):
        if (before >= after) if upwards else (before <= after):
            order = "rise" if upwards else "fall"
            raise ValueError(f"timesteps must strictly {order}, got {before} before {after}")
    return found


def _make_finite(levels: Any, config: Any) -> None:
    """Replaces an ε model's ᾱ_T in place if it is 0; see ``NEARLY_ZERO``."""
    if config.prediction_type == "epsilon" and len(levels) > 1 and levels[-1] <= 0:
        levels[-1] = min(NEARLY_ZERO, float(levels[-2]) / 2)


def _timesteps(config: Any, steps: int, T: int) -> list[int]:
    """Returns exactly S distinct timesteps, rising.

    ``steps_offset`` shifts those of "leading", but never beyond the schedule's last timestep.
    """
    chosen = sorted(t for t, _ in make_pairs(config.timestep_spacing, steps, T))
    if config.timestep_spacing == "leading":
        offset = min(config.steps_offset, T - 1 - chosen[-1])
        chosen = [t + offset for t in chosen]
    return chosen
