"""τ: every spacing against literal lists, the authors' code and diffusers."""

from __future__ import annotations

import operator
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from fastddim import DDIM, NoiseSchedule, make_pairs
from fastddim.check import SamplingWarning
from fastddim.timesteps import SpacingName
from fastddim.tools.quality import Gaussian
from tests.refusals import refused

STRICT: tuple[SpacingName, ...] = ("uniform", "quad", "leading", "trailing", "linspace")
ERMONGROUP = ("uniform-ermongroup", "quad-ermongroup")


def tau(spacing: Any, S: int, T: int) -> list[int]:
    """τ in increasing order, from the pairs."""
    return [t for t, _ in reversed(make_pairs(spacing, S, T))]


@pytest.mark.parametrize(
    ("spacing", "S", "T", "expected"),
    [
        ("uniform", 1, 1000, [999]),
        ("uniform", 7, 100, [0, 14, 28, 42, 57, 71, 85]),
        ("uniform", 10, 1000, [0, 100, 200, 300, 400, 500, 600, 700, 800, 900]),
        ("uniform", 50, 1000, list(range(0, 1000, 20))),
        ("quad", 1, 1000, [999]),
        ("quad", 7, 100, [0, 2, 8, 20, 35, 55, 80]),
        ("quad", 10, 1000, [0, 9, 39, 88, 158, 246, 355, 483, 632, 800]),
        ("quad", 12, 12, list(range(12))),
        ("leading", 1, 1000, [999]),
        ("leading", 7, 100, [0, 14, 28, 42, 56, 70, 84]),
        ("leading", 10, 1000, [0, 100, 200, 300, 400, 500, 600, 700, 800, 900]),
        ("trailing", 1, 1000, [999]),
        ("trailing", 7, 100, [13, 28, 42, 56, 70, 85, 99]),
        ("trailing", 10, 1000, [99, 199, 299, 399, 499, 599, 699, 799, 899, 999]),
        ("trailing", 50, 1000, list(range(19, 1000, 20))),
        ("linspace", 1, 1000, [999]),
        ("linspace", 7, 100, [0, 16, 33, 50, 66, 82, 99]),
        ("linspace", 10, 1000, [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]),
        ("uniform-ermongroup", 7, 100, [0, 14, 28, 42, 56, 70, 84, 98]),
        ("uniform-ermongroup", 10, 1000, [0, 100, 200, 300, 400, 500, 600, 700, 800, 900]),
        ("quad-ermongroup", 10, 1000, [0, 9, 39, 88, 158, 246, 355, 483, 632, 800]),
    ],
)
def test_spacings_are_these_lists(spacing: str, S: int, T: int, expected: list[int]) -> None:
    assert tau(spacing, S, T) == expected


def test_quad_of_50_spreads_steps_that_truncation_repeats() -> None:
    assert tau("quad-ermongroup", 50, 1000)[:8] == [0, 0, 1, 2, 5, 8, 11, 16]
    assert tau("quad", 50, 1000)[:8] == [0, 1, 2, 3, 5, 8, 11, 16]
    assert tau("quad", 50, 1000)[8:] == tau("quad-ermongroup", 50, 1000)[8:]


def test_pairs_are_in_the_order_of_the_steps() -> None:
    assert make_pairs("uniform", 4, 1000) == ((750, 500), (500, 250), (250, 0), (0, -1))
    assert make_pairs("trailing", 2, 10) == ((9, 4), (4, -1))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("T", [1, 100, 1000])
@pytest.mark.parametrize("spacing", STRICT)
def test_strict_spacings_take_S_distinct_steps_down_to_data(spacing: str, T: int) -> None:
    for S in range(1, T + 1):
        pairs = make_pairs(spacing, S, T)
        assert len(pairs) == S
        levels = [t for t, _ in pairs]
        assert levels[0] < T
        assert all(map(operator.gt, levels, levels[1:]))
        assert [s for _, s in pairs] == [*levels[1:], -1]
        assert set(map(type, levels)) == {int}
    assert tau(spacing, T, T) == list(range(T))


def seeds_own(skip_type: str, timesteps: int, num_timesteps: int) -> list[int]:
    """The authors' lines as they stand."""
    if skip_type == "uniform":
        skip = num_timesteps // timesteps
        seq: Any = range(0, num_timesteps, skip)
    else:
        seq = np.linspace(0, np.sqrt(num_timesteps * 0.8), timesteps) ** 2
        seq = [int(s) for s in list(seq)]
    return list(seq)


@pytest.mark.parametrize("T", [100, 1000])
@pytest.mark.parametrize("skip_type", ["uniform", "quad"])
def test_ermongroup_spacings_are_the_authors_code_for_every_S(skip_type: str, T: int) -> None:
    for S in range(1, T + 1):
        expected = seeds_own(skip_type, S, T)
        pairs = make_pairs(f"{skip_type}-ermongroup", S, T)
        assert [t for t, _ in reversed(pairs)] == expected
        assert [s for _, s in reversed(pairs)] == [-1, *expected[:-1]]


def test_the_authors_uniform_may_take_more_steps_than_asked() -> None:
    assert len(make_pairs("uniform-ermongroup", 300, 1000)) == 334
    exact = [S for S in range(1, 1001) if len(make_pairs("uniform-ermongroup", S, 1000)) == S]
    assert len(exact) == 16  # the divisors of 1000


def test_the_authors_quad_repeats_steps_from_30_on() -> None:
    def repeated(S: int) -> int:
        return sum(t == s for t, s in make_pairs("quad-ermongroup", S, 1000))

    assert {S: repeated(S) for S in (50, 100, 1000)} == {50: 1, 100: 4, 1000: 312}
    assert next(S for S in range(1, 1001) if repeated(S)) == 30
    assert {tau("quad-ermongroup", S, 1000)[-1] for S in range(2, 1001)} <= {799, 800}


def diffusers_tau(spacing: Any, S: int, T: int) -> list[int]:
    scheduler = DDIMScheduler(num_train_timesteps=T, timestep_spacing=spacing, steps_offset=0)
    scheduler.set_timesteps(S)
    timesteps: list[int] = scheduler.timesteps.tolist()
    return timesteps[::-1]


@pytest.mark.parametrize("S", [2, 7, 10, 30, 50, 99, 250, 333, 1000])
def test_leading_is_that_of_diffusers(S: int) -> None:
    assert tau("leading", S, 1000) == diffusers_tau("leading", S, 1000)


@pytest.mark.parametrize("S", [S for S in range(1, 1001) if 1000 % S == 0])
def test_trailing_is_that_of_diffusers_where_S_divides_T(S: int) -> None:
    assert tau("trailing", S, 1000) == diffusers_tau("trailing", S, 1000)


@pytest.mark.parametrize("S", [7, 12, 30, 60, 300])
def test_trailing_is_that_of_diffusers_where_its_arange_is_sound(S: int) -> None:
    assert tau("trailing", S, 1000) == diffusers_tau("trailing", S, 1000)


def test_trailing_has_no_timestep_minus_one_where_diffusers_has() -> None:
    assert diffusers_tau("trailing", 61, 1000)[0] == -1
    assert tau("trailing", 61, 1000) == diffusers_tau("trailing", 61, 1000)[1:]


@pytest.mark.parametrize("S", [2, 7, 10, 30, 50, 99, 250, 333, 1000])
def test_linspace_is_that_of_diffusers(S: int) -> None:
    assert tau("linspace", S, 1000) == diffusers_tau("linspace", S, 1000)


@pytest.mark.parametrize(
    "spacing",
    [
        [0, 3, 7],
        [7, 3, 0],
        (7, 3, 0),
        np.array([0, 3, 7]),
        torch.tensor([7, 3, 0]),
        [np.int64(0), np.int64(3), np.int64(7)],
        [(7, 3), (3, 0), (0, -1)],
        ((7, 3), (3, 0), (0, -1)),
        [[7, 3], [3, 0], [0, -1]],
        torch.tensor([[7, 3], [3, 0], [0, -1]]),
    ],
)
def test_tau_may_be_given_ascending_descending_or_as_pairs(spacing: Any) -> None:
    expected = ((7, 3), (3, 0), (0, -1))
    assert make_pairs(spacing, 1, 10) == expected
    ddim = DDIM(spacing=spacing)
    assert ddim.pairs == expected
    assert ddim.steps == 3


def test_tau_may_be_a_range() -> None:
    expected = ((6, 4), (4, 2), (2, 0), (0, -1))
    assert make_pairs(range(0, 8, 2), 1, 10) == expected
    assert make_pairs(range(6, -1, -2), 1, 10) == expected


def test_pairs_may_stop_short_of_data() -> None:
    assert make_pairs([(9, 5), (5, 2)], 1, 10) == ((9, 5), (5, 2))
    assert make_pairs([4], 1, 10) == ((4, -1),)


@pytest.mark.parametrize("steps", [True, 1.0, "10", None, [10]])
def test_steps_that_are_no_integer_are_refused(steps: Any) -> None:
    refused(lambda: make_pairs("uniform", steps, 1000), TypeError, "steps", "[1, 1000]")


@pytest.mark.parametrize("steps", [0, -5, 1001])
@pytest.mark.parametrize("spacing", STRICT + ERMONGROUP)
def test_steps_out_of_range_are_refused(spacing: str, steps: int) -> None:
    refused(lambda: make_pairs(spacing, steps, 1000), ValueError, "steps", "[1, 1000]", str(steps))


@pytest.mark.parametrize("spacing", ["Uniform", "", "lambda"])
def test_the_refusal_of_an_unknown_spacing_lists_the_spacings(spacing: str) -> None:
    refused(lambda: make_pairs(spacing, 10, 1000), ValueError, "spacing", *STRICT, *ERMONGROUP)


@pytest.mark.parametrize(
    "spacing",
    [
        [],
        np.array([]),
        [3, 3],
        [0, 5, 5],
        [0, 5, 3],
        [5, 3, 4],
        [9, 10],
        [-1, 3],
        [3, -1],
        [(3, 3)],
        [(3, 5)],
        [(9, 5), (4, -1)],
        [(10, 5)],
        [(5, -2)],
        [(5, 3, 1)],
        [(5,)],
        [(5, 3), 3],
        ["a"],
        [(1, 0), (0, -1), (0, -1)],
    ],
)
def test_a_tau_that_is_no_way_down_is_refused(spacing: Any) -> None:
    refused(lambda: make_pairs(spacing, 1, 10), ValueError, "spacing")


@pytest.mark.parametrize(
    "spacing",
    [
        None,
        5,
        {3, 5},
        {3: 5},
        iter([3, 5]),
        [0.0, 5.0],
        [True],
        [None],
        [5, (3, 1)],
        [(5.0, 3)],
        [(5, None)],
        torch.tensor(5),
        np.array([1.5]),
    ],
)
def test_spacings_that_are_no_list_of_levels_are_refused(spacing: Any) -> None:
    refused(lambda: make_pairs(spacing, 1, 10), TypeError, "spacing")


def test_steps_beside_a_list_must_be_its_length() -> None:
    assert DDIM(steps=2, spacing=[0, 5]).steps == 2
    refused(lambda: DDIM(steps=3, spacing=[0, 5]), ValueError, "steps", "2", "3")


def test_a_list_given_is_the_samplers_own() -> None:
    spacing = [0, 5]
    ddim = DDIM(spacing=spacing)
    spacing[1] = 9
    assert ddim.pairs == ((5, 0), (0, -1)) == ddim.spacing
    assert ddim == DDIM(spacing=[5, 0], schedule=ddim.schedule)


def test_steps_are_checked_against_the_schedules_length() -> None:
    assert DDIM(steps=5, schedule=NoiseSchedule.linear(100)).pairs == make_pairs("uniform", 5, 100)
    refused(lambda: DDIM(steps=101, schedule=NoiseSchedule.linear(100)), ValueError, "steps")


# --- A loop that starts from noise starts where noise is ---------------------------------------


@pytest.mark.parametrize("spacing", ["uniform", "quad", "leading", "trailing", "linspace"])
def test_one_step_from_noise_draws_the_data(spacing: SpacingName) -> None:
    # x0 ~ N(0.3, 0.5²): the x0 predicted at √ᾱ = 0.006 is the mean; noise stays N(0, 1) at t = 0.
    ddim, gaussian = DDIM(1, spacing=spacing), Gaussian(0.3, 0.5)
    assert ddim.pairs == ((999, -1),)
    x = ddim.sample(lambda x, t: gaussian(x.double(), t).float(), shape=(64, 8), seeds=range(64))
    assert float((x - 0.3).abs().max()) < 0.02


@pytest.mark.parametrize("spacing", ["uniform-ermongroup", "quad-ermongroup"])
def test_one_step_of_the_authors_spacings_is_refused(spacing: SpacingName) -> None:
    assert make_pairs(spacing, 1, 1000) == ((0, -1),)  # as their code has it
    refused(lambda: DDIM(1, spacing=spacing), ValueError, "steps", spacing, "t = 0", "'trailing'")
    assert DDIM(1, spacing=spacing, schedule=NoiseSchedule.linear(1)).pairs == ((0, -1),)


FAR_FROM_NOISE: list[tuple[SpacingName, int, NoiseSchedule, str]] = [
    ("uniform", 2, NoiseSchedule.linear(), "0.279"),
    ("leading", 2, NoiseSchedule.linear(), "0.279"),
    ("leading", 501, NoiseSchedule.linear(), "0.279"),  # ⌊1000/501⌋ = 1: from t = 500
    ("uniform-ermongroup", 2, NoiseSchedule.linear(), "0.279"),
    ("uniform", 4, NoiseSchedule.scaled_linear(), "0.237"),
    ("uniform", 5, NoiseSchedule.cosine(100), "0.292"),
    ("quad", 50, NoiseSchedule.cosine(), "0.305"),
    ("quad-ermongroup", 50, NoiseSchedule.cosine(), "0.305"),
]


@pytest.mark.parametrize(("spacing", "S", "schedule", "signal"), FAR_FROM_NOISE)
def test_a_first_level_far_from_noise_is_warned_of_once(
    spacing: SpacingName, S: int, schedule: NoiseSchedule, signal: str
) -> None:
    with pytest.warns(SamplingWarning) as caught:
        ddim = DDIM(S, spacing=spacing, schedule=schedule)
    [warning] = caught
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ddim.sample(lambda x, t: 0 * x, shape=(1, 2), seeds=[0])
    first = ddim.pairs[0][0]
    assert float(np.sqrt(schedule.alphas_cumprod[first])) == pytest.approx(float(signal), abs=5e-4)
    for said in (signal, "√ᾱ", f"t = {first}", "'trailing'", f"t = {len(schedule) - 1}"):
        assert said in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.parametrize(
    ("spacing", "S", "schedule"),
    [
        *[(spacing, S, NoiseSchedule.linear()) for spacing in STRICT for S in (3, 10, 50, 1000)],
        *[("uniform", S, NoiseSchedule.cosine(100)) for S in (8, 10, 16)],
        *[("leading", S, NoiseSchedule.scaled_linear()) for S in (5, 20, 50)],
        *[(s, S, NoiseSchedule.cosine()) for s in ("trailing", "linspace") for S in (1, 2, 5)],
        # Its noisiest level has √ᾱ = 0.6, so no spacing lets the loop start from pure noise.
        *[("uniform", S, NoiseSchedule.linear(100)) for S in (1, 2, 10)],
        # A list of timesteps names its own first one.
        ([0, 100, 200], None, NoiseSchedule.linear()),
        ([(300, 10), (10, -1)], None, NoiseSchedule.linear()),
    ],
)
def test_common_spacings_are_not_warned_of(spacing: Any, S: Any, schedule: NoiseSchedule) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DDIM(S, spacing=spacing, schedule=schedule)


@pytest.mark.parametrize(("paper", "ours"), [("linear", "uniform"), ("quadratic", "quad")])
def test_the_papers_own_names_are_answered_with_ours(paper: Any, ours: str) -> None:
    refused(lambda: DDIM(spacing=paper), ValueError, "spacing", repr(paper), f"(here {ours})")
