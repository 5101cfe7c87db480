"""Loops that begin, end or turn elsewhere: any row, known pixels, callbacks, temperature."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastddim import DDIM, NoiseSchedule, Step
from fastddim.step.buffers import FRESH
from fastddim.step.op import initial_noise
from fastddim.step.philox import FORWARD_STREAM, INITIAL_STREAM, normals
from tests.loops import by_hand, column, counter_noise, drawn, last
from tests.paths import CPU, use
from tests.refusals import refused
from tests.tolerances import NORMAL_ATOL

LINEAR = NoiseSchedule.linear()
ABAR = torch.from_numpy(LINEAR.alphas_cumprod.copy())
SHAPE, SEEDS = (3, 2, 5, 4), [7, 2**35, 2**63 - 1]
X = drawn(*SHAPE)


def model(x: Tensor, t: Tensor) -> Tensor:
    return 0.8 * x.clamp(-1.5, 1.5) + 1e-3 * column(t % 97, x)


def unused(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing may be called")


def sources(eta: float) -> dict[str, Callable[[], dict[str, Any]]]:
    return {
        "seeds": lambda: {"seeds": SEEDS},
        "noise": lambda: {"noise": drawn(12, *SHAPE, seed=4)},
        "generator": lambda: {"generator": torch.Generator().manual_seed(8)},
    }


@pytest.mark.parametrize("source", ["seeds", "noise", "generator"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("k", [0, 1, 5, 10])
def test_sample_continues_iterate_bit_for_bit(source: str, eta: float, k: int) -> None:
    ddim = DDIM(12, eta=eta, schedule=LINEAR, clip=1.0)
    given = sources(eta)[source]
    whole = ddim.sample(model, X, **given())
    options, part = given(), None
    for step in ddim.iterate(model, X, **options):
        if step.index == k:
            part = step
            break
    assert part is not None
    # The same generator goes on where the first half has left it.
    out = ddim.sample(model, part.x, start=k + 1, **options)
    assert torch.equal(out, whole)
    if eta and source == "seeds":
        other = ddim.sample(model, part.x, start=k + 1, seeds=[1, 2, 3])
        assert torch.equal(other, whole) == (k == 10)  # the last row adds no noise


@pytest.mark.parametrize("start", [0, 3, 11])
def test_rows_and_their_noise_keep_their_numbers(start: int) -> None:
    ddim = DDIM(12, eta=1.0, schedule=LINEAR)
    told: list[int] = []

    def listening(x: Tensor, t: Tensor) -> Tensor:
        told.append(int(t[0]))
        return model(x, t)

    out = ddim.sample(listening, X, start=start, seeds=SEEDS)
    assert told == [t for t, _ in ddim.pairs[start:]]
    states = by_hand(ddim, model, X, counter_noise(ddim, SEEDS, SHAPE), start=start)
    assert torch.equal(out, last(states))
    steps = list(ddim.iterate(model, X, start=start, seeds=SEEDS))
    assert [step.index for step in steps] == list(range(start, 12))


@pytest.mark.parametrize("start", [0, 4, 11])
@pytest.mark.parametrize("source", ["noise", "seeds", "generator", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_add_noise_is_the_forward_process(start: int, source: str, dtype: torch.dtype) -> None:
    ddim = DDIM(12, eta=0.5, schedule=LINEAR, spacing="quad")
    x0 = X.to(dtype)
    before = x0.clone()
    if source == "noise":
        eps = drawn(*SHAPE, seed=9)
        out = ddim.add_noise(x0, start, noise=eps)
    elif source == "seeds":
        eps = torch.from_numpy(normals(np.array(SEEDS), np.zeros(3, np.int32), 40, INITIAL_STREAM))
        out = ddim.add_noise(x0, start, seeds=SEEDS)
    elif source == "generator":
        eps = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
        out = ddim.add_noise(x0, start, generator=torch.Generator().manual_seed(2))
    else:
        torch.manual_seed(6)
        eps = initial_noise(torch.randint(0, 2**63 - 1, (3,)), SHAPE)
        torch.manual_seed(6)
        out = ddim.add_noise(x0, start)
    abar = float(ABAR[ddim.pairs[start][0]])
    exact = math.sqrt(abar) * x0.double() + math.sqrt(1 - abar) * eps.view(SHAPE).double()
    assert out.dtype == dtype
    tolerance = {torch.float32: NORMAL_ATOL, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert ((out - exact).abs() <= tolerance * exact.abs().clamp(min=1)).all()
    assert torch.equal(x0, before)


def test_image_to_image_is_the_loop_from_there() -> None:
    ddim = DDIM(12, eta=1.0, schedule=LINEAR)
    x = ddim.add_noise(X, 6, seeds=SEEDS)
    out = ddim.sample(model, x, start=6, seeds=SEEDS)
    assert torch.equal(
        out, last(by_hand(ddim, model, x, counter_noise(ddim, SEEDS, SHAPE), start=6))
    )


# Inpainting.


def forward_noise(row: int) -> Tensor:
    """z of stream 2 in this row, as this device draws it."""
    z = torch.full(SHAPE, float("nan"))
    rows = torch.full((3,), row, dtype=torch.int32)
    torch.ops.fastddim.normal_(z, torch.tensor(SEEDS), rows, FORWARD_STREAM)
    return z


def inpainted(
    ddim: DDIM, known: Tensor, mask: Tensor, x: Tensor, forward: Callable[[int], Tensor], z: Any
) -> Tensor:
    """RePaint without resampling (Lugmayr et al. 2022, algorithm 1), each state put together."""
    from fastddim.step import reference

    def at(row: int) -> Tensor:
        level = ddim.pairs[row][0] if row < len(ddim.pairs) else ddim.pairs[-1][1]
        if level < 0:
            return known.double()
        abar = float(ABAR[level])
        return math.sqrt(abar) * known.double() + math.sqrt(1 - abar) * forward(row).double()

    def together(x: Tensor, row: int) -> Tensor:
        return (mask.double() * at(row) + (1 - mask.double()) * x.double()).float()

    table = torch.tensor(ddim.table)
    x = together(x, 0)
    for row, (t, _) in enumerate(ddim.pairs):
        x, _x0 = reference.ddim_step(x, model(x, torch.full((3,), t)), table[row], z[row])
        x = together(x, row + 1)
    return x


HARD = (drawn(3, 1, 5, 4, seed=5) > 0).float()
MASKS = {
    "hard": HARD,
    "one for all": HARD[:1],
    "by pixel and channel": (drawn(*SHAPE, seed=6) > 0).float(),
    "soft": torch.rand(3, 1, 5, 4, generator=torch.Generator().manual_seed(1)),
    "half": HARD.half(),
    "bool": HARD.bool(),
    "all": torch.ones(1, 1, 1, 1),
    "none": torch.zeros(1, 1, 1, 1),
}
ENDS = {
    "clean": DDIM(12, eta=1.0, schedule=LINEAR),
    "ddim": DDIM(12, schedule=LINEAR, spacing="trailing"),
    "final": DDIM(12, schedule=LINEAR, final_alpha_cumprod=float(ABAR[0]), eta=0.5),
    "short": DDIM(spacing=[(900, 500), (500, 300), (300, 100)], eta=1.0, schedule=LINEAR),
    "to level 0": DDIM(spacing=[(900, 500), (500, 0)], schedule=LINEAR),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("ddim", ENDS.values(), ids=ENDS)
def test_states_are_the_noised_image_where_the_mask_is_1(ddim: DDIM, mask: Tensor) -> None:
    known = drawn(*SHAPE, seed=3)
    out = ddim.sample(model, X, seeds=SEEDS, known=known, mask=mask)
    z = counter_noise(ddim, SEEDS, SHAPE)
    exact = inpainted(ddim, known, mask.float(), X, forward_noise, z)
    assert (out - exact).abs().max() < 1e-5
    steps = list(ddim.iterate(model, X, seeds=SEEDS, known=known, mask=mask))
    assert torch.equal(steps[-1].x, out)
    where = mask.float().expand(SHAPE)
    if ddim.pairs[-1][1] < 0:
        assert torch.equal(out[where == 1], known[where == 1])
    else:
        abar = float(ABAR[ddim.pairs[-1][1]])
        eps = forward_noise(len(ddim.pairs))
        level = math.sqrt(abar) * known + math.sqrt(1 - abar) * eps
        assert (out - level)[where == 1].abs().sum() < 1e-4
    if not where.any():
        assert torch.equal(out, ddim.sample(model, X, seeds=SEEDS))


def test_known_pixels_are_noised_from_the_first_model_call_on() -> None:
    known, mask, ddim = drawn(*SHAPE, seed=3), torch.ones(1, 1, 1, 1), ENDS["clean"]
    seen: list[Tensor] = []

    def watching(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return model(x, t)

    for start in (0, 5):
        seen.clear()
        ddim.sample(watching, X, seeds=SEEDS, known=known, mask=mask, start=start)
        for row, x in enumerate(seen, start):
            abar = float(ABAR[ddim.pairs[row][0]])
            exact = math.sqrt(abar) * known + math.sqrt(1 - abar) * forward_noise(row)
            assert (x - exact).abs().max() < 1e-5


def test_a_known_images_noise_may_come_from_a_generator() -> None:
    known, ddim = drawn(*SHAPE, seed=3), DDIM(12, schedule=LINEAR)
    ours, theirs = (torch.Generator().manual_seed(4) for _ in range(2))
    out = ddim.sample(model, X, generator=ours, known=known, mask=HARD)
    drawn_in_turn: dict[int, Tensor] = {}

    def forward(row: int) -> Tensor:
        if row not in drawn_in_turn:
            drawn_in_turn[row] = torch.randn(SHAPE, generator=theirs)
        return drawn_in_turn[row]

    exact = inpainted(ddim, known, HARD, X, forward, [None] * 12)
    assert (out - exact).abs().max() < 1e-5


def test_half_precision_inpainting_keeps_the_known_image_exactly() -> None:
    known = drawn(*SHAPE, seed=3).to(torch.bfloat16)
    seen: set[torch.dtype] = set()

    def watching(x: Tensor, t: Tensor) -> Tensor:
        seen.add(x.dtype)
        return model(x, t)

    out = ENDS["clean"].sample(watching, X.to(torch.bfloat16), seeds=SEEDS, known=known, mask=HARD)
    where = HARD.expand(SHAPE) == 1
    assert seen == {torch.bfloat16}
    assert torch.equal(out[where], known[where])
    assert not torch.equal(out[~where], known[~where])


# Callbacks.


def test_a_callback_gets_each_step_and_none_changes_nothing() -> None:
    ddim = DDIM(12, eta=1.0, schedule=LINEAR)
    seen: list[Step] = []
    for answer in (None, False):

        def watching(step: Step, answer: Any = answer) -> Any:
            seen.append(step)
            return answer

        seen.clear()
        out = ddim.sample(model, X, seeds=SEEDS, callback=watching)
        steps = list(ddim.iterate(model, X, seeds=SEEDS))
        assert len(seen) == 12
        for a, b in zip(seen, steps, strict=True):
            assert (a.index, a.t, a.s) == (b.index, b.t, b.s)
            assert torch.equal(a.x, b.x)
            assert torch.equal(a.x0, b.x0)
        assert torch.equal(out, steps[-1].x)


@pytest.mark.parametrize("k", [0, 5, 11])
def test_true_ends_the_loop_there(k: int) -> None:
    ddim = DDIM(12, eta=1.0, schedule=LINEAR)
    calls: list[int] = []

    def counting(x: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        return model(x, t)

    out = ddim.sample(counting, X, seeds=SEEDS, callback=lambda step: step.index == k)
    assert len(calls) == k + 1
    assert torch.equal(out, list(ddim.iterate(model, X, seeds=SEEDS))[k].x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_a_callback_returns_takes_the_place_of_x(dtype: torch.dtype) -> None:
    ddim = DDIM(12, eta=1.0, schedule=LINEAR)

    def halved(step: Step) -> Tensor | None:
        return 0.5 * step.x if step.index in (3, 7, 11) else None

    out = ddim.sample(model, X, seeds=SEEDS, callback=halved, dtype=dtype)
    x, noise = X, counter_noise(ddim, SEEDS, SHAPE)
    for row in range(12):
        x, _ = next(by_hand(ddim, model, x, noise, dtype=dtype, start=row))
        x = 0.5 * x if row in (3, 7, 11) else x
    assert torch.equal(out, x)


@pytest.mark.parametrize("backend", CPU)
def test_a_replacement_may_lie_otherwise_in_memory(backend: str) -> None:
    """The launch of the steps before would read and write its elements in another order."""
    ddim, shape = DDIM(8, eta=1.0, schedule=LINEAR), (2, 3, 4, 5)
    x = drawn(*shape)

    def contiguous(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t).contiguous()

    def turned(step: Step) -> Tensor | None:
        return step.x.contiguous(memory_format=torch.channels_last) if step.index == 3 else None

    with use(backend):
        for dtype in (torch.float32, torch.bfloat16):
            given: dict[str, Any] = {"seeds": SEEDS[:2], "dtype": dtype}
            out = ddim.sample(contiguous, x, callback=turned, **given)
            assert torch.equal(out, ddim.sample(contiguous, x, **given))


@pytest.mark.parametrize("backend", CPU)
def test_no_step_writes_the_array_of_a_state_that_nobody_holds(backend: str) -> None:
    """The array's references are none of the tensor's, which the generator alone holds."""
    ddim, x = DDIM(5, schedule=LINEAR), drawn(2, 3, 96, 96)
    assert x.numel() >= FRESH
    array = x.numpy().copy()
    with use(backend):
        for _ in ddim.iterate(model, torch.from_numpy(array)):
            pass
    assert np.array_equal(array, x.numpy())


@pytest.mark.parametrize("backend", CPU)
def test_each_rows_noise_is_read_as_it_lies(backend: str) -> None:
    ddim, shape = DDIM(6, eta=1.0, schedule=LINEAR), (2, 3, 4, 5)
    x, noise = drawn(*shape), list(drawn(6, *shape, seed=4))
    turned = [
        z.contiguous(memory_format=torch.channels_last) if i % 2 else z for i, z in enumerate(noise)
    ]
    with use(backend):
        out = ddim.sample(model, x, noise=turned)
        assert torch.equal(out, ddim.sample(model, x, noise=noise))


@pytest.mark.parametrize("backend", CPU)
def test_outputs_with_the_negative_bit_are_read_by_value(backend: str) -> None:
    """Such an output lies as the one before, and its memory holds the opposite numbers."""
    ddim, x = DDIM(6, schedule=LINEAR), drawn(*SHAPE)

    def negated(x: Tensor, t: Tensor) -> Tensor:
        output = model(x, t)
        return torch._neg_view(-output) if int(t[0]) < 500 else output  # pyright: ignore[reportPrivateImportUsage]

    with use(backend):
        assert torch.equal(ddim.sample(negated, x), ddim.sample(model, x))


def test_a_callback_may_return_the_state_or_a_gradient() -> None:
    ddim = DDIM(12, eta=1.0, schedule=LINEAR)
    plain = ddim.sample(model, X, seeds=SEEDS)
    assert torch.equal(ddim.sample(model, X, seeds=SEEDS, callback=lambda step: step.x), plain)
    weight = torch.ones(1, requires_grad=True)
    out = ddim.sample(model, X, seeds=SEEDS, callback=lambda step: weight * step.x)
    assert torch.equal(out, plain)
    assert not out.requires_grad
    half = ddim.sample(model, X, seeds=SEEDS, callback=lambda step: step.x.double())
    assert half.dtype == torch.float32
    assert torch.equal(half, plain)


@pytest.mark.parametrize("answer", [lambda x: 1.0, lambda x: x[:1], lambda x: x.numpy()])
def test_bad_outputs_of_a_callback_are_refused(answer: Callable[[Tensor], Any]) -> None:
    refused(
        lambda: DDIM(5).sample(model, X, callback=lambda step: answer(step.x)),
        ValueError,
        "callback",
        "(3, 2, 5, 4)",
    )


# Temperature.


@pytest.mark.parametrize("eta", [0.5, 1.0, "hat"])
def test_temperature_scales_the_noise_alone(eta: Any) -> None:
    plain = DDIM(12, eta=eta, schedule=LINEAR)
    for temperature in (0.0, 0.5, 2.0):
        ddim = DDIM(12, eta=eta, schedule=LINEAR, temperature=temperature)
        assert np.array_equal(np.delete(ddim.table, 5, 1), np.delete(plain.table, 5, 1))
        assert np.allclose(ddim.table[:, 5], temperature * plain.table[:, 5], rtol=1e-6)
        noise = drawn(12, *SHAPE, seed=3)
        out = ddim.sample(model, X, noise=noise)
        assert (out - plain.sample(model, X, noise=temperature * noise)).abs().max() < 1e-5
    assert DDIM(12, schedule=LINEAR, temperature=0.5) != DDIM(12, schedule=LINEAR)


def test_at_temperature_0_nothing_is_drawn() -> None:
    generator = torch.Generator().manual_seed(1)
    state = generator.get_state()
    DDIM(5, eta=1.0, temperature=0.0).sample(model, X, generator=generator)
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize(
    ("error", "value"),
    [
        (ValueError, -0.1),
        (ValueError, math.nan),
        (ValueError, math.inf),
        (TypeError, "1"),
        (TypeError, True),
    ],
)
def test_a_bad_temperature_is_refused_at_construction(error: type[Exception], value: Any) -> None:
    refused(lambda: DDIM(5, temperature=value), error, "temperature")


ONE = torch.ones(3, 1, 5, 4)


@pytest.mark.parametrize(
    ("error", "said", "arguments"),
    [
        (TypeError, ("start", "1.0"), {"x_T": X, "start": 1.0}),
        (ValueError, ("start", "[0, 11]", "12"), {"x_T": X, "start": 12}),
        (ValueError, ("start", "-1"), {"x_T": X, "start": -1}),
        (ValueError, ("x_T", "start = 3"), {"shape": SHAPE, "start": 3}),
        (TypeError, ("mask", "known", "NoneType"), {"x_T": X, "known": X}),
        (TypeError, ("known", "mask", "NoneType"), {"x_T": X, "mask": ONE}),
        (TypeError, ("known", "list"), {"x_T": X, "known": [1], "mask": ONE}),
        (
            ValueError,
            ("known", "(3, 2, 5, 4)", "(1, 2, 5, 4)"),
            {"x_T": X, "known": X[:1], "mask": ONE},
        ),
        (ValueError, ("mask", "(5, 4)"), {"x_T": X, "known": X, "mask": ONE[0, 0]}),
        (ValueError, ("mask", "(2, 1, 5, 4)"), {"x_T": X, "known": X, "mask": ONE[:2]}),
        (ValueError, ("mask", "[0, 1]"), {"x_T": X, "known": X, "mask": 2 * ONE}),
        (ValueError, ("mask", "[0, 1]"), {"x_T": X, "known": X, "mask": -ONE}),
        (ValueError, ("mask", "[0, 1]"), {"x_T": X, "known": X, "mask": math.nan * ONE}),
        (ValueError, ("known", "noise"), {"x_T": X, "known": X, "mask": ONE, "noise": [X] * 12}),
    ],
)
@pytest.mark.parametrize("run", ["sample", "iterate"])
def test_bad_arguments_are_refused_before_any_work(
    run: str, error: type[Exception], said: tuple[str, ...], arguments: dict[str, Any]
) -> None:
    refused(lambda: getattr(DDIM(12), run)(unused, **arguments), error, *said)


@pytest.mark.parametrize(
    ("error", "said", "arguments"),
    [
        (TypeError, ("x0", "float64"), {"x0": X.double(), "start": 0}),
        (ValueError, ("start", "12"), {"x0": X, "start": 12}),
        (TypeError, ("start", "None"), {"x0": X, "start": None}),
        (ValueError, ("seeds", "3", "2"), {"x0": X, "start": 0, "seeds": [1, 2]}),
        (ValueError, ("noise", "source"), {"x0": X, "start": 0, "seeds": SEEDS, "noise": X}),
        (ValueError, ("noise", "float64"), {"x0": X, "start": 0, "noise": X.double()}),
        (ValueError, ("noise", "(1, 2, 5, 4)"), {"x0": X, "start": 0, "noise": X[:1]}),
        (TypeError, ("generator", "int"), {"x0": X, "start": 0, "generator": 1}),
    ],
)
def test_add_noise_refuses_bad_arguments(
    error: type[Exception], said: tuple[str, ...], arguments: dict[str, Any]
) -> None:
    refused(lambda: DDIM(12).add_noise(**arguments), error, *said)
