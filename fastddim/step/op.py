"""The step and its noise are torch ops for torch.compile, fake tensors and dispatch modes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastddim.step import philox
from fastddim.step.backends import Fixed, backend
from fastddim.step.bound import step_of


def initial_noise(
    seeds: Tensor,
    shape: Sequence[int],
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Returns x_T, float32 of ``shape`` (batch, ...): stream 1, row 0 of the (batch,) seeds."""
    seeds = seeds.to(device)
    if out is None:
        out = torch.empty(tuple(shape), dtype=torch.float32, device=seeds.device)
    rows = torch.zeros((), dtype=torch.int32, device=seeds.device).expand(len(seeds))
    torch.ops.fastddim.normal_(out, seeds, rows, philox.INITIAL_STREAM)
    return out


def _ddim_step(
    x: Tensor,
    output: Tensor,
    table: Tensor,
    rows: Tensor | None,
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
    row: int | None = None,
    history: Tensor | None = None,
    posterior: bool = False,
    rounding: torch.dtype | None = None,
) -> None:
    """Takes the step. All samples are on ``row`` where ``rows`` is None."""
    on = rows if row is None else row
    assert on is not None
    fixed = Fixed(prediction, noise_first, clip, rederive, posterior, rounding)
    inputs = x, output, table, on, seeds, noise, guidance, threshold
    arguments = *inputs, out, x0, next_input, history
    step = step_of(backend("cpu" if x.is_cpu else x.device), fixed, x.device)
    step.launch(*arguments, seen=False)(*arguments)
    written(out, x0, next_input)


def _normal_(out: Tensor, seeds: Tensor, rows: Tensor, stream: int) -> None:
    backend(out.device).normal_(out, seeds.contiguous(), rows, stream)
    written(out)


def written(*tensors: Tensor | None) -> None:
    """Has autograd count these writes: it sees PyTorch's, but not Triton's, numba's and NumPy's."""
    torch.autograd.graph.increment_version(
        [tensor for tensor in tensors if tensor is not None and not tensor.is_inference()]
    )


def _nothing(*_: object) -> None:
    """Fake implementation: nothing to do, since the ops only write to their arguments."""


_library = torch.library.Library("fastddim", "DEF")
_library.define(
    "ddim_step(Tensor x, Tensor output, Tensor table, Tensor? rows, Tensor? seeds, Tensor? noise, "
    "Tensor? guidance, Tensor? threshold, int prediction, bool noise_first, float? clip, "
    "bool rederive, Tensor(a!) out, Tensor(b!)? x0, Tensor(c!)? next_input, "
    "SymInt? row=None, Tensor? history=None, bool posterior=False, "
    "ScalarType? rounding=None) -> ()",
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

OP = torch.ops.fastddim.ddim_step.default
"""The op without checks, for callers that have checked."""
