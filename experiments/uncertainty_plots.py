"""Figures with every method of a comparison: a panel each, or a row each."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from experiments import plots

FAMILIES = {
    "one network": ("#000000", ("SGD", "SWA", "Temperature", "SWA-Temperature")),
    "SWAG": ("#D55E00", ("SWAG-Diag", "SWAG", "SWAG-block", "MultiSWAG", "SWAG-Dropout")),
    "ensemble": ("#009E73", ("MultiSWA", "DeepEnsemble", "FGE", "SGD-Iterates")),
    "Laplace": ("#0072B2", ("Laplace-KFAC", "Laplace-Diag")),
    "sampling, VI, dropout": ("#CC79A7", ("Dropout", "SGLD", "SGHMC", "MFVI")),
    "noise control": ("#8C6D1F", ("HomoNoise", "NaiveNoise")),
}
COLORS = {method: color for color, methods in FAMILIES.values() for method in methods}
REFERENCE = "SGD"  # drawn in grey behind every other method
LEAST_DOUBT = 1e-6
ENTROPY_EDGES = np.concatenate([[0.0], np.logspace(-8, 0.5, 31)])  # the first bin holds all that is smaller [nats]

Curve = tuple[ArrayLike, ArrayLike]  # mean confidence and accuracy of each bin


def color_of(method: str) -> str:
    """Return the colour of a method's family; of FOLDER/METHOD that of the method."""
    return COLORS.get(method.rpartition("/")[2], "#000000")


def _panels(count: int, width: float, height: float, columns: int = 4) -> tuple[Figure, list[Axes]]:
    rows = -(-count // columns)
    figure, panels = plots._axes(
        width * columns, height * rows + 1.1, nrows=rows, ncols=columns, sharex=True, sharey=True, squeeze=False
    )
    for axes in panels.flat[count:]:
        axes.set_visible(False)
    for axes in panels.flat[max(count - columns, 0) : count]:
        axes.xaxis.set_tick_params(labelbottom=True)  # the lowest of each column, also where a row is not full
    return figure, list(panels.flat[:count])


def _doubt_and_gap(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    confidence, accuracy = (np.asarray(values, dtype=float) for values in curve)
    return np.maximum(1 - confidence, LEAST_DOUBT), confidence - accuracy


def reliability_panels(
    path: Path, curves: Mapping[str, Sequence[Curve]], ece: Mapping[str, float], title: str, reference: str = REFERENCE
) -> None:
    """Confidence minus accuracy against confidence: a panel a method, a line a seed.

    Args:
        path: File to write.
        curves: For each method, and each seed, mean confidence and accuracy of each bin.
        ece: For each method, the expected calibration error.
        title: Title of the figure.
        reference: Method that is drawn in grey behind all others.
    """
    with plt.rc_context(plots.STYLE):
        figure, panels = _panels(len(curves), 2.9, 2.15)
        points = {name: [_doubt_and_gap(curve) for curve in own] for name, own in curves.items()}
        every = np.concatenate([doubt for own in points.values() for doubt, _ in own])
        largest, smallest = float(every.max()) * 1.6, float(every.min()) / 1.6
        for axes, (name, own) in zip(panels, points.items(), strict=True):
            axes.axhline(0, color="#555555", linestyle="--", linewidth=1)
            for doubt, gap in points.get(reference, []) if name != reference else []:
                axes.plot(doubt, gap, color="#bbbbbb", linewidth=1)
            for doubt, gap in own:
                axes.plot(doubt, gap, color=color_of(name), marker="o", markersize=2.5, linewidth=1.3)
            axes.set_xscale("log")
            axes.set_xlim(largest, smallest)
            plots._confidence_ticks(axes, largest, smallest)
            axes.tick_params(axis="x", labelsize=8)
            for label in axes.get_xticklabels():
                label.set(rotation=45, ha="right")
            axes.set_title(f"{name}: ECE {100 * ece[name]:.2f} %", fontsize=10.5)
        behind = f"; grey: {reference}" if reference in curves else ""
        figure.suptitle(f"{title}\n(bins of equal mass, a line a seed{behind})", fontsize=12)
        figure.supxlabel("confidence", fontsize=11)
        figure.supylabel("confidence − accuracy   (above 0: overconfident)", fontsize=11)
        plots._save(figure, path)


def entropy_counts(entropy: ArrayLike) -> np.ndarray:
    """Count predictions by entropy [nats] in the bins of `entropy_panels`; none is left out."""
    inside = np.clip(np.asarray(entropy, dtype=float), 0, ENTROPY_EDGES[-1])
    counts, _ = np.histogram(inside, ENTROPY_EDGES)
    return counts


def entropy_panels(
    path: Path,
    inside: Mapping[str, ArrayLike],
    outside: Mapping[str, ArrayLike],
    auroc: Mapping[str, float],
    names: tuple[str, str],
) -> None:
    """Histograms of predictive entropy: a panel a method, test images against foreign ones.

    Args:
        path: File to write.
        inside: For each method, `entropy_counts` of the test images.
        outside: The same of the foreign images.
        auroc: For each method, the area under the ROC curve.
        names: What the two sets of images are called.
    """
    with plt.rc_context(plots.STYLE):
        figure, panels = _panels(len(inside), 2.9, 2.0)
        edges = np.concatenate([[ENTROPY_EDGES[1] ** 2 / ENTROPY_EDGES[2]], ENTROPY_EDGES[1:]])
        for axes, method in zip(panels, inside, strict=True):
            for counts, color in ((inside[method], "#0072B2"), (outside[method], "#E69F00")):
                share = np.asarray(counts, dtype=float) / np.sum(np.asarray(counts, dtype=float))
                axes.stairs(share, edges, fill=True, color=color, alpha=0.45)
                axes.stairs(share, edges, color=color, linewidth=1.2)
            axes.set_xscale("log")
            axes.set_xticks([1e-8, 1e-6, 1e-4, 1e-2, 1])
            axes.minorticks_off()
            axes.tick_params(labelsize=9)
            axes.set_title(f"{method}: AUROC {100 * auroc[method]:.1f} %", fontsize=10.5)
        handles = [plt.Rectangle((0, 0), 1, 1, color=color, alpha=0.6) for color in ("#0072B2", "#E69F00")]
        figure.legend(handles, names, loc="outside upper right", ncols=2, fontsize=11)
        figure.supxlabel("entropy of the prediction [nats]; the first bin holds all below", fontsize=11)
        figure.supylabel("share of the images", fontsize=11)
        plots._save(figure, path)


def metric_dots(
    path: Path,
    values: Mapping[str, Mapping[str, Sequence[float]]],
    errors: Mapping[str, Mapping[str, float]],
    control: str,
    title: str,
) -> None:
    """A row a method, a column a metric: mean with its error bar, each seed as a small dot, a line at the control.

    Args:
        path: File to write.
        values: For each metric (the label of its axis), and each method, the values of all seeds.
        errors: For each metric and method, the length of the error bar to one side.
        control: The method whose mean the dashed lines show.
        title: Title of the figure.
    """
    methods = list(next(iter(values.values())))
    with plt.rc_context(plots.STYLE):
        figure, panels = plots._axes(
            2.1 + 2.35 * len(values), 1.7 + 0.27 * len(methods), ncols=len(values), sharey=True, squeeze=False
        )
        for axes, (metric, own) in zip(panels.flat, values.items(), strict=True):
            for place, method in enumerate(methods):
                seeds, error, color = np.asarray(own[method], dtype=float), errors[metric][method], color_of(method)
                axes.plot(seeds, np.full(len(seeds), -place), ".", color=color, alpha=0.4, markersize=5)
                axes.errorbar(seeds.mean(), -place, xerr=error, color=color, marker="o", markersize=5.5, capsize=2.5)
            axes.axvline(float(np.mean(own[control])), color="#8C6D1F", linestyle="--", linewidth=1.1, zorder=0)
            axes.set_xlabel(metric, fontsize=10.5)
            every = np.concatenate([np.asarray(seeds, dtype=float) for seeds in own.values()])
            if every.min() > 0 and every.max() > 4 * np.median(every):
                axes.set_xscale("log")
                plots._plain_log_numbers(axes, low_panel=True, of="x")
            else:
                axes.locator_params(axis="x", nbins=4)
            axes.tick_params(axis="x", which="both", labelsize=9)
        panels[0, 0].set_yticks([-place for place in range(len(methods))], methods)
        panels[0, 0].set_ylim(0.6 - len(methods), 0.6)
        figure.suptitle(f"{title}\ndashed: {control}", fontsize=12)
        plots._save(figure, path)


def severity_panels(
    path: Path,
    values: Mapping[str, Mapping[str, Sequence[float]]],
    ticks: Sequence[str],
    title: str,
    digits: Mapping[str, int],
) -> None:
    """A panel a metric, a row a method, a column a severity: the number, on a colour.

    Args:
        path: File to write.
        values: For each metric, and each method, a value a severity.
        ticks: What the severities are called.
        title: Title of the figure.
        digits: For each metric, digits after the point.
    """
    methods = list(next(iter(values.values())))
    with plt.rc_context(plots.STYLE):
        figure, panels = plots._axes(
            1.6 + 3.7 * len(values), 1.4 + 0.29 * len(methods), ncols=len(values), sharey=True, squeeze=False
        )
        for axes, (metric, own) in zip(panels.flat, values.items(), strict=True):
            table = np.array([own[method] for method in methods], dtype=float)
            shades = axes.imshow(table, aspect="auto", cmap="viridis_r" if metric.startswith("acc") else "viridis")
            for (row, column), value in np.ndenumerate(table):
                red, green, blue, _ = shades.cmap(shades.norm(value))
                color = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
                text = f"{value:.{digits[metric]}f}"
                axes.text(column, row, text, ha="center", va="center", color=color, fontsize=9)
            axes.grid(False)
            axes.set_xticks(range(len(ticks)), ticks)
            axes.set_xlabel("severity")
            axes.set_title(metric)
        panels[0, 0].set_yticks(range(len(methods)), methods)
        figure.suptitle(title, fontsize=12)
        plots._save(figure, path)
