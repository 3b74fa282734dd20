"""Figures of `experiments.plane`: contours of loss and error with what lies on the plane, and a view from above."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from torch import Tensor

from experiments import plots

COLORMAP = "YlGnBu_r"
LEVELS = 10
STEEPNESS = 5.0  # levels lie exp(5) times closer at the bottom than at the top
HIGHEST = 0.9  # quantile of the values above which everything is one colour
LINE_STYLES = {
    "path": dict(color="#000000", linestyle="-", linewidth=1.2, marker=".", markersize=5),
    "SWAG": dict(color="#D55E00", linestyle="--", linewidth=2.2),
}
CURVE_STYLE = dict(color="#D55E00", linestyle="-", linewidth=2.4)
SPOTS = ("D", "s", "o", "^")


@dataclass(frozen=True)
class Drawn:
    """What is drawn.

    Attributes:
        grid: Coordinates, (ny, nx, 2).
        images: Values on the grid by name, (ny, nx).
        lines: Coordinates (n, 2) by name.
        spots: Coordinates (2,) by name.
        axes: What x and y are.
        sigmas: Of SWAG's ellipse.
    """

    grid: np.ndarray
    images: Mapping[str, np.ndarray]
    lines: Mapping[str, Tensor]
    spots: Mapping[str, Tensor]
    axes: tuple[str, str]
    sigmas: float


def levels_of(image: np.ndarray) -> np.ndarray:
    """Return levels from the lowest value to a high quantile, close together at the bottom, as published contours.

    Args:
        image: Values, of which some may be infinite.
    """
    finite = image[np.isfinite(image)]
    low, high = (0.0, 1.0) if not finite.size else (float(finite.min()), float(np.quantile(finite, HIGHEST)))
    high = max(high, low + 1e-6 * max(abs(low), 1.0))
    steps = np.linspace(0.0, 1.0, LEVELS)
    return low + (high - low) * np.expm1(STEEPNESS * steps) / np.expm1(STEEPNESS)


def contours(path: Path, drawn: Drawn, shown: str, title: str) -> None:
    """Draw training loss and test error side by side.

    Args:
        path: File to write.
        drawn: What is drawn.
        shown: Name of the images to test on.
        title: Of the figure.
    """
    panels = {"train_loss": ("training loss [nats]", 1.0), f"{shown}_error": (f"{shown} error [%]", 100.0)}
    with plt.rc_context(plots.STYLE | {"axes.grid": False}):
        figure, axes = plots._axes(13.0, 5.6, ncols=2)
        for panel, (name, (label, factor)) in zip(axes, panels.items(), strict=True):
            _image(panel, drawn, factor * drawn.images[name])
            _overlays(panel, drawn)
            panel.set_title(label)
            panel.set_xlabel(drawn.axes[0])
        axes[0].set_ylabel(drawn.axes[1])
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)))
        figure.suptitle(title)
        plots._save(figure, path)


def _image(axes: Axes, drawn: Drawn, image: np.ndarray) -> None:
    x, y, levels = drawn.grid[..., 0], drawn.grid[..., 1], levels_of(image)
    capped = np.where(np.isfinite(image), image, 10 * levels[-1])
    colors = plt.get_cmap(COLORMAP)
    norm = BoundaryNorm(levels, colors.N, extend="max")
    filled = axes.contourf(x, y, capped, levels=levels, cmap=colors, norm=norm, extend="max")
    axes.contour(x, y, capped, levels=levels, colors="#ffffff", linewidths=0.5, alpha=0.6)
    bar = axes.figure.colorbar(filled, ax=axes, ticks=levels)
    bar.ax.set_yticklabels([f"{level:.3g}" for level in levels])


def _overlays(axes: Axes, drawn: Drawn) -> None:
    for name, line in drawn.lines.items():
        label = {"path": "SGD's path", "SWAG": f"SWAG, {drawn.sigmas:g} sigma"}.get(name, name)
        axes.plot(*line.numpy().T, label=label, **LINE_STYLES.get(name, CURVE_STYLE))  # type: ignore[arg-type]
    for number, (name, spot) in enumerate(drawn.spots.items()):
        x, y = spot.tolist()
        color = plots.COLORS.get(name, plots.SEQUENCE[number % len(plots.SEQUENCE)])
        marker = plots.MARKERS.get(name, SPOTS[number % len(SPOTS)])
        axes.plot([x], [y], marker, color=color, markersize=9, markeredgecolor="white", markeredgewidth=1.3, label=name)
    axes.set_xlim(drawn.grid[0, 0, 0], drawn.grid[0, -1, 0])
    axes.set_ylim(drawn.grid[0, 0, 1], drawn.grid[-1, 0, 1])


def surface(path: Path, drawn: Drawn, title: str) -> None:
    """Draw the training loss as a surface over the plane, cut off where the contours end.

    Args:
        path: File to write.
        drawn: What is drawn.
        title: Of the figure.
    """
    image = drawn.images["train_loss"]
    levels = levels_of(image)
    height = np.minimum(np.where(np.isfinite(image), image, np.inf), levels[-1])
    with plt.rc_context(plots.STYLE):
        figure = plt.figure(figsize=(8.5, 6.5), layout="constrained")
        axes = figure.add_subplot(projection="3d")
        shares = np.interp(height, levels, np.linspace(0.0, 1.0, LEVELS))  # colours change where the contours do
        options = dict(rcount=len(image), ccount=image.shape[1], linewidth=0, antialiased=False, shade=False)
        faces = plt.get_cmap(COLORMAP)(shares)
        axes.plot_surface(drawn.grid[..., 0], drawn.grid[..., 1], height, facecolors=faces, **options)
        axes.set_xlabel(drawn.axes[0], labelpad=10)
        axes.set_ylabel(drawn.axes[1], labelpad=10)
        axes.set_zlabel("training loss [nats]", labelpad=14)  # clear of the numbers
        axes.view_init(elev=42, azim=-62)
        axes.set_title(title)
        plots._save(figure, path)
