"""The time that a model takes, measured beside the loop that calls it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastddim.loop.model import Model
from fastddim.loop.sampler import DDIM


class Timed:
    """A model that knows how long its calls took.

    On an accelerator it waits for the device around each call, so that the time is the model's
    own. What waits for nothing between two calls is then counted in full: the share that
    ``summary`` gives is an upper bound.
    """

    def __init__(self, model: Model, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.start()

    def start(self) -> None:
        """From here on time counts."""
        self._inside = 0.0
        self._started = self._now()

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Any:
        before = self._now()
        output = self.model(x, t, **cond)
        self._inside += self._now() - before
        return output

    def seconds(self) -> tuple[float, float]:
        """(in all, in the model) since ``start``."""
        return self._now() - self._started, self._inside

    def summary(self, images: int) -> str:
        """One line about ``images`` made since ``start``."""
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
    **options: Any,
) -> None:
    """Takes one step of ``ddim`` and one that adds no noise, with one call of the model.

    First calls compile; run them before timing.
    """
    outputs: list[Any] = []

    def asked_once(x: Tensor, t: Tensor, **cond: Any) -> Any:
        if not outputs:
            outputs.append(model(x, t, **cond))
        return outputs[0]

    last = DDIM(spacing=[0], schedule=ddim.schedule, prediction=ddim.prediction)
    for sampler in (ddim, last):
        sampler.sample(
            asked_once,
            shape=(batch_size, *shape),
            seeds=[0] * batch_size,
            device=device,
            progress=lambda steps: itertools.islice(steps, 1),
            **options,
        )
