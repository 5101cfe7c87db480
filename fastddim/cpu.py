"""The step on a CPU, value-identical to the reference: where numba is installed as one fused pass
(``fastddim.fused``), where it is not as PyTorch in blocks that stay in the cache."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from fastddim import noise as counter
from fastddim.coefficients import COLUMNS

_C1 = COLUMNS.index("c1")

# What stays in a core's cache, and just below the 32,768 elements that PyTorch hands to OpenMP. A
# multiple of 16, torch.randn's own stride, and so of four, the elements of one Philox call.
BLOCK = 32752

# What an operation does at a time for each thread it is shared out to: so much that neither
# Python nor the barrier at its end counts, and little enough to be in the cache for the next one.
PART = 4 * BLOCK

# Of samples smaller than this the fused pass takes longer, one after the other, than PyTorch's
# operations take over many at once: 70 ns for each, where a sample has numbers of its own.
SMALL = 64


def ddim_step(
    x: Tensor,
    output: Tensor,
    table: Tensor,
    rows: Tensor,
    seeds: Tensor | None,
    noise: Tensor | None,
    guidance: Tensor | None,
    threshold: Tensor | None,
    prediction: int,
    noise_first: bool,
    clip: float | None,
    rederive: bool,
    out: Tensor,
    x0: Tensor | None,
) -> None:
    """x_s into ``out`` and, if given, x0 into ``x0``: the Triton kernel's twin.

    ``noise``, ``out`` and ``x0`` have x's shape and strides, which are dense. So has each sample
    of ``output``, of which ``guidance`` makes 2·batch; from one to the next may be further.
    """
    if x.numel() == 0:
        return
    batch = x.shape[0]
    n = x.numel() // batch
    small = n < SMALL and batch > 1
    fused = _fused()
    if small and guidance is not None and (not fused or _rows_differ(rows)):
        guidance = _one_if_equal(guidance)
    if fused and small and seeds is not None and _by_sample(rows, guidance, threshold):
        noise, seeds = _noise(x, seeds, rows), None
    # Rows that differ are all that the fused pass takes sample by sample, however small they are.
    if fused and not (small and _rows_differ(rows)):
        fused.step(
            x,
            output,
            table,
            rows,
            seeds,
            noise,
            guidance,
            threshold,
            prediction,
            noise_first,
            clip,
            rederive,
            out,
            x0,
        )
        return
    factors = _factors(table, rows)
    if seeds is not None and not factors[_C1].any():
        seeds = None  # the last step adds no noise: do not compute any
    if seeds is not None and not x.is_contiguous():
        noise, seeds = _noise(x, seeds, rows), None

    apart = guidance is not None or _by_sample(rows, guidance, threshold) or _apart(output, x)
    whole = apart or seeds is not None
    room = min(_together(), x.numel())
    scratch = _scratch(5 * room)
    if room == x.numel() and not whole:
        shape, strides = x.shape, x.stride()
        term, scaled, x0_like = (scratch.as_strided(shape, strides, k * room) for k in range(3))
        _step(
            x,
            output.float(),
            factors,
            noise,
            prediction,
            noise_first,
            clip,
            None,
            rederive,
            out,
            x0_like if x0 is None else x0,
            term,
            scaled,
        )
        return
    stride = output.stride(0) if whole and output.shape[0] > 1 else n
    for sample, samples, first, count in _blocks(batch, n, whole):
        start, group = sample * n + first, slice(sample, sample + samples)

        def own(k: int, size: tuple[int, int] = (samples, count)) -> Tensor:
            return scratch.as_strided(size, (size[1], 1), k * room)

        term = scaled = own(0)
        if noise is not None or seeds is not None:
            scaled = own(1)
        said = _block(output, sample * stride + first, samples, count, stride).float()
        if guidance is not None:
            of_cond = (batch + sample) * stride + first
            cond = _block(output, of_cond, samples, count, stride).float()
            each = batch > 1 and guidance.stride(0) != 0
            w = guidance[group, None] if each else guidance[0]
            said = torch.sub(cond, said, out=own(2)).mul_(w).add_(said)
        z = None if noise is None else _block(noise, start, samples, count, n)
        if seeds is not None:
            z = scaled
            counter.normals(
                seeds[group].numpy(),
                rows[group].numpy(),
                count,
                counter.STEP,
                first=first,
                out=z.numpy(),
            )
        _step(
            _block(x, start, samples, count, n),
            said,
            tuple(f[group] for f in factors) if factors[0].dim() else factors,
            z,
            prediction,
            noise_first,
            clip,
            None if threshold is None else own(3).copy_(threshold[group, None]),
            rederive,
            _block(out, start, samples, count, n),
            own(4) if x0 is None else _block(x0, start, samples, count, n),
            term,
            scaled,
        )


def _by_sample(rows: Tensor, guidance: Tensor | None, threshold: Tensor | None) -> bool:
    """Whether samples may have numbers of their own."""
    of_guidance = guidance is not None and guidance.stride(0) != 0
    return threshold is not None or of_guidance or _rows_differ(rows)


def _rows_differ(rows: Tensor) -> bool:
    """Whether samples may be on rows of their own."""
    return rows.stride(0) != 0 and len(rows) > 1


def _one_if_equal(numbers: Tensor) -> Tensor:
    """One for each sample, with a stride of 0 where they are equal: for all samples at once."""
    count = numbers.shape[0]
    if numbers.stride(0) == 0 or count == 1:
        return numbers
    low, high = torch.aminmax(numbers)
    return numbers[:1].expand(count) if low == high else numbers


def _noise(x: Tensor, seeds: Tensor, rows: Tensor) -> Tensor:
    """Counter noise laid out as x: it belongs to the logical element, wherever memory keeps it."""
    logical = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    normal_(logical, seeds, rows, counter.STEP)
    return logical if x.is_contiguous() else torch.empty_like(x).copy_(logical)


def _factors(table: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    """The table's columns: of shape () where all samples are on one row, else (batch, 1).

    A column multiplied into a block of samples gives each what its own number would.
    """
    if rows.stride(0) == 0 or rows.shape[0] == 1:
        lowest = highest = int(rows[0])
    else:
        lowest, highest = (int(row) for row in torch.aminmax(rows))
    if lowest < 0 or highest >= table.shape[0]:
        raise ValueError(f"rows must lie in [0, {len(table)}), got {lowest} to {highest}")
    if lowest == highest:
        return table[lowest].unbind()
    return torch.embedding(table, rows).unsqueeze(-1).unbind(1)


def normal_(out: Tensor, seeds: Tensor, rows: Tensor, stream: int) -> None:
    """Fills ``out``, contiguous float32 (batch, ...), with counter noise."""
    fused = _fused()
    if fused:
        fused.normal_(out, seeds, rows, stream)
    elif out.numel():
        flat = out.view(out.shape[0], -1)
        counter.normals(seeds.numpy(), rows.numpy(), flat.shape[1], stream, out=flat.numpy())


def backend() -> str:
    """What takes the steps on a CPU here: ``"numba"``, or ``"torch"`` in blocks."""
    return "numba" if _fused() else "torch"


@functools.cache
def _fused() -> ModuleType | None:
    """The fused pass where numba is: imported at the first step, not with the package."""
    try:
        from fastddim import fused
    except ImportError:
        return None
    return fused


def _step(
    x: Tensor,
    output: Tensor,
    row: tuple[Tensor, ...],
    z: Tensor | None,
    prediction: int,
    noise_first: bool,
    clip: float | None,
    threshold: Tensor | None,
    rederive: bool,
    out: Tensor,
    x0: Tensor,
    term: Tensor,
    scaled: Tensor,
) -> None:
    """``reference.ddim_step`` in place, of factors and thresholds that are one number or a column.

    Never add_(alpha=), which is a fused multiply-add.
    """
    a_t, _, b_t, _, a_s, c1, c2 = row
    eps = output
    if prediction == 0:
        torch.mul(output, b_t, out=term)
        torch.sub(x, term, out=x0).div_(a_t)
    elif prediction == 1:
        torch.mul(output, b_t, out=term)
        torch.mul(x, a_t, out=x0).sub_(term)
        torch.mul(output, a_t, out=out)
        eps = torch.mul(x, b_t, out=term).add_(out)
    else:
        x0.copy_(output)
        torch.mul(output, a_t, out=term)
        eps = torch.sub(x, term, out=term).div_(b_t)
    if clip is not None:
        x0.clamp_(-clip, clip)
    if threshold is not None:
        x0.clamp_(-threshold, threshold).div_(threshold)
    if rederive:
        torch.mul(x0, a_t, out=term)
        eps = torch.sub(x, term, out=term).div_(b_t)
    torch.mul(x0, a_s, out=out)
    direction = torch.mul(eps, c2, out=term)
    if z is None:
        out.add_(direction)
        return
    torch.mul(z, c1, out=scaled)
    if noise_first:
        out.add_(scaled).add_(direction)
    else:
        out.add_(direction).add_(scaled)


def _most() -> int:
    """How many elements an operation gets at the most: in a forked child what one thread takes."""
    return BLOCK if _is_forked else PART * torch.get_num_threads()


def _together() -> int:
    """How many elements are one block if there are no more."""
    return BLOCK if _is_forked else 2 * _most()


def forked() -> bool:
    """Whether this is the child of a fork, which has none of its parent's threads.

    PyTorch's operations are shared out to them all the same, and wait for ever.
    """
    return _is_forked


_is_forked = False


def _note_fork() -> None:
    global _is_forked
    _is_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


class _Own(threading.local):
    room: Tensor | None = None


_own = _Own()


def _scratch(count: int) -> Tensor:
    """Memory of this thread's, of ``count`` elements and more, kept for its next step.

    Fresh memory costs more than the operations that write it: a page fault for each 4 KiB.
    """
    room = _own.room
    if room is None or len(room) < count:
        with torch.inference_mode(False):  # which would keep later steps from writing it
            room = _own.room = torch.empty(count, dtype=torch.float32, device="cpu")
    return room


def _blocks(batch: int, n: int, whole: bool) -> Iterator[tuple[int, int, int, int]]:
    """Blocks as (sample, samples, first element, elements of each).

    ``whole``: a block holds whole samples, as many small ones as there is room for, or a part of
    one. Else all is one sample.

    The first block is for one thread and says what an element costs it. Those after it are shared
    out for as long as that is cheaper: a barrier waits for every thread, and on a busy machine
    one of them waits for a core, which takes a hundred times as long as its part of the work.
    What is no more than two shared blocks is one: to begin a block takes some 20 µs.
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
    """Whether there is something between one sample of the output and the next."""
    return len(x) > 1 and output.stride(0) != x.stride(0)


def _block(tensor: Tensor, first: int, samples: int, count: int, stride: int) -> Tensor:
    """``count`` elements of each of some samples, ``stride`` apart in a tensor's memory."""
    return tensor.as_strided((samples, count), (stride, 1), tensor.storage_offset() + first)
