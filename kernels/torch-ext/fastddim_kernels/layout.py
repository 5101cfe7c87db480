"""Where a program's elements lie: their accesses, and rows of four moved between layouts.

The state (x and the results), the model's output and the noise may lie in different orders; noise
belongs to the logical element. A program works on rows in the state's order. Rows in another order
are renamed in registers, or turned through shared memory.
"""

# Triton compiles these bodies; pyright takes its language for functions that never return.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .noise import join4, philox_normal4, split4

IN_ORDER = tl.constexpr(0)
"""A sample is one stretch of memory in the order of its elements."""
FEW = tl.constexpr(1)
"""One to three channels: a lane takes four pixels with all their channels."""
TILE = tl.constexpr(2)
"""A multiple of four channels: a program takes a tile, some pixels by up to 16 channels."""
SCATTERED = tl.constexpr(3)
"""No four elements of one Philox call are one access: every access is one element wide."""

FAR = tl.constexpr(1 << 30)
"""A number of elements beyond every block, for comparisons in 32 bits."""


@triton.constexpr_function
def layout_of(channels, fours):
    """Returns which of the four layouts a launch takes.

    ``channels`` is 0 where state and output both lie in the order of the elements. ``fours`` says
    that a channel's pixels, and the stride of the output's samples, are multiples of four elements.
    """
    if channels == 0:
        return IN_ORDER.value
    if fours and channels < 4:
        return FEW.value
    return TILE.value if fours and channels % 4 == 0 else SCATTERED.value


@triton.constexpr_function
def block_channels(channels, layout):
    """Returns how many channels a program takes, a divisor of ``channels``."""
    if layout == IN_ORDER.value:
        return 1
    if layout == TILE.value:
        # 16 channels of a 16-bit output are a sector of 32 bytes.
        return 16 if channels % 16 == 0 else 8 if channels % 8 == 0 else 4
    return 4 if channels % 4 == 0 else channels if channels < 4 else 1


@triton.jit
def quotient(n, magic, shift):
    """Returns n // d for 0 ≤ n < 2³¹, from d's ``magic`` and ``shift`` (``geometry.divisor``).

    Granlund and Montgomery (1994), figure 4.1, in three instructions. A division of two variables
    takes thirty, and no element of a sample can be read before the quotient is known.
    """
    high = (n.to(tl.uint64) * magic.to(tl.uint32, bitcast=True).to(tl.uint64)) >> 32
    return (high.to(tl.uint32) + n.to(tl.uint32)) >> shift.to(tl.uint32)


@triton.jit
def left_of(size, first):
    """Returns size − first, at most FAR, in 32 bits."""
    if size.dtype == tl.int64:
        return tl.minimum(size - first, FAR).to(tl.int32)
    else:  # noqa: RET505  (without it Triton compiles on)
        return tl.minimum(size - first.to(tl.int32), FAR)


@triton.jit
def place(sample_begin, first_quad, first_channel, n_pixels, PIXEL: tl.constexpr):
    """Returns where a program begins in a tensor whose pixels lie ``PIXEL`` elements apart.

    Where pixels lie 1 apart, channels lie ``n_pixels`` apart.
    """
    if PIXEL == 1:
        return sample_begin + first_channel * n_pixels + first_quad * 4
    else:  # noqa: RET505
        return sample_begin + first_quad * 4 * PIXEL + first_channel


@triton.jit
def early_of(
    begin, first_channel, size,
    WIDTH: tl.constexpr, LAYOUT: tl.constexpr, FOURS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Returns how many elements before its first one the fours of each channel begin.

    Where a channel is no multiple of four, the fours of noise count from the sample's first
    element: a channel may begin inside one, and the four at the border of two channels is drawn for
    both. With ``ALIGNED`` the fours are those of the memory, and a sample may begin inside one.
    """
    early = ()
    for k in tl.static_range(WIDTH):
        found = 0
        if LAYOUT == SCATTERED and not FOURS:
            found = ((first_channel + k) * size & 3).to(tl.int32)
        elif ALIGNED:
            found = (begin & 3).to(tl.int32)
        early = early + (found,)
    return early


@triton.jit
def accesses(
    begin, n_pixels, left, early, skipped,
    CHANNELS: tl.constexpr, PIXEL: tl.constexpr, WIDTH: tl.constexpr, LAYOUT: tl.constexpr,
    FOURS: tl.constexpr, DRAWN: tl.constexpr, ALIGNED: tl.constexpr,
    FIRST: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """Returns (begin, offsets, mask) of each access to a tensor whose pixels lie ``PIXEL`` apart.

    The accesses hold the fours from ``FIRST`` on. ``left`` counts fours with ``FOURS`` and elements
    without; the first ``skipped`` elements belong to the channel or sample before, and ``early`` is
    that of ``early_of``. With ``DRAWN`` a lane holds the four elements of one Philox call.
    """
    j = FIRST + tl.arange(0, QUADS)
    found = ()
    if LAYOUT == IN_ORDER and FOURS:
        # Rows of four with the mask on the row: `offsets < n` alone, with n no multiple of 16,
        # would make every access scalar, and a flat block with a 16-bit output would exchange
        # its elements through shared memory.
        offsets = j[:, None] * 4 + tl.arange(0, 4)[None, :]
        found = ((0, begin + offsets, (j < left)[:, None]),)
    elif ALIGNED:
        # Rows of four in memory. A row that the sample begins or ends within belongs to two
        # samples, and eight lanes take its elements one by one.
        end = left + early[0]
        row_of_end = end & -4
        offsets = j[:, None] * 4 + tl.arange(0, 4)[None, :]
        whole = (4 * j >= skipped[0]) & (4 * j + 4 <= end)
        edge = tl.arange(0, 8)
        at = tl.where(edge < 4, edge, row_of_end + edge - 4)
        begins_here = (skipped[0] > 0) & (FIRST == 0)
        ends_here = (row_of_end >= 4 * FIRST) & (row_of_end < 4 * (FIRST + QUADS))
        inside = (at >= skipped[0]) & (at < end) & tl.where(edge < 4, begins_here, ends_here)
        found = ((0, begin + offsets, whole[:, None]), (0, begin + at, inside))
    elif LAYOUT == IN_ORDER and not DRAWN:
        # A sample that is no multiple of four, beside tensors that begin elsewhere in 16 bytes.
        # Lanes side by side take elements side by side, so that an access fills its sectors.
        offsets = 4 * FIRST + tl.arange(0, 4 * QUADS)
        found = ((0, begin + offsets, offsets < left),)
    elif LAYOUT == IN_ORDER:
        for lane in tl.static_range(4):
            offsets = j * 4 + lane
            found = found + ((0, begin + offsets, offsets < left),)
    elif LAYOUT == FEW and PIXEL == 1:
        offsets = j[:, None] * 4 + tl.arange(0, 4)[None, :]
        for channel in tl.static_range(CHANNELS):
            at = begin + channel * n_pixels
            found = found + ((0, at + offsets, (j < left)[:, None]),)
    elif LAYOUT == FEW:
        for k in tl.static_range(PIXEL):
            offsets = j[:, None] * (4 * PIXEL) + (4 * k + tl.arange(0, 4))[None, :]
            found = found + ((0, begin + offsets, (j < left)[:, None]),)
    elif LAYOUT == TILE:
        pixel, channel = 4 * FIRST + tl.arange(0, 4 * QUADS), tl.arange(0, WIDTH)
        # From this form Triton knows that four pixels share a mask, and makes them one access.
        mask = pixel // 4 < left
        if PIXEL == 1:
            offsets = channel[:, None] * n_pixels + pixel[None, :]
            found = ((0, begin + offsets, mask[None, :]),)
        else:
            offsets = pixel[:, None] * PIXEL + channel[None, :]
            found = ((0, begin + offsets, mask[:, None]),)
    else:
        # Lanes side by side take pixels side by side. Where each lane kept the four pixels that it
        # draws, an access to channels that are last would touch 32 sectors.
        lane = tl.arange(0, QUADS)
        for k in tl.static_range(WIDTH):
            at = begin - early[k] * PIXEL + (k if PIXEL != 1 else k * n_pixels)
            for r in tl.static_range(4):
                pixel = 4 * FIRST + r * QUADS + lane
                if FOURS:
                    mask = pixel // 4 < left
                else:
                    mask = (pixel >= skipped[k]) & (pixel < left + early[k])
                found = found + ((at + (4 * FIRST + r * QUADS) * PIXEL, lane * PIXEL, mask),)
    return found


@triton.jit
def load_all(ptr, accesses):
    """Returns the elements that each access reads."""
    found = ()
    for i in tl.static_range(len(accesses)):
        begin, offsets, mask = accesses[i]
        found = found + (tl.load(ptr + begin + offsets, mask=mask),)
    return found


@triton.jit
def arranged(planes, CHANNELS: tl.constexpr, PIXEL: tl.constexpr):
    """Returns rows of four in a layout's order, from ``planes``: 4·c + p is pixel p, channel c.

    Each lane holds four pixels, so that this renames registers and moves no data.
    """
    rows = ()
    for k in tl.static_range(CHANNELS):
        if PIXEL == 1:
            row = join4(planes[4 * k], planes[4 * k + 1], planes[4 * k + 2], planes[4 * k + 3])
        else:  # element e of the lane's 4·CHANNELS is channel e % CHANNELS of pixel e // CHANNELS
            row = join4(
                planes[4 * k % CHANNELS * 4 + 4 * k // CHANNELS],
                planes[(4 * k + 1) % CHANNELS * 4 + (4 * k + 1) // CHANNELS],
                planes[(4 * k + 2) % CHANNELS * 4 + (4 * k + 2) // CHANNELS],
                planes[(4 * k + 3) % CHANNELS * 4 + (4 * k + 3) // CHANNELS],
            )
        rows = rows + (row,)
    return rows


@triton.jit
def as_planes(rows, CHANNELS: tl.constexpr, PIXEL: tl.constexpr):
    """Inverts ``arranged``, without the variance where pixels are further apart than channels."""
    values = ()
    for k in tl.static_range(len(rows)):
        values = values + split4(rows[k])
    planes = ()
    for channel in tl.static_range(CHANNELS):
        for p in tl.static_range(4):
            planes = planes + (values[4 * channel + p if PIXEL == 1 else p * PIXEL + channel],)
    return planes


@triton.jit
def as_state(
    rows, CHANNELS: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr, LAYOUT: tl.constexpr
):
    """Returns rows in the order of pixels ``TO`` apart, from rows of pixels ``FROM`` apart."""
    if LAYOUT == FEW and FROM != TO:
        return arranged(as_planes(rows, CHANNELS, FROM), CHANNELS, TO)
    elif LAYOUT == TILE and (FROM == 1) != (TO == 1):  # noqa: RET505
        return (tl.trans(rows[0]),)
    else:
        return rows


@triton.jit
def draw(
    noise_of,
    CHANNELS: tl.constexpr, PIXEL: tl.constexpr, WIDTH: tl.constexpr, LAYOUT: tl.constexpr,
    FOURS: tl.constexpr, FIRST: tl.constexpr, QUADS: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Returns the step's normals, in the rows of the state's accesses."""
    row, key, first_quad, first_channel, n_pixels, size = noise_of
    # Fours are counted in as many bits as the sizes have: 32 bits save half of Philox's first two
    # rounds.
    quad = (first_quad + (FIRST + tl.arange(0, QUADS))).to(size.dtype)
    if LAYOUT == IN_ORDER:
        z = philox_normal4(quad, row, 0, key, PORTABLE)
        if FOURS:
            z = (join4(z[0], z[1], z[2], z[3]),)
        return z
    elif LAYOUT == FEW:  # noqa: RET505
        planes = ()
        for _ in tl.static_range(CHANNELS):
            planes = planes + philox_normal4(quad, row, 0, key, PORTABLE)
            quad += size
        return arranged(planes, CHANNELS, PIXEL)
    elif LAYOUT == TILE:
        channel = first_channel.to(size.dtype) + tl.arange(0, WIDTH)
        quad = channel[:, None] * size + quad[None, :]
        z = philox_normal4(quad, row, 0, key, PORTABLE)
        pairs = tl.join(tl.join(z[0], z[2]), tl.join(z[1], z[3]))
        tile = tl.reshape(pairs, (WIDTH, 4 * QUADS))
        return (tl.trans(tile) if PIXEL != 1 else tile,)
    else:
        rows = ()
        for k in tl.static_range(WIDTH):
            start = (first_channel + k) * n_pixels
            z = philox_normal4((start >> 2).to(quad.dtype) + quad, row, 0, key, PORTABLE)
            turned = tl.trans(tl.reshape(join4(z[0], z[1], z[2], z[3]), (4, QUADS)))
            rows = rows + split4(turned)
        return rows
