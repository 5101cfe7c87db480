"""Code that all drop-ins share: tables of factors, the generator's state, and the step's call."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastddim.coefficients import COLUMNS, PREDICTIONS, Prediction
from fastddim.step.backends import Fixed, Launch, backend, chosen
from fastddim.step.bound import by_op, nothing, step_of, watched
from fastddim.step.buffers import FRESH, Spare, fitting, memory
from fastddim.step.checked import ddim_step
from fastddim.step.on_torch import BLOCK

C1 = COLUMNS.index("c1")
"""The column of the noise's factor."""


def pack_rows(a_t: Tensor, b_t: Tensor, a_s: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """Returns the table, float32 (steps, 7), of factors that another system computes.

    The columns are those of ``COLUMNS``. The reciprocals are rounded from the float32 a_t and b_t,
    because the compiled kernel divides by multiplying with them; no other backend reads them.
    """
    a_t, b_t, a_s, c1, c2 = (column.to(torch.float32) for column in (a_t, b_t, a_s, c1, c2))
    return torch.stack([a_t, 1 / a_t, b_t, 1 / b_t, a_s, c1, c2], dim=1)


def as_eager(table: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns the table of states of this dtype, by which steps round as PyTorch rounds there.

    ``table`` is float32 (steps, 7) on the device of the system's factors, which are tensors without
    dimensions: they stand before a tensor that they multiply, and after a tensor that they divide.
    For a state on a CPU, PyTorch rounds such a factor to the state's dtype where it stands first.
    For a state on a GPU it rounds every factor that is on the GPU, and none that is on the CPU.

    Returns:
        Float32 (steps, 9) with the columns ``COLUMNS_ROUNDED``, on the table's device, or
        ``table`` itself for float32.
    """
    if dtype == torch.float32:
        return table
    times = table.to(dtype).float() if table.device.type == device.type else table
    a_t, _, b_t = (table if device.type == "cpu" else times)[:, :3].unbind(1)
    divisors = torch.stack([a_t, 1 / a_t, b_t, 1 / b_t], dim=1)
    return torch.cat([divisors, times[:, 4:], times[:, 0:3:2]], dim=1)


def rounds(x: Tensor, clip: float | None) -> bool:
    """Tells whether a step from a half precision x rounds as PyTorch does, x0 clamped to ±clip."""
    dtype = x.dtype
    return (
        (dtype == torch.bfloat16 or dtype == torch.float16)
        and x.device.type in backend(x.device).rounds
        # PyTorch refuses a bound that x's dtype does not hold.
        and (clip is None or clip <= torch.finfo(dtype).max)
    )


def checked_factors(
    factors: Callable[[float], tuple[Tensor, Tensor]], eta: float, steps: str
) -> tuple[Tensor, Tensor]:
    """Returns (c1, c2) = ``factors(eta)``, which a system's own float32 operations compute.

    Raises:
        ValueError: c2 holds a NaN. The message names the largest η that gives none for ``steps``.
    """
    c1, c2 = factors(eta)
    if c2.isnan().any():
        # Search with the same float32 operations: they may give NaN at the exact bound.
        most, least = 0, math.ceil(eta * 1e6)
        while least - most > 1:
            middle = (most + least) // 2
            if factors(middle / 1e6)[1].isnan().any():
                least = middle
            else:
                most = middle
        raise ValueError(
            f"eta must be at most {most / 1e6} for {steps} (beyond it 1 − ᾱ_s − c1² is "
            f"negative), got {eta:g}"
        )
    return c1, c2


def stream_of(device: torch.device) -> int:
    """Returns the CUDA stream that is current on ``device``, or 0 on other devices.

    Cached tables belong to one stream, because another stream would have to wait for them.
    """
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def passed_over(x: Tensor) -> Callable[[], None]:
    """Returns a function that moves the generator as ``torch.randn_like(x)`` would.

    Loops call it instead of drawing noise that has no effect.

    On a CPU, PyTorch fills a contiguous tensor with normals sixteen at a time, in order. Drawing
    block by block into the cache therefore moves the generator in the same way, and saves a pass
    over memory.
    """
    if x.device.type != "cpu" or not x.is_contiguous():
        z = torch.empty_like(x)

        def draw_all() -> None:
            z.normal_()

        return draw_all
    block = x.new_empty(min(x.numel(), 2 * BLOCK))

    def draw() -> None:
        left = x.numel()
        while left > len(block):
            block[:BLOCK].normal_()
            left -= BLOCK
        block[:left].normal_()

    return draw


class Buffers:
    """Takes steps, and reuses tensors of earlier steps that nobody references any more.

    The buffers belong to one thread. A step whose result is the input of another step needs
    separate buffers, or its results would displace the states.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Frees the memory, after the last step of a trajectory."""
        self.states, self.x0s = Spare(), Spare()
        self.noise: Tensor | None = None
        self._latest: tuple[Any, Tensor | None, Launch] = None, None, nothing

    def drawn(self, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draws normals as ``torch.randn_like(like)`` does, always into the same memory."""
        z = fitting(self.noise, like)
        if z is None:
            z = self.noise = torch.empty_like(like)
        return z.normal_(generator=generator)

    def stepped(
        self,
        table: Tensor,
        x: Tensor,
        output: Tensor,
        rows: Tensor | int,
        *,
        prediction: Prediction = "epsilon",
        clip: float | None = None,
        rederive: bool = False,
        posterior: bool = False,
        noise_first: bool = False,
        want_x0: bool = True,
        seeds: Tensor | None = None,
        noise: Tensor | None = None,
        guidance: Tensor | float | None = None,
        threshold: Tensor | None = None,
        next_input: Tensor | None = None,
        history: Tensor | None = None,
        checked: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns (x_s, x0) as ``fastddim.ddim_step`` does.

        Drop-ins call the step only here and in ``Launches``.

        ``table`` and the keywords down to ``want_x0`` stay the same in a run; the others change
        from step to step. ``checked`` skips the checks. It promises that all arguments have the
        shapes and types that the op takes, and that tensors among ``rows``, ``guidance`` and
        ``threshold`` have one value per sample. A checked step from a half precision x, of which
        ``rounds`` is true, rounds after each operation.
        """
        # For a small state, allocating costs less than looking for an unreferenced tensor.
        large = x.numel() >= FRESH and x.is_cpu
        x_s = memory(self.states, x) if large else torch.empty_like(x)
        x0 = None
        if want_x0:
            x0 = memory(self.x0s, x) if large else torch.empty_like(x)
        if checked:
            assert guidance is None or isinstance(guidance, Tensor)
            given = (
                x, output, table, rows, seeds, noise, guidance, threshold, x_s, x0, next_input,
                history,
            )  # fmt: skip
            rounding = None if x.dtype is torch.float32 else x.dtype
            options = prediction, noise_first, clip, rederive, posterior, rounding
            self._launch(options, *given)(*given)
        else:
            ddim_step(
                x,
                output,
                table,
                rows,
                seeds,
                noise=noise,
                guidance=guidance,
                prediction=prediction,
                clip=clip,
                threshold=threshold,
                rederive=rederive,
                posterior=posterior,
                noise_first=noise_first,
                want_x0=want_x0,
                out=x_s,
                x0_out=x0,
                next_input=next_input,
                history=history,
            )
        if large:
            self.states.keep(x_s)
            if x0 is not None:
                self.x0s.keep(x0)
        return x_s, x0

    def _launch(
        self,
        options: tuple[Any, ...],
        x: Tensor,
        output: Tensor,
        table: Tensor,
        rows: Tensor | int,
        seeds: Tensor | None,
        noise: Tensor | None,
        guidance: Tensor | None,
        threshold: Tensor | None,
        x_s: Tensor,
        x0: Tensor | None,
        next_input: Tensor | None,
        history: Tensor | None,
    ) -> Launch:
        """Returns the previous step's launch if only the tensors' values have changed since."""
        plain = (
            seeds is None
            and guidance is None
            and threshold is None
            and next_input is None
            and history is None
            # ``is_plain`` checks the same, but its two calls would slow a small step.
            and x.__class__ is Tensor
            and output.__class__ is Tensor
            and not (x.is_neg() or x._is_zerotensor())
            and not (output.is_neg() or output._is_zerotensor())
            and (
                noise is None
                or (noise.__class__ is Tensor and not (noise.is_neg() or noise._is_zerotensor()))
            )
            and not watched()
        )
        like = None
        if plain:
            # x decides the layout of x_s and x0. All tensors are on the table's device.
            like = (
                options,
                chosen(),
                x.shape,
                x.stride(),
                output.dtype,
                output.shape,
                output.stride(),
                x0 is None,
                None if isinstance(rows, int) else rows.stride(),
                None if noise is None else noise.stride(),
            )
            before, of, launch = self._latest
            if like == before and of is table:
                return launch
        prediction, noise_first, clip, rederive, posterior, rounding = options
        # Pipelines leave ``rederive`` at None.
        fixed = Fixed(
            PREDICTIONS.index(prediction), noise_first, clip, bool(rederive), posterior, rounding
        )
        step = step_of(backend(x.device), fixed, x.device)
        launch = step.launch(
            x, output, table, rows, seeds, noise, guidance, threshold, x_s, x0, next_input, history
        )
        if plain:
            self._latest = like, table, launch
        return launch


class Launches:
    """Takes the steps of loops of small states, and keeps a launch for each layout.

    The table and the options are those of ``Buffers.stepped``. Every tensor is float32 on the
    table's device; ``x`` and ``noise`` are plain tensors. Threads may share the launches.
    """

    def __init__(
        self,
        table: Tensor,
        prediction: Prediction,
        clip: float | None,
        rederive: bool,
        posterior: bool,
    ) -> None:
        self._table = table
        self._fixed = Fixed(PREDICTIONS.index(prediction), False, clip, rederive, posterior)
        self._kept: dict[Any, Launch] = {}

    def stepped(self, x: Tensor, output: Tensor, row: int, noise: Tensor | None) -> Tensor:
        """Returns x_s in new memory."""
        x_s = torch.empty_like(x)
        given = x, output, self._table, row, None, noise, None, None, x_s, None, None, None
        if watched() or output.is_neg() or output._is_zerotensor():
            by_op(self._fixed, *given)
            return x_s
        strides = x.stride(), output.stride(), None if noise is None else noise.stride()
        like = chosen(), x.shape, strides
        launch = self._kept.get(like)
        if launch is None:
            step = step_of(backend(x.device), self._fixed, x.device)
            launch = self._kept[like] = step.launch(*given)
        launch(*given)
        return x_s


class Own(Buffers, threading.local):
    """Gives every thread its own buffers."""

    def clear(self) -> None:
        super().clear()
        self.between = Buffers()
        """The buffers of steps whose result is the input of another step."""
