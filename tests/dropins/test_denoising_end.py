"""A loop of Stable Diffusion XL that ends early and another that goes on: the whole loop."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim.dropins.diffusers import FastDDIMScheduler
from tests.dropins.pipeline_cases import autoencoder, conditional_unet, diffusers, quiet

FAST: Any = FastDDIMScheduler

CASES = list(
    itertools.product(
        ("leading", "trailing", "linspace"), (7, 10, 25), (0.1, 0.35, 0.8, 0.85), (0.0, 1.0)
    )
)


pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def pipelines() -> tuple[Any, Any]:
    """Small random parts without text encoders: the calls hand over the embeddings."""
    torch.manual_seed(2)
    unet = conditional_unet(
        4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + 16,
    )
    parts: dict[str, Any] = {
        "unet": unet,
        "vae": autoencoder(4),
        "scheduler": FAST(),
        **dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
    }
    base = quiet(diffusers.StableDiffusionXLPipeline(**parts))
    return base, quiet(diffusers.StableDiffusionXLImg2ImgPipeline(**parts))


def latents(pipe: Any, scheduler: Any, **given: Any) -> Tensor:
    pipe.scheduler = scheduler
    drawn = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 5, 16, generator=drawn)
    pooled = torch.randn(1, 16, generator=drawn)
    found: Tensor = pipe(
        prompt_embeds=hidden,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=-hidden,
        negative_pooled_prompt_embeds=-pooled,
        guidance_scale=3.0,
        output_type="latent",
        **given,
    ).images
    return found


@pytest.mark.parametrize(
    ("spacing", "steps", "end", "eta", "shared"),
    [
        # One scheduler serves both parts in every third case, with each value of the others.
        pytest.param(*c, i % 3 == 0, marks=() if i % 31 == 4 else pytest.mark.slow)
        for i, c in enumerate(CASES)
    ],
)
def test_a_loop_in_two_parts_is_the_whole_strict_loop(
    pipelines: tuple[Any, Any], spacing: str, steps: int, end: float, eta: float, shared: bool
) -> None:
    base, refiner = pipelines
    first: Any = FAST(clip_sample=False, timestep_spacing=spacing, strict=True)
    second = first if shared else FAST.from_config(first.config)
    given: dict[str, Any] = {"num_inference_steps": steps, "eta": eta}
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    drawn = [torch.Generator().manual_seed(2) for _ in range(2)]
    size: dict[str, Any] = {"height": 16, "width": 16, "latents": x}
    whole = latents(base, first, generator=drawn[0], **size, **given)
    half = latents(base, first, generator=drawn[1], denoising_end=end, **size, **given)
    assert not torch.equal(half, whole)
    rest = latents(
        refiner, second, generator=drawn[1], denoising_start=end, image=half, strength=0.5, **given
    )
    assert torch.equal(rest, whole)
    assert torch.equal(drawn[0].get_state(), drawn[1].get_state())
