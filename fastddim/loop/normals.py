"""Normals come from a seed for each sample, from a generator, or from the caller's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fastddim.step import philox as counter
from fastddim.step.op import initial_noise

Noises: TypeAlias = Sequence[Tensor] | Tensor


@dataclass(frozen=True, eq=False)
class Noise:
    """A source of normals. One of ``seeds``, ``generator`` and ``tensors`` is set, the others None.

    ``fastddim.loop.options.checked_noise`` makes it from a caller's arguments.
    """

    size: tuple[int, ...]
    device: torch.device
    seeds: Tensor | None = None
    generator: torch.Generator | None = None
    tensors: Sequence[Tensor] | None = None

    def part(self, samples: Tensor) -> Noise:
        """Returns the source for some of the samples. A generator's stream cannot be divided."""
        tensors = None if self.tensors is None else [z[samples] for z in self.tensors]
        seeds = None if self.seeds is None else self.seeds[samples]
        return Noise((len(samples), *self.size[1:]), self.device, seeds, None, tensors)

    def initial(self) -> Tensor:
        """Returns x_T: stream 1 of the seeds, or the generator's next normals."""
        if self.tensors is not None:
            raise ValueError("x_T must be given with noise, which holds the steps' z only")
        if self.seeds is not None:
            return initial_noise(self.seeds, self.size)
        return self._drawn()

    def step(self, row: int, into: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Returns (seeds, z) for a step that adds noise: one is a tensor, the other None.

        A generator writes z into ``into``, unless ``into`` is None.
        """
        if self.tensors is not None:
            return None, self.tensors[row]
        if self.generator is not None:
            return None, self._drawn(into)
        return self.seeds, None

    def forward(self, rows: Tensor) -> Tensor:
        """Returns the noise for a known image: stream 2 of the seeds, or the generator's next."""
        if self.seeds is None:
            return self._drawn()
        z = torch.empty(self.size, dtype=torch.float32, device=self.device)
        torch.ops.fastddim.normal_(z, self.seeds, rows, counter.FORWARD_STREAM)
        return z

    def _drawn(self, into: Tensor | None = None) -> Tensor:
        if into is not None:
            # torch.randn would draw the same normals into fresh memory, which costs page faults.
            return into.normal_(generator=self.generator)
        return torch.randn(
            self.size, generator=self.generator, device=self.device, dtype=torch.float32
        )


def drawn_seeds(batch: int) -> Tensor:
    """Returns a seed for each sample, from the CPU's generator whatever the default device is."""
    return torch.randint(0, 2**63 - 1, (batch,), device="cpu")
