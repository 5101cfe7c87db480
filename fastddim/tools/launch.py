"""Ends a launch of torchrun whose processes cannot do their work."""

from __future__ import annotations

import os
import signal
import sys
import time

PARENT = os.getppid()
"""The process that started this one, read at import: the parent may be gone by the first image."""


def refuse(message: str) -> None:
    """Prints ``message`` on stderr, and ends the launch of torchrun that this process is part of.

    Whatever the exit status, torchrun would restart the same processes ``--max-restarts`` times, in
    vain. Usually all processes fail alike: the first on each machine prints the message and ends
    the launch before the others do, which wait longer.
    """
    local = os.environ.get("LOCAL_RANK", "")
    time.sleep(2 * int(local) if local.isdecimal() else 0)
    print(message, file=sys.stderr, flush=True)
    if os.getppid() == PARENT:
        os.kill(PARENT, signal.SIGTERM)
        time.sleep(30)  # torchrun ends this process in this time
