"""The README's code and commands do what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fastddim
from fastddim import embedded

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
def test_the_ten_lines_draw_the_images_that_iterate_ends_with() -> None:
    names: dict[str, object] = {}
    exec(blocks("python")[0], names)
    images, step = names["images"], names["step"]
    assert isinstance(images, torch.Tensor)
    assert isinstance(step, fastddim.Step)
    assert images.shape == (4, 1, 28, 28)
    assert torch.equal(images, step.x)


def test_the_drop_in_is_called_as_the_readme_says() -> None:
    names = {
        "fastddim": fastddim,
        "x": torch.zeros(2, 1, 28, 28),
        "seq": range(0, 1000, 500),
        "model": embedded.load(),
        "betas": torch.linspace(1e-4, 0.02, 1000),
    }
    exec(blocks("python")[1], names)
    assert len(names["xs"]) == 3  # type: ignore[arg-type]


def test_each_command_block_is_one_line_that_the_continuous_integration_runs() -> None:
    commands = blocks("bash")
    assert [c.count("\n") for c in commands] == [1, 1]
    assert "fastddim sample" in commands[0]
    assert "python -m pytest" in commands[1]
