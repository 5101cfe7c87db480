"""Checkpoints load exactly or are refused in one line; no code in one is ever run."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file, save_file

from fastddim import DDIM, NoiseSchedule, checkpoints, embedded
from fastddim.__main__ import main
from fastddim.models import unets
from tests import networks
from tests.networks import Guided

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

CLOSE = 2e-6
"""How far another implementation's answer may be from the one recorded."""


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


def legacy(held: Any, path: Path) -> None:
    torch.save(held, path, _use_new_zipfile_serialization=False)


def plain(held: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(held))


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
        ({"class_embed_type": "timestep"}, "no class or its number, got class_embed_type = 'time"),
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


SCHEDULERS: list[tuple[dict[str, Any], str, int]] = [
    ({}, "linear(0.0001, 0.02)", 1000),
    ({"beta_start": 0.00085, "beta_end": 0.012}, "linear(0.00085, 0.012)", 1000),
    ({"num_train_timesteps": 100, "beta_end": 0.2}, "linear(0.0001, 0.2)", 100),
    ({"beta_schedule": "scaled_linear"}, "scaled_linear(0.0001, 0.02)", 1000),
    ({"beta_schedule": "squaredcos_cap_v2"}, "cosine", 1000),
    ({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50}, "cosine", 50),
    ({"beta_schedule": "sigmoid"}, "sigmoid(0.0001, 0.02)", 1000),
    ({"trained_betas": [0.1, 0.2, 0.3, 0.4], "num_train_timesteps": 4}, "trained_betas", 4),
    ({"rescale_betas_zero_snr": True}, "linear(0.0001, 0.02), rescaled to zero", 1000),
]


@pytest.mark.parametrize("place", ["scheduler_config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize(("fields", "name", "T"), SCHEDULERS)
def test_the_schedule_is_the_schedulers(
    folder: Path, place: str, fields: dict[str, Any], name: str, T: int
) -> None:
    theirs = DDPMScheduler(**fields)
    theirs.save_pretrained((folder / place).parent)
    loaded = checkpoints.load(folder)
    assert len(loaded.schedule) == T
    assert loaded.schedule.name.startswith(name)
    ours = torch.from_numpy(loaded.schedule.alphas_cumprod.copy())
    # Theirs is multiplied up in float32.
    assert torch.allclose(ours, theirs.alphas_cumprod.double(), rtol=3e-4, atol=1e-7)
    assert f"epsilon on {loaded.schedule.name} noise, T = {T}" in loaded.description
    assert f"({place})" in loaded.description


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_pipeline_in_a_folder_samples_as_diffusers_has_it(
    folder: Path, prediction: Any, clip: float | None
) -> None:
    make: Any = DDIMScheduler  # whose types are narrower than what it takes
    theirs = make(
        num_train_timesteps=100,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
    )
    theirs.save_pretrained(folder / "scheduler")
    loaded = checkpoints.load(folder)
    assert loaded.clip == clip
    model, shape = network(loaded)
    x_T = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    ours = loaded.ddim(10, spacing="leading").sample(model, x_T)
    theirs.set_timesteps(10)
    x = x_T
    with torch.no_grad():
        for t in theirs.timesteps:
            x = theirs.step(model(x, t).sample, t, x).prev_sample
    assert x.std() > 0.1
    assert torch.allclose(ours, x, rtol=1e-4, atol=1e-5)
    assert not loaded.ddim(10, clip=None).clip


def test_a_configurations_missing_values_are_its_classs(folder: Path) -> None:
    """As diffusers fills it in: configurations written long ago say little."""
    path = folder / "scheduler_config.json"
    for fields, expected in (
        ({}, ("epsilon", None)),
        ({"_class_name": "DDPMScheduler"}, ("epsilon", 1.0)),
        ({"_class_name": "DDIMParallelScheduler"}, ("epsilon", 1.0)),
        ({"_class_name": "DDIMScheduler", "clip_sample": False}, ("epsilon", None)),
        ({"_class_name": "PNDMScheduler", "beta_start": 0.0001}, ("epsilon", None)),
        ({"predict_epsilon": False}, ("sample", None)),
        ({"clip_sample": True, "clip_sample_range": 2}, ("epsilon", 2.0)),
    ):
        path.write_text(json.dumps(fields))
        loaded = checkpoints.load(folder)
        assert (loaded.prediction, loaded.clip) == expected
    path.write_text(json.dumps({"_class_name": "LCMScheduler"}))
    assert checkpoints.load(folder).schedule.name == "scaled_linear(0.00085, 0.012)"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prediction_type": "flow_prediction"}, "prediction_type one of epsilon, v_prediction, s"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "a scheduler that knows β"),
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}, "a scheduler that knows β"),
        ({"beta_schedule": "laplacian"}, "beta_schedule must be linear, scaled_linear, squaredcos"),
        ({"beta_end": 2}, "beta_start and beta_end must satisfy"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps must be an integer"),
        ({"trained_betas": [0.1, 2]}, "betas must lie in (0, 1), got 2 at 1"),
        ({"trained_betas": "betas.npy"}, "betas must be a sequence"),
        ({"beta_schedule": "sigmoid", "beta_start": None}, "beta_start must be a number"),
    ],
)
def test_schedulers_refused(folder: Path, fields: dict[str, Any], said: str) -> None:
    (folder / "scheduler_config.json").write_text(json.dumps(fields))
    message = refusal(folder)
    assert "scheduler_config.json" in message
    assert said in message


def test_without_a_scheduler_the_assumption_is_named(folder: Path) -> None:
    loaded = checkpoints.load(folder)
    said = "no scheduler_config.json: taken to predict ε on linear noise, T = 1000"
    assert loaded.description.endswith(said)
    cosine = NoiseSchedule.cosine(100)
    told = checkpoints.load(folder, schedule=cosine, prediction="v")
    assert (told.schedule, told.prediction) == (cosine, "v")
    assert told.description.endswith("v predicted as said, cosine noise, T = 100, as said")
    ermongroup = checkpoints.load(ERMONGROUP, shape=(3, 16, 16), prediction="sample")
    assert (ermongroup.prediction, ermongroup.schedule.name) == ("sample", "linear(0.0001, 0.02)")
    assert checkpoints.load(schedule=cosine).schedule is cosine
    assert "prediction must be one of epsilon, v, sample (sample is x0), got 'x'" in refusal(
        folder, prediction="x"
    )
    assert "schedule must be a NoiseSchedule, got str" in refusal(
        folder, TypeError, schedule="cosine"
    )


def test_images_that_are_latents_are_said_to_be(folder: Path) -> None:
    (folder / "vqvae").mkdir()
    assert "in latents that vqvae/ decodes, which is not done" in (
        checkpoints.load(folder).description
    )


def scaled(model: UNet2DModel, factor: float) -> UNet2DModel:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor)
    return model


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """What diffusers' train_unconditional.py leaves: both networks in ``checkpoint-500``."""
    torch.manual_seed(0)
    model = UNet2DModel(**TINY)
    ema = EMAModel(model.parameters(), model_cls=UNet2DModel, model_config=model.config, decay=0.9)
    for factor in (1.0, 2.0):  # the first is taken as it is
        ema.step(scaled(model, factor).parameters())
    folder = tmp_path / "out" / "checkpoint-500"
    ema.save_pretrained(folder / "unet_ema")
    model.save_pretrained(folder / "unet")
    DDPMScheduler(beta_schedule="squaredcos_cap_v2").save_pretrained(tmp_path / "out/scheduler")
    (folder / "scheduler.bin").touch()  # of the learning rate
    return folder


def same_weights(loaded: checkpoints.Loaded, folder: Path) -> bool:
    theirs = load_file(folder / WEIGHTS)
    ours = network(loaded)[0].state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_the_ema_of_diffusers_training_is_taken(training: Path) -> None:
    assert json.loads((training / "unet_ema/config.json").read_text())["optimization_step"] == 2
    assert not same_weights(checkpoints.load(training), training / "unet")
    for ema, name, said in (
        (None, "unet_ema", "diffusers, EMA; unet/ has the last weights,"),
        (True, "unet_ema", "diffusers, EMA; unet/ has the last weights,"),
        (False, "unet", "diffusers, no EMA; unet_ema/ has it,"),
    ):
        loaded = checkpoints.load(training, ema=ema)
        assert same_weights(loaded, training / name)
        assert said in loaded.description
        assert "scheduler/scheduler_config.json" in loaded.description
        assert loaded.schedule.name == "cosine"
        inside = checkpoints.load(training / name)
        assert same_weights(inside, training / name)
        assert inside.schedule.name == "cosine"
    assert "diffusers, EMA," in checkpoints.load(training / "unet_ema").description
    shutil.rmtree(training / "unet")
    assert same_weights(checkpoints.load(training), training / "unet_ema")
    assert "ema must be left out or True" in refusal(training, ema=False)
    assert "ema must be left out or True" in refusal(training / "unet_ema", ema=False)


def test_the_command_line_says_and_chooses_the_weights(
    training: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = ["sample", "--checkpoint", str(training), "--seeds", "0-1", "--steps", "2"]
    asked += ["--batch-size", "2", "--device", "cpu", "--out", str(tmp_path / "a.png")]
    pictures = []
    for option, said in (
        ((), "diffusers, EMA; unet/ has the last weights,"),
        (("--ema",), "diffusers, EMA; unet/ has the last weights,"),
        (("--last",), "diffusers, no EMA; unet_ema/ has it,"),
    ):
        assert main([*asked, *option]) == 0
        assert said in capfd.readouterr().err
        with Image.open(tmp_path / "a.png") as picture:
            pictures.append(picture.tobytes())
    assert pictures[0] == pictures[1] != pictures[2]
    assert main(["sample", "--last"]) == 2
    assert "last must be left out without checkpoint" in capfd.readouterr().err


def test_an_ema_that_is_not_there_is_no_choice(folder: Path, tmp_path: Path) -> None:
    assert "ema must be left out or False" in refusal(folder, ema=True)
    checkpoints.load(folder, ema=False)
    shutil.copytree(folder, tmp_path / "pipe/unet")
    assert "which has no unet_ema/" in refusal(tmp_path / "pipe", ema=True)
    assert "in which none is named" in refusal(ERMONGROUP, ema=True, shape=(3, 16, 16))
    torch.save(whole_checkpoint(ema=False), tmp_path / "a.ckpt")
    assert "in which none is named" in refusal(tmp_path / "a.ckpt", ema=True, shape=(3, 16, 16))


def test_the_ema_of_a_whole_checkpoint_can_be_left(tmp_path: Path) -> None:
    torch.save(whole_checkpoint(ema=True), tmp_path / "a.ckpt")
    ema = checkpoints.load(tmp_path / "a.ckpt", shape=(3, 16, 16))
    last = checkpoints.load(tmp_path / "a.ckpt", shape=(3, 16, 16), ema=False)
    assert "ermongroup, EMA," in ema.description
    assert "ermongroup, no EMA," in last.description
    held = whole_checkpoint(ema=True)
    for loaded, tensors, prefix in ((ema, held[4], ""), (last, held[0], "module.")):
        own = network(loaded)[0].state_dict()["conv_in.weight"]
        assert torch.equal(own, tensors[f"{prefix}conv_in.weight"])


def test_variants_and_shards_as_diffusers_writes_them(folder: Path) -> None:
    model = by_diffusers(folder)
    weights = model.state_dict()
    for options, said in (
        ({"variant": "fp16"}, "diffusers, fp16 variant,"),
        ({"variant": "non_ema"}, "diffusers, non_ema variant,"),
        ({"max_shard_size": "8KB"}, "diffusers, 0.0 M"),
        ({"max_shard_size": "8KB", "variant": "fp16"}, "diffusers, fp16 variant,"),
        ({"safe_serialization": False, "variant": "fp16"}, "diffusers, fp16 variant,"),
        ({"safe_serialization": False, "max_shard_size": "8KB"}, "diffusers, 0.0 M"),
    ):
        half = options.get("variant") == "fp16"
        for file in folder.glob("diffusion*"):
            file.unlink()
        by = copy.deepcopy(model).half() if half else model
        by.save_pretrained(folder, **options)
        assert not (folder / WEIGHTS).exists()
        loaded = checkpoints.load(folder)
        assert said in loaded.description
        for name, w in network(loaded)[0].state_dict().items():
            assert torch.equal(w, weights[name].half().float() if half else weights[name])
    model.save_pretrained(folder)
    assert same_weights(checkpoints.load(folder), folder)  # in full, before any variant
    assert " variant" not in checkpoints.load(folder).description


def test_shards_that_are_not_whole(folder: Path) -> None:
    by_diffusers(folder).save_pretrained(folder, max_shard_size="8KB")
    os.remove(folder / WEIGHTS) if (folder / WEIGHTS).exists() else None
    index = folder / f"{WEIGHTS}.index.json"
    held = json.loads(index.read_text())
    first = sorted(set(held["weight_map"].values()))[0]
    for changed, kind, said in (
        ({}, ValueError, "must name the file of each tensor in weight_map"),
        ({"a": "../b"}, FileNotFoundError, "names '../b', which is no file in its folder"),
        ({"a": "b"}, FileNotFoundError, "names 'b', which is no file in its folder"),
        ({"a": first}, ValueError, "and its files must name the same tensors: "),
    ):
        index.write_text(json.dumps({"weight_map": changed}))
        assert said in refusal(folder, kind)
    index.write_text(json.dumps(held))
    (folder / first).unlink()
    assert f"names '{first}'" in refusal(folder, FileNotFoundError)
    for name in ("a", "b"):
        (folder / f"diffusion_pytorch_model.{name}.safetensors").touch()
    index.unlink()
    assert "several variants of its weights, a, b: name the file" in refusal(folder)


WRAPPED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "compiled": (lambda w: {f"_orig_mod.{k}": v for k, v in w.items()}, "ermongroup,"),
    "both": (lambda w: {f"_orig_mod.module.{k}": v for k, v in w.items()}, "ermongroup,"),
    "a part compiled": (
        lambda w: {k.replace("down.0.", "down.0._orig_mod."): v for k, v in w.items()},
        "ermongroup,",
    ),
    "averaged": (
        lambda w: {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in w.items()}},
        "ermongroup,",
    ),
    "lightning": (
        lambda w: {"state_dict": {f"model.unet.{k}": v for k, v in w.items()}, "epoch": 3},
        "ermongroup,",
    ),
    "numpy's numbers": (
        lambda w: {
            "state_dict": w,
            "loss": np.float64(0.5),
            "step": np.int64(7),
            "losses": np.arange(3.0),
        },
        "ermongroup,",
    ),
    "model": (lambda w: {"model": w, "optimizer": {"lr": 0.1}}, "ermongroup,"),
    "ema": (
        lambda w: {"model": {k: v + 1 for k, v in w.items()}, "ema": w, "step": 3},
        "ermongroup, EMA,",
    ),
    "ema in state_dict": (
        lambda w: {"ema": {"state_dict": w, "decay": 0.9}, "state_dict": {}},
        "ermongroup, EMA,",
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_and_in_dictionaries(tmp_path: Path, name: str) -> None:
    wrap, said = WRAPPED[name]
    plain = state(ERMONGROUP)
    torch.save(wrap(plain), tmp_path / "a.pt")
    loaded = checkpoints.load(tmp_path / "a.pt", shape=(3, 16, 16))
    expected = network(checkpoints.load(ERMONGROUP, shape=(3, 16, 16)))[0].state_dict()
    ours = network(loaded)[0].state_dict()
    assert all(torch.equal(ours[k], w) for k, w in expected.items())
    assert said in loaded.description


def test_of_a_dictionary_the_last_weights_can_be_taken(tmp_path: Path) -> None:
    plain = state(ERMONGROUP)
    other = {k: v + 1 for k, v in plain.items()}
    torch.save({"model": plain, "ema": other}, tmp_path / "a.pt")
    loaded = checkpoints.load(tmp_path / "a.pt", shape=(3, 16, 16), ema=False)
    own = network(loaded)[0].state_dict()["conv_in.weight"]
    assert torch.equal(own, plain["conv_in.weight"])
    assert "ermongroup, no EMA," in loaded.description
    # An average that cannot be read is not passed over without a word.
    torch.save({"model": plain, "ema": {"shadow_params": [1.0]}}, tmp_path / "a.pt")
    assert "to take the last weights, ema must be False" in refusal(
        tmp_path / "a.pt", shape=(3, 16, 16)
    )
    checkpoints.load(tmp_path / "a.pt", shape=(3, 16, 16), ema=False)
    torch.save(plain | {"module.conv_in.weight": plain["conv_in.weight"]}, tmp_path / "a.pt")
    assert "each tensor once, got conv_in.weight twice" in refusal(tmp_path / "a.pt")


def test_compiled_weights_of_diffusers(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({f"_orig_mod.{name}": w for name, w in weights.items()}, folder / WEIGHTS)
    own = network(checkpoints.load(folder))[0].state_dict()
    assert all(torch.equal(own[name], w) for name, w in weights.items())


def test_numpys_numbers_do_not_open_the_door_to_objects(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1), "o": np.array(["a", 1], dtype=object)}, tmp_path / "a.pt")
    assert "wants code (numpy.dtypes.ObjectDType)" in refusal(tmp_path / "a.pt")


def recorded(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{name}-outputs.safetensors")


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


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: torch.save(whole_checkpoint(True), path), "ermongroup, EMA, 0.3 M"),
        (lambda path: torch.save(tuple(whole_checkpoint(False)), path), "ermongroup, no EMA, "),
        (lambda path: legacy(state(ERMONGROUP), path), "ermongroup, 0.3 M parameters, 3x16x16"),
        (lambda path: save_file(state(ERMONGROUP), path), "ermongroup, 0.3 M parameters, 3x16x16"),
    ],
)
def test_ermongroup_as_recorded(tmp_path: Path, write: Callable[[Path], None], said: str) -> None:
    write(tmp_path / "any.name")
    loaded = checkpoints.load(tmp_path / "any.name", shape=(3, 16, 16))
    model, shape = network(loaded)
    expected = recorded("ermongroup-tiny")
    assert (model(expected["x"], expected["t"]).sample - expected["y_ema"]).abs().max() <= CLOSE
    assert shape == (3, 16, 16)
    assert said in loaded.description
    assert not model.training


def test_guided_as_recorded(tmp_path: Path) -> None:
    expected = recorded("guided-tiny")
    save_file(state(GUIDED), tmp_path / "guided.safetensors")
    for file in (GUIDED, tmp_path / "guided.safetensors"):
        loaded = checkpoints.load(file, config=written(FLAGS, tmp_path))
        model, shape = network(loaded)
        assert (model(expected["x"], expected["t"]).sample - expected["y"]).abs().max() <= CLOSE
        assert shape == (3, 16, 16)
        assert loaded.description.endswith(
            "guided-diffusion, 0.4 M parameters, 3x16x16, learned variance, linear noise, T = 1000"
        )
    samples = loaded.ddim(3).sample(model, shape=(2, *shape), seeds=[0, 1])
    assert samples.shape == (2, 3, 16, 16)
    assert torch.equal(samples, DDIM(3).sample(model, shape=(2, *shape), seeds=[0, 1]))


def test_the_description_of_guided_computes_what_is_recorded() -> None:
    expected = recorded("guided-tiny")
    tiny = Guided(32, (1, 1), 1, (2,), head_channels=32)
    weights = state(GUIDED)
    assert tiny.shapes() == {name: tuple(w.shape) for name, w in weights.items()}
    assert (tiny(weights, expected["x"], expected["t"]) - expected["y"]).abs().max() <= CLOSE


@pytest.mark.parametrize(
    ("described", "flags"),
    [
        # improved-diffusion's: convolutions from level to level, heads by number
        (
            Guided(32, (1, 2, 2), 2, (2, 4), heads=2, updown=False),
            {"num_heads": 2, "resblock_updown": False, "attention_resolutions": "8,4"},
        ),
        (
            Guided(32, (1, 2), 1, (1, 2), heads=4, new_order=True, scale_shift=False, out=3),
            {"use_new_attention_order": True, "use_scale_shift_norm": False, "learn_sigma": False},
        ),
        # the published 512's: the finest level is half as wide
        (
            Guided(64, (0.5, 1, 1), 1, (4,), head_channels=16),
            {"num_head_channels": 16, "channel_mult": "0.5,1,1", "use_fp16": True},
        ),
        # t counted to 1000
        (
            Guided(32, (1, 1), 1, (), heads=4),
            {"diffusion_steps": 4000, "rescale_timesteps": True, "noise_schedule": "cosine"},
        ),
    ],
)
def test_guided_in_every_form(tmp_path: Path, described: Guided, flags: dict[str, Any]) -> None:
    weights = networks.random(described.shapes())
    torch.save(weights, tmp_path / "a.pt")
    loaded = checkpoints.load(
        tmp_path / "a.pt", config=written({"image_size": 16} | flags, tmp_path)
    )
    torch.manual_seed(0)
    x, t = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.tensor([30, 700])
    told = t * (1000 / flags.get("diffusion_steps", 1000))
    model, _ = network(loaded)
    expected = described({name: w.double() for name, w in weights.items()}, x, told)
    assert (model.double()(x, t).sample - expected).abs().max() < 1e-12


def test_flags_that_are_the_samplers(tmp_path: Path) -> None:
    def load(**flags: Any) -> checkpoints.Loaded:
        return checkpoints.load(GUIDED, config=written(FLAGS | flags, tmp_path))

    usual, cosine = load(), load(noise_schedule="cosine", predict_xstart=True)
    many = load(diffusion_steps=4000, rescale_timesteps=False)
    assert (usual.prediction, cosine.prediction) == ("epsilon", "sample")
    linear = NoiseSchedule.linear(4000, 1e-4 / 4, 0.02 / 4)
    for loaded, schedule in (
        (usual, NoiseSchedule.linear()),
        (cosine, NoiseSchedule.cosine()),
        (many, linear),
    ):
        assert loaded.schedule.alphas_cumprod == pytest.approx(schedule.alphas_cumprod, rel=1e-12)
    assert "cosine noise, T = 1000" in cosine.description
    assert (cosine.ddim(7).steps, cosine.ddim(7).prediction) == (7, "sample")
    assert many.ddim(2000).schedule is many.schedule


UNKNOWN_SIZE = "does not tell the size of its images: say its shape (--shape), such as 3,32,32"


def test_values_that_tensors_do_not_tell_are_required(tmp_path: Path) -> None:
    assert UNKNOWN_SIZE in refusal(ERMONGROUP)
    assert UNKNOWN_SIZE in refusal(GUIDED, config=written({"num_heads": 1}, tmp_path))
    message = refusal(GUIDED)
    assert "none of guided-diffusion's published networks" in message
    assert "say them with --config FLAGS.json" in message


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"num_head_channels": 24}, "32 channels, which num_heads = 4, num_head_channels = 24 do"),
        ({"num_head_channels": 0}, "num_head_channels = 0 do not divide"),
        ({"num_heads": 0}, "num_heads must be an integer ≥ 1, got 0"),
        ({"num_heads": "4"}, "must have num_heads of type int, got '4'"),
        ({"num_heads": True}, "must have num_heads of type int, got True"),
        ({"image_size": 0}, "image_size must be an integer ≥ 1, got 0"),
        ({"image_size": 15}, "shape must be 3,H,W with H and W multiples of 2"),
        ({"noise_schedule": "sigmoid"}, "noise_schedule linear or cosine, got 'sigmoid'"),
        ({"diffusion_steps": 4000}, "must have rescale_timesteps where diffusion_steps is not"),
        ({"diffusion_steps": 0, "rescale_timesteps": True}, "diffusion_steps must be an integer"),
        ({"num_heads_upsample": 8}, "must have num_heads_upsample -1, got 8"),
        ({"num_channels": 64}, "has num_channels = 64, the tensors 32"),
        ({"learn_sigma": False}, "has learn_sigma = False, the tensors True"),
        ({"num_head": 4}, "must hold guided-diffusion's flags, got 'num_head'"),
    ],
)
def test_flags_refused(tmp_path: Path, flags: dict[str, Any], said: str) -> None:
    assert said in refusal(GUIDED, config=written(FLAGS | flags, tmp_path))


@pytest.mark.parametrize("file", [ERMONGROUP, GUIDED])
def test_configurations_refused(tmp_path: Path, file: Path, folder: Path) -> None:
    assert "config must be one of cifar10, celeba64, lsun256, or a file, got 'cifar'" in refusal(
        file, config="cifar"
    )
    other = written({}, tmp_path) if file == ERMONGROUP else "cifar10"
    message = refusal(file, config=other)
    assert message.startswith("config must be ")
    assert message.endswith(f"got {other!r}")
    (tmp_path / "text.json").write_text("text")
    if file == GUIDED:
        assert "is no JSON" in refusal(file, config=str(tmp_path / "text.json"))
    for own in (embedded.WEIGHTS, folder):
        assert "config must be left out with" in refusal(own, config="cifar10")


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((3, 15, 16), "shape must be 3,H,W with H and W multiples of 2 for"),
        ((1, 16, 16), "got 1,16,16"),
        ((3, 16), "shape must be (channels, height, width), each ≥ 1, got (3, 16)"),
        ((3, 0, 16), "each ≥ 1"),
        ((3, 16.0, 16), "each ≥ 1"),
    ],
)
def test_shapes_refused(shape: Any, said: str) -> None:
    assert said in refusal(ERMONGROUP, shape=shape)


def test_garments_have_one_shape() -> None:
    assert checkpoints.load(shape=embedded.SHAPE).shape == embedded.SHAPE
    assert "shape must be left out with garment" in refusal(embedded.WEIGHTS, shape=(1, 32, 32))


@pytest.mark.parametrize("file", [ERMONGROUP, GUIDED])
def test_weights_that_do_not_fit(tmp_path: Path, file: Path) -> None:
    options: dict[str, Any] = {"shape": (3, 16, 16)}
    first, deep, wide = {
        ERMONGROUP: ("conv_in.weight", "up.1.attn.0.k.bias", "mid.block_2.conv2.weight"),
        GUIDED: ("time_embed.0.weight", "output_blocks.1.1.qkv.bias", "middle_block.1.qkv.weight"),
    }[file]
    if file == GUIDED:
        options["config"] = written(FLAGS, tmp_path)
    weights = state(file)
    del weights[deep]
    weights[wide] = torch.zeros(7, 32)
    weights |= {f"extra{i}": torch.zeros(1) for i in range(5)}
    weights["time_proj.weight"] = torch.zeros(1)
    path = tmp_path / "a.pt"
    torch.save(weights, path)
    message = refusal(path, **options)
    assert f"1 missing ({deep})" in message
    assert "6 left over (extra0, extra1, extra2, ...)" in message
    assert f"1 of another shape ({wide} (7, 32) for (32, 32" in message
    for change in ({first: None}, {first: torch.zeros(3)}):
        kept = {name: w for name, w in (state(file) | change).items() if w is not None}
        torch.save(kept, path)
        assert first in refusal(path, **options)


def test_a_name_of_diffusers_own_in_another_kind_of_file(tmp_path: Path) -> None:
    weights = state(GUIDED) | {"conv_in.weight": torch.zeros(32, 3, 3, 3)}
    torch.save(weights, tmp_path / "a.pt")
    message = refusal(tmp_path / "a.pt", config=written(FLAGS, tmp_path))
    assert message.endswith("does not hold the model's weights: 1 left over (conv_in.weight)")


def test_half_of_a_network_is_none(tmp_path: Path) -> None:
    for file, start in ((ERMONGROUP, "up.0."), (GUIDED, "output_blocks.3."), (GUIDED, "input_")):
        kept = {name: w for name, w in state(file).items() if not name.startswith(start)}
        torch.save(kept, tmp_path / "a.pt")
        config = written(FLAGS, tmp_path) if file == GUIDED else None
        message = refusal(tmp_path / "a.pt", config=config, shape=(3, 16, 16))
        assert start in message or "input_blocks as output_blocks" in message


def test_guided_networks_with_classes_add_the_classes_embedding(tmp_path: Path) -> None:
    tensors = state(GUIDED)
    width = len(tensors["time_embed.2.bias"])
    table = torch.randn(10, width, generator=torch.Generator().manual_seed(1))
    torch.save(tensors | {"label_emb.weight": table}, tmp_path / "a.pt")
    tensors["time_embed.2.bias"] = tensors["time_embed.2.bias"] + table[7]
    torch.save(tensors, tmp_path / "b.pt")
    config = written(FLAGS, tmp_path)
    told = checkpoints.load(tmp_path / "a.pt", config=config)
    plain = checkpoints.load(tmp_path / "b.pt", config=config)
    assert (told.classes, told.null_class, plain.classes) == (10, None, None)
    x, t = (
        torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)),
        torch.tensor([7, 900]),
    )
    out = told.model(x, t, class_labels=torch.tensor([7, 7])).sample
    assert (out - plain.model(x, t).sample).abs().max() < 1e-5
    other = told.model(x, t, class_labels=torch.tensor([7, 3])).sample
    assert torch.equal(out[:1], other[:1])
    assert (out[1] - other[1]).abs().max() > 1e-3


def test_diffusers_networks_with_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    UNet2DModel(**TINY, num_class_embeds=10).save_pretrained(tmp_path / "model")
    loaded = checkpoints.load(tmp_path / "model")
    theirs = by_diffusers(tmp_path / "model")
    assert loaded.classes == 10
    x, t, labels = torch.randn(2, *loaded.shape), torch.tensor([7, 900]), torch.tensor([1, 9])
    ours = loaded.model(x, t, class_labels=labels).sample
    assert torch.equal(ours, theirs(x, t, class_labels=labels).sample)


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    half = {name: w.half() for name, w in state(ERMONGROUP).items()}
    torch.save(half, tmp_path / "a.pt")
    model, _ = network(checkpoints.load(tmp_path / "a.pt", shape=(3, 16, 16)))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.state_dict()["conv_in.weight"], half["conv_in.weight"].float())


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ([1, 2, 3], "is a list of 3; ermongroup's is [model, optimizer, epoch, step, ema]"),
        ([1, 2, 3, 4, 5], "must hold tensors by name, got int"),
        ({}, "must hold tensors by name, got dict"),
        (torch.zeros(3), "must hold tensors by name, got Tensor"),
        ({"state_dict": {}}, "must hold tensors of floating point by name, got dict as 'state_di"),
        ({3: torch.zeros(1)}, "got torch.float32 as 3"),
        ({"a": torch.zeros(1, dtype=torch.int64)}, "got torch.int64 as 'a'"),
        ({"a": torch.zeros(1, device="meta")}, "must hold tensors"),
        ({"a": torch.zeros(1, 1).to_sparse()}, "must hold tensors"),
        ({f"model.{i}": torch.zeros(1) for i in range(9)}, "(model.0, model.1, model.2, ...)"),
    ],
)
def test_other_pickles(tmp_path: Path, held: Any, said: str) -> None:
    torch.save(held, tmp_path / "a.pt")
    message = refusal(tmp_path / "a.pt")
    assert "a.pt" in message
    assert said in message


@pytest.mark.parametrize("write", [torch.save, legacy])
@pytest.mark.parametrize("kept", [2, 9, 100, 5000, 600_000, -1])
def test_truncated_pickles(tmp_path: Path, write: Callable[[Any, Path], Any], kept: int) -> None:
    write(state(ERMONGROUP), tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:kept])
    message = refusal(tmp_path / "cut.pt")
    assert "cut.pt is " in message
    assert "truncated" in message or "wants code (collections" in message


def test_a_zip_file_is_no_checkpoint(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("a.txt", "text")
    assert "or no checkpoint that torch.save wrote" in refusal(tmp_path / "a.zip")
    (tmp_path / "a.txt").write_text("PKZIP was a program")
    assert "or no checkpoint that torch.save wrote" in refusal(tmp_path / "a.txt")


PUBLISHED = {
    "cifar10": (networks.ermongroup((1, 2, 2, 2), 32), 35.75),
    "celeba64": (networks.ermongroup((1, 2, 2, 2, 4), 64), 78.70),
    "lsun256": (networks.ermongroup((1, 1, 2, 2, 4, 4), 256), 113.67),
}
"""ermongroup/ddim's configurations, and their parameters in millions."""


def on_meta(path: Path, **options: Any) -> checkpoints.Loaded:
    """What becomes of the weights of the largest networks takes memory and no part in this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unets, "BUILT_ON", torch.device("meta"))
        return checkpoints.load(path, **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter:UserWarning")
@pytest.mark.parametrize("name", PUBLISHED)
def test_ermongroups_sizes(tmp_path: Path, name: str) -> None:
    shapes, parameters = PUBLISHED[name]
    torch.save(networks.empty(shapes), tmp_path / "a.ckpt")
    size = {"cifar10": 32, "celeba64": 64, "lsun256": 256}[name]
    for config in (None, name):
        loaded = on_meta(tmp_path / "a.ckpt", config=config)
        model, shape = network(loaded)
        assert shape == (3, size, size)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        assert round(millions, 2) == parameters
        assert f"ermongroup, {name}, {millions:.1f} M parameters" in loaded.description
    for other in PUBLISHED.keys() - {name}:
        with pytest.raises(ValueError, match=r"does not hold the model's weights: \d+ "):
            on_meta(tmp_path / "a.ckpt", config=other)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter:UserWarning")
@pytest.mark.parametrize(
    ("described", "size", "parameters"),
    [
        (Guided(192, (1, 2, 3, 4), 3, (2, 4, 8)), 64, None),
        (Guided(256, (1, 1, 2, 2, 4, 4), 2, (8, 16, 32)), 256, 552_814_086),
        (Guided(256, (0.5, 1, 1, 2, 2, 4, 4), 2, (16, 32, 64)), 512, None),
    ],
)
def test_guided_diffusions_sizes(
    tmp_path: Path, described: Guided, size: int, parameters: int | None
) -> None:
    torch.save(networks.empty(described.shapes()), tmp_path / "a.pt")
    loaded = on_meta(tmp_path / "a.pt")
    model, shape = network(loaded)
    assert shape == (3, size, size)
    assert "taken to be as published: 64 channels a head, in the old order" in loaded.description
    assert loaded.description.endswith("linear noise, T = 1000")
    if parameters is not None:
        assert sum(p.numel() for p in model.parameters()) == parameters
    x = torch.empty(1, 3, size, size, device="meta")
    assert model(x, torch.zeros(1, dtype=torch.int64, device="meta")).sample.shape[1] == 6


MODULE = """
import torch
from fastddim import NoiseSchedule
from fastddim.models.checkpoints import Loaded

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(0.5))
    def forward(self, x, t):
        return self.w * x

def alone(): return Net()
def sized(): return Net(), (3, 4, 6)
def wrong_size(): return Net(), (3, 4)
def known(): return Loaded(Net(), (1, 4, 4), NoiseSchedule.cosine(), "v", "on cosine noise")
def function(): return lambda x, t: x
def nothing(): pass
def fails(): return 1 / 0
def leaves(): raise SystemExit(3)
def needs(argument): pass
def imports(): import not_installed
net = Net()
class Group:
    make = staticmethod(sized)
number = 3
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "nets.py").write_text(MODULE)
    (tmp_path / "own" / "broken.py").write_text("def f(:")
    (tmp_path / "own" / "missing.py").write_text("\nimport not_installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "own"]:
        monkeypatch.delitem(sys.modules, name)
    return "own.nets"


def test_a_model_of_ones_own(mine: str) -> None:
    for name, shape in (("alone", (3, 8, 8)), ("Net", (3, 8, 8)), ("net", (3, 8, 8))):
        loaded = checkpoints.build(f"{mine}:{name}", shape)
        model, found = network(loaded)
        assert found == shape
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        x = loaded.ddim(2).sample(model, shape=(1, *shape), seeds=[0])
        assert torch.equal(x, DDIM(2).sample(lambda x, t: 0.5 * x, shape=(1, *shape), seeds=[0]))
    assert loaded.description == (
        "model own.nets:net: 0.0 M parameters, 3x8x8, taken to predict ε on linear noise, T = 1000"
    )
    assert checkpoints.build(f"{mine}:sized").shape == (3, 4, 6)
    assert checkpoints.build(f"{mine}:Group.make").shape == (3, 4, 6)
    assert checkpoints.build(f"{mine}:sized", (1, 2, 2)).shape == (1, 2, 2)
    assert checkpoints.build(f"{mine}:function", (1, 2, 2)).model(7, 3) == 7
    known = checkpoints.build(f"{mine}:known")
    assert (known.shape, known.prediction, known.schedule.name) == ((1, 4, 4), "v", "cosine")
    assert known.description.endswith("1x4x4, on cosine noise")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own.nets", "model must be package.module:factory, got 'own.nets'"),
        ("own/nets.py:alone", "model must be package.module:factory"),
        ("own.nets:", "model must be package.module:factory"),
        (":alone", "model must be package.module:factory"),
        (
            "own.none:alone",
            "own.none:alone failed: ModuleNotFoundError: No module named 'own.none'",
        ),
        (".nets:alone", "failed: TypeError"),
        ("own.nets:none", "failed: AttributeError: module 'own.nets' has no attribute 'none'"),
        ("own.nets:number", "failed: TypeError: 'int' object is not callable"),
        ("own.nets:needs", "missing 1 required positional argument"),
        ("own.nets:fails", "failed: ZeroDivisionError: division by zero ("),
        ("own.nets:leaves", "failed: SystemExit: 3 ("),
        ("own.nets:imports", "No module named 'not_installed' ("),
        ("own.missing:f", "missing.py:2)"),
        ("own.broken:f", "failed: SyntaxError: invalid syntax (broken.py, line 1)"),
        ("own.nets:alone", "does not say its shape: add --shape, such as 3,32,32"),
        ("own.nets:nothing", "must return a model, (model, (channels, height, width)) or a Loaded"),
        ("own.nets:wrong_size", "shape must be (channels, height, width), each ≥ 1, got (3, 4)"),
    ],
)
@pytest.mark.usefixtures("mine")
def test_models_refused(name: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        checkpoints.build(name)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
