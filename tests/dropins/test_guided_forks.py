"""The options of guided-diffusion's forks, beside their loops operation for operation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastddim.dropins import guided
from tests.dropins.guided_original import (
    FIFTY,
    LINEAR,
    TWELVE,
    Original,
    assert_equal,
    darker,
    kept,
    linear,
    model,
    score,
    start,
    toy,
)
from tests.refusals import refused

X, IMAGE = start(2, 3, 4, 4), 0.5 * start(2, 3, 4, 4, seed=2)


class Net:
    """A model with classes, which draws from the global stream."""

    num_classes = 7

    def __init__(self) -> None:
        self.classes: list[list[int]] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None, **given: Any) -> Tensor:
        if y is not None:
            self.classes.append(y.tolist())
        return model(x, t, y, **given)


class Fork(Original):
    """crowsonkb's fork: loops that skip timesteps, start from an image, and draw classes."""

    def condition_score_with_grad(self) -> None:
        """Never called; the attribute tells this fork from openai's code."""

    def ddim_sample(
        self, model: Any, x: Tensor, t: Tensor, eta: float = 0.0, **kwargs: Any
    ) -> dict[str, Tensor]:
        """The x0 of the result is the one before ``cond_fn``."""
        seen: list[Tensor] = []

        def once(*arguments: Any, **more: Any) -> Tensor:
            seen.append(model(*arguments, **more))
            return seen[-1]

        out = super().ddim_sample(once, x, t, eta, **kwargs)
        given = {**kwargs, "cond_fn": None}
        state = torch.get_rng_state()
        first = super().ddim_sample(lambda *_, **__: seen[0], x, t, **given)["pred_xstart"]
        torch.set_rng_state(state)
        return {**out, "pred_xstart": first}

    @torch.no_grad()
    def loop(
        self,
        which: str,
        net: Any,
        x: Tensor,
        skip: int = 0,
        image: Tensor | None = None,
        randomize: bool = False,
        **given: Any,
    ) -> Iterator[dict[str, Tensor]]:
        levels = range(self.num_timesteps - skip)[::-1]
        if image is None and skip:
            image = torch.zeros_like(x)
        if image is not None:
            t = torch.full((len(x),), levels[0])
            a = self.at(np.sqrt(self.alphas_cumprod), t, x)
            x = a * image + self.at(np.sqrt(1.0 - self.alphas_cumprod), t, x) * x
        kwargs = dict(given.pop("model_kwargs", {}))
        for i in levels:
            if randomize:
                kwargs["y"] = torch.randint(0, net.num_classes, kwargs["y"].shape)
            t = torch.full((len(x),), i)
            out = getattr(self, which)(net, x, t, model_kwargs=kwargs, **given)
            yield out
            x = out["sample"]


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "skip": ({"skip_timesteps": 5}, {"skip": 5}),
    "image": ({"init_image": IMAGE}, {"image": IMAGE}),
    "both": ({"skip_timesteps": 7, "init_image": IMAGE}, {"skip": 7, "image": IMAGE}),
    "half": (
        {"skip_timesteps": 1, "init_image": IMAGE.half()},
        {"skip": 1, "image": IMAGE.half()},
    ),
    "all but one": ({"skip_timesteps": 11}, {"skip": 11}),
    "classes": (
        {"randomize_class": True, "model_kwargs": {"y": torch.tensor([3, 4])}},
        {"randomize": True, "model_kwargs": {"y": torch.tensor([3, 4])}},
    ),
    "all": (
        {
            "randomize_class": True,
            "model_kwargs": {"y": torch.tensor([3, 4])},
            "skip_timesteps": 2,
            "init_image": IMAGE,
        },
        {
            "randomize": True,
            "model_kwargs": {"y": torch.tensor([3, 4])},
            "skip": 2,
            "image": IMAGE,
        },
    ),
}
MORE: list[dict[str, Any]] = [
    {},
    {"cond_fn": score},
    {"cond_fn": score, "denoised_fn": darker, "clip_denoised": False},
]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("more", MORE, ids=["plain", "guided", "all"])
@pytest.mark.parametrize("which", ["ddim_sample", "p_sample"])
@pytest.mark.parametrize("option", OPTIONS)
def test_loops_of_the_fork_are_bit_identical(option: str, which: str, more: Any) -> None:
    diffusion = Fork(linear(), TWELVE)
    given, theirs = OPTIONS[option]
    more = {**more, "eta": 0.7} if which == "ddim_sample" else more
    progressive = getattr(guided, f"{which}_loop_progressive")
    nets = Net(), Net(), Net()
    torch.manual_seed(0)
    ours = kept(progressive(diffusion, nets[0], X.shape, X, device="cpu", **given, **more))
    state = torch.get_rng_state()
    torch.manual_seed(0)
    assert_equal(ours, kept(diffusion.loop(which, nets[1], X, **theirs, **more)))
    assert torch.equal(state, torch.get_rng_state())
    assert nets[0].classes == nets[1].classes
    torch.manual_seed(0)
    loop = getattr(guided, f"{which}_loop")
    assert torch.equal(loop(diffusion, nets[2], X.shape, X, **given, **more), ours[-2])


def test_a_drawn_start_is_the_noise_of_the_image() -> None:
    torch.manual_seed(3)
    ours = guided.ddim_sample_loop(
        LINEAR, toy, X.shape, device="cpu", skip_timesteps=10, init_image=IMAGE
    )
    torch.manual_seed(3)
    x = torch.randn(X.shape)
    (*_, last) = Fork(linear(), FIFTY).loop("ddim_sample", toy, x, skip=10, image=IMAGE)
    assert torch.equal(ours, last["sample"])


def test_classes_are_drawn_and_the_callers_dictionary_stays() -> None:
    net, y = Net(), torch.tensor([3, 4])
    kwargs = {"y": y}
    guided.ddim_sample_loop(LINEAR, net, X.shape, X, model_kwargs=kwargs, randomize_class=True)
    assert kwargs["y"] is y
    assert len(net.classes) == 50
    assert {c for drawn in net.classes for c in drawn} == set(range(7))
    guided.ddim_sample_loop(LINEAR, toy, X.shape, X, randomize_class=True)  # There is no y.


def test_openais_x0_is_the_one_after_cond_fn() -> None:
    given: dict[str, Any] = {
        "clip_denoised": False,
        "cond_fn": lambda x, t: torch.full_like(x, 50.0),
    }
    t = torch.tensor([30, 30])
    found = [
        guided.ddim_sample(diffusion, toy, X, t, **given)
        for diffusion in (Original(linear(), FIFTY), Fork(linear(), FIFTY))
    ]
    assert torch.equal(found[0]["sample"], found[1]["sample"])
    assert (found[0]["pred_xstart"] - found[1]["pred_xstart"]).abs().min() > 1


# --- Towards noise ----------------------------------------------------------------------------


@pytest.mark.parametrize("mean", ["EPSILON", "START_X"])
@pytest.mark.parametrize(
    "more", [{}, {"denoised_fn": darker, "clip_denoised": False}], ids=["plain", "denoised"]
)
def test_reverse_loops_are_bit_identical(mean: str, more: dict[str, Any]) -> None:
    diffusion = Original(linear(), FIFTY, mean=mean)
    torch.manual_seed(0)
    ours = kept(
        guided.ddim_reverse_sample_loop_progressive(diffusion, model, IMAGE, device="cpu", **more)
    )
    torch.manual_seed(0)
    theirs, x = [], IMAGE
    for i in range(50):
        out = diffusion.ddim_reverse_sample(model, x, torch.tensor([i, i]), **more)
        theirs.append(out)
        x = out["sample"]
    assert_equal(ours, kept(theirs))
    torch.manual_seed(0)
    assert torch.equal(guided.ddim_reverse_sample_loop(diffusion, model, IMAGE, **more), ours[-2])


def test_the_reverse_loop_is_undone_by_the_loop() -> None:
    """Exactly if the model's x0 is that of the data, whatever the number of steps."""
    known = torch.tanh(IMAGE)
    diffusion = Original(linear(), FIFTY, mean="START_X")

    def net(x: Tensor, t: Tensor) -> Tensor:
        return known

    *_, before, _ = guided.ddim_reverse_sample_loop_progressive(diffusion, net, known)
    noise = guided.ddim_reverse_sample_loop(diffusion, net, known)
    back = guided.ddim_sample_loop(diffusion, net, known.shape, noise)
    assert (back - known).abs().max() < 1e-5
    assert not torch.equal(before["sample"], noise)


@pytest.mark.parametrize(
    ("error", "name", "changed"),
    [
        (ValueError, "skip_timesteps", {"skip_timesteps": 50}),
        (ValueError, "skip_timesteps", {"skip_timesteps": -1}),
        (TypeError, "skip_timesteps", {"skip_timesteps": 0.5}),
        (TypeError, "init_image", {"init_image": 0.5}),
        (TypeError, "init_image", {"init_image": IMAGE.double()}),
        (ValueError, "cond_fn_with_grad", {"cond_fn_with_grad": True}),
        (
            TypeError,
            "model.num_classes",
            {"randomize_class": True, "model_kwargs": {"y": torch.ones(2)}},
        ),
    ],
)
def test_bad_options_are_refused_at_the_call(
    error: type[Exception], name: str, changed: dict[str, Any]
) -> None:
    for loop in (guided.ddim_sample_loop_progressive, guided.p_sample_loop_progressive):
        refused(partial(loop, LINEAR, toy, X.shape, X, **changed), error, name)


def test_bad_images_are_refused() -> None:
    small: dict[str, Any] = {"init_image": IMAGE[:1], "device": "cpu"}
    for noise in (X, None):
        call = partial(guided.ddim_sample_loop_progressive, LINEAR, toy, X.shape, noise, **small)
        refused(call, ValueError, "init_image must have the shape")
    loop = guided.ddim_reverse_sample_loop_progressive
    refused(lambda: loop(LINEAR, toy, IMAGE.double()), TypeError, "image")
    refused(lambda: loop(LINEAR, toy, IMAGE, eta=0.5), ValueError, "eta", "0.5")
