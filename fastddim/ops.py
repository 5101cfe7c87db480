"""The step as a torch op: here, and nowhere else, a device picks its backend."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from fastddim import cpu, reference
from fastddim import noise as counter
from fastddim.check import finite, whole
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
    prediction: str = "epsilon",
    clip: float | None = None,
    noise_first: bool = True,
    want_x0: bool = True,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(x_s, x0) of one step t → s in one pass over memory, value-identical to eager PyTorch.

        x0  = (x_t − √(1−ᾱ_t)·ε) / √ᾱ_t
        x_s = √ᾱ_s·x0 + c1·z + c2·ε                    (Song et al. 2021, eq. 12)

    Args:
        x: x_t, float32 of shape (batch, ...). Never written.
        output: what the model returned, of x's shape: float32, bfloat16 or float16. The
            arithmetic is float32. Never written.
        table: the coefficients, float32 (steps, 7), from ``fastddim.make_table``.
        rows: the row each sample is on: an int, or int32 of shape () or (batch,) on x's device.
            On a GPU, rows out of range are not noticed: looking would wait for the device.
        seeds: int64 (batch,): counter noise, see ``fastddim.noise``. A row with c1 = 0 draws none.
        noise: or z itself, float32 of x's shape. With neither, no noise is added.
        prediction: what ``output`` is: ``"epsilon"``, ``"v"`` or ``"sample"`` (x0).
        clip: x0 is clamped to ±clip; ε is not derived from it again.
        noise_first: whether c1·z is added before c2·ε (the paper's code) or after it (diffusers).
        want_x0: whether x0 is returned; ``None`` stands in its place otherwise.
        out: where x_s goes, float32 of x's shape, not overlapping an argument; made if not given.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    _check_tensor("x", x, x, (_STATE,))
    if x.dim() == 0:
        raise ValueError("x must have shape (batch, ...), got ()")
    _check_tensor("output", output, x, OUTPUTS)
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
    if clip is not None and not finite("clip", clip) > 0:
        raise ValueError(f"clip must be > 0, got {clip:g}")
    if out is None:
        out = _like(x)
    else:
        _check_tensor("out", out, x, (_STATE,))
    x0 = _like(x) if want_x0 else None
    torch.ops.fastddim.ddim_step(
        x,
        output,
        table,
        rows.expand(x.shape[0]),
        seeds,
        noise,
        PREDICTIONS.index(prediction),
        noise_first,
        clip,
        out,
        x0,
    )
    return out, x0


def initial_noise(
    seeds: Tensor, shape: Sequence[int], device: torch.device | str | None = None
) -> Tensor:
    """x_T: the normals of stream 1, row 0; float32 of ``shape`` (batch, ...) for (batch,) seeds."""
    seeds = seeds.to(device)
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
    prediction: int,
    noise_first: bool,
    clip: float | None,
    out: Tensor,
    x0: Tensor | None,
) -> None:
    """Lays every tensor out as x is, then hands over to the device's backend."""
    kernels = _kernels(x.device.type)
    # A sample on a row of its own is taken as one stretch of memory.
    apart = len(x) < 2 or x.stride(0) * len(x) == x.numel()
    if (kernels and seeds is not None) or not _is_dense(x) or (rows.stride(0) and not apart):
        x = x.contiguous()
    output = _laid_out(output, x)
    noise = None if noise is None else _laid_out(noise, x)
    into = out if _same_layout(out, x) else _like(x)
    x0_into = x0 if x0 is None or _same_layout(x0, x) else _like(x)
    if kernels:
        kernels.ddim_step(
            x,
            output,
            table,
            rows,
            into,
            x0_into,
            seeds=seeds,
            noise=noise,
            prediction=prediction,
            noise_first=noise_first,
            clip=clip,
        )
    elif x.device.type == "cpu":
        cpu.ddim_step(
            x, output, table, rows, seeds, noise, prediction, noise_first, clip, into, x0_into
        )
    else:
        _reference_step(
            x, output, table, rows, seeds, noise, prediction, noise_first, clip, into, x0_into
        )
    if into is not out:
        out.copy_(into)
    if x0 is not None and x0_into is not None and x0_into is not x0:
        x0.copy_(x0_into)
    _written(out, x0)


def _reference_step(
    x: Tensor,
    output: Tensor,
    table: Tensor,
    rows: Tensor,
    seeds: Tensor | None,
    noise: Tensor | None,
    prediction: int,
    noise_first: bool,
    clip: float | None,
    out: Tensor,
    x0: Tensor | None,
) -> None:
    """Devices with neither Triton nor a path of their own."""
    if seeds is not None:
        noise = torch.empty(x.shape, dtype=_STATE, device=x.device)
        _normal_(noise, seeds, rows, counter.STEP)
    row = table[rows].view(-1, *[1] * (x.dim() - 1), len(COLUMNS))
    x_s, predicted = reference.ddim_step(
        x, output.float(), row, noise, PREDICTIONS[prediction], clip, noise_first
    )
    out.copy_(x_s)
    if x0 is not None:
        x0.copy_(predicted)


def _normal_(out: Tensor, seeds: Tensor, rows: Tensor, stream: int) -> None:
    kernels = _kernels(out.device.type)
    if kernels:
        kernels.normal_(out, seeds, rows, stream)
    elif out.device.type == "cpu":
        cpu.normal_(out, seeds, rows, stream)
    else:
        on_cpu = torch.empty(out.shape, dtype=_STATE)
        cpu.normal_(on_cpu, seeds.cpu(), rows.cpu(), stream)
        out.copy_(on_cpu)
    _written(out)


def _written(*tensors: Tensor | None) -> None:
    """Says so to autograd, which sees what PyTorch writes but not what Triton and numpy do."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


@functools.cache
def _kernels(device: str) -> ModuleType | None:
    """The Triton kernels where they run: imported at the first call, not with the package."""
    if device != "cuda":
        return None
    try:
        import fastddim_kernels
    except ImportError:
        return None
    return fastddim_kernels


_is_dense = torch.ops.aten.is_non_overlapping_and_dense.default
"""Whether the elements fill one stretch of memory, in any order of the dimensions."""


def _nothing(*_: object) -> None:
    """What the op does to fake tensors: its results are its arguments."""


_library = torch.library.Library("fastddim", "DEF")
_library.define(
    "ddim_step(Tensor x, Tensor output, Tensor table, Tensor rows, Tensor? seeds, Tensor? noise, "
    "int prediction, bool noise_first, float? clip, Tensor(a!) out, Tensor(b!)? x0) -> ()",
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


def _laid_out(tensor: Tensor, x: Tensor) -> Tensor:
    """``tensor`` with x's strides: a flat pass over two layouts would pair the wrong elements."""
    if _same_layout(tensor, x):
        return tensor
    return _like(x, tensor.dtype).copy_(tensor)


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.preserve_format)


def _same_layout(tensor: Tensor, x: Tensor) -> bool:
    """Whether the strides that matter, those of dimensions longer than one, are equal."""
    return tensor.stride() == x.stride() or all(
        a == b for a, b, n in zip(tensor.stride(), x.stride(), x.shape, strict=True) if n > 1
    )
