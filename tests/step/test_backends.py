"""The table of backends: who takes the steps where, who is asked for, and who says so."""

from __future__ import annotations

import contextvars
import importlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastddim
from fastddim import DDIM, using
from fastddim.__main__ import main
from fastddim.step import backends, reference
from fastddim.step.backends import TABLE, Backend, available, backend
from fastddim.step.op import initial_noise
from fastddim.tools.folder import Folder
from fastddim.tools.quality import Gaussian
from tests import paths
from tests.cases import some
from tests.paths import forget, has_numba, here, instead, randn
from tests.processes import ran
from tests.refusals import refused

STEPS = torch.tensor(DDIM(5, eta=1.0).table)
BEST = here("numba", "torch")


@pytest.fixture
def _anew() -> Iterator[None]:
    """What the table of this test gives is not remembered."""
    forget()
    yield
    forget()


# The table.


@pytest.mark.parametrize("name", TABLE)
def test_each_line_names_a_module_whose_backend_has_its_name(name: str) -> None:
    if not here(name):
        pytest.skip("numba is missing")
    found = importlib.import_module(TABLE[name].module).BACKEND
    assert isinstance(found, Backend)
    assert found.name == name


def test_the_first_that_runs_on_a_device_takes_its_steps() -> None:
    assert list(TABLE) == ["triton", "numba", "torch"]
    assert TABLE["triton"].devices == ("cuda",)
    assert TABLE["numba"].devices == ("cpu",)
    assert TABLE["torch"].devices is None
    for device in ("cuda", "cuda:1", torch.device("cuda"), torch.device("cuda", 0)):
        assert backend(device).name == "triton"
        assert available(device) == ["triton", "torch"]
    for on_cpu in ("cpu", "cpu:0", torch.device("cpu")):
        assert backend(on_cpu).name == BEST[0]
        assert available(on_cpu) == BEST
    for other in ("mps", "xpu", "meta", torch.device("mps", 0)):
        assert backend(other).name == "torch"
        assert available(other) == ["torch"]


@pytest.mark.parametrize("name", ["torch", *here("numba")])
def test_a_name_given_comes_before_every_other_choice(name: str) -> None:
    with using("torch"):
        assert backend("cpu", name).name == name


@pytest.mark.usefixtures("_anew")
def test_without_numba_pytorch_takes_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastddim.step.on_numba", None)
    assert available("cpu") == ["torch"]
    assert backend("cpu").name == "torch"
    x = randn(2, 3)
    with using("numba"):
        refused(
            lambda: backend("cpu"), ImportError, "backend 'numba' cannot be imported", "on_numba"
        )
        refused(lambda: fastddim.ddim_step(x, x, STEPS, 0), ImportError, "backend 'numba'")


@pytest.mark.usefixtures("_anew")
def test_without_triton_pytorch_takes_a_gpus_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastddim.step.on_triton", None)
    assert available("cuda") == ["torch"]
    assert backend("cuda").name == "torch"


# Asking for one.


def steps_taken_by(name: str) -> bool:
    """Whether a step, bound or not, and the noise are this backend's here."""
    taken: list[str] = []
    x, seeds = randn(2, 3), torch.arange(2)
    with pytest.MonkeyPatch.context() as patch:
        forget()
        for each in here(*paths.ALL):
            module: Any = importlib.import_module(TABLE[each].module)
            own = module.BACKEND

            def bind(*given: Any, own: Backend = own) -> Any:
                taken.append(own.name)
                return own.bind(*given)

            def normal_(*given: Any, own: Backend = own) -> None:
                taken.append(own.name)
                own.normal_(*given)

            patch.setattr(module, "BACKEND", Backend(each, bind, normal_, own.reads, own.in_order))
        fastddim.ddim_step(x, x, STEPS, 0, seeds)
        fastddim.bind(STEPS)(x, x, 0)
        initial_noise(seeds, (2, 3))
        forget()
    assert len(taken) == 3
    return taken == [name] * 3


@pytest.mark.parametrize("name", here(*paths.ALL))
def test_using_has_every_step_and_all_noise_taken_by_one(name: str) -> None:
    with using(name):
        assert backends.chosen() == name
        assert backend("cpu").name == name
        assert steps_taken_by(name)
    assert backends.chosen() is None
    assert steps_taken_by(BEST[0])


def test_using_may_be_nested_and_ends_with_its_block() -> None:
    with using("torch"):
        with using("triton"):
            assert backend("cpu").name == "triton"
            with pytest.raises(RuntimeError, match="model"), using("torch"):
                raise RuntimeError("model")
            assert backend("cpu").name == "triton"
        assert backend("cpu").name == "torch"
    assert backend("cpu").name == BEST[0]


def test_using_is_of_one_thread_and_of_its_context() -> None:
    found: dict[str, str] = {}

    def look(key: str) -> None:
        found[key] = backend("cpu").name

    with using("triton"):
        copied = contextvars.copy_context()
        threads = [
            threading.Thread(target=look, args=("alone",)),
            threading.Thread(target=copied.run, args=(look, "in the context")),
        ]
        for thread in threads:
            thread.start()
            thread.join()
        look("here")
    assert found == {"alone": BEST[0], "in the context": "triton", "here": "triton"}


def test_a_bound_step_stays_with_its_backend() -> None:
    x, seeds = randn(2, 300), torch.arange(2)
    with using("torch"):
        step = fastddim.bind(STEPS)
        expected = step(x, x, 0, seeds)[0]
    assert torch.equal(step(x, x, 0, seeds)[0], expected)
    assert torch.equal(step(x[:1], x[:1], 0, seeds[:1])[0], expected[:1])  # another layout
    if has_numba():
        assert not torch.equal(fastddim.ddim_step(x, x, STEPS, 0, seeds)[0], expected)


@pytest.mark.parametrize("name", ["nonsense", "", None, 3, "Torch", ("torch",), "x" * 100])
def test_a_name_that_is_none_is_refused(name: Any) -> None:
    def enter() -> None:
        with using(name):
            pytest.fail("entered")

    error = ValueError
    refused(enter, error, "using must name one of triton, numba, torch, got ")
    assert backends.chosen() is None


def test_a_backend_that_cannot_run_on_the_device_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = randn(2, 3)
    forget()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with using("triton"):
        said = f"backend must be one that runs on cpu ({', '.join(BEST)}), got 'triton'"
        refused(lambda: backend("cpu"), ValueError, said)
        refused(lambda: fastddim.ddim_step(x, x, STEPS, 0), ValueError, said)
        refused(lambda: fastddim.bind(STEPS)(x, x, 0), ValueError, said)
        refused(lambda: DDIM(2).sample(lambda x, t: x, x), ValueError, said)
        refused(lambda: initial_noise(torch.arange(2), (2, 3)), ValueError, said)
    with using("numba"):
        refused(
            lambda: backend("cuda:0"),
            ValueError,
            "backend must be one that runs on cuda (triton, torch), got 'numba'",
        )
        refused(
            lambda: backend("mps"),
            ValueError,
            "backend must be one that runs on mps (torch), got 'numba'",
        )
    monkeypatch.undo()
    with using("triton"):
        assert backend("cpu").name == "triton"  # by the interpreter


# The environment.


def run(code: str, **env: str) -> tuple[int, str]:
    done = ran(code, env)
    return done.returncode, (done.stdout or done.stderr).strip().splitlines()[-1]


LOOK = """
import fastddim, torch
from fastddim.step import backends
x = torch.ones(2, 3)
fastddim.ddim_step(x, x, torch.tensor(fastddim.DDIM(5).table), 0)
found = [backends.backend("cpu").name]
with fastddim.using("triton"):
    found.append(backends.backend("cpu").name)
print(*found, *backends.available("cpu"))
"""


@pytest.mark.parametrize("name", some(["torch", "triton"], 2))
def test_the_environment_names_the_backend_of_a_process(name: str) -> None:
    given = {"FASTDDIM_BACKEND": name, "TRITON_INTERPRET": "1"}
    assert run(LOOK, **given) == (0, " ".join([name, "triton", *BEST]))


@pytest.mark.slow
def test_an_empty_variable_names_none() -> None:
    given = {"FASTDDIM_BACKEND": "", "TRITON_INTERPRET": "1"}
    assert run(LOOK, **given) == (0, " ".join([BEST[0], "triton", *BEST]))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nonsense", "ValueError: FASTDDIM_BACKEND must name one of triton, numba, torch, got "),
        ("triton", f"ValueError: backend must be one that runs on cpu ({', '.join(BEST)}), got "),
    ],
)
def test_nonsense_in_the_environment_is_said_at_the_first_step(name: str, said: str) -> None:
    status, last = run(LOOK, FASTDDIM_BACKEND=name, TRITON_INTERPRET="0")
    assert status == 1
    assert last == f"{said}{name!r}"


MISSING = (
    """
import sys
sys.modules["numba"] = None
"""
    + LOOK
)


def test_a_process_without_numba_takes_its_steps_by_pytorch() -> None:
    given = {"FASTDDIM_BACKEND": "", "TRITON_INTERPRET": "1"}
    assert run(MISSING, **given) == (0, "torch triton torch")
    status, last = run(MISSING, FASTDDIM_BACKEND="numba")
    assert status == 1
    assert last.startswith("ImportError: backend 'numba' cannot be imported here: ")
    status, last = run(LOOK, FASTDDIM_BACKEND="numba", NUMBA_DISABLE_JIT="1")
    assert status == 1
    assert last.startswith("ImportError: backend 'numba' cannot be imported here: ")


# Who says what ran.


@pytest.mark.parametrize("name", here(*paths.ALL))
def test_a_manifest_names_what_took_the_steps(name: str, tmp_path: Path) -> None:
    with using(name):
        fastddim.generate(
            DDIM(2, eta=1.0),
            Gaussian(0.0, 0.5),
            out=tmp_path / "out",
            seeds=range(2),
            shape=(1, 2, 2),
            batch_size=2,
            device="cpu",
        )
    assert Folder.read(tmp_path / "out").recipe["backend"] == f"cpu, {name}"


SAID = {
    "triton": "a step is one Triton kernel",
    "numba": "a step is one pass compiled by numba",
    "torch": "a step is PyTorch's own operations",
    "another": "a step is taken by another",
}


@pytest.mark.parametrize("name", here(*paths.ALL))
def test_info_names_what_takes_the_steps(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with using(name):
        assert main(["info", "--device", "cpu"]) == 0
    assert f"; {SAID[name]}\n" in capfd.readouterr().out


def test_info_says_where_the_backend_asked_for_takes_no_step(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with using("triton"):
        forget()
        assert main(["info", "--device", "cpu"]) == 0
    forget()
    why = f"backend must be one that runs on cpu ({', '.join(BEST)}), got 'triton'"
    assert f"; no step can be taken: {why}\n" in capfd.readouterr().out


def test_info_names_a_backend_that_was_added(capfd: pytest.CaptureFixture[str]) -> None:
    with instead(Backend("another", lambda *_: lambda *_: None, lambda *_: None)):
        assert main(["info", "--device", "cpu"]) == 0
    assert f"; {SAID['another']}\n" in capfd.readouterr().out


@pytest.mark.parametrize("name", here(*paths.ALL))
def test_describe_names_what_takes_the_steps(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with using(name):
        DDIM(2).describe()
        DDIM(2).describe(torch.device("cpu"))
    of_default, of_cpu = capsys.readouterr().out.split("DDIM: ")[1:]
    assert of_default == of_cpu
    assert of_cpu.splitlines()[0].endswith(f", 2 model calls, steps on cpu by {name}")


def test_describe_names_what_takes_the_steps_on_another_device(
    capsys: pytest.CaptureFixture[str],
) -> None:
    DDIM(2).describe("meta")
    with torch.device("meta"):
        DDIM(2).describe()
    assert capsys.readouterr().out.count("steps on meta by torch\n") == 2
    refused(
        lambda: DDIM(2).describe("nonsense"), ValueError, "device must be one that torch can use"
    )


def test_describe_names_the_backend_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    taken: list[str] = []
    real = backend("cpu", "torch")

    def bind(*first: Any) -> Any:
        launch = real.bind(*first)

        def noted(*given: Any) -> None:
            taken.append("another")
            launch(*given)

        return noted

    ddim = DDIM(3)
    with instead(Backend("another", bind, real.normal_)):
        ddim.describe()
        assert not taken
        ddim.sample(lambda x, t: x, torch.ones(1, 2))
    assert taken == ["another"] * 3
    assert "steps on cpu by another\n" in capsys.readouterr().out


# Adding one.


def other_backends(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    for name in here(*paths.ALL):
        with using(name):
            yield name, fastddim.ddim_step(x, x, STEPS, 2)[0]


def test_every_backend_gives_the_same_bits() -> None:
    x = randn(3, 5, 7)
    expected = reference.ddim_step(x, x, STEPS[2])[0]
    for name, found in other_backends(x):
        assert torch.equal(found, expected), name
