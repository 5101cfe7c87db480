"""``fastddim`` and ``python -m fastddim``: runs the command line, and says what went wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


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
        extra = _EXTRA.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        return _refuse(f"{error.name} is missing; it comes with pip install 'fastddim[{extra}]'")
    except (TypeError, ValueError, FileNotFoundError) as error:
        return _refuse(str(error))
    except OSError as error:
        return _refuse(str(error), for_good=False)
    except Exception as error:
        # Typer's own complaints. Their base class is click's or Typer's, depending on its version.
        if type(error).__name__ == "Abort":
            status = 130
        elif (format_message := getattr(error, "format_message", None)) is not None:
            return _refuse(format_message())
        else:
            raise
    if status == 130:
        print("fastddim: interrupted", file=sys.stderr)
    return status or 0


_EXTRA = {
    **dict.fromkeys(
        ("typer", "click", "rich", "PIL", "safetensors", "diffusers", "matplotlib"), "cli"
    ),
    **dict.fromkeys(("torch_fidelity", "torchvision"), "fid"),
}
"""What the commands import beyond the core's own needs, and the extra it comes with."""


def _refuse(reason: str, for_good: bool = True) -> int:
    """Says why. ``for_good``: the same command would be refused again, so that none starts it."""
    said = f"fastddim: {' '.join(reason.split())}"
    if for_good and "TORCHELASTIC_RUN_ID" in os.environ:
        from fastddim.generate import Worker

        Worker.here().refuse(said)
    else:
        print(said, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
