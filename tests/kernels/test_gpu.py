"""The compiled kernels, on a GPU, against eager PyTorch on the same GPU: equal, not close."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import fastddim
import fastddim_kernels.launch
from benchmarks.checks import Given, by_reference, contract_error, kernel_noise, rows_of
from benchmarks.variants import ROUNDED, VARIANTS, launch_arguments, step_arguments
from fastddim.coefficients import PREDICTIONS
from fastddim.step import reference
from fastddim.step.op import initial_noise
from fastddim.step.philox import INITIAL_STREAM, STEP_STREAM, normals
from fastddim_kernels import geometry
from fastddim_kernels.noise import box_muller
from tests.gpu_steps import DEVICE, LARGE, arguments, last, moved, on_row, plain, same
from tests.paths import forget
from tests.tolerances import NORMAL_ATOL, NORMAL_MAX, NORMAL_RARE

pytestmark = pytest.mark.gpu


launch: Any = fastddim_kernels.launch


PHILOX = [name for name, v in VARIANTS.items() if v.noise == "philox"]


EVERY = [(name, size) for name in VARIANTS for size in ("its own shape", "odd")]


def assert_is_the_reference(given: Given) -> None:
    """All that the step returns and writes, on poisoned memory, its arguments being left alone."""
    z = kernel_noise(given)
    inputs = {k: t for k, t in given.items() if isinstance(t, Tensor) and k != "next_input"}
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    out, next_input = torch.full_like(given["x"], float("nan")), given.get("next_input")
    if next_input is not None:
        next_input.fill_(float("nan"))
    x_s, x0 = fastddim.ddim_step(**given, out=out)
    expected, expected_x0 = by_reference(given, z)
    assert x_s is out
    assert same(x_s, expected)
    assert (x0 is None) == (not given.get("want_x0", True))
    assert x0 is None or same(x0, expected_x0)
    if next_input is not None:
        for half in next_input.chunk(len(next_input) // len(x_s)):
            assert same(half, expected.to(half.dtype))
    for name, tensor in inputs.items():
        assert same(tensor, before[name]), name


def assert_is_the_contract(error: Tensor) -> None:
    assert error.max() <= NORMAL_MAX
    assert (error > NORMAL_ATOL).sum() <= max(1, NORMAL_RARE * error.numel())


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("name", "size"), EVERY)
def test_every_variant_equals_the_reference(name: str, size: str) -> None:
    assert_is_the_reference(arguments(name, size))


@pytest.mark.parametrize("size", ["large", "odd"])
@pytest.mark.parametrize(
    "name", ["epsilon", "epsilon odd", "v", "epsilon philox last order 2", "epsilon mixed rgb"]
)
def test_the_state_may_be_written_over_itself(name: str, size: str) -> None:
    given = arguments(name, size)
    x = given["x"].clone()
    expected, expected_x0 = fastddim.ddim_step(**given)
    _, x0 = fastddim.ddim_step(**given | {"x": x, "out": x})
    assert same(x, expected)
    assert x0 is None or (expected_x0 is not None and same(x0, expected_x0))


@pytest.mark.parametrize("shape", [(4, 64, 64), (3, 7, 5)])
@pytest.mark.parametrize("name", ROUNDED)
def test_a_step_that_rounds_has_the_bits_of_the_cpus(
    name: str, shape: tuple[int, int, int]
) -> None:
    v = ROUNDED[name]
    given = launch_arguments(v, 3, shape=shape)
    threshold = given.get("threshold")
    expected = reference.ddim_step(
        given["x"], given["output"], given["table"][given["rows"]], given.get("noise"),
        v.prediction, v.clip, v.noise_first, None,
        None if threshold is None else threshold.view(-1, 1, 1, 1), v.rederive, None, v.posterior,
        given["rounding"],
    )  # fmt: skip
    results: Given = {
        k: torch.full_like(given["x"], torch.nan, device=DEVICE) for k in ("out", "x0")
    }
    on_device: Given = {k: t.to(DEVICE) if isinstance(t, Tensor) else t for k, t in given.items()}
    fastddim_kernels.ddim_step(**on_device | results)
    for got, wanted in zip(results.values(), expected, strict=True):
        assert same(got.cpu(), wanted)


@pytest.mark.parametrize("size", ["its own shape", "odd"])
@pytest.mark.parametrize("name", PHILOX)
def test_every_variants_noise_is_that_of_the_contract(name: str, size: str) -> None:
    given = arguments(name, size)
    z = kernel_noise(given)
    assert z is not None
    assert_is_the_contract(contract_error(given, z, tuple(range(len(z)))))


@pytest.mark.parametrize("name", PHILOX)
def test_the_steps_noise_is_what_normal_writes(name: str) -> None:
    given = arguments(name)
    z = kernel_noise(given)
    assert z is not None
    written = torch.full(z.shape, float("nan"), device=DEVICE)
    torch.ops.fastddim.normal_(written, given["seeds"], rows_of(given), STEP_STREAM)
    assert torch.equal(z, written)


def test_the_initial_noise_is_that_of_the_contract() -> None:
    seeds, rows = torch.tensor([0, 2**32 - 1, 2**63 - 1]), torch.zeros(3, dtype=torch.int32)
    for n in (LARGE // 4, 33):
        x_T = initial_noise(seeds, (3, n), DEVICE)
        truth = torch.from_numpy(normals(seeds.numpy(), rows.numpy(), n, INITIAL_STREAM))
        assert_is_the_contract((x_T.cpu().double() - truth.double()).abs())


# Not annotated: compiled, Triton takes `Any` for a global variable, and refuses it.
def _radii_kernel(a_ptr, b_ptr, out_ptr, n, BLOCK: tl.constexpr, PORTABLE: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    a = tl.load(a_ptr + offsets, mask=mask).to(tl.uint32, bitcast=True)
    b = tl.load(b_ptr + offsets, mask=mask).to(tl.uint32, bitcast=True)
    cosine, sine = box_muller(a, b, PORTABLE)  # pyright: ignore[reportGeneralTypeIssues]
    tl.store(out_ptr + offsets, cosine, mask=mask)
    tl.store(out_ptr + n + offsets, sine, mask=mask)


def drawn(words: Tensor, angles: Tensor) -> Tensor:
    """(2, n): what the kernel's Box–Muller makes of these words, given as int64."""
    out = torch.full((2, len(words)), float("nan"), device=DEVICE)
    # As int32 of the same bits: few of torch's operations know uint32.
    a, b = ((w - (w >= 2**31) * 2**32).to(torch.int32) for w in (words, angles))
    kernel: Any = triton.jit(_radii_kernel)
    kernel[(-(-len(words) // 4096),)](
        a, b, out, len(words), BLOCK=4096, PORTABLE=geometry.portable(), enable_fp_fusion=False
    )
    return out


def test_every_float_from_a_half_to_one_gives_a_normal() -> None:
    # u is the word as a float32, times 2⁻³²: from 2³¹ on such floats are 256 apart, and the last
    # words round to 2³², where u = 1 and an approximate −2·ln u may be negative.
    words = (2**31 + 256 * torch.arange(2**23 + 1, device=DEVICE)).clamp(max=2**32 - 1)
    assert len(words.to(torch.float32).unique()) == 2**23 + 1
    g = torch.Generator(DEVICE).manual_seed(0)
    angles = torch.randint(2**32, words.shape, generator=g, device=DEVICE)
    z = drawn(words, angles).double()
    assert z.isfinite().all()
    r = (-2 * (words.to(torch.float32).double() / 2**32).log()).clamp(min=0).sqrt()
    turn = 2 * math.pi * angles.double() / 2**32
    truth = torch.stack([r * turn.cos(), r * turn.sin()])
    assert (z - truth).abs().max() <= NORMAL_MAX
    # Beyond a standard deviation nothing cancels any more.
    far = words < 0.6 * 2**32
    assert (z - truth)[:, far].abs().max() <= NORMAL_ATOL


def test_the_smallest_and_the_largest_words_give_a_normal() -> None:
    ends = torch.tensor([0, 1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 129, 2**32 - 1])
    words, angles = (w.flatten().to(DEVICE) for w in torch.meshgrid(ends, ends, indexing="ij"))
    z = drawn(words, angles)
    assert z.isfinite().all()
    largest = math.sqrt(2 * 33 * math.log(2))
    assert abs(z.abs().max().item() - largest) <= NORMAL_MAX


@pytest.mark.parametrize(
    "shape",
    [
        *[(3, 4, 8, 8), (3, 4, 5, 7), (2, 8, 5, 7), (3, 3, 8, 8), (3, 3, 5, 7), (2, 1, 5, 7)],
        *[(2, 16, 8, 8), (2, 12, 4, 6), (3, 2, 8, 8), (3, 5, 8, 8)],
    ],
)
def test_channels_last_and_contiguous_draw_the_same_noise(shape: tuple[int, ...]) -> None:
    given = plain(shape, seeds=torch.arange(shape[0], device=DEVICE) + 2**33)
    of_last = moved(given, last)
    z, z_last = kernel_noise(given), kernel_noise(of_last)
    assert z is not None
    assert z_last is not None
    assert torch.equal(z, z_last)
    assert torch.equal(fastddim.ddim_step(**given)[0], fastddim.ddim_step(**of_last)[0])


@pytest.mark.parametrize(
    "shape",
    [(2, 3, 5, 7), (2, 3, 8, 8), (2, 16, 8, 8), (2, 2, 5, 8), (65, 3, 64, 64), (65, 4, 64, 64)],
)
def test_layouts_may_be_mixed(shape: tuple[int, ...]) -> None:
    given = plain(shape, torch.bfloat16)
    want = by_reference(given, None)[0]
    given["noise"] = torch.zeros_like(given["x"])
    for name in ("x", "output", "noise"):
        assert torch.equal(fastddim.ddim_step(**moved(given, last, (name,)))[0], want)
    del given["noise"]
    given["seeds"] = torch.arange(shape[0], device=DEVICE) + 2**33
    for names in (("x",), ("output",), ("x", "output")):
        assert_is_the_reference(moved(given, last, names))


@pytest.mark.parametrize("blocks", [(16, 1), (128, 2), (512, 1), (256, 4)])
@pytest.mark.parametrize(
    "name",
    [
        "epsilon philox",
        "epsilon odd philox",
        "epsilon last philox",
        "epsilon last philox rgb",
        "epsilon last philox odd",
        "epsilon mixed bf16",
        "epsilon philox last mixed rgb",
    ],
)
def test_results_do_not_depend_on_blocks_and_parts(
    monkeypatch: pytest.MonkeyPatch, name: str, blocks: tuple[int, int]
) -> None:
    v = VARIANTS[name]
    side = (64, 64) if v.shape[1] % 4 == 0 else (53, 63)
    given = step_arguments(v, 2, DEVICE, shape=(v.shape[0], *side))
    want = fastddim.ddim_step(**given)[0]
    chosen: list[int] = []

    def block(*_: Any, **__: Any) -> tuple[int, int]:
        chosen.append(1)
        return blocks

    out = torch.full_like(want, float("nan"))
    with monkeypatch.context() as patch:
        patch.setattr(geometry, "block_of", block)
        forget()  # A kept launch has its blocks already.
        fastddim.ddim_step(**given, out=out)
    forget()
    assert chosen
    assert torch.equal(out, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [36, 37])
def test_memory_may_begin_anywhere(dtype: torch.dtype, n: int) -> None:
    for offset in (1, 2, 3, 5):
        given = plain((2, n), dtype)

        def shifted(tensor: Tensor, offset: int = offset) -> Tensor:
            room = torch.full((tensor.numel() + 16,), float("nan"), device=DEVICE)
            room = room.to(tensor.dtype)
            return room[offset : offset + tensor.numel()].view_as(tensor).copy_(tensor)

        want = by_reference(given, None)
        room = torch.full((2 * n + 16,), 12345.0, device=DEVICE)
        out = room[offset : offset + 2 * n].view(2, n)
        _, x0 = fastddim.ddim_step(**moved(given, shifted), out=out)
        assert x0 is not None
        assert torch.equal(out, want[0])
        assert torch.equal(x0, want[1])
        assert (room[:offset] == 12345).all(), "the kernel wrote before its tensor"
        assert (room[offset + 2 * n :] == 12345).all(), "the kernel wrote beyond its tensor"


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("shape", [(4, 2, 2), (3, 1, 3)])
def test_more_samples_than_a_grids_other_axes_hold(shape: tuple[int, ...], layout: str) -> None:
    batch = 65_537
    given = plain((batch, *shape), seeds=torch.arange(batch, device=DEVICE))
    given["rows"] = torch.arange(batch, dtype=torch.int32, device=DEVICE) % 50
    if layout == "channels last":
        given = moved(given, last)
    assert_is_the_reference(given)
    z = kernel_noise(given)
    assert z is not None
    assert_is_the_contract(contract_error(given, z, (0, 1, 65_535, 65_536)))


def needs(gibibytes: int) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gibibytes:
        pytest.skip(f"needs {gibibytes} GiB of the GPU's memory, {free:.0f} are free")


@pytest.mark.parametrize(
    ("batch", "n"), [(1, 2**31 + 1028), (1, 2**31 + 1029), (2**15 + 1, 2**16 + 4)]
)
def test_tensors_over_two_to_the_31_elements(batch: int, n: int) -> None:
    needs(32)
    assert_long_tensors_are_the_reference(batch, n, chunk=2**27)


def assert_long_tensors_are_the_reference(batch: int, n: int, chunk: int) -> None:
    given = plain((batch, n), torch.bfloat16)
    if batch > 1:
        given["rows"] = torch.arange(batch, dtype=torch.int32, device=DEVICE) % 50
    x_s, _ = fastddim.ddim_step(**given, want_x0=False)
    samples, width = max(1, chunk // n), min(n, chunk)
    for b in range(0, batch, samples):
        for start in range(0, n, width):
            here = slice(b, b + samples), slice(start, start + width)
            part = {name: given[name][here] for name in ("x", "output")}
            part |= {"rows": given["rows"][here[0]], "table": given["table"]}
            assert torch.equal(x_s[here], by_reference(part, None)[0])


def test_noise_of_a_sample_over_two_to_the_31_elements() -> None:
    needs(32)
    assert_long_noise_is_the_contract(2**31 + 1028, (0, 2**31 - 32, 2**31 + 1028 - 64))


def assert_long_noise_is_the_contract(n: int, places: tuple[int, ...]) -> None:
    x, seeds = torch.zeros(1, n, device=DEVICE), torch.tensor([2**40 + 1], device=DEVICE)
    table = torch.tensor([[1.0, 1, 1, 1, 0, 1, 0]], device=DEVICE)
    z, _ = fastddim.ddim_step(x, x, table, on_row(0, 1), seeds, want_x0=False)
    for first in places:
        truth = normals(seeds.cpu().numpy(), on_row(0, 1).cpu().numpy(), 64, STEP_STREAM, first)
        here = z[:, first : first + 64].cpu()
        assert (here - torch.from_numpy(truth)).abs().max() <= NORMAL_MAX


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where all this is interpreted
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("bound", [{}, {"clip": 1.0}, {"clip": 1.0, "rederive": True}])
def test_nan_and_infinity_come_out_as_eagers(prediction: str, bound: Given) -> None:
    # 1e-30 is above 2⁻¹⁰⁰, from where on the division is exact.
    special = [float("nan"), float("inf"), -float("inf"), 3e38, 1e-30, 0.0, 1.0, -2.0]
    values = torch.tensor(special, device=DEVICE)
    x, output = (t.reshape(1, 64) for t in torch.meshgrid(values, values, indexing="ij"))
    for row in (0, 49):
        for n in (64, 63):
            given = plain((1, n), row=row, prediction=prediction, **bound)
            given |= {"x": x[:, :n].contiguous(), "output": output[:, :n].contiguous()}
            given["next_input"] = torch.empty(1, n, dtype=torch.bfloat16, device=DEVICE)
            assert_is_the_reference(given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_half_outputs_are_widened_and_nothing_else(dtype: torch.dtype, prediction: str) -> None:
    for n in (64, 63):
        given = plain((3, n), dtype, prediction=prediction, clip=1.0)
        assert_is_the_reference(given)
