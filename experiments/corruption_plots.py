"""Figures of `experiments.corrupt`: one image under every corruption, and how much each changes the pixels."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from experiments import plots

COLUMNS = ("clean", "1", "2", "3", "4", "5")
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
GAP = 2  # between images [pixels]


def examples(path: Path, clean: Tensor, names: Sequence[str], images: Mapping[tuple[str, int], Tensor]) -> None:
    """One image, a row for each corruption and a column for each severity; white where there is none.

    Args:
        path: File to write.
        clean: The image itself, (H, W, C), uint8.
        names: Corruptions, from top to bottom, in two halves side by side.
        images: By corruption and severity, each (H, W, C), uint8.
    """
    rows = -(-len(names) // 2)
    halves = [half for half in (names[:rows], names[rows:]) if half]
    height, width = clean.shape[0] + GAP, clean.shape[1] + GAP
    with plt.rc_context({**plots.STYLE, "axes.grid": False}):
        figure, panels = plt.subplots(
            ncols=len(halves),
            figsize=(0.4 + 5.8 * len(halves), 0.6 + 0.68 * rows * height / width),
            layout="compressed",  # axes whose shape is that of their images
            squeeze=False,
        )
        for axes, half in zip(panels[0], halves, strict=True):
            mosaic = np.full((rows * height - GAP, len(COLUMNS) * width - GAP, 3), 255, np.uint8)
            for row, name in enumerate(half):
                for column in range(len(COLUMNS)):
                    image = images.get((name, column)) if column else clean
                    if image is not None:
                        pixels = np.broadcast_to(image.numpy(), (*image.shape[:2], 3))
                        y, x = row * height, column * width
                        mosaic[y : y + image.shape[0], x : x + image.shape[1]] = pixels
            axes.imshow(mosaic, interpolation="nearest")
            axes.set_yticks([row * height + height / 2 for row in range(len(half))], [_words(name) for name in half])
            axes.set_xticks([column * width + width / 2 for column in range(len(COLUMNS))], COLUMNS)
            axes.xaxis.tick_top()
            axes.tick_params(length=0)
            for side in axes.spines.values():
                side.set_visible(False)
        plots._save(figure, path)


def damage(path: Path, groups: Mapping[str, Mapping[str, Mapping[int, float]]]) -> None:
    """Mean absolute change of a pixel against severity, a panel for each group of corruptions.

    Args:
        path: File to write.
        groups: Change by group, corruption and severity [steps of 1/255].
    """
    with plt.rc_context(plots.STYLE):
        figure, panels = plots._axes(2.5 * len(groups) + 0.8, 5.0, ncols=len(groups), sharey=True, squeeze=False)
        for axes, (group, members) in zip(panels[0], groups.items(), strict=True):
            for (name, changes), color, marker in zip(members.items(), COLORS, "osD^v", strict=False):
                axes.plot(list(changes), list(changes.values()), color=color, marker=marker, label=_words(name))
            axes.set_title(group)
            axes.set_xlabel("severity")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=10)
        panels[0, 0].set_ylim(0, None)  # shared by all, and after all of them
        panels[0, 0].set_ylabel("mean absolute change\n[of 255 grey levels]")
        plots._save(figure, path)


def _words(name: str) -> str:
    return name.replace("_", " ")
