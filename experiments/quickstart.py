"""Train a small network, collect SWAG from its iterates, and compare four predictions.

SGD        the last iterate of a run whose learning rate decays to 1 %
SWA        the mean of the iterates of a second run, whose learning rate stays up
SWAG-Diag  a Gaussian around that mean with the iterates' variances (scale 1, rank 0)
SWAG       the same with the covariance of the last iterates as well (scale 0.5, rank 20)

Batch-norm statistics are recomputed from the training images for every set of weights. The test images are used for
the report alone; the default settings of digits and MNIST were chosen on the validation images. The shift AUROC says
how well predictive entropy tells test images turned by 90 degrees from upright ones.

Examples:
  python -m experiments.quickstart
  python -m experiments.quickstart --dataset MNIST --data_path DATA_DIR --dir runs/mnist
  python -m experiments.quickstart --dataset CIFAR10 --data_path DATA_DIR --dir runs/cifar10 --device cuda
  python -m experiments.quickstart --resume

Writes to --dir: posterior.safetensors, log.jsonl, five figures (*.png), results.json (last), settings.json,
environment.json, command.sh, checkpoint-*.safetensors
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lowrank_bdl as lb
from experiments import plots
from experiments.common import (
    RunDir,
    SettingsError,
    format_table,
    parse_settings,
    require_at_least,
    require_positive,
    resolve_device,
    run_script,
    setting,
)
from experiments.datasets import Datasets, load_dataset
from experiments.evaluation import (
    Evaluation,
    average_curve,
    describe_posterior,
    evaluate_method,
    losses_along_rays,
    rays,
    validate,
)
from experiments.models import SmallConvNet
from experiments.training_data import AsTrained, TrainingBatches
from lowrank_bdl.training import checkpoints, losses, schedules
from lowrank_bdl.training.collection import Collection
from lowrank_bdl.training.trainer import Trainer

PROG = "python -m experiments.quickstart"
METHODS = ("SGD", "SWA", "SWAG-Diag", "SWAG")
FIGURES = ("training", "reliability", "nll_against_samples", "covariance_spectrum", "principal_directions")
OUTPUTS = (
    "results.json",
    "log.jsonl",
    "posterior.safetensors",
    "checkpoint-sgd.safetensors",
    "checkpoint-swag.safetensors",
    *(f"{name}.png" for name in FIGURES),
)
# Never chosen on test images.
CHOSEN = {
    "digits": "lowest validation NLL of SWAG among 6 settings, seeds 0 to 2",
    "MNIST": "lowest validation NLL of SWAG among 6 settings, seed 0",
    "CIFAR10": "not chosen: close to the published settings of preactivation ResNets",
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": dict(
        epochs=150, train_size=200, batch_size=10, lr_init=0.1, swa_lr=0.05, wd=5e-4, collects_per_epoch=1, width=8,
        max_shift=1, flip=False, threads=1,
    ),
    "MNIST": dict(
        epochs=40, train_size=5000, batch_size=50, lr_init=0.1, swa_lr=0.03, wd=5e-4, collects_per_epoch=1, width=8,
        max_shift=2, flip=False, threads=1,
    ),
    "CIFAR10": dict(
        epochs=60, train_size=45_000, batch_size=128, lr_init=0.1, swa_lr=0.05, wd=5e-4, collects_per_epoch=1, width=32,
        max_shift=4, flip=True, threads=0,
    ),
}  # fmt: skip


def _by_dataset(name: str, what: str, **options: Any) -> Any:
    values = ", ".join(f"{dataset} {defaults[name]}" for dataset, defaults in DEFAULTS.items())
    return setting(None, f"{what} (default: {values})", **options)


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run does; None means the data set's default."""

    dir: str = setting("runs/quickstart", "folder to write to; an earlier run's files are replaced", free=True)
    dataset: str = setting("digits", f"data set: {', '.join(DEFAULTS)}; digits needs no files")
    data_path: str | None = setting(None, "folder with the files of MNIST or CIFAR10", kind=str, free=True)
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto takes CUDA where there is some", free=True)
    threads: int | None = _by_dataset("threads", "CPU threads, 0 for torch's choice", kind=int, free=True)
    epochs: int | None = _by_dataset("epochs", "epochs of each of the two runs", kind=int)
    swa_start: int | None = setting(
        None, "epochs before the first snapshot (default: half of the epochs)", kind=int, alias="--start"
    )
    collects_per_epoch: int | None = _by_dataset("collects_per_epoch", "snapshots in an epoch", kind=int)
    rank: int = setting(20, "deviations kept by SWAG; 0 keeps none")
    scale: float = setting(0.5, "multiplies SWAG's covariance; 0.5 is the published law")
    num_samples: int = setting(30, "weight samples in a model average")
    batch_size: int | None = _by_dataset("batch_size", "images in a training batch", kind=int)
    lr_init: float | None = _by_dataset("lr_init", "learning rate of the first epochs", kind=float)
    swa_lr: float | None = _by_dataset("swa_lr", "learning rate while snapshots are taken", kind=float)
    momentum: float = setting(0.9, "momentum of SGD")
    wd: float | None = _by_dataset("wd", "weight decay", kind=float)
    width: int | None = _by_dataset("width", "channels of the first convolution", kind=int)
    train_size: int | None = _by_dataset("train_size", "training images to use", kind=int)
    seed: int = setting(0, "seed of initial weights, order of the data and weight samples")
    resume: bool = setting(False, "go on with the run in --dir from its last finished epoch", free=True)


def check(settings: Settings) -> Settings:
    """Fill in the data set's defaults; refuse what cannot run."""
    if settings.dataset not in DEFAULTS:
        raise SettingsError(f"unknown data set {settings.dataset!r}; known are {', '.join(DEFAULTS)}")
    missing = {
        name: value for name, value in DEFAULTS[settings.dataset].items()
        if name not in ("max_shift", "flip") and getattr(settings, name) is None
    }  # fmt: skip
    settings = dataclasses.replace(settings, **missing)
    if settings.swa_start is None:
        settings = dataclasses.replace(settings, swa_start=max(1, settings.epochs // 2))
    at_least = dict(epochs=1, swa_start=0, rank=0, num_samples=1, batch_size=2, width=1, seed=0, collects_per_epoch=1,
                    threads=0, wd=0, momentum=0)  # fmt: skip
    require_at_least(settings, at_least)
    require_positive(settings, ("scale", "lr_init", "swa_lr"))
    if settings.epochs <= settings.swa_start:
        raise SettingsError(f"--epochs must be more than --swa_start; got {settings.epochs} and {settings.swa_start}")
    if (settings.epochs - settings.swa_start) * settings.collects_per_epoch < 2:
        raise SettingsError("SWAG needs at least 2 snapshots: more --epochs, or more --collects_per_epoch")
    return settings


def load_data(settings: Settings, data_path: str | None, device: torch.device) -> Datasets:
    """Load training, validation and test images."""
    limit = settings.train_size
    return load_dataset(settings.dataset, data_path, use_test=True, validation=True, train_limit=limit, device=device)


def new_model(settings: Settings, data: Datasets, device: torch.device) -> nn.Module:
    """Make the network with initial weights that depend on the seed alone."""
    torch.manual_seed(settings.seed)
    return SmallConvNet(data.channels, data.image_size, data.num_classes, settings.width).to(device)


def run_phase(
    settings: Settings,
    run: RunDir,
    data: Datasets,
    device: torch.device,
    phase: str,
    final_lr: float,
    horizon: int,
    collector: lb.SWAG | None = None,
) -> nn.Module:
    """Train one run, or finish it; return the network."""
    recipe = DEFAULTS[settings.dataset]
    model = new_model(settings, data, device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=settings.lr_init, momentum=settings.momentum, weight_decay=settings.wd
    )
    collections = {}
    if collector is not None:
        collections["swag"] = Collection(collector, settings.swa_start, per_epoch=settings.collects_per_epoch)
    trainer = Trainer(
        model,
        optimizer,
        schedule=schedules.SWAGLR(optimizer, swa_lr=final_lr, horizon=horizon),
        collections=collections,
        metrics={"accuracy": losses.accuracy},
        seed=settings.seed,
    )
    checkpoint = run.path / f"checkpoint-{phase}.safetensors"
    if checkpoint.exists():
        trainer.load(checkpoint)
    run.write_log([r for r in run.read_log() if r["phase"] != phase or r["epoch"] <= trainer.epoch])

    def after_epoch(trainer: Trainer, record: dict[str, Any]) -> dict[str, Any]:
        extra = {"held_out": validate(model, data.validation)}
        run.log(phase=phase, **record, **extra)
        return extra

    trainer.fit(
        lambda g: TrainingBatches(data, settings.batch_size, g, recipe["max_shift"], recipe["flip"]),
        settings.epochs,
        after_epoch=after_epoch,
        checkpoint=checkpoint,
        description=phase,
    )
    return model


def bn_images(settings: Settings, data: Datasets) -> AsTrained:
    """Return the images that batch norm is recalibrated on: augmented as they were trained on."""
    recipe = DEFAULTS[settings.dataset]
    return AsTrained(data.train, recipe["max_shift"], recipe["flip"], data.black)


def run_phases(settings: Settings, run: RunDir, data: Datasets, device: torch.device) -> tuple[nn.Module, Tensor, Any]:
    """Train both runs, or finish them; return the network, SGD's weights (D,) and the SWAG collector."""
    model = run_phase(settings, run, data, device, "sgd", 0.01 * settings.lr_init, settings.epochs)
    sgd = lb.ParameterLayout.from_module(model).flatten(model)
    swag = lb.SWAG(model, rank=settings.rank)
    model = run_phase(settings, run, data, device, "swag", settings.swa_lr, settings.swa_start, swag)
    return model, sgd, swag


def draw_figures(
    settings: Settings,
    run: RunDir,
    model: nn.Module,
    posterior: Any,
    evaluations: dict[str, Evaluation],
    data: Datasets,
) -> None:
    """Write the five figures."""
    ece = {name: evaluations[name].metrics["test"]["ece"] for name in METHODS}
    curves = {}
    for name, evaluation in evaluations.items():
        found = evaluation.probabilities["test"], evaluation.targets["test"]
        curves[name] = plots.reliability_points(lb.metrics.reliability_curve(*found, num_bins=20, binning="mass"))
    log = run.read_log()
    phases = {
        label: (method, [record for record in log if record["phase"] == phase])
        for phase, method, label in (("sgd", "SGD", "SGD"), ("swag", "SWAG", "SWAG's iterates"))
    }
    plots.training_curves(run.path / "training.png", phases, settings.swa_start, "validation")
    plots.reliability_diagram(run.path / "reliability.png", curves, ece)
    log_likelihood = {name: evaluation.sample_log_likelihood["test"] for name, evaluation in evaluations.items()}
    plots.nll_against_samples(
        run.path / "nll_against_samples.png",
        {name: average_curve(log_likelihood[name], settings.seed) for name in ("SWAG-Diag", "SWAG")},
        {name: evaluations[name].metrics["test"]["nll"] for name in ("SGD", "SWA")},
    )
    covariance = posterior.covariance
    rank = covariance.rank
    plots.covariance_spectrum(
        run.path / "covariance_spectrum.png",
        covariance.principal_components(max(rank, 1), of="full")[0].cpu().numpy(),
        covariance.principal_components(rank, of="low_rank")[0].cpu().numpy(),
        covariance.diag.cpu().numpy(),
    )
    units, stddevs, names = rays(posterior, settings.seed)
    steps = np.linspace(-6, 6, 25)
    limit = 2000  # images; a smooth picture needs no more
    few = {"train": data.train.first(limit), "test": data.test.first(limit)}
    along = losses_along_rays(model, posterior, units, stddevs, steps, few, bn_images(settings, data).first(limit))
    plots.loss_along_directions(
        run.path / "principal_directions.png", steps, along["train"], along["test"], stddevs, names
    )


def report(settings: Settings, evaluations: dict[str, Evaluation], posteriors: dict[str, Any], data: Datasets) -> str:
    """Lay out the two tables."""
    rows = []
    for name, evaluation in evaluations.items():
        found = evaluation.metrics["test"]
        cells = [f"{100 * found['accuracy']:.2f}", f"{found['nll']:.4f}", f"{100 * found['ece']:.2f}"]
        rows.append([name, *cells, f"{found['brier']:.4f}", f"{found['shift_auroc']:.4f}"])
    first = format_table(["method", "accuracy %", "NLL", "ECE %", "Brier", "shift AUROC"], rows)
    rows = [
        [
            name,
            f"{found['parameters']:,}",
            str(found["rank"]),
            f"{found['entropy_nats']:,.1f}",
            f"{found['log_density_at_mean_nats']:,.1f}",
            f"{found['log_density_of_draws_nats']:,.1f}",
            f"{found['peak_bytes'] / 2**20:.1f}",
        ]
        for name, found in posteriors.items()
    ]
    header = ["posterior", "parameters", "rank", "entropy", "log p(mean)", "log p(draws)", "peak MiB"]
    title = f"{data.name}: " + ", ".join(
        f"{len(split):,} {name}"
        for name, split in (("training", data.train), ("validation", data.validation), ("test images", data.test))
    )
    note = (
        f"test images; {settings.num_samples} weight samples; NLL in nats, entropy and log-density in nats over all "
        f"parameters; peak: drawing {settings.num_samples} samples, their log-density, and the entropy"
    )
    return f"{title}\n\n{first}\n\n{format_table(header, rows)}\n\n{note}"


def experiment(settings: Settings, data: Datasets, run: RunDir, device: torch.device) -> str:
    """Train, evaluate, draw, and write results.json last; return the tables."""
    began = time.perf_counter()
    model, sgd, swag = run_phases(settings, run, data, device)
    trained = time.perf_counter()
    sources = {
        "SGD": sgd,
        "SWA": swag.mean,
        "SWAG-Diag": swag.posterior(scale=1.0, rank=0),
        "SWAG": swag.posterior(scale=settings.scale),
    }
    posterior = sources["SWAG"]
    posterior.save(run.path / "posterior.safetensors")
    draws = {"num_samples": settings.num_samples, "seed": settings.seed}
    splits = {"validation": data.validation, "test": data.test, "shifted": data.test.rotated()}
    evaluations = {
        name: evaluate_method(model, weights, splits, bn_images(settings, data), **draws)
        for name, weights in sources.items()
    }
    for evaluation in evaluations.values():  # how well predictive entropy tells shifted from test images
        entropy = evaluation.entropy
        evaluation.metrics["test"]["shift_auroc"] = lb.metrics.auroc(entropy["test"], entropy["shifted"])
    posteriors = {name: describe_posterior(sources[name], **draws) for name in ("SWAG-Diag", "SWAG")}
    evaluated = time.perf_counter()
    draw_figures(settings, run, model, posterior, evaluations, data)
    seconds = {
        "train": trained - began,
        "evaluate": evaluated - trained,
        "figures": time.perf_counter() - evaluated,
    }
    run.write_json(
        "results.json",
        {
            "schema": 1,
            "settings": dataclasses.asdict(settings),
            "defaults_chosen_by": CHOSEN[settings.dataset],
            "images": {"train": len(data.train), "validation": len(data.validation), "test": len(data.test)},
            "snapshots": int(swag.n_averaged),
            "methods": {name: evaluation.metrics for name, evaluation in evaluations.items()},
            "posteriors": posteriors,
            "seconds": seconds,
        },
    )
    return report(settings, evaluations, posteriors, data)


def work(settings: Settings) -> str:
    """Check everything, then run the experiment; return what to print."""
    device = resolve_device(settings.device)
    data = load_data(settings, settings.data_path, device)
    run = RunDir(settings, OUTPUTS, device)
    for checkpoint in run.path.glob("checkpoint-*.safetensors") if settings.resume else ():
        checkpoints.read(checkpoint)  # a damaged one is refused before anything is written
    run.begin()
    return f"{experiment(settings, data, run, device)}\n\nwritten to {run.path}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    settings = parse_settings(Settings, argv, prog=PROG, description=__doc__, check=check)
    return run_script(PROG, lambda: work(settings), threads=settings.threads)


if __name__ == "__main__":
    sys.exit(main())
