"""The backend ``triton`` takes steps on a GPU by the kernels of ``fastddim_kernels``."""

from __future__ import annotations

import warnings

import torch
import triton

import fastddim_kernels
from fastddim.check import SamplingWarning
from fastddim.step.backends import Backend, Fixed, Launch, StepArgs


def bind(fixed: Fixed, first: StepArgs) -> Launch:
    """Binds the kernel: see ``backends.Backend``."""
    x, output, table, row, seeds, noise, guidance, threshold, out, x0, next_input, history = first
    launch: Launch = fastddim_kernels.bind(
        x, output, table, row, out, x0, next_input, seeds=seeds, noise=noise, guidance=guidance,
        threshold=threshold, history=history, **fixed._asdict(),
    )  # fmt: skip
    return launch


def _warn_where_steps_are_rounded_otherwise() -> None:
    """Warns of Triton 3.6 on a Blackwell GPU: its ptxas 12.9 fuses packed multiplies and adds."""
    old = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7)
    if old and any(
        torch.cuda.get_device_capability(i)[0] >= 10 for i in range(torch.cuda.device_count())
    ):
        warnings.warn(
            f"Triton {triton.__version__} fuses multiplies and adds on a Blackwell GPU, so that "
            f"steps may differ from eager PyTorch in the last bit: Triton 3.7 or later does not",
            SamplingWarning,
            stacklevel=2,
        )


_warn_where_steps_are_rounded_otherwise()
BACKEND = Backend(
    "triton",
    bind,
    fastddim_kernels.normal_,
    reads=lambda x, output: (
        fastddim_kernels.pixel_spacing(x) is not None
        and fastddim_kernels.pixel_spacing(output) is not None
    ),
    in_order=True,
    rounds=("cuda", "cpu"),
)
