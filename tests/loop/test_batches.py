"""batch_size: the model sees full batches only, and no sample can tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim import DDIM, NoiseSchedule
from tests.loops import column, conditioned, drawn
from tests.refusals import refused

LINEAR = NoiseSchedule.linear()
SHAPE = (7, 2, 3, 5)
SEEDS = [3, 1, 4, 2**33, 5, 9, 2**62]
C, U = drawn(7, 2, 1, 1, seed=1), drawn(7, 2, 1, 1, seed=2)
BOTH: dict[str, Any] = {"cond": {"c": C}, "uncond": {"c": U}}
SIZES = [1, 2, 3, 4, 6, 7, 20]


def loose(x: Tensor, t: Tensor, c: Tensor | None = None, before: Tensor | None = None) -> Tensor:
    output = conditioned(x, t, torch.zeros(1) if c is None else c)
    return output if before is None else output + 0.1 * before


CALLS: dict[str, dict[str, Any]] = {
    "plain": {"shape": SHAPE, "seeds": SEEDS},
    "x_T": {"x_T": drawn(*SHAPE), "seeds": SEEDS},
    "noise": {"x_T": drawn(*SHAPE), "noise": drawn(8, *SHAPE, seed=5)},
    "list of noise": {"x_T": drawn(*SHAPE), "noise": list(drawn(8, *SHAPE, seed=5))},
    "half": {"x_T": drawn(*SHAPE).to(torch.bfloat16), "seeds": SEEDS},
    "bf16": {"shape": SHAPE, "seeds": SEEDS, "dtype": torch.bfloat16},
    "channels_last": {
        "x_T": drawn(*SHAPE).contiguous(memory_format=torch.channels_last),
        "seeds": SEEDS,
    },
    "cond": {"shape": SHAPE, "seeds": SEEDS, "cond": {"c": C}},
    "one row": {"shape": SHAPE, "seeds": SEEDS, "cond": {"c": C[:1]}},
    "guidance": {"shape": SHAPE, "seeds": SEEDS, **BOTH, "guidance": 3.0},
    "per sample": {"shape": SHAPE, "seeds": SEEDS, **BOTH, "guidance": [0, 1, 2, 3, 4, 5, 6]},
    "per row": {
        "shape": SHAPE,
        "seeds": SEEDS,
        **BOTH,
        "guidance": lambda t: 3.0 if t > 300 else 1.0,
        "dtype": torch.bfloat16,
    },
    "both": {"shape": SHAPE, "seeds": SEEDS, **BOTH, "guidance": drawn(8, 7, seed=8)},
    "one row of uncond": {
        "shape": SHAPE,
        "seeds": SEEDS,
        "cond": {"c": C},
        "uncond": {"c": U[:1]},
        "guidance": 2.0,
    },
    "known": {
        "shape": SHAPE,
        "seeds": SEEDS,
        "known": drawn(*SHAPE, seed=6),
        "mask": (drawn(7, 1, 3, 5, seed=7) > 0).float(),
    },
    "one mask": {
        "shape": SHAPE,
        "seeds": SEEDS,
        "known": drawn(*SHAPE, seed=6),
        "mask": torch.rand(1, 1, 3, 5, generator=torch.Generator().manual_seed(7)),
    },
    "self": {"shape": SHAPE, "seeds": SEEDS, "self_condition": "before"},
    "cond_fn": {
        "shape": SHAPE,
        "seeds": SEEDS,
        **BOTH,
        "guidance": 2.0,
        "cond_fn": lambda x, t, c: c * x,
    },
    "start": {"x_T": drawn(*SHAPE), "seeds": SEEDS, "start": 3},
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_any_split_is_bit_identical(how: str, eta: float) -> None:
    ddim = DDIM(8, eta=eta, schedule=LINEAR)
    whole, path = ddim.sample(loose, trajectory=("x", "x0"), every=3, **CALLS[how])
    plain = ddim.sample(loose, **CALLS[how])
    assert torch.equal(whole, plain)
    # With η = 0 every third size will do: with η = 1 each call is split in every size.
    for size in SIZES if eta else SIZES[list(CALLS).index(how) % 3 :: 3]:
        out = ddim.sample(loose, batch_size=size, **CALLS[how])
        assert out.dtype == whole.dtype
        assert out.shape == whole.shape
        assert torch.equal(out, whole), size
    out, kept = ddim.sample(loose, batch_size=3, trajectory=("x", "x0"), every=3, **CALLS[how])
    assert torch.equal(out, whole)
    assert path.x is not None
    assert path.x0 is not None
    assert kept.x is not None
    assert kept.x0 is not None
    assert kept.index == path.index
    assert torch.equal(kept.x, path.x)
    assert torch.equal(kept.x0, path.x0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("guided", [False, True])
def test_the_model_sees_full_batches_only(size: int, guided: bool) -> None:
    calls: list[tuple[int, list[float]]] = []

    def counting(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        assert len(t) == len(x) == len(c)
        calls.append((len(x), c[-size:].flatten().tolist()))
        return conditioned(x, t, c.view(-1, 1, 1, 1))

    names = torch.arange(7.0)
    more: dict[str, Any] = {"uncond": {"c": names + 10}, "guidance": 2.0} if guided else {}
    DDIM(4).sample(counting, shape=SHAPE, seeds=SEEDS, cond={"c": names}, batch_size=size, **more)
    batches = -(-7 // size)
    assert [n for n, _ in calls] == [size * (1 + guided)] * (4 * batches)
    for k in range(batches):  # in order, the last filled with its last sample
        members = [min(i, 6) for i in range(k * size, (k + 1) * size)]
        assert all(c == members for _, c in calls[4 * k : 4 * k + 4])


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("guided", [False, True])
def test_conditions_that_belong_to_no_sample_are_not_split(size: int, guided: bool) -> None:
    # As many rows as a batch has here, but not as there are samples.
    table = drawn(size, 2)

    def net(x: Tensor, t: Tensor, c: Tensor, table: Tensor, deep: dict[str, Any]) -> Tensor:
        assert table is given
        assert deep["more"][0] is given
        return conditioned(x, t, c + table.sum())

    given = table
    cond = {"c": C, "table": table, "deep": {"more": [table]}}
    more: dict[str, Any] = {}
    if guided:
        more = {"uncond": {"c": U, "table": table}, "guidance": 2.0}
    ddim = DDIM(4, eta=1.0)
    whole = ddim.sample(net, shape=SHAPE, seeds=SEEDS, cond=cond, **more)
    split = ddim.sample(net, shape=SHAPE, seeds=SEEDS, cond=cond, batch_size=size, **more)
    assert torch.equal(split, whole)


def test_nested_conditions_are_split_too() -> None:
    def net(x: Tensor, t: Tensor, deep: Any, flag: str) -> Tensor:
        first, (second,) = deep["list"]
        assert flag == "yes"
        return conditioned(x, t, first + second)

    common: dict[str, Any] = {
        "shape": SHAPE,
        "seeds": SEEDS,
        "cond": {"deep": {"list": [C, (U,)]}, "flag": "yes"},
        "uncond": {"deep": {"list": [U, (C,)]}},
        "guidance": 2.0,
    }
    ddim = DDIM(4, eta=1.0)
    assert torch.equal(ddim.sample(net, batch_size=3, **common), ddim.sample(net, **common))


def rounding(x: Tensor, t: Tensor) -> Tensor:
    """As many networks do, rounds otherwise in a batch of another size."""
    n = len(x)
    return 0.8 * ((x / (n + 0.1)) * (n + 0.1)).clamp(-1.5, 1.5) + 1e-3 * column(t % 97, x)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_seeds_image_depends_on_the_batch_by_the_model_alone(eta: float) -> None:
    ddim = DDIM(50, eta=eta, schedule=LINEAR)
    seeds, some = [*range(9), *SEEDS], [5, 2**62, 2**33]
    at = [seeds.index(seed) for seed in some]

    def sampled(net: Any, of: list[int], size: int | None) -> Tensor:
        return ddim.sample(net, shape=(len(of), *SHAPE[1:]), seeds=of, batch_size=size)

    # The sampler's own arithmetic adds nothing.
    for size in (None, 1, 4):
        assert torch.equal(sampled(loose, seeds, size)[at], sampled(loose, some, size))
    assert torch.equal(sampled(loose, seeds, None), sampled(loose, seeds, 4))
    # A network that rounds by batch size: another rounding in another batch ...
    alone, together = sampled(rounding, some, None), sampled(rounding, seeds, None)[at]
    assert not torch.equal(alone, together)
    assert float((alone - together).abs().max()) < 2e-5
    # ... and none where all batches are of one size, whatever else is asked for and in what order.
    for size in (1, 4, 20):
        full = sampled(rounding, seeds, size)[at]
        assert torch.equal(full, sampled(rounding, some, size))
        assert torch.equal(full, sampled(rounding, some[::-1], size).flip(0))


def test_without_a_source_of_noise_there_is_one_draw_for_all() -> None:
    ddim, outs = DDIM(4, eta=1.0), []
    for size in (None, 3):
        torch.manual_seed(5)
        outs.append(ddim.sample(loose, shape=SHAPE, batch_size=size))
    assert torch.equal(*outs)


def test_a_generator_may_draw_x_T_where_steps_add_no_noise() -> None:
    outs = [
        DDIM(4).sample(
            loose, shape=SHAPE, generator=torch.Generator().manual_seed(3), batch_size=size
        )
        for size in (None, 3)
    ]
    assert torch.equal(*outs)


def test_an_empty_batch_calls_no_model() -> None:
    out = DDIM(4).sample(unused, shape=(0, 3), seeds=[], batch_size=4)
    assert out.shape == (0, 3)


def test_progress_counts_the_steps_of_all_batches() -> None:
    seen: list[int] = []
    ended: list[bool] = []

    def wrapper(steps: Any) -> Any:
        steps = list(steps)
        for n, step in enumerate(steps):
            seen.append(n)
            yield step
        ended.append(True)

    DDIM(4).sample(loose, shape=SHAPE, seeds=SEEDS, batch_size=3, progress=wrapper)
    assert seen == list(range(12))
    assert ended == [True]


def unused(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing may be called")


@pytest.mark.parametrize(
    ("error", "said", "arguments"),
    [
        (ValueError, ("batch_size", "0"), {"batch_size": 0}),
        (ValueError, ("batch_size", "-3"), {"batch_size": -3}),
        (ValueError, ("batch_size", "1000000"), {"batch_size": 10**30}),
        (TypeError, ("batch_size", "2.0"), {"batch_size": 2.0}),
        (TypeError, ("batch_size", "True"), {"batch_size": True}),
        (ValueError, ("batch_size", "callback"), {"batch_size": 2, "callback": unused}),
        (
            ValueError,
            ("batch_size", "generator"),
            {"batch_size": 2, "generator": torch.Generator(), "seeds": None},
        ),
    ],
)
def test_bad_arguments_are_refused(
    error: type[Exception], said: tuple[str, ...], arguments: dict[str, Any]
) -> None:
    given: dict[str, Any] = {"shape": SHAPE, "seeds": SEEDS} | arguments
    refused(lambda: DDIM(4, eta=1.0).sample(unused, **given), error, *said)


def test_a_generator_cannot_be_divided_for_known_images_either() -> None:
    known, mask = drawn(*SHAPE), torch.ones(1, 1, 1, 1)
    refused(
        lambda: DDIM(4).sample(
            unused,
            shape=SHAPE,
            generator=torch.Generator(),
            known=known,
            mask=mask,
            batch_size=2,
        ),
        ValueError,
        "batch_size",
        "generator",
    )
