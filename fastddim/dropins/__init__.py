"""Each drop-in replaces one system's sampler, and only translates its names and schedule."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastddim.dropins import compvis as compvis
    from fastddim.dropins import diffsynth as diffsynth
    from fastddim.dropins import diffusers as diffusers
    from fastddim.dropins import ermongroup as ermongroup
    from fastddim.dropins import guided as guided
    from fastddim.dropins import lucidrains as lucidrains
    from fastddim.dropins import monai as monai
    from fastddim.dropins import policies as policies

__all__ = (
    "compvis",
    "diffsynth",
    "diffusers",
    "ermongroup",
    "guided",
    "lucidrains",
    "monai",
    "policies",
)


def __getattr__(name: str) -> Any:
    """Imports a drop-in at its first use, because diffusers takes seconds and may be missing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
