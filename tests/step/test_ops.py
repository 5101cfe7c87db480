"""The torch op: what torch expects of one, and what a caller who errs is told."""

from __future__ import annotations

import re
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastddim
from fastddim import DDIM
from fastddim.step import on_triton
from fastddim.step.op import initial_noise
from tests.cases import some
from tests.paths import ALL, use

TABLE = torch.tensor(DDIM(steps=50, eta=1.0).table)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def op_arguments(
    shape: tuple[int, ...] = (2, 3, 4, 4),
    dtype: torch.dtype = torch.float32,
    noise: str = "none",
    prediction: int = 0,
    clip: float | None = None,
    want_x0: bool = True,
    layout: torch.memory_format = torch.contiguous_format,
    guided: bool = False,
    threshold: bool = False,
    next_dtype: torch.dtype | None = None,
    next_inputs: int = 1,
    posterior: bool = False,
) -> tuple[Any, ...]:
    x, output, z = (randn(*shape, seed=i) for i in range(3))
    if guided:
        output = torch.cat([output, z])
    x, output = (t.contiguous(memory_format=layout) for t in (x, output.to(dtype)))
    return (
        x,
        output,
        TABLE,
        rows(3, 40),
        torch.tensor([1, 2**40]) if noise == "counter" else None,
        z if noise == "tensor" else None,
        torch.tensor([1.5, 7.5]) if guided else None,
        torch.tensor([1.0, 1.2]) if threshold else None,
        prediction,
        True,
        clip,
        threshold,
        torch.zeros_like(x),
        torch.zeros_like(x) if want_x0 else None,
        None
        if next_dtype is None
        else torch.cat([torch.zeros_like(x)] * next_inputs).to(next_dtype),
        *((None, None, True) if posterior else ()),
    )


SAMPLES: dict[str, tuple[Any, ...]] = {
    "plain": op_arguments(),
    "counter noise": op_arguments(noise="counter"),
    "tensor noise, v, clip": op_arguments(noise="tensor", prediction=1, clip=1.0),
    "bfloat16, sample, no x0": op_arguments(dtype=torch.bfloat16, prediction=2, want_x0=False),
    "flow": op_arguments(noise="tensor", prediction=3),
    "posterior": op_arguments(noise="tensor", prediction=1, clip=1.0, posterior=True),
    "channels_last": op_arguments(noise="counter", layout=torch.channels_last),
    "guidance, next input": op_arguments(guided=True, next_dtype=torch.bfloat16),
    "threshold": op_arguments(threshold=True),
    "everything": op_arguments(
        dtype=torch.float16,
        noise="counter",
        prediction=1,
        layout=torch.channels_last,
        guided=True,
        threshold=True,
        next_dtype=torch.float16,
        next_inputs=2,
    ),
}


@pytest.mark.parametrize("sample", some(reversed(SAMPLES), 3))
def test_the_step_passes_opcheck(sample: str) -> None:
    torch.library.opcheck(torch.ops.fastddim.ddim_step.default, SAMPLES[sample])


@pytest.mark.parametrize("stream", [0, 1])
def test_the_noise_passes_opcheck(stream: int) -> None:
    arguments = (torch.zeros(2, 3, 5), torch.tensor([1, 2**40]), rows(0, 4), stream)
    torch.library.opcheck(torch.ops.fastddim.normal_.default, arguments)


@pytest.mark.parametrize("backend", ALL)
def test_versions_are_bumped_for_written_tensors_alone(backend: str) -> None:
    arguments = op_arguments(noise="counter", next_dtype=torch.float16)
    before = [t._version for t in arguments if isinstance(t, Tensor)]
    with use(backend):
        torch.ops.fastddim.ddim_step(*arguments)
    after = [t._version for t in arguments if isinstance(t, Tensor)]
    bumped = [b - a for a, b in zip(before, after, strict=True)]
    assert [n > 0 for n in bumped] == [False] * 5 + [True, True, True]
    out = torch.zeros(2, 3)
    with use(backend):
        torch.ops.fastddim.normal_(out, torch.arange(2), rows(0, 0), 1)
    assert out._version > 0


def step(
    x: Tensor, output: Tensor, row: Tensor, seeds: Tensor, **options: Any
) -> tuple[Tensor, Tensor | None]:
    return fastddim.ddim_step(x, output, TABLE, row, seeds, clip=1.0, **options)


def noisy_loop(net: torch.nn.Module, x: Tensor, seeds: Tensor) -> Tensor:
    for row in range(3):
        x, _ = fastddim.ddim_step(x, net(x), TABLE, row, seeds, want_x0=False)
    return x


@pytest.fixture
def _fresh_compiler() -> None:
    """Nothing compiled by another test is left to be found."""
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    "options", [{}, {"prediction": "flow"}, {"posterior": True, "noise_first": False}]
)
def test_a_compiled_step_equals_the_eager_one(options: dict[str, Any]) -> None:
    x, output, seeds = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1), torch.tensor([1, 2**40])
    compiled = torch.compile(partial(step, **options), fullgraph=True, backend="aot_eager")
    for row in (rows(3, 40), rows(49, 0)):
        found = compiled(x, output, row, seeds)
        expected = step(x, output, row, seeds, **options)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert not options or not torch.equal(found[0], step(x, output, row, seeds)[0])


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_model_and_step_equal_the_eager_ones() -> None:
    assert_compiled_loop_equals_eager("aot_eager")


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own, of Python's
def test_inductor_equals_eager() -> None:
    assert_compiled_loop_equals_eager("inductor")


def assert_compiled_loop_equals_eager(backend: str) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()).requires_grad_(False)
    x, seeds = randn(2, 8), torch.tensor([1, 2])
    kept = x.clone()
    compiled = torch.compile(noisy_loop, fullgraph=True, backend=backend)
    with torch.no_grad():
        found = compiled(net, x, seeds)
    expected = noisy_loop(net, x, seeds)
    if backend == "inductor":  # its tanh rounds otherwise than eager's
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    else:
        assert torch.equal(found, expected)
    assert torch.equal(x, kept)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_noise_equals_the_eager_one() -> None:
    def f(seeds: Tensor) -> Tensor:
        return initial_noise(seeds, (2, 3, 5)) * 2

    seeds = torch.tensor([1, 2**40])
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(seeds), f(seeds))


def test_fake_tensors_have_the_shapes_of_real_ones() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
        output = torch.empty(2, 3, 4, 4, dtype=torch.bfloat16)
        table, seeds = torch.empty(50, 7), torch.empty(2, dtype=torch.int64)
        x_s, x0 = fastddim.ddim_step(x, output, table, 3, seeds)
        assert x0 is not None
        assert x_s.shape == x0.shape == x.shape
        assert x_s.dtype == x0.dtype == torch.float32
        assert x_s.stride() == x.stride()
        assert fastddim.ddim_step(x, output, table, 3, want_x0=False)[1] is None
        assert initial_noise(seeds, (2, 5)).shape == (2, 5)
        # Both halves of guidance, each with a variance, and the next model input of both.
        stacked = torch.empty(4, 6, 4, 4, dtype=torch.bfloat16)
        next_input = torch.empty(4, 3, 4, 4, dtype=torch.bfloat16)
        guided, _ = fastddim.ddim_step(
            x,
            stacked,
            table,
            3,
            guidance=7.5,
            threshold=torch.ones(2),
            rederive=True,
            next_input=next_input,
        )
        assert guided.shape == x.shape


def test_meta_tensors_are_no_device_of_their_own() -> None:
    x = torch.empty(2, 3, device="meta")
    with pytest.raises((NotImplementedError, ValueError)):
        fastddim.ddim_step(x, torch.empty(2, 3), TABLE, 0)


# What is changed in a good call, the error and what its one line says.
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x no tensor": ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    "x dtype": ({"x": randn(2, 3).double()}, TypeError, "x must be float32, got float64"),
    "x bfloat16": ({"x": randn(2, 3).bfloat16()}, TypeError, "x must be float32, got bfloat16"),
    "x without batch": ({"x": torch.tensor(1.0)}, ValueError, "x must have shape (batch, ...)"),
    "output no tensor": ({"output": None}, TypeError, "output must be a tensor, got NoneType"),
    "output shape": (
        {"output": randn(2, 4)},
        ValueError,
        "output must have shape (2, 3), got (2, 4)",
    ),
    "output rank": ({"output": randn(2)}, ValueError, "output must have shape (2, 3), got (2,)"),
    "output dtype": (
        {"output": randn(2, 3).double()},
        TypeError,
        "output must be float32 or bfloat16 or float16, got float64",
    ),
    "output device": (
        {"output": torch.empty(2, 3, device="meta")},
        ValueError,
        "output must be on cpu with x, got meta",
    ),
    "table no tensor": ({"table": TABLE.numpy()}, TypeError, "table must be a tensor, got ndarray"),
    "table columns": (
        {"table": TABLE[:, :6]},
        ValueError,
        "table must have shape (steps, 7), got (50, 6)",
    ),
    "table dtype": ({"table": TABLE.double()}, TypeError, "table must be float32, got float64"),
    "table device": ({"table": TABLE.to("meta")}, ValueError, "table must be on cpu with x"),
    "rows too large": ({"rows": 50}, ValueError, "rows must be an integer in [0, 49], got 50"),
    "rows negative": ({"rows": -1}, ValueError, "rows must be an integer in [0, 49], got -1"),
    "rows float": ({"rows": 1.0}, TypeError, "rows must be an integer in [0, 49], got 1.0"),
    "rows bool": ({"rows": True}, TypeError, "rows must be an integer in [0, 49], got True"),
    "rows dtype": ({"rows": torch.tensor([1, 2])}, TypeError, "rows must be int32, got int64"),
    "rows shape": ({"rows": rows(1, 2, 3)}, ValueError, "rows must have shape (2,), got (3,)"),
    "rows tensor too large": ({"rows": rows(1, 50)}, ValueError, "rows must lie in [0, 50)"),
    "rows tensor negative": ({"rows": rows(-1, 3)}, ValueError, "rows must lie in [0, 50)"),
    "one row too large": (
        {"rows": torch.tensor(50, dtype=torch.int32)},
        ValueError,
        "rows must lie in [0, 50), got 50 to 50",
    ),
    "rows device": ({"rows": rows(1, 2).to("meta")}, ValueError, "rows must be on cpu with x"),
    "seeds no tensor": ({"seeds": [1, 2]}, TypeError, "seeds must be a tensor, got list"),
    "seeds dtype": ({"seeds": rows(1, 2)}, TypeError, "seeds must be int64, got int32"),
    "seeds shape": (
        {"seeds": torch.arange(3)},
        ValueError,
        "seeds must have shape (2,), got (3,)",
    ),
    "seeds device": (
        {"seeds": torch.arange(2, device="meta")},
        ValueError,
        "seeds must be on cpu with x, got meta",
    ),
    "seeds and noise": (
        {"seeds": torch.arange(2), "noise": randn(2, 3)},
        ValueError,
        "noise comes from seeds or from a tensor, got both",
    ),
    "noise no tensor": ({"noise": 1.0}, TypeError, "noise must be a tensor, got float"),
    "noise shape": ({"noise": randn(3)}, ValueError, "noise must have shape (2, 3), got (3,)"),
    "noise dtype": ({"noise": randn(2, 3).half()}, TypeError, "noise must be float32, got float16"),
    "prediction": (
        {"prediction": "eps"},
        ValueError,
        "prediction must be one of epsilon, v, sample, flow, got 'eps'",
    ),
    "posterior and rederive": (
        {"posterior": True, "rederive": True},
        ValueError,
        "rederive must be False with posterior, whose sum holds no ε, got True",
    ),
    "clip zero": ({"clip": 0.0}, ValueError, "clip must be > 0, got 0"),
    "clip negative": ({"clip": -1.0}, ValueError, "clip must be > 0, got -1"),
    "clip nan": ({"clip": float("nan")}, ValueError, "clip must be finite, got nan"),
    "clip infinite": ({"clip": float("inf")}, ValueError, "clip must be finite, got inf"),
    "clip no number": ({"clip": "1"}, TypeError, "clip must be a number, got '1'"),
    "guidance nan": ({"guidance": float("nan")}, ValueError, "guidance must be finite, got nan"),
    "guidance without halves": (
        {"guidance": 2.0},
        ValueError,
        "output must have shape (4, 3), got (2, 3)",
    ),
    "guidance shape": (
        {"guidance": randn(3), "output": randn(4, 3)},
        ValueError,
        "guidance must have shape (2,), got (3,)",
    ),
    "guidance dtype": (
        {"guidance": randn(2).double(), "output": randn(4, 3)},
        TypeError,
        "guidance must be float32, got float64",
    ),
    "guidance no number": (
        {"guidance": "7.5", "output": randn(4, 3)},
        TypeError,
        "guidance must be a number, got '7.5'",
    ),
    "guidance infinite": (
        {"guidance": float("inf"), "output": randn(4, 3)},
        ValueError,
        "guidance must be finite, got inf",
    ),
    "guidance dimensions": (
        {"guidance": randn(2, 1), "output": randn(4, 3)},
        ValueError,
        "guidance must have shape (2,), got (2, 1)",
    ),
    "guidance device": (
        {"guidance": torch.empty(2, device="meta"), "output": randn(4, 3)},
        ValueError,
        "guidance must be on cpu with x, got meta",
    ),
    "halves without guidance": (
        {"output": randn(4, 3)},
        ValueError,
        "output must have shape (2, 3), got (4, 3)",
    ),
    "threshold no tensor": ({"threshold": 1.0}, TypeError, "threshold must be a tensor, got float"),
    "threshold shape": (
        {"threshold": randn(2, 1)},
        ValueError,
        "threshold must have shape (2,), got (2, 1)",
    ),
    "threshold dtype": (
        {"threshold": randn(2).double()},
        TypeError,
        "threshold must be float32, got float64",
    ),
    "threshold device": (
        {"threshold": torch.empty((), device="meta")},
        ValueError,
        "threshold must be on cpu with x, got meta",
    ),
    "threshold and clip": (
        {"threshold": randn(2), "clip": 1.0},
        ValueError,
        "clip must be left out where there is a threshold, got 1",
    ),
    "next_input shape": (
        {"next_input": randn(3, 3)},
        ValueError,
        "next_input must have shape (4, 3), got (3, 3)",
    ),
    "next_input dtype": (
        {"next_input": randn(2, 3).double()},
        TypeError,
        "next_input must be float32 or bfloat16 or float16, got float64",
    ),
    "next_input no tensor": (
        {"next_input": torch.float16},
        TypeError,
        "next_input must be a tensor, got dtype",
    ),
    "next_input device": (
        {"next_input": torch.empty(2, 3, device="meta")},
        ValueError,
        "next_input must be on cpu with x, got meta",
    ),
    "next_input dimensions": (
        {"next_input": randn(2)},
        ValueError,
        "next_input must have shape (2, 3), got (2,)",
    ),
    "two next_inputs' shape": (
        {"next_input": randn(4, 4)},
        ValueError,
        "next_input must have shape (4, 3), got (4, 4)",
    ),
    "noise device": (
        {"noise": torch.empty(2, 3, device="meta")},
        ValueError,
        "noise must be on cpu with x, got meta",
    ),
    "learned variance of no channels": (
        {"output": randn(2, 6)},
        ValueError,
        "output must have shape (2, 3), got (2, 6)",
    ),
    "learned variance and another": (
        {"x": randn(2, 3, 4), "output": randn(2, 9, 4)},
        ValueError,
        "output must have shape (2, 3, 4), got (2, 9, 4)",
    ),
    "out no tensor": ({"out": 1}, TypeError, "out must be a tensor, got int"),
    "out shape": ({"out": randn(3, 2)}, ValueError, "out must have shape (2, 3), got (3, 2)"),
    "out dtype": ({"out": randn(2, 3).half()}, TypeError, "out must be float32, got float16"),
    "out device": (
        {"out": torch.empty(2, 3, device="meta")},
        ValueError,
        "out must be on cpu with x, got meta",
    ),
    **{
        f"{name} requires grad": (
            {name: tensor.clone().requires_grad_()},
            ValueError,
            f"{name} requires grad, which the step does not carry: detach it",
        )
        for name, tensor in {
            "x": randn(2, 3),
            "output": randn(2, 3),
            "table": TABLE,
            "noise": randn(2, 3),
            "threshold": randn(2),
            "out": randn(2, 3),
            "next_input": randn(2, 3),
        }.items()
    },
    "guidance requires grad": (
        {"guidance": randn(2).requires_grad_(), "output": randn(4, 3)},
        ValueError,
        "guidance requires grad, which the step does not carry: detach it",
    ),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_named_in_one_line(case: str) -> None:
    change, error, message = BAD[case]
    good: dict[str, Any] = {"x": randn(2, 3), "output": randn(2, 3), "table": TABLE, "rows": 0}
    fastddim.ddim_step(**good)
    with pytest.raises(error, match="^" + re.escape(message)) as caught:
        fastddim.ddim_step(**(good | change))
    assert "\n" not in str(caught.value)
    assert type(caught.value) is error


def test_an_object_equal_to_an_accepted_number_is_refused() -> None:
    x = randn(2, 3)
    fastddim.ddim_step(x, x, TABLE, 0, clip=1.0)
    with pytest.raises(TypeError, match="clip must be a number, got True"):
        fastddim.ddim_step(x, x, TABLE, 0, clip=True)
    fastddim.ddim_step(x, torch.cat([x, x]), TABLE, 0, guidance=1.0)
    with pytest.raises(TypeError, match="guidance must be a number, got True"):
        fastddim.ddim_step(x, torch.cat([x, x]), TABLE, 0, guidance=True)
    for row in (True, 1.0):
        with pytest.raises(TypeError, match="rows must be an integer"):
            fastddim.ddim_step(x, x, TABLE, row)  # type: ignore[arg-type]


def test_grad_is_no_error_where_it_is_off() -> None:
    x = randn(2, 3).requires_grad_()
    with torch.no_grad():
        x_s, _ = fastddim.ddim_step(x, x, TABLE, 0)
    assert not x_s.requires_grad


def test_the_op_runs_where_inference_mode_is_on() -> None:
    x, output = randn(2, 3), randn(2, 3, seed=1)
    expected = fastddim.ddim_step(x, output, TABLE, 0, torch.arange(2))[0]
    with torch.inference_mode():
        assert torch.equal(fastddim.ddim_step(x, output, TABLE, 0, torch.arange(2))[0], expected)


@pytest.mark.parametrize(
    ("triton", "major", "warned"), [("3.6.0", 10, True), ("3.6.0", 9, False), ("3.7.1", 10, False)]
)
def test_an_inexact_step_on_blackwell_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, triton: str, major: int, warned: bool
) -> None:
    monkeypatch.setattr("triton.__version__", triton)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (major if i else 8, 0))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        on_triton._warn_where_steps_are_rounded_otherwise()
    assert [str(w.message).partition(",")[0] for w in found] == (
        ["Triton 3.6.0 fuses multiplies and adds on a Blackwell GPU"] if warned else []
    )
