"""Figures of `experiments.curve`: loss and error along the paths; of the toy, what the networks on them decide."""

from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from torch import Tensor

from experiments import plots
from experiments.curve_bench import Bench
from lowrank_bdl.surfaces.curves import Curve
from lowrank_bdl.surfaces.surface_model import SurfaceModel

COLORS = {"line": "#555555", "chain": "#555555", "PolyChain": "#0072B2", "Bezier": "#D55E00"}
LABELS = {"line": "straight line", "chain": "straight lines", "PolyChain": "polygonal chain", "Bezier": "Bézier curve"}
STYLES = {"line": "--", "chain": "-", "PolyChain": "-", "Bezier": "-"}
CLASSES = ("#053061", "#67001F")  # the ends of the colours of the decisions
SHOWN_T = (0.0, 0.25, 0.5, 0.75, 1.0)
REACH, PIXELS = 1.25, 160  # of the pictures of decisions


def profiles(
    path: Path, t: Mapping[str, Tensor], found: Mapping[str, Mapping[str, Tensor]], knots: int, shown: str, title: str
) -> None:
    """Draw the regularised training loss and the test error along every path.

    Args:
        path: File to write.
        t: Of each path, (T,).
        found: Of each path, what is measured, each (T,).
        knots: Number of files that a path of --ckpt goes through; 2 for others.
        shown: Name of the images to test on.
        title: Of the figure.
    """
    with plt.rc_context(plots.STYLE):
        figure, (losses, errors) = plots._axes(10.0, 4.4, ncols=2)
        for name, values in found.items():
            style = {"color": COLORS[name], "linestyle": STYLES[name], "label": LABELS[name]}
            losses.plot(t[name], values["train_loss"], **style)
            errors.plot(t[name], 100 * values["test_error"], **style)
            for panel, value in ((losses, values["train_loss"]), (errors, 100 * values["test_error"])):
                panel.plot(t[name][[0, -1]], value[[0, -1]], "o", color="black", markersize=6, zorder=3)
        for panel in (losses, errors):
            for knot in range(1, knots - 1):
                panel.axvline(knot / (knots - 1), color="#bbbbbb", linewidth=1)
            panel.set_xlabel("t")
            panel.set_xlim(-0.02, 1.02)
        losses.set_ylabel("training loss, regularised [nats]")
        losses.set_yscale("log")
        plots._plain_log_numbers(losses)
        errors.set_ylabel(f"{shown} error [%]")
        errors.set_ylim(0, None)
        handles, labels = losses.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        figure.suptitle(title)
        plots._save(figure, path)


@torch.no_grad()
def decisions(path: Path, bench: Bench, paths: Mapping[str, Curve]) -> None:
    """Draw which class the networks of the toy give to each point of the plane, along every path.

    Args:
        path: File to write.
        bench: The toy.
        paths: By name.
    """
    axis = torch.linspace(-REACH, REACH, PIXELS)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    pixels = torch.stack([x, y], -1).view(-1, 2)
    inputs, targets = (tensor.cpu() for tensor in (bench.data.train.inputs, bench.data.train.targets))
    device = next(bench.model.parameters()).device
    with plt.rc_context(plots.STYLE | {"axes.grid": False}):
        shape = {"nrows": len(paths), "ncols": len(SHOWN_T), "squeeze": False, "sharex": True, "sharey": True}
        figure, grid = plots._axes(2.3 * len(SHOWN_T), 2.4 * len(paths) + 0.4, **shape)
        for (name, curve), row in zip(paths.items(), grid, strict=True):
            net = SurfaceModel(bench.model, curve).eval()
            for t, panel in zip(SHOWN_T, row, strict=True):
                with net.at(curve(t)):
                    second = net(pixels.to(device)).softmax(-1)[:, 1].view(PIXELS, PIXELS).cpu()
                extent = (-REACH, REACH, -REACH, REACH)
                panel.imshow(second.numpy(), extent=extent, origin="lower", cmap="RdBu_r", vmin=0, vmax=1, alpha=0.5)
                panel.contour(axis, axis, second, levels=[0.5], colors="black", linewidths=0.8)
                for label, color in enumerate(CLASSES):
                    own = inputs[targets == label].view(-1, 2)
                    panel.plot(own[:, 0], own[:, 1], ".", color=color, markersize=3, markeredgewidth=0)
                panel.set_aspect("equal")
                panel.set_xticks([])
                panel.set_yticks([])
                if panel is grid[0, SHOWN_T.index(t)]:
                    panel.set_title(f"t = {t:g}")
            row[0].set_ylabel(LABELS[name])
        plots._save(figure, path)
