"""Tables of `experiments.simplex`: ensembles of simplexes against ensembles of networks, and the loss on simplexes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from experiments.common import format_table
from experiments.curve_bench import Bench
from experiments.evaluation import Predictions, classification_metrics
from lowrank_bdl.surfaces.evaluation import PointValues
from lowrank_bdl.surfaces.simplicial_complex import SimplicialComplex


def name_of(dimension: int) -> str:
    """Name an ensemble by what it has in place of every network."""
    return "deep ensemble" if dimension == 0 else f"{dimension}-simplex"


def averaged(parts: Sequence[Predictions], seed: int) -> dict[str, float]:
    """Measure the average of several predictions of the same images, each with the same weight."""
    likelihoods = [part.log_likelihood for part in parts if part.log_likelihood is not None]
    probabilities = torch.stack([part.probabilities.double().cpu() for part in parts]).mean(0)
    log_likelihood = torch.stack([each.double().cpu() for each in likelihoods]).logsumexp(0) - math.log(len(parts))
    assert parts[0].targets is not None
    return classification_metrics(probabilities, parts[0].targets.cpu(), log_likelihood, seed=seed)


def ensembles(
    found: Mapping[tuple[int, int], Predictions], num_samples: int, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Return the metrics of the first 1, 2, ... components together, for every dimension of the simplexes.

    Args:
        found: Predictions by (component, dimension).
        num_samples: Points of each simplex.
        seed: Of the resamples behind standard errors.
    """
    components = sorted({component for component, _ in found})
    result = {}
    for dimension in sorted({dimension for _, dimension in found}):
        result[name_of(dimension)] = [
            {
                "components": count,
                "networks": count * (num_samples if dimension else 1),
                **averaged([found[component, dimension] for component in components[:count]], seed),
            }
            for count in range(1, len(components) + 1)
        ]
    return result


def ensemble_table(found: Mapping[str, Sequence[Mapping[str, Any]]], shown: str) -> str:
    """Lay out error, NLL and calibration against the number of components."""
    rows = []
    for name, entries in found.items():
        for entry in entries:
            error, nll = 100 * (1 - entry["accuracy"]), entry["nll"]
            rows.append(
                [
                    name, str(entry["components"]), str(entry["networks"]),
                    f"{error:.2f} ± {100 * entry['accuracy_se']:.2f}", f"{nll:.4f} ± {entry['nll_se']:.4f}",
                    f"{entry['ece']:.4f}", f"{entry['brier']:.4f}",
                ]
            )  # fmt: skip
    header = ["ensemble of", "components", "networks", f"{shown} error %", "NLL", "ECE", "Brier"]
    return format_table(header, rows)


def points_of(bench: Bench, surface: SimplicialComplex, values: Mapping[str, PointValues]) -> dict[str, Any]:
    """Summarise what was measured at a complex's vertices and at random points of it.

    Args:
        bench: Gives the weight decay of the regularised loss, and the name of the images to test on.
        surface: The complex.
        values: At its m vertices, and at the random points below.
    """
    m = surface.num_vertices
    loss = values["train"].regularized(bench.weight_decay)
    error = values[bench.shown].error
    vertices = torch.stack([vertex.detach() for vertex in surface.vertices])
    edges = torch.pdist(vertices)
    return {
        "simplexes": [list(simplex) for simplex in surface.simplexes],
        "log_volume": surface.log_volume().item(),
        "edge_lengths": edges.tolist(),
        "vertices": {"train_loss": loss[:m].tolist(), "error": error[:m].tolist()},
        "points": {
            "number": len(loss) - m,
            "train_loss_mean": loss[m:].mean().item(),
            "train_loss_max": loss[m:].max().item(),
            "error_mean": error[m:].mean().item(),
            "error_max": error[m:].max().item(),
        },
    }


def point_table(found: Mapping[str, Mapping[str, Any]], between: Mapping[str, float] | None, shown: str) -> str:
    """Lay out training loss and test error at the vertices and at random points of every complex."""
    rows = []
    for name, entry in found.items():
        points, vertices, edges = entry["points"], entry["vertices"], entry["edge_lengths"] or [0.0]
        rows.append(
            [
                name, f"{len(vertices['error'])}", f"{max(vertices['train_loss']):.4f}",
                f"{points['train_loss_mean']:.4f}", f"{points['train_loss_max']:.4f}",
                f"{100 * max(vertices['error']):.2f}", f"{100 * points['error_mean']:.2f}",
                f"{100 * points['error_max']:.2f}", f"{sum(edges) / len(edges):.3g}", f"{entry['log_volume']:.2f}",
            ]
        )  # fmt: skip
    if between is not None:
        dashes = ["-"] * 2
        rows.append(
            ["midway, straight", "-", "-", f"{between['train_loss_mean']:.4f}", f"{between['train_loss_max']:.4f}", "-",
             f"{100 * between['error_mean']:.2f}", f"{100 * between['error_max']:.2f}", *dashes]
        )  # fmt: skip
    header = [
        "simplex", "vertices", "train loss, vertices max", "points mean", "max", f"{shown} error %, vertices max",
        "points mean", "max", "edge", "log volume",
    ]  # fmt: skip
    return format_table(header, rows)


def midway(bench: Bench, values: Mapping[str, PointValues]) -> dict[str, float]:
    """Summarise what was measured halfway between the networks on straight lines."""
    loss: Tensor = values["train"].regularized(bench.weight_decay)
    error = values[bench.shown].error
    return {
        "train_loss_mean": loss.mean().item(), "train_loss_max": loss.max().item(),
        "error_mean": error.mean().item(), "error_max": error.max().item(),
    }  # fmt: skip
