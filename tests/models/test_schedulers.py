"""Schedules and moving averages that checkpoints of diffusers bring."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file

from fastddim import NoiseSchedule, checkpoints
from fastddim.__main__ import main
from tests.models.checkpoint_files import (
    ERMONGROUP,
    TINY,
    WEIGHTS,
    by_diffusers,
    folder,
    network,
    refusal,
    saved,
    whole_checkpoint,
)

__all__ = ["folder", "saved"]


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


@pytest.mark.one_in(2)
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


@pytest.mark.one_in(2)
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
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "a scheduler that has β"),
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}, "a scheduler that has β"),
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
    said = "no scheduler_config.json: assumed to predict ε on linear noise, T = 1000"
    assert loaded.description.endswith(said)
    cosine = NoiseSchedule.cosine(100)
    told = checkpoints.load(folder, schedule=cosine, prediction="v")
    assert (told.schedule, told.prediction) == (cosine, "v")
    assert told.description.endswith("v predicted as given, cosine noise, T = 100, as given")
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
    assert "in latents, which vqvae/ would decode (not done here)" in (
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
