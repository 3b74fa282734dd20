"""Figures of `experiments.ensembling`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from experiments import plots

COLORS = {**plots.COLORS, "NaiveNoise": "#8C6D1F", "SWA-path": plots.COLORS["SWA"]}
MARKERS = {**plots.MARKERS, "NaiveNoise": "v", "SWA-path": plots.MARKERS["SWA"]}
NAMES = {
    "NaiveNoise": "SWA + noise", "SWA-path": "SWA of the first iterates", "Snapshots": "average over the iterates",
}  # fmt: skip
NLL = "NLL [nats per image]"
BARS = "bars: ± standard error of the difference from SWA"

Point = tuple[float, float, float]  # level, NLL, and standard error of its difference from SWA [nats]


@dataclass(frozen=True)
class Curve:
    """What a method predicts with its first 1, 2, ... weight vectors.

    Attributes:
        method: Its name.
        values: ``mean``, and where known ``low`` and ``high``, of "nll" [nats] and "accuracy".
        of_swa: Whether all samples have the batch-norm statistics of the SWA mean.
    """

    method: str
    values: Mapping[str, Mapping[str, Sequence[float]]]
    of_swa: bool = False

    @property
    def label(self) -> str:
        return NAMES.get(self.method, self.method) + (", statistics of SWA" if self.of_swa else "")


def _lines(axes: Axes, lines: Mapping[str, Mapping[str, float]], metric: str, factor: float = 1.0) -> None:
    for method, found in lines.items():
        style = "--" if method == "SGD" else "-."
        axes.axhline(factor * found[metric], color=COLORS[method], linestyle=style, label=method)


def _curve(axes: Axes, curve: Curve, metric: str, factor: float = 1.0) -> None:
    found = {key: factor * np.asarray(values) for key, values in curve.values[metric].items()}
    number = np.arange(1, len(found["mean"]) + 1)
    color = COLORS[curve.method]
    if "low" in found:
        axes.fill_between(number, found["low"], found["high"], color=color, alpha=0.15, linewidth=0)
    style: dict[str, Any] = dict(linestyle=":", fillstyle="none") if curve.of_swa else {}
    axes.plot(
        number, found["mean"], color=color, marker=MARKERS[curve.method], markersize=4, label=curve.label, **style
    )


def by_samples(path: Path, curves: Sequence[Curve], lines: Mapping[str, Mapping[str, float]], what: str) -> None:
    """NLL and accuracy of the model average against the number of weight samples in it.

    Args:
        path: File to write.
        curves: One a method.
        lines: Metrics of the methods that are one set of weights.
        what: Network and images, for the title.
    """
    with plt.rc_context(plots.STYLE):
        figure, panels = plots._axes(10.5, 4.9, ncols=2)
        for axes, metric, factor, label in zip(
            panels, ("nll", "accuracy"), (1.0, 100.0), (NLL, "accuracy [%]"), strict=True
        ):
            _lines(axes, lines, metric, factor)
            for curve in curves:
                _curve(axes, curve, metric, factor)
            axes.set_xlabel("weight samples in the average")
            axes.set_ylabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[0].set_yscale("log")
        plots._plain_log_numbers(panels[0])
        figure.suptitle(f"Model averaging: {what}\n(band: 10–90 % over orders of the samples)", fontsize=12)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=10)
        plots._save(figure, path)


def by_snapshots(
    path: Path, curves: Sequence[Curve], fitted: Mapping[str, Sequence[Point]], last: float, what: str
) -> None:
    """NLL against the number of iterates that were collected.

    Args:
        path: File to write.
        curves: SWA after each iterate, and the average over the iterates' predictions.
        fitted: For each method that is fitted to the first iterates only: their number, and as in `by_level`.
        last: NLL of the last iterate [nats].
        what: Network and images, for the title.
    """
    with plt.rc_context(plots.STYLE):
        figure, axes = plots._axes(7.2, 4.8)
        axes.axhline(last, color=COLORS["SGD"], linestyle="--", label="SGD, last iterate")
        for curve in curves:
            _curve(axes, curve, "nll")
        _points(axes, fitted)
        axes.set_xlabel("iterates collected")
        axes.set_ylabel(NLL)
        axes.set_title(f"{what}\n({BARS})")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="best")
        plots._save(figure, path)


def by_level(
    path: Path,
    points: Mapping[str, Sequence[Point]],
    lines: Mapping[str, Mapping[str, float]],
    what: str,
    label: str,
    of_swa: Mapping[str, float] | None = None,
    *,
    log: bool = True,
) -> None:
    """NLL against one number that a posterior, or its use, depends on.

    Args:
        path: File to write.
        points: For each method, the number, the NLL, and the standard error of its difference from that of SWA.
        lines: Metrics of the methods that are one set of weights.
        what: Network and images, for the title.
        label: What the number is.
        of_swa: NLL of methods with the batch-norm statistics of the SWA mean for all samples [nats].
        log: Whether the number's axis is logarithmic.
    """
    with plt.rc_context(plots.STYLE):
        figure, axes = plots._axes(7.2, 4.8)
        _lines(axes, lines, "nll")
        for method, value in (of_swa or {}).items():
            axes.axhline(value, color=COLORS[method], linestyle=":", label=f"{method}, statistics of SWA")
        _points(axes, points)
        axes.set_xscale("log" if log else "linear")
        axes.set_yscale("log")
        if log:
            plots._plain_log_numbers(axes, of="x")
        else:
            axes.set_xticks(sorted({level for values in points.values() for level, _, _ in values}))
        plots._plain_log_numbers(axes)
        axes.set_xlabel(label)
        axes.set_ylabel(NLL)
        axes.set_title(f"{what}\n({BARS})")
        axes.legend(loc="best")
        plots._save(figure, path)


def _points(axes: Axes, points: Mapping[str, Sequence[Point]]) -> None:
    for method, values in points.items():
        level, nll, error = np.array(sorted(values), dtype=float).T
        axes.errorbar(
            level, nll, yerr=error, color=COLORS[method], marker=MARKERS[method], capsize=2,
            label=NAMES.get(method, method),
        )  # fmt: skip
