"""From the cells of `experiments.uci` to its table beside the published one, its figure and results.json."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from experiments import plots
from experiments.uci_published import COVERAGE, LOG_LIKELIHOOD, RMSE, SMALL, Level

Cells = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]  # by data set and method, in the order of the splits
OURS, THEIRS = "#D55E00", "#999999"


def levels_of(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, standard deviation and standard error over the splits."""
    std = statistics.stdev(values) if len(values) > 1 else math.nan
    return {
        "mean": statistics.fmean(values),
        "std": std,
        "standard_error": std / math.sqrt(len(values)),
        "values": list(values),
    }


def likelihood_key(dataset: str) -> str:
    """Return the metric that was published for a data set: small sets in original units, large ones normalised."""
    large = dataset in LOG_LIKELIHOOD and dataset not in SMALL
    return "normalized_gaussian_log_likelihood" if large else "gaussian_log_likelihood"


def published_of(dataset: str, method: str) -> dict[str, Level]:
    """Return what was published for a method, by metric; empty where nothing was."""
    sources = {likelihood_key(dataset): LOG_LIKELIHOOD, "rmse": RMSE, "coverage": COVERAGE}
    return {
        metric: table[dataset][method]
        for metric, table in sources.items()
        if dataset in table and method in table[dataset]
    }


def verdict(ours: float, published: Level) -> str:
    """Say how a log-likelihood stands to the published one and its printed standard deviation."""
    if ours >= published.mean:
        return "better"
    return "within 1 sd" if published.std is not None and ours >= published.mean - published.std else "worse"


def summary(cells: Cells) -> dict[str, Any]:
    """Return every metric's level, beside what was published."""
    found: dict[str, Any] = {}
    for dataset, methods in cells.items():
        for method, own in methods.items():
            entry: dict[str, Any] = {
                name: levels_of([cell["metrics"][name] for cell in own]) for name in own[0]["metrics"]
            }
            published = published_of(dataset, method)
            if published:
                entry["published"] = {name: level._asdict() for name, level in published.items()}
                key = likelihood_key(dataset)
                entry["verdict"] = verdict(entry[key]["mean"], published[key])
            found.setdefault(dataset, {})[method] = entry
    return found


def _level(entry: Mapping[str, Any], digits: int) -> str:
    spread = "" if math.isnan(entry["std"]) else f" ± {entry['std']:.{digits}f}"
    return f"{entry['mean']:.{digits}f}{spread}"


def _published(entry: Mapping[str, Any], name: str, digits: int) -> str:
    level = entry.get("published", {}).get(name)
    if level is None:
        return "–"
    return f"{level['mean']:.{digits}f}" + ("" if level["std"] is None else f" ± {level['std']:.{digits}f}")


def markdown(cells: Cells, found: Mapping[str, Any], notes: Sequence[str]) -> str:
    """Lay out the table, one block a data set, and how to read it."""
    head = [
        "data set", "method", "log-likelihood", "published", "", "mixture", "RMSE", "published", "95 % coverage",
        "published",
    ]  # fmt: skip
    lines = ["# UCI regression", "", _row(head), "|" + "---|" * len(head)]
    for dataset, methods in found.items():
        key = likelihood_key(dataset)
        for method, entry in methods.items():
            lines.append(
                _row(
                    [
                        dataset,
                        method,
                        _level(entry[key], 3),
                        _published(entry, key, 3),
                        entry.get("verdict", ""),
                        _level(entry[key.replace("gaussian_", "")], 3),
                        _level(entry["rmse"], 3),
                        _published(entry, "rmse", 3),
                        _level(entry["coverage"], 3),
                        _published(entry, "coverage", 3),
                    ]
                )
            )
    return "\n".join([*lines, "", *(f"{note}\n" for note in notes), "Chosen levels (medians over the splits):", "",
                      *_levels(cells)])  # fmt: skip


def _levels(cells: Cells) -> list[str]:
    lines = []
    for dataset, methods in cells.items():
        for method, own in methods.items():
            names = list(own[0]["levels"])
            medians = {name: statistics.median(cell["levels"][name] for cell in own) for name in names}
            if medians:
                lines.append(f"- {dataset}, {method}: " + ", ".join(f"{n} {v:.3g}" for n, v in medians.items()))
    return lines


def _row(entries: Sequence[str]) -> str:
    return "| " + " | ".join(entries) + " |"


def draw(path: Path, found: Mapping[str, Any]) -> None:
    """Draw log-likelihood and coverage of each method, ours beside the published, one column a data set."""
    with plt.rc_context(plots.STYLE):
        columns = dict(ncols=len(found), squeeze=False, sharex="col")
        figure, panels = plots._axes(1.2 + 3.1 * len(found), 6.0, nrows=2, **columns)
        for column, (dataset, methods) in enumerate(found.items()):
            key = likelihood_key(dataset)
            for axes, name in zip(panels[:, column], (key, "coverage"), strict=True):
                place = np.arange(len(methods))
                ours = [methods[method][name] for method in methods]
                axes.errorbar(
                    place - 0.12, [e["mean"] for e in ours], [np.nan_to_num(e["std"]) for e in ours],
                    fmt="o", color=OURS, label="ours, ± sd over splits",
                )  # fmt: skip
                levels = [entry.get("published", {}).get(name) for entry in methods.values()]
                known = [(number, level) for number, level in enumerate(levels) if level is not None]
                axes.errorbar(
                    [n + 0.12 for n, _ in known], [level["mean"] for _, level in known],
                    [level["std"] or 0.0 for _, level in known], fmt="s", color=THEIRS, label="published",
                )  # fmt: skip
                axes.set_xticks(place, list(methods), rotation=60, ha="right", fontsize=9)
            panels[1, column].set_ylim(top=min(panels[1, column].get_ylim()[1], 1.01))
            panels[1, column].axhline(0.95, color="#555555", linestyle="--", linewidth=1.2)
            panels[0, column].set_title(dataset)
        panels[0, 0].set_ylabel("test log-likelihood [nat]")
        panels[1, 0].set_ylabel("coverage of the 95 % interval")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=10)
        plots._save(figure, path)
