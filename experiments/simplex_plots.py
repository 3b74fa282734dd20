"""Figures of `experiments.simplex`: ensembles against components, loss on a simplex in 3-D, decisions of the toy."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import MaxNLocator
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from torch import Tensor, nn

import lowrank_bdl as lb
from experiments import plots
from experiments.curve_bench import Bench
from experiments.curve_plots import CLASSES, PIXELS, REACH
from lowrank_bdl.surfaces.simplicial_complex import SimplicialComplex

PALETTE = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
CORNERS = 4  # a picture in three dimensions has room for a tetrahedron


def ensembles(path: Path, found: Mapping[str, Sequence[Mapping[str, Any]]], shown: str, title: str) -> None:
    """Draw error and NLL against the number of components, one line a dimension of the simplexes.

    Args:
        path: File to write.
        found: For each kind, an entry a number of components, with metrics and their standard errors.
        shown: Name of the images.
        title: Of the figure.
    """
    with plt.rc_context(plots.STYLE):
        figure, (errors, losses) = plots._axes(10.0, 4.4, ncols=2)
        for number, (name, entries) in enumerate(found.items()):
            color = PALETTE[number % len(PALETTE)]
            style = dict(color=color, marker="o", capsize=2, label=name, elinewidth=1)
            at = np.array([entry["components"] for entry in entries]) + 0.03 * number
            accuracy, spread = (np.array([entry[key] for entry in entries]) for key in ("accuracy", "accuracy_se"))
            errors.errorbar(at, 100 * (1 - accuracy), 100 * spread, **style)
            losses.errorbar(at, [e["nll"] for e in entries], [e["nll_se"] for e in entries], **style)
        errors.set_ylim(max(errors.get_ylim()[0], 0), None)
        errors.set_ylabel(f"{shown} error [%]")
        losses.set_ylabel(f"{shown} NLL [nats per image]")
        for axes in (errors, losses):
            axes.set_xlabel("components (independently trained networks)")
            axes.set_xticks([entry["components"] for entry in next(iter(found.values()))])
        errors.legend(loc="best")
        figure.suptitle(title)
        plots._save(figure, path)


def barycentric_grid(steps: int) -> tuple[Tensor, Tensor]:
    """Return a grid on a triangle: coefficients (M, 3) of its corners, and small triangles (T, 3) between the points.

    Args:
        steps: Points along an edge, at least 2.
    """
    n = steps - 1
    places = {(i, j): k for k, (i, j) in enumerate((i, j) for i in range(steps) for j in range(steps - i))}
    points = torch.tensor([[n - i - j, i, j] for i, j in places], dtype=torch.float64) / n
    triangles = [[places[i, j], places[i + 1, j], places[i, j + 1]] for i, j in places if i + j < n]
    triangles += [[places[i + 1, j], places[i + 1, j + 1], places[i, j + 1]] for i, j in places if i + j < n - 1]
    return points, torch.tensor(triangles)


def faces_of(num_vertices: int) -> list[tuple[int, ...]]:
    """Return the triangles of the first (up to four) vertices."""
    return list(combinations(range(min(num_vertices, CORNERS)), 3))


def picture_points(num_vertices: int, steps: int) -> Tensor:
    """Return the coefficients of all points of the picture, face by face, (F M, m)."""
    points, _ = barycentric_grid(steps)
    faces = []
    for face in faces_of(num_vertices):
        weights = torch.zeros(len(points), num_vertices, dtype=torch.float64)
        weights[:, list(face)] = points
        faces.append(weights)
    return torch.cat(faces)


def embedding(surface: SimplicialComplex) -> Tensor:
    """Return the first (up to four) vertices in three dimensions, (m, 3) float64, with their true distances.

    The edges' R of a QR decomposition: the first vertex is the origin, the second on the first axis, and so on.
    """
    vertices = torch.stack([vertex.detach().cpu().double() for vertex in surface.vertices[:CORNERS]])
    edges = vertices[1:] - vertices[0]
    triangular = torch.linalg.qr(edges.mT, mode="r").R  # columns are the edges
    found = torch.zeros(len(vertices), 3, dtype=torch.float64)
    found[1:, : len(triangular)] = (triangular * triangular.diagonal().sign()[:, None]).mT
    return found


def picture(path: Path, surface: SimplicialComplex, loss: Tensor, steps: int, label: str, title: str) -> None:
    """Draw the faces of a simplex in 3-D with its true proportions, coloured by a value; a triangle's is its height.

    Args:
        path: File to write.
        surface: A simplex of 3 vertices or more; of 5 or more the first 4 are drawn.
        loss: At `picture_points`, (F M,).
        steps: Points along an edge.
        label: What the value is.
        title: Of the figure.
    """
    points, triangles = barycentric_grid(steps)
    corners, faces = embedding(surface), faces_of(surface.num_vertices)
    values = loss.view(len(faces), len(points)).cpu().numpy()
    norm = Normalize(float(values.min()), float(values.max()))
    flat = len(faces) == 1
    with plt.rc_context(plots.STYLE):
        figure = plt.figure(figsize=(7.6, 5.8), layout="constrained")
        axes: Any = figure.add_subplot(projection="3d")
        axes.computed_zorder = False  # names and edges are seen through the faces
        pieces, colors = [], []
        for face, value in zip(faces, values, strict=True):
            places = (points @ corners[list(face)]).numpy()
            if flat:
                places[:, 2] = value
            pieces.append(places[triangles.numpy()])
            colors.append(plt.get_cmap("viridis_r")(norm(value[triangles.numpy()].mean(1))))
        shades = np.concatenate(colors)
        shades[:, 3] = 1.0 if flat else 0.8
        axes.add_collection3d(Poly3DCollection(np.concatenate(pieces), facecolors=shades, edgecolors="none", zorder=2))
        shown = corners.numpy().copy()
        if flat:
            shown[:, 2] = values[0][points.argmax(0).numpy()]
        for i, j in combinations(range(len(shown)), 2):
            axes.plot(*shown[[i, j]].T, color="#333333", linewidth=0.8, alpha=0.6, zorder=3)
        axes.scatter(*shown.T, color="black", s=28, depthshade=False, zorder=4)
        for number, place in enumerate(shown):
            name = "network" if number == 0 else f"vertex {number}"
            axes.text(*place, f"{name}\n", fontsize=10, ha="center", va="bottom", zorder=5)
        for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
            axis.set_major_locator(MaxNLocator(4))
        axes.set_xlim(shown[:, 0].min(), shown[:, 0].max())
        axes.set_ylim(shown[:, 1].min(), shown[:, 1].max())
        low, high = (norm.vmin, norm.vmax) if flat else (shown[:, 2].min(), shown[:, 2].max())
        axes.set_zlim(low, high if high > low else low + 1e-9)
        if flat:
            axes.set_zticklabels([])  # the height is the colour's value
        else:
            axes.set_box_aspect(np.maximum(np.ptp(shown, axis=0), 0.15 * np.ptp(shown)), zoom=0.8)
            axes.set_zlabel("weights", labelpad=10)
        axes.set_xlabel("weights", labelpad=10)
        axes.set_ylabel("weights", labelpad=10)
        axes.set_title(title)
        figure.colorbar(ScalarMappable(norm, "viridis_r"), ax=axes, label=label, shrink=0.7, pad=0.08)
        plots._save(figure, path)


@torch.no_grad()
def decisions(path: Path, bench: Bench, shown: Mapping[str, Any]) -> None:
    """Draw the probability that the toy's second class has at each point of the plane, under every posterior.

    Args:
        path: File to write.
        bench: The toy.
        shown: By title: a posterior, or weight vectors (S, D).
    """
    axis = torch.linspace(-REACH, REACH, PIXELS)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    pixels = torch.stack([x, y], -1).view(-1, 2)
    inputs, targets = (tensor.cpu() for tensor in (bench.data.train.inputs, bench.data.train.targets))
    with plt.rc_context(plots.STYLE | {"axes.grid": False}):
        figure, panels = plots._axes(3.6 * len(shown), 3.9, ncols=len(shown), squeeze=False, sharex=True, sharey=True)
        for (title, weights), panel in zip(shown.items(), panels[0], strict=True):
            second = second_class(bench.model, weights, bench.layout, pixels, bench.settings).view(PIXELS, PIXELS)
            filled = panel.contourf(axis, axis, second, levels=np.linspace(0, 1, 21), cmap="RdBu_r", alpha=0.75)
            panel.contour(axis, axis, second, levels=[0.5], colors="black", linewidths=0.8)
            for label, color in enumerate(CLASSES):
                own = inputs[targets == label].view(-1, 2)
                panel.plot(own[:, 0], own[:, 1], ".", color=color, markersize=2.2, markeredgewidth=0)
            panel.set_aspect("equal")
            panel.set_xticks([])
            panel.set_yticks([])
            panel.set_title(title)
        figure.colorbar(filled, ax=panels, label="probability of the second spiral", shrink=0.8)
        plots._save(figure, path)


def second_class(model: nn.Module, weights: Any, layout: lb.ParameterLayout, pixels: Tensor, settings: Any) -> Tensor:
    """Return the averaged probability of the second class, (N,)."""
    number = settings.num_samples * settings.components
    generator = torch.Generator().manual_seed(settings.seed)
    found = lb.predict(
        model, weights, [pixels], number, layout=layout, generator=generator, progress=False, vectorize=False
    )
    return found.mean[:, 1].cpu()
