"""DDIM(order=2): the loop against the step's reference, and where it begins again at order 1."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim import DDIM, Step, make_table
from fastddim.loop import graph
from fastddim.step import reference
from tests.loops import column, counter_noise, drawn
from tests.paths import CPU, use
from tests.refusals import refused
from tests.tape import Tape, tapes_for_graphs

SHAPE = (3, 2, 5, 7)
SEEDS = [5, 2**32 + 5, 2**63 - 1]
SAMPLERS = {
    "epsilon": DDIM(10, order=2),
    "v eta=0.5 clip": DDIM(9, eta=0.5, prediction="v", clip=1.0, order=2),
    "x0 eta=1 trailing": DDIM(8, eta=1.0, prediction="sample", spacing="trailing", order=2),
    "final ᾱ": DDIM(7, final_alpha_cumprod=0.9999, temperature=0.5, eta=0.2, order=2),
}
EACH = pytest.mark.parametrize("ddim", SAMPLERS.values(), ids=SAMPLERS)


def model(x: Tensor, t: Tensor) -> Tensor:
    """Elementwise, so that it rounds alike in any batch."""
    return 0.8 * x.clamp(-1.5, 1.5) + 1e-3 * column(t % 97, x)


def by_hand(
    ddim: DDIM,
    x: Tensor,
    noise: list[Tensor | None] | None = None,
    start: int = 0,
    replaced: dict[int, Tensor] | None = None,
    net: Any = model,
) -> list[tuple[Tensor, Tensor]]:
    """(x_s, x0) of each step by the reference; ``replaced`` are states put in after a row."""
    first = torch.tensor(
        make_table(ddim.schedule, ddim.pairs, ddim.eta, ddim.final_alpha_cumprod, ddim.temperature)
    )
    second, before, found = torch.tensor(ddim.table), None, []
    for row, (t, _) in list(enumerate(ddim.pairs))[start:]:
        output = net(x, torch.full((len(x),), t))
        step = partial(
            reference.ddim_step,
            *(x, output),
            z=None if noise is None else noise[row],
            prediction=ddim.prediction,
            clip=ddim.clip,
        )
        table = first if before is None else second
        x, before = step(row=table[row], history=before)
        found.append((x, before))
        if replaced and row in replaced:
            x, before = replaced[row], None
    return found


@pytest.mark.parametrize("backend", CPU)
@EACH
def test_sample_is_the_references_loop(ddim: DDIM, backend: str) -> None:
    x = drawn(*SHAPE)
    with use(backend):
        noise = counter_noise(ddim, SEEDS, SHAPE)
        expected = by_hand(ddim, x, noise)[-1][0]
        assert torch.equal(ddim.sample(model, x, seeds=SEEDS), expected)
        assert torch.equal(ddim.capture(model, SHAPE)(x_T=x, seeds=SEEDS), expected)
        parts = ddim.sample(model, x, seeds=SEEDS, batch_size=2)
        assert torch.equal(parts, expected)
        start = ddim.sample(model, x, seeds=SEEDS, start=3)
        assert torch.equal(start, by_hand(ddim, x, noise, start=3)[-1][0])


@EACH
def test_iterate_yields_each_state_and_x0(ddim: DDIM) -> None:
    x = drawn(*SHAPE)
    expected = by_hand(ddim, x, counter_noise(ddim, SEEDS, SHAPE))
    for step, (x_s, x0) in zip(ddim.iterate(model, x, seeds=SEEDS), expected, strict=True):
        assert torch.equal(step.x, x_s)
        assert torch.equal(step.x0, x0)
        step.x.fill_(torch.nan)  # copies, which the loop does not read
        step.x0.fill_(torch.nan)
    _, path = ddim.sample(model, x, seeds=SEEDS, trajectory=["x", "x0"])
    assert path.x0 is not None
    assert torch.equal(path.x0[-2], expected[-2][1])


def test_a_state_that_a_callback_replaces_starts_at_order_1() -> None:
    ddim, x, other = SAMPLERS["epsilon"], drawn(*SHAPE), drawn(*SHAPE, seed=2)

    def callback(step: Step) -> Tensor | None:
        return other if step.index == 4 else None

    found = ddim.sample(model, x, callback=callback)
    assert torch.equal(found, by_hand(ddim, x, replaced={4: other})[-1][0])
    assert not torch.equal(found, by_hand(ddim, x)[-1][0])


def test_a_state_that_is_looked_at_goes_on_at_order_2() -> None:
    ddim, x = SAMPLERS["epsilon"], drawn(*SHAPE)
    found = ddim.sample(model, x, callback=lambda step: None)
    assert torch.equal(found, by_hand(ddim, x)[-1][0])


def test_known_pixels_do_not_end_the_second_order() -> None:
    ddim, x, image = SAMPLERS["epsilon"], drawn(*SHAPE), drawn(*SHAPE, seed=3)
    nothing = ddim.sample(model, x, seeds=SEEDS, known=image, mask=torch.zeros(1, 1, 5, 7))
    assert torch.equal(nothing, by_hand(ddim, x)[-1][0])
    half = (torch.arange(7) < 3).float().expand(1, 1, 5, 7)
    found = ddim.sample(model, x, seeds=SEEDS, known=image, mask=half)
    assert torch.equal(found[..., :3], image[..., :3])
    # The model is elementwise: pixels that are not known are those of a loop without known ones.
    assert torch.equal(found[..., 3:], nothing[..., 3:])


def test_self_conditioning_and_the_step_share_the_last_x0() -> None:
    ddim, x = SAMPLERS["epsilon"], drawn(*SHAPE)
    last: list[Tensor] = [torch.zeros(SHAPE)]

    def conditioned(x: Tensor, t: Tensor, x0: Tensor | None = None) -> Tensor:
        return model(x, t) + 0.1 * (last[0] if x0 is None else x0)

    def hand(x: Tensor, t: Tensor) -> Tensor:
        return conditioned(x, t)

    first, second = torch.tensor(SAMPLERS["epsilon"]._all_rows.table), torch.tensor(ddim.table)
    state, before = x, None
    for row, (t, _) in enumerate(ddim.pairs):
        output = hand(state, torch.full((3,), t))
        table = first if before is None else second
        state, before = reference.ddim_step(state, output, table[row], history=before)
        last[0] = before
    assert torch.equal(ddim.sample(conditioned, x, self_condition="x0"), state)


@pytest.mark.parametrize("ddim", [SAMPLERS["epsilon"], SAMPLERS["v eta=0.5 clip"]])
def test_guidance_and_half_precision_read_the_last_x0(ddim: DDIM) -> None:
    def net(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return (model(x.float(), t) + c.view(-1, 1, 1, 1)).to(x.dtype)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        small = x.bfloat16()
        u, c = (net(small, t, torch.full((len(x),), value)).float() for value in (0.0, 0.1))
        return u + 2.5 * (c - u)

    x, one, zero = drawn(*SHAPE), torch.full((3,), 0.1), torch.zeros(3)
    found = ddim.sample(
        *(net, x),
        seeds=SEEDS,
        dtype=torch.bfloat16,
        cond={"c": one},
        uncond={"c": zero},
        guidance=2.5,
    )
    expected = by_hand(ddim, x, counter_noise(ddim, SEEDS, SHAPE), net=guided)
    assert torch.equal(found.float(), expected[-1][0])


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    return tapes_for_graphs(monkeypatch)


@EACH
def test_graphs_of_one_step_hold_the_x0_of_the_step_before(
    ddim: DDIM, taped: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "WHOLE", 3)
    act = ddim.capture(model, SHAPE)
    for seed in (1, 2):
        x = drawn(*SHAPE, seed=seed)
        expected = by_hand(ddim, x, counter_noise(ddim, SEEDS, SHAPE))
        assert torch.equal(act(x_T=x, seeds=SEEDS), expected[-1][0])
    assert taped


def test_order_1_is_what_it_was() -> None:
    ddim = DDIM(10, eta=0.5)
    assert ddim == DDIM(10, eta=0.5, order=1)
    assert ddim != DDIM(10, eta=0.5, order=2)
    assert ddim.table.shape == (10, 7)
    state = {name: value for name, value in ddim.__getstate__().items() if name != "order"}
    old = DDIM.__new__(DDIM)
    old.__setstate__(copy.deepcopy(state))  # a pickle of a version without orders
    assert old == ddim


def test_samplers_of_order_2_can_be_copied_and_described(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ddim = SAMPLERS["epsilon"]
    for other in (copy.deepcopy(ddim), pickle.loads(pickle.dumps(ddim))):
        assert other == ddim
        assert hash(other) == hash(ddim)
        assert torch.equal(other.sample(model, drawn(*SHAPE)), ddim.sample(model, drawn(*SHAPE)))
    assert "order=2" in repr(ddim)
    ddim.describe()
    head, names, first, second, *_ = capsys.readouterr().out.splitlines()
    assert "order 2" in head
    assert names.split() == ["row", "t", "s", "√ᾱ_t", "√ᾱ_s", "c1", "c2", "κ"]
    assert first.split()[-1] == "0.000000"
    assert float(second.split()[-1]) == pytest.approx(ddim.table[1, -1], abs=1e-6)


def test_inversion_is_refused_at_order_2() -> None:
    x, ddim = drawn(*SHAPE), SAMPLERS["epsilon"]
    refused(lambda: ddim.invert(model, x), ValueError, "order must be 1 to run backwards, got 2")
    refused(lambda: next(iter(ddim.iterate(model, x, reverse=True))), ValueError, "order must be 1")
