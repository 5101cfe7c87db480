"""tests/lowest.txt, which the continuous integration installs, agrees with pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
METADATA = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
LISTED = (ROOT / "tests" / "lowest.txt").read_text(encoding="utf-8")
TESTED = ("dependencies", "cli", "cpu", "test")
"""The lists of pyproject.toml that the fast tests need."""
UNTESTED = {"torch"}
"""The lowest version that pyproject.toml names has no wheel for a CPU."""


def lowest(name: str) -> dict[str, str]:
    """The lowest version of each package in one list of pyproject.toml."""
    # Python 3.10 has no tomllib.
    (found,) = re.findall(rf"^{name} = \[(.*?)\]$", METADATA, re.MULTILINE | re.DOTALL)
    requirements = re.findall(r'"([^"]+)"', re.sub(r"\[[^]]*\]", "", found))
    versions = {}
    for requirement in requirements:
        package, _, version = requirement.partition(";")[0].strip().partition(">=")
        if package != "fastddim":
            assert re.fullmatch(r"\d+(\.\d+)*", version), f"{requirement} names no lowest version"
            versions[package] = version
    return versions


def pinned(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    versions = dict(line.split("==") for line in lines)
    assert len(versions) == len(lines)
    return versions


def test_the_listed_versions_are_the_lowest_of_the_metadata() -> None:
    named: dict[str, str] = {}
    for name in TESTED:
        named |= lowest(name)
    assert len(named) > 15
    listed = pinned(LISTED.partition("\n\n")[0])
    assert listed.keys() == named.keys() - UNTESTED
    for package, version in listed.items():
        # Each version that is listed has three numbers: 2.11 in pyproject.toml is 2.11.0 here.
        short = named[package].split(".")
        assert version.split(".") == [*short, *["0"] * (3 - len(short))], package


def test_the_rest_of_the_list_names_other_packages() -> None:
    named = {package for name in TESTED for package in lowest(name)}
    assert not pinned(LISTED.partition("\n\n")[2]).keys() & named
