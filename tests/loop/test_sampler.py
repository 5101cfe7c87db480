"""DDIM: the loop against the paper's step, what it draws, what it leaves alone, what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import pickle
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastddim import DDIM, NoiseSchedule, Step, using
from fastddim.check import SamplingWarning
from fastddim.coefficients import PREDICTIONS, Prediction
from fastddim.loop.devices import place_of
from fastddim.loop.model import device_of
from fastddim.loop.options import checked_noise, checked_seeds
from fastddim.step import reference
from fastddim.step.buffers import FRESH
from fastddim.step.op import initial_noise
from tests.loops import column, counter_noise, drawn, last
from tests.refusals import refused

LINEAR = NoiseSchedule.linear()
ABAR = torch.from_numpy(LINEAR.alphas_cumprod.copy())
SHAPE = (3, 2, 5, 7)
SEEDS = [5, 2**32 + 5, 2**63 - 1]


def model(x: Tensor, t: Tensor) -> Tensor:
    """Elementwise, so that it rounds alike in any batch."""
    return 0.8 * x.clamp(-1.5, 1.5) + 1e-3 * column(t % 97, x)


def by_hand(
    ddim: DDIM,
    net: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    noise: Iterable[Tensor | None],
) -> Iterator[tuple[Tensor, Tensor]]:
    """The paper's loop in plain PyTorch, given each step's z."""
    table = torch.tensor(ddim.table)
    for row, ((t, _), z) in enumerate(zip(ddim.pairs, noise, strict=True)):
        output = net(x, torch.full((len(x),), t))
        x, x0 = reference.ddim_step(x, output, table[row], z, ddim.prediction, ddim.clip)
        yield x, x0


SAMPLERS = {
    "ddim": DDIM(50, schedule=LINEAR),
    "ddpm": DDIM(50, eta=1.0, schedule=LINEAR),
    "hat": DDIM(50, eta="hat", schedule=LINEAR, spacing="quad"),
    "clip": DDIM(50, eta=0.5, schedule=LINEAR, clip=1.0, spacing="trailing"),
    "v": DDIM(50, eta=0.3, schedule=LINEAR, prediction="v", spacing="linspace"),
    "sample": DDIM(50, eta=1.0, schedule=LINEAR, prediction="sample", clip=0.7),
    "final": DDIM(50, eta=1.0, schedule=LINEAR, spacing="leading", final_alpha_cumprod=0.9999),
    "list": DDIM(spacing=[3, 50, 51, 700], eta=1.0, schedule=LINEAR),
    "short": DDIM(spacing=[(900, 500), (500, 20)], eta=1.0, schedule=LINEAR),
}
EACH = pytest.mark.parametrize("ddim", SAMPLERS.values(), ids=SAMPLERS)


@EACH
def test_sample_is_the_papers_loop_with_seeds(ddim: DDIM) -> None:
    x_T = initial_noise(torch.tensor(SEEDS), SHAPE)
    expected = last(by_hand(ddim, model, x_T, counter_noise(ddim, SEEDS, SHAPE)))
    out = ddim.sample(model, shape=SHAPE, seeds=SEEDS)
    assert torch.equal(out, expected)
    assert out.isfinite().all()
    assert torch.equal(ddim.sample(model, x_T, seeds=torch.tensor(SEEDS)), expected)


@EACH
def test_sample_is_the_papers_loop_with_given_noise(ddim: DDIM) -> None:
    x_T, noise = drawn(*SHAPE), drawn(len(ddim.pairs), *SHAPE, seed=2)
    expected = last(by_hand(ddim, model, x_T, noise))
    assert torch.equal(ddim.sample(model, x_T, noise=noise), expected)
    assert torch.equal(ddim.sample(model, x_T, noise=list(noise)), expected)


@EACH
@pytest.mark.parametrize("given", [True, False])
def test_sample_is_the_papers_loop_with_a_generator(ddim: DDIM, given: bool) -> None:
    theirs = torch.Generator().manual_seed(3)
    x_T = drawn(*SHAPE) if given else torch.randn(SHAPE, generator=theirs)
    noise = [torch.randn(SHAPE, generator=theirs) if c1 else None for c1 in ddim.table[:, 5]]
    expected = last(by_hand(ddim, model, x_T, noise))
    ours = torch.Generator().manual_seed(3)
    start: dict[str, Any] = {"x_T": x_T} if given else {"shape": SHAPE}
    assert torch.equal(ddim.sample(model, **start, generator=ours), expected)
    assert torch.equal(ours.get_state(), theirs.get_state())


@EACH
def test_iterate_is_the_loop_one_step_at_a_time(ddim: DDIM) -> None:
    x_T, noise = drawn(*SHAPE), drawn(len(ddim.pairs), *SHAPE, seed=2)
    steps = list(ddim.iterate(model, x_T, noise=noise))
    assert [step.index for step in steps] == list(range(len(ddim.pairs)))
    assert tuple((step.t, step.s) for step in steps) == ddim.pairs
    for step, (x, x0) in zip(steps, by_hand(ddim, model, x_T, noise), strict=True):
        assert isinstance(step, Step)
        assert torch.equal(step.x, x)
        assert torch.equal(step.x0, x0)
    assert torch.equal(steps[-1].x, ddim.sample(model, x_T, noise=noise))


def test_v_and_x0_models_of_the_same_data_give_the_same_samples() -> None:
    def to_v(x: Tensor, t: Tensor) -> Tensor:
        a, b = column(ABAR[t].sqrt(), x), column((1 - ABAR[t]).sqrt(), x)
        eps = model(x, t)
        return a * eps - b * ((x - b * eps) / a)

    def to_x0(x: Tensor, t: Tensor) -> Tensor:
        a, b = column(ABAR[t].sqrt(), x), column((1 - ABAR[t]).sqrt(), x)
        return (x - b * model(x, t)) / a

    tau = list(range(0, 500, 25))
    common: dict[str, Any] = {"eta": 0.5, "schedule": LINEAR, "spacing": tau}
    outs = [
        DDIM(prediction=prediction, **common).sample(net, shape=SHAPE, seeds=SEEDS)
        for prediction, net in zip(PREDICTIONS, (model, to_v, to_x0), strict=True)
    ]
    # One model three times, up to twenty steps of float32 rounding.
    assert (outs[1] - outs[0]).abs().max() < 2e-4
    assert (outs[2] - outs[0]).abs().max() < 2e-4


def test_the_model_gets_int64_t_and_cond_and_no_gradients() -> None:
    calls: list[tuple[Any, ...]] = []

    def recorded(x: Tensor, t: Tensor, *, c: Tensor, scale: float) -> Tensor:
        calls.append((t.dtype, t.tolist(), c, scale, torch.is_grad_enabled()))
        return scale * x + c

    c = torch.ones(1, requires_grad=True)
    ddim = DDIM(spacing=[0, 7, 999], schedule=LINEAR)
    out = ddim.sample(recorded, shape=(2, 3), seeds=[1, 2], cond={"c": c, "scale": 0.5})
    assert [call[1] for call in calls] == [[999, 999], [7, 7], [0, 0]]
    assert all(call[0] == torch.int64 and call[2] is c and call[3] == 0.5 for call in calls)
    assert not any(call[4] for call in calls)
    assert not out.requires_grad
    assert torch.is_grad_enabled()
    weight = torch.ones(1, requires_grad=True)
    for step in ddim.iterate(lambda x, t: weight * x, shape=(2, 3)):
        assert torch.is_grad_enabled()  # the caller's own mode, between steps
        assert not step.x.requires_grad
        assert not step.x0.requires_grad


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_samples_noise_is_its_own_in_any_batch(eta: float) -> None:
    ddim = DDIM(10, eta=eta)
    together = ddim.sample(model, shape=(5, 3, 33), seeds=[9, 8, 7, 6, 2**40])
    apart = [ddim.sample(model, shape=(1, 3, 33), seeds=[k]) for k in (9, 8, 7, 6, 2**40)]
    assert torch.equal(together, torch.cat(apart))
    assert torch.equal(together[[4, 0]], ddim.sample(model, shape=(2, 3, 33), seeds=[2**40, 9]))


@pytest.mark.parametrize("seeds", [[1, 2**32 + 1, 2**62], [0, 1, 2**63 - 1]])
def test_seeds_differ_in_every_bit(seeds: list[int]) -> None:
    out = DDIM(5, eta=1.0).sample(model, shape=(3, 64), seeds=seeds)
    assert len({tuple(row) for row in out.tolist()}) == 3


@pytest.mark.parametrize(
    "seeds",
    [
        range(3),
        (0, 1, 2),
        np.arange(3),
        torch.arange(3),
        torch.arange(3, dtype=torch.int32),
        [np.int64(0), torch.tensor(1), 2],
    ],
)
def test_seeds_may_be_any_sequence_of_integers(seeds: Any) -> None:
    ddim = DDIM(3, eta=1.0)
    expected = ddim.sample(model, shape=(3, 4), seeds=[0, 1, 2])
    assert torch.equal(ddim.sample(model, shape=(3, 4), seeds=seeds), expected)


def test_manual_seed_governs_noise_without_another_source() -> None:
    ddim = DDIM(5, eta=1.0)
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(ddim.sample(model, shape=(2, 8)))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0][0], outs[0][1])
    again = ddim.sample(model, shape=(2, 8))
    assert not torch.equal(again, outs[2])


def test_given_seeds_leave_torchs_own_stream_alone() -> None:
    state = torch.get_rng_state()
    DDIM(5, eta=1.0).sample(model, shape=(2, 8), seeds=[1, 2])
    DDIM(5, eta=1.0).sample(model, shape=(2, 8), generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(2, 9), (2, 3, 5), (2, 3, 5, 7), (2, 1, 3, 2, 5), (1, 40_001)])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_any_rank_from_two_and_any_size_will_do(shape: tuple[int, ...], eta: float) -> None:
    ddim, seeds = DDIM(4, eta=eta), list(range(shape[0]))
    x_T = initial_noise(torch.tensor(seeds), shape)
    expected = last(by_hand(ddim, model, x_T, counter_noise(ddim, seeds, shape)))
    assert torch.equal(ddim.sample(model, shape=shape, seeds=seeds), expected)


def test_an_empty_batch_is_empty() -> None:
    assert DDIM(3, eta=1.0).sample(model, shape=(0, 3, 4), seeds=[]).shape == (0, 3, 4)
    assert DDIM(3).sample(model, torch.empty(0, 3)).shape == (0, 3)
    assert len(list(DDIM(3).iterate(model, shape=(0, 3, 4)))) == 3


@pytest.mark.parametrize(
    "x_T",
    [
        drawn(3, 4, 5, 6).contiguous(memory_format=torch.channels_last),
        drawn(4, 5, 6, 9)[1:3, 1:4, ::2, 2:],
        drawn(1, 3, 4).expand(3, -1, -1),
        drawn(2, 5, 3).transpose(1, 2),
    ],
    ids=["channels_last", "slice", "expanded", "transposed"],
)
def test_noise_belongs_to_the_logical_element_in_any_layout(x_T: Tensor) -> None:
    ddim, seeds = DDIM(20, eta=1.0), list(range(len(x_T)))
    expected = last(by_hand(ddim, model, x_T, counter_noise(ddim, seeds, tuple(x_T.shape))))
    assert torch.equal(ddim.sample(model, x_T, seeds=seeds), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_reaches_the_model_and_not_the_state(
    dtype: torch.dtype,
) -> None:
    ddim, x_T = DDIM(50), drawn(*SHAPE)
    seen: set[torch.dtype] = set()

    def half(x: Tensor, t: Tensor) -> Tensor:
        seen.add(x.dtype)
        return model(x, t)

    expected = last(
        by_hand(ddim, lambda x, t: model(x.to(dtype), t).float(), x_T, [None] * len(ddim.pairs))
    )
    out = ddim.sample(half, x_T, dtype=dtype)
    assert seen == {dtype}
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)
    # x_T in half precision: its dtype is the model's and the output's.
    rounded = x_T.to(dtype)
    states = by_hand(ddim, lambda x, t: model(x.to(dtype), t).float(), rounded.float(), [None] * 50)
    out = ddim.sample(half, rounded)
    assert seen == {dtype}
    assert out.dtype == dtype
    assert torch.equal(out, last(states).to(dtype))
    for step in ddim.iterate(half, rounded):
        assert step.x.dtype == step.x0.dtype == dtype
    seen.clear()
    ddim.sample(half, rounded, dtype=torch.float32)
    assert seen == {torch.float32}


def test_a_float64_default_dtype_changes_nothing() -> None:
    ddim = DDIM(10, eta=1.0)
    channels_last = drawn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)

    def samples() -> list[Tensor]:
        return [
            ddim.sample(model, shape=SHAPE, seeds=SEEDS),
            ddim.sample(model, shape=SHAPE, generator=torch.Generator().manual_seed(1)),
            ddim.sample(model, channels_last, seeds=[1, 2]),
        ]

    expected = samples()
    torch.set_default_dtype(torch.float64)
    try:
        got = samples()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda eps: (eps,),
        lambda eps: (eps, "more"),
        lambda eps: SimpleNamespace(sample=eps),
        lambda eps: eps.double().float().contiguous().clone(),
        lambda eps: torch.stack([eps, eps], -1)[..., 0],
        lambda eps: torch.cat([eps, torch.full_like(eps, torch.nan)], dim=1),  # learned variance
    ],
)
def test_models_may_return_tuples_objects_and_any_layout(wrap: Callable[[Tensor], Any]) -> None:
    ddim = DDIM(5, eta=1.0)
    expected = ddim.sample(model, shape=SHAPE, seeds=SEEDS)
    out = ddim.sample(lambda x, t: wrap(model(x, t)), shape=SHAPE, seeds=SEEDS)
    assert torch.equal(out, expected)


class Graph:
    """A graph in which autograd, and nobody else, holds x: d(w·x)/dw is x still."""

    def __init__(self, x: Tensor) -> None:
        self.w = torch.ones_like(x, requires_grad=True)
        with torch.enable_grad():
            self.y = self.w * x

    def tobytes(self) -> bytes:
        (x,) = torch.autograd.grad(self.y.sum(), self.w, retain_graph=True)
        return x.numpy().tobytes()


KEEPS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "view": lambda x: x[0],
    "reshaped": lambda x: x.view(-1),
    "detached": lambda x: x.detach(),
    "data": lambda x: x.data,
    "array": lambda x: x.numpy(),
    "array view": lambda x: x.numpy()[:1],
    "memoryview": lambda x: memoryview(x.numpy().data),
    "storage": lambda x: x.untyped_storage(),
    "dlpack": lambda x: np.from_dlpack(x),
    "module buffer": lambda x: torch.nn.Buffer(x),
    "graph": Graph,
}


def bytes_of(kept: Any) -> bytes:
    if isinstance(kept, Tensor):
        return kept.detach().contiguous().numpy().tobytes()
    if isinstance(kept, torch.UntypedStorage):
        return bytes(kept.tolist())
    with torch.enable_grad():
        return bytes(kept.tobytes())


@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("iterated", [False, True])
def test_arguments_and_outputs_that_a_model_keeps_never_change(
    keep: Callable[[Tensor], Any], eta: float, iterated: bool
) -> None:
    kept: list[tuple[Any, bytes]] = []

    def keeping(x: Tensor, t: Tensor) -> Tensor:
        eps = model(x, t)
        for tensor in (x, eps):
            held = keep(tensor)
            kept.append((held, bytes_of(held)))
        return eps

    ddim, x_T = DDIM(12, eta=eta), drawn(2, 3, 4)
    before = x_T.clone()
    if iterated:
        for _ in ddim.iterate(keeping, x_T, seeds=[1, 2]):
            pass
    else:
        ddim.sample(keeping, x_T, seeds=[1, 2])
    assert torch.equal(x_T, before)
    assert len(kept) == 24
    assert all(bytes_of(held) == was for held, was in kept)


@pytest.mark.parametrize("keep", [lambda x: x, lambda x: x.numpy(), lambda x: x[:1]])
def test_steps_of_iterate_that_are_kept_never_change(keep: Callable[[Tensor], Any]) -> None:
    kept: list[tuple[Any, bytes]] = []
    for step in DDIM(12, eta=1.0).iterate(model, shape=(2, 3, 4)):
        for tensor in (step.x, step.x0):
            held = keep(tensor)
            kept.append((held, bytes_of(held)))
        del step, tensor
    assert all(bytes_of(held) == was for held, was in kept)


def test_a_list_of_steps_holds_separate_tensors() -> None:
    steps = list(DDIM(12).iterate(model, shape=(2, 3, 4)))
    assert len({tensor.data_ptr() for step in steps for tensor in (step.x, step.x0)}) == 24


@pytest.mark.parametrize("run", ["sample", "iterate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_x_T_and_the_array_it_was_made_from_are_never_written(run: str, dtype: torch.dtype) -> None:
    array = np.ones((2, 3, 4), dtype=np.float32)
    ddim = DDIM(5)
    if run == "sample":
        ddim.sample(model, torch.from_numpy(array))
    else:
        for _ in ddim.iterate(model, torch.from_numpy(array)):
            pass
    assert (array == 1).all()
    x_T = drawn(2, 3, 4).to(dtype)
    before = x_T.clone()
    list(getattr(ddim, run)(model, x_T))
    assert torch.equal(x_T, before)


def test_given_noise_and_identity_outputs_are_never_written() -> None:
    noise = drawn(12, 2, 3, 4)
    before = noise.clone()
    ddim = DDIM(12, eta=1.0)
    x_T = drawn(2, 3, 4, seed=3)
    out = ddim.sample(lambda x, t: x, x_T, noise=noise)
    assert torch.equal(noise, before)
    assert torch.equal(out, last(by_hand(ddim, lambda x, t: x, x_T, noise)))


@pytest.mark.parametrize("run", ["sample", "iterate"])
def test_states_that_nobody_keeps_take_turns_in_two_buffers(run: str) -> None:
    pointers: list[int] = []
    held: list[Tensor] = []  # what the model allocates must not take a freed state's place

    def watching(x: Tensor, t: Tensor) -> Tensor:
        pointers.append(x.data_ptr())
        held.append(model(x, t))
        return held[-1]

    x_T = drawn(2, FRESH // 2)  # smaller states take fresh memory
    for _ in getattr(DDIM(20), run)(watching, x_T):
        pass
    assert pointers[0] == x_T.data_ptr()
    assert len(set(pointers[1:])) == 2
    assert pointers[1:3] * 9 == pointers[1:19]


def test_progress_may_wrap_the_steps() -> None:
    seen: list[int] = []

    def wrapper(steps: Iterable[Any]) -> Iterator[Any]:
        seen.append(len(list(steps)))
        yield from steps

    expected = DDIM(7).sample(model, shape=(1, 4), seeds=[1])
    assert torch.equal(DDIM(7).sample(model, shape=(1, 4), seeds=[1], progress=wrapper), expected)
    assert seen == [7]


def test_progress_true_shows_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    expected = DDIM(7).sample(model, shape=(1, 4), seeds=[1])
    assert capsys.readouterr().out == ""
    out = DDIM(7).sample(model, shape=(1, 4), seeds=[1], progress=True)
    assert torch.equal(out, expected)
    assert "sampling" in capsys.readouterr().out


def test_describe_prints_pairs_and_model_calls(capsys: pytest.CaptureFixture[str]) -> None:
    with using("torch"):
        DDIM(steps=3).describe()
    assert capsys.readouterr().out == (
        "DDIM: NoiseSchedule(linear(0.0001, 0.02), T=1000), epsilon model, eta = 0, "
        "uniform spacing, 3 model calls, steps on cpu by torch\n"
        "  row     t     s       √ᾱ_t       √ᾱ_s         c1         c2\n"
        "    0   666   333   0.104806   0.564469   0.000000   0.825455\n"
        "    1   333     0   0.564469   0.999950   0.000000   0.010000\n"
        "    2     0    -1   0.999950   1.000000   0.000000   0.000000\n"
    )
    DDIM(steps=300, spacing="uniform-ermongroup", eta="hat").describe()
    assert "eta = hat, uniform-ermongroup spacing, 334 model calls" in capsys.readouterr().out
    DDIM(spacing=[0, 5], prediction="v").describe()
    assert "v model, eta = 0, given spacing, 2 model calls" in capsys.readouterr().out


def test_the_defaults_are_the_papers() -> None:
    ddim = DDIM()
    assert (ddim.steps, ddim.eta, ddim.spacing, ddim.prediction) == (50, 0.0, "uniform", "epsilon")
    assert ddim.clip is None
    assert ddim.final_alpha_cumprod == 1.0
    assert ddim.schedule.alphas_cumprod.tolist() == LINEAR.alphas_cumprod.tolist()
    assert ddim.pairs[:2] == ((980, 960), (960, 940))


def test_a_sampler_is_frozen_and_its_table_read_only() -> None:
    ddim = DDIM(5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ddim.steps = 6  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        ddim.table[0, 0] = 0


def test_replace_makes_a_sampler_equal_by_its_arguments() -> None:
    one = DDIM(5, schedule=LINEAR)
    other = dataclasses.replace(one, steps=10, eta=1)
    assert (other.steps, other.eta, len(other.pairs), other.table[0, 5] > 0) == (10, 1.0, 10, True)
    assert other == DDIM(10, eta=1.0, schedule=LINEAR)
    assert hash(other) == hash(DDIM(10, eta=1.0, schedule=LINEAR))
    assert one != other
    assert DDIM(7) == DDIM(7)
    assert dataclasses.replace(other, steps=5, eta=0.0) == one
    listed = DDIM(spacing=[0, 5], schedule=LINEAR)
    assert dataclasses.replace(listed, eta=1.0).pairs == listed.pairs
    with pytest.raises(ValueError, match="pairs"):
        dataclasses.replace(one, pairs=((5, -1),))


@pytest.mark.parametrize("copied", [lambda d: pickle.loads(pickle.dumps(d)), copy.deepcopy])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"steps": np.int64(7), "eta": "hat", "clip": np.float32(1.5), "spacing": "quad"},
        {"steps": torch.tensor(7), "clip": torch.tensor(0.5), "temperature": np.float64(0.5)},
        {"spacing": [0, 10, 700], "schedule": NoiseSchedule.cosine(), "prediction": "x0"},
    ],
)
def test_samplers_are_equal_by_value_after_pickle_and_deepcopy(
    copied: Callable[[DDIM], DDIM], arguments: dict[str, Any]
) -> None:
    ddim = DDIM(**arguments)
    other, again = copied(ddim), DDIM(**arguments)
    assert ddim == other == again
    assert hash(ddim) == hash(other) == hash(again)
    assert repr(ddim) == repr(other)
    assert len({ddim, other, again}) == 1
    assert other.table.tobytes() == ddim.table.tobytes()
    with pytest.raises(ValueError, match="read-only"):
        other.table[0, 0] = 0


def test_a_steps_repr_prints_shapes() -> None:
    *_, step = DDIM(3).iterate(model, torch.zeros(2, 3, 4, dtype=torch.bfloat16))
    assert repr(step) == "Step(index=2, t=0, s=-1, x=bfloat16 (2, 3, 4), x0=bfloat16 (2, 3, 4))"
    assert step == step  # the fields' tensors would raise
    assert step in [step]


SYNONYMS: dict[Any, Prediction] = {
    **dict.fromkeys(("epsilon", "eps", "noise", "pred_noise"), "epsilon"),
    **dict.fromkeys(("v", "v_prediction", "pred_v"), "v"),
    **dict.fromkeys(("sample", "x0", "x_0", "x_start", "pred_x0"), "sample"),
}


@pytest.mark.parametrize("name", SYNONYMS)
def test_predictions_go_by_the_names_of_other_systems_too(name: Any) -> None:
    ddim = DDIM(prediction=name)
    assert ddim.prediction == SYNONYMS[name]
    assert ddim == DDIM(prediction=SYNONYMS[name])


@pytest.mark.parametrize("name", ["flow", "flow_prediction", "rectified_flow", "velocity"])
def test_a_flows_velocity_is_refused_with_the_reason(name: Any) -> None:
    refused(lambda: DDIM(prediction=name), ValueError, "prediction", name, "epsilon, v, sample")


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "steps", {"steps": 1.5}),
        (TypeError, "steps", {"steps": True}),
        (ValueError, "steps", {"steps": 0}),
        (ValueError, "steps", {"steps": 1001}),
        (TypeError, "schedule", {"schedule": [0.9, 0.5]}),
        (TypeError, "schedule", {"schedule": "linear"}),
        (ValueError, "prediction", {"prediction": "score"}),
        (ValueError, "prediction", {"prediction": None}),
        (TypeError, "clip", {"clip": "1"}),
        (TypeError, "clip", {"clip": True}),
        (ValueError, "clip", {"clip": 0}),
        (ValueError, "clip", {"clip": -1.0}),
        (ValueError, "clip", {"clip": math.nan}),
        (ValueError, "clip", {"clip": math.inf}),
        (TypeError, "final_alpha_cumprod", {"final_alpha_cumprod": None}),
        (ValueError, "final_alpha_cumprod", {"final_alpha_cumprod": 1.1}),
        (ValueError, "final_alpha_cumprod", {"final_alpha_cumprod": 0.5}),
        (ValueError, "final_alpha_cumprod", {"final_alpha_cumprod": math.nan}),
        (ValueError, "spacing", {"spacing": "karras"}),
        (TypeError, "spacing", {"spacing": None}),
        (ValueError, "eta", {"eta": -1}),
    ],
)
def test_bad_fields_are_refused_at_construction(
    error: type[Exception], name: str, arguments: dict[str, Any]
) -> None:
    refused(lambda: DDIM(**arguments), error, name)


X = torch.zeros(2, 3)
NOISE = [X] * 50


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "model", {"model": None, "x_T": X}),
        (ValueError, "give x_T or shape", {}),
        (ValueError, "give x_T or shape", {"x_T": X, "shape": (2, 3)}),
        (TypeError, "x_T", {"x_T": [[0.0]]}),
        (TypeError, "x_T", {"x_T": X.double()}),
        (TypeError, "x_T", {"x_T": X.long()}),
        (ValueError, "x_T", {"x_T": X[0]}),
        (ValueError, "x_T", {"x_T": X.clone().requires_grad_()}),
        (TypeError, "shape", {"shape": 3}),
        (TypeError, "shape", {"shape": "23"}),
        (TypeError, "shape[1]", {"shape": (2, 3.0)}),
        (TypeError, "shape[0]", {"shape": (True, 3)}),
        (ValueError, "shape[0]", {"shape": (-1, 3)}),
        (ValueError, "shape[1]", {"shape": (2, 0)}),
        (ValueError, "shape", {"shape": (2,)}),
        (ValueError, "device", {"shape": (2, 3), "device": "nonsense"}),
        (ValueError, "device", {"x_T": X, "device": "nonsense"}),
        (ValueError, "device", {"x_T": X, "device": "meta"}),
        (ValueError, "device", {"shape": (2, 3), "device": 1.5}),
        (TypeError, "dtype", {"x_T": X, "dtype": torch.int64}),
        (TypeError, "dtype", {"x_T": X, "dtype": "bfloat16"}),
        (TypeError, "cond", {"x_T": X, "cond": [1]}),
        (TypeError, "cond", {"x_T": X, "cond": X}),
        (ValueError, "noise has one source", {"x_T": X, "seeds": [1, 2], "noise": NOISE}),
        (
            ValueError,
            "noise has one source",
            {"x_T": X, "seeds": [1, 2], "generator": torch.Generator()},
        ),
        (TypeError, "seeds", {"x_T": X, "seeds": 1}),
        (TypeError, "seeds", {"x_T": X, "seeds": "12"}),
        (TypeError, "seeds", {"x_T": X, "seeds": {1, 2}}),
        (TypeError, "seeds", {"x_T": X, "seeds": torch.tensor(1)}),
        (ValueError, "seeds", {"x_T": X, "seeds": [1]}),
        (ValueError, "seeds", {"x_T": X, "seeds": range(3)}),
        (TypeError, "seeds[0]", {"x_T": X, "seeds": [1.0, 2.0]}),
        (TypeError, "seeds[1]", {"x_T": X, "seeds": [1, True]}),
        (TypeError, "seeds[0]", {"x_T": X, "seeds": torch.ones(2)}),
        (TypeError, "seeds[0]", {"x_T": X, "seeds": torch.ones(2, 9, 9)}),
        (ValueError, "seeds[0]", {"x_T": X, "seeds": [-1, 2]}),
        (ValueError, "seeds[1]", {"x_T": X, "seeds": [1, 2**63]}),
        (TypeError, "generator", {"x_T": X, "generator": 1}),
        (TypeError, "generator", {"x_T": X, "generator": [torch.Generator()] * 2}),
        (ValueError, "x_T", {"shape": (2, 3), "noise": NOISE}),
        (ValueError, "noise", {"x_T": X, "noise": NOISE[:-1]}),
        (ValueError, "noise", {"x_T": X, "noise": 1}),
        (ValueError, "noise[3]", {"x_T": X, "noise": [X, X, X, X[:1], *NOISE[4:]]}),
        (ValueError, "noise[0]", {"x_T": X, "noise": [X.double()] * 50}),
        (ValueError, "noise[0]", {"x_T": X, "noise": [None] * 50}),
    ],
)
@pytest.mark.parametrize("run", ["sample", "iterate"])
def test_bad_arguments_are_refused_before_any_work(
    run: str, error: type[Exception], name: str, arguments: dict[str, Any]
) -> None:
    calls: list[int] = []

    def counting(x: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        return x

    # iterate refuses when called, not when the first step is asked for.
    refused(lambda: getattr(DDIM(50), run)(**{"model": counting} | arguments), error, name)
    assert not calls


@pytest.mark.parametrize(
    ("error", "said", "output"),
    [
        (TypeError, ("model", "NoneType"), lambda x: None),
        (TypeError, ("model", "ndarray"), lambda x: x.numpy()),
        (TypeError, ("model", "tuple"), lambda x: ()),
        (TypeError, ("model", "str"), lambda x: ("eps",)),
        (TypeError, ("model", "list"), lambda x: [x]),
        (TypeError, ("model", "NoneType"), lambda x: SimpleNamespace(sample=None)),
        (ValueError, ("model", "(2, 3)", "(2, 6)"), lambda x: torch.cat([x, x], 1)),
        (ValueError, ("model", "(2, 3)", "(1, 3)"), lambda x: x[:1]),
        (ValueError, ("model", "(2, 3)", "()"), lambda x: x.sum()),
        (TypeError, ("model", "int64"), lambda x: x.long()),
        (TypeError, ("model", "float64"), lambda x: x.double()),
    ],
)
def test_bad_outputs_of_a_model_are_refused(
    error: type[Exception], said: tuple[str, ...], output: Callable[[Tensor], Any]
) -> None:
    refused(lambda: DDIM(5).sample(lambda x, t: output(x), X), error, *said)


@pytest.mark.parametrize(
    "seeds",
    [
        list(range(5, 8)),
        (5, 6, 7),
        range(5, 8),
        np.arange(5, 8),
        np.arange(5, 8, dtype=np.int32),
        torch.arange(5, 8),
        [np.int64(5), 6, torch.tensor(7)],
    ],
)
def test_seeds_of_any_kind_are_these_numbers_and_a_copy(seeds: Any) -> None:
    found = checked_seeds(seeds, 3)
    assert (found.dtype, found.tolist()) == (torch.int64, [5, 6, 7])
    found.zero_()
    assert int(seeds[0]) == 5


def test_many_seeds_are_not_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastddim.loop.options.whole", unused)
    for seeds in (range(3), [0, 1, 2], torch.arange(3), None):
        assert len(_noise_of(seeds)) == 3


def _noise_of(seeds: Any) -> Tensor:
    found = checked_noise((3, 2), torch.device("cpu"), 1, seeds, None, None).seeds
    assert found is not None
    return found


def unused(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing may be called")


# --- What the model is, found out from the model ------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self, *layers: torch.nn.Module) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 3), *layers)

    def forward(self, x: Tensor, t: Tensor, scale: float = 1.0) -> Tensor:
        out: Tensor = scale * self.layers(x)
        return out


CALLED: list[Callable[[Net], Any]] = [
    lambda net: net,
    lambda net: net.forward,
    lambda net: functools.partial(net, scale=2.0),
    lambda net: functools.partial(functools.partial(net.forward), scale=2.0),
]


@pytest.mark.parametrize("called", CALLED)
@pytest.mark.parametrize("buffers", [False, True])
def test_noise_is_made_where_the_models_parameters_are(
    called: Callable[[Net], Any], buffers: bool
) -> None:
    net: Any = Net().eval()
    if buffers:
        net = torch.nn.Module()
        net.register_buffer("here", torch.zeros(1))
        net.forward = lambda x, t: net.here * x
    with torch.device("meta"):  # the default device, where no noise is drawn
        out = DDIM(3).sample(net if buffers else called(net), shape=(2, 3), seeds=[0, 1])
        nowhere = DDIM(3).sample(model, shape=(2, 3), seeds=[0, 1])
    assert out.device.type == "cpu"
    assert nowhere.device.type == "meta"


def test_a_given_device_outweighs_the_models() -> None:
    net = Net().to("meta")
    assert device_of(net) == torch.device("meta")
    assert place_of("cpu", net) == torch.device("cpu")
    assert place_of(None, net) == torch.device("meta")
    assert place_of(None, lambda x, t: net(x, t)) == torch.device("cpu")


@pytest.mark.gpu
def test_on_a_gpu_a_network_that_is_there_gets_noise_there() -> None:
    net = Net().eval().cuda()
    out = DDIM(3).sample(net, shape=(2, 3), seeds=[0, 1])
    assert out.is_cuda
    assert torch.equal(out, DDIM(3).sample(net, shape=(2, 3), seeds=[0, 1], device="cuda"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "layer", [torch.nn.Linear(3, 3), torch.nn.Conv1d(3, 3, 1), torch.nn.LayerNorm(3)]
)
def test_the_refusal_of_another_dtype_names_both(
    dtype: torch.dtype, layer: torch.nn.Module
) -> None:
    net = Net().to(dtype)
    net.layers = torch.nn.Sequential(layer.to(dtype))
    call = functools.partial(DDIM(3).sample, net, shape=(2, 3, 3), seeds=[0, 1])
    said = (f"got {torch.float32}", f"dtype={dtype}", "autocast")
    refused(call, ValueError, "dtype", *said)
    assert call(dtype=dtype).isfinite().all()


def test_a_network_that_casts_its_own_input_is_no_fault() -> None:
    net = Net().to(torch.bfloat16).eval()
    out = DDIM(3).sample(lambda x, t: net(x.bfloat16(), t), shape=(2, 3), seeds=[0, 1])
    net.register_forward_pre_hook(lambda m, a: (a[0].bfloat16(), a[1]))
    assert torch.equal(out, DDIM(3).sample(net, shape=(2, 3), seeds=[0, 1]))


def test_errors_of_the_model_itself_pass_unchanged() -> None:
    class Failing(Net):
        def forward(self, x: Tensor, t: Tensor, scale: float = 1.0) -> Tensor:
            raise RuntimeError("of another type")

    with pytest.raises(RuntimeError, match="of another type"):
        DDIM(3).sample(Failing(), torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        DDIM(3).sample(Net(), torch.zeros(2, 4))


def test_a_float64_models_output_is_rounded_once() -> None:
    seen: list[torch.dtype] = []

    def exact(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.dtype)
        return 0.3 * torch.sin(x)

    x = drawn(*SHAPE)
    out = DDIM(5).sample(exact, x, dtype=torch.float64)
    assert seen == [torch.float64] * 5
    assert torch.equal(out, DDIM(5).sample(lambda x, t: exact(x.double(), t).float(), x))


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (torch.nn.Dropout(0.1), "Dropout"),
        (torch.nn.BatchNorm1d(3), "BatchNorm1d"),
        (torch.nn.TransformerEncoderLayer(3, 1, 4, 0.2), "dropout of 0.2"),
    ],
)
def test_a_network_in_training_mode_is_warned_of_once(layer: torch.nn.Module, named: str) -> None:
    net, ddim, x = Net(layer), DDIM(3), torch.zeros(2, 3)
    with pytest.warns(SamplingWarning) as caught:
        ddim.sample(net, x)
    [warning] = caught
    assert named in str(warning.message)
    assert "model.eval()" in str(warning.message)
    assert warning.filename == __file__
    ddim.sample(net, x)
    list(ddim.iterate(net.forward, x))


@pytest.mark.parametrize(
    "layer", [torch.nn.ReLU(), torch.nn.Dropout(0.0), torch.nn.GroupNorm(1, 3)]
)
def test_training_mode_that_changes_nothing_is_not_warned_of(layer: torch.nn.Module) -> None:
    DDIM(3).sample(Net(layer), torch.zeros(2, 3))
    DDIM(3).sample(Net(torch.nn.Dropout(0.5)).eval(), torch.zeros(2, 3))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), [2, 3], torch.Size([2, 3])])
@pytest.mark.parametrize("run", ["sample", "iterate"])
def test_the_refusal_of_a_shape_as_x_T_names_the_argument(run: str, shape: Any) -> None:
    call = lambda: getattr(DDIM(3), run)(model, shape)  # noqa: E731
    refused(call, TypeError, "x_T", f"shape={tuple(shape)}")


@pytest.mark.gpu
@pytest.mark.parametrize("eta", [0.0, 1.0, "hat"])
def test_on_a_gpu_the_samples_are_those_of_the_cpu(eta: Any) -> None:
    ddim = DDIM(50, eta=eta, clip=1.0)
    shape, seeds = (4, 3, 17, 9), [1, 2, 3, 2**40]
    on_cpu = ddim.sample(model, shape=shape, seeds=seeds)
    on_gpu = ddim.sample(model, shape=shape, seeds=seeds, device="cuda")
    assert on_gpu.is_cuda
    # The normals differ by 1e-3 at the worst and rarely so; the model here is a contraction.
    difference = (on_gpu.cpu() - on_cpu).abs()
    assert difference.max() < 1e-2
    assert difference.median() < 1e-5


@pytest.mark.gpu
def test_on_a_gpu_given_noise_is_the_papers_loop() -> None:
    ddim = DDIM(50, eta=1.0)
    x_T, noise = drawn(*SHAPE).cuda(), drawn(50, *SHAPE, seed=2).cuda()
    table = torch.tensor(ddim.table, device="cuda")
    x = x_T
    for row, (t, _) in enumerate(ddim.pairs):
        output = model(x, torch.full((len(x),), t, device="cuda"))
        x, _x0 = reference.ddim_step(x, output, table[row], noise[row])
    assert torch.equal(ddim.sample(model, x_T, noise=noise), x)
