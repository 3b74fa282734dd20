"""From what each seed found to the study's table, figure and results.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from experiments import plots
from experiments.study_methods import BASELINE, METHODS
from experiments.study_statistics import holm, mean_interval, paired_difference
from experiments.study_tasks import Task

Cells = Mapping[str, Sequence[Mapping[str, Any]]]  # by task, what each seed found, in the order of the seeds
UNITS = {"rmse": "RMSE", "error": "error %", "nll": "NLL"}
SIGNIFICANT = 0.05  # family-wise
COLORS = {**plots.COLORS, "SGD constant": "#7F7F7F"}
MARKERS = {**plots.MARKERS, "SGD constant": "X"}


def values(cells: Sequence[Mapping[str, Any]], method: str, metric: str) -> list[float]:
    return [cell["methods"][method]["test"][metric] for cell in cells]


def analyse(tasks: Sequence[Task], cells: Cells, confidence: float) -> dict[str, Any]:
    """Return levels of every method, and differences from the baseline, with intervals and Holm's p-values.

    The comparisons of the primary metrics (RMSE, error) are one family, over all tasks and methods; those of the NLL
    are another.
    """
    found: dict[str, Any] = {"tasks": {}, "families": {}}
    for task in tasks:
        entry: dict[str, Any] = {}
        for metric in task.metrics:
            of = {name: values(cells[task.name], name, metric) for name in (BASELINE, *METHODS)}
            entry[metric] = {
                "levels": {name: _level(each, confidence) for name, each in of.items()},
                "differences": {
                    name: paired_difference(of[name], of[BASELINE], confidence).as_json() for name in METHODS
                },
            }
        found["tasks"][task.name] = entry
    for place, family in enumerate(("primary", "nll")):
        members = [found["tasks"][task.name][task.metrics[place]]["differences"][m] for task in tasks for m in METHODS]
        for member, adjusted in zip(members, holm([member["p_value"] for member in members]), strict=True):
            member["p_holm"] = adjusted
        found["families"][family] = {"comparisons": len(members), "verdicts": _verdicts(tasks, found, place)}
    return found


def _level(each: Sequence[float], confidence: float) -> dict[str, Any]:
    interval = mean_interval(each, confidence)
    return {"mean": interval.mean, "low": interval.low, "high": interval.high, "values": list(each)}


def verdict(difference: Mapping[str, Any]) -> str:
    """Say which way a difference goes, if the family of comparisons lets it be said; less is better."""
    if difference["p_holm"] >= SIGNIFICANT:
        return "undecided"
    return "better" if difference["mean"] < 0 else "worse"


def _verdicts(tasks: Sequence[Task], found: Mapping[str, Any], place: int) -> dict[str, dict[str, list[str]]]:
    verdicts: dict[str, dict[str, list[str]]] = {m: {"better": [], "worse": [], "undecided": []} for m in METHODS}
    for task in tasks:
        for method, difference in found["tasks"][task.name][task.metrics[place]]["differences"].items():
            verdicts[method][verdict(difference)].append(task.name)
    return verdicts


def markdown(tasks: Sequence[Task], cells: Cells, analysis: Mapping[str, Any], confidence: float) -> str:
    """Lay out the study: the table, how to read it, and what follows from it, negative results included."""
    head = ["task", "training / test, epochs, seeds", "metric", BASELINE, *(f"{name} − {BASELINE}" for name in METHODS)]
    lines = ["# Does averaging weights help?", "", _row(head), "|" + "---|" * len(head)]
    for task in tasks:
        first = cells[task.name][0]
        size = f"{first['sizes']['train']:,} / {first['sizes']['test']:,}, {task.epochs}, {len(cells[task.name])}"
        for metric in task.metrics:
            entry = analysis["tasks"][task.name][metric]
            level = entry["levels"][BASELINE]
            cell = f"{level['mean']:.4g} ± {level['high'] - level['mean']:.2g}"
            lines.append(
                _row([task.name, size, UNITS[metric], cell, *(_cell(entry["differences"][name]) for name in METHODS)])
            )
    comparisons = {name: family["comparisons"] for name, family in analysis["families"].items()}
    lines += [
        "",
        f"Of every metric less is better. {BASELINE}: mean over seeds ± half the width of its {100 * confidence:g} % "
        f"interval. Other columns: mean paired difference over the same seeds, [{100 * confidence:g} % interval of "
        "Student's t], p-value adjusted by Holm's method; **bold** where that is below "
        f"{SIGNIFICANT:g}. The intervals are not adjusted. Families: {comparisons['primary']} comparisons of RMSE or "
        f"error, and {comparisons['nll']} of NLL. Regression: every seed has data, initial weights and order of its "
        "own. Images: every seed has the same training and test images, so that the intervals tell how much initial "
        "weights and order matter and not how much the choice of the images does.",
        "",
    ]
    for family, name in (("primary", "RMSE or error"), ("nll", "NLL")):
        for method in METHODS:
            lines.append(_sentence(method, name, analysis["families"][family]["verdicts"][method], len(tasks)))
    return "\n".join(lines) + "\n"


def _row(row: Sequence[str]) -> str:
    return "| " + " | ".join(row) + " |"


def _cell(difference: Mapping[str, Any]) -> str:
    text = "{mean:+.3g} [{low:+.3g}, {high:+.3g}] p = {p_holm:.2g}".format_map(difference)
    return text if verdict(difference) == "undecided" else f"**{text}**"


def _sentence(method: str, metric: str, verdicts: Mapping[str, Sequence[str]], count: int) -> str:
    parts = []
    for word in ("better", "worse"):
        names = f" ({', '.join(verdicts[word])})" if verdicts[word] else ""
        parts.append(f"{word} than {BASELINE} on {len(verdicts[word])}{names}")
    return f"- {metric}, {method}: {', '.join(parts)}, undecided on {len(verdicts['undecided'])} of {count} tasks."


def draw(path: Path, tasks: Sequence[Task], analysis: Mapping[str, Any], confidence: float) -> None:
    """One row a task, one column a metric: mean paired difference of each method, with its interval and a line at 0."""
    with plt.rc_context(plots.STYLE):
        figure, panels = plots._axes(10.0, 1.0 + 1.55 * len(tasks), nrows=len(tasks), ncols=2, squeeze=False)
        for row, task in zip(panels, tasks, strict=True):
            for axes, metric in zip(row, task.metrics, strict=True):
                differences = analysis["tasks"][task.name][metric]["differences"]
                for place, method in enumerate(METHODS):
                    found = differences[method]
                    decided = verdict(found) != "undecided"
                    axes.errorbar(
                        found["mean"],
                        -place,
                        xerr=(found["high"] - found["low"]) / 2,
                        color=COLORS[method],
                        marker=MARKERS[method],
                        fillstyle="full" if decided else "none",
                        markersize=7,
                        capsize=3,
                    )
                axes.axvline(0, color="#555555", linestyle="--", linewidth=1.2)
                axes.set_yticks([-place for place in range(len(METHODS))], METHODS if metric != "nll" else [])
                axes.set_ylim(0.6 - len(METHODS), 0.6)
                axes.locator_params(axis="x", nbins=6)
                axes.set_title(f"{task.name}: {UNITS[metric]}", fontsize=11)
        figure.suptitle(
            f"Paired difference from {BASELINE} over seeds, {100 * confidence:g} % intervals (left of 0: better)\n"
            f"filled: Holm-adjusted p < {SIGNIFICANT:g}",
            fontsize=12,
        )
        plots._save(figure, path)
