"""The time that a model takes, measured apart from the loop that calls the model."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastddim.loop.model import Model
from fastddim.loop.sampler import DDIM

MANY_CALLS = 20
"""The fewest model calls of a timed run before which ``warm_up`` calls the model."""


class Timed:
    """A model that measures the time of its calls.

    On an accelerator it waits for the device before and after each call, so that the time is the
    model's own. Work that otherwise overlaps with the model then counts in full: the share
    outside the model, as in ``summary``, is an upper bound.
    """

    def __init__(self, model: Model, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.start()

    def start(self) -> None:
        """Sets both times to zero."""
        self._inside = 0.0
        self._started = self._now()

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Any:
        before = self._now()
        output = self.model(x, t, **cond)
        self._inside += self._now() - before
        return output

    def seconds(self) -> tuple[float, float]:
        """Returns the seconds since ``start``: (all of them, those in the model)."""
        return self._now() - self._started, self._inside

    def summary(self, images: int) -> str:
        """Returns one line: the rate of ``images`` since ``start``, and the share of the time
        outside the model."""
        seconds, inside = self.seconds()
        return (
            f"{images} {'image' if images == 1 else 'images'} in {seconds:.1f} s: "
            f"{images / seconds:.2f} images/s, "
            f"{1 - inside / seconds:.1%} of the time outside the model"
        )

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


def warm_up(
    ddim: DDIM,
    model: Model,
    shape: Sequence[int],
    batch_size: int,
    device: torch.device,
    *,
    calls: int | None = None,
    **options: Any,
) -> None:
    """Takes the first steps of ``ddim`` and one that adds no noise, with at most one model call.

    The first steps are as many as its order: the second step of order 2 has a launch of its own.

    First calls compile; run them before timing. The model is not called if the timed run has
    fewer than ``MANY_CALLS`` ``calls``: one more would be a large part of the whole time.
    """
    outputs: list[Any] = []

    def called_once(x: Tensor, t: Tensor, **cond: Any) -> Any:
        if calls is not None and calls < MANY_CALLS:
            return torch.zeros_like(x)
        if not outputs:
            outputs.append(model(x, t, **cond))
        return outputs[0]

    last = replace(ddim, steps=None, spacing=[ddim.pairs[-1]], eta=0.0, order=1)
    for sampler in (ddim, last):
        sampler.sample(
            called_once,
            shape=(batch_size, *shape),
            seeds=[0] * batch_size,
            device=device,
            progress=functools.partial(_first, sampler.order),
            **options,
        )


def _first(count: int, steps: Iterable[Any]) -> Iterable[Any]:
    """Returns the first ``count`` steps."""
    return itertools.islice(steps, count)
