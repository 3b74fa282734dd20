"""Figures of `experiments.width`: loss and error along rays, and along the line between SWA and SGD."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from experiments import plots
from lowrank_bdl.surfaces.widths import WidthProfile

COLORS = {
    "pca": ("#D55E00", "#E69F00", "#CC79A7"), "swag": ("#0072B2", "#56B4E9", "#009E73"),
    "random": ("#888888",), "sgd": ("#000000",),
}  # fmt: skip
STYLES = {"pca": "-", "swag": "--", "random": "-", "sgd": ":"}
SOURCES = {"pca": "iterates", "swag": "SWAG", "random": "from SWA", "sgd": "from SGD"}


def rays(path: Path, profiles: Mapping[str, WidthProfile], shown: str, title: str) -> None:
    """Draw training loss and test error against the distance, a line a ray.

    Args:
        path: File to write.
        profiles: Values by kind of ray.
        shown: Name of the images to test on.
        title: Of the figure.
    """
    with plt.rc_context(plots.STYLE):
        figure, (losses, errors) = plots._axes(12.0, 5.0, ncols=2)
        for kind, profile in profiles.items():
            t, colors = profile.distances.cpu().numpy(), COLORS[kind]
            bundle = len(colors) == 1
            for number, name in enumerate(profile.names):
                label = f"random, {SOURCES[kind]}" if bundle else f"{name} of {SOURCES[kind]}"
                style = {
                    "color": colors[number % len(colors)],
                    "linestyle": STYLES[kind],
                    "linewidth": 1.0 if bundle else 2.0,
                    "label": label if not bundle or number == 0 else None,
                }
                losses.plot(t, profile.of("train").loss[number].cpu().numpy(), **style)
                errors.plot(t, 100 * profile.of(shown).error[number].cpu().numpy(), **style)
        losses.set_yscale("log")
        losses.set_ylabel("training loss [nats]")
        plots._plain_log_numbers(losses)
        errors.set_ylabel(f"{shown} error [%]")
        for panel in (losses, errors):
            panel.set_xlabel("distance along a direction of length 1")
        handles, labels = losses.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
        figure.suptitle(f"{title}: width of the minimum")
        plots._save(figure, path)


def line(path: Path, profile: WidthProfile, shown: str, title: str) -> None:
    """Draw training loss and test error along the line through SWA and SGD.

    Args:
        path: File to write.
        profile: One ray; SWA is at 0, SGD half way to the last point.
        shown: Name of the images to test on.
        title: Of the figure.
    """
    t = profile.distances.cpu().numpy()
    images = {
        "training loss [nats]": profile.of("train").loss[0].cpu().numpy(),
        f"{shown} error [%]": 100 * profile.of(shown).error[0].cpu().numpy(),
    }
    with plt.rc_context(plots.STYLE):
        figure, panels = plots._axes(11.0, 4.4, ncols=2)
        for panel, (label, values) in zip(panels, images.items(), strict=True):
            panel.plot(t, values, color="#555555")
            for name, at in (("SWA", 0.0), ("SGD", t[-1] / 2)):
                panel.axvline(at, color=plots.COLORS[name], linewidth=1, linestyle=":")
                height = np.interp(at, t, values)
                panel.plot([at], [height], plots.MARKERS[name], color=plots.COLORS[name], markersize=8, label=name)
            panel.set_xlabel("distance from the SWA mean, towards SGD's last iterate")
            panel.set_ylabel(label)
            panel.legend(loc="best")
        figure.suptitle(f"{title}: the line through SWA and SGD")
        plots._save(figure, path)
