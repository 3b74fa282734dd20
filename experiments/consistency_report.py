"""Accuracy while training, of the iterate and of its averages."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from experiments import plots
from experiments.seed_study import Cell

COLORS = {"SGD": "#000000", "EMA": "#CC79A7", "SWA": "#009E73", "fast-SWA": "#D55E00"}


def draw_curves(path: Path, cells: Sequence[Cell], cycles_from: int, title: str) -> None:
    """A panel for each way to train: means over seeds, single seeds faint; the cycles begin at the dashed line.

    Args:
        path: File to write.
        cells: One a seed, with an entry ``curves``: by kind and by weights, [epoch, accuracy in percent].
        cycles_from: Epoch at which the cycles of the learning rate begin.
        title: What was trained on what.
    """
    kinds = list(cells[0]["curves"])
    with plt.rc_context(plots.STYLE):
        figure, axes = plots._axes(1.2 + 4.2 * len(kinds), 4.2, ncols=len(kinds), sharey=True, squeeze=False)
        for panel, kind in zip(axes[0], kinds, strict=True):
            for name, color in COLORS.items():
                seeds = np.array([cell["curves"][kind][name] for cell in cells])  # (seeds, epochs measured, 2)
                epochs, levels = seeds[0, :, 0], seeds[:, :, 1]
                for level in levels if len(levels) > 1 else ():
                    panel.plot(epochs, level, color=color, alpha=0.2, linewidth=1)
                panel.plot(epochs, levels.mean(0), color=color, label=name, marker="." if len(epochs) < 30 else None)
            panel.axvline(cycles_from, color="#777777", linestyle="--", linewidth=1.2, zorder=0)
            panel.set_title(kind)
            panel.set_xlabel("epoch")
        axes[0, 0].set_ylabel("accuracy on held-out images [%]")
        axes[0, -1].legend(loc="lower right")
        figure.suptitle(title, fontsize=12)
        plots._save(figure, path)
