"""The record of a run as a Markdown document."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import peers


def seconds(value: float | None) -> str:
    """Return a time with three digits and a unit."""
    if value is None:
        return ""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def number(value: Any) -> str:
    """Return a figure with three digits; words as they are."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def where(cell: Mapping[str, Any]) -> str:
    """Return the size of a cell in words."""
    place = f"D = {cell['numel']:,}" if cell["model"] is None else f"{cell['model']} network, D = {cell['numel']:,}"
    return f"{place}, K = {cell['rank']}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows] + [""]


def _ratio(row: Mapping[str, Any], name: str) -> str:
    ratio = row.get("ratios", {}).get(name)
    if ratio is None:
        return ""
    interval = "" if ratio["ci95"] is None else " [{}, {}]".format(*map(number, ratio["ci95"]))
    return f"{number(ratio['median'])}{interval}"


def _memory(row: Mapping[str, Any]) -> str:
    memory = row.get("memory")
    if memory is None:
        return ""
    return f"{memory['extra_dk']:.3f}" if memory["status"] == "ok" else memory["status"]


def _remark(row: Mapping[str, Any]) -> str:
    parts = [row["note"]] if row["note"] else []
    if row["status"] != "ok":
        parts.append(
            row["reason"] or {"once": "timed once: its first call took over 5 s"}.get(row["status"], row["status"])
        )
    if row["status"] == "wrong" and row["first_call_s"] is not None:
        parts.append(f"after {seconds(row['first_call_s'])}")
    memory = row.get("memory")
    if memory is not None and memory["status"] != "ok" and row["status"] not in ("failed", "skipped"):
        parts.append(f"memory: {memory['reason']}")
    return "; ".join(parts).replace("|", "/").replace("\n", " ")


def _cell(cell: Mapping[str, Any]) -> list[str]:
    floor = next((row["contender"] for row in cell["rows"] if row["floor"]), None)
    rows = [
        (
            f"*{row['contender']}*" if row["floor"] else row["contender"],
            seconds(row.get("median_s")),
            _ratio(row, peers.OURS),
            "" if floor is None else _ratio(row, floor),
            _memory(row),
            "" if row.get("error") is None else number(row["error"]),
            _remark(row),
        )
        for row in cell["rows"]
    ]
    head = ("contender", "median", "× ours [95 %]", "× floor [95 %]", "extra / D·K", "error / tolerance", "remark")
    return [f"### {cell['title']}: {where(cell)}", "", *table(head, rows)]


def _targets(record: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            t["title"],
            t["who"],
            t["model"] or f"{t['numel']:,}",
            t["quantity"],
            number(t["value"]) + ("" if t["ci95"] is None else " [{}, {}]".format(*map(number, t["ci95"]))),
            number(t["limit"]),
            {True: "met", False: "**missed**", None: "not measured"}[t["met"]],
        )
        for t in record["targets"]
    ]
    lines = ["## Targets", "", *table(("operation", "whose", "size", "figure", "value", "at most", ""), rows)]
    slope = record.get("state_slope")
    if slope is not None:
        lines += [
            f"Stored state against rank: {slope['slope']:.4f} K + {slope['intercept']:.3f} in units of D·itemsize "
            f"(theory: K + 3), largest departure of a row {slope['worst_row']:.2%} over {slope['rows']} rows "
            f"of at least 256 MB: {'met' if slope['met'] else '**missed**'}.",
            "",
        ]
    return lines


def _sweep(record: Mapping[str, Any]) -> list[str]:
    """Return time against rank of ours, with the ratio to the floor."""
    lines = ["## Against rank (ours; in parentheses the ratio to the floor, then memory beyond the result / D·K)", ""]
    cells = [c for c in record["cells"] if c["model"] is None]
    ranks = sorted({c["rank"] for c in cells})
    names = dict.fromkeys(c["operation"] for c in cells)
    for numel in sorted({c["numel"] for c in cells}):
        rows = []
        for name in names:
            found = {c["rank"]: c for c in cells if c["operation"] == name and c["numel"] == numel}
            if len(found) > 1:
                rows.append((next(iter(found.values()))["title"], *(_ours(found.get(rank)) for rank in ranks)))
        if rows:
            lines += [f"D = {numel:,}", "", *table(("operation", *(f"K = {rank}" for rank in ranks)), rows)]
    return lines if len(lines) > 2 else []


def _ours(cell: Mapping[str, Any] | None) -> str:
    row = None if cell is None else next((r for r in cell["rows"] if r["contender"] == peers.OURS), None)
    if cell is None or row is None or not row["times_s"]:
        return ""
    floor = next((r["contender"] for r in cell["rows"] if r["floor"]), None)
    ratio = row["ratios"].get(floor)
    parts = [f"{ratio['median']:.2f}×" if ratio else "", _memory(row)]
    return f"{seconds(row['median_s'])} ({', '.join(p for p in parts if p)})"


def estimates(record: Mapping[str, Any]) -> tuple[int, int, list[str]]:
    """Return how many rows have a memory estimate within its bound, how many there are, and which are not."""
    rows = [
        (cell, row["estimate"], row["memory"].get("above_inputs"))
        for cell in record["cells"]
        for row in cell["rows"]
        if row.get("estimate") and row["estimate"]["within"] is not None
    ]
    off = [
        f"{cell['key']}: {estimate['above_inputs'] / 2**20:.1f} MiB estimated, {measured / 2**20:.1f} MiB measured"
        for cell, estimate, measured in rows
        if not estimate["within"]
    ]
    return len(rows) - len(off), len(rows), off


def markdown(record: Mapping[str, Any], plots: Iterable[str] = ()) -> str:
    """Return the whole document."""
    env, floors = record["environment"], record["machine_floors"]
    gpu = env.get("gpu")
    machine = gpu["name"] if gpu else f"{env['cpu']}, {env['cores']} cores, {env['threads']} threads"
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in env["versions"].items())
    kernels = "not stated" if "compiled_kernels" not in env else env["compiled_kernels"] or "none, torch's are used"
    within, total, off = estimates(record)
    lines = [
        f"# Time and memory against rank, {record['created']}",
        "",
        f"{machine}; {(env['memory_bytes'] or 0) / 2**30:.0f} GiB; {record['settings']['dtype']}; {versions}. "
        f"Compiled kernels: {kernels}.",
        f"Read {floors['read_bytes_per_s'] / 1e9:.1f} GB/s, copy {floors['copy_bytes_per_s'] / 1e9:.1f} GB/s (read and "
        f"write counted), {floors['seconds_per_normal'] * 1e9:.2f} ns a normal. "
        f"Run in {record['wall_s'] / 60:.0f} min{'' if record['finished'] else ', unfinished'}.",
        "",
        "Times are medians; ratios are paired within rounds, with bootstrap 95 % intervals. Memory is the peak of a",
        "process of its own above its inputs, less the result, in units of one D x K tensor. A wrong answer is not",
        "timed. Outputs are fresh for all, floors included; the floors are measured in the same rounds.",
        "",
        *_targets(record),
        *_sweep(record),
        *[f"![{Path(plot).stem}]({plot})\n" for plot in plots],
        "## Memory estimates",
        "",
        f"`lowrank_bdl.estimate_memory` is within 5 % + 16 MiB of the measured peak on {within} of {total} rows.",
        *[f"- {line}" for line in off],
        "",
        "## Every comparison",
        "",
    ]
    for cell in record["cells"]:
        if cell["full"]:
            lines += _cell(cell)
    lines += ["## Left out", "", *[f"- {line}" for line in dict.fromkeys(record["left_out"])], ""]
    return "\n".join(lines)
