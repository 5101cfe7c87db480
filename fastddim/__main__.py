"""``fastddim`` and ``python -m fastddim``: runs the command line, and says what went wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from fastddim.extras import explained, extra_of
from fastddim.tools import launch


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    0: done. 2: what was asked for cannot be done, and one line on stderr says why. 3: done, but
    images hold NaN or infinity, and one line on stderr says which. 130: Ctrl-C.
    """
    try:
        from fastddim.cli import app

        status = app(args=arguments, prog_name="fastddim", standalone_mode=False)
    except KeyboardInterrupt:
        status = 130
    except ModuleNotFoundError as error:
        if extra_of(error.name) is None:
            raise
        return _refuse(str(explained(error)))
    except (TypeError, ValueError, OSError) as error:
        # What torchrun's other workers and later starts find as well has a type of its own.
        alike = type(error).__name__ == "RefusedError"
        # A full disk may have room the next time, nonsense stays nonsense.
        for_good = not isinstance(error, OSError) or isinstance(error, FileNotFoundError)
        return _refuse(str(error), alike, for_good)
    except Exception as error:
        # Typer's own complaints. Their base class is click's or Typer's, depending on its version.
        if type(error).__name__ == "Abort":
            status = 130
        elif (format_message := getattr(error, "format_message", None)) is not None:
            return _refuse(format_message(), alike=True)
        else:
            raise
    if status == 130:
        print("fastddim: interrupted", file=sys.stderr)
    return status or 0


def _refuse(reason: str, alike: bool = False, for_good: bool = True) -> int:
    """Says why, and gives the exit status.

    Args:
        alike: all processes find the same, and one says it.
        for_good: the same command will be refused again, so that no launcher need start it.
    """
    said = f"fastddim: {' '.join(reason.split())}"
    if for_good and "TORCHELASTIC_RUN_ID" in os.environ:
        launch.refuse(said)
    elif not (alike and _said_elsewhere()):
        print(said, file=sys.stderr)
    return 2


def _said_elsewhere() -> bool:
    """Whether another process on this machine says the same, or this one did before a restart."""
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return local != "0" or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


if __name__ == "__main__":
    sys.exit(main())
