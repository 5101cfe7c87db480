"""The command that says what is installed and what runs: info."""

import platform
import sys
from importlib import util

from fastddim.cli import bars
from fastddim.cli.options import Machine

EXTRAS = {
    "cli": (
        ("typer", "rich", "PIL", "safetensors", "matplotlib", "diffusers"),
        "the command line, pictures, plots, and the weights of other systems",
    ),
    "cpu": (("numba",), "a step on a CPU as one fused pass, several times as fast"),
    "fid": (("torch_fidelity",), "FID in fastddim evaluate"),
}
"""What each extra of ``pip install 'fastddim[...]'`` holds, and what it is for."""


def info(machine: Machine) -> None:
    """Say what is installed, which devices there are, and what takes the steps on each.

    For example: fastddim info
    """
    with bars.spinner("looking", machine.quiet):
        import torch

        from fastddim import __version__, images, ops, provenance
        from fastddim.cli.network import usable

        usable(machine)
        names = ("torch", "triton", "numpy", "numba", "diffusers")
        found = provenance.versions(*names)
        devices = images.devices()
        backends = {device: ops.backend(device) for device in devices}
    print(f"fastddim {__version__}, Python {platform.python_version()} on {sys.platform}")
    print(", ".join(f"{name} {found.get(name, 'is not installed')}" for name in names))
    for device in devices:
        what = provenance.machine(torch.device(device))
        print(f"{device}: {what}; {STEPS[backends[device]]}")
    for extra, (modules, what) in EXTRAS.items():
        missing = [name for name in modules if util.find_spec(name) is None]
        if missing:
            print(
                f"fastddim[{extra}] would add {what} ({', '.join(missing)} missing): "
                f"pip install 'fastddim[{extra}]'"
            )
        else:
            print(f"fastddim[{extra}] is installed: {what}")


STEPS = {
    "triton": "a step is one Triton kernel",
    "numba": "a step is one pass compiled by numba",
    "torch": "a step is PyTorch's own operations",
}
