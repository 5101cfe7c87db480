"""Compiles every variant ahead of time and counts its machine code; this needs no GPU.

    python -m benchmarks.codegen --out DIR                  # sm_80, sm_90 and sm_100
    python -m benchmarks.codegen --out DIR --arch 90,gfx942 --only "epsilon,v philox bf16 next"

The launcher is called on tensors without content, and Triton's own dispatch compiles the kernel for
a GPU that need not exist. DIR gets ``codegen.json`` with one row for each variant and architecture,
``details.json`` with the count of each instruction, and ``<variant>-<arch>.cubin`` beside its
``.ttir``, ``.ptx`` and ``.sass``.

Accesses are counted in the machine code. The loads of 32 bits include a block's scalars: the row
and its factors, guidance and thresholds, and the two words of the seed. For AMD (gfx942) the
columns are vector registers, bytes of scratch, bytes of LDS, and spilled registers; there is no
budget.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget

from benchmarks.variants import ROUNDED, SERVED, VARIANTS, launch_arguments
from fastddim_kernels import geometry, launch
from fastddim_kernels.layout import block_channels, layout_of

BIN = Path(nvidia.__file__).parent / "bin"
NORMAL = "normal"
STEPS = VARIANTS | SERVED | ROUNDED
NAMES = (*STEPS, NORMAL)
BATCH = 512
"""Batch of a large launch: 2²³ elements of four channels of 64², so the largest blocks are used."""
SLOTS_PER_BYTE = {"80": 11.0, "90": 7.75, "100": 5.2}
"""Thread instructions that an A100, an H200 and a B200 can issue while a copy moves one byte."""
ARCHS = (*SLOTS_PER_BYTE, "gfx942")
COLUMNS = {
    "variant": "variant",
    "arch": "arch",
    "regs": "regs",
    "stack": "stack",
    "shared": "shared",
    "local": "local",
    "sass_per_element": "SASS/el",
    "bytes_per_element": "bytes/el",
    "budget_share": "budget",
    "load_widths": "loads (bits×times)",
    "store_widths": "stores",
}
TEXT = ("variant", "load_widths", "store_widths")

Row = dict[str, Any]


class Driver:
    """The part of a driver that Triton's dispatch needs to compile; it cannot launch."""

    def __init__(self, arch: str) -> None:
        self.device = ARCHS.index(arch)  # dispatch caches compiled kernels by device
        amd = arch.startswith("gfx")
        self.target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch), 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


class Compiler:
    """Replaces the launcher's kernel: compiles it where the launcher would launch it."""

    kernel: Any
    elements: int
    """Elements per thread."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int]) -> Any:
        def compiled(*args: Any, **options: Any) -> None:
            self.kernel = self.function.warmup(*args, grid=grid, **options)
            threads = options["num_warps"] * self.kernel.metadata.target.warp_size
            block = options.get("BLOCK_SIZE")
            if block is None:
                channels = options["CHANNELS"]
                width = block_channels(channels, layout_of(channels, options["FOURS"]))
                block = options["QUADS"] * options["PARTS"] * 4 * width
            self.elements = block // threads

        return compiled


def compiled(name: str, arch: str) -> Compiler:
    """The kernel that the launcher launches for this variant on this architecture."""
    driver: Any = Driver(arch)
    triton.runtime.driver.set_active(driver)
    normal = name == NORMAL
    kernel = "normal_kernel" if normal else "ddim_step_kernel"
    compiler = Compiler(getattr(launch, kernel))
    portable = arch.startswith("gfx")
    with (
        patch.object(launch, kernel, compiler),
        patch.object(geometry, "portable", lambda: portable),
    ):
        if normal:
            x = torch.empty(BATCH, 4, 64, 64, device="meta")
            seeds = torch.empty(BATCH, dtype=torch.int64, device="meta")
            launch.normal_(x, seeds, seeds[:1].int().expand(BATCH), 1)
        else:
            launch.ddim_step(**launch_arguments(STEPS[name], BATCH, "meta"))
    return compiler


def row_of(name: str, arch: str, facts: dict[str, int], sass: Counter[str], elements: int) -> Row:
    """A table row; ``sass`` counts a thread's instructions for its ``elements`` elements."""
    v = STEPS.get(name)
    per_element = round(sass.total() / elements, 2)
    moved = v.bytes_per_element if v else 4
    slots = SLOTS_PER_BYTE.get(arch)
    return {
        "variant": name,
        "arch": arch,
        "dtype": str(v.dtype if v else torch.float32).removeprefix("torch."),
        **facts,
        "sass_per_element": per_element,
        "bytes_per_element": moved,
        "budget_share": slots and round(per_element / (moved * slots), 3),
        "load_widths": widths(sass, "LDG", "global_load", "buffer_load"),
        "store_widths": widths(sass, "STG", "global_store", "buffer_store"),
    }


def instructions(sass: str) -> Counter[str]:
    """Count of each instruction up to the last exit; the rest is padding."""
    names = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)
    if not names:  # AMD's assembly
        names = re.findall(r"^\s+([a-z]+_[a-z]\w*)", sass, re.MULTILINE)
    last = max(i for i, name in enumerate(names) if name.startswith(("EXIT", "s_endpgm")))
    return Counter(names[: last + 1])


def widths(sass: Counter[str], *access: str) -> dict[str, int]:
    """{bits: accesses of global memory}, widest first."""
    found: Counter[int] = Counter()
    for name, n in sass.items():
        if name.startswith(access):
            bits = re.search(r"\.[US]?(8|16|64|128|256)\b", name)
            dwords = re.search(r"dwordx(\d)", name)
            narrow = 16 if "short" in name else 8 if "byte" in name else 32
            found[int(bits[1]) if bits else 32 * int(dwords[1]) if dwords else narrow] += n
    return {str(bits): n for bits, n in sorted(found.items(), reverse=True)}


def disassembled(cubin: bytes) -> tuple[str, dict[str, int]]:
    """The SASS, and the registers and bytes of memory that the machine code needs."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run(
                [str(BIN / tool), option, file.name], check=True, capture_output=True, text=True
            ).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    names = {"regs": "REG", "stack": "STACK", "shared": "SHARED", "local": "LOCAL"}
    return sass, {name: found[key] for name, key in names.items()}


def amd_facts(code: str) -> dict[str, int]:
    """The registers and bytes of memory of AMD's assembly."""
    names = {
        "regs": "vgpr_count",
        "stack": "private_segment_fixed_size",
        "shared": "group_segment_fixed_size",
        "local": "vgpr_spill_count",
    }
    found = dict(re.findall(r"^\s+\.(\w+):\s+(\d+)", code, re.MULTILINE))
    return {name: int(found[key]) for name, key in names.items()}


def file_name(variant: str, arch: str) -> str:
    return f"{variant.replace(' ', '-')}-{arch}"


def compile_to(out: Path, name: str, arch: str) -> tuple[Row, dict[str, Any]]:
    """Compiles one variant, writes its files, and returns its row and its details."""
    compiler = compiled(name, arch)
    asm, elements = compiler.kernel.asm, compiler.elements
    files: dict[str, str | bytes] = {"ttir": asm["ttir"]}
    if "cubin" in asm:
        sass, facts = disassembled(asm["cubin"])
        files |= {"ptx": asm["ptx"], "sass": sass, "cubin": asm["cubin"]}
    else:
        sass, facts = asm["amdgcn"], amd_facts(asm["amdgcn"])
        files |= {"amdgcn": sass}
    facts["shared"] += compiler.kernel.metadata.shared  # dynamic shared memory, beside the static
    for kind, content in files.items():
        write(out / f"{file_name(name, arch)}.{kind}", content)
    counts = instructions(sass)
    ptx = re.findall(
        r"^\s*(?:@%?!?\w+\s+)?([a-z]\w*(?:\.\w+)+)\s", asm.get("ptx", ""), re.MULTILINE
    )
    details = {"elements_per_thread": elements, "sass": counts, "ptx": Counter(ptx)}
    return row_of(name, arch, facts, counts, elements), details


def compile_all(out: Path, cells: list[tuple[str, str]]) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Compiles all cells, in as many processes as the machine has cores, and yields in order."""
    workers = min(os.cpu_count() or 1, len(cells) // 4)
    if workers < 2:  # To start a process takes as long as to compile three variants.
        yield from (compile_to(out, *cell) for cell in cells)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield from pool.map(compile_to, repeat(out), *zip(*cells, strict=True))


def write(path: Path, content: str | bytes) -> None:
    """Writes the file atomically: after a failure the old content is still there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError as error:
        refuse(f"cannot write {str(path)!r}: {error.strerror}")
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    write(path, json.dumps(content, indent=1) + "\n")


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table that is aligned for a terminal too."""
    lines = [list(COLUMNS.values()), *([cell(row[name]) for name in COLUMNS] for row in rows)]
    spans = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = [
        "-" * span if name in TEXT else "-" * (span - 1) + ":"
        for name, span in zip(COLUMNS, spans, strict=True)
    ]
    return "\n".join(
        "| "
        + " | ".join(
            text.ljust(span) if name in TEXT else text.rjust(span)
            for name, text, span in zip(COLUMNS, line, spans, strict=True)
        )
        + " |"
        for line in (lines[0], rule, *lines[1:])
    )


def spans(rows: list[Row]) -> str:
    """Least and greatest instructions of a step by architecture and by its kind."""
    lines = []
    for arch in dict.fromkeys(row["arch"] for row in rows if row["arch"] in SLOTS_PER_BYTE):
        whole = VARIANTS | SERVED
        philox = [n for n, v in whole.items() if v.noise == "philox"]
        kinds = {
            "without counter noise": [n for n in whole if n not in philox],
            "with counter noise": philox,
            "of a state in half precision": list(ROUNDED),
        }
        for kind, named in kinds.items():
            some = [row for row in rows if row["arch"] == arch and row["variant"] in named]
            if some:
                counts, share = (
                    [row[key] for row in some] for key in ("sass_per_element", "budget_share")
                )
                lines.append(
                    f"- sm_{arch} {kind}: {min(counts)} to {max(counts)} instructions an element, "
                    f"{min(share):.0%} to {max(share):.0%} of the budget"
                )
    return "\n".join(lines)


def cell(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{bits}×{n}" for bits, n in value.items())
    return "-" if value is None else str(value)


def chosen(option: str, value: str, allowed: tuple[str, ...]) -> list[str]:
    """The comma-separated parts of an option's value, without repeats; all must be allowed."""
    found = list(dict.fromkeys(part.strip() for part in value.split(",")))
    for part in found:
        if part not in allowed:
            refuse(f"{option} must be among {', '.join(allowed)}, got {part!r}")
    return found


def refuse(message: str) -> NoReturn:
    print(f"benchmarks.codegen: {message}", file=sys.stderr)
    raise SystemExit(2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--arch", default=",".join(SLOTS_PER_BYTE), help=f"among {', '.join(ARCHS)}"
    )
    parser.add_argument("--only", default=",".join(NAMES), help="variants (default: all)")
    args = parser.parse_args()
    interpret = os.environ.get("TRITON_INTERPRET", "")
    if interpret not in ("", "0"):
        refuse(f"TRITON_INTERPRET must not be set, got {interpret!r}: no kernel would be compiled")
    archs = chosen("--arch", args.arch, ARCHS)
    names = chosen("--only", args.only, NAMES)
    out: Path = args.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        refuse(f"--out must be a directory to write to, got {str(out)!r}: {error.strerror}")
    cells = [(name, arch) for arch in archs for name in names]
    rows, details = [], {}
    for (name, arch), (row, of) in zip(cells, compile_all(out, cells), strict=True):
        rows.append(row)
        details[file_name(name, arch)] = of
    write_json(out / "details.json", details)
    write_json(out / "codegen.json", rows)
    print(f"triton {triton.__version__}\n\n{table(rows)}\n\n{spans(rows)}".rstrip())


if __name__ == "__main__":
    main()
