"""Children and runs that the tests of a GPU record share."""

from __future__ import annotations

import sys
from collections.abc import Callable

from benchmarks.children import Child, Deadline

# What a program that measures a section does first: it writes to the file that it is told of.
HEAD = """
import json, os, signal, subprocess, sys, time
begin, file = int(sys.argv[1]), open(sys.argv[2], "w", buffering=1)
def part(k): print(json.dumps({"part": k, "key": "variants", "label": {"variant": k}}), file=file)
def row(k): print(json.dumps({"key": "variants", "row": {"variant": k, "us": k}}), file=file)
"""


def program(code: str) -> Callable[[str, Deadline, list[str]], Child]:
    """In place of ``gpu.section``: a process that runs this."""

    def section(_: str, deadline: Deadline, options: list[str]) -> Child:
        begin = options[options.index("--begin") + 1] if "--begin" in options else "0"
        return Child(lambda path: [sys.executable, "-c", HEAD + code, begin, path], deadline)

    return section
