"""The backends that a test takes its steps by, each where it can be had."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastddim.step import backends, bound
from fastddim.step import checked as step_module
from fastddim.step.bound import Bound

CPU = ("torch", "numba")
"""A CPU's own."""
ALL = ("triton", *CPU)
"""And Triton's interpreter, which reads a CPU's memory too."""


def has_numba() -> bool:
    return "numba" in backends.available("cpu")


def here(*names: str) -> list[str]:
    """Those of the backends ``names`` that can take a CPU's steps, numba being an extra."""
    return [name for name in names if name != "numba" or has_numba()]


def use(name: str) -> AbstractContextManager[None]:
    """``fastddim.using``; the test is skipped where numba is asked for and missing."""
    if not here(name):
        pytest.skip("this backend needs the cpu extra: numba")
    return backends.using(name)


@contextmanager
def instead(backend: backends.Backend) -> Iterator[None]:
    """Within, the table has this backend too, and it takes the steps."""
    module = f"stand-in for {backend.name}"
    forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module, SimpleNamespace(BACKEND=backend))
        patch.setitem(backends.TABLE, backend.name, backends.Entry(("cpu",), module))
        try:
            with backends.using(backend.name):
                yield
        finally:
            forget()


def forget() -> None:
    """Nothing that was decided before is kept: neither a backend nor a launch."""
    backends._found.cache_clear()
    step_module._steps.clear()
    bound._steps.clear()


def normal_(out: Tensor, seeds: Tensor, rows: Tensor, stream: int) -> None:
    """The counter noise of the CPU's backend in use, which has tests of its own.

    The interpreter computes with NumPy, whose normals are the PyTorch backend's.
    """
    name = backends.backend("cpu").name
    backends.backend("cpu", "torch" if name == "triton" else name).normal_(out, seeds, rows, stream)


def step(
    backend: backends.Backend,
    x: Tensor,
    output: Tensor,
    table: Tensor,
    rows: int | Tensor,
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
    next_input: Tensor | None = None,
) -> None:
    """One step by this backend, bound anew, with nothing checked and nothing remembered."""
    fixed = backends.Fixed(prediction, noise_first, clip, rederive)
    Bound(backend, fixed)(
        x, output, table, rows, seeds, noise, guidance, threshold, out, x0, next_input
    )


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
