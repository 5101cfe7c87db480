"""The code and the commands of README.md and of the pages under docs/ do what these say."""

from __future__ import annotations

import functools
import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastddim
from fastddim import DDIM, embedded
from fastddim.dropins import guided, policies
from tests.diffusion import Model
from tests.dropins.lucidrains_original import Described, Net
from tests.dropins.policies_original import DiffusionModel, LeRobotPolicy

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SHELF = ROOT / "docs" / "dropins"
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted(SHELF.glob("*.md"))]
"""The index is the site's first page; readers of the repository begin with README.md."""


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def block(words: str) -> str:
    """The README's one Python block that holds these words."""
    (found,) = (code for code in blocks("python") if words in code)
    return found


def run(code: str, **names: object) -> SimpleNamespace:
    exec(code, names)
    return SimpleNamespace(**names)


def test_the_ten_lines_save_and_print_what_they_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = block("four.png")
    found = run(code)
    assert len(code.splitlines()) == 10
    assert found.x.shape == (4, 1, 28, 28)
    assert torch.equal(found.x, found.step.x)
    assert (tmp_path / "four.png").stat().st_size > 1000
    assert len(capsys.readouterr().out.splitlines()) == 50


def test_one_line_is_the_loop_that_stands_before_it() -> None:
    before, after = block("# before").split("# after")
    seq, x_T = range(0, 1000, 50), torch.randn(2, 1, 8, 8)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * x + t.view(-1, 1, 1, 1) / 1000

    abar = torch.from_numpy(fastddim.NoiseSchedule.linear().alphas_cumprod.copy()).float()
    names = {"DDIM": fastddim.DDIM, "torch": torch, "seq": seq, "model": model, "eta": 0.0}
    loop = run(before, abar=abar, x=x_T, **names).x
    line = run("#" + after, x=x_T, **names).x
    torch.testing.assert_close(line, loop, rtol=1e-4, atol=1e-4)


def test_the_drop_ins_are_called_as_the_readme_says() -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    pipe = SimpleNamespace(scheduler=DDIMScheduler(clip_sample_range=0.5))
    found = run(
        block("FastDDIMScheduler"),
        fastddim=fastddim,
        pipe=pipe,
        x=torch.zeros(2, 1, 28, 28),
        seq=range(0, 1000, 500),
        model=embedded.load(),
        betas=torch.linspace(1e-4, 0.02, 1000),
    )
    assert len(found.xs) == 3
    assert type(pipe.scheduler).__name__ == "FastDDIMScheduler"
    assert pipe.scheduler.config.clip_sample_range == 0.5


def test_every_block_of_the_readme_has_a_test() -> None:
    tested = {block("four.png"), block("# before"), block("FastDDIMScheduler")}
    assert set(blocks("python")) == tested


def test_the_readme_names_every_backend_of_the_table() -> None:
    from fastddim.step.backends import TABLE, VARIABLE

    assert f"`{VARIABLE}=torch`" in README
    for name in TABLE:
        assert f"`{name}`" in README


def test_the_readme_names_every_extra_and_every_page() -> None:
    extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    for name in re.findall(r"^(\w+) = \[", extras.split("\n[")[0], flags=re.MULTILINE):
        assert f"`{name}`" in README
    named = [page for page in PAGES if page.parent != SHELF and page.stem != "index"]
    for page in (*named, SHELF / "index.md"):
        assert f"]({page.relative_to(ROOT)})" in README


def test_the_table_of_drop_ins_leads_to_every_page() -> None:
    table = (SHELF / "index.md").read_text()
    for page in SHELF.glob("*.md"):
        assert page.stem == "index" or f"]({page.name}" in table, page.name


def test_links_between_pages_lead_to_files() -> None:
    links = [
        (page, link)
        for page in (ROOT / "README.md", *PAGES)
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    ]
    assert len(links) > 30
    assert [link for page, link in links if not (page.parent / link).exists()] == []


def test_options_in_the_map_from_diffusers_exist() -> None:
    import inspect

    table = README.split("| diffusers | fastddim |")[1].split("\n\n")[0]
    for of, function in (("DDIM", fastddim.DDIM), ("sample", fastddim.DDIM.sample)):
        lists = re.findall(rf"`{of}\((.*?)\)`", table)
        names = [name for some in lists for name in re.findall(r"(\w+)=", some)]
        assert names
        assert set(names) <= set(inspect.signature(function).parameters)


def test_strength_becomes_the_row_that_diffusers_begins_with() -> None:
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as module
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler = DDIMScheduler()
    pipe: Any = SimpleNamespace(scheduler=scheduler)
    get_timesteps = module.StableDiffusionImg2ImgPipeline.get_timesteps
    scheduler.set_timesteps(50)
    pairs = fastddim.DDIM(steps=50, spacing="leading").pairs
    for strength in (0.1, 0.33, 0.8):
        start = 50 - int(50 * strength)
        timesteps, _ = get_timesteps(pipe, 50, strength, "cpu")
        assert timesteps.tolist() == [t for t, _ in pairs[start:]]


def test_each_command_block_is_one_line_that_the_ci_runs() -> None:
    commands = blocks("bash")
    assert [c.count("\n") for c in commands] == [1, 1]
    for command, words in zip(commands, ("fastddim sample", "python -m pytest"), strict=True):
        first = next(line for line in README.splitlines() if words in line)
        assert command == first + "\n"


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.parent != SHELF], ids=lambda page: page.stem
)
def test_the_blocks_of_a_page_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Inductor would take ten seconds, and is tested elsewhere.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    found = run("\n".join(blocks("python", page.read_text())))
    if page.stem == "compile":
        assert torch.equal(found.x, found.y)
        assert not torch.equal(found.x, found.x_T)


def test_the_lines_of_every_drop_in_run() -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    noise_scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    lucidrains = Described(
        Net(), image_size=8, timesteps=10, sampling_timesteps=3, objective="pred_noise"
    )
    policy = LeRobotPolicy(DiffusionModel(noise_scheduler))
    others: dict[str, dict[str, object]] = {
        "compvis": {"model": Model()},
        "guided-diffusion": {"diffusion": guided.Diffusion(diffusion_steps=50)},
        "lucidrains": {"diffusion": lucidrains},
        "monai": {"DiffusionInferer": lambda scheduler: scheduler},
        "policies": {"policy": policy},
    }
    made = {}
    for page in SHELF.glob("*.md"):
        if page.stem == "monai" and not find_spec("monai"):
            continue
        names: dict[str, object] = {
            "pipe": SimpleNamespace(scheduler=DDIMScheduler()),
            "policy": policy,
        }
        given = names | {"noise_scheduler": noise_scheduler} | others.get(page.stem, {})
        made[page.stem] = run("\n".join(blocks("python", page.read_text())), **given)
        assert page.stem == "index" or "fastddim.dropins" in page.read_text()
    assert type(made["strict"].pipe.scheduler).__name__ == "FastDDIMScheduler"
    assert made["strict"].pipe.scheduler.config.strict
    assert made["lucidrains"].images.shape == (16, 3, 8, 8)
    assert policies.restore(made["policies"].policy) is policy


def test_the_guide_computes_what_it_says() -> None:
    code = blocks("python", (ROOT / "docs" / "guide.md").read_text())
    found = run("\n".join(code))
    ddim, image = found.ddim, found.image
    assert torch.equal(found.last, found.both[7:])
    assert found.latents.shape == (4, 4, 64, 64)
    assert torch.equal(found.filled[..., :32], image[..., :32])
    torch.testing.assert_close(found.again, image, rtol=0.01, atol=0.01)
    assert found.action.shape == (1, 16, 7)
    own = [c for c in code if "fastddim.bind" in c]
    assert len(own) == 1
    assert torch.equal(found.x, ddim.sample(found.model, found.start))
    assert torch.equal(found.x, found.x0)  # The last step goes to clean data.
    stepped = [s.x for s in ddim.iterate(found.model, shape=(4, 4, 8, 8), seeds=range(4))]
    assert torch.equal(found.early, stepped[9])


def test_the_page_of_paths_computes_what_it_says() -> None:
    found = run("\n".join(blocks("python", (ROOT / "docs" / "paths.md").read_text())))
    model = {"cond": {"obs": torch.ones(1, 7)}, "shape": (1, 16, 7), "seeds": [0]}
    assert torch.equal(found.actions, found.ddim.sample(found.policy, **model))
    assert torch.equal(found.chunk[:, :4], torch.zeros(1, 4, 7))
    assert found.chunk[:, 4:].abs().min() > 0
    assert found.latents.shape == (2, 16, 32, 32)
    assert found.flux.shift == pytest.approx(2.718281828**1.15)
    assert found.images.isfinite().all()
    assert found.samples.isfinite().all()
    assert (found.group.table[:-1, 5] > 0).all()


def test_the_page_of_serving_computes_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("\n".join(blocks("python", (ROOT / "docs" / "serving.md").read_text())))
    served = [line.split()[0] for line in capsys.readouterr().out.splitlines()[:6]]
    assert sorted(served) == [str(i) for i in range(6)]
    halves: Any = {"cond": {"text": found.text[None]}, "uncond": {"text": found.nothing[None]}}
    ddim = DDIM(steps=8)
    latent = ddim.sample(found.denoiser, shape=(1, 4, 16, 16), seeds=[1], guidance=5.0, **halves)
    torch.testing.assert_close(found.latent, latent[0])
    assert len(found.images) == 3


def test_the_guides_schedule_is_that_of_stable_diffusion() -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    stable = run("\n".join(blocks("python", (ROOT / "docs" / "guide.md").read_text()))).stable
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )
    scheduler.set_timesteps(50)
    x = x_T = torch.randn(2, 4, 8, 8)
    for t in scheduler.timesteps:
        x = scheduler.step(0.5 * x, int(t), x, return_dict=False)[0]
    ours = stable.sample(lambda x, t: 0.5 * x, x_T)
    assert [t for t, _ in stable.pairs] == scheduler.timesteps.tolist()
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)
