"""Table, files and figure of `experiments.grad_cov`."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from experiments import plots
from experiments.common import RunDir, format_table, write_atomically

FILES = ("grad_cov.json", "grad_cov.csv", "grad_cov.png")
# Key of a measurement -> head of its column, and how it is shown
COLUMNS = {
    "lr": ("lr", ".3g"), "optimal_learning_rate": ("optimal lr", ".3g"), "trace": ("tr V", ".3g"),
    "squared_gradient_norm": ("|gradient|²", ".3g"), "signal_to_noise": ("signal/noise", ".3g"),
    "noise_scale": ("noise scale", ".3g"), "swag_share": ("along SWAG %", ".2f"),
}  # fmt: skip
TABLE_ROWS = 12
BLUE, RED, GREEN, PINK = plots.SEQUENCE


def measurements(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a record for every epoch that was measured: epoch, learning rate, training loss [nats], and the noise."""
    return [
        {**{key: record[key] for key in ("epoch", "lr", "loss")}, **record["grad_cov"]}
        for record in history
        if "grad_cov" in record
    ]


def report(
    run: RunDir, history: Sequence[Mapping[str, Any]], title: str, batch_size: int, parameters: int
) -> list[str]:
    """Write grad_cov.json, .csv and .png; return the table, at most a dozen epochs of it.

    Args:
        run: Where to.
        history: Records of all epochs.
        title: Network and data set.
        batch_size: Images in a batch.
        parameters: D, the number of weights.
    """
    found = measurements(history)
    run.write_json("grad_cov.json", {"schema": 1, "batch_size": batch_size, "parameters": parameters, "epochs": found})
    write_atomically(run.path / "grad_cov.csv", to_csv(found))
    draw(run.path / "grad_cov.png", found, f"{title}: noise of the gradient of {batch_size} images")
    step = -(-len(found) // TABLE_ROWS)
    shown = found[::-1][::step][::-1]
    columns = {key: head for key, head in COLUMNS.items() if any(key in row for row in found)}
    rows = [[str(row["epoch"]), *(cell(row, key, style) for key, (_, style) in columns.items())] for row in shown]
    return ["", format_table(["epoch", *(head for head, _ in columns.values())], rows)]


def cell(row: Mapping[str, Any], key: str, style: str) -> str:
    if key not in row:
        return "-"
    return format(row[key] * (100 if key == "swag_share" else 1), style)


def to_csv(found: Sequence[Mapping[str, Any]]) -> str:
    """Write a line an epoch; an eigenvalue has a column of its own, and what was not measured is empty."""
    rows = []
    for record in found:
        values = {f"eigenvalue_{i}": value for i, value in enumerate(record.get("eigenvalues", ()), start=1)}
        rows.append({key: value for key, value in record.items() if key != "eigenvalues"} | values)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def draw(path: Path, found: Sequence[Mapping[str, Any]], title: str) -> None:
    """Trace and largest eigenvalue of the noise, optimal and used learning rate, and signal to noise, by epoch."""

    def line(axes: Axes, key: str, color: str, label: str, **options: Any) -> None:
        points = [(row["epoch"], row[key]) for row in found if key in row and 0 < row[key] < math.inf]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, label=label, marker="o", **options)

    found = [{**row, "largest_eigenvalue": max(row.get("eigenvalues", [0.0]))} for row in found]
    with plt.rc_context(plots.STYLE):
        figure, (noise, rates, signal) = plots._axes(9.0, 8.0, nrows=3, sharex=True)
        line(noise, "trace", BLUE, "trace")
        line(noise, "largest_eigenvalue", PINK, "largest eigenvalue")
        line(noise, "squared_gradient_norm", GREEN, "squared norm of the mean gradient", linestyle=":")
        line(rates, "optimal_learning_rate", RED, "optimal for sampling")
        line(rates, "lr", "#000000", "used", linestyle=":")
        line(signal, "noise_scale", BLUE, "noise scale [images]")
        for axes, label in ((noise, "gradient noise V"), (rates, "learning rate"), (signal, "noise scale [images]")):
            axes.set_yscale("log")
            plots._plain_log_numbers(axes)
            axes.set_ylabel(label)
        for axes in (noise, rates):
            axes.legend(fontsize=10, loc="center left", bbox_to_anchor=(1.0, 0.5))
        noise.set_title(title)
        signal.set_xlabel("epoch")
        signal.xaxis.set_major_locator(MaxNLocator(integer=True))
        plots._save(figure, path)
