"""What ``import fastddim`` gives: names, help, examples, one line where an extra is missing.

And the names of the tests.
"""

from __future__ import annotations

import builtins
import doctest
import importlib
import pkgutil
import pydoc
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import fastddim
from tests.processes import ran, ran_anew

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(fastddim.__path__, "fastddim.")
    if info.name != "fastddim.__main__"
)
WITH_EXAMPLES = sorted(
    name
    for name in ("fastddim", *MODULES)
    if ">>> " in Path(str(importlib.util.find_spec(name).origin)).read_text()  # type: ignore[union-attr]
)


def alone(code: str) -> str:
    """What a process prints that has imported PyTorch alone."""
    done = ran(code, strict=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_test_has_a_name_of_over_60_characters() -> None:
    files = (ROOT / "tests").rglob("test_*.py")
    names = [
        name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    ]
    assert len(names) > 1000
    assert not [name for name in names if len(name) > 60]


def test_every_public_name_is_there_and_listed() -> None:
    assert set(fastddim.__all__) <= set(dir(fastddim))
    for name in fastddim.__all__:
        assert getattr(fastddim, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        fastddim.nonsense  # noqa: B018
    names: dict[str, Any] = {}
    exec("from fastddim import *", names)
    assert set(fastddim.__all__) <= set(names)


def test_help_shows_the_classes() -> None:
    text = pydoc.plain(pydoc.render_doc(fastddim))
    for name in ("class DDIM", "class NoiseSchedule", "class Step", "generalized_steps(", "slerp("):
        assert name in text


def test_importing_the_package_imports_no_torch() -> None:
    done = ran_anew("import fastddim, sys; print('torch' in sys.modules)")
    assert done.stdout == "False\n", done.stderr


SCHEDULERS = "fastddim.dropins.diffusers"
OTHERS = (
    "FastCogVideoXDDIMScheduler",
    "FastDDIMScheduler",
    "FastDDPMScheduler",
    "FastDPMSolverMultistepScheduler",
    "FastEulerAncestralDiscreteScheduler",
    "FastFlowMatchEulerDiscreteScheduler",
)
"""These come out of the module of FastDDIMScheduler, and importing diffusers takes two seconds."""


@pytest.mark.parametrize(
    "used",
    [
        "fastddim.embedded.load",
        "fastddim.profile.cells",
        "fastddim.checkpoints.load",
        "fastddim.dropins.compvis.DDIMSampler",
        "fastddim.dropins.compvis.PLMSSampler",
        "fastddim.dropins.guided.ddim_sample_loop",
        "fastddim.dropins.lucidrains.ddim_sample",
        "fastddim.dropins.ermongroup.ddpm_steps",
        "fastddim.generate.shard",
        "fastddim.DDIM().sample",
        *(pytest.param(f"{SCHEDULERS}.{name}", marks=pytest.mark.slow) for name in OTHERS),
        pytest.param("fastddim.dropins.policies.accelerate", marks=pytest.mark.slow),
    ],
)
def test_names_of_the_readme_need_no_import_of_their_own(used: str) -> None:
    assert alone(f"import warnings, fastddim; print(callable({used}))") == "True\n"


def test_generate_is_called_whatever_is_imported_first() -> None:
    for first in ("import fastddim", "from fastddim.tools.shards import shard; import fastddim"):
        assert alone(f"{first}; print(callable(fastddim.generate))") == "True\n"


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_in_docstrings_run(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted
    assert not found.failed


def test_there_are_examples() -> None:
    assert {"fastddim", "fastddim.embedded", "fastddim.latents"} <= set(WITH_EXAMPLES)


@pytest.mark.parametrize(
    ("missing", "code"),
    [
        ("safetensors", "from fastddim import embedded; embedded.load()"),
        ("diffusers", "import fastddim.dropins.diffusers"),
        ("diffusers", "import fastddim; fastddim.dropins.diffusers"),
        ("diffusers", "import fastddim; fastddim.dropins.policies"),
    ],
)
def test_without_an_extra_one_line_says_which(missing: str, code: str) -> None:
    said = alone(
        f"import sys\nsys.modules[{missing!r}] = None\n"
        f"try:\n    exec({code!r})\nexcept ModuleNotFoundError as error:\n    print(error)"
    )
    assert re.fullmatch(
        rf"{missing}\S* is missing; it comes with pip install 'fastddim\[cli\]'\n", said
    )


def test_every_module_of_an_extra_is_known() -> None:
    from fastddim.extras import EXTRAS

    text = (ROOT / "pyproject.toml").read_text()
    for extra, (modules, _) in EXTRAS.items():
        listed = re.search(rf"^{extra} = \[(.*?)\]$", text, flags=re.DOTALL | re.MULTILINE)
        assert listed is not None
        needed = set(re.findall(r'"([\w-]+)(?:\[\w+\])?>=', listed[1]))
        assert needed == {package for package in modules.values() if package}


def test_python_3_10_has_all_that_is_pinned() -> None:
    # NumPy 2.3 and later, SciPy 1.16 and later need Python 3.11.
    for name in ("numpy", "scipy", "contourpy", "matplotlib"):
        [line] = [
            line
            for line in (ROOT / "constraints.txt").read_text().splitlines()
            if line.startswith(f"{name}==")
        ]
        assert line.endswith('; python_version >= "3.11"'), line


def test_the_import_system_is_as_it_was() -> None:
    assert builtins.__import__ is __import__
    module: Any = importlib.import_module("fastddim.cli.network")
    before = dict(sys.modules)
    with module.lean_imports():
        pass
    assert dict(sys.modules) == before
