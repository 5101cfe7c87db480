"""The training script: its objective, its optimizer, and a run on pictures made here."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastddim import embedded
from fastddim.training import model as train


class ExactV(nn.Module):
    """v of data that is 0.25 everywhere: v = √ᾱ·ε − √(1−ᾱ)·x0, with ε solved from x."""

    def __init__(self) -> None:
        super().__init__()
        self.alphas_cumprod = embedded.GarmentModel().alphas_cumprod

    def v(self, x: Tensor, t: Tensor) -> Tensor:
        abar = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        eps = (x - abar.sqrt() * 0.25) / (1 - abar).sqrt()
        return abar.sqrt() * eps - (1 - abar).sqrt() * 0.25


def test_the_objective_is_zero_for_the_exact_model_alone() -> None:
    x0, t = torch.full((8, 1, 28, 28), 0.25), torch.arange(20, 980, 120)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    loss = train.Objective(ExactV())(x0, t, eps)  # type: ignore[arg-type]
    assert loss.shape == (8,)
    assert loss.max() < 1e-9
    assert train.Objective(ExactV())(x0 + 0.1, t, eps).min() > 1e-4  # type: ignore[arg-type]


def test_levels_are_drawn_most_where_images_are_decided() -> None:
    weights = train.level_weights(embedded.GarmentModel().alphas_cumprod)
    assert weights.sum() == pytest.approx(1, abs=1e-9)
    assert weights.min() >= 0.1 / 1000
    ln_sigma = 0.5 * torch.log(1 / embedded.GarmentModel().alphas_cumprod.double() - 1)
    assert float((weights * ln_sigma).sum()) == pytest.approx(-0.9 * 0.9, abs=0.25)


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (16, 4, 3, 3)])
def test_muon_makes_its_update_orthogonal(shape: tuple[int, ...]) -> None:
    p = nn.Parameter(torch.zeros(shape))
    p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    train.Muon([p], lr=1.0).step()
    update = -p.detach().flatten(1)
    scale = 0.2 * max(update.shape) ** 0.5
    singular = torch.linalg.svdvals(update) / scale
    assert singular.min() > 0.5
    assert singular.max() < 1.3
    assert (update * p.grad.flatten(1)).sum() > 0


@pytest.mark.slow
def test_a_run_leaves_loadable_weights_and_resumes_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (100, 28, 28), dtype=np.uint8)
    for split in ("train", "t10k"):
        file = tmp_path / f"{split}-images-idx3-ubyte.gz"
        header = struct.pack(">BBBB3I", 0, 0, 8, 3, *pictures.shape)
        file.write_bytes(gzip.compress(header + pictures.tobytes()))
    out = tmp_path / "out"
    command = ["train", "--batch", "4", "--data", str(tmp_path), "--out", str(out)]
    start = ["--start", str(embedded.WEIGHTS)]
    for more in (["--minutes", "0.05", *start], ["--minutes", "0.1", "--resume"]):
        monkeypatch.setattr("sys.argv", [*command, *more])
        train.main()
    first, last = (json.loads(line) for line in (out / "log.jsonl").read_text().splitlines())
    assert last["step"] > first["step"] > 0
    assert last["minutes"] >= first["minutes"]
    model = embedded.load(out / "garments.safetensors")
    assert model(torch.zeros(1, 1, 28, 28), torch.tensor([500])).isfinite().all()
    assert not list(out.glob("*.tmp"))
