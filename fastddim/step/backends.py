"""The table of backends says which takes the steps on a device; ``using`` chooses another."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastddim.check import shown
from fastddim.coefficients import COLUMNS_OF_MANY

VARIABLE = "FASTDDIM_BACKEND"
"""The environment variable that names the backend of every step of a process."""


class Fixed(NamedTuple):
    """The options of the step that stay the same throughout a run.

    Attributes:
        prediction: the model's output: 0 ε, 1 v, 2 x0, 3 flow (``coefficients.PREDICTIONS``).
        noise_first: whether c1·z is added before c2·ε or after it.
        clip: x0 is clamped to ±clip; None leaves x0 as it is.
        rederive: whether ε is computed again from the clamped x0.
        posterior: whether the sum takes x_t in the place of ε.
        rounding: the state's dtype, bfloat16 or float16, to which the result of each operation is
            rounded, as eager PyTorch does; None keeps a float32 state and float32 results.
    """

    prediction: int = 0
    noise_first: bool = True
    clip: float | None = None
    rederive: bool = False
    posterior: bool = False
    rounding: torch.dtype | None = None


class StepArgs(NamedTuple):
    """The arguments of one step, checked, in the order in which a launch takes them.

    With ``Fixed.rounding`` the tensors x, output, noise, out and x0 have that dtype in place of
    float32, the table has the columns ``COLUMNS_ROUNDED``, and there are no seeds, guidance, next
    input or history.

    Attributes:
        x: x_t, float32 (batch, ...).
        output: the model's output, float32, bfloat16 or float16, of x's shape; with guidance
            (2·batch, ...).
        table: the coefficients, float32 (steps, 7); with history (steps, 8). Without
            ``Fixed.rounding`` a table may have the columns ``coefficients.COLUMNS_OF_MANY``, whose
            last holds the number for which a row's counter noise is drawn, in place of the row's
            place in the table.
        row: the row of the table that all samples are on, or int32 (batch,) with one for each.
        seeds: int64 (batch,), for counter noise.
        noise: z itself, float32 of x's shape, in place of seeds.
        guidance: w, float32 (batch,).
        threshold: s, float32 (batch,).
        out: x_s is written here, float32 of x's shape.
        x0: x0 is written here, likewise.
        next_input: x_s is written here in this tensor's dtype, once or for both halves of guidance.
        history: x0′, the x0 of the step before, float32 of x's shape, for a step of order 2. It
            may be the tensor ``x0`` itself.
    """

    x: Tensor
    output: Tensor
    table: Tensor
    row: int | Tensor
    seeds: Tensor | None
    noise: Tensor | None
    guidance: Tensor | None
    threshold: Tensor | None
    out: Tensor
    x0: Tensor | None
    next_input: Tensor | None
    history: Tensor | None = None


def numbers_of(table: Tensor, row: int | Tensor) -> int | Tensor:
    """Returns the numbers for which these rows' counter noise is drawn.

    They are the ninth column of ``COLUMNS_OF_MANY``. A step that rounds, whose ninth column is
    another, draws no counter noise.
    """
    if table.shape[1] <= _NUMBER:
        return row
    if isinstance(row, int):
        return int(table[row, _NUMBER])
    return table[:, _NUMBER].index_select(0, row).to(torch.int32)


_NUMBER = COLUMNS_OF_MANY.index("number")

Launch: TypeAlias = Callable[..., None]
"""``launch(*arguments)`` takes one step, of ``StepArgs`` that lie in memory as the bound ones.

Any thread may call a launch, and several threads at once.
"""


def reads_as_it_lies(x: Tensor, output: Tensor) -> bool:
    """Returns False, for a backend that reads outputs in the order of x alone."""
    return False


@dataclass(frozen=True, eq=False)
class Backend:
    """One way to take a step. Each module in the table defines one, named ``BACKEND``.

    Attributes:
        name: its name in the table, in ``FASTDDIM_BACKEND`` and in records.
        bind: ``bind(fixed, first)`` looks at the ``StepArgs`` of a first step, compiles where
            there is something to compile, and returns the ``Launch`` for all tensors that lie
            alike. x is dense; noise, out, x0 and history have x's strides; each sample of the
            output lies as a sample of x.
        normal_: ``normal_(out, seeds, rows, stream)`` fills a contiguous float32 (batch, ...) with
            the counter noise that ``fastddim.step.philox`` defines.
        reads: ``reads(x, output)`` returns whether a launch reads an output whose samples lie in
            another order than x's. Otherwise the output is copied first.
        in_order: whether a launch with seeds needs x to be contiguous or channels last.
        rounds: the kinds of device on which ``bind`` takes ``Fixed.rounding``.
    """

    name: str
    bind: Callable[..., Launch]
    normal_: Callable[[Tensor, Tensor, Tensor, int], None]
    reads: Callable[[Tensor, Tensor], bool] = reads_as_it_lies
    in_order: bool = False
    rounds: tuple[str, ...] = ()


class Entry(NamedTuple):
    """A line of the table says where a backend can run, and which module defines it."""

    devices: tuple[str, ...] | None
    """The kinds of device that the backend runs on; None stands for any."""
    module: str
    """The module, imported by the first step: a compiler may be missing and is slow to import."""


TABLE: dict[str, Entry] = {
    "triton": Entry(("cuda",), "fastddim.step.on_triton"),
    "numba": Entry(("cpu",), "fastddim.step.on_numba"),
    "torch": Entry(None, "fastddim.step.on_torch"),
}
"""The backends by name. The first that runs on a device and can be imported takes the steps."""

_using: ContextVar[str | None] = ContextVar("fastddim backend", default=None)
# The environment is read once, because reading it costs as much as a small step.
_environment = os.environ.get(VARIABLE) or None


def backend(device: torch.device | str, name: str | None = None) -> Backend:
    """Returns the backend that takes the steps on a device. No other function chooses one.

    The first of these that is given names the backend: ``name``, ``using``, ``FASTDDIM_BACKEND``.
    If none is given, the first backend of the table that can run there takes the steps.

    Raises:
        ValueError: the backend that is named is not in the table or cannot run on such a device.
        ImportError: the backend that is named cannot be imported.
    """
    kind = device if isinstance(device, str) and ":" not in device else torch.device(device).type
    return _found(kind, name or chosen())


def chosen() -> str | None:
    """Returns the name that ``using`` or ``FASTDDIM_BACKEND`` gives, or None without either."""
    return _using.get() or _environment


@contextmanager
def using(name: str) -> Iterator[None]:
    """Has the named backend take the steps of this thread, within the block.

        with fastddim.using("torch"):
            images = ddim.sample(model, x_T)

    A sampler's loop that has begun, and a step that ``bind`` returned, keep their backend.

    Raises:
        ValueError: there is no backend of this name.
    """
    _checked(name, "using")
    with again(name):
        yield


def available(device: torch.device | str) -> list[str]:
    """Returns the names of the backends that can take steps on this device here, best first."""
    kind = torch.device(device).type
    return [name for name in TABLE if _runs_on(name, kind) and _imported(name) is not None]


@contextmanager
def again(name: str | None) -> Iterator[None]:
    """Restores a choice that ``chosen`` returned before, within the block."""
    token = _using.set(name)
    try:
        yield
    finally:
        _using.reset(token)


def forked() -> bool:
    """Returns whether this process is a forked child, which has none of its parent's threads.

    PyTorch still gives those threads parts of its operations, and then waits for ever.
    """
    return _is_forked


_is_forked = False


def _note_fork() -> None:
    global _is_forked
    _is_forked = True


# The hook stands here because a forked child may be the first to import a backend.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@functools.cache
def _found(kind: str, name: str | None) -> Backend:
    if name is None:
        return next(b for n in TABLE if _runs_on(n, kind) and (b := _imported(n)) is not None)
    _checked(name, VARIABLE)
    if not _runs_on(name, kind) and not _interprets(name):
        raise ValueError(
            f"backend must be one that runs on {kind} ({', '.join(available(kind))}), got {name!r}"
        )
    try:
        return _load(name)
    except ImportError as error:
        raise ImportError(f"backend {name!r} cannot be imported here: {error}") from error


def _checked(name: str, of: str) -> None:
    if name not in TABLE:
        raise ValueError(f"{of} must name one of {', '.join(TABLE)}, got {shown(name)}")


def _runs_on(name: str, kind: str) -> bool:
    devices = TABLE[name].devices
    return devices is None or kind in devices


def _interprets(name: str) -> bool:
    """Returns whether Triton's interpreter replaces the GPU: it also reads a CPU's memory."""
    value = os.environ.get("TRITON_INTERPRET", "0").lower()
    return name == "triton" and value in ("1", "true", "on", "yes")


def _imported(name: str) -> Backend | None:
    try:
        return _load(name)
    except ImportError:
        return None


def _load(name: str) -> Backend:
    found: Backend = importlib.import_module(TABLE[name].module).BACKEND
    return found
