"""Table and figure of `experiments.label_evidence`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from experiments import plots
from experiments.common import format_table

Cells = Sequence[Mapping[str, Any]]
# Where each number is in a cell, and how the table shows it
COLUMNS = {
    "changed": (("changed",), "labels wrong %", 100, 1),
    "train_nll": (("train", "nll"), "training NLL", 1, 4),
    "train_accuracy": (("train", "accuracy"), "training acc. %", 100, 1),
    "test_accuracy": (("test", "accuracy"), "test acc. %", 100, 1),
    "diagonal": (("laplace", "diagonal", "evidence"), "evidence, diagonal", 1, 3),
    "KFAC": (("laplace", "KFAC", "evidence"), "evidence, KFAC", 1, 3),
    "best_diagonal": (("laplace", "diagonal", "best_evidence"), "best, diagonal", 1, 3),
    "best_KFAC": (("laplace", "KFAC", "best_evidence"), "best, KFAC", 1, 3),
}
STYLES = {
    "train_nll": ("#000000", "s", "training images, corrupted labels"), "test_nll": ("#E69F00", "D", "test images"),
    "diagonal": ("#0072B2", "^", "diagonal"), "KFAC": ("#D55E00", "o", "Kronecker factors"),
}  # fmt: skip


def value_at(cell: Mapping[str, Any], path: Sequence[str]) -> float:
    found: Any = cell
    for key in path:
        found = found[key]
    return float(found)


def values(cells: Cells, path: Sequence[str]) -> dict[float, list[float]]:
    """Return a number of every seed, by fraction."""
    found: dict[float, list[float]] = {}
    for cell in cells:
        found.setdefault(cell["fraction"], []).append(value_at(cell, path))
    return found


def summary(cells: Cells) -> dict[str, list[dict[str, float]]]:
    """Mean and standard deviation over seeds of every column, by rising fraction; one seed has no deviation."""
    return {
        name: [
            {"fraction": fraction, "mean": fmean(found), "sd": stdev(found) if len(found) > 1 else math.nan}
            for fraction, found in values(cells, path).items()
        ]
        for name, (path, *_) in COLUMNS.items()
    }


def table(cells: Cells, what: str) -> str:
    """Lay out mean ± standard deviation over seeds; evidences are an example, in nats."""
    found = summary(cells)
    fractions = [entry["fraction"] for entry in found["changed"]]
    rows = []
    for number, fraction in enumerate(fractions):
        row = [f"{fraction:g}"]
        for name, (_, _, factor, digits) in COLUMNS.items():
            entry = found[name][number]
            spread = "" if math.isnan(entry["sd"]) else f" ± {factor * entry['sd']:.{digits}f}"
            row.append(f"{factor * entry['mean']:.{digits}f}{spread}")
        rows.append(row)
    seeds = len(values(cells, ("seed",))[fractions[0]])
    title = (
        f"{what}: {cells[0]['images']:,} training images, {cells[0]['parameters']:,} parameters, {seeds} seeds\n"
        "Log evidence an example [nats], ± standard deviation over seeds: at the prior precision of training, "
        f"{cells[0]['prior_precision']:g}, and at the best one"
    )
    return f"{title}\n\n{format_table(['drawn anew', *(title for _, title, _, _ in COLUMNS.values())], rows)}"


def draw(path: Path, cells: Cells, num_classes: int, what: str) -> None:
    """Loss and log evidence against the fraction of labels that were drawn anew: mean and every seed.

    Args:
        path: File to write.
        cells: One a fraction and seed.
        num_classes: The evidence of a network that has learnt nothing is minus the logarithm of it.
        what: Network and data, for the title.
    """
    with plt.rc_context(plots.STYLE):
        figure, (losses, *evidences) = plots._axes(14.0, 4.4, ncols=3)
        for name, where in (("train_nll", ("train", "nll")), ("test_nll", ("test", "nll"))):
            _seeds(losses, values(cells, where), *STYLES[name])
        losses.axhline(math.log(num_classes), color="#555555", linestyle="--", linewidth=1.2, label="chance")
        losses.set_ylabel("NLL [nats per image]")
        losses.set_title("Loss")
        titles = {
            "best_evidence": "Evidence, best prior precision",
            "evidence": "Evidence, prior precision of training",
        }
        for axes, (key, title) in zip(evidences, titles.items(), strict=True):
            for method in ("diagonal", "KFAC"):
                _seeds(axes, values(cells, ("laplace", method, key)), *STYLES[method])
            axes.axhline(-math.log(num_classes), color="#555555", linestyle="--", linewidth=1.2, label="chance")
            axes.set_ylabel("log evidence [nats per image]")
            axes.set_title(title)
        for axes in (losses, *evidences):
            axes.set_xlabel("fraction of the labels drawn anew")
            axes.legend(loc="best", fontsize=10)
        figure.suptitle(what, fontsize=12)
        plots._save(figure, path)


def _seeds(axes: Axes, found: Mapping[float, Sequence[float]], color: str, marker: str, label: str) -> None:
    at = list(found)
    axes.plot(at, [fmean(each) for each in found.values()], color=color, marker=marker, label=label)
    places = np.concatenate([np.full(len(each), fraction) for fraction, each in found.items()])
    axes.plot(places, np.concatenate(list(found.values())), ".", color=color, markersize=4, alpha=0.5)
