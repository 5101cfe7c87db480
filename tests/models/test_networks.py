"""Networks of ermongroup, guided-diffusion and diffusers, and their flags."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastddim import DDIM, NoiseSchedule, checkpoints, embedded
from tests import networks
from tests.models.checkpoint_files import (
    ERMONGROUP,
    FLAGS,
    GOLDEN,
    GUIDED,
    WEIGHTS,
    folder,
    legacy,
    network,
    refusal,
    saved,
    state,
    whole_checkpoint,
    written,
)
from tests.networks import Guided

__all__ = ["folder", "saved"]


CLOSE = 2e-6
"""How far another implementation's answer may be from the one recorded."""


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


@pytest.mark.one_in(2)
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


UNKNOWN_SIZE = "does not contain the size of its images: give its shape (--shape), such as 3,32,32"


def test_values_that_tensors_do_not_tell_are_required(tmp_path: Path) -> None:
    assert UNKNOWN_SIZE in refusal(ERMONGROUP)
    assert UNKNOWN_SIZE in refusal(GUIDED, config=written({"num_heads": 1}, tmp_path))
    message = refusal(GUIDED)
    assert "none of guided-diffusion's published networks" in message
    assert "give them with --config FLAGS.json" in message


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
