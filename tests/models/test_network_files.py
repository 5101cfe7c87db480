"""Networks of sizes that do not fit, networks with classes, pickles, and published sizes."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from fastddim import DDIM, checkpoints, embedded
from fastddim.models import unets
from tests import networks
from tests.models.checkpoint_files import (
    ERMONGROUP,
    FLAGS,
    GUIDED,
    TINY,
    by_diffusers,
    legacy,
    network,
    refusal,
    state,
    written,
)
from tests.networks import Guided


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


@pytest.mark.one_in(2)
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
    assert (
        "assumed to be as published: 64 channels per head, old order of attention"
        in loaded.description
    )
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
        "model own.nets:net: 0.0 M parameters, 3x8x8, "
        "assumed to predict ε on linear noise, T = 1000"
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
        ("own.nets:alone", "does not return its shape: add --shape, such as 3,32,32"),
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
