"""Between two model calls: one operation, no host sync, and two buffers at most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastddim import DDIM, Step
from tests.loops import Dispatched, by_hand, conditioned, counter_noise, drawn, last
from tests.refusals import refused
from tests.waiting import allow_waiting, forbid_waiting, no_waiting

STEP = "fastddim.ddim_step.default"
DRAWS = ("aten.randn.generator", "aten.normal_.default")
SHAPE = (4, 3, 5, 7)
SEEDS = [1, 2, 3, 2**40]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Watch:
    """A model that notes what was dispatched between one of its calls and the next."""

    def __init__(self, net: Callable[..., Tensor]) -> None:
        self.net, self.mode = net, Dispatched()
        self.before: list[list[str]] = []

    def __call__(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        self.before.append(list(self.mode.names))
        output = self.net(x, t, **cond)
        self.mode.names.clear()
        return output

    @property
    def between(self) -> list[list[str]]:
        return self.before[1:]


def free(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * x


def guided(device: str, w: Any, **more: Any) -> dict[str, Any]:
    c, u = drawn(4, 3, 1, 1).to(device), drawn(4, 3, 1, 1, seed=2).to(device)
    return {"cond": {"c": c}, "uncond": {"c": u}, "guidance": w, **more}


def noise_from(source: str, device: str) -> dict[str, Any]:
    if source == "seeds":
        return {"seeds": SEEDS}
    if source == "noise":
        return {"noise": drawn(10, *SHAPE).to(device)}
    return {"generator": torch.Generator(device).manual_seed(1)}


def worked(names: list[str]) -> list[str]:
    """Without allocations: a GPU's, and a CPU's of few elements, cost no pass over memory."""
    return [name for name in names if not name.startswith("aten.empty")]


CALLS: dict[str, Callable[[str], dict[str, Any]]] = {
    "plain": lambda d: {},
    "bf16": lambda d: {"dtype": torch.bfloat16},
    "cond": lambda d: {"cond": {"c": drawn(4, 3, 1, 1).to(d)}},
    "guidance": lambda d: guided(d, 3.0),
    "guidance per sample": lambda d: guided(d, [1.0, 2.0, 3.0, 4.0]),
    "guidance per row": lambda d: guided(d, torch.arange(2.0, 12.0)[:, None], dtype=torch.float16),
    "guidance of some rows": lambda d: guided(d, lambda t: 3.0 if 300 < t < 700 else 1.0),
    "guidance of some rows, bf16": lambda d: guided(
        d, lambda t: 3.0 if t > 500 else 1.0, dtype=torch.bfloat16
    ),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("source", ["seeds", "noise", "generator"])
@pytest.mark.parametrize("learned", [False, True], ids=["", "learned variance"])
def test_one_operation_between_model_calls(
    device: str, how: str, eta: float, source: str, learned: bool
) -> None:
    options = CALLS[how](device)

    def net(x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        eps = conditioned(x, t, **cond) if cond else free(x, t)
        return torch.cat([eps, eps], 1) if learned else eps

    watch, x_T = Watch(net), drawn(*SHAPE).to(device)
    options |= noise_from(source, device)
    with watch.mode:
        DDIM(10, eta=eta).sample(watch, x_T, **options)
    assert len(watch.between) == 9
    for between in map(worked, watch.between):
        draws = [name for name in between if name in DRAWS]
        assert len(draws) == (source == "generator" and eta == 1.0)
        assert between == [*draws, STEP]


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("source", ["seeds", "generator"])
def test_a_large_loop_allocates_nothing_between_model_calls(source: str, eta: float) -> None:
    # Fresh memory costs a CPU more than the step that writes it.
    watch, x_T = Watch(free), drawn(4, 3, 64, 64)
    with watch.mode:
        DDIM(10, eta=eta).sample(watch, x_T, **noise_from(source, "cpu"))
    draws = ["aten.normal_.default"] * (source == "generator" and eta == 1.0)
    assert watch.between[1:] == [[*draws, STEP]] * 8


@pytest.mark.parametrize("device", DEVICES)
def test_one_operation_between_model_calls_of_invert(device: str) -> None:
    for refine in (0, 2):
        watch = Watch(free)
        with watch.mode:
            DDIM(10).invert(watch, drawn(*SHAPE).to(device), refine=refine)
        # What a refinement leaves behind is free again, but its memory is not kept for the next.
        assert [worked(between) for between in watch.between] == [[STEP]] * (10 * (1 + refine) - 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_one_operation_from_any_start_and_with_iterate(device: str, eta: float) -> None:
    ddim, x = DDIM(10, eta=eta), drawn(*SHAPE).to(device)
    watch = Watch(free)
    with watch.mode:
        ddim.sample(watch, x, start=3, seeds=SEEDS)
    assert [worked(between) for between in watch.between] == [[STEP]] * 6
    watch = Watch(free)
    with watch.mode:
        kept = list(ddim.iterate(watch, shape=SHAPE, seeds=SEEDS, device=device))
    # What iterate yields is a copy, which the caller may write to.
    assert len(kept) == 10
    for between in watch.between:
        assert worked(between) == [STEP, "aten.clone.default"]


@pytest.mark.gpu
@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("source", ["seeds", "noise", "generator"])
def test_on_a_gpu_the_loop_never_waits_for_the_device(how: str, eta: float, source: str) -> None:
    options = CALLS[how]("cuda")
    options |= noise_from(source, "cuda")
    ddim, x_T = DDIM(10, eta=eta), drawn(*SHAPE).cuda()

    def net(x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        forbid_waiting()
        return conditioned(x, t, **cond) if cond else free(x, t)

    ddim.sample(net, x_T, **options)


@pytest.mark.gpu
def test_on_a_gpu_options_beside_the_loop_never_wait() -> None:
    known, mask = drawn(*SHAPE).cuda(), torch.ones(1, 1, 1, 7, device="cuda")

    def net(x: Tensor, t: Tensor, **more: Tensor) -> Tensor:
        forbid_waiting()
        return 0.5 * x

    common: dict[str, Any] = {"shape": SHAPE, "seeds": SEEDS, "device": "cuda"}
    ddim = DDIM(10, eta=1.0)
    others: list[dict[str, Any]] = [
        {"known": known, "mask": mask},
        {"self_condition": "before"},
        {"cond_fn": lambda x, t, **cond: -x},
        {"callback": lambda step: step.x.clone()},
        {"trajectory": ("x", "x0")},
    ]
    for more in others:
        allow_waiting()
        ddim.sample(net, **common, **more)
    allow_waiting()
    DDIM(10).invert(net, known, refine=1)


@pytest.mark.gpu
def test_a_question_to_the_host_would_be_noticed() -> None:
    with no_waiting(), pytest.raises(RuntimeError):
        torch.ones(1, device="cuda").item()


STATE = 1 << 18
"""Elements of a state: so many that all other allocations are small beside it."""


def peak_states(call: Callable[[], Any]) -> float:
    """The most memory PyTorch had allocated at once during the call, in states."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    held = most = 0
    profiler: Any = found.profiler
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / (4 * STATE)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("steps", [5, 40])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("source", ["seeds", "generator"])
@pytest.mark.parametrize("given", [False, True], ids=["", "x_T"])
def test_on_a_cpu_loops_of_any_length_hold_three_states(
    steps: int, eta: float, source: str, given: bool
) -> None:
    ddim, x_T = DDIM(steps, eta=eta), drawn(2, STATE // 2)
    options: dict[str, Any] = {"x_T": x_T} if given else {"shape": tuple(x_T.shape)}

    def model(x: Tensor, t: Tensor) -> Tensor:  # its own: one state
        return 0.5 * x

    def call() -> None:
        given: dict[str, Any] = {"seeds": [1, 2]}
        if source == "generator":
            given = {"generator": torch.Generator().manual_seed(1)}
        ddim.sample(model, **options, **given)

    call()  # compiles, where numba is
    peak = peak_states(call)
    # Tables and timesteps: thousands of bytes. The scratch of the pass without numba: four blocks.
    assert 2 <= peak <= 1 + 3 + 0.6


@pytest.mark.parametrize("steps", [5, 60])
def test_on_a_cpu_bf16_and_guidance_add_only_the_models_input(steps: int) -> None:
    def model(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return 0.5 * x

    peaks = {}
    for copies, more in ((1, {}), (2, {"uncond": {"c": torch.ones(2, 1)}, "guidance": 2.0})):

        def call(more: Any = more) -> None:
            DDIM(steps).sample(
                model,
                shape=(2, STATE // 2),
                seeds=[1, 2],
                dtype=torch.bfloat16,
                cond={"c": torch.zeros(2, 1)},
                **more,
            )

        call()
        peaks[copies] = peak_states(call)
        # bf16: what the model returns and two inputs in turn, half a state for each copy.
        assert peaks[copies] <= 2 + 3 * copies / 2 + 0.6
    assert peaks[2] > peaks[1]


KEEPS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "half": lambda x: x[: len(x) // 2],
    "detached": lambda x: x.detach(),
    "bytes": lambda x: x.view(torch.uint8).numpy(),
    "storage": lambda x: x.untyped_storage(),
}


def bytes_of(kept: Any) -> bytes:
    if isinstance(kept, Tensor):
        return kept.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return bytes(kept.tolist()) if isinstance(kept, torch.UntypedStorage) else bytes(kept.tobytes())


@pytest.mark.one_in(2)
@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("w", [None, 2.0, "some rows"])
@pytest.mark.parametrize("self_condition", [None, "before"])
def test_inputs_that_a_model_keeps_never_change(
    keep: Callable[[Tensor], Any], dtype: torch.dtype, w: Any, self_condition: str | None
) -> None:
    kept: list[tuple[Any, bytes]] = []

    def keeping(x: Tensor, t: Tensor, c: Tensor, before: Tensor | None = None) -> Tensor:
        output = conditioned(x, t, c)
        for tensor in (x, output) if before is None else (x, output, before):
            held = keep(tensor)
            kept.append((held, bytes_of(held)))
        return output

    options: dict[str, Any] = {"cond": {"c": drawn(2, 3, 1)}}
    if w is not None:
        weights = w if w == 2.0 else (lambda t: 2.0 if t % 3 else 1.0)
        options |= {"uncond": {"c": drawn(2, 3, 1, seed=2)}, "guidance": weights}
    DDIM(12, eta=1.0).sample(
        keeping,
        shape=(2, 3, 4),
        seeds=[1, 2],
        dtype=dtype,
        self_condition=self_condition,
        **options,
    )
    assert len(kept) == 12 * (2 if self_condition is None else 3)
    assert all(bytes_of(held) == was for held, was in kept)


EDITS: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda x: x.fill_(7.0),
    "data": lambda x: x.data.mul_(-2.0),
    "bytes": lambda x: np.copyto(x.view(torch.uint8).numpy(), 0x40),
    "requires_grad": lambda x: x.requires_grad_(),
    "resized": lambda x: x.resize_(0),
}
HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "half": {"x_T": drawn(*SHAPE).to(torch.bfloat16)},
    "bf16": {"dtype": torch.bfloat16},
    "guidance": guided("cpu", 2.0),
    "guidance, bf16": guided("cpu", 2.0, dtype=torch.bfloat16),
    "guidance of some rows": guided("cpu", lambda t: 3.0 if 300 < t < 700 else 1.0),
    "self": {"self_condition": "before"},
    "self, bf16": {"self_condition": "before", "dtype": torch.bfloat16},
    "known": {"known": drawn(*SHAPE, seed=4), "mask": torch.ones(1, 1, 5, 1)},
}


def from_there(x: Tensor, t: Tensor, c: Any = 0.0, before: Tensor | None = None) -> Tensor:
    output: Tensor = free(x, t) + 0.1 * c
    return output if before is None else output + 0.1 * before


@pytest.mark.one_in(2)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("large", [False, True])
def test_writes_into_a_step_never_steer_the_loop(
    how: str, edit: str, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:  # enough for copies to be made in memory that an earlier one had
        monkeypatch.setattr("fastddim.loop.trajectory.FRESH", 0)
    ddim = DDIM(10, eta=1.0)
    given: dict[str, Any] = {"x_T": drawn(*SHAPE), "seeds": SEEDS, **HOW[how]}
    names = ("x", "x0")
    out, path = ddim.sample(from_there, trajectory=names, **given)

    def edited(step: Step) -> None:
        EDITS[edit](step.x)
        EDITS[edit](step.x0)

    again, kept = ddim.sample(from_there, trajectory=names, callback=edited, **given)
    assert torch.equal(again, out)
    for name in names:
        assert torch.equal(getattr(kept, name), getattr(path, name))
    seen: list[Step] = []
    for step in ddim.iterate(from_there, **given):
        x, x0 = step.x.clone(), step.x0.clone()
        edited(step)
        seen.append(replace(step, x=x, x0=x0))
    for name in names:
        states = torch.stack([getattr(step, name) for step in seen])
        assert torch.equal(states, getattr(path, name))


@pytest.mark.parametrize("edit", EDITS)
def test_writes_into_a_step_never_steer_invert(edit: str) -> None:
    ddim, x = DDIM(10), drawn(*SHAPE)
    last = x
    for step in ddim.iterate(free, x, reverse=True, refine=1):
        last = step.x.clone()
        EDITS[edit](step.x)
        EDITS[edit](step.x0)
    assert torch.equal(last, ddim.invert(free, x, refine=1))


@pytest.mark.parametrize("how", ["plain", "half", "bf16", "guidance"])
@pytest.mark.parametrize("writer", ["model", "cond_fn"])
def test_functions_that_write_into_x_are_refused_in_every_dtype(how: str, writer: str) -> None:
    def writing(x: Tensor, t: Tensor, c: Any = 0.0) -> Tensor:
        return from_there(x.mul_(0.5), t, c)

    given: dict[str, Any] = {"x_T": drawn(*SHAPE), "seeds": SEEDS, **HOW[how]}
    net = writing if writer == "model" else from_there
    more: dict[str, Any] = {} if writer == "model" else {"cond_fn": writing}
    refused(lambda: DDIM(10).sample(net, **given, **more), ValueError, writer, "clone")


@pytest.mark.parametrize("how", ["guidance", "bf16", "self", "known", "reverse", "half", "cond_fn"])
def test_steps_of_iterate_never_change_whatever_the_call(how: str) -> None:
    options: dict[str, Any] = {
        "guidance": guided("cpu", 2.0, shape=SHAPE),
        "bf16": {"dtype": torch.bfloat16, "shape": SHAPE},
        "self": {"self_condition": "before", "shape": SHAPE},
        "known": {"known": drawn(*SHAPE), "mask": torch.ones(1, 1, 5, 1), "shape": SHAPE},
        "reverse": {"reverse": True, "refine": 1, "x_T": drawn(*SHAPE)},
        "half": {"x_T": drawn(*SHAPE).to(torch.bfloat16)},
        "cond_fn": {"cond_fn": lambda x, t, **cond: -x, "shape": SHAPE},
    }[how]

    def net(x: Tensor, t: Tensor, c: Tensor | None = None, before: Tensor | None = None) -> Tensor:
        output = 0.5 * x if c is None else conditioned(x, t, c)
        return output if before is None else output + 0.1 * before

    kept: list[tuple[Tensor, bytes]] = []
    for step in DDIM(12).iterate(net, **options):
        kept += [(tensor, bytes_of(tensor)) for tensor in (step.x, step.x0)]
        del step
    assert len(kept) == 24
    assert all(bytes_of(tensor) == was for tensor, was in kept)
    # No two steps share memory, so a write to one leaves the others alone.
    assert len({tensor.untyped_storage().data_ptr() for tensor, _ in kept}) == 24


@pytest.mark.parametrize("w", [None, 2.0])
def test_inputs_that_nobody_keeps_take_turns_in_two_buffers(w: float | None) -> None:
    pointers: list[int] = []
    held: list[Tensor] = []  # what the model allocates must not take a freed input's place

    def watching(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        pointers.append(x.data_ptr())
        held.append(conditioned(x, t, c))
        return held[-1]

    options: dict[str, Any] = {"cond": {"c": drawn(4, 3, 1, 1)}, "dtype": torch.bfloat16}
    if w is not None:
        options |= {"uncond": {"c": drawn(4, 3, 1, 1)}, "guidance": w}
    DDIM(20).sample(watching, shape=SHAPE, **options)
    assert len(set(pointers)) <= 2


def test_callers_tensors_are_never_written() -> None:
    c, u, w = drawn(4, 3, 1, 1), drawn(4, 3, 1, 1, seed=2), torch.tensor([1.0, 2.0, 3.0, 4.0])
    x_T, known, mask = drawn(*SHAPE), drawn(*SHAPE, seed=3), torch.rand(1, 3, 5, 7)
    theirs = (c, u, w, x_T, known, mask)
    before = [tensor.clone() for tensor in theirs]
    replaced: list[Tensor] = []

    def replacing(step: Any) -> Tensor:
        replaced.append(drawn(*SHAPE, seed=step.index))
        return replaced[-1]

    options: dict[str, Any] = {"cond": {"c": c}, "uncond": {"c": u}, "guidance": w, "seeds": SEEDS}
    ddim = DDIM(6, eta=1.0)
    ddim.sample(conditioned, x_T, known=known, mask=mask, **options)
    ddim.sample(conditioned, x_T, callback=replacing, **options)
    DDIM(6).invert(
        conditioned, x_T, refine=1, cond={"c": c}, uncond={"c": u}, guidance=w, dtype=torch.bfloat16
    )
    ddim.add_noise(x_T, 3, noise=known)
    assert all(torch.equal(a, b) for a, b in zip(theirs, before, strict=True))
    for index, tensor in enumerate(replaced):
        assert torch.equal(tensor, drawn(*SHAPE, seed=index))


def test_the_loop_that_was_watched_is_the_papers() -> None:
    # Otherwise one operation between calls would prove nothing.
    ddim, x_T = DDIM(10, eta=1.0), drawn(*SHAPE)
    watch = Watch(free)
    with watch.mode:
        out = ddim.sample(watch, x_T, seeds=SEEDS)
    assert torch.equal(out, last(by_hand(ddim, free, x_T, counter_noise(ddim, SEEDS, SHAPE))))
