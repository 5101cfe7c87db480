"""Formats a GPU's record for the pages: figures, limits, and the failures of that run."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.markdown import grid, median, met, met_at_most, span
from benchmarks.sections.peers import BY_NUMBERS, COMPILED
from benchmarks.timing import Record, by

NOT_YET = "No GPU's record is in `benchmarks/results`: `benchmarks/gpu.sh` makes one."


def reason(row: Record) -> str | None:
    """Why a row has no figures, or None if it has some."""
    if "wrong" in row:
        return f"**wrong**: {row['wrong']}"
    for key in ("failed", "left_out"):
        if key in row:
            return str(row[key])
    return None


def made(record: Record) -> str:
    """Versions, date, commit and command of the record."""
    names = ("driver", "cuda", "torch", "triton", "python")
    of = ", ".join(f"{name} {record[name]}" for name in names if record.get(name))
    return f"{of}; {record['date'][:10]}, commit {record['commit']}: `{record['command']}`"


def tested(record: Record) -> str:
    """The outcome of the GPU tests in that run, with the names of the failed tests."""
    tests = record["tests"]
    if tests["ended"] == "not run":
        return "The GPU tests were **not run** beside these figures."
    text = (
        f"GPU tests in that run: {tests['passed']} passed, {tests['failed']} failed, "
        f"{tests['skipped']} skipped"
    )
    text += "." if tests["ended"] == "done" else f"; **{tests['ended']}**."
    failures = []
    for (test, why), cases in alike(tests["failures"]).items():
        those = f" with {'; '.join(f'`{case}`' for case in cases)}" if cases != [""] else ""
        failures.append(f"- **failed**: `{test}`{those}: {why}")
    return "\n\n".join([text, *(["\n".join(failures)] if failures else [])])


def alike(failures: list[Record]) -> dict[tuple[str, str], list[str]]:
    """{(test, reason): its parameters}, because one fault often fails many cases of a test."""
    found: dict[tuple[str, str], list[str]] = {}
    for failure in failures:
        test, _, case = failure["test"].partition("[")
        found.setdefault((test, failure["why"]), []).append(case.removesuffix("]"))
    return found


def missing(record: Record) -> str:
    """The sections that were not measured, and the reasons."""
    if record["complete"]:
        return ""
    ended = {
        name: record["sections"].get(name, {}).get("ended", "not run") for name in record["missing"]
    }
    return f"Not complete. {'; '.join(f'`{name}`: {how}' for name, how in ended.items())}."


def ranges(record: Record) -> str:
    """The meaning of the values in parentheses."""
    return f"In parentheses: {record['ranges'].split(': ', 1)[-1]}."


# The tables


def variants(rows: list[Record]) -> str:
    head = ["bytes per second", "shape", "bytes", "µs", "GB/s", "of a copy", "required", "met"]
    lines, notes = [head], []
    for row in rows:
        name, why = row["variant"], reason(row)
        if why is not None:
            lines.append([name, "", "", "", "", why, "", "**no**"])
            continue
        held = row["of_copy"]
        if "yardstick" in row:
            held, name = row["of_add"], f"{name} †"
            notes.append(f"† Compared with {row['yardstick']}.")
        us = f"{median(row['us']):.4g}"
        numbers = [by(row["shape"]), str(row["bytes_moved"]), us, f"{row['gb_per_s']:.4g}"]
        least = f"≥ {row['required']:g}"
        lines.append([name, *numbers, span(held, "", 4), least, met(held, row["required"])])
    return "\n\n".join([grid(*lines), *dict.fromkeys(notes)])


def marginal(rows: list[Record]) -> str:
    lines = [["one more step in a graph", "η", "µs", "an empty node", "of it", "required", "met"]]
    for row in rows:
        begin, why = [by(row["shape"]), f"{row['eta']:g}"], reason(row)
        if why is not None:
            lines.append([*begin, "", "", why, "", ""])
            continue
        of = row["of_small_kernel"]
        ends = ["", ""]
        if "required" in row:
            ends = [f"≤ {row['required']:g}×", met_at_most(of, row["required"])]
        us = [span(row[name], "") for name in ("us_per_step", "us_per_small_kernel")]
        lines.append([*begin, *us, span(of), *ends])
    return grid(*lines)


def graph(rows: list[Record]) -> str:
    lines = [["steps captured by hand", "η", "nodes", "µs a node", "µs of the host a replay"]]
    for row in rows:
        why = reason(row)
        if why is not None:
            lines.append(["", "", "", why, ""])
            continue
        numbers = [span(row["us_per_node"], ""), f"{row['host_us_per_replay']:.3g}"]
        lines.append([by(row["shape"]), f"{row['eta']:g}", str(row["nodes"]), *numbers])
    return grid(*lines)


def serving(rows: list[Record]) -> str:
    lines = [["the engine", "shape", "µs or samples a second", "ratio", "required", "met"]]
    for row in rows:
        begin, why = [row["figure"], by(row.get("shape", ()))], reason(row)
        if why is not None:
            lines.append([*begin, why, "", "", ""])
            continue
        value = span(row["us"], " µs") if "us" in row else span(row["samples_per_s"], " a second")
        ratio, ends = "", ["", ""]
        if "required_us" in row:
            ends = [f"≤ {row['required_us']:g} µs", met_at_most(row["us"], row["required_us"])]
        elif "of_bound" in row:
            ratio = f"{span(row['of_bound'])} a bound step"
            ends = [f"≤ {row['required']:g}×", met_at_most(row["of_bound"], row["required"])]
        elif "tick_over_it" in row:
            ratio = f"a tick takes {span(row['tick_over_it'])}"
        elif "of_sample" in row:
            off = "" if row.get("bit_equal", True) else f", {row['relative_difference']:.1g} off"
            ratio = f"{span(row['of_sample'])} DDIM.sample{off}"
            if "required" in row:
                ends = [f"≥ {row['required']:g}×", met(row["of_sample"], row["required"])]
        lines.append([*begin, value, ratio, *ends])
    return grid(*lines)


def peers(rows: list[Record]) -> str:
    lines = [["a step of 12.6 million elements", "µs", "over fastddim's", "required", "met"]]
    for row in rows:
        name, why = row.get("step", ""), reason(row)
        if why is not None:
            lines.append([name, "", why, "", ""])
            continue
        of = row["times_fastddim"]
        ends = (
            [f"≥ {row['required']:g}×", met(of, row["required"])] if "required" in row else ["", ""]
        )
        lines.append([name, span(row["us"], "", 4), span(of, digits=4), *ends])
    return grid(*lines)


def host(rows: list[Record]) -> str:
    lines = [
        ["the host's time for a call or a step", "µs", "of torch.add(out=)", "required", "met"]
    ]
    for row in rows:
        call, why = f"`{row['call']}`" if "call" in row else "", reason(row)
        if why is not None:
            lines.append([call, why, "", "", ""])
        elif "times" in row:
            ends = [f"≥ {row['required_at_least']:g}×", met(row["times"], row["required_at_least"])]
            lines.append([call, f"{row['times']:.3g}×", "", *ends])
        else:
            # The first record has neither key.
            of = [span(row["of_add"])] if "of_add" in row else [""]
            most = row.get("required")
            ends = ["", ""] if most is None else [f"≤ {most:g}×", met_at_most(row["of_add"], most)]
            lines.append([call, f"{row['us']:.3g}", *of, *ends])
    return grid(*lines)


def loops(rows: list[Record]) -> str:
    head = ["the loop without its model", "shape", "η", "µs a step", "original / it"]
    lines = [[*head, "plain loop / it"]]
    for row in rows:
        begin = [row.get("loop", ""), by(row["shape"]), f"{row['eta']:g}"]
        why = reason(row)
        if why is not None:
            lines.append([*begin, "", why, ""])
            continue
        # Records from before the plain loop was a peer lack this key.
        held = span(row["times_plain"]) if "times_plain" in row else ""
        lines.append([*begin, span(row["us_per_step"], ""), span(row["times_faster"]), held])
    return grid(*lines)


def ladder(rows: list[Record]) -> str:
    lines = [["a whole call", "ms", "original / it", "µs a step beside the model", "bit-equal"]]
    of: tuple[str, ...] | None = None
    for row in rows:
        case = (row["case"], row.get("dtype", ""))
        if case != of:
            steps = f", {row['steps']} steps" if "steps" in row else ""
            about = ", ".join(word for word in case if word)
            shape = f", {by(row['shape'])}" if "shape" in row else ""
            lines.append([f"**{about}{shape}{steps}**", "", "", "", ""])
        of = case
        why = reason(row)
        name = row.get("rung", "")
        if why is not None:
            lines.append([name, "", why, "", ""])
            continue
        faster = span(row["times_faster"]) if "times_faster" in row else ""
        beside = row.get("us_per_step_beside_model")
        equal = {True: "yes", False: f"{row.get('relative_difference', 0):.1g} off", None: ""}
        cells = ["" if beside is None else span(beside, ""), equal[row.get("bit_equal")]]
        lines.append([name, span(row["ms"], ""), faster, *cells])
    return grid(*lines)


def sanitizer(rows: list[Record]) -> str:
    lines = [["compute-sanitizer", "of", "tests passed", "errors", "verdict"]]
    for row in rows:
        why = reason(row)
        passed = f"{row['tests_passed']}" if "tests_passed" in row else ""
        errors = "" if row.get("errors") is None else str(row["errors"])
        verdict = why or "; ".join([row["verdict"], *dict.fromkeys(row.get("first", []))])
        lines.append([row["tool"], row["of"], passed, errors, verdict])
    return grid(*lines)


def tuning(rows: list[Record]) -> str:
    """The three fastest choices for each variant; the record has the others."""
    lines = [["launch constants", "fours × parts, warps", "µs", "GB/s"]]
    good = [row for row in rows if reason(row) is None]
    for name in dict.fromkeys(row["variant"] for row in good):
        every = sorted(
            (row for row in good if row["variant"] == name), key=lambda row: median(row["us"])
        )
        for row in every[:3]:
            constants = f"{row['fours']} × {row['parts']}, {row['warps']}"
            if "registers" in row:
                constants += f", at most {row['registers']} registers"
            lines.append([name, constants, span(row["us"], "", 4), f"{row['gb_per_s']:.4g}"])
    return grid(*lines)


TABLES: dict[str, Callable[[list[Record]], str]] = {
    "variants": variants,
    "peers": peers,
    "marginal": marginal,
    "graph": graph,
    "serving": serving,
    "host": host,
    "loops": loops,
    "ladder": ladder,
    "sanitizer": sanitizer,
    "tuning": tuning,
}


def tables(record: Record) -> str:
    """The whole record: how it was made, the failures, and a table for each measured section."""
    about = [made(record), record.get("note", ""), tested(record), missing(record), ranges(record)]
    shown = [show(record[name]) for name, show in TABLES.items() if record.get(name)]
    return "\n\n".join([f"### {record['gpu']}", *filter(None, about), *shown])


def headline(record: Record) -> str:
    """The most important figures of a GPU in one line, as far as they were measured."""
    parts = []
    row = of("variant", "epsilon", record.get("variants", []))
    if row is not None:
        parts.append(f"a step reaches {span(row['of_copy'], '')} of the speed of a copy")
    beside = {
        "eager": "eager PyTorch",
        BY_NUMBERS: "eager PyTorch with factors precomputed as numbers",
        "eager, randn_like (the original loop's step)": "the original loop's step",
        COMPILED: "`torch.compile` of the simplified maths",
    }
    rows = {name: of("step", name, record.get("peers", [])) for name in beside}
    found = [(beside[name], row["times_fastddim"]) for name, row in rows.items() if row is not None]
    if found:
        parts.append(", ".join(f"{name} takes {span(times)} as long" for name, times in found))
    small = [r for r in record.get("marginal", []) if "us_per_step" in r and r["eta"] == 0]
    row = min(small, key=lambda r: median(r["us_per_step"]), default=None)
    if row is not None:
        us, node = (f"{median(row[k]):.3g}" for k in ("us_per_step", "us_per_small_kernel"))
        step = f"in a CUDA graph a step of {by(row['shape'])} takes {us} µs"
        parts.append(f"{step}, and a node that does nothing {node} µs")
    if not parts:
        return ""
    tests = record["tests"]
    outcome = f"{tests['failed']} of {tests['passed'] + tests['failed']} GPU tests failed"
    if tests["ended"] != "done":
        outcome = f"GPU tests: {tests['ended']}"
    return (
        f"On an **{record['gpu']}** {'; '.join(parts)} (η = 0; {outcome} in that run, commit "
        f"{record['commit']})."
    )


def of(key: str, name: str, rows: list[Record]) -> Record | None:
    """The row of this name, or None if it has no figures."""
    found = (row for row in rows if row.get(key) == name and reason(row) is None)
    return next(found, None)


def summary(records: list[Record]) -> str:
    """One line for each GPU, from its latest record."""
    latest = {record["gpu"]: record for record in sorted(records, key=lambda r: str(r["date"]))}
    return "\n\n".join(filter(None, map(headline, latest.values()))) or NOT_YET
