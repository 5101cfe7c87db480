"""Child processes with a time limit, whose results are read while they run.

Measurements run in child processes, so that an illegal address, a hang or a crash ends one of them
and not the command that writes the record. A child writes its results to a pipe, one JSON object a
line; its standard output stays free for progress.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parents[1]
POLL = 0.1
"""Seconds between two checks whether a silent program still runs."""


class Deadline:
    """The moment at which the time is over."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def over(self) -> bool:
        return self.left() == 0

    def part(self, share: float) -> Deadline:
        """The deadline after this share of the time that is left."""
        return Deadline(self.left() * share)


class Child:
    """A program that is killed at its deadline, with all processes that it has started.

    Args:
        command: returns the program and its arguments for the path of the file to write to.
        deadline: the moment at which the program is killed.
        env: the program's environment; by default this process's.

    Attributes:
        status: None while the program runs, then its exit status, negative after a signal.
        late: True if the program was killed at its deadline.
    """

    def __init__(
        self,
        command: Callable[[str], list[str]],
        deadline: Deadline,
        env: dict[str, str] | None = None,
    ) -> None:
        self.command, self.deadline, self.env = command, deadline, env
        self.status: int | None = None
        self.late = False

    def __iter__(self) -> Iterator[Any]:
        """Starts the program and yields the objects that it writes, until it ends."""
        reading, writing = os.pipe()
        try:
            process = subprocess.Popen(
                self.command(f"/dev/fd/{writing}"),
                cwd=ROOT,
                env=self.env,
                pass_fds=(writing,),
                start_new_session=True,
            )
        finally:
            os.close(writing)
        try:
            for line in self._lines(reading, process):
                # A killed program may leave half a line.
                with suppress(json.JSONDecodeError):
                    yield json.loads(line)
        finally:
            os.close(reading)
            # Its children may outlive it and hold the GPU.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            self.status = process.wait()

    def _lines(self, pipe: int, process: subprocess.Popen[bytes]) -> Iterator[bytes]:
        rest = b""
        while True:
            over = self.deadline.over()
            # Check for the end first, then read once more, or the last lines could be lost.
            ended = process.poll() is not None
            if select.select([pipe], [], [], 0 if ended or over else POLL)[0]:
                chunk = os.read(pipe, 1 << 16)
                if chunk:
                    *lines, rest = (rest + chunk).split(b"\n")
                    yield from lines
                    continue
                # The pipe is closed, so only the program's end is left to wait for.
                with suppress(subprocess.TimeoutExpired):
                    process.wait(self.deadline.left())
                self.late = process.poll() is None
                return
            if ended or over:
                self.late = not ended
                return


class Pipe:
    """The child's end of the pipe: writes objects to ``path``, or to stdout."""

    def __init__(self, path: str | None) -> None:
        self.file: TextIO = sys.stdout if path is None else open(path, "w")  # noqa: SIM115

    def write(self, found: dict[str, Any]) -> None:
        self.file.write(json.dumps(found) + "\n")
        self.file.flush()
