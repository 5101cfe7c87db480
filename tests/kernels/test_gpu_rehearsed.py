"""The GPU tests of the kernels on a CPU, interpreted: a fault of a test must not wait for a GPU."""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fastddim import using
from tests import gpu_steps
from tests.rehearsal import faked

MODULES = [importlib.import_module(name) for name in ("test_gpu", "test_gpu_graphs")]
SMALL = 1 << 8
"""Replaces ``gpu_steps.LARGE``: the interpreter takes a second for some thousand elements."""
QUICK: dict[str, list[dict[str, Any]]] = {
    "test_channels_last_and_contiguous_draw_the_same_noise": [{"shape": (3, 3, 5, 7)}],
    "test_layouts_may_be_mixed": [{"shape": (2, 3, 5, 7)}],
    # The second call must not find the launch that the first one bound: caches are not cleared.
    "test_results_do_not_depend_on_blocks_and_parts": [
        {"name": "epsilon mixed bf16", "blocks": blocks} for blocks in ((128, 2), (512, 1))
    ],
    "test_more_samples_than_a_grids_other_axes_hold": [],
    "test_every_float_from_a_half_to_one_gives_a_normal": [],
    "test_tensors_over_two_to_the_31_elements": [],
    "test_noise_of_a_sample_over_two_to_the_31_elements": [],
    "test_fifty_steps_are_those_of_the_reference": [],
    "test_a_sample_does_not_depend_on_its_batch": [],
    "test_a_captured_loop_is_the_loop": [],
    "test_the_loop_does_not_wait_for_the_device_once_begun": [],
    "test_a_wait_for_the_device_is_noticed": [],
    "test_any_gpu_serves_whichever_is_current": [],
}
"""Arguments that take the interpreter little time; of other tests the first and the last."""
LONG: dict[str, list[dict[str, Any]]] = {
    "test_the_loop_does_not_wait_for_the_device_once_begun": [{}],
    "test_a_captured_loop_is_the_loop": [{"batch": 1}],
    "test_every_float_from_a_half_to_one_gives_a_normal": [{}],
}
"""Arguments of slow tests."""


def gpu_tests(module: Any) -> dict[str, Callable[..., None]]:
    return {
        name: inspect.unwrap(test) for name, test in vars(module).items() if name[:5] == "test_"
    }


def calls(test: Callable[..., None]) -> list[dict[str, Any]]:
    """The arguments with which pytest calls the test."""
    found = []
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names, values = mark.args
            names = names.split(",") if isinstance(names, str) else names
            of = [value if len(names) > 1 else (value,) for value in values]
            found.append([dict(zip(names, value, strict=True)) for value in of])
    return [
        {k: v for part in parts for k, v in part.items()} for parts in itertools.product(*found)
    ]


def chosen() -> Iterator[Any]:
    for module in MODULES:
        for name, test in gpu_tests(module).items():
            every = calls(test)
            quick = QUICK.get(name, every[:: max(1, len(every) - 1)])
            for given in quick[:1]:
                yield pytest.param(module, name, given)
            for given in (*quick[1:], *LONG.get(name, [])):
                yield pytest.param(module, name, given, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (*MODULES, gpu_steps):
        monkeypatch.setattr(module, "DEVICE", "cpu")
        monkeypatch.setattr(module, "LARGE", SMALL, raising=False)
    with faked(), using("triton"):
        yield


@pytest.mark.one_in(3)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of NaN and infinity
@pytest.mark.parametrize(("module", "name", "given"), list(chosen()))
def test_a_gpu_test_passes_interpreted(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, given: dict[str, Any]
) -> None:
    test = gpu_tests(module)[name]
    if "monkeypatch" in inspect.signature(test).parameters:
        given = given | {"monkeypatch": monkeypatch}
    test(**given)


def test_the_checks_of_long_tensors_pass_on_short_ones() -> None:
    gpu: Any = MODULES[0]
    gpu.assert_long_tensors_are_the_reference(1, 37, chunk=16)
    gpu.assert_long_tensors_are_the_reference(5, 12, chunk=24)
    gpu.assert_long_noise_is_the_contract(128, (0, 32, 64))


def test_every_gpu_test_of_the_kernels_has_a_call() -> None:
    names = {name for module in MODULES for name in gpu_tests(module)}
    assert names >= set(QUICK)
    without = {name for name, given in QUICK.items() if not given} - set(LONG)
    assert without == {
        "test_more_samples_than_a_grids_other_axes_hold",  # its parts are in other tests
        "test_tensors_over_two_to_the_31_elements",
        "test_noise_of_a_sample_over_two_to_the_31_elements",
        "test_fifty_steps_are_those_of_the_reference",
        "test_a_sample_does_not_depend_on_its_batch",
        "test_a_wait_for_the_device_is_noticed",  # only a GPU makes the host wait
        "test_any_gpu_serves_whichever_is_current",  # needs two GPUs
    }
