"""Threads that share the fused pass, forks, and where the pass is used."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastddim
from fastddim.step import backends
from fastddim.step.philox import INITIAL_STREAM
from tests.cases import some
from tests.processes import ran_anew

numba = pytest.importorskip("numba", reason="the fused pass needs the cpu extra: numba")
from fastddim.step import on_numba  # noqa: E402
from tests.step.fused import TABLE, randn, rows_of, run, step  # noqa: E402

# --- Threads ----------------------------------------------------------------------------------

BIG = (3, 7 * 9981)  # tasks begin in the middle of samples, of chunks and of quads


def big_step(layout: str = "flat", noise_first: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    x, output = randn(*BIG).view(3, 7, -1), randn(*BIG, seed=1).view(3, 7, -1)
    if layout == "channels_last":
        x, output = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, output))
    out, x0 = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
    args = (x, output, TABLE, rows_of(3, [0, 20, 49]), torch.tensor([5, 2**40, 6]))
    step(*args, None, None, None, 0, noise_first, 1.0, False, out, x0)
    noise = torch.full(BIG, float("nan"))
    on_numba.normal_(noise, torch.tensor([5, 2**40, 6]), rows_of(3, 0), INITIAL_STREAM)
    return out, x0, noise


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets threads share small calls, and lists how many were asked for each."""
    asked: list[int] = []
    team = on_numba.team
    if team is None:
        pytest.skip("this PyTorch is built without OpenMP")
    run = team.run

    def counted(function: Any, call: Any, threads: int) -> None:
        asked.append(threads)
        run(function, call, threads)

    monkeypatch.setattr(team, "run", counted)
    monkeypatch.setattr(on_numba, "SHARED", 1)
    monkeypatch.setattr(on_numba, "NOISY_SHARED", 1)
    return asked


@pytest.mark.parametrize(
    "case", [("flat", True), ("flat", False), ("channels_last", True)], ids=str
)
def test_any_number_of_threads_gives_the_same(
    case: tuple[str, bool], shared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    expected = big_step(*case)
    assert not shared
    assert all(t.isfinite().all() for t in expected)
    for threads in (2, 3, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        shared.clear()
        for found, want in zip(big_step(*case), expected, strict=True):
            assert torch.equal(found, want)
        assert shared == [threads, threads]
    monkeypatch.setattr(on_numba, "team", None)
    for found, want in zip(big_step(*case), expected, strict=True):
        assert torch.equal(found, want)


def test_small_calls_are_not_shared(shared: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(on_numba, "SHARED", 3 * BIG[1] + 1)
    monkeypatch.setattr(on_numba, "NOISY_SHARED", 3 * BIG[1])
    x = randn(*BIG)
    args = (x, x, TABLE, rows_of(3, 4), None, None, None, None, 0, True, None, False)
    step(*args, torch.empty_like(x), None)
    assert not shared
    monkeypatch.setattr(on_numba, "SHARED", 3 * BIG[1])
    step(*args, torch.empty_like(x), None)
    big_step()
    assert shared == [2, 2, 2]


def test_rows_outside_the_table_are_refused_by_threads_too(
    shared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x, out = randn(*BIG), torch.full(BIG, 7.0)
    for rows in ([0, 50, 1], [0, -1, 1]):
        args = (x, x, TABLE, rows_of(3, rows), None, None, None, None, 0, True, None, False)
        with pytest.raises(ValueError, match=r"rows must lie in \[0, 50\), got "):
            step(*args, out, None)
    assert shared == [2, 2]
    assert (out == 7).all()


SHARING = """
import os, sys, numpy as np, torch, fastddim
from fastddim.step import backends, on_numba
from fastddim.step.bound import Bound
torch.set_num_threads(2)
n = 1 << 18
x, out = torch.randn(2, n), torch.empty(2, n)
alone, table = torch.empty(2, n), torch.tensor(fastddim.DDIM(steps=5).table)
rows = torch.ones(1, dtype=torch.int32).expand(2)
assert 2 * n >= on_numba.SHARED

def step(out):
    Bound(on_numba.BACKEND, backends.Fixed())(
        x, x, table, rows, None, None, None, None, out, None, None
    )

team, on_numba.team = on_numba.team, None
step(alone)
on_numba.team = team
"""


def shared_by(code: str, **env: str) -> str:
    """What a process prints in which PyTorch's threads share a step: not one of this process."""
    if on_numba.team is None:
        pytest.skip("this PyTorch is built without OpenMP")
    return run_anew(SHARING + code, **env) if env else run(SHARING + code)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_the_threads_are_pytorchs_own() -> None:
    counted = """
torch.add(x, x, out=out)
threads = len(os.listdir('/proc/self/task'))
step(out)
print(len(os.listdir('/proc/self/task')) - threads, threads > 1, torch.equal(out, alone))
"""
    assert shared_by(counted) == "0 True True"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_fewer_threads_than_were_asked_for_do_it_all() -> None:
    few = """
threads = len(os.listdir('/proc/self/task'))
torch.get_num_threads = lambda: 5
out.fill_(float('nan'))
step(out)
print(torch.equal(out, alone), len(os.listdir('/proc/self/task')) - threads <= 1)
"""
    assert shared_by(few, OMP_THREAD_LIMIT="2") == "True True"


def test_several_python_threads_at_once() -> None:
    at_once = """
import threading
outs = [torch.full_like(out, float('nan')) for _ in range(4)]
callers = [threading.Thread(target=step, args=(o,)) for o in outs]
[caller.start() for caller in callers]
[caller.join() for caller in callers]
print([torch.equal(o, alone) for o in outs])
"""
    assert shared_by(at_once) == str([True] * 4)


FORKED = """
import warnings
warnings.simplefilter('ignore')  # Python warns of a fork beside threads, and rightly
torch.add(x, x, out=out)  # PyTorch's threads are there, and will not be in the child
{before}
pid = os.fork()
if pid == 0:
    out.numpy()[:] = 0  # PyTorch itself would wait
    step(out)
    os._exit(0 if np.array_equal(out, alone) else 1)
print(os.waitpid(pid, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("before", some(["step(out)", ""], 2))
def test_a_forked_child_does_it_alone(before: str) -> None:
    assert shared_by(FORKED.format(before=before)) == "0"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_that_compiles_first_works_alone() -> None:
    first = """
import os, torch, fastddim, numpy as np
from fastddim.step import backends
from fastddim.step.bound import Bound
n = 1 << 18
x, table = torch.randn(2, n), torch.tensor(fastddim.DDIM(steps=5).table)
out, rows = torch.add(x, x), torch.ones((), dtype=torch.int32)
args = x, x, table, rows.expand(2), None, None, None, None, out, None, None
import warnings
warnings.simplefilter('ignore')
pid = os.fork()
if pid == 0:
    Bound(backends.backend("cpu", {name!r}), backends.Fixed())(*args)
    os._exit(0 if np.isfinite(out.numpy()).all() else 1)
print(os.waitpid(pid, 0)[1])
"""
    assert run(first.format(name="numba"), numba=False) == "0"
    assert run(first.format(name="torch"), numba=False) == "0"


@pytest.mark.slow  # the threads of two processes wait for each other on two cores
def test_threads_flush_denormals_as_their_caller_does() -> None:
    denormal = """
if not torch.set_flush_denormal(True):
    print('[]')  # no such mode on this processor
    sys.exit()
torch.set_flush_denormal(False)
x.fill_(1e-39)
step(alone)
torch.add(x, x, out=out)  # PyTorch's threads are there from now on
found = []
for flush in (True, False, True):
    torch.set_flush_denormal(flush)
    torch.mul(x, 1.0, out=out)
    before = out.view(torch.int32).clone()
    bits = set()
    for _ in range(20):  # on a busy machine one thread may do it all
        step(out)
        bits |= set(out.view(torch.int32).unique().tolist())
    found += [len(bits), int(any(bits))]
    torch.mul(x, 1.0, out=out)
    assert torch.equal(out.view(torch.int32), before)  # PyTorch's threads are as they were
print(found)
"""
    assert shared_by(denormal) in ("[1, 0, 1, 1, 1, 0]", "[]")


def test_a_step_without_memory_for_its_chunks_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Undone:
        def __call__(self, address: int) -> None: ...

    undone = SimpleNamespace(ctypes=Undone())
    monkeypatch.setattr(on_numba, "part_of", lambda rounding: undone)
    x = randn(2, 3)
    with pytest.raises(MemoryError, match="no memory"):
        step(x, x, TABLE, rows_of(2, 4), None, None, None, None, 0, True, None, False, x, None)


# --- Where it is used -------------------------------------------------------------------------


def test_the_op_takes_the_fused_pass_where_numba_is() -> None:
    assert backends.backend("cpu") is on_numba.BACKEND
    x, output, seeds = randn(2, 3, 8, 8), randn(2, 3, 8, 8, seed=1), torch.tensor([1, 2])
    found, x0 = fastddim.ddim_step(x, output, TABLE, 3, seeds)
    out, x0_out = torch.empty_like(x), torch.empty_like(x)
    args = (x, output, TABLE, rows_of(2, 3), seeds, None, None, None)
    step(*args, 0, True, None, False, out, x0_out)
    assert torch.equal(found, out)
    assert x0 is not None
    assert torch.equal(x0, x0_out)
    assert not torch.equal(found, fastddim.ddim_step(x, output, TABLE, 3)[0])


def run_anew(code: str, **env: str) -> str:
    done = ran_anew(code, env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


STEP_ONCE = """
import sys, torch, fastddim
from fastddim import DDIM
from fastddim.step import backends
assert 'numba' not in sys.modules, 'numba came with the package'
{first}
x = torch.ones(2, 3)
fastddim.ddim_step(x, x, torch.tensor(DDIM(steps=5, eta=1.0).table), 1, torch.tensor([1, 2]))
print('numba' in backends.available('cpu'), 'numba' in sys.modules)
"""


@pytest.mark.slow
def test_numba_is_imported_at_the_first_step_and_may_be_missing() -> None:
    assert run_anew(STEP_ONCE.format(first="")) == "True True"
    missing = "sys.modules['numba'] = None"
    assert run_anew(STEP_ONCE.format(first=missing)) == "False True"
    assert run_anew(STEP_ONCE.format(first=""), NUMBA_DISABLE_JIT="1") == "False True"


@pytest.mark.slow
def test_without_a_cache_folder_code_is_compiled_anew() -> None:
    nowhere = """
from numba.core import caching
caching.CacheImpl._locator_classes = []
"""
    assert run_anew(STEP_ONCE.format(first=nowhere)) == "True True"
    assert run_anew(STEP_ONCE.format(first=""), NUMBA_CACHE_DIR="/proc/nowhere") == "True True"
