"""The options of ``DDIM``'s methods stand once: in a type, and in ``sample``'s signature."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastddim
import fastddim.loop.options
from fastddim import DDIM
from fastddim.loop.options import (
    CaptureOptions,
    InvertOptions,
    IterateOptions,
    Options,
    option_names,
)
from fastddim.tools.shards import Options as GenerateOptions
from tests.refusals import refused

X = torch.linspace(-1, 1, 24).view(2, 3, 4)
BACKWARDS = ("until", "refine")
TAKE: dict[str, tuple[Any, tuple[str, ...]]] = {
    "sample": (Options, ("trajectory",)),
    "iterate": (IterateOptions, ("reverse", *BACKWARDS)),
    "invert": (InvertOptions, BACKWARDS),
    "capture": (CaptureOptions, ()),
}
"""Of each method the type of its options, and the keywords that are its own."""


def model(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * x


def unused(x: Tensor, t: Tensor) -> Tensor:
    raise AssertionError("the model must not be called")


def keywords(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters
    return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def called(method: str, ddim: DDIM, net: Any, **options: Any) -> Any:
    first = tuple(X.shape) if method == "capture" else X
    return getattr(ddim, method)(net, first, **options)


@pytest.mark.parametrize("method", TAKE)
def test_signatures_list_the_options_with_samples_defaults(method: str) -> None:
    options, own = TAKE[method]
    found = keywords(getattr(DDIM, method))
    assert set(found) == {*option_names(options), *own}
    of_sample = keywords(DDIM.sample)
    for name in option_names(options):
        assert found[name].default == of_sample[name].default
        assert found[name].annotation == of_sample[name].annotation


@pytest.mark.parametrize("method", ["iterate", "invert", "capture"])
def test_a_docstring_names_every_option(method: str) -> None:
    text = inspect.getdoc(getattr(DDIM, method)) or ""
    for name in keywords(getattr(DDIM, method)):
        assert f"``{name}``" in text or f"{name}:" in text or f"{name}, " in text, name


def test_other_methods_and_generate_take_some_sample_options() -> None:
    every = set(option_names(Options))
    for options, _ in TAKE.values():
        assert set(option_names(options)) <= every
    assert set(option_names(GenerateOptions)) - every == {"postprocess"}


NOT_TAKEN = [
    (method, name)
    for method, (options, own) in TAKE.items()
    for name in (*option_names(Options), *BACKWARDS, "trajectory", "guidence")
    if name not in {*option_names(options), *own, "shape"}  # capture's own argument is a shape
]


@pytest.mark.parametrize(("method", "name"), NOT_TAKEN)
def test_an_option_of_another_method_raises_pythons_type_error(method: str, name: str) -> None:
    said = f"DDIM.{method}() got an unexpected keyword argument {name!r}"
    refused(lambda: called(method, DDIM(2), unused, **{name: None}), TypeError, said)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """The options that reach ``prepare``, of each call."""
    found: list[Mapping[str, Any]] = []
    plain = fastddim.loop.options.prepare

    def watched(plan: Any, net: Any, x_T: Any, options: Mapping[str, Any]) -> Any:
        found.append(options)
        return plain(plan, net, x_T, options)

    for module in ("sampler", "graph"):
        monkeypatch.setattr(f"fastddim.loop.{module}.prepare", watched)
    return found


def test_every_option_of_sample_reaches_the_run(prepared: list[Mapping[str, Any]]) -> None:
    DDIM(2).sample(model, X, seeds=[1, 2], every=2)
    assert prepared[0].keys() == set(option_names(Options))
    assert (prepared[0]["seeds"], prepared[0]["every"]) == ([1, 2], 2)


@pytest.mark.parametrize("method", ["iterate", "invert", "capture"])
def test_one_more_option_is_one_line_in_one_place(
    prepared: list[Mapping[str, Any]], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    options, _ = TAKE[method]
    monkeypatch.setitem(options.__annotations__, "another", "int")
    called(method, DDIM(2), model, another=3)
    assert prepared[0]["another"] == 3


def test_nothing_else_lists_the_options() -> None:
    every = set(option_names(Options))
    package = Path(fastddim.__file__).parent
    found = [
        (path.relative_to(package).as_posix(), getattr(node, "name", None))
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if len(listed(node) & every) >= 8  # a call of the model alone takes seven
    ]
    assert found == [("loop/sampler.py", "sample")]


def listed(node: ast.AST) -> set[Any]:
    """The names in a signature, a call, a class or a literal."""
    if isinstance(node, (ast.FunctionDef, ast.Lambda)):
        return {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
    if isinstance(node, ast.Call):
        return {keyword.arg for keyword in node.keywords}
    if isinstance(node, ast.ClassDef):
        fields = (line.target for line in node.body if isinstance(line, ast.AnnAssign))
        return {field.id for field in fields if isinstance(field, ast.Name)}
    if isinstance(node, (ast.Tuple, ast.List, ast.Set, ast.Dict)):
        items = node.keys if isinstance(node, ast.Dict) else node.elts
        return {item.value for item in items if isinstance(item, ast.Constant)}
    return set()


def test_a_run_is_fixed() -> None:
    run: Any = fastddim.loop.options.prepare(DDIM(2)._plan(0, False), model, X, {})
    with pytest.raises(FrozenInstanceError):
        run.progress = iter
