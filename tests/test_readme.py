"""The README's code and commands do what it says."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

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


def test_the_lines_around_the_loop_run() -> None:
    def unet(x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.bfloat16
        assert len(x) == 8
        return 0.5 * x + c

    image, text = torch.rand(1, 1, 8, 8), torch.ones(4, 1, 1, 1)
    mask = (torch.arange(8) < 4).float().expand(1, 1, 8, 8)
    names: dict[str, object] = {
        "torch": torch,
        "ddim": fastddim.DDIM(steps=50, eta=0.0),
        "unet": unet,
        "text": text,
        "no_text": -text,
        "model": lambda x, t: 0.5 * x,
        "image": image,
        "mask": mask,
        "policy": lambda x, t, obs: 0.5 * x + obs,
        "obs": torch.zeros(1, 1, 7),
        "tick": 3,
    }
    exec(blocks("python")[1], names)
    images, x, action = names["images"], names["x"], names["action"]
    assert isinstance(images, torch.Tensor)
    assert isinstance(x, torch.Tensor)
    assert isinstance(action, torch.Tensor)
    assert images.shape == (4, 4, 64, 64)
    assert torch.equal(x[..., :4], image[..., :4])
    assert action.shape == (1, 16, 7)


def test_diffusers_scheduler_is_replaced_as_the_readme_says() -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    pipe = SimpleNamespace(scheduler=DDIMScheduler(clip_sample_range=0.5))
    exec(blocks("python")[3], {"pipe": pipe})
    assert type(pipe.scheduler).__name__ == "FastDDIMScheduler"
    assert pipe.scheduler.config.clip_sample_range == 0.5


def test_the_drop_in_is_called_as_the_readme_says() -> None:
    names = {
        "fastddim": fastddim,
        "x": torch.zeros(2, 1, 28, 28),
        "seq": range(0, 1000, 500),
        "model": embedded.load(),
        "betas": torch.linspace(1e-4, 0.02, 1000),
    }
    exec(blocks("python")[2], names)
    assert len(names["xs"]) == 3  # type: ignore[arg-type]


def test_a_loop_of_ones_own_binds_the_step_as_the_readme_says() -> None:
    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert t.shape == (2,)
        return 0.5 * x + t.view(-1, 1, 1, 1) / 1000

    ddim, x_T = fastddim.DDIM(steps=5), torch.rand(2, 1, 8, 8)
    names = {"fastddim": fastddim, "torch": torch, "ddim": ddim, "model": model, "x": x_T}
    exec(blocks("python")[4], names)
    assert len(blocks("python")[4].splitlines()) <= 5
    x, x0 = names["x"], names["x0"]
    assert isinstance(x, torch.Tensor)
    assert isinstance(x0, torch.Tensor)
    assert torch.equal(x, ddim.sample(model, x_T))
    assert torch.equal(x, x0)  # the last step goes to clean data


def test_the_readme_names_every_backend_of_the_table() -> None:
    from fastddim.backends import TABLE, VARIABLE

    assert f"`{VARIABLE}=torch`" in README
    for name in TABLE:
        assert f"`{name}`" in README


def test_each_command_block_is_one_line_that_the_continuous_integration_runs() -> None:
    commands = blocks("bash")
    assert [c.count("\n") for c in commands] == [1, 1]
    assert "fastddim sample" in commands[0]
    assert "python -m pytest" in commands[1]
