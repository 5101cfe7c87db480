"""The tensors that timed launches cycle through, and the bytes that each launch moves."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.checks import Given
from benchmarks.sections import scale
from benchmarks.timing import Call
from benchmarks.variants import Variant, launch_arguments

CHUNK = 1 << 20
"""A copy's tensors are a multiple of this many bytes. On an H200 a copy of 76,079,248 bytes ran at
2690 GB/s and a copy of 75,497,472 bytes at 4080, so an odd size would be a poor yardstick."""


def moved_bytes(v: Variant) -> int:
    """Bytes read and written per element, counted in whole sectors of 32 bytes.

    The sectors of channels-last pixels hold the learned variance too, so it is read along with
    them.
    """
    between = v.dtype.itemsize if v.learned and v.channels_last else 0
    return v.bytes_per_element + between


def sets_of(set_bytes: int) -> int:
    """How many sets of ``set_bytes`` bytes keep a launch from finding its data in the L2."""
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, -(-scale.FOOTPRINT * l2 // set_bytes))


def copies(total: int, count: int) -> tuple[dict[str, Call], dict[str, int]]:
    """A copy and an addition, and the bytes that each moves: ``total``, in whole chunks."""
    streams = {"copy": 2, "add": 3}
    size = {name: -(-total // (n * CHUNK)) * CHUNK for name, n in streams.items()}

    def tensors(name: str) -> list[list[Tensor]]:
        """``count`` tensors for each stream of this call."""
        n = size[name] // 4
        return [
            [torch.randn(n, device=scale.DEVICE) for _ in range(count)]
            for _ in range(streams[name])
        ]

    a, b = tensors("copy")
    p, q, r = tensors("add")

    def copy(i: int) -> object:
        return b[i % count].copy_(a[i % count])

    def add(i: int) -> object:
        return torch.add(p[i % count], q[i % count], out=r[i % count])

    return {"copy": copy, "add": add}, {name: n * size[name] for name, n in streams.items()}


def launches_of(v: Variant, elements: int) -> tuple[list[Given], int]:
    """Sets of the launcher's arguments, and the bytes that a launch on one set moves."""
    n = v.shape[0] * v.shape[1] * v.shape[2]
    batch = -(-elements // n)
    total = moved_bytes(v) * batch * n
    return [launch_arguments(v, batch, scale.DEVICE, seed=i) for i in range(sets_of(total))], total
