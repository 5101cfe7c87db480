"""The command ``fastddim``, and ``python -m fastddim``: runs the command line, reports errors."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastddim.extras import explained, extra_of
from fastddim.tools import launch


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    The status is 0 after success; 2 where the command cannot be carried out, and one line on stderr
    says why; 3 where images hold NaN or infinity, and one line on stderr names them; 130 after
    Ctrl-C.
    """
    try:
        from fastddim.cli import app

        with _warnings_in_one_line():
            status = app(args=arguments, prog_name="fastddim", standalone_mode=False)
    except KeyboardInterrupt:
        status = 130
    except ModuleNotFoundError as error:
        if extra_of(error.name) is None:
            raise
        return _refuse(str(explained(error)))
    except (TypeError, ValueError, OSError) as error:
        # All of torchrun's workers raise a RefusedError, and raise it again after a restart.
        alike = type(error).__name__ == "RefusedError"
        # A full disk may have room the next time; a wrong argument stays wrong.
        for_good = not isinstance(error, OSError) or isinstance(error, FileNotFoundError)
        return _refuse(str(error), alike, for_good)
    except Exception as error:
        # Typer's own errors, whose base class is click's or Typer's, depending on its version.
        if type(error).__name__ == "Abort":
            status = 130
        elif (format_message := getattr(error, "format_message", None)) is not None:
            return _refuse(format_message(), alike=True)
        else:
            raise
    if status == 130:
        print("fastddim: interrupted", file=sys.stderr)
    return status or 0


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Prints warnings about the sampler's options as one line, without a place in the source."""
    usual = warnings.formatwarning

    def line(message: Any, category: type[Warning], *rest: Any, **more: Any) -> str:
        if category.__name__ == "SamplingWarning":
            return f"fastddim: {message}\n"
        return usual(message, category, *rest, **more)

    warnings.formatwarning = line
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _refuse(reason: str, alike: bool = False, for_good: bool = True) -> int:
    """Prints the reason on stderr and returns the exit status.

    Args:
        alike: all processes have the same reason, and one of them prints it.
        for_good: the same command would fail again, so that a launcher must not restart it.
    """
    line = f"fastddim: {' '.join(reason.split())}"
    if for_good and "TORCHELASTIC_RUN_ID" in os.environ:
        launch.refuse(line)
    elif not (alike and _printed_elsewhere()):
        print(line, file=sys.stderr)
    return 2


def _printed_elsewhere() -> bool:
    """Returns whether another process here prints the line, or this one did before a restart."""
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return local != "0" or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


if __name__ == "__main__":
    sys.exit(main())
