"""Table and results of `experiments.curve`: what happens to loss and error along each path."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from experiments.common import format_table
from experiments.curve_bench import Bench
from lowrank_bdl.surfaces.curves import Curve
from lowrank_bdl.surfaces.evaluation import PointValues

Values = Mapping[str, PointValues]


def measured(bench: Bench, values: Values) -> dict[str, Tensor]:
    """Return what is reported at every point of a path, each (T,): losses [nats], errors as fractions.

    The loss is the regularised one, as published: NLL and half of the weight decay times the squared norm.
    """
    train, test = values["train"], values[bench.shown]
    return {
        "train_loss": train.regularized(bench.weight_decay),
        "train_nll": train.loss,
        "train_error": train.error,
        "test_loss": test.regularized(bench.weight_decay),
        "test_nll": test.loss,
        "test_error": test.error,
    }


def statistics(path: Curve, t: Tensor, found: Tensor) -> dict[str, float]:
    """Return values at the ends, extremes, and means over t and over the length of the path."""
    return {
        "start": found[0].item(),
        "end": found[-1].item(),
        "min": found.min().item(),
        "max": found.max().item(),
        "argmax_t": t[found.argmax()].item(),
        "mean": (torch.trapezoid(found, t) / (t[-1] - t[0])).item(),
        "mean_by_length": path.arc_length_mean(t, found).item(),
        "barrier": (found.max() - found[[0, -1]].max()).item(),
    }


def results_of(bench: Bench, path: Curve, t: Tensor, values: Values) -> dict[str, Any]:
    """Return what results.json says about a path."""
    every = {name: statistics(path, t, found) for name, found in measured(bench, values).items()}
    distance = (path(1.0) - path(0.0)).norm().item()
    return {"length": path.length(), "distance": distance, "num_points": len(t), **every}


def table(bench: Bench, paths: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay out the table of the paper: smallest and largest value along each path, and means over its length."""
    header = [
        "path", "loss min", "max", "mean", "barrier", "train error % min", "max", f"{bench.shown} error % min", "max",
        "mean", "length",
    ]  # fmt: skip
    first = next(iter(paths.values()))
    rows = []
    for label, end in (("start alone", "start"), ("end alone", "end")):
        loss, train, test = (first[name][end] for name in ("train_loss", "train_error", "test_error"))
        rows.append([label, f"{loss:.4f}", "", "", "", f"{100 * train:.2f}", "", f"{100 * test:.2f}", "", "", ""])
    for name, found in paths.items():
        loss, train, test = (found[key] for key in ("train_loss", "train_error", "test_error"))
        numbers = [
            *(f"{loss[key]:.4f}" for key in ("min", "max", "mean_by_length", "barrier")),
            *(f"{100 * train[key]:.2f}" for key in ("min", "max")),
            *(f"{100 * test[key]:.2f}" for key in ("min", "max", "mean_by_length")),
            f"{found['length']:.2f}",
        ]
        rows.append([name, *numbers])
    count = {name: len(bench.split(name)) for name in ("train", bench.shown)}
    notes = [
        f"{bench.recipe.model} on {bench.data.name}: {first['num_points']} points of each path, {count['train']:,} "
        f"training and {count[bench.shown]:,} {bench.shown} images.",
        f"loss: NLL [nats] of the training images plus {bench.weight_decay:g}/2 times the squared norm. barrier: its "
        "largest value above that of the worse end. mean: over the length of the path.",
    ]
    return "\n".join(notes) + "\n\n" + format_table(header, rows)
