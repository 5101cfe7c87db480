"""What a process owes to the launcher that has started it beside others: torchrun."""

from __future__ import annotations

import os
import signal
import sys
import time

PARENT = os.getppid()
"""Who started this process, as far back as can be told: that may be gone by the first image."""


def refuse(said: str) -> None:
    """Says on stderr why torchrun's processes can do nothing, and ends the launch.

    Whatever the exit status, torchrun would start the same processes again, in vain, as often as
    ``--max-restarts`` says. What one process cannot do none can, as a rule: the first of its
    machine speaks for all, and others do where it has found nothing wrong.
    """
    local = os.environ.get("LOCAL_RANK", "")
    time.sleep(2 * int(local) if local.isdecimal() else 0)
    print(said, file=sys.stderr, flush=True)
    if os.getppid() == PARENT:
        os.kill(PARENT, signal.SIGTERM)
        time.sleep(30)  # until it ends this process too
