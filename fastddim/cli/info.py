"""The command ``info``, which prints the installed packages, and the backend of each device."""

import platform
import sys
from importlib import util

from fastddim.cli import bars
from fastddim.cli.options import Machine
from fastddim.extras import EXTRAS

STEPS = {
    "triton": "a step is one Triton kernel",
    "numba": "a step is one pass compiled by numba",
    "torch": "a step is PyTorch's own operations",
}


def info(machine: Machine) -> None:
    """Print the versions, the devices of this machine, and the backend that each device uses.

    A line for each extra of the package names what the extra adds and, if a part of it is
    missing, the command that installs it.

    For example: fastddim info
    """
    with bars.spinner("looking", machine.quiet):
        import torch

        from fastddim import __version__
        from fastddim.cli.network import usable
        from fastddim.loop import devices
        from fastddim.tools import provenance

        usable(machine)
        packages = ["torch", "triton", "numpy"]
        packages += [name for modules, _ in EXTRAS.values() for name in modules.values() if name]
        found = provenance.versions(*packages)
        usable_here = [machine.device] if machine.device else devices.devices()
        takes = {device: _step_on(device) for device in usable_here}
    print(f"fastddim {__version__}, Python {platform.python_version()} on {sys.platform}")
    print(", ".join(f"{name} {found[name]}" for name in packages if name in found))
    for device in usable_here:
        print(f"{device}: {provenance.machine(torch.device(device))}; {takes[device]}")
    for extra, (modules, adds) in EXTRAS.items():
        missing = [
            package
            for module, package in modules.items()
            if package and util.find_spec(module) is None
        ]
        if missing:
            print(
                f"fastddim[{extra}] would add {adds} ({', '.join(missing)} missing): "
                f"pip install 'fastddim[{extra}]'"
            )
        else:
            print(f"fastddim[{extra}] is installed: {adds}")


def _step_on(device: str) -> str:
    """Returns how ``device`` takes a step, or why the chosen backend cannot take one there."""
    from fastddim.step import backends

    try:
        name = backends.backend(device).name
    except (ValueError, ImportError) as error:
        # FASTDDIM_BACKEND may name a backend that runs on some of the devices only.
        return f"no step can be taken: {error}"
    return STEPS.get(name, f"a step is taken by {name}")
