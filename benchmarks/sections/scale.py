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
SLOTS, SERVED = 32, (4, 64, 64)
"""The engine's slots, and the shape of a sample whose tick is timed."""
SERVED_IMAGE, SERVED_STEPS = (3, 32, 32), 8
"""Shape and steps of the engine's requests to a U-Net."""
CHOICES: tuple[tuple[str, int, int, int, int | None], ...] = (
    ("guidance philox bf16 clip next", 512, 2, 4, 64),
    ("guidance philox bf16 clip next", 512, 1, 4, None),
    ("epsilon philox bf16", 256, 1, 4, 64),
    ("v philox bf16 next", 256, 1, 4, 64),
    ("epsilon philox", 256, 1, 4, 64),
    ("learned philox clip rederive", 256, 1, 4, 64),
    ("epsilon odd philox", 128, 2, 4, 64),
    ("epsilon odd philox", 256, 1, 4, 64),
    ("epsilon philox rows x0", 256, 1, 4, 64),
    ("epsilon philox", 512, 1, 4, None),
    ("epsilon philox", 512, 1, 8, None),
    ("epsilon threshold", 512, 1, 4, None),
    ("epsilon threshold", 512, 1, 8, None),
    ("guidance philox threshold", 256, 2, 4, 64),
    ("epsilon last philox", 128, 1, 8, None),
    ("epsilon odd", 512, 1, 4, None),
    ("epsilon last philox odd", 32, 1, 1, 64),
    ("epsilon last philox odd", 128, 2, 4, 64),
    ("learned last rgb", 64, 1, 2, 64),
)
"""(variant, fours of a part, parts of a program, warps, most registers of a lane) that the tuning
tries, in order of promise. None leaves the registers to the launcher."""


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
