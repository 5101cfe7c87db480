"""What every test shares. Nothing here imports Triton, which reads TRITON_INTERPRET but once."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

from tests.faults import pytest_runtest_makereport, waiting_allowed_again

__all__ = ["pytest_runtest_makereport", "waiting_allowed_again"]


def pytest_configure(config: pytest.Config) -> None:
    """The kernels run in Triton's interpreter, unless the GPU tests were asked for by name."""
    if config.getoption("benchmark", False):  # which run no test, and compiled kernels
        return
    asked = config.getoption("markexpr") or ""
    if "gpu" not in asked.replace("not gpu", ""):
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests are skipped where there is no GPU, and where the interpreter stands in for it."""
    import torch

    if not torch.cuda.is_available():
        reason = "no CUDA device"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        reason = "the kernels are interpreted here: ask for these tests with -m gpu"
    else:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """What was imported stays: ``gc.collect``, which many tests call, need not go through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def recorders_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The square root of the machine that recorded ``tests/golden``.

    PyTorch takes a CPU's square roots from MKL, which rounds some wrongly, and others on other
    processors. Those of the recording are off by 2⁻³¹ at most before they are rounded.
    """
    import torch

    from fastddim.dropins import guided

    root = torch.Tensor.sqrt
    recorded_root = lambda a: (root(a.double()) * (1 - 2.0**-31)).to(a.dtype)  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "sqrt", recorded_root)
        guided._tables.cache_clear()  # Tables of earlier tests have this machine's roots.
        yield
    guided._tables.cache_clear()
