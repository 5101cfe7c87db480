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
from typing import Any, NamedTuple

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastddim.coefficients import COLUMNS_2, COLUMNS_OF_MANY
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
_inlined: Callable[..., Any] = numba.njit(error_model="numpy", inline="always")
"""Decorates a function that becomes a part of its callers before they are compiled. LLVM optimises
each level of calls anew with all levels below it: one more level of ``_part`` may cost a second."""


def _c_function(function: Callable[[int], int]) -> Any:
    """Returns ``int64_t function(void *)``, which any thread may call: compiled now or cached."""
    try:
        compiled = numba.cfunc("int64(int64)", cache=True, error_model="numpy")(function)
    except (RuntimeError, OSError):  # no folder can be written to
        compiled = numba.cfunc("int64(int64)", error_model="numpy")(function)
    return compiled


def _at(kind: Any) -> Any:
    """Returns a function from an address to a pointer, or to a record.

    A compiled function takes addresses, because integers cost a call less than arrays.
    """

    @intrinsic
    def at(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return kind(types.int64), generate

    return at


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

_float32, _uint32, _uint16, _int32, _int64 = (
    _at(types.CPointer(number))
    for number in (types.float32, types.uint32, types.uint16, types.int32, types.int64)
)
_call = _at(numba.from_dtype(CALL))
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
def _floats(address, start):
    return _float32(address + 4 * start)


@_part
def _halves(address, start):
    return _uint16(address + 2 * start)


# --- Noise: the definition is that of fastddim.step.philox ------------------------------------

# Typed int64, or numba would compile a second version for the literal.
_STEP_STREAM = np.int64(STEP_STREAM)
_NUMBER, _KAPPA = COLUMNS_OF_MANY.index("number"), COLUMNS_2.index("kappa")
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


# --- Rounding ---------------------------------------------------------------------------------


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


@_part
def _bfloat16_value(half):
    return np.uint32(np.uint32(half) << np.uint32(16)).view(np.float32)


@_part
def _bfloat16_bits(v):
    return np.uint16(np.uint32(np.float32(v).view(np.uint32) >> np.uint32(16)))


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


# --- The equation's terms, of one element -----------------------------------------------------

EPSILON, V, SAMPLE, FLOW = range(4)
"""The models, as ``Fixed.prediction`` numbers them."""


class Row(NamedTuple):
    """The coefficients of a step: those columns of the table that the terms use."""

    a_t: Any  # √ᾱ_t where it divides
    b_t: Any  # √(1−ᾱ_t) where it divides
    a_s: Any  # √ᾱ_s
    c1: Any
    c2: Any
    times_a: Any  # √ᾱ_t where it multiplies
    times_b: Any  # √(1−ᾱ_t) where it multiplies


@_part
def _guided(u, c, w):
    return u + w * (c - u)


@_part
def _the_output(x, output, row):
    """Returns ε of an epsilon model, and x0 of an x0 model."""
    return output


@_part
def _the_state(x, output, row):
    """Returns x_t, which a posterior sum holds in the place of ε."""
    return x


@_part
def _clamped(value, bound):
    """Returns a value clamped to ±bound. A NaN stays one: neither comparison holds for it."""
    value = -bound if value < -bound else value
    return bound if value > bound else value


@_part
def _extrapolated(x0, x0_before, kappa):
    return x0 + kappa * (x0 - x0_before)


class Terms(NamedTuple):
    """The terms of the equation whose operations may round.

    Attributes:
        of_models: for each prediction, x0 and ε of x_t and the model's output.
        bounded: x0 clamped to ±s and divided by s.
        x_s: √ᾱ_s·x0 + c2·ε.
        x_s_noise_first: √ᾱ_s·x0 + c1·z + c2·ε, added in this order.
        x_s_noise_last: √ᾱ_s·x0 + c2·ε + c1·z, added in this order.
    """

    of_models: tuple[tuple[Any, Any], ...]
    bounded: Any
    x_s: Any
    x_s_noise_first: Any
    x_s_noise_last: Any


def _terms(rounded):
    """Returns the terms, each of whose operations goes through ``rounded``."""

    @_part
    def x0_of_epsilon(x, eps, row):
        return rounded(rounded(x - rounded(eps * row.times_b)) / row.a_t)

    @_part
    def x0_of_v(x, v, row):
        return rounded(rounded(row.times_a * x) - rounded(row.times_b * v))

    @_part
    def eps_of_v(x, v, row):
        return rounded(rounded(row.times_a * v) + rounded(row.times_b * x))

    @_part
    def eps_of_x0(x, x0, row):
        return rounded(rounded(x - rounded(row.times_a * x0)) / row.b_t)

    @_part
    def x0_of_flow(x, u, row):
        return rounded(x - rounded(u * row.times_b))

    @_part
    def eps_of_flow(x, u, row):
        return rounded(x + rounded(row.times_a * u))

    @_part
    def bounded(x0, s):
        return rounded(_clamped(x0, s) / s)

    @_part
    def x_s(x0, eps, row):
        return rounded(rounded(row.a_s * x0) + rounded(row.c2 * eps))

    @_part
    def x_s_noise_first(x0, eps, z, row):
        x0_and_z = rounded(rounded(row.a_s * x0) + rounded(row.c1 * z))
        return rounded(x0_and_z + rounded(row.c2 * eps))

    @_part
    def x_s_noise_last(x0, eps, z, row):
        return rounded(x_s(x0, eps, row) + rounded(row.c1 * z))

    of_models = (
        (x0_of_epsilon, _the_output),
        (x0_of_v, eps_of_v),
        (_the_output, eps_of_x0),
        (x0_of_flow, eps_of_flow),
    )
    return Terms(of_models, bounded, x_s, x_s_noise_first, x_s_noise_last)


# --- The terms of a chunk ---------------------------------------------------------------------


def _by_model(loop, of_models):
    """Returns ``run(model, ...)``, which runs ``loop(x0_of, eps_of)`` of this model's terms."""
    of_epsilon, of_v, of_x0, of_last = (_part(loop(*terms)) for terms in of_models)

    @_inlined
    def run(model, count, x, output, row, into):
        if model == EPSILON:
            of_epsilon(count, x, output, row, into)
        elif model == V:
            of_v(count, x, output, row, into)
        elif model == SAMPLE:
            of_x0(count, x, output, row, into)
        else:
            of_last(count, x, output, row, into)

    return run


class Loops(NamedTuple):
    """The loops over a chunk of the terms that may round."""

    predict_x0: Any
    predict: Any
    bound: Any
    bound_each: Any
    rederive: Any
    combine: Any


def _loops(terms):
    """Returns the loops of these terms."""
    of_models, bounded, x_s, x_s_noise_first, x_s_noise_last = terms
    _, eps_of_x0 = of_models[SAMPLE]

    def of_x0(x0_of, eps_of):
        def predict_x0(count, x, output, row, x0):
            for i in range(count):
                x0[i] = x0_of(x[i], output[i], row)

        return predict_x0

    def of_x0_and_eps(x0_of, eps_of):
        def predict(count, x, output, row, into):
            x0, eps = into
            for i in range(count):
                x0[i] = x0_of(x[i], output[i], row)
                eps[i] = eps_of(x[i], output[i], row)

        return predict

    @_part
    def bound(count, x0, s):
        for i in range(count):
            x0[i] = bounded(x0[i], s)

    @_part
    def bound_each(count, x0, s):
        for i in range(count):
            x0[i] = bounded(x0[i], s[i])

    @_part
    def rederive(count, x, x0, row, eps):
        """Writes ε of the bounded x0, as if a model had returned it."""
        for i in range(count):
            eps[i] = eps_of_x0(x[i], x0[i], row)

    @_part
    def combine(count, x0, eps, z, lane, noisy, noise_first, row, out):
        """Writes x_s = √ᾱ_s·x0 + c1·z + c2·ε, with the noise before the direction or after it."""
        if not noisy:
            for i in range(count):
                out[i] = x_s(x0[i], eps[i], row)
        elif noise_first:
            for i in range(count):
                out[i] = x_s_noise_first(x0[i], eps[i], z[i + lane], row)
        else:
            for i in range(count):
                out[i] = x_s_noise_last(x0[i], eps[i], z[i + lane], row)

    predict_x0, predict = (_by_model(loop, of_models) for loop in (of_x0, of_x0_and_eps))
    return Loops(predict_x0, predict, bound, bound_each, rederive, combine)


_float32_terms = _terms(_unrounded)
_float32_loops = _loops(_float32_terms)
_predict_x0, _combine = _float32_loops.predict_x0, _float32_loops.combine


def _of_x_s(x0_of, eps_of):
    """Returns the loop of a plain step, which neither keeps nor bounds x0 and adds no noise."""
    x_s = _float32_terms.x_s

    def plain_step(count, x, output, row, out):
        for i in range(count):
            out[i] = x_s(x0_of(x[i], output[i], row), eps_of(x[i], output[i], row), row)

    return plain_step


_plain_step = _by_model(_of_x_s, _float32_terms.of_models)


@_part
def _guide(count, u, c, w, into):
    for i in range(count):
        into[i] = _guided(u[i], c[i], w)


@_part
def _guide_each(count, u, c, w, into):
    for i in range(count):
        into[i] = _guided(u[i], c[i], w[i])


@_part
def _clamp(count, x0, bound):
    for i in range(count):
        x0[i] = _clamped(x0[i], bound)


@_part
def _extrapolate(count, x0, history, kappa, d):
    """Writes D = x0 + κ·(x0 − x0′)."""
    for i in range(count):
        d[i] = _extrapolated(x0[i], history[i], kappa)


@_part
def _copy(count, values, lane, into):
    for i in range(count):
        into[i] = values[i + lane]


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
def _widen(address, dtype, start, count, into):
    """Returns a chunk of numbers as float32, converted in ``into`` if need be."""
    if dtype == 0:
        return _floats(address, start)
    half = _halves(address, start)
    if dtype == 1:
        for i in range(count):
            into[i] = _bfloat16_value(half[i])
    else:
        for i in range(count):
            into[i] = _extended(half[i])
    return into


@_part
def _narrow(address, dtype, start, count, values):
    """Writes a chunk of numbers that have been rounded to a 16-bit type in that type."""
    half = _halves(address, start)
    if dtype == 1:
        for i in range(count):
            half[i] = _bfloat16_bits(values[i])
    else:
        for i in range(count):
            half[i] = _narrowed(values[i])


# --- The walk over the chunks of a call -------------------------------------------------------


class Chunk(NamedTuple):
    """``count`` elements from ``start`` on, which lie in one sample from its ``first`` on."""

    sample: Any
    first: Any
    start: Any
    count: Any


@_part
def _taken(address, thread, total):
    """Returns (start, stop) of a thread's next task, an empty one when none is left.

    A thread begins with its own share of the tasks, the same at every step, because its core's
    cache holds the part of x that it wrote at the last step. Then it helps the other threads.
    """
    call = _call(address)
    if call.threads == 1:
        return (total if _next(address + TAKEN) else 0), total
    tasks = (total + TASK - 1) // TASK
    for k in range(call.threads):
        share = (thread + k) % call.threads
        task = share * tasks // call.threads + _next(address + SIZE + OWN * share)
        if task < (share + 1) * tasks // call.threads:
            return TASK * task, min(TASK * (task + 1), total)
    return total, total


def _walk(visit):
    """Returns the walk that calls ``visit(call, chunk, given)`` on each chunk of a thread's tasks.

    A chunk has ``longest`` elements at most, and its sample ``n``.
    """

    @_inlined
    def walk(address, thread, n, longest, given):
        call = _call(address)
        total = call.batch * call.n
        while True:
            start, stop = _taken(address, thread, total)
            if start >= stop:
                return
            while start < stop:
                sample = start // n
                first = start - sample * n
                count = min(min(longest, n - first), stop - start)
                visit(call, Chunk(sample, first, start, count), given)
                start += count

    return walk


# The rows of a thread's scratch memory. Each term has its own, because LLVM vectorises no loop that
# writes where it reads.
_X, _OUTPUT, _COND, _GUIDED, _X0, _EPS, _D, _EACH, _Z, _OUT, _PLANE, _PAIRS, _WORDS = range(13)
# A row has room for the noise of ``_scattered``, of up to CHUNK // 16 channels. Rows are not nearly
# 4 KiB apart, or a processor would have loads wait for stores to the same place in another page.
_WIDTH = CHUNK + 240


@_inlined
def _scratch():
    return np.empty((_WORDS + 1) * _WIDTH, np.float32)


@_part
def _address(scratch, row):
    """Returns the address of a row of scratch memory, which a walk holds until it ends."""
    return scratch.ctypes.data + 4 * _WIDTH * row


@_part
def _own(scratch, row):
    return _float32(_address(scratch, row))


@_part
def _index(call, sample):
    """Returns the index of a sample's row in the table."""
    return _int32(call.rows)[sample * call.row_stride]


@_part
def _row(call, index):
    row = _floats(call.table, call.columns * index)
    return Row(row[0], row[2], row[4], row[5], row[6], row[0], row[2])


@_part
def _rounded_row(call, index):
    row = _floats(call.table, call.columns * index)
    return Row(row[0], row[2], row[4], row[5], row[6], row[7], row[8])


@_inlined
def _draw(call, chunk, number, stream, scratch):
    """Returns (z, lane): the chunk's counter noise is in z, from the index ``lane`` on."""
    sample, first, _, count = chunk
    seed, z = _int64(call.seeds)[sample], _own(scratch, _Z)
    words, pairs = _uint32(_address(scratch, _WORDS)), _own(scratch, _PAIRS)
    if call.channels < 2:
        return z, normals(seed, number, stream, first, count, words, pairs, z)
    pixels, plane = call.n // call.channels, _own(scratch, _PLANE)
    return z, _scattered(
        seed, number, stream, first, count, call.channels, pixels, words, pairs, plane, z
    )


@_inlined
def _visit_noise(call, chunk, scratch):
    z, lane = _draw(call, chunk, _index(call, chunk.sample), call.stream, scratch)
    _copy(chunk.count, z, lane, _floats(call.out, chunk.start))


_walk_noise = _walk(_visit_noise)


@_inlined
def _fill(address, thread):
    """Writes counter noise to the elements of ``out`` in this thread's tasks."""
    _walk_noise(address, thread, _call(address).n, CHUNK, _scratch())


# --- A step -----------------------------------------------------------------------------------


class Plan(NamedTuple):
    """The properties that all chunks of a call share.

    Attributes:
        counted: whether a chunk may draw counter noise.
        spread: whether a chunk of several small samples gets its weights and thresholds element by
            element: one pass for each sample would cost more than its few elements.
        plain: whether a chunk that draws no noise takes a ``_plain_step``.
    """

    counted: Any
    spread: Any
    plain: Any


@_part
def _on_rows(call):
    """Returns whether all rows are in the table; otherwise the outcome is REFUSED."""
    for sample in range(call.batch if call.row_stride else 1):
        row = _index(call, sample)
        if row < 0 or row >= call.steps:
            call.outcome = REFUSED
            return False
    return True


@_inlined
def _joined(call, counted):
    """Returns (n, spread): the elements of a sample in ``_walk``, and ``Plan.spread``.

    Adjacent samples that are on one row count as one sample.
    """
    alone = call.guidance_stride == 0 and call.threshold_stride == 0
    spread = not alone and call.n < CHUNK
    alike = call.row_stride == 0 and call.output_stride == call.n and not counted
    if alike and (alone or spread):
        return call.batch * call.n, spread
    return call.n, False


@_inlined
def _is_plain(call):
    kept = call.x0 != 0 or call.threshold != 0 or call.history != 0
    bounded = call.clips or call.rederive or call.posterior
    return not (kept or bounded or call.noise != 0)


@_inlined
def _read_output(call, chunk, address, into):
    """Returns a chunk of the model's output as float32."""
    start = chunk.sample * call.output_stride + chunk.first
    return _widen(address, call.dtype, start, chunk.count, into)


@_inlined
def _guided_output(call, chunk, plan, u, scratch):
    """Returns u + w·(c − u) of the unconditional and the conditional output."""
    w, output = _float32(call.guidance), _own(scratch, _GUIDED)
    conditional = call.output + call.batch * call.output_stride * (4 if call.dtype == 0 else 2)
    c = _read_output(call, chunk, conditional, _own(scratch, _COND))
    if plan.spread and call.guidance_stride != 0:
        each = _own(scratch, _EACH)
        _repeat(w, call.guidance_stride, call.n, chunk.start, chunk.count, each)
        _guide_each(chunk.count, u, c, each, output)
    else:
        _guide(chunk.count, u, c, w[chunk.sample * call.guidance_stride], output)
    return output


def _step_of(loops, native):
    """Returns ``step(call, chunk, given)``.

    A ``native`` state is float32. Another has 16 bits, and no guidance, counter noise or history.
    """
    predict_x0, predict_x0_and_eps, bound, bound_each, rederive, combine = loops
    row_of = _row if native else _rounded_row

    @_part
    def read(call, address, chunk, into):
        """Returns a chunk of x_t or of z as float32."""
        if native:
            return _floats(address, chunk.start)
        return _widen(address, call.dtype, chunk.start, chunk.count, into)

    @_part
    def place(call, address, chunk, own):
        """Returns where a term is computed: in its tensor, if that is float32 and not x itself."""
        if native and address != call.x:
            return _floats(address, chunk.start)
        return own

    @_inlined
    def predict(call, count, x, output, row, of_x, x0, eps):
        """Writes x0 and returns ε, or x_t in the place of ε.

        The loop that reads x_t and the output for x0 writes ε too, where the output is not ε.
        """
        if call.prediction == EPSILON or call.rederive or of_x:
            predict_x0(call.prediction, count, x, output, row, x0)
            return x if of_x else output
        predict_x0_and_eps(call.prediction, count, x, output, row, (x0, eps))
        return eps

    @_inlined
    def bound_x0(call, chunk, plan, x0, scratch):
        """Clamps x0 to ±clip; or clamps x0 to ±s and divides it by s."""
        if call.clips:
            _clamp(chunk.count, x0, np.float32(call.clip))
        s = _float32(call.threshold)
        if call.threshold and plan.spread and call.threshold_stride != 0:
            each = _own(scratch, _EACH)
            _repeat(s, call.threshold_stride, call.n, chunk.start, chunk.count, each)
            bound_each(chunk.count, x0, each)
        elif call.threshold:
            bound(chunk.count, x0, s[chunk.sample * call.threshold_stride])

    @_inlined
    def noise(call, chunk, drawn, scratch):
        """Returns (z, lane): the chunk's noise is in z, from the index ``lane`` on."""
        if native and drawn:
            number = _index(call, chunk.sample)
            if call.columns > _NUMBER:
                number = np.int32(_floats(call.table, call.columns * number)[_NUMBER])
            return _draw(call, chunk, number, _STEP_STREAM, scratch)
        z = _own(scratch, _Z)
        return (read(call, call.noise, chunk, z) if call.noise else z), 0

    @_part
    def store(call, chunk, x0, out):
        """Writes the terms that were not computed in their tensors."""
        if native:
            if call.x0 and call.history:
                _copy(chunk.count, x0, 0, _floats(call.x0, chunk.start))
            if call.out == call.x:
                _copy(chunk.count, out, 0, _floats(call.out, chunk.start))
        else:
            if call.x0:
                _narrow(call.x0, call.dtype, chunk.start, chunk.count, x0)
            _narrow(call.out, call.dtype, chunk.start, chunk.count, out)

    @_part
    def step(call, chunk, given):
        """Writes x_s, and x0 where it is kept: the equation's terms in the equation's order."""
        plan, scratch = given
        count, index = chunk.count, _index(call, chunk.sample)
        row = row_of(call, index)
        kappa = _floats(call.table, call.columns * index)[_KAPPA] if call.history else _ZERO
        drawn = plan.counted and row.c1 != 0
        out = place(call, call.out, chunk, _own(scratch, _OUT))

        x = read(call, call.x, chunk, _own(scratch, _X))
        output = _read_output(call, chunk, call.output, _own(scratch, _OUTPUT))
        if native and call.guidance:
            output = _guided_output(call, chunk, plan, output, scratch)
        if native and plan.plain and not drawn:
            _plain_step(call.prediction, count, x, output, row, out)
            store(call, chunk, out, out)
            return

        x0 = _own(scratch, _X0)
        if call.x0 and not call.history:  # x0 may lie where x0′ does, which is read later
            x0 = place(call, call.x0, chunk, x0)
        of_x = call.posterior or kappa != 0
        eps = predict(call, count, x, output, row, of_x, x0, _own(scratch, _EPS))
        bound_x0(call, chunk, plan, x0, scratch)
        if call.rederive and not of_x:
            eps = _own(scratch, _EPS)
            rederive(count, x, x0, row, eps)
        z, lane = noise(call, chunk, drawn, scratch)
        d = x0
        if native and kappa != 0:
            d = _own(scratch, _D)
            _extrapolate(count, x0, _floats(call.history, chunk.start), kappa, d)
        noisy = drawn or call.noise != 0
        combine(count, d, eps, z, lane, noisy, call.noise_first, row, out)
        store(call, chunk, x0, out)

    return step


def _steps_of(step, is_light, light_step):
    """Returns ``steps(address, thread)``, which takes the steps of a thread's tasks.

    A light step needs no scratch memory, which would cost a small step half its time.
    """
    walk, walk_lightly = _walk(step), _walk(light_step)

    @_inlined
    def steps(address, thread):
        """Writes x_s of the tasks, or the outcome REFUSED if a row is not in the table."""
        call = _call(address)
        if not _on_rows(call):
            return
        counted = call.seeds != 0 and (call.row_stride != 0 or _row(call, _index(call, 0)).c1 != 0)
        n, spread = _joined(call, counted)
        if is_light(call, counted):
            walk_lightly(address, thread, n, CHUNK if call.x0 else n, None)
        else:
            plan = Plan(counted, spread, _is_plain(call))
            walk(address, thread, n, CHUNK, (plan, _scratch()))

    return steps


# --- A step of float32 ------------------------------------------------------------------------


@_inlined
def _is_light(call, counted):
    """Returns whether every term is one of the caller's tensors, or none is kept.

    A step that writes x_s over x_t goes through scratch memory: see ``_scratch``.
    """
    made = call.guidance != 0 or call.dtype != 0 or call.noise != 0 or counted
    bounded = call.threshold != 0 or call.rederive or (call.clips and call.x0 == 0)
    bounded = bounded or call.posterior
    light = call.prediction == EPSILON or call.x0 == 0
    return light and not made and not bounded and call.history == 0 and call.out != call.x


@_inlined
def _light_step(call, chunk, given):
    count, row = chunk.count, _row(call, _index(call, chunk.sample))
    x, out = _floats(call.x, chunk.start), _floats(call.out, chunk.start)
    output = _floats(call.output, chunk.sample * call.output_stride + chunk.first)
    if call.x0:
        x0 = _floats(call.x0, chunk.start)
        _predict_x0(EPSILON, count, x, output, row, x0)
        if call.clips:
            _clamp(count, x0, np.float32(call.clip))
        _combine(count, x0, output, x0, 0, False, False, row, out)
    else:
        _plain_step(call.prediction, count, x, output, row, out)


_steps = _steps_of(_step_of(_float32_loops, True), _is_light, _light_step)


# --- A step of 16 bits, which rounds after each operation -------------------------------------


POSTERIOR = FLOW
"""The number of an epsilon model in whose sum x_t takes the place of ε: no light step has u."""


@_inlined
def _is_light_rounded(call, counted):
    """Returns whether the step has neither thresholds nor ε computed again."""
    light = call.x0 and not (call.noise and call.noise_first) and call.out != call.x
    light = light and not (call.threshold or call.rederive)
    return light and (
        call.prediction == EPSILON or (call.prediction != FLOW and not call.posterior)
    )


def _rounding_steps(rounded, value, bits):
    """Returns the ``_steps`` of bfloat16 or float16 tensors.

    ``value`` and ``bits`` turn a 16-bit number into float32 and back.
    """
    terms = _terms(rounded)
    x_s, x_s_noise_last = terms.x_s, terms.x_s_noise_last

    def of_all_terms(x0_of, eps_of):
        def run(count, x, output, row, into):
            bound, noisy, z, x0, out = into
            if noisy:
                for i in range(count):
                    x_t, e = value(x[i]), value(output[i])
                    x0_i, eps = _clamped(x0_of(x_t, e, row), bound), eps_of(x_t, e, row)
                    x0[i] = bits(x0_i)
                    out[i] = bits(x_s_noise_last(x0_i, eps, value(z[i]), row))
            else:
                for i in range(count):
                    x_t, e = value(x[i]), value(output[i])
                    x0_i, eps = _clamped(x0_of(x_t, e, row), bound), eps_of(x_t, e, row)
                    x0[i] = bits(x0_i)
                    out[i] = bits(x_s(x0_i, eps, row))

        return run

    x0_of_epsilon, _ = terms.of_models[EPSILON]
    take = _by_model(of_all_terms, (*terms.of_models[:POSTERIOR], (x0_of_epsilon, _the_state)))

    @_inlined
    def light_step(call, chunk, given):
        """Takes the step in one loop."""
        start, row = chunk.start, _rounded_row(call, _index(call, chunk.sample))
        model = POSTERIOR if call.posterior else call.prediction
        x, z = _halves(call.x, start), _halves(call.noise, start)
        output = _halves(call.output, chunk.sample * call.output_stride + chunk.first)
        x0, out = _halves(call.x0, start), _halves(call.out, start)
        bound = np.float32(call.clip) if call.clips else np.float32(np.inf)
        take(model, chunk.count, x, output, row, (bound, call.noise != 0, z, x0, out))

    return _steps_of(_step_of(_loops(terms), False), _is_light_rounded, light_step)


_bfloat16_steps = _rounding_steps(_to_bfloat16, _bfloat16_value, _bfloat16_bits)
_float16_steps = _rounding_steps(_to_float16, _extended, _narrowed)


# --- The compiled functions -------------------------------------------------------------------


@_part
def _entered(address):
    """Returns this thread's number and the address of its modes, and sets the caller's modes.

    PyTorch's threads keep the rounding mode and the flushing of denormals that were set when they
    were made. Here they have their caller's, or a result would depend on which thread took a task.
    """
    call = _call(address)
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
    call = _call(address)
    if call.outcome == UNDONE:  # not reached where memory ran out
        call.outcome = DONE
    if call.threads > 1:
        _call_with(call.fesetenv, own)
    return call.outcome


@_c_function
def take_part(address):
    """Takes one thread's part of the call at this address, all of it if the thread is alone."""
    thread, own = _entered(address)
    if _call(address).fills:
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
