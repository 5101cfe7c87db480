"""Counter noise, a function of (sample seed, row, element): its definition, in NumPy.

z depends on the sample's seed, the row of the step and the element's row-major index within the
sample. The batch, the memory format, the block size and the number of processes change no bit of
it. Philox's words are the same on every device. The normals differ from backend to backend (NumPy
here, numba, Triton) by the rounding of ln, sin and cos: by at most 1e-5 in all but one value of
10⁴, and never by more than 1e-3.

Philox4x32-10 (Salmon et al. 2011): key = the seed's low and high word, counter = (⌊i/4⌋ low,
⌊i/4⌋ high, row, stream), lane = i mod 4. Words (0, 1) and (2, 3) each feed Box–Muller:
u = (word + ½)·2⁻³², r = √max(−2·ln u_a, 0), θ = 2π·u_b, giving (r·cos θ, r·sin θ).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

STEP_STREAM, INITIAL_STREAM, FORWARD_STREAM = 0, 1, 2
"""The streams of a step's noise, of the initial x_T (row 0) and of inpainting's forward noise."""

Words = npt.NDArray[np.uint64]

_LOW = np.uint64(0xFFFFFFFF)
_HALF_WORD = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_BLOCK = 8192  # Philox calls at a time: ten rounds on arrays of 64 KiB stay in the L2 cache


def philox4x32(
    counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]
) -> tuple[Words, Words, Words, Words]:
    """Returns the words after ten rounds: below 2³², in uint64, which holds their products."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> _HALF_WORD) ^ c1 ^ k0,
            p1 & _LOW,
            (p0 >> _HALF_WORD) ^ c3 ^ k1,
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def normals(
    seeds: npt.NDArray[np.int64],
    rows: npt.NDArray[np.integer],
    n: int,
    stream: int,
    first: int = 0,
    out: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.float32]:
    """Returns the normals of elements ``first`` to ``first + n`` of each sample.

    Args:
        seeds: (batch,) int64, each in [0, 2⁶³).
        rows: (batch,), the row each sample is on.
        n: the number of elements of each sample.
        stream: STEP_STREAM, INITIAL_STREAM or FORWARD_STREAM.
        first: the first element, a multiple of four.
        out: the normals are written here, float32 (batch, n), C-contiguous; by default a new
            array.

    Returns:
        ``out``, float32 (batch, n).
    """
    batch = len(seeds)
    if out is None:
        out = np.empty((batch, n), dtype=np.float32)
    key = seeds.astype(np.uint64)
    low, high, row = key & _LOW, key >> _HALF_WORD, rows.astype(np.uint64)
    quads = -(-n // 4)
    together = max(1, _BLOCK // max(quads, 1))  # samples at a time
    for b in range(0, batch, together):
        sample = slice(b, min(b + together, batch))
        for q in range(0, quads, _BLOCK):
            count = min(_BLOCK, quads - q)
            index = np.arange(first // 4 + q, first // 4 + q + count, dtype=np.uint64)
            column = [a[sample, None] for a in (row, low, high)]
            words = philox4x32(
                (index & _LOW, index >> _HALF_WORD, column[0], np.full((1, 1), stream, np.uint64)),
                (column[1], column[2]),
            )
            z = np.empty((sample.stop - b, count, 4), dtype=np.float32)
            _box_muller(words[0], words[1], z[..., 0], z[..., 1])
            _box_muller(words[2], words[3], z[..., 2], z[..., 3])
            end = min(4 * (q + count), n)
            out[sample, 4 * q : end] = z.reshape(len(z), -1)[:, : end - 4 * q]
    return out


def _box_muller(
    a: Words, b: Words, cosine: npt.NDArray[np.float32], sine: npt.NDArray[np.float32]
) -> None:
    scale, half = np.float32(2.0**-32), np.float32(0.5)
    u = (a.astype(np.float32) + half) * scale
    r = np.sqrt(np.maximum(np.float32(-2.0) * np.log(u), np.float32(0.0)))
    # The word as a signed number is the same angle less a turn, with half the rounding error.
    turn = (b.astype(np.uint32).view(np.int32).astype(np.float32) + half) * scale
    theta = turn * np.float32(2 * np.pi)
    np.multiply(r, np.cos(theta), out=cosine)
    np.multiply(r, np.sin(theta), out=sine)
