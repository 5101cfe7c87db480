"""PyTorch's sync debug mode, in which an operation that waits for the GPU raises."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_forbidden = False


def forbid_waiting() -> None:
    """Makes operations that wait for the GPU raise, to the end of the test at the latest.

    The fixture ``faults.waiting_allowed_again`` ends this mode even if the test fails.
    """
    global _forbidden
    _forbidden = True
    _set("error")


def allow_waiting() -> None:
    """Ends the effect of ``forbid_waiting``."""
    global _forbidden
    if _forbidden:
        _set("default")
    _forbidden = False


@contextmanager
def no_waiting() -> Iterator[None]:
    """Makes operations that wait for the GPU raise within the block."""
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
