"""The extras of the package, and the one line that names the extra of a missing module."""

from __future__ import annotations

EXTRAS: dict[str, tuple[dict[str, str], str]] = {
    "cli": (
        {
            "typer": "typer",
            "click": "",
            "rich": "rich",
            "PIL": "pillow",
            "safetensors": "safetensors",
            "matplotlib": "matplotlib",
            "jinja2": "jinja2",
            "diffusers": "diffusers",
        },
        "the command line, pictures, plots, pages, and the weights and schedulers of diffusers",
    ),
    "cpu": ({"numba": "numba"}, "a step on a CPU as one fused pass, several times as fast"),
    "fid": (
        {"torch_fidelity": "torch-fidelity", "torchvision": ""},
        "FID in fastddim evaluate",
    ),
    "ray": ({"ray": "ray"}, "Ray, with which examples/ serves and generates on many machines"),
}
"""Extra → (its modules → their packages, "" for an indirect dependency; what the extra enables)."""


def extra_of(module: str | None) -> str | None:
    """Returns the extra that a module comes with, or None."""
    root = (module or "").partition(".")[0]
    return next((extra for extra, (modules, _) in EXTRAS.items() if root in modules), None)


def explained(error: ModuleNotFoundError) -> ModuleNotFoundError:
    """Returns ``error`` with the command that installs the module, where an extra has it."""
    extra = extra_of(error.name)
    if extra is None:
        return error
    return ModuleNotFoundError(
        f"{error.name} is missing; it comes with pip install 'fastddim[{extra}]'", name=error.name
    )
