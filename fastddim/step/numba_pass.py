"""One step as one compiled pass over a CPU's memory: everything that numba compiles.

Each chunk of elements passes through the equation's terms while it sits in the L1 cache, and LLVM
turns each term's loop into vector instructions. There is no fused multiply-add and no
reassociation, so a vector's lanes and the loop's remainder give the same bits: those of
``reference.ddim_step``, and noise that depends on (seed, row, element) alone.

Everything that numba compiles stands in this file, because numba's cache looks at the file of the
cached function alone, and would run the old code after a change in another file.
"""

# numba changes the parameters of functions, and pyright does not see all names that it exports.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from fastddim.coefficients import COLUMNS_OF_MANY
from fastddim.step.philox import STEP_STREAM

if numba.config.DISABLE_JIT:
    raise ImportError("the backend numba needs numba's compiler, which NUMBA_DISABLE_JIT turns off")

CHUNK = 1024
"""The elements that pass through all terms together: seven arrays of them fill a 32 KiB L1."""
ROOM = CHUNK // 4 + 1
"""The most quads that a chunk touches: one more than it holds, where it begins inside a quad."""
TASK = 16 * CHUNK
"""Threads fetch tasks of this many elements one by one, so a slowed thread fetches fewer."""

_part: Callable[..., Any] = numba.njit(
    error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True
)
"""Decorates a function that is compiled with its caller, when the cache lacks the caller."""


def _c_function(function: Callable[[int], int]) -> Any:
    """Returns ``int64_t function(void *)``, which any thread may call: compiled now or cached."""
    try:
        compiled = numba.cfunc("int64(int64)", cache=True, error_model="numpy")(function)
    except (RuntimeError, OSError):  # no folder can be written to
        compiled = numba.cfunc("int64(int64)", error_model="numpy")(function)
    return compiled


def _pointer(dtype: Any) -> Any:
    """Returns a function from an address to a pointer. Integers cost a call less than arrays."""

    @intrinsic
    def pointer(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(dtype)(types.int64), generate

    return pointer


# A call is one record, which its threads share. First come the fields that each step brings:
# addresses, 0 standing for None; the outcome; and how many tasks a lone thread has taken. Then come
# the fields that a launch is bound to: sizes and flags, and the addresses of C functions.
BROUGHT = (
    *("x", "output", "table", "rows", "seeds", "noise", "guidance", "threshold", "out", "x0"),
    *("history", "outcome", "taken"),
)
BOUND = (
    *(
        "batch",
        "n",
        "channels",
        "steps",
        "columns",
        "dtype",
        "prediction",
        "noise_first",
        "rederive",
        "posterior",
    ),
    *("output_stride", "row_stride", "guidance_stride", "threshold_stride", "stream", "clips"),
    "fills",
)
FUNCTIONS = ("omp_get_thread_num", "fegetenv", "fesetenv")
CALL = np.dtype(
    [
        *((name, np.int64) for name in (*BROUGHT, *BOUND, "threads", *FUNCTIONS)),
        ("clip", np.float64),
        ("modes", np.int64, (8,)),  # the caller's floating point modes; any C library's fenv_t fits
    ]
)
# After the record each thread has two cache lines: how many tasks of its share have been taken, and
# its modes.
OWN, OWN_MODES = 128, 64
# DONE is no small number, because a function that has failed might return one by chance.
UNDONE, DONE, REFUSED = -1, 0x600D, 1

_float32, _uint16 = _pointer(types.float32), _pointer(types.uint16)
_int32, _int64 = _pointer(types.int32), _pointer(types.int64)
_call = _pointer(numba.from_dtype(CALL))
TAKEN, MODES = (CALL.fields[name][1] for name in ("taken", "modes"))  # type: ignore[index]
SIZE = CALL.itemsize


@intrinsic
def _next(typing_context: Any, address: Any) -> Any:
    """Returns the int64 at an address and adds one to it, atomically."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        place = builder.inttoptr(arguments[0], word.as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(word, 1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def _int_of(typing_context: Any, address: Any) -> Any:
    """Calls the ``int function(void)`` at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = ir.FunctionType(ir.IntType(32), ())
        called = builder.call(builder.inttoptr(arguments[0], function.as_pointer()), ())
        return builder.sext(called, ir.IntType(64))

    return types.int64(types.int64), generate


@intrinsic
def _call_with(typing_context: Any, address: Any, argument: Any) -> Any:
    """Calls the ``int function(void *)`` at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = ir.FunctionType(ir.IntType(32), (ir.IntType(64),))
        place = builder.inttoptr(arguments[0], function.as_pointer())
        return builder.sext(builder.call(place, (arguments[1],)), ir.IntType(64))

    return types.int64(types.int64, types.int64), generate


@_part
def _floats(address, start, count):
    return carray(_float32(address + 4 * start), (count,))


@_part
def _halves(address, start, count):
    return carray(_uint16(address + 2 * start), (count,))


# --- Noise: the definition is that of fastddim.step.philox ------------------------------------

# Typed int64, or numba would compile a second version for the literal.
_STEP_STREAM = np.int64(STEP_STREAM)
_NUMBER = COLUMNS_OF_MANY.index("number")
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
def philox_words(seed, row, stream, quad, quads, words):
    """Writes Philox4x32-10 of the quads from ``quad`` on: all words 0, all 2, all 1, all 3."""
    low, high = np.uint64(seed) & _LOW, np.uint64(seed) >> _WORD
    for i in range(quads):
        index = np.uint64(quad + i)
        c0, c1, c2, c3 = index & _LOW, index >> _WORD, np.uint64(row), np.uint64(stream)
        k0, k1 = low, high
        for _ in range(10):
            # A word has 64 bits, and only a product's operands are masked to 32: the product then
            # becomes vpmuludq, four at a time.
            p0, p1 = (c0 & _LOW) * _M0, (c2 & _LOW) * _M1
            c0, c1, c2, c3 = (p1 >> _WORD) ^ c1 ^ k0, p1, (p0 >> _WORD) ^ c3 ^ k1, p0
            k0, k1 = k0 + _W0, k1 + _W1
        words[i], words[i + 2 * quads] = np.uint32(c0 & _LOW), np.uint32(c1 & _LOW)
        words[i + quads], words[i + 3 * quads] = np.uint32(c2 & _LOW), np.uint32(c3 & _LOW)


@_part
def ln(u):
    """Returns ln u of a positive normal float32: u = 2^k·(1 + f)."""
    bits = np.float32(u).view(np.int32)
    k = np.int32(np.int32(bits - _SQRT_HALF) >> _EXPONENT)
    f = np.int32(bits - np.int32(k << _EXPONENT)).view(np.float32) - _ONE
    q = _Q3 + f * (_Q4 + f * (_Q5 + f * (_Q6 + f * _Q7)))
    q = _Q0 + f * (_Q1 + f * (_Q2 + f * q))
    exponent = np.float32(k)
    return exponent * _LN2_HIGH + (f + (exponent * _LN2_LOW + f * f * q))


@_part
def box_muller(count, words, z):
    """Writes all r·cos θ, then all r·sin θ, from ``count`` words for u and as many for θ."""
    for i in range(count):
        u = (np.float32(words[i]) + _HALF) * _SCALE
        square = _MINUS_TWO * ln(u)
        r = math.sqrt(square if square > _ZERO else _ZERO)
        # θ is k quarter turns, k being the upper two bits, and f of a turn, |f| ≤ ⅛.
        word = np.int32(np.int32(words[i + count]) + _EIGHTH)
        f = (np.float32(np.int32((word & _QUARTER) - _EIGHTH)) + _HALF) * _SCALE
        g = f * f
        s = f * (_S0 + g * (_S1 + g * (_S2 + g * _S3)))
        c = _ONE + g * (_C0 + g * (_C1 + g * (_C2 + g * _C3)))
        next_bit = np.int32(word << _BIT)  # its sign bit says whether k is odd
        cosine, sine = (s, c) if next_bit < 0 else (c, s)
        cosine_sign = np.int32((word ^ next_bit) & _SIGN)
        sine_sign = np.int32(word & _SIGN)
        z[i] = np.int32(np.float32(r * cosine).view(np.int32) ^ cosine_sign).view(np.float32)
        z[i + count] = np.int32(np.float32(r * sine).view(np.int32) ^ sine_sign).view(np.float32)


@_part
def normals(seed, row, stream, first, count, words, pairs, z):
    """Writes the normals of elements ``first`` to ``first + count`` to z; returns their start."""
    quad, lane = first // 4, first % 4
    quads = (lane + count + 3) // 4
    philox_words(seed, row, stream, quad, quads, words)
    box_muller(2 * quads, words, pairs)
    for i in range(quads):
        z[4 * i], z[4 * i + 1] = pairs[i], pairs[i + 2 * quads]
        z[4 * i + 2], z[4 * i + 3] = pairs[i + quads], pairs[i + 3 * quads]
    return lane


@_part
def _scattered(seed, row, stream, first, count, channels, pixels, words, pairs, plane, z):
    """Writes ``normals`` in the order of memory, where a pixel's channels are adjacent.

    Noise belongs to the logical element, channel · pixels + pixel.
    """
    low, high = first // channels, (first + count - 1) // channels + 1
    for channel in range(channels):
        lane = normals(seed, row, stream, channel * pixels + low, high - low, words, pairs, plane)
        for i in range(high - low):
            z[i * channels + channel] = plane[i + lane]
    return first - low * channels


# --- The step's terms -------------------------------------------------------------------------


@_part
def _widened(address, dtype, start, count, into):
    """Returns a chunk of the model's output as float32, converted in ``into`` if need be."""
    if dtype == 0:
        return _floats(address, start, count)
    half = _halves(address, start, count)
    if dtype == 1:
        for i in range(count):
            into[i] = np.uint32(np.uint32(half[i]) << np.uint32(16)).view(np.float32)
    else:
        for i in range(count):
            into[i] = _extended(half[i])
    return into


@_part
def _guide(count, u, c, w, into):
    """Writes u + w·(c − u) of the unconditional and the conditional output."""
    for i in range(count):
        into[i] = u[i] + w * (c[i] - u[i])


@_part
def _guide_each(count, u, c, w, into):
    """Writes u + w·(c − u), where each element has its own w."""
    for i in range(count):
        into[i] = u[i] + w[i] * (c[i] - u[i])


@_part
def _repeat(values, stride, n, start, count, into):
    """Writes to into[i] the value of the sample, of n elements, that element start + i is in."""
    sample, i = start // n, 0
    stop = min((sample + 1) * n - start, count)
    while i < count:
        value = values[sample * stride]
        for k in range(i, stop):
            into[k] = value
        i, sample, stop = stop, sample + 1, min(stop + n, count)


@_part
def _unrounded(v):
    return v


@_part
def _to_bfloat16(v):
    """Returns v rounded to bfloat16, to nearest even, as a float32.

    The sum could turn a NaN with bits in its lower half into a zero. No NaN here has any: it comes
    from bfloat16, or from an operation without a result.
    """
    bits = np.float32(v).view(np.uint32)
    even = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    near = np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + even)
    return np.uint32(near & np.uint32(0xFFFF0000)).view(np.float32)


@intrinsic
def _converted(typing_context: Any, v: Any) -> Any:
    """Returns the bits of a float32 in float16, by the processor's instruction."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def _converted_back(typing_context: Any, bits: Any) -> Any:
    """Returns the float32 of a float16's bits, by the processor's instruction."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@_part
def _float16_bits(v):
    """Returns the bits of v in float16, rounded to nearest even, without conversions."""
    bits = np.float32(v).view(np.uint32)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    # The exponent's bias is 15, and float32's is 127.
    even = np.uint32(np.uint32(magnitude >> np.uint32(13)) & np.uint32(1))
    word = np.uint32(np.uint32(magnitude + np.uint32(0xFFF)) + even)
    word = np.uint32(np.uint32(word - np.uint32(112 << 23)) >> np.uint32(13))
    # A subnormal is a multiple of 2⁻²⁴, as are the float32 numbers in [½, 1): their lowest bits
    # count the multiples.
    tiny = np.float32(abs(np.float32(v)) + np.float32(0.5)).view(np.uint32)
    word = np.uint32(tiny - np.uint32(126 << 23)) if magnitude < np.uint32(113 << 23) else word
    word = np.uint32(0x7C00) if magnitude >= _OVERFLOW else word
    word = np.uint32(0x7E00) if magnitude > np.uint32(0x7F800000) else word
    sign = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000))
    return np.uint16(np.uint32(word | sign))


_OVERFLOW = np.uint32(143 << 23)  # 65536. Smaller numbers carry into infinity's bits from 65520 on.


@_part
def _float16_value(half):
    """Returns the float32 of a float16's bits, without conversions."""
    bits = np.uint32(half)
    magnitude = np.uint32(bits & np.uint32(0x7FFF))
    # A denormal is a multiple of 2⁻²⁴. Infinity and NaN get the largest exponent of float32.
    word = np.uint32(np.uint32(magnitude << np.uint32(13)) + np.uint32(112 << 23))
    word = np.uint32(word | np.uint32(0x7F800000)) if magnitude >= 0x7C00 else word
    tiny = np.float32(np.float32(magnitude) * np.float32(2.0**-24)).view(np.uint32)
    word = tiny if magnitude < 0x400 else word
    sign = np.uint32((bits & np.uint32(0x8000)) << np.uint32(16))
    return np.uint32(word | sign).view(np.float32)


def _converts() -> bool:
    """Returns whether the code is compiled for a processor that converts to float16 and back.

    For another, LLVM would call functions that are not there.
    """
    if numba.config.CPU_NAME is not None:
        return False
    if platform.machine() in ("aarch64", "arm64"):
        return True
    try:
        return bool(dict(llvmlite.binding.get_host_cpu_features()).get("f16c"))
    except RuntimeError:  # llvmlite does not know the features of this processor
        return False


_narrowed, _extended = (
    (_converted, _converted_back) if _converts() else (_float16_bits, _float16_value)
)


@_part
def _to_float16(v):
    return _extended(_narrowed(v))


def _terms(rounded):
    """Returns the terms of the equation, each of whose operations goes through ``rounded``."""

    @_part
    def x0_of_epsilon(x, e, a_t, times_a, times_b):
        return rounded(rounded(x - rounded(e * times_b)) / a_t)

    @_part
    def x0_of_v(x, e, a_t, times_a, times_b):
        return rounded(rounded(times_a * x) - rounded(times_b * e))

    @_part
    def eps_of_v(x, e, b_t, times_a, times_b):
        return rounded(rounded(times_a * e) + rounded(times_b * x))

    @_part
    def eps_of_x0(x, x0, b_t, times_a, times_b):
        return rounded(rounded(x - rounded(times_a * x0)) / b_t)

    @_part
    def sum_of(x0, eps, a_s, c2):
        return rounded(rounded(a_s * x0) + rounded(c2 * eps))

    @_part
    def predict(count, prediction, x, e, a_t, b_t, times_a, times_b, x0, eps):
        """Writes x0 and ε; of an epsilon model, whose output is ε, x0 alone."""
        if prediction == 0:
            for i in range(count):
                x0[i] = x0_of_epsilon(x[i], e[i], a_t, times_a, times_b)
        elif prediction == 1:
            for i in range(count):
                x0[i] = x0_of_v(x[i], e[i], a_t, times_a, times_b)
                eps[i] = eps_of_v(x[i], e[i], b_t, times_a, times_b)
        elif prediction == 3:
            for i in range(count):
                x0[i] = rounded(x[i] - rounded(e[i] * times_b))
                eps[i] = rounded(x[i] + rounded(times_a * e[i]))
        else:
            for i in range(count):
                x0[i] = e[i]
                eps[i] = eps_of_x0(x[i], e[i], b_t, times_a, times_b)

    @_part
    def predict_x0(count, prediction, x, e, a_t, times_a, times_b, x0):
        """Writes the x0 of ``predict`` alone, for a sum that holds x in the place of ε."""
        if prediction == 0:
            for i in range(count):
                x0[i] = x0_of_epsilon(x[i], e[i], a_t, times_a, times_b)
        elif prediction == 1:
            for i in range(count):
                x0[i] = x0_of_v(x[i], e[i], a_t, times_a, times_b)
        elif prediction == 3:
            for i in range(count):
                x0[i] = rounded(x[i] - rounded(e[i] * times_b))
        else:
            for i in range(count):
                x0[i] = e[i]

    @_part
    def divide_by(count, s, x0):
        """Divides x0 by a threshold."""
        for i in range(count):
            x0[i] = rounded(x0[i] / s)

    @_part
    def rederive(count, x, x0, b_t, times_a, eps):
        """Writes ε of the bounded x0."""
        for i in range(count):
            eps[i] = eps_of_x0(x[i], x0[i], b_t, times_a, times_a)

    @_part
    def combine(count, x0, eps, z, lane, noisy, noise_first, a_s, c1, c2, out):
        """Writes x_s = √ᾱ_s·x0 + c1·z + c2·ε, with the noise before the direction or after it."""
        if not noisy:
            for i in range(count):
                out[i] = sum_of(x0[i], eps[i], a_s, c2)
        elif noise_first:
            for i in range(count):
                x_s = rounded(rounded(a_s * x0[i]) + rounded(c1 * z[i + lane]))
                out[i] = rounded(x_s + rounded(c2 * eps[i]))
        else:
            for i in range(count):
                x_s = sum_of(x0[i], eps[i], a_s, c2)
                out[i] = rounded(x_s + rounded(c1 * z[i + lane]))

    of_models = x0_of_epsilon, x0_of_v, eps_of_v, eps_of_x0, sum_of
    return of_models, predict, predict_x0, divide_by, rederive, combine


_, _predict, _predict_x0, _divide_by, _rederive, _combine = _terms(_unrounded)


@_part
def _plain_step(count, prediction, x, e, a_t, b_t, a_s, c2, out):
    """Writes x_s in one loop, where x0 is neither kept nor bounded and no noise is added."""
    if prediction == 0:
        for i in range(count):
            out[i] = a_s * ((x[i] - e[i] * b_t) / a_t) + c2 * e[i]
    elif prediction == 1:
        for i in range(count):
            out[i] = a_s * (a_t * x[i] - b_t * e[i]) + c2 * (a_t * e[i] + b_t * x[i])
    elif prediction == 3:
        for i in range(count):
            out[i] = a_s * (x[i] - e[i] * b_t) + c2 * (x[i] + a_t * e[i])
    else:
        for i in range(count):
            out[i] = a_s * e[i] + c2 * ((x[i] - a_t * e[i]) / b_t)


@_part
def _clamped(value, bound):
    """Returns a value clamped to ±bound. A NaN stays one: neither comparison holds for it."""
    value = -bound if value < -bound else value
    return bound if value > bound else value


@_part
def _clamp(count, x0, bound):
    """Clamps x0 to ±bound."""
    for i in range(count):
        x0[i] = _clamped(x0[i], bound)


@_part
def _bound_each(count, x0, s):
    """Clamps x0 to ±s and divides it by s, where each element has its own s."""
    for i in range(count):
        value, bound = x0[i], s[i]
        value = -bound if value < -bound else value
        x0[i] = (bound if value > bound else value) / bound


@_part
def _extrapolate(count, x0, history, kappa, d):
    """Writes D = x0 + κ·(x0 − x0′)."""
    for i in range(count):
        d[i] = x0[i] + kappa * (x0[i] - history[i])


@_part
def _taken(address, thread, total):
    """Returns (start, stop) of a thread's next task, an empty one when none is left.

    A thread begins with its own share of the tasks, the same at every step, because its core's
    cache holds the part of x that it wrote at the last step. Then it helps the other threads.
    """
    call = carray(_call(address), (1,))[0]
    if call.threads == 1:
        return (total if _next(address + TAKEN) else 0), total
    tasks = (total + TASK - 1) // TASK
    for k in range(call.threads):
        share = (thread + k) % call.threads
        task = share * tasks // call.threads + _next(address + SIZE + OWN * share)
        if task < (share + 1) * tasks // call.threads:
            return TASK * task, min(TASK * (task + 1), total)
    return total, total


@_part
def _on_rows(address):
    """Returns whether all rows are in the table; otherwise the outcome is REFUSED."""
    call = carray(_call(address), (1,))[0]
    rows = carray(_int32(call.rows), (call.batch,))
    for sample in range(call.batch if call.row_stride else 1):
        row = rows[sample * call.row_stride]
        if row < 0 or row >= call.steps:
            call.outcome = REFUSED
            return False
    return True


@_part
def _light_steps(address, thread, n, total):
    """Takes ``_steps`` where every term is one of the caller's tensors, or none is kept.

    Scratch memory for the terms would cost a small step half its time. ``n`` elements follow one
    another on one row.
    """
    call = carray(_call(address), (1,))[0]
    rows = carray(_int32(call.rows), (call.batch,))
    table = carray(_float32(call.table), (call.columns * call.steps,))
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
            at = call.columns * row
            a_t, b_t, a_s, c2 = table[at], table[at + 2], table[at + 4], table[at + 6]
            x, out = _floats(call.x, start, count), _floats(call.out, start, count)
            e = _floats(call.output, sample * call.output_stride + first, count)
            if call.x0:
                x0 = _floats(call.x0, start, count)
                _predict(count, 0, x, e, a_t, b_t, a_t, b_t, x0, e)
                if call.clips:
                    _clamp(count, x0, np.float32(call.clip))
                _combine(count, x0, e, x0, 0, False, False, a_s, _ZERO, c2, out)
            else:
                _plain_step(count, call.prediction, x, e, a_t, b_t, a_s, c2, out)
            start += count


@_part
def _steps(address, thread):
    """Writes x_s of this thread's tasks, or the outcome REFUSED if a row is not in the table."""
    call = carray(_call(address), (1,))[0]
    batch, n, channels, steps = call.batch, call.n, call.channels, call.steps
    rows = carray(_int32(call.rows), (batch,))
    table = carray(_float32(call.table), (call.columns * steps,))
    seeds = carray(_int64(call.seeds), (batch,))
    guidance = carray(_float32(call.guidance), (batch,))
    threshold = carray(_float32(call.threshold), (batch,))
    if not _on_rows(address):
        return
    total = batch * n
    conditional = call.output + batch * call.output_stride * (4 if call.dtype == 0 else 2)
    counted = call.seeds != 0 and (call.row_stride != 0 or table[call.columns * rows[0] + 5] != 0)
    # A chunk of several small samples gets its weights and thresholds element by element: one pass
    # for each sample would cost more than its few elements.
    each, spread = n, (call.guidance_stride != 0 or call.threshold_stride != 0) and n < CHUNK
    alone = call.guidance_stride == 0 and call.threshold_stride == 0
    if call.row_stride == 0 and call.output_stride == n and not counted and (alone or spread):
        n = total  # all samples are on one row and adjacent, so they count as one sample
    else:
        spread = False

    kept = call.x0 != 0 or call.threshold != 0 or call.history != 0
    kept_x0 = call.clips or call.rederive or call.posterior or kept
    plain = not kept_x0 and call.noise == 0
    made = call.guidance != 0 or call.dtype != 0 or call.noise != 0 or counted
    bounded = call.threshold != 0 or call.rederive or (call.clips and call.x0 == 0)
    bounded = bounded or call.posterior
    light = call.prediction == 0 or call.x0 == 0
    if light and not made and not bounded and call.history == 0:
        _light_steps(address, thread, n, total)
        return
    x0_own, eps_own = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    u_own, c_own = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    own = np.empty(CHUNK if spread else 1, np.float32)
    d_own = np.empty(CHUNK if call.history else 1, np.float32)
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
            at = call.columns * row
            a_t, b_t, a_s = table[at], table[at + 2], table[at + 4]
            c1, c2 = table[at + 5], table[at + 6]
            x, out = _floats(call.x, start, count), _floats(call.out, start, count)
            in_place = call.x0 and not call.history  # they may be the same memory
            x0, eps = _floats(call.x0, start, count) if in_place else x0_own, eps_own

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
                _plain_step(count, call.prediction, x, e, a_t, b_t, a_s, c2, out)
                start += count
                continue
            extrapolates = call.history != 0 and table[at + 7] != 0
            of_x = call.posterior != 0 or extrapolates
            if of_x:
                _predict_x0(count, call.prediction, x, e, a_t, a_t, b_t, x0)
                eps = x
            else:
                _predict(count, call.prediction, x, e, a_t, b_t, a_t, b_t, x0, eps)
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
                _divide_by(count, s, x0)
            if call.rederive and not of_x:
                eps = eps_own
                _rederive(count, x, x0, b_t, a_t, eps)
            noisy, z, lane = call.noise != 0, _floats(call.noise, start, count), 0
            if counted and c1 != 0:
                noisy, z, seed, number = True, z_own, seeds[sample], row
                if call.columns > _NUMBER:
                    number = np.int32(table[at + _NUMBER])
                if channels == 1:
                    lane = normals(seed, number, _STEP_STREAM, first, count, words, pairs, z_own)
                else:
                    lane = _scattered(
                        seed, number, _STEP_STREAM, first, count, channels, n // channels, words,
                        pairs, plane, z_own,
                    )  # fmt: skip
            if extrapolates:
                _extrapolate(count, x0, _floats(call.history, start, count), table[at + 7], d_own)
                _combine(count, d_own, eps, z, lane, noisy, call.noise_first, a_s, c1, c2, out)
            else:
                _combine(count, x0, eps, z, lane, noisy, call.noise_first, a_s, c1, c2, out)
            if call.history and call.x0:
                x0_out = _floats(call.x0, start, count)
                for i in range(count):
                    x0_out[i] = x0[i]
            start += count


@_part
def _fill(address, thread):
    """Writes counter noise to the elements of ``out`` in this thread's tasks."""
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
            lane = normals(seeds[sample], row, call.stream, first, count, words, pairs, z)
            out = _floats(call.out, start, count)
            for i in range(count):
                out[i] = z[i + lane]
            start += count


# --- A step that rounds -----------------------------------------------------------------------


@_part
def _narrow(address, dtype, start, count, values):
    """Writes a chunk of numbers that have been rounded to a 16-bit type in that type."""
    half = _halves(address, start, count)
    if dtype == 1:
        for i in range(count):
            bits = np.float32(values[i]).view(np.uint32)
            half[i] = np.uint16(np.uint32(bits >> np.uint32(16)))
    else:
        for i in range(count):
            half[i] = _narrowed(values[i])


def _rounding_steps(rounded, value, bits):
    """Returns ``_steps`` of bfloat16 or float16 tensors, which rounds after each operation.

    ``value`` and ``bits`` turn a 16-bit number into float32 and back.
    """
    of_models, predict, predict_x0, divide_by, rederive, combine = _terms(rounded)
    x0_of_epsilon, x0_of_v, eps_of_v, eps_of_x0, sum_of = of_models

    @_part
    def itself(x, e, factor, times_a, times_b):
        return e

    @_part
    def state(x, e, factor, times_a, times_b):
        return x

    def light(x0_of, eps_of):
        """Returns the step that has neither thresholds nor ε computed again, in one loop."""

        @_part
        def taken(count, x, e, z, bound, noisy, at, x0, out):
            a_t, b_t, times_a, times_b, a_s, c1, c2 = at
            if noisy:
                for i in range(count):
                    x_t, output = value(x[i]), value(e[i])
                    predicted = _clamped(x0_of(x_t, output, a_t, times_a, times_b), bound)
                    x0[i] = bits(predicted)
                    x_s = sum_of(predicted, eps_of(x_t, output, b_t, times_a, times_b), a_s, c2)
                    out[i] = bits(rounded(x_s + rounded(c1 * value(z[i]))))
            else:
                for i in range(count):
                    x_t, output = value(x[i]), value(e[i])
                    predicted = _clamped(x0_of(x_t, output, a_t, times_a, times_b), bound)
                    x0[i] = bits(predicted)
                    eps = eps_of(x_t, output, b_t, times_a, times_b)
                    out[i] = bits(sum_of(predicted, eps, a_s, c2))

        return taken

    of_epsilon, of_v = light(x0_of_epsilon, itself), light(x0_of_v, eps_of_v)
    of_x0, of_posterior = light(itself, eps_of_x0), light(x0_of_epsilon, state)

    @_part
    def steps(address, thread):
        call = carray(_call(address), (1,))[0]
        batch, n, steps = call.batch, call.n, call.steps
        rows = carray(_int32(call.rows), (batch,))
        table = carray(_float32(call.table), (call.columns * steps,))
        threshold = carray(_float32(call.threshold), (batch,))
        if not _on_rows(address):
            return
        total = batch * n
        if call.row_stride == 0 and call.output_stride == n and call.threshold_stride == 0:
            n = total
        x_own, e_own = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
        x0, eps_own = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
        z_own = np.empty(CHUNK if call.noise else 1, np.float32)
        out = np.empty(CHUNK, np.float32)  # LLVM vectorises no loop that writes where it reads.
        is_light = call.x0 and not (call.noise and call.noise_first)
        is_light = is_light and not (call.threshold or call.rederive)
        is_light = is_light and (
            call.prediction == 0 or (call.prediction < 3 and not call.posterior)
        )
        bound = np.float32(call.clip) if call.clips else np.float32(np.inf)
        while True:
            start, stop = _taken(address, thread, total)
            if start >= stop:
                return
            while start < stop:
                sample = start // n
                first = start - sample * n
                count = min(min(CHUNK, n - first), stop - start)
                at = call.columns * rows[sample * call.row_stride]
                a_t, b_t, a_s = table[at], table[at + 2], table[at + 4]
                c1, c2 = table[at + 5], table[at + 6]
                times_a, times_b = table[at + 7], table[at + 8]
                where = sample * call.output_stride + first
                if is_light:
                    x_half, e_half = (
                        _halves(call.x, start, count),
                        _halves(call.output, where, count),
                    )
                    z_half = _halves(call.noise, start, count)
                    halves = _halves(call.x0, start, count), _halves(call.out, start, count)
                    noisy, factors = call.noise != 0, (a_t, b_t, times_a, times_b, a_s, c1, c2)
                    if call.posterior:
                        of_posterior(count, x_half, e_half, z_half, bound, noisy, factors, *halves)
                    elif call.prediction == 0:
                        of_epsilon(count, x_half, e_half, z_half, bound, noisy, factors, *halves)
                    elif call.prediction == 1:
                        of_v(count, x_half, e_half, z_half, bound, noisy, factors, *halves)
                    else:
                        of_x0(count, x_half, e_half, z_half, bound, noisy, factors, *halves)
                    start += count
                    continue
                x = _widened(call.x, call.dtype, start, count, x_own)
                e = _widened(call.output, call.dtype, where, count, e_own)
                if call.posterior:
                    predict_x0(count, call.prediction, x, e, a_t, times_a, times_b, x0)
                    eps = x
                else:
                    eps = e if call.prediction == 0 else eps_own
                    predict(count, call.prediction, x, e, a_t, b_t, times_a, times_b, x0, eps)
                if call.clips:
                    _clamp(count, x0, np.float32(call.clip))
                if call.threshold:
                    s = threshold[sample * call.threshold_stride]
                    _clamp(count, x0, s)
                    divide_by(count, s, x0)
                if call.rederive and not call.posterior:
                    eps = eps_own
                    rederive(count, x, x0, b_t, times_a, eps)
                if call.x0:
                    _narrow(call.x0, call.dtype, start, count, x0)
                z = z_own
                if call.noise:
                    z = _widened(call.noise, call.dtype, start, count, z_own)
                noisy = call.noise != 0
                combine(count, x0, eps, z, 0, noisy, call.noise_first, a_s, c1, c2, out)
                _narrow(call.out, call.dtype, start, count, out)
                start += count

    return steps


@_part
def _bfloat16_value(half):
    return np.uint32(np.uint32(half) << np.uint32(16)).view(np.float32)


@_part
def _bfloat16_bits(v):
    return np.uint16(np.uint32(np.float32(v).view(np.uint32) >> np.uint32(16)))


_bfloat16_steps = _rounding_steps(_to_bfloat16, _bfloat16_value, _bfloat16_bits)
_float16_steps = _rounding_steps(_to_float16, _extended, _narrowed)


# --- The compiled functions -------------------------------------------------------------------


@_part
def _entered(address):
    """Returns this thread's number and the address of its modes, and sets the caller's modes.

    PyTorch's threads keep the rounding mode and the flushing of denormals that were set when they
    were made. Here they have their caller's, or a result would depend on which thread took a task.
    """
    call = carray(_call(address), (1,))[0]
    thread = own = 0
    if call.threads > 1:
        thread = _int_of(call.omp_get_thread_num)
        own = address + SIZE + OWN * thread + OWN_MODES
        _call_with(call.fegetenv, own)
        _call_with(call.fesetenv, address + MODES)
    return thread, own


@_part
def _left(address, own):
    """Restores this thread's modes, and returns the outcome."""
    call = carray(_call(address), (1,))[0]
    if call.outcome == UNDONE:  # not reached where memory ran out
        call.outcome = DONE
    if call.threads > 1:
        _call_with(call.fesetenv, own)
    return call.outcome


@_c_function
def take_part(address):
    """Takes one thread's part of the call at this address, all of it if the thread is alone."""
    thread, own = _entered(address)
    if carray(_call(address), (1,))[0].fills:
        _fill(address, thread)
    else:
        _steps(address, thread)
    return _left(address, own)


def _take_bfloat16_part(address):
    thread, own = _entered(address)
    _bfloat16_steps(address, thread)
    return _left(address, own)


def _take_float16_part(address):
    thread, own = _entered(address)
    _float16_steps(address, thread)
    return _left(address, own)


@functools.cache
def part_of(rounding: Any) -> Any:
    """Returns ``take_part`` of a step that rounds to this dtype, or ``take_part`` itself for None.

    The functions that round are compiled by their first step, because few processes need them.
    """
    if rounding is None:
        return take_part
    return _c_function(_take_bfloat16_part if rounding is torch.bfloat16 else _take_float16_part)
