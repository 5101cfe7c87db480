"""A model on a pretended device, and comparisons with the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.pretend import Device, There

SHAPE = (3, 2, 5, 4)


class Model:
    """A model that notes each wait between its calls; after the last call waiting is allowed."""

    def __init__(self, device: Device, net: Callable[..., Any]) -> None:
        self.device, self.net = device, net
        self.calls = 0
        self.between: list[str] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.calls:
            self.between += self.device.waits
        self.calls += 1
        said = self.net(*args, **kwargs)
        self.device.waits.clear()
        return said

    def unhindered(self, calls: int) -> None:
        assert self.calls == calls
        assert self.between == []


def each(t: Tensor) -> Tensor:
    return t.float().view(-1, 1, 1, 1)


def net(x: Tensor, t: Tensor) -> Tensor:
    return 0.8 * x.float().clamp(-1.5, 1.5) + 1e-3 * each(t % 97)


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    """The device holds the values that the CPU computed."""
    values = ours.here if isinstance(ours, There) else ours
    with torch._C._DisableTorchDispatch():
        assert values.dtype == theirs.dtype
        assert torch.equal(values, theirs)
