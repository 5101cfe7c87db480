"""One DDIM step in one pass over memory: the kernel, and a function for each term."""

# Triton compiles these bodies; pyright takes its language for functions that never return.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .layout import (
    FAR,
    IN_ORDER,
    TILE,
    accesses,
    as_state,
    block_channels,
    draw,
    early_of,
    layout_of,
    left_of,
    load_all,
    place,
    quotient,
)
from .noise import key_of

# What the model returns, as ints, which Triton's cache key and a C signature can hold.
EPSILON = tl.constexpr(0)
V = tl.constexpr(1)
SAMPLE = tl.constexpr(2)
FLOW = tl.constexpr(3)


@triton.jit
def divide(x, c, rcp_c, FINITE: tl.constexpr, PORTABLE: tl.constexpr):
    """Returns x / c, correctly rounded for |x| > 2⁻¹⁰⁰, from rcp_c = fl(1/c).

    tl.div_rn costs 25 instructions and a call for each element. Where q is not finite the residual
    is NaN and q is the result; ``FINITE`` says that q is finite. The interpreter's fma does not
    fuse, so that it takes tl.div_rn. ``c * -1.0`` flips c's sign inside the fma at no cost; ``-c``
    is 0 − c, an instruction.
    """
    if PORTABLE:
        return tl.div_rn(x, tl.zeros_like(x) + c)
    q = x * rcp_c
    y = tl.fma(tl.fma(c * -1.0, q, x), rcp_c, q)
    return y if FINITE else tl.where(tl.abs(q) < float("inf"), y, q)


@triton.jit
def guide(output, cond, w):
    """Returns u + w·(c − u), where the model's output holds u and c, or the output alone."""
    return output if w is None else output + w * (cond - output)


@triton.jit
def rounded(x, dtype: tl.constexpr, PORTABLE: tl.constexpr):
    """Returns x in ``dtype``, rounded to nearest even; the interpreter truncates to bfloat16."""
    if PORTABLE and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(x == x, bits, 0x7FC0)  # the sum could carry a NaN into the sign
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def eager(x, dtype: tl.constexpr, PORTABLE: tl.constexpr):
    """Returns x rounded to the state's dtype, as eager PyTorch rounds the result of an operation.

    A float32 state stays as it is.
    """
    return x if dtype == tl.float32 else rounded(x, dtype, PORTABLE).to(tl.float32)


@triton.jit
def predict_x0(
    x, output, a_t, rcp_a_t, times_a, times_b,
    PREDICTION: tl.constexpr, STATE: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Returns x0 by the model's output; a_t = α_t, and times_a and times_b are α_t and σ_t."""
    if PREDICTION == V:
        first = eager(times_a * x, STATE, PORTABLE)
        return eager(first - eager(times_b * output, STATE, PORTABLE), STATE, PORTABLE)
    if PREDICTION == SAMPLE:
        return output
    x0 = eager(x - eager(output * times_b, STATE, PORTABLE), STATE, PORTABLE)
    if PREDICTION == FLOW:
        return x0
    return eager(divide(x0, a_t, rcp_a_t, False, PORTABLE), STATE, PORTABLE)


@triton.jit
def bound_x0(x0, clip, threshold, rcp_threshold, STATE: tl.constexpr, PORTABLE: tl.constexpr):
    """Returns x0 clamped to ±clip, or to ±s and divided by s; NaN stays NaN, as in torch.clamp."""
    if clip is not None:
        x0 = tl.clamp(x0, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
    if threshold is not None:
        x0 = tl.clamp(x0, -threshold, threshold, propagate_nan=tl.PropagateNan.ALL)
        # With an infinite s the residual would be NaN, so the largest float32 stands for s there.
        c = threshold if PORTABLE else tl.minimum(threshold, 3.4028234663852886e38)
        x0 = eager(divide(x0, c, rcp_threshold, True, PORTABLE), STATE, PORTABLE)
    return x0


@triton.jit
def predict_eps(
    x, output, x0, bounded_x0, b_t, rcp_b_t, times_a, times_b,
    PREDICTION: tl.constexpr, REDERIVE: tl.constexpr, POSTERIOR: tl.constexpr,
    STATE: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Returns ε by the model's output, or by the bounded x0 with ``REDERIVE``.

    With ``POSTERIOR`` it returns x_t, which takes the place of ε in the sum.
    """
    if POSTERIOR:
        return x
    if PREDICTION == EPSILON and not REDERIVE:
        return output
    of = bounded_x0 if REDERIVE else x0 if PREDICTION == SAMPLE else output
    term = eager(times_a * of, STATE, PORTABLE)
    if PREDICTION == V and not REDERIVE:
        return eager(term + eager(times_b * x, STATE, PORTABLE), STATE, PORTABLE)
    if PREDICTION == FLOW and not REDERIVE:
        return eager(x + term, STATE, PORTABLE)
    direction = eager(x - term, STATE, PORTABLE)
    return eager(divide(direction, b_t, rcp_b_t, False, PORTABLE), STATE, PORTABLE)


@triton.jit
def combine(
    x0, eps, z, a_s, c1, c2,
    NOISE: tl.constexpr, NOISE_FIRST: tl.constexpr, STATE: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Returns x_s = √ᾱ_s·x0 + c1·z + c2·ε, summed in the order of the original loop.

    The store rounds the last sum.
    """
    x_s = eager(a_s * x0, STATE, PORTABLE)
    if NOISE and NOISE_FIRST:
        x_s = eager(x_s + eager(c1 * z, STATE, PORTABLE), STATE, PORTABLE)
    x_s = x_s + eager(c2 * eps, STATE, PORTABLE)
    if NOISE and not NOISE_FIRST:
        x_s = eager(x_s, STATE, PORTABLE) + eager(c1 * z, STATE, PORTABLE)
    return x_s


@triton.jit
def extrapolate(x, x0, eps, x0_before, kappa):
    """D = x0 + κ·(x0 − x0′), and x, of which a row with κ ≠ 0 holds the factors; else x0 and ε."""
    first = kappa == 0.0
    d = x0 + kappa * (x0 - x0_before)
    return tl.where(first, x0, d), tl.where(first, eps, x)


@triton.jit
def finish(
    x, output, z, x0_before, access, factors, kappa, bounds, written,
    PREDICTION: tl.constexpr, NOISE: tl.constexpr, NOISE_FIRST: tl.constexpr,
    REDERIVE: tl.constexpr, POSTERIOR: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Takes the step of one access: x0, its bounds, ε, x_s, and the stores."""
    begin, offsets, mask = access
    a_t, rcp_a_t, b_t, rcp_b_t, a_s, c1, c2, times_a, times_b = factors
    clip, threshold, rcp_threshold = bounds
    out_ptr, x0_ptr, next_ptr, next_again_ptr = written
    STATE: tl.constexpr = out_ptr.dtype.element_ty

    predicted = predict_x0(x, output, a_t, rcp_a_t, times_a, times_b, PREDICTION, STATE, PORTABLE)
    x0 = bound_x0(predicted, clip, threshold, rcp_threshold, STATE, PORTABLE)
    eps = predict_eps(
        x, output, predicted, x0, b_t, rcp_b_t, times_a, times_b,
        PREDICTION, REDERIVE, POSTERIOR, STATE, PORTABLE,
    )  # fmt: skip
    d = x0
    if kappa is not None:
        d, eps = extrapolate(x, x0, eps, x0_before, kappa)
    x_s = combine(d, eps, z, a_s, c1, c2, NOISE, NOISE_FIRST, STATE, PORTABLE)

    tl.store(out_ptr + begin + offsets, rounded(x_s, STATE, PORTABLE), mask=mask)
    if x0_ptr is not None:
        tl.store(x0_ptr + begin + offsets, rounded(x0, STATE, PORTABLE), mask=mask)
    if next_ptr is not None:
        model_input = rounded(x_s, next_ptr.dtype.element_ty, PORTABLE)
        tl.store(next_ptr + begin + offsets, model_input, mask=mask)
        if next_again_ptr is not None:
            tl.store(next_again_ptr + begin + offsets, model_input, mask=mask)


SIZES = [
    "one_row", "size", "samples", "minus_blocks", "blocks_magic", "blocks_shift", "output_stride",
    "rows_stride", "guidance_stride",
]  # fmt: skip


# The kernel reads one number at a time through these pointers, so that their alignment does not
# change the code. Triton would otherwise compile a second variant for addresses that are not
# multiples of 16, as most rows' addresses are not.
SCALARS = [
    "table_ptr", "rows_ptr", "seeds_ptr", "guidance_ptr", "threshold_ptr", "rcp_threshold_ptr",
]  # fmt: skip


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SCALARS)
def ddim_step_kernel(
    x_ptr,
    output_ptr,
    noise_ptr,
    out_ptr,
    x0_ptr,
    next_ptr,
    history_ptr,
    table_ptr,
    rows_ptr,
    seeds_ptr,
    guidance_ptr,
    threshold_ptr,
    rcp_threshold_ptr,
    one_row,
    size,
    samples,
    minus_blocks,
    blocks_magic,
    blocks_shift,
    output_stride,
    rows_stride,
    guidance_stride,
    clip,
    COLUMNS: tl.constexpr,
    PREDICTION: tl.constexpr,
    NOISE_FIRST: tl.constexpr,
    REDERIVE: tl.constexpr,
    POSTERIOR: tl.constexpr,
    NEXT_TWICE: tl.constexpr,
    CHANNELS: tl.constexpr,
    X_PIXEL: tl.constexpr,
    OUTPUT_PIXEL: tl.constexpr,
    FOURS: tl.constexpr,
    EVEN: tl.constexpr,
    PORTABLE: tl.constexpr,
    QUADS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Writes x_s, and x0 and the next input where they have pointers, of one block of one sample.

    The grid has one axis, since the others end at 65,535. ``size`` is the number of elements of a
    sample, or of a channel where CHANNELS > 0; ``output_stride`` is the distance of two samples of
    the output. Both count fours with ``FOURS`` and elements without. ``minus_blocks`` is the number
    of blocks of a sample, negated, so that one multiply-add gives the block's number.

    None is a choice at compile time: for a pointer, that its tensor is absent; for
    ``minus_blocks``, that there is one sample; for ``rows_stride`` and ``guidance_stride``, that
    all samples have the first value; for ``output_stride``, that the output's samples are as far
    apart as x's. Values that change between calls are read from device memory, so that one captured
    graph serves all calls.

    With CHANNELS = 0, state and output lie in the order of the elements. Otherwise their pixels lie
    X_PIXEL and OUTPUT_PIXEL elements apart, 1 where channel follows channel (``layout``). With EVEN
    all blocks of a sample are full, and no access is masked.
    """
    LAYOUT: tl.constexpr = layout_of(CHANNELS, FOURS)
    WIDTH: tl.constexpr = block_channels(CHANNELS, LAYOUT)
    C: tl.constexpr = CHANNELS if CHANNELS > 0 else 1
    UNIT: tl.constexpr = 4 if FOURS else 1
    GROUPS: tl.constexpr = C // WIDTH
    # Whether all tensors begin alike in 16 bytes of memory, though a sample is no multiple of four.
    ALIGNED: tl.constexpr = (
        LAYOUT == IN_ORDER and not FOURS and not NEXT_TWICE
        and seeds_ptr is None and guidance_ptr is None and output_stride is None
    )  # fmt: skip
    ROUNDS: tl.constexpr = out_ptr.dtype.element_ty != tl.float32
    pid = tl.program_id(0)
    first_channel = (pid % GROUPS * WIDTH).to(tl.int64)
    block, sample = pid // GROUPS, tl.zeros_like(pid)
    if minus_blocks is not None:
        sample = quotient(block, blocks_magic, blocks_shift).to(tl.int32)
        block += sample * minus_blocks
    block, sample = block.to(tl.int64), sample.to(tl.int64)

    row = one_row
    if rows_ptr is not None:
        row = tl.load(rows_ptr if rows_stride is None else rows_ptr + sample * rows_stride)
    key, w, threshold, rcp_threshold = None, None, None, None
    number = row  # the counter noise's
    if seeds_ptr is not None:
        key = key_of(seeds_ptr, sample)
        if COLUMNS == 9:
            number = tl.load(table_ptr + row.to(tl.int64) * COLUMNS + 8).to(tl.int32)
    if guidance_ptr is not None:
        of_sample = 0 if guidance_stride is None else sample * guidance_stride
        w = tl.load(guidance_ptr + of_sample)
    if threshold_ptr is not None:
        threshold = tl.load(threshold_ptr + sample)
        rcp_threshold = tl.load(rcp_threshold_ptr + sample)

    # A block's begin has 64 bits, and offsets from there fit in 32. The products of two variables
    # come first: one instruction multiplies them while both are widened from 32 bits.
    elements = sample * size.to(tl.int64) * (UNIT * C)
    output_elements, n_pixels = elements, size.to(tl.int64) * UNIT
    all_elements = samples.to(tl.int64) * size.to(tl.int64) * (UNIT * C)
    all_output_elements = all_elements
    if output_stride is not None:
        output_elements = sample * output_stride.to(tl.int64) * UNIT
        all_output_elements = samples.to(tl.int64) * output_stride.to(tl.int64) * UNIT
    first_quad = block * (PARTS * QUADS)
    begin = place(elements, first_quad, first_channel, n_pixels, X_PIXEL)
    output_begin = begin
    if output_stride is not None or OUTPUT_PIXEL != X_PIXEL:
        output_begin = place(output_elements, first_quad, first_channel, n_pixels, OUTPUT_PIXEL)
    cond_ptr, next_again_ptr = output_ptr, None
    if guidance_ptr is not None:
        cond_ptr = output_ptr + all_output_elements
    if NEXT_TWICE:
        next_again_ptr = next_ptr + all_elements
    # A function takes this tuple, but none returns one: Triton 3.6 cannot return a None.
    written = (out_ptr, x0_ptr, next_ptr, next_again_ptr)

    factors, kappa = (), None
    early = early_of(elements, first_channel, size, WIDTH, LAYOUT, FOURS, ALIGNED)
    skipped = ()
    for k in tl.static_range(WIDTH):
        skipped = skipped + (tl.where(first_quad == 0, early[k], 0),)
    left = FAR if EVEN else left_of(size, first_quad * (4 // UNIT))
    if ALIGNED:
        # From this form Triton knows that the address of a four is a multiple of 16 bytes.
        begin = begin >> 2 << 2
        output_begin = begin
    noise_of = (number, key, first_quad, first_channel, n_pixels, size)
    for part in tl.static_range(PARTS):
        here = accesses(
            begin, n_pixels, left, early, skipped,
            C, X_PIXEL, WIDTH, LAYOUT, FOURS, key is not None, ALIGNED, part * QUADS, QUADS,
        )  # fmt: skip
        there = accesses(
            output_begin, n_pixels, left, early, skipped,
            C, OUTPUT_PIXEL, WIDTH, LAYOUT, FOURS, key is not None, ALIGNED, part * QUADS, QUADS,
        )  # fmt: skip
        # A tile's noise is turned through shared memory before the loads, which would hold 32
        # registers meanwhile. Elsewhere the noise is drawn while the loads are under way.
        z = ()
        if key is not None and LAYOUT == TILE:
            z = draw(noise_of, C, X_PIXEL, WIDTH, LAYOUT, FOURS, part * QUADS, QUADS, PORTABLE)
        # All loads precede all stores: a compiler cannot move a load before a store.
        x = load_all(x_ptr, here)
        output = as_state(load_all(output_ptr, there), C, OUTPUT_PIXEL, X_PIXEL, LAYOUT)
        cond = output
        if w is not None:
            cond = as_state(load_all(cond_ptr, there), C, OUTPUT_PIXEL, X_PIXEL, LAYOUT)
        if noise_ptr is not None:
            z = load_all(noise_ptr, here)
        before = x
        if history_ptr is not None:
            before = load_all(history_ptr, here)
        if part == 0:
            # The factors wait for the row, so that the loads of the state are issued first.
            for column in tl.static_range(7):
                factors = factors + (tl.load(table_ptr + row.to(tl.int64) * COLUMNS + column),)
            if history_ptr is not None:
                kappa = tl.load(table_ptr + row.to(tl.int64) * COLUMNS + 7)
            if ROUNDS:
                times_a = tl.load(table_ptr + row.to(tl.int64) * COLUMNS + 7)
                times_b = tl.load(table_ptr + row.to(tl.int64) * COLUMNS + 8)
                factors = factors + (times_a, times_b)
            else:
                factors = factors + (factors[0], factors[2])
        if key is not None and LAYOUT != TILE:
            z = draw(noise_of, C, X_PIXEL, WIDTH, LAYOUT, FOURS, part * QUADS, QUADS, PORTABLE)
        for i in tl.static_range(len(here)):
            finish(
                x[i].to(tl.float32), guide(output[i].to(tl.float32), cond[i].to(tl.float32), w),
                z[i].to(tl.float32) if len(z) > 0 else 0.0, before[i], here[i], factors, kappa,
                (clip, threshold, rcp_threshold), written,
                PREDICTION, noise_ptr is not None or seeds_ptr is not None, NOISE_FIRST,
                REDERIVE, POSTERIOR, PORTABLE,
            )  # fmt: skip
