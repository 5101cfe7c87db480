"""The authors' two loops, bit for bit, live and as they were recorded."""

from __future__ import annotations

import gc
import json
import re
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastddim import generalized_steps, make_pairs
from fastddim.dropins.ermongroup import ddpm_steps
from fastddim.step import reference
from fastddim.step.on_torch import BLOCK
from tests.refusals import refused
from tests.waiting import allow_waiting, forbid_waiting

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [
    case
    for case in json.loads((GOLDEN / "index.json").read_text())
    if case["system"].startswith("ermongroup")
]
BETAS = torch.linspace(1e-4, 0.02, 1000)
UNIFORM, TEN = range(0, 1000, 20), range(0, 1000, 100)
QUAD = [int(s) for s in np.linspace(0, np.sqrt(800), 50) ** 2]  # one step twice

Loop = Callable[..., tuple[list[Tensor], list[Tensor]]]
DDPM = None
"""Stands in the place of an η for ddpm_steps, which takes none."""


def model(x: Tensor, t: Tensor) -> Tensor:
    """Nonlinear, bounded, and rounding alike wherever it runs."""
    return 0.8 * x.clamp(-1.5, 1.5) + 1e-3 * (t % 97).to(x.dtype).view(-1, 1, 1, 1)


def drawing_model(x: Tensor, t: Tensor) -> Tensor:
    """A model that draws from the global stream too, as dropout would."""
    return model(x, t) + 0.01 * torch.randn_like(x)


def run(
    loop: Loop, x: Tensor, seq: Sequence[int], model: Any, b: Tensor, **kwargs: Any
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The loop's results, and the state it leaves the generator in."""
    torch.manual_seed(0)
    xs, x0_preds = loop(x, seq, model, b, **kwargs)
    return xs, x0_preds, torch.get_rng_state()


def of(eta: float | None, where: Any = None, **kwargs: Any) -> Loop:
    """The drop-in, or the original where ``reference`` is named."""
    if eta is DDPM:
        return partial(ddpm_steps if where is None else where.ddpm_steps, **kwargs)
    return partial(
        generalized_steps if where is None else where.generalized_steps, eta=eta, **kwargs
    )


def assert_identical(
    x: Tensor, seq: Sequence[int], model: Any, b: Tensor, eta: float | None
) -> None:
    ours = run(of(eta), x, seq, model, b)
    theirs = run(of(eta, reference), x, seq, model, b)
    for a, e in zip(ours[:2], theirs[:2], strict=True):
        assert len(a) == len(e)
        for mine, own in zip(a, e, strict=True):
            assert mine.dtype == own.dtype
            assert torch.equal(mine, own)
            assert mine.isfinite().all()
    assert torch.equal(ours[2], theirs[2])


def start(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("eta", [0.0, 0.2, 1.0, DDPM])
@pytest.mark.parametrize("seq", [UNIFORM, QUAD], ids=["uniform", "quad"])
@pytest.mark.parametrize("net", [model, drawing_model])
def test_fifty_steps_are_bit_identical_and_leave_the_same_stream(
    net: Any, seq: Sequence[int], eta: float | None
) -> None:
    assert_identical(start(3, 3, 8, 8), seq, net, BETAS, eta)


@pytest.mark.parametrize(
    "x",
    [
        start(1, 1, 1, 1),
        start(1, 3, 5, 7),
        start(2, 3, 17, 3),
        start(0, 3, 4, 4),
        start(3, 4, 6, 5).contiguous(memory_format=torch.channels_last),
        start(4, 5, 6, 9)[1:3, 1:4, ::2, 2:],
        start(2, 6, 5, 3).transpose(1, 3),
        start(1, 3, 4, 4).expand(3, -1, -1, -1),
        start(2, 6, 4, 4)[:, ::2].contiguous(memory_format=torch.channels_last),
    ],
    ids=[
        "one",
        "odd",
        "wide",
        "empty",
        "channels_last",
        "slice",
        "transposed",
        "expanded",
        "channels_last_slice",
    ],
)
@pytest.mark.parametrize("eta", [0.0, 1.0, DDPM])
def test_odd_sizes_and_layouts_are_bit_identical(x: Tensor, eta: float | None) -> None:
    assert_identical(x, TEN, model, BETAS, eta)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 2 * BLOCK, 2 * BLOCK + 1, 3 * BLOCK + 15, 250_003])
def test_unused_noise_moves_the_stream_as_drawn_noise_does(n: int) -> None:
    assert_identical(torch.linspace(-2, 2, n).view(1, 1, 1, n), [0, 500], drawing_model, BETAS, 0.0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 3, 105, 104), (1, 1, 181, 181), (33, 1, 32, 31)])
def test_samples_larger_than_a_block_are_bit_identical(
    shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    x = start(*shape).contiguous(memory_format=layout)
    assert x.numel() > 32_000
    for eta in (0.5, DDPM):
        assert_identical(x, TEN, model, BETAS, eta)


@pytest.mark.parametrize("eta", [0.0, 1.0, DDPM])
def test_the_full_trajectory_is_bit_identical(eta: float | None) -> None:
    assert_identical(start(2, 1, 3, 3), range(1000), model, BETAS, eta)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("S", [7, 30, 300])
@pytest.mark.parametrize("spacing", ["uniform-ermongroup", "quad-ermongroup"])
def test_the_spacings_of_make_pairs_are_bit_identical_as_seq(spacing: str, S: int) -> None:
    seq = [t for t, _ in reversed(make_pairs(spacing, S, 1000))]
    for eta in (0.3, DDPM):
        assert_identical(start(1, 1, 2, 3), seq, model, BETAS, eta)


@pytest.mark.parametrize("seq", [[500], [0], [3, 3], [0, 0, 7], [], np.array([0, 10, 500])])
def test_unusual_sequences_are_bit_identical(seq: Any) -> None:
    for eta in (1.0, DDPM):
        assert_identical(start(2, 1, 2, 3), seq, model, BETAS, eta)


def test_a_model_that_returns_another_layout_is_bit_identical() -> None:
    def sliced(x: Tensor, t: Tensor) -> Tensor:
        eps = model(x, t)
        return torch.stack([eps, eps], -1)[..., 0]

    for eta in (1.0, DDPM):
        assert_identical(start(2, 3, 5, 7), UNIFORM, sliced, BETAS, eta)
        assert_identical(start(2, 3, 5, 7), UNIFORM, lambda x, t: x, BETAS, eta)


@pytest.mark.parametrize(
    ("dtype", "beta_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
)
def test_other_dtypes_are_the_loop_itself(dtype: torch.dtype, beta_dtype: torch.dtype) -> None:
    x, b = start(2, 3, 4, 4).to(dtype), torch.linspace(1e-4, 0.02, 1000, dtype=beta_dtype)
    for eta in (0.2, DDPM):
        assert_identical(x, TEN, model, b, eta)
        last, x0, _ = run(of(eta, keep="last"), x, TEN, model, b)
        full, x0s, _ = run(of(eta, reference), x, TEN, model, b)
        assert len(last) == len(x0) == 1
        assert torch.equal(last[0], full[-1])
        assert torch.equal(x0[0], x0s[-1])


def test_a_float64_default_dtype_is_the_loop_itself() -> None:
    x = start(2, 3, 4, 4)
    torch.set_default_dtype(torch.float64)
    try:
        for eta in (0.2, DDPM):
            assert_identical(x, UNIFORM, model, BETAS, eta)
    finally:
        torch.set_default_dtype(torch.float32)


def as_recorded(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda a: (function(a.double()) * (1 - 2.0**-31)).to(a.dtype)


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
@pytest.mark.parametrize("where", [None, reference], ids=["ours", "theirs"])
def test_the_recorded_trajectories_are_met_bit_for_bit(
    where: Any, case: dict[str, Any], recorders_root: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("log", "exp"):  # these depend on the recording machine as its roots do
        monkeypatch.setattr(torch.Tensor, name, as_recorded(getattr(torch.Tensor, name)))
    golden = load_file(GOLDEN / f"{case['name']}.safetensors")
    spacing = f"{case['skip_type']}-ermongroup"
    seq = [t for t, _ in reversed(make_pairs(spacing, case["steps"], 1000))]
    seen: list[Tensor] = []

    def recorded(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return model(x, t)

    betas = torch.from_numpy(np.linspace(1e-4, 0.02, 1000)).float()
    torch.manual_seed(case["generator_seed"])
    loop = of(DDPM if case["function"] == "ddpm_steps" else case["eta"], where)
    xs, x0_preds = loop(golden["x_T"], seq, recorded, betas)
    assert torch.equal(torch.stack(xs[1:]), golden["xs"])
    assert torch.equal(torch.stack(x0_preds), golden["x0_preds"])
    assert torch.equal(torch.stack(seen), golden["t"])


@pytest.mark.parametrize("eta", [0.0, 1.0, DDPM])
def test_keep_last_is_the_end_of_all_and_leaves_the_same_stream(eta: float | None) -> None:
    x = start(2, 3, 8, 8)
    xs, x0_preds, state = run(of(eta), x, QUAD, drawing_model, BETAS)
    last, x0, last_state = run(of(eta, keep="last"), x, QUAD, drawing_model, BETAS)
    assert len(last) == len(x0) == 1
    assert torch.equal(last[0], xs[-1])
    assert torch.equal(x0[0], x0_preds[-1])
    assert torch.equal(state, last_state)


@pytest.mark.parametrize("eta", [1.0, DDPM])
def test_keep_last_keeps_nothing_else(eta: float | None) -> None:
    storages: list[Any] = []
    alive: list[int] = []

    def watching(x: Tensor, t: Tensor) -> Tensor:
        alive.append(len({s() for s in storages} - {None}))
        storages.append(weakref.ref(x))
        return model(x, t)

    x = start(2, 3, 8, 8)
    xs, x0_preds = of(eta, keep="last")(x, UNIFORM, watching, BETAS)
    assert max(alive) <= 3  # the caller's x, the state and the one that becomes the next
    del xs, x0_preds
    gc.collect()
    assert {s() for s in storages} == {x, None}


@pytest.mark.parametrize("eta", [0.0, DDPM])
def test_keep_last_takes_turns_in_two_buffers(eta: float | None) -> None:
    pointers: list[int] = []

    def watching(x: Tensor, t: Tensor) -> Tensor:
        pointers.append(x.data_ptr())
        return model(x, t)

    x = start(2, 3, 80, 80)  # fresh memory serves what is smaller
    of(eta, keep="last")(x, UNIFORM, watching, BETAS)
    assert pointers[0] == x.data_ptr()
    assert len(set(pointers[1:])) == 2
    assert x.data_ptr() not in pointers[1:]


@pytest.mark.parametrize("keep", ["all", "last"])
def test_the_model_gets_float32_t_of_shape_n(keep: Any) -> None:
    seen: list[Tensor] = []

    def recorded(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        assert not torch.is_grad_enabled()
        return model(x, t)

    generalized_steps(start(3, 1, 2, 2), [0, 7, 7, 999], recorded, BETAS, keep=keep)
    assert [t.tolist() for t in seen] == [[999.0] * 3, [7.0] * 3, [7.0] * 3, [0.0] * 3]
    assert {t.dtype for t in seen} == {torch.float32}


def test_states_start_with_x_itself_and_all_are_returned() -> None:
    x = start(2, 1, 2, 2)
    xs, x0_preds = generalized_steps(x, UNIFORM, model, BETAS)
    assert xs[0] is x
    assert len(xs) == 51
    assert len(x0_preds) == 50
    assert len({state.data_ptr() for state in xs + x0_preds}) == 101


@pytest.mark.parametrize("eta", [1.0, DDPM])
@pytest.mark.parametrize("keep", ["all", "last"])
def test_nothing_of_the_callers_is_written(keep: Any, eta: float | None) -> None:
    kept: list[tuple[Tensor, Tensor]] = []

    def keeping(x: Tensor, t: Tensor) -> Tensor:
        eps = model(x, t)
        kept.extend((tensor, tensor.clone()) for tensor in (x, t, eps))
        return eps

    x, b = start(2, 3, 8, 8), BETAS.clone()
    before = x.clone()
    of(eta, keep=keep)(x, UNIFORM, keeping, b)
    assert torch.equal(x, before)
    assert torch.equal(b, BETAS)
    assert all(torch.equal(tensor, copy) for tensor, copy in kept)


@pytest.mark.parametrize("keep", ["all", "last"])
def test_an_array_that_x_was_made_from_is_not_written(keep: Any) -> None:
    array = np.ones((2, 1, 3, 3), dtype=np.float32)
    generalized_steps(torch.from_numpy(array), UNIFORM, model, BETAS, keep=keep)
    assert (array == 1).all()


def test_betas_may_be_a_parameter() -> None:
    x, b = start(2, 1, 2, 2), torch.nn.Parameter(BETAS)
    xs, _ = generalized_steps(x, UNIFORM, model, b)
    assert torch.equal(xs[-1], generalized_steps(x, UNIFORM, model, BETAS)[0][-1])
    assert not xs[-1].requires_grad
    refused(lambda: generalized_steps(x, UNIFORM, model, b, eta=3.0), ValueError, "eta")


def test_ddpm_steps_reads_no_eta() -> None:
    x = start(2, 1, 2, 2)
    ours, theirs = (
        run(ddpm_steps, x, UNIFORM, model, BETAS, **given) for given in ({"eta": 0.5}, {})
    )
    assert torch.equal(ours[0][-1], theirs[0][-1])


SEQUENCES: list[Sequence[int]] = [
    range(1000),
    UNIFORM,
    range(0, 1000, 100),
    QUAD,
    [1, 2, 3],
    [0, 1],
]
SEQUENCES += [range(0, 1000, 1000 // S) for S in (2, 30, 300)]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("seq", SEQUENCES, ids=[f"{len(s)}" for s in SEQUENCES])
def test_the_largest_eta_named_works_and_no_larger_one(seq: Sequence[int]) -> None:
    x = start(1, 1, 2, 2)
    with pytest.raises(ValueError, match="eta must be at most") as caught:
        generalized_steps(x, seq, model, BETAS, eta=1e4)
    message = str(caught.value)
    assert "\n" not in message
    number = re.findall(r"at most ([\d.]+(?:e[+-]\d+)?)", message)[0]
    most = float(number)
    assert_identical(x, seq, model, BETAS, most)
    more = (round(most * 1e6) + 1) / 1e6
    refused(lambda: generalized_steps(x, seq, model, BETAS, eta=more), ValueError, "eta", number)
    xs, _ = reference.generalized_steps(x, seq, model, BETAS, eta=more)
    assert xs[-1].isnan().any()


X = start(1, 1, 2, 2)


@pytest.mark.parametrize(
    ("error", "name", "changed"),
    [
        (TypeError, "x", {"x": [1.0]}),
        (ValueError, "x", {"x": X[0]}),
        (ValueError, "x", {"x": X.long()}),
        (ValueError, "x", {"x": X.clone().requires_grad_()}),
        (TypeError, "b", {"b": [0.1, 0.2]}),
        (ValueError, "b", {"b": BETAS[None]}),
        (ValueError, "b", {"b": torch.arange(3)}),
        (ValueError, "b", {"b": torch.tensor([0.1, 1.0])}),
        (ValueError, "b", {"b": torch.tensor([0.0, 0.1])}),
        (ValueError, "b", {"b": torch.tensor([0.1, torch.nan])}),
        (ValueError, "b", {"b": BETAS.to("meta")}),
        (TypeError, "model", {"model": None}),
        (TypeError, "seq", {"seq": None}),
        (TypeError, "seq", {"seq": 50}),
        (TypeError, "seq", {"seq": torch.tensor(5)}),
        (TypeError, "seq", {"seq": "uniform"}),
        (TypeError, "seq[1]", {"seq": [0, 0.5]}),
        (TypeError, "seq[0]", {"seq": [True]}),
        (ValueError, "seq[1]", {"seq": [0, 1000]}),
        (ValueError, "seq[0]", {"seq": [-1, 5]}),
        (ValueError, "seq", {"seq": [5, 3]}),
        (ValueError, "keep", {"keep": "first"}),
        (ValueError, "keep", {"keep": None}),
        (ValueError, "keep", {"keep": BETAS.view(2, -1)}),
        (TypeError, "eta", {"eta": "hat"}),
        (TypeError, "eta", {"eta": None}),
        (ValueError, "eta", {"eta": -0.1}),
        (ValueError, "eta", {"eta": 10**30}),
        (ValueError, "eta", {"eta": float("nan")}),
        (TypeError, "output", {"model": lambda x, t: None}),
        (ValueError, "output", {"model": lambda x, t: x[:, :, :1]}),
    ],
)
def test_bad_arguments_are_refused(
    error: type[Exception], name: str, changed: dict[str, Any]
) -> None:
    arguments: dict[str, Any] = {"x": X, "seq": UNIFORM, "model": model, "b": BETAS} | changed
    refused(lambda: generalized_steps(**arguments), error, name)
    if name != "eta":
        refused(lambda: ddpm_steps(**arguments), error, name)


@pytest.mark.gpu
@pytest.mark.parametrize("eta", [0.0, 0.2, 1.0, DDPM])
@pytest.mark.parametrize("seq", [UNIFORM, QUAD], ids=["uniform", "quad"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_on_a_gpu_fifty_steps_are_bit_identical(
    layout: torch.memory_format, seq: Sequence[int], eta: float | None
) -> None:
    x = start(3, 3, 17, 9).cuda().contiguous(memory_format=layout)
    states = []
    for loop in (of(eta), of(eta, reference)):
        torch.manual_seed(0)
        xs, x0_preds = loop(x, seq, drawing_model, BETAS.cuda())
        states.append((xs + x0_preds, torch.cuda.get_rng_state()))
    (ours, our_state), (theirs, their_state) = states
    for mine, own in zip(ours, theirs, strict=True):
        assert torch.equal(mine.cpu(), own.cpu())
    assert torch.equal(our_state, their_state)


@pytest.mark.gpu
@pytest.mark.parametrize("eta", [0.0, 1.0, DDPM])
def test_on_a_gpu_no_step_waits_and_all_that_is_kept_arrives(eta: float | None) -> None:
    x, calls = start(3, 3, 17, 9).cuda(), 0

    def net(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        # The end of the loop waits for what is kept.
        allow_waiting() if calls == len(UNIFORM) else forbid_waiting()
        return model(x, t)

    torch.manual_seed(0)
    xs, x0_preds = of(eta)(x, UNIFORM, net, BETAS.cuda())
    torch.manual_seed(0)
    own_xs, own_x0_preds = of(eta, reference)(x, UNIFORM, model, BETAS.cuda())
    for mine, own in zip(xs[1:] + x0_preds, own_xs[1:] + own_x0_preds, strict=True):
        assert mine.device.type == "cpu"
        assert torch.equal(mine, own)
