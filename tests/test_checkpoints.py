"""Checkpoints load exactly or are refused in one line; none is ever unpickled."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from safetensors.torch import load_file, save_file

from fastddim import DDIM, checkpoints, embedded

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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    UNet2DModel(**TINY).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


def by_diffusers(folder: Path) -> Any:
    model = UNet2DModel.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
    # On a CPU, attention that may need a gradient is another kernel and rounds differently.
    return model.eval().requires_grad_(False)


def refusal(path: Path | str, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        checkpoints.load(path)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value).strip()
    return str(caught.value)


def test_the_model_that_ships() -> None:
    model, shape = checkpoints.load()
    again, _ = checkpoints.load(embedded.WEIGHTS)
    assert shape == embedded.SHAPE
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    x, t = torch.randn(2, *shape), torch.tensor([3, 700])
    assert torch.equal(model(x, t), again(x, t))


@pytest.mark.parametrize("inside", ["", "unet"])
def test_diffusers_folder_gives_diffusers_output(saved: Path, tmp_path: Path, inside: str) -> None:
    shutil.copytree(saved, tmp_path / "model" / inside)
    model, shape = checkpoints.load(tmp_path / "model")
    assert shape == (3, 8, 4)
    assert not model.training
    theirs = by_diffusers(saved)
    x, t = torch.randn(2, *shape), torch.tensor([0, 999])
    assert torch.equal(model(x, t).sample, theirs(x, t).sample)
    out = [DDIM(3).sample(m, shape=(2, *shape), seeds=[0, 1]) for m in (model, theirs)]
    assert torch.equal(*out)


def test_half_precision_weights_become_float32(folder: Path) -> None:
    half = {name: w.half() for name, w in load_file(folder / WEIGHTS).items()}
    save_file(half, folder / WEIGHTS)
    model, _ = checkpoints.load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(w, half[name].float()) for name, w in model.state_dict().items())


def test_old_attention_names_as_diffusers_reads_them(folder: Path) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, w in load_file(folder / WEIGHTS).items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        weights[name] = w
    assert any(".proj_attn." in name for name in weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    model, shape = checkpoints.load(folder)
    theirs = by_diffusers(folder)
    x, t = torch.randn(2, *shape), torch.tensor([0, 999])
    assert torch.equal(model(x, t).sample, theirs(x, t).sample)


def test_missing(tmp_path: Path) -> None:
    message = refusal(tmp_path / "none.safetensors", FileNotFoundError)
    assert "none.safetensors" in message
    assert "allowed: a safetensors file of garment weights or a folder with" in message


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return pytest.fail, ("a checkpoint was unpickled",)


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.bin", "a.pkl", "a.safetensors"])
@pytest.mark.parametrize("write", [torch.save, lambda x, p: p.write_bytes(pickle.dumps(x))])
def test_pickles_are_refused_unread(
    tmp_path: Path, name: str, write: Callable[[Any, Path], Any]
) -> None:
    write(Bomb(), tmp_path / name)
    message = refusal(tmp_path / name)
    assert name in message
    assert "is a pickle" in message
    assert "allowed: " in message
    with pytest.raises(ValueError, match="is a pickle"):
        embedded.load(tmp_path / name)


@pytest.mark.parametrize("kept", [0, 1, 8, 9, 400, 100_000, -1])
def test_truncated_garments(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(embedded.WEIGHTS.read_bytes()[:kept])
    message = refusal(path)
    assert "cut.safetensors" in message
    assert "truncated" in message if kept else "an empty file" in message


def test_truncated_diffusers(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-1])
    assert "truncated" in refusal(folder)


def test_other_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello, this is a text")
    assert "a file of another kind" in refusal(tmp_path / "a.txt")
    assert "a folder without config.json" in refusal(tmp_path)
    assert "neither a file nor a folder" in refusal("/dev/null")
    save_file({"w": torch.zeros(1)}, tmp_path / "lora.safetensors")
    assert "has no 'unet'" in refusal(tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("unet", "said"),
    [
        ("not json", "describes no garment model"),
        ("[1]", "describes no garment model"),
        ('{"nonsense": 1}', "describes no garment model"),
        (json.dumps(TINY), "must have 4 channels in and out, got 3 and 3"),
    ],
)
def test_garments_with_a_wrong_description(tmp_path: Path, unet: str, said: str) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "a.safetensors", {"unet": unet})
    assert said in refusal(tmp_path / "a.safetensors")


def test_garments_that_do_not_fit(tmp_path: Path) -> None:
    from fastddim.embedded.model import UNET

    weights = load_file(embedded.WEIGHTS)
    del weights["conv_in.bias"]
    weights["conv_out.bias"] = torch.zeros(7)
    weights |= {f"extra{i}": torch.zeros(1) for i in range(5)}
    save_file(weights, tmp_path / "a.safetensors", {"unet": json.dumps(UNET)})
    assert refusal(tmp_path / "a.safetensors").endswith(
        "does not hold the model's weights: 1 missing (conv_in.bias), "
        "5 left over (extra0, extra1, extra2, ...), "
        "1 of another shape (conv_out.bias (7,) for (4,))"
    )


def test_diffusers_weights_that_do_not_fit(folder: Path) -> None:
    change(folder, layers_per_block=2)
    assert " missing (" in refusal(folder)
    change(folder, layers_per_block=1, block_out_channels=[16, 8])
    assert " of another shape (" in refusal(folder)


def test_diffusers_without_safetensors(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    assert f"no {WEIGHTS} in" in refusal(folder, FileNotFoundError)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "must be of a UNet2DModel, got 'UNet2DCond"),
        ({"num_class_embeds": 10}, "unconditional model, got num_class_embeds = 10"),
        ({"class_embed_type": "timestep"}, "unconditional model, got class_embed_type = 'time"),
        ({"time_embedding_type": "fourier"}, "noise level"),
        ({"out_channels": 6}, "as many out_channels as in_channels, got 6 and 3"),
        ({"sample_size": None}, "must have a sample_size, n or [height, width], got None"),
        ({"sample_size": [8, 8, 8]}, "must have a sample_size"),
        ({"nonsense": 1}, "builds no UNet2DModel"),
        ({"block_out_channels": "abc"}, "builds no UNet2DModel"),
    ],
)
def test_diffusers_configurations_refused(folder: Path, fields: dict[str, Any], said: str) -> None:
    change(folder, **fields)
    message = refusal(folder)
    assert said in message
    assert "config.json" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "\x80"])
def test_diffusers_configuration_that_is_no_json(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert "JSON" in refusal(folder)


@pytest.mark.parametrize("place", ["", "scheduler"])
def test_another_schedule_or_prediction_is_refused(folder: Path, place: str) -> None:
    path = folder / place / "scheduler_config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"beta_schedule": "linear", "num_train_timesteps": 1000}))
    checkpoints.load(folder)
    for name, value in {"prediction_type": "v_prediction", "beta_end": 0.012}.items():
        path.write_text(json.dumps({name: value}))
        message = refusal(folder)
        assert f"must have {name} = " in message
        assert message.endswith(f"got {value!r}")
