"""How good each method's weights are while training goes on."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from experiments import plots
from experiments.seed_study import Cell

COLORS = {"EMA": "#CC79A7", "SWA": "#009E73", "fast-SWA": "#D55E00", "random policy": "#777777"}  # all others black


def draw_curves(
    path: Path,
    cells: Sequence[Cell],
    milestone: float,
    title: str,
    *,
    xlabel: str = "epoch",
    ylabel: str = "accuracy on held-out images [%]",
) -> None:
    """A panel for each way to train: means over seeds, single seeds faint; the milestone is a dashed line.

    Args:
        path: File to write.
        cells: One a seed, with an entry ``curves``: by way to train and by weights, pairs of time and level.
        milestone: A time, such as the beginning of the cycles of the learning rate.
        title: What was trained on what.
        xlabel: What the time is.
        ylabel: What the level is.
    """
    kinds = list(cells[0]["curves"])
    with plt.rc_context(plots.STYLE):
        width = 1.2 + 4.2 * len(kinds) if len(kinds) > 1 else 7.0
        figure, axes = plots._axes(width, 4.2, ncols=len(kinds), sharey=True, squeeze=False)
        for panel, kind in zip(axes[0], kinds, strict=True):
            for name in cells[0]["curves"][kind]:
                color = COLORS.get(name, "#000000")
                seeds = np.array([cell["curves"][kind][name] for cell in cells])  # (seeds, times, 2)
                times, levels = seeds[0, :, 0], seeds[:, :, 1]
                for level in levels if len(levels) > 1 else ():
                    panel.plot(times, level, color=color, alpha=0.2, linewidth=1)
                panel.plot(times, levels.mean(0), color=color, label=name, marker="." if len(times) < 30 else None)
            panel.axvline(milestone, color="#777777", linestyle="--", linewidth=1.2, zorder=0)
            panel.set_title(kind)
            panel.set_xlabel(xlabel)
        axes[0, 0].set_ylabel(ylabel)
        axes[0, -1].legend(loc="best")
        figure.suptitle(title, fontsize=12)
        plots._save(figure, path)
