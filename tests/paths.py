"""Selects the backend of a test's steps, as far as it is available."""

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
"""Backends of a CPU."""
ALL = ("triton", *CPU)
"""Those and Triton's interpreter, which also works on a CPU's memory."""


def has_numba() -> bool:
    """True if the backend "numba" is available, which needs the extra ``cpu``."""
    return "numba" in backends.available("cpu")


def here(*names: str) -> list[str]:
    """The backends among ``names`` that are available: numba needs the extra ``cpu``."""
    return [name for name in names if name != "numba" or has_numba()]


def use(name: str) -> AbstractContextManager[None]:
    """``fastddim.using``; skips the test where ``name`` is numba and numba is missing."""
    if not here(name):
        pytest.skip("this backend needs the cpu extra: numba")
    return backends.using(name)


@contextmanager
def instead(backend: backends.Backend) -> Iterator[None]:
    """Adds this backend to the table within the block, and takes the steps by it."""
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
    """Clears the caches of backends and launches."""
    backends._found.cache_clear()
    step_module._steps.clear()
    bound._steps.clear()


def normal_(out: Tensor, seeds: Tensor, rows: Tensor, stream: int) -> None:
    """Fills ``out`` with the counter noise of the backend in use; other tests check the noise.

    Triton's interpreter computes with NumPy, whose normals equal the PyTorch backend's.
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
    posterior: bool = False,
) -> None:
    """Takes one step by this backend, bound anew: no checks and no caches."""
    fixed = backends.Fixed(prediction, noise_first, clip, rederive, posterior)
    Bound(backend, fixed)(
        x, output, table, rows, seeds, noise, guidance, threshold, out, x0, next_input
    )


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
