"""The progress that a command shows on stderr, and the tables that it prints."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fastddim.tools.pace import Count

SOON, LATER = 5, 60
"""Seconds from the first line of progress to the second, and between later lines."""


@contextmanager
def spinner(text: str, quiet: bool = False) -> Iterator[None]:
    """Shows a spinner on a terminal at once, because importing torch takes seconds."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield
        return
    with Live(Spinner("dots", text), console=console, transient=True) as live:
        live.refresh()  # now, and not at the first turn of its thread
        yield


@contextmanager
def bar(
    text: str, total: int, quiet: bool = False
) -> Iterator[Callable[[Iterable[Any]], Iterable[Any]]]:
    """Yields a wrapper of iterables, which all advance one bar; it shows on a terminal only."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    progress = Progress(*columns, TimeRemainingColumn(), console=console)
    with _shown(progress, quiet):
        task = progress.add_task(text, total=total)

        def counted(steps: Iterable[Any]) -> Iterator[Any]:
            for step in steps:
                yield step
                progress.advance(task)

        yield counted


@contextmanager
def bar_of_images(total: int, quiet: bool) -> Iterator[Callable[[Count], None]]:
    """Yields a function that shows the number of finished images, of ``total``, in a bar on stderr.

    If stderr is no terminal, it prints a line at once, one after five seconds, and then one each
    minute.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("generating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
    )
    lines = not (quiet or console.is_terminal)
    progress = Progress(*columns, console=console)
    with _shown(progress, quiet):
        task = progress.add_task("", total=total)
        due: list[float] = []

        def show(n: Count) -> None:
            pace = n.pace()
            progress.update(task, completed=n, description=pace)
            if not lines:
                return
            now = time.perf_counter()
            if not due or (n < total and now >= due[0]):
                due[:] = [now + (LATER if due else SOON)]
                line = f"{n} of {total} images" + (f", {pace}" if pace else " are finished")
                print(line, file=sys.stderr, flush=True)

        yield show


def _shown(progress: Progress, quiet: bool) -> AbstractContextManager[object]:
    """Returns a context that shows ``progress`` on a terminal only."""
    if quiet or not progress.console.is_terminal:
        # A Progress that is only disabled ends with an empty line before Rich 14.3.
        progress.disable = True
        return nullcontext()
    return progress


def print_table(heading: str, names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints a right-aligned table to stdout, without line breaks in rows if stdout is piped."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    # Rich assumes 80 columns if it finds no terminal.
    console = Console(highlight=False, width=10_000 if piped else None)
    console.print(Text(heading))
    console.print(table)
