"""DDIM: the loop against the paper's step, the noise it draws, the memory it never writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastddim import DDIM, Step
from fastddim.coefficients import VP_PREDICTIONS
from fastddim.step import reference
from fastddim.step.buffers import FRESH
from fastddim.step.op import initial_noise
from tests.loop.sampler_cases import LINEAR, SHAPE, model
from tests.loops import column, counter_noise, drawn, last

ABAR = torch.from_numpy(LINEAR.alphas_cumprod.copy())
SEEDS = [5, 2**32 + 5, 2**63 - 1]


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
        for prediction, net in zip(VP_PREDICTIONS, (model, to_v, to_x0), strict=True)
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
