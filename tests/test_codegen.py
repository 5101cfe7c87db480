"""What the compilers make of the kernels, read from the machine code: no GPU is needed."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeAlias

import pytest

Facts: TypeAlias = dict[str, Any]
ROOT = Path(__file__).parents[1]
ELEMENTS = 8  # of a thread: 1024 of a block by 4 warps


@functools.cache
def machine_code(arch: str, *variants: str) -> dict[str, Facts]:
    """The facts of each variant, from a process in which the interpreter is off."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels" / "torch-ext")])
    command = [sys.executable, "-m", "tests.compile_kernels", arch, *variants]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, Facts] = json.loads(run.stdout)
    return found


@pytest.fixture(
    params=[
        pytest.param(("90", "epsilon", "epsilon philox bf16"), id="sm_90, two variants"),
        *(pytest.param((a,), id=f"sm_{a}", marks=pytest.mark.slow) for a in ("80", "90", "100")),
    ]
)
def code(request: pytest.FixtureRequest) -> dict[str, Facts]:
    """The machine code of one architecture."""
    return machine_code(*request.param)


def test_no_stack_no_spills_no_shared_memory_no_barrier(code: dict[str, Facts]) -> None:
    for name, facts in code.items():
        assert (facts["stack"], facts["local"], facts["shared"]) == (0, 0, 0), name
        assert not starting(facts["sass"], "LDS", "STS", "LDL", "STL", "BAR", "CALL"), name


def test_at_most_64_registers(code: dict[str, Facts]) -> None:
    for name, facts in code.items():
        assert facts["reg"] <= 64, name


def test_vectors_are_128_bits_of_float32_and_64_of_bfloat16(code: dict[str, Facts]) -> None:
    for name, facts in code.items():
        if name == "normal" or "scalar" in name:
            continue
        loads = 1 + ("bf16" not in name) + ("tensor" in name)  # x, output, noise
        stores = 1 + ("x0" in name or name == "epsilon philox bf16")
        sass = starting(facts["sass"], "LDG.E.128"), starting(facts["sass"], "STG.E.128")
        assert sass == (loads * ELEMENTS // 4, stores * ELEMENTS // 4), name
        halves = starting(facts["sass"], "LDG.E.64") - ("philox" in name)  # a seed has 64 bits
        assert halves == ("bf16" in name) * ELEMENTS // 4, name
        assert starting(facts["sass"], "STG") == stores * ELEMENTS // 4, name


def test_no_multiply_is_contracted_into_an_add(code: dict[str, Facts]) -> None:
    # What is fused is written so: the two multiply-adds of an exact division.
    for name, facts in code.items():
        divides = name.startswith(("epsilon", "sample"))
        assert starting(facts["ptx"], "fma.") == 2 * ELEMENTS * divides, name
        assert starting(facts["sass"], "FFMA") == 2 * ELEMENTS * divides, name
        assert starting(facts["ptx"], "div.") == 1, f"{name}: the program's, of integers"


def test_philox_multiplies_wide_and_box_muller_approximates(code: dict[str, Facts]) -> None:
    for name, facts in code.items():
        quads = ELEMENTS // 4 if "philox" in name or "scalar" in name or name == "normal" else 0
        ptx = facts["ptx"]
        # Ten rounds of two; what does not depend on the element is not computed for each.
        assert ptx.get("mul.wide.u32", 0) >= 16 * quads, name
        assert starting(ptx, "mul.hi", "mul.lo.s64", "mul.lo.u64") <= 3 * quads, name
        for function in ("lg2", "sin", "cos"):
            assert starting(ptx, f"{function}.") == starting(ptx, f"{function}.approx"), name
            assert starting(ptx, f"{function}.approx") == 2 * quads, name


def test_clamp_keeps_nan(code: dict[str, Facts]) -> None:
    for name, facts in code.items():
        clips = ELEMENTS if "clip" in name else 0
        assert starting(facts["ptx"], "min.NaN.f32") == clips, name
        assert starting(facts["ptx"], "max.NaN.f32") == clips, name


def test_offsets_are_64_bits_wide(code: dict[str, Facts]) -> None:
    for name, facts in code.items():
        assert facts["offsets"] == ["i64"], name


@pytest.mark.slow
def test_amd_compiles_without_scratch_or_spills() -> None:
    for name, facts in machine_code("gfx942").items():
        assert facts["private_segment_fixed_size"] == 0, name
        assert facts["vgpr_spill_count"] == 0, name
        assert not starting(facts["code"], "scratch_", "ds_"), name
        if "scalar" not in name and name != "normal":
            assert facts["code"]["global_store_dwordx4"] >= 1, name


def starting(counts: dict[str, int], *prefixes: str) -> int:
    return sum(n for name, n in counts.items() if name.startswith(prefixes))
