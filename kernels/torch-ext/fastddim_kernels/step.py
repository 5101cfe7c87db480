"""One DDIM step in Triton, one pass over memory: the kernel, its body term by term."""

# Triton compiles these bodies; to pyright its language is made of functions that never return.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .noise import join4, philox_normal4

# Compile-time choices, as plain ints so that a cache key and a C signature can hold them.
EPSILON = tl.constexpr(0)
V = tl.constexpr(1)
SAMPLE = tl.constexpr(2)

FAR = tl.constexpr(1 << 30)
"""Beyond every block: what is left of a sample is compared in 32 bits."""


@triton.jit
def divide(x, c, rcp_c, FINITE: tl.constexpr, PORTABLE: tl.constexpr):
    """x / c, correctly rounded, from rcp_c = fl(1/c): exact for |x| > 2⁻¹⁰⁰.

    tl.div_rn costs 25 instructions and a call for each element. Where q is not finite the residual
    is NaN and q itself the answer: ``FINITE`` says that this cannot be. The interpreter does not
    fuse its fma, hence the twin.
    """
    if PORTABLE:
        return tl.div_rn(x, tl.zeros_like(x) + c)
    q = x * rcp_c
    y = tl.fma(tl.fma(-c, q, x), rcp_c, q)
    return y if FINITE else tl.where(tl.abs(q) < float("inf"), y, q)


@triton.jit
def guide(output, cond_ptr, base, offsets, mask, w):
    """output_u + w·(output_c − output_u), where the model's output holds both halves."""
    if w is not None:
        cond = tl.load(cond_ptr + base + offsets, mask=mask).to(tl.float32)
        output = output + w * (cond - output)
    return output


@triton.jit
def predict_x0(x, output, a_t, rcp_a_t, b_t, PREDICTION: tl.constexpr, PORTABLE: tl.constexpr):
    """x0 from what the model returned; a_t = √ᾱ_t, b_t = √(1−ᾱ_t)."""
    if PREDICTION == EPSILON:
        return divide(x - output * b_t, a_t, rcp_a_t, False, PORTABLE)
    if PREDICTION == V:
        return a_t * x - b_t * output
    return output


@triton.jit
def bound_x0(x0, clip, threshold, rcp_threshold, PORTABLE: tl.constexpr):
    """x0 within ±clip, or within ±s and then divided by s; NaN stays NaN, as in torch.clamp."""
    if clip is not None:
        x0 = tl.clamp(x0, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
    if threshold is not None:
        x0 = tl.clamp(x0, -threshold, threshold, propagate_nan=tl.PropagateNan.ALL)
        # An infinite s: the residual is then x0 itself, and nothing remains of it.
        c = threshold if PORTABLE else tl.minimum(threshold, 3.4028234663852886e38)
        x0 = divide(x0, c, rcp_threshold, True, PORTABLE)
    return x0


@triton.jit
def predict_eps(
    x, output, x0, bounded_x0, a_t, b_t, rcp_b_t,
    PREDICTION: tl.constexpr, REDERIVE: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """ε from what the model returned; rederived, from the x0 that was bounded."""
    if REDERIVE:
        return divide(x - a_t * bounded_x0, b_t, rcp_b_t, False, PORTABLE)
    if PREDICTION == EPSILON:
        return output
    if PREDICTION == V:
        return a_t * output + b_t * x
    return divide(x - a_t * x0, b_t, rcp_b_t, False, PORTABLE)


@triton.jit
def combine(x0, eps, z, a_s, c1, c2, NOISE: tl.constexpr, NOISE_FIRST: tl.constexpr):
    """x_s = √ᾱ_s·x0 + c1·z + c2·ε, summed in the order of the loop that is replaced."""
    if not NOISE:
        return a_s * x0 + c2 * eps
    if NOISE_FIRST:
        return a_s * x0 + c1 * z + c2 * eps
    return a_s * x0 + c2 * eps + c1 * z


@triton.jit
def rounded(x, dtype: tl.constexpr, PORTABLE: tl.constexpr):
    """x in ``dtype``, to nearest even: the interpreter would cut bfloat16 off."""
    if PORTABLE and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(x == x, bits, 0x7FC0)  # the sum could carry a NaN into the sign
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def fetch(state, model, bases, access, w):
    """(x, what the model says of it, z): all that one access reads."""
    x_ptr, noise_ptr, _, _, _, _ = state
    output_ptr, cond_ptr = model
    base, output_base = bases
    offsets, output_offsets, mask, z = access
    x = tl.load(x_ptr + base + offsets, mask=mask)
    output = tl.load(output_ptr + output_base + output_offsets, mask=mask).to(tl.float32)
    output = guide(output, cond_ptr, output_base, output_offsets, mask, w)
    if noise_ptr is not None:
        z = tl.load(noise_ptr + base + offsets, mask=mask)
    return x, output, z


@triton.jit
def finish(
    fetched, access, factors, bounds, state, base,
    PREDICTION: tl.constexpr, NOISE: tl.constexpr, NOISE_FIRST: tl.constexpr,
    REDERIVE: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """The step itself: predict x0, bound it, direction, noise, store."""
    x, output, z = fetched
    offsets, _, mask, _ = access
    a_t, rcp_a_t, b_t, rcp_b_t, a_s, c1, c2 = factors
    clip, threshold, rcp_threshold = bounds
    _, _, out_ptr, x0_ptr, next_ptr, next_again_ptr = state

    predicted = predict_x0(x, output, a_t, rcp_a_t, b_t, PREDICTION, PORTABLE)
    x0 = bound_x0(predicted, clip, threshold, rcp_threshold, PORTABLE)
    eps = predict_eps(x, output, predicted, x0, a_t, b_t, rcp_b_t, PREDICTION, REDERIVE, PORTABLE)
    x_s = combine(x0, eps, z, a_s, c1, c2, NOISE, NOISE_FIRST)

    tl.store(out_ptr + base + offsets, x_s, mask=mask)
    if x0_ptr is not None:
        tl.store(x0_ptr + base + offsets, x0, mask=mask)
    if next_ptr is not None:
        model_input = rounded(x_s, next_ptr.dtype.element_ty, PORTABLE)
        tl.store(next_ptr + base + offsets, model_input, mask=mask)
        if next_again_ptr is not None:
            tl.store(next_again_ptr + base + offsets, model_input, mask=mask)


@triton.jit
def step_noise(quad, row, seed, PORTABLE: tl.constexpr):
    """The normals of elements 4·quad … 4·quad + 3, or four zeros where there is no seed."""
    if seed is None:
        return 0.0, 0.0, 0.0, 0.0
    else:  # noqa: RET505  (without it Triton compiles on into what there is no seed for)
        return philox_normal4(quad, row, 0, seed, PORTABLE)


@triton.jit
def in_order(j, first_quad, n_elements, noise_of, FOURS: tl.constexpr, PORTABLE: tl.constexpr):
    """The accesses of these fours of a sample that lies in the order of its elements."""
    row, seed = noise_of
    z = step_noise(first_quad + j, row, seed, PORTABLE)
    left = tl.minimum(n_elements - first_quad * 4, FAR).to(tl.int32)
    if FOURS:
        # Rows of four with the mask on the row: `offsets < n` alone, with n no multiple of 16,
        # would make every access scalar, and a flat block with a 16-bit output would exchange
        # its elements through shared memory.
        offsets = j[:, None] * 4 + tl.arange(0, 4)[None, :]
        z_row = join4(z[0], z[1], z[2], z[3]) if seed is not None else 0.0
        accesses = ((offsets, offsets, (j * 4 < left)[:, None], z_row),)
    else:
        # A sample that is no multiple of four: rows of four would reach into the next sample.
        accesses = ()
        for lane in tl.static_range(4):
            offsets = j * 4 + lane
            accesses = accesses + ((offsets, offsets, offsets < left, z[lane]),)
    return accesses


@triton.jit
def four_channels(
    j, first_quad, first_channel, n_pixels, noise_of,
    CHANNELS: tl.constexpr, OUTPUT_CHANNELS: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """The accesses of these fours of pixels that lie channels last: four channels are a row."""
    row, seed = noise_of
    z = ()
    for k in tl.static_range(4):
        quad = (first_channel + k) * (n_pixels // 4) + first_quad + j
        z = z + (step_noise(quad, row, seed, PORTABLE),)
    mask = (j * 4 < tl.minimum(n_pixels - first_quad * 4, FAR).to(tl.int32))[:, None]
    accesses = ()
    for lane in tl.static_range(4):
        pixel, c = (j * 4 + lane)[:, None], tl.arange(0, 4)[None, :]
        z_row = 0.0
        if seed is not None:
            z_row = join4(z[0][lane], z[1][lane], z[2][lane], z[3][lane])
        offsets, output_offsets = pixel * CHANNELS + c, pixel * OUTPUT_CHANNELS + c
        accesses = accesses + ((offsets, output_offsets, mask, z_row),)
    return accesses


@triton.jit
def one_channel(
    j, first_quad, start, early, n_pixels, noise_of,
    CHANNELS: tl.constexpr, OUTPUT_CHANNELS: tl.constexpr, FOURS: tl.constexpr,
    PORTABLE: tl.constexpr,
):  # fmt: skip
    """The accesses of these fours of one channel of pixels, which are that many elements apart.

    Where sizes are no multiple of four, a channel's first element, ``start``, stands anywhere in
    its four: fours begin ``early`` pixels before it, and one on a border is drawn for both
    channels. What the base lacks of it is constant, or each access would have an address to
    work out for itself.
    """
    row, seed = noise_of
    z = step_noise((start >> 2) + first_quad + j, row, seed, PORTABLE)
    left = tl.minimum(n_pixels - first_quad * 4 + early, FAR).to(tl.int32)
    skipped = tl.where(first_quad == 0, early, 0).to(tl.int32)
    accesses = ()
    for lane in tl.static_range(4):
        pixel = j * 4 + lane
        mask = j * 4 < left if FOURS else (pixel >= skipped) & (pixel < left)
        accesses = accesses + ((pixel * CHANNELS, pixel * OUTPUT_CHANNELS, mask, z[lane]),)
    return accesses


@triton.constexpr_function
def block_channels(channels):
    """How many channels a block takes of samples that lie channels last; it divides them."""
    return 4 if channels > 0 and channels % 4 == 0 else channels if 0 < channels < 4 else 1


SIZES = [
    "n_elements", "samples", "blocks_per_sample", "output_stride", "rows_stride", "guidance_stride",
]  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def ddim_step_kernel(
    x_ptr,
    output_ptr,
    noise_ptr,
    out_ptr,
    x0_ptr,
    next_ptr,
    table_ptr,
    rows_ptr,
    seeds_ptr,
    guidance_ptr,
    threshold_ptr,
    rcp_threshold_ptr,
    n_elements,
    samples,
    blocks_per_sample,
    output_stride,
    rows_stride,
    guidance_stride,
    clip,
    COLUMNS: tl.constexpr,
    PREDICTION: tl.constexpr,
    NOISE_FIRST: tl.constexpr,
    REDERIVE: tl.constexpr,
    NEXT_TWICE: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUT_CHANNELS: tl.constexpr,
    FOURS: tl.constexpr,
    PORTABLE: tl.constexpr,
    QUADS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """x_s and whatever else is asked for, of one block of one sample.

    One grid axis, since the others end at 65,535. Sizes are in elements; n_elements is a
    sample's. A pointer that is None is a choice made at compile time. What changes between calls
    is read from device memory, so that a captured graph can serve them all.

    CHANNELS = 0: a sample is one stretch of memory in the order of its elements. Otherwise its
    pixels lie CHANNELS apart, OUTPUT_CHANNELS apart in the model's output, and a block is up to
    four channels of some pixels: noise belongs to the element, wherever memory keeps it.
    """
    WIDTH: tl.constexpr = block_channels(CHANNELS)
    PIXEL: tl.constexpr = CHANNELS if CHANNELS > 0 else 1
    OUTPUT_PIXEL: tl.constexpr = OUTPUT_CHANNELS if CHANNELS > 0 else 1
    GROUPS: tl.constexpr = PIXEL // WIDTH
    pid = tl.program_id(0)
    first_channel = (pid % GROUPS * WIDTH).to(tl.int64)
    sample = pid // GROUPS // blocks_per_sample
    block = (pid // GROUPS - sample * blocks_per_sample).to(tl.int64)
    sample = sample.to(tl.int64)

    row = tl.load(rows_ptr + sample * rows_stride)
    factors = ()
    for column in tl.static_range(7):
        factors = factors + (tl.load(table_ptr + row * COLUMNS + column),)
    seed, w, threshold, rcp_threshold = None, None, None, None
    if seeds_ptr is not None:
        seed = tl.load(seeds_ptr + sample)
    if guidance_ptr is not None:
        w = tl.load(guidance_ptr + sample * guidance_stride)
    if threshold_ptr is not None:
        threshold = tl.load(threshold_ptr + sample)
        rcp_threshold = tl.load(rcp_threshold_ptr + sample)

    # A block begins at its base, in 64 bits; offsets count from there and fit in 32.
    if FOURS:  # so written, these tell the compiler of the alignment
        n_elements = n_elements // 4 * 4
        output_stride = output_stride // 4 * 4
    cond_ptr, next_again_ptr = None, None
    if guidance_ptr is not None:
        cond_ptr = output_ptr + samples.to(tl.int64) * output_stride
    if NEXT_TWICE:
        next_again_ptr = next_ptr + samples.to(tl.int64) * n_elements
    first_quad = block * (PARTS * QUADS)
    base = sample * n_elements + first_quad * 4 * PIXEL + first_channel
    output_base = sample * output_stride + first_quad * 4 * OUTPUT_PIXEL + first_channel
    # As a tuple they are passed on, but never returned: Triton 3.6 cannot return a None.
    state = (x_ptr, noise_ptr, out_ptr, x0_ptr, next_ptr, next_again_ptr)
    model = (output_ptr, cond_ptr)

    n_pixels = n_elements // PIXEL
    noise_of = (row, seed)
    for k in tl.static_range(1 if CHANNELS % 4 == 0 and FOURS else WIDTH):
        start = (first_channel + k) * n_pixels
        early = start * 0 if FOURS or CHANNELS == 0 else start & 3
        base_k = base + (k - early * PIXEL)
        output_base_k = output_base + (k - early * OUTPUT_PIXEL)
        for part in tl.static_range(PARTS):
            j = tl.arange(0, QUADS) + part * QUADS
            if CHANNELS == 0:
                accesses = in_order(j, first_quad, n_elements, noise_of, FOURS, PORTABLE)
            elif CHANNELS % 4 == 0 and FOURS:
                accesses = four_channels(
                    j, first_quad, first_channel, n_pixels, noise_of,
                    CHANNELS, OUTPUT_CHANNELS, PORTABLE,
                )  # fmt: skip
            else:
                accesses = one_channel(
                    j, first_quad, start, early, n_pixels, noise_of,
                    CHANNELS, OUTPUT_CHANNELS, FOURS, PORTABLE,
                )  # fmt: skip
            # All is read before anything is written: a load cannot be moved before a store.
            fetched = ()
            for i in tl.static_range(len(accesses)):
                fetched = fetched + (fetch(state, model, (base_k, output_base_k), accesses[i], w),)
            for i in tl.static_range(len(accesses)):
                finish(
                    fetched[i], accesses[i], factors, (clip, threshold, rcp_threshold), state,
                    base_k, PREDICTION, noise_ptr is not None or seeds_ptr is not None, NOISE_FIRST,
                    REDERIVE, PORTABLE,
                )  # fmt: skip
