"""What the weights of a training run predict: table, figures, results.json."""

import dataclasses
import time
from typing import Any

from torch import Tensor, nn

import lowrank_bdl as lb
from experiments import plots
from experiments.common import RunDir, format_table
from experiments.datasets import Datasets
from experiments.evaluation import Evaluation, evaluate_method
from experiments.train_settings import Settings, prior_std
from experiments.train_setup import network
from experiments.train_weights import FinalWeights, final_weights
from lowrank_bdl.posteriors.snapshots import WeightSnapshots
from lowrank_bdl.training import averages
from lowrank_bdl.training.trainer import Trainer
from lowrank_bdl.training.variational import MeanFieldModel

COLUMNS = {
    "accuracy": ("accuracy %", 100, 2),
    "nll": ("NLL", 1, 4),
    "ece": ("ECE %", 100, 2),
    "brier": ("Brier", 1, 4),
}


OF_SWAG = ("SWA", "SWAG-Diag", "SWAG", "Snapshots")


def weight_sources(settings: Settings, trainer: Trainer) -> dict[str, Any]:
    """Return what is compared, by name: weight vectors (D,) and posteriors; the last iterate comes first."""
    model = network(trainer)
    last = lb.ParameterLayout.from_module(model).flatten(model)
    if isinstance(trainer.model, MeanFieldModel):
        return {"mean": last, "MFVI": trainer.model.posterior()}
    found: dict[str, Any] = {settings.optimizer: last}
    swag = trainer.collections["swag"].collector if settings.swa else None
    if isinstance(swag, lb.SWAG):
        found["SWA"] = swag.mean
        found["SWAG-Diag"] = swag.posterior(scale=1.0, rank=0)
        if settings.rank:
            found["SWAG"] = swag.posterior(scale=settings.scale)
    snapshots = trainer.collections["snapshots"].collector if settings.snapshots else None
    if isinstance(snapshots, WeightSnapshots):
        found["Snapshots"] = snapshots.posterior()
    for name, key in (("EMA", "ema"), ("Polyak", "polyak")):
        if key in trainer.collections:
            found[name] = averages.weights(trainer.collections[key].collector)  # type: ignore[arg-type]
    return found


def layout_of(trainer: Trainer, name: str) -> lb.ParameterLayout | None:
    """Return what a method's weight vectors hold: with --include those of SWA and SWAG are shorter."""
    if name in OF_SWAG:
        layout: lb.ParameterLayout = trainer.collections["swag"].collector.layout  # type: ignore[attr-defined]
        return layout
    return None


def weights_of(trainer: Trainer, sources: dict[str, Any]) -> FinalWeights:
    """Return the weight vectors among what is compared, each of the whole network."""
    vectors = {name: weights for name, weights in sources.items() if isinstance(weights, Tensor)}
    return final_weights(network(trainer), vectors, {name: layout_of(trainer, name) for name in vectors})


def report(
    settings: Settings, run: RunDir, trainer: Trainer, data: Datasets, sources: dict[str, Any], bn_images: Any
) -> str:
    """Evaluate every method, draw the figures, write results.json; return the table."""
    began = time.perf_counter()
    splits = {name: split for name in ("validation", "test") if (split := getattr(data, name)) is not None}
    shown = "test" if "test" in splits else "validation"
    evaluations = {
        name: evaluate_method(
            network(trainer),
            weights,
            splits,
            bn_images,
            num_samples=settings.num_samples,
            seed=settings.seed,
            layout=layout_of(trainer, name),
        )
        for name, weights in sources.items()
    }
    draw_figures(settings, run, trainer, evaluations, shown)
    swag = trainer.collections["swag"].collector if settings.swa else None
    run.write_json(
        "results.json",
        {
            "schema": 1,
            "settings": dataclasses.asdict(settings),
            "images": {"train": len(data.train), **{name: len(split) for name, split in splits.items()}},
            "data": data.facts,
            "parameters": count_parameters(network(trainer)),
            "snapshots": swag.n_averaged if isinstance(swag, lb.SWAG) else 0,
            "prior_std": prior_std(settings, len(data.train)),
            "reported_on": shown,
            "methods": {name: evaluation.metrics for name, evaluation in evaluations.items()},
            "final_epoch": {key: trainer.history[-1][key] for key in ("epoch", "lr", "loss", "accuracy")},
            "seconds": {
                "train": sum(record["seconds"] for record in trainer.history),
                "evaluate": time.perf_counter() - began,
            },
        },
    )
    return table(settings, trainer, data, evaluations, shown)


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def draw_figures(
    settings: Settings, run: RunDir, trainer: Trainer, evaluations: dict[str, Evaluation], shown: str
) -> None:
    """Write the learning curves, of a variational run those of the NLL alone, and the reliability diagram."""
    curves_of = [{**record, "loss": record.get("nll", record["loss"])} for record in trainer.history]
    plots.training_curves(
        run.path / "training.png",
        {settings.model: (settings.optimizer, curves_of)},
        settings.swa_start if settings.swa else None,
        "test" if settings.use_test else "validation",
    )
    curves = {}
    for name, evaluation in evaluations.items():
        found = (evaluation.probabilities[shown], evaluation.targets[shown])
        curves[name] = plots.reliability_points(lb.metrics.reliability_curve(*found, num_bins=20, binning="mass"))
    ece = {name: evaluation.metrics[shown]["ece"] for name, evaluation in evaluations.items()}
    plots.reliability_diagram(run.path / "reliability.png", curves, ece, f"Reliability on the {shown} images")


def table(settings: Settings, trainer: Trainer, data: Datasets, evaluations: dict[str, Evaluation], shown: str) -> str:
    """Lay out the table; each number with its standard error."""
    rows = []
    for name, evaluation in evaluations.items():
        found = evaluation.metrics[shown]
        cells = [
            f"{factor * found[metric]:.{digits}f} ± {factor * found[f'{metric}_se']:.{digits}f}"
            for metric, (_, factor, digits) in COLUMNS.items()
        ]
        rows.append([name, *cells])
    count = len(next(iter(evaluations.values())).targets[shown])
    title = (
        f"{settings.model} ({count_parameters(network(trainer)):,} parameters) on {settings.dataset}: "
        f"{len(data.train):,} training images, {settings.epochs} epochs\n"
        f"{count:,} {shown} images, ± standard error; "
        f"{settings.num_samples} weight samples"
    )
    return f"{title}\n\n{format_table(['method', *(name for name, _, _ in COLUMNS.values())], rows)}"
