"""A backend in NumPy for a CPU's tensors: the example of everything that a backend needs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastddim.step import philox as counter
from fastddim.step.backends import Backend, Fixed, Launch
from fastddim.step.layout import write_next

Floats = npt.NDArray[Any]


def bind(fixed: Fixed, x: Tensor, *first: Any) -> Launch:
    """Implements ``backends.Backend.bind``. NumPy compiles nothing; only the rank is fixed."""
    each = (-1, *[1] * (x.dim() - 1))

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
    ) -> None:
        batch = len(x)
        rows = np.broadcast_to(np.asarray(row), (batch,))
        if rows.min() < 0 or rows.max() >= len(table):
            span = f"{rows.min()} to {rows.max()}"
            raise ValueError(f"rows must lie in [0, {len(table)}), got {span}")
        factors = [column.reshape(each) for column in array(table)[rows].T]
        z = None if noise is None else array(noise)
        if seeds is not None:
            # Noise belongs to the logical element, whatever the strides of x.
            z = counter.normals(seeds.numpy(), rows, x[0].numel(), counter.STEP).reshape(x.shape)
        predicted_output = array(output)
        if guidance is not None:
            u, c = predicted_output[:batch], predicted_output[batch:]
            predicted_output = u + array(guidance).reshape(each) * (c - u)
        bound = None if threshold is None else array(threshold).reshape(each)
        x_s, predicted = step(fixed, array(x), predicted_output, factors, z, bound)
        array(out)[...] = x_s
        if x0 is not None:
            array(x0)[...] = predicted
        if next_input is not None:
            write_next(next_input, out)

    return launch


def step(
    fixed: Fixed, x: Floats, output: Floats, factors: list[Floats], z: Floats | None, bound: Any
) -> tuple[Floats, Floats]:
    """(x_s, x0) by the operations of ``reference.ddim_step``, in the same order."""
    a_t, _, b_t, _, a_s, c1, c2 = factors
    eps, x0 = output, output
    if fixed.prediction == 0:
        x0 = (x - output * b_t) / a_t
    elif fixed.prediction == 1:
        x0, eps = a_t * x - b_t * output, a_t * output + b_t * x
    else:
        eps = (x - a_t * output) / b_t
    if fixed.clip is not None:
        x0 = np.clip(x0, np.float32(-fixed.clip), np.float32(fixed.clip))
    if bound is not None:
        x0 = np.clip(x0, -bound, bound) / bound
    if fixed.rederive:
        eps = (x - a_t * x0) / b_t
    x_s = a_s * x0
    terms = [c2 * eps] if z is None else [c1 * z, c2 * eps]
    for term in terms if fixed.noise_first else terms[::-1]:
        x_s = x_s + term
    return x_s, x0


def normal_(out: Tensor, seeds: Tensor, rows: Tensor, stream: int) -> None:
    """Implements ``backends.Backend.normal_`` with ``fastddim.step.philox``."""
    if out.numel():
        flat = out.view(len(out), -1).numpy()
        counter.normals(seeds.numpy(), rows.numpy(), flat.shape[1], stream, out=flat)


def array(tensor: Tensor) -> Floats:
    """A float32 tensor's own memory, or a float32 copy of a half-precision tensor."""
    numbers: Floats = tensor.detach().to(torch.float32).numpy()
    return numbers


BACKEND = Backend("numpy", bind, normal_)
