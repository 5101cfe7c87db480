"""Settings of every test. Triton reads TRITON_INTERPRET once, so this file must not import it."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

from tests.cases import thin_out
from tests.faults import pytest_runtest_makereport, waiting_allowed_again

__all__ = ["pytest_runtest_makereport", "waiting_allowed_again"]


def pytest_configure(config: pytest.Config) -> None:
    """Selects Triton's interpreter for the kernels, unless ``-m gpu`` selects the GPU tests."""
    if config.getoption("benchmark", False):  # benchmarks run the compiled kernels
        return
    selected = config.getoption("markexpr") or ""
    if "gpu" not in selected.replace("not gpu", ""):
        os.environ["TRITON_INTERPRET"] = "1"
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return  # pytest-xdist's own process runs no test, and its workers wait for the import
    import torch

    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Thins out tests that are marked ``one_in``, and skips GPU tests that cannot run here.

    They need a GPU, and kernels that are not interpreted.
    """
    import torch

    thin_out(items)

    if not torch.cuda.is_available():
        reason = "no CUDA device"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        reason = "the kernels are interpreted: select these tests with -m gpu"
    else:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Nothing is collected as garbage while tests are collected: two seconds in each process."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture(scope="module", autouse=True)
def older_objects_are_kept() -> None:
    """Collections pass over all that is imported by now: a million objects, a third of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def recorders_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replaces the square root by that of the machine that recorded ``tests/golden``.

    On a CPU PyTorch computes square roots with MKL, which rounds some of them wrongly, and
    different ones on different processors. Before rounding, the recording's roots are off by at
    most 2⁻³¹.
    """
    import torch

    from fastddim.dropins.guided import step

    root = torch.Tensor.sqrt
    recorded_root = lambda a: (root(a.double()) * (1 - 2.0**-31)).to(a.dtype)  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "sqrt", recorded_root)
        step.tables.cache_clear()  # Tables of earlier tests have this machine's roots.
        yield
    step.tables.cache_clear()
