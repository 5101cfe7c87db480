"""The search of timesteps, on data whose exact ε is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim import DDIM, tune
from fastddim.timesteps import make_pairs
from fastddim.tools import profile, tuning
from fastddim.tools.draw import by_seed
from fastddim.tools.quality import frechet_distance, moments
from tests.refusals import refused

SHAPE = (64,)
ORDER_2 = DDIM(order=2)
QUICK: dict[str, Any] = {"seeds": range(64), "batch_size": 64, "fine": 50}


def flat(x: Tensor) -> Tensor:
    return x.flatten(1)


class Counting:
    """The exact ε of the mixture, which counts its calls and can fail at one of them."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.data, self.calls, self.fails_at = profile.oracle(), 0, fails_at

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        return self.data(x, t)  # type: ignore[no-any-return]


def distance(tau: Any, seeds: range) -> float:
    """The Fréchet distance of samples to the data's exact moments."""
    ddim = DDIM(spacing=tau, order=2)
    x = torch.cat(list(by_seed(ddim, profile.oracle(), seeds, SHAPE, 256)))
    return frechet_distance(flat(x), profile.oracle().moments())


def test_tuned_timesteps_are_better_on_other_seeds() -> None:
    data = profile.oracle()
    tuned = tune(
        ORDER_2,
        data,
        SHAPE,
        [5],
        seeds=range(256),
        batch_size=256,
        features=flat,
        real=data.moments(),
    )
    found = distance(tuned.tau(5), range(1000, 2024))
    names = [
        distance(make_pairs(name, 5, ORDER_2.schedule), range(1000, 2024)) for name in tuning.STARTS
    ]
    assert found < 0.9 * min(names), (found, names)
    assert tuned.tau(5)[0] == 999


def test_without_real_data_the_fine_samples_are_the_target() -> None:
    tuned = tune(ORDER_2, profile.oracle(), SHAPE, [4, 5], **QUICK)
    about = json.loads(tuned.about)
    assert tuned.steps == (4, 5)
    x = torch.cat(list(by_seed(DDIM(50, spacing="linspace", order=2), profile.oracle(),
                               range(64), SHAPE, 64)))  # fmt: skip
    of = tuning.principal(x)
    for S in (4, 5):
        start, before, after = about["distances"][str(S)]
        assert start in tuning.STARTS
        assert after <= before
        y = torch.cat(list(by_seed(replace(ORDER_2, steps=None, spacing=tuned.tau(S)),
                                   profile.oracle(), range(64), SHAPE, 64)))  # fmt: skip
        assert frechet_distance(of(y), moments(of(x))) == after


def test_principal_components_keep_the_largest_spread() -> None:
    x = torch.randn(20, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    of = tuning.principal(x)
    assert of(x).shape == (20, 10)
    centred = (x.flatten(1) - x.flatten(1).mean(0)).double()
    kept = torch.linalg.svdvals(centred)[:10].square().sum()
    torch.testing.assert_close(of(x).square().sum(), kept)


def test_the_calls_are_at_most_those_that_were_foretold() -> None:
    model = Counting()
    search = tuning.Search(
        ORDER_2, model, SHAPE, [3, 4], **QUICK, features=None, real=None, memory=None, device=None
    )
    seen: list[int] = []
    search.run(lambda ticks: (seen.append(t) or t for t in ticks))  # type: ignore[func-returns-value]
    assert 50 < model.calls <= search.model_calls() == len(seen)
    assert search.seconds() > 0


def test_an_interrupted_search_goes_on_and_ends_alike(tmp_path: Path) -> None:
    memory = tmp_path / "search"
    whole = tune(ORDER_2, Counting(), SHAPE, [4], **QUICK)
    with pytest.raises(KeyboardInterrupt):
        tune(ORDER_2, Counting(fails_at=100), SHAPE, [4], memory=memory, **QUICK)
    known = memory.read_text().count("\n") - 1
    assert known == 12  # (99 calls − 50 of the fine samples) / 4
    with memory.open("a") as file:
        file.write("[[999, 3")  # a line that a power cut has cut off
    model = Counting()
    assert tune(ORDER_2, model, SHAPE, [4], memory=memory, **QUICK) == whole
    again = Counting()
    tune(ORDER_2, again, SHAPE, [4], **QUICK)
    assert again.calls - model.calls == 4 * known
    assert not memory.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seeds": range(65)}, ("seeds",)),
        ({"fine": 40}, ("target", "40")),
        ({"ddim": DDIM(order=1)}, ("order", "2", "1")),
    ],
)
def test_the_memory_of_another_search_is_refused(
    tmp_path: Path, change: dict[str, Any], words: tuple[str, ...]
) -> None:
    memory = tmp_path / "search"
    with pytest.raises(KeyboardInterrupt):
        tune(ORDER_2, Counting(fails_at=60), SHAPE, [4], memory=memory, **QUICK)
    before = memory.read_text()
    given = {"ddim": ORDER_2, **QUICK, **change}
    refused(
        lambda: tune(model=Counting(), shape=SHAPE, steps=[4], memory=memory, **given),
        ValueError,
        str(memory),
        *words,
    )
    memory.write_text("no search\n")
    refused(
        lambda: tune(ORDER_2, Counting(), SHAPE, [4], memory=memory, **QUICK),
        ValueError,
        str(memory),
    )
    assert before


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"ddim": DDIM(eta=1.0)}, ValueError, ("eta", "0", "1.0")),
        ({"ddim": None}, TypeError, ("ddim", "None")),
        ({"steps": []}, ValueError, ("steps", "[]")),
        ({"steps": [4, 4]}, ValueError, ("steps", "[4, 4]")),
        ({"steps": [1]}, ValueError, ("steps", "1")),
        ({"steps": [50]}, ValueError, ("steps", "50", "49")),
        ({"steps": [4.0]}, TypeError, ("steps", "4.0")),
        ({"fine": 1001}, ValueError, ("fine", "1000", "1001")),
        ({"seeds": range(7)}, ValueError, ("seeds", "8", "7")),
        ({"seeds": [-1] * 8}, ValueError, ("seeds",)),
        ({"real": profile.oracle().moments()}, ValueError, ("features", "real")),
        ({"batch_size": 0}, ValueError, ("batch_size",)),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    change: dict[str, Any], error: type[Exception], words: tuple[str, ...]
) -> None:
    model = Counting()
    given = {"ddim": ORDER_2, "model": model, "shape": SHAPE, "steps": [4], **QUICK, **change}
    refused(lambda: tune(**given), error, *words)
    assert model.calls == 0


def test_samples_that_are_not_finite_are_never_chosen() -> None:
    data = profile.oracle()

    def model(x: Tensor, t: Tensor) -> Tensor:
        bad = (t[0] % 2 == 1) & (t[0] < 900)
        return torch.where(bad, torch.nan, data(x, t))

    tuned = tune(ORDER_2, model, SHAPE, [3], **QUICK, features=flat, real=data.moments())
    assert all(t % 2 == 0 for t in tuned.tau(3)[1:])


@pytest.mark.parametrize(
    ("tau", "i", "share", "expected"),
    [
        ((999, 500, 0), 1, 0.3, (999, 650, 0)),
        ((999, 500, 0), 1, -0.3, (999, 350, 0)),
        ((999, 500, 0), 2, -0.3, None),
        ((999, 500, 0), 2, 0.3, (999, 500, 150)),
        ((999, 500, 10), 2, -0.3, (999, 500, 7)),
        ((5, 4, 3), 1, 0.3, None),
    ],
)
def test_a_level_moves_by_a_share_of_its_gap(
    tau: tuple[int, ...], i: int, share: float, expected: tuple[int, ...] | None
) -> None:
    assert tuning._moved(tau, i, share) == expected
