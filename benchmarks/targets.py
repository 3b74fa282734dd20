"""The figures that the kernels are held to, each judged from a record of the suite."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks import peers
from benchmarks.collect_operations import FLATTEN_AND_COPY
from benchmarks.draw_operations import READ, READ_AND_DRAW, READ_AND_WRITE
from benchmarks.structure_operations import FRESH

LARGE_ROW = 256 * 10**6
"""Rows of at least this many bytes enter the slope of memory against rank."""
SAME_COST = 1.1
"""What "the same cost" means for a ratio of times."""


@dataclass(frozen=True)
class Target:
    """One figure.

    Attributes:
        operation: Which.
        limit: Largest value allowed.
        against: Contender whose time ours is divided by; None for memory or an error.
        extra: ``"dk"`` for memory beyond inputs and result in units of D·K·itemsize, ``"result"`` in those of the
            result, ``"dk_all"`` for memory beyond the inputs, results included, in units of D·K·itemsize.
        error: Name of an error of the answer.
        who: The contender that is judged.
        model: The network it holds for; None for all sizes.
    """

    operation: str
    limit: float
    against: str | None = None
    extra: str | None = None
    error: str | None = None
    who: str = peers.OURS
    model: str | None = None

    @property
    def quantity(self) -> str:
        """What is measured, in words."""
        if self.against is not None:
            return f"time / {self.against}"
        if self.error is not None:
            return f"error: {self.error}"
        return {
            "dk": "memory beyond inputs and result / (D·K·itemsize)",
            "dk_all": "memory beyond inputs / (D·K·itemsize)",
            "result": "memory beyond inputs and result / result",
        }[str(self.extra)]


TARGETS = (
    Target("sample", 1.2, against=READ_AND_DRAW),
    Target("sample", 1.2, against=READ_AND_DRAW, who="our MultivariateNormal.rsample"),
    Target("sample", 0.06, extra="dk"),
    Target("sample_30", 1.3, against=READ_AND_DRAW),
    Target("sample_30", 0.05, extra="result"),
    Target("log_prob_cached", 2.0, against=READ),
    Target("log_prob_new", 4.0, against=READ),
    Target("log_prob_new", 0.15, extra="dk"),
    Target("logdet", 4.0, against=READ),
    Target("logdet", 0.15, extra="dk"),
    Target("diagonal", 1.1, against=peers.HAND),
    Target("diagonal", 0.06, extra="dk"),
    Target("scaled_solve", SAME_COST, against=FRESH),
    Target("sum_solve", SAME_COST, against=FRESH),
    Target("indexed_solve", SAME_COST, against=FRESH),
    Target("log_prob_backward", 1.2, against=peers.HAND),
    Target("log_prob_backward", 1.3, extra="dk_all"),
    Target("principal_components", 2.2, against=READ_AND_WRITE),
    Target("principal_components", 1e-6, error="variances"),
    Target("principal_components", 1e-5, error="residual"),
    Target("principal_components", 1e-5, error="orthonormal"),
    Target("collect", 1.3, against=FLATTEN_AND_COPY, model="36M"),
    Target("collect", 2.0, against=FLATTEN_AND_COPY, model="330-tensors"),
)
TARGET_DIMS = (1_000_000, 10_000_000)


def judge(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every target with the value reached at each of its sizes; ``met`` is None where it was not measured."""
    return [entry for target in TARGETS for entry in _judged(target, record)]


def _judged(target: Target, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    main = record["settings"]["main_rank"]
    for cell in record["cells"]:
        if cell["operation"] != target.operation or cell["rank"] != main:
            continue
        if target.model != cell["model"] or (cell["model"] is None and cell["numel"] not in TARGET_DIMS):
            continue
        row = next((r for r in cell["rows"] if r["contender"] == target.who), None)
        value, interval = (None, None) if row is None else _value(target, row, cell)
        yield {
            "operation": target.operation,
            "title": cell["title"],
            "who": target.who,
            "quantity": target.quantity,
            "numel": cell["numel"],
            "model": cell["model"],
            "rank": cell["rank"],
            "value": value,
            "ci95": interval,
            "limit": target.limit,
            "met": None if value is None else value <= target.limit,
        }


def _value(target: Target, row: Mapping[str, Any], cell: Mapping[str, Any]) -> tuple[float | None, Any]:
    if target.against is not None:
        ratio = row.get("ratios", {}).get(target.against)
        return (None, None) if ratio is None else (ratio["median"], ratio["ci95"])
    if target.error is not None:
        error = row["errors"].get(target.error)
        return (error if isinstance(error, int | float) else None), None
    memory = row.get("memory")
    if memory is None or memory["status"] != "ok":
        return None, None
    extra = memory["extra_bytes"]
    if target.extra == "result":
        return extra / cell["result_bytes"], None
    if target.extra == "dk_all":
        return memory["above_inputs"] / cell["dk_bytes"], None
    return memory["extra_dk"], None


def state_slope(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Fit measured state against rank over large rows; None with fewer than two.

    Returns:
        Slope and intercept in units of ``D * itemsize`` (1 and 3 in theory), and the largest relative difference of a
        row from ``(K + 3) D itemsize``.
    """
    points = []
    for cell in record["cells"]:
        ours = next((r for r in cell["rows"] if r["contender"] == peers.OURS), None)
        if cell["operation"] != "state" or ours is None or not ours["memory"] or ours["memory"]["status"] != "ok":
            continue
        unit = cell["dk_bytes"] / cell["rank"]
        if ours["memory"]["above_inputs"] >= LARGE_ROW:
            points.append((cell["rank"], ours["memory"]["above_inputs"] / unit))
    if len({rank for rank, _ in points}) < 2:
        return None
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    worst = max(abs(y / (x + 3) - 1) for x, y in points)
    met = abs(slope - 1) <= 0.02 and worst <= 0.02
    return {"slope": slope, "intercept": mean_y - slope * mean_x, "worst_row": worst, "rows": len(points), "met": met}
