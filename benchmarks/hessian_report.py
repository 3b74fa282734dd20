"""The tables of a comparison of eigensolvers."""

from typing import Any

from benchmarks.lanczos_steps import FLOOR, OURS
from experiments.common import format_table

MIB = 2.0**20


def markdown(record: dict[str, Any]) -> str:
    """Lay a record out."""
    machine, found = record["environment"], record["hessian"]
    size, reference = found["size"], found["reference"]
    packages = ", ".join(f"{name} {version}" for name, version in record["peers"].items() if version)
    top, bottom = reference["top"], reference["bottom"]
    return "\n".join(
        [
            f"# Eigenvalues of a Hessian: top {size['top']} and bottom {size['bottom']}",
            "",
            f"{machine['cpu']}, {machine['threads']} thread(s), torch {machine['versions']['torch']}, {packages}.",
            "",
            f"A convolutional network of {found['weights']:,} weights on {size['images']} images (loss "
            f"{found['loss']:.2g}): eigenvalues {top[0]:.4g} to {top[-1]:.4g}, and {bottom[-1]:.4g} to "
            f"{bottom[0]:.4g}. Residuals and errors "
            "are relative to the largest, measured in float64; those of the reference are below "
            f"{reference['residual']:.0e}. In column `ours`: how many products ours needs for the same worst residual. "
            "Memory is beyond network and images. Times are medians, ratios are of the same round; what is marked "
            "`once` was timed by one call.",
            "",
            "```",
            _hessian_table(found),
            "```",
            "",
            *_remarks(found["rows"]),
            "",
            "## The solver's own time and memory",
            "",
            f"A diagonal matrix, D = {record['solver'][0]['dim']:,}, float32. The floor is four matrix-vector products "
            f"with the basis so far at each step, as two-pass reorthogonalisation needs them, and nothing else; a run "
            "also allocates its basis, multiplies by the matrix, and ends with the eigenvectors.",
            "",
            "```",
            _solver_table(record["solver"]),
            "```",
            "",
        ]
    )


def _remarks(rows: list[dict[str, Any]]) -> list[str]:
    said = {"left out": "", **{row["contender"]: row["note"] for row in rows if row["note"]}}
    for row in rows:
        if row["status"] in ("skipped", "wrong", "failed"):
            said[row["contender"]] = row["reason"]
    return [f"- {name}: {remark}." for name, remark in said.items() if remark]


def _hessian_table(found: dict[str, Any]) -> str:
    head = ["way", "products", "ours", "time [s]", "/ ours", "95 %", "peak [MiB]"]
    head += ["residual, top", "bottom", "error, top", "bottom"]
    lines = []
    for row in found["rows"]:
        worth = row["worth"]
        if not worth:
            lines.append([row["contender"], row["status"], *[""] * (len(head) - 2)])
            continue
        lines.append(
            [
                row["contender"],
                f"{worth['products']:,}",
                _count(row["ours_for_this_residual"]),
                *_time(row, next(iter(row.get("ratios", {}).values()), None)),
                f"{worth['above_inputs'] / MIB:.0f}",
                *(_small(worth[f"{kind}_{end}"]) for kind in ("residual", "error") for end in ("top", "bottom")),
            ]
        )
    return format_table(head, lines)


def _solver_table(parts: list[dict[str, Any]]) -> str:
    head = ["way", "steps", "time [s]", "/ floor", "95 %", "/ ours", "vectors beyond the basis", "bases"]
    lines = []
    for part in parts:
        for row in part["rows"]:
            ratios, memory = row.get("ratios", {}), row.get("memory", {})
            kept = memory.get("status") == "ok"
            own = ratios.get(OURS)
            lines.append(
                [
                    row["contender"] if row["times_s"] else f"{row['contender']} ({row['status']})",
                    str(part["steps"]),
                    *_time(row, ratios.get(FLOOR)),
                    f"{own['median']:.2f}" if own else "",
                    f"{memory['vectors_beyond_basis']:.1f}" if kept else "",
                    f"{memory['bases']:.2f}" if kept else "",
                ]
            )
    return format_table(head, lines)


def _time(row: dict[str, Any], ratio: dict[str, Any] | None) -> list[str]:
    if not row["times_s"]:
        return [row["status"], "", ""]
    once = " (once)" if row["status"] == "once" else ""
    low, high = (ratio and ratio["ci95"]) or (None, None)
    return [
        f"{row['median_s']:.3g}{once}",
        f"{ratio['median']:.2f}" if ratio else "",
        "" if low is None else f"{low:.2f} to {high:.2f}",
    ]


def _count(value: int | None) -> str:
    return "" if value is None else str(value)


def _small(value: float | str | None) -> str:
    return "none" if value is None else f"{float(value):.1e}"
