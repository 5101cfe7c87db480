"""Checks of a launch's results: each is compared with the reference before it is timed."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

import fastddim
from benchmarks.timing import WrongResultError, captured
from fastddim.coefficients import PREDICTIONS
from fastddim.step import reference
from fastddim.step.philox import STEP_STREAM, normals

Given: TypeAlias = dict[str, Any]
"""The arguments of ``fastddim.ddim_step``, or of ``fastddim_kernels.ddim_step``."""
NORMAL_MAX = 1e-3
"""Greatest difference of normals drawn on a CPU and on a GPU (``fastddim.step.philox``)."""


def zeros_as(tensor: Tensor) -> Tensor:
    """Zeros with ``tensor``'s strides, gaps included, which ``zeros_like`` would close."""
    room = torch.zeros(
        tensor.untyped_storage().nbytes() // tensor.itemsize,
        dtype=tensor.dtype,
        device=tensor.device,
    )
    return room.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def kernel_noise(given: Given) -> Tensor | None:
    """z as this specialisation of the step draws it: for x = ε = 0 and c1 = 1, x_s is z."""
    if given.get("seeds") is None:
        return given.get("noise")
    table = torch.zeros_like(given["table"])
    table[:, :4] = 1
    table[:, 5] = 1
    zeros = {name: zeros_as(given[name]) for name in ("x", "output")}
    if given.get("next_input") is not None:
        zeros["next_input"] = zeros_as(given["next_input"])
    z, _ = fastddim.ddim_step(**{**given, **zeros, "table": table, "out": None})
    return z


def rows_of(given: Given) -> Tensor:
    """The table row of each sample, int32 (batch,)."""
    rows, x = given["rows"], given["x"]
    if isinstance(rows, Tensor):
        return rows
    return torch.full((), rows, dtype=torch.int32, device=x.device).expand(len(x))


def by_reference(given: Given, z: Tensor | None) -> tuple[Tensor, Tensor]:
    """(x_s, x0) of ``fastddim.ddim_step(**given)`` in eager PyTorch on the tensors' device."""
    x, each = given["x"], (-1, *[1] * (given["x"].dim() - 1))

    def by_sample(name: str) -> Tensor | None:
        value = given.get(name)
        return value.reshape(each) if isinstance(value, Tensor) else value

    return reference.ddim_step(
        x,
        given["output"].float(),
        given["table"][rows_of(given).long()].view(*each, given["table"].shape[1]),
        z,
        given.get("prediction", "epsilon"),
        given.get("clip"),
        given.get("noise_first", True),
        by_sample("guidance"),
        by_sample("threshold"),
        given.get("rederive", False),
        given.get("history"),
        given.get("posterior", False),
    )


def as_step(launch: Given) -> Given:
    """The arguments of ``fastddim.ddim_step`` that correspond to this launch."""
    given = {name: value for name, value in launch.items() if name not in ("out", "x0")}
    given["prediction"] = PREDICTIONS[launch["prediction"]]
    return given | {"want_x0": launch["x0"] is not None}


def contract_error(given: Given, z: Tensor, samples: tuple[int, ...]) -> Tensor:
    """|noise of these samples − their noise by ``fastddim.step.philox``|, elementwise."""
    chosen = list(samples)
    truth = normals(
        given["seeds"][chosen].cpu().numpy(),
        rows_of(given)[chosen].cpu().numpy(),
        z[0].numel(),
        STEP_STREAM,
    )
    drawn = z[chosen].cpu().reshape(len(chosen), -1)
    return (drawn.double() - torch.from_numpy(truth).double()).abs()


def differing(launch: Given) -> list[str]:
    """Names of the launch's outputs that differ from the reference."""
    given = as_step(launch)
    z = kernel_noise(given)
    x_s, x0 = by_reference(given, z)
    wrong = [] if torch.equal(launch["out"], x_s) else ["out"]
    if launch["x0"] is not None and not torch.equal(launch["x0"], x0):
        wrong.append("x0")
    next_input = launch.get("next_input")
    if next_input is not None:
        halves = next_input.chunk(len(next_input) // len(x_s))
        if not all(torch.equal(half, x_s.to(half.dtype)) for half in halves):
            wrong.append("next_input")
    if z is None or given.get("seeds") is None:
        return wrong
    error = contract_error(given, z, (0, len(z) - 1)).max().item()
    return wrong if error <= NORMAL_MAX else [*wrong, "noise"]


def poison(launch: Given) -> None:
    """Fills every output of the launch with NaN."""
    for name in ("out", "x0", "next_input"):
        if launch.get(name) is not None:
            launch[name].fill_(float("nan"))


def differ(what: str, names: list[str]) -> None:
    """Raises ``WrongResultError`` if there are any names."""
    if names:
        raise WrongResultError(f"{what}: {', '.join(names)} differs from the reference")


def checked_graph(
    name: str, sets: list[Given], launches: int, every: bool = True
) -> tuple[torch.cuda.CUDAGraph, list[object]]:
    """Captures launches that cycle through these sets, and checks the graph's own results."""
    import fastddim_kernels

    def call(i: int) -> None:
        fastddim_kernels.ddim_step(**sets[i % len(sets)])

    graph, returned = captured(call, launches)
    for launch in sets:
        poison(launch)
    graph.replay()
    for launch in sets if every else sets[:1]:
        differ(name, differing(launch))
    return graph, returned
