"""Other programs, started with a time limit, whose findings are read while they run.

What is measured runs in processes of its own: an illegal address, a hang or a crash then ends one
of them, and not the command that keeps the record. A program writes its findings to a pipe, one
JSON object a line; its standard output is left to whoever watches.
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
"""Seconds between two looks at whether a silent program still runs."""


class Deadline:
    """A moment in the future up to which there is time."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def over(self) -> bool:
        return self.left() == 0

    def part(self, share: float) -> Deadline:
        """A deadline after this share of the time that is left."""
        return Deadline(self.left() * share)


class Child:
    """A program that is killed, with all processes it started, when its time is over.

    Args:
        command: the program and its arguments, made from the name of the file it writes to.
        deadline: when it is killed.
        env: its environment, by default this process's.

    Attributes:
        status: None while it runs, then its exit status, negative if a signal ended it.
        late: whether its time was over.
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
        """What it writes, object by object, until it ends."""
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
                # A program that is killed may leave half a line.
                with suppress(json.JSONDecodeError):
                    yield json.loads(line)
        finally:
            os.close(reading)
            # Its own children may outlive it, and hold the GPU.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            self.status = process.wait()

    def _lines(self, pipe: int, process: subprocess.Popen[bytes]) -> Iterator[bytes]:
        rest = b""
        while True:
            over = self.deadline.over()
            # Look first whether it has ended, and then once more for what it wrote before it did.
            ended = process.poll() is not None
            if select.select([pipe], [], [], 0 if ended or over else POLL)[0]:
                chunk = os.read(pipe, 1 << 16)
                if chunk:
                    *lines, rest = (rest + chunk).split(b"\n")
                    yield from lines
                    continue
                # The pipe is closed: all that is left is to wait until the program has ended.
                with suppress(subprocess.TimeoutExpired):
                    process.wait(self.deadline.left())
                self.late = process.poll() is None
                return
            if ended or over:
                self.late = not ended
                return


class Pipe:
    """The other end: where a program writes what it finds."""

    def __init__(self, path: str | None) -> None:
        self.file: TextIO = sys.stdout if path is None else open(path, "w")  # noqa: SIM115

    def write(self, found: dict[str, Any]) -> None:
        self.file.write(json.dumps(found) + "\n")
        self.file.flush()
