"""From the cells of `experiments.synthetic_regression` to its table and figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from experiments import plots
from experiments.common import format_table
from experiments.synthetic_regression_cells import Cell, correlation
from experiments.synthetic_regression_data import ToySet

SHADES = ((3, "#d6e6f4"), (2, "#a8cee4"), (1, "#6aaed6"))  # standard deviations, from the widest band
LINE, DATA, HELD_OUT = "#08306b", "#D55E00", "#009E73"
TITLES = {
    "SGD": "SGD", "SWAG": "SWAG", "Random+ESS": "ESS, random subspace", "PCA+ESS": "ESS, PCA subspace",
    "Curve+ESS": "ESS, curve subspace", "VI": "VI", "NUTS": "NUTS", "Prior": "prior", "HMC": "HMC, all weights",
    "Ensemble": "deep ensemble", "MFVI": "mean-field VI, all weights",
}  # fmt: skip


class Picture:
    """A picture that notebooks show."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()

    def __repr__(self) -> str:
        return f"Picture({self.path.name})"


def title_of(cell: Cell) -> str:
    """Return what a panel is called: for a method that may be in any subspace, with that."""
    name, subspace = TITLES[cell["method"]], cell["details"].get("subspace")
    return f"{name}, {'PCA' if subspace == 'pca' else subspace} subspace" if subspace and "," not in name else name


def draw_bands(
    path: Path, cells: Sequence[Cell], x: np.ndarray, data: ToySet, noise_variance: float, title: str
) -> Path:
    """Draw the functions' mean and 1, 2 and 3 standard deviations, one panel a method.

    Args:
        path: File to write.
        cells: One a panel.
        x: Grid of the cells' functions, (G,).
        data: The set; held-out rows have a colour of their own.
        noise_variance: Dotted lines are two standard deviations of a new y, noise included.
        title: Of the figure.
    """
    columns = min(4, len(cells))
    rows = -(-len(cells) // columns)
    targets = np.concatenate([data.train[1].numpy(), *(y.numpy() for _, y in data.held_out.values())])
    spread = np.ptp(targets)
    with plt.rc_context({**plots.STYLE, "savefig.dpi": 80}):
        figure, panels = plots._axes(
            3.4 * columns + 0.6, 2.7 * rows + 1.0, nrows=rows, ncols=columns, squeeze=False, sharex=True, sharey=True
        )
        for axes, cell in zip(panels.flat, cells, strict=False):
            mean, std = np.asarray(cell["mean"]), np.asarray(cell["std"])
            for factor, shade in SHADES:
                axes.fill_between(
                    x, mean - factor * std, mean + factor * std, color=shade, linewidth=0, label=f"±{factor} sd of f"
                )
            axes.plot(x, mean, color=LINE, linewidth=1.6, label="mean of f")
            total = np.sqrt(std**2 + noise_variance)
            for sign, label in ((-2, "±2 sd of y"), (2, None)):
                axes.plot(x, mean + sign * total, color=LINE, linewidth=0.8, linestyle=":", label=label)
            _scatter(axes, data)
            axes.set_title(title_of(cell))
        panels[0, 0].set_ylim(targets.min() - 0.8 * spread, targets.max() + 0.8 * spread)
        panels[0, 0].set_xlim(x[0], x[-1])
        _label(panels, len(cells), "x", "y")
        figure.suptitle(title)
        handles, labels = panels[0, 0].get_legend_handles_labels()
        if len(cells) < panels.size:
            panels.flat[-1].legend(handles, labels, loc="center", fontsize=10)
        else:
            figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=10)
        plots._save(figure, path)
    return path


def _label(panels: np.ndarray, count: int, x: str, y: str) -> None:
    """Name the axes at the left and at the lower end of each column; empty panels have none."""
    columns = panels.shape[1]
    for number, axes in enumerate(panels.flat):
        if number >= count:
            axes.set_axis_off()
            continue
        if number % columns == 0:
            axes.set_ylabel(y)
        if number + columns >= count:
            axes.set_xlabel(x)
            axes.tick_params(labelbottom=True)


def _scatter(axes: Axes, data: ToySet) -> None:
    style: dict[str, Any] = dict(linestyle="none", marker="o", markersize=2.2, markeredgewidth=0)
    axes.plot(*(part.numpy() for part in data.train), color=DATA, label="training rows", **style)
    shown = [rows for name, rows in data.held_out.items()]
    for number, rows in enumerate(shown):
        label = "held-out rows" if number == 0 else None
        axes.plot(*(part.numpy() for part in rows), color=HELD_OUT, label=label, **style)


def draw_correlations(
    path: Path, functions: Mapping[str, np.ndarray], titles: Mapping[str, str], x: np.ndarray
) -> Path:
    """Draw corr(f(x), f(x')) as heat maps, one panel a law of the weights.

    Args:
        path: File to write.
        functions: For each method, functions on the grid, (S, G).
        titles: Of the panels.
        x: The grid, (G,).
    """
    columns = min(4, len(functions))
    rows = -(-len(functions) // columns)
    with plt.rc_context({**plots.STYLE, "axes.grid": False, "savefig.dpi": 80}):
        figure, panels = plots._axes(
            3.0 * columns + 1.0, 2.9 * rows + 0.5, nrows=rows, ncols=columns, squeeze=False, sharex=True, sharey=True
        )
        for axes, (method, values) in zip(panels.flat, functions.items(), strict=False):
            image = axes.imshow(
                correlation(values), origin="lower", extent=(x[0], x[-1], x[0], x[-1]), vmin=-1, vmax=1, cmap="RdBu_r"
            )
            axes.set_title(titles[method], fontsize=11)
        figure.colorbar(image, ax=panels, shrink=0.8, label="corr(f(x), f(x′))")
        _label(panels, len(functions), "x", "x′")
        plots._save(figure, path)
    return path


def table(cells: Sequence[Cell]) -> str:
    """Lay out how well each method predicts the held-out rows, and how far its chains have mixed."""
    places = list(cells[0]["metrics"])
    header = ["method", "T"]
    header += [f"{place}{name}" for place in places for name in (" log-lik.", " cover.", " sd")]
    header += ["R-hat z", "R-hat f", "seconds"]
    rows = []
    for cell in cells:
        details = cell["details"]
        row = [title_of(cell), _number(details.get("temperature"), "g")]
        for place in places:
            own = cell["metrics"][place]
            row += [f"{own['log_likelihood']:.3f}", f"{own['coverage']:.3f}", f"{own['function_std']:.2f}"]
        row += [_number(details.get(name), ".3f") for name in ("largest_rhat", "median_function_rhat")]
        rows.append([*row, f"{cell['seconds']:.1f}"])
    return format_table(header, rows)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def notes(data: ToySet, noise_variance: float) -> str:
    """Say what the numbers are."""
    counts = ", ".join(f"{len(x)} {name}" for name, (x, _) in data.held_out.items()) or "none"
    return (
        f"Data: {data.source}; {len(data.train[0])} training rows; held out: {counts}. Log-likelihood [nat a row] of "
        f"the model average with noise variance {noise_variance:g}, 95 % coverage of the Gaussian with its moments, "
        "and standard deviation of f at the held-out x. R-hat: the largest of z, the median of f(x). T divides the "
        "log-likelihood; no T: 1, or none of the data."
    )
