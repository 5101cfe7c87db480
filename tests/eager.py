"""Calls of every backend compared with eager PyTorch, in guarded memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import fastddim
from benchmarks.variants import VARIANTS, step_arguments
from fastddim.step import reference
from fastddim.step.philox import STEP_STREAM
from tests.paths import ALL, here, normal_, use
from tests.steps import same

BACKENDS = here(*ALL)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


PAD, GUARD = 67, 4096.0  # which every dtype can hold


class Memory:
    """Where results go: poisoned with NaN, and around them guards that must stay as they were."""

    def __init__(self) -> None:
        self.lent: list[tuple[Tensor, Tensor]] = []

    def like(self, tensor: Tensor, offset: int = 0) -> Tensor:
        """As large as ``tensor``, with its strides, gaps and dtype."""
        reach = [(n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
        span = 1 + sum(reach) if tensor.numel() else 0
        whole = torch.full((2 * PAD + offset + span,), GUARD, dtype=tensor.dtype)
        lent = whole.as_strided(tensor.shape, tensor.stride(), PAD + offset)
        self.lent.append((whole, lent.fill_(float("nan"))))
        return lent

    def check(self) -> None:
        """Nothing was written beside what was lent, which is lost with this."""
        for whole, lent in self.lent:
            lent.fill_(GUARD)
            assert (whole == GUARD).all(), "written outside of a tensor"


def by_reference(
    x: Tensor,
    output: Tensor,
    table: Tensor,
    rows: Tensor | int,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    guidance: Tensor | float | None = None,
    prediction: str = "epsilon",
    clip: float | None = None,
    threshold: Tensor | None = None,
    rederive: bool = False,
    noise_first: bool = True,
    history: Tensor | None = None,
    posterior: bool = False,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """The step in eager float32, from what ``fastddim.ddim_step`` is called with."""
    batch, each = len(x), (-1, *[1] * (x.dim() - 1))

    def of_samples(value: Tensor | float | None) -> Tensor | None:
        if value is None:
            return None
        return torch.as_tensor(value, dtype=torch.float32).expand(batch).reshape(each)

    rows = torch.as_tensor(rows, dtype=torch.int32).expand(batch)
    if seeds is not None:
        noise = torch.empty(x.shape)
        normal_(noise, seeds, rows, STEP_STREAM)
    row = table[rows.long()].view(*each, table.shape[1])
    w, s = of_samples(guidance), of_samples(threshold)
    return reference.ddim_step(
        x, output.float(), row, noise, prediction, clip, noise_first, w, s, rederive, history,
        posterior,
    )  # fmt: skip


def assert_rounded(next_input: Tensor, x_s: Tensor) -> None:
    """Bit for bit what PyTorch makes of x_s in this dtype, once or twice; NaN is NaN."""
    integers = torch.int32 if next_input.dtype == torch.float32 else torch.int16
    expected = x_s.to(next_input.dtype)
    for half in next_input.split(max(len(x_s), 1)):
        assert same(half, expected)
        number = ~expected.isnan()
        assert torch.equal(half[number].view(integers), expected[number].view(integers))


def assert_equals_eager(arguments: dict[str, Any], offset: int = 0) -> None:
    """Every backend: every result, and nothing written but these."""
    for backend in BACKENDS:
        memory, called = Memory(), dict(arguments)
        for name in ("out", "next_input"):
            if called.get(name) is not None:
                called[name] = memory.like(called[name], offset)
        given = [t for n, t in arguments.items() if isinstance(t, Tensor) and t is called[n]]
        before = [t.clone() for t in given]
        with use(backend):
            expected, expected_x0 = by_reference(**arguments)
            x_s, x0 = fastddim.ddim_step(**called)
        assert same(x_s, expected), backend
        if called.get("out") is not None:
            assert x_s is called["out"]
        assert (x0 is not None) == arguments.get("want_x0", True)
        if x0 is not None:
            assert same(x0, expected_x0), backend
        if called.get("next_input") is not None:
            assert_rounded(called["next_input"], x_s)
        for tensor, value in zip(given, before, strict=True):
            assert same(tensor, value), f"the {backend} wrote to what it was given"
        memory.check()


def of_variant(
    name: str, dtype: torch.dtype, last: bool, batch: int, shape: tuple[int, ...]
) -> dict[str, Any]:
    """A call of this variant, of another dtype, layout and shape."""
    variant = replace(VARIANTS[name], dtype=dtype, channels_last=last)
    arguments = step_arguments(variant, batch, shape=shape)
    if not variant.rows_differ:
        arguments["rows"] = torch.full((), 20, dtype=torch.int32).expand(batch)
    return arguments | {"out": torch.empty_like(arguments["x"])}


LAYOUTS = {"contiguous": False, "last": True}
