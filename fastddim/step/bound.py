"""The bound step decides once what a run fixes; each call then brings addresses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastddim.step import layout
from fastddim.step.backends import Backend, Fixed, Launch, again

_MOST = 64
"""A step remembers this many layouts, and this module this many steps. More would fill memory."""


class Bound:
    """The step of one backend with one set of options, for checked arguments.

    A call compares what a launch is specialised for: sizes, strides, dtypes, and which arguments
    there are. It takes the launch of an earlier call that had the same. Otherwise it binds a new
    one: it decides which tensors are copied first, and has the backend compile.

    A bound step keeps nothing but launches between two calls, so that threads and trajectories may
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
    ) -> None:
        """Writes x_s to ``out`` and, where they are given, x0 to ``x0`` and x_s to ``next_input``.

        The tensors are on one device, and of the shapes and dtypes that ``ddim_step`` asks for;
        ``guidance`` and ``threshold`` are (batch,), and ``row`` is an int or int32 (batch,).
        """
        given = x, output, table, row, seeds, noise, guidance, threshold, out, x0, next_input
        self.launch(*given)(*given)

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
        seen: bool = True,
    ) -> Launch:
        """Returns the launch for these arguments, and for all that lie as they do.

        Where ``seen`` is True and somebody watches for the op, the launch calls the op instead.
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
        )
        latest, launch = self._latest
        if key != latest:
            found = self._launches.get(key)
            if found is None:
                given = x, output, table, row, seeds, noise, guidance, threshold, out, x0
                found = bind(self.backend, self.fixed, *given, next_input)
                if len(self._launches) >= _MOST:
                    self._launches.clear()
                self._launches[key] = found
            launch = found
            self._latest = key, launch
        return launch


def is_plain(tensor: Tensor) -> bool:
    """Returns whether the values of a tensor are what stands at its address.

    A subclass may keep them elsewhere, a tensor that is negated by a bit keeps their opposites, and
    one of zeros alone may have no memory at all. The op knows of all three.
    """
    kind = tensor.__class__
    return (
        (kind is Tensor or kind is torch.nn.Parameter)
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
    )


def watched() -> bool:
    """Returns whether a call of the op would be seen: compiled, traced, profiled, or by a mode."""
    # Each step asks this, so that no question is a call within a call.
    return is_compiling() or moded() > 0 or profiled() or _traced() is not None


def compiled() -> bool:
    """Returns whether torch.compile or torch.jit.trace notes what this code does."""
    return is_compiling() or _traced() is not None


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
) -> None:
    """Launches by the op, which torch.compile, dispatch modes, subclasses and the profiler see."""
    rows, number = (row, None) if isinstance(row, Tensor) else (None, row)
    inputs = x, output, table, rows, seeds, noise, guidance, threshold
    torch.ops.fastddim.ddim_step.default(*inputs, *fixed, out, x0, next_input, number)


def by_op_again(name: str | None, fixed: Fixed, *given: Any) -> None:
    """Launches by the op, with the backend that was chosen when the step was bound."""
    with again(name):
        by_op(fixed, *given)


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


def bind(
    backend: Backend,
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
) -> Launch:
    """Returns the backend's launch for tensors that lie as these, with the copies that it needs."""
    if not x.numel():
        return nothing
    copies = _Copies(
        backend, x, output, table, row, seeds, noise, guidance, threshold, out, x0, next_input
    )
    if not copies.needed:
        return backend.bind(
            fixed, x, output, table, row, seeds, noise, guidance, threshold, out, x0, next_input
        )
    x, output, table, seeds, noise, out, x0, next_input = copies.before(
        x, output, table, seeds, noise, out, x0, next_input
    )
    inner = backend.bind(
        fixed, x, output, table, row, seeds, noise, guidance, threshold, out, x0, next_input
    )

    def launch(
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
    ) -> None:
        read_x, read, factors, keys, z, x_s, x0_s, after = copies.before(
            x, output, table, seeds, noise, out, x0, next_input
        )
        inner(read_x, read, factors, row, keys, z, guidance, threshold, x_s, x0_s, after)
        copies.after((out, x_s), (x0, x0_s), (next_input, after))

    return launch


class _Copies:
    """Copies, around a launch, the tensors that do not lie as the backend takes them."""

    def __init__(
        self,
        backend: Backend,
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
    ) -> None:
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

    @property
    def needed(self) -> bool:
        return self.channels is not None or any(
            (self.x, self.output, self.table, self.seeds, self.noise, self.out, self.x0, self.next)
        )

    def before(
        self,
        x: Tensor,
        output: Tensor,
        table: Tensor,
        seeds: Tensor | None,
        noise: Tensor | None,
        out: Tensor,
        x0: Tensor | None,
        next_input: Tensor | None,
    ) -> tuple[
        Tensor,
        Tensor,
        Tensor,
        Tensor | None,
        Tensor | None,
        Tensor,
        Tensor | None,
        Tensor | None,
    ]:
        """Returns the tensors that the backend is given, those that it writes included."""
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
        if self.next and next_input is not None:
            next_input = layout.with_batch(len(next_input), x, next_input.dtype)
        return (
            x,
            output,
            table.contiguous(),
            seeds,
            noise,
            layout.like(x) if self.out else out,
            layout.like(x) if self.x0 else x0,
            next_input,
        )

    @staticmethod
    def after(*written: tuple[Tensor | None, Tensor | None]) -> None:
        """Copies each (given, written) pair back where the backend wrote to memory of its own."""
        for given, there in written:
            if given is not None and there is not None and there is not given:
                given.copy_(there)
