"""The drop-in for denoising-diffusion-pytorch: bit for bit its loop, as written out and live.

The package itself is compared with wherever it is installed, as in one stage of .ci/run:
``pip install --no-deps denoising-diffusion-pytorch einops`` is enough. It is in no extra, because
it needs torchvision, which allows one version of PyTorch only. The modules that sampling does not
use may be missing.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim.dropins import lucidrains
from tests.dropins.lucidrains_original import Described, Net, package
from tests.refusals import refused

SHAPE = (3, 3, 8, 8)
OBJECTIVES = ("pred_noise", "pred_x0", "pred_v")


@pytest.fixture(params=["described", "package"])
def original(request: pytest.FixtureRequest) -> Any:
    return Described if request.param == "described" else package()


def made(original: Any = Described, then: Any = None, **given: Any) -> Any:
    net = Net(given.pop("self_condition", False), then)
    settings = {"timesteps": 1000, "sampling_timesteps": 10, "objective": "pred_noise"}
    settings |= {"image_size": 8, "beta_schedule": "linear"} | given
    return original(net, **settings)


def run(sample: Callable[..., Tensor], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The samples, and the state that the generator is left in."""
    torch.manual_seed(5)
    return sample(*args, **kwargs), torch.get_rng_state()


def assert_identical(diffusion: Any, shape: Any = SHAPE, finite: bool = True) -> Tensor:
    """The states, the samples, the model's arguments and the generator are the original's."""
    for every in (True, False):
        diffusion.model.seen.clear()
        theirs, their_state = run(diffusion.ddim_sample, shape, return_all_timesteps=every)
        told = [(t, b) for _, t, b in diffusion.model.seen]
        diffusion.model.seen.clear()
        ours, our_state = run(lucidrains.ddim_sample, diffusion, shape, every)
        assert ours.dtype == theirs.dtype == torch.float32
        assert torch.equal(ours, theirs)
        assert torch.equal(our_state, their_state)
        assert ours.isfinite().all() or not finite
        for (_, t, before), (their_t, their_before) in zip(diffusion.model.seen, told, strict=True):
            assert torch.equal(t, their_t)
            assert (before is None) == (their_before is None)
            assert before is None or their_before is None or torch.equal(before, their_before)
    return ours


@pytest.mark.one_in(4)
@pytest.mark.parametrize("S", [1, 4, 13, 40])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_states_are_bit_identical_and_leave_the_same_stream(
    original: Any, objective: str, self_condition: bool, eta: float, S: int
) -> None:
    diffusion = made(
        original,
        timesteps=40,
        sampling_timesteps=S,
        objective=objective,
        self_condition=self_condition,
        ddim_sampling_eta=eta,
        beta_schedule="cosine",
    )
    samples = assert_identical(diffusion)
    assert 0 <= samples.min() < samples.max() <= 1


@pytest.mark.one_in(2)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_fifty_of_a_thousand_steps_are_bit_identical(original: Any, objective: str) -> None:
    for eta in (0.0, 0.2, 1.0):
        for auto_normalize in (True, False):
            assert_identical(
                made(
                    original,
                    objective=objective,
                    sampling_timesteps=50,
                    ddim_sampling_eta=eta,
                    auto_normalize=auto_normalize,
                )
            )


def test_x0_is_clamped_and_eps_derived_again() -> None:
    diffusion = made(auto_normalize=False)
    states = lucidrains.ddim_sample(diffusion, SHAPE, return_all_timesteps=True)
    assert states.shape == (3, 11, 3, 8, 8)
    assert states[:, :-1].abs().max() > 1
    assert 0.02 < (states[:, -1].abs() == 1).float().mean() < 0.98


def test_the_timesteps_are_the_originals_for_every_s(original: Any) -> None:
    for S in range(1, 51):
        assert_identical(made(original, timesteps=50, sampling_timesteps=S), (1, 3, 1, 1))


def test_a_thousand_of_a_thousand_steps_are_bit_identical(original: Any) -> None:
    assert_identical(made(original, sampling_timesteps=1000, ddim_sampling_eta=1.0), (1, 3, 2, 2))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("shape", [(2,), (2, 5), [2, 3, 5, 7], (0, 3, 4, 4), (2, 3, 105, 104)])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_shapes_of_any_kind_are_bit_identical(objective: str, shape: Any) -> None:
    for eta in (0.0, 1.0):
        assert_identical(made(objective=objective, ddim_sampling_eta=eta), shape)


OUTPUTS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "channels_last": lambda o, x, b: o.contiguous(memory_format=torch.channels_last),
    "at times": lambda o, x, b: o if o.sum() > 0 else o.transpose(2, 3).contiguous().mT,
    "slice": lambda o, x, b: torch.stack([o, o], -1)[..., 0],
    "expanded": lambda o, x, b: o[:1].expand(x.shape),
    "x itself": lambda o, x, b: x,
    "x0 itself": lambda o, x, b: x if b is None else b,
    "x written": lambda o, x, b: x.mul_(0.5).add(o, alpha=0.25),
    "drawing": lambda o, x, b: o + 0.01 * torch.randn_like(o),
    "infinite": lambda o, x, b: o.masked_fill(o > 1, torch.inf).masked_fill(o < -1, -torch.inf),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("what", OUTPUTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_outputs_of_any_kind_are_bit_identical(original: Any, objective: str, what: str) -> None:
    for eta in (0.0, 1.0):
        given = {"objective": objective, "self_condition": True, "ddim_sampling_eta": eta}
        assert_identical(made(original, OUTPUTS[what], **given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_identical_but_for_x0_models(dtype: torch.dtype) -> None:
    def halved(output: Tensor, x: Tensor, before: Tensor | None) -> Tensor:
        return output.to(dtype)

    for objective in ("pred_noise", "pred_v"):
        assert_identical(made(then=halved, objective=objective, ddim_sampling_eta=1.0))
    # The original rounds √ᾱ_s·x0 and the samples. The drop-in computes both in float32.
    ours, _ = run(lucidrains.ddim_sample, made(then=halved, objective="pred_x0"), SHAPE)
    widened = made(then=lambda *given: halved(*given).float(), objective="pred_x0")
    theirs, _ = run(widened.ddim_sample, SHAPE)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)


def test_sample_and_copies_use_the_drop_in(original: Any) -> None:
    diffusion = made(original, objective="pred_v", ddim_sampling_eta=0.5)
    theirs, _ = run(diffusion.sample, batch_size=2)
    calls: list[Any] = []
    replaced = partial(lucidrains.ddim_sample, diffusion)
    diffusion.ddim_sample = replaced
    assert torch.equal(run(diffusion.sample, batch_size=2)[0], theirs)
    twin = copy.deepcopy(diffusion)
    assert twin.ddim_sample.args == (twin,)
    diffusion.model.forward = lambda *args: calls.append(args)
    assert torch.equal(run(twin.sample, batch_size=2)[0], theirs)
    assert not calls


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nothing_that_is_held_is_written(objective: str, self_condition: bool) -> None:
    kept: list[tuple[Tensor, Tensor]] = []

    def keeping(output: Tensor, x: Tensor, before: Tensor | None) -> Tensor:
        kept.extend((held, held.clone()) for held in (output, x, before) if held is not None)
        return output

    given = {"objective": objective, "self_condition": self_condition, "ddim_sampling_eta": 1.0}
    diffusion = made(then=keeping, auto_normalize=False, **given)
    buffers = {name: buffer.clone() for name, buffer in diffusion.named_buffers()}
    first = lucidrains.ddim_sample(diffusion, SHAPE)
    kept.append((first, first.clone()))
    lucidrains.ddim_sample(diffusion, SHAPE)
    assert all(torch.equal(held, before) for held, before in kept)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in diffusion.named_buffers())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_states_take_turns_in_two_buffers(objective: str) -> None:
    places: list[int] = []

    def noting(output: Tensor, x: Tensor, before: Tensor | None) -> Tensor:
        places.append(x.data_ptr())
        return output

    diffusion = made(then=noting, objective=objective)
    diffusion.model.seen = SimpleNamespace(append=lambda seen: None)
    lucidrains.ddim_sample(diffusion, (3, 3, 64, 64))  # fresh memory serves what is smaller
    assert len(set(places)) == 2
    assert places == (places[:2] * 5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_threads_give_what_each_gives_alone(
    objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At η = 0, as all threads draw from one generator: x_T is what each of them has drawn."""
    diffusion = made(
        objective=objective, self_condition=True, sampling_timesteps=50, auto_normalize=False
    )

    def sampled(_: int) -> Tensor:
        return lucidrains.ddim_sample(diffusion, SHAPE, return_all_timesteps=True)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(sampled, range(6)))
    for states in found:
        monkeypatch.setattr(torch, "randn", lambda *_, first=states[:, 0], **__: first.clone())
        assert torch.equal(diffusion.ddim_sample(SHAPE, return_all_timesteps=True), states)
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_results_are_inference_tensors_in_every_mode(mode: Any) -> None:
    diffusion = made(objective="pred_v", self_condition=True, ddim_sampling_eta=1.0)
    with mode():
        ours, theirs = (
            run(sample, SHAPE)[0]
            for sample in (partial(lucidrains.ddim_sample, diffusion), diffusion.ddim_sample)
        )
    assert ours.is_inference()
    assert theirs.is_inference()
    assert torch.equal(ours, theirs)


# Forward-mode differentiation makes torch itself compile some of its rules with torch.jit.script.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_transforms_are_refused() -> None:
    diffusion = made()

    def scaled(a: Tensor) -> Tensor:
        return lucidrains.ddim_sample(diffusion, SHAPE) * a

    one = torch.ones(())
    for call in (
        lambda: torch.func.jvp(scaled, (one,), (one,)),
        lambda: torch.func.vmap(scaled)(torch.ones(2)),
    ):
        refused(call, ValueError, "ddim_sample", "torch.func")


# --- What is refused --------------------------------------------------------------------------


class Learned(Described):
    """As the package's LearnedGaussianDiffusion: other predictions below the same loop."""

    def model_predictions(self, x: Tensor, t: Tensor, before: Tensor | None) -> list[Tensor]:
        return super().model_predictions(x, t, before)


class OtherLoop(Described):
    """As the package's GaussianDiffusion1D, whose loop has an argument more."""

    ddim_sample: Any = lambda self, shape, clip_denoised=True: None


@pytest.mark.parametrize(
    ("error", "named", "shape", "return_all_timesteps"),
    [
        (TypeError, "shape", 3, False),
        (TypeError, "shape", "abc", False),
        (TypeError, "shape", (), False),
        (TypeError, "shape[1]", (2, 3.0, 8, 8), False),
        (ValueError, "shape[0]", (-1, 3, 8, 8), False),
        (TypeError, "return_all_timesteps", SHAPE, "yes"),
        (TypeError, "return_all_timesteps", SHAPE, None),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    error: type[Exception], named: str, shape: Any, return_all_timesteps: Any
) -> None:
    assert_refused(made(), error, named, shape=shape, return_all_timesteps=return_all_timesteps)


@pytest.mark.parametrize(
    ("error", "name", "value"),
    [
        (ValueError, "objective", "pred_velocity"),
        (ValueError, "objective", []),
        (TypeError, "num_timesteps", 1000.0),
        (ValueError, "num_timesteps", 0),
        (TypeError, "sampling_timesteps", None),
        (ValueError, "sampling_timesteps", 0),
        (ValueError, "sampling_timesteps", 1001),
        (TypeError, "ddim_sampling_eta", "hat"),
        (ValueError, "ddim_sampling_eta", -0.5),
        (ValueError, "ddim_sampling_eta", float("nan")),
        (TypeError, "alphas_cumprod", torch.ones(1000, dtype=torch.float64)),
        (TypeError, "alphas_cumprod", None),
        (TypeError, "sqrt_recip_alphas_cumprod", torch.ones(999)),
    ],
)
def test_bad_settings_are_refused_before_any_work(
    error: type[Exception], name: str, value: Any
) -> None:
    diffusion = made()
    setattr(diffusion, name, value)
    assert_refused(diffusion, error, f"diffusion.{name}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_is_refused(dtype: torch.dtype) -> None:
    diffusion = made()
    torch.set_default_dtype(dtype)
    try:
        assert_refused(diffusion, TypeError, "torch's default dtype")
    finally:
        torch.set_default_dtype(torch.float32)


def test_objects_of_other_classes_and_loops_are_refused() -> None:
    for other in (None, Net(), SimpleNamespace(ddim_sample=print), made(Described).double()):
        refused(partial(lucidrains.ddim_sample, other, SHAPE), TypeError, "diffusion")
    assert_refused(made(Learned), TypeError, "diffusion", "model_predictions of its own")
    assert_refused(made(OtherLoop), TypeError, "diffusion", "ddim_sample(self, shape, clip_den")
    patched = made()
    patched.predict_start_from_noise = lambda x, t, noise: x
    assert_refused(patched, TypeError, "diffusion", "predict_start_from_noise of its own")


def assert_refused(
    diffusion: Any,
    error: type[Exception],
    *said: str,
    shape: Any = SHAPE,
    return_all_timesteps: Any = False,
) -> None:
    """One line, before the model is called and before anything is drawn."""
    before = torch.get_rng_state()
    call = partial(lucidrains.ddim_sample, diffusion, shape, return_all_timesteps)
    refused(call, error, *said)
    assert torch.equal(torch.get_rng_state(), before)
    assert not diffusion.model.seen


@pytest.mark.parametrize(
    "returned",
    [
        lambda o, x, b: None,
        lambda o, x, b: (o,),
        lambda o, x, b: o[:1],
        lambda o, x, b: torch.cat([o, o], 1),
        lambda o, x, b: o.double(),
        lambda o, x, b: o.long(),
    ],
)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_outputs_of_another_shape_or_dtype_are_refused(objective: str, returned: Any) -> None:
    diffusion = made(then=returned, objective=objective)
    call = partial(lucidrains.ddim_sample, diffusion, SHAPE)
    refused(call, TypeError, "diffusion.model must return", "(3, 3, 8, 8), got ")


@pytest.mark.parametrize("S", [2, 10, 50])
def test_the_largest_eta_named_works_and_no_larger_one(original: Any, S: int) -> None:
    diffusion = made(original, sampling_timesteps=S, ddim_sampling_eta=1e4)
    with pytest.raises(ValueError, match="eta must be at most") as caught:
        lucidrains.ddim_sample(diffusion, SHAPE)
    [number] = re.findall(r"at most ([\d.]+)", str(caught.value))
    diffusion.ddim_sampling_eta = float(number)
    assert_identical(diffusion)
    diffusion.ddim_sampling_eta = (round(float(number) * 1e6) + 1) / 1e6
    assert diffusion.ddim_sample(SHAPE).isnan().any()
    diffusion.model.seen.clear()
    assert_refused(diffusion, ValueError, "eta", number)


@pytest.mark.gpu
@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_on_a_gpu_states_are_bit_identical(
    objective: str, self_condition: bool, eta: float
) -> None:
    given = {"objective": objective, "self_condition": self_condition, "ddim_sampling_eta": eta}
    diffusion = made(sampling_timesteps=50, **given).cuda()
    states = []
    for sample in (partial(lucidrains.ddim_sample, diffusion), diffusion.ddim_sample):
        torch.cuda.manual_seed(5)
        found = sample((3, 3, 17, 9), return_all_timesteps=True)
        states.append((found, torch.cuda.get_rng_state()))
    (ours, our_state), (theirs, their_state) = states
    assert torch.equal(ours, theirs)
    assert torch.equal(our_state, their_state)
