"""One DDIM step in Triton, one pass over memory: the kernel, its body term by term."""

# Triton compiles these bodies; to pyright its language is made of functions that never return.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from .noise import join4, philox_normal4

# Compile-time choices, as plain ints so that a cache key and a C signature can hold them.
EPSILON = tl.constexpr(0)
V = tl.constexpr(1)
SAMPLE = tl.constexpr(2)
NO_NOISE = tl.constexpr(0)
TENSOR = tl.constexpr(1)
PHILOX = tl.constexpr(2)


@triton.jit
def divide(x, c, rcp_c, PORTABLE: tl.constexpr):
    """x / c, correctly rounded, from rcp_c = fl(1/c): exact for |x| > 2⁻¹⁰⁰.

    tl.div_rn costs 25 instructions and a call for each element. Where q overflows the residual
    is NaN and q itself the answer. The interpreter does not fuse its fma, hence the twin.
    """
    if PORTABLE:
        return tl.div_rn(x, tl.zeros_like(x) + c)
    q = x * rcp_c
    y = tl.fma(tl.fma(-c, q, x), rcp_c, q)
    return tl.where(tl.abs(q) < float("inf"), y, q)


@triton.jit
def predict_x0(x, output, a_t, rcp_a_t, b_t, PREDICTION: tl.constexpr, PORTABLE: tl.constexpr):
    """x0 from what the model returned; a_t = √ᾱ_t, b_t = √(1−ᾱ_t)."""
    if PREDICTION == EPSILON:
        return divide(x - output * b_t, a_t, rcp_a_t, PORTABLE)
    if PREDICTION == V:
        return a_t * x - b_t * output
    return output


@triton.jit
def predict_eps(x, x0, output, a_t, b_t, rcp_b_t, PREDICTION: tl.constexpr, PORTABLE: tl.constexpr):
    """ε from what the model returned; x0 is the one not yet clipped."""
    if PREDICTION == EPSILON:
        return output
    if PREDICTION == V:
        return a_t * output + b_t * x
    return divide(x - a_t * x0, b_t, rcp_b_t, PORTABLE)


@triton.jit
def clip_x0(x0, clip, CLIP: tl.constexpr):
    """x0 within ±clip; NaN stays NaN, as in torch.clamp."""
    if CLIP:
        return tl.clamp(x0, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
    return x0


@triton.jit
def combine(x0, eps, z, a_s, c1, c2, NOISE: tl.constexpr, NOISE_FIRST: tl.constexpr):
    """x_s = √ᾱ_s·x0 + c1·z + c2·ε, summed in the order of the loop that is replaced."""
    if NOISE == NO_NOISE:
        return a_s * x0 + c2 * eps
    if NOISE_FIRST:
        return a_s * x0 + c1 * z + c2 * eps
    return a_s * x0 + c2 * eps + c1 * z


@triton.jit
def update(
    x_ptr,
    output_ptr,
    noise_ptr,
    out_ptr,
    x0_ptr,
    row_ptr,
    clip,
    z,
    offsets,
    mask,
    PREDICTION: tl.constexpr,
    NOISE: tl.constexpr,
    NOISE_FIRST: tl.constexpr,
    CLIP: tl.constexpr,
    WRITE_X0: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    """The step at these offsets: load, predict x0, clip, direction, noise, store."""
    a_t, rcp_a_t = tl.load(row_ptr), tl.load(row_ptr + 1)
    b_t, rcp_b_t = tl.load(row_ptr + 2), tl.load(row_ptr + 3)
    a_s, c1, c2 = tl.load(row_ptr + 4), tl.load(row_ptr + 5), tl.load(row_ptr + 6)

    x = tl.load(x_ptr + offsets, mask=mask)
    output = tl.load(output_ptr + offsets, mask=mask).to(tl.float32)
    if NOISE == TENSOR:
        z = tl.load(noise_ptr + offsets, mask=mask)

    x0 = predict_x0(x, output, a_t, rcp_a_t, b_t, PREDICTION, PORTABLE)
    eps = predict_eps(x, x0, output, a_t, b_t, rcp_b_t, PREDICTION, PORTABLE)
    x0 = clip_x0(x0, clip, CLIP)
    tl.store(out_ptr + offsets, combine(x0, eps, z, a_s, c1, c2, NOISE, NOISE_FIRST), mask=mask)
    if WRITE_X0:
        tl.store(x0_ptr + offsets, x0, mask=mask)


@triton.jit(do_not_specialize=["n_elements", "blocks_per_sample", "rows_stride"])
def ddim_step_kernel(
    x_ptr,
    output_ptr,
    noise_ptr,
    out_ptr,
    x0_ptr,
    table_ptr,
    rows_ptr,
    seeds_ptr,
    n_elements,
    blocks_per_sample,
    rows_stride,
    clip,
    COLUMNS: tl.constexpr,
    PREDICTION: tl.constexpr,
    NOISE: tl.constexpr,
    NOISE_FIRST: tl.constexpr,
    CLIP: tl.constexpr,
    WRITE_X0: tl.constexpr,
    VECTOR: tl.constexpr,
    PORTABLE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """x_s and, if asked for, x0 of BLOCK_SIZE elements of one sample.

    One grid axis, since the others end at 65,535. Sizes are in elements of one sample. What
    changes between calls is read from device memory, so that a captured graph can serve them all.
    """
    pid = tl.program_id(0).to(tl.int64)
    sample, block = pid // blocks_per_sample, pid % blocks_per_sample
    base = sample * n_elements
    row = tl.load(rows_ptr + sample * rows_stride)
    row_ptr = table_ptr + row * COLUMNS
    quad = block * (BLOCK_SIZE // 4) + tl.arange(0, BLOCK_SIZE // 4)

    z0, z1, z2, z3 = 0.0, 0.0, 0.0, 0.0
    if NOISE == PHILOX:
        z0 = tl.zeros((BLOCK_SIZE // 4,), tl.float32)
        z1, z2, z3 = z0, z0, z0
        if tl.load(row_ptr + 5) != 0:  # the last step adds no noise: do not compute any
            seed = tl.load(seeds_ptr + sample)
            z0, z1, z2, z3 = philox_normal4(quad, row, 0, seed, PORTABLE)

    if VECTOR:
        # Rows of four with the mask on the row: `offsets < n` alone, with n no multiple of 16,
        # would make every access scalar, and a flat block with a 16-bit output would exchange
        # its elements through shared memory.
        quads = tl.multiple_of(n_elements, 4) // 4
        offsets = (sample * quads + quad)[:, None] * 4 + tl.arange(0, 4)[None, :]
        z = join4(z0, z1, z2, z3) if NOISE == PHILOX else z0
        update(
            x_ptr, output_ptr, noise_ptr, out_ptr, x0_ptr, row_ptr, clip, z,
            offsets, (quad < quads)[:, None],
            PREDICTION, NOISE, NOISE_FIRST, CLIP, WRITE_X0, PORTABLE,
        )  # fmt: skip
    else:
        # A sample that is no multiple of four: rows of four would reach into the next sample.
        z = (z0, z1, z2, z3)
        for lane in tl.static_range(4):
            offsets = quad * 4 + lane
            update(
                x_ptr, output_ptr, noise_ptr, out_ptr, x0_ptr, row_ptr, clip, z[lane],
                base + offsets, offsets < n_elements,
                PREDICTION, NOISE, NOISE_FIRST, CLIP, WRITE_X0, PORTABLE,
            )  # fmt: skip
