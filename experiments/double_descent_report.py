"""Table and figure of `experiments.double_descent`: what each method makes of every width."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import NullLocator

from experiments import plots
from experiments.common import format_table
from experiments.evaluation import METRICS, Predictions
from experiments.simplex_report import averaged

SINGLE = ("SGD", "SWAG")  # of one run each: mean and spread over the members
TOGETHER = {"deep ensemble": "SGD", "MultiSWAG": "SWAG"}  # of all members
STYLES = {
    "SGD": ("#000000", "s", "-"), "deep ensemble": ("#000000", "s", ":"), "SWAG": ("#D55E00", "o", "-"),
    "MultiSWAG": ("#D55E00", "o", ":"),
}  # fmt: skip


def row(
    width: int, cells: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Predictions]], seed: int
) -> dict[str, Any]:
    """Measure every method at one width.

    Args:
        width: Of the networks.
        cells: One a member.
        predictions: Of each member, by method.
        seed: Of the resamples behind standard errors.

    Returns:
        For SGD and SWAG mean and standard deviation over the members (NaN of one), for ensembles of all members the
        value and its standard error over the test images.
    """
    found: dict[str, dict[str, float]] = {}
    for method in SINGLE:
        each = [averaged([own[method]], seed) for own in predictions]
        found[method] = {}
        for name in METRICS:
            values = [metrics[name] for metrics in each]
            found[method] |= {name: fmean(values), f"{name}_sd": stdev(values) if len(values) > 1 else math.nan}
    for name, method in TOGETHER.items():
        found[name] = averaged([own[method] for own in predictions], seed)
    return {
        "width": width,
        "parameters": cells[0]["parameters"],
        "train_error": fmean(1 - cell["train"]["accuracy"] for cell in cells),
        "methods": found,
    }


def table(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Lay out test error and NLL against the width."""
    methods = (*SINGLE, *TOGETHER)
    lines = []
    for entry in rows:
        line = [str(entry["width"]), f"{entry['parameters']:,}", f"{100 * entry['train_error']:.2f}"]
        for method in methods:
            values = entry["methods"][method]
            spread = values.get("accuracy_sd", math.nan)
            line.append(
                f"{100 * (1 - values['accuracy']):.2f}" + ("" if math.isnan(spread) else f" ± {100 * spread:.2f}")
            )
        lines.append([*line, *(f"{entry['methods'][method]['nll']:.4f}" for method in methods)])
    header = [
        "width", "weights", "train error %", *(f"{method} error %" for method in methods),
        *(f"{method} NLL" for method in methods),
    ]  # fmt: skip
    return f"{title}\nTest images; ± standard deviation over networks\n\n{format_table(header, lines)}"


def draw(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw test error and NLL against the width, and the training error that shows where labels can be fitted.

    Args:
        path: File to write.
        rows: One a width.
        title: Of the figure.
    """
    widths = np.array([entry["width"] for entry in rows])
    with plt.rc_context(plots.STYLE):
        figure, (errors, losses) = plots._axes(11.0, 4.6, ncols=2)
        for method, (color, marker, line) in STYLES.items():
            style = dict(color=color, marker=marker, linestyle=line, label=method)
            values = [entry["methods"][method] for entry in rows]
            error = np.array([100 * (1 - each["accuracy"]) for each in values])
            loss = np.array([each["nll"] for each in values])
            errors.plot(widths, error, **style)
            losses.plot(widths, loss, **style)
            if method in SINGLE:
                for axes, mean, name, factor in ((errors, error, "accuracy", 100), (losses, loss, "nll", 1)):
                    spread = factor * np.array([each[f"{name}_sd"] for each in values])
                    axes.fill_between(widths, mean - spread, mean + spread, color=color, alpha=0.15, linewidth=0)
        shown = [100 * entry["train_error"] for entry in rows]
        errors.plot(widths, shown, color="#999999", linestyle="--", label="SGD, training images and labels")
        errors.set_ylabel("error [%]")
        losses.set_ylabel("test NLL [nats per image]")
        losses.set_yscale("log")
        plots._plain_log_numbers(losses)
        for axes in (errors, losses):
            axes.set_xscale("log")
            axes.set_xticks(widths, [str(width) for width in widths])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel("width: channels of the first stage")
        errors.legend(loc="best", fontsize=10)
        figure.suptitle(title)
        plots._save(figure, path)
