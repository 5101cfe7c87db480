"""The example of a backend: it takes the steps of tensors on a CPU by NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastddim.step.backends import Backend, Fixed, Launch, StepArgs, numbers_of
from fastddim.step.layout import write_next
from fastddim.step.philox import STEP_STREAM, normals

Floats = npt.NDArray[Any]


def bind(fixed: Fixed, first: StepArgs) -> Launch:
    """See ``backends.Backend``. Nothing is compiled, so only the rank is fixed here."""
    each = (-1, *[1] * (first.x.dim() - 1))

    def launch(
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
        history: Tensor | None = None,
    ) -> None:
        batch = len(x)
        rows = np.broadcast_to(np.asarray(row), (batch,))
        if not 0 <= rows.min() <= rows.max() < len(table):
            raise ValueError(f"rows must lie in [0, {len(table)}), got {rows}")
        factors = [column.reshape(each) for column in array(table)[rows].T]
        z = None if noise is None else array(noise)
        if seeds is not None:
            # Noise belongs to the logical element, however x lies in memory.
            numbers = np.broadcast_to(np.asarray(numbers_of(table, row)), (batch,))
            z = normals(seeds.numpy(), numbers, x[0].numel(), STEP_STREAM).reshape(x.shape)
        e = array(output)
        if guidance is not None:
            u, c = e[:batch], e[batch:]
            e = u + array(guidance).reshape(each) * (c - u)
        bound = None if threshold is None else array(threshold).reshape(each)
        before = None if history is None else array(history)
        x_s, predicted = step(fixed, array(x), e, factors, z, bound, before)
        array(out)[...] = x_s
        if x0 is not None:
            array(x0)[...] = predicted
        if next_input is not None:
            write_next(next_input, out)

    return launch


def step(
    fixed: Fixed, x: Floats, output: Floats, factors: list[Floats], z: Any, bound: Any, before: Any
) -> tuple[Floats, Floats]:
    """Returns (x_s, x0) by the operations of ``reference.ddim_step``, in their order."""
    a_t, _, b_t, _, a_s, c1, c2, *kappa = factors
    eps, x0 = output, output
    if fixed.prediction == 0:
        x0 = (x - output * b_t) / a_t
    elif fixed.prediction == 1:
        x0, eps = a_t * x - b_t * output, a_t * output + b_t * x
    elif fixed.prediction == 3:
        x0, eps = x - output * b_t, x + a_t * output
    else:
        eps = (x - a_t * output) / b_t
    if fixed.clip is not None:
        x0 = np.clip(x0, np.float32(-fixed.clip), np.float32(fixed.clip))
    if bound is not None:
        x0 = np.clip(x0, -bound, bound) / bound
    if fixed.rederive:
        eps = (x - a_t * x0) / b_t
    if fixed.posterior:
        eps = x
    d = x0
    if before is not None:
        d = np.where(kappa[0] == 0, x0, x0 + kappa[0] * (x0 - before))
        eps = np.where(kappa[0] == 0, eps, x)
    terms = [c2 * eps] if z is None else [c1 * z, c2 * eps]
    return sum(terms if fixed.noise_first else terms[::-1], a_s * d), x0


def normal_(out: Tensor, seeds: Tensor, rows: Tensor, stream: int) -> None:
    """See ``backends.Backend``. The noise is that of ``fastddim.step.philox``."""
    if out.numel():
        flat = out.view(len(out), -1).numpy()
        normals(seeds.numpy(), rows.numpy(), flat.shape[1], stream, out=flat)


def array(tensor: Tensor) -> Floats:
    """Returns the tensor's memory, or a float32 copy of bfloat16, which NumPy does not have."""
    return tensor.detach().to(torch.float32).numpy()


BACKEND = Backend("numpy", bind, normal_)
