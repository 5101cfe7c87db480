"""The command that says what is installed and what runs: info."""

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
    """Say what is installed, which devices there are, and what takes the steps on each.

    For each extra of the package there is a line with what it adds, and with the command that
    installs it where something of it is missing.

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
        what = provenance.machine(torch.device(device))
        print(f"{device}: {what}; {takes[device]}")
    for extra, (modules, what) in EXTRAS.items():
        missing = [
            package
            for module, package in modules.items()
            if package and util.find_spec(module) is None
        ]
        if missing:
            print(
                f"fastddim[{extra}] would add {what} ({', '.join(missing)} missing): "
                f"pip install 'fastddim[{extra}]'"
            )
        else:
            print(f"fastddim[{extra}] is installed: {what}")


def _step_on(device: str) -> str:
    """What takes a step there, or why the backend that is asked for takes none."""
    from fastddim.step import backends

    try:
        name = backends.backend(device).name
    except (ValueError, ImportError) as error:
        # FASTDDIM_BACKEND may name one that runs on some of the devices and not on others.
        return f"no step can be taken: {error}"
    return STEPS.get(name, f"a step is taken by {name}")
