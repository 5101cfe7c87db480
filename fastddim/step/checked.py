"""``ddim_step`` checks its arguments and takes a step; ``bind`` returns the step of a loop."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastddim.check import finite, whole
from fastddim.step import bound
from fastddim.step.arguments import (
    STATE,
    check_memory,
    checked_fixed,
    checked_rows,
    checked_table,
    transformed,
)
from fastddim.step.backends import Fixed, Launch, StepArgs, again, backend, chosen
from fastddim.step.bound import by_op, by_op_again, is_plain, watched
from fastddim.step.op import written
from fastddim.step.traced import traced_step


def ddim_step(
    x: Tensor,
    output: Tensor,
    table: Tensor,
    rows: Tensor | int,
    seeds: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    guidance: Tensor | float | None = None,
    prediction: str = "epsilon",
    clip: float | None = None,
    threshold: Tensor | None = None,
    rederive: bool = False,
    posterior: bool = False,
    noise_first: bool = True,
    want_x0: bool = True,
    out: Tensor | None = None,
    x0_out: Tensor | None = None,
    next_input: Tensor | None = None,
    history: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns (x_s, x0) of the step t → s in one pass over memory, value-identical to PyTorch.

        x0  = (x_t − √(1−ᾱ_t)·ε) / √ᾱ_t
        x_s = √ᾱ_s·x0 + c1·z + c2·ε                    (Song et al. 2021, eq. 12)

    Args:
        x: x_t, float32 of shape (batch, ...). Written only if it is ``out`` too.
        output: the model's output, of x's shape: float32, bfloat16 or float16. The arithmetic
            is float32. Where the output has twice x's channels (dimension 1 of three or more),
            the second half is a learned variance, which the step ignores. Never written.
        table: the coefficients, float32 (steps, 7), from ``fastddim.make_table``.
        rows: the row each sample is on: an int, or int32 of shape () or (batch,) on x's device.
            On a GPU the numbers in a tensor are not checked, since that would be a host sync.
        seeds: int64 (batch,): counter noise, see ``step.philox``. A row with c1 = 0 adds none.
        noise: z itself, float32 of x's shape, in place of seeds. With neither, no noise is added.
        guidance: w of classifier-free guidance (Ho and Salimans 2022), a number or float32 of
            shape () or (batch,). ``output`` is then (2·batch, ...), u without the condition and c
            with it, and the step takes u + w·(c − u).
        prediction: the quantity in ``output``: ``"epsilon"``, ``"v"``, ``"sample"`` (x0), or
            ``"flow"``, ε − x0 on a path with α + σ = 1.
        clip: x0 is clamped to ±clip; ε changes with ``rederive`` alone.
        threshold: s, float32 > 0 of shape () or (batch,): x0 is clamped to ±s and divided by s,
            in place of ``clip``. This is dynamic thresholding (Saharia et al. 2022, section 2.3),
            where s is max(quantile, 1).
        rederive: whether ε is computed again from the clamped x0, ε = (x − √ᾱ_t·x0)/√(1−ᾱ_t).
        posterior: whether x_t takes the place of ε: x_s = p·x0 + c1·z + q·x_t, with p and q in the
            columns of √ᾱ_s and c2. DDPM's posterior mean has this form (Ho et al. 2020, eq. 7).
        noise_first: whether c1·z is added before c2·ε (the paper's code) or after it (diffusers).
        want_x0: whether x0 is returned; ``None`` stands in its place otherwise.
        out: x_s is written here: float32 of x's shape, by default a new tensor. It may be x
            itself, which saves a tensor's memory; with another argument it shares none.
        x0_out: x0 is written here, likewise, but not over x.
        next_input: x_s is written here as well, in this tensor's dtype (float32, bfloat16 or
            float16): once in x's shape, or twice in a tensor of twice the batch, for guidance.
        history: x0′, the x0 of the step before, float32 of x's shape, for a table of order 2
            (``make_table``): D = x0 + κ·(x0 − x0′) takes x0's place in x_s, and ε_D that of ε,
            with neither clamped again. Where κ = 0, in the first row, history is not used, and any
            tensor will do. ``x0_out`` may be the same tensor.

    Raises:
        TypeError, ValueError: naming the argument, the value and what is allowed.
    """
    arguments = (
        x,
        output,
        table,
        rows,
        seeds,
        noise,
        guidance,
        threshold,
        want_x0,
        out,
        x0_out,
        next_input,
        history,
    )
    if torch.compiler.is_compiling():  # A trace must not depend on ``_steps``.
        return _traced(
            checked_fixed(prediction, clip, rederive, noise_first, posterior), *arguments
        )
    # True would find the step of clip 1.0, which it equals, and would not be refused.
    if clip is not None and clip.__class__ is not float:
        clip = finite("clip", clip)
    key = prediction, clip, rederive, noise_first, posterior, chosen()
    try:
        step = _steps.get(key)
    except TypeError:  # ``checked_fixed`` refuses an option that has no hash.
        step = None
    if step is None:
        step = _Step(checked_fixed(prediction, clip, rederive, noise_first, posterior), chosen())
        if len(_steps) >= _MOST:
            _steps.clear()
        _steps[key] = step
    return step(*arguments)


_steps: dict[tuple[Any, ...], _Step] = {}
_MOST = 64
"""The most sets of options that are kept, and the most layouts of tensors for each."""


class BoundStep:
    """``ddim_step`` with a fixed table and fixed options: ``fastddim.bind`` returns it.

    The first call checks the tensors, picks the backend and compiles. A later call compares dtypes,
    shapes, strides, devices and which arguments are None, and launches; where one differs, the call
    checks and binds again. The backend is chosen when the step is bound. Threads and trajectories
    may share a step: it keeps no state between calls.
    """

    def __init__(self, table: Tensor, step: _Step) -> None:
        self._table, self._step = table, step

    def __call__(
        self,
        x: Tensor,
        output: Tensor,
        rows: Tensor | int,
        seeds: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        guidance: Tensor | float | None = None,
        threshold: Tensor | None = None,
        want_x0: bool = True,
        out: Tensor | None = None,
        x0_out: Tensor | None = None,
        next_input: Tensor | None = None,
        history: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (x_s, x0): see ``ddim_step``, whose arguments these are.

        Code that torch.compile has traced uses the backend that is in use when it runs.
        """
        arguments = (
            x,
            output,
            self._table,
            rows,
            seeds,
            noise,
            guidance,
            threshold,
            want_x0,
            out,
            x0_out,
            next_input,
            history,
        )
        if torch.compiler.is_compiling():
            return _traced(self._step.fixed, *arguments)
        return self._step(*arguments)


def bind(
    table: Tensor,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    rederive: bool = False,
    noise_first: bool = True,
    posterior: bool = False,
) -> BoundStep:
    """Returns the step for your own loop, which fixes the options that all steps share.

        step = fastddim.bind(torch.tensor(ddim.table, device=x.device), clip=1.0)
        for row, (t, s) in enumerate(ddim.pairs):
            output = model(x, torch.full((len(x),), t, device=x.device))
            x, x0 = step(x, output, row)

    Args:
        table, prediction, clip, rederive, noise_first, posterior: as in ``ddim_step``.

    Returns:
        A ``BoundStep``, which takes ``ddim_step``'s remaining arguments and returns (x_s, x0).

    Raises:
        TypeError, ValueError: naming the argument, the value and what is allowed. A call of the
            step raises them for its tensors.
    """
    table = checked_table(table)
    return BoundStep(
        table, _Step(checked_fixed(prediction, clip, rederive, noise_first, posterior), chosen())
    )


class _Step:
    """The step with one set of options, which checks its arguments."""

    __slots__ = ("_chosen", "_latest", "_launches", "_weight", "fixed")

    def __init__(self, fixed: Fixed, chosen: str | None) -> None:
        self.fixed, self._chosen = fixed, chosen
        self._launches: dict[tuple[Any, ...], Launch] = {}
        self._latest: tuple[tuple[Any, ...], Launch] = (), bound.nothing
        self._weight: tuple[float, int, Tensor] | None = None

    def __call__(
        self,
        x: Tensor,
        output: Tensor,
        table: Tensor,
        rows: Tensor | int,
        seeds: Tensor | None,
        noise: Tensor | None,
        guidance: Tensor | float | None,
        threshold: Tensor | None,
        want_x0: bool,
        out: Tensor | None,
        x0_out: Tensor | None,
        next_input: Tensor | None,
        history: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        try:
            seen: tuple[Any, ...] = (
                x.__class__,
                x.is_neg(),
                x._is_zerotensor(),
                x.dtype,
                x.shape,
                x.stride(),
                x.device,
                output.__class__,
                output.is_neg(),
                output._is_zerotensor(),
                output.dtype,
                output.shape,
                output.stride(),
                output.device,
                table.__class__,
                table.is_neg(),
                table.dtype,
                table.shape,
                table.stride(),
                table.device,
                int if rows.__class__ is int else _seen(rows),
                seeds if seeds is None else _seen(seeds),
                noise if noise is None else _seen(noise),
                guidance if guidance is None else _seen(guidance),
                threshold if threshold is None else _seen(threshold),
                out if out is None else _seen(out),
                x0_out if x0_out is None else _seen(x0_out),
                next_input if next_input is None else _seen(next_input),
                history if history is None else _seen(history),
                want_x0,
            )
            latest, launch = self._latest
            known: Launch | None = launch if seen == latest else self._launches.get(seen)
        except (AttributeError, RuntimeError, TypeError):
            # An argument is no tensor, has no strides, or has symbolic sizes.
            seen, latest, known = (), (), None
        if known is None or watched() or transformed():
            plain = False
        elif (out is not None or x0_out is not None or next_input is not None) and _shared(
            x, output, noise, history, out, x0_out, next_input
        ):
            plain = False  # ``check_memory`` finds it, and raises.
        else:
            plain = not torch.is_grad_enabled() or not _require_grad(
                x,
                output,
                table,
                seeds,
                noise,
                guidance,
                threshold,
                out,
                x0_out,
                next_input,
                history,
            )
        if not plain:
            rows = checked_rows(
                self.fixed, x, output, table, rows, seeds, noise, guidance, threshold, out, x0_out,
                next_input, history,
            )  # fmt: skip
        elif isinstance(rows, int) and not 0 <= rows < table.shape[0]:
            whole("rows", rows, low=0, high=len(table) - 1)

        batch = x.shape[0]
        if isinstance(rows, Tensor) and not rows.dim():
            rows = rows.expand(batch)
        w = None if guidance is None else self._weights(guidance, batch, x.device)
        if threshold is not None and not threshold.dim():
            threshold = threshold.expand(batch)
        x_s = torch.empty_like(x) if out is None else out
        x0 = x0_out if x0_out is not None or not want_x0 else torch.empty_like(x)
        if not plain:
            first = StepArgs(
                x, output, table, rows, seeds, noise, w, threshold, x_s, x0, next_input, history
            )
            known = self._bound(seen, first)
        elif seen != latest:
            self._latest = seen, known  # type: ignore[assignment]
        known(x, output, table, rows, seeds, noise, w, threshold, x_s, x0, next_input, history)  # type: ignore[misc]
        if out is not None or x0_out is not None or next_input is not None:
            written(out, x0_out, next_input)
        return x_s, x0

    def _bound(self, seen: tuple[Any, ...], first: StepArgs) -> Launch:
        """Returns the launch for these arguments, or the op where the launch would hide them."""
        plain = all(is_plain(tensor) for tensor in first if isinstance(tensor, Tensor))
        if watched() or transformed() or not plain:
            return partial(by_op_again, self._chosen, self.fixed)
        check_memory(first)
        with again(self._chosen):
            found = backend(first.x.device)
        launch = bound.bind(found, self.fixed, first)
        if seen:
            if len(self._launches) >= _MOST:
                self._launches.clear()
            self._launches[seen] = launch
        return launch

    def _weights(self, w: Tensor | float, batch: int, device: torch.device) -> Tensor:
        """Returns w as float32 (batch,): the same tensor as before for the same number."""
        if isinstance(w, Tensor):
            return w if w.dim() else w.expand(batch)
        kept = self._weight
        own = device.type == "cpu" and not watched()
        if own and kept is not None and kept[0] == w and kept[1] == batch:
            return kept[2]
        scale = torch.full((), finite("guidance", w), dtype=STATE, device=device).expand(batch)
        # Not kept: a GPU's tensor, which belongs to a stream or to a graph being captured; a
        # dispatch mode's, which belongs to the mode (it may be fake); and 0.0, which equals -0.0.
        if own and w:
            self._weight = w, batch, scale
        return scale


def _traced(
    fixed: Fixed,
    x: Tensor,
    output: Tensor,
    table: Tensor,
    rows: Tensor | int,
    seeds: Tensor | None,
    noise: Tensor | None,
    guidance: Tensor | float | None,
    threshold: Tensor | None,
    want_x0: bool,
    out: Tensor | None,
    x0_out: Tensor | None,
    next_input: Tensor | None,
    history: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Takes the step as torch.compile traces it: by the checks, and the op or the plain maths.

    On a CPU the maths have eager's bits, and a fused loop of them takes an eighth of the op's time
    at 1x16x7. On other devices Inductor rounds otherwise (Triton contracts a·b + c), and the op
    keeps the bits. Counter noise needs the op.
    """
    rows = checked_rows(
        fixed, x, output, table, rows, seeds, noise, guidance, threshold, out, x0_out, next_input,
        history,
    )  # fmt: skip
    batch = x.shape[0]
    if not isinstance(rows, Tensor):  # torch.compile would compile anew for each number
        rows = torch.full((), rows, dtype=torch.int32, device=x.device)
    w = None
    if guidance is not None:
        if not isinstance(guidance, Tensor):
            guidance = torch.full((), guidance, dtype=STATE, device=x.device)
        w = guidance.expand(batch)
    if threshold is not None:
        threshold = threshold.expand(batch)
    if x.is_cpu and seeds is None:
        found, clean = traced_step(
            fixed, x, output.float(), table, rows.reshape(-1), noise, w, threshold, history
        )
        if next_input is not None:
            next_input.copy_(found.repeat(next_input.shape[0] // batch, *(1,) * (x.dim() - 1)))
        x_s = found if out is None else out.copy_(found)
        if not want_x0 and x0_out is None:
            return x_s, None
        return x_s, clean if x0_out is None else x0_out.copy_(clean)
    rows = rows.expand(batch)
    out = torch.empty_like(x) if out is None else out
    x0 = x0_out if x0_out is not None or not want_x0 else torch.empty_like(x)
    by_op(fixed, x, output, table, rows, seeds, noise, w, threshold, out, x0, next_input, history)
    return out, x0


def _seen(tensor: Any) -> Any:
    """Returns the key of a launch for this value: a tensor's layout, or ``float`` for a number."""
    if tensor.__class__ is float or tensor.__class__ is int:
        return float
    kind, odd = tensor.__class__, tensor.is_neg() or tensor._is_zerotensor()
    return kind, odd, tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def _shared(
    x: Tensor,
    output: Tensor,
    noise: Tensor | None,
    history: Tensor | None,
    out: Tensor | None,
    x0_out: Tensor | None,
    next_input: Tensor | None,
) -> bool:
    """Returns whether a result is to be written over another result, or over an argument."""
    if out is not None and (out is output or out is noise or out is history):
        return True
    if x0_out is not None and (x0_out is x or x0_out is output or x0_out is noise or x0_out is out):
        return True
    return next_input is not None and (
        next_input is x
        or next_input is output
        or next_input is noise
        or next_input is history
        or next_input is out
        or next_input is x0_out
    )


def _require_grad(*tensors: Any) -> bool:
    return any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)
