"""What is measured, kept and shown: right before it is timed, and the same on every page."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from benchmarks import counts, gpu_report, records, report
from benchmarks.sections import host, variants
from benchmarks.timing import interval, times
from benchmarks.variants import VARIANTS
from tests.benchmarks.reports import ROOT, row

# The pages


def test_the_pages_show_the_results() -> None:
    assert report.main(["--check"]) == 0


def test_a_page_that_says_otherwise_is_noticed_and_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "README.md"
    right = (ROOT / "README.md").read_text()
    page.write_text(right.replace("| the original loop | ", "| the original loop | 1"))
    assert page.read_text() != right
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "PAGES", (page,))
    assert report.main(["--check"]) == 1
    assert capsys.readouterr().out.startswith("README.md must match benchmarks/results")
    assert page.read_text() != right
    assert report.main([]) == 0
    assert page.read_text() == right
    page.write_text("<!-- report: costs -->\n<!-- end -->")
    with pytest.raises(SystemExit, match="'costs'"):
        report.main([])


def test_figures_name_the_worst_shape_and_whether_they_are_met() -> None:
    large = report.LARGE
    section = {
        "rows": [
            row(
                "numba", 0, large, times_original=[16.0, 14.0, 18.0], times_compile=[3.0, 2.0, 4.0]
            ),
            row(
                "numba",
                0,
                [1, 16, 7],
                times_original=[2.0, 1.9, 2.1],
                times_compile=[0.9, 0.8, 1.1],
            ),
            row("numba", 1, large, times_original=[5.9, 5.0, 7.0], times_compile=[0.9, 0.8, 0.99]),
            row("pytorch", 0, large, times_original=[8.0, 7.0, 9.0], times_compile=[0.5, 0.4, 0.6]),
            row(
                "numba",
                0,
                [4, 3, 32, 32],
                times_original=[9.0, 8.0, 9.5],
                times_compile=[0.95, 0.92, 0.97],
            ),
        ]
    }
    lines = [line for line in report.figures(section).splitlines() if "η" in line]
    assert [line.split(" | ")[-1] for line in lines] == [
        "yes, by the median |",
        "yes, by the median |",
        "open: the interval contains the limit |",
        "**no** |",
        "**no** |",
    ]
    # Not 0.9 (0.8 to 1.1), which may be none: a certain loss at another shape comes before it.
    assert "here 4x3x32x32 | ≥ 1× | 0.95× (0.92–0.97)" in lines[3]
    assert "64x3x256x256 | ≥ 6× | 5.9× (5–7)" in lines[2]
    section["rows"][2]["times_original"] = [7.0, 6.0, 8.0]
    assert report.figures(section).splitlines()[4].endswith("| 7× (6–8) | yes |")
    lost = report.losses(section).splitlines()
    assert [line.split(":")[0] for line in lost] == [
        "- DDIM.sample, numba at 1x16x7, η = 0",
        "- DDIM.sample, numba at 64x3x256x256, η = 1",
        "- DDIM.sample, PyTorch at 64x3x256x256, η = 0",
        "- DDIM.sample, numba at 4x3x32x32, η = 0",
    ]
    assert lost[2].endswith("2 times as long (1.67–2.5) as torch.compile of the simplified maths")
    missing = {"shape": [1, 16, 7], "eta": 0, "peer": "compile", "missing": "no compiler"}
    shown = report.steps({"rows": [*section["rows"], missing]})
    assert "12.3 ms, 16× (14–18)" in shown
    assert "| torch.compile of the simplified maths |  | no compiler |" in shown
    assert "90.00% (80.00%–100.00%)" in shown


def test_the_plain_loop_is_listed_where_it_was_measured() -> None:
    section = {
        "rows": [
            row("plain", 0, [1, 16, 7], times_plain=[1.0, 1.0, 1.0], times_tensors=[0.7] * 3),
            row("scheduler", 0, [1, 16, 7], times_plain=[0.8, 0.7, 0.9], times_tensors=[0.5] * 3),
            row("numba", 0, [1, 16, 7], times_plain=[2.0, 1.9, 2.1], times_tensors=[1.5] * 3),
        ]
    }
    scheduler, numba = report.figures(section).splitlines()[2:]
    assert scheduler.endswith("against a plain loop, factors precomputed | any shape, here 1x16x7 "
                              "| ≥ 1× | 0.8× (0.7–0.9) | **no** |")  # fmt: skip
    assert numba.endswith("| 2× (1.9–2.1) | yes |")
    first, second = report.losses(section).splitlines()
    assert first.endswith("1.25 times as long (1.11–1.43) as a plain loop, factors precomputed")
    assert second.endswith("2 times as long (2–2) as a plain loop, factors precomputed as tensors")
    # Records made before it was a peer are shown without it.
    of_gpu = {"loop": "DDIM.sample", "shape": [1, 16, 7], "eta": 0, "us_per_step": [2.0] * 3}
    old = of_gpu | {"times_faster": [9.0, 8.0, 10.0]}
    table = gpu_report.loops([old, old | {"loop": "new", "times_plain": [3.0, 2.0, 4.0]}])
    assert cells(table, "DDIM.sample")[-1].startswith("9× (8–10)")
    assert cells(table, "new")[-2:] == ["9× (8–10)", "3× (2–4)"]


# A GPU's record


def a_gpu(**more: Any) -> dict[str, Any]:
    return {
        "gpu": "A GPU",
        "driver": "1.2",
        "date": "2026-11-27T10:00:00+00:00",
        "commit": "abc",
        "command": "benchmarks/gpu.sh",
        "ranges": "[median, low, high]: low to high holds it",
        "complete": True,
        "missing": [],
        "sections": {},
        "tests": {"passed": 9, "failed": 0, "skipped": 1, "ended": "done", "failures": []},
        **more,
    }


def variant(name: str, of_copy: Any, least: float = 0.9, **more: Any) -> dict[str, Any]:
    numbers = {"bytes_moved": 12, "us": [1.0, 0.9, 1.1], "gb_per_s": 4000.0}
    asked = {"of_copy": of_copy, "of_add": [0.5, 0.4, 0.6], "required": least}
    return {"variant": name, "shape": [2, 3, 4], **numbers, **asked, **more}


def cells(table: str, first: str) -> list[str]:
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {first}"))
    return line.strip("| ").split(" | ")


def test_a_gpus_tables_say_what_was_met_and_what_is_wrong() -> None:
    table = gpu_report.variants(
        [
            variant("certain", [0.95, 0.93, 0.97]),
            variant("probable", [0.91, 0.89, 0.93]),
            variant("open", [0.89, 0.88, 0.91]),
            variant("lost", [0.85, 0.84, 0.86]),
            variant("short of nothing but its interval", 0.95),
            variant("held elsewhere", [1.4, 1.3, 1.5], yardstick="the addition: reasons"),
            {"variant": "astray", "wrong": "out differs"},
            {"variant": "late", "left_out": "no time"},
        ]
    )
    assert cells(table, "certain")[4:] == ["4000", "0.95 (0.93–0.97)", "≥ 0.9", "yes"]
    assert cells(table, "probable")[-1] == "yes, by the median"
    assert cells(table, "open")[-1] == "open: the interval contains the limit"
    assert cells(table, "lost")[-1] == "**no**"
    assert cells(table, "short")[-3:] == ["0.95", "≥ 0.9", "yes"]
    # However fast it is beside a copy that is slow.
    assert cells(table, "held elsewhere †")[-3:] == ["0.5 (0.4–0.6)", "≥ 0.9", "**no**"]
    assert table.endswith("† Compared with the addition: reasons.")
    assert "**wrong**: out differs" in cells(table, "astray")
    assert "no time" in cells(table, "late")


def test_the_hosts_limits_stand_beside_what_was_measured() -> None:
    theirs, ours = (of["timesteps as CUDA tensors"] for of in (host.THEIRS, host.FAST))
    table = gpu_report.host(
        [
            {"call": "old", "us": 6.3},
            {"call": "free", "us": 6.3, "of_add": 1.0},
            {"call": "kept", "us": 15.0, "of_add": 2.4, "required": 2.5},
            {"call": "lost", "us": 30.0, "of_add": 4.1, "required": 4.0},
            {"call": "ratio", "times": 8.5, "required_at_least": 8.0},
            {"call": theirs, "failed": "ImportError: diffusers"},
        ]
    )
    assert "| `old` | 6.3 |  |  |  |" in table
    assert "| `free` | 6.3 | 1× |  |  |" in table
    assert cells(table, "`kept`")[1:] == ["15", "2.4×", "≤ 2.5×", "yes"]
    assert cells(table, "`lost`")[1:] == ["30", "4.1×", "≤ 4×", "**no**"]
    assert cells(table, "`ratio`")[1:] == ["8.5×", "", "≥ 8×", "yes"]
    assert "ImportError: diffusers" in cells(table, f"`{theirs}`")[1]
    assert set(host.OF_ADD.values()) == {2.5, 4.0}
    assert ours in host.OF_ADD


def test_the_engines_limits_stand_beside_its_figures() -> None:
    of_sample = {"samples_per_s": [80.0, 70.0, 90.0], "bit_equal": True, "required": 0.95}
    table = gpu_report.serving(
        [
            {"figure": "tick", "shape": [32, 4], "us": [4.5, 4.4, 5.1], "required_us": 5.0},
            {"figure": "step", "us": [2.0, 1.9, 2.1], "tick_over_it": [2.2, 2.1, 2.4]},
            {"figure": "host", "us": 24.0, "of_bound": 2.1, "required": 2.0},
            {"figure": "refill", "us": 80.0},
            {"figure": "alike", "of_sample": [0.97, 0.96, 0.98], **of_sample},
            {"figure": "slow", "of_sample": [0.8, 0.7, 0.9], **of_sample}
            | {"bit_equal": False, "relative_difference": 0.001},
            {"figure": "astray", "wrong": "seed 3"},
        ]
    )
    assert cells(table, "tick")[1:3] == ["32x4", "4.5 µs (4.4–5.1)"]
    assert cells(table, "tick")[-2:] == ["≤ 5 µs", "yes, by the median"]
    assert "a tick takes 2.2× (2.1–2.4)" in cells(table, "step")
    assert cells(table, "host")[2:] == ["24 µs", "2.1× a bound step", "≤ 2×", "**no**"]
    assert "80 µs" in cells(table, "refill")
    assert cells(table, "alike")[3:] == ["0.97× (0.96–0.98) DDIM.sample", "≥ 0.95×", "yes"]
    assert cells(table, "slow")[3:] == [
        "0.8× (0.7–0.9) DDIM.sample, 0.001 off", "≥ 0.95×", "**no**",
    ]  # fmt: skip
    assert "**wrong**: seed 3" in cells(table, "astray")


def test_an_upper_limit_is_met_below_its_figure() -> None:
    def of(ratio: Any) -> str:
        row: dict[str, Any] = {"shape": [1, 16, 7], "eta": 0}
        row |= {"us_per_step": 1.2, "us_per_small_kernel": 1.0}
        return cells(
            gpu_report.marginal([row | {"of_small_kernel": ratio, "required": 1.3}]), "1x"
        )[-1]

    assert of([1.2, 1.1, 1.3]) == "yes"
    assert of([1.2, 1.1, 1.4]) == "yes, by the median"
    assert of([1.4, 1.2, 1.5]) == "open: the interval contains the limit"
    assert of([1.4, 1.31, 1.5]) == "**no**"
    assert (of(1.3), of(1.31)) == ("yes", "**no**")


def test_failed_tests_and_missing_sections_stand_by_the_figures() -> None:
    failures = [{"test": "tests/kernels/test_gpu.py::test_a", "why": "assert 1 == 2"}]
    record = a_gpu(
        tests={"passed": 9, "failed": 1, "skipped": 0, "ended": "done", "failures": failures},
        complete=False,
        missing=["loops", "tuning"],
        sections={"loops": {"ended": "cut off"}},
        variants=[variant("epsilon", [0.95, 0.93, 0.97])],
        note="A note.",
    )
    text = gpu_report.tables(record)
    assert "9 passed, 1 failed, 0 skipped." in text
    assert "- **failed**: `tests/kernels/test_gpu.py::test_a`: assert 1 == 2" in text
    assert "Not complete. `loops`: cut off; `tuning`: not run." in text
    assert "A note." in text
    failures[:] = [{"test": f"test_b[{case}]", "why": "assert []"} for case in ("x-1", "y")]
    shown = gpu_report.tables(record)
    assert "- **failed**: `test_b` with `x-1`; `y`: assert []" in shown
    line = gpu_report.headline(record)
    assert line.startswith(
        "On an **A GPU** a step reaches 0.95 (0.93–0.97) of the speed of a copy (η = 0"
    )
    assert "1 of 10 GPU tests failed in that run, commit abc" in line
    record["tests"] |= {"ended": "cut off"}
    assert "; **cut off**." in gpu_report.tables(record)
    assert "GPU tests: cut off in that run" in gpu_report.headline(record)
    record["tests"] |= {"ended": "not run"}
    assert "were **not run** beside these figures" in gpu_report.tables(record)
    assert "Not complete" not in gpu_report.tables(a_gpu())


def test_one_line_a_gpu_tells_of_its_latest_record() -> None:
    def record(date: str, of_copy: float, gpu: str = "A GPU") -> dict[str, Any]:
        return a_gpu(gpu=gpu, date=date, variants=[variant("epsilon", [of_copy] * 3)])

    found = [record("2026-12-01", 0.99), record("2026-11-01", 0.9), record("2026-11-02", 0.8, "B")]
    lines = gpu_report.summary(found).split("\n\n")
    assert [line[:12] for line in lines] == ["On an **A GP", "On an **B** "]
    assert "reaches 0.99 (0.99–0.99)" in lines[0]
    assert gpu_report.summary([]) == gpu_report.NOT_YET
    # The most of it: peers, and the smallest shape in a graph.
    full = a_gpu(
        peers=[
            {"step": "eager", "us": [2.0, 1.9, 2.1], "times_fastddim": [5.0, 4.9, 5.1]},
            {"step": "torch.compile, simplified", "failed": "no compiler"},
        ],
        marginal=[
            {"shape": [4, 3, 32, 32], "eta": 0, "us_per_step": 2.0, "us_per_small_kernel": 1.0},
            {"shape": [1, 16, 7], "eta": 0, "us_per_step": 1.2, "us_per_small_kernel": 1.0},
        ],
    )
    assert gpu_report.headline(full).startswith(
        "On an **A GPU** eager PyTorch takes 5× (4.9–5.1) as long; "
        "in a CUDA graph a step of 1x16x7 takes 1.2 µs, and a node that does nothing 1 µs (η = 0"
    )


def test_the_record_of_the_h200_says_what_failed_there() -> None:
    record = json.loads((records.RESULTS / "nvidia-h200.json").read_text())
    for measured in record["variants"]:
        held = measured["of_add"] if "yardstick" in measured else measured["of_copy"][0]
        assert measured["required"] == variants.required(VARIANTS[measured["variant"]])
        assert measured["met"] == (held >= measured["required"])
    assert record["complete"] == (not record["missing"])
    assert len(record["tests"]["failures"]) == record["tests"]["failed"]
    page = (ROOT / "README.md").read_text()
    assert page.index("NVIDIA H200") < page.index("On a CPU")


# What a step does


def test_the_pages_counts_are_the_dispatched_operations() -> None:
    found = counts.rows()
    assert found == json.loads((records.RESULTS / "counts.json").read_text())["rows"]
    of = {(r["loop"], r["eta"]): [r[name] for name in counts.NAMES] for r in found}
    for eta in (0.0, 1.0):
        assert of["original loop", eta] == [43, 9, 80, 3, 0]
        assert of["DDIM.sample(seeds=)", eta] == [1, 1, 12, 0, 0]


def test_the_tally_counts_by_the_definition() -> None:
    x, small = torch.ones(8, 8), torch.ones(8)
    with counts.Transfers(64) as transfers, counts.Tally(64) as tally:
        y = x + small  # read, written
        y.mul_(2.0)  # read, written
        torch.mul(x, y, out=y)  # two read, one written
        y.view(64).copy_(x.view(64))  # read, written; views are nothing
        torch.randn_like(x)  # written
        small.sum().item()  # an operation and a host sync
        y = y.to("cpu").to(x.device).to(x.device)  # there and back
        small.to("cpu")
    assert tally.found["operations"] == 6
    assert tally.found["passes"] == 5
    assert tally.found["bytes_per_element"] == 8 + 8 + 12 + 8 + 4
    assert tally.found["host_syncs"] == 1
    assert transfers.count == 2


# What may be said of times


@pytest.mark.parametrize("n", [6, 7, 9, 12, 30, 101])
def test_the_interval_holds_the_median_as_often_as_it_says(n: int) -> None:
    median, low, high = interval(range(n))
    assert median == (n - 1) / 2
    left_out = int(low)
    assert high == n - 1 - left_out
    miss = [2 * stats.binom.cdf(k, n, 0.5) for k in (left_out, left_out + 1)]
    assert miss[0] <= 0.05 < miss[1]  # and no shorter one does
    assert interval([3.0, 1.0, 2.0]) == [2.0, 1.0, 3.0]


def test_ratios_are_those_of_a_round() -> None:
    r = random.Random(0)
    slow = [r.uniform(1, 10) for _ in range(20)]  # the machine's, alike for both
    assert times([6 * s for s in slow], [2 * s for s in slow]) == [3.0, 3.0, 3.0]
