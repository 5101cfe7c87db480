"""A mutation run: each named fault is put into the code, and the fast tests must catch it.

    python -m tests.mutants [--area kernel] [--jobs 2]

A fault is one replacement in one file, made in a copy of the repository. It is caught if the fast
tests of its area fail. The command prints a line for each fault and ends with status 1 if one is
not caught.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
KERNELS = "kernels/torch-ext/fastddim_kernels"
TESTS = {
    "kernel": ["tests/kernels"],
    "fused": ["tests/step"],
    "loop": ["tests/loop", "tests/step"],
    "dropins": ["tests/dropins"],
}
"""The tests that run for the faults of an area."""


class Mutant(NamedTuple):
    area: str
    name: str
    folder: str
    """The fault is put into the one file under this folder that holds ``code``."""
    code: str
    fault: str


STEP, LOOP, DROPINS = "fastddim/step", "fastddim/loop", "fastddim/dropins"
MUTANTS = [
    Mutant(
        "kernel",
        "guidance starts from the conditional output",
        KERNELS,
        "output + w * (cond - output)",
        "cond + w * (output - cond)",
    ),
    Mutant(
        "kernel",
        "a flow model's ε is that of its x0",
        KERNELS,
        "return x + a_t * output",
        "return x - a_t * output",
    ),
    Mutant(
        "kernel",
        "D moves towards the x0 of the step before",
        KERNELS,
        "d = x0 + kappa * (x0 - x0_before)",
        "d = x0 - kappa * (x0 - x0_before)",
    ),
    Mutant(
        "kernel",
        "a row with κ = 0 extrapolates too",
        KERNELS,
        "return tl.where(first, x0, d), tl.where(first, eps, x)",
        "return d, tl.where(first, eps, x)",
    ),
    Mutant(
        "kernel",
        "v model's x0 has the wrong sign",
        KERNELS,
        "return a_t * x - b_t * output",
        "return a_t * x + b_t * output",
    ),
    Mutant(
        "kernel",
        "clip loses NaN",
        KERNELS,
        "tl.clamp(x0, -clip, clip, propagate_nan=tl.PropagateNan.ALL)",
        "tl.clamp(x0, -clip, clip)",
    ),
    Mutant(
        "kernel",
        "rederived ε takes the unbounded x0",
        KERNELS,
        "divide(x - a_t * bounded_x0, b_t",
        "divide(x - a_t * x0, b_t",
    ),
    Mutant(
        "kernel",
        "the noise's place in the sum is swapped",
        KERNELS,
        "    if NOISE_FIRST:\n        return a_s * x0 + c1",
        "    if not NOISE_FIRST:\n        return a_s * x0 + c1",
    ),
    Mutant(
        "kernel",
        "bfloat16 rounds half up",
        KERNELS,
        "(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16",
        "(bits + 0x8000) >> 16",
    ),
    Mutant(
        "kernel",
        "a seed's high word is its low one",
        KERNELS,
        "tl.load(words + 2 * sample + 1)",
        "tl.load(words + 2 * sample)",
    ),
    Mutant(
        "kernel",
        "two of four normals change places",
        KERNELS,
        "z2, z3 = box_muller(w2, w3, PORTABLE)",
        "z3, z2 = box_muller(w2, w3, PORTABLE)",
    ),
    Mutant(
        "kernel",
        "pixels before a channel's first are drawn too",
        KERNELS,
        "skipped = tl.where(first_quad == 0, early, 0).to(tl.int32)",
        "skipped = tl.where(first_quad == 0, 0, 0).to(tl.int32)",
    ),
    Mutant(
        "kernel",
        "the conditional half is found by the state's stride",
        KERNELS,
        "all_output_elements = samples.to(tl.int64) * output_stride.to(tl.int64) * UNIT",
        "all_output_elements = all_elements",
    ),
    Mutant(
        "kernel",
        "the second copy of the next input is lost",
        KERNELS,
        "tl.store(next_again_ptr + begin + offsets, model_input, mask=mask)",
        "tl.store(next_ptr + begin + offsets, model_input, mask=mask)",
    ),
    Mutant(
        "kernel",
        "a sample's threshold is the first one's",
        KERNELS,
        "threshold = tl.load(threshold_ptr + sample)",
        "threshold = tl.load(threshold_ptr)",
    ),
    Mutant(
        "fused",
        "clip has no upper bound",
        STEP,
        "        x0[i] = bound if value > bound else value\n",
        "        x0[i] = value\n",
    ),
    Mutant(
        "fused",
        "noise after the direction loses its lane",
        STEP,
        "out[i] = a_s * x0[i] + c2 * eps[i] + c1 * z[i + lane]",
        "out[i] = a_s * x0[i] + c2 * eps[i] + c1 * z[i]",
    ),
    Mutant(
        "fused",
        "a task leaves out its last element",
        STEP,
        "min(TASK * (task + 1), total)",
        "min(TASK * (task + 1) - 1, total)",
    ),
    Mutant(
        "fused",
        "a row after the table's end is read",
        STEP,
        "        if row < 0 or row >= steps:\n            call.outcome = REFUSED",
        "        if row < 0:\n            call.outcome = REFUSED",
    ),
    Mutant(
        "fused",
        "half precision's second half is looked for too far",
        STEP,
        "call.output_stride * (4 if call.dtype == 0 else 2)",
        "call.output_stride * 4",
    ),
    Mutant(
        "fused",
        "samples with a wider output are joined",
        STEP,
        "call.row_stride == 0 and call.output_stride == n and not counted",
        "call.row_stride == 0 and not counted",
    ),
    Mutant(
        "fused",
        "ε of an x0 model is not divided",
        STEP,
        "eps[i] = (x[i] - a_t * e[i]) / b_t",
        "eps[i] = x[i] - a_t * e[i]",
    ),
    Mutant(
        "fused",
        "guidance starts from the conditional output",
        STEP,
        "def _guide_each(count, u, c, w, into):",
        "def _guide_each(count, c, u, w, into):",
    ),
    Mutant(
        "fused",
        "PyTorch's rows with κ = 0 extrapolate too",
        STEP,
        "return torch.where(first, x0, out), torch.where(first, eps, x)",
        "return out, torch.where(first, eps, x)",
    ),
    Mutant(
        "fused",
        "numba's rows with κ = 0 take x for ε",
        STEP,
        "extrapolates = call.history != 0 and table[at + 7] != 0",
        "extrapolates = call.history != 0",
    ),
    Mutant(
        "loop",
        "a replaced x keeps the x0 of the step before",
        LOOP,
        "and self._x0 is not None and x is self._reached:",
        "and self._x0 is not None:",
    ),
    Mutant(
        "loop",
        "the caller's state is kept as a buffer",
        LOOP,
        "if x is self._made and self._states is not None:",
        "if self._states is not None:",
    ),
    Mutant(
        "loop",
        "launches outlive a state that lies otherwise",
        LOOP,
        "            self._launches.clear()\n",
        "            pass\n",
    ),
    Mutant(
        "loop",
        "the written input is used for another state",
        LOOP,
        "written = x_in is not None and x is self._made and len(x_in)",
        "written = x_in is not None and len(x_in)",
    ),
    Mutant(
        "loop", "a negative output is read as it lies", LOOP, "            or output.is_neg()\n", ""
    ),
    Mutant(
        "loop",
        "guidance of weight 0 is left out",
        LOOP,
        "(guidance != 1).any(1)",
        "(guidance > 1).any(1)",
    ),
    Mutant(
        "loop",
        "a step draws the next row's noise",
        LOOP,
        "self._noise.step(row.number, self._z)",
        "self._noise.step(row.number + 1, self._z)",
    ),
    Mutant(
        "loop",
        "known pixels get the level they left",
        LOOP,
        "put_back(x_s, row.number + 1, self._noise)",
        "put_back(x_s, row.number, self._noise)",
    ),
    Mutant(
        "loop",
        "rows get the guidance of others",
        LOOP,
        "in zip(guidance, guided, strict=True)]",
        "in zip(guidance.flip(0), guided, strict=True)]",
    ),
    Mutant(
        "loop",
        "inversion leaves out its last row",
        LOOP,
        "order=range(len(up) - 1, last - 1, -1),",
        "order=range(len(up) - 1, last, -1),",
    ),
    Mutant(
        "loop",
        "self-conditioning keeps the first x0",
        LOOP,
        "            self._x0 = x0\n        self._made",
        "            self._x0 = self._x0 or x0\n        self._made",
    ),
    Mutant(
        "dropins",
        "the DDPM scheduler draws noise in its last step",
        DROPINS,
        "self._drawn(output, generator) if t > 0 else None",
        "self._drawn(output, generator) if t >= 0 else None",
    ),
    Mutant(
        "dropins",
        "the DDPM scheduler keeps its rows when the timesteps are chosen anew",
        DROPINS,
        "self.one, (chosen, kinds)",
        "self.one, kinds",
    ),
    Mutant(
        "dropins",
        "the multistep scheduler's last step is of order 2",
        DROPINS,
        "or (config.lower_order_final and steps < 15)",
        "or (config.lower_order_final and steps < 3)",
    ),
    Mutant(
        "dropins",
        "lucidrains' last step returns x_s",
        DROPINS,
        "x = x0 if last and x0 is not None else x_s",
        "x = x_s",
    ),
    Mutant(
        "dropins",
        "lucidrains moves no generator at η = 0",
        DROPINS,
        "z = None if last else buffers.drawn(x) if eta else skip()",
        "z = None if last else buffers.drawn(x) if eta else None",
    ),
    Mutant(
        "dropins",
        "MONAI's step clamps to ±c with every lower bound",
        DROPINS,
        "return float(high) if high > 0 and low == -high else None",
        "return float(high) if high > 0 else None",
    ),
    Mutant(
        "dropins",
        "MONAI's step from t < T // S goes to ᾱ_0",
        DROPINS,
        "torch.where(s >= 0, abar[s.clamp(0, T - 1)], sent(end, abar.device))",
        "torch.where(s >= -T, abar[s.clamp(0, T - 1)], sent(end, abar.device))",
    ),
    Mutant(
        "dropins",
        "a policy's known part is not written after the last step",
        DROPINS,
        "        if known is not None:\n            known.into(x)\n        if x.numel()",
        "        if x.numel()",
    ),
    Mutant(
        "dropins",
        "a policy's graph keeps the first conditions",
        DROPINS,
        "self._cond[name].copy_(value)",
        "self._cond[name]",
    ),
    Mutant(
        "dropins",
        "a policy's loop draws noise in DDPM's last step",
        DROPINS,
        "rows.append((row, t > 0))",
        "rows.append((row, t >= 0))",
    ),
    Mutant(
        "dropins",
        "a kept launch ignores the strides",
        DROPINS,
        "like = chosen(), x.shape, strides",
        "like = chosen(), x.shape",
    ),
    Mutant(
        "dropins",
        "skipped normals leave out the rest of a block",
        DROPINS,
        "            left -= BLOCK\n        block[:left].normal_()",
        "            left -= BLOCK\n        block[: left // 16 * 16].normal_()",
    ),
    Mutant(
        "dropins",
        "a remembered launch ignores the output's strides",
        DROPINS,
        "                output.shape,\n                output.stride(),\n",
        "                output.shape,\n",
    ),
    Mutant(
        "dropins",
        "a batch of diffusers' ends at the scheduler's ᾱ",
        DROPINS,
        "tables_of(scheduler, 0.0, sample.device, 1.0)",
        "tables_of(scheduler, 0.0, sample.device, scheduler._end())",
    ),
    Mutant(
        "dropins",
        "diffusers' σ has the levels the other way round",
        DROPINS,
        "((1 - at_prev) / (1 - at)) * (1 - at / at_prev)",
        "((1 - at) / (1 - at_prev)) * (1 - at / at_prev)",
    ),
    Mutant(
        "dropins",
        "strict's half-precision state is rounded twice",
        DROPINS,
        "x = sample if half is None else _SHADOWS.state_of(sample)",
        "x = sample if half is None else sample.float()",
    ),
    Mutant(
        "dropins",
        "CompVis' dropout comes before the temperature",
        DROPINS,
        "z.mul_(table[index, C1]).mul_(temperature)",
        "z.mul_(table[index, C1])",
    ),
    Mutant(
        "dropins",
        "CompVis' decoded latents are not those of the step",
        DROPINS,
        "x = self.model.q_sample(x0, t) * mask + (1.0 - mask) * x",
        "x = self.model.q_sample(x0, t) * mask + x",
    ),
    Mutant(
        "dropins",
        "the DDPM loop clamps no x0",
        DROPINS,
        '            prediction="v",\n            clip=1.0,\n',
        '            prediction="v",\n',
    ),
]


def place_of(mutant: Mutant, root: Path) -> Path:
    """Returns the one file that holds the code once."""
    places = [
        path
        for path in sorted((root / mutant.folder).rglob("*.py"))
        if mutant.code in path.read_text()
    ]
    if len(places) != 1 or places[0].read_text().count(mutant.code) != 1:
        raise ValueError(f"{mutant.name}: {len(places)} files hold {mutant.code!r}")
    return places[0]


def caught(mutant: Mutant, root: Path) -> tuple[bool, str]:
    """Runs the area's tests with the fault in ``root``; returns (caught, the first failure)."""
    path = place_of(mutant, root)
    text = path.read_text()
    path.write_text(text.replace(mutant.code, mutant.fault))
    try:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0"]
        run = subprocess.run(
            [*command, "--benchmark-disable", "--tb=no", *TESTS[mutant.area]],
            cwd=root,
            env={**os.environ, "PYTHONPATH": f"{root}:{root}/kernels/torch-ext"},
            capture_output=True,
            text=True,
        )
    finally:
        path.write_text(text)
    failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    # A fault that writes outside of its memory may kill the process, which has a negative status.
    if run.returncode > 2 or (run.returncode > 0 and not failed):
        raise RuntimeError(f"{mutant.name}: {run.stdout[-2000:]}{run.stderr[-2000:]}")
    by = failed[0].partition(" - ")[0] if failed else f"signal {-run.returncode}"
    return run.returncode != 0, by


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--area", choices=TESTS, help="only the faults of this area")
    parser.add_argument("--jobs", type=int, default=2, help="the number of faults at a time")
    arguments = parser.parse_args()
    mutants = [m for m in MUTANTS if arguments.area in (None, m.area)]
    for mutant in mutants:
        place_of(mutant, ROOT)
    with tempfile.TemporaryDirectory() as folder:
        roots: SimpleQueue[Path] = SimpleQueue()
        ignored = shutil.ignore_patterns(".git", ".*_cache", "out", "__pycache__", ".hypothesis")
        for i in range(arguments.jobs):
            roots.put(Path(shutil.copytree(ROOT, Path(folder, str(i)), ignore=ignored)))

        def one(mutant: Mutant) -> bool:
            root, began = roots.get(), time.monotonic()
            try:
                found, by = caught(mutant, root)
            finally:
                roots.put(root)
            took = f"{time.monotonic() - began:.0f} s"
            verdict = f"caught by {by.removeprefix('FAILED ')}" if found else "NOT CAUGHT"
            print(f"{mutant.area}: {mutant.name}: {verdict} ({took})", flush=True)
            return found

        with ThreadPoolExecutor(arguments.jobs) as pool:
            results = list(pool.map(one, mutants))
    print(f"{sum(results)} of {len(results)} caught")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
