"""The bound step: one launch for each layout of its tensors, kept for later calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastddim.step import layout
from fastddim.step.arguments import check_bound
from fastddim.step.backends import Backend, Fixed, Launch, StepArgs, again

_MOST = 64
"""The most layouts that a step keeps, and the most steps that this module keeps."""


class Bound:
    """The step of one backend with one set of options, for checked arguments.

    A call takes the launch of an earlier call with the same sizes, strides, dtypes and arguments
    that are None. Otherwise it binds a new launch: it decides which tensors are copied first, and
    has the backend compile.

    A bound step keeps nothing but launches between two calls, so threads and trajectories may
    share it.
    """

    __slots__ = ("_latest", "_launches", "backend", "fixed")

    def __init__(self, backend: Backend, fixed: Fixed) -> None:
        self.backend, self.fixed = backend, fixed
        self._launches: dict[tuple[object, ...], Launch] = {}
        self._latest: tuple[tuple[object, ...], Launch] = (), nothing

    def __call__(
        self,
        x: Tensor,
        output: Tensor,
        table: Tensor,
        row: int | Tensor,
        seeds: Tensor | None,
        noise: Tensor | None,
        guidance: Tensor | None,
        threshold: Tensor | None,
        out: Tensor,
        x0: Tensor | None,
        next_input: Tensor | None,
        history: Tensor | None = None,
    ) -> None:
        """Writes x_s to ``out`` and, where they are given, x0 to ``x0`` and x_s to ``next_input``.

        The arguments are ``StepArgs``, on one device.
        """
        arguments = (
            x, output, table, row, seeds, noise, guidance, threshold, out, x0, next_input, history,
        )  # fmt: skip
        self.launch(*arguments)(*arguments)

    def launch(
        self,
        x: Tensor,
        output: Tensor,
        table: Tensor,
        row: int | Tensor,
        seeds: Tensor | None,
        noise: Tensor | None,
        guidance: Tensor | None,
        threshold: Tensor | None,
        out: Tensor,
        x0: Tensor | None,
        next_input: Tensor | None,
        history: Tensor | None = None,
        seen: bool = True,
    ) -> Launch:
        """Returns the launch for these arguments, and for all that lie alike.

        With ``seen`` the launch calls the op where ``watched()`` holds or a tensor is not plain.
        """
        if seen and (
            x.__class__ is not Tensor
            or x.is_neg()
            or x._is_zerotensor()
            or output.__class__ is not Tensor
            or output.is_neg()
            or output._is_zerotensor()
            or table.__class__ is not Tensor
            or not (noise is None or is_plain(noise))
            or not (guidance is None or is_plain(guidance))
            or not (threshold is None or is_plain(threshold))
            or not (history is None or is_plain(history))
            or watched()
        ):
            return partial(by_op, self.fixed)
        key = (
            x.shape,
            x.stride(),
            output.dtype,
            output.shape,
            output.stride(),
            table.shape,
            table.stride(),
            None if isinstance(row, int) else row.stride(),
            None if seeds is None else seeds.stride(),
            None if noise is None else noise.stride(),
            None if guidance is None else guidance.stride(),
            None if threshold is None else threshold.stride(),
            out.stride(),
            None if x0 is None else x0.stride(),
            None
            if next_input is None
            else (next_input.dtype, next_input.shape, next_input.stride()),
            None if history is None else history.stride(),
        )
        latest, launch = self._latest
        if key != latest:
            found = self._launches.get(key)
            if found is None:
                first = StepArgs(
                    x, output, table, row, seeds, noise, guidance, threshold, out, x0, next_input,
                    history,
                )  # fmt: skip
                found = bind(self.backend, self.fixed, first)
                if len(self._launches) >= _MOST:
                    self._launches.clear()
                self._launches[key] = found
            launch = found
            self._latest = key, launch
        return launch


def is_plain(tensor: Tensor) -> bool:
    """Returns whether a tensor's values are those in the memory at its address.

    A subclass may keep its values elsewhere, the memory of a tensor with the negative bit holds
    their opposites, and a tensor of zeros alone may have no memory. The op handles all three.
    """
    kind = tensor.__class__
    return (
        (kind is Tensor or kind is torch.nn.Parameter)
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
    )


def watched() -> bool:
    """Returns whether torch.compile, a tracer, the profiler or a dispatch mode would see the op."""
    # Each step calls this function, so these are PyTorch's own functions, without wrappers.
    return is_compiling() or moded() > 0 or profiled() or _traced() is not None


moded: Callable[[], int] = torch._C._len_torch_dispatch_stack
"""Returns how many dispatch modes are on."""
_traced: Callable[[], object] = torch._C._get_tracing_state
_autograd: Any = getattr(torch._C, "_autograd")  # noqa: B009 its types do not name it
profiled: Callable[[], bool] = _autograd._profiler_enabled
"""Returns whether PyTorch's profiler is on."""


def by_op(
    fixed: Fixed,
    x: Tensor,
    output: Tensor,
    table: Tensor,
    row: int | Tensor,
    seeds: Tensor | None,
    noise: Tensor | None,
    guidance: Tensor | None,
    threshold: Tensor | None,
    out: Tensor,
    x0: Tensor | None,
    next_input: Tensor | None,
    history: Tensor | None = None,
) -> None:
    """Launches by the op, which torch.compile, dispatch modes, subclasses and the profiler see."""
    rows, number = (row, None) if isinstance(row, Tensor) else (None, row)
    *options, posterior, rounding = fixed
    inputs = x, output, table, rows, seeds, noise, guidance, threshold
    results = out, x0, next_input
    torch.ops.fastddim.ddim_step.default(
        *inputs, *options, *results, number, history, posterior, rounding
    )


def by_op_again(name: str | None, fixed: Fixed, *arguments: Any) -> None:
    """Launches by the op, with the backend that was chosen when the step was bound."""
    with again(name):
        by_op(fixed, *arguments)


_steps: dict[tuple[Backend, Fixed, torch.device], Bound] = {}


def step_of(backend: Backend, fixed: Fixed, device: torch.device) -> Bound:
    """Returns the bound step of this backend on this device, the same one at each call."""
    key = backend, fixed, device
    step = _steps.get(key)
    if step is None:
        if len(_steps) >= _MOST:
            _steps.clear()
        step = _steps[key] = Bound(backend, fixed)
    return step


def nothing(*_: object) -> None:
    """Does nothing: this is the launch of a step that has no elements."""


def bind(backend: Backend, fixed: Fixed, first: StepArgs) -> Launch:
    """Returns the backend's launch for arguments that lie alike, with the copies that it needs."""
    check_bound(fixed, first)
    if not first.x.numel():
        return nothing
    copies = _Copies(backend, first)
    if not copies.needed:
        return backend.bind(fixed, first)
    inner = backend.bind(fixed, StepArgs(*copies.before(*first)))

    def launch(*arguments: Any) -> None:
        taken = copies.before(*arguments)
        inner(*taken)
        for i in copies.results:
            arguments[i].copy_(taken[i])

    return launch


class _Copies:
    """Copies, around a launch, the tensors that do not lie as the backend takes them."""

    def __init__(self, backend: Backend, first: StepArgs) -> None:
        x, output, table, row, seeds, noise, guidance, threshold, out, x0, next_input, x0_before = (
            first
        )
        self.channels = x.shape[1] if layout.has_variance(output, x) else None
        # Per-sample values and stacked inputs require every sample to be one contiguous block.
        stacked = next_input is not None and len(next_input) > len(x)
        rows_differ = isinstance(row, Tensor) and row.stride(0) != 0
        of_samples = guidance is not None or threshold is not None or rows_differ or stacked
        orderly = not (backend.in_order and seeds is not None) or (
            x.is_contiguous() or layout.is_channels_last(x)
        )
        self.x = not layout.is_dense(x) or not orderly or (of_samples and not layout.apart(x))
        x = x.contiguous() if self.x else x
        output = output if self.channels is None else output[:, : self.channels]
        self.output = not layout.readable(output, x, backend.reads)
        self.seeds = seeds is not None and not seeds.is_contiguous()
        self.table = not table.is_contiguous()
        self.noise = noise is not None and not layout.alike(noise, x)
        self.out = not layout.alike(out, x)
        self.x0 = x0 is not None and not layout.alike(x0, x)
        self.next = next_input is not None and not layout.writable(next_input, x)
        self.history = x0_before is not None and not layout.alike(x0_before, x)
        copied = {"out": self.out, "x0": self.x0, "next_input": self.next}
        # The positions in ``StepArgs`` of the results that are copied back to the caller's tensors.
        self.results = [StepArgs._fields.index(name) for name in copied if copied[name]]

    @property
    def needed(self) -> bool:
        return self.channels is not None or any(
            (
                *(self.x, self.output, self.table, self.seeds, self.noise),
                *(self.out, self.x0, self.next, self.history),
            )
        )

    def before(
        self,
        x: Tensor,
        output: Tensor,
        table: Tensor,
        row: int | Tensor,
        seeds: Tensor | None,
        noise: Tensor | None,
        guidance: Tensor | None,
        threshold: Tensor | None,
        out: Tensor,
        x0: Tensor | None,
        next_input: Tensor | None,
        history: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """Returns the backend's arguments: copies where these do not lie as it takes them."""
        if self.x:
            x = x.contiguous()
        if self.channels is not None:
            output = output[:, : self.channels]
        if self.output:
            output = layout.with_batch(len(output), x, output.dtype).copy_(output)
        if self.seeds and seeds is not None:
            seeds = seeds.contiguous()
        if self.noise and noise is not None:
            noise = layout.like(x).copy_(noise)
        if self.out:
            out = layout.like(x)
        if self.x0:
            x0 = layout.like(x)
        if self.next and next_input is not None:
            next_input = layout.with_batch(len(next_input), x, next_input.dtype)
        if self.history and history is not None:
            history = layout.like(x).copy_(history)
        table = table.contiguous()
        return (
            x,
            output,
            table,
            row,
            seeds,
            noise,
            guidance,
            threshold,
            out,
            x0,
            next_input,
            history,
        )
