"""What a command shows on stderr while it works, and how its tables are printed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fastddim.tools.pace import There

SOON, LATER = 5, 60
"""Seconds from the first line of progress to the second, and from then on to the next."""


@contextmanager
def spinner(what: str, quiet: bool = False) -> Iterator[None]:
    """A sign of life on a terminal, from the first moment: importing torch takes seconds."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield
        return
    with Live(Spinner("dots", what), console=console, transient=True) as live:
        live.refresh()  # at once, and not when its thread first gets a turn
        yield


@contextmanager
def bar(
    what: str, total: int, quiet: bool = False
) -> Iterator[Callable[[Iterable[Any]], Iterable[Any]]]:
    """A wrapper of iterables, all counted by one bar on stderr; none where that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    hidden = quiet or not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=hidden) as progress:
        task = progress.add_task(what, total=total)

        def counted(steps: Iterable[Any]) -> Iterator[Any]:
            for step in steps:
                yield step
                progress.advance(task)

        yield counted


@contextmanager
def bar_of_images(total: int, quiet: bool) -> Iterator[Callable[[There], None]]:
    """A bar on stderr of how many of ``total`` images there are, told the number from outside.

    Where stderr is no terminal there is a line at once, one after five seconds, and then one a
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
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        due: list[float] = []

        def there(n: There) -> None:
            said = ""
            if n.rate is not None and n.left is not None:
                left = timedelta(seconds=round(n.left))
                said = f"{n.rate:.1f} images/s, {left} left"
            progress.update(task, completed=n, description=said)
            if not lines:
                return
            now = time.perf_counter()
            if not due or (n < total and now >= due[0]):
                due[:] = [now + (LATER if due else SOON)]
                what = f"{n} of {total} images" + (f", {said}" if said else " are there")
                print(what, file=sys.stderr, flush=True)

        yield there


def print_table(heading: str, names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on stdout, numbers to the right; piped, no line of it is broken."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    # Rich takes 80 columns where it cannot see the width of a terminal.
    console = Console(highlight=False, width=10_000 if piped else None)
    console.print(Text(heading))
    console.print(table)
