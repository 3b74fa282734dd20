"""One cell of a comparison: a method with a seed, fitted, evaluated, and kept as one file."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import lowrank_bdl as lb
from experiments.common import RunDir, fixed, replacing
from experiments.evaluation import Images, Predictions, detection_metrics, metrics_of, predict_splits
from experiments.uncertainty_methods import METHODS, Bench, Fitted
from experiments.uncertainty_plots import entropy_counts
from experiments.uncertainty_settings import Settings

REPORTED = "test"


@dataclass(frozen=True)
class ImageSets:
    """What every method predicts, by name.

    Attributes:
        labelled: Images of the network's classes; of these "validation" is for fitting alone.
        foreign: Images of other classes, whose predictions should be unsure.
    """

    labelled: Mapping[str, Images]
    foreign: Mapping[str, Images]

    @property
    def sizes(self) -> dict[str, int]:
        return {name: len(images) for name, images in (*self.labelled.items(), *self.foreign.items())}


def cell_file(method: str, seed: int, suffix: str = "json") -> str:
    return f"cells/{method}-{seed}.{suffix}"


def recipe_of(settings: Settings) -> dict[str, Any]:
    """Return what a cell's numbers depend on beside its method and seed."""
    return fixed(settings)


def finished_cell(settings: Settings, run: RunDir, method: str, seed: int) -> dict[str, Any] | None:
    """Return what an earlier part of this comparison found, if it did, its predictions included.

    Raises:
        SettingsError: If the file is damaged or of another recipe.
    """
    if settings.save_predictions and not (run.path / cell_file(method, seed, "npz")).exists():
        return None
    return run.read_cell(cell_file(method, seed), recipe_of(settings))


def predict(bench: Bench, fitted: Fitted, sets: ImageSets) -> tuple[dict[str, Predictions], dict[str, Any]]:
    """Predict every set with one set of weight samples; fit and apply the temperature of a calibrated method.

    Returns:
        The predictions, and the hyper-parameters found on the way.
    """
    found = predict_splits(
        fitted.run.model,
        fitted.weights,
        sets.labelled,
        bench.bn_images(fitted.run),
        foreign=sets.foreign,
        num_samples=bench.settings.num_samples,
        seed=bench.seed,
        layout=fitted.layout,
        dropout=fitted.dropout,
        progress=False,
    )
    if not fitted.calibrated:
        return found, {}
    held_out = found["validation"]
    scaling = lb.TemperatureScaling().fit(held_out.probabilities, held_out.targets)
    scaled = {name: predictions.rescaled(scaling) for name, predictions in found.items()}
    return scaled, {"temperature": scaling.temperature, **({} if scaling.converged else {"at_bound": True})}


def curve_of(predictions: Predictions) -> dict[str, list[float]]:
    """Reliability in 20 bins of equal mass (of few images in fewer, not under 5), as JSON."""
    assert predictions.targets is not None
    bins = min(20, max(5, len(predictions.targets) // 50))
    curve = lb.metrics.reliability_curve(predictions.probabilities, predictions.targets, bins, binning="mass")
    filled = curve.count > 0
    return {
        "confidence": curve.confidence[filled].tolist(),
        "accuracy": curve.accuracy[filled].tolist(),
        "count": curve.count[filled].tolist(),
    }


def run_cell(run: RunDir, bench: Bench, method: str, sets: ImageSets) -> dict[str, Any]:
    """Fit and evaluate one method with one seed, and write its cell."""
    settings, began = bench.settings, time.perf_counter()
    fitted = METHODS[method].fit(bench)
    fitting = time.perf_counter() - began
    predictions, found = predict(bench, fitted, sets)
    reported = predictions[REPORTED]
    cell = {
        "method": method,
        "seed": bench.seed,
        "recipe": recipe_of(settings),
        "epochs": fitted.epochs,
        "networks": fitted.networks(settings.num_samples),
        "parameters": fitted.layout.numel,
        "levels": {**fitted.levels, **found},
        "tried": [list(pair) for pair in fitted.tried],
        "details": dict(fitted.details),
        "metrics": {name: metrics_of(predictions[name], seed=bench.seed) for name in sets.labelled},
        "foreign": {name: detection_metrics(reported.entropy, predictions[name].entropy) for name in sets.foreign},
        "reliability": curve_of(reported),
        "entropy": {
            name: entropy_counts(predictions[name].entropy.cpu().numpy()).tolist() for name in (REPORTED, *sets.foreign)
        },
        "seconds": {"fit": fitting, "predict": time.perf_counter() - began - fitting},
    }
    if settings.save_predictions:
        save_predictions(run.path / cell_file(method, bench.seed, "npz"), predictions)
    run.write_json(cell_file(method, bench.seed), cell)
    run.log(method=method, seed=bench.seed, seconds=time.perf_counter() - began)
    return dict(json.loads(json.dumps(cell)))


def save_predictions(path: Path, predictions: Mapping[str, Predictions]) -> None:
    """Write probabilities (N, C), entropies (N,) [nats] and, where there are any, targets (N,) of each set."""
    arrays = {}
    for name, found in predictions.items():
        values = {"probabilities": found.probabilities, "entropy": found.entropy, "targets": found.targets}
        arrays |= {f"{name}/{key}": value.cpu().numpy() for key, value in values.items() if value is not None}
    with replacing(path) as file:
        np.savez_compressed(file, **arrays)
