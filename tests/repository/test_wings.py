"""The listing reads as the flow: no import runs up, none in a circle, and CONTRIBUTING maps it."""

from __future__ import annotations

import ast
import re
import warnings
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

from fastddim._moved import MOVED

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fastddim"
WINGS = (
    *("", "step", "loop", "serving", "dropins", "embedded", "models", "tools", "training", "cli"),
)
"""From the mathematics, which has no folder, to the command line: each imports those before it."""
ENTRANCES = {"fastddim", "fastddim.__main__"}
"""They hand out every name, and may import any wing."""
LINES = 500
LONGER = {
    # numba's cache looks at the file of the cached function alone: what numba compiles must stay
    # in one file, or an edit in another file would go on running the old code.
    "fastddim/step/numba_pass.py",
}


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(name: str, path: Path) -> set[str]:
    """The modules of the package that a module imports anywhere, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{name} imports relatively"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {part for part in parts if part in MODULES}
            found |= modules | ({node.module} if len(modules) < len(parts) else set())
    return {other for other in found if other in MODULES} - ENTRANCES - {name}


IMPORTS = {name: imported(name, path) for name, path in MODULES.items() if name not in ENTRANCES}


def wing(name: str) -> str:
    """The folder of the package that a module is in, or is."""
    first = name.split(".")[1]
    return first if (PACKAGE / first).is_dir() else ""


def test_every_wing_is_known() -> None:
    assert {wing(name) for name in IMPORTS} == set(WINGS)


def test_no_import_runs_up() -> None:
    up = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if WINGS.index(wing(other)) > WINGS.index(wing(name))
    ]
    assert not up


def test_no_imports_form_a_circle() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_no_file_is_longer_than_500_lines() -> None:
    files = [
        path
        for folder in ("fastddim", "kernels", "benchmarks", "tests", "examples")
        for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(files) > 100
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {path for path, lines in long.items() if lines > LINES} == LONGER


def test_contributing_names_every_file_and_no_other() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE))
    files = {str(path.relative_to(ROOT)) for path in MODULES.values() if path.stem != "__init__"}
    named_files = {name for name in named if name.startswith("fastddim/") and name.endswith(".py")}
    assert named_files == files
    others = {name for name in named if "/" in name and " " not in name}
    assert not [name for name in others if not (ROOT / name).exists()]


def test_tests_lie_in_the_folder_of_what_they_test() -> None:
    folders = {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert folders == {wing for wing in WINGS if wing} | {
        "mathematics",
        "kernels",
        "benchmarks",
        "repository",
    }


@pytest.mark.parametrize("old", MOVED)
def test_a_moved_module_keeps_its_old_path_with_a_warning(old: str) -> None:
    parts = [import_module(f"fastddim.{path}") for path in MOVED[old]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = import_module(f"fastddim.{old}")
    assert len(parts) > 1 or module is parts[0]
    for part in parts:
        for name in (name for name in vars(part) if not name.startswith("_")):
            assert getattr(module, name) is not None or getattr(part, name) is None
    assert [warning.category for warning in caught if "has moved" in str(warning.message)] in (
        [DeprecationWarning],
        [],  # imported before, by this process
    )
