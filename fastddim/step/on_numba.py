"""The backend ``numba`` takes a step on a CPU as one compiled pass over memory.

Each stretch of elements passes through the equation's terms while it sits in the L1 cache, every
term a loop that LLVM turns into vector instructions. There is no fused multiply-add and no
reassociation, so a vector's lanes and the loop's remainder give the same bits: those of
``reference.ddim_step``, and noise that depends on (seed, row, element) alone.
"""

# numba changes what a function's arguments are, and names of its own are not seen as exported.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import contextlib
import ctypes
import math
import struct
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic
from torch import Tensor

from fastddim.step import layout, on_torch
from fastddim.step import philox as counter
from fastddim.step.backends import Backend, Fixed, Launch, forked

if numba.config.DISABLE_JIT:
    raise ImportError("numba is told not to compile (NUMBA_DISABLE_JIT)")

CHUNK = 1024
"""Elements taken through all terms at once: seven arrays of them fill a 32 KiB L1."""
ROOM = CHUNK // 4 + 1
"""Quads that a chunk may touch: one more than it holds, where it begins inside one."""
TASK = 16 * CHUNK
"""Threads fetch tasks of so many elements one by one, so a slowed thread fetches fewer."""
SMALL = 64
"""Samples on rows of their own are taken one by one here, 70 ns each. Below this many elements a
sample costs less in PyTorch's operations, which take many at once."""
SHARED, NOISY_SHARED = 32 * TASK, 4 * TASK
"""From so many elements on PyTorch's threads share a pass, without counter noise and with it. It
then takes tenths of a millisecond, many times what beginning and ending together costs them."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_part: Callable[..., Any] = numba.njit(
    error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True
)
"""For what is compiled as part of its caller, when that is not read from the cache."""


def _c_function(function: Callable[[int], int]) -> Any:
    """Returns ``int64_t function(void *)``, which a thread of any kind may call. It is compiled
    now, or read from the cache where there is a folder to keep one in."""
    try:
        compiled = numba.cfunc("int64(int64)", cache=True, error_model="numpy")(function)
    except (RuntimeError, OSError):  # neither this folder nor the user's can be written to
        compiled = numba.cfunc("int64(int64)", error_model="numpy")(function)
    return compiled


def _pointer(dtype: Any) -> Any:
    """A function from an address to a pointer. Plain integers cost a call far less than arrays."""

    @intrinsic
    def pointer(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(dtype)(types.int64), generate

    return pointer


# The threads that share a call find its arguments in this order. First come those that each step
# brings: addresses, of which 0 stands for None, and how the call went. Then come those that a
# launch is bound to: sizes and flags, as the callers below name them, and addresses of C functions.
_BROUGHT = (
    *("x", "output", "table", "rows", "seeds", "noise", "guidance", "threshold", "out", "x0"),
    *("outcome", "taken"),
)
_BOUND = (
    *("batch", "n", "channels", "steps", "dtype", "prediction", "noise_first", "rederive"),
    *("output_stride", "row_stride", "guidance_stride", "threshold_stride", "stream", "clips"),
    "fills",
)
_FUNCTIONS = ("omp_get_thread_num", "fegetenv", "fesetenv")
_CALL = np.dtype(
    [
        *((name, np.int64) for name in (*_BROUGHT, *_BOUND, "threads", *_FUNCTIONS)),
        ("clip", np.float64),
        ("modes", np.int64, (8,)),  # the caller's; room for any C library's fenv_t
    ]
)
_bring = struct.Struct(f"={len(_BROUGHT)}q").pack_into
_bind = struct.Struct(f"={len(_BOUND) + 1 + len(_FUNCTIONS)}qd").pack_into
# Then, for each thread, on cache lines of its own: how many tasks of its share have been taken, and
# its modes.
_OWN, _OWN_MODES = 128, 64
# Done is no small number, which a function that has failed might return by chance.
_UNDONE, _DONE, _REFUSED = -1, 0x600D, 1
_INT64 = struct.Struct("=q")

_float32, _uint16 = _pointer(types.float32), _pointer(types.uint16)
_int32, _int64 = _pointer(types.int32), _pointer(types.int64)
_call = _pointer(numba.from_dtype(_CALL))
_OUTCOME, _TAKEN, _FIRST_BOUND, _MODES = (
    _CALL.fields[name][1]  # type: ignore[index]
    for name in ("outcome", "taken", "batch", "modes")
)
_SIZE = _CALL.itemsize


@intrinsic
def _next(typing_context: Any, address: Any) -> Any:
    """The int64 at an address, which is raised by one, atomically."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        place = builder.inttoptr(arguments[0], word.as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(word, 1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def _int_of(typing_context: Any, address: Any) -> Any:
    """What ``int function(void)`` at an address returns."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = ir.FunctionType(ir.IntType(32), ())
        called = builder.call(builder.inttoptr(arguments[0], function.as_pointer()), ())
        return builder.sext(called, ir.IntType(64))

    return types.int64(types.int64), generate


@intrinsic
def _call_with(typing_context: Any, address: Any, argument: Any) -> Any:
    """What ``int function(void *)`` at an address returns."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = ir.FunctionType(ir.IntType(32), (ir.IntType(64),))
        place = builder.inttoptr(arguments[0], function.as_pointer())
        return builder.sext(builder.call(place, (arguments[1],)), ir.IntType(64))

    return types.int64(types.int64, types.int64), generate


@_part
def _floats(address, start, count):
    return carray(_float32(address + 4 * start), (count,))


# --- Noise: the definition is that of fastddim.step.philox ------------------------------------

_STEP = np.int64(counter.STEP)  # a literal would be compiled apart from a stream not known
_LOW, _WORD = np.uint64(0xFFFFFFFF), np.uint64(32)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)

_SCALE, _HALF, _ONE = np.float32(2.0**-32), np.float32(0.5), np.float32(1.0)
_ZERO, _MINUS_TWO = np.float32(0.0), np.float32(-2.0)

# ln(1 + f) = f + f²·Q(f) on [√½ − 1, √2 − 1]: minimax, 3.0e-8 of ln(1 + f) before rounding and
# 1.0e-7 of it in float32.
_Q0, _Q1, _Q2, _Q3 = (np.float32(c) for c in (-0.4999999, 0.3333395, -0.25001755, 0.19962072))
_Q4, _Q5, _Q6, _Q7 = (np.float32(c) for c in (-0.16570507, 0.14917974, -0.14307527, 0.08734846))
# ln 2 in two parts: the first has nine bits, so that its product with a binary exponent is exact.
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_EXPONENT, _SQRT_HALF = np.int32(23), np.int32(0x3F3504F3)  # the bits of √½ in float32

# In turns, on [−⅛, ⅛]: sin 2πf = f·S(f²) and cos 2πf = 1 + f²·C(f²), minimax, 3.2e-9 and 6.4e-11
# of the value before rounding; times r = 2, within 1.3e-7 of r in float32.
_S0, _S1, _S2, _S3 = (np.float32(c) for c in (6.2831855, -41.341663, 81.592354, -75.39356))
_C0, _C1, _C2, _C3 = (np.float32(c) for c in (-19.739208, 64.93932, -85.44324, 59.229244))
_EIGHTH, _QUARTER = np.int32(1 << 29), np.int32((1 << 30) - 1)
_SIGN, _BIT = np.int32(-(1 << 31)), np.int32(1)


@_part
def _words(seed, row, stream, quad, quads, words):
    """Philox4x32-10 of the quads from ``quad`` on: all words 0, all words 2, all 1, all 3."""
    low, high = np.uint64(seed) & _LOW, np.uint64(seed) >> _WORD
    for i in range(quads):
        index = np.uint64(quad + i)
        c0, c1, c2, c3 = index & _LOW, index >> _WORD, np.uint64(row), np.uint64(stream)
        k0, k1 = low, high
        for _ in range(10):
            # Words are kept in 64 bits, whose upper half only a product's operand must clear:
            # so it becomes vpmuludq, four products at a time.
            p0, p1 = (c0 & _LOW) * _M0, (c2 & _LOW) * _M1
            c0, c1, c2, c3 = (p1 >> _WORD) ^ c1 ^ k0, p1, (p0 >> _WORD) ^ c3 ^ k1, p0
            k0, k1 = k0 + _W0, k1 + _W1
        words[i], words[i + 2 * quads] = np.uint32(c0 & _LOW), np.uint32(c1 & _LOW)
        words[i + quads], words[i + 3 * quads] = np.uint32(c2 & _LOW), np.uint32(c3 & _LOW)


@_part
def _ln(u):
    """ln u of a positive normal float32: u = 2^k·(1 + f)."""
    bits = np.float32(u).view(np.int32)
    k = np.int32(np.int32(bits - _SQRT_HALF) >> _EXPONENT)
    f = np.int32(bits - np.int32(k << _EXPONENT)).view(np.float32) - _ONE
    q = _Q3 + f * (_Q4 + f * (_Q5 + f * (_Q6 + f * _Q7)))
    q = _Q0 + f * (_Q1 + f * (_Q2 + f * q))
    exponent = np.float32(k)
    return exponent * _LN2_HIGH + (f + (exponent * _LN2_LOW + f * f * q))


@_part
def _box_muller(count, words, z):
    """All r·cos θ, then all r·sin θ, from ``count`` words for u and as many for θ."""
    for i in range(count):
        u = (np.float32(words[i]) + _HALF) * _SCALE
        square = _MINUS_TWO * _ln(u)
        r = math.sqrt(square if square > _ZERO else _ZERO)
        # θ is a number of quarter turns, the upper two bits, and f of a turn, |f| ≤ ⅛.
        word = np.int32(np.int32(words[i + count]) + _EIGHTH)
        f = (np.float32(np.int32((word & _QUARTER) - _EIGHTH)) + _HALF) * _SCALE
        g = f * f
        s = f * (_S0 + g * (_S1 + g * (_S2 + g * _S3)))
        c = _ONE + g * (_C0 + g * (_C1 + g * (_C2 + g * _C3)))
        next_bit = np.int32(word << _BIT)  # its sign says whether the quarters are odd
        cosine, sine = (s, c) if next_bit < 0 else (c, s)
        cosine_sign = np.int32((word ^ next_bit) & _SIGN)
        sine_sign = np.int32(word & _SIGN)
        z[i] = np.int32(np.float32(r * cosine).view(np.int32) ^ cosine_sign).view(np.float32)
        z[i + count] = np.int32(np.float32(r * sine).view(np.int32) ^ sine_sign).view(np.float32)


@_part
def _normals(seed, row, stream, first, count, words, pairs, z):
    """Writes the normals of elements ``first`` to ``first + count`` to z; the first one's place."""
    quad, lane = first // 4, first % 4
    quads = (lane + count + 3) // 4
    _words(seed, row, stream, quad, quads, words)
    _box_muller(2 * quads, words, pairs)
    for i in range(quads):
        z[4 * i], z[4 * i + 1] = pairs[i], pairs[i + 2 * quads]
        z[4 * i + 2], z[4 * i + 3] = pairs[i + quads], pairs[i + 3 * quads]
    return lane


@_part
def _scattered(seed, row, stream, first, count, channels, pixels, words, pairs, plane, z):
    """``_normals`` of ``count`` elements in memory's order, where a pixel's channels are adjacent.

    Noise belongs to the logical element, channel · pixels + pixel.
    """
    low, high = first // channels, (first + count - 1) // channels + 1
    for channel in range(channels):
        lane = _normals(seed, row, stream, channel * pixels + low, high - low, words, pairs, plane)
        for i in range(high - low):
            z[i * channels + channel] = plane[i + lane]
    return first - low * channels


# --- The step's terms -------------------------------------------------------------------------


@_part
def _widened(address, dtype, start, count, into):
    """A stretch of the model's output as float32, in ``into`` if it is not so already."""
    if dtype == 0:
        return _floats(address, start, count)
    half = carray(_uint16(address + 2 * start), (count,))
    if dtype == 1:
        for i in range(count):
            into[i] = np.uint32(np.uint32(half[i]) << np.uint32(16)).view(np.float32)
    else:
        for i in range(count):
            bits = np.uint32(half[i])
            magnitude = np.uint32(bits & np.uint32(0x7FFF))
            # Its exponent's bias is 15, float32's 127; what is below the least exponent counts
            # 2⁻²⁴; the largest exponent, of infinity and NaN, becomes float32's.
            word = np.uint32(np.uint32(magnitude << np.uint32(13)) + np.uint32(112 << 23))
            word = np.uint32(word | np.uint32(0x7F800000)) if magnitude >= 0x7C00 else word
            tiny = np.float32(np.float32(magnitude) * np.float32(2.0**-24)).view(np.uint32)
            word = tiny if magnitude < 0x400 else word
            sign = np.uint32((bits & np.uint32(0x8000)) << np.uint32(16))
            into[i] = np.uint32(word | sign).view(np.float32)
    return into


@_part
def _guide(count, u, c, w, into):
    """u + w·(c − u) from the unconditional and the conditional output."""
    for i in range(count):
        into[i] = u[i] + w * (c[i] - u[i])


@_part
def _guide_each(count, u, c, w, into):
    """``_guide`` where each element has its own w."""
    for i in range(count):
        into[i] = u[i] + w[i] * (c[i] - u[i])


@_part
def _repeat(values, stride, n, start, count, into):
    """into[i] is the value of the sample, of n elements, that element ``start + i`` belongs to."""
    sample, i = start // n, 0
    stop = min((sample + 1) * n - start, count)
    while i < count:
        value = values[sample * stride]
        for k in range(i, stop):
            into[k] = value
        i, sample, stop = stop, sample + 1, min(stop + n, count)


@_part
def _predict(count, prediction, x, e, a_t, b_t, x0, eps):
    """x0 and ε; of an epsilon model, whose output ε is, x0 alone."""
    if prediction == 0:
        for i in range(count):
            x0[i] = (x[i] - e[i] * b_t) / a_t
    elif prediction == 1:
        for i in range(count):
            x0[i] = a_t * x[i] - b_t * e[i]
            eps[i] = a_t * e[i] + b_t * x[i]
    else:
        for i in range(count):
            x0[i] = e[i]
            eps[i] = (x[i] - a_t * e[i]) / b_t


@_part
def _epsilon_step(count, x, e, a_t, b_t, a_s, c2, out):
    """x_s of an epsilon model where x0 goes nowhere and no noise is added, in one loop."""
    for i in range(count):
        out[i] = a_s * ((x[i] - e[i] * b_t) / a_t) + c2 * e[i]


@_part
def _clamp(count, x0, bound):
    """x0 within ±bound. A NaN stays one: neither comparison holds for it."""
    for i in range(count):
        value = x0[i]
        value = -bound if value < -bound else value
        x0[i] = bound if value > bound else value


@_part
def _bound_each(count, x0, s):
    """x0 within ±s and divided by s, each element having its own s."""
    for i in range(count):
        value, bound = x0[i], s[i]
        value = -bound if value < -bound else value
        x0[i] = (bound if value > bound else value) / bound


@_part
def _combine(count, x0, eps, z, lane, noisy, noise_first, a_s, c1, c2, out):
    """x_s = √ᾱ_s·x0 + c1·z + c2·ε, the noise added before the direction or after it."""
    if not noisy:
        for i in range(count):
            out[i] = a_s * x0[i] + c2 * eps[i]
    elif noise_first:
        for i in range(count):
            out[i] = a_s * x0[i] + c1 * z[i + lane] + c2 * eps[i]
    else:
        for i in range(count):
            out[i] = a_s * x0[i] + c2 * eps[i] + c1 * z[i + lane]


@_part
def _taken(address, thread, total):
    """The next stretch of elements for a thread, an empty one when none is left.

    A thread begins with a share of its own, the same at every step: what it wrote at the last one
    is in the cache of its core. Then it helps those that have not done theirs.
    """
    call = carray(_call(address), (1,))[0]
    if call.threads == 1:
        return (total if _next(address + _TAKEN) else 0), total
    tasks = (total + TASK - 1) // TASK
    for k in range(call.threads):
        share = (thread + k) % call.threads
        task = share * tasks // call.threads + _next(address + _SIZE + _OWN * share)
        if task < (share + 1) * tasks // call.threads:
            return TASK * task, min(TASK * (task + 1), total)
    return total, total


@_part
def _light_steps(address, thread, n, total):
    """Takes ``_steps`` of an epsilon model where every term is an argument.

    No term then needs memory of its own, which would cost a small step half its time. ``n``
    elements follow one another on one row.
    """
    call = carray(_call(address), (1,))[0]
    rows = carray(_int32(call.rows), (call.batch,))
    table = carray(_float32(call.table), (7 * call.steps,))
    while True:
        start, stop = _taken(address, thread, total)
        if start >= stop:
            return
        while start < stop:
            sample = start // n
            first = start - sample * n
            count = min(n - first, stop - start)
            if call.x0:
                count = min(count, CHUNK)
            row = rows[sample * call.row_stride]
            a_t, b_t, a_s = table[7 * row], table[7 * row + 2], table[7 * row + 4]
            c2 = table[7 * row + 6]
            x, out = _floats(call.x, start, count), _floats(call.out, start, count)
            e = _floats(call.output, sample * call.output_stride + first, count)
            if call.x0:
                x0 = _floats(call.x0, start, count)
                _predict(count, 0, x, e, a_t, b_t, x0, e)
                if call.clips:
                    _clamp(count, x0, np.float32(call.clip))
                _combine(count, x0, e, x0, 0, False, False, a_s, _ZERO, c2, out)
            else:
                _epsilon_step(count, x, e, a_t, b_t, a_s, c2, out)
            start += count


@_part
def _steps(address, thread):
    """x_s of the elements this thread takes; none, and why, if a row is not in the table."""
    call = carray(_call(address), (1,))[0]
    batch, n, channels, steps = call.batch, call.n, call.channels, call.steps
    rows = carray(_int32(call.rows), (batch,))
    table = carray(_float32(call.table), (7 * steps,))
    seeds = carray(_int64(call.seeds), (batch,))
    guidance = carray(_float32(call.guidance), (batch,))
    threshold = carray(_float32(call.threshold), (batch,))
    for sample in range(batch if call.row_stride else 1):
        row = rows[sample * call.row_stride]
        if row < 0 or row >= steps:
            call.outcome = _REFUSED
            return
    total = batch * n
    conditional = call.output + batch * call.output_stride * (4 if call.dtype == 0 else 2)
    counted = call.seeds != 0 and (call.row_stride != 0 or table[7 * rows[0] + 5] != 0)
    # Weights and thresholds of small samples are spread over the elements, once a chunk: a pass
    # over each sample by itself would cost more than its few elements.
    each, spread = n, (call.guidance_stride != 0 or call.threshold_stride != 0) and n < CHUNK
    alone = call.guidance_stride == 0 and call.threshold_stride == 0
    if call.row_stride == 0 and call.output_stride == n and not counted and (alone or spread):
        n = total  # the samples are on one row, and one after the other: all of them are one
    else:
        spread = False

    kept_x0 = call.clips or call.rederive or call.x0 != 0 or call.threshold != 0
    plain = call.prediction == 0 and not kept_x0 and call.noise == 0
    made = call.guidance != 0 or call.dtype != 0 or call.noise != 0 or counted
    bounded = call.threshold != 0 or call.rederive or (call.clips and call.x0 == 0)
    if call.prediction == 0 and not made and not bounded:
        _light_steps(address, thread, n, total)
        return
    x0_own, eps_own = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    u_own, c_own = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    own = np.empty(CHUNK if spread else 1, np.float32)
    z_own, plane = np.empty(4 * ROOM + 2 * channels, np.float32), np.empty(4 * ROOM, np.float32)
    pairs, words = np.empty(4 * ROOM, np.float32), np.empty(4 * ROOM, np.uint32)
    while True:
        start, stop = _taken(address, thread, total)
        if start >= stop:
            return
        while start < stop:
            sample = start // n
            first = start - sample * n
            count = min(min(CHUNK, n - first), stop - start)
            row = rows[sample * call.row_stride]
            a_t, b_t, a_s = table[7 * row], table[7 * row + 2], table[7 * row + 4]
            c1, c2 = table[7 * row + 5], table[7 * row + 6]
            x, out = _floats(call.x, start, count), _floats(call.out, start, count)
            x0, eps = _floats(call.x0, start, count) if call.x0 else x0_own, eps_own

            where = sample * call.output_stride + first
            e = _widened(call.output, call.dtype, where, count, u_own)
            if call.guidance:
                c = _widened(conditional, call.dtype, where, count, c_own)
                if spread and call.guidance_stride != 0:
                    _repeat(guidance, call.guidance_stride, each, start, count, own)
                    _guide_each(count, e, c, own, u_own)
                else:
                    _guide(count, e, c, guidance[sample * call.guidance_stride], u_own)
                e = u_own
            if plain and (c1 == 0 or not counted):
                _epsilon_step(count, x, e, a_t, b_t, a_s, c2, out)
                start += count
                continue
            _predict(count, call.prediction, x, e, a_t, b_t, x0, eps)
            if call.prediction == 0:
                eps = e
            if call.clips:
                _clamp(count, x0, np.float32(call.clip))
            if call.threshold and spread and call.threshold_stride != 0:
                _repeat(threshold, call.threshold_stride, each, start, count, own)
                _bound_each(count, x0, own)
            elif call.threshold:
                s = threshold[sample * call.threshold_stride]
                _clamp(count, x0, s)
                for i in range(count):
                    x0[i] = x0[i] / s
            if call.rederive:
                eps = eps_own
                for i in range(count):
                    eps[i] = (x[i] - a_t * x0[i]) / b_t
            noisy, z, lane = call.noise != 0, _floats(call.noise, start, count), 0
            if counted and c1 != 0:
                noisy, z, seed = True, z_own, seeds[sample]
                if channels == 1:
                    lane = _normals(seed, row, _STEP, first, count, words, pairs, z_own)
                else:
                    lane = _scattered(
                        seed,
                        row,
                        _STEP,
                        first,
                        count,
                        channels,
                        n // channels,
                        words,
                        pairs,
                        plane,
                        z_own,
                    )
            _combine(count, x0, eps, z, lane, noisy, call.noise_first, a_s, c1, c2, out)
            start += count


@_part
def _fill(address, thread):
    """Counter noise into the elements of ``out`` that this thread takes."""
    call = carray(_call(address), (1,))[0]
    batch, n = call.batch, call.n
    rows = carray(_int32(call.rows), (batch,))
    seeds = carray(_int64(call.seeds), (batch,))
    total = batch * n
    z, pairs = np.empty(4 * ROOM, np.float32), np.empty(4 * ROOM, np.float32)
    words = np.empty(4 * ROOM, np.uint32)
    while True:
        start, stop = _taken(address, thread, total)
        if start >= stop:
            return
        while start < stop:
            sample = start // n
            first = start - sample * n
            count = min(min(CHUNK, n - first), stop - start)
            row = rows[sample * call.row_stride]
            lane = _normals(seeds[sample], row, call.stream, first, count, words, pairs, z)
            out = _floats(call.out, start, count)
            for i in range(count):
                out[i] = z[i + lane]
            start += count


@_c_function
def _take_part(address):
    """One thread's part of a call, all of it if it is alone.

    PyTorch's threads keep the rounding mode and the flushing of denormals that were set when they
    were made; here they have their caller's, or a result would depend on who took which task.
    """
    call = carray(_call(address), (1,))[0]
    thread = own = 0
    if call.threads > 1:
        thread = _int_of(call.omp_get_thread_num)
        own = address + _SIZE + _OWN * thread + _OWN_MODES
        _call_with(call.fegetenv, own)
        _call_with(call.fesetenv, address + _MODES)
    if call.fills:
        _fill(address, thread)
    else:
        _steps(address, thread)
    if call.outcome == _UNDONE:  # where memory is short this is not come to, nor any task taken
        call.outcome = _DONE
    if call.threads > 1:
        _call_with(call.fesetenv, own)
    return call.outcome


_take_it_all = _take_part.ctypes

# --- Threads -----------------------------------------------------------------------------------


class _OpenMP:
    """The threads that PyTorch's own operations run on, in the number the user has set.

    They are awake while a model runs, and others would compete with them for the same cores. So
    it is the OpenMP library PyTorch is linked to that is asked, of GNU, LLVM or Intel: each has
    GNU's functions.
    """

    def __init__(self) -> None:
        for scope in (None, torch._C.__file__):  # where PyTorch's calls go: a preloaded one first
            library = ctypes.CDLL(scope)
            if hasattr(library, "GOMP_parallel"):
                break
        self._parallel, self._read_modes = library.GOMP_parallel, library.fegetenv
        self._parallel.restype, self._read_modes.argtypes = None, (ctypes.c_void_p,)
        self._parallel.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
        functions = (ctypes.cast(getattr(library, f), ctypes.c_void_p) for f in _FUNCTIONS)
        self.functions = tuple(function.value or 0 for function in functions)

    def run(self, function: Any, call: Any, threads: int) -> None:
        """Each thread's part of a call."""
        self._read_modes(ctypes.byref(call, _MODES))
        self._parallel(function.address, call, threads, 0)


_team: _OpenMP | None = None
with contextlib.suppress(OSError, AttributeError, TypeError):  # PyTorch is without, or on Windows
    _team = _OpenMP()
_NO_FUNCTIONS = (0,) * len(_FUNCTIONS)

# --- From tensors to addresses -----------------------------------------------------------------


class _Calls:
    """Calls the C function with the same bound arguments each time, and reuses the calls' memory.

    A call's memory leaves ``_spare`` while the call runs, so that no other thread takes it.
    """

    def __init__(self, bound: tuple[int, ...], clip: float | None, many: bool) -> None:
        self._bound, self._clip, self._many = bound, clip, many
        self._spare: list[tuple[Any, int]] = []

    def __call__(self, *brought: int) -> int:
        """Runs a call with the addresses of ``_BROUGHT``, and returns how it went."""
        if self._many and _team and not forked() and torch.get_num_threads() > 1:
            call = self._new(torch.get_num_threads(), _team.functions)
            _bring(call, 0, *brought, _UNDONE, 0)
            _team.run(_take_part, call, torch.get_num_threads())
            (outcome,) = _INT64.unpack_from(call, _OUTCOME)
            return int(outcome)
        try:
            own = self._spare.pop()
        except IndexError:
            call = self._new(1, _NO_FUNCTIONS)
            own = call, ctypes.addressof(call)
        _bring(own[0], 0, *brought, _UNDONE, 0)
        outcome = _take_it_all(own[1])
        self._spare.append(own)
        return outcome  # type: ignore[no-any-return]

    def _new(self, threads: int, functions: tuple[int, ...]) -> Any:
        call = (ctypes.c_char * (_SIZE + _OWN * threads))()
        _bind(call, _FIRST_BOUND, *self._bound, threads, *functions, self._clip or 0.0)
        return call


def bind(
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
) -> Launch:
    """Binds ``reference.ddim_step`` as one pass: see ``backends.Backend``.

    output = u + w·(c − u)                              with guidance w
    x0     = clamp(x0, −clip, clip)                     or clamp(x0, −s, s)/s
    ε      = (x − √ᾱ_t·x0)/√(1−ᾱ_t)                     again, if asked to rederive it
    x_s    = √ᾱ_s·x0 + c1·z + c2·ε
    """
    batch, total = x.shape[0], x.numel()
    n = total // batch
    row_stride = 0 if isinstance(row, int) or batch == 1 else row.stride(0)
    guidance_stride = 0 if batch == 1 or guidance is None else guidance.stride(0)
    threshold_stride = 0 if batch == 1 or threshold is None else threshold.stride(0)
    if not layout.apart(x) and (row_stride or threshold_stride or guidance is not None):
        raise ValueError("samples that are on rows of their own must lie one after another")
    small = n < SMALL and batch > 1
    channels = 1
    if seeds is not None and not x.is_contiguous():
        few = layout.apart(x) and x.dim() > 2 and x.shape[1] <= CHUNK // 16
        channels = x.shape[1] if few and x[0].movedim(0, -1).is_contiguous() else 0
    # The pass draws the noise of contiguous samples, and of pixels of a few channels. For another
    # layout, and for small samples with numbers of their own, it is drawn ahead.
    ahead = seeds is not None and (
        channels == 0 or (small and on_torch.by_sample(row, guidance, threshold))
    )
    if ahead or (small and row_stride):
        rest = on_torch.bind if small and row_stride else bind
        return _drawn_ahead(
            rest, fixed, x, output, table, row, seeds, noise, guidance, threshold, out, x0,
            next_input,
        )  # fmt: skip
    steps = table.shape[0]
    # These stand in _BOUND's order.
    bound = (
        batch,
        n,
        channels,
        steps,
        _DTYPES.index(output.dtype),
        fixed.prediction,
        fixed.noise_first,
        fixed.rederive,
        output.stride(0) if layout.apart(x) and output.shape[0] > 1 else n,
        row_stride,
        guidance_stride,
        threshold_stride,
        counter.STEP,
        fixed.clip is not None,
        False,
    )
    run = _Calls(bound, fixed.clip, total >= (NOISY_SHARED if seeds is not None else SHARED))
    rows = _counting(steps)

    def launch(
        x: Tensor,
        output: Tensor,
        table: Tensor,
        row: Any,
        seeds: Tensor | None,
        noise: Tensor | None,
        guidance: Tensor | None,
        threshold: Tensor | None,
        out: Tensor,
        x0: Tensor | None,
        next_input: Tensor | None,
    ) -> None:
        if not isinstance(row, int):
            at = row.data_ptr()
        elif 0 <= row < steps:
            at = rows + 4 * row
        else:
            raise ValueError(f"rows must lie in [0, {steps}), got {row}")
        outcome = run(
            x.data_ptr(),
            output.data_ptr(),
            table.data_ptr(),
            at,
            0 if seeds is None else seeds.data_ptr(),
            0 if noise is None else noise.data_ptr(),
            0 if guidance is None else guidance.data_ptr(),
            0 if threshold is None else threshold.data_ptr(),
            out.data_ptr(),
            0 if x0 is None else x0.data_ptr(),
        )
        if outcome != _DONE:
            _refuse(outcome, row, steps)
        if next_input is not None:
            layout.write_next(next_input, out)

    return launch


def _refuse(outcome: int, row: Any, steps: int) -> None:
    """Raises the error that kept the call from writing."""
    if outcome != _REFUSED:
        raise MemoryError("there is no memory for the step's own chunks")
    low, high = (int(each) for each in torch.aminmax(on_torch.rows_of(row, 1)))
    raise ValueError(f"rows must lie in [0, {steps}), got {low} to {high}")


def _drawn_ahead(bind: Callable[..., Launch], fixed: Fixed, *first: Any) -> Launch:
    """Returns ``bind``'s launch, which gets the noise itself in place of the seeds."""

    def told(
        x: Tensor, output: Tensor, table: Tensor, row: int | Tensor, seeds: Tensor | None,
        noise: Tensor | None, *rest: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        if seeds is not None:
            noise = on_torch.drawn(x, seeds, row, normal_)
        return x, output, table, row, None, noise, *rest

    inner = bind(fixed, *told(*first))

    def launch(*given: Any) -> None:
        inner(*told(*given))

    return launch


_counted: list[npt.NDArray[np.int32]] = []


def _counting(count: int) -> int:
    """Returns the address of 0, 1, 2, ..., at least ``count`` of them as int32, kept for good."""
    for numbers in _counted:
        if len(numbers) >= count:
            break
    else:  # Another thread may add to the list as well: each returns the address of its own.
        numbers = np.arange(max(count, 1024), dtype=np.int32)
        _counted.append(numbers)
    return int(numbers.ctypes.data)


def normal_(out: Tensor, seeds: Tensor, rows: Tensor, stream: int) -> None:
    """Fills ``out``, contiguous float32 (batch, ...), with counter noise."""
    total = out.numel()
    if total == 0:
        return
    batch = out.shape[0]
    seeds = seeds.contiguous()
    bound = dict.fromkeys(_BOUND, 0) | {
        "batch": batch,
        "n": total // batch,
        "row_stride": 0 if batch == 1 else rows.stride(0),
        "stream": stream,
        "fills": True,
    }
    run = _Calls(tuple(bound.values()), None, total >= NOISY_SHARED)
    if run(0, 0, 0, rows.data_ptr(), seeds.data_ptr(), 0, 0, 0, out.data_ptr(), 0) != _DONE:
        raise MemoryError("there is no memory for the normals' own chunks")


BACKEND = Backend("numba", bind, normal_)
