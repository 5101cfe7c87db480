"""A sample of the engine has the bits of ``DDIM.sample``, whatever its neighbours are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastddim import DDIM, Engine, Request
from tests.loops import column

SHAPE = (2, 3, 4)


def model(x: Tensor, t: Tensor) -> Tensor:
    """A model of ε that treats samples independently and bounds its output."""
    return 0.7 * x.clamp(-1.5, 1.5) + 1e-3 * column(t % 97, x)


MIX = (
    DDIM(5),
    DDIM(7, eta=1.0, spacing="quad"),
    DDIM(4, eta="hat", spacing="trailing"),
    DDIM(3, eta=0.5, order=2, spacing="mixed"),
    DDIM(11, order=2, spacing="logsnr"),
    DDIM(1, spacing="uniform"),
)


def alone(request: Request, slots: int) -> Tensor:
    """The request's sample by ``DDIM.sample``, in batches of ``slots``."""
    assert request.ddim is not None
    assert request.seed is not None
    size = (1, *SHAPE)
    return request.ddim.sample(model, shape=size, seeds=[request.seed], batch_size=slots)[0]


@pytest.mark.parametrize("slots", [1, 3, 8, 16])
def test_a_mix_of_samplers_has_the_bits_of_sample(slots: int) -> None:
    engine = Engine(model, SHAPE, slots)
    requests = [Request(seed, ddim=MIX[seed % len(MIX)]) for seed in range(25)]
    found = dict(engine.run(requests))
    assert sorted(found) == list(range(25))
    for i, request in enumerate(requests):
        assert torch.equal(found[i], alone(request, slots))
