"""The pages of the commands show what these print, and there is one for each command."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path

import pytest

from fastddim.__main__ import main

PAGES = Path(__file__).parents[2] / "docs" / "commands"
CONSOLE = re.compile(r"^```console\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
MEASURED = re.compile(r"\d[\d,]*\.\d+(e[+-]\d+)?")
"""Times and distances, which differ from run to run and from machine to machine."""
DISTANCES = re.compile(r"\d+\.\d+(?= +\d+\.\d+ ± \d| of \d+ images)|\d\.\d+e-\d+")
"""Of the measured numbers those that machines give alike, up to rounding."""
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def commands() -> list[str]:
    from typer.main import get_command

    from fastddim.cli import app

    return list(get_command(app).commands)  # type: ignore[attr-defined]


def shown(page: str) -> list[tuple[str, str]]:
    """(command, its output) of each command in a page's console blocks."""
    found = []
    for block in CONSOLE.findall(page):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output))
    return found


def test_each_command_has_a_page_and_a_row_in_the_index() -> None:
    index = (PAGES / "index.md").read_text()
    assert re.findall(r"^\| \[`fastddim ([\w-]+)`\]\(\1\.md\)", index, re.MULTILINE) == commands()
    assert {page.stem for page in PAGES.glob("*.md")} == {*commands(), "index"}


@pytest.mark.slow
@pytest.mark.parametrize("name", commands())
def test_a_page_shows_the_output_of_its_command(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    page = shown((PAGES / f"{name}.md").read_text())
    assert any(command.startswith(f"fastddim {name}") for command, _ in page)
    for command, output in page:
        assert main(shlex.split(command)[1:]) == 0
        printed = capfd.readouterr().out
        expected, got = (MEASURED.sub("#.#", text) for text in (output, printed))
        same = doctest.OutputChecker().check_output(expected, got, FLAGS)
        assert same, f"$ {command}\n{printed}"
        shows, has = ([*map(float, DISTANCES.findall(text))] for text in (output, printed))
        assert has == pytest.approx(shows, rel=0.05), command
