"""Checkpoints load exactly or are refused in one line; no code in one is ever run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastddim import DDIM, checkpoints, embedded
from tests.models.checkpoint_files import (
    ERMONGROUP,
    TINY,
    WEIGHTS,
    by_diffusers,
    change,
    folder,
    legacy,
    network,
    plain,
    refusal,
    saved,
    state,
)

__all__ = ["folder", "saved"]


def test_the_model_that_ships() -> None:
    model, shape = network(checkpoints.load())
    again, _ = network(checkpoints.load(embedded.WEIGHTS))
    assert shape == embedded.SHAPE
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    x, t = torch.randn(2, *shape), torch.tensor([3, 700])
    assert torch.equal(model(x, t), again(x, t))


@pytest.mark.parametrize("inside", ["", "unet"])
def test_diffusers_folder_gives_diffusers_output(saved: Path, tmp_path: Path, inside: str) -> None:
    shutil.copytree(saved, tmp_path / "model" / inside)
    model, shape = network(checkpoints.load(tmp_path / "model"))
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
    model, _ = network(checkpoints.load(folder))
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
    model, shape = network(checkpoints.load(folder))
    theirs = by_diffusers(folder)
    x, t = torch.randn(2, *shape), torch.tensor([0, 999])
    assert torch.equal(model(x, t).sample, theirs(x, t).sample)


def test_missing(tmp_path: Path) -> None:
    message = refusal(tmp_path / "none.safetensors", FileNotFoundError)
    assert "none.safetensors" in message
    assert "allowed: a folder with a diffusers UNet2DModel" in message
    assert (
        "or a file with the weights of garments or ermongroup/ddim or guided-diffusion" in message
    )


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return pytest.fail, ("a checkpoint was unpickled",)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("write", [torch.save, legacy, plain])
def test_pickles_that_want_code_are_refused(
    tmp_path: Path, name: str, write: Callable[[Any, Path], Any]
) -> None:
    write(state(ERMONGROUP) | {"bomb": Bomb()}, tmp_path / name)
    message = refusal(tmp_path / name)
    assert name in message
    assert "is a pickle that " in message
    assert "none is run" in message
    assert "--model" in message
    assert "weights_only" not in message
    with pytest.raises(ValueError, match="is a pickle"):
        embedded.load(tmp_path / name)


def test_edm_is_told_what_to_do(tmp_path: Path) -> None:
    # As EDM's are written: an object whose class comes along as source code.
    (tmp_path / "edm.pkl").write_bytes(
        b"\x80\3}X\3\0\0\0emactorch_utils.persistence\n_reconstruct_persistent_obj\n}\x85Rs."
    )
    message = refusal(tmp_path / "edm.pkl")
    assert "wants code (torch_utils.persistence._reconstruct_persistent_obj)" in message
    assert "save the network's state_dict(), or name a function that builds it" in message


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
    assert "has tensors of no kind known here (w)" in refusal(tmp_path / "lora.safetensors")


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
    weights = load_file(folder / WEIGHTS)
    os.remove(folder / WEIGHTS)
    message = refusal(folder, FileNotFoundError)
    assert f"no {WEIGHTS} or diffusion_pytorch_model.bin in" in message
    torch.save(weights, folder / "diffusion_pytorch_model.bin")
    model, _ = network(checkpoints.load(folder))
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())


@pytest.mark.parametrize("named", [False, True])
def test_diffusers_weights_with_their_configuration(
    folder: Path, tmp_path: Path, named: bool
) -> None:
    config, weights = folder / "config.json", folder / WEIGHTS
    if named:
        config = Path(shutil.move(config, tmp_path / "tiny.json"))
    loaded = checkpoints.load(weights, config=str(config) if named else None)
    model, shape = network(loaded)
    assert shape == (3, 8, 4)
    assert all(torch.equal(w, model.state_dict()[name]) for name, w in load_file(weights).items())
    assert "diffusers, 0.0 M parameters, 3x8x4" in loaded.description
    if named:
        assert "config.json must be beside it, or config name it" in refusal(weights)


def test_a_shape_where_a_configuration_has_none(folder: Path) -> None:
    change(folder, sample_size=None)
    loaded = checkpoints.load(folder, shape=(3, 6, 4))
    assert loaded.shape == (3, 6, 4)
    DDIM(1).sample(loaded.model, shape=(1, *loaded.shape), seeds=[0])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "must be of a UNet2DModel, got 'UNet2DCond"),
        ({"class_embed_type": "timestep"}, "no class or a class number, got class_embed_type ="),
        ({"time_embedding_type": "fourier"}, "noise level"),
        ({"out_channels": 5}, "as many out_channels as in_channels, or twice as many, got 5 and 3"),
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
