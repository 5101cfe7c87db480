"""The step as a torch op: here, and nowhere else, a device picks its backend."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastddim import cpu, reference
from fastddim import noise as counter
from fastddim.check import SamplingWarning, finite, whole
from fastddim.coefficients import COLUMNS, PREDICTIONS

_STATE = torch.float32
OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)


def ddim_step(
    x: Tensor,
    output: Tensor,
    table: Tensor,
    rows: Tensor | int,
    seeds: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    guidance: Tensor | float | None = None,
    prediction: str = "epsilon",
    clip: float | None = None,
    threshold: Tensor | None = None,
    rederive: bool = False,
    noise_first: bool = True,
    want_x0: bool = True,
    out: Tensor | None = None,
    x0_out: Tensor | None = None,
    next_input: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(x_s, x0) of one step t → s in one pass over memory, value-identical to eager PyTorch.

        x0  = (x_t − √(1−ᾱ_t)·ε) / √ᾱ_t
        x_s = √ᾱ_s·x0 + c1·z + c2·ε                    (Song et al. 2021, eq. 12)

    Args:
        x: x_t, float32 of shape (batch, ...). Never written.
        output: what the model returned, of x's shape: float32, bfloat16 or float16. The
            arithmetic is float32. With twice x's channels (dimension 1 of three or more) the
            first half counts: a learned variance follows. Never written.
        table: the coefficients, float32 (steps, 7), from ``fastddim.make_table``.
        rows: the row each sample is on: an int, or int32 of shape () or (batch,) on x's device.
            On a GPU, rows out of range are not noticed: looking would wait for the device.
        seeds: int64 (batch,): counter noise, see ``fastddim.noise``. A row with c1 = 0 adds none.
        noise: or z itself, float32 of x's shape. With neither, no noise is added.
        guidance: w of classifier-free guidance (Ho and Salimans 2022), a number or float32 of
            shape () or (batch,). ``output`` is then (2·batch, ...), first without the condition
            and then with it, and u + w·(c − u) stands in its place.
        prediction: what ``output`` is: ``"epsilon"``, ``"v"`` or ``"sample"`` (x0).
        clip: x0 is clamped to ±clip; ε is not derived from it again.
        threshold: or to ±s and divided by s, float32 > 0 of shape () or (batch,): dynamic
            thresholding (Saharia et al. 2022, section 2.3), s being their max(quantile, 1).
        rederive: ε follows from the x0 that was clamped, ε = (x − √ᾱ_t·x0)/√(1−ᾱ_t).
        noise_first: whether c1·z is added before c2·ε (the paper's code) or after it (diffusers).
        want_x0: whether x0 is returned; ``None`` stands in its place otherwise.
        out: where x_s goes, float32 of x's shape, not overlapping an argument; made if not given.
        x0_out: where x0 goes, likewise.
        next_input: where x_s goes as well, in this tensor's dtype (float32, bfloat16 or
            float16): of x's shape, or of twice its batch and then stacked, as guidance wants it.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    if not torch.compiler.is_compiling() and transformed():
        given = {"x": x, "output": output, "table": table, "rows": rows, "seeds": seeds}
        _check_constants(
            **given, noise=noise, guidance=guidance, threshold=threshold, out=out, x0_out=x0_out
        )
    _check_tensor("x", x, x, (_STATE,))
    if x.dim() == 0:
        raise ValueError("x must have shape (batch, ...), got ()")
    if guidance is not None and not isinstance(guidance, Tensor):
        w = finite("guidance", guidance)
        guidance = torch.full((), w, dtype=_STATE, device=x.device)
    batch = x.shape[0]
    expected = x.shape if guidance is None else (2 * batch, *x.shape[1:])
    if isinstance(output, Tensor) and _with_variance(output, x):
        expected = (expected[0], 2 * expected[1], *expected[2:])
    _check_tensor("output", output, x, OUTPUTS, expected)
    _check_tensor("table", table, x, (_STATE,), (-1, len(COLUMNS)))
    if isinstance(rows, Tensor):
        _check_tensor("rows", rows, x, (torch.int32,), x.shape[:1] if rows.dim() else ())
    else:
        row = whole("rows", rows, low=0, high=len(table) - 1)
        rows = torch.full((), row, dtype=torch.int32, device=x.device)
    if seeds is not None:
        if noise is not None:
            raise ValueError("noise comes from seeds or from a tensor, got both")
        _check_tensor("seeds", seeds, x, (torch.int64,), x.shape[:1])
    if noise is not None:
        _check_tensor("noise", noise, x, (_STATE,))
    if guidance is not None:
        _check_tensor("guidance", guidance, x, (_STATE,), x.shape[:1] if guidance.dim() else ())
        guidance = _by_sample(guidance, batch)
    if clip is not None and not finite("clip", clip) > 0:
        raise ValueError(f"clip must be > 0, got {clip:g}")
    if threshold is not None:
        if clip is not None:
            raise ValueError(f"clip must be left out where there is a threshold, got {clip:g}")
        shape = x.shape[:1] if isinstance(threshold, Tensor) and threshold.dim() else ()
        _check_tensor("threshold", threshold, x, (_STATE,), shape)
        threshold = _by_sample(threshold, batch)
    out = _given_or_made("out", out, x)
    if next_input is not None:
        copies = 2 if isinstance(next_input, Tensor) and next_input.shape[:1] != x.shape[:1] else 1
        _check_tensor("next_input", next_input, x, OUTPUTS, (copies * batch, *x.shape[1:]))
    x0 = _given_or_made("x0_out", x0_out, x) if want_x0 or x0_out is not None else None
    STEP(
        x,
        output,
        table,
        _by_sample(rows, batch),
        seeds,
        noise,
        guidance,
        threshold,
        PREDICTIONS.index(prediction),
        noise_first,
        clip,
        rederive,
        out,
        x0,
        next_input,
    )
    return out, x0


def transformed() -> bool:
    """Whether this call is differentiated forwards or transformed by ``torch.func``.

    The op has no rule for either: its results would be constants, and memory that is kept for a
    later step would belong to the transform. torch.compile cannot trace the question, and has no
    need to: it traces the op as it is.
    """
    return _interpreter() is not None or forward_ad._current_level >= 0


def check_untransformed(name: str) -> None:
    """For what carries no derivatives at all: ``name`` is called outside of any transform."""
    if not torch.compiler.is_compiling() and transformed():
        raise ValueError(
            f"{name} must not run inside torch.func's transforms or forward-mode differentiation: "
            f"it carries no derivatives"
        )


_functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009 its types do not name it
_interpreter: Callable[[], Any] = _functorch.peek_interpreter_stack


def initial_noise(
    seeds: Tensor,
    shape: Sequence[int],
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x_T: the normals of stream 1, row 0; float32 of ``shape`` (batch, ...) for (batch,) seeds."""
    seeds = seeds.to(device)
    if out is None:
        out = torch.empty(tuple(shape), dtype=_STATE, device=seeds.device)
    rows = torch.zeros((), dtype=torch.int32, device=seeds.device).expand(len(seeds))
    torch.ops.fastddim.normal_(out, seeds, rows, counter.INITIAL)
    return out


def _ddim_step(
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
    next_input: Tensor | None,
) -> None:
    """Lays every tensor out as x is, then hands over to the device's backend."""
    if _with_variance(output, x):
        output = output[:, : x.shape[1]]
    kernels = _kernels("cpu" if x.is_cpu else x.device.type)
    into, x0_into, next_into = out, x0, next_input
    as_is = (
        x.numel()  # of nothing every stride is contiguous, and some differ
        and x.is_contiguous()
        and output.is_contiguous()
        and out.is_contiguous()
        and (noise is None or noise.is_contiguous())
        and (x0 is None or x0.is_contiguous())
        and (next_input is None or next_input.is_contiguous())
    )
    if not as_is:
        stacked = next_input is not None and len(next_input) > len(x)
        by_sample = guidance is not None or threshold is not None or rows.stride(0) != 0
        # What belongs to a sample needs each in one stretch of memory.
        apart = len(x) < 2 or x.stride(0) * len(x) == x.numel()
        orderly = not kernels or seeds is None or x.is_contiguous() or _is_channels_last(x)
        if not _is_dense(x) or not orderly or ((by_sample or stacked) and not apart):
            x = x.contiguous()
        output = _readable(output, x, kernels)
        noise = None if noise is None else _laid_out(noise, x)
        into = out if _same_layout(out, x) else _like(x)
        x0_into = x0 if x0 is None or _same_layout(x0, x) else _like(x)
        if next_input is not None and not _writable(next_input, x):
            next_into = _with_batch(len(next_input), x, next_input.dtype)
    if kernels:
        kernels.ddim_step(
            x,
            output,
            table,
            rows,
            into,
            x0_into,
            next_into,
            seeds=None if seeds is None else seeds.contiguous(),
            noise=noise,
            guidance=guidance,
            threshold=threshold,
            prediction=prediction,
            noise_first=noise_first,
            clip=clip,
            rederive=rederive,
        )
    else:
        step = cpu.ddim_step if x.is_cpu else _reference_step
        step(
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
            into,
            x0_into,
        )
        if next_into is not None and next_into.shape[0] == x.shape[0]:
            next_into.copy_(into)
        elif next_into is not None:
            for half in next_into.chunk(len(next_into) // max(len(x), 1) or 1):
                half.copy_(into)
    if not as_is:
        for given, written in ((out, into), (x0, x0_into), (next_input, next_into)):
            if written is not given and given is not None and written is not None:
                given.copy_(written)
    _written(out, x0, next_input)


def _reference_step(
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
    """Devices with neither Triton nor a path of their own."""
    if seeds is not None:
        noise = torch.empty(x.shape, dtype=_STATE, device=x.device)
        _normal_(noise, seeds, rows, counter.STEP)
    each = (-1, *[1] * (x.dim() - 1))
    x_s, predicted = reference.ddim_step(
        x,
        output.float(),
        table[rows].view(*each, len(COLUMNS)),
        noise,
        PREDICTIONS[prediction],
        clip,
        noise_first,
        None if guidance is None else guidance.reshape(each),
        None if threshold is None else threshold.reshape(each),
        rederive,
    )
    out.copy_(x_s)
    if x0 is not None:
        x0.copy_(predicted)


def _normal_(out: Tensor, seeds: Tensor, rows: Tensor, stream: int) -> None:
    kernels = _kernels(out.device.type)
    if kernels:
        kernels.normal_(out, seeds.contiguous(), rows, stream)
    elif out.device.type == "cpu":
        cpu.normal_(out, seeds, rows, stream)
    else:
        on_cpu = torch.empty(out.shape, dtype=_STATE, device="cpu")
        cpu.normal_(on_cpu, seeds.cpu(), rows.cpu(), stream)
        out.copy_(on_cpu)
    _written(out)


def _written(*tensors: Tensor | None) -> None:
    """Says so to autograd, which sees what PyTorch writes but not what Triton and numpy do."""
    torch.autograd.graph.increment_version(
        [tensor for tensor in tensors if tensor is not None and not tensor.is_inference()]
    )


@functools.cache
def _kernels(device: str) -> ModuleType | None:
    """The Triton kernels where they run: imported at the first call, not with the package."""
    if device != "cuda":
        return None
    try:
        import triton

        import fastddim_kernels
    except ImportError:
        return None
    _warn_where_steps_are_rounded_otherwise(triton.__version__)
    return fastddim_kernels


def _warn_where_steps_are_rounded_otherwise(triton: str) -> None:
    """Of Blackwell GPUs under Triton 3.6: ptxas 12.9 fuses packed multiplies and adds there."""
    old = tuple(int(part) for part in triton.split(".")[:2]) < (3, 7)
    if old and any(
        torch.cuda.get_device_capability(i)[0] >= 10 for i in range(torch.cuda.device_count())
    ):
        warnings.warn(
            f"Triton {triton} fuses multiplies and adds on a Blackwell GPU, so that steps may "
            f"differ from eager PyTorch in the last bit: Triton 3.7 or later does not",
            SamplingWarning,
            stacklevel=2,
        )


def backend(device: torch.device | str) -> str:
    """What takes the steps on a device of this kind here: ``"triton"``, ``"numba"`` or ``"torch"``.

    The step decides by the same answer, so what a record says of it is what has run.
    """
    kind = torch.device(device).type
    if _kernels(kind):
        return "triton"
    return cpu.backend() if kind == "cpu" else "torch"


_is_dense = torch.ops.aten.is_non_overlapping_and_dense.default
"""Whether the elements fill one stretch of memory, in any order of the dimensions."""


def _nothing(*_: object) -> None:
    """What the op does to fake tensors: its results are its arguments."""


_library = torch.library.Library("fastddim", "DEF")
_library.define(
    "ddim_step(Tensor x, Tensor output, Tensor table, Tensor rows, Tensor? seeds, Tensor? noise, "
    "Tensor? guidance, Tensor? threshold, int prediction, bool noise_first, float? clip, "
    "bool rederive, Tensor(a!) out, Tensor(b!)? x0, Tensor(c!)? next_input) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "normal_(Tensor(a!) out, Tensor seeds, Tensor rows, int stream) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _key in ("CPU", "CUDA", "MPS", "XPU", "PrivateUse1"):
    _library.impl("ddim_step", _ddim_step, _key)
    _library.impl("normal_", _normal_, _key)
torch.library.register_fake("fastddim::ddim_step", _nothing, lib=_library)
STEP = torch.ops.fastddim.ddim_step.default
"""The op itself, which looks at no argument: for those who have, and whose step takes 100 µs."""
torch.library.register_fake("fastddim::normal_", _nothing, lib=_library)


def _check_tensor(
    name: str,
    tensor: Tensor,
    x: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: Sequence[int] | None = None,
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    shape = x.shape if shape is None else shape
    here = tensor.shape == shape and tensor.dtype in dtypes and tensor.device == x.device
    if here and not tensor.requires_grad:
        return  # all is well, as nearly always: the step pays for these four questions alone
    if len(tensor.shape) != len(shape) or any(
        want not in (-1, got) for want, got in zip(shape, tensor.shape, strict=True)
    ):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be {allowed}, got {str(tensor.dtype)[6:]}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x.device} with x, got {tensor.device}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, which the step does not carry: detach it or use torch.no_grad()"
        )


def _check_constants(**given: object) -> None:
    """That none of the tensors carries a forward derivative or is one of ``torch.func``'s."""
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            continue
        wrapped = _functorch.is_functorch_wrapped_tensor(tensor)
        if wrapped or forward_ad.unpack_dual(tensor).tangent is not None:
            raise ValueError(
                f"{name} is transformed by torch.func or carries a forward derivative, which the "
                f"step does not: take it out of the transform"
            )


def _given_or_made(name: str, tensor: Tensor | None, x: Tensor) -> Tensor:
    if tensor is None:
        return _like(x)
    _check_tensor(name, tensor, x, (_STATE,))
    return tensor


def _by_sample(tensor: Tensor, batch: int) -> Tensor:
    # Even a view is a call of torch's dispatcher, and the loop has one for all of its step.
    return tensor if tensor.dim() else tensor.expand(batch)


def _with_variance(output: Tensor, x: Tensor) -> bool:
    """Whether there are twice x's channels: a learned variance follows."""
    if output.numel() == x.numel() != 0:
        return False  # as nearly always
    return output.dim() == x.dim() > 2 and output.shape[1] == 2 * x.shape[1]


def _laid_out(tensor: Tensor, x: Tensor) -> Tensor:
    """``tensor`` with x's strides: a flat pass over two layouts would pair the wrong elements."""
    if _same_layout(tensor, x):
        return tensor
    return _like(x, tensor.dtype).copy_(tensor)


def _readable(output: Tensor, x: Tensor, kernels: ModuleType | None) -> Tensor:
    """The model's output as the backend reads it: samples laid out as x's, however far apart."""
    if len(output) == len(x) and _same_layout(output, x):
        return output
    if len(x) < 2 or x.stride(0) * len(x) == x.numel():
        if _same_layout(output[:1], x[:1]):
            return output
        if kernels and kernels.pixel_spacing(x) and kernels.pixel_spacing(output) is not None:
            return output
    return _with_batch(len(output), x, output.dtype).copy_(output)


def _writable(next_input: Tensor, x: Tensor) -> bool:
    """Whether the kernel may write the next model input where it is to go."""
    if len(next_input) == len(x):
        return _same_layout(next_input, x)
    return _same_layout(next_input[:1], x[:1]) and _is_dense(next_input)


def _with_batch(batch: int, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A new tensor of ``batch`` samples, each laid out as x's."""
    if batch == len(x):
        return _like(x, dtype)
    strides = (x.numel() // max(len(x), 1), *x.stride()[1:])
    return torch.empty_strided((batch, *x.shape[1:]), strides, dtype=dtype, device=x.device)


def input_like(x: Tensor, dtype: torch.dtype, copies: int) -> Tensor:
    """Memory for a model input: ``copies`` times the batch, each sample laid out as x's."""
    if not _is_dense(x) or x.stride(0) * len(x) != x.numel():
        return torch.empty((copies * len(x), *x.shape[1:]), dtype=dtype, device=x.device)
    return _with_batch(copies * len(x), x, dtype)


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() > 2 and x.movedim(1, -1).is_contiguous()


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.preserve_format)


def _same_layout(tensor: Tensor, x: Tensor) -> bool:
    """Whether the strides that matter, those of dimensions longer than one, are equal."""
    return tensor.stride() == x.stride() or all(
        a == b for a, b, n in zip(tensor.stride(), x.stride(), x.shape, strict=True) if n > 1
    )
