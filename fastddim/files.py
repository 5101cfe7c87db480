"""Writes a file as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[IO[bytes]]:
    """Yields a file to write, which replaces ``path`` only once it is written in full.

    Until then the file is ``temporary``, by default a hidden name in the same folder.
    """
    temporary = temporary or _beside(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the new name without content
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise


def _beside(path: Path) -> Path:
    """Returns a name in the same folder: replacing is atomic only within one file system."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def check_out(path: Path | str, suffix: str) -> Path:
    """Returns ``path`` if a file can be written there: checked before any work.

    Raises:
        ValueError: the name has another suffix, or is a folder's.
        OSError: the folder does not exist, or cannot be written to.
    """
    path = Path(path)
    if path.suffix.lower() != suffix:
        raise ValueError(f"out must be a file name that ends in {suffix}, got {str(path)!r}")
    if path.is_dir():
        raise ValueError(f"out must be a file name that ends in {suffix}, got the folder {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"out must be in a folder that exists, got {path}")
    temporary = _beside(path)
    try:
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise type(error)(
            f"out must be in a folder that can be written to, got {path}: {error.strerror}"
        ) from None
    temporary.unlink()
    return path
