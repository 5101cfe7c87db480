"""Named variants of the step's options, for the tests, the machine code and the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastddim
from fastddim.coefficients import COLUMNS_OF_MANY, PREDICTIONS


@dataclass(frozen=True)
class Variant:
    """One specialisation of the step.

    Attributes:
        prediction: ``"epsilon"``, ``"v"``, ``"sample"`` or ``"flow"``: the model's output.
        noise: ``"none"``, ``"tensor"`` or ``"philox"`` (counter noise, from seeds).
        dtype: dtype of the model's output and input; the state is float32.
        shape: shape of a sample, (channels, height, width).
        channels_last: True if every tensor is channels last.
        mixed: True if the model's output has the other of the two layouts.
        learned: True if the output has twice the channels: ε, then a learned variance.
        guidance: True if the output holds both halves of classifier-free guidance.
        clip: bound of x0, or None.
        threshold: True if each sample has its own bound of x0 (dynamic thresholding).
        rederive: True if ε is computed again from the bounded x0.
        posterior: True if x_t takes the place of ε in the sum.
        noise_first: True if noise is added before the direction term (the original loop), False
            if after (diffusers).
        want_x0: True if x0 is written too.
        next_inputs: how many copies of x_s are written for the model's next call, in its dtype.
        rows_differ: True if each sample has its own table row.
        of_many: True if the table holds the rows of several samplers, with their own numbers.
        order: 2 if the step reads the x0 of the step before.
        rounds: True if the state has ``dtype`` too, to which the result of each operation is
            rounded.
    """

    prediction: str = "epsilon"
    noise: str = "none"
    dtype: torch.dtype = torch.float32
    shape: tuple[int, int, int] = (4, 64, 64)
    channels_last: bool = False
    mixed: bool = False
    learned: bool = False
    guidance: bool = False
    clip: float | None = None
    threshold: bool = False
    rederive: bool = False
    posterior: bool = False
    noise_first: bool = True
    want_x0: bool = False
    next_inputs: int = 0
    rows_differ: bool = False
    of_many: bool = False
    order: int = 1
    rounds: bool = False

    @property
    def bytes_per_element(self) -> int:
        """Bytes read and written per element, without the coefficients."""
        output = self.dtype.itemsize * (2 if self.guidance else 1)
        of_state = self.dtype.itemsize if self.rounds else 4
        state = of_state * (2 + self.want_x0 + (self.noise == "tensor") + (self.order == 2))
        return state + output + self.dtype.itemsize * self.next_inputs


BF16, FP16 = torch.bfloat16, torch.float16
ODD = (3, 255, 255)

VARIANTS = {
    "epsilon": Variant(),
    "epsilon bf16": Variant(dtype=BF16),
    "epsilon x0 clip": Variant(want_x0=True, clip=1.0),
    "epsilon tensor": Variant(noise="tensor", noise_first=False),
    "epsilon philox": Variant(noise="philox"),
    "epsilon philox bf16": Variant(noise="philox", dtype=BF16),
    "epsilon philox rows x0": Variant(noise="philox", rows_differ=True, want_x0=True),
    "epsilon odd": Variant(shape=ODD, rows_differ=True),
    "epsilon odd philox": Variant(shape=ODD, noise="philox"),
    "epsilon last philox": Variant(channels_last=True, noise="philox"),
    "epsilon last philox rgb": Variant(noise="philox", shape=(3, 64, 64), channels_last=True),
    "epsilon last philox odd": Variant(shape=ODD, channels_last=True, noise="philox"),
    "epsilon mixed bf16": Variant(dtype=BF16, mixed=True),
    "epsilon mixed rgb": Variant(mixed=True, shape=(3, 64, 64)),
    "epsilon philox last mixed rgb": Variant(
        noise="philox", shape=(3, 64, 64), channels_last=True, mixed=True
    ),
    "epsilon clip rederive": Variant(clip=1.0, rederive=True, noise_first=False),
    "epsilon threshold": Variant(threshold=True, want_x0=True),
    "epsilon fp16 next": Variant(dtype=FP16, next_inputs=1),
    "epsilon tensor posterior clip": Variant(
        noise="tensor", posterior=True, clip=1.0, noise_first=False
    ),
    "flow": Variant("flow"),
    "flow philox": Variant("flow", "philox"),
    "v": Variant("v"),
    "v philox bf16 next": Variant("v", "philox", BF16, next_inputs=1),
    "sample philox x0 clip": Variant("sample", "philox", want_x0=True, clip=1.0),
    "learned philox clip rederive": Variant(
        noise="philox", learned=True, clip=1.0, rederive=True, shape=(3, 64, 64)
    ),
    "learned last": Variant(learned=True, channels_last=True),
    "learned last rgb": Variant(learned=True, channels_last=True, shape=(3, 64, 64)),
    "guidance bf16 next": Variant(dtype=BF16, guidance=True, next_inputs=2),
    "guidance philox bf16 clip next": Variant(
        noise="philox", dtype=BF16, guidance=True, clip=1.0, next_inputs=2
    ),
    "guidance philox bf16 last next": Variant(
        noise="philox", dtype=BF16, guidance=True, channels_last=True, next_inputs=2
    ),
    "guidance philox threshold": Variant(noise="philox", guidance=True, threshold=True),
    "epsilon order 2": Variant(want_x0=True, order=2),
    "epsilon philox order 2": Variant(noise="philox", want_x0=True, order=2),
    "epsilon philox last order 2": Variant(
        noise="philox", channels_last=True, want_x0=True, rows_differ=True, order=2
    ),
    "v bf16 order 2 next": Variant("v", dtype=BF16, want_x0=True, next_inputs=1, order=2),
}

ROUNDED = {
    f"{name} {dtype} rounded": replace(v, dtype=of, rounds=True, noise_first=False)
    for dtype, of in (("bf16", BF16), ("fp16", FP16))
    for name, v in {
        "epsilon": Variant(),
        "epsilon x0 clip": Variant(want_x0=True, clip=1.0),
        "epsilon tensor": Variant(noise="tensor"),
        "epsilon clip rederive": Variant(clip=1.0, rederive=True),
        "epsilon threshold": Variant(threshold=True, want_x0=True),
        "epsilon tensor posterior clip": Variant(noise="tensor", posterior=True, clip=1.0),
        "v": Variant("v"),
    }.items()
}
"""The variants of a state in half precision, which ``fastddim.ddim_step`` does not take."""

SERVED = {"epsilon philox rows of many": Variant(noise="philox", rows_differ=True, of_many=True)}
"""The step of ``fastddim.Engine`` with noise."""


def step_arguments(
    v: Variant, batch: int, device: str = "cpu", shape: tuple[int, ...] | None = None, seed: int = 0
) -> dict[str, Any]:
    """The arguments of ``fastddim.ddim_step`` for a batch of this variant.

    On the device ``"meta"`` tensors have no content, so the step cannot run.
    """
    sample = shape or v.shape
    table = fastddim.DDIM(steps=50, eta=1.0, order=v.order).table
    if v.of_many:
        wide = np.zeros((len(table), len(COLUMNS_OF_MANY)), np.float32)
        wide[:, : table.shape[1]], wide[:, -1] = table, np.arange(len(table))
        table = wide
    g = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def normals(*size: int, last: bool = v.channels_last) -> Tensor:
        t = torch.randn(size, generator=g, device=device)
        return t.movedim(1, -1).contiguous().movedim(-1, 1) if last else t

    rows = torch.arange(batch, dtype=torch.int32, device=device) % 49
    channels = sample[0] * (2 if v.learned else 1)
    halves = 2 if v.guidance else 1
    output = normals(batch * halves, channels, *sample[1:], last=v.channels_last != v.mixed)
    found: dict[str, Any] = {
        "x": normals(batch, *sample),
        "output": output.to(v.dtype),
        "table": torch.tensor(table, device=device),
        "rows": rows if v.rows_differ else v.order - 1,  # row 0 of order 2 does not use history
        "prediction": v.prediction,
        "noise_first": v.noise_first,
        "clip": v.clip,
        "rederive": v.rederive,
        "posterior": v.posterior,
        "want_x0": v.want_x0,
    }
    if v.noise == "philox":
        found["seeds"] = torch.arange(2**40, 2**40 + batch, device=device)
    if v.noise == "tensor":
        found["noise"] = normals(batch, *sample)
    if v.order == 2:
        found["history"] = normals(batch, *sample)
    if v.guidance:
        found["guidance"] = torch.linspace(1.5, 9, batch, device=device)
    if v.threshold:
        found["threshold"] = torch.linspace(1, 2, batch, device=device)
    if v.next_inputs:
        found["next_input"] = torch.cat(
            # Not empty: torch.cat would read memory that nothing has written.
            [torch.zeros_like(found["x"], dtype=v.dtype)] * v.next_inputs
        )
    return found


def launch_arguments(v: Variant, batch: int, device: str = "cpu", **options: Any) -> dict[str, Any]:
    """The arguments of ``fastddim_kernels.ddim_step``, which also takes the output tensors."""
    found = step_arguments(v, batch, device, **options)
    x = found["x"]
    found["output"] = found["output"][:, : x.shape[1]]
    found["prediction"] = PREDICTIONS.index(v.prediction)
    if v.rounds:
        x = found["x"] = x.to(v.dtype)
        table = found["table"]
        found |= {"rounding": v.dtype, "table": torch.cat([table, table[:, 0:3:2]], dim=1)}
        if v.noise == "tensor":
            found["noise"] = found["noise"].to(v.dtype)
    found["out"] = torch.empty_like(x)
    found["x0"] = torch.empty_like(x) if found.pop("want_x0") else None
    return found
