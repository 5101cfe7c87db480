"""Real pipelines of small random parts: the same pictures with our scheduler as with theirs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fastddim.dropins.diffusers import (
    FastDDIMInverseScheduler,
    FastDDIMParallelScheduler,
    FastDDIMScheduler,
    FastDDPMScheduler,
    FastDPMSolverMultistepScheduler,
    FastEulerAncestralDiscreteScheduler,
)
from tests.dropins.pipeline_cases import SMALL, autoencoder, conditional_unet, diffusers, quiet

pytestmark = pytest.mark.usefixtures("offline")
DDIMPipeline = diffusers.DDIMPipeline
DDIMScheduler = diffusers.DDIMScheduler
DDPMPipeline = diffusers.DDPMPipeline
DDPMScheduler = diffusers.DDPMScheduler
EulerDiscreteScheduler = diffusers.EulerDiscreteScheduler
PNDMScheduler = diffusers.PNDMScheduler
StableDiffusionImg2ImgPipeline = diffusers.StableDiffusionImg2ImgPipeline
StableDiffusionInpaintPipeline = diffusers.StableDiffusionInpaintPipeline
StableDiffusionPipeline = diffusers.StableDiffusionPipeline
UNet2DModel = diffusers.UNet2DModel

STABLE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
DDIM_STABLE: dict[str, Any] = {**STABLE, "clip_sample": False, "set_alpha_to_one": False}
FAST: Any = FastDDIMScheduler
ORIGINAL: Any = DDIMScheduler


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    return UNet2DModel(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **SMALL,
    ).eval()


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    """What Stable Diffusion is made of, but for its scheduler."""
    torch.manual_seed(1)
    letters = [chr(ord("a") + i) for i in range(26)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *[f"{c}</w>" for c in letters]]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocabulary, [], model_max_length=12)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=12,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return {
        "vae": autoencoder(4),
        "text_encoder": CLIPTextModel(text).eval(),
        "tokenizer": tokenizer,
        "unet": conditional_unet(4),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def gen(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(pipe: Any, scheduler: Any, *arguments: Any, **given: Any) -> Any:
    """The picture with this scheduler, from generators made anew for each picture."""
    pipe.scheduler = scheduler
    torch.manual_seed(3)
    made = {k: v() if callable(v) else v for k, v in given.items()}
    images = pipe(*arguments, output_type="np", **made).images
    assert np.isfinite(images).all()
    assert images.std() > 0
    return images


def assert_same_picture(pipe: Any, original: Any, *arguments: Any, **given: Any) -> None:
    assert isinstance(original, DDIMScheduler)
    fast = FAST.from_config(original.config)
    a = picture(pipe, original, *arguments, **given)
    b = picture(pipe, fast, *arguments, **given)
    assert type(pipe.scheduler) is FastDDIMScheduler
    assert np.array_equal(a, b)


DRAWS: dict[str, dict[str, Any]] = {
    "ddim": {},
    "generator": {"generator": gen},
    "eta": {"eta": 0.7, "generator": gen},
    "eta, global stream": {"eta": 1.0},
    "eta, generators": {"eta": 1.0, "generator": lambda: [gen(1), gen(2)]},
}


@pytest.mark.parametrize("draw", DRAWS)
def test_ddim_pipeline(unet: Any, draw: str) -> None:
    pipe = quiet(DDIMPipeline(unet, DDIMScheduler()))
    given = {"batch_size": 2, "num_inference_steps": 5, **DRAWS[draw]}
    assert_same_picture(pipe, DDIMScheduler(), **given)
    trailing = DDIMScheduler(timestep_spacing="trailing", thresholding=True, sample_max_value=1.5)
    assert_same_picture(pipe, trailing, use_clipped_model_output=True, **given)


def test_a_scheduler_assigned_to_a_ddim_pipeline_stays(unet: Any) -> None:
    pipe: Any = quiet(DDIMPipeline(unet, FAST(strict=True, timestep_spacing="trailing")))
    assert type(pipe.scheduler) is DDIMScheduler
    pipe.scheduler = FAST.from_config(pipe.scheduler.config)
    assert type(pipe.scheduler) is FastDDIMScheduler
    assert pipe.scheduler.config["strict"] is True  # which the plain one's configuration kept
    pipe(batch_size=1, num_inference_steps=3, output_type="np")
    assert len(pipe.scheduler.timesteps) == 3


def test_ddpm_pipeline(unet: Any) -> None:
    pipe = quiet(DDPMPipeline(unet, DDPMScheduler()))
    original = ORIGINAL.from_config(pipe.scheduler.config)
    given = {"batch_size": 2, "num_inference_steps": 5, "generator": gen}
    assert_same_picture(pipe, original, **given)


def test_the_ddpm_scheduler_in_a_ddpm_pipeline_stays(unet: Any, tmp_path: Path) -> None:
    pipe = quiet(DDPMPipeline(unet, FastDDPMScheduler()))
    given = {"batch_size": 2, "num_inference_steps": 5}
    for own in ({}, {"variance_type": "fixed_large"}, {"thresholding": True}):
        for generator in (None, gen, lambda: [gen(1), gen(2)]):
            more = {} if generator is None else {"generator": generator}
            original = DDPMScheduler(**own)
            fast = FastDDPMScheduler.from_config(original.config)
            a, b = (picture(pipe, scheduler, **given, **more) for scheduler in (original, fast))
            assert np.array_equal(a, b)
    assert type(pipe.scheduler) is FastDDPMScheduler
    pipe.save_pretrained(tmp_path)
    again = quiet(DDPMPipeline.from_pretrained(str(tmp_path), low_cpu_mem_usage=False))
    assert type(again.scheduler) is FastDDPMScheduler


def test_the_ddpm_scheduler_in_stable_diffusion(parts: dict[str, Any]) -> None:
    own = {**STABLE, "clip_sample": False}
    pipe = quiet(StableDiffusionPipeline(**parts, scheduler=DDPMScheduler(**own)))
    given = {"num_inference_steps": 4, "height": 16, "width": 16, "generator": gen}
    a, b = (
        picture(pipe, scheduler(**own), "a cat", **given)
        for scheduler in (DDPMScheduler, FastDDPMScheduler)
    )
    assert np.array_equal(a, b)


def test_pictures_as_pil_and_tensors(unet: Any) -> None:
    pipe: Any = quiet(DDIMPipeline(unet, DDIMScheduler()))
    found = []
    for scheduler in (DDIMScheduler(), FAST()):
        pipe.scheduler = scheduler
        given = {"batch_size": 2, "num_inference_steps": 4}
        images = pipe(generator=gen(), **given).images
        (tensor,) = pipe(generator=gen(), output_type="pt", return_dict=False, **given)
        found.append(([np.asarray(image) for image in images], tensor))
    assert all(np.array_equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    # diffusers 0.37 returns an array for "pt".
    assert np.array_equal(np.asarray(found[0][1]), np.asarray(found[1][1]))


@pytest.mark.parametrize("draw", DRAWS)
def test_stable_diffusion(parts: dict[str, Any], draw: str) -> None:
    pipe = quiet(StableDiffusionPipeline(**parts, scheduler=DDIMScheduler(**DDIM_STABLE)))
    prompts = ["a cat", "a dog"]
    given = {"num_inference_steps": 4, "height": 16, "width": 16, **DRAWS[draw]}
    assert_same_picture(pipe, DDIMScheduler(**DDIM_STABLE), prompts, **given)
    v = DDIMScheduler(**DDIM_STABLE, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert_same_picture(pipe, v, prompts, guidance_scale=1.0, **given)


@pytest.mark.parametrize("other", [PNDMScheduler, EulerDiscreteScheduler])
def test_stable_diffusion_that_names_another_scheduler(parts: dict[str, Any], other: Any) -> None:
    pipe = quiet(StableDiffusionPipeline(**parts, scheduler=other(**STABLE)))
    original = ORIGINAL.from_config(pipe.scheduler.config)
    given = {"num_inference_steps": 4, "height": 16, "width": 16, "generator": gen}
    assert_same_picture(pipe, original, "a cat", **given)


def test_given_timesteps_of_a_strict_scheduler(parts: dict[str, Any]) -> None:
    pipe = quiet(StableDiffusionPipeline(**parts, scheduler=DDIMScheduler(**DDIM_STABLE)))
    strict = FAST(**DDIM_STABLE, strict=True)
    size = {"height": 16, "width": 16, "generator": gen}
    by_number = picture(pipe, strict, "a cat", num_inference_steps=4, **size)
    chosen = strict.timesteps.tolist()
    assert np.array_equal(picture(pipe, strict, "a cat", timesteps=chosen, **size), by_number)
    other = picture(pipe, strict, "a cat", timesteps=[999, 400, 30], **size)
    assert strict.timesteps.tolist() == [999, 400, 30]
    assert not np.array_equal(other, by_number)


def photograph(size: int = 16) -> Tensor:
    return torch.rand(1, 3, size, size, generator=gen(9))


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_image_to_image(parts: dict[str, Any], eta: float) -> None:
    pipe = quiet(StableDiffusionImg2ImgPipeline(**parts, scheduler=DDIMScheduler(**DDIM_STABLE)))
    given = {
        "image": photograph(),
        "strength": 0.6,
        "num_inference_steps": 10,
        "eta": eta,
        "generator": gen,
    }
    assert_same_picture(pipe, DDIMScheduler(**DDIM_STABLE), "a cat", **given)


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_inpainting(parts: dict[str, Any], channels: int, eta: float) -> None:
    torch.manual_seed(2)
    own = {**parts, "unet": parts["unet"] if channels == 4 else conditional_unet(9)}
    pipe = quiet(StableDiffusionInpaintPipeline(**own, scheduler=DDIMScheduler(**DDIM_STABLE)))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    given = {
        "image": photograph(),
        "mask_image": mask,
        "strength": 0.8,
        "num_inference_steps": 8,
        "height": 16,
        "width": 16,
        "eta": eta,
        "generator": gen,
    }
    assert_same_picture(pipe, DDIMScheduler(**DDIM_STABLE), "a cat", **given)


def test_a_callback_that_keeps_and_changes_the_latents(parts: dict[str, Any]) -> None:
    pipe = quiet(StableDiffusionPipeline(**parts, scheduler=DDIMScheduler(**DDIM_STABLE)))
    kept: dict[type, list[tuple[Tensor, Tensor]]] = {}

    def callback(pipe: Any, step: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        latents = tensors["latents"]
        kept.setdefault(type(pipe.scheduler), []).append((latents, latents.clone()))
        return {"latents": latents * 0.9} if step % 2 else tensors

    given = {"num_inference_steps": 4, "height": 16, "width": 16, "generator": gen}
    given["callback_on_step_end"] = lambda: callback
    assert_same_picture(pipe, DDIMScheduler(**DDIM_STABLE), "a cat", **given)
    for (a, then), (b, _) in zip(*kept.values(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, then)


@pytest.mark.parametrize("strict", [False, True])
def test_a_saved_pipeline_loads_again(parts: dict[str, Any], strict: bool, tmp_path: Path) -> None:
    scheduler = FAST(**DDIM_STABLE, strict=strict)
    pipe = quiet(StableDiffusionPipeline(**parts, scheduler=scheduler))
    given = {"num_inference_steps": 4, "height": 16, "width": 16, "generator": gen}
    expected = picture(pipe, scheduler, "a cat", **given)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["fastddim.dropins.diffusers", "FastDDIMScheduler"]
    options = {"local_files_only": True, "low_cpu_mem_usage": False}
    again = quiet(StableDiffusionPipeline.from_pretrained(str(tmp_path), **options))
    assert type(again.scheduler) is FastDDIMScheduler
    assert again.scheduler.config["strict"] is strict
    assert np.array_equal(picture(again, again.scheduler, "a cat", **given), expected)
    # And by somebody who gives it the original.
    plain = DDIMScheduler.from_pretrained(str(tmp_path), subfolder="scheduler")
    if not strict:
        assert np.array_equal(picture(again, plain, "a cat", **given), expected)


def test_a_copied_pipeline_and_parts_for_another(parts: dict[str, Any]) -> None:
    pipe: Any = quiet(StableDiffusionPipeline(**parts, scheduler=FAST(**DDIM_STABLE)))
    given = {"num_inference_steps": 4, "height": 16, "width": 16, "generator": gen}
    expected = picture(pipe, pipe.scheduler, "a cat", **given)
    second = copy.deepcopy(pipe.scheduler)
    assert np.array_equal(picture(pipe, second, "a cat", **given), expected)
    other: Any = quiet(StableDiffusionImg2ImgPipeline(**pipe.components))
    assert type(other.scheduler) is FastDDIMScheduler


@pytest.mark.parametrize("scheduler", [FastDDIMParallelScheduler, FastDDIMInverseScheduler])
def test_the_other_schedulers_in_a_pipeline(parts: dict[str, Any], scheduler: Any) -> None:
    original: Any = getattr(diffusers, scheduler.__name__.removeprefix("Fast"))
    pipe = quiet(StableDiffusionPipeline(**parts, scheduler=DDIMScheduler(**DDIM_STABLE)))
    given = {"num_inference_steps": 4, "height": 16, "width": 16, "generator": gen}
    own = {k: v for k, v in DDIM_STABLE.items() if k != "steps_offset"}
    a, b = (picture(pipe, cls(**own), "a cat", **given) for cls in (original, scheduler))
    assert np.array_equal(a, b)


MULTISTEP: dict[str, dict[str, Any]] = {
    "ode": {"use_karras_sigmas": True},
    "sde": {"algorithm_type": "sde-dpmsolver++", "timestep_spacing": "leading"},
    "v": {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["text", "image", "mask"])
@pytest.mark.parametrize("config", MULTISTEP)
def test_the_multistep_solver_in_pipelines(parts: dict[str, Any], config: str, kind: str) -> None:
    own = STABLE | MULTISTEP[config]
    made: Any = {
        "text": StableDiffusionPipeline,
        "image": StableDiffusionImg2ImgPipeline,
        "mask": StableDiffusionInpaintPipeline,
    }[kind]
    original = diffusers.DPMSolverMultistepScheduler(**own)
    pipe = quiet(made(**parts, scheduler=original))
    given: dict[str, Any] = {"num_inference_steps": 8, "generator": gen}
    if kind != "text":
        given |= {"image": photograph(), "strength": 0.6}
    if kind == "mask":
        given["mask_image"] = torch.ones(1, 1, 16, 16).tril()
    if kind != "image":
        given |= {"height": 16, "width": 16}
    a = picture(pipe, original, "a cat", **given)
    b = picture(
        pipe, FastDPMSolverMultistepScheduler.from_config(original.config), "a cat", **given
    )
    assert type(pipe.scheduler) is FastDPMSolverMultistepScheduler
    assert pipe.scheduler.step_index == original.step_index
    np.testing.assert_allclose(b, a, atol=1e-4)


@pytest.mark.parametrize("kind", ["text", "image"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_euler_ancestral_in_pipelines(parts: dict[str, Any], prediction: str, kind: str) -> None:
    made = {"text": StableDiffusionPipeline, "image": StableDiffusionImg2ImgPipeline}[kind]
    original = diffusers.EulerAncestralDiscreteScheduler(**STABLE, prediction_type=prediction)
    pipe = quiet(made(**parts, scheduler=original))
    given: dict[str, Any] = {"num_inference_steps": 8, "generator": gen}
    given |= {"height": 16, "width": 16} if kind == "text" else {"image": photograph()}
    fast: Any = FastEulerAncestralDiscreteScheduler.from_config(original.config)
    a, b = (picture(pipe, scheduler, "a cat", **given) for scheduler in (original, fast))
    assert type(pipe.scheduler) is FastEulerAncestralDiscreteScheduler
    assert fast.step_index == original.step_index
    assert np.array_equal(a, b)


def test_a_pipeline_saved_with_the_multistep_solver_loads_again(
    parts: dict[str, Any], tmp_path: Path
) -> None:
    scheduler = FastDPMSolverMultistepScheduler(**STABLE)
    pipe = quiet(StableDiffusionPipeline(**parts, scheduler=scheduler))
    given = {"num_inference_steps": 4, "height": 16, "width": 16, "generator": gen}
    expected = picture(pipe, scheduler, "a cat", **given)
    pipe.save_pretrained(tmp_path)
    options = {"local_files_only": True, "low_cpu_mem_usage": False}
    again = quiet(StableDiffusionPipeline.from_pretrained(str(tmp_path), **options))
    assert type(again.scheduler) is FastDPMSolverMultistepScheduler
    assert np.array_equal(picture(again, again.scheduler, "a cat", **given), expected)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_strict_with_seeds_gives_an_image_its_own_noise(parts: dict[str, Any], eta: float) -> None:
    """The model rounds differently at another batch size; the noise is the same."""
    scheduler = FAST(**DDIM_STABLE, strict=True)
    pipe: Any = quiet(StableDiffusionPipeline(**parts, scheduler=scheduler))

    def pictures(seeds: list[int], **more: Any) -> Any:
        scheduler.use_seeds(seeds)
        latents = scheduler.initial_latents((len(seeds), 4, 8, 8))
        return pipe(
            ["a cat"] * len(seeds),
            num_inference_steps=5,
            latents=latents,
            eta=eta,
            output_type="np",
            **more,
        ).images

    together = pictures([11, 12, 13])
    assert np.abs(together[0] - together[1]).max() > 1e-3
    for i, seed in enumerate([11, 12, 13]):
        np.testing.assert_allclose(pictures([seed])[0], together[i], atol=1e-4)
    again = pictures([11, 12, 13], generator=[gen(i) for i in range(3)])
    assert np.array_equal(again, together)


def test_strict_in_image_to_image_starts_where_it_should(parts: dict[str, Any]) -> None:
    """The first step taken goes to the second timestep taken."""
    scheduler = FAST(**DDIM_STABLE, strict=True, timestep_spacing="trailing")
    pipe = quiet(StableDiffusionImg2ImgPipeline(**parts, scheduler=scheduler))
    seen: list[int] = []
    step: Callable[..., Any] = scheduler.step

    def watched(output: Tensor, t: Any, x: Tensor, **given: Any) -> Any:
        seen.append(int(t))
        return step(output, t, x, **given)

    scheduler.step = watched
    given = {"image": photograph(), "strength": 0.5, "num_inference_steps": 12, "generator": gen}
    picture(pipe, scheduler, "a cat", **given)
    assert seen == scheduler.timesteps.tolist()[6:]
