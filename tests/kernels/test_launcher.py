"""What the launcher of the kernel refuses, by the name of the argument."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastddim_kernels
from tests.kernel_steps import on_row
from tests.steps import TABLE, randn


def good() -> SimpleNamespace:
    return SimpleNamespace(
        x=randn(2, 4, 4),
        output=randn(2, 4, 4, seed=1),
        table=TABLE,
        rows=on_row(0, 2),
        out=torch.empty(2, 4, 4),
        x0=torch.empty(2, 4, 4),
        seeds=None,
        noise=None,
        guidance=None,
        threshold=None,
        next_input=None,
        clip=None,
    )


def guided(a: SimpleNamespace) -> SimpleNamespace:
    a.guidance = torch.ones(2)
    return a


def bounded(a: SimpleNamespace) -> SimpleNamespace:
    a.threshold, a.clip = torch.ones(2), 1.0
    return a


BAD: dict[str, tuple[str, Callable[[SimpleNamespace], Any]]] = {
    "x double": ("x", lambda a: a.x.double()),
    "x has gaps": ("x", lambda a: randn(2, 4, 8)[..., ::2]),
    "x has no batch": ("x", lambda a: torch.tensor(1.0)),
    "output shape": ("output", lambda a: a.output[..., :2]),
    "output strides": ("output", lambda a: randn(2, 4, 8)[..., ::2]),
    "output dtype": ("output", lambda a: a.output.double()),
    "output device": ("output", lambda a: a.output.to("meta")),
    "table columns": ("table", lambda a: a.table[:, :6].contiguous()),
    "table strides": ("table", lambda a: a.table.mT.contiguous().mT),
    "table dtype": ("table", lambda a: a.table.double()),
    "table dimensions": ("table", lambda a: a.table[0]),
    "rows dtype": ("rows", lambda a: a.rows.long()),
    "rows shape": ("rows", lambda a: on_row(0, 3)),
    "out dtype": ("out", lambda a: a.out.half()),
    "out strides": ("out", lambda a: a.out.mT),
    "x0 shape": ("x0", lambda a: a.x0[:1]),
    "noise dtype": ("noise", lambda a: a.x.half()),
    "noise strides": ("noise", lambda a: a.x.mT),
    "seeds dtype": ("seeds", lambda a: torch.arange(2, dtype=torch.int32)),
    "seeds shape": ("seeds", lambda a: torch.arange(3)),
    "seeds strides": ("seeds", lambda a: torch.arange(4)[::2]),
    "seeds device": ("seeds", lambda a: torch.arange(2, device="meta")),
    "rows device": ("rows", lambda a: a.rows.to("meta")),
    "table device": ("table", lambda a: a.table.to("meta")),
    "out device": ("out", lambda a: a.out.to("meta")),
    "x0 device": ("x0", lambda a: a.x0.to("meta")),
    "noise device": ("noise", lambda a: a.x.to("meta")),
    "guidance dtype": ("guidance", lambda a: torch.ones(2).double()),
    "guidance shape": ("guidance", lambda a: torch.ones(3)),
    "guidance dimensions": ("guidance", lambda a: torch.tensor(7.5)),
    "guidance device": ("guidance", lambda a: torch.ones(2, device="meta")),
    "output without halves": ("output", lambda a: guided(a).output),
    "output of halves": ("output", lambda a: torch.cat([a.output, a.output])),
    "threshold dtype": ("threshold", lambda a: torch.ones(2).half()),
    "threshold shape": ("threshold", lambda a: torch.ones(2, 1)),
    "threshold device": ("threshold", lambda a: torch.ones(2, device="meta")),
    "clip with a threshold": ("clip", lambda a: bounded(a).clip),
    "next_input dtype": ("next_input", lambda a: a.x.double()),
    "next_input shape": ("next_input", lambda a: torch.empty(3, 4, 4)),
    "next_input strides": ("next_input", lambda a: a.x.mT.bfloat16()),
    "next_input device": ("next_input", lambda a: a.x.to("meta")),
    "next_input apart": ("next_input", lambda a: torch.empty(2, 8, 4)[:, :4]),
    "two next_inputs' strides": ("next_input", lambda a: torch.empty(4, 4, 4).mT),
    "next_input of one value": ("next_input", lambda a: torch.tensor(1.0)),
    "two next_inputs apart": ("next_input", lambda a: torch.empty(4, 8, 4)[:, :4]),
}


@pytest.mark.parametrize("case", BAD)
def test_the_launcher_names_the_argument_at_fault(case: str) -> None:
    name, bad = BAD[case]
    arguments = good()
    setattr(arguments, name, bad(arguments))
    with pytest.raises(ValueError, match=rf"^{name} must ") as caught:
        fastddim_kernels.ddim_step(**vars(arguments))
    assert "\n" not in str(caught.value)


def test_the_launcher_refuses_two_sources_of_noise() -> None:
    arguments = good()
    arguments.seeds, arguments.noise = torch.arange(2), randn(2, 4, 4)
    with pytest.raises(ValueError, match=r"^noise comes from seeds or from a tensor, got both$"):
        fastddim_kernels.ddim_step(**vars(arguments))


def test_the_launcher_asks_for_contiguous_memory_with_seeds() -> None:
    arguments = good()
    for name in ("x", "output", "out", "x0"):
        setattr(arguments, name, torch.zeros(2, 3, 5, 4).permute(0, 2, 1, 3))
    arguments.seeds = torch.arange(2)
    with pytest.raises(ValueError, match=r"^x must be contiguous or channels last, got .*strides"):
        fastddim_kernels.ddim_step(**vars(arguments))


def test_the_launcher_needs_stacked_next_inputs_in_one_stretch() -> None:
    # Of one sample the halves' own strides do not say how far apart they are.
    x, out = randn(1, 4, 4), torch.empty(1, 4, 4)
    next_input = torch.empty(2, 8, 4)[:, :4]
    with pytest.raises(ValueError, match=r"^next_input must be dense, got .*strides"):
        fastddim_kernels.ddim_step(x, x, TABLE, on_row(0, 1), out, next_input=next_input)


# What belongs to a sample, or lies sample by sample.
ONE_STRETCH: dict[str, dict[str, Tensor]] = {
    "rows differ": {"rows": torch.zeros(4, dtype=torch.int32)},
    "there are seeds": {"seeds": torch.arange(4)},
    "guidance differs": {"guidance": torch.ones(4), "output": randn(8, 2, 4)},
    "guidance stacks output": {
        "guidance": torch.ones(()).expand(4),
        "output": randn(2, 8, 4).permute(1, 0, 2),
    },
    "there is a threshold": {"threshold": torch.ones(4)},
    "the samples of output are apart": {"output": randn(4, 2, 4)},
}


@pytest.mark.parametrize("reason", ONE_STRETCH)
def test_the_launcher_asks_for_samples_that_are_one_stretch(reason: str) -> None:
    arguments = good()
    for name in ("x", "output", "out", "x0"):
        setattr(arguments, name, getattr(arguments, name).permute(1, 0, 2))
    arguments.rows = on_row(0, 4)
    fastddim_kernels.ddim_step(**vars(arguments))
    for name, value in ONE_STRETCH[reason].items():
        setattr(arguments, name, value)
    message = rf"^x must hold each sample in one stretch where {reason}, got .*strides"
    with pytest.raises(ValueError, match=message) as caught:
        fastddim_kernels.ddim_step(**vars(arguments))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("out", torch.empty(2, 8)[:, ::2]),
        ("out", torch.empty(2, 4, dtype=torch.half)),
        ("seeds", torch.arange(3)),
        ("seeds", torch.arange(4)[::2]),
        ("rows", torch.zeros(2, dtype=torch.int64)),
    ],
)
def test_the_noise_launcher_names_the_argument_at_fault(name: str, value: Tensor) -> None:
    arguments = {"out": torch.empty(2, 4), "seeds": torch.arange(2), "rows": on_row(0, 2)}
    with pytest.raises(ValueError, match=rf"^{name} must be "):
        fastddim_kernels.normal_(**(arguments | {name: value}), stream=0)
