"""The backend ``torch`` takes steps by PyTorch's operations, on a CPU in cache-sized blocks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastddim.coefficients import COLUMNS, PREDICTIONS
from fastddim.step import backends, layout, philox, reference
from fastddim.step.backends import Backend, Fixed, Launch, StepArgs, numbers_of
from fastddim.step.rows import Factors, factors_of, read_factors, rows_differ, rows_of

C1 = COLUMNS.index("c1")

BLOCK = 32752
"""A block of this many elements stays in a core's cache. The number is just below the 32,768
elements that PyTorch hands to OpenMP, and a multiple of four, the elements of one Philox call."""

PART = 4 * BLOCK
"""The elements of one operation for each thread that shares it: enough to outweigh Python and the
barrier at the operation's end, and few enough to stay in the cache for the next operation."""

SMALL = 64
"""Below this many elements a sample, multiplying by a column of guidance is slow, so one number
replaces a column of equal numbers."""


def bind(fixed: Fixed, first: StepArgs) -> Launch:
    """Chooses between the blocked step and the reference: see ``backends.Backend``."""
    return _on_cpu(fixed, first.x) if first.x.is_cpu else partial(_by_reference, fixed)


def _on_cpu(fixed: Fixed, x: Tensor) -> Launch:
    """Returns the launch on a CPU, which takes a batch that fits one block as a whole."""
    total, batch, dtype = x.numel(), len(x), x.dtype
    light = fixed.prediction == 0 and fixed.clip is None
    light = light and not fixed.rederive and not fixed.posterior
    """Such a step needs no memory for x0 where the caller does not want it."""
    each = (-1, *[1] * (x.dim() - 1))

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
        history: Tensor | None = None,
    ) -> None:
        if total > BLOCK and total > _together():
            _in_blocks(
                fixed, x, output, table, row, seeds, noise, guidance, threshold, out, x0, history
            )
        else:
            factors = factors_of(table, row)
            if factors[0].dim():
                factors = tuple(f.view(each) for f in factors)
            if seeds is not None and factors[C1].any():  # c1 = 0 at the last row.
                noise = drawn(x, seeds, numbers_of(table, row), _numpy_normal_)
            # Views of the scratch memory cost as much as an operation: each thread keeps its last.
            if _own.terms[0] is not launch:
                _own.terms = launch, *_terms(x)
            _, term, scaled, x0_own, guided, extrapolated = _own.terms
            if output.dtype is not dtype:
                output = output.to(dtype)
            if guidance is not None:
                uncond, cond = output[:batch], output[batch:]
                w = guidance.view(each) if guidance.stride(0) else guidance[0]
                output = torch.sub(cond, uncond, out=guided).mul_(w).add_(uncond)
            if light and noise is None and threshold is None and x0 is None and history is None:
                a_t, _, b_t, _, a_s, _, c2, *more = factors
                torch.mul(output, b_t if fixed.rounding is None else more[1], out=term)
                torch.sub(x, term, out=out).div_(a_t).mul_(a_s)
                out.add_(torch.mul(output, c2, out=term))
            else:
                _step(
                    fixed,
                    x,
                    output,
                    factors,
                    noise,
                    _spread(threshold, each, scaled),
                    out,
                    x0_own if x0 is None or history is not None else x0,
                    term,
                    scaled,
                    history,
                    extrapolated,
                )
                if history is not None and x0 is not None:  # which may be the same tensor
                    x0.copy_(x0_own)
        if next_input is not None:
            layout.write_next(next_input, out)

    return launch


def _terms(x: Tensor) -> list[Tensor]:
    """Returns memory for the five terms of a step, laid out as x."""
    count, scratch = x.numel(), _scratch(5 * x.numel(), x.dtype)
    return [scratch.as_strided(x.shape, x.stride(), k * count) for k in range(5)]


def _in_blocks(
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
    history: Tensor | None,
) -> None:
    """Takes the step of a batch that is more than one block."""
    batch = x.shape[0]
    n = x.numel() // batch
    if guidance is not None and n < SMALL and batch > 1:
        guidance = _one_if_equal(guidance)
    factors = read_factors(table, row)
    if seeds is not None and not factors[C1].any():
        seeds = None  # c1 = 0 at the last row: no noise is added.
    if seeds is not None and not x.is_contiguous():
        noise, seeds = drawn(x, seeds, numbers_of(table, row), _numpy_normal_), None
    rows = None if seeds is None else rows_of(numbers_of(table, row), batch)

    apart = guidance is not None or by_sample(row, guidance, threshold) or _apart(output, x)
    whole = apart or seeds is not None
    room = min(_together(), x.numel())
    scratch = _scratch(6 * room, x.dtype)
    stride = output.stride(0)
    for sample, samples, first, count in _blocks(batch, n, whole):
        start, group = sample * n + first, slice(sample, sample + samples)

        def own(k: int, size: tuple[int, int] = (samples, count)) -> Tensor:
            return scratch.as_strided(size, (size[1], 1), k * room)

        term = scaled = own(0)
        if noise is not None or seeds is not None:
            scaled = own(1)
        e = _block(output, sample * stride + first, samples, count, stride).to(x.dtype)
        if guidance is not None:
            of_cond = (batch + sample) * stride + first
            cond = _block(output, of_cond, samples, count, stride).float()
            each = batch > 1 and guidance.stride(0) != 0
            w = guidance[group, None] if each else guidance[0]
            e = torch.sub(cond, e, out=own(2)).mul_(w).add_(e)
        z = None if noise is None else _block(noise, start, samples, count, n)
        if seeds is not None and rows is not None:
            z = scaled
            philox.normals(
                seeds[group].numpy(),
                rows[group].numpy(),
                count,
                philox.STEP_STREAM,
                first=first,
                out=z.numpy(),
            )
        x0_block = None if x0 is None else _block(x0, start, samples, count, n)
        before = None if history is None else _block(history, start, samples, count, n)
        predicted = own(4) if x0_block is None or before is not None else x0_block
        _step(
            fixed,
            _block(x, start, samples, count, n),
            e,
            tuple(f[group] for f in factors) if factors[0].dim() else factors,
            z,
            None if threshold is None else _spread(threshold[group], (-1, 1), own(3)),
            _block(out, start, samples, count, n),
            predicted,
            term,
            scaled,
            before,
            own(5),
        )
        if before is not None and x0_block is not None:
            x0_block.copy_(predicted)


def _by_reference(
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
    """Launches the reference, on any device but a CPU."""
    if seeds is not None:
        noise = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        numbers = rows_of(numbers_of(table, row), len(x))
        normal_(noise, seeds, numbers, philox.STEP_STREAM)
    each = (-1, *[1] * (x.dim() - 1))
    factors = table[row] if isinstance(row, int) else table[row].view(*each, table.shape[1])
    x_s, predicted = reference.ddim_step(
        x,
        output.to(x.dtype),
        factors,
        noise,
        PREDICTIONS[fixed.prediction],
        fixed.clip,
        fixed.noise_first,
        None if guidance is None else guidance.reshape(each),
        None if threshold is None else threshold.reshape(each),
        fixed.rederive,
        history,
        fixed.posterior,
        fixed.rounding,
    )
    out.copy_(x_s)
    if x0 is not None:
        x0.copy_(predicted)
    if next_input is not None:
        layout.write_next(next_input, out)


def by_sample(row: int | Tensor, guidance: Tensor | None, threshold: Tensor | None) -> bool:
    """Returns whether samples may have rows, guidance or thresholds of their own."""
    of_guidance = guidance is not None and guidance.stride(0) != 0
    return threshold is not None or of_guidance or rows_differ(row)


def _one_if_equal(numbers: Tensor) -> Tensor:
    """Returns the numbers, (batch,), with a stride of 0 where all of them are equal."""
    count = numbers.shape[0]
    if numbers.stride(0) == 0 or count == 1:
        return numbers
    low, high = torch.aminmax(numbers)
    return numbers[:1].expand(count) if low == high else numbers


def drawn(
    x: Tensor,
    seeds: Tensor,
    row: int | Tensor,
    fill: Callable[[Tensor, Tensor, Tensor, int], None],
) -> Tensor:
    """Returns counter noise laid out as x: each logical element's own, in any layout."""
    logical = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    fill(logical, seeds, rows_of(row, len(x)), philox.STEP_STREAM)
    return logical if x.is_contiguous() else torch.empty_like(x).copy_(logical)


def normal_(out: Tensor, seeds: Tensor, rows: Tensor, stream: int) -> None:
    """Fills ``out``, contiguous float32 (batch, ...), with counter noise."""
    if out.is_cpu:
        _numpy_normal_(out, seeds, rows, stream)
        return
    on_cpu = torch.empty(out.shape, dtype=torch.float32, device="cpu")
    backends.backend("cpu").normal_(on_cpu, seeds.cpu(), rows.cpu(), stream)
    out.copy_(on_cpu)


def _numpy_normal_(out: Tensor, seeds: Tensor, rows: Tensor, stream: int) -> None:
    if out.numel():
        flat = out.view(out.shape[0], -1)
        philox.normals(seeds.numpy(), rows.numpy(), flat.shape[1], stream, out=flat.numpy())


def _step(
    fixed: Fixed,
    x: Tensor,
    output: Tensor,
    factors: Factors,
    z: Tensor | None,
    threshold: Tensor | None,
    out: Tensor,
    x0: Tensor,
    term: Tensor,
    scaled: Tensor,
    history: Tensor | None,
    extrapolated: Tensor,
) -> None:
    """Takes ``reference.ddim_step`` in place; factors and thresholds are scalars or columns.

    It never uses add_(alpha=): a fused multiply-add rounds once where the reference rounds twice.
    """
    prediction, noise_first, clip, rederive, posterior, rounding = fixed
    a_t, _, b_t, _, a_s, c1, c2, *more = factors
    times_a, times_b = (a_t, b_t) if rounding is None else more
    eps = x if posterior else output
    if prediction == 0:
        torch.mul(output, times_b, out=term)
        torch.sub(x, term, out=x0).div_(a_t)
    elif prediction == 1:
        torch.mul(output, times_b, out=term)
        torch.mul(x, times_a, out=x0).sub_(term)
        if not posterior:
            torch.mul(output, times_a, out=extrapolated)
            eps = torch.mul(x, times_b, out=term).add_(extrapolated)
    elif prediction == 3:
        torch.mul(output, times_b, out=term)
        torch.sub(x, term, out=x0)
        if not posterior:
            eps = torch.mul(output, times_a, out=term).add_(x)
    else:
        x0.copy_(output)
        if not posterior:
            torch.mul(output, times_a, out=term)
            eps = torch.sub(x, term, out=term).div_(b_t)
    if clip is not None:
        x0.clamp_(-clip, clip)
    if threshold is not None and rounding is None:
        x0.clamp_(-threshold, threshold).div_(threshold)
    elif threshold is not None:  # PyTorch bounds in float32, and rounds the quotient alone
        x0.copy_(x0.float().clamp_(-threshold, threshold).div_(threshold))
    if rederive:
        torch.mul(x0, times_a, out=term)
        eps = torch.sub(x, term, out=term).div_(b_t)
    if history is not None:
        x0, eps = _extrapolated(x, x0, eps, history, more[0], extrapolated)
    direction = torch.mul(eps, c2, out=term)
    torch.mul(x0, a_s, out=out)  # Last, because ``out`` may be x.
    if z is None:
        out.add_(direction)
        return
    torch.mul(z, c1, out=scaled)
    if noise_first:
        out.add_(scaled).add_(direction)
    else:
        out.add_(direction).add_(scaled)


def _spread(threshold: Tensor | None, shape: tuple[int, ...], into: Tensor) -> Tensor | None:
    """Returns each sample's threshold for its elements, in ``into`` unless that has half precision.

    An operation with a column is slower, and a half precision tensor would round the thresholds.
    """
    if threshold is None:
        return None
    column = threshold.view(shape)
    return into.copy_(column) if into.dtype is torch.float32 else column


def _extrapolated(
    x: Tensor, x0: Tensor, eps: Tensor, history: Tensor, kappa: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns D = x0 + κ·(x0 − x0′) and x where κ is not 0, and x0 and ε elsewhere."""
    if not kappa.dim() and not kappa:
        return x0, eps
    torch.sub(x0, history, out=out).mul_(kappa).add_(x0)
    if not kappa.dim():
        return out, x
    first = kappa == 0
    return torch.where(first, x0, out), torch.where(first, eps, x)


def _most() -> int:
    """Returns the most elements of one operation. A forked child has one thread."""
    return BLOCK if backends.forked() else PART * torch.get_num_threads()


def _together() -> int:
    """Returns the most elements of a batch that is taken as one block."""
    return BLOCK if backends.forked() else 2 * _most()


class _Own(threading.local):
    room: Tensor | None = None
    terms: tuple[Any, ...] = (None,)
    """This thread's last launch, and the launch's terms."""


_own = _Own()


def _scratch(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns memory for ``count`` elements or more, which this thread keeps for its next step.

    Fresh memory, with a page fault for each 4 KiB, costs more than the operations that write it.
    """
    room = _own.room
    if room is None or len(room) < count or dtype is not torch.float32:
        # Steps outside inference mode cannot write to a tensor that was made inside it.
        with torch.inference_mode(False):
            if room is None or len(room) < count:
                room = _own.room = torch.empty(count, dtype=torch.float32, device="cpu")
            return room if dtype is torch.float32 else room.view(dtype)
    return room


def _blocks(batch: int, n: int, whole: bool) -> Iterator[tuple[int, int, int, int]]:
    """Yields blocks as (sample, samples, first element, elements of each).

    With ``whole`` a block holds as many whole samples as fit, or a part of one sample. Without it
    all samples count as one.

    One thread takes the first block, which gives its time for an element. Later blocks are shared
    among threads for as long as that is faster: a barrier waits for every thread, and on a busy
    machine a thread may wait for a core a hundred times as long as its part of the work takes.
    A batch of no more than two shared blocks is one block, because each block costs some 20 µs.
    """
    if not whole:
        batch, n = 1, batch * n
    size, cost = BLOCK if batch * n > _together() else _together(), 0.0
    sample = first = 0
    while sample < batch:
        together = 1 if first else max(1, size // n)
        samples, count = min(together, batch - sample), min(size, n - first)
        began = time.perf_counter()
        yield sample, samples, first, count
        took = (time.perf_counter() - began) / (samples * count)
        if not cost:
            size, cost = _most(), took
        elif took > cost:
            size = BLOCK
        first += count
        if first == n:
            sample, first = sample + samples, 0


def _apart(output: Tensor, x: Tensor) -> bool:
    """Returns whether there is a gap between one sample of the output and the next."""
    return len(x) > 1 and output.stride(0) != x.stride(0)


def _block(tensor: Tensor, first: int, samples: int, count: int, stride: int) -> Tensor:
    """Returns a view of ``count`` elements of each of some samples, which lie ``stride`` apart."""
    return tensor.as_strided((samples, count), (stride, 1), tensor.storage_offset() + first)


BACKEND = Backend("torch", bind, normal_, rounds=("cpu",))
