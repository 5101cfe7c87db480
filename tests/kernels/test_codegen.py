"""What the compilers make of the kernels, read from the machine code: no GPU is needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
import triton

from benchmarks import codegen
from benchmarks.codegen import NAMES, STEPS, file_name, spans, table
from benchmarks.variants import ODD, ROUNDED, SERVED, VARIANTS, Variant

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "benchmarks" / "results" / "codegen.json"
COLUMNS = [
    "variant", "arch", "dtype", "regs", "stack", "shared", "local", "sass_per_element",
    "bytes_per_element", "budget_share", "load_widths", "store_widths",
]  # fmt: skip


@dataclass(frozen=True)
class Code:
    """One kernel: its row, how often each instruction stands in it, and Triton's own form of it."""

    name: str
    row: dict[str, Any]
    elements: int  # of a thread
    sass: dict[str, int]
    ptx: dict[str, int]
    ttir: str

    @property
    def v(self) -> Variant:
        """The variant; the kernel that fills x_T draws noise, and writes it."""
        return STEPS.get(self.name, Variant("x_T", noise="philox"))

    @property
    def pairs(self) -> int:
        """Box–Muller pairs of a thread; two are drawn by one call of Philox."""
        return self.elements // 2 if self.v.noise == "philox" else 0

    @property
    def divisions(self) -> int:
        """Divisions of a thread: x0 or ε by a root, and by the threshold."""
        predicted = self.v.prediction == "epsilon"
        derived = self.v.rederive or self.v.prediction == "sample"
        ends = self.name == "epsilon odd"  # one more element, at an end of its sample
        return (self.elements + ends) * (predicted + derived + self.v.threshold)

    @property
    def scalar(self) -> bool:
        """Whether the layout leaves no four elements side by side to every access."""
        return (self.v.shape == ODD and self.v.noise == "philox") or self.name == "normal"

    @property
    def turned(self) -> bool:
        """Whether the noise, or the output, goes through shared memory: four channels of pixels."""
        noise_turned = self.v.channels_last and self.v.noise == "philox"
        return self.v.shape == (4, 64, 64) and (noise_turned or self.v.mixed)


def compiled(out: Path, arch: str, only: tuple[str, ...] = ()) -> list[Code]:
    """By the command, in a process of its own: the interpreter, once on, is on for good."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # What is there stays: it may name another Triton.
    paths = [str(ROOT), str(ROOT / "kernels" / "torch-ext"), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-m", "benchmarks.codegen", "--out", str(out), "--arch", arch]
    command += ["--only", ",".join(only)] if only else []
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    details, found = json.loads((out / "details.json").read_text()), []
    for row in json.loads((out / "codegen.json").read_text()):
        name = file_name(row["variant"], arch)
        assert (out / f"{name}.{'amdgcn' if arch == 'gfx942' else 'cubin'}").stat().st_size > 0
        ttir, of = (out / f"{name}.ttir").read_text(), details[name]
        elements = of["elements_per_thread"]
        found.append(Code(row["variant"], row, elements, of["sass"], of["ptx"], ttir))
    assert [c.name for c in found] == list(only or NAMES)
    return found


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            (
                "90",
                "epsilon",
                "epsilon x0 clip",
                "epsilon odd",
                "epsilon bf16 rounded",
            ),
            id="sm_90, four variants",
        ),
        *(pytest.param((a,), id=f"sm_{a}", marks=pytest.mark.slow) for a in ("80", "90", "100")),
    ],
)
def code(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Code]:
    """The machine code of one architecture."""
    arch, *only = request.param
    return compiled(tmp_path_factory.mktemp("codegen"), arch, tuple(only))


SHARED = ("LDS", "STS", "BAR")


def test_no_stack_no_spills_and_no_call(code: list[Code]) -> None:
    for c in code:
        assert (c.row["stack"], c.row["local"]) == (0, 0), c.name
        assert not starting(c.sass, "LDL", "STL", "CALL", "RET", "WARPSYNC"), c.name


def test_lanes_exchange_noise_only_in_odd_samples_channels_last(code: list[Code]) -> None:
    for c in code:
        exchanged = 2 * c.elements if c.name == "epsilon last philox odd" else 0
        assert starting(c.sass, "SHFL") == exchanged, c.name


def test_shared_memory_only_where_four_channels_are_turned(code: list[Code]) -> None:
    for c in code:
        if c.turned:
            assert 0 < c.row["shared"] <= 8192, c.name
            assert all(starting(c.sass, name) for name in SHARED), c.name
        else:
            assert c.row["shared"] == 0, c.name
            assert not starting(c.sass, *SHARED, "LDSM"), c.name


def test_nothing_jumps_so_that_each_instruction_is_issued_once(code: list[Code]) -> None:
    for c in code:
        assert not starting(c.sass, "BRA", "BRX", "JMP", "BSSY"), c.name


def test_at_most_64_registers(code: list[Code]) -> None:
    for c in code:
        assert c.row["regs"] <= 64, c.name


def test_at_most_24_instructions_an_element_and_48_with_seeds(code: list[Code]) -> None:
    for c in code:
        # A second output in a 16-bit type is widened by two instructions, and weighed by three.
        most = 48 if c.pairs else 28 if c.v.guidance else 24
        most = 35 if c.name == "epsilon last philox rgb" else most
        # One part takes more instructions than four, and less time on an H200: ``block_of``.
        most = 55 if c.pairs and c.v.guidance else most
        most += ROUNDING * c.v.rounds
        assert c.row["sass_per_element"] <= most, c.name


# The output in bfloat16 is widened, and the next input rounded. In four parts, as the plain step
# takes its tile, a step of order 2 would spill registers.
SECOND = {
    "epsilon order 2": ("epsilon", 8),
    "epsilon philox order 2": ("epsilon philox", 8),
    "v bf16 order 2 next": ("v", 9),
    "epsilon philox last order 2": ("epsilon last philox", 12),
}


def test_order_2_adds_eight_instructions_an_element_or_few_more(code: list[Code]) -> None:
    assert set(SECOND) == {name for name, v in VARIANTS.items() if v.order == 2}
    found = {c.name: c.row["sass_per_element"] for c in code}
    # The ptxas of Triton 3.6 takes one instruction more for 24 elements on sm_100, where fastddim
    # warns of this Triton in any case.
    slack = 1 / 24 if OLD_TRITON and code[0].row["arch"] == "100" else 0
    for name in found.keys() & SECOND:
        plain, most = SECOND[name]
        assert found[name] <= found[plain] + most + slack, name


ROUNDING = 12
"""The most instructions an element by which a step that rounds exceeds the same step in float32."""


def test_an_engines_table_adds_an_instruction_an_element(code: list[Code]) -> None:
    found = {c.name: c.row["sass_per_element"] for c in code}
    for name in found.keys() & SERVED.keys():
        assert found[name] <= found["epsilon philox"] + 1, name


def test_rounding_adds_at_most_12_instructions_an_element(code: list[Code]) -> None:
    found = {c.name: c.row["sass_per_element"] for c in code}
    for name in found.keys() & ROUNDED.keys():
        plain = name.removesuffix(" bf16 rounded").removesuffix(" fp16 rounded")
        assert found[name] <= found[plain] + ROUNDING, name


def test_a_step_issues_at_most_three_quarters_of_a_copys_room(
    code: list[Code],
) -> None:
    for c in code:
        if c.name != "normal":  # it only writes: arithmetic is all its time, once a run
            # A step of two divisions that moves 6 bytes an element leaves a B200 little room.
            full = c.v.rounds and c.v.rederive and c.row["arch"] == "100"
            assert c.row["budget_share"] <= (0.95 if full else 0.75), c.name


def test_each_access_is_as_wide_as_four_elements(code: list[Code]) -> None:
    for c in code:
        v, n = c.v, c.elements // 4
        halves = v.dtype != torch.float32
        said = 2 if v.guidance else 1
        loads = {"128": n * (1 + (v.noise == "tensor") + (v.order == 2)), "64": 0}
        stores = {"128": n * (1 + v.want_x0), "64": 0}
        if v.rounds:
            loads, stores = ({"128": 0, "64": wide["128"]} for wide in (loads, stores))
        loads["64" if halves else "128"] += n * said
        stores["64" if halves else "128"] += n * v.next_inputs
        if c.name == "normal":
            loads, stores = {"64": 0, "32": 0}, {"32": c.elements}
        elif c.scalar:
            loads, stores = ({"32": 4 * wide["128"]} for wide in (loads, stores))
        elif c.name == "epsilon odd":
            # Lanes take the ends of a sample one by one.
            loads, stores = loads | {"32": 2}, stores | {"32": 1}
        elif c.name == "learned last rgb":
            # Twelve of 24 elements that follow one another: of six accesses two are needed by half,
            # and one of them by a word.
            loads = {"128": n + 2, "64": 2, "32": 2}
        # What belongs to the block: the row, what the equation needs of it, w, s, 1/s and the seed.
        found = dict(c.row["load_widths"])
        scalars = found.pop("32") - loads.pop("32", 0)
        most = 7 + v.order + v.of_many + 2 * v.rounds
        most += 2 * bool(c.pairs) + v.guidance + 2 * v.threshold
        assert 1 <= scalars <= most, c.name
        assert found == {bits: k for bits, k in loads.items() if k}, c.name
        assert c.row["store_widths"] == {bits: k for bits, k in stores.items() if k}, c.name


OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)


def test_no_multiply_is_contracted_into_an_add(code: list[Code]) -> None:
    if OLD_TRITON and code[0].row["arch"] == "100":
        pytest.xfail("ptxas 12.9 contracts packed multiplies and adds, though told not to")
    # What is fused is written so: twice in a division, twice in a pair of normals.
    for c in code:
        written = 2 * c.divisions + 2 * c.pairs
        # Blackwell has instructions that do two at once.
        single = starting(c.ptx, "fma.rn.f32")
        assert single + starting(c.ptx, "fma.rn.f32x2") == written, c.name
        # An A100 subtracts bfloat16 numbers by an fma that multiplies by −1.
        if not (c.v.rounds and c.row["arch"] == "80"):
            assert starting(c.ptx, "fma.") == single, c.name
        assert starting(c.sass, "FFMA") + starting(c.sass, "FFMA2") == written, c.name
        # The kernel that fills x_T divides integers, once a program; the step multiplies instead.
        assert starting(c.ptx, "div.") == (c.name == "normal"), c.name


def test_philox_multiplies_wide_and_box_muller_approximates(code: list[Code]) -> None:
    for c in code:
        calls = c.pairs // 2
        # Ten rounds of two; what does not depend on the element is not computed for each.
        assert c.ptx.get("mul.wide.u32", 0) >= 16 * calls, c.name
        # One for the block's sample, up to three for where it begins.
        others = starting(c.ptx, "mul.hi", "mul.lo.s64", "mul.lo.u64")
        assert others <= 4, c.name
        for function in ("lg2", "sin", "cos", "sqrt"):
            assert starting(c.ptx, f"{function}.") == c.pairs, c.name
            assert starting(c.ptx, f"{function}.approx") == c.pairs, c.name


def test_bounds_keep_nan_and_nothing_else_is_bounded_so(code: list[Code]) -> None:
    for c in code:
        bounded = c.elements if c.v.clip is not None or c.v.threshold else 0
        assert starting(c.ptx, "min.NaN.f32") == bounded, c.name
        assert starting(c.ptx, "max.NaN.f32") == bounded, c.name
        # The one of Box–Muller, which must not keep NaN; a threshold's, of the block.
        assert starting(c.ptx, "max.f32") == c.pairs, c.name
        assert starting(c.ptx, "min.f32") == c.v.threshold, c.name


def test_a_block_is_found_in_64_bits(code: list[Code]) -> None:
    for c in code:
        moves = scalar_moves(c.ttir)
        constants = set(re.findall(r"(%[\w-]+) = arith\.constant ", c.ttir))
        assert {kind for _, by, kind in moves if by not in constants} == {"i64"}, c.name
        offsets = set(re.findall(TENSOR_MOVE, c.ttir))
        # Offsets of 32 bits count from where a block begins, which its pointers have moved to.
        apart = c.name == "epsilon last philox odd"
        assert offsets == {"i32" if apart else "i64"}, c.name
        assert not apart or "%out_ptr" in {root for root, _, _ in moves}, c.name
        assert not overflowing(c.ttir), c.name


TENSOR_MOVE = r"tt\.addptr .* : tensor<[\dx]+!tt\.ptr<\w+>>, tensor<[\dx]+(i\d+)>"


def scalar_moves(ttir: str) -> list[tuple[str, str, str]]:
    """(argument, offset, its type) of each move of a pointer that is not a tensor of them."""
    move = r"(%[\w-]+) = tt\.addptr (%[\w-]+), (%[\w-]+) : !tt\.ptr<\w+>, (i\d+)"
    root: dict[str, str] = {}
    found = []
    for result, pointer, offset, kind in re.findall(move, ttir):
        root[result] = root.get(pointer) or pointer
        found.append((root[result], offset, kind))
    return found


def overflowing(ttir: str) -> list[str]:
    """Products of two variables taken in 32 bits and only then widened."""
    multiply = r"(%[\w-]+) = arith\.muli (%[\w-]+), (%[\w-]+) : i32"
    constants = set(re.findall(r"(%[\w-]+) = arith\.constant ", ttir))
    products = {r for r, a, b in re.findall(multiply, ttir) if not {a, b} & constants}
    return [v for v in re.findall(r"arith\.extsi (%[\w-]+) : i32", ttir) if v in products]


def test_the_page_shows_the_committed_file() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    rows = json.loads(COMMITTED.read_text())
    assert table([row for row in rows if row["arch"] == "90"]) in page
    assert spans(rows) in page


@pytest.mark.slow
@pytest.mark.skipif(triton.__version__ != "3.7.1", reason="the page is of triton 3.7.1")
def test_the_committed_file_is_of_this_code(code: list[Code]) -> None:
    committed = {(row["variant"], row["arch"]): row for row in json.loads(COMMITTED.read_text())}
    again = "python -m benchmarks.codegen --out DIR, then DIR/codegen.json to benchmarks/results"
    for c in code:
        assert committed[c.name, c.row["arch"]] == c.row, again


def test_each_row_has_the_columns_of_the_table(code: list[Code]) -> None:
    for c in code:
        assert list(c.row) == COLUMNS


def starting(counts: dict[str, int], *prefixes: str) -> int:
    return sum(n for name, n in counts.items() if name.startswith(prefixes))


Refuse: TypeAlias = Callable[..., None]


@pytest.fixture
def refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Arguments are refused in one line that says so; what is refused compiles nothing."""

    def check(*arguments: str, said: tuple[str, ...]) -> None:
        monkeypatch.setattr(sys, "argv", ["codegen", *arguments])
        with pytest.raises(SystemExit, match="2"):
            codegen.main()
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert all(words in captured.err for words in said), captured.err

    return check


def test_codegen_refuses_to_run_interpreted(
    tmp_path: Path, refuses: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    refuses("--out", str(tmp_path / "a"), said=("TRITON_INTERPRET", "'1'"))
    assert not any(tmp_path.iterdir())


def test_codegen_refuses_nonsense_and_leaves_nothing_behind(
    tmp_path: Path, refuses: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    file = tmp_path / "file"
    file.write_text("kept")
    out = str(tmp_path / "a")
    refuses("--out", out, "--arch", "42", said=("--arch", "80, 90, 100", "'42'"))
    refuses("--out", out, "--arch", "", said=("--arch", "''"))
    refuses("--out", out, "--only", "epsilon,zeta", said=("--only", "'zeta'"))
    refuses("--out", str(file), said=("--out", str(file)))
    refuses("--out", str(file / "a"), said=("--out", str(file)))
    refuses("--out", "/proc/nothing", said=("--out", "/proc/nothing"))
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "kept"


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(SystemExit, match="2"):
        codegen.write(tmp_path / "taken", "text")
    assert capsys.readouterr().err.count("\n") == 1
    codegen.write(tmp_path / "free", "text")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["free", "taken"]


@pytest.mark.slow
def test_amd_compiles_without_scratch_or_spills(tmp_path: Path) -> None:
    for c in compiled(tmp_path, "gfx942"):
        assert (c.row["stack"], c.row["local"]) == (0, 0), c.name
        assert (c.row["shared"] > 0) == c.turned, c.name
        assert not starting(c.sass, "scratch_"), c.name
        # Lanes exchange values by ds_bpermute, which needs no LDS.
        exchanged = starting(c.sass, "ds_bpermute")
        assert c.turned or starting(c.sass, "ds_") == exchanged, c.name
        assert c.row["budget_share"] is None, c.name
        if not c.scalar:
            assert c.row["store_widths"]["64" if c.v.rounds else "128"] >= 1, c.name
