"""The step on a CPU, value-identical to the reference: where numba is installed as one fused pass
(``fastddim.fused``), where it is not as PyTorch in blocks that stay in the cache."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from fastddim import noise as counter

# PyTorch hands 32,768 elements and more to OpenMP, whose barrier waits for a core that may be
# busy with something else (100 times slower then). A multiple of 16, torch.randn's own stride,
# and so of four, the elements of one Philox call.
BLOCK = 32752


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
    fused = _fused()
    if fused:
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
    batch, n = x.shape[0], x.numel() // x.shape[0]
    row_of = rows.tolist() if rows.stride(0) else [int(rows[0])] * batch
    if min(row_of) < 0 or max(row_of) >= len(table):
        raise ValueError(f"rows must lie in [0, {len(table)}), got {min(row_of)} to {max(row_of)}")
    if seeds is not None and not table[row_of, 5].any():
        seeds = None  # the last step adds no noise: do not compute any
    if seeds is not None and not x.is_contiguous():
        # Noise belongs to the logical element, wherever memory keeps it.
        logical = torch.empty(x.shape, dtype=torch.float32)
        normal_(logical, seeds, rows, counter.STEP)
        noise, seeds = torch.empty_like(x).copy_(logical), None

    apart = guidance is not None or threshold is not None or _apart(output, x)
    alone = apart or len(set(row_of)) > 1
    stride = output.stride(0) if apart and len(output) > 1 else n
    flat_x, flat_out = _flat(x), _flat(out)
    flat_noise = None if noise is None else _flat(noise)
    flat_x0 = None if x0 is None else _flat(x0)
    scratch = torch.empty(4, min(BLOCK, x.numel()), dtype=torch.float32)
    factors = {row: table[row].unbind() for row in set(row_of)}
    for sample, samples, first, count in _blocks(batch, n, alone, seeds is not None):
        start = sample * n + first
        part = slice(start, start + samples * count)
        x0_block, term, scaled, guided = scratch[:, : samples * count].unbind()
        said = _stretch(output, sample * stride + first, samples * count).float()
        if guidance is not None:
            cond = _stretch(output, (batch + sample) * stride + first, count).float()
            said = torch.sub(cond, said, out=guided).mul_(guidance[sample]).add_(said)
        z = None if flat_noise is None else flat_noise[part]
        if seeds is not None:
            group = slice(sample, sample + samples)
            z = scaled
            counter.normals(
                seeds[group].numpy(),
                rows[group].numpy(),
                count,
                counter.STEP,
                first=first,
                out=z.view(samples, count).numpy(),
            )
        _step(
            flat_x[part],
            said,
            factors[row_of[sample]],
            z,
            prediction,
            noise_first,
            clip,
            None if threshold is None else threshold[sample],
            rederive,
            flat_out[part],
            x0_block if flat_x0 is None else flat_x0[part],
            term,
            scaled,
        )


def normal_(out: Tensor, seeds: Tensor, rows: Tensor, stream: int) -> None:
    """Fills ``out``, contiguous float32 (batch, ...), with counter noise."""
    fused = _fused()
    if fused:
        fused.normal_(out, seeds, rows, stream)
    elif out.numel():
        flat = out.view(out.shape[0], -1)
        counter.normals(seeds.numpy(), rows.numpy(), flat.shape[1], stream, out=flat.numpy())


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
    """``reference.ddim_step`` in place. Never add_(alpha=), which is a fused multiply-add."""
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


def _blocks(
    batch: int, n: int, alone: bool, counter_noise: bool
) -> Iterator[tuple[int, int, int, int]]:
    """Blocks as (sample, samples, first element, elements of each): whole samples or one's part.

    ``alone``: no block holds two samples. Else, without counter noise, all is one sample.
    """
    if not alone and not counter_noise:
        batch, n = 1, batch * n
    together = 1 if alone else max(1, BLOCK // n)
    for sample in range(0, batch, together):
        samples = min(together, batch - sample)
        for first in range(0, n, BLOCK):
            yield sample, samples, first, min(BLOCK, n - first)


def _apart(output: Tensor, x: Tensor) -> bool:
    """Whether there is something between one sample of the output and the next."""
    return len(x) > 1 and output.stride(0) != x.stride(0)


def _stretch(tensor: Tensor, first: int, count: int) -> Tensor:
    """So many elements of a tensor's memory."""
    return tensor.as_strided((count,), (1,), tensor.storage_offset() + first)


def _flat(tensor: Tensor) -> Tensor:
    """A dense tensor's memory as one vector, whatever the order of its dimensions."""
    return tensor.as_strided((tensor.numel(),), (1,))
