"""MONAI's ``DDIMScheduler``: its constructor and methods, on the fused step.

    from fastddim.dropins.monai import FastDDIMScheduler as DDIMScheduler

This line replaces ``from monai.networks.schedulers import DDIMScheduler``. The first use of the
class imports MONAI (1.4 or later), and raises ``ModuleNotFoundError`` where MONAI is missing.
"""

from __future__ import annotations

import importlib
import math
from typing import Any, cast

import torch
from torch import Tensor

from fastddim.dropins._scheduler import NAMES, Scheduler, levels_fit, like
from fastddim.dropins._shared import as_eager, pack_rows, rounds
from fastddim.dropins._tables import Made, Tables
from fastddim.dropins._transfer import sent
from fastddim.step.arguments import transformed

FastDDIMScheduler: Any
"""MONAI's class with the methods of ``FusedSteps``. ``__getattr__`` makes it at its first use."""

_INDICES = (torch.int64, torch.int32)
"""The dtypes of timesteps by which the original reads one ᾱ (uint8 would be a mask)."""

_PLAIN: tuple[Any, ...] = (Tensor, torch.nn.Parameter)
"""The classes of samples and outputs whose results are tensors of class ``Tensor``."""


class FusedSteps(Scheduler):
    """The methods of ``FastDDIMScheduler``, a subclass of ``monai``'s ``DDIMScheduler``.

    The subclass takes the original's arguments, and has its attributes. With k = T // S,
    σ = η·√((1−ᾱ_s)/(1−ᾱ_t)·(1 − ᾱ_t/ᾱ_s)) and x0 clamped to the clip bounds, the steps are

        step:           x_s = √ᾱ_s·x0 + √(1 − ᾱ_s − σ²)·ε + σ·z,   s = t − k
        reversed_step:  x_s = √ᾱ_s·x0 + √(1 − ᾱ_s)·ε,              s = t + k

    (Song et al. 2021, eq. 12 and 16), each in one pass over memory. The original's own float32
    operations make the factors, once for each ``set_timesteps`` and η. In float32, bfloat16 and
    float16 the results equal the original's, bit for bit on a CPU, and the generators end in the
    same states.

    The original's own step runs for clip bounds other than ±c, such as (0, 1), because the fused
    step clamps to ±c; for float64; for subclasses of ``Tensor`` such as
    MetaTensor; for samples and outputs of different dtypes or shapes; under autograd and in
    ``torch.compile``.

    Example::

        scheduler = FastDDIMScheduler(schedule="scaled_linear_beta", clip_sample=False)
        scheduler.set_timesteps(50)
        for t in scheduler.timesteps:
            x, x0 = scheduler.step(model(x, t), t, x)
    """

    num_train_timesteps: int
    num_inference_steps: int | None
    prediction_type: str
    clip_sample: bool
    clip_sample_values: list[float]

    _as_original = True
    """False if a subclass overrides ``_get_variance``: the original's step then calls it."""

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        original: Any = super()
        cls._as_original = getattr(cls, "_get_variance", None) is original._get_variance

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Chooses timesteps as the original does."""
        original: Any = super()
        original.set_timesteps(num_inference_steps, device)
        if self.timesteps.device.type not in ("cpu", "meta"):
            self._chosen()  # Read them now: in a step, the host would wait for the device.
        self._own.clear()

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns (x_s, x0) of the step t → t − T // S, as the original's ``step`` does.

        Elements of ``timesteps`` and numbers cause no host sync. Any other tensor on a GPU causes
        one, as in the original.
        """
        found = self._taken(model_output, timestep, sample, eta, generator, up=False)
        if found is not None:
            return found
        original: Any = super()
        return cast(
            tuple[Tensor, Tensor], original.step(model_output, timestep, sample, eta, generator)
        )

    def reversed_step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns (x_s, x0) of the step t → t + T // S, as the original does."""
        found = self._taken(model_output, timestep, sample, 0.0, None, up=True)
        if found is not None:
            return found
        original: Any = super()
        return cast(tuple[Tensor, Tensor], original.reversed_step(model_output, timestep, sample))

    def _taken(
        self, output: Tensor, timestep: Any, sample: Tensor, eta: Any, generator: Any, up: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Returns (x_s, x0), or None if the original's own step must run."""
        if torch.compiler.is_compiling() or transformed():
            return None
        if isinstance(timestep, Tensor) and timestep.dtype not in _INDICES:
            return None
        t, c, stride = self._row(timestep), self._bound(), self._stride()
        if t is None or c is None or stride is None or eta.__class__ not in (float, int):
            return None
        if not self._fits(output, sample, c):
            return None
        t, T = int(t), len(self.alphas_cumprod)
        s = t + stride if up else t - stride
        if not -T <= t < T or s >= T:
            return None
        tables = self._tables_of(float(eta), sample.device, stride, up, sample.dtype)
        if tables is None:
            return None
        own, z = self._own, None
        if eta > 0:
            if output.is_cpu and output.is_contiguous():
                z = own.drawn(output, generator)
            else:
                z = torch.randn(
                    output.shape, dtype=output.dtype, generator=generator, device=output.device
                )
        clip = None if c == math.inf else c
        as_given = clip is None and self.prediction_type == "sample"  # x0 is the output itself.
        x_s, x0 = own.stepped(
            tables.table,
            sample,
            output,
            t + T,
            prediction=NAMES[str.__str__(self.prediction_type)],
            clip=clip,
            want_x0=not as_given,
            noise=z,
            checked=True,
        )
        if s + stride >= T if up else s < 0:  # No step of this loop follows.
            own.clear()
        x0 = output if as_given else x0
        assert x0 is not None
        return x_s, x0

    def _bound(self) -> float | None:
        """Returns c of the clip bounds ±c, ∞ without clipping, or None for other bounds."""
        if not self.clip_sample:
            return math.inf
        low, high = self.clip_sample_values
        if not isinstance(high, (int, float)) or not isinstance(low, (int, float)):
            return None
        return float(high) if high > 0 and low == -high else None

    def _stride(self) -> int | None:
        """Returns T // S, or None if the original refuses the number of steps."""
        steps, levels = self.num_inference_steps, self.num_train_timesteps
        fits = isinstance(steps, int) and isinstance(levels, int) and steps > 0 and levels > 0
        return levels // steps if fits and steps else None

    def _tables_of(
        self,
        eta: float,
        device: torch.device,
        stride: int,
        up: bool,
        dtype: torch.dtype = torch.float32,
    ) -> Tables | None:
        """Returns the original's step from each timestep, by its own float32 operations.

        A negative timestep counts from the end, as an index does in the original. The operations
        run where the original's would. Returns None if the original's factors are not float32.
        """
        abar, end = self.alphas_cumprod, self._end()
        given = (eta, up, dtype), device, abar, end, stride
        found = self._cache.found(*given)
        if found is not None or not levels_fit(self):
            return found
        T = len(abar)
        t = torch.arange(-T, T, device=abar.device)
        s = t + stride if up else t - stride
        # A step to s ≥ T has no row that is read: the original raises there.
        at, at_s = abar[t], torch.where(s >= 0, abar[s.clamp(0, T - 1)], sent(end, abar.device))
        sigma = torch.zeros_like(at)
        direction = (1 - at_s) ** 0.5
        if not up:
            variance = ((1 - at_s) / (1 - at)) * (1 - at / at_s)
            sigma = eta * variance**0.5
            direction = (1 - at_s - sigma**2) ** 0.5
        table = pack_rows(at**0.5, (1 - at) ** 0.5, at_s**0.5, sigma, direction)
        return self._cache.keep(*given, Made(as_eager(table, device, dtype)))

    def _fits(self, output: Any, sample: Any, clip: float) -> bool:
        """Tells whether the fused step equals the original's step for these tensors."""
        return (
            # Results of another subclass, such as MetaTensor, have its class in the original.
            sample.__class__ in _PLAIN
            and output.__class__ in _PLAIN
            and like(output, sample)
            and (
                sample.dtype == torch.float32 or rounds(sample, None if clip == math.inf else clip)
            )
            and sample.dim() > 0
            and self._as_original
            and str.__str__(self.prediction_type) in NAMES
            and not (
                torch.is_grad_enabled()
                and (
                    sample.requires_grad
                    or output.requires_grad
                    or self.alphas_cumprod.requires_grad
                    or getattr(self._end(), "requires_grad", False)
                )
            )
        )


def fused(original: Any) -> Any:
    """Returns the subclass of ``original``, which is MONAI's class or computes the same steps."""
    names = {"__module__": __name__, "__doc__": FusedSteps.__doc__}
    return type("FastDDIMScheduler", (FusedSteps, original), names)


def __getattr__(name: str) -> Any:
    """Makes ``FastDDIMScheduler`` at its first use, because importing MONAI takes seconds."""
    if name != "FastDDIMScheduler":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module("monai.networks.schedulers.ddim")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "monai":
            raise
        raise ModuleNotFoundError(
            "monai is missing or older than 1.4; FastDDIMScheduler needs it: "
            "pip install 'monai>=1.4'",
            name=error.name,
        ) from None
    return globals().setdefault(name, fused(module.DDIMScheduler))
