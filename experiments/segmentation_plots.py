"""Figures of `experiments.segmentation`: uncertainty maps, calibration of pixels, doubt of patches, the classes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from experiments import plots
from experiments.segmentation_data import CLASS_NAMES

# SegNet's colours of the classes, black for pixels without a label
PALETTE = np.array(
    [
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0), (192, 128, 128),
        (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192), (0, 0, 0),
    ],
    dtype=np.uint8,
)  # fmt: skip
STYLES = {
    "Majority": ("#999999", ":"),
    **dict.fromkeys(("SGD", "RMSProp", "Adam"), ("#000000", "-")),
    "Dropout": ("#CC79A7", "-"),
    "SWA": ("#009E73", "-"),
    "SWAG-Diag": ("#0072B2", "-"),
    "SWAG": ("#D55E00", "-"),
}


@dataclass(frozen=True)
class Map:
    """What a method says about one scene.

    Attributes:
        predicted: Classes (H, W).
        entropy: Of the prediction (H, W) [nats].
        mutual_information: Between class and weights (H, W) [nats]: the part of the entropy that is about the weights.
    """

    predicted: np.ndarray
    entropy: np.ndarray
    mutual_information: np.ndarray


def uncertainty_maps(
    path: Path, images: np.ndarray, labels: np.ndarray, maps: Mapping[str, Sequence[Map]], title: str
) -> None:
    """A row a scene: the image, its labels, and what each method predicts and doubts.

    Args:
        path: File to write.
        images: Shape (M, H, W, 3), bytes.
        labels: Shape (M, H, W), bytes.
        maps: Of each method, one a scene; the mutual information is shown of the last method alone.
        title: Title of the figure.
    """
    last = list(maps)[-1]
    heads = ["image", "labels", *(f"{name}: {what}" for name in maps for what in ("classes", "entropy"))]
    heads.append(f"{last}: mutual information")
    height, width = labels.shape[1:]
    side = 2.1
    with plt.rc_context({**plots.STYLE, "axes.grid": False}):
        figure, axes = plots._axes(
            side * len(heads) + 0.8, side * height / width * len(images) + 1.3,
            nrows=len(images), ncols=len(heads), squeeze=False,
        )  # fmt: skip
        largest = max(float(own[row].mutual_information.max()) for own in (maps[last],) for row in range(len(images)))
        for row, panels in enumerate(axes):
            own = [maps[name][row] for name in maps]
            shown: list[tuple[np.ndarray, float | None]] = [(images[row], None), (PALETTE[labels[row]], None)]
            for each in own:
                shown += [(PALETTE[each.predicted], None), (each.entropy, math.log(len(CLASS_NAMES)))]
            shown.append((own[-1].mutual_information, max(largest, 1e-6)))
            for panel, (values, most), head in zip(panels, shown, heads, strict=True):
                scale: dict[str, Any] = {} if most is None else {"vmin": 0, "vmax": most, "cmap": "magma"}
                drawn = panel.imshow(values, interpolation="nearest", **scale)
                panel.set_xticks([])
                panel.set_yticks([])
                if row == 0:
                    panel.set_title(head, fontsize=9.5)
                if row == len(images) - 1 and most is not None:
                    bar = figure.colorbar(drawn, ax=panel, orientation="horizontal", fraction=0.06, pad=0.04)
                    bar.ax.tick_params(labelsize=7)
                    bar.locator = MaxNLocator(3)
                    bar.set_label("nats", fontsize=8)
        handles = [Patch(color=PALETTE[i] / 255, label=name) for i, name in enumerate((*CLASS_NAMES, "no label"))]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
        figure.suptitle(title, fontsize=12)
        plots._save(figure, path)


def _mean(curves: Sequence[Mapping[str, Sequence[float]]], name: str) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        stacked = np.array([curve[name] for curve in curves], dtype=float)
    filled = np.isfinite(stacked)
    total = np.where(filled, stacked, 0).sum(0)
    return np.where(filled.any(0), total / np.maximum(filled.sum(0), 1), np.nan)


def calibration(
    path: Path, pixels: Mapping[str, Sequence[Mapping[str, Any]]], patches: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """Confidence against accuracy of pixels; accuracy of patches against the threshold on their doubt.

    Args:
        path: File to write.
        pixels: For each method, and each seed, ``confidence`` and ``accuracy`` of each bin; means over seeds are drawn.
        patches: For each method, and each seed, ``thresholds``, ``accurate_if_certain``, ``uncertain_if_inaccurate``
            and ``pavpu``.
    """
    heads = {
        "accurate_if_certain": "p(accurate | certain)",
        "uncertain_if_inaccurate": "p(uncertain | inaccurate)",
        "pavpu": "PAvPU",
    }
    with plt.rc_context(plots.STYLE):
        figure, axes = plots._axes(15.0, 4.2, ncols=4)
        axes[0].plot([0, 1], [0, 1], color="#555555", linestyle="--", linewidth=1)
        for method in pixels:
            color, line = STYLES[method]
            style = dict(color=color, linestyle=line, marker="o", markersize=3)
            axes[0].plot(_mean(pixels[method], "confidence"), _mean(pixels[method], "accuracy"), **style, label=method)
            for panel, name in zip(axes[1:], heads, strict=True):
                panel.plot(_mean(patches[method], "thresholds"), _mean(patches[method], name), **style)
        axes[0].set_xlabel("confidence")
        axes[0].set_ylabel("accuracy of pixels")
        axes[0].set_title("Calibration, bins of equal width", fontsize=11)
        axes[0].legend(fontsize=9)
        for panel, head in zip(axes[1:], heads.values(), strict=True):
            panel.set_xlabel("threshold on the entropy [fraction of log 11]")
            panel.set_title(f"Patches: {head}", fontsize=11)
            panel.set_ylim(-0.03, 1.03)
        plots._save(figure, path)


def class_ious(path: Path, ious: Mapping[str, Sequence[Sequence[float]]], shares: Mapping[str, float]) -> None:
    """Intersection over union of every class, the most frequent first.

    Args:
        path: File to write.
        ious: For each method, and each seed, one number a class; the mean over seeds is drawn, each seed a dot.
        shares: Of the training pixels, by class.
    """
    order = sorted(range(len(CLASS_NAMES)), key=lambda c: -shares[CLASS_NAMES[c]])
    with plt.rc_context(plots.STYLE):
        figure, axes = plots._axes(11.0, 4.4)
        width = 0.8 / len(ious)
        for i, (method, seeds) in enumerate(ious.items()):
            values = 100 * np.array(seeds, dtype=float)[:, order]
            place = np.arange(len(order)) + (i - (len(ious) - 1) / 2) * width
            mean = _mean([{"iou": seed} for seed in values.tolist()], "iou")
            axes.bar(place, mean, width, color=STYLES[method][0], label=method, alpha=0.85)
            axes.plot(np.tile(place, len(values)), values.flatten(), ".", color="#333333", markersize=3)
        names = [f"{CLASS_NAMES[c]}\n{100 * shares[CLASS_NAMES[c]]:.1f} %" for c in order]
        axes.set_xticks(range(len(order)), names, fontsize=9)
        axes.grid(False, axis="x")
        axes.set_ylabel("intersection over union [%]")
        axes.set_title("Classes, by their share of the training pixels")
        axes.legend(ncols=len(ious), fontsize=9)
        plots._save(figure, path)
