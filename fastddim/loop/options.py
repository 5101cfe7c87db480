"""Lists every option of a sampler once, checks the options, and makes a run of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastddim.check import kind, shown, truth, whole
from fastddim.loop.devices import check_not_capturing, place_of, usable_device
from fastddim.loop.inpaint import checked_known
from fastddim.loop.model import Model, Predictor, warn_of_training
from fastddim.loop.normals import Noise, Noises, drawn_seeds
from fastddim.loop.plan import Plan, rows_of
from fastddim.loop.run import Run
from fastddim.step.arguments import check_untransformed

if TYPE_CHECKING:
    from fastddim.loop.trajectory import Callback

Guidance: TypeAlias = (
    float | Sequence[float] | Sequence[Sequence[float]] | Tensor | Callable[[int], Any]
)
Progress: TypeAlias = bool | Callable[[Iterable[Any]], Iterable[Any]]


class ConditionOptions(TypedDict, total=False):
    """The model's keyword arguments."""

    cond: Mapping[str, Any] | None
    uncond: Mapping[str, Any] | None


class GuidanceOptions(TypedDict, total=False):
    """Options that move the model's output towards the condition."""

    guidance: Guidance | None
    cond_fn: Model | None


class PrecisionOptions(TypedDict, total=False):
    """The dtypes that the model computes in."""

    dtype: torch.dtype | None
    autocast: torch.dtype | bool | None


class DownOptions(GuidanceOptions, total=False):
    """Options of every loop from noise to data, that of ``generate`` included."""

    self_condition: str | None
    device: torch.device | str | None


class CaptureOptions(ConditionOptions, DownOptions, PrecisionOptions, total=False):
    """The options of ``DDIM.capture``, beside the model and the shape."""

    start: int


class InvertOptions(ConditionOptions, GuidanceOptions, PrecisionOptions, total=False):
    """The options of ``DDIM.invert``, beside the model, x0, ``until`` and ``refine``."""

    progress: Progress


class IterateOptions(CaptureOptions, InvertOptions, total=False):
    """The options of ``DDIM.iterate``, beside those of ``reverse``, the model and x_T."""

    shape: Sequence[int] | None
    seeds: Sequence[int] | Tensor | None
    generator: torch.Generator | None
    noise: Noises | None
    known: Tensor | None
    mask: Tensor | None


class Options(IterateOptions, total=False):
    """The options of ``DDIM.sample``, beside the model, x_T and ``trajectory``."""

    batch_size: int | None
    callback: Callback | None
    every: int
    offload: bool


def option_names(options: Any) -> tuple[str, ...]:
    """Returns the names of the options in one of these types."""
    return tuple(options.__annotations__)


def options_in(arguments: Mapping[str, Any]) -> Options:
    """Returns the options among a function's arguments."""
    return cast(Options, {name: arguments[name] for name in option_names(Options)})


def check_names(method: str, passed: Mapping[str, Any], options: Any) -> None:
    """Raises ``TypeError``, as Python does, for an option that ``method`` does not take."""
    for name in passed:
        if name not in options.__annotations__:
            raise TypeError(
                f"{method}() got an unexpected keyword argument {name!r}: its options are "
                f"{', '.join(option_names(options))}"
            )


def check_backwards(passed: IterateOptions) -> None:
    """Raises ``ValueError`` for an option that a loop which runs backwards does not take."""
    # ``prepare`` refuses a device other than x0's; start=0 is the default.
    allowed = {*option_names(InvertOptions), "device", *(() if passed.get("start") else ("start",))}
    for name, value in passed.items():
        if value is not None and name not in allowed:
            raise ValueError(f"{name} has no place in a loop that runs backwards")


def list_options(method: Callable[..., Any], options: Any, like: Callable[..., Any]) -> None:
    """Makes ``help(method)`` list each option as it stands in the signature of ``like``."""
    known = inspect.signature(like).parameters
    own = inspect.signature(method)
    parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters += [known[name] for name in known if name in option_names(options)]
    vars(method)["__signature__"] = own.replace(parameters=parameters)


def prepare(plan: Plan, model: Model, x_T: Tensor | None, options: Mapping[str, object]) -> Run:
    """Checks every argument, moves it to the device, and returns the run.

    Args:
        plan: the rows of the loop.
        model, x_T: as in ``DDIM.sample``; backwards, x_T is the data.
        options: the options that the loop's method takes.

    Raises:
        TypeError, ValueError: naming the argument, the value and what is allowed.
        RuntimeError: while a CUDA graph is being captured.
    """
    passed = cast(Options, options)
    shape, device, start = passed.get("shape"), passed.get("device"), plan.order[0]
    if plan.backwards:
        x_T = checked_state("x0", x_T, device)
    elif (x_T is None) == (shape is None):
        raise ValueError(f"give x_T or shape, got {'neither' if x_T is None else 'both'}")
    elif x_T is None and start:
        raise ValueError(f"x_T must be given with start = {start}: noise is at row 0")
    elif x_T is not None:
        checked_state("x_T", x_T, device)
    size = checked_shape(shape) if x_T is None else tuple(x_T.shape)
    where = place_of(device, model) if x_T is None else x_T.device
    check_not_capturing(where)
    check_untransformed("sampling")
    state_dtype = torch.float32 if x_T is None else x_T.dtype
    model_dtype = checked_dtype(passed.get("dtype")) or state_dtype
    uncond, self_condition = passed.get("uncond"), passed.get("self_condition")
    w = checked_guidance(passed.get("guidance"), uncond, size[0], plan.times.tolist())
    if w is not None and (w == 1).all():
        uncond = w = None  # With w = 1 the output is that of the model with its condition.
    predictor = Predictor.of(
        model,
        size[0],
        where,
        model_dtype,
        passed.get("cond"),
        uncond,
        passed.get("cond_fn"),
        self_condition,
        passed.get("autocast"),
    )
    if plan.shift is not None:
        without = [row for row in plan.order if not np.isfinite(plan.shift[row])]
        if without:
            raise ValueError(
                f"cond_fn cannot be used where α is 0 and x is noise alone, as at level "
                f"{max(plan.pairs[without[0]]):g} of this schedule"
            )
    warn_of_training(model, 4)  # Above are the sampler's method and its decorator.
    progress = checked_progress(passed.get("progress", False))
    noise = checked_noise(
        size,
        where,
        len(plan.table),
        passed.get("seeds"),
        passed.get("generator"),
        passed.get("noise"),
    )
    x = noise.initial() if x_T is None else x_T.to(torch.float32)
    if x_T is None and plan.noise_scale != 1:
        x.mul_(plan.noise_scale)
    known = None
    if plan.forward is not None and not (passed.get("known") is passed.get("mask") is None):
        clean = (*(False for _ in plan.pairs), plan.pairs[-1][1] < 0)
        known = checked_known(passed.get("known"), passed.get("mask"), x, plan.forward, clean)
    if known is not None and noise.tensors is not None:
        raise ValueError(
            "known needs seeds or a generator, got noise, which holds the steps' z only"
        )
    scales = None if w is None else torch.tensor(w, device=where)
    return Run(
        x=x,
        made=x is not x_T,
        predictor=predictor,
        table=plan.table_on(where),
        second=None if plan.second is None else torch.tensor(plan.second, device=where),
        rows=rows_of(plan, predictor, scales, known is not None),
        prediction=plan.prediction,
        clip=plan.clip,
        conversion=None if plan.conversion is None else torch.tensor(plan.conversion, device=where),
        guidance=scales,
        noise=noise,
        known=known,
        dtype=state_dtype,
        progress=progress,
    )


def checked_noise(
    size: tuple[int, ...],
    device: torch.device,
    steps: int,
    seeds: Sequence[int] | Tensor | None,
    generator: torch.Generator | None,
    noise: Noises | None,
) -> Noise:
    """Returns the source of normals, by default seeds from torch's default generator.

    Raises:
        TypeError, ValueError: naming the argument, the value and what is allowed.
    """
    sources = {"seeds": seeds, "generator": generator, "noise": noise}
    given = [name for name, source in sources.items() if source is not None]
    if len(given) > 1:
        raise ValueError(f"noise has one source, got {' and '.join(given)}")
    if noise is not None:
        _check_noises(noise, size, device, steps)
        # Unbind once, because indexing a tensor in each step would call torch's dispatcher.
        rows = noise.unbind() if isinstance(noise, Tensor) else noise
        return Noise(size, device, tensors=rows)
    if generator is not None:
        _check_generator(generator, device)
        return Noise(size, device, generator=generator)
    keys = drawn_seeds(size[0]) if seeds is None else checked_seeds(seeds, size[0])
    return Noise(size, device, seeds=keys.to(device))


def _check_generator(generator: torch.Generator, device: torch.device) -> None:
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {kind(generator)}")
    if generator.device.type != device.type:
        raise ValueError(f"generator must be on {device}, got one on {generator.device}")


def _check_noises(noise: Any, size: tuple[int, ...], device: torch.device, steps: int) -> None:
    listed = noise.dim() > 0 if isinstance(noise, Tensor) else isinstance(noise, Sequence)
    if not listed or len(noise) != steps:
        got = f"{len(noise)}" if listed else shown(noise)
        raise ValueError(f"noise must hold a tensor for each of {steps} rows, got {got}")
    for row, z in enumerate(noise):
        if not isinstance(z, Tensor) or z.shape != size or z.dtype != torch.float32:
            got = f"{z.dtype} {tuple(z.shape)}" if isinstance(z, Tensor) else kind(z)
            raise ValueError(f"noise[{row}] must be a float32 tensor of shape {size}, got {got}")
        if z.device != device:
            raise ValueError(f"noise[{row}] must be on {device}, got {z.device}")


def checked_seeds(seeds: Sequence[int] | Tensor, batch: int) -> Tensor:
    """Returns ``seeds`` as int64 (batch,)."""
    if (fast := _int64(seeds)) is not None and fast.shape == (batch,) and (fast >= 0).all():
        return torch.from_numpy(fast)
    values: Any = seeds.tolist() if isinstance(seeds, (Tensor, np.ndarray)) else seeds
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"seeds must be a sequence of integers, got {kind(seeds)}")
    if len(values) != batch:
        raise ValueError(f"seeds must be one for each of {batch} samples, got {len(values)}")
    checked = [whole(f"seeds[{i}]", k, low=0, high=2**63 - 1) for i, k in enumerate(values)]
    return torch.tensor(checked, dtype=torch.int64, device="cpu")


def _int64(numbers: Any) -> npt.NDArray[np.int64] | None:
    """Returns a copy of int64 numbers, or None for anything else.

    The conversion is one call, because checking 100,000 numbers one by one takes 0.1 s.
    """
    if isinstance(numbers, range):
        numbers = np.arange(numbers.start, numbers.stop, numbers.step)
    elif isinstance(numbers, Tensor) and numbers.dtype == torch.int64:
        numbers = numbers.detach().cpu().numpy()
    elif isinstance(numbers, (list, tuple)) and set(map(type, numbers)) == {int}:
        try:
            numbers = np.array(numbers, dtype=np.int64)
        except OverflowError:
            return None
    if not isinstance(numbers, np.ndarray) or numbers.dtype != np.int64:
        return None
    return numbers.copy()


def checked_guidance(
    guidance: Any, uncond: object, batch: int, times: Sequence[float]
) -> npt.NDArray[np.float32] | None:
    """Returns w of each row and sample, float32 (rows, batch), or None without guidance.

    Raises:
        TypeError, ValueError: naming the argument, the value and what is allowed.
    """
    if guidance is None and uncond is None:
        return None
    if guidance is None:
        raise ValueError("guidance must be given with uncond: a number such as 7.5, got None")
    if uncond is None:
        raise ValueError(
            "uncond must be given with guidance: the model's arguments without the condition"
        )
    steps = len(times)
    if callable(guidance) and not isinstance(guidance, Tensor):
        rows = [_numbers(f"guidance({t})", guidance(t)) for t in times]
        for t, row in zip(times, rows, strict=True):
            if row.shape not in ((), (batch,)):
                raise ValueError(
                    f"guidance({t}) must be a number or one for each of {batch} samples, "
                    f"got shape {row.shape}"
                )
        return np.stack([np.broadcast_to(row, (batch,)) for row in rows]).astype(np.float32)
    values = _numbers("guidance", guidance)
    if values.shape not in ((), (batch,), (steps, 1), (steps, batch)):
        raise ValueError(
            f"guidance must be a number, ({batch},) for each sample, ({steps}, 1) for each row or "
            f"({steps}, {batch}) for both, got shape {values.shape}"
        )
    return np.broadcast_to(values, (steps, batch)).astype(np.float32)


def _numbers(name: str, value: Any) -> npt.NDArray[np.float64]:
    if isinstance(value, Tensor) and not value.is_complex():
        value = value.detach().cpu().double().numpy()
    if value is None or isinstance(value, (bool, str, bytes)):
        raise TypeError(f"{name} must be a number or numbers, got {value!r}")
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number or numbers, got {kind(value)}") from None
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} must be finite, got {numbers[~np.isfinite(numbers)].flat[0]}")
    return numbers


def checked_state(name: str, x: Any, device: torch.device | str | None) -> Tensor:
    """Returns x, checked to be a floating point state (batch, ...) without gradients."""
    if not isinstance(x, Tensor):
        if name == "x_T" and isinstance(x, Sequence) and all(isinstance(n, int) for n in x):
            raise TypeError(
                f"x_T must be a tensor, got {shown(x)}: to begin with noise, give "
                f"shape={shown(tuple(x))}"
            )
        raise TypeError(f"{name} must be a tensor, got {kind(x)}")
    if x.dim() < 2:
        raise ValueError(
            f"{name} must have shape (batch, ...) with two dimensions or more, got {tuple(x.shape)}"
        )
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}")
    if x.requires_grad:
        raise ValueError(
            f"{name} requires grad, which sampling does not carry: pass {name}.detach()"
        )
    if device is not None and usable_device(device) != x.device:
        raise ValueError(f"device must be {name}'s, {x.device}, or left out, got {str(device)!r}")
    return x


def checked_shape(shape: Any) -> tuple[int, ...]:
    if isinstance(shape, str) or not isinstance(shape, Sequence):
        raise TypeError(f"shape must be a sequence of integers, got {kind(shape)}")
    size = tuple(whole(f"shape[{i}]", n, low=0 if i == 0 else 1) for i, n in enumerate(shape))
    if len(size) < 2:
        raise ValueError(f"shape must be (batch, ...) with two dimensions or more, got {size}")
    return size


def checked_dtype(dtype: Any) -> torch.dtype | None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating point torch.dtype, got {shown(dtype)}")
    return dtype


def checked_progress(progress: Progress) -> Callable[[Iterable[Any]], Iterable[Any]]:
    """Returns the function that wraps a loop's rows: a bar for True, ``iter`` for False."""
    if callable(progress):
        return progress
    try:
        wanted = progress is not None and truth("progress", progress)
    except TypeError:
        raise TypeError(
            f"progress must be True, False or a function such as tqdm.tqdm, got {shown(progress)}"
        ) from None
    if not wanted:
        return iter
    try:
        from rich.progress import track
    except ImportError:
        raise ValueError(
            "progress=True needs rich (pip install 'fastddim[cli]'); or pass a wrapper such as "
            "tqdm.tqdm"
        ) from None
    return lambda steps: track(steps, description="sampling")
