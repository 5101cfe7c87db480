"""A captured loop: replayed with anything new, it is a fresh eager run, bit for bit."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddim import DDIM, NoiseSchedule
from fastddim.coefficients import Prediction
from fastddim.loop import graph
from tests.apart import apart
from tests.loop.graph_cases import CALLS, given, gradient, halves, model
from tests.loops import conditioned, drawn
from tests.refusals import refused
from tests.tape import Tape, tapes_for_graphs

LINEAR = NoiseSchedule.linear()
SHAPE = (3, 2, 5, 4)
SEEDS = [7, 2**35, 2**63 - 1]


@pytest.fixture(params=["eager", "tape"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU's way, which runs the loop again, and a GPU's, which replays a graph.

    Graphs of one step begin beyond ten steps rather than beyond a hundred.
    """
    monkeypatch.setattr(graph, "WHOLE", 10)
    if request.param == "tape":
        tapes_for_graphs(monkeypatch)
    return str(request.param)


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    return tapes_for_graphs(monkeypatch)


STEPS = [1, 7, 12, 13]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("eta", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_a_replay_with_all_new_is_a_fresh_run(way: str, how: str, steps: int, eta: float) -> None:
    # "linspace" begins at 999, so the intervals above leave each kind of row, as in a hundred.
    ddim = DDIM(steps, eta=eta, schedule=LINEAR, clip=1.5, spacing="linspace")
    fixed = CALLS[how]
    run = ddim.capture(model, SHAPE, **given(how, 1), **fixed)
    before: list[tuple[Tensor, Tensor]] = []
    for k in (1, 2, 3):
        new, seeds = given(how, 10 * k), [k, 2 * k, 3 * k]
        x_T = None if k == 1 else drawn(*SHAPE, seed=k)
        again = dict(fixed)
        if how in ("guidance", "guidance, bf16", "cond_fn, guidance") and k > 1:
            again["guidance"] = [0.5 * k, 1.0, -k]
        changed = {"guidance": again["guidance"]} if again != fixed else {}
        out = run(seeds=seeds, x_T=x_T, **new, **changed)
        start: dict[str, Any] = {"shape": SHAPE} if x_T is None else {"x_T": x_T}
        assert torch.equal(out, ddim.sample(model, seeds=seeds, **start, **new, **again))
        before.append((out, out.clone()))
    assert all(torch.equal(out, was) for out, was in before)
    assert not torch.equal(before[0][0], before[1][0])


@pytest.mark.parametrize("steps", [7, 12])
def test_arguments_that_a_replay_omits_keep_their_values(way: str, steps: int) -> None:
    ddim = DDIM(steps, eta=1.0, schedule=LINEAR)
    first, second = halves(1), halves(2)
    run = ddim.capture(model, SHAPE, **first, guidance=2.0)

    def fresh(cond: Any, uncond: Any, w: Any) -> Tensor:
        return ddim.sample(
            model,
            shape=SHAPE,
            seeds=SEEDS,
            cond=cond["cond"],
            uncond=uncond["uncond"],
            guidance=w,
        )

    assert torch.equal(run(seeds=SEEDS), fresh(first, first, 2.0))
    assert torch.equal(run(seeds=SEEDS, cond=second["cond"]), fresh(second, first, 2.0))
    assert torch.equal(run(seeds=SEEDS, guidance=3.0), fresh(second, first, 3.0))
    assert torch.equal(run(seeds=SEEDS, uncond=second["uncond"]), fresh(second, second, 3.0))
    w = torch.linspace(0, 4, steps)[:, None]
    assert torch.equal(run(seeds=SEEDS, guidance=w), fresh(second, second, w))
    assert torch.equal(
        run(seeds=SEEDS, guidance=lambda t: t / 300), fresh(second, second, lambda t: t / 300)
    )


@pytest.mark.parametrize("steps", [7, 12])
def test_a_tensor_captured_twice_may_be_two_tensors_in_a_replay(way: str, steps: int) -> None:
    ddim = DDIM(steps, schedule=LINEAR)
    blank = torch.zeros(3, 2, 1, 1)

    def net(x: Tensor, t: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return conditioned(x, t, a - 0.5 * b)

    run = ddim.capture(
        net, SHAPE, cond={"a": blank, "b": blank}, uncond={"a": blank, "b": blank}, guidance=2.0
    )
    held: dict[str, Any] = {
        "cond": {"a": blank, "b": blank},
        "uncond": {"a": blank, "b": blank},
    }
    for name, key, seed in (
        ("cond", "a", 1),
        ("uncond", "a", 2),
        ("cond", "b", 3),
        ("uncond", "b", 4),
    ):
        new: dict[str, Any] = {name: {key: drawn(3, 2, 1, 1, seed=seed)}}
        held[name] = {**held[name], **new[name]}
        out = run(seeds=SEEDS, **new)
        assert torch.equal(out, ddim.sample(net, shape=SHAPE, seeds=SEEDS, guidance=2.0, **held))
    assert not blank.any()


def test_a_tensor_shared_by_both_halves_stays_shared(way: str) -> None:
    ddim = DDIM(7, schedule=LINEAR)

    def net(x: Tensor, t: Tensor, c: Tensor, table: Tensor) -> Tensor:
        assert table.shape == (5,)
        return conditioned(x, t, c + table.sum())

    table, other = drawn(5), drawn(5, seed=2)
    both = halves(1)
    for named in (False, True):
        cond = {**both["cond"], "table": table}
        uncond = {**both["uncond"], "table": table} if named else both["uncond"]
        run = ddim.capture(net, SHAPE, cond=cond, uncond=uncond, guidance=2.0)
        out = run(seeds=SEEDS, cond={"table": other})
        expected = ddim.sample(
            net,
            shape=SHAPE,
            seeds=SEEDS,
            cond={**cond, "table": other},
            uncond=both["uncond"],
            guidance=2.0,
        )
        assert torch.equal(out, expected)
        if named:
            refused(
                lambda run=run: run(cond={"table": table}, uncond={"table": other}),  # type: ignore[misc]
                ValueError,
                "uncond['table']",
            )
            assert torch.equal(run(seeds=SEEDS), expected)


@pytest.mark.parametrize("steps", [7, 13])
def test_nested_conditions_single_rows_and_plain_values(way: str, steps: int) -> None:
    def net(x: Tensor, t: Tensor, deep: Mapping[str, Any], scale: float) -> Tensor:
        first, (second,) = deep["list"]
        return conditioned(x, t, scale * (first + second + deep["more"]["c"]))

    def cond(seed: int, rows: int = 3) -> dict[str, Any]:
        c = [drawn(rows, 2, 1, 1, seed=seed + i) for i in range(3)]
        return {"deep": {"list": [c[0], (c[1],)], "more": {"c": c[2]}}, "scale": 0.5}

    ddim = DDIM(steps, eta=1.0, schedule=LINEAR)
    run = ddim.capture(net, SHAPE, cond=cond(1), uncond=cond(11, 1), guidance=2.0)
    out = run(seeds=SEEDS, cond=cond(21), uncond=cond(31, 1))
    assert torch.equal(
        out,
        ddim.sample(net, shape=SHAPE, seeds=SEEDS, cond=cond(21), uncond=cond(31, 1), guidance=2.0),
    )


@pytest.mark.parametrize("steps", [12, 20])
def test_a_capture_may_start_anywhere(way: str, steps: int) -> None:
    ddim, start = DDIM(steps, eta=1.0, schedule=LINEAR), 3
    others: list[dict[str, Any]] = [{}, {"dtype": torch.bfloat16}, {"cond_fn": gradient}]
    for more in others:
        run = ddim.capture(model, SHAPE, start=start, **halves(1), guidance=2.0, **more)
        for k in (1, 2):
            x = drawn(*SHAPE, seed=k)
            common: dict[str, Any] = {"seeds": [k, 5, 6], **halves(k)}
            expected = ddim.sample(model, x, start=start, guidance=2.0, **common, **more)
            assert torch.equal(run(x_T=x, **common), expected)
    run = ddim.capture(model, SHAPE, start=start, cond=halves(1)["cond"])
    refused(lambda: run(seeds=SEEDS), ValueError, "x_T", "start = 3")


def test_captures_in_one_process_do_not_disturb_each_other(way: str) -> None:
    captured = []
    for i, (steps, how) in enumerate(
        [(7, "guidance"), (7, "plain"), (12, "interval, bf16"), (13, "self"), (7, "guidance")]
    ):
        ddim = DDIM(steps, eta=float(i % 2), schedule=LINEAR)
        captured.append((ddim, how, ddim.capture(model, SHAPE, **given(how, i), **CALLS[how])))
    kept: list[tuple[Tensor, Tensor]] = []
    for k in (1, 2):
        for i, (ddim, how, run) in enumerate([*captured, *reversed(captured)]):
            new, seeds = given(how, 7 * k + i), [k, i, 99]
            out = run(seeds=seeds, **new)
            expected = ddim.sample(model, shape=SHAPE, seeds=seeds, **new, **CALLS[how])
            assert torch.equal(out, expected)
            kept.append((out, expected))
    assert all(torch.equal(out, expected) for out, expected in kept)


@pytest.mark.parametrize("steps", [7, 12])
def test_the_result_is_a_copy_or_the_out_that_is_given(way: str, steps: int) -> None:
    ddim = DDIM(steps, eta=1.0, schedule=LINEAR)
    run = ddim.capture(model, SHAPE, **halves(1), guidance=2.0)
    first = run(seeds=SEEDS)
    was = first.clone()
    place = torch.full(SHAPE, float("nan"))
    assert run(seeds=[1, 2, 3], out=place) is place
    assert torch.equal(place, run(seeds=[1, 2, 3]))
    assert torch.equal(first, was)
    first.zero_()
    place.zero_()
    assert torch.equal(run(seeds=SEEDS), was)
    strided = torch.empty(5, 4, 3, 2).permute(2, 3, 0, 1)
    assert torch.equal(run(seeds=SEEDS, out=strided), was)


@pytest.mark.parametrize("steps", [7, 12])
def test_the_callers_tensors_are_neither_held_nor_written(way: str, steps: int) -> None:
    ddim = DDIM(steps, eta=1.0, schedule=LINEAR)
    first, second = halves(1), halves(2)
    w, x_T = torch.tensor([1.5, 2.0, 3.0]), drawn(*SHAPE)
    theirs = [*first["cond"].values(), *first["uncond"].values(), w]
    theirs += [*second["cond"].values(), *second["uncond"].values(), x_T]
    was = [tensor.clone() for tensor in theirs]
    run = ddim.capture(model, SHAPE, **first, guidance=w)
    run(seeds=SEEDS, x_T=x_T, **second, guidance=w + 1)
    out = run(seeds=SEEDS, x_T=x_T)
    assert all(torch.equal(a, b) for a, b in zip(theirs, was, strict=True))
    for tensor in theirs[:-1]:
        tensor.zero_()
    assert torch.equal(run(seeds=SEEDS, x_T=x_T), out)


def test_a_model_may_return_its_input_from_a_replay(way: str) -> None:
    ddim = DDIM(7, eta=1.0, schedule=LINEAR)

    def identity(x: Tensor, t: Tensor) -> Tensor:
        return x

    for dtype in (torch.float32, torch.bfloat16):
        run = ddim.capture(identity, SHAPE, dtype=dtype)
        expected = ddim.sample(identity, shape=SHAPE, seeds=SEEDS, dtype=dtype)
        assert torch.equal(run(seeds=SEEDS), expected)


@pytest.mark.parametrize("prediction", ["v", "sample"])
@pytest.mark.parametrize("steps", [7, 12])
def test_other_predictions_and_learned_variances(
    way: str, prediction: Prediction, steps: int
) -> None:
    ddim = DDIM(steps, eta=0.5, schedule=LINEAR, prediction=prediction, clip=1.0, temperature=0.5)

    def learned(x: Tensor, t: Tensor, c: Tensor) -> tuple[Tensor]:
        return (torch.cat([model(x, t, c), torch.full_like(x, torch.nan)], 1),)

    run = ddim.capture(learned, SHAPE, **halves(1), guidance=2.0, cond_fn=gradient)
    expected = ddim.sample(
        learned, shape=SHAPE, seeds=SEEDS, **halves(2), guidance=2.0, cond_fn=gradient
    )
    assert torch.equal(run(seeds=SEEDS, **halves(2)), expected)


@pytest.mark.parametrize("steps", [7, 12])
def test_seeds_by_default_come_from_torchs_generator(way: str, steps: int) -> None:
    ddim = DDIM(steps, eta=1.0, schedule=LINEAR)
    run = ddim.capture(model, SHAPE, cond=halves(1)["cond"])
    outs = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        outs.append(run())
    torch.manual_seed(4)
    expected = ddim.sample(model, shape=SHAPE, cond=halves(1)["cond"])
    assert torch.equal(outs[0], expected)
    assert torch.equal(outs[1], expected)
    assert not torch.equal(outs[2], expected)


@pytest.mark.parametrize("steps", [3, 12])
def test_an_empty_batch_stays_empty(way: str, steps: int) -> None:
    run = DDIM(steps, schedule=LINEAR).capture(lambda x, t: x, (0, 3))
    assert run(seeds=[]).shape == (0, 3)


def test_the_models_weights_are_those_in_place(taped: list[Tape]) -> None:
    weight = torch.ones(1)

    def weighed(x: Tensor, t: Tensor) -> Tensor:
        return weight * x

    ddim = DDIM(7, schedule=LINEAR)
    run = ddim.capture(weighed, SHAPE)
    first = run(seeds=SEEDS)
    weight.mul_(0.5)
    assert torch.equal(run(seeds=SEEDS), ddim.sample(weighed, shape=SHAPE, seeds=SEEDS))
    assert not torch.equal(run(seeds=SEEDS), first)


@pytest.mark.parametrize("steps", [7, 102])
def test_python_code_runs_at_the_capture_alone(taped: list[Tape], steps: int) -> None:
    calls: list[int] = []

    def counting(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        calls.append(1)
        return conditioned(x, t, c)

    run = DDIM(steps, eta=1.0, schedule=LINEAR).capture(counting, SHAPE, cond=halves(1)["cond"])
    asked = len(calls)
    # Beyond a hundred steps a graph of each kind of step: fewer calls than steps.
    assert asked == 14 if steps == 7 else asked < 20
    run(seeds=SEEDS)
    assert len(calls) == asked


def test_a_model_that_reads_a_value_cannot_be_taped(taped: list[Tape]) -> None:
    # A tape that let this model pass would record a value that a replay cannot renew.
    def reading(x: Tensor, t: Tensor) -> Tensor:
        return x * (0.5 if t[0].item() > 500 else 0.4)

    with pytest.raises(RuntimeError, match="cannot read values"):
        DDIM(7).capture(reading, SHAPE)


def unused(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing may be called")


X = torch.zeros(SHAPE)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("error", "said", "arguments"),
    [
        (ValueError, ("seeds", "3", "2"), {"seeds": [1, 2]}),
        (ValueError, ("seeds[1]", "-1"), {"seeds": [1, -1, 2]}),
        (TypeError, ("seeds", "int"), {"seeds": 1}),
        (ValueError, ("x_T", "(3, 2, 5, 4)", "(1, 2, 5, 4)"), {"x_T": X[:1]}),
        (TypeError, ("x_T", "float64"), {"x_T": X.double()}),
        (ValueError, ("out", "(3, 2, 5, 4)", "(1, 2, 5, 4)"), {"out": X[:1]}),
        (ValueError, ("out", "bfloat16"), {"out": X.bfloat16()}),
        (TypeError, ("out", "list"), {"out": []}),
        (TypeError, ("cond", "list"), {"cond": []}),
        (TypeError, ("uncond", "Tensor"), {"uncond": X}),
        (ValueError, ("cond", "'d'"), {"cond": {"d": X}}),
        (ValueError, ("cond['c']", "(3, 2, 1, 1)", "(3, 2, 5, 4)"), {"cond": {"c": X}}),
        (ValueError, ("cond['c']", "NoneType"), {"cond": {"c": None}}),
        (ValueError, ("uncond['c']", "bfloat16"), {"uncond": {"c": X[:, :, :1, :1].bfloat16()}}),
        (ValueError, ("cond['k']", "0.5", "0.6"), {"cond": {"k": 0.6}}),
        (ValueError, ("guidance", "(3,)", "(2,)"), {"guidance": [1.0, 2.0]}),
        (TypeError, ("guidance", "'2'"), {"guidance": "2"}),
        (ValueError, ("guidance", "inf"), {"guidance": float("inf")}),
        (ValueError, ("guidance", "row 4", "4.0"), {"guidance": 4.0}),
    ],
)
@pytest.mark.parametrize("steps", [7, 12])
def test_a_refused_replay_changes_nothing(
    way: str, steps: int, error: type[Exception], said: tuple[str, ...], arguments: dict[str, Any]
) -> None:
    def net(x: Tensor, t: Tensor, c: Tensor, k: float) -> Tensor:
        return conditioned(x, t, k * c)

    ddim = DDIM(steps, eta=1.0, schedule=LINEAR)
    both = halves(1)
    first = [t for t, _ in ddim.pairs[:4]]
    run = ddim.capture(
        net,
        SHAPE,
        cond={**both["cond"], "k": 0.5},
        uncond=both["uncond"],
        guidance=lambda t: 2.0 if t in first else 1.0,
    )
    new = halves(2)
    was = run(seeds=SEEDS)
    good: dict[str, Any] = {"seeds": [1, 2, 3], "x_T": X + 1, **new, "guidance": 1.0}
    refused(lambda: run(**(good | arguments)), error, *said)
    assert torch.equal(run(seeds=SEEDS), was)


@pytest.mark.parametrize(
    ("error", "said", "arguments"),
    [
        (TypeError, ("model", "NoneType"), {"model": None}),
        (TypeError, ("shape", "int"), {"shape": 3}),
        (ValueError, ("shape", "(3,)"), {"shape": (3,)}),
        (ValueError, ("device", "'nonsense'"), {"device": "nonsense"}),
        (ValueError, ("start", "7"), {"start": 7}),
        (TypeError, ("start", "1.0"), {"start": 1.0}),
        (TypeError, ("dtype", "int64"), {"dtype": torch.int64}),
        (TypeError, ("cond", "list"), {"cond": []}),
        (ValueError, ("guidance", "uncond"), {"uncond": {}}),
    ],
)
def test_capture_refuses_bad_arguments(
    error: type[Exception], said: tuple[str, ...], arguments: dict[str, Any]
) -> None:
    given: dict[str, Any] = {"model": unused, "shape": SHAPE} | arguments
    refused(lambda: DDIM(7).capture(**given), error, *said)


@pytest.mark.one_in(3)
@pytest.mark.gpu
@apart
@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("steps", [1, 7, 101, 102])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_on_a_gpu_a_replay_is_a_fresh_run(how: str, steps: int, eta: float) -> None:
    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: moved(item) for key, item in value.items()}
        return value.cuda() if isinstance(value, Tensor) else value

    ddim, fixed = DDIM(steps, eta=eta, schedule=LINEAR, clip=1.5), CALLS[how]
    run = ddim.capture(model, SHAPE, device="cuda", **moved(given(how, 1)), **fixed)
    outs = []
    for k in (1, 2, 3):
        new, seeds = moved(given(how, 10 * k)), [k, 2 * k, 3 * k]
        x_T = None if k == 1 else drawn(*SHAPE, seed=k).cuda()
        start: dict[str, Any] = {"x_T": x_T} if k > 1 else {"shape": SHAPE, "device": "cuda"}
        expected = ddim.sample(model, seeds=seeds, **start, **new, **fixed)
        outs.append((run(seeds=seeds, x_T=x_T, **new), expected))
    assert all(torch.equal(out, expected) for out, expected in outs)


@pytest.mark.gpu
@apart
@pytest.mark.parametrize("steps", [7, 102])
def test_on_a_gpu_a_replay_outlives_its_sampler_and_weights(steps: int) -> None:
    net = torch.nn.Conv2d(2, 2, 3, padding=1, device="cuda").requires_grad_(False)
    act = DDIM(steps, eta=1.0, schedule=LINEAR, clip=1.0).capture(
        lambda x, t: net(x), SHAPE, device="cuda"
    )
    was, replay = act(seeds=SEEDS), act._replay
    del act
    net.cpu()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    # Whatever was freed is written by somebody else.
    others = [torch.full((n,), float("nan"), device="cuda") for n in (1, 8, 64, 512) * 50]
    assert torch.equal(replay(), was)
    assert all(other.isnan().all() for other in others)


@pytest.mark.gpu
@apart
@pytest.mark.parametrize("steps", [7, 102])
def test_on_a_gpu_a_failed_capture_names_the_line_of_the_model(steps: int) -> None:
    def reading(x: Tensor, t: Tensor) -> Tensor:
        return x * (0.5 if t[0].item() > 500 else 0.4)

    with pytest.raises(RuntimeError) as caught:
        DDIM(steps).capture(reading, SHAPE, device="cuda")
    message = str(caught.value)
    assert message.startswith("the model cannot be captured: ")
    assert "test_graph.py" in message
    assert "t[0].item()" in message
    assert "\n" not in message
    # And nothing is left broken behind.
    out = DDIM(steps).capture(lambda x, t: 0.5 * x, SHAPE, device="cuda")(seeds=SEEDS)
    expected = DDIM(steps).sample(lambda x, t: 0.5 * x, shape=SHAPE, seeds=SEEDS, device="cuda")
    assert torch.equal(out, expected)
