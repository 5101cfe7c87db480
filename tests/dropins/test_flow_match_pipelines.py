"""Stable Diffusion 3 and FLUX of small random parts: the same pictures as with the original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.dropins.euler_cases import FLOW, FLOW_ORIGINAL, Config, drawn
from tests.dropins.pipeline_cases import autoencoder, diffusers, quiet

pytestmark = pytest.mark.usefixtures("offline")
ENCODERS = [f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")]


SHIFTED: dict[str, Any] = {"shift_factor": 0.1, "scaling_factor": 1.5}


@pytest.fixture(scope="module")
def stable() -> dict[str, Any]:
    """The parts of Stable Diffusion 3, whose text encoders the callers replace by embeddings."""
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
    )
    none = dict.fromkeys(ENCODERS)
    return {"transformer": transformer.eval(), "vae": autoencoder(4, **SHIFTED), **none}


@pytest.fixture(scope="module")
def flux() -> dict[str, Any]:
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    none = dict.fromkeys(name for name in ENCODERS if not name.endswith("3"))
    return {"transformer": transformer.eval(), "vae": autoencoder(1, **SHIFTED), **none}


def picture(pipe: Any, scheduler: Any, **given: Any) -> Any:
    quiet(pipe).scheduler = scheduler
    words = {"prompt_embeds": drawn(1, (1, 5, 32)), "pooled_prompt_embeds": drawn(2, (1, 32))}
    if "negative_prompt_embeds" in given:
        given |= {"negative_pooled_prompt_embeds": drawn(4, (1, 32))}
    given |= {"num_inference_steps": 5, "output_type": "np", "height": 16, "width": 16}
    torch.manual_seed(3)  # These pipelines pass their generator to no step.
    images = pipe(**words, **given, generator=torch.Generator().manual_seed(5)).images
    assert np.isfinite(images).all()
    assert images.std() > 0
    return images


@pytest.mark.parametrize(
    "config",
    [
        {"shift": 3.0},
        {"shift": 3.0, "stochastic_sampling": True},
        {"use_dynamic_shifting": True},
        {"use_karras_sigmas": True},
    ],
)
@pytest.mark.parametrize("kind", ["text", "image"])
def test_stable_diffusion_3_draws_the_originals_picture(
    stable: dict[str, Any], kind: str, config: Config
) -> None:
    original = FLOW_ORIGINAL(**config)
    names = {
        "text": "StableDiffusion3Pipeline",
        "image": "StableDiffusion3Img2ImgPipeline",
    }
    pipe = getattr(diffusers, names[kind])(**stable, scheduler=original)
    given: dict[str, Any] = {"negative_prompt_embeds": drawn(3, (1, 5, 32))}
    if config.get("use_dynamic_shifting"):
        given["mu"] = 0.7
    if kind == "image":
        given |= {"image": drawn(6, (1, 3, 16, 16)).sigmoid(), "strength": 0.6}
    fast = FLOW.from_config(original.config)
    a, b = (picture(pipe, scheduler, **given) for scheduler in (original, fast))
    assert fast.step_index == original.step_index
    assert np.array_equal(a, b)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_flux_draws_the_originals_picture(flux: dict[str, Any], kind: str, tmp_path: Path) -> None:
    original = FLOW_ORIGINAL(use_dynamic_shifting=True, shift=3.0, time_shift_type=kind)
    pipe = diffusers.FluxPipeline(**flux, scheduler=original)
    a = picture(pipe, original)
    assert np.array_equal(a, picture(pipe, FLOW.from_config(original.config)))
    pipe.save_pretrained(tmp_path)
    none = {name: None for name, part in flux.items() if part is None}
    options = {**none, "local_files_only": True, "low_cpu_mem_usage": False}
    again = diffusers.FluxPipeline.from_pretrained(str(tmp_path), **options)
    assert type(again.scheduler) is FLOW
    # A network whose weights lie elsewhere in memory may round differently.
    np.testing.assert_allclose(a, picture(again, again.scheduler), atol=1e-5)
