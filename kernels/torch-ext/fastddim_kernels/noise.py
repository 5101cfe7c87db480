"""Counter noise in Triton: four normals for a Philox call, and a kernel that fills a tensor."""

# Triton compiles these bodies; pyright takes its language for functions that never return.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def wide_multiply(a, M: tl.constexpr):
    """Returns the (high, low) words of a·M, on NVIDIA by one mul.wide.u32."""
    product = a.to(tl.uint64) * M
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Returns uint32 words after ten rounds of Philox4x32 (Salmon et al. 2011)."""
    for _ in tl.static_range(10):
        high0, low0 = wide_multiply(c0, 0xD2511F53)
        high1, low1 = wide_multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ (c1 ^ k0), low1, high0 ^ (c3 ^ k1), low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def radius_and_angle(a, b, PORTABLE: tl.constexpr):
    """Returns (−2 ln u, sin θ, cos θ), u = (a + ½)·2⁻³² and θ = 2π·(b + ½)·2⁻³², for float32 words.

    NVIDIA's .approx instructions cost one slot each; tl.log, tl.sin and tl.cos would double the
    kernel and give it a stack. The interpreter and AMD take the portable functions.
    """
    if PORTABLE:
        u, turn = (a + 0.5) * 2.3283064365386963e-10, (b + 0.5) * 2.3283064365386963e-10
        theta = turn * 6.283185307179586
        return -2.0 * tl.log(u), tl.sin(theta), tl.cos(theta)
    else:  # noqa: RET505  (without else Triton would look up these names on AMD, which lacks them)
        u = tl.fma(a, 2.3283064365386963e-10, 1.1641532182693481e-10)
        theta = tl.fma(b, 1.4629180792671596e-09, 7.314590396335798e-10)
        minus_two_ln_u = libdevice.fast_log2f(u) * -1.3862943611198906
        return minus_two_ln_u, libdevice.fast_sinf(theta), libdevice.fast_cosf(theta)


@triton.jit
def box_muller(a, b, PORTABLE: tl.constexpr):
    """Returns two normals of two words: u = (word + ½)·2⁻³², r = √(−2 ln u_a), θ = 2π·u_b."""
    # The word as a signed number is the same angle less a turn, with half the rounding error.
    signed = b.to(tl.int32, bitcast=True).to(tl.float32)
    minus_two_ln_u, sin, cos = radius_and_angle(a.to(tl.float32), signed, PORTABLE)
    # The approximate logarithm may exceed 0 near u = 1; without the max r would be NaN there.
    r = tl.sqrt(tl.maximum(minus_two_ln_u, 0.0))
    return r * cos, r * sin


@triton.jit
def key_of(seeds_ptr, sample):
    """Returns the low and the high word of a sample's seed: Philox's key.

    Two loads bring them, because LLVM would multiply the parts of one 64-bit number in 64 bits.
    """
    words = seeds_ptr.to(tl.pointer_type(tl.uint32))
    return tl.load(words + 2 * sample), tl.load(words + 2 * sample + 1)


@triton.jit
def philox_normal4(quad, row, stream, key, PORTABLE: tl.constexpr):
    """Returns the normals of elements 4·quad … 4·quad + 3 of the sample with this key.

    A quad of 32 bits saves the high word's share of the rounds.
    """
    low = quad.to(tl.uint32)
    zeros = tl.zeros_like(low)
    high = (quad >> 32).to(tl.uint32) if quad.dtype == tl.int64 else zeros
    w0, w1, w2, w3 = philox4x32(
        low,
        high,
        zeros + row.to(tl.uint32),
        zeros + stream,
        key[0],
        key[1],
    )
    z0, z1 = box_muller(w0, w1, PORTABLE)
    z2, z3 = box_muller(w2, w3, PORTABLE)
    return z0, z1, z2, z3


@triton.jit
def join4(a, b, c, d):
    """Returns four (Q,) tensors as one (Q, 4), with each lane's values side by side."""
    pairs = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(pairs, (a.shape[0], 4))


@triton.jit
def split4(row):
    """Returns the four (Q,) tensors that ``join4`` put side by side."""
    even, odd = tl.split(tl.reshape(row, (row.shape[0], 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit(do_not_specialize=["n_elements", "blocks_per_sample", "stream"])
def normal_kernel(
    out_ptr,
    seeds_ptr,
    rows_ptr,
    n_elements,
    blocks_per_sample,
    rows_stride,
    stream,
    BLOCK_SIZE: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    """Writes the normal of (seeds[sample], rows[sample], i) in this stream to out[sample, i]."""
    pid = tl.program_id(0).to(tl.int64)
    sample, block = pid // blocks_per_sample, pid % blocks_per_sample
    quad = block * (BLOCK_SIZE // 4) + tl.arange(0, BLOCK_SIZE // 4)
    z = philox_normal4(
        quad,
        tl.load(rows_ptr + sample * rows_stride),
        stream,
        key_of(seeds_ptr, sample),
        PORTABLE,
    )
    base = sample * n_elements
    for lane in tl.static_range(4):
        offsets = quad * 4 + lane
        tl.store(out_ptr + base + offsets, z[lane], mask=offsets < n_elements)
