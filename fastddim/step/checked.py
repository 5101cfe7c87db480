"""``ddim_step`` takes a step of unchecked arguments; ``bind`` returns one for many calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastddim.check import finite, kind, whole
from fastddim.coefficients import COLUMNS, PREDICTIONS
from fastddim.step import bound, layout
from fastddim.step.backends import Fixed, Launch, again, backend, chosen
from fastddim.step.bound import by_op, by_op_again, is_plain, watched
from fastddim.step.op import written

_STATE = torch.float32
OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)


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
    noise_first: bool = True,
    want_x0: bool = True,
    out: Tensor | None = None,
    x0_out: Tensor | None = None,
    next_input: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns (x_s, x0) of the step t → s in one pass over memory, value-identical to PyTorch.

        x0  = (x_t − √(1−ᾱ_t)·ε) / √ᾱ_t
        x_s = √ᾱ_s·x0 + c1·z + c2·ε                    (Song et al. 2021, eq. 12)

    Args:
        x: x_t, float32 of shape (batch, ...). Never written.
        output: what the model returned, of x's shape: float32, bfloat16 or float16. The
            arithmetic is float32. With twice x's channels (dimension 1 of three or more) the
            first half counts: a learned variance follows. Never written.
        table: the coefficients, float32 (steps, 7), from ``fastddim.make_table``.
        rows: the row each sample is on: an int, or int32 of shape () or (batch,) on x's device.
            On a GPU a tensor's rows are not checked, since that would wait for the device.
        seeds: int64 (batch,): counter noise, see ``step.philox``. A row with c1 = 0 adds none.
        noise: z itself, float32 of x's shape, in place of seeds. With neither, no noise is added.
        guidance: w of classifier-free guidance (Ho and Salimans 2022), a number or float32 of
            shape () or (batch,). ``output`` is then (2·batch, ...), first without the condition
            and then with it, and u + w·(c − u) stands in its place.
        prediction: what ``output`` is: ``"epsilon"``, ``"v"`` or ``"sample"`` (x0).
        clip: x0 is clamped to ±clip; ε is not derived from it again.
        threshold: s, float32 > 0 of shape () or (batch,): x0 is clamped to ±s and divided by s,
            in place of ``clip``. This is dynamic thresholding (Saharia et al. 2022, section 2.3),
            where s is max(quantile, 1).
        rederive: whether ε is computed again from the clamped x0, ε = (x − √ᾱ_t·x0)/√(1−ᾱ_t).
        noise_first: whether c1·z is added before c2·ε (the paper's code) or after it (diffusers).
        want_x0: whether x0 is returned; ``None`` stands in its place otherwise.
        out: x_s is written here: float32 of x's shape, not overlapping an argument. A new tensor
            takes it where none is given.
        x0_out: x0 is written here, likewise.
        next_input: x_s is written here as well, in this tensor's dtype (float32, bfloat16 or
            float16): once in x's shape, or twice in a tensor of twice the batch, for guidance.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    given = (
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
    )
    if torch.compiler.is_compiling():  # A trace must not depend on what is kept below.
        return _traced(_fixed(prediction, clip, rederive, noise_first), *given)
    # The key has clip's class too: True equals 1.0, but is refused as a number to clip by.
    if clip is not None and clip.__class__ is not float:
        clip = finite("clip", clip)
    key = prediction, clip, rederive, noise_first, chosen()
    try:
        step = _steps.get(key)
    except TypeError:  # An option without a hash is none that exists: ``_fixed`` refuses it.
        step = None
    if step is None:
        step = _Step(_fixed(prediction, clip, rederive, noise_first), chosen())
        if len(_steps) >= _MOST:
            _steps.clear()
        _steps[key] = step
    return step(*given)


_steps: dict[tuple[Any, ...], _Step] = {}
_MOST = 64
"""At most so many sets of options are remembered, and so many layouts of tensors for each."""


class BoundStep:
    """``ddim_step`` with its table and its options decided: ``fastddim.bind`` returns it.

    The first call checks the tensors, picks the backend and compiles. A later call compares dtypes,
    shapes, strides, devices and which arguments there are, and launches; where something differs,
    it checks and binds again. The choice of a backend stays the one in use when the step was
    bound. Threads and trajectories may share a step: it keeps no state between calls.
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
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (x_s, x0): see ``ddim_step``, whose arguments these are.

        Code that torch.compile has traced uses the backend that is in use when it runs.
        """
        given = (
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
        )
        if torch.compiler.is_compiling():
            return _traced(self._step.fixed, *given)
        return self._step(*given)


def bind(
    table: Tensor,
    *,
    prediction: str = "epsilon",
    clip: float | None = None,
    rederive: bool = False,
    noise_first: bool = True,
) -> BoundStep:
    """Returns the step for a loop of one's own: what a run fixes is decided once.

        step = fastddim.bind(torch.tensor(ddim.table, device=x.device), clip=1.0)
        for row, (t, s) in enumerate(ddim.pairs):
            output = model(x, torch.full((len(x),), t, device=x.device))
            x, x0 = step(x, output, row)

    Args:
        table, prediction, clip, rederive, noise_first: as in ``ddim_step``.

    Returns:
        A ``BoundStep``, which takes ``ddim_step``'s remaining arguments and returns (x_s, x0).

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed. A call of
            the step raises them for its tensors.
    """
    if not isinstance(table, Tensor):
        raise TypeError(f"table must be a tensor, got {kind(table)}")
    _check_tensor("table", table, table, (_STATE,), (-1, len(COLUMNS)))
    return BoundStep(table, _Step(_fixed(prediction, clip, rederive, noise_first), chosen()))


def _fixed(prediction: Any, clip: float | None, rederive: bool, noise_first: bool) -> Fixed:
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    if clip is not None:
        # ``finite`` makes a float of an int, for which Triton would compile another kernel.
        clip = finite("clip", clip)
        if not clip > 0:
            raise ValueError(f"clip must be > 0, got {clip:g}")
    return Fixed(PREDICTIONS.index(prediction), noise_first, clip, rederive)


class _Step:
    """The step with one set of options. Its arguments may be anything, and are checked."""

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
                want_x0,
            )
            latest, launch = self._latest
            known: Launch | None = launch if seen == latest else self._launches.get(seen)
        except (AttributeError, RuntimeError, TypeError):
            # One is no tensor, has no strides, or has sizes that are symbols.
            seen, latest, known = (), (), None
        if known is None or not seen or watched() or transformed():
            plain = False
        else:
            plain = not torch.is_grad_enabled() or not _require_grad(
                x, output, table, seeds, noise, guidance, threshold, out, x0_out, next_input
            )
        if not plain:
            rows = _checked(
                self.fixed, x, output, table, rows, seeds, noise, guidance, threshold, out, x0_out,
                next_input,
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
            known = self._bound(
                seen, x, output, table, rows, seeds, noise, w, threshold, x_s, x0, next_input
            )
        elif seen != latest:
            self._latest = seen, known  # type: ignore[assignment]
        known(x, output, table, rows, seeds, noise, w, threshold, x_s, x0, next_input)  # type: ignore[misc]
        if out is not None or x0_out is not None or next_input is not None:
            written(out, x0_out, next_input)
        return x_s, x0

    def _bound(self, seen: tuple[Any, ...], x: Tensor, output: Tensor, *rest: Any) -> Launch:
        """Returns the launch for these arguments, or the op where somebody is watching."""
        given = x, output, *rest
        plain = all(is_plain(tensor) for tensor in given if isinstance(tensor, Tensor))
        if watched() or transformed() or not plain:
            return partial(by_op_again, self._chosen, self.fixed)
        launch = self._launches.get(seen)
        if launch is None or not seen:
            with again(self._chosen):
                found = backend(x.device)
            launch = bound.bind(found, self.fixed, *given)
            if len(self._launches) >= _MOST:
                self._launches.clear()
            self._launches[seen] = launch
        return launch

    def _weights(self, w: Tensor | float, batch: int, device: torch.device) -> Tensor:
        """Returns w as float32 (batch,). The same number as before gives the same tensor."""
        if isinstance(w, Tensor):
            return w if w.dim() else w.expand(batch)
        kept = self._weight
        own = device.type == "cpu" and not watched()
        if own and kept is not None and kept[0] == w and kept[1] == batch:
            return kept[2]
        scale = torch.full((), finite("guidance", w), dtype=_STATE, device=device).expand(batch)
        # A GPU's belongs to a stream, and to a graph that is being captured; that of a mode, a fake
        # one say, belongs to the mode; and 0.0 equals -0.0.
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
) -> tuple[Tensor, Tensor | None]:
    """Takes the step as torch.compile traces it: by the checks and the op alone."""
    rows = _checked(
        fixed, x, output, table, rows, seeds, noise, guidance, threshold, out, x0_out, next_input
    )
    batch = x.shape[0]
    if not isinstance(rows, Tensor):  # a number in the graph would be compiled for each row
        rows = torch.full((), rows, dtype=torch.int32, device=x.device)
    if not rows.dim():
        rows = rows.expand(batch)
    w = None
    if guidance is not None:
        if not isinstance(guidance, Tensor):
            guidance = torch.full((), guidance, dtype=_STATE, device=x.device)
        w = guidance if guidance.dim() else guidance.expand(batch)
    if threshold is not None and not threshold.dim():
        threshold = threshold.expand(batch)
    out = torch.empty_like(x) if out is None else out
    x0 = x0_out if x0_out is not None or not want_x0 else torch.empty_like(x)
    by_op(fixed, x, output, table, rows, seeds, noise, w, threshold, out, x0, next_input)
    return out, x0


def _seen(tensor: Any) -> Any:
    """Returns what a launch is specialised for: a tensor's layout, or that this is a number."""
    if tensor.__class__ is float or tensor.__class__ is int:
        return float
    kind, negated = tensor.__class__, tensor.is_neg()
    return kind, negated, tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def _require_grad(*tensors: Any) -> bool:
    return any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)


def _checked(
    fixed: Fixed,
    x: Tensor,
    output: Tensor,
    table: Tensor,
    rows: Tensor | int,
    seeds: Tensor | None,
    noise: Tensor | None,
    guidance: Tensor | float | None,
    threshold: Tensor | None,
    out: Tensor | None,
    x0_out: Tensor | None,
    next_input: Tensor | None,
) -> Tensor | int:
    """Returns ``rows``, or raises where an argument is not as ``ddim_step`` asks for."""
    if not torch.compiler.is_compiling() and transformed():
        given = {"x": x, "output": output, "table": table, "rows": rows, "seeds": seeds}
        _check_constants(
            **given, noise=noise, guidance=guidance, threshold=threshold, out=out, x0_out=x0_out
        )
    _check_tensor("x", x, x, (_STATE,))
    if x.dim() == 0:
        raise ValueError("x must have shape (batch, ...), got ()")
    if guidance is not None and not isinstance(guidance, Tensor):
        finite("guidance", guidance)
    batch = x.shape[0]
    expected = x.shape if guidance is None else (2 * batch, *x.shape[1:])
    if isinstance(output, Tensor) and layout.has_variance(output, x):
        expected = (expected[0], 2 * expected[1], *expected[2:])
    _check_tensor("output", output, x, OUTPUTS, expected)
    _check_tensor("table", table, x, (_STATE,), (-1, len(COLUMNS)))
    if isinstance(rows, Tensor):
        _check_tensor("rows", rows, x, (torch.int32,), x.shape[:1] if rows.dim() else ())
    else:
        rows = whole("rows", rows, low=0, high=len(table) - 1)
    if seeds is not None:
        if noise is not None:
            raise ValueError("noise comes from seeds or from a tensor, got both")
        _check_tensor("seeds", seeds, x, (torch.int64,), x.shape[:1])
    if noise is not None:
        _check_tensor("noise", noise, x, (_STATE,))
    if isinstance(guidance, Tensor):
        _check_tensor("guidance", guidance, x, (_STATE,), x.shape[:1] if guidance.dim() else ())
    if threshold is not None:
        if fixed.clip is not None:
            raise ValueError(
                f"clip must be left out where there is a threshold, got {fixed.clip:g}"
            )
        shape = x.shape[:1] if isinstance(threshold, Tensor) and threshold.dim() else ()
        _check_tensor("threshold", threshold, x, (_STATE,), shape)
    for name, tensor in (("out", out), ("x0_out", x0_out)):
        if tensor is not None:
            _check_tensor(name, tensor, x, (_STATE,))
    if next_input is not None:
        copies = 2 if isinstance(next_input, Tensor) and next_input.shape[:1] != x.shape[:1] else 1
        _check_tensor("next_input", next_input, x, OUTPUTS, (copies * batch, *x.shape[1:]))
    return rows


def transformed() -> bool:
    """Returns whether this call is differentiated forwards or transformed by ``torch.func``.

    The op has no rule for either: its results would be constants, and memory that is kept for a
    later step would belong to the transform. torch.compile cannot trace this function. It need not,
    because it traces the op as it is.
    """
    return _interpreter() is not None or forward_ad._current_level >= 0


def check_untransformed(name: str) -> None:
    """Raises ``ValueError`` where ``name``, which carries no derivatives, runs in a transform."""
    if not torch.compiler.is_compiling() and transformed():
        raise ValueError(
            f"{name} must not run inside torch.func's transforms or forward-mode differentiation: "
            f"it carries no derivatives"
        )


_functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009 its types do not name it
_interpreter: Callable[[], Any] = _functorch.peek_interpreter_stack


def _check_tensor(
    name: str,
    tensor: Tensor,
    x: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: Sequence[int] | None = None,
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    shape = x.shape if shape is None else shape
    here = tensor.shape == shape and tensor.dtype in dtypes and tensor.device == x.device
    if here and not tensor.requires_grad:
        return  # This is the usual case, and the only one whose cost a step pays for.
    if len(tensor.shape) != len(shape) or any(
        want not in (-1, got) for want, got in zip(shape, tensor.shape, strict=True)
    ):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be {allowed}, got {str(tensor.dtype)[6:]}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x.device} with x, got {tensor.device}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, which the step does not carry: detach it or use torch.no_grad()"
        )


def _check_constants(**given: object) -> None:
    """Raises where a tensor carries a forward derivative or is one of ``torch.func``'s."""
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            continue
        wrapped = _functorch.is_functorch_wrapped_tensor(tensor)
        if wrapped or forward_ad.unpack_dual(tensor).tangent is not None:
            raise ValueError(
                f"{name} is transformed by torch.func or carries a forward derivative, which the "
                f"step does not: take it out of the transform"
            )
