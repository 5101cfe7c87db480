"""Checkpoints that several test files write and load."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from fastddim import checkpoints

TINY: dict[str, Any] = {
    "sample_size": [8, 4],
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}


WEIGHTS = "diffusion_pytorch_model.safetensors"


GOLDEN = Path(__file__).parents[1] / "golden"


ERMONGROUP = GOLDEN / "ermongroup-tiny-plain.ckpt"


GUIDED = GOLDEN / "guided-tiny.pt"


FLAGS: dict[str, Any] = {"image_size": 16, "num_head_channels": 32}
"""Those of ``GUIDED`` that its tensors do not tell."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    UNet2DModel(**TINY).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def state(file: Path) -> dict[str, torch.Tensor]:
    tensors = torch.load(file, weights_only=True)
    assert isinstance(tensors, dict)
    return tensors


def change(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


def by_diffusers(folder: Path) -> Any:
    model = UNet2DModel.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
    # On a CPU, attention that may need a gradient is another kernel and rounds differently.
    return model.eval().requires_grad_(False)


def network(loaded: checkpoints.Loaded) -> tuple[torch.nn.Module, tuple[int, int, int]]:
    assert isinstance(loaded.model, torch.nn.Module)
    return loaded.model, loaded.shape


def refusal(path: Path | str, kind: type[Exception] = ValueError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        checkpoints.load(path, **options)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value).strip()
    return str(caught.value)


def legacy(held: Any, path: Path) -> None:
    torch.save(held, path, _use_new_zipfile_serialization=False)


def plain(held: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(held))


def written(flags: dict[str, Any], folder: Path) -> str:
    (folder / "flags.json").write_text(json.dumps(flags))
    return str(folder / "flags.json")


def whole_checkpoint(ema: bool) -> list[Any]:
    """As ermongroup/ddim trains: DataParallel's names, other weights, an optimizer, counters."""
    weights = state(ERMONGROUP)
    torch.manual_seed(0)
    other = {f"module.{name}": torch.randn_like(w) for name, w in weights.items()}
    adam = {"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3)}}}
    if not ema:
        other = {f"module.{name}": w for name, w in weights.items()}
    return [other, adam, 3, 790_000, *([weights] if ema else [])]
