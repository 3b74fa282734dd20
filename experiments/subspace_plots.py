"""Figures of `experiments.subspace`: draws on the posterior's density, traces, NLL against samples."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from experiments import plots
from experiments.subspace_plane import Plane
from lowrank_bdl.subspaces.draws import Draws

COLORS = {
    "ess": "#0072B2", "slice": "#E69F00", "nuts": "#7B3294", "sgld": "#56B4E9", "sghmc": "#8C6D1F", "vi": "#CC79A7",
    "vi_full": "#882255", "flow": "#999933", "map": "#555555", "low_rank_gaussian": "#44AA99", **plots.COLORS,
}  # fmt: skip
ON_BLUE = "#D55E00"
LINES = {
    "random": ":", "pca": "-", "covariance": "--", "freq_dir": "-.", "principal": (0, (5, 1)), "hessian": (0, (1, 1)),
    "curve": (0, (3, 1, 1, 1)),
}  # fmt: skip
DEPTH = 12.0  # log-densities further below the top are one shade [nats]
LEVELS = (-4.5, -2.0, -0.5)  # of a normal density: 3, 2 and 1 standard deviations from the mode
PANELS = 4  # in a row
MANY = 200  # draws, above which their markers are small
LEGEND_COLUMNS = 3
COORDINATES = 3  # shown in a trace


def plane(path: Path, found: Plane, draws: Mapping[str, Draws], title: str) -> None:
    """Draw the posterior's density in a plane once a method, the method's draws on it.

    Args:
        path: File to write.
        found: The density.
        draws: By method.
        title: Of the figure.
    """
    top = np.nanmax(found.log_joint)
    shown = np.clip(np.nan_to_num(found.log_joint - top, nan=-np.inf), -DEPTH, 0)
    columns = min(PANELS, len(draws))
    rows = -(-len(draws) // columns)
    with plt.rc_context(plots.STYLE | {"axes.grid": False}):
        shape = {"nrows": rows, "ncols": columns, "sharex": True, "sharey": True, "squeeze": False}
        figure, grid = plots._axes(max(4.2 * columns, 6.6) + 0.8, 4.2 * rows + 0.8, **shape)
        panels = list(grid.flat)
        for axes, (method, own) in zip(panels, draws.items(), strict=False):
            image = axes.contourf(found.x, found.y, shown, levels=np.linspace(-DEPTH, 0, 25), cmap="Blues")
            axes.contour(found.x, found.y, shown, levels=LEVELS, colors="#444444", linewidths=0.8)
            size = 4.0 if len(own.flat) <= MANY else 1.8
            for chain, marker in zip(own.draws.cpu().numpy(), _markers(own.num_chains), strict=True):
                axes.plot(
                    chain[:, 0], chain[:, 1], marker, color=ON_BLUE, markersize=size, markeredgecolor="white",
                    markeredgewidth=0.1 * size, alpha=0.8,
                )  # fmt: skip
            axes.set_title(method)
            axes.set_xlabel("first coordinate")
        for axes in panels[len(draws) :]:
            axes.set_visible(False)
        for axes in grid[:, 0]:
            axes.set_ylabel("second coordinate")
        bar = figure.colorbar(image, ax=panels, shrink=0.8)
        bar.set_label("log-density below the highest shown [nats]")
        figure.suptitle(title, fontsize=12)
        plots._save(figure, path)


def _markers(count: int) -> list[str]:
    """One marker a chain."""
    kinds = ("o", "s", "^", "D", "v", "P", "X", "*")
    return [kinds[i % len(kinds)] for i in range(count)]


def trace(path: Path, draws: Draws, title: str) -> None:
    """Draw log-joint and first coordinates against the draw, a line each chain; and the objective of a fit."""
    shown = min(draws.rank, COORDINATES)
    panels = [("log-joint [nats]", draws.log_joints), *((f"z{i + 1}", draws.draws[:, :, i]) for i in range(shown))]
    extra = draws.trace is not None
    with plt.rc_context(plots.STYLE):
        figure, grid = plots._axes(8.0, 1.7 * (len(panels) + extra) + 0.8, nrows=len(panels) + extra, squeeze=False)
        rows = list(grid[:, 0])
        if draws.trace is not None:
            objective = draws.trace.cpu().numpy()
            rows[-1].plot(np.arange(1, len(objective) + 1), objective, color="black", linewidth=1)
            rows[-1].set_ylabel("objective [nats]")
            rows[-1].set_xlabel("step of the optimization")
        number = np.arange(1, draws.num_samples + 1)
        for axes, (label, values) in zip(rows, panels, strict=False):
            for chain in values.cpu().numpy():
                axes.plot(number, chain, marker="." if len(number) < 40 else None, linewidth=0.9, markersize=4)
            axes.set_ylabel(label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        rows[len(panels) - 1].set_xlabel("draw, a line each chain")
        figure.suptitle(title, fontsize=12)
        plots._save(figure, path)


def against_samples(
    path: Path, curves: Sequence[tuple[Any, Mapping[str, Sequence[float]]]], lines: Mapping[str, float], title: str
) -> None:
    """Draw the NLL of the average against the number of samples in it.

    Args:
        path: File to write.
        curves: Cell, and ``mean``, ``low``, ``high`` of its NLL [nats].
        lines: NLL of what is one set of weights [nats].
        title: Of the figure.
    """
    with plt.rc_context(plots.STYLE):
        rows = -(-(len(curves) + len(lines)) // LEGEND_COLUMNS)
        figure, axes = plots._axes(8.5, 4.6 + 0.22 * rows)
        for name, value in lines.items():
            _line(axes, name, value)
        for cell, curve in curves:
            number = np.arange(1, len(curve["mean"]) + 1)
            style: dict[str, Any] = {"color": COLORS[cell.method], "linestyle": LINES.get(cell.subspace, "-")}
            axes.fill_between(number, curve["low"], curve["high"], color=style["color"], alpha=0.12, linewidth=0)
            axes.plot(number, curve["mean"], label=cell.label, **style)
        if curves:
            axes.set_xscale("log")
            plots._plain_log_numbers(axes, of="x")
        axes.set_xlabel("samples in the average")
        axes.set_ylabel("NLL [nats per image]")
        axes.set_title(f"{title}\n(band: 10–90 % over orders of the samples)")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize=10)
        plots._save(figure, path)


def _line(axes: Axes, name: str, value: float) -> None:
    method = name.rpartition(" ")[2]
    axes.axhline(value, color=COLORS.get(method, "#555555"), linestyle="--" if name == "SGD" else "-.", label=name)
