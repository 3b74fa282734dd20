"""Table, arrays and figures of `experiments.hessian_eigs`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

import lowrank_bdl as lb
from experiments import plots
from experiments.common import format_table, replacing

Cell = Mapping[str, Any]
DENSITY_DECADES = 6  # a smoothed density is drawn down to this far below its peak


def report(path: Path, cells: Sequence[Cell], title: str, tol: float) -> tuple[str, list[str]]:
    """Write eigs.npz and the figures; return the table and the figures' names."""
    write_arrays(path, cells)
    figures = []
    draw_spectrum(path / "spectrum.png", cells[-1], title)
    figures.append("spectrum.png")
    if len(cells) > 1 and "eigenvalues" in cells[0]:
        draw_along(path / "along.png", cells, title)
        figures.append("along.png")
    return f"{title}\n\n{table(cells, tol)}", figures


def write_arrays(path: Path, cells: Sequence[Cell]) -> None:
    """Write eigs.npz: NAME/eigenvalues, /residuals, /converged, /nodes, /weights of every set of weights.

    Of a single one also ``pos_evals`` and ``neg_evals`` under the names of swa_gaussian's script: the positive and the
    negative among the eigenvalues that converged.
    """
    arrays: dict[str, np.ndarray] = {}
    for cell in cells:
        for key in ("eigenvalues", "residuals", "converged"):
            if key in cell:
                arrays[f"{cell['name']}/{key}"] = np.asarray(cell[key])
        if "density" in cell:
            arrays |= {f"{cell['name']}/{key}": np.asarray(cell["density"][key]) for key in ("nodes", "weights")}
        vectors = vectors_file(path, cell["name"])
        if vectors.exists():
            arrays[f"{cell['name']}/eigenvectors"] = np.load(vectors)
    if len(cells) == 1 and "eigenvalues" in cells[0]:
        values = np.asarray(cells[0]["eigenvalues"])[np.asarray(cells[0]["converged"], dtype=bool)]
        arrays |= {"pos_evals": values[values > 0], "neg_evals": values[values < 0]}
    with replacing(path / "eigs.npz") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def vectors_file(path: Path, name: str) -> Path:
    return path / "cells" / f"{name}-eigenvectors.npy"


def save_vectors(path: Path, name: str, vectors: Tensor) -> None:
    """Write eigenvectors (D, k) beside the cell."""
    with replacing(vectors_file(path, name)) as file:
        np.save(file, vectors.cpu().numpy())


def table(cells: Sequence[Cell], tol: float) -> str:
    """Lay out the ends of every spectrum, how well they are known, and what they took."""
    rows = []
    for cell in cells:
        row = [cell["label"], "-" if cell["epoch"] is None else str(cell["epoch"])]
        if "eigenvalues" in cell:
            values, residuals = np.asarray(cell["eigenvalues"]), np.asarray(cell["residuals"])
            worst = residuals.max() / np.abs(values).max() if values.any() else 0.0
            row += [
                f"{values[0]:.4g}", f"{values[-1]:.4g}", f"{sum(cell['converged'])} of {len(values)}", f"{worst:.1e}",
                str(cell["products"]),
            ]  # fmt: skip
        else:
            row += ["-"] * 5
        density = cell.get("density")
        trace = "-" if density is None else f"{density['trace']:.4g}"
        error = "" if density is None or not density["trace_se"] >= 0 else f" ± {density['trace_se']:.2g}"
        rows.append([*row, trace + error, f"{sum(cell['seconds'].values()):.0f}"])
    header = ["weights", "epoch", "largest", "smallest", "converged", "worst residual", "products", "trace", "seconds"]
    note = (
        f"{cells[0]['parameters']:,} parameters. Residuals are |A v - lambda v| over the largest eigenvalue; converged "
        f"means at most {tol:g}."
    )
    return f"{format_table(header, rows)}\n\n{note}"


def draw_spectrum(path: Path, cell: Cell, title: str) -> None:
    """Eigenvalues at both ends with their residuals, and the density of all of them."""
    panels = [key for key in ("eigenvalues", "density") if key in cell]
    with plt.rc_context(plots.STYLE):
        figure, axes = plots._axes(5.5 * len(panels), 4.6, ncols=len(panels), squeeze=False)
        for panel, own in zip(panels, axes[0], strict=True):
            if panel == "eigenvalues":
                _ends(own, cell)
            else:
                _density(own, cell)
        figure.suptitle(f"{title}\n{cell['label']}", fontsize=12)
        plots._save(figure, path)


def _ends(axes: Axes, cell: Cell) -> None:
    values, residuals = np.asarray(cell["eigenvalues"]), np.asarray(cell["residuals"])
    rank = np.arange(1, len(values) + 1)
    for chosen, color, marker, label in (
        (values >= 0, plots.SEQUENCE[0], "o", "positive"), (values < 0, plots.SEQUENCE[1], "v", "negative, its size"),
    ):  # fmt: skip
        if chosen.any():
            axes.errorbar(
                rank[chosen], np.abs(values[chosen]), residuals[chosen], fmt=marker, color=color, label=label, capsize=2
            )
    axes.set_yscale("log")
    plots._plain_log_numbers(axes)
    axes.set_xlabel("eigenvalue, from the largest to the smallest computed")
    axes.set_ylabel("eigenvalue [nats]")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=10)


def density_curve(cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    """Return grid and smoothed density of a cell."""
    density = cell["density"]
    nodes, weights = (torch.tensor(density[key], dtype=torch.float64) for key in ("nodes", "weights"))
    empty = torch.zeros(0, dtype=torch.float64)
    rule = lb.SpectralDensity(nodes, weights, empty, empty, cell["parameters"], density["products"])
    points, curve, _ = rule.density(2000)
    return points.numpy(), curve.numpy()


def _density(axes: Axes, cell: Cell) -> None:
    points, curve = density_curve(cell)
    axes.plot(points, curve, color=plots.SEQUENCE[0])
    axes.set_yscale("log")
    axes.set_ylim(curve.max() * 10.0**-DENSITY_DECADES, curve.max() * 2)
    axes.set_xlabel("eigenvalue [nats]")
    axes.set_ylabel("density of all eigenvalues")


def draw_along(path: Path, cells: Sequence[Cell], title: str) -> None:
    """Draw the ends of the spectrum from one set of weights to the next, against the epoch if all have one."""
    epochs = [cell["epoch"] for cell in cells]
    by_epoch = all(epoch is not None for epoch in epochs) and len(set(epochs)) == len(epochs)
    order = np.argsort(epochs) if by_epoch else np.arange(len(cells))
    places = np.asarray(epochs)[order] if by_epoch else np.arange(1, len(cells) + 1)
    values = np.asarray([cells[i]["eigenvalues"] for i in order])
    with plt.rc_context(plots.STYLE):
        figure, axes = plots._axes(8.0, 4.8)
        shades = plt.get_cmap("viridis")(np.linspace(0, 0.9, values.shape[1]))
        for i, shade in enumerate(shades):
            axes.plot(places, values[:, i], color=shade, marker="o", markersize=3, linewidth=1.2)
        scale = max(np.abs(values).max() * 1e-4, 1e-12)
        axes.set_yscale("symlog", linthresh=max(np.median(np.abs(values)) * 0.1, scale))
        axes.axhline(0, color="#999999", linewidth=1)
        axes.set_ylabel("eigenvalue [nats]")
        if by_epoch:
            axes.set_xlabel("epoch")
        else:
            axes.set_xticks(places, [cell["label"] for cell in cells], rotation=20, ha="right")
        axes.set_title(title)
        plots._save(figure, path)
