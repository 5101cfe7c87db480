"""Counter noise against its definition, computed again here, and against the normal law."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import triton
import triton.language as tl
from scipy import stats
from torch import Tensor

import fastddim
import fastddim_kernels
from fastddim import DDIM
from fastddim.step.op import initial_noise
from fastddim.step.philox import (
    FORWARD_STREAM,
    INITIAL_STREAM,
    STEP_STREAM,
    _box_muller,
    normals,
    philox4x32,
)
from fastddim_kernels.noise import key_of, philox_normal4
from fastddim_kernels.noise import philox4x32 as jitted_philox
from tests.paths import ALL, use
from tests.tolerances import NORMAL_ATOL, NORMAL_MAX, NORMAL_RARE, P_VALUE, SIGMAS

Floats = npt.NDArray[np.float32]

# The known answers that Random123 publishes for philox4x32-10: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def oracle_words(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 in Python's integers, as the paper's figure 2 has it."""
    (a, b, c, d), (k0, k1) = counter, key
    for r in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        low0, low1 = left % 2**32, right % 2**32
        bumped0, bumped1 = (k0 + r * 0x9E3779B9) % 2**32, (k1 + r * 0xBB67AE85) % 2**32
        a, b, c, d = right // 2**32 ^ b ^ bumped0, low1, left // 2**32 ^ d ^ bumped1, low0
    return a, b, c, d


def oracle_normals(seed: int, row: int, stream: int, elements: range) -> npt.NDArray[np.float64]:
    """The contract, one element at a time, in float64."""
    z = []
    for i in elements:
        counter = (i // 4 % 2**32, i // 4 // 2**32, row, stream)
        words = oracle_words(counter, (seed % 2**32, seed // 2**32))
        a, b = words[:2] if i % 4 < 2 else words[2:]
        u, turn = (a + 0.5) / 2**32, (b + 0.5) / 2**32
        r = math.sqrt(max(-2 * math.log(u), 0.0))
        z.append(r * (math.sin if i % 2 else math.cos)(2 * math.pi * turn))
    return np.array(z)


def draw(seed: int, row: int, n: int, stream: int = STEP_STREAM, first: int = 0) -> Floats:
    z: Floats = normals(np.array([seed]), np.array([row]), n, stream, first=first)[0]
    return z


def assert_same_normals(z: npt.NDArray[Any], truth: npt.NDArray[Any]) -> None:
    error = np.abs(z.astype(np.float64) - truth)
    assert error.max() <= NORMAL_MAX
    assert (error > NORMAL_ATOL).sum() <= max(1, NORMAL_RARE * error.size)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_random123s_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    assert oracle_words(counter, key) == words
    c0, c1, c2, c3 = (np.array([c], dtype=np.uint64) for c in counter)
    k0, k1 = (np.array([k], dtype=np.uint64) for k in key)
    assert tuple(int(w[0]) for w in philox4x32((c0, c1, c2, c3), (k0, k1))) == words


def _words_kernel(counter_ptr: Any, key_ptr: Any, out_ptr: Any) -> None:
    lane = tl.arange(0, 4)
    c0, c1 = tl.load(counter_ptr + lane * 4), tl.load(counter_ptr + lane * 4 + 1)
    c2, c3 = tl.load(counter_ptr + lane * 4 + 2), tl.load(counter_ptr + lane * 4 + 3)
    k0, k1 = tl.load(key_ptr + lane * 2), tl.load(key_ptr + lane * 2 + 1)
    w0, w1, w2, w3 = jitted_philox(c0, c1, c2, c3, k0, k1)  # pyright: ignore[reportGeneralTypeIssues]
    tl.store(out_ptr + lane * 4, w0)
    tl.store(out_ptr + lane * 4 + 1, w1)
    tl.store(out_ptr + lane * 4 + 2, w2)
    tl.store(out_ptr + lane * 4 + 3, w3)


def test_the_kernels_philox_gives_random123s_known_answers() -> None:
    cases = [*KNOWN, ((1, 2, 3, 4), (5, 6), oracle_words((1, 2, 3, 4), (5, 6)))]
    counter = torch.tensor([c for c, _, _ in cases], dtype=torch.uint32)
    key = torch.tensor([k for _, k, _ in cases], dtype=torch.uint32)
    out = torch.zeros(4, 4, dtype=torch.uint32)
    triton.jit(_words_kernel)[(1,)](counter, key, out)
    assert out.tolist() == [list(words) for _, _, words in cases]


def test_philox_equals_the_oracle_on_many_counters() -> None:
    draws = np.random.default_rng(0).integers(0, 2**32, (6, 300), dtype=np.uint64)
    words = philox4x32((draws[0], draws[1], draws[2], draws[3]), (draws[4], draws[5]))
    for i in range(300):
        c0, c1, c2, c3, k0, k1 = draws[:, i].tolist()
        assert tuple(int(w[i]) for w in words) == oracle_words((c0, c1, c2, c3), (k0, k1))


CONTRACT = list(
    itertools.product(
        (0, 1, 2**32 - 1, 2**32, 0x1234_5678_9ABC_DEF0, 2**63 - 1), (0, 49, 2**31 - 1)
    )
)


@pytest.mark.parametrize("stream", [STEP_STREAM, INITIAL_STREAM, FORWARD_STREAM])
def test_normals_are_those_of_the_contract(stream: int) -> None:
    z, truth = [], []
    for seed, row in CONTRACT:
        # Within the first quads, across the quad index's 2³² and across an element's 2³².
        for first in (0, 2**32 - 16, 4 * 2**32 - 16, 2**40):
            z.append(draw(seed, row, 31, stream, first))
            truth.append(oracle_normals(seed, row, stream, range(first, first + 31)))
    assert_same_normals(np.stack(z), np.stack(truth))


def test_the_streams_are_numbered_as_the_contract_has_them() -> None:
    assert (STEP_STREAM, INITIAL_STREAM, FORWARD_STREAM) == (0, 1, 2)


def _normals_kernel(quad_ptr: Any, row_ptr: Any, stream: Any, seed_ptr: Any, out_ptr: Any) -> None:
    lane = tl.arange(0, 16)
    row, key = tl.load(row_ptr), key_of(seed_ptr, 0)  # pyright: ignore[reportGeneralTypeIssues]
    z = philox_normal4(tl.load(quad_ptr + lane), row, stream, key, True)
    tl.store(out_ptr + lane * 4, z[0])
    tl.store(out_ptr + lane * 4 + 1, z[1])
    tl.store(out_ptr + lane * 4 + 2, z[2])
    tl.store(out_ptr + lane * 4 + 3, z[3])


@pytest.mark.parametrize(
    ("seed", "row", "stream"),
    [(7, 3, STEP_STREAM), (2**32 + 7, 3, INITIAL_STREAM), (2**63 - 1, 2**31 - 1, 2)],
)
def test_the_kernels_normals_are_those_of_the_contract(seed: int, row: int, stream: int) -> None:
    quads = torch.tensor([*range(8), *range(2**32 - 4, 2**32 + 4)])
    out = torch.empty(16, 4)
    rows = torch.tensor([row], dtype=torch.int32)
    triton.jit(_normals_kernel)[(1,)](quads, rows, stream, torch.tensor([seed]), out)
    truth = [oracle_normals(seed, row, stream, range(4 * q, 4 * q + 4)) for q in quads.tolist()]
    assert_same_normals(out.numpy(), np.stack(truth))
    cpu = [draw(seed, row, 4, stream, first=4 * q) for q in quads.tolist()]
    assert_same_normals(out.numpy(), np.stack(cpu))


@pytest.mark.parametrize("n", [1, 3, 64, 1023])
def test_the_noise_kernel_fills_a_tensor_and_nothing_beside_it(n: int) -> None:
    seeds, rows = torch.tensor([3, 2**33]), torch.tensor([0, 7], dtype=torch.int32)
    memory = torch.full((2 * n + 32,), 12345.0)
    out = memory[16 : 16 + 2 * n].view(2, n).fill_(float("nan"))
    fastddim_kernels.normal_(out, seeds, rows, INITIAL_STREAM)
    assert_same_normals(out.numpy(), normals(seeds.numpy(), rows.numpy(), n, INITIAL_STREAM))
    memory[16 : 16 + 2 * n] = 12345.0
    assert (memory == 12345.0).all()


class Spied:
    """A model that returns x0 = 0 and keeps the states it was shown."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append(x.clone())
        return torch.zeros_like(x)


def test_x_T_and_every_steps_noise_are_those_of_the_contract() -> None:
    seeds, shape = [3, 2**32 + 3, 2**63 - 1], (3, 3, 5, 3)
    ddim = DDIM(steps=6, eta=1.0, prediction="sample")
    model = Spied()
    last = ddim.sample(model, shape=shape, seeds=seeds)
    n = 45
    x_T = [oracle_normals(s, 0, INITIAL_STREAM, range(n)) for s in seeds]
    assert_same_normals(model.seen[0].flatten(1).numpy(), np.stack(x_T))
    for row, (x, x_s) in enumerate(itertools.pairwise([*model.seen, last])):
        _, _, b_t, _, _, c1, c2 = ddim.table[row].astype(np.float64)
        truth = np.stack([oracle_normals(s, row, STEP_STREAM, range(n)) for s in seeds])
        state, found = (t.double().flatten(1).numpy() for t in (x, x_s))
        assert (c1 == 0) == (row == 5)
        # √ᾱ_s·0 + c1·z + c2·x/b_t, whose own float32 rounding stays far under the tolerance.
        np.testing.assert_allclose(found, c1 * truth + c2 * state / b_t, rtol=0, atol=1e-5)


def test_row_zero_is_the_first_step_taken_whatever_its_t() -> None:
    for spacing in ("uniform", "quad"):
        ddim = DDIM(steps=3, eta=1.0, spacing=spacing, prediction="sample")
        model = Spied()
        ddim.sample(model, torch.zeros(1, 8), seeds=[11])
        z = model.seen[1].double().numpy() / float(ddim.table[0, 5])
        assert_same_normals(z[0], oracle_normals(11, 0, STEP_STREAM, range(8)))


def test_initial_noise_is_stream_normals_kernel_zero() -> None:
    z = initial_noise(torch.tensor([5, 2**40]), (2, 3, 7))
    truth = [oracle_normals(s, 0, INITIAL_STREAM, range(21)) for s in (5, 2**40)]
    assert_same_normals(z.flatten(1).numpy(), np.stack(truth))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 4 * 8192 - 1, 4 * 8192 + 6])
def test_a_samples_noise_does_not_depend_on_its_batch(n: int) -> None:
    seeds, rows = np.array([9, 2**35, 0, 9, 1]), np.array([4, 0, 1, 4, 2])
    batch = normals(seeds, rows, n, STEP_STREAM)
    for i in range(5):
        assert np.array_equal(batch[i], draw(int(seeds[i]), int(rows[i]), n))
    assert np.array_equal(batch[0], batch[3])
    assert n == 1 or not np.array_equal(batch[0], batch[1])


def test_an_elements_noise_does_not_depend_on_the_first_element() -> None:
    whole = draw(1, 2, 40_000)
    for first in (4, 1000, 32_752, 39_996):
        assert np.array_equal(draw(1, 2, 40_000 - first, first=first), whole[first:])
    assert np.array_equal(draw(1, 2, 39_997), whole[:39_997])


def test_drawing_into_memory_writes_all_of_it_and_no_more() -> None:
    memory = np.full(2 * 37 + 2, 12345.0, dtype=np.float32)
    out = memory[1:-1].reshape(2, 37)
    out[:] = np.nan
    seeds, rows = np.array([1, 2]), np.array([0, 0])
    assert normals(seeds, rows, 37, STEP_STREAM, out=out) is out
    assert np.array_equal(out, normals(seeds, rows, 37, STEP_STREAM))
    assert memory[0] == memory[-1] == 12345.0


@pytest.mark.parametrize("n", [16, 15, 40_000])
def test_sampling_a_seed_alone_or_in_a_batch_is_the_same(n: int) -> None:
    ddim, seeds = DDIM(steps=3, eta=1.0), [4, 2**50, 77]

    def model(x: Tensor, t: Tensor) -> Tensor:
        return x.tanh()

    batch = ddim.sample(model, shape=(3, n), seeds=seeds)
    for i, seed in enumerate(seeds):
        alone = ddim.sample(model, shape=(1, n), seeds=[seed])
        assert torch.equal(batch[i : i + 1], alone)


def test_noise_belongs_to_the_logical_element_in_any_layout() -> None:
    table = torch.tensor(DDIM(steps=5, eta=1.0).table)
    x, output = torch.randn(2, 2, 3, 5, 7, generator=torch.Generator().manual_seed(0)).unbind()
    seeds, rows = torch.tensor([1, 2]), torch.tensor([0, 2], dtype=torch.int32)
    expected = fastddim.ddim_step(x, output, table, rows, seeds)[0]

    def moved_by(t: Tensor, *order: int) -> Tensor:
        return t.permute(order).contiguous().permute([order.index(i) for i in range(4)])

    for order in ((0, 2, 3, 1), (3, 2, 1, 0), (1, 0, 2, 3)):  # the first is channels_last
        moved = moved_by(x, *order)
        assert moved.stride() != x.stride()
        for other in (moved_by(output, *order), output):
            assert torch.equal(fastddim.ddim_step(moved, other, table, rows, seeds)[0], expected)


N = 1_000_000


@pytest.fixture(scope="module")
def million() -> Floats:
    """A million normals of one sample at one row."""
    return draw(2024, 3, N)


def test_moments_are_those_of_the_normal_law(million: Floats) -> None:
    z = million.astype(np.float64)
    assert abs(z.mean()) < SIGMAS / math.sqrt(N)
    assert abs(z.var() - 1) < SIGMAS * math.sqrt(2 / N)
    assert abs((z**3).mean()) < SIGMAS * math.sqrt(15 / N)
    assert abs((z**4).mean() - 3) < SIGMAS * math.sqrt(96 / N)


def test_the_distribution_is_normal_in_every_lane(million: Floats) -> None:
    assert stats.kstest(million[: N // 2], "norm").pvalue > P_VALUE
    for lane in range(4):
        assert stats.kstest(million[lane::16], "norm").pvalue > P_VALUE


@pytest.mark.parametrize("limit", [3.0, 4.0, 4.5])
def test_the_tails_are_as_heavy_as_the_normal_laws(million: Floats, limit: float) -> None:
    p = 2 * stats.norm.sf(limit)
    beyond = int((np.abs(million) > limit).sum())
    assert abs(beyond - N * p) < SIGMAS * math.sqrt(N * p)


def test_extreme_words_give_finite_normals_of_the_contracts_size() -> None:
    words = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 128, 2**32 - 1], dtype=np.uint64)
    a, b = (w.ravel() for w in np.meshgrid(words, words))
    cosine, sine = np.empty((2, 36), dtype=np.float32)
    _box_muller(a, b, cosine, sine)
    r = np.sqrt(-2 * np.log((a + 0.5) / 2.0**32))
    theta = 2 * np.pi * (b + 0.5) / 2.0**32
    assert np.abs(cosine - r * np.cos(theta)).max() <= NORMAL_MAX
    assert np.abs(sine - r * np.sin(theta)).max() <= NORMAL_MAX
    # The last words are angles just below a turn: exact only when taken as signed.
    last = b >= 2**32 - 128
    assert np.abs(sine - r * np.sin(theta))[last].max() <= 1e-9


PAIRS: dict[str, Callable[[int], tuple[Floats, Floats]]] = {
    "neighbouring seeds": lambda n: (draw(5, 0, n), draw(6, 0, n)),
    "seeds that differ in the high word": lambda n: (draw(5, 0, n), draw(5 + 2**32, 0, n)),
    "seeds whose words are exchanged": lambda n: (draw(5, 0, n), draw(5 * 2**32, 0, n)),
    "neighbouring rows": lambda n: (draw(5, 0, n), draw(5, 1, n)),
    "seed and row exchanged": lambda n: (draw(5, 6, n), draw(6, 5, n)),
    "step and initial": lambda n: (draw(5, 0, n, STEP_STREAM), draw(5, 0, n, INITIAL_STREAM)),
    "initial and forward": lambda n: (draw(5, 0, n, INITIAL_STREAM), draw(5, 0, n, FORWARD_STREAM)),
    "row and stream exchanged": lambda n: (
        draw(5, 1, n, STEP_STREAM),
        draw(5, 0, n, INITIAL_STREAM),
    ),
    "quads 2³² apart": lambda n: (draw(5, 0, n), draw(5, 0, n, first=4 * 2**32)),
}
LANES = [f"lanes {a} and {b}" for a, b in itertools.combinations(range(4), 2)]
APART = [f"elements {k} apart" for k in (1, 2, 3, 4, 8, 32, 1024)]


def pair_of(name: str, n: int) -> tuple[Floats, Floats]:
    """Two vectors of n normals that have nothing to do with one another."""
    numbers = [int(word) for word in name.split() if word.isdecimal()]
    if name in LANES:
        z = draw(5, 0, 4 * n).reshape(n, 4)
        return z[:, numbers[0]], z[:, numbers[1]]
    if name in APART:
        return draw(5, 0, n), draw(5, 0, n + numbers[0])[numbers[0] :]
    return PAIRS[name](n)


@pytest.mark.parametrize("pair", [*PAIRS, *LANES, *APART])
def test_normals_are_uncorrelated(pair: str) -> None:
    n = 100_000
    a, b = (z.astype(np.float64) for z in pair_of(pair, n))
    assert abs((a * b).mean()) < SIGMAS / math.sqrt(n)
    # Nor are their squares, which share r in a Box–Muller pair.
    assert abs(((a**2 - 1) * (b**2 - 1)).mean() / 2) < SIGMAS / math.sqrt(n)


def test_normals_across_many_seeds_are_normal() -> None:
    seeds = np.arange(100_000)
    z = normals(seeds, np.zeros(100_000, dtype=np.int32), 4, INITIAL_STREAM)
    for lane in range(4):
        assert stats.kstest(z[:, lane], "norm").pvalue > P_VALUE
        column = z[:, lane].astype(np.float64)
        assert abs((column[1:] * column[:-1]).mean()) < SIGMAS / math.sqrt(len(column))


@pytest.mark.slow
def test_a_hundred_million_normals_are_normal() -> None:
    n, count, fourth, beyond, p = 4_000_000, 25, 0.0, 0, 2 * float(stats.norm.sf(5.0))
    for seed in range(count):
        z = draw(seed, 0, n).astype(np.float64)
        fourth += (z**4).mean() / count
        beyond += int((np.abs(z) > 5).sum())
    assert abs(fourth - 3) < SIGMAS * math.sqrt(96 / (n * count))
    assert abs(beyond - n * count * p) < SIGMAS * math.sqrt(n * count * p)


@pytest.mark.parametrize("seeds", [torch.arange(8)[::2], torch.tensor([5]).expand(4)])
@pytest.mark.parametrize("path", ALL)
def test_seeds_may_lie_anywhere(seeds: Tensor, path: str) -> None:
    apart = seeds.clone(memory_format=torch.contiguous_format)
    with use(path):
        x = initial_noise(seeds, (4, 6))
        assert torch.equal(x, initial_noise(apart, (4, 6)))
    assert_same_normals(x.numpy(), normals(seeds.numpy(), np.zeros(4, np.int32), 6, INITIAL_STREAM))
