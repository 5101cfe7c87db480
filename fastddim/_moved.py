"""The modules that have moved: their old paths work for one more release, with a warning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED: dict[str, tuple[str, ...]] = {
    "backends": ("step.backends",),
    "blocked": ("step.on_torch",),
    "bound": ("step.bound",),
    "buffers": ("step.buffers",),
    "checkpoints": ("models.checkpoints",),
    "devices": ("loop.devices",),
    "dropins.diffusers.tables": ("dropins._tables",),
    "embedded.distance": ("tools.distance", "training.distance"),
    "embedded.evaluate": ("training.evaluate",),
    "embedded.train": ("training.model",),
    "embedded.train_classifier": ("training.classifier",),
    "evaluate": ("tools.evaluate",),
    "folder": ("tools.folder", "tools.seeds"),
    "fused": ("step.on_numba", "step.numba_pass"),
    "generate": ("tools.shards",),
    "graph": ("loop.graph", "loop.recording"),
    "held": ("loop.held",),
    "images": ("tools.images", "tools.draw", "tools.timing", "loop.devices"),
    "inpaint": ("loop.inpaint",),
    "launch": ("tools.launch",),
    "layout": ("step.layout",),
    "noise": ("step.philox",),
    "normals": ("loop.normals",),
    "on_triton": ("step.on_triton",),
    "op": ("step.op",),
    "options": ("loop.options",),
    "pace": ("tools.pace",),
    "plan": ("loop.plan",),
    "predict": ("loop.model",),
    "profile": ("tools.profile",),
    "provenance": ("tools.provenance",),
    "quality": ("tools.quality",),
    "reconstruction": ("tools.reconstruction",),
    "reference": ("step.reference",),
    "run": ("loop.run",),
    "sampler": ("loop.sampler",),
    "sheet": ("tools.sheet",),
    "sources": ("tools.sources",),
    "statedicts": ("models.statedicts",),
    "trained": ("models.trained",),
    "trajectory": ("loop.trajectory",),
    "transfer": ("dropins._transfer",),
    "unets": ("models.unets",),
}
"""Old path → new paths, relative to the package. ``step`` is a package with its old names."""


class Finder(MetaPathFinder, Loader):
    """Imports a moved module by its old path."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, old = fullname.partition(".")
        if package != __package__ or old not in MOVED:
            return None
        return ModuleSpec(fullname, self, origin="moved")

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Puts the new module in place of the old one.

        The old path of a divided module becomes a module that looks each name up in the parts.
        """
        old = module.__name__
        paths = [f"{__package__}.{new}" for new in MOVED[old.partition(".")[2]]]
        warnings.warn(
            f"{old} has moved to {' and '.join(paths)}; the old path goes in the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        parts = [importlib.import_module(path) for path in paths]
        if len(parts) == 1:
            sys.modules[old] = parts[0]
            return

        def found(name: str) -> Any:
            for part in parts:
                if hasattr(part, name):
                    return getattr(part, name)
            raise AttributeError(f"module {old!r} has no attribute {name!r}")

        vars(module)["__getattr__"] = found
