"""The other classes of denoising-diffusion-pytorch: bit for bit their loops, described and live."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim.dropins import lucidrains
from tests.dropins.lucidrains_original import (
    Described,
    Described1D,
    DescribedClasses,
    DescribedGuided,
    package,
)
from tests.refusals import refused

OBJECTIVES = ("pred_noise", "pred_x0", "pred_v")
ORIGINALS = ("described", "package")
CLASSES = torch.tensor([0, 3, 2])


class Net(torch.nn.Module):
    """Takes what each of the classes passes, and rounds alike wherever it runs."""

    channels = out_dim = 3
    random_or_learned_sinusoidal_cond = False

    def __init__(self, self_condition: bool = False) -> None:
        super().__init__()
        self.self_condition = self_condition
        self.seen: list[tuple[Tensor, Tensor | None]] = []

    def forward(
        self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None, shift: float = 0.0
    ) -> Tensor:
        assert t.dtype == torch.int64
        assert not torch.is_grad_enabled()
        self.seen.append((t, x_self_cond))
        output = 1.3 * x.clamp(-1.5, 1.5) + 1e-3 * (t % 97).view(-1, *[1] * (x.dim() - 1)) + shift
        return output if x_self_cond is None else output - 0.2 * x_self_cond

    def forward_with_cond_scale(
        self, x: Tensor, t: Tensor, classes: Tensor, cond_scale: float, rescaled_phi: float
    ) -> tuple[Tensor, Tensor]:
        assert not torch.is_inference_mode_enabled()
        null = self(x, t)
        output = null + 0.01 * classes.view(-1, *[1] * (x.dim() - 1))
        return null + cond_scale * (output - null) * rescaled_phi, null


def made(cls: Any, **given: Any) -> Any:
    net = Net(given.pop("self_condition", False))
    settings = {"timesteps": 1000, "sampling_timesteps": 10, "objective": "pred_noise"}
    return cls(net, **{**settings, "beta_schedule": "linear", **given})


def assert_identical(diffusion: Any, ours: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Compares the results, the model's arguments and the generator's final state."""
    results = []
    for sample in (diffusion.ddim_sample, partial(ours, diffusion)):
        diffusion.model.seen.clear()
        torch.manual_seed(5)
        found = sample(*args, **kwargs)
        each = found if isinstance(found, tuple) else (found,)
        results.append((each, list(diffusion.model.seen), torch.get_rng_state()))
    (theirs, told, their_state), (mine, seen, state) = results
    assert len(theirs) == len(mine)
    for a, b in zip(theirs, mine, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, b)
        assert a.isfinite().all()
        assert a.is_inference() == b.is_inference()
    for (t, before), (their_t, their_before) in zip(seen, told, strict=True):
        assert torch.equal(t, their_t)
        assert (before is None) == (their_before is None)
        assert before is None or torch.equal(before, their_before)
    assert torch.equal(state, their_state)
    return mine[0]


def sequences(original: str) -> Any:
    if original == "described":
        return Described1D
    return package("denoising_diffusion_pytorch_1d", "GaussianDiffusion1D")


@pytest.mark.one_in(2)
@pytest.mark.parametrize("original", ORIGINALS)
@pytest.mark.parametrize("S", [1, 7, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_sequences_are_bit_identical(
    original: str, objective: str, clip: bool, eta: float, S: int
) -> None:
    cls = sequences(original)
    for self_condition in (False, True):
        diffusion = made(
            cls,
            seq_length=9,
            timesteps=40,
            sampling_timesteps=S,
            objective=objective,
            ddim_sampling_eta=eta,
            self_condition=self_condition,
        )
        shape = (3, 3, 9)
        call = partial(assert_identical, diffusion, lucidrains.ddim_sample_1d, shape, clip)
        samples = call()
        assert not torch.equal(call(model_forward_kwargs={"shift": 0.1}), samples)


@pytest.mark.parametrize("original", ORIGINALS)
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_samples_of_classes_are_bit_identical(
    original: str, objective: str, clip: bool, eta: float
) -> None:
    cls = DescribedClasses if original == "described" else package("classifier_free_guidance")
    for S in (1, 7):
        diffusion = made(
            cls, image_size=8, objective=objective, ddim_sampling_eta=eta, sampling_timesteps=S
        )
        ours, shape = lucidrains.ddim_sample_of_classes, (3, 3, 8, 8)
        found = assert_identical(diffusion, ours, CLASSES, shape, 3.0, 0.5, clip)
        assert not torch.equal(assert_identical(diffusion, ours, CLASSES, shape), found) or S == 1


@pytest.mark.parametrize("original", ORIGINALS)
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_guided_samples_are_bit_identical(
    original: str, objective: str, self_condition: bool, eta: float
) -> None:
    cls = DescribedGuided if original == "described" else package("guided_diffusion")
    for S in (1, 7):
        diffusion = made(
            cls,
            image_size=8,
            objective=objective,
            ddim_sampling_eta=eta,
            sampling_timesteps=S,
            self_condition=self_condition,
        )
        call = partial(assert_identical, diffusion, lucidrains.ddim_sample_guided, (3, 3, 8, 8))
        samples = call(cond_fn=print, guidance_kwargs={})
        states = call(return_all_timesteps=True)
        assert states.shape == (3, S + 1, 3, 8, 8)
        assert torch.equal(states[:, 0], states[:, 1])
        assert not torch.equal(states[:, -1], samples)


def test_sample_uses_the_drop_in() -> None:
    def replaced(diffusion: Any, function: Any) -> Any:
        diffusion.ddim_sample = partial(function, diffusion)
        return diffusion

    one = made(package("denoising_diffusion_pytorch_1d", "GaussianDiffusion1D"), seq_length=9)
    classes = made(package("classifier_free_guidance"), image_size=8, ddim_sampling_eta=0.5)
    guided = made(package("guided_diffusion"), image_size=8)
    for diffusion, function, given in (
        (one, lucidrains.ddim_sample_1d, {"batch_size": 2, "return_noise": False}),
        (classes, lucidrains.ddim_sample_of_classes, {"classes": CLASSES, "cond_scale": 2.0}),
        (guided, lucidrains.ddim_sample_guided, {"batch_size": 2, "return_all_timesteps": True}),
    ):
        torch.manual_seed(1)
        theirs = diffusion.sample(**given)
        torch.manual_seed(1)
        assert torch.equal(replaced(diffusion, function).sample(**given), theirs)


@pytest.mark.parametrize("original", ORIGINALS)
def test_the_noise_of_a_sequence_is_the_one_it_began_with(original: str) -> None:
    """The original's loop writes the noise of each step over it."""
    diffusion = made(sequences(original), seq_length=9)
    torch.manual_seed(5)
    theirs, last = diffusion.ddim_sample((3, 3, 9), return_noise=True)
    torch.manual_seed(5)
    ours, noise = lucidrains.ddim_sample_1d(diffusion, (3, 3, 9), return_noise=True)
    torch.manual_seed(5)
    drawn = [torch.randn(3, 3, 9) for _ in range(10)]
    assert torch.equal(ours, theirs)
    assert torch.equal(noise, drawn[0])
    assert torch.equal(last, drawn[-1])


def test_eps_is_not_derived_again() -> None:
    """The loops differ where x0 is clamped."""
    again, once = made(Described, image_size=9), made(Described1D, seq_length=9)
    found = []
    for diffusion in (again, once):
        torch.manual_seed(0)
        found.append(diffusion.ddim_sample((3, 3, 9)))
    assert not torch.equal(*found)


@pytest.mark.parametrize(
    ("cls", "right", "given"),
    [
        (Described, "ddim_sample", {"image_size": 8}),
        (Described1D, "ddim_sample_1d", {"seq_length": 8}),
        (DescribedClasses, "ddim_sample_of_classes", {"image_size": 8}),
        (DescribedGuided, "ddim_sample_guided", {"image_size": 8}),
    ],
)
def test_a_wrong_function_names_the_right_one(cls: Any, right: str, given: Any) -> None:
    diffusion = made(cls, **given)
    for name in lucidrains.TAKES:
        arguments: tuple[Any, ...] = ((3, 3, 8, 8),)
        if name == "ddim_sample_of_classes":
            arguments = (CLASSES, *arguments)
        if name != right:
            call = partial(getattr(lucidrains, name), diffusion, *arguments)
            refused(call, TypeError, "diffusion must be", f": call {right}")
    assert not diffusion.model.seen


@pytest.mark.parametrize(
    ("error", "name", "function", "given"),
    [
        (TypeError, "clip_denoised", "ddim_sample_1d", {"clip_denoised": None}),
        (TypeError, "return_noise", "ddim_sample_1d", {"return_noise": 1}),
        (TypeError, "clip_denoised", "ddim_sample_of_classes", {"clip_denoised": 1}),
        (ValueError, "cond_scale", "ddim_sample_of_classes", {"cond_scale": 1}),
        (TypeError, "cond_scale", "ddim_sample_of_classes", {"cond_scale": "high"}),
        (TypeError, "return_all_timesteps", "ddim_sample_guided", {"return_all_timesteps": 1}),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    error: type[Exception], name: str, function: str, given: Any
) -> None:
    classes = function == "ddim_sample_of_classes"
    sizes: Any = {"seq_length": 8} if function == "ddim_sample_1d" else {"image_size": 8}
    cls: Any = {"1d": Described1D, "es": DescribedClasses, "ed": DescribedGuided}[function[-2:]]
    diffusion = made(cls, **sizes)
    arguments = ((CLASSES,) if classes else ()) + ((3, 3, 8, 8),)
    refused(partial(getattr(lucidrains, function), diffusion, *arguments, **given), error, name)
    assert not diffusion.model.seen


def test_two_eps_of_one_step_are_refused() -> None:
    diffusion = made(DescribedClasses, image_size=8)
    call = partial(lucidrains.ddim_sample_of_classes, diffusion, CLASSES, (3, 3, 8, 8))
    diffusion.use_cfg_plus_plus = True
    refused(call, ValueError, "diffusion.use_cfg_plus_plus must be False")
    diffusion.model = torch.nn.Identity()
    refused(call, TypeError, "diffusion.model must have forward_with_cond_scale")
