"""What the engine's tests share: models that treat samples independently, and samplers to mix."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastddim import DDIM, NoiseSchedule, Request
from tests.loops import column

SHAPE = (2, 3, 4)
LINEAR = NoiseSchedule.linear()
_AT = LINEAR.at(range(len(LINEAR)))
_ALPHA, _SIGMA = (torch.tensor(level, dtype=torch.float32) for level in (_AT.alpha, _AT.sigma))


def exact(x: Tensor, t: Tensor) -> Tensor:
    """The exact ε of data from N(0.3, 0.25): σ·(x − 0.3·α)/(0.25·α² + σ²)."""
    a, s = (column(level[t], x) for level in (_ALPHA, _SIGMA))
    return s * (x - 0.3 * a) / (0.25 * a * a + s * s)


def named(x: Tensor, t: Tensor, c: Tensor, y: Tensor) -> Tensor:
    """A model with a condition of x's shape and a label."""
    shift = 0.2 * c.to(x.dtype) + 0.05 * column(y, x)
    return 0.7 * x.clamp(-1.5, 1.5) + 1e-3 * column(t % 97, x) + shift


MIX = (
    DDIM(5),
    DDIM(7, eta=1.0, spacing="quad"),
    DDIM(4, eta="hat", spacing="trailing"),
    DDIM(3, eta=0.5, order=2, spacing="mixed"),
    DDIM(8, order=2, spacing="logsnr"),
    DDIM(1),
    DDIM(6, eta=0.3, schedule=NoiseSchedule.cosine(), temperature=0.9),
)


def alone(model: Any, request: Request, slots: int, **rest: Any) -> Tensor:
    """The request's sample by ``DDIM``'s own loop, in a full batch of ``slots``."""
    ddim = DDIM() if request.ddim is None else request.ddim

    def full(tensors: Any) -> Any:
        if tensors is None:
            return None
        return {key: value.expand(slots, *value.shape) for key, value in tensors.items()}

    options = {"cond": full(request.cond), **rest}
    if request.uncond is not None:
        options |= {"uncond": full(request.uncond), "guidance": request.guidance}
    x_T = request.x_T
    if x_T is not None:
        x_T = x_T.expand(slots, *x_T.shape).contiguous()
    if request.reverse:
        assert x_T is not None
        data: Tensor = ddim.invert(model, x_T, until=request.until, **options)
        return data[0]
    if request.seed is not None:
        options["seeds"] = [request.seed] * slots
    if x_T is None:
        options["shape"] = (slots, *SHAPE)
    samples: Tensor = ddim.sample(model, x_T, start=request.start, **options)
    return samples[0]


@functools.cache
def expected(number: int, seed: int, slots: int) -> Tensor:
    """The sample of ``MIX[number]`` and ``seed`` of the exact model."""
    return alone(exact, Request(seed, ddim=MIX[number]), slots)
