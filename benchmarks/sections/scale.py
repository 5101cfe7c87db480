"""The device and the sizes of the GPU measurements, which a rehearsal without a GPU replaces.

Sections read each value as ``scale.NAME`` when they measure.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.variants import VARIANTS

DEVICE = "cuda"
ELEMENTS = 64 * 3 * 256 * 256
LAUNCHES = 64
"""Launches in one timed CUDA graph."""
ROUNDS = 25
FOOTPRINT = 8
"""The sets of tensors that launches cycle through take this many times the L2 cache."""
SMALL = (4, 8, 8)
"""A sample so small that the call's Python takes longer than the step."""
STEPS = 50
"""Steps of the loops of the section "host", and of each graph captured by hand."""
NODES = ((1, 4, 64, 64), (4, 3, 32, 32))
"""Shapes whose steps are captured by hand."""
LOOPS = (((1, 16, 7), 10), ((64, 3, 32, 32), 50), ((1, 4, 64, 64), 50), ((64, 3, 256, 256), 20))
"""Shapes and steps of the loops without a model: robot actions, CIFAR-10, latents, large images."""
CHOICES = (
    *((256, parts, warps) for warps in (4, 8) for parts in (1, 2, 4, 8)),
    *((fours, parts, 4) for fours in (128, 512) for parts in (1, 4)),
)
"""(groups of four elements in a block, blocks of a program, warps) that the tuning tries."""


@dataclass(frozen=True)
class Sizes:
    """The sizes that the command line sets.

    Attributes:
        elements: least number of elements of a variant's state.
        rounds: rounds of the sections "variants" and "peers".
        variants: names of the variants to measure.
    """

    elements: int = ELEMENTS
    rounds: int = ROUNDS
    variants: tuple[str, ...] = tuple(VARIANTS)
