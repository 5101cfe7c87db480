"""Compiles the kernels for GPUs that need not be there; prints what the machine code says.

    python -m tests.compile_kernels 90 [variant ...]

One JSON object: variant → facts. Run apart from pytest: Triton's interpreter, if it is on in a
process, is on for good. ``gfx942`` in place of the number compiles for AMD.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastddim_kernels.noise import normal_kernel
from fastddim_kernels.step import ddim_step_kernel

BIN = Path(nvidia.__file__).parent / "bin"
NONE, TENSOR, PHILOX = 0, 1, 2


@dataclass(frozen=True)
class Variant:
    """One specialisation of the step's kernel, as the launcher asks for it."""

    prediction: int = 0
    noise: int = NONE
    vector: bool = True
    output: str = "fp32"
    clip: bool = False
    write_x0: bool = False
    noise_first: bool = True


VARIANTS = {
    "epsilon": Variant(),
    "epsilon scalar": Variant(vector=False, noise=PHILOX, write_x0=True),
    "epsilon x0 clip": Variant(write_x0=True, clip=True),
    "epsilon tensor last": Variant(noise=TENSOR, noise_first=False),
    "epsilon philox": Variant(noise=PHILOX),
    "epsilon philox bf16": Variant(noise=PHILOX, output="bf16", write_x0=True),
    "v tensor": Variant(prediction=1, noise=TENSOR),
    "v bf16": Variant(prediction=1, output="bf16"),
    "sample philox x0 clip": Variant(prediction=2, noise=PHILOX, write_x0=True, clip=True),
}


def compile_step(v: Variant, target: GPUTarget) -> Any:
    signature = dict.fromkeys(ddim_step_kernel.arg_names, "constexpr")
    pointers = {"x": "fp32", "output": v.output, "out": "fp32", "table": "fp32", "rows": "i32"}
    if v.noise == TENSOR:
        pointers["noise"] = "fp32"
    if v.noise == PHILOX:
        pointers["seeds"] = "i64"
    if v.write_x0:
        pointers["x0"] = "fp32"
    signature |= {f"{name}_ptr": f"*{dtype}" for name, dtype in pointers.items()}
    signature |= {"n_elements": "i32", "blocks_per_sample": "i32", "rows_stride": "i32"}
    signature["clip"] = "fp32"
    constants: dict[str, Any] = {n: None for n, kind in signature.items() if kind == "constexpr"}
    constants |= {
        "COLUMNS": 7,
        "PREDICTION": v.prediction,
        "NOISE": v.noise,
        "NOISE_FIRST": v.noise_first,
        "CLIP": v.clip,
        "WRITE_X0": v.write_x0,
        "VECTOR": v.vector,
        "PORTABLE": target.backend == "hip",
        "BLOCK_SIZE": 1024,
    }
    return compiled(ddim_step_kernel, signature, constants, target)


def compile_normal(target: GPUTarget) -> Any:
    signature = {
        "out_ptr": "*fp32",
        "seeds_ptr": "*i64",
        "rows_ptr": "*i32",
        "n_elements": "i32",
        "blocks_per_sample": "i32",
        "rows_stride": "i32",
        "stream": "i32",
        "BLOCK_SIZE": "constexpr",
        "PORTABLE": "constexpr",
    }
    constants = {"BLOCK_SIZE": 1024, "PORTABLE": target.backend == "hip"}
    return compiled(normal_kernel, signature, constants, target)


def compiled(
    fn: Any, signature: dict[str, str], constants: dict[str, Any], target: GPUTarget
) -> Any:
    # What torch allocates begins at a multiple of 16 bytes, and the launch says so.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(fn.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(fn, signature, constants, aligned)
    return triton.compile(
        source, target=target, options={"num_warps": 4, "enable_fp_fusion": False}
    )


def cuda_facts(kernel: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        sass = tool("nvdisasm", "-c", file.name)
    numbers = {k.lower(): int(n) for k, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    ptx = kernel.asm["ptx"]
    return numbers | {
        "sass": count(r"\b((?:LDG|STG|LDS|STS|LDL|STL|BAR|FFMA|CALL)[.\w]*)", sass),
        "ptx": count(r"^\s*(?:@%?!?\w+\s+)?([a-z]\w*(?:\.\w+)+)\s", ptx),
        "offsets": offsets(kernel.asm["ttir"]),
    }


def offsets(ttir: str) -> list[str]:
    """The integer types by which vectors of pointers are moved."""
    return sorted(set(re.findall(r"tt\.addptr .*, tensor<[^>]*x(i\d+)>", ttir)))


def amd_facts(kernel: Any) -> dict[str, Any]:
    code = kernel.asm["amdgcn"]
    wanted = r"\.(private_segment_fixed_size|group_segment_fixed_size|vgpr_spill_count):\s+(\d+)"
    numbers = {k: int(n) for k, n in re.findall(wanted, code)}
    return numbers | {"code": count(r"^\s*(global_\w+|scratch_\w+|ds_\w+)", code)}


def count(pattern: str, text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in re.findall(pattern, text, re.MULTILINE):
        found[name] = found.get(name, 0) + 1
    return found


def tool(name: str, *arguments: str) -> str:
    command = [str(BIN / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main(arch: str, *names: str) -> None:
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch), 32)
    facts = amd_facts if amd else cuda_facts
    found = {
        name: facts(
            compile_normal(target) if name == "normal" else compile_step(VARIANTS[name], target)
        )
        for name in names or (*VARIANTS, "normal")
    }
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
