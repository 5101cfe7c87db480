"""DDIM: the sampler. Its loop is the paper's, and reads like it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastddim.check import finite, whole
from fastddim.coefficients import PREDICTIONS, Eta, Float32, checked_eta, make_table
from fastddim.ops import OUTPUTS, ddim_step, initial_noise
from fastddim.schedule import NoiseSchedule
from fastddim.timesteps import Pair, Spacing, make_pairs

Model: TypeAlias = Callable[..., Any]
Noise: TypeAlias = Sequence[Tensor] | Tensor
Draw: TypeAlias = tuple[Tensor | None, Tensor | None]
"""A step's (seeds, z): at most one is a tensor."""
Progress: TypeAlias = bool | Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Step:
    """What one step of the loop leaves behind.

    Attributes:
        index: the step's row, 0 for the first taken.
        t, s: the levels it went from and to; s = −1 is clean data.
        x: x_s.
        x0: the x0 predicted from x_t.
    """

    index: int
    t: int
    s: int
    x: Tensor
    x0: Tensor


@functools.cache
def _papers_schedule() -> NoiseSchedule:
    # One object, since schedules are equal only to themselves: so DDIM(50) == DDIM(50).
    return NoiseSchedule.linear()


@dataclass(frozen=True)
class DDIM:
    """Denoising diffusion implicit models (Song et al. 2021), and DDPM at η = 1.

        x0  = (x_t − √(1−ᾱ_t)·ε(x_t, t)) / √ᾱ_t
        x_s = √ᾱ_s·x0 + c1·z + c2·ε(x_t, t),   c1 = σ_t,   c2 = √(1 − ᾱ_s − σ_t²)

    A bad value raises ``TypeError`` or ``ValueError`` here, naming the argument, the value and
    what is allowed; none is left to be found out while sampling.

    Args:
        steps: S, the number of steps; 50 where neither it nor a list of timesteps is given.
        eta: η ≥ 0 (0 is DDIM, 1 is DDPM on τ), or ``"hat"`` for the paper's σ̂.
        schedule: ᾱ; linear β with T = 1000 by default.
        spacing: how τ is chosen, or τ itself: see ``make_pairs``.
        prediction: what the model returns: ``"epsilon"``, ``"v"`` or ``"sample"`` (x0).
        clip: the predicted x0 is clamped to ±clip; None leaves it alone.
        final_alpha_cumprod: ᾱ_s of the step to s = −1. 1 is clean data; Stable Diffusion ends
            at ᾱ_0.

    Attributes:
        pairs: the (t, s) of each step, in the order in which they are taken.
        table: the coefficients, float32, one row a step: see ``make_table``.
    """

    steps: int | None = None
    eta: Eta = 0.0
    schedule: NoiseSchedule = field(default_factory=_papers_schedule)
    spacing: Spacing = "uniform"
    prediction: str = "epsilon"
    clip: float | None = None
    final_alpha_cumprod: float = 1.0
    pairs: tuple[Pair, ...] = field(init=False, repr=False)
    table: Float32 = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, NoiseSchedule):
            raise TypeError(f"schedule must be a NoiseSchedule, got {_kind(self.schedule)}")
        if self.prediction not in PREDICTIONS:
            raise ValueError(
                f"prediction must be one of {', '.join(PREDICTIONS)}, got {self.prediction!r}"
            )
        if self.clip is not None and finite("clip", self.clip) <= 0:
            raise ValueError(f"clip must be > 0, got {self.clip:g}")
        steps = 50 if self.steps is None else self.steps
        spacing = self.spacing
        pairs = make_pairs(spacing, steps, len(self.schedule))
        if not isinstance(spacing, str):
            if self.steps not in (None, len(pairs)):
                raise ValueError(
                    f"steps must be left out or {len(pairs)}, the length of spacing, "
                    f"got {self.steps!r}"
                )
            steps, spacing = len(pairs), pairs  # frozen, unlike the list it came from
        noisiest, cleanest = self.schedule.alphas_cumprod[[pairs[0][0], pairs[-1][0]]]
        if noisiest == 0 and self.prediction == "epsilon":
            raise ValueError(
                f"prediction must be v or sample where ᾱ is 0, as it is at t = {pairs[0][0]} of "
                f"this schedule, got 'epsilon'"
            )
        final = finite("final_alpha_cumprod", self.final_alpha_cumprod)
        if not cleanest <= final <= 1:
            raise ValueError(
                f"final_alpha_cumprod must lie between {cleanest:.6g}, the level of the last "
                f"step, and 1, got {final:g}"
            )
        table = make_table(self.schedule, pairs, self.eta, final)
        table.setflags(write=False)
        derived = {
            "steps": steps,
            "spacing": spacing,
            "eta": checked_eta(self.eta),
            "final_alpha_cumprod": final,
            "pairs": pairs,
            "table": table,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def sample(
        self,
        model: Model,
        x_T: Tensor | None = None,
        *,
        shape: Sequence[int] | None = None,
        seeds: Sequence[int] | Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: Noise | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        cond: Mapping[str, Any] | None = None,
        progress: Progress = False,
    ) -> Tensor:
        """Samples: the loop from the noisiest level down to clean data.

        Args:
            model: called as ``model(x, t, **cond)`` without gradients, t being int64 of shape
                (batch,). Returns a tensor of x's shape, or one with twice the channels (a learned
                variance, which is not used), or a tuple or an object with ``.sample`` that holds
                one.
            x_T: where to start, (batch, ...), float32, bfloat16 or float16; never written.
            shape: (batch, ...) to start from noise, where x_T is not given.
            seeds: an integer in [0, 2⁶³) for each sample. What is drawn for a sample depends on
                its seed alone: not on its batch or the device.
            generator: or torch's own stream, a generator of the sampling device: x_T first, then
                z for each step that adds noise.
            noise: or z itself: for each row a float32 tensor of x_T's shape. With none of the
                three, seeds come from torch's default generator, as ``torch.manual_seed`` sets it.
            device: where to sample; x_T's by default, else torch's default device.
            dtype: what x is cast to for the model; x_T's by default. The state stays float32.
            cond: keyword arguments for the model.
            progress: True for a bar (needs the ``cli`` extra), or a wrapper such as ``tqdm.tqdm``.

        Returns:
            The last x, in x_T's dtype, float32 by default.

        Raises:
            TypeError, ValueError: before any work, naming the argument, what was given and what
                is allowed; or, when the model has returned something that is no such tensor.
        """
        run, x = self._start(
            model, x_T, shape, seeds, generator, noise, device, dtype, cond, progress
        )
        for x, _ in self._loop(run, x, want_x0=False):  # noqa: B007, B020
            pass
        return x.to(run.dtype)

    def iterate(
        self,
        model: Model,
        x_T: Tensor | None = None,
        *,
        shape: Sequence[int] | None = None,
        seeds: Sequence[int] | Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: Noise | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        cond: Mapping[str, Any] | None = None,
        progress: Progress = False,
    ) -> Iterator[Step]:
        """``sample`` one step at a time, with the x0 predicted at each.

        The arguments, checked before the first step is asked for, are ``sample``'s. The tensors
        of a step are the caller's to keep: nothing that follows writes to them.
        """
        run, x = self._start(
            model, x_T, shape, seeds, generator, noise, device, dtype, cond, progress
        )
        return self._steps(run, x)

    def describe(self) -> None:
        """Prints what will be done: each step's levels and factors, and the model calls."""
        eta = self.eta if isinstance(self.eta, str) else f"{self.eta:g}"
        spacing = self.spacing if isinstance(self.spacing, str) else "given"
        print(
            f"DDIM: {self.schedule}, {self.prediction} model, eta = {eta}, {spacing} spacing, "
            f"{len(self.pairs)} model calls"
        )
        print(f"{'row':>5}{'t':>6}{'s':>6}{'√ᾱ_t':>11}{'√ᾱ_s':>11}{'c1':>11}{'c2':>11}")
        for row, ((t, s), f) in enumerate(zip(self.pairs, self.table.tolist(), strict=True)):
            print(f"{row:>5}{t:>6}{s:>6}{f[0]:>11.6f}{f[4]:>11.6f}{f[5]:>11.6f}{f[6]:>11.6f}")

    def _loop(self, run: _Run, x: Tensor, want_x0: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(x_s, x0) after each step. All it needs is on the device before it begins."""
        spare = Spare()
        for row, t in run.progress(run.steps):  # τ_S → τ_1
            with torch.no_grad():
                eps = run.predict(x, t)
                seeds, z = next(run.noise)  # after the model's call, as eager loops draw
                x_s, x0 = ddim_step(
                    x,
                    eps,
                    run.table,
                    row,
                    seeds,
                    noise=z,
                    prediction=self.prediction,
                    clip=self.clip,
                    want_x0=want_x0,
                    out=spare.take(),
                )
            spare.keep(x)
            x = x_s
            del x_s, eps  # or they would hold what `spare` may hand out again
            yield x, x0

    def _steps(self, run: _Run, x: Tensor) -> Iterator[Step]:
        states = self._loop(run, x, want_x0=True)
        del x
        for row, (state, x0) in enumerate(states):  # a zip would hold on to every other state
            assert x0 is not None
            t, s = self.pairs[row]
            yield Step(row, t, s, state.to(run.dtype), x0.to(run.dtype))

    def _start(
        self,
        model: Model,
        x_T: Tensor | None,
        shape: Sequence[int] | None,
        seeds: Sequence[int] | Tensor | None,
        generator: torch.Generator | None,
        noise: Noise | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        cond: Mapping[str, Any] | None,
        progress: Progress,
    ) -> tuple[_Run, Tensor]:
        """Every argument checked and on the device: what the loop reads, and the x it starts at."""
        if not callable(model):
            raise TypeError(f"model must be callable, got {_kind(model)}")
        if cond is not None and not isinstance(cond, Mapping):
            raise TypeError(f"cond must map names to values, got {_kind(cond)}")
        sources = {"seeds": seeds, "generator": generator, "noise": noise}
        given = [name for name, source in sources.items() if source is not None]
        if len(given) > 1:
            raise ValueError(f"noise has one source, got {' and '.join(given)}")
        size, where, state_dtype = _destination(x_T, shape, device)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating point torch.dtype, got {dtype!r}")
        noisy = (self.table[:, 5] != 0).tolist()

        draws: Iterator[Draw]
        if noise is not None:
            if x_T is None:
                raise ValueError("x_T must be given with noise, which holds the steps' only")
            x, draws = x_T, iter(_given_noise(noise, size, where, noisy))
        elif generator is not None:
            _check_generator(generator, where)
            x = (
                torch.randn(size, generator=generator, device=where, dtype=torch.float32)
                if x_T is None
                else x_T
            )
            draws = _generator_noise(generator, size, where, noisy)
        else:
            if seeds is None:
                seeds = torch.randint(0, 2**63 - 1, size[:1])
            keys = _checked_seeds(seeds, size[0]).to(where)
            x = initial_noise(keys, size) if x_T is None else x_T
            draws = iter([(keys, None) if row else (None, None) for row in noisy])

        table = torch.tensor(self.table, device=where)
        rows = torch.arange(len(table), dtype=torch.int32, device=where).unbind()
        t = torch.tensor([t for t, _ in self.pairs], device=where)
        timesteps = t[:, None].expand(-1, size[0]).unbind()
        run = _Run(
            model,
            dict(cond or {}),
            dtype or state_dtype,
            state_dtype,
            table,
            list(zip(rows, timesteps, strict=True)),
            draws,
            _progress(progress),
        )
        return run, x.to(torch.float32)


@dataclass(frozen=True)
class _Run:
    """One call's arguments, checked, on the device."""

    model: Model
    cond: dict[str, Any]
    model_dtype: torch.dtype
    dtype: torch.dtype
    table: Tensor
    steps: list[tuple[Tensor, Tensor]]
    noise: Iterator[Draw]
    progress: Callable[[Iterable[Any]], Iterable[Any]]

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        """What the model says of x at t, unpacked and checked."""
        output: Any = self.model(x.to(self.model_dtype), t, **self.cond)
        if not isinstance(output, Tensor) and hasattr(output, "sample"):
            output = output.sample
        elif isinstance(output, tuple) and output:
            output = output[0]
        if not isinstance(output, Tensor):
            raise TypeError(f"model must return a tensor, got {_kind(output)}")
        if output.dtype not in OUTPUTS:
            raise TypeError(f"model must return float32, bfloat16 or float16, got {output.dtype}")
        with_variance = x.dim() > 2 and (x.shape[0], 2 * x.shape[1], *x.shape[2:])
        if output.shape not in (x.shape, with_variance):
            raise ValueError(
                f"model must return a tensor of x's shape, {tuple(x.shape)}, or one with twice the "
                f"channels (a learned variance), got {tuple(output.shape)}"
            )
        return output


class Spare:
    """A state that nobody holds any more, written anew by a later step.

    Fresh memory costs a CPU more than the step itself (page faults: 120 ms against 51 ms for
    50 MB). The caching allocator of a GPU gives it back for nothing, in stream order.
    The first state kept is x_T, whose memory may be somebody's (a numpy array's, say) without
    a reference that could be counted: it is never handed out.
    """

    def __init__(self) -> None:
        self._box: list[Tensor] = []
        self._past_first = False

    def keep(self, x: Tensor) -> None:
        self._box = [x] if self._past_first and x.device.type == "cpu" else []
        self._past_first = True

    def take(self) -> Tensor | None:
        """The state kept, if the box is all that holds it."""
        box, self._box = self._box, []
        return box[0] if box and _holders(box) == _ALONE else None


def _holders(box: list[Tensor]) -> tuple[int, int, int, int]:
    """Who holds box[0]: Python names, C++ references, and the same two of its storage (views)."""
    storage = box[0].untyped_storage()
    return (
        sys.getrefcount(box[0]),
        box[0]._use_count(),  # type: ignore[attr-defined]
        sys.getrefcount(storage),
        torch._C._storage_Use_Count(storage._cdata),
    )


_ALONE = _holders([torch.empty(1)])


def _destination(
    x_T: Tensor | None, shape: Sequence[int] | None, device: torch.device | str | None
) -> tuple[tuple[int, ...], torch.device, torch.dtype]:
    """(shape, device, dtype) of the state, from x_T or from ``shape``."""
    if (x_T is None) == (shape is None):
        raise ValueError(f"give x_T or shape, got {'neither' if x_T is None else 'both'}")
    if x_T is None:
        if isinstance(shape, str) or not isinstance(shape, Sequence):
            raise TypeError(f"shape must be a sequence of integers, got {_kind(shape)}")
        size = tuple(whole(f"shape[{i}]", n, low=0 if i == 0 else 1) for i, n in enumerate(shape))
        if len(size) < 2:
            raise ValueError(f"shape must be (batch, ...) with two dimensions or more, got {size}")
        return size, _usable(device), torch.float32
    if not isinstance(x_T, Tensor):
        raise TypeError(f"x_T must be a tensor, got {_kind(x_T)}")
    if x_T.dim() < 2:
        raise ValueError(
            f"x_T must have shape (batch, ...) with two dimensions or more, got {tuple(x_T.shape)}"
        )
    if x_T.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"x_T must be float32, bfloat16 or float16, got {x_T.dtype}")
    if x_T.requires_grad:
        raise ValueError("x_T requires grad, which sampling does not carry: pass x_T.detach()")
    if device is not None and _usable(device) != x_T.device:
        raise ValueError(f"device must be x_T's, {x_T.device}, or left out, got {str(device)!r}")
    return tuple(x_T.shape), x_T.device, x_T.dtype


def _usable(device: torch.device | str | None) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {str(device)!r} cannot be used: {reason}") from None


def _checked_seeds(seeds: Sequence[int] | Tensor, batch: int) -> Tensor:
    """``seeds`` as int64 (batch,)."""
    values: Any = seeds.tolist() if isinstance(seeds, (Tensor, np.ndarray)) else seeds
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"seeds must be a sequence of integers, got {_kind(seeds)}")
    if len(values) != batch:
        raise ValueError(f"seeds must be one for each of {batch} samples, got {len(values)}")
    checked = [whole(f"seeds[{i}]", k, low=0, high=2**63 - 1) for i, k in enumerate(values)]
    return torch.tensor(checked, dtype=torch.int64)


def _check_generator(generator: torch.Generator, device: torch.device) -> None:
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {_kind(generator)}")
    if generator.device.type != device.type:
        raise ValueError(f"generator must be on {device}, got one on {generator.device}")


def _generator_noise(
    generator: torch.Generator, size: tuple[int, ...], device: torch.device, noisy: list[bool]
) -> Iterator[Draw]:
    """torch's own stream, drawn only where the step adds noise, into one buffer."""
    z: Tensor | None = None
    for row in noisy:
        if row:
            z = torch.randn(size, generator=generator, device=device, dtype=torch.float32, out=z)
        yield None, z if row else None


def _given_noise(
    noise: Noise, size: tuple[int, ...], device: torch.device, noisy: list[bool]
) -> list[Draw]:
    if not isinstance(noise, (Tensor, Sequence)) or len(noise) != len(noisy):
        got = f"{len(noise)}" if hasattr(noise, "__len__") else _kind(noise)
        raise ValueError(f"noise must hold a tensor for each of {len(noisy)} rows, got {got}")
    for row, z in enumerate(noise):
        if not isinstance(z, Tensor) or z.shape != size or z.dtype != torch.float32:
            got = f"{z.dtype} {tuple(z.shape)}" if isinstance(z, Tensor) else _kind(z)
            raise ValueError(f"noise[{row}] must be a float32 tensor of shape {size}, got {got}")
        if z.device != device:
            raise ValueError(f"noise[{row}] must be on {device}, got {z.device}")
    return [(None, z if row else None) for row, z in zip(noisy, noise, strict=True)]


def _progress(progress: Progress) -> Callable[[Iterable[Any]], Iterable[Any]]:
    if callable(progress):
        return progress
    if not progress:
        return iter
    try:
        from rich.progress import track
    except ImportError:
        raise ValueError(
            "progress=True needs rich (pip install 'fastddim[cli]'); a wrapper such as tqdm.tqdm "
            "serves too"
        ) from None
    return lambda steps: track(steps, description="sampling")


def _kind(value: object) -> str:
    return type(value).__name__
