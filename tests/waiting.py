"""PyTorch's sync debug mode, in which an operation that waits for the GPU is an error."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_forbidden = False


def forbid_waiting() -> None:
    """From now on what waits for the GPU is an error, to the end of the test at the latest.

    The test's fixture (``faults.waiting_allowed_again``) ends it even where the test has failed.
    """
    global _forbidden
    _forbidden = True
    _set("error")


def allow_waiting() -> None:
    global _forbidden
    if _forbidden:
        _set("default")
    _forbidden = False


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within, what waits for the GPU is an error."""
    torch.cuda.synchronize()
    forbid_waiting()
    try:
        yield
    finally:
        allow_waiting()


def _set(mode: str) -> None:
    with warnings.catch_warnings():
        # The first call warns that the mode is a prototype, and warnings are errors here.
        warnings.filterwarnings("ignore", ".*prototype", UserWarning)
        torch.cuda.set_sync_debug_mode(mode)
