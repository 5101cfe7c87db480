"""``--order 2`` of the commands that draw: the library's sampler, and a recipe that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastddim import DDIM, embedded
from fastddim.__main__ import main
from fastddim.tools import draw, images, sheet
from fastddim.tools.folder import MANIFEST, Folder
from tests.cli.commands import QUICK, _here, no_work, refused

__all__ = ["_here", "no_work", "refused"]

STEPS = ("--steps", "4")


def drawn(order: int, count: int = 2) -> torch.Tensor:
    ddim = DDIM(4, order=order)
    return torch.cat(list(draw.by_seed(ddim, embedded.load(), range(count), embedded.SHAPE, 2)))


def test_sample_draws_by_the_second_order() -> None:
    assert main(["sample", "--seeds", "0-1", "--order", "2", *QUICK, *STEPS]) == 0
    expected = images.grid(images.to_uint8(drawn(2)))[0].numpy()
    assert np.array_equal(np.array(Image.open("garments.png")), expected)
    assert sheet.recipe_of(Path("garments.png"))["order"] == 2
    assert not torch.equal(drawn(1), drawn(2))


def test_the_ends_of_sequences_and_interpolations_are_samples() -> None:
    assert (
        main(["sequence", "--seeds", "0-1", "--order", "2", "--columns", "2", *QUICK, *STEPS]) == 0
    )
    assert (
        main(["interpolate", "--seeds", "0-1", "--order", "2", "--columns", "2", *QUICK, *STEPS])
        == 0
    )
    samples = images.to_uint8(drawn(2))[:, 0].numpy()
    sequence, between = (
        np.array(Image.open(f"{name}.png")) for name in ("sequence", "interpolation")
    )
    assert np.array_equal(sequence[2:30, -30:-2], samples[0])
    assert np.array_equal(between[2:30, 2:30], samples[0])
    assert np.array_equal(between[2:30, -30:-2], samples[1])


def test_generate_names_an_order_of_2_and_no_order_of_1() -> None:
    """A folder that a version without orders has begun can go on."""
    for order in ("1", "2"):
        out = ("--out", f"order-{order}")
        assert main(["generate", "--seeds", "0-1", "--order", order, *out, *QUICK, *STEPS]) == 0
        recipe = json.loads(Path(f"order-{order}", MANIFEST).read_text())["recipe"]
        assert recipe.get("order") == {"1": None, "2": 2}[order]
        made = torch.from_numpy(np.load(next(Path(f"order-{order}").glob("*.npy"))))
        assert torch.equal(made[..., 0], images.to_uint8(drawn(int(order)))[:, 0])
    assert Folder.read(Path("order-2")) is not None


@pytest.mark.parametrize("command", ["sample", "interpolate", "sequence", "generate"])
@pytest.mark.usefixtures("no_work")
def test_other_orders_are_refused(command: str, refused: Callable[..., str]) -> None:
    rest = ("--seeds", "0-1", "--out", "made") if command == "generate" else ()
    assert "order must be 1 (DDIM) or 2, got 3" in refused(command, "--order", "3", *rest)


@pytest.mark.usefixtures("no_work")
def test_sigma_hat_is_refused_at_order_2(refused: Callable[..., str]) -> None:
    assert "eta must be a number with order 2" in refused("sample", "--order", "2", "--eta", "hat")
