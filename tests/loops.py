"""The loop in plain PyTorch with every option: the expected result of the sampler's tests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastddim import DDIM
from fastddim.step import reference


def column(t: Tensor, x: Tensor) -> Tensor:
    """t (batch,) in x's dtype, shaped to broadcast against x."""
    return t.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def drawn(*shape: int, seed: int = 1) -> Tensor:
    """Normals from a generator with this seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def counter_noise(ddim: DDIM, seeds: list[int], shape: tuple[int, ...]) -> list[Tensor | None]:
    """z of each row, or None, as the CPU draws it; other tests check the draws."""
    from fastddim.step.philox import STEP_STREAM

    def z(row: int) -> Tensor:
        out = torch.full(shape, float("nan"))
        rows = torch.full(shape[:1], row, dtype=torch.int32)
        torch.ops.fastddim.normal_(out, torch.tensor(seeds), rows, STEP_STREAM)
        return out

    return [z(row) if ddim.table[row, 5] else None for row in range(len(ddim.pairs))]


def last(states: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The last x_s."""
    *_, (x, _) = states
    return x


def conditioned(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    """A conditional model; it is elementwise, so the batch does not affect rounding."""
    return 0.7 * x.clamp(-1.5, 1.5) + 1e-3 * column(t % 97, x) + 0.2 * c.to(x.dtype)


def by_hand(
    ddim: DDIM,
    net: Any,
    x: Tensor,
    noise: Iterable[Tensor | None] | None = None,
    *,
    cond: Mapping[str, Any] | None = None,
    uncond: Mapping[str, Any] | None = None,
    w: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    self_condition: str | None = None,
    start: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (x_s, x0) of each step. ``w`` is (rows, batch); the halves are two model calls."""
    table, cond, before = torch.tensor(ddim.table), dict(cond or {}), None
    z = [None] * len(table) if noise is None else list(noise)
    for row, (t, _) in list(enumerate(ddim.pairs))[start:]:
        own = {}
        if self_condition is not None:
            own = {self_condition: (torch.zeros_like(x) if before is None else before).to(dtype)}

        def call(keywords: Mapping[str, Any], x: Tensor = x, t: int = t, own: Any = own) -> Tensor:
            output: Tensor = net(x.to(dtype), torch.full((len(x),), t), **keywords, **own)
            return output.float()

        output, each = call(cond), None
        if w is not None and uncond is not None:
            output = torch.cat([call({**cond, **uncond}), output])
            each = w[row].view(-1, *[1] * (x.dim() - 1))
        x, before = reference.ddim_step(
            x, output, table[row], z[row], ddim.prediction, ddim.clip, guidance=each
        )
        yield x, before


class Dispatched(TorchDispatchMode):
    """Records the names of the operations that PyTorch dispatches."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))
