"""A loop of Stable Diffusion XL that ends early and another that goes on: the whole loop."""

from __future__ import annotations

import importlib
import itertools
import socket
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim.dropins.diffusers import FastDDIMScheduler

diffusers: Any = importlib.import_module("diffusers")  # without its types
FAST: Any = FastDDIMScheduler

CASES = list(
    itertools.product(
        ("leading", "trailing", "linspace"), (7, 10, 25), (0.1, 0.35, 0.8, 0.85), (0.0, 1.0)
    )
)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing reaches for the network."""
    monkeypatch.setattr(socket.socket, "connect", None)


@pytest.fixture(scope="module")
def pipelines() -> tuple[Any, Any]:
    """Small random parts without text encoders: the calls hand over the embeddings."""
    torch.manual_seed(2)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + 16,
    ).eval()
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4)
    parts: dict[str, Any] = {
        "unet": unet,
        "vae": vae,
        "scheduler": FAST(),
        **dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
    }
    found = (
        diffusers.StableDiffusionXLPipeline(**parts),
        diffusers.StableDiffusionXLImg2ImgPipeline(**parts),
    )
    for pipe in found:
        pipe.set_progress_bar_config(disable=True)
    return found


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


@pytest.mark.one_in(2)
@pytest.mark.parametrize("shared", [True, False], ids=["one-scheduler", "two-schedulers"])
@pytest.mark.parametrize(
    ("spacing", "steps", "end", "eta"),
    [pytest.param(*c, marks=() if c in CASES[4::31] else pytest.mark.slow) for c in CASES],
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
