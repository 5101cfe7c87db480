"""Processes of their own for single tests, each forked from a process that has imported PyTorch.

Importing PyTorch takes a second and a half, which each test would wait for anew. The server that
forks has imported the modules below and has run nothing else, so that a child finds neither
threads, nor this package, nor a backend, nor Triton's choice of the interpreter made.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

LIMIT = 120
"""Seconds that a process may take."""

SERVER = """
import gc, importlib, json, os, signal, sys, types
for name in {modules!r}:
    importlib.import_module(name)
assert not set(sys.modules) & {{"fastddim", "fastddim_kernels", "triton"}}
gc.freeze()
print("ready", flush=True)
while line := sys.stdin.readline():
    request = json.loads(line)
    if (child := os.fork()) == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    os._exit(0)
signal.alarm({limit})
for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, request["out"], os.O_WRONLY),
                            (2, request["err"], os.O_WRONLY)):
    os.dup2(os.open(path, flags), number)
os.chdir(request["cwd"])
os.environ.clear()
os.environ.update(request["env"])
if request["strict"]:
    import warnings
    warnings.simplefilter("error")
status = 0
try:
    sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(request["code"], "<string>", "exec"), sys.modules["__main__"].__dict__)
except SystemExit as end:
    status = end.code or 0
    if not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
except BaseException:
    sys.excepthook(*sys.exc_info())
    status = 1
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)  # without the tenth of a second that clearing PyTorch away takes
"""


@dataclass(frozen=True)
class Done:
    """How a process ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def ran(
    code: str,
    environment: Mapping[str, str] | None = None,
    *,
    strict: bool = True,
    numba: bool = False,
) -> Done:
    """Runs ``code`` in a process of its own, with these variables beside this one's.

    ``strict`` makes errors of warnings, as ``-W error`` does. ``numba`` imports numba beforehand,
    for code that is not about who imports it. Variables that a library reads while PyTorch is
    imported, such as those of OpenMP, come too late here: see ``ran_anew``.
    """
    if not hasattr(os, "fork"):
        return ran_anew(code, environment, strict=strict)
    server = _server(("torch", "numba") if numba else ("torch",))
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        out.touch()
        err.touch()
        request = {
            "code": code,
            "strict": strict,
            "cwd": os.getcwd(),
            "env": _environment(environment),
            "out": str(out),
            "err": str(err),
        }
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        ended = server.stdout.readline()
        if not ended:
            raise RuntimeError(f"the server that forks has ended with status {server.wait()}")
        return Done(int(ended), out.read_text(), err.read_text())


def ran_anew(
    code: str, environment: Mapping[str, str] | None = None, *, strict: bool = True
) -> Done:
    """Runs ``code`` in a process that has imported nothing."""
    done = subprocess.run(
        [sys.executable, *(["-W", "error"] if strict else []), "-c", code],
        env=_environment(environment),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def _environment(own: Mapping[str, str] | None) -> dict[str, str]:
    """This process' variables and modules, whatever folder a test has gone to."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(own or {})}


_servers: dict[tuple[str, ...], subprocess.Popen[str]] = {}


def _server(modules: tuple[str, ...]) -> subprocess.Popen[str]:
    """The server with these modules. One that has ended fails one test, and not all after it."""
    found = _servers.get(modules)
    if found is not None and found.poll() is None:
        return found
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER.format(modules=modules, limit=LIMIT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(None),
        start_new_session=True,  # a test may signal its whole process group
    )
    atexit.register(_end, server)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    _servers[modules] = server
    return server


def _end(server: subprocess.Popen[str]) -> None:
    assert server.stdin is not None
    server.stdin.close()
    server.wait()
